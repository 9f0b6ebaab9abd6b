"""What every picture is drawn with: boxes, lines, texts, legends and axes, written as SVG text.

A picture is made by a pure function of data, from the top downwards, in points. It needs no plotting library, so an
explorer can draw it again at each turn of a slider.

Leaves out: what is drawn; each topic has its file beside this one.
"""

from __future__ import annotations

import html
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .colours import BLACK, DARK, GREY, SOFT, TRACK, WHITE, ink

WIDTH = 540  # points
PIXELS = 900  # that a picture is wide where there is room; with less room it shrinks
LEFT, RIGHT = 52, 116  # points beside the bars, for labels and numbers
GROUND, NORMAL, ABOVE, TOP = 0, 1, 2, 3  # depths: what is drawn later covers what was drawn before
PITCH = 5.0  # points between the lines of a hatch

# Widths of DejaVu Sans in em, rounded up; Verdana, which browsers take where it is missing, is as wide.
_WIDTHS = {
    0.28: "'IJijl", 0.32: " ,./:;\\|·", 0.36: "-f", 0.40: "!()[]rt", 0.46: '"', 0.52: "*?_`sz–", 0.56: "FLck",
    0.62: "PTYaovxy", 0.64: "$0123456789ESbdeghnpqu{}µ", 0.70: "ABCKRVXZ", 0.74: "U", 0.79: "DGHN", 0.82: "&OQw",
    0.84: "#+<=>M^~×≥", 0.98: "%m", 1.00: "@W…",
}  # fmt: skip
_WIDTH_OF = {letter: width for width, letters in _WIDTHS.items() for letter in letters}
BOLD = 1.12  # times as wide
_FORBIDDEN = re.compile("[\x00-\x1f\ud800-\udfff\ufffe\uffff]")


class Box(NamedTuple):
    """A rectangle in points; `kind` says what it stands for.

    A hatch is "/" or "x", drawn in the colour `ink`; the colour "none" leaves the ground visible.
    """

    kind: str
    x: float
    y: float
    width: float
    height: float
    colour: str
    hatch: str = ""
    ink: str = DARK
    depth: int = NORMAL
    moved: float = 0  # points downwards to where it has just come from, which an explorer shows


class Line(NamedTuple):
    """A line through points or, without a width, a filled polygon."""

    kind: str
    points: Sequence[tuple[float, float]]
    colour: str
    width: float = 0
    dash: str = ""
    depth: int = TOP


class Text(NamedTuple):
    """A text whose middle is at height `y`; a plate is a white ground that makes it legible on a hatch."""

    x: float
    y: float
    text: str
    size: float = 10
    colour: str = BLACK
    anchor: str = "start"
    bold: bool = False
    plate: bool = False
    inside: bool = False  # on a colour, which is the same in a dark theme

    @property
    def span(self) -> tuple[float, float]:
        """Where it begins and ends, from left to right."""
        width = text_width(self.text, self.size, self.bold)
        start = self.x - {"start": 0.0, "middle": width / 2, "end": width}[self.anchor]
        return start, start + width


class Mark(NamedTuple):
    """An invisible rectangle over something that can be pointed at.

    `key` says what it is ("layer:3"), `says` tells about it in a sentence, which is a tooltip wherever the picture is
    shown. `widgets/touch.js` reads `data`: what it may be dragged onto, and where it is now.
    """

    key: str
    says: str
    x: float
    y: float
    width: float
    height: float
    data: Mapping[str, str]


class Picture:
    """A picture that Jupyter shows, and that can be saved.

    Args:
        title: its name, which browsers show as a tooltip.
        label: what it says, as a sentence for those who cannot see it.
        left, right: points beside the bars and axes.

    >>> picture = Picture("A bar", "Half of it is full.")
    >>> picture.box("bar", 52, picture.y, 186, 16, "#0072B2")
    >>> picture
    <Picture: Half of it is full.>
    >>> picture.svg[:23]
    '<svg xmlns="http://www.'
    >>> picture.save("bar.svg")  # doctest: +SKIP
    """

    def __init__(self, title: str, label: str, left: float = LEFT, right: float = RIGHT) -> None:
        self.title, self.label, self.left, self.right = title, label, left, right
        self.y = 6.0  # where the next part begins, and at the end the height
        self.shapes: list[Box | Line] = []
        self.texts: list[Text] = []
        self.marks: list[Mark] = []

    @property
    def room(self) -> float:
        """Points between `left` and `right`."""
        return WIDTH - self.left - self.right

    # -- shapes and texts

    def box(self, *values: Any, **options: Any) -> None:
        """Draw a `Box`."""
        self.shapes.append(Box(*values, **options))

    def line(self, *values: Any, **options: Any) -> None:
        """Draw a `Line`."""
        self.shapes.append(Line(*values, **options))

    def frame(self, kind: str, x: float, y: float, width: float, height: float, *values: Any, **options: Any) -> None:
        """Draw the outline of a rectangle as a `Line`."""
        corners = [(x, y), (x + width, y), (x + width, y + height), (x, y + height), (x, y)]
        self.line(kind, corners, *values, **options)

    def text(self, *values: Any, **options: Any) -> None:
        """Write a `Text`."""
        self.texts.append(Text(*values, **options))

    def mark(self, key: str, says: str, x: float, y: float, width: float, height: float, **data: str) -> None:
        """Put a `Mark` over what is drawn there, unless it is too narrow to be pointed at."""
        if width >= 0.4 and height >= 0.4:
            self.marks.append(Mark(key, says, x, y, width, height, data))

    def label_in(
        self, x: float, middle: float, width: float, texts: Iterable[str], size: float = 8.5,
        ground: str = WHITE, plate: bool = False, margin: float = 4,
    ) -> None:  # fmt: skip
        """Write the first of some texts that fits into a box, in its middle; none if it is too narrow for all."""
        text = next((text for text in texts if text and text_width(text, size) <= width - margin), "")
        if text:
            inside = not plate and ground not in (WHITE, TRACK)
            colour = ink(ground) if inside else BLACK
            self.text(x + width / 2, middle, text, size, colour, "middle", plate=plate, inside=inside)

    # -- parts from the top downwards

    def head(self, facts: str = "") -> None:
        """The title and, below it, what was asked for, if anything."""
        self.text(8, self.y + 8, shorten(self.title, WIDTH - 16, 12, bold=True), 12, bold=True)
        if facts:
            self.text(8, self.y + 24, shorten(facts, WIDTH - 16, 9.5), 9.5, SOFT)
        self.y += 40 if facts else 24

    def heading(self, text: str) -> None:
        """One line over the next part."""
        self.text(8, self.y + 9, shorten(text, WIDTH - 16, 9.5), 9.5, SOFT)
        self.y += 20

    def legend(self, entries: Iterable[tuple[str, str | Sequence[str]]], styles: Mapping[str, str] = {}) -> None:
        """Name the colours.

        Args:
            entries: a name and its colour, or several colours.
            styles: name -> "/" or "x" for a hatch (an "x" has the colour itself), "-" or "--" for a line.
        """
        x = 8.0
        for name, colours in entries:
            colours, style = (colours,) if isinstance(colours, str) else colours, styles.get(name, "")
            wide = 7 if len(colours) > 1 else 12
            end = x + wide * len(colours) + 5 + text_width(name, 9)
            if end > WIDTH - 8 and x > 8:
                x, end, self.y = 8.0, end - x + 8, self.y + 16
            for i, colour in enumerate(colours):
                if style.startswith("-"):
                    dash = "5 2" if style == "--" else ""
                    self.line("key", [(x, self.y + 7), (x + wide, self.y + 7)], colour, 2, dash)
                    continue
                fill, stroke = ("none", colour) if style == "x" else (colour, WHITE if ink(colour) == WHITE else DARK)
                self.box("key", x + wide * i, self.y + 2, wide, 10, fill, style, stroke)
            self.text(end - text_width(name, 9), self.y + 7, name, 9)
            x = end + 14
        self.y += 22

    def axis(self, longest: float, unit: str, top: float) -> None:
        """Round values from 0 to `longest` below all that was drawn since `top`, with a thin line for each."""
        for value in ticks(longest):
            x = self.left + self.room * value / longest
            self.box("grid", x - 0.25, top, 0.5, self.y - top + 1, GREY, depth=GROUND)
            self.text(x, self.y + 7, f"{value:,g}" if value else f"0 {unit}", 8, SOFT, "middle")
        self.y += 20

    # -- showing it

    @property
    def svg(self) -> str:
        """One `<svg role="img">` element; the same picture gives the same text, and text in it stays text."""
        label, title = (html.escape(printable(text)) for text in (self.label, self.title))
        height = _number(self.y)
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {height}" '
            f'width="{PIXELS}" style="display:block;max-width:100%;height:auto" '
            "font-family=\"'DejaVu Sans', Verdana, sans-serif\">"
        )
        ground = f'<path class="ground" fill="{WHITE}" d="M0 0h{WIDTH}v{height}H0z"/>'
        parts = [head, f"<title>{title}</title>", ground, *self._draw_shapes(), *map(_draw_text, self.texts)]
        if self.marks:
            parts += ['<g class="marks" fill="none" pointer-events="all">', *map(_draw_mark, self.marks), "</g>"]
        return "\n".join([*parts, "</svg>"])

    def _draw_shapes(self) -> Iterator[str]:
        """Shapes that look the same become one path, which keeps the text short; a hatch lies over all fills."""
        groups: dict[tuple[float, str], list[str]] = {}
        for shape in self.shapes:
            if isinstance(shape, Line):
                groups.setdefault((shape.depth, _line_style(shape)), []).append(_trace(shape))
                continue
            x, y, width, height = map(_number, (shape.x, shape.y, shape.width, shape.height))
            outline = f"M{x} {y}h{width}v{height}h-{width}z"
            if shape.colour != "none":
                way = f' class="bigkit-travels" style="--from:{_number(shape.moved)}px"' if shape.moved else ""
                groups.setdefault((shape.depth, f'fill="{shape.colour}"{way}'), []).append(outline)
            if shape.hatch:
                style = f'fill="none" stroke="{shape.ink}" stroke-width="0.8"'
                groups.setdefault((shape.depth + 0.5, style), []).append(outline + "".join(_hatch(shape)))
        for (_, style), paths in sorted(groups.items(), key=lambda group: group[0][0]):
            yield f'<path {style} d="{"".join(paths)}"/>'

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it to a file.

        Raises:
            ValueError: the name does not end in .svg.
        """
        path = Path(path)
        if path.suffix != ".svg":
            raise ValueError(f"cannot save a picture as {path.name!r}: expected a name that ends in .svg")
        path.write_text(self.svg + "\n", encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        """The SVG as HTML, for as `image/svg+xml` JupyterLab would neither shrink it nor show its tooltips."""
        return self.svg

    def __repr__(self) -> str:
        return f"<Picture: {self.label}>"


# ---------------------------------------------------------------------------------------------------------------------
# Measures


def text_width(text: str, size: float, bold: bool = False) -> float:
    """How many points wide a text is in DejaVu Sans or Verdana, or a little less.

    >>> round(text_width("GPU 0", 10), 1)
    31.1
    """
    width = sum(_WIDTH_OF.get(letter, 0.66 if letter < "⺀" else 1.0) for letter in text)
    return size * width * (BOLD if bold else 1)


def shorten(text: str, width: float, size: float, bold: bool = False) -> str:
    """A text cut in its middle so that it is at most `width` points wide.

    >>> shorten("/models/a-very-long-name", 60, 10)
    '/mod…ame'
    """
    keep, short = min(len(text), 200), text
    while text_width(short, size, bold) > width and keep:
        keep -= 1
        short = f"{text[: keep - keep // 2]}…{text[len(text) - keep // 2 :]}"
    return short


def ticks(longest: float, parts: int = 4) -> list[float]:
    """Round values from 0 up to `longest` that cut it into at least so many parts, and less than three times as many.

    >>> ticks(24), ticks(0.9, parts=2)
    ([0, 5, 10, 15, 20], [0.0, 0.2, 0.4, 0.6, 0.8])
    """
    power = 10 ** math.floor(math.log10(longest / parts))
    step = next(step * power for step in (5, 2, 1) if step * power <= longest / parts * (1 + 1e-9))
    return [round(i * step, 12) for i in range(math.floor(longest / step + 1e-9) + 1)]


def time_unit(longest: float) -> tuple[float, str]:
    """The unit of an axis of time, in seconds, and its name.

    >>> time_unit(0.25)
    (0.001, 'ms')
    """
    return next(((unit, name) for unit, name in ((1.0, "s"), (1e-3, "ms")) if longest >= unit), (1e-6, "µs"))


# ---------------------------------------------------------------------------------------------------------------------
# SVG


def printable(text: str) -> str:
    """A text without characters that XML forbids, such as those of undecodable file names."""
    return _FORBIDDEN.sub("\ufffd", text)


def _number(value: float) -> str:
    """A coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _draw_text(text: Text) -> str:
    x, size = _number(text.x), _number(text.size)
    style = "" if text.anchor == "start" else f' text-anchor="{text.anchor}"'
    style += "" if text.colour == BLACK and not text.inside else f' fill="{text.colour}"'
    style += ' font-weight="bold"' if text.bold else ""
    baseline = _number(text.y + 0.36 * text.size)  # capitals are 0.73 em high
    words = f'<text x="{x}" y="{baseline}" font-size="{size}"{style}>{html.escape(printable(text.text))}</text>'
    if not text.plate:
        return words
    start, end = text.span
    width, height = _number(end - start + 3), _number(text.size + 2)
    top = _number(text.y - text.size / 2 - 1)
    return f'<path fill="{WHITE}" d="M{_number(start - 1.5)} {top}h{width}v{height}h-{width}z"/>\n{words}'


def _draw_mark(mark: Mark) -> str:
    x, y, width, height = map(_number, (mark.x, mark.y, mark.width, mark.height))
    key, says = (html.escape(printable(text)) for text in (mark.key, mark.says))
    data = "".join(f' data-{name}="{html.escape(value)}"' for name, value in mark.data.items())
    place = f'x="{x}" y="{y}" width="{width}" height="{height}"'
    return f'<rect data-key="{key}"{data} {place}><title>{says}</title></rect>'


def _line_style(line: Line) -> str:
    if not line.width:
        return f'fill="{line.colour}"'
    dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    return f'fill="none" stroke="{line.colour}" stroke-width="{_number(line.width)}"{dash}'


def _trace(line: Line) -> str:
    points = "L".join(f"{_number(x)} {_number(y)}" for x, y in line.points)
    return f"M{points}" + ("" if line.width else "z")


def _hatch(box: Box) -> Iterator[str]:
    """Slanted lines over a box, on a grid that all boxes share; a `<pattern>` would need an id unique in its page."""
    x, y, right, bottom = box.x, box.y, box.x + box.width, box.y + box.height
    for c in _grid(x + y, right + bottom):  # x + y = c, rising to the right
        start, end = max(x, c - bottom), min(right, c - y)
        yield f"M{_number(start)} {_number(c - start)}L{_number(end)} {_number(c - end)}"
    if box.hatch == "x":
        for c in _grid(x - bottom, right - y):  # x - y = c, falling to the right
            start, end = max(x, c + y), min(right, c + bottom)
            yield f"M{_number(start)} {_number(start - c)}L{_number(end)} {_number(end - c)}"


def _grid(start: float, end: float) -> Iterator[float]:
    return (PITCH * i for i in range(math.ceil(start / PITCH), math.floor(end / PITCH) + 1))
