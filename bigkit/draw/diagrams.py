"""Drawn diagrams of the course: a small vocabulary of blocks, arrows and braces, and the pictures made with it.

A diagram is a `Picture` whose parts are placed by hand, in points; it is 540 points wide, and as high as its lowest
part. Blocks know where their sides are, so that arrows can join them. Each picture is a function without arguments,
named after its idea. Here are those of notebooks 00 to 04, 14 and 16; `diagrams_run` has those of the others.

Leaves out: pictures of data, which have their own files beside this one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .canvas import Picture, text_width
from .colours import DARK, SKY, SOFT, WHITE, ink

Point = tuple[float, float]


class Block(NamedTuple):
    """A block that has been drawn, in points: where it is, and the middles of its sides.

    >>> Block(10, 20, 100, 30).right
    (110, 35.0)
    """

    x: float
    y: float
    width: float
    height: float

    @property
    def left(self) -> Point:
        return self.x, self.y + self.height / 2

    @property
    def right(self) -> Point:
        return self.x + self.width, self.y + self.height / 2

    @property
    def top(self) -> Point:
        return self.x + self.width / 2, self.y

    @property
    def bottom(self) -> Point:
        return self.x + self.width / 2, self.y + self.height


class Diagram(Picture):
    """A picture of blocks, arrows, braces and notes; all coordinates are points from the top left corner.

    Args:
        title: a line over the picture.
        label: what it shows, as a sentence for those who cannot see it.

    >>> diagram = Diagram("A loan", "Box A points to box B.")
    >>> a, b = diagram.row(20, 40, ["A", "B"], width=80, gap=60)
    >>> diagram.arrow(a.right, b.left, text="lends")
    >>> diagram
    <Picture: Box A points to box B.>
    """

    def __init__(self, title: str, label: str) -> None:
        super().__init__(title, label)
        self.text(8, 14, title, 12, bold=True)
        self.y = 32.0

    def reach(self, y: float) -> None:
        """Make the picture at least so high."""
        self.y = max(self.y, y + 8)

    def note(
        self, x: float, y: float, text: str, size: float = 9, colour: str = SOFT, anchor: str = "start",
        bold: bool = False, plate: bool = False,
    ) -> None:  # fmt: skip
        """Write a text whose first line has its middle at height `y`; "\\n" begins another line."""
        for i, line in enumerate(text.split("\n")):
            self.text(x, y + i * (size + 3), line, size, colour, anchor, bold=bold, plate=plate)
        self.reach(y + text.count("\n") * (size + 3) + size / 2)

    def block(
        self, x: float, y: float, width: float, height: float, text: str = "", colour: str = SKY,
        hatch: str = "", dash: str = "", size: float = 9.5,
    ) -> Block:  # fmt: skip
        """Draw a block with a text in its middle, whose lines after the first are smaller.

        Args:
            colour: of the ground; "none" leaves the outline alone.
            hatch: "/" or "x".
            dash: such as "4 3", for the outline of what is not there.

        Raises:
            ValueError: a line is wider than the block.
        """
        self.box("block", x, y, width, height, colour, hatch)
        corners = [(x, y), (x + width, y), (x + width, y + height), (x, y + height), (x, y)]
        self.line("outline", corners, DARK, 0.8, dash)
        lines = text.split("\n") if text else []
        sizes = [size, *[size - 1] * (len(lines) - 1)]
        middle = y + height / 2 - (sum(sizes[1:]) + 3 * len(sizes[1:])) / 2
        for line, font in zip(lines, sizes):
            if (needed := text_width(line, font)) > width - 2:
                raise ValueError(f"{line!r} needs {needed:.0f} points: a block of {width:g} points is too narrow")
            ground = WHITE if colour == "none" else colour
            self.text(x + width / 2, middle, line, font, ink(ground), "middle", plate=bool(hatch))
            middle += font + 3
        self.reach(y + height)
        return Block(x, y, width, height)

    def row(
        self, x: float, y: float, texts: Sequence[str], width: float | Sequence[float], height: float = 24,
        colours: str | Sequence[str] = SKY, gap: float = 0, size: float = 9.5,
    ) -> list[Block]:  # fmt: skip
        """Draw blocks from left to right, `gap` points apart; one width or colour holds for all."""
        blocks = []
        for i, text in enumerate(texts):
            wide = width if isinstance(width, (int, float)) else width[i]
            colour = colours if isinstance(colours, str) else colours[i]
            blocks.append(self.block(x, y, wide, height, text, colour, size=size))
            x += wide + gap
        return blocks

    def arrow(self, *points: Point, text: str = "", colour: str = DARK, dash: str = "", width: float = 1.4) -> None:
        """Draw an arrow through points, with a text beside the middle of its longest part."""
        (x0, y0), (x1, y1) = points[-2:]
        length = math.hypot(x1 - x0, y1 - y0)
        across, along = (x1 - x0) / length, (y1 - y0) / length
        base = x1 - 7 * across, y1 - 7 * along  # the head is 7 points long and 7 wide
        self.line("arrow", [*points[:-1], base], colour, width, dash)
        sides = [(base[0] - s * 3.5 * along, base[1] + s * 3.5 * across) for s in (1, -1)]
        self.line("head", [(x1, y1), *sides], colour)
        self.reach(max(y for _, y in points))
        if not text:
            return
        (x0, y0), (x1, y1) = max(zip(points, points[1:]), key=lambda part: math.dist(*part))
        upright = abs(x1 - x0) < abs(y1 - y0)
        x, y = (x0 + x1) / 2, (y0 + y1) / 2 - 6 * text.count("\n")
        if upright:
            self.note(x + 6, y, text)
        else:
            self.note(x, y - 8 - 6 * text.count("\n"), text, anchor="middle", plate=True)

    def brace(self, start: float, end: float, y: float, text: str = "", up: bool = False) -> None:
        """Draw a brace from `start` to `end`, open at height `y`, with a text on its far side."""
        s, middle = (-1 if up else 1), (start + end) / 2
        tip = [(middle - 4, y + 4 * s), (middle, y + 8 * s), (middle + 4, y + 4 * s)]
        self.line("brace", [(start, y), (start, y + 4 * s), *tip, (end, y + 4 * s), (end, y)], DARK, 1)
        if text:
            lines = text.count("\n")
            self.note(middle, y + 15 * s - (12 * lines if up else 0), text, anchor="middle")
        self.reach(y if up else y + 8)


def figures() -> dict[str, Diagram]:
    """Every diagram of the course by the name of its function: those of this file and of `diagrams_run`."""
    from . import diagrams_run

    made = {**globals(), **vars(diagrams_run)}
    return {
        name: draw() for name, draw in made.items()
        if callable(draw) and name[0] != "_" and getattr(draw, "__annotations__", {}).get("return") == "Diagram"
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Models, files and maps
