"""Charts of bytes for the course: bars against the memory of a GPU, curves over tokens, areas, and the parts of a file.

Each is a function of the numbers that a notebook has just computed.

Leaves out: plans, estimates and runs, which have files of their own, and what is measured (matplotlib draws that).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..units import GiB, KiB, MiB, TiB, counted, format_bytes, three_figures
from .bars import PART_COLOURS, Bar, draw_bars
from .canvas import ABOVE, WIDTH, Picture, shorten, text_width, ticks
from .colours import BLACK, BLUE, DARK, GREEN, GREY, ORANGE, PALE, PURPLE, SKY, SOFT, VERMILLION, WHITE, YELLOW, ink

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, VERMILLION, GREY)
Sizes = Mapping[str, int]


def bars_figure(
    title: str, bars: Mapping[str, int | Sizes], limit: tuple[str, int] | None = None, facts: str = ""
) -> Picture:
    """Bars of bytes on one scale, and the line of a memory that they must stay left of.

    Args:
        title: what the bars are.
        bars: label -> bytes, or bytes by part: "weights", "KV cache", "activations" and others have their colours.
        limit: a name, and its bytes.
        facts: a second line.

    >>> bars_figure("One model", {"float32": 30 * 2**30, "bfloat16": 15 * 2**30}, ("GPU", 24 * 2**30))
    <Picture: One model: float32 30.00 GiB, bfloat16 15.00 GiB; GPU 24.00 GiB.>
    """
    parts = {name: {"": size} if isinstance(size, int) else dict(size) for name, size in bars.items()}
    sums = ", ".join(f"{name} {format_bytes(sum(part.values()))}" for name, part in parts.items())
    end = f"; {limit[0]} {format_bytes(limit[1])}" if limit else ""
    left = 16 + max(text_width(name, 10) for name in bars)
    picture = Picture(title, f"{title}: {sums}{end}.", left=left, right=108 if limit else 74)
    picture.head(facts)
    names = list(dict.fromkeys(name for part in parts.values() for name in part if name))
    spare = iter(colour for colour in COLOURS if colour not in {PART_COLOURS.get(name) for name in names})
    colours = {"": BLUE} | {name: PART_COLOURS.get(name) or next(spare) for name in names}
    if names:
        picture.legend([(name, colours[name]) for name in names])
    drawn = [
        Bar(name, [(key, size, colours[key]) for key, size in part.items()], limit and limit[1])
        for name, part in parts.items()
    ]
    if limit:
        longest = max([limit[1], *(bar.used for bar in drawn)])
        x, text = left + picture.room * limit[1] / longest, f"{limit[0]}: {format_bytes(limit[1])}"
        middle = min(x, WIDTH - 10 - text_width(text, 9, True) / 2)
        picture.text(middle, picture.y + 6, text, 9, BLACK, "middle", bold=True)
        picture.y += 16
        picture.line("limit", [(x, picture.y - 4), (x, picture.y + 23 * len(drawn))], BLACK, 1.8, depth=ABOVE)
    draw_bars(picture, drawn)
    return picture


def curves_figure(title: str, curves: Mapping[str, Sequence[tuple[int, int]]], unit: str = "tokens") -> Picture:
    """Bytes over a count, a curve for each name, which is written at its end; both axes begin at zero.

    Args:
        title: what the bytes are.
        curves: name -> (count, bytes), in order.
        unit: what is counted.

    >>> curves_figure("Cache", {"a": [(0, 0), (10, 2**30)], "b": [(0, 0), (10, 2**29)]})
    <Picture: Cache at 10 tokens: a 1.00 GiB, b 512.00 MiB.>
    """
    last = {name: points[-1] for name, points in curves.items()}
    longest, most = max(x for x, _ in last.values()), max(y for points in curves.values() for _, y in points)
    size, name_of = next(((s, n) for s, n in ((TiB, "TiB"), (GiB, "GiB"), (MiB, "MiB")) if most >= s), (KiB, "KiB"))
    words = ", ".join(f"{name} {format_bytes(y)}" for name, (_, y) in last.items())
    right = 22 + max(text_width(f"{name}  {format_bytes(y)}", 9) for name, (_, y) in last.items())
    picture = Picture(title, f"{title} at {longest:,} {unit}: {words}.", left=44, right=right)
    picture.head()
    top, high = picture.y + 8, 200.0
    for value in ticks(most / size):
        y = top + high * (1 - value * size / most)
        picture.line("grid", [(picture.left, y), (WIDTH - right, y)], PALE, 0.7, depth=ABOVE - 1)
        picture.text(picture.left - 5, y, f"{value:,g}" if value else f"0 {name_of}", 8, SOFT, "end")
    for value in ticks(longest):
        x = picture.left + picture.room * value / longest
        picture.text(x, top + high + 10, f"{value:,.0f}", 8, SOFT, "middle")
    picture.text(WIDTH - right + 6, top + high + 10, unit, 8, SOFT)
    heights = {name: top + high * (1 - y / most) for name, (_, y) in last.items()}
    written = _apart(heights, 12, top + high)
    for colour, (name, points) in zip(COLOURS * len(curves), curves.items()):
        line = [(picture.left + picture.room * x / longest, top + high * (1 - y / most)) for x, y in points]
        picture.line("curve", line, colour, 2)
        end, label = WIDTH - right + 14, (WIDTH - right + 1, heights[name])
        picture.line("leader", [label, (end, written[name])], GREY, 0.7, depth=ABOVE - 1)
        picture.box("key", end, written[name] - 3, 4, 6, colour)
        picture.text(end + 7, written[name], f"{name}  {format_bytes(last[name][1])}", 9)
    picture.y = top + high + 22
    return picture


def areas_figure(title: str, groups: Mapping[str, Sizes]) -> Picture:
    """Bytes as areas: a rectangle for each group, cut into its parts (a squarified treemap).

    Args:
        title: what the whole is.
        groups: name -> name of a part -> bytes.

    >>> areas_figure("A model", {"blocks": {"0": 3 * 2**30, "1": 2**30}, "head": {"": 2**30}})
    <Picture: A model, 5.00 GiB: blocks 4.00 GiB in 2 parts, head 1.00 GiB.>
    """
    sums = {name: sum(parts.values()) for name, parts in groups.items()}
    words = ", ".join(
        f"{name} {format_bytes(size)}" + (f" in {counted(len(groups[name]), 'part')}" if len(groups[name]) > 1 else "")
        for name, size in sums.items()
    )
    whole = sum(sums.values())
    picture = Picture(title, f"{title}, {format_bytes(whole)}: {words}.")
    picture.head(f"{format_bytes(whole)}; each area is as large as its bytes")
    colours = dict(zip(groups, COLOURS))
    picture.legend([(f"{name} {three_figures(100 * size / whole)} %", colours[name]) for name, size in sums.items()])
    for name, (x, y, width, height) in squarify(sums, 8, picture.y, WIDTH - 16, 230).items():
        for part, (px, py, wide, high) in squarify(groups[name], x, y, width, height).items():
            picture.box(name, px, py, wide, high, colours[name])
            picture.frame("outline", px, py, wide, high, WHITE, 0.8)
            if high > 11:
                picture.label_in(px, py + high / 2, wide, [part or name], 8, colours[name])
    picture.y += 238
    return picture


def squarify(
    sizes: Sizes, x: float, y: float, width: float, height: float
) -> dict[str, tuple[float, float, float, float]]:
    """Rectangles (x, y, width, height) that fill one, with areas in proportion to sizes, and about as wide as high.

    Source: Bruls, Huizing and van Wijk, Squarified Treemaps (2000).

    >>> squarify({"a": 3, "b": 1}, 0, 0, 40, 10)
    {'a': (0, 0.0, 30.0, 10.0), 'b': (30.0, 0.0, 10.0, 10.0)}
    """
    rest = sorted((item for item in sizes.items() if item[1] > 0), key=lambda item: -item[1])
    scale, placed = width * height / (sum(sizes.values()) or 1), {}
    while rest:
        short, strip, best = min(width, height), 1, float("inf")
        for count in range(1, len(rest) + 1):  # as many as make the worst of the strip less oblong
            thick = sum(size for _, size in rest[:count]) * scale / short
            worst = max(max(thick * thick / (size * scale), size * scale / thick**2) for _, size in rest[:count])
            if worst > best:
                break
            strip, best = count, worst
        thick, along = sum(size for _, size in rest[:strip]) * scale / short, 0.0
        for name, size in rest[:strip]:
            long = size * scale / thick
            placed[name] = (x, y + along, thick, long) if width >= height else (x + along, y, long, thick)
            along += long
        x, y, width, height = (
            (x + thick, y, width - thick, height) if width >= height else (x, y + thick, width, height - thick)
        )
        rest = rest[strip:]
    return placed


def file_figure(path: str | os.PathLike[str], tensor: str) -> Picture:
    """A safetensors file as a ruler: eight bytes, the header, and the tensors, one of which the header points to.

    The first two parts are drawn larger than they are, the tensors in proportion to their bytes.

    Args:
        path: the file.
        tensor: a name in it.

    Raises:
        KeyError: the file has no such tensor.
        CheckpointError: it is no sound safetensors file.
    """
    from ..checkpoints.format import read_header  # imports torch, which the other charts do not need

    path, tensors = Path(path), read_header(Path(path))
    found, whole = tensors[tensor], path.stat().st_size
    start, count = min(other.offset for other in tensors.values()), counted(len(tensors), "tensor")
    picture = Picture(
        path.name,
        f"{path.name}, {whole:,} bytes: 8 that say how long the header is, a header of {start - 8:,} bytes, and "
        f"{count}; {tensor} lies from {found.offset:,} to {found.offset + found.nbytes:,}.",
    )
    picture.head(f"{count} in {whole:,} bytes; the first two parts are drawn larger than they are")
    top, high, edges = picture.y + 42, 34.0, (8.0, 80.0, 190.0, float(WIDTH - 8))
    for x, wide, text, colour in (
        (edges[0], 72.0, f"{start - 8:,}", ORANGE),
        (edges[1], 110.0, "header (JSON)", GREEN),
    ):
        picture.box("part", x, top, wide, high, colour)
        picture.text(x + wide / 2, top + high / 2, text, 9.5, ink(colour), "middle")
    scale = (edges[3] - edges[2]) / (whole - start)
    for other in tensors.values():
        x, wide = edges[2] + (other.offset - start) * scale, other.nbytes * scale
        picture.box("tensor", x, top, wide, high, BLUE)
        if wide > 2:
            picture.line("edge", [(x, top), (x, top + high)], WHITE, 0.8)
    x, wide = edges[2] + (found.offset - start) * scale, max(found.nbytes * scale, 2.5)
    picture.box("found", x, top - 3, wide, high + 6, YELLOW, depth=ABOVE)
    picture.frame("frame", x, top - 3, wide, high + 6, DARK)
    hook = [(edges[1] + 55, top), (edges[1] + 55, top - 14), (x + wide / 2, top - 14), (x + wide / 2, top - 4)]
    picture.line("arrow", hook, DARK, 1.2)
    tip = x + wide / 2
    picture.line("head", [(tip, top - 3), (tip - 3, top - 9), (tip + 3, top - 9)], DARK)
    words = shorten(
        f"{tensor}: data_offsets [{found.offset - start:,}, {found.offset - start + found.nbytes:,}]", 380, 9
    )
    picture.text(edges[1] + 55, top - 22, words, 9, SOFT)
    for x, text, anchor in (
        (edges[0], "byte 0", "start"), (edges[1], "8", "middle"), (edges[2], f"{start:,}", "middle"),
        (edges[3], f"{whole:,}", "end"),
    ):  # fmt: skip
        picture.line("tick", [(x, top + high), (x, top + high + 6)], DARK, 1)
        picture.text(x, top + high + 12, text, 8.5, SOFT, anchor)
    picture.y = top + high + 24
    return picture


def _apart(heights: Mapping[str, float], gap: float, lowest: float) -> dict[str, float]:
    """Heights of labels near those of their curves, at least `gap` apart, none below `lowest`."""
    moved: dict[str, float] = {}
    for name in sorted(heights, key=lambda name: -heights[name]):  # from the bottom up
        moved[name] = lowest = min(heights[name], lowest)
        lowest -= gap
    return moved
