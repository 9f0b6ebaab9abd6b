"""From files to a GPU in bulk, at the speed of the link.

    file --reader threads--> pinned chunk --copy engine--> tensor on the GPU
                                                 \\--> staging on the GPU --one kernel--> many small tensors, or a cast

Tensors are taken in the order in which they lie in the files, through a small ring of pinned chunks
(`checkpoints/ring.py`). Small tensors travel together and are laid out by the GPU, which also does the casts.

Leaves out: the CPU, where a mapped file needs no copy at all (`checkpoints/load.py`).
"""

from __future__ import annotations

import os
import queue
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..units import GB, KiB, MiB
from ._torch import copy_all, cut_like
from .ring import HUGE_PAGE, READERS, Chunk, Ring, count_readers, read_fully

if TYPE_CHECKING:
    from .format import Stored

CHUNK = 8 * MiB  # of one read and one copy: large enough for the full rate of the link
RING = 16  # chunks: 128 MiB of pinned RAM while a checkpoint is loaded
DIRECT = 256 * KiB  # a part of this size is worth a copy of its own
LONG = 4 * GB  # a load of more bytes shows its progress


class _Part(NamedTuple):
    """A stretch of one tensor within a chunk."""

    name: str  # of the tensor
    offset: int  # byte of the chunk at which it begins
    nbytes: int
    first: int  # element of the tensor with which it begins


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
    **sizes: int,
) -> dict[str, Tensor]:
    """Read tensors from files to a GPU.

    Args:
        stored: name -> where the tensor lies.
        device: a CUDA device.
        dtypes: name -> dtype to cast to on the GPU; None or no entry keeps the file's.
        sizes: to try others: `chunk` (bytes of a chunk), `ring` (chunks), `readers` (threads, at most).

    Returns:
        name -> tensor on the device, ready on its current stream. Takes `chunk * ring` bytes of pinned memory
        meanwhile, and `chunk` bytes of the GPU.

    Raises:
        OSError: a file cannot be read, or is shorter than it was.

    >>> read_to_gpu(Checkpoint.open("model.safetensors").stored, torch.device("cuda:0"))  # doctest: +SKIP
    """
    tensors: dict[str, Tensor] = {}
    for _ in _arrivals(stored, device, dtypes or {}, tensors, **sizes):
        pass
    return {name: tensors[name] for name in stored}


def read_to_gpus(
    wanted: Sequence[tuple[torch.device, Mapping[str, Stored]]], dtypes: Mapping[str, torch.dtype | None] | None = None
) -> dict[str, Tensor]:
    """`read_to_gpu` for several GPUs at once, each over its own link; the (device, what it gets) are `wanted`.

    They share the readers: copying out of the page cache is what takes time then, and more threads made it slower.
    """
    if len(wanted) == 1:
        return read_to_gpu(wanted[0][1], wanted[0][0], dtypes)
    readers = max(1, READERS // max(len(wanted), 1))

    def read(device: torch.device, stored: Mapping[str, Stored], current: torch.cuda.Stream) -> dict[str, Tensor]:
        with torch.cuda.stream(current):  # each thread has one of its own
            return read_to_gpu(stored, device, dtypes, readers=readers)

    values: dict[str, Tensor] = {}
    with ThreadPoolExecutor(max(len(wanted), 1), thread_name_prefix="bigkit-loader") as pool:
        jobs = [pool.submit(read, device, stored, torch.cuda.current_stream(device)) for device, stored in wanted]
        for job in jobs:
            values |= job.result()
    return values


def stream_to_gpu(
    stored: Mapping[str, Stored],
    device: torch.device,
    dtypes: Mapping[str, torch.dtype | None] | None = None,
    **sizes: int,
) -> Iterator[tuple[str, Tensor]]:
    """`read_to_gpu`, tensor by tensor as they arrive: memory of one that the caller lets go is there for the next.

    Those that share the chunks in flight are on the GPU together.

    Args and errors: those of `read_to_gpu`.
    """
    tensors: dict[str, Tensor] = {}
    missing = {name: where.nbytes for name, where in stored.items()}  # bytes of each tensor that are still to come
    for load, stream in _arrivals(stored, device, dtypes or {}, tensors, **sizes):
        for part in load.parts:
            missing[part.name] -= part.nbytes
        if complete := [part.name for part in load.parts if not missing[part.name]]:
            torch.cuda.current_stream(device).wait_stream(stream)
            for name in complete:
                yield name, tensors.pop(name)
    yield from tensors.items()  # those without elements


def _arrivals(
    stored: Mapping[str, Stored],
    device: torch.device,
    dtypes: Mapping[str, torch.dtype | None],
    tensors: dict[str, Tensor],
    chunk: int = CHUNK,
    ring: int = RING,
    readers: int = READERS,
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
        size = -(-max(load.nbytes for load in loads) // HUGE_PAGE) * HUGE_PAGE
        with ExitStack() as cleanup:
            chunks = Ring(size, min(ring, len(loads)))
            cleanup.callback(chunks.unpin)
            filled = cleanup.enter_context(_readers(loads, chunks, device, readers))
            progress = cleanup.enter_context(_progress(sum(load.nbytes for load in loads)))
            staging = torch.empty(size, dtype=torch.uint8, device=device)
            stream = torch.cuda.Stream(device)
            stream.wait_stream(current)  # memory that is new to us may still be in use there
            cleanup.callback(stream.synchronize)  # whatever happens, the chunks outlive the copies
            for load, full in filled:
                if allocate(part.name for part in load.parts):
                    stream.wait_stream(current)
                with torch.cuda.stream(stream):
                    _lay_out(load, full.bytes, staging, stored, tensors)
                chunks.give_back(full, stream)
                progress.update(load.nbytes)
                yield load, stream
            current.wait_stream(stream)
    allocate(name for name, where in stored.items() if not where.nbytes)  # those without elements are in no load


@contextmanager
def _readers(
    loads: list[_Load], ring: Ring, device: torch.device, count: int
) -> Iterator[Iterator[tuple[_Load, Chunk]]]:
    """Threads that read loads into a ring; gives each load with its chunk, in the order in which they become full."""
    ready: queue.SimpleQueue[tuple[_Load, Chunk] | BaseException] = queue.SimpleQueue()
    files: dict[Path, int] = {}
    jobs = iter(loads)

    def read(load: _Load, chunk: Chunk) -> None:
        read_fully(files[load.file], chunk.view[: load.nbytes], load.start, load.file)

    def work() -> None:
        try:
            with torch.cuda.device(device):
                ring.fill(jobs, read, lambda load, chunk: ready.put((load, chunk)))
        except BaseException as error:  # for the thread that waits
            ready.put(error)

    def filled() -> Iterator[tuple[_Load, Chunk]]:
        for _ in loads:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    threads = [
        Thread(target=work, name="bigkit-loader", daemon=True)
        for _ in range(count_readers(min(count, len(ring.chunks))))
    ]
    try:
        for file in {load.file for load in loads}:
            files[file] = os.open(file, os.O_RDONLY)
        for thread in threads:
            thread.start()
        yield filled()
    finally:
        ring.close()
        for thread in threads:
            if thread.ident:
                thread.join()
        for descriptor in files.values():
            os.close(descriptor)


def _cut(stored: Mapping[str, Stored], chunk: int) -> Iterator[_Load]:
    """The tensors in file order, cut and packed into chunks; every part starts between two elements."""
    files: dict[Path, list[tuple[int, int, str, int]]] = {}
    for name, where in stored.items():
        files.setdefault(where.file, []).append((where.offset, where.nbytes, name, where.dtype.itemsize))
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


def _lay_out(
    load: _Load, chunk: Tensor, staging: Tensor, stored: Mapping[str, Stored], tensors: Mapping[str, Tensor]
) -> None:
    """Copy a chunk's parts to their tensors: large ones straight, runs of others over the staging area in one go."""

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
        else:
            staged = staging[begin:end].view(dtype)
            staged.copy_(source, non_blocking=True)
            copy_all(targets, cut_like(staged, targets))


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    from tqdm import tqdm

    quiet = True if total < LONG else None  # None: quiet where nobody looks
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=quiet, leave=False) as bar:
        yield bar
