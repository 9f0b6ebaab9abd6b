"""A picture of an estimate tells its numbers, and its text twin tells the same."""

from __future__ import annotations

import pytest

from bigkit import estimate_memory, format_bytes
from bigkit.draw.estimate import estimate_figure, estimate_label, estimate_text
from tests.draw.test_plan import boxes, rows, texts


@pytest.mark.parametrize("name", ["bert-base-cased", "deepseek-v3", "resnet50.a1_in1k"])
def test_estimate_bars_are_as_long_as_the_bytes(name: str) -> None:
    estimate = estimate_memory(name)
    picture = estimate_figure(estimate)
    tops = rows(picture)
    records = [*estimate.inference, *estimate.training]
    assert len(tops) == len(records)
    kinds = {"weights": "weights", "kv_cache": "KV cache", "activations": "activations", "gradients": "gradients",
             "optimizer": "optimizer"}  # fmt: skip
    for group in (estimate.inference, estimate.training):
        lengths = {}
        for record in group:
            y = tops[records.index(record)]
            drawn = [box for kind in kinds.values() for box in boxes(picture, kind) if box.y == y]
            lengths[record.total] = sum(box.width for box in drawn)
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
