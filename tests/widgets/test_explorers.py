"""Explorers answer when their controls are turned: plan, picture, text twin, verdict, `repr`, code and export."""

from __future__ import annotations

import base64
import re
import runpy
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import ipywidgets as widgets
import pytest
from IPython.core.formatters import DisplayFormatter

from bigkit import HARDWARE, Plan, describe, plan
from bigkit.widgets import FitExplorer, PlanExplorer, ShardExplorer
from bigkit.widgets._controls import TOKENS
from bigkit.widgets._explorer import LONGEST_REPR, Explorer

ROOT = Path(__file__).resolve().parent.parent.parent
GIB = 2**30
PATH = "{http://www.w3.org/2000/svg}path"
SMALL = {0: "300MiB", 1: "300MiB"}


def looks(explorer: Explorer) -> tuple[str, str, str, str]:
    return explorer.picture.value, explorer.text.value, explorer.verdict.value, repr(explorer)


def tree(widget: widgets.Widget) -> list[widgets.Widget]:
    """A widget and all those inside it."""
    return [widget, *(inner for child in getattr(widget, "children", ()) for inner in tree(child))]


def press(explorer: Explorer, name: str) -> None:
    next(button for button in explorer.buttons.children if button.description == name).click()


def classes(explorer: Explorer) -> list[str]:
    """The CSS classes of every widget in the tree."""
    return sorted(name for widget in tree(explorer) for name in widget._dom_classes if name.startswith("bigkit"))


# ---------------------------------------------------------------------------------------------------------------------
# What both share


@pytest.mark.parametrize("make", [lambda: PlanExplorer("gpt2", SMALL), lambda: FitExplorer("gpt2")])
def test_something_shows_before_anything_is_touched(make: type[Explorer]) -> None:
    explorer = make()
    svg = ElementTree.fromstring(explorer.picture.value)
    assert svg.get("role") == "img" and "gpt2" in (svg.get("aria-label") or "")
    assert "gpt2" in explorer.text.value and 'role="status"' in explorer.verdict.value
    assert explorer.error.value == ""
    agreed = {"bigkit-explorer", "bigkit-picture", "bigkit-text", "bigkit-verdict", "bigkit-error"}
    assert agreed <= {*classes(explorer)}
    assert not [widget for widget in tree(explorer) if isinstance(widget, widgets.Output)]


@pytest.mark.parametrize("make", [lambda: PlanExplorer("gpt2", SMALL), lambda: FitExplorer("gpt2")])
def test_reset_brings_back_what_was_there(make: type[Explorer]) -> None:
    explorer = make()
    before = looks(explorer)
    explorer.model.value = "bert-base-cased"
    explorer.batch.value = 8
    explorer.context.value = 16384
    assert looks(explorer) != before
    press(explorer, "Reset")
    assert looks(explorer) == before


@pytest.mark.parametrize("name", ["no-such-model", "", "https://example.org/model", "/no/such/folder"])
@pytest.mark.parametrize("make", [lambda: PlanExplorer("gpt2", SMALL), lambda: FitExplorer("gpt2")])
def test_a_bad_name_is_one_sentence_and_the_last_picture_stays(make: type[Explorer], name: str) -> None:
    explorer = make()
    before = looks(explorer)
    explorer.model.value = name
    assert 'role="alert"' in explorer.error.value
    said = re.sub("<[^>]+>", "", explorer.error.value)
    assert "Traceback" not in said and said.endswith(".") and len(said) < 300
    assert looks(explorer) == before
    explorer.model.value = "gpt2"
    assert explorer.error.value == "" and looks(explorer) == before


@pytest.mark.parametrize("kind", [PlanExplorer, FitExplorer])
def test_a_bad_name_from_the_start_can_be_corrected(kind: type[Explorer]) -> None:
    explorer = kind("no-such-model")
    assert 'role="alert"' in explorer.error.value and "yet" in repr(explorer)
    press(explorer, "Code")  # there is no code to show, and no traceback either
    with pytest.raises(ValueError, match="give the explorer a model"):
        explorer.to_code()
    explorer.model.value = "gpt2"
    assert explorer.error.value == "" and "gpt2" in repr(explorer) and "<svg" in explorer.picture.value


def test_a_cell_stores_a_still_picture_beside_the_live_view() -> None:
    explorer = PlanExplorer("gpt2", SMALL)
    data, _ = DisplayFormatter().format(explorer)
    assert set(data) == {"text/plain", "text/html", "application/vnd.jupyter.widget-view+json"}
    assert data["text/plain"] == repr(explorer)
    image = ElementTree.fromstring(data["text/html"].replace(">", "/>"))
    picture = ElementTree.fromstring(explorer.picture.value)
    assert image.tag == "img" and image.get("alt") == picture.get("aria-label")
    still = ElementTree.fromstring(base64.b64decode(image.get("src", "").partition(",")[2]))
    assert still.get("aria-label") == picture.get("aria-label")
    assert [path.get("d") for path in still.iter(PATH)] == [path.get("d") for path in picture.iter(PATH)]
    empty, _ = DisplayFormatter().format(PlanExplorer("no-such-model"))
    assert "text/html" not in empty


def test_together_computes_once() -> None:
    explorer = PlanExplorer("gpt2", SMALL)
    count = counting(explorer)
    with explorer.together():
        explorer.batch.value = 2
        explorer.context.value = 128
        explorer.gpus[0].value = 1
    assert count == [1]
    with explorer.together():
        pass
    assert count == [1]


def counting(explorer: Explorer) -> list[int]:
    """A list whose only element counts the calls of `compute` from now on."""
    count, compute = [0], explorer.compute

    def counted() -> object:
        count[0] += 1
        return compute()

    explorer.compute = counted  # type: ignore[method-assign]
    return count


# ---------------------------------------------------------------------------------------------------------------------
# PlanExplorer


def test_plan_is_what_plan_gives() -> None:
    budgets = {0: "10GiB", 1: "10GiB", "disk": "100GiB"}
    explorer = PlanExplorer("llama-2-7b", budgets, dtype="float16", context=2048, strategy="balanced")
    expected = plan("llama-2-7b", budgets, "balanced", dtype="float16", context=2048)
    assert explorer.plan == expected
    assert explorer.device_map == expected.device_map
    assert str(expected) == expected.explain()


def test_machines_of_the_menu() -> None:
    explorer = PlanExplorer("llama-2-7b", "4 x L4")
    assert len(explorer.gpus) == 4 and explorer.hardware.value == "4 x L4"
    for name, machine in HARDWARE.items():
        explorer.hardware.value = name
        assert explorer.hardware.value == name and explorer.error.value == ""
        assert len(explorer.gpus) == len(machine.gpus)
        for device, budget in machine.max_memory().items():
            shown = explorer.max_memory[device]
            assert budget - GIB < shown <= budget, "rounded down to a step of the control, never up"


def test_a_machine_is_one_computation_and_budgets_name_it() -> None:
    explorer = PlanExplorer("llama-2-7b")
    count = counting(explorer)
    explorer.hardware.value = "8 x A100-80GB"
    assert count == [1]
    explorer.gpus[0].value = 60
    assert explorer.hardware.value == "my own budgets"
    explorer.gpus[0].value = 80
    assert explorer.hardware.value == "8 x A100-80GB"
    assert count == [3]


def test_turning_each_control() -> None:
    explorer = PlanExplorer("llama-2-7b", {0: "10GiB", 1: "10GiB", "cpu": "64GiB"}, dtype="float16")
    explorer.count.value = 3
    for control, value in (
        (explorer.gpus[0], 4), (explorer.dtype, "float32"), (explorer.quantization, "nf4"), (explorer.batch, 4),
        (explorer.context, 16384), (explorer.strategy, "sequential"), (explorer.gpus[2], 2), (explorer.ram, 1),
        (explorer.disk, 3), (explorer.overhead, 100), (explorer.model, "llama-2-70b"),
    ):  # fmt: skip
        before = looks(explorer)
        control.value = value
        assert explorer.error.value == ""
        changed = [one != other for one, other in zip(looks(explorer), before)]
        assert changed[0] and changed[1], f"picture and text follow {control.description}"
    assert explorer.max_memory == {0: 4 * GIB, 1: 10 * GIB, 2: 2 * GIB, "cpu": GIB, "disk": 3 * GIB}
    assert explorer.plan.model == "llama-2-70b" and explorer.plan.strategy == "sequential"


def test_repr_follows_the_smallest_turn_of_every_gpu() -> None:
    explorer = PlanExplorer("llama-3.1-405b", "8 x A100-80GB")
    for slider in explorer.gpus:
        before = repr(explorer)
        slider.value -= slider.step
        assert repr(explorer) != before
        slider.value += slider.step
        assert repr(explorer) == before


def test_reprs_are_short() -> None:
    explorer = PlanExplorer("idefics-80b-instruct", dict.fromkeys(range(16), "24GiB"), quantization="nf4-double")
    for name in ("vit_base_patch16_224.augreg_in21k_ft_in1k", "llama-3.1-405b", "deepseek-v3", "gpt2"):
        explorer.model.value = name
        for strategy in ("balanced_low_0", "exact"):
            explorer.strategy.value = strategy
            assert len(repr(explorer)) <= LONGEST_REPR, repr(explorer)
    memory = FitExplorer("vit_base_patch16_224.augreg_in21k_ft_in1k", context=2**20, batch=4096)
    assert len(repr(memory)) <= LONGEST_REPR


def test_too_small_a_budget_shows_the_plan_that_comes_closest_and_a_cure() -> None:
    explorer = PlanExplorer("llama-2-7b", {0: "10GiB", "disk": 0}, dtype="float16")
    assert isinstance(explorer.plan, Plan) and not explorer.plan.feasible
    assert explorer.error.value == "" and "does not fit" in repr(explorer)
    assert "Does not fit." in explorer.verdict.value and "It would fit with" in explorer.verdict.value
    assert "does not fit" in explorer.picture.value
    explorer.quantization.value = "nf4"
    assert explorer.plan.feasible and "Fits." in explorer.verdict.value


def test_offloading_is_said() -> None:
    explorer = PlanExplorer("llama-2-7b", {0: "10GiB", "cpu": "64GiB"}, dtype="float16")
    assert "Fits, offloaded." in explorer.verdict.value and "rest in RAM" in explorer.verdict.value
    assert "offloads" in repr(explorer)


def test_exact_looks_for_the_longest_context() -> None:
    explorer = PlanExplorer("llama-2-7b", {0: "10GiB", 1: "8GiB"}, dtype="float16", strategy="exact", context=0)
    longest = explorer.plan.context
    assert longest > 0 and f"{longest:,}" in explorer.verdict.value
    explorer.gpus[1].value = 9
    assert explorer.plan.context > longest


def test_gpus_come_and_go() -> None:
    explorer = PlanExplorer("gpt2", {0: "2GiB"})
    first = explorer.gpus[0]
    for count in (3, 0, 16, 1):
        explorer.count.value = count
        assert len(explorer.gpus) == count == classes(explorer).count("bigkit-gpu-slider")
        assert explorer.error.value == ""
        assert [share.budget for share in explorer.plan.shares if isinstance(share.device, int)] == [2 * GIB] * count
    assert explorer.gpus[0] is first


def test_tiny_budgets_have_fine_sliders() -> None:
    explorer = PlanExplorer("gpt2", SMALL)
    assert explorer.max_memory == {0: 300 * 2**20, 1: 300 * 2**20, "disk": 2**40}
    assert explorer.plan == plan("gpt2", {**SMALL, "disk": "1TiB"}, dtype="bfloat16", context=4096)
    assert explorer.gpus[0].step < 0.01 and explorer.gpus[0].max == 4


def test_any_context_can_be_given() -> None:
    assert list(TOKENS) == sorted(set(TOKENS)) and TOKENS[-1] == 2**20
    explorer = PlanExplorer("gpt2", SMALL, context=1000)
    assert explorer.plan.context == 1000
    explorer.context.value = 0
    assert explorer.plan.context == 0


def test_bad_arguments_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="unknown hardware '3 x PS5': no name is close to it"):
        PlanExplorer("gpt2", "3 x PS5")
    assert PlanExplorer("gpt2", "4090").machine is HARDWARE["1 x RTX 4090"]
    assert len(PlanExplorer("gpt2", "3xL4").gpus) == 3
    with pytest.raises(ValueError, match="GPUs 0, 1"):
        PlanExplorer("gpt2", {1: "1GiB"})
    with pytest.raises(ValueError, match="ambiguous"):
        PlanExplorer("gpt2", {0: "1Gb"})
    with pytest.raises(ValueError, match="unknown strategy 'best': expected one of 'auto'"):
        PlanExplorer("gpt2", SMALL, strategy="best")


def test_a_spec_can_be_given_instead_of_a_name() -> None:
    spec = describe("gpt2").renamed("my model")
    explorer = PlanExplorer(spec, SMALL)
    assert explorer.model.value == "my model" and explorer.plan.model == "my model"
    assert FitExplorer(spec).advice.model == "my model"


def test_code_makes_the_same_plan() -> None:
    explorer = PlanExplorer("llama-2-7b", "2 x RTX 4090", quantization="int8", strategy="exact", batch=2)
    names: dict[str, object] = {}
    exec(explorer.to_code(), names)
    assert names["p"] == explorer.plan
    assert names["device_map"] == explorer.device_map


def test_panes_follow_the_plan_when_they_are_open() -> None:
    explorer = PlanExplorer("gpt2", SMALL)
    panes = explorer.panes
    assert all(pane.value == "" for pane in panes.children if pane is not explorer.text)
    for i, inside in enumerate(("Every device is within its budget", "<table", "<textarea", "download=")):
        panes.selected_index = i
        assert inside in panes.children[i].value
    panes.selected_index = 1
    before = panes.children[1].value
    explorer.gpus[0].value = 4
    assert panes.children[1].value != before
    press(explorer, "Code")
    assert panes.get_title(panes.selected_index) == "Code"
    press(explorer, "Export")
    assert panes.get_title(panes.selected_index) == "Export"
    links = re.findall(r'download="([^"]+)" href="data:([^;]+);base64,([^"]+)"', panes.children[3].value)
    assert [(name, kind) for name, kind, _ in links] == [
        ("bigkit-plan.json", "application/json"), ("bigkit-plan.svg", "image/svg+xml")
    ]  # fmt: skip
    assert Plan.from_json(base64.b64decode(links[0][2]).decode()) == explorer.plan
    assert base64.b64decode(links[1][2]).decode() == explorer.picture.value


def test_export(tmp_path: Path) -> None:
    explorer = PlanExplorer("gpt2", SMALL)
    assert Plan.from_json(explorer.export(tmp_path / "plan.json").read_text()) == explorer.plan
    assert ElementTree.parse(explorer.export(str(tmp_path / "plan.svg"))).getroot().get("role") == "img"
    with pytest.raises(ValueError, match=r"'plan\.png': expected a name that ends in \.json or \.svg"):
        explorer.export(tmp_path / "plan.png")


EVIL = "<script>alert('1')</script> & \"quotes\" $x$"


def evil_explorers() -> Iterator[Explorer]:
    """Explorers of a model whose name and layers would be markup if they were not escaped."""
    from torch import nn

    module = nn.Sequential()
    module.add_module(EVIL, nn.Linear(8, 8))
    spec = describe(module).renamed(EVIL)
    for kind in (PlanExplorer, ShardExplorer, FitExplorer):
        yield kind(spec)
    yield PlanExplorer(EVIL)  # an error that quotes the name
    yield ShardExplorer("gpt2", find=EVIL)


def test_names_are_escaped_everywhere() -> None:
    for explorer in evil_explorers():
        for i in range(len(explorer.panes.children)):
            explorer.panes.selected_index = i
        pieces = [widget.value for widget in tree(explorer) if isinstance(widget, widgets.HTML)]
        assert any("&lt;script&gt;" in piece for piece in pieces)
        assert not any("<script" in piece or "&lt;script>" in piece for piece in pieces), explorer
        if explorer.picture.value:
            ElementTree.fromstring(explorer.picture.value)


def test_a_machine_has_one_overhead() -> None:
    """The explorer, `bigkit plan --hardware` and the other explorers leave the same bytes of each GPU."""
    machine = HARDWARE["2 x RTX 4090"]
    explorer = PlanExplorer("llama-2-7b", "2 x RTX 4090")
    assert explorer.plan.shares[0].overhead == machine.overhead and explorer.max_memory == machine.max_memory()
    explorer.hardware.value = "4 x L4"
    assert explorer.plan.shares[0].overhead == HARDWARE["4 x L4"].overhead
    explorer.ram.value += 1
    assert 0 <= explorer.plan.shares[0].overhead - HARDWARE["4 x L4"].overhead < 2**20, "the control counts whole MiB"
    assert PlanExplorer("llama-2-7b", "4 x L4", overhead=0).plan.shares[0].overhead == 0
    assert PlanExplorer("llama-2-7b", {0: "20GiB"}).plan.shares[0].overhead == 0


def test_the_picture_of_the_readme_is_what_is_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "draw_readme.py"))
    monkeypatch.setitem(script["main"].__globals__, "PATH", tmp_path / "moving.svg")
    script["main"]()
    assert (tmp_path / "moving.svg").read_text() == (ROOT / "notebooks" / "images" / "moving.svg").read_text()


# ---------------------------------------------------------------------------------------------------------------------


def test_shipped_models_are_explored_without_torch() -> None:
    code = (
        "import sys\nfrom bigkit.widgets import FitExplorer, PlanExplorer\n"
        "PlanExplorer(), FitExplorer()\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_time_of_a_turn(capsys: pytest.CaptureFixture[str]) -> None:
    explorer = PlanExplorer("llama-3.1-405b", "8 x A100-80GB")
    times = []
    for i in range(1, 8):
        start = time.perf_counter()
        explorer.gpus[0].value = 80 - i
        times.append(1000 * (time.perf_counter() - start))
    with capsys.disabled():
        print(f"\n  llama-3.1-405b on 8 GPUs planned and drawn again in {statistics.median(times):.0f} ms (median)")
    assert explorer.gpus[0].value == 73 and explorer.plan.budget[0] == 73 * GIB
