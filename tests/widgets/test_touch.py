"""What follows from a hand in the picture, and from a line of text: the kernel's side, with anywidget and without."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

import ipywidgets as widgets
import pytest

from bigkit import plan
from bigkit.draw.plan import moved, plan_differences
from bigkit.widgets import ExpertExplorer, HookTheatre, PlanExplorer, ShardExplorer, SplitExplorer
from bigkit.widgets import _picture as picture_file
from bigkit.widgets._controls import Number
from bigkit.widgets._explorer import Explorer

BUDGETS = {0: "10GiB", 1: "10GiB", "cpu": "32GiB"}


@pytest.fixture(params=["anywidget", "plain HTML"])
def explorer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> PlanExplorer:
    """Two GPUs of 10 GiB; layers 0 to 18 rest on the first, the others on the second."""
    if request.param == "plain HTML":
        monkeypatch.setattr(picture_file, "Touched", None)
    made = PlanExplorer("llama-2-7b", BUDGETS, dtype="float16")
    assert isinstance(made.picture, widgets.HTML) == (request.param == "plain HTML")
    return made


def hand(explorer: Explorer, **content: object) -> None:
    """What the front end sends when a hand does something."""
    explorer.picture._handle_custom_msg(content, [])


def marks(explorer: Explorer) -> dict[str, ElementTree.Element]:
    """Key -> mark of the picture."""
    found = ElementTree.fromstring(explorer.picture.value).iter("{http://www.w3.org/2000/svg}rect")
    return {mark.get("data-key", ""): mark for mark in found}


def says(explorer: Explorer, key: str) -> str:
    return marks(explorer)[key][0].text or ""


def first_of(explorer: PlanExplorer, device: object) -> int:
    return next(i for i, layer in enumerate(explorer.plan.layers) if layer.device == device)


# ---------------------------------------------------------------------------------------------------------------------
# Plans


def test_marks_say_name_class_bytes_where_and_why(explorer: PlanExplorer) -> None:
    cut = first_of(explorer, 1)
    assert says(explorer, "layer:3").startswith(
        "model.layers.2 (LlamaDecoderLayer), 386.02 MiB, rests on GPU 0 and works there."
    )
    assert explorer.plan.shares[0].why in says(explorer, "layer:3")
    assert says(explorer, "device:0").startswith("GPU 0: ") and "% full" in says(explorer, "device:0")
    assert f"GPU 1 from {explorer.plan.layers[cut].name} on" in says(explorer, f"boundary:{cut}")
    assert "device:cpu" in marks(explorer), "also where nothing rests yet"


def test_a_dragged_layer_is_a_map_of_ones_own(explorer: PlanExplorer) -> None:
    before = explorer.plan
    explorer.drag("layer:3", "device:1")
    expected = {layer.name: layer.device for layer in before.layers} | {before.layers[3].name: 1}
    context = {"dtype": "float16", "context": 4096}
    assert explorer.plan == plan("llama-2-7b", explorer.max_memory, expected, **context)
    assert explorer.strategy.value == "custom" and explorer.error.value == ""
    explorer.drag("layer:3", "layer:0")  # onto a neighbour: to its device
    assert explorer.device_map == before.device_map
    explorer.undo()
    explorer.undo()
    assert explorer.plan == before and explorer.strategy.value == "auto"


def test_a_boundary_over_budget_is_measured_and_the_planner_comes_back(explorer: PlanExplorer) -> None:
    before, cut = explorer.plan, first_of(explorer, 1)
    explorer.drag(f"boundary:{cut}", f"layer:{cut + 10}")
    assert first_of(explorer, 1) == cut + 11 and not explorer.plan.feasible
    assert explorer.plan.shares[0].over > 0 and "Does not fit." in explorer.verdict.value
    assert "over budget" in explorer.picture.value and "over budget" in says(explorer, "device:0")
    explorer.drag(f"boundary:{cut + 11}", f"layer:{cut - 5}")
    assert first_of(explorer, 1) == cut - 5
    explorer.batch.value = 2
    assert first_of(explorer, 1) == cut - 5 and explorer.plan.batch == 2, "the map stays when something else is turned"
    explorer.batch.value = 1
    explorer.planner_button.click()
    assert explorer.plan == before


def test_a_drag_is_shown_before_it_ends_and_can_end_nowhere(explorer: PlanExplorer) -> None:
    before, cut = explorer.plan, first_of(explorer, 1)
    for there in (cut + 1, cut + 2, cut - 3):  # each from where the drag began
        explorer.drag(f"boundary:{cut}", f"layer:{there}", done=False)
        assert first_of(explorer, 1) == (there + 1 if there >= cut else there)
    assert explorer.strategy.value == "auto"
    text = explorer.text.value
    explorer.drag(f"boundary:{cut}", None)
    assert explorer.text.value == text, "the text follows when the hand lets go"
    assert explorer.plan == before and "custom" not in explorer.picture.value
    explorer.undo()
    assert explorer.plan == before, "what was only shown is not remembered"


def test_the_front_end_reports_hands() -> None:
    explorer = PlanExplorer("llama-2-7b", BUDGETS, dtype="float16")
    before = explorer.plan
    hand(explorer, kind="drag", key="layer:3", onto="device:1", done=True)
    assert explorer.plan.layers[3].device == 1
    hand(explorer, kind="undo")
    assert explorer.plan == before
    hand(explorer, kind="click", key="device:0")
    assert "model.embed_tokens" in explorer.about.value and "KV cache" in explorer.about.value
    hand(explorer, kind="drag", key="layer:999", onto="device:1", done=True)
    assert "cannot drag" in explorer.error.value and explorer.plan == before
    hand(explorer, kind="drag", key="layer:3", onto="device:1", done=False)
    hand(explorer, kind="drag", key="layer:3", onto="device:99", done=True)  # a drag that goes wrong is over
    hand(explorer, kind="drag", key="layer:3", onto="device:0", done=True)
    assert explorer.device_map == before.device_map and not explorer.passing


def test_what_is_told_of_a_device_follows_the_plan(explorer: PlanExplorer) -> None:
    explorer.click("device:1")
    assert "lm_head" in explorer.about.value
    explorer.drag("layer:35", "device:0")
    assert "lm_head" not in explorer.about.value
    explorer.click("layer:3")
    assert explorer.about.value == "", "a layer's tooltip has said all"
    explorer.click("device:1")
    assert explorer.about.value
    explorer.click("device:1")
    assert explorer.about.value == "", "a second click closes it"


def test_moved_refuses_what_is_not_there() -> None:
    p = plan("gpt2", {0: "300MiB", 1: "300MiB"})
    for key, onto in (("layer:99", "device:0"), ("boundary:3", "nowhere:0"), ("x", "y"), ("layer:1", "device:7")):
        with pytest.raises(ValueError, match="cannot drag"):
            moved(p, key, onto)


def test_two_plans_side_by_side(explorer: PlanExplorer) -> None:
    before, svg = explorer.plan, explorer.picture.value
    explorer.compare()
    assert svg in explorer.before.value and "no difference yet" in explorer.verdict.value
    explorer.drag("layer:3", "device:1")
    said = re.sub("<[^>]+>", "", explorer.verdict.value)
    for sentence in plan_differences(before, explorer.plan):
        assert sentence in said and sentence in re.sub("<[^>]+>", "", explorer.text.value)
    assert "Moved: 1 layer from GPU 0 to GPU 1." in said and "Strategy: custom (before: auto)." in said
    explorer.compare()
    explorer.gpus[0].value = 9
    assert explorer.before.value == "" and "Compared" not in explorer.verdict.value


# ---------------------------------------------------------------------------------------------------------------------
# State, numbers, news


def explorers() -> Iterator[Explorer]:
    plans = PlanExplorer("llama-2-7b", "2 x RTX 4090")
    plans.drag("layer:3", "device:1")
    plans.gpus[0].value = 19.3
    yield plans
    yield SplitExplorer(7, 3, padding=True)
    yield ShardExplorer("pygpt", "3MB", find="h.1 &c")
    theatre = HookTheatre("everything in RAM")
    theatre.step.value, theatre.mode.value = 5, "one by one"
    yield theatre
    experts = ExpertExplorer()
    experts.click("token:7")
    yield experts


def test_a_state_makes_the_same_explorer() -> None:
    for explorer in explorers():
        assert "\n" not in explorer.state
        again = type(explorer).from_state(explorer.state)
        assert (repr(again), again.state) == (repr(explorer), explorer.state)
        assert again.picture.value == explorer.picture.value


def test_a_state_is_pasted_and_a_wrong_one_refused() -> None:
    explorer = SplitExplorer()
    explorer.panes.selected_index = len(explorer.panes.children) - 1
    line = explorer.panes.children[-1]
    assert line.value == explorer.state
    line.value = "items=9&processes=4"
    assert (explorer.split.items, explorer.split.processes) == (9, 4) and line.value == explorer.state
    for wrong in ("", "nonsense", "items=many", "cats=3"):
        with pytest.raises(ValueError, match="is not a state of SplitExplorer: expected name=value"):
            SplitExplorer.from_state(wrong)
    line.value = "nonsense"
    assert "not a state" in explorer.error.value and explorer.split.items == 9


def test_undo_takes_one_turn_at_a_time() -> None:
    explorer = SplitExplorer(3, 2)
    for items in (10, 11, 12):  # one hand on one slider
        explorer.items.value = items
    explorer.padding.value = True
    explorer.undo()
    assert (explorer.items.value, explorer.padding.value) == (12, False)
    explorer.undo()
    assert explorer.items.value == 3
    explorer.undo()
    assert explorer.items.value == 3


def test_numbers_are_taken_as_typed_or_refused() -> None:
    explorer = PlanExplorer("gpt2", {0: "8GiB"})
    gpu, batch, context = explorer.gpus[0], explorer.batch, explorer.context
    gpu.entry.value = "7.3"
    assert gpu.value == 7.3 and explorer.plan.budget[0] == round(7.3 * 2**30) and gpu.entry.value == "7.3"
    context.entry.value = "1,000"
    assert explorer.plan.context == 1000 and context.entry.value == "1,000"
    context.entry.value = "none"
    assert explorer.plan.context == 0
    for number, typed in ((batch, "2.5"), (batch, "0"), (gpu, "9999"), (gpu, "much"), (context, "-1"), (batch, "nan")):
        value = number.value
        number.entry.value = typed
        assert number.value == value and number.description in explorer.error.value and typed in explorer.error.value
        assert "it stays" in explorer.error.value and 'role="alert"' in explorer.error.value
        number.entry.value = typed  # again
        assert number.value == value
    batch.entry.value = "3"
    assert explorer.plan.batch == 3 and explorer.error.value == ""


def test_a_slider_and_its_field_follow_each_other() -> None:
    number = Number("Size", 3.0, min=0, max=10, step=0.5, whole=False)
    number.slider.value = 4.5
    assert (number.value, number.entry.value) == (4.5, "4.5")
    number.entry.value = "4.6"
    number.slider.value = 4.5  # what a browser reports then
    assert (number.value, number.entry.value) == (4.6, "4.6")
    number.max = 4
    assert (number.value, number.slider.value, number.slider.max) == (4, 4, 4)
    stops = Number("Tokens", 128, stops=[128, 256, 1024], words={128: "few"})
    assert stops.entry.value == "few"
    stops.slider.value = 2
    assert stops.value == 1024
    stops.entry.value = "300"
    assert (stops.value, stops.slider.value) == (300, 1), "the slider stands at the nearest stop"


def test_news_while_it_works_and_after_an_error(explorer: PlanExplorer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, compute = [], explorer.compute
    monkeypatch.setattr(explorer, "compute", lambda: seen.append(explorer.working.value) or compute())
    explorer.batch.value = 2
    assert "Working" in seen[0] and explorer.working.value == ""
    assert "bigkit-stale" not in explorer.verdict._dom_classes
    explorer.model.value = "Qwen/no-such-model-7B"
    assert "bigkit-stale" in explorer.verdict._dom_classes and "bigkit-stale" in explorer.picture._dom_classes
    assert "bigkit models" in explorer.error.value, "what to do about it is shown too"
    explorer.undo()
    assert explorer.error.value == "" and "bigkit-stale" not in explorer.verdict._dom_classes
