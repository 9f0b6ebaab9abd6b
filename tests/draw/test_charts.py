"""Charts of the course draw the numbers that they are given, and keep text from outside as text."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from bigkit.draw.canvas import WIDTH, Box, Line, Picture
from bigkit.draw.charts import areas_figure, bars_figure, curves_figure, file_figure, squarify
from bigkit.units import GiB

EVIL = "<script>alert('1')</script> & \x00 é"


def boxes(picture: Picture, kind: str) -> list[Box]:
    return [shape for shape in picture.shapes if isinstance(shape, Box) and shape.kind == kind]


def test_bars_share_a_scale_and_stop_at_the_limit_or_are_hatched_beyond() -> None:
    picture = bars_figure("Sizes", {"a": 30 * GiB, "b": {"weights": 10 * GiB, "KV cache": 5 * GiB}}, ("GPU", 24 * GiB))
    (a,), (weights,), (cache,) = (boxes(picture, kind) for kind in ("", "weights", "KV cache"))
    assert a.width == pytest.approx(3 * weights.width) and weights.width == pytest.approx(2 * cache.width)
    assert cache.x == pytest.approx(weights.x + weights.width)
    (over,) = boxes(picture, "over budget")
    assert over.width == pytest.approx(a.width * 6 / 30)
    (limit,) = [shape for shape in picture.shapes if isinstance(shape, Line)]
    assert limit.points[0][0] == pytest.approx(a.x + a.width * 24 / 30)
    assert picture.label == "Sizes: a 30.00 GiB, b 15.00 GiB; GPU 24.00 GiB."


def test_curves_begin_and_end_where_the_numbers_say() -> None:
    picture = curves_figure("Cache", {"a": [(0, 0), (50, 4 * GiB), (100, 8 * GiB)], "b": [(0, 0), (100, 2 * GiB)]})
    a, b = (shape.points for shape in picture.shapes if isinstance(shape, Line) and shape.kind == "curve")
    assert a[0] == b[0] and a[-1][0] == b[-1][0] == pytest.approx(WIDTH - picture.right)
    assert (a[0][1] - b[-1][1]) == pytest.approx((a[0][1] - a[-1][1]) / 4)
    assert a[1] == (pytest.approx((a[0][0] + a[2][0]) / 2), pytest.approx((a[0][1] + a[2][1]) / 2))


def test_labels_of_curves_that_end_together_stay_apart() -> None:
    picture = curves_figure("Cache", {name: [(0, 0), (10, GiB + i)] for i, name in enumerate("abcd")})
    heights = sorted(text.y for text in picture.texts if text.text[:3] in ("a  ", "b  ", "c  ", "d  "))
    assert len(heights) == 4 and all(low - high >= 11.9 for high, low in zip(heights, heights[1:]))


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=40), st.floats(20, 500), st.floats(20, 500))
def test_areas_are_the_sizes_and_do_not_overlap(sizes: list[int], width: float, height: float) -> None:
    placed = squarify({str(i): size for i, size in enumerate(sizes)}, 0, 0, width, height)
    for i, size in enumerate(sizes):
        x, y, wide, high = placed[str(i)]
        assert wide * high == pytest.approx(width * height * size / sum(sizes), rel=1e-6)
        near = 1e-3  # points: a sliver of a billionth of the area is as long as rounding lets it be
        assert x >= -near and y >= -near and x + wide <= width + near and y + high <= height + near
    assert sum(wide * high for *_, wide, high in placed.values()) == pytest.approx(width * height)


def test_areas_of_groups_are_cut_into_their_parts() -> None:
    picture = areas_figure("A model", {"blocks": {"0": 6, "1": 2}, "head": {"": 2}})
    area = {kind: sum(box.width * box.height for box in boxes(picture, kind)) for kind in ("blocks", "head")}
    assert area["blocks"] == pytest.approx(4 * area["head"]) and len(boxes(picture, "blocks")) == 2
    assert [text.text for text in picture.texts if "%" in text.text] == ["blocks 80.0 %", "head 20.0 %"]


def test_file_is_drawn_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(300), "b": torch.zeros(100)}, path)
    picture = file_figure(path, "b")
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    wide = {box.width for box in boxes(picture, "tensor")}
    assert max(wide) == pytest.approx(3 * min(wide))
    assert f"{len(data):,} bytes: 8 that say how long the header is, a header of {length:,} bytes" in picture.label
    assert f"b lies from {8 + length + 1200:,} to {8 + length + 1600:,}" in picture.label
    assert any("data_offsets [1,200, 1,600]" in text.text for text in picture.texts)
    with pytest.raises(KeyError):
        file_figure(path, "c")


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({EVIL[:20]: torch.zeros(3)}, path)
    for picture in (
        bars_figure(EVIL, {EVIL: {EVIL: GiB}}, (EVIL, GiB), EVIL),
        curves_figure(EVIL, {EVIL: [(0, 0), (1, 1)]}, EVIL),
        areas_figure(EVIL, {EVIL: {EVIL: 1}}),
        file_figure(path, EVIL[:20]),
    ):
        root = ElementTree.fromstring(picture.svg)
        tags = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert tags <= {"svg", "title", "path", "text", "g", "rect"}
        assert not re.search("<script", picture.svg) and "<script>" in "".join(root.itertext())
