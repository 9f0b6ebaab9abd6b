"""A picture of an estimate tells its numbers, and its text twin tells the same."""

from __future__ import annotations

import pytest

from bigkit import estimate_memory, format_bytes
from bigkit.draw.canvas import Box
from bigkit.draw.estimate import estimate_figure, estimate_label, estimate_text


@pytest.mark.parametrize("name", ["bert-base-cased", "deepseek-v3", "resnet50.a1_in1k"])
def test_estimate_bars_are_as_long_as_the_bytes(name: str) -> None:
    estimate = estimate_memory(name)
    picture = estimate_figure(estimate)
    parts = {"weights", "KV cache", "activations", "gradients", "optimizer"}
    bars: dict[float, float] = {}  # top of a bar -> its length
    for shape in picture.shapes:
        if isinstance(shape, Box) and shape.kind in parts:
            bars[shape.y] = bars.get(shape.y, 0) + shape.width
    lengths = [length for _, length in sorted(bars.items())]
    runs = len(estimate.inference)
    for group, drawn in ((estimate.inference, lengths[:runs]), (estimate.training, lengths[runs:])):
        scale = max(drawn) / max(row.total for row in group)
        assert drawn == pytest.approx([row.total * scale for row in group])


def test_estimate_text_and_label() -> None:
    estimate = estimate_memory("bert-base-cased")
    for row in (*estimate.inference, *estimate.training):
        assert format_bytes(row.total) in estimate_text(estimate)
        assert format_bytes(row.total) in estimate_label(estimate)
    assert "413.18 MB" in estimate_text(estimate)


def test_estimate_without_rows_is_drawn() -> None:
    estimate = estimate_memory("gpt2", stored=())
    assert "To train GPT2LMHeadModel (another scale)" in {text.text for text in estimate_figure(estimate).texts}
