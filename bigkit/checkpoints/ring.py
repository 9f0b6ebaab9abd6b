"""Pinned RAM, and a ring of it: how bytes reach a GPU at the speed of its link.

A GPU copies from ordinary memory through a buffer of its driver, slowly and one piece at a time; from pinned memory its
copy engine works alone, at the rate of the link. Pinning is slow and takes RAM from everybody, so what comes from files
travels through a few pinned chunks:

    file --reader threads--> chunk --copy engine--> GPU
                               ^                     |
                               +-- free: an event ---+

Readers fill chunks (`preadv` leaves Python's lock) while the copy engine empties others. A chunk goes back into the
ring as soon as the copies out of it are queued, with an event that comes after them; the reader that takes it next
waits for the event. Nothing else waits.

Two kinds of work go through rings. Loading a checkpoint (`to_gpu.py`): one thread queues the copies of all chunks, in
the order in which they become full. Filling slots (`offload/transfer.py`): each reader queues the copies of its own.

Leaves out: what is read, and where on the GPU it belongs.
"""

from __future__ import annotations

import mmap
import os
import queue
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..machine.ram import ram_limit
from ..units import MiB
from ._torch import detect_fake_mode

READERS = 16  # threads that fill a ring, at most: with 12 or more, files in the page cache are faster than the link
HUGE_PAGE = 2 * MiB
PINNED_SHARE = 0.9  # of the machine's RAM (or of what its control group allows) that may be pinned

Job = TypeVar("Job")


def count_readers(most: int = READERS) -> int:
    """How many reader threads this machine has use for: one for each core, and at most `most`."""
    return min(most, os.cpu_count() or 1)


def read_fully(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill `view` with a file's bytes from `offset` on.

    Args:
        descriptor: the open file.
        view: where the bytes go.
        offset: the first byte.
        path: the file's name, for the error.

    Raises:
        OSError: the file is shorter than that, or the disk fails; it names the file.
    """
    done = 0
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            error.filename = str(path)
            raise
        if not count:
            raise OSError(f"{path} is shorter than it was: nothing at byte {offset + done}")
        done += count


# ---------------------------------------------------------------------------------------------------------------------
# Pinned RAM


class Slab:
    """RAM that a GPU reads at the speed of the link, if the system lets it be pinned; ordinary RAM otherwise.

    Registering huge pages that are already there is several times faster than `pin_memory`, which also rounds up to a
    power of two and keeps what it took.

    Args:
        nbytes: its size.
        pin: whether a CUDA device will read it.
    """

    def __init__(self, nbytes: int, pin: bool = False) -> None:
        self.bytes = _anonymous(nbytes, huge=pin)  # shape (nbytes,), uint8
        self.wants_pin = pin
        self.pinned = False
        self._release: weakref.finalize[Any, Any]  # set when it is pinned

    def pin(self, filled: bool = False) -> None:
        """Pin the RAM if it should be; what has been written to it stays.

        Where pinning is refused the same copies work, only slower.

        Args:
            filled: all of it has been written to, so that its pages exist; else they are made first, which is faster
                than leaving it to the driver.
        """
        if not self.wants_pin or self.pinned or not _may_pin(self.bytes.nbytes):
            return
        if not filled:
            self.bytes[:: mmap.PAGESIZE].add_(0)
        address, nbytes = self.bytes.data_ptr(), self.bytes.nbytes
        runtime = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(address, nbytes, 1)) == 0:  # 1: for all GPUs
            self.pinned = True
            _pinned[address] = nbytes
            done = partial(_wait_for_all, torch.cuda.synchronize)  # a copy may be under way when it is let go
            self._release = weakref.finalize(self, _unregister, self.bytes, done, runtime.cudaHostUnregister)
            self._release.atexit = False
        else:
            with suppress(RuntimeError, AssertionError):  # else whatever the GPU does next would report the refusal
                torch.zeros((), device="cuda")

    def unpin(self) -> None:
        """Make it ordinary RAM again, as also happens when nothing refers to it any more. No copy may be under way."""
        if self.pinned and (release := self._release.detach()):
            self.pinned = False
            memory, _, unregister = release[2]
            _unregister(memory, torch.cuda.synchronize, unregister)


@torch.inference_mode(False)  # who writes there may be in another mode than the forward that first asked for it
def _anonymous(nbytes: int, huge: bool) -> Tensor:
    """RAM of its own as a tensor of shape (nbytes,), uint8."""
    if detect_fake_mode() is not None:
        return torch.empty(nbytes, dtype=torch.uint8)
    step = HUGE_PAGE if huge else mmap.PAGESIZE
    memory = mmap.mmap(-1, max(1, -(-nbytes // step)) * step)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]


_pinned: dict[int, int] = {}  # address -> bytes, of all slabs of this process
_kept: list[Tensor] = []  # what could not be unpinned


def pinned_bytes() -> int:
    """Bytes that are pinned now, by all slabs of this process."""
    return sum([*_pinned.values()])


def _may_pin(nbytes: int) -> bool:
    return pinned_bytes() + nbytes <= PINNED_SHARE * ram_limit()


def _wait_for_all(synchronize: Callable[..., None]) -> None:
    """Wait for every GPU that PyTorch has used here: copies may be those of another than the current one."""
    synchronize()
    for index in range(torch.cuda.device_count()):
        if torch.cuda.memory_reserved(index):  # else there may be no context, and none is to be made
            synchronize(index)


def _unregister(memory: Tensor, done: Callable[[], None], unregister: Callable[[int], Any]) -> None:
    try:
        done()
    except BaseException:  # who gets its address next could not pin it
        _kept.append(memory)
        raise
    unregister(memory.data_ptr())
    _pinned.pop(memory.data_ptr(), None)


# ---------------------------------------------------------------------------------------------------------------------
# The ring


class Chunk:
    """A slab of a ring."""

    def __init__(self, nbytes: int) -> None:
        self.slab = Slab(nbytes, pin=True)
        self.bytes = self.slab.bytes  # shape (nbytes,), uint8
        self.view: memoryview = self.bytes.numpy().data  # the same RAM, for `preadv`
        self.emptied: Any = None  # event after the last copy out of it


class Ring:
    """Chunks of pinned RAM that go round between readers and a copy engine.

    A chunk is pinned when it has been filled for the first time: then its pages are there, and while one reader pins,
    others read.

    Args:
        nbytes: bytes of a chunk.
        count: chunks.
    """

    def __init__(self, nbytes: int, count: int) -> None:
        self.chunks = [Chunk(nbytes) for _ in range(count)]
        self._free: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
        self._closed = False
        for chunk in self.chunks:
            self._free.put(chunk)

    def fill(self, jobs: Iterator[Job], read: Callable[[Job, Chunk], None], send: Callable[[Job, Chunk], None]) -> None:
        """One reader's work: read job after job into a chunk each, until none is left or the ring is closed.

        Args:
            jobs: shared by all readers: each takes the next.
            read: (job, chunk) -> None; writes the job's bytes into the chunk.
            send: (job, chunk) -> None; queues the copies out of the chunk and gives it back, or has it done.
        """
        for job in jobs:
            chunk = self._free.get()
            if self._closed:
                self._free.put(chunk)  # wakes the next reader
                return
            try:
                if chunk.emptied is not None:
                    chunk.emptied.synchronize()
                read(job, chunk)
                if chunk.emptied is None:  # tried once: the system may refuse
                    chunk.slab.pin(filled=True)
            except BaseException:
                self._free.put(chunk)
                raise
            send(job, chunk)

    def give_back(self, chunk: Chunk, stream: torch.cuda.Stream) -> None:
        """Let the readers have a chunk as soon as `stream` has done what is in its queue."""
        chunk.emptied = stream.record_event(chunk.emptied)
        self._free.put(chunk)

    def close(self) -> None:
        """Let readers end after what they are reading now."""
        self._closed = True
        self._free.put(self.chunks[0])

    def unpin(self) -> None:
        """Make the chunks ordinary RAM; nothing may be under way out of them."""
        for chunk in self.chunks:
            chunk.slab.unpin()
