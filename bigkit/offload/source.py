"""An open file that weights rest in, and ranges of several that are read as if they were one.

It is read in two ways: into memory that a GPU copies from (`read`), or as mapped pages, which the system reads when
they are touched (`mapped`). It is never written to: a page that is written to is the process's own from then on.

Leaves out: which tensor lies where in it (`checkpoints/format.py`), and which ranges belong together
(`checkpoints/in_order.py`).
"""

from __future__ import annotations

import mmap
import os
import weakref
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoints.format import Stored
from ..checkpoints.ring import read_fully

PAGE = mmap.PAGESIZE  # bytes


class Range(NamedTuple):
    """`nbytes` bytes from `at` of a source; `start`: where they belong in what was asked for."""

    source: Source
    at: int
    start: int
    nbytes: int


class Source:
    """An open file that weights of one model rest in. It stays readable if its name is given to another file.

    Args:
        path: the file.
        owner: kept alive as long as the file is in use (what removes the file when it goes).

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], owner: Any = None) -> None:
        self.path = Path(path).resolve()
        self.owner = owner
        self.descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        self._state = self._size_and_time()
        self._map: mmap.mmap | None = None

    def _size_and_time(self) -> tuple[int, int]:
        status = os.fstat(self.descriptor)
        return status.st_size, status.st_mtime_ns

    def check(self) -> None:
        """Make sure that the file is what it was; touching a mapped page that it lacks would end the process.

        Raises:
            OSError: somebody wrote to it.
        """
        if self._size_and_time() != self._state:
            raise OSError(f"{self.path} was changed under a model whose weights rest in it: load the checkpoint again")

    def read(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset` on.

        Raises:
            OSError: the file is shorter than it was.
        """
        read_fully(self.descriptor, view, offset, self.path)

    def ranges(self, offset: int, nbytes: int) -> list[Range]:
        """The ranges of files that hold the bytes from `offset` on; more than one of a `Joined`."""
        return [Range(self, offset, 0, nbytes)]

    def mapped(self) -> mmap.mmap:
        """The file as memory: pages are read when touched and copied when written to, so that nobody else sees it."""
        if self._map is None:
            self._map = mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_COPY)
        return self._map

    def madvise(self, advice: int, start: int, nbytes: int) -> None:
        """Tell the system what is going to happen to these bytes; of pages to drop, only those that hold no others."""
        begin, end = start // PAGE * PAGE, start + nbytes
        if advice == mmap.MADV_DONTNEED:
            begin, end = -(-start // PAGE) * PAGE, end // PAGE * PAGE
        if begin < end:
            self.mapped().madvise(advice, begin, end - begin)


class Joined(Source):
    """Ranges of open files, one after another: the experts of a block, each of which lies alone.

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
