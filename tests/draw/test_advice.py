"""The picture of an advice tells its numbers."""

from __future__ import annotations

import pytest

from bigkit import advise
from bigkit.draw.advice import advice_figure
from bigkit.draw.canvas import Box, Line


@pytest.mark.parametrize(
    ("model", "machine"),
    [("llama-2-70b", "RTX 4090"), ("deepseek-v3", "8 x H200"), ("resnet50.a1_in1k", "T4"), ("llama-3.1-405b", "Binder"),
     ("mixtral-8x7b", "2 x RTX 4090"), ("llama-2-7b", "laptop")],
)  # fmt: skip
def test_bars_are_as_long_as_the_bytes_and_lines_lie_where_memory_ends(model: str, machine: str) -> None:
    advice = advise(model, machine)
    picture = advice_figure(advice)
    plans = [*(option.plan for option in advice.options), *advice.misfits]
    [*tracks] = (shape for shape in picture.shapes if isinstance(shape, Box) and shape.kind == "room")
    assert len(plans) == len(tracks)
    ends: dict[float, float] = {track.y: 0.0 for track in tracks}  # top of a bar -> its length
    for shape in picture.shapes:
        if isinstance(shape, Box) and shape.y in ends and shape.kind not in ("room", "key", "grid"):
            ends[shape.y] += shape.width
    totals = [sum(share.used for share in plan.shares) for plan in plans]
    scale = max(ends.values()) / max(totals)
    assert [*ends.values()] == pytest.approx([total * scale for total in totals])
    running = sum(share.budget or 0 for share in plans[0].shares if share.runs)
    lines = {shape.points[0][0] for shape in picture.shapes if isinstance(shape, Line) and shape.kind == "capacity"}
    assert min(lines) == pytest.approx(picture.left + running * scale)
    assert 1 <= len(lines) <= 3


def test_label_and_texts_say_each_way() -> None:
    advice = advise("llama-3.1-405b", "RTX 4090")
    picture = advice_figure(advice)
    texts = {text.text for text in picture.texts}
    assert advice.options and advice.verdict in picture.label
    for option in advice.options:
        assert option.speed in texts and f"{option.label} {option.speed}" in picture.label
    small = advise("llama-3.1-405b", "2 x T4, 32GiB RAM")
    assert {"does not fit"} <= {text.text for text in advice_figure(advise("llama-3.1-405b", "Binder")).texts}
    assert small.best is None or small.options


def test_the_grid_passes_behind_what_a_token_waits_for() -> None:
    picture = advice_figure(advise("llama-3.1-8b", "RTX 3060"))
    grounds = [shape for shape in picture.shapes if isinstance(shape, Box) and shape.kind == "words" and shape.depth]
    waits = [text for text in picture.texts if text.text.startswith("waits for ")]
    assert len(waits) == 4
    for text in waits:
        start, end = text.span
        assert any(at.x <= start and end <= at.x + at.width and at.y < text.y < at.y + at.height for at in grounds)
