"""How bytes get from where they rest into a slot on the device.

    pinned slab  ----------------------------------------- one copy --> slot       the copy engine, at the link's rate
    file         --reader threads--> pinned chunk of a ring --copies--> slot       as fast as disk and link allow
    other RAM    --reader threads--> pinned chunk of a ring --copies--> slot       where pinning was refused

`CudaLane` copies on streams of its own. Two events order them against the work on the device: a slot is filled only
after the work that last read it (`Slot.free`), and read only after it was filled (`Slot.ready`). For pinned RAM the
host never waits. For files it must: a copy can be queued only when the bytes have been read. So these have a stream for
themselves, where nothing from RAM that was asked for later gets ahead of them: the link is shared.

`PlainLane` copies at once. It serves devices without streams: MPS, fake devices, and the CPU where it stands in for
one.

Leaves out: what to copy when, and into which slot (`offload/stream.py`), what a reader reads at once (`reads.py`), and
the ring itself (`checkpoints/ring.py`).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.ring import READERS, Chunk, Ring, count_readers
from ..units import MiB
from .reads import Read, jobs_of, read_job
from .weights import Move, Unit

CHUNK = 16 * MiB  # of one read and one copy: so large that Python's part of it does not count
TOGETHER = 8 * MiB  # what is smaller shares a chunk and a reader: Python begins with one after another
RING = READERS + 4  # chunks, where there are cores for all readers: some are copied while each reader fills another


@dataclass(eq=False)
class Slot:
    """Memory on the device for one unit at a time."""

    base: Tensor  # the memory, shape (bytes of the largest unit,), uint8
    unit: Unit | None = None  # whose weights it holds
    owner: Unit | None = None  # the only unit that it is for, if there is one
    lent: bool = False  # whether a forward is using it
    holders: Any = None  # who held its memory when it was lent: if others do later, it is theirs (`offload/escapes.py`)
    used: int = 0  # number of the last loan of it: the slot with the lowest is filled next
    version: int = 0  # of `base` when it was lent: a higher one now means that somebody wrote to it
    visits: dict[int, Any] = field(default_factory=dict)  # index of a unit -> its weights in this slot
    ready: Any = None  # event after the last copy into it
    free: Any = None  # event after the last work that read it
    pending: list[Future[None]] = field(default_factory=list)  # readers that have copies into it still to queue


class PlainLane:
    """Copies at once, on the thread that asks."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def slot(self, nbytes: int) -> Slot:
        """A new slot."""
        with torch.inference_mode(False):  # an inference tensor would have no version
            return Slot(torch.empty(nbytes, dtype=torch.uint8, device=self.device))

    def fill(self, slot: Slot, unit: Unit) -> None:
        """Begin to bring a unit's bytes into a slot."""
        for move in unit.moves():
            if move.slab is not None:
                there = move.slab.bytes[move.at : move.at + move.nbytes]
                slot.base[move.offset : move.offset + move.nbytes].copy_(there)
            else:
                for part in move.parts:
                    part.over(slot.base, part.offset).copy_(part.on_cpu())
        unit.madvise(mmap.MADV_DONTNEED)

    def arrive(self, slot: Slot) -> None:
        """Make the work that follows wait until the slot is filled.

        Raises:
            OSError: a file could not be read.
        """

    def leave(self, slot: Slot) -> None:
        """Note that the work so far was the last to read the slot."""

    def finish(self, slot: Slot) -> None:
        """Wait until no reader is at work for the slot any more."""

    def close(self) -> None:
        """Wait for copies that are under way."""


class CudaLane(PlainLane):
    """Copies on streams of its own, in the background."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.streams = self.stream, self.from_ring = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._ring: Ring | None = None  # made when something first comes from a file or from RAM that is not pinned

    def slot(self, nbytes: int) -> Slot:
        slot = super().slot(nbytes)
        slot.ready, slot.free = torch.cuda.Event(), torch.cuda.Event()
        for stream in self.streams:
            slot.base.record_stream(stream)  # freed, it is not given away before the copies into it are done
            stream.wait_stream(torch.cuda.current_stream(self.device))  # memory that is new to us may still be in use
        return slot

    def fill(self, slot: Slot, unit: Unit) -> None:
        self.stream.wait_event(slot.free)
        others: list[Move] = []
        with torch.cuda.stream(self.stream):
            for move in unit.moves():
                if move.slab is not None and move.slab.pinned:
                    target = slot.base[move.offset : move.offset + move.nbytes]
                    target.copy_(move.slab.bytes[move.at : move.at + move.nbytes], non_blocking=True)
                else:
                    others.append(move)
            slot.ready.record(self.stream)
        if others:
            self.from_ring.wait_event(slot.free)
            jobs = jobs_of(others, CHUNK, TOGETHER)
            self._ring = self._ring or Ring(CHUNK, count_readers() + RING - READERS)
            given: Any = self._carry, self._ring, iter(jobs), slot.base
            slot.pending = [readers().submit(*given) for _ in jobs[: count_readers()]]

    def _carry(self, ring: Ring, jobs: Iterator[list[Read]], base: Tensor) -> None:
        """One reader's work: fill chunks of the ring and queue their copies, until no job is left."""

        def send(job: list[Read], chunk: Chunk) -> None:
            try:
                for start, slot, nbytes in (piece for read in job for piece in read.pieces()):
                    source = chunk.bytes[start : start + nbytes]
                    base[slot : slot + nbytes].copy_(source, non_blocking=True)
            finally:
                ring.give_back(chunk, self.from_ring)

        with torch.cuda.stream(self.from_ring):
            ring.fill(jobs, read_job, send)

    def arrive(self, slot: Slot) -> None:
        if slot.pending:
            pending, slot.pending = slot.pending, []
            errors = [error for reader in pending if (error := reader.exception()) is not None]
            self.from_ring.wait_event(slot.ready)
            slot.ready.record(self.from_ring)
            if errors:
                raise errors[0]
        torch.cuda.current_stream(self.device).wait_event(slot.ready)

    def leave(self, slot: Slot) -> None:
        slot.free.record(torch.cuda.current_stream(self.device))

    def finish(self, slot: Slot) -> None:
        for reader in slot.pending:
            reader.exception()
        slot.pending = []

    def close(self) -> None:
        for stream in self.streams:
            stream.synchronize()


@cache
def readers() -> ThreadPoolExecutor:
    """The reader threads, shared by all lanes of this process and started when they are first needed."""
    return ThreadPoolExecutor(count_readers(), thread_name_prefix="bigkit-reader")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=readers.cache_clear)  # threads do not survive a fork
