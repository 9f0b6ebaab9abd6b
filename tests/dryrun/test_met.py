"""What dry runs take for granted of a version is what the installed version says."""

import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from bigkit import dry_run
from bigkit.dryrun.met import NEVER, NO_OTHER, RULES, VERSIONS, rules_text
from bigkit.dryrun.run import on_machine
from bigkit.machine import allocator
from bigkit.machine.hardware import machine_of
from bigkit.machine.ledger import Calibration


def test_the_allocators_sizes_are_those_of_this_pytorch():
    """Its C++ headers come with the wheel."""
    header = Path(torch.__file__).parent / "include" / "c10" / "core" / "AllocatorConfig.h"
    if not header.exists():
        pytest.skip("this build of PyTorch comes without headers")
    text = header.read_text()
    said = {name: int(value) for name, value in re.findall(r"constexpr size_t (k\w+) = (\d+);", text)}
    [large] = re.findall(r"large_segment_size_\{(\d+)\}", text)
    assert said == {
        "kSmallBuffer": allocator.SMALL_SEGMENT, "kMinBlockSize": allocator.ROUND, "kSmallSize": allocator.SMALL,
        "kMinLargeAlloc": allocator.MEDIUM, "kRoundLarge": allocator.ROUND_LARGE,
    }  # fmt: skip
    assert int(large) == allocator.MEDIUM_SEGMENT


def test_what_was_never_compared_is_said():
    never = [rule.what for rule in RULES if rule.compared == NEVER]
    assert len(never) == 2 and all("other GPUs" in what for what in never)
    assert all(rule.what in rules_text() and rule.source for rule in RULES)


@pytest.mark.parametrize(
    "hardware, torch_there, transformers_there, met",
    [
        ("H200", "2.11.0+cu130", "5.17.0", True),
        ("T4", "2.11.0+cu130", "5.17.0", False),
        ("H200", "2.15.0", "5.17.0", False),
        ("H200", "2.11.1", "5.23.0", False),
        ("H200", "2.11.1", None, False),
    ],
)
def test_a_dry_run_says_if_its_gpu_or_its_versions_were_never_met(
    monkeypatch, hardware, torch_there, transformers_there, met
):
    def version(library):
        if (found := {"torch": torch_there, "transformers": transformers_there}[library]) is None:
            raise PackageNotFoundError(library)
        return found

    monkeypatch.setattr("bigkit.dryrun.met.version", version)
    run = dry_run("pygpt", None, 1, 4, 0, hardware)
    assert (NO_OTHER in run.notes) != met and (NO_OTHER in str(run)) != met
    other = on_machine(run, machine_of("H200" if hardware == "T4" else "T4"))
    assert other is None or (NO_OTHER in other.notes) == (hardware == "H200")


def test_the_docs_name_the_versions_and_gpus_that_were_met():
    said = (Path(__file__).parents[2] / "benchmarks" / "README.md").read_text()
    [paragraph] = [part for part in said.split("\n\n") if "No other GPU and no other version" in part]
    assert all(name in paragraph for name in ("H200", *VERSIONS.values()))
    assert all(name in NO_OTHER for name in ("H200", *VERSIONS.values()))


def test_a_machine_measured_with_another_pytorch_is_said():
    own = ".".join(torch.__version__.split(".")[:2])
    for version, said in (("1.0.1+cu130", f"with PyTorch 1.0; this run does what {own} does"), (torch.__version__, "")):
        calibration = Calibration("there", kernel=1e-6, versions={"torch": version})
        notes = " ".join(dry_run("pygpt", None, 1, 4, 0, "T4", calibration=calibration).notes)
        assert said in notes and ("this run does" in notes) == bool(said)
