"""The picture of a checkpoint that is cut into files, with its text twin.

Leaves out: where to cut (`checkpoints/shards.py`), and controls (`widgets/shard_explorer.py`).
"""

from __future__ import annotations

from ..checkpoints.shards import Cut
from ..units import counted, format_bytes, text_table
from .canvas import ABOVE, WIDTH, Picture, shorten
from .colours import DARK, GPU_COLOURS, ORANGE, SOFT, WHITE, YELLOW

STRIPS = 8  # rows that many files are wrapped into, about
LISTED = 24  # files that a text names; of more, the first and the last
BAR = 20  # points: height of a file


def shards_figure(cut: Cut, find: str = "") -> Picture:
    """A cut checkpoint as a picture: its files in order, each as wide as its bytes, with its tensors as segments.

    A tensor larger than the limit, which has a file of its own, is hatched; one whose name contains `find` is yellow.
    The bar below shows how wide the limit is.

    >>> from bigkit import describe
    >>> from bigkit.checkpoints.shards import cut_model
    >>> shards_figure(cut_model(describe("pygpt"), "5MB", "bfloat16")).label
    'Checkpoint of pygpt, bfloat16: 4 files, 16.32 MB in all, limit 5.00 MB; 4.61 MB, 4.74 MB, 4.74 MB, 2.24 MB.'
    """
    picture = Picture(cut.model or "checkpoint", shards_label(cut, find))
    picture.head(shards_verdict(cut))
    alone = set(cut.alone)
    matches = {cut.ties.get(name, name) for name in cut.find(find)} if find else set()
    colours = GPU_COLOURS[: len(cut.files) - len(alone)]
    picture.legend(
        [
            *([("tensors, by file", colours)] if colours else []),
            *([("larger than the limit", ORANGE)] if alone else []),
            *([(f"name contains {shorten(find, 180, 9)}", YELLOW)] if matches else []),
        ],
        {"larger than the limit": "/"},
    )
    _draw_files(picture, cut, matches, alone)
    return picture


def shards_text(cut: Cut, find: str = "") -> str:
    """The text twin of `shards_figure`: each file with its bytes, and its first and last tensor.

    >>> from bigkit import describe
    >>> from bigkit.checkpoints.shards import cut_model
    >>> print(shards_text(cut_model(describe("pygpt"), "5MB", "bfloat16")).splitlines()[0])
    pygpt, bfloat16: 4 files, 16.32 MB in all, limit 5.00 MB
    """
    rows, sizes, alone = [], cut.sizes, set(cut.alone)
    for file, tensors in cut.files.items():
        names = list(tensors)
        span = f"{names[0]}{f' .. {names[-1]}' if len(names) > 1 else ''}" if names else "nothing"
        note = ", larger than the limit" if alone & tensors.keys() else ""
        rows.append([file, format_bytes(sizes[file], "si"), f"{len(names):,}", span + note])
    if len(rows) > LISTED:
        rows[LISTED - 4 : -4] = [[f"… {len(rows) - LISTED:,} more files", "", "", ""]]
    table = text_table(["file", "bytes", "tensors", "first .. last"], rows, "<>><")
    lines = [f"{cut.model or 'checkpoint'}: {shards_verdict(cut)}", "", table]
    if find:
        places = cut.find(find)
        lines += ["", f"names that contain {find!r}: {len(places):,}"]
        for name, file in list(places.items())[:LISTED]:
            lines.append(f"  {name}{f' (stored as {cut.ties[name]})' if name in cut.ties else ''}: {file}")
        lines += [f"  … {len(places) - LISTED:,} more"] if len(places) > LISTED else []
    return "\n".join(lines)


def shards_verdict(cut: Cut) -> str:
    """A cut in a few words: "4 files, 16.32 MB in all, limit 5.00 MB"."""
    sizes = f"{format_bytes(cut.bytes, 'si')} in all, limit {format_bytes(cut.limit, 'si')}"
    return f"{counted(len(cut.files), 'file')}, {sizes}"


def shards_label(cut: Cut, find: str = "") -> str:
    """One sentence for those who cannot see the picture of a cut."""
    sizes = [format_bytes(size, "si") for size in cut.sizes.values()]
    first = ", ".join([*sizes[:8], *(["and so on"] if len(sizes) > 8 else [])])
    label = f"Checkpoint of {cut.model or 'a model'}: {shards_verdict(cut)}; {first}."
    if alone := len(cut.alone):
        label += f" {counted(alone, 'tensor')} {'is' if alone == 1 else 'are'} larger than the limit."
    if find:
        places = cut.find(find)
        label += f" Names that contain {find}: {len(places):,}, files that hold them: {len(set(places.values())):,}."
    return label


def _draw_files(picture: Picture, cut: Cut, matches: set[str], alone: set[str]) -> None:
    """Files from left to right, wrapped like words; below them the width of the limit."""
    left, room = 8.0, WIDTH - 16
    sizes = cut.sizes
    widest = max([*sizes.values(), cut.bytes / STRIPS, 1])
    scale = room / max(widest, cut.limit if cut.limit <= 1.5 * widest else 0)
    x = left
    for number, (file, tensors) in enumerate(cut.files.items(), start=1):
        width = sizes[file] * scale
        if x > left and x + width > left + room + 0.01:
            x, picture.y = left, picture.y + BAR + 20
        colour = GPU_COLOURS[(number - 1) % len(GPU_COLOURS)]
        texts = (f"{number}: {format_bytes(sizes[file], 'si')}", str(number))
        picture.label_in(x, picture.y + BAR + 8, width, texts, margin=0)
        says = f"{file}: {format_bytes(sizes[file], 'si')}, {counted(len(tensors), 'tensor')}."
        picture.mark(f"file:{number}", says, x, picture.y, width, BAR + 16)
        for name, size in tensors.items():
            ground = YELLOW if name in matches else ORANGE if name in alone else colour
            kind = "larger than the limit" if name in alone else "matches" if name in matches else "tensors"
            _draw_tensor(picture, kind, name, x, size * scale, ground)
            says = f"{name}: {format_bytes(size, 'si')}, in {file}{', ' + kind if kind != 'tensors' else ''}."
            picture.mark(f"tensor:{name}", says, x, picture.y, size * scale if size * scale > 1 else 0, BAR)
            x += size * scale
        if width > 6:
            picture.box("gaps", x - 1, picture.y, 2, BAR, WHITE, depth=ABOVE)
    picture.y += BAR + 26
    limit = cut.limit * scale
    drawn = 2 <= limit <= room
    if drawn:
        picture.box("limit", left, picture.y, limit, 4, DARK)
    why = "" if drawn else ", wider than this picture" if limit > room else ", too narrow to draw"
    picture.text(left, picture.y + 13, f"the limit: {format_bytes(cut.limit, 'si')}{why}", 8.5, SOFT)
    picture.y += 24


def _draw_tensor(picture: Picture, kind: str, name: str, x: float, width: float, ground: str) -> None:
    """One segment of a file, with as much of the tensor's name as there is room for."""
    hatch = "/" if kind == "larger than the limit" else ""
    if width:
        picture.box(kind, x, picture.y, width, BAR, ground, hatch)
    if width > 2:
        picture.box("seams", x + width - 0.5, picture.y, 0.5, BAR, WHITE, depth=ABOVE)
    if width > 9:  # else no name is short enough
        parts = name.removesuffix(".weight").split(".")
        texts = (".".join(parts[i:]) for i in range(len(parts)))
        picture.label_in(x, picture.y + BAR / 2, width, texts, 8, ground, plate=bool(hatch))
