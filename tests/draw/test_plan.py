"""A picture of a plan tells the plan's own numbers, and its text twin tells the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bigkit import HARDWARE, format_bytes, plan
from bigkit.devices import device_label
from bigkit.draw.canvas import WIDTH, Box, Picture
from bigkit.draw.colours import GPU_COLOURS, VERMILLION, device_colour
from bigkit.draw.plan import plan_figure, plan_label, plan_text, plan_verdict
from bigkit.machine.hardware import CONTEXT_BYTES
from bigkit.maps.plan import Plan

GIB = 2**30

PLANS = {
    "fits": lambda: plan("llama-2-7b", {0: "24GiB", 1: "16GiB"}, dtype="float16", context=4096, overhead=CONTEXT_BYTES),
    "offloads": lambda: plan("llama-3.1-405b", HARDWARE["8 x A100-80GB"].max_memory(), dtype="bfloat16", context=4096),
    "on disk": lambda: plan("llama-2-70b", {0: "24GiB", "cpu": "32GiB"}, dtype="bfloat16", context=128),
    "too big": lambda: plan("llama-2-70b", {0: "24GiB", "cpu": "9GiB", "disk": "9GiB"}, dtype="bfloat16", strict=False),
    "tied": lambda: plan("gpt2", {0: "300MiB", 1: "300MiB"}),
    "one device": lambda: plan("bert-base-cased", {0: "1GiB"}),
    "no GPU": lambda: plan("resnet50.a1_in1k", HARDWARE["laptop, no GPU"].max_memory()),
    "16 GPUs": lambda: plan("idefics-80b-instruct", dict.fromkeys(range(16), "12GiB"), dtype="bfloat16"),
}


@pytest.fixture(params=PLANS)
def made(request: pytest.FixtureRequest) -> Plan:
    return PLANS[request.param]()


def boxes(picture: Picture, kind: str) -> list[Box]:
    """Every box of one kind, from the top and the left."""
    found = [shape for shape in picture.shapes if isinstance(shape, Box) and shape.kind == kind]
    return sorted(found, key=lambda box: (box.y, box.x))


def texts(picture: Picture) -> list[str]:
    return [text.text for text in picture.texts]


def rows(picture: Picture) -> list[float]:
    """The top of each bar, from the top."""
    return sorted({box.y for kind in ("room", "weights") for box in boxes(picture, kind)})


def test_bars_are_as_long_as_the_bytes(made: Plan) -> None:
    picture = plan_figure(made)
    parts = {"weights": "weights", "kv_cache": "KV cache", "activations": "activations", "reserve": "reserve",
             "overhead": "overhead"}  # fmt: skip
    groups = [[s for s in made.shares if s.runs], [s for s in made.shares if not s.runs]]
    if not any(share.used for share in groups[1]):
        groups.pop()
    tops = iter(rows(picture))
    for group in groups:
        scales = set()
        for share in group:
            if not share.used and not share.budget:
                continue
            y = next(tops)
            for part, kind in parts.items():
                drawn = [box.width for box in boxes(picture, kind) if box.y == y]
                expected = getattr(share, part)
                assert len(drawn) == bool(expected), (share.device, part)
                if expected * 500 > share.used:  # shorter ones are too short to measure a scale by
                    scales.add(round(drawn[0] / expected * GIB, 6))
        assert len(scales) == 1, "one group of bars, one scale"


def test_capacity_stands_where_the_budget_ends() -> None:
    picture = plan_figure(PLANS["fits"]())
    rooms = boxes(picture, "room")
    assert rooms[0].width / rooms[1].width == pytest.approx(24 / 16)
    for line, room in zip(boxes(picture, "capacity"), rooms, strict=True):
        assert line.x + line.width / 2 == pytest.approx(room.x + room.width)


def test_what_is_over_budget_is_hatched_and_as_long_as_it_is_over() -> None:
    made = PLANS["too big"]()
    assert not made.feasible
    picture = plan_figure(made)
    over = boxes(picture, "over budget")
    shares = [share for share in made.shares if share.over]
    assert len(over) == len(shares) == 1
    weights = boxes(picture, "weights")[-1]  # the disk's, lowest
    assert over[0].width / weights.width == pytest.approx(shares[0].over / shares[0].used)
    assert over[0].hatch == "x"
    assert "over budget" in texts(picture)
    assert all(not boxes(plan_figure(PLANS[name]()), "over budget") for name in ("fits", "offloads"))


def test_strip_shows_every_layer_in_order_as_wide_as_its_bytes(made: Plan) -> None:
    strip = boxes(plan_figure(made), "layers")
    total = sum(layer.bytes for layer in made.layers)
    assert len(strip) == len(made.layers)
    assert sum(box.width for box in strip) == pytest.approx(WIDTH - 16)
    wide = [layer for layer in made.layers if layer.bytes]
    for layer, box in zip(wide, [box for box in strip if box.width > 1e-9], strict=True):
        assert box.width == pytest.approx((WIDTH - 16) * layer.bytes / total, abs=1e-6)
        assert box.colour == device_colour(layer.device)


def test_nothing_leaves_the_picture_and_no_texts_of_a_line_overlap(made: Plan) -> None:
    picture = plan_figure(made)
    lines: dict[int, list[tuple[float, float, str]]] = {}
    for text in picture.texts:
        start, end = text.span
        assert start >= 0 and end <= WIDTH and text.y < picture.y, text.text
        lines.setdefault(round(text.y), []).append((start, end, text.text))
    for line in lines.values():
        line.sort()
        for (_, end, left), (start, _, right) in zip(line, line[1:]):
            assert end <= start, f"{left!r} overlaps {right!r}"


def test_labels_as_well_as_colours() -> None:
    shown = texts(plan_figure(PLANS["offloads"]()))
    assert {"GPU 0", "GPU 7", "RAM", "disk", "KV cache", "reserve", "weights, by device"} <= set(shown)
    assert sum(text.endswith(" of 80.0 GiB") for text in shown) == 8


def test_neighbours_differ() -> None:
    assert len(set(GPU_COLOURS)) == 4
    assert VERMILLION not in GPU_COLOURS  # it means "over budget"
    assert all(device_colour(i) != device_colour(i + 1) for i in range(16))


def test_a_long_name_with_a_dollar_stays_one_line() -> None:
    made = replace(PLANS["tied"](), model="/models/$HOME/" + "very-long-name-" * 12 + "$end")
    picture = plan_figure(made)
    title = picture.texts[0]
    assert title.span[1] < WIDTH
    assert title.text.startswith("/models/$HOME") and title.text.endswith("$end")
    assert made.model in plan_text(made)


def test_text_twin_tells_every_figure(made: Plan) -> None:
    lines = plan_text(made).splitlines()
    assert lines[0] == f"{made.model}: {plan_verdict(made)}"
    for share in made.shares:
        line = next((line for line in lines if line.startswith(device_label(share.device) + "  ")), None)
        if line is None:
            assert not share.used and share.budget == 0
            continue
        for size in (share.used, share.weights):
            assert format_bytes(size) in line
        assert ("no limit" if share.budget is None else format_bytes(share.budget)) in line
    told = [line.strip() for line in lines if ": " in line and line.startswith("  ")]
    count = sum(int(line.rpartition("(")[2].rstrip(")")) if line.endswith(")") else 1 for line in told)
    assert count == len(made.layers)


def test_verdicts() -> None:
    assert plan_verdict(PLANS["fits"]()) == "fits"
    assert plan_verdict(PLANS["offloads"]()).endswith("of weights rest in RAM")
    assert plan_verdict(PLANS["too big"]()).startswith("does not fit: disk lacks ")


def test_label_tells_the_loads() -> None:
    made = PLANS["fits"]()
    for size in made.used.values():
        if size:
            assert format_bytes(size) in plan_label(made)
