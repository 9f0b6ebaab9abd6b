"""What readers read into the chunks of a ring, and where in a slot it belongs.

A chunk takes a long move piece by piece, or several short ones: Python begins with one reader after another, so a few
who read much are done sooner than many who read little.

Leaves out: the ring (`checkpoints/ring.py`), and the copies into slots (`transfer.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..checkpoints.ring import Chunk
from .weights import Move


class Read(NamedTuple):
    """A stretch of a move that is read at once, from the `first` of its bytes on, to byte `chunk` of a chunk."""

    move: Move
    first: int
    nbytes: int
    chunk: int

    def into(self, chunk: Chunk) -> None:
        """Read it."""
        at, stop = self.move.at + self.first, self.chunk + self.nbytes
        if self.move.source is not None:
            self.move.source.read(chunk.view[self.chunk : stop], at)
        else:
            assert self.move.slab is not None
            chunk.bytes[self.chunk : stop].copy_(self.move.slab.bytes[at : at + self.nbytes])

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """What belongs together in the slot too: where it begins in the chunk and in the slot, and its bytes."""
        if self.move.slab is not None:
            yield self.chunk, self.move.offset + self.first, self.nbytes
            return
        for part in self.move.parts:  # in a file they lie without gaps, in the slot each is aligned
            begin = part.at - self.move.at
            low, high = max(begin, self.first), min(begin + part.nbytes, self.first + self.nbytes)
            if low < high:
                yield self.chunk + low - self.first, part.offset + low - begin, high - low


def jobs_of(moves: Iterable[Move], chunk: int, together: int) -> list[list[Read]]:
    """Moves as jobs for readers.

    Args:
        moves: from files, or from RAM that is not pinned.
        chunk: bytes of a job, at most.
        together: what is smaller shares a job, up to so many bytes.
    """
    jobs, end = list[list[Read]](), chunk
    for move in moves:
        for first in range(0, move.nbytes, chunk):
            nbytes = min(chunk, move.nbytes - first)
            if end + nbytes > min(together, chunk):
                jobs.append([])
                end = 0
            jobs[-1].append(Read(move, first, nbytes, end))
            end += nbytes
    return jobs


def read_job(job: list[Read], chunk: Chunk) -> None:
    """One reader's job."""
    for read in job:
        read.into(chunk)
