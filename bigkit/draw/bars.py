"""Stacked bars of bytes on one scale, which pictures of plans and of estimates share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..units import GiB, KiB, MiB, format_bytes, three_figures
from .canvas import ABOVE, GROUND, WIDTH, Picture, text_width
from .colours import BLACK, BLUE, DARK, GREEN, ORANGE, PURPLE, TRACK, VERMILLION, WHITE, YELLOW

ROW, BAR = 23, 16  # points from one bar to the next, and of a bar

PART_COLOURS = {
    "weights": BLUE, "KV cache": ORANGE, "activations": YELLOW, "reserve": WHITE, "overhead": DARK,
    "gradients": GREEN, "optimizer": PURPLE,
}  # fmt: skip
PART_ABOUT = {"activations": "the working memory of the largest step", "reserve": "room for offloaded layers in flight",
              "overhead": "what the runtime itself takes"}  # fmt: skip
HATCHES = {"reserve": "/", "over budget": "x"}


@dataclass(frozen=True)
class Bar:
    """A stacked bar: (part, bytes, colour) from the left, and the capacity in bytes that it is compared with."""

    label: str
    parts: list[tuple[str, int, str]]
    capacity: int | None = None
    key: str = ""  # of its mark
    says: str = ""  # about the whole bar
    parts_say: Mapping[str, str] = field(default_factory=dict)  # about a part, in a few words

    @property
    def used(self) -> int:
        """Bytes of all parts."""
        return sum(size for _, size, _ in self.parts)


def draw_bars(picture: Picture, bars: Sequence[Bar], least: int = 0) -> None:
    """Bars with an axis below that reaches to the longest bar or capacity, and at least to so many bytes.

    A disk much larger than what rests on it would squeeze the rest: its capacity is then written, not drawn.
    """
    most = max((bar.used for bar in bars), default=0) or 1
    drawn = [bar.capacity for bar in bars if bar.capacity and (bar.label != "disk" or bar.capacity <= 2 * most)]
    longest = max([most, least, *drawn])
    unit, unit_name = next(((u, name) for u, name in ((GiB, "GiB"), (MiB, "MiB")) if longest >= u), (KiB, "KiB"))
    top = picture.y
    for bar in bars:
        _draw_bar(picture, bar, longest, unit, unit_name)
    picture.axis(longest / unit, unit_name, top)


def _draw_bar(picture: Picture, bar: Bar, longest: int, unit: int, unit_name: str) -> None:
    x, y, middle = picture.left, picture.y + (ROW - BAR) / 2, picture.y + ROW / 2
    scale = picture.room / longest
    over = bar.capacity is not None and bar.used > bar.capacity
    key = bar.key or f"bar:{bar.label}"
    picture.mark(key, bar.says or f"{bar.label}: {format_bytes(bar.used)}.", 0, picture.y, WIDTH, ROW)
    picture.text(picture.left - 6, middle, bar.label, anchor="end")
    if bar.capacity:
        picture.box("room", x, y, min(bar.capacity, longest) * scale, BAR, TRACK, depth=GROUND)
    for name, size, colour in bar.parts:
        if not size:
            continue
        width, hatch = size * scale, HATCHES.get(name, "")
        picture.box(name, x, y, width, BAR, colour, hatch)
        about = f", {bar.parts_say[name]}" if name in bar.parts_say else ""
        picture.mark(f"{key}:{name}", f"{bar.label}: {name} {format_bytes(size)}{about}.", x, y, width, BAR)
        number = three_figures(size / unit)
        plate = bool(hatch) or over
        texts = (f"{name} {number}", number)
        picture.label_in(x, middle, width, texts, ground=colour, plate=plate, margin=8 if plate else 4)
        x += width
    if bar.capacity is not None and bar.capacity <= longest:
        end = picture.left + bar.capacity * scale
        if over:
            picture.box("over budget", end, y, x - end, BAR, "none", "x", VERMILLION, ABOVE)
        picture.box("capacity", end - 0.9, y - 3, 1.8, BAR + 6, BLACK, depth=ABOVE)
    total = three_figures(bar.used / unit)
    total += "" if bar.capacity is None else f" of {three_figures(bar.capacity / unit)}"
    total = f"{total} {unit_name}"
    font = 9.5 if text_width(total, 9.5, over) < picture.right - 12 else 8.0
    picture.text(WIDTH - 8, middle, total, font, "#B00000" if over else BLACK, "end", bold=over)
    picture.y += ROW
