"""What dry runs take for granted of a version is what the installed version says."""

import re
from pathlib import Path

import pytest
import torch

from bigkit import dry_run
from bigkit.dryrun.met import NEVER, RULES, rules_text
from bigkit.machine import allocator
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


def test_a_machine_measured_with_another_pytorch_is_said():
    own = ".".join(torch.__version__.split(".")[:2])
    for version, said in (("1.0.1+cu130", f"with PyTorch 1.0; this run does what {own} does"), (torch.__version__, "")):
        calibration = Calibration("there", kernel=1e-6, versions={"torch": version})
        notes = " ".join(dry_run("pygpt", None, 1, 4, 0, "T4", calibration=calibration).notes)
        assert said in notes and ("PyTorch" in notes) == bool(said)
