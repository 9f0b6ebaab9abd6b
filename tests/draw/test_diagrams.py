"""Every diagram of the course is legible: texts stay inside the picture and apart from each other."""

from __future__ import annotations

from itertools import combinations

import pytest

from bigkit.draw.canvas import WIDTH, Text
from bigkit.draw.diagrams import Block, Diagram, figures

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
