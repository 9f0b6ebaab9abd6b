"""Drawn diagrams of the course: a small vocabulary of blocks, arrows and braces, and the pictures made with it.

A diagram is a `Picture` whose parts are placed by hand, in points; it is 540 points wide, and as high as its lowest
part. Blocks know where their sides are, so that arrows can join them. Each picture is a function without arguments,
named after its idea. Here are those of notebooks 01 to 04; `diagrams_count` has those of the index, 14 and 16, and
`diagrams_run` those of the others.

Leaves out: pictures of data, which have their own files beside this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .canvas import Picture, text_width
from .colours import BLUE, DARK, GREEN, GREY, ORANGE, PALE, SKY, SOFT, VERMILLION, WHITE, YELLOW, ink

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
        self.frame("outline", x, y, width, height, DARK, 0.8, dash)
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


def diagram(title: str) -> Callable[[Callable[[Diagram], None]], Callable[[], Diagram]]:
    """Make what draws into a diagram a function without arguments, which returns it; its docstring is the label."""

    def decorate(draw: Callable[[Diagram], None]) -> Callable[[], Diagram]:
        def made() -> Diagram:
            d = Diagram(title, " ".join((draw.__doc__ or "").split()))
            draw(d)
            return d

        made.__doc__, made.__name__, made.__module__ = draw.__doc__, draw.__name__, draw.__module__
        return made

    return decorate


def figures() -> dict[str, Diagram]:
    """Every diagram of the course by the name of its function: of this file, `diagrams_count`, `diagrams_run`."""
    from . import diagrams_count, diagrams_run

    made = {**globals(), **vars(diagrams_count), **vars(diagrams_run)}
    return {
        name: draw() for name, draw in made.items()
        if callable(draw) and name[0] != "_" and getattr(draw, "__annotations__", {}).get("return") == "Diagram"
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Models, files and maps


@diagram("An empty model: parameters without numbers, real buffers, ties that hold")  # notebook 01
def kinds_of_tensor(d: Diagram) -> None:
    """A parameter on the meta device has a shape and a dtype but no numbers; a buffer is real and keeps its own; a tied
    weight is one parameter that two modules hold.
    """
    real = d.block(8, 64, 118, 58, "4096 x 4096\nfloat16\n0.12 -0.03 1.4 …", BLUE)
    meta = d.block(158, 64, 118, 58, "4096 x 4096\nfloat16\nno numbers", "none", dash="4 3")
    buffer = d.block(308, 64, 92, 58, "64\nfloat32\n1.0 0.87 …", GREEN)
    tie = d.block(436, 90, 96, 32, "one parameter", "none", dash="4 3")
    for block, text in ((real, "parameter, usual"), (meta, "parameter, empty"), (buffer, "buffer")):
        d.note(block.top[0], 48, text, 9.5, anchor="middle", bold=True)
    d.note(tie.top[0], 48, "tied weight", 9.5, anchor="middle", bold=True)
    d.note(436, 68, "embedding", 8.5)
    d.note(532, 68, "head", 8.5, anchor="end")
    d.arrow((456, 74), (466, 90))
    d.arrow((520, 74), (508, 90))
    d.note(real.bottom[0], 134, "32 MiB in memory", anchor="middle")
    d.note(meta.bottom[0], 134, "0 bytes in memory", anchor="middle")
    d.note(buffer.bottom[0], 134, "256 bytes, kept", anchor="middle")
    d.note(tie.bottom[0], 134, "counted once", anchor="middle")


@diagram("Two ways to fill a model")  # notebook 01
def two_ways_to_load(d: Diagram) -> None:
    """Usually a model is built with random numbers, the file is read into a second copy, and the numbers are copied
    over; an empty model takes the tensors that were read as its own, so there is one copy.
    """
    d.note(8, 50, "usual: copy", 9.5, bold=True)
    file = d.block(112, 38, 70, 26, "file", PALE)
    read = d.block(240, 38, 110, 26, "tensors read", BLUE)
    model = d.block(420, 38, 112, 26, "random numbers", ORANGE)
    d.arrow(file.right, read.left, text="read")
    d.arrow(read.right, model.left, text="copy_")
    d.note(540 - 8, 76, "two copies in memory", anchor="end")
    d.note(8, 112, "empty: assign", 9.5, bold=True)
    file = d.block(112, 100, 70, 26, "file", PALE)
    read = d.block(240, 100, 110, 26, "tensors read", BLUE)
    model = d.block(420, 100, 112, 26, "names and shapes", "none", dash="4 3")
    d.arrow(file.right, read.left, text="read")
    d.arrow(model.left, read.right, text="is now")
    d.note(540 - 8, 138, "one copy: the tensors that were read", anchor="end")


@diagram("A block computes x + f(x): cut it, and the sum has its terms on two GPUs")  # notebook 02
def residual(d: Diagram) -> None:
    """The input x goes through f, whose second part lies on GPU 1, and also around f to the plus sign: x is on GPU 0
    and f(x) is on GPU 1, so the sum fails.
    """
    d.block(8, 40, 318, 84, "", PALE)
    d.block(336, 40, 120, 84, "", PALE)
    d.note(16, 50, "GPU 0", 9, bold=True)
    d.note(344, 50, "GPU 1", 9, bold=True)
    x = d.block(24, 66, 30, 26, "x", WHITE)
    norm = d.block(82, 66, 60, 26, "norm", SKY)
    up = d.block(170, 66, 66, 26, "up_proj", SKY)
    down = d.block(350, 66, 84, 26, "down_proj", SKY)
    plus = d.block(484, 66, 30, 26, "+", YELLOW, size=12)
    d.arrow(x.right, norm.left)
    d.arrow(norm.right, up.left)
    d.arrow(up.right, down.left, text="is moved")
    d.arrow(down.right, plus.left)
    d.line("cut", [(331, 34), (331, 146)], VERMILLION, 2, "5 3")
    d.note(331, 152, "a careless cut", 9, anchor="middle")
    d.arrow(x.bottom, (39, 110), (499, 110), plus.bottom)
    d.note(190, 117, "x goes around f and stays on GPU 0", 8.5, anchor="middle")
    d.note(540 - 8, 152, "f(x) is on GPU 1, x is on GPU 0", 9, anchor="end")


@diagram("What does not fit is copied to the GPU when it is needed")  # notebook 02
def visitors(d: Diagram) -> None:
    """GPU 0 holds layers 1, 3 and 5 and one free slot; layers 0, 2, 4 and 6 are in RAM or on disk: while layer 1
    computes, layer 2 is copied into the slot.
    """
    d.block(150, 40, 382, 46, "", PALE)
    d.note(8, 62, "GPU 0", 10, bold=True)
    d.row(158, 50, ["layer 1", "layer 3", "layer 5"], 60, 26, (YELLOW, BLUE, BLUE), gap=44)
    slot = d.block(470, 50, 54, 26, "slot", WHITE)
    d.note(188, 96, "computes now", 9, anchor="middle")
    d.note(8, 132, "RAM, disk", 10, bold=True)
    waiting = d.row(106, 118, ["layer 0", "layer 2", "layer 4", "layer 6"], 60, 26, GREY, gap=44)
    d.arrow(waiting[1].top, (waiting[1].top[0], 104), (slot.bottom[0], 104), slot.bottom)
    d.note(370, 97, "arrives meanwhile", 9, anchor="middle")


@diagram("A save in four steps: the index decides which model loads")  # notebook 04
def three_renames(d: Diagram) -> None:
    """While the new shards are written and moved in, the index still names the old ones; one rename replaces the index;
    only then are the old shards removed.
    """
    steps = ("1. write aside", "2. move shards in", "3. replace the index", "4. clear up")
    for i, step in enumerate(steps):
        x = 8 + 134 * i
        d.note(x, 44, step, 9.5, bold=True)
        index = d.block(x, 56, 60, 22, "index", WHITE if i < 2 else ORANGE)
        old = d.block(x, 104, 54, 26, "old 1, 2", BLUE) if i < 3 else None
        new = d.block(x + 64, 104, 58, 26, "new 1, 2", ORANGE, "/" if i == 0 else "")
        d.arrow(index.bottom, old.top if old and i < 2 else new.top)
        if i == 0:
            d.note(new.bottom[0], 140, "hidden folder", 8.5, anchor="middle")
    d.line("before", [(8, 160), (270, 160)], BLUE, 3)
    d.line("after", [(278, 160), (532, 160)], ORANGE, 3)
    d.note(139, 170, "killed here: the old model loads", anchor="middle")
    d.note(405, 170, "killed here: the new model loads", anchor="middle")


@diagram("Two devices, one tensor between them")  # notebook 03
def two_halves(d: Diagram) -> None:
    """The image goes through the 18 pieces on device 0; one tensor of 2048 channels and 7 x 7 places passes to device
    1, whose 4 pieces give the answer.
    """
    d.block(84, 40, 196, 64, "", PALE)
    d.block(350, 40, 130, 64, "", PALE)
    d.note(92, 50, "device 0: 55.8 MiB", 9, bold=True)
    d.note(358, 50, "device 1: 41.9 MiB", 9, bold=True)
    image = d.block(8, 66, 54, 26, "image", GREEN)
    first = d.row(92, 66, ["conv1", "…", "layer4.0"], [50, 44, 66], 26, SKY, gap=9)
    second = d.row(358, 66, ["layer4.1", "…", "fc"], [52, 22, 24], 26, SKY, gap=8, size=9)
    d.arrow(image.right, first[0].left)
    for a, b in zip([*first[:2], *second[:2]], [*first[1:], *second[1:]]):
        d.arrow(a.right, b.left, width=1)
    d.arrow(first[2].right, second[0].left)
    d.note(315, 116, "1 x 2048 x 7 x 7: 392 KiB", anchor="middle")
    d.arrow(second[2].right, (506, 79))
    d.note(508, 79, "class", 9)


@diagram("Two names in the model, one in the file")  # notebook 04
def tie_on_disk(d: Diagram) -> None:
    """In the model embed.weight and head.weight are one tensor; the file holds it once, under the first name; after
    loading both names belong to one tensor again.
    """
    for x, text in ((8, "the model"), (240, "the file"), (380, "the model, loaded")):
        d.note(x, 44, text, 9.5, bold=True)
    tensors = []
    for x in (8, 380):
        names = [d.block(x, y, 76, 22, own, WHITE, size=8.5) for y, own in ((58, "embed.weight"), (90, "head.weight"))]
        tensor = d.block(x + 104, 74, 48, 22, "100 x 16", BLUE, size=8.5)
        for name in names:
            d.arrow(name.right, tensor.left, width=1)
        tensors.append(tensor)
    file = d.block(240, 62, 92, 46, "embed.weight\n100 x 16", ORANGE)
    d.arrow(tensors[0].right, file.left, text="save")
    d.arrow(file.right, (380, 85), text="load")
