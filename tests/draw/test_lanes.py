"""The lanes of a dry run: what is drawn, measured in the SVG's rectangles, is the share of the time that is said."""

import re

import pytest

from bigkit import dry_run
from bigkit.draw.colours import GREEN, GREY, PURPLE, TRACK
from bigkit.draw.dryrun import LANE, dryrun_figure, dryrun_text

RECTANGLE = re.compile(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h-")


def rectangles(svg, colour):
    """(x, bottom, width, height) of every rectangle of a colour."""
    paths = re.findall(rf'<path fill="{colour}" d="([^"]*)"', svg)
    boxes = [tuple(map(float, numbers)) for path in paths for numbers in RECTANGLE.findall(path)]
    return [(x, round(y + height, 1), width, height) for x, y, width, height in boxes]


@pytest.fixture(scope="module")
def run():
    places = {"": 0} | {f"transformer.h.{i}": "cpu" for i in range(0, 10, 2)}
    return dry_run("pygpt", places, 1, 64, 3, "T4")


def test_a_lane_is_as_full_as_it_is_busy(run):
    svg = dryrun_figure(run).svg
    rooms = {bottom: (width, height) for _, bottom, width, height in rectangles(svg, TRACK) if height == LANE - 4}
    colours = {"python": GREY, "cuda:0": GREEN, "copy to cuda:0": PURPLE}
    lanes = [lane for lane in colours if lane in run.busy]
    assert len(rooms) == len(run.busy) and len(lanes) == 3
    for lane, bottom in zip(lanes, sorted(rooms)):
        width, height = rooms[bottom]
        drawn = [box for box in rectangles(svg, colours[lane]) if box[1] == bottom and box[3] <= height]
        share = sum(box[2] * box[3] for box in drawn) / (width * height)
        assert share == pytest.approx(run.busy[lane], abs=0.02), lane
        assert f"busy {100 * run.busy[lane]:.0f} %" in svg
    assert run.busy["cuda:0"] < 0.9, "a lane that does not look full"


def test_the_text_says_the_same_shares(run):
    said = dict(re.findall(r"(Python|GPU 0|link to GPU 0) (\d+) %", dryrun_text(run)))
    assert said == {name: f"{100 * run.busy[lane]:.0f}" for name, lane in (
        ("Python", "python"), ("GPU 0", "cuda:0"), ("link to GPU 0", "copy to cuda:0"))}  # fmt: skip
    for lane, share in run.busy.items():
        assert share == pytest.approx(sum(step.busy[lane] for step in run.times) / sum(s.seconds for s in run.times))


def test_a_step_that_pauses_is_not_hidden_by_one_that_does_not():
    run = dry_run("gpt2", None, 4, 256, 3, "T4", dtype="float16")
    svg = dryrun_figure(run).svg
    (room,) = {(x, width) for x, _, width, height in rectangles(svg, TRACK) if height == LANE - 4}
    scale, start = room[1] / sum(step.seconds for step in run.times), room[0]
    shares = []
    for step in run.times:
        end = start + step.seconds * scale
        boxes = [box for box in rectangles(svg, GREEN) if start - 0.1 <= box[0] < end - 0.1 and box[3] <= LANE - 4]
        shares.append(sum(width * height for _, _, width, height in boxes) / ((end - start) * (LANE - 4)))
        assert shares[-1] == pytest.approx(step.busy["cuda:0"] / step.seconds, abs=0.03), step.name
        start = end
    assert shares[0] > 0.95 and max(shares[1:]) < 0.7
