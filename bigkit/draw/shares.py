"""The picture of items that are split between processes, with its text twin.

Leaves out: who gets what (`distributed/shares.py`), and controls (`widgets/split_explorer.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..distributed.shares import Shares
from ..units import counted, text_table
from .canvas import Picture
from .colours import GPU_COLOURS, SOFT, TRACK, WHITE


def shares_figure(split: Shares) -> Picture:
    """A split as a picture: a row for each process with its items from left to right, a column for each turn.

    Below it what `gather` returns, and what `gather_for_results` makes of it. Repeated items are hatched, turns without
    work are pale.

    >>> shares_figure(Shares(3, 2, padding=True))
    <Picture: 3 items on 2 processes: process 0 gets 0, 1; process 1 gets 2, 2. 2 turns instead of 3, 1 repeated.>
    """
    picture = Picture(_title(split), shares_label(split), left=80, right=8)
    picture.head(_turns(split))
    picture.legend(
        [
            ("items, by process", GPU_COLOURS[: split.processes]),
            *([("repeated", WHITE)] if split.padded else []),
            *([("idle", TRACK)] if split.idle else []),
        ],
        {"repeated": "/"},
    )
    _draw_turns(picture, split)
    _draw_results(picture, split)
    return picture


def shares_text(split: Shares) -> str:
    """The text twin of `shares_figure`.

    >>> print(shares_text(Shares(3, 2, padding=True)))
    process    items  repeated  idle
    ---------  -----  --------  ----
    process 0      2         -     -
    process 1      1         1     -
    <BLANKLINE>
    gather returns 4: 0 1 | 2 2
    gather_for_results returns 3: 0 1 2
    """
    rows = [
        [f"process {process}", *(str(n or "-") for n in (real, len(part) - real, split.rounds - len(part)))]
        for process, (part, real) in enumerate(zip(split.parts, split.lengths))
    ]
    table = text_table(["process", "items", "repeated", "idle"], rows)
    parts = " | ".join(" ".join(map(str, part)) for part in split.parts)
    exact = " ".join(map(str, range(split.items)))
    gathered, results = f"gather returns {len(split.gathered)}", f"gather_for_results returns {split.items}"
    return f"{table}\n\n{gathered}: {parts}\n{results}: {exact}"


def shares_label(split: Shares) -> str:
    """One sentence for those who cannot see the picture of a split."""
    shares = "; ".join(f"process {i} gets {_positions(part) or 'nothing'}" for i, part in enumerate(split.parts))
    return f"{_title(split)}: {shares}. {_turns(split)}."


def _title(split: Shares) -> str:
    return f"{counted(split.items, 'item')} on {split.processes} process{'es' * (split.processes != 1)}"


def _turns(split: Shares) -> str:
    """How long it takes: "2 turns instead of 3, 1 idle"."""
    text = f"{counted(split.rounds, 'turn')} instead of {split.items}"
    text += f", {split.idle} idle" if split.idle else ""
    return text + (f", {split.padded} repeated" if split.padded else "")


def _positions(part: Sequence[int]) -> str:
    """Positions in few words: "0, 1", "3 .. 9", or nothing."""
    return f"{part[0]} .. {part[-1]}" if len(part) > 4 else ", ".join(map(str, part))


def _draw_turns(picture: Picture, split: Shares) -> None:
    """A row for each process, a column for each turn."""
    rounds = max(1, split.rounds)
    width = min(picture.room / rounds, 64)
    for process, (part, real) in enumerate(zip(split.parts, split.lengths)):
        picture.text(picture.left - 8, picture.y + 9, f"process {process}", 9, anchor="end")
        repeats = " and repeats the last" * (len(part) > real)
        says = f"Process {process} gets {_positions(part[:real]) or 'nothing'}{repeats}."
        picture.mark(f"process:{process}", says, 0, picture.y, picture.left, 18)
        for turn in range(rounds):
            position = part[turn] if turn < len(part) else None
            _draw_item(picture, picture.left + turn * width, width, process, position, turn >= real)
            what = "waits" if position is None else f"works on item {position}" + " once more" * (turn >= real)
            says = f"In turn {turn + 1} process {process} {what}."
            picture.mark(f"turn:{process}:{turn}", says, picture.left + turn * width, picture.y, width, 18)
        picture.y += 21
    picture.text(picture.left - 8, picture.y + 5, "turns", 8, SOFT, "end")
    for turn in range(0, rounds + 1, max(1, math.ceil(rounds / 12))):
        picture.text(picture.left + turn * width, picture.y + 5, str(turn), 8, SOFT, "middle")
    picture.y += 22


def _draw_results(picture: Picture, split: Shares) -> None:
    """What `gather` and `gather_for_results` return, from left to right."""
    width = min(picture.room / max(1, len(split.gathered)), 32)
    for name, count in (("gather", len(split.gathered)), ("gather_for_results", split.items)):
        picture.text(8, picture.y + 8, f"{name} returns {counted(count, 'result')}", 9)
        picture.y += 16
        x = picture.left
        for process, (part, real) in enumerate(zip(split.parts, split.lengths)):
            for turn, position in enumerate(part if name == "gather" else part[:real]):
                _draw_item(picture, x, width, process, position, turn >= real)
                says = f"{name}: the result of item {position}, from process {process}{', a repeat' * (turn >= real)}."
                picture.mark(f"{name}:{process}:{turn}", says, x, picture.y, width, 18)
                x += width
        picture.y += 24


def _draw_item(picture: Picture, x: float, width: float, process: int, position: int | None, repeated: bool) -> None:
    """One turn of a process: its item, an item that is repeated, or nothing."""
    kind = "idle" if position is None else "repeated" if repeated else "items"
    ground = {"idle": TRACK, "repeated": WHITE, "items": GPU_COLOURS[process % len(GPU_COLOURS)]}[kind]
    picture.box(kind, x + 0.5, picture.y, width - 1, 18, ground, "/" if kind == "repeated" else "")
    if position is not None:
        plate = kind == "repeated"
        picture.label_in(x, picture.y + 9, width, (str(position),), ground=ground, plate=plate, margin=0)
