"""From files to a GPU in bulk, at the speed of the link.

    file --reader threads--> pinned chunk --copy engine--> tensor on the GPU
                                                 \\--> staging on the GPU --one kernel--> many small tensors, or a cast

A GPU copies from ordinary memory through a driver buffer, slowly and one piece at a time; from pinned memory its copy
engine works alone, at the rate of the link. Pinning is slow, so only a small ring of chunks is pinned. Tensors are
taken in the order in which they lie in the files; reader threads fill the chunks (`preadv` leaves Python's lock) while
the GPU empties others. A chunk is handed back to the readers when an event says that the GPU is done with it: nothing
else waits. Small tensors travel together and are laid out by the GPU, which also does the casts.

Leaves out: the CPU, where a mapped file needs no copy at all (`checkpoints/load.py`).
"""

from __future__ import annotations

import mmap
import os
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from ..units import GB, KiB, MiB

if TYPE_CHECKING:
    from .format import Stored

CHUNK = 8 * MiB  # one copy: large enough for the full rate of the link
RING = 16  # chunks that are pinned
READERS = 16  # threads that fill them
DIRECT = 256 * KiB  # a part of this size is worth a copy of its own
LONG = 4 * GB  # a load of more bytes shows its progress


class _Part(NamedTuple):
    """A stretch of one tensor within a chunk: its bytes there, and the elements of the tensor that they are."""

    name: str
    offset: int
    nbytes: int
    first: int


@dataclass(slots=True)
class _Load:
    """One chunk's worth of a file."""

    file: Path
    start: int
    nbytes: int = 0
    parts: list[_Part] = field(default_factory=list)


def read_to_gpu(
    stored: Mapping[str, Stored],
    device: torch.device,
    dtypes: Mapping[str, torch.dtype | None] | None = None,
    *,
    chunk: int = CHUNK,
    ring: int = RING,
    readers: int = READERS,
) -> dict[str, Tensor]:
    """Read tensors from files to a GPU.

    Args:
        stored: name -> where the tensor lies.
        device: a CUDA device.
        dtypes: name -> dtype to cast to on the GPU; None or no entry keeps the file's.
        chunk, ring, readers: bytes of a chunk, pinned chunks, reader threads.

    Returns:
        name -> tensor on the device, ready on its current stream. Takes `chunk * ring` bytes of pinned memory
        meanwhile, and `chunk` bytes of the GPU.

    Raises:
        OSError: a file cannot be read, or is shorter than it was.

    >>> read_to_gpu(Checkpoint.open("model.safetensors").stored, torch.device("cuda:0"))  # doctest: +SKIP
    """
    tensors: dict[str, Tensor] = {}
    for _ in _arrivals(stored, device, dtypes or {}, tensors, chunk, ring, readers):
        pass
    return {name: tensors[name] for name in stored}


def stream_to_gpu(
    stored: Mapping[str, Stored],
    device: torch.device,
    dtypes: Mapping[str, torch.dtype | None] | None = None,
    *,
    chunk: int = CHUNK,
    ring: int = RING,
    readers: int = READERS,
) -> Iterator[tuple[str, Tensor]]:
    """`read_to_gpu`, tensor by tensor as they arrive: memory of one that the caller lets go is there for the next.

    Those that share the chunks in flight are on the GPU together.

    Args and errors: those of `read_to_gpu`.
    """
    tensors: dict[str, Tensor] = {}
    left = {name: where.nbytes for name, where in stored.items()}
    for load, stream in _arrivals(stored, device, dtypes or {}, tensors, chunk, ring, readers):
        for part in load.parts:
            left[part.name] -= part.nbytes
        if done := [part.name for part in load.parts if not left[part.name]]:
            torch.cuda.current_stream(device).wait_stream(stream)
            for name in done:
                yield name, tensors.pop(name)
    yield from tensors.items()  # those without elements


def _arrivals(
    stored: Mapping[str, Stored],
    device: torch.device,
    dtypes: Mapping[str, torch.dtype | None],
    tensors: dict[str, Tensor],
    chunk: int,
    ring: int,
    readers: int,
) -> Iterator[tuple[_Load, torch.cuda.Stream]]:
    """Queue the copies of load after load on a stream; the tensors that they fill are made in `tensors` as they come.

    When all have been taken, the current stream has been made to wait for that stream.
    """

    def allocate(names: Iterable[str]) -> bool:
        new = [name for name in names if name not in tensors]
        for name in new:
            where = stored[name]
            tensors[name] = torch.empty(where.shape, dtype=dtypes.get(name) or where.dtype, device=device)
        return bool(new)

    loads = list(_cut(stored, chunk))
    current = torch.cuda.current_stream(device)
    if loads:
        with ExitStack() as cleanup:
            filled = cleanup.enter_context(_readers(loads, device, ring, readers))
            progress = cleanup.enter_context(_progress(sum(load.nbytes for load in loads)))
            staging = torch.empty(filled.size, dtype=torch.uint8, device=device)
            stream = torch.cuda.Stream(device)
            stream.wait_stream(current)  # memory that is new to us may still be in use there
            cleanup.callback(stream.synchronize)  # whatever happens, the chunks outlive the copies
            for load, slot in filled:
                if allocate(part.name for part in load.parts):
                    stream.wait_stream(current)
                with torch.cuda.stream(stream):
                    _empty(load, filled.chunks[slot], staging, stored, tensors)
                filled.give_back(slot, stream)
                progress.update(load.nbytes)
                yield load, stream
            current.wait_stream(stream)
    allocate(name for name, where in stored.items() if not where.nbytes)  # those without elements are in no load


def _cut(stored: Mapping[str, Stored], chunk: int) -> Iterator[_Load]:
    """The tensors in file order, cut and packed into chunks; every part starts between two elements."""
    files: dict[Path, list[tuple[int, int, str, int]]] = {}
    for name, (file, offset, nbytes, dtype, _) in stored.items():
        files.setdefault(file, []).append((offset, nbytes, name, dtype.itemsize))
    for file, tensors in files.items():
        load, end = _Load(file, 0), 0
        for offset, nbytes, name, itemsize in sorted(tensors):
            done = 0
            while done < nbytes:
                start, room = offset + done, chunk - load.nbytes
                if start != end or load.nbytes % itemsize or room < itemsize:
                    if load.parts:
                        yield load
                    load, room = _Load(file, start), chunk  # other tensors lie between, or the chunk is full
                size = nbytes - done if nbytes - done <= room else room // itemsize * itemsize
                load.parts.append(_Part(name, load.nbytes, size, done // itemsize))
                load.nbytes += size
                done += size
                end = start + size
        if load.parts:
            yield load


def _empty(
    load: _Load, chunk: Tensor, staging: Tensor, stored: Mapping[str, Stored], tensors: Mapping[str, Tensor]
) -> None:
    """Bring a chunk's parts to their tensors: large ones straight, runs of others over the staging area in one go."""

    def kind(part: _Part) -> tuple[torch.dtype, torch.dtype, int]:
        """What parts that travel together have in common; a large one without a cast has a number of its own."""
        dtype, wanted = stored[part.name].dtype, tensors[part.name].dtype
        return dtype, wanted, part.offset + 1 if part.nbytes >= DIRECT and dtype == wanted else 0

    for (dtype, wanted, large), run in groupby(load.parts, key=kind):
        parts = list(run)
        begin, end = parts[0].offset, parts[-1].offset + parts[-1].nbytes
        targets = []
        for name, _, nbytes, first in parts:
            target = tensors[name]
            if nbytes != stored[name].nbytes:
                target = target.view(-1)[first : first + nbytes // dtype.itemsize]
            targets.append(target)
        if dtype == wanted and dtype.itemsize == 1:
            # A type of one byte that stays as it is travels as uint8, for which there is a kernel.
            dtype, targets = torch.uint8, [target.view(torch.uint8) for target in targets]
        source = chunk[begin:end].view(dtype)
        if large:
            targets[0].view(-1).copy_(source, non_blocking=True)
            continue
        staged = staging[begin:end].view(dtype)
        staged.copy_(source, non_blocking=True)
        torch._foreach_copy_(targets, _unflatten_dense_tensors(staged, targets))


class _Filled:
    """Chunks as the readers fill them: iterate for (load, slot), and give each slot back."""

    def __init__(self, loads: list[_Load], device: torch.device, count: int) -> None:
        self.loads, self.device = loads, device
        self.next = iter(loads)
        self.lock = threading.Lock()
        self.free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.ready: queue.SimpleQueue[tuple[_Load, int] | BaseException] = queue.SimpleQueue()
        self.files: dict[Path, int] = {}
        # One piece of memory, in huge pages: quick to fill for the first time, and to pin.
        self.size = -(-max((load.nbytes for load in loads), default=1) // (2 * MiB)) * 2 * MiB
        memory = mmap.mmap(-1, self.size * max(1, count))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.chunks = torch.frombuffer(memory, dtype=torch.uint8).split(self.size)
        self.views = [chunk.numpy().data for chunk in self.chunks]
        self.events: list[torch.cuda.Event | None] = [None] * count  # of a slot's last copy
        self.pinned: list[int] = []
        for slot in range(count):
            self.free.put(slot)

    def __iter__(self) -> Iterator[tuple[_Load, int]]:
        for _ in self.loads:
            item = self.ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    def give_back(self, slot: int, stream: torch.cuda.Stream) -> None:
        """Let the readers have a slot as soon as `stream` has done what is in its queue."""
        event = self.events[slot] = self.events[slot] or torch.cuda.Event()
        event.record(stream)
        self.free.put(slot)

    def work(self) -> None:
        """One reader: take a free chunk and the next load, wait until the GPU is done with the chunk, fill it."""
        try:
            with torch.cuda.device(self.device):
                while (slot := self.free.get()) is not None:
                    with self.lock:
                        load = next(self.next, None)
                    if load is None:
                        return
                    event = self.events[slot]
                    if event is not None:
                        event.synchronize()
                    self.fill(load, self.views[slot])
                    if event is None:  # the first time; now its pages are there
                        self.pin(slot)
                    self.ready.put((load, slot))
        except BaseException as error:  # told to the thread that waits
            self.ready.put(error)

    def fill(self, load: _Load, view: memoryview) -> None:
        done = 0
        while done < load.nbytes:
            count = os.preadv(self.files[load.file], [view[done : load.nbytes]], load.start + done)
            if not count:
                raise OSError(f"{load.file} is shorter than when it was checked: nothing at byte {load.start + done}")
            done += count

    def pin(self, slot: int) -> None:
        """Where pinning is refused the same copies work, only slower.

        Registering memory that is already there is several times faster than `pin_memory`, which also rounds up to a
        power of two and keeps what it took.
        """
        address = self.chunks[slot].data_ptr()
        if int(torch.cuda.cudart().cudaHostRegister(address, self.size, 0)) == 0:
            self.pinned.append(address)

    def unpin(self) -> None:
        for address in self.pinned:
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(address)))


@contextmanager
def _readers(loads: list[_Load], device: torch.device, ring: int, count: int) -> Iterator[_Filled]:
    """Readers at work on `loads`, and the chunks that they fill."""
    filled = _Filled(loads, device, min(ring, len(loads)))
    count = min(count, len(filled.events), os.cpu_count() or 1)
    threads = [threading.Thread(target=filled.work, daemon=True) for _ in range(count)]
    try:
        for load in loads:
            if load.file not in filled.files:
                filled.files[load.file] = os.open(load.file, os.O_RDONLY)
        for thread in threads:
            thread.start()
        yield filled
    finally:
        filled.next = iter(())
        for _ in threads:
            filled.free.put(None)
        for thread in threads:
            if thread.ident:
                thread.join()
        for descriptor in filled.files.values():
            os.close(descriptor)
        filled.unpin()


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    from tqdm import tqdm

    quiet = True if total < LONG else None  # None: quiet where nobody looks
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=quiet, leave=False) as bar:
        yield bar
