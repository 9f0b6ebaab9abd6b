"""A theatre shows what a real model did; its picture and text tell the same, and it follows its controls."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigkit import init_empty_weights, load_checkpoint_and_dispatch
from bigkit.draw.canvas import WIDTH
from bigkit.draw.colours import GREEN, ORANGE, TRACK, YELLOW
from bigkit.draw.run import gantt_figure, gantt_label, gantt_text, run_figure, run_label, run_news, run_text
from bigkit.machine.streams import Schedule, Turn, schedule
from bigkit.offload.observe import observe
from bigkit.units import format_seconds
from bigkit.widgets import HookTheatre
from bigkit.widgets._explorer import LONGEST_REPR
from bigkit.widgets.hook_theatre import BLOCKS, ONE_BY_ONE, PREFETCH, PRESETS
from bigkit.zoo.gpt import GPT, PYGPT, GPTConfig
from tests.draw.test_plan import boxes


def looks(theatre: HookTheatre) -> tuple[str, str, str, str]:
    return theatre.picture.value, theatre.text.value, theatre.verdict.value, repr(theatre)


@pytest.fixture(scope="module")
def theatre() -> HookTheatre:
    """One for all tests: it remembers runs, and each test begins with a reset."""
    return HookTheatre()


@pytest.fixture(autouse=True)
def begin(request: pytest.FixtureRequest) -> None:
    if "theatre" in request.fixturenames:
        theatre = request.getfixturevalue("theatre")
        theatre.reset()
        theatre.panes.selected_index = None


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and texts

BLOCK = 1_000_000


def a_run(slots: int = 2, tokens: int = 2, **options: Any) -> Schedule:
    rests = [0, "cpu", "cpu", "disk", 0, "disk", "cpu"]
    turns = [Turn(f"h.{i}", BLOCK, 0.0002, place) for i, place in enumerate(rests)] + [
        Turn("head", BLOCK, 0.0001, 1, 1)
    ]
    return schedule(turns, link=10e9, disk=5e9, slots=slots, tokens=tokens, **options)


RUNS = {
    "mixed": a_run,
    "one slot": lambda: a_run(slots=1, prefetch=False, ahead=False),
    "four slots": lambda: a_run(slots=4, tokens=3),
    "nothing travels": lambda: schedule([Turn("a", 10, 1.0, 0), Turn("b", 0, 0.0, 0)], link=1),
    "one unit": lambda: schedule([Turn("", 10, 0.0, "disk")], link=1, disk=1),
    "no time at all": lambda: schedule([Turn("a", 0, 0.0, "cpu")], link=1),
    "eighty blocks": lambda: schedule([Turn(f"h.{i}", BLOCK, 1e-4, "cpu") for i in range(80)], link=1e9, tokens=2),
}


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest) -> Schedule:
    return RUNS[request.param]()


def test_a_chart_has_a_bar_for_each_span_as_long_as_it_lasts(run: Schedule) -> None:
    picture = gantt_figure({"one": run, "again": run}, "a model")
    for lane in ("compute", "link", "disk"):
        spans = [span for span in run.spans if span.lane == lane and span.start < run.seconds] * 2
        drawn = boxes(picture, lane)
        assert len(drawn) == len(spans)
        if spans and run.seconds:
            most = max(min(span.end, run.seconds) for span in spans)
            scale = max(box.x + box.width - 58 for box in drawn) / most
            for box, span in zip(drawn, sorted(spans[: len(spans) // 2], key=lambda s: s.start) * 2):
                assert box.x - 58 == pytest.approx(span.start * scale, abs=1e-6)
                assert box.width == pytest.approx((min(span.end, run.seconds) - span.start) * scale, abs=1e-6)
    assert all(box.x + box.width <= WIDTH for kind in ("compute", "link", "disk") for box in boxes(picture, kind))


def test_every_scene_is_drawn_as_it_is(run: Schedule) -> None:
    colours = {"arriving": YELLOW, "ready": GREEN, "working": ORANGE, "done": TRACK}
    for step in run.frames[:: max(1, len(run.frames) // 12)]:
        scene = run.scene(step)
        picture = run_figure({"run": run}, "run", step)
        units = boxes(picture, "units")
        held = [colours[state] for holds, state in scene.slots if holds is not None]
        assert len(units) == len(run.turns) + len(held)
        drawn = [box.colour for box in units]
        resident = scene.working is not None and not run.turns[scene.working].travels
        for colour in (YELLOW, GREEN, ORANGE, TRACK):
            assert drawn.count(colour) - held.count(colour) == (colour == ORANGE and resident) or colour == GREEN
        ends = [x for shape in picture.shapes if shape.kind == "slots" for x, _ in shape.points]
        assert not ends or (min(ends) == 58 and max(ends) <= WIDTH - 92 + 1e-6), "the future is not drawn"
        arrows = [shape for shape in picture.shapes if shape.kind == "arrow"]
        assert len(arrows) == 2 * len(scene.arriving)
        text, label = run_text({"run": run}, "run", step), run_label({"run": run}, "run", step)
        assert run_news(run, step) in text and run_news(run, step) in label
        for number, (holds, state) in enumerate(scene.slots):
            if holds is not None:
                name = re.escape(run.turns[holds].name or "the whole model")
                assert re.search(rf"^slot {number} .* {state} +{name}", text, re.MULTILINE)


def test_texts_tell_the_figures() -> None:
    charts = {"one": a_run(slots=1, prefetch=False, ahead=False), "two": a_run()}
    text = gantt_text(charts)
    for name, found in charts.items():
        row = next(line for line in text.splitlines() if line.startswith(name))
        assert [format_seconds(found.ends[0]), format_seconds(found.per_token)] == re.findall(r"[\d.]+ [mµ]?s", row)[:2]
        assert f"{name} {format_seconds(found.per_token)}" in gantt_label(charts)
    assert run_news(a_run(), 0) == "before the start"
    assert "h.3 is fetched from disk into slot" in " ".join(run_news(a_run(), step) for step in a_run().frames)


# ---------------------------------------------------------------------------------------------------------------------
# HookTheatre


def test_something_shows_before_anything_is_touched(theatre: HookTheatre) -> None:
    svg = ElementTree.fromstring(theatre.picture.value)
    assert svg.get("role") == "img" and "before the start" in (svg.get("aria-label") or "")
    assert "prefetch, 2 slots, before the start" in theatre.text.value and "Step 0 of" in theatre.verdict.value
    assert theatre.error.value == "" and "transformer." not in theatre.text.value + theatre.picture.value


@pytest.mark.parametrize("mode", [ONE_BY_ONE, PREFETCH])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_and_writes_what_the_whole_model_writes(theatre: HookTheatre, preset: str, mode: str) -> None:
    theatre.preset.value, theatre.mode.value = preset, mode
    assert theatre.error.value == "" and theatre.recording is not None and theatre.schedule is not None
    written, equal = theatre.recording.result
    assert equal and len(written) == len("def ") + theatre.tokens.value
    found = PRESETS[preset]
    blocks = [device for name, device in theatre.device_map.items() if ".h." in name]
    places = [blocks.count(place) for place in (0, 1, "cpu")]
    assert places == [found["gpu0"], found["gpu1"], found["ram"]] and len(blocks) == BLOCKS
    if found["spread"]:
        assert blocks != sorted(blocks, key=str), "GPU 0's blocks stand together"
    fetched = {event.unit for event in theatre.recording.events if event.kind == "fetch"}
    assert fetched == {f"transformer.h.{i}" for i, device in enumerate(blocks) if device in ("cpu", "disk")}
    slow, fast = theatre.charts.values()
    assert fast.per_token <= slow.per_token and theatre.schedule.spans == theatre.charts[theatre._chart].spans
    assert theatre.preset.value == preset, "a preset keeps its name"
    theatre.step.value = theatre.step.max
    assert "as the whole model does: True" in theatre.verdict.value


def test_turning_each_control_and_reset(theatre: HookTheatre) -> None:
    start = looks(theatre)
    for control, value in (
        (theatre.step, 9), (theatre.mode, ONE_BY_ONE), (theatre.slots, 3), (theatre.mode, PREFETCH),
        (theatre.tokens, 3), (theatre.gpu1, 0), (theatre.gpu0, 4), (theatre.spread, True), (theatre.ram, 1),
        (theatre.link, 50.0), (theatre.disk, 2.0), (theatre.rate, 900.0), (theatre.preset, "everything in RAM"),
    ):  # fmt: skip
        before = looks(theatre)
        control.value = value
        assert theatre.error.value == ""
        assert theatre.picture.value != before[0], control.description
        assert looks(theatre)[1] != before[1] or control is theatre.tokens, control.description
    theatre.buttons.children[0].click()
    assert looks(theatre) == start


def test_own_placements_have_no_preset_name(theatre: HookTheatre) -> None:
    theatre.gpu0.value = 3
    assert theatre.preset.value == "my own"
    theatre.gpu0.value = 2
    assert theatre.preset.value == "two GPUs, RAM and disk"


def test_stepping_through_all_of_it(theatre: HookTheatre) -> None:
    found = theatre.schedule
    assert found is not None and theatre.step.max == theatre.play.max == len(found.frames) - 1
    seen = set()
    for step in range(0, theatre.step.max + 1, 3):
        theatre.step.value = step
        assert len(repr(theatre)) <= LONGEST_REPR and f"step {step} of" in repr(theatre)
        seen.add(theatre.picture.value)
    assert len(seen) == len(range(0, theatre.step.max + 1, 3))
    theatre.step.value = theatre.step.max
    theatre.tokens.value = 1
    assert theatre.step.value == theatre.step.max < len(found.frames) - 1, "fewer steps pull the slider back"


def test_too_many_blocks_are_a_sentence(theatre: HookTheatre) -> None:
    before = looks(theatre)
    theatre.ram.value = 9
    assert 'role="alert"' in theatre.error.value and "13 blocks" in theatre.error.value
    assert looks(theatre)[:3] == before[:3]
    theatre.ram.value = 6
    assert theatre.error.value == "" and looks(theatre) != before
    with pytest.raises(ValueError, match="unknown mode"):
        HookTheatre(mode="backwards")
    with pytest.raises(ValueError, match="unknown preset"):
        HookTheatre("everything on tape")


@settings(max_examples=8)
@given(
    gpu0=st.integers(0, 10), gpu1=st.integers(0, 10), ram=st.integers(0, 10), spread=st.booleans(),
    mode=st.sampled_from([ONE_BY_ONE, PREFETCH]), slots=st.integers(1, 4), step=st.integers(0, 100),
)  # fmt: skip
def test_any_setting_runs_or_says_why(gpu0: int, gpu1: int, ram: int, spread: bool, mode: str, slots: int, step: int):
    theatre = HookTheatre(slots=slots, tokens=1)
    with theatre.together():
        theatre.gpu0.value, theatre.gpu1.value, theatre.ram.value = gpu0, gpu1, ram
        theatre.spread.value, theatre.mode.value = spread, mode
    if gpu0 + gpu1 + ram > BLOCKS:
        assert "blocks are placed" in theatre.error.value
        return
    theatre.step.value = step
    assert theatre.error.value == "" and theatre.recording is not None and theatre.recording.result[1]
    assert len(repr(theatre)) <= LONGEST_REPR


def test_panes(theatre: HookTheatre) -> None:
    parts = ("before the start", "transformer.h.9", "MLPs computed", "load_checkpoint_and_dispatch", "Download")
    for i, part in enumerate(parts):
        theatre.panes.selected_index = i
        assert part in theatre.panes.children[i].value


def test_streamed_computed_in_ram_and_both(theatre: HookTheatre) -> None:
    theatre.preset.value = "one token, RTX 4090"
    theatre.cpu.value = theatre.link.value = 25.0
    theatre.panes.selected_index = 2
    block, blocks = 404e6, 6
    streamed, computed, both = (
        float(row.split()[-8]) for row in theatre.panes.children[2].value.splitlines() if re.search(r" ms .* %", row)
    )
    assert streamed == pytest.approx(1e3 * blocks * block / 25e9, rel=0.03)  # all of it over the link
    assert computed == pytest.approx(1e3 * blocks * block / 3 * 2 / 25e9, rel=0.06)  # of each, the MLP by the CPU
    assert both < computed < streamed
    faster = re.search(r"The CPU helps:</b> a token is ([\d.]+) times", theatre.panes.children[2].value)
    assert faster and float(faster[1]) == pytest.approx(streamed / both, abs=0.01)
    theatre.cpu.value = 1.0
    assert "The CPU does not help here" in theatre.panes.children[2].value
    theatre.cpu.value = 250.0
    again = [row for row in theatre.panes.children[2].value.splitlines() if row.startswith("MLPs")]
    assert float(again[0].split()[-8]) < 0.6 * computed
    theatre.ram.value = 1
    assert "two blocks or more" in theatre.panes.children[2].value


def test_code_and_export_give_the_same(theatre: HookTheatre, tmp_path: Path) -> None:
    for mode in (ONE_BY_ONE, PREFETCH):
        theatre.mode.value = mode
        scope: dict[str, Any] = {}
        exec(theatre.to_code(), scope)
        assert scope["found"] == theatre.schedule
        content = json.loads(theatre.export(tmp_path / "run.json").read_text())
        assert content["device_map"] == theatre.device_map and content["mode"] == mode
        assert [event["unit"] for event in content["recorded"]] == [event.unit for event in scope["recording"].events]
        for name, chart in theatre.charts.items():
            assert len(content["charts"][name]["spans"]) == len(chart.spans)
    ElementTree.parse(theatre.export(tmp_path / "run.svg"))


def test_a_checkpoint_goes_to_the_stand_ins_of_gpus() -> None:
    with init_empty_weights():
        model = GPT(GPTConfig("pygpt"))
    places = {"transformer": 1, "lm_head": "cpu"}
    load_checkpoint_and_dispatch(model, PYGPT, places, dtype="bfloat16", stand_in={1: "cpu"})
    recording = observe(model.eval(), lambda: model(torch.tensor([[1, 2]]))[0].shape)
    assert recording.result == (1, 2, 256) and recording.units["lm_head"] == (131072, "cpu", 1)
