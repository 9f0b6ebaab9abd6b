"""From files to a GPU in bulk, at the speed of the link.

    file --reader threads--> pinned chunk --copy engine--> tensor on the GPU
                                                 \\--> staging on the GPU --one kernel--> many small tensors, or a cast

A GPU copies from ordinary memory through a driver buffer, slowly and one piece at a time; from pinned memory its copy
engine works alone, at the rate of the link. Pinning is slow, so only a small ring of chunks is pinned. Tensors are
taken in the order in which they lie in the files; reader threads fill the chunks (`preadv` leaves Python's lock) while
the GPU empties others. A chunk is handed back to the readers when an event says that the GPU is done with it: nothing
else waits. Small tensors travel together and are laid out by the GPU, which also does the casts.

Leaves out: the CPU, where a mapped file needs no copy at all (`checkpoint.py`).
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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .units import GB, KiB, MiB

if TYPE_CHECKING:
    from .checkpoint import Stored

CHUNK = 8 * MiB  # one copy: large enough for the full rate of the link
RING = 16  # chunks that are pinned
READERS = 16  # threads that fill them
DIRECT = 256 * KiB  # a part of this size is worth a copy of its own
LONG = 4 * GB  # a load of more bytes shows its progress


@dataclass
class _Part:
    """A stretch of one tensor within a chunk: its bytes there, and the elements of the tensor that they are."""

    name: str
    offset: int
    nbytes: int
    first: int


@dataclass
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
    tensors = dict(stream_to_gpu(stored, device, dtypes, chunk=chunk, ring=ring, readers=readers))
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
    dtypes = dtypes or {}
    tensors: dict[str, Tensor] = {}
    flat: dict[str, Tensor] = {}

    def make(name: str) -> None:
        tensors[name] = torch.empty(stored[name].shape, dtype=dtypes.get(name) or stored[name].dtype, device=device)
        flat[name] = tensors[name].view(-1)

    for name, where in stored.items():
        if not where.nbytes:
            make(name)
            del flat[name]
            yield name, tensors.pop(name)
    loads = list(_cut(stored, chunk))
    if not loads:
        return
    left = {name: where.nbytes for name, where in stored.items()}
    ring = min(ring, len(loads))
    with ExitStack() as cleanup:
        with torch.cuda.device(device):  # not while the caller has a tensor
            chunks = cleanup.enter_context(_pinned(min(chunk, max(load.nbytes for load in loads)), ring))
            staging = torch.empty(chunks[0].nbytes, dtype=torch.uint8, device=device)
            stream, events = torch.cuda.Stream(device), [torch.cuda.Event() for _ in chunks]
        progress = cleanup.enter_context(_progress(sum(load.nbytes for load in loads)))
        cleanup.callback(stream.synchronize)  # whatever happens, the chunks outlive the copies
        filled = cleanup.enter_context(_readers(loads, chunks, events, min(readers, ring, os.cpu_count() or 1)))
        stream.wait_stream(torch.cuda.current_stream(device))  # memory that is new to us may still be in use there
        for load, slot in filled:
            new = [part.name for part in load.parts if part.name not in flat]
            for name in new:
                make(name)
            if new:
                stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                _empty(load, chunks[slot], staging, stored, flat)
                events[slot].record(stream)
            filled.give_back(slot)
            progress.update(load.nbytes)
            for part in load.parts:
                left[part.name] -= part.nbytes
            if done := [part.name for part in load.parts if not left[part.name]]:
                torch.cuda.current_stream(device).wait_stream(stream)
                for name in done:
                    del flat[name]
                    yield name, tensors.pop(name)


def _cut(stored: Mapping[str, Stored], chunk: int) -> Iterator[_Load]:
    """The tensors in file order, cut and packed into chunks; every part starts between two elements."""
    load: _Load | None = None
    for name, where in sorted(stored.items(), key=lambda item: (str(item[1].file), item[1].offset)):
        itemsize, done = where.dtype.itemsize, 0
        while done < where.nbytes:
            start = where.offset + done
            if (
                load is None
                or load.file != where.file
                or start != load.start + load.nbytes  # other tensors lie between
                or load.nbytes % itemsize
                or chunk - load.nbytes < itemsize
            ):
                if load is not None:
                    yield load
                load = _Load(where.file, start)
            size = min(where.nbytes - done, (chunk - load.nbytes) // itemsize * itemsize)
            load.parts.append(_Part(name, load.nbytes, size, done // itemsize))
            load.nbytes += size
            done += size
    if load is not None:
        yield load


def _empty(
    load: _Load, chunk: Tensor, staging: Tensor, stored: Mapping[str, Stored], flat: Mapping[str, Tensor]
) -> None:
    """Bring a chunk's parts to their tensors: large ones straight, runs of others over the staging area in one go."""
    for (dtype, wanted, large), run in groupby(load.parts, key=lambda part: _kind(part, stored, flat)):
        parts = list(run)
        begin, end = parts[0].offset, parts[-1].offset + parts[-1].nbytes
        # A type of one byte that stays as it is travels as uint8, for which there is a kernel.
        alike = torch.uint8 if dtype == wanted and dtype.itemsize == 1 else dtype
        targets = []
        for part in parts:
            target = flat[part.name] if alike == dtype else flat[part.name].view(alike)
            count = part.nbytes // dtype.itemsize
            targets.append(target if len(target) == count else target[part.first : part.first + count])
        source = chunk[begin:end].view(alike)
        if large:
            targets[0].copy_(source, non_blocking=True)
            continue
        staging[begin:end].copy_(chunk[begin:end], non_blocking=True)
        torch._foreach_copy_(targets, staging[begin:end].view(alike).split([len(target) for target in targets]))


def _kind(
    part: _Part, stored: Mapping[str, Stored], flat: Mapping[str, Tensor]
) -> tuple[torch.dtype, torch.dtype, int]:
    """What parts that travel together have in common; a large one without a cast has a number of its own."""
    dtype, wanted = stored[part.name].dtype, flat[part.name].dtype
    return dtype, wanted, part.offset + 1 if part.nbytes >= DIRECT and dtype == wanted else 0


class _Filled:
    """Chunks as the readers fill them: iterate for (load, slot), and give each slot back."""

    def __init__(self, loads: Iterable[_Load], chunks: list[Tensor], events: list[torch.cuda.Event]) -> None:
        self.loads, self.chunks, self.events = list(loads), chunks, events
        self.next = iter(self.loads)
        self.lock = threading.Lock()
        self.free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.ready: queue.SimpleQueue[tuple[_Load, int] | BaseException] = queue.SimpleQueue()
        self.files: dict[Path, int] = {}
        for slot in range(len(chunks)):
            self.free.put(slot)

    def __iter__(self) -> Iterator[tuple[_Load, int]]:
        for _ in self.loads:
            item = self.ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    def give_back(self, slot: int) -> None:
        self.free.put(slot)

    def work(self) -> None:
        """One reader: take a free chunk and the next load, wait until the GPU is done with the chunk, fill it."""
        try:
            while (slot := self.free.get()) is not None:
                with self.lock:
                    load = next(self.next, None)
                if load is None:
                    return
                self.events[slot].synchronize()
                self.fill(load, self.chunks[slot])
                self.ready.put((load, slot))
        except BaseException as error:  # told to the thread that waits
            self.ready.put(error)

    def fill(self, load: _Load, chunk: Tensor) -> None:
        view, done = chunk.numpy().data, 0
        while done < load.nbytes:
            count = os.preadv(self.files[load.file], [view[done : load.nbytes]], load.start + done)
            if not count:
                raise OSError(f"{load.file} is shorter than when it was checked: nothing at byte {load.start + done}")
            done += count


@contextmanager
def _readers(loads: list[_Load], chunks: list[Tensor], events: list[torch.cuda.Event], count: int) -> Iterator[_Filled]:
    filled = _Filled(loads, chunks, events)
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


@contextmanager
def _pinned(size: int, count: int) -> Iterator[list[Tensor]]:
    """`count` pinned chunks of `size` bytes, as one registered piece of memory in huge pages.

    Registering memory that is already there is several times faster than `pin_memory`, which also rounds up to a power
    of two and keeps what it took.
    """
    size = -(-size // (2 * MiB)) * 2 * MiB
    memory = mmap.mmap(-1, size * count)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    chunks = list(whole.split(size))
    touch = [threading.Thread(target=chunk.zero_) for chunk in chunks]
    for thread in touch:
        thread.start()
    for thread in touch:
        thread.join()
    runtime: Any = torch.cuda.cudart()
    code = runtime.cudaHostRegister(whole.data_ptr(), whole.nbytes, 0)
    try:
        yield chunks  # where pinning is refused the same copies work, only slower
    finally:
        if int(code) == 0:
            torch.cuda.check_error(int(runtime.cudaHostUnregister(whole.data_ptr())))


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    from tqdm import tqdm

    quiet = True if total < LONG else None  # None: quiet where nobody looks
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=quiet, leave=False) as bar:
        yield bar
