"""Pictures tell the plan's own numbers, and their text twins tell the same."""

from __future__ import annotations

import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from bigkit import HARDWARE, estimate_memory, format_bytes, plan
from bigkit.devices import device_label
from bigkit.draw.canvas import (
    GPU_COLOURS,
    VERMILLION,
    WIDTH,
    device_colour,
    estimate_figure,
    estimate_label,
    estimate_text,
    plan_figure,
    plan_label,
    plan_text,
    plan_verdict,
    svg,
)
from bigkit.machine.hardware import CONTEXT_BYTES
from bigkit.maps.plan import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def boxes(figure: Figure, kind: str) -> Iterator[tuple[float, float, float, str]]:
    """(x, y, width, colour) of every box of one kind, in points."""
    from matplotlib.colors import to_hex

    for patch in figure.artists:
        if patch.get_label() == kind:
            for corners in patch.get_path().vertices.reshape(-1, 5, 2):
                (left, top), (right, _) = corners.min(0), corners.max(0)
                yield float(left), float(top), float(right - left), to_hex(patch.get_facecolor()).upper()


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def rows(figure: Figure) -> list[float]:
    """The top of each bar, from the top."""
    return sorted({y for kind in ("room", "weights") for _, y, _, _ in boxes(figure, kind)})


# ---------------------------------------------------------------------------------------------------------------------
# Plans


def test_bars_are_as_long_as_the_bytes(made: Plan) -> None:
    figure = plan_figure(made)
    parts = {"weights": "weights", "kv_cache": "KV cache", "activations": "activations", "reserve": "reserve",
             "overhead": "overhead"}  # fmt: skip
    groups = [[s for s in made.shares if s.runs], [s for s in made.shares if not s.runs]]
    if not any(share.used for share in groups[1]):
        groups.pop()
    tops = iter(rows(figure))
    for group in groups:
        scales = set()
        for share in group:
            if not share.used and not share.budget:
                continue
            y = next(tops)
            for part, kind in parts.items():
                drawn = [width for _, top, width, _ in boxes(figure, kind) if top == y]
                expected = getattr(share, part)
                assert len(drawn) == bool(expected), (share.device, part)
                if expected * 500 > share.used:  # shorter ones are too short to measure a scale by
                    scales.add(round(drawn[0] / expected * GIB, 6))
        assert len(scales) == 1, "one group of bars, one scale"


def test_capacity_stands_where_the_budget_ends() -> None:
    figure = plan_figure(PLANS["fits"]())
    (_, _, width_0, _), (_, _, width_1, _) = sorted(boxes(figure, "room"), key=lambda box: box[1])
    assert width_0 / width_1 == pytest.approx(24 / 16)
    lines = sorted(boxes(figure, "capacity"), key=lambda box: box[1])
    rooms = sorted(boxes(figure, "room"), key=lambda box: box[1])
    for line, room in zip(lines, rooms, strict=True):
        assert line[0] + line[2] / 2 == pytest.approx(room[0] + room[2])


def test_what_is_over_budget_is_hatched_and_as_long_as_it_is_over() -> None:
    made = PLANS["too big"]()
    assert not made.feasible
    figure = plan_figure(made)
    over = list(boxes(figure, "over budget"))
    shares = [share for share in made.shares if share.over]
    assert len(over) == len(shares) == 1
    weights = max(boxes(figure, "weights"), key=lambda box: box[1])  # the disk's, lowest
    assert over[0][2] / weights[2] == pytest.approx(shares[0].over / shares[0].used)
    patch = next(patch for patch in figure.artists if patch.get_label() == "over budget")
    assert patch.get_hatch()
    assert "over budget" in texts(figure)
    assert all(not list(boxes(plan_figure(PLANS[name]()), "over budget")) for name in ("fits", "offloads"))


def test_strip_shows_every_layer_in_order_as_wide_as_its_bytes(made: Plan) -> None:
    strip = sorted(boxes(plan_figure(made), "layers"))
    total = sum(layer.bytes for layer in made.layers)
    assert len(strip) == len(made.layers)
    assert sum(width for _, _, width, _ in strip) == pytest.approx(WIDTH - 16)
    wide = [layer for layer in made.layers if layer.bytes]
    for layer, (_, _, width, colour) in zip(wide, [box for box in strip if box[2] > 1e-9], strict=True):
        assert width == pytest.approx((WIDTH - 16) * layer.bytes / total, abs=1e-6)
        assert colour == device_colour(layer.device)


def test_nothing_leaves_the_picture_and_no_texts_of_a_line_overlap(made: Plan) -> None:
    figure = plan_figure(made)
    figure.canvas.draw()
    frame = figure.bbox
    lines: dict[int, list[tuple[float, float, str]]] = {}
    for text in figure.texts:
        box = text.get_window_extent()
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1, text.get_text()
        lines.setdefault(round(text.get_position()[1]), []).append((box.x0, box.x1, text.get_text()))
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
    from dataclasses import replace

    made = replace(PLANS["tied"](), model="/models/$HOME/" + "very-long-name-" * 12 + "$end")
    figure = plan_figure(made)
    figure.canvas.draw()
    title = figure.texts[0]
    assert title.get_window_extent().x1 < figure.bbox.x1
    assert title.get_text().startswith("/models/$HOME") and title.get_text().endswith("$end")
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


# ---------------------------------------------------------------------------------------------------------------------
# Estimates


@pytest.mark.parametrize("name", ["bert-base-cased", "deepseek-v3", "resnet50.a1_in1k"])
def test_estimate_bars_are_as_long_as_the_bytes(name: str) -> None:
    estimate = estimate_memory(name)
    figure = estimate_figure(estimate)
    tops = rows(figure)
    records = [*estimate.inference, *estimate.training]
    assert len(tops) == len(records)
    kinds = {"weights": "weights", "kv_cache": "KV cache", "activations": "activations", "gradients": "gradients",
             "optimizer": "optimizer"}  # fmt: skip
    for group in (estimate.inference, estimate.training):
        lengths = {}
        for record in group:
            y = tops[records.index(record)]
            drawn = [box for kind in kinds.values() for box in boxes(figure, kind) if box[1] == y]
            lengths[record.total] = sum(width for _, _, width, _ in drawn)
        longest = max(lengths)
        for total, length in lengths.items():
            assert length / lengths[longest] == pytest.approx(total / longest)


def test_estimate_text_and_label() -> None:
    estimate = estimate_memory("bert-base-cased")
    for row in (*estimate.inference, *estimate.training):
        assert format_bytes(row.total) in estimate_text(estimate)
        assert format_bytes(row.total) in estimate_label(estimate)
    assert "413.18 MB" in estimate_text(estimate)


def test_estimate_without_rows_is_drawn() -> None:
    estimate = estimate_memory("gpt2", stored=())
    assert "To train GPT2LMHeadModel (another scale)" in texts(estimate_figure(estimate))


# ---------------------------------------------------------------------------------------------------------------------
# SVG


def test_svg_is_one_accessible_element(made: Plan) -> None:
    label = plan_label(made) + ' "<&'
    text = svg(plan_figure(made), label)
    assert text.startswith("<svg ") and text.endswith("</svg>")
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("role") == "img"
    assert root.get("aria-label") == label
    assert root.get("viewBox", "").split()[2] == str(WIDTH)
    words = "".join(root.itertext())
    assert device_label(made.shares[0].device) in words, "text stays text"
    assert "<metadata" not in text and "<script" not in text


def test_same_plan_same_bytes() -> None:
    first, second = (svg(plan_figure(PLANS["too big"]()), "a") for _ in range(2))
    assert first == second


def test_pictures_need_neither_pyplot_nor_torch() -> None:
    code = (
        "import sys\nfrom bigkit import plan\nfrom bigkit.draw.canvas import plan_figure, svg\n"
        "svg(plan_figure(plan('gpt2', {0: '1GiB'})), 'x')\n"
        "print([name for name in ('torch', 'matplotlib.pyplot', 'ipywidgets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_style_of_the_user_changes_nothing() -> None:
    import matplotlib

    made = PLANS["fits"]()
    plain = svg(plan_figure(made), "a")
    loud = {"text.color": "red", "figure.facecolor": "black", "font.size": 30, "font.family": "serif"}
    with matplotlib.rc_context(loud):
        assert svg(plan_figure(made), "a") == plain


def test_drawing_time(capsys: pytest.CaptureFixture[str]) -> None:
    made = PLANS["offloads"]()
    svg(plan_figure(made), "warm")
    start = time.perf_counter()
    svg(plan_figure(made), plan_label(made))
    with capsys.disabled():
        print(f"\n  llama-3.1-405b on 8 GPUs drawn in {1000 * (time.perf_counter() - start):.0f} ms")
