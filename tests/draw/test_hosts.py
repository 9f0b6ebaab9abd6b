"""A picture of a plan over hosts tells the plan's own numbers, and its text twin tells the same."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from bigkit import HostsPlan, plan_hosts
from bigkit.devices import device_label
from bigkit.draw.canvas import WIDTH, Box, Picture
from bigkit.draw.hosts import TOKENS, hosts_differences, hosts_figure, hosts_label, hosts_text
from bigkit.units import format_bytes, format_seconds, three_figures

PLANS = {
    "two": lambda: plan_hosts("llama-2-7b", "RTX 4090 | RTX 3090", dtype="float16", batch=8, context=2048),
    "offloads": lambda: plan_hosts("llama-2-70b", "2 x RTX 4090 | A100-80GB", "WLAN", dtype="float16"),
    "four": lambda: plan_hosts("llama-2-70b", "4 x L4 | 2 x 4090 | A100-80GB | 3090", quantization="nf4", batch=16),
    "one": lambda: plan_hosts("gpt2", ["L4"]),
    "no GPU": lambda: plan_hosts("gpt2", ["laptop, no GPU", "laptop, no GPU"]),
}


@pytest.fixture(params=PLANS)
def made(request: pytest.FixtureRequest) -> HostsPlan:
    return PLANS[request.param]()


def boxes(picture: Picture, kind: str) -> list[Box]:
    return [shape for shape in picture.shapes if isinstance(shape, Box) and shape.kind == kind]


def test_bars_of_all_hosts_have_one_scale(made: HostsPlan) -> None:
    picture = hosts_figure(made)
    shares = [share for stage in made.stages for share in stage.plan.shares if share.runs]
    weights = sorted(boxes(picture, "weights"), key=lambda box: box.y)
    longest = max(max(share.used, share.budget or 0) for share in shares)
    for box, share in zip(weights, [share for share in shares if share.weights], strict=True):
        assert box.width == pytest.approx(picture.room * share.weights / longest)


def test_lanes_are_the_rehearsal(made: HostsPlan) -> None:
    picture = hosts_figure(made)
    drawn = {groups: made.timeline(groups, TOKENS)[1] for groups in {1, made.groups}}
    longest = max(span.end for spans in drawn.values() for span in spans)
    for lane in made.lanes:
        spans = [span for spans in drawn.values() for span in spans if span.lane == lane]
        found = sorted((box.x, box.width) for box in boxes(picture, lane))
        scale = picture.room / longest
        expected = sorted((picture.left + s.start * scale, max(0.8, (s.end - s.start) * scale)) for s in spans)
        assert found == [pytest.approx(pair) for pair in expected]


def test_words_and_numbers(made: HostsPlan) -> None:
    picture, text = hosts_figure(made), hosts_text(made)
    svg = ElementTree.fromstring(picture.svg)
    assert svg.get("role") == "img" and svg.get("aria-label") == hosts_label(made) == text.splitlines()[0]
    for stage in made.stages:
        row = next(line for line in text.splitlines() if f"{stage.names[0]} .. {stage.names[-1]}" in line)
        assert stage.host in row and f" {stage.blocks} " in row and format_seconds(stage.seconds) in row
        for share in stage.plan.shares:
            assert not share.runs or f"{device_label(share.device)} {format_bytes(share.used)}" in row
    assert f"{three_figures(made.one)} tokens/s" in text and f"{three_figures(made.many)} tokens/s" in text
    assert format_bytes(made.hidden) in text
    for words in picture.texts:
        start, end = words.span
        assert -1 <= start and end <= WIDTH + 1, words.text
    keys = [mark.key for mark in picture.marks if mark.key.startswith("process:")]
    assert len({*keys}) == len(keys)


def test_text_from_outside_is_escaped() -> None:
    made = PLANS["two"]()
    stages = tuple(replace(stage, host="<script>&") for stage in made.stages)
    svg = hosts_figure(replace(made, stages=stages, model="<b>")).svg
    assert "<script>" not in svg and "<b>" not in svg and "&lt;script&gt;&amp;" in svg


def test_what_differs() -> None:
    made = PLANS["two"]()
    assert hosts_differences(made, made) == []
    slower = plan_hosts("llama-2-7b", "RTX 4090 | L4", dtype="float16", batch=8, context=2048)
    said = hosts_differences(made, slower)
    assert said[0].startswith("Process 0 has 22 blocks" if slower.stages[0].blocks == 22 else "Process 0 has")
    assert any(line.startswith("One sequence gets") and "(before: " in line for line in said)
