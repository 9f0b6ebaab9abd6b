"""Every diagram of the course is legible: texts stay inside the picture and apart from each other."""

from __future__ import annotations

from itertools import combinations

import pytest

from bigkit import HARDWARE, describe, plan
from bigkit.draw.canvas import WIDTH, Text
from bigkit.draw.diagrams import Block, Diagram, figures
from bigkit.machine.roofline import Rates
from bigkit.maps.predict import ASSUMED

FIGURES = figures()


def overlap(a: Text, b: Text) -> bool:
    """Whether two texts cover each other; a pixel of margin is needed between them."""
    (a_start, a_end), (b_start, b_end) = a.span, b.span
    return a_start < b_end and b_start < a_end and abs(a.y - b.y) < 0.42 * (a.size + b.size)


@pytest.mark.parametrize("name", FIGURES)
def test_texts_stay_inside_and_apart(name: str) -> None:
    diagram = FIGURES[name]
    for text in diagram.texts:
        assert text.span[0] >= 0 and text.span[1] <= WIDTH, text
        assert text.y + text.size / 2 <= diagram.y, text
    pairs = [(a.text, b.text) for a, b in combinations(diagram.texts, 2) if overlap(a, b)]
    assert pairs == []
    assert diagram.label.endswith(".") and len(diagram.label) > 40, "a sentence says what the picture shows"


def test_arrow_ends_at_its_point_and_braces_span_their_part() -> None:
    diagram = Diagram("Title", "A sentence.")
    a, b = diagram.row(20, 40, ["A", "B"], width=[80, 100], gap=60)
    assert (a, b) == (Block(20, 40, 80, 24), Block(160, 40, 100, 24))
    diagram.arrow(a.right, b.left)
    shaft, head = diagram.shapes[-2:]
    assert shaft.points == [(100, 52), (153, 52)] and head.points == [(160, 52), (153, 55.5), (153, 48.5)]
    diagram.brace(20, 260, 70, "both")
    assert diagram.shapes[-1].points[0] == (20, 70) and diagram.shapes[-1].points[-1] == (260, 70)
    assert diagram.texts[-1].span[0] < 140 < diagram.texts[-1].span[1] and diagram.y > 85


def test_text_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="'a long name' needs 63 points: a block of 40 points is too narrow"):
        Diagram("Title", "A sentence.").block(0, 40, 40, 20, "a long name", size=10)


def test_figures_in_diagrams_are_those_that_bigkit_computes() -> None:
    def said(name: str) -> str:
        return " ".join(text.text for text in FIGURES[name].texts)

    halves = plan("resnet50.a1_in1k", {0: "60MiB", 1: "60MiB"})
    pieces = [sum(layer.device == device for layer in halves.layers) for device in (0, 1)]
    assert f"the {pieces[0]} pieces on device 0" in FIGURES["two_halves"].label
    assert f"whose {pieces[1]} pieces" in FIGURES["two_halves"].label
    for share in halves.shares[:2]:
        assert f"device {share.device}: {share.weights / 2**20:.1f} MiB" in said("two_halves")
    for model in ("llama-2-7b", "llama-3.1-8b"):
        assert f"{describe(model).attention[0].per_token:,} numbers" in said("kinds_of_attention")
    assert f" {describe('deepseek-v3').attention[0].per_token} " in said("kinds_of_attention")
    desktop = HARDWARE["1 x RTX 4090"]
    link, gpu = Rates.of_gpu(desktop.gpus[0]).link / 1e9, desktop.gpus[0].bandwidth / 1e9
    for figure in (f"link: {link:.0f} GB/s", f"{desktop.disk_rate / 1e9:g} GB/s", f"GPU: {gpu:,.0f} GB/s"):
        assert figure in said("four_lanes")
    assert f"{ASSUMED.steps[None]} steps a block" in said("four_lanes")
