"""A block's experts as rows of its tensors, and those that come from files in RAM.

Transformers holds all experts of a block in a few tensors, whose first dimension are the experts. So an expert is a row
of each: a stretch of RAM, or a range of a file (or a few: `Joined`).

For experts from files memory is set aside, laid out as a slot that holds all of a block; but only what is read takes
RAM. What was read stays there until more than a given number of bytes are kept; then the experts that were used longest
ago give their pages back.

Leaves out: which experts are chosen, and who asks for them (`experts.py`).
"""

from __future__ import annotations

import math
import mmap
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from ..checkpoints.ring import Slab
from ..model.config import experts_per_token
from .source import Range
from .transfer import readers
from .weights import ALIGN, Move, Part, Unit

Kept = tuple[int, int]  # index of a unit, number of an expert


def count_rows(module: nn.Module) -> int:
    """The number of experts that a module holds as rows of its parameters; 0 if it holds none so.

    It must be one of those that Transformers marks with `use_experts_implementation`: their forwards take the router's
    choice, and read no other experts.
    """
    count = getattr(module, "num_experts", 0)
    if not all(hasattr(module, name) for name in ("is_transposed", "has_bias", "has_gate", "config")):
        return 0
    own = list(module._parameters.values())
    fits = own and all(tensor is not None and tensor.ndim and tensor.shape[0] == count for tensor in own)
    return int(count) if fits and not any(True for child in module.children() for _ in child.parameters()) else 0


def count_chosen(module: nn.Module) -> int:
    """How many of a module's experts a token takes, as its config says; 1 if it does not."""
    return experts_per_token(getattr(module, "config", None)) or 1


class Rows:
    """Some of a unit's experts, as a lane fills them into a slot: it sees them as it sees a unit.

    Args:
        unit: the unit.
        parts: a plain tensor for each parameter and expert, where it rests and where in the slot it belongs. They are
            taken one after another as they are copied: the link works on the first while others are looked up.
        nbytes: bytes of them all.
    """

    def __init__(self, unit: Unit, parts: Iterable[Part], nbytes: int) -> None:
        self.name, self.weights, self.whole = unit.name, unit.weights, unit
        self._parts, self.nbytes = parts, nbytes

    def moves(self) -> Iterator[Move]:
        """What has to be copied, once: what follows where it rests and in the slot goes in one piece."""
        move: Move | None = None
        for part in self._parts:
            if move is not None and part.offset == move.offset + move.nbytes and move.take(part):
                continue
            if move is not None:
                yield move
            move = Move(part.slab, part.source, part.at, part.offset, [part], part.nbytes)
        if move is not None:
            yield move

    def madvise(self, advice: int) -> None:
        """Tell the system what is going to happen to the mapped pages of their files."""


def starts_of(sizes: Iterable[int]) -> list[int]:
    """Where tensors of so many bytes begin in a slot, and at last where it ends."""
    return [*accumulate((-(-size // ALIGN) * ALIGN for size in sizes), initial=0)]


def bytes_of_one(unit: Unit) -> int:
    """Bytes of one of a unit's experts, without what lies between its tensors in a slot."""
    return sum(part.nbytes // part.shape[0] for part in unit.parts())


def rows_of(unit: Unit, rows: Sequence[int]) -> Iterator[Part]:
    """The plain tensors of some experts, each where it rests and where it belongs in a slot: the first tensor of all of
    them, then the second, and so on."""
    for part in unit.parts():
        if each := part.nbytes // part.shape[0]:
            shape, stride = part.shape[1:], part.stride[1:]
            for row in rows:
                start = each * row
                yield Part(shape, stride, part.dtype, part.offset + start, part.at + start, part.slab, part.source)


def has_rows(unit: Unit) -> bool:
    """Whether each of a unit's weights is plain, and has one expert after another."""
    parts = [part for weight in unit.weights for part in weight.parts.values()]
    plain = all([*weight.parts] == [""] for weight in unit.weights)
    count = count_rows(unit.module)
    in_order = all(part.shape[:1] == (count,) and part.stride[0] * count == math.prod(part.shape) for part in parts)
    return plain and in_order and count > 0


# ---------------------------------------------------------------------------------------------------------------------
# Experts from files, in RAM


class Reserved(Slab):
    """RAM that takes no memory until it is written to, and can give it back page by page."""

    def __init__(self, nbytes: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self.memory = mmap.mmap(-1, max(nbytes, 1), flags=flags)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            self.memory.madvise(mmap.MADV_NOHUGEPAGE)  # one would be there for each expert that only begins in it
        with torch.inference_mode(False):
            self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)[:nbytes]  # shape (nbytes,)
        self.wants_pin = self.pinned = False

    def drop(self, start: int, nbytes: int) -> None:
        """Give back the pages that lie wholly within a stretch; its bytes are lost."""
        begin = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (start + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end:
            self.memory.madvise(mmap.MADV_DONTNEED, begin, end - begin)


class ExpertCache:
    """Experts from files, kept in RAM: of all units together those that were used last.

    Args:
        most: bytes that are kept between two forwards.
        units: whose experts they are.

    Attributes:
        hits, misses: experts that were there, and that were read, so far.
        bytes_read: bytes that were read, so far.
    """

    def __init__(self, most: int, units: Sequence[Unit]) -> None:
        self.most, self.units = most, units
        self.kept: OrderedDict[Kept, int] = OrderedDict()  # -> its bytes; used last comes last
        self.held = 0
        self.hits = self.misses = self.bytes_read = 0
        self._memory: dict[int, Reserved] = {}

    def memory(self, unit: Unit) -> Reserved:
        """The memory for all experts of a unit, laid out as a slot."""
        if unit.index not in self._memory:
            self._memory[unit.index] = Reserved(unit.nbytes)
        return self._memory[unit.index]

    def bring(self, unit: Unit, rows: Sequence[int]) -> list[Part]:
        """Make experts be in RAM, and say where, in the order of `rows_of`.

        Raises:
            OSError: a file could not be read; what could be read is kept.
        """
        memory = self.memory(unit)
        missing = {row: [*rows_of(unit, [row])] for row in rows if (unit.index, row) not in self.kept}
        jobs = [readers().submit(_read, own, memory.bytes) for own in missing.values()]
        for job in jobs:
            job.exception()  # all have ended before any error is raised: nobody writes to the memory any more
        for (row, own), job in zip(missing.items(), jobs):
            self.bytes_read += job.result()
            self.kept[unit.index, row] = size = sum(part.nbytes for part in own)
            self.held += size
        for row in rows:
            self.kept.move_to_end((unit.index, row))
        self.misses += len(missing)
        self.hits += len(rows) - len(missing)
        return [replace(part, slab=memory, source=None, at=part.offset) for part in rows_of(unit, rows)]

    def trim(self, in_use: Iterable[int] = ()) -> None:
        """Let go of the experts that were used longest ago, until no more are kept than may be.

        Args:
            in_use: indices of units of which none may go.
        """
        spared = set(in_use)
        for index, row in [key for key in self.kept if key[0] not in spared]:
            if self.held <= self.most:
                return
            self._drop(index, row)

    def forget(self, unit: Unit) -> None:
        """Let go of a unit's experts: they have changed where they rest, or somebody else has the memory."""
        for index, row in [key for key in self.kept if key[0] == unit.index]:
            self.held -= self.kept.pop((index, row))
        self._memory.pop(unit.index, None)

    def _drop(self, index: int, row: int) -> None:
        self.held -= self.kept.pop((index, row))
        for part in rows_of(self.units[index], [row]):
            self._memory[index].drop(part.offset, part.nbytes)


def _read(parts: Sequence[Part], memory: Tensor) -> int:
    """Read an expert from its files to its places in memory: what lies together in a file in one call.

    Returns:
        Bytes that were read.
    """
    view = memory.numpy().data
    jobs: list[tuple[Range, memoryview]] = []
    for part in parts:
        target = view[part.offset : part.offset + part.nbytes]
        if part.source is None:  # it was written to, and rests in RAM since
            target[:] = part.on_cpu().contiguous().view(torch.uint8).flatten().numpy().data
            continue
        own = part.source.ranges(part.at, part.nbytes)
        jobs += [(place, target[place.start : place.start + place.nbytes]) for place in own]
    jobs.sort(key=lambda job: (str(job[0].source.path), job[0].at))
    while jobs:
        run, first = 1, jobs[0][0]
        end = first.at + first.nbytes
        while run < len(jobs) and jobs[run][0][:2] == (first.source, end):
            end, run = end + jobs[run][0].nbytes, run + 1
        views = [target for _, target in jobs[:run]]
        if os.preadv(first.source.descriptor, views, first.at) < end - first.at:  # seldom: read piece by piece
            for place, target in jobs[:run]:
                place.source.read(target, place.at)
        jobs = jobs[run:]
    return sum(part.nbytes for part in parts if part.source is not None)
