"""Several ranges of files that are read as if they were one file: the experts of a block, each of which lies alone.

Leaves out: which ranges belong together (`checkpoints/in_order.py`).
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from ..checkpoints.format import Stored
from .source import Range, Source


class Joined(Source):
    """Ranges of open files, one after another.

    Args:
        pieces: where they lie.
        sources: the open file of each.
    """

    def __init__(self, pieces: Sequence[Stored], sources: Sequence[Source]) -> None:
        self.pieces, self.sources = tuple(pieces), tuple(sources)
        self.path, self.owner = sources[0].path, None
        self._starts = [0, *accumulate(piece.nbytes for piece in pieces)]

    def check(self) -> None:
        for source in dict.fromkeys(self.sources):
            source.check()

    def ranges(self, offset: int, nbytes: int) -> list[Range]:
        found, done = [], 0
        while done < nbytes:
            number = bisect_right(self._starts, offset + done) - 1
            inside = offset + done - self._starts[number]
            count = min(nbytes - done, self.pieces[number].nbytes - inside)
            found.append(Range(self.sources[number], self.pieces[number].offset + inside, done, count))
            done += count
        return found

    def read(self, view: memoryview, offset: int) -> None:
        for part in self.ranges(offset, len(view)):
            part.source.read(view[part.start : part.start + part.nbytes], part.at)

    def mapped(self) -> mmap.mmap:
        """The bytes, read into memory that the caller alone has."""
        memory = mmap.mmap(-1, max(self._starts[-1], 1))
        self.read(memoryview(memory)[: self._starts[-1]], 0)
        return memory

    def madvise(self, advice: int, start: int, nbytes: int) -> None:
        for part in self.ranges(start, nbytes):
            part.source.madvise(advice, part.at, part.nbytes)
