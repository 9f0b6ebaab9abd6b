"""PyTorch's CUDA caching allocator as a model: what it takes from the driver when tensors come and go.

Tensors do not get memory from the driver but from segments that the allocator keeps. That is why `nvidia-smi` shows
more than the tensors need, and why a run can fail although its tensors would fit. The rules, all of them:

    round     every request up to 512 B
    pool      requests up to 1 MiB live in segments of 2 MiB, larger ones in a second pool: up to 10 MiB in segments of
              20 MiB, above that in a segment of their own, rounded up to 2 MiB; each stream has its own two pools
    search    best fit: the smallest free block that is large enough, the lowest address among equals
    split     the rest of a block becomes a free block if it is worth it: 512 B or more in a small segment, more than
              1 MiB in a large one; otherwise the request is given the whole block, and all of it counts as allocated
    join      a freed block joins the free blocks next to it
    release   segments are kept; only when the driver has no more are the ones that are wholly free given back, and the
              request tried once more

`allocated` is what `torch.cuda.memory_allocated()` says, `reserved` what `torch.cuda.memory_reserved()` says.

Leaves out: the settings of PYTORCH_CUDA_ALLOC_CONF (expandable segments, a largest split, other roundings), private
pools of CUDA graphs, and blocks that wait for another stream (give the moment at which they are really free).

Source: c10/core/AllocatorConfig.h and c10/cuda/CUDACachingAllocator.cpp in PyTorch; tests replay recordings of real
runs.
"""

from __future__ import annotations

import gzip
import json
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..units import MiB, format_bytes

ROUND = 512
SMALL, SMALL_SEGMENT = MiB, 2 * MiB
MEDIUM, MEDIUM_SEGMENT = 10 * MiB, 20 * MiB
ROUND_LARGE = 2 * MiB


def round_up(size: int, step: int = ROUND) -> int:
    """The next multiple of `step`.

    >>> round_up(1), round_up(512), round_up(513)
    (512, 512, 1024)
    """
    return -(-size // step) * step


def segment_bytes(size: int) -> int:
    """Bytes of the segment that is asked of the driver when no free block can hold `size` (already rounded) bytes.

    >>> [segment_bytes(n) // 2**20 for n in (512, 2**20, 2**20 + 512, 10 * 2**20, 2**26 + 512)]
    [2, 2, 20, 10, 66]
    """
    if size <= SMALL:
        return SMALL_SEGMENT
    return MEDIUM_SEGMENT if size < MEDIUM else round_up(size, ROUND_LARGE)


class OutOfMemory(Exception):
    """The allocator could not serve a request, not even after it gave its free segments back."""


@dataclass(eq=False, slots=True)
class Block:
    """A stretch of a segment: in use, or free. `before` and `after` are its neighbours in the segment."""

    address: int
    size: int
    pool: tuple[int, bool]  # stream, whether it is the pool of small blocks
    used: bool = False
    before: Block | None = None
    after: Block | None = None

    @property
    def key(self) -> tuple[int, int]:
        """What free blocks are sorted by."""
        return self.size, self.address

    @property
    def is_segment(self) -> bool:
        """Whether the block is all of its segment."""
        return self.before is None and self.after is None


class CachingAllocator:
    """The caching allocator of one device.

    Args:
        capacity: the most bytes that segments may take together; None for no limit.
        place: gives the address of a new segment from its size. It decides only between equal free blocks. None places
            them as the CUDA driver does.
        watch: is told (+bytes or -bytes, address) of each segment that is taken or given back.

    >>> gpu = CachingAllocator()
    >>> a = gpu.malloc(3 * MiB)
    >>> gpu.allocated // MiB, gpu.reserved // MiB
    (3, 20)
    >>> gpu.free(a)
    >>> gpu.allocated, gpu.reserved // MiB  # kept for the next one
    (0, 20)
    """

    def __init__(
        self,
        capacity: int | None = None,
        place: Callable[[int], int] | None = None,
        watch: Callable[[int, int], None] | None = None,
    ) -> None:
        self.capacity = capacity
        self.allocated = self.reserved = 0
        self.peak_allocated = self.peak_reserved = 0
        self._free: dict[tuple[int, bool], list[tuple[int, int]]] = {}  # pool -> sorted keys of its free blocks
        self._at: dict[int, Block] = {}  # address -> free block
        self._space = _Space()
        self._place = place or self._space.take
        self._watch = watch or (lambda size, address: None)

    def malloc(self, size: int, stream: int = 0) -> Block:
        """Serve a request of `size` bytes (at least 1) made on `stream`.

        Raises:
            OutOfMemory: no segment of the size needed fits below `capacity`.
        """
        if size < 1:
            raise ValueError(f"a request must be for at least 1 byte, not {size}: PyTorch serves empty tensors itself")
        need = round_up(size)
        pool = (stream, need <= SMALL)
        block = self._find(pool, need) or self._segment(pool, need)
        rest = block.size - need
        if rest >= ROUND if pool[1] else rest > SMALL:
            tail = Block(block.address + need, rest, pool, before=block, after=block.after)
            if block.after:
                block.after.before = tail
            block.after, block.size = tail, need
            self._shelve(tail)
        block.used = True
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block) -> None:
        """Take a block back and join it with its free neighbours."""
        if not block.used:
            raise ValueError(f"the block of {format_bytes(block.size)} at {block.address:#x} is free already")
        block.used = False
        self.allocated -= block.size
        if block.before and not block.before.used:
            before = self._unshelve(block.before)
            block.address, block.size, block.before = before.address, before.size + block.size, before.before
            if block.before:
                block.before.after = block
        if block.after and not block.after.used:
            after = self._unshelve(block.after)
            block.size, block.after = block.size + after.size, after.after
            if block.after:
                block.after.before = block
        self._shelve(block)

    def empty_cache(self) -> None:
        """Give every segment that is wholly free back to the driver (`torch.cuda.empty_cache()`)."""
        for block in sorted(self._at.values(), key=lambda block: (block.pool[1], block.pool[0], block.key)):
            if block.is_segment:
                self._unshelve(block)
                self.reserved -= block.size
                self._space.give(block.address, block.size)
                self._watch(-block.size, block.address)

    def reset_peaks(self) -> None:
        """Let the peaks start from what is held now (`torch.cuda.reset_peak_memory_stats()`)."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    # -- how

    def _find(self, pool: tuple[int, bool], need: int) -> Block | None:
        """The smallest free block of the pool that is large enough, taken off the shelf."""
        shelf = self._free.get(pool, [])
        i = bisect_left(shelf, (need, 0))
        return self._unshelve(self._at[shelf[i][1]]) if i < len(shelf) else None

    def _segment(self, pool: tuple[int, bool], need: int) -> Block:
        """A new segment as one block; free segments are given back first if there is no room."""
        size = segment_bytes(need)
        if self.capacity is not None and self.reserved + size > self.capacity:
            self.empty_cache()
            if self.reserved + size > self.capacity:
                raise OutOfMemory(
                    f"{format_bytes(need)} were asked for; {format_bytes(self.allocated)} are allocated in segments of "
                    f"{format_bytes(self.reserved)}, and {format_bytes(self.capacity)} is all there is"
                )
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        block = Block(self._place(size), size, pool)
        self._watch(size, block.address)
        return block

    def _shelve(self, block: Block) -> None:
        insort(self._free.setdefault(block.pool, []), block.key)
        self._at[block.address] = block

    def _unshelve(self, block: Block) -> Block:
        shelf = self._free[block.pool]
        del shelf[bisect_left(shelf, block.key)], self._at[block.address]
        return block


class _Space:
    """Addresses for segments, as the CUDA driver gives them: it takes ranges of 32 MiB and more, each below the last,
    and puts what fits into the lowest gap of those it has.

    Found by looking at where segments of recorded runs lie.
    """

    RANGE = 32 * MiB

    def __init__(self) -> None:
        self.gaps: list[tuple[int, int]] = []  # (start, end), in order, apart
        self.lowest = 2**47

    def take(self, size: int) -> int:
        for i, (start, end) in enumerate(self.gaps):
            if end - start >= size:
                self.gaps[i : i + 1] = [(start + size, end)] if end - start > size else []
                return start
        end = self.lowest
        self.lowest -= round_up(size, self.RANGE)
        self.give(self.lowest + size, end - self.lowest - size)
        return self.lowest

    def give(self, start: int, size: int) -> None:
        if size:
            insort(self.gaps, (start, start + size))
        joined: list[tuple[int, int]] = []
        for start, end in self.gaps:
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((start, end))
        self.gaps = joined


# ---------------------------------------------------------------------------------------------------------------------
# Replaying a run


@dataclass(frozen=True)
class Replay:
    """What a device held after each event of a run, in bytes, and the peaks."""

    allocated: list[int] = field(default_factory=list)
    reserved: list[int] = field(default_factory=list)
    peak_allocated: int = 0
    peak_reserved: int = 0

    def __repr__(self) -> str:
        return (
            f"Replay({len(self.allocated)} events, peak allocated {format_bytes(self.peak_allocated)}, "
            f"reserved {format_bytes(self.peak_reserved)})"
        )


def replay(events: Iterable[int], streams: Iterable[int] = (), allocator: CachingAllocator | None = None) -> Replay:
    """Play the requests and frees of a run through the model.

    Args:
        events: n > 0 asks for n bytes, -k frees what the k-th request (from 1) was given, 0 empties the cache.
        streams: the stream of each request, in order; where it ends, stream 0.
        allocator: the device, with what it already holds; None for a fresh one.

    Raises:
        OutOfMemory: the device's capacity was not enough.

    >>> replay([512, 5 * MiB, -2, 12 * MiB])
    Replay(4 events, peak allocated 12.00 MiB, reserved 22.00 MiB)
    """
    gpu = allocator or CachingAllocator()
    gpu.reset_peaks()
    blocks: list[Block] = []
    allocated: list[int] = []
    reserved: list[int] = []
    stream = iter(streams)
    for event in events:
        if event > 0:
            blocks.append(gpu.malloc(event, next(stream, 0)))
        elif event < 0:
            gpu.free(blocks[-event - 1])
        else:
            gpu.empty_cache()
        allocated.append(gpu.allocated)
        reserved.append(gpu.reserved)
    return Replay(allocated, reserved, gpu.peak_allocated, gpu.peak_reserved)


@dataclass
class Recording:
    """What a run asked of one device's allocator, and what the device held: made on fake devices or on a real GPU.

    Args:
        events, streams: as `replay` takes them.
        marks: (name, number of events before it) of moments in the run, such as the end of the prefill.
        segments: (number of events before it, + or - bytes, address) of each segment taken or given back.
        addresses: where each request was served.
        capacity: the most bytes that segments could take, if there was a limit.
        peaks: what the device itself said: "allocated" and "reserved", in bytes.
        about: what ran, and on what.
    """

    events: list[int] = field(default_factory=list)
    streams: list[int] = field(default_factory=list)
    marks: list[tuple[str, int]] = field(default_factory=list)
    segments: list[tuple[int, int, int]] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)
    capacity: int | None = None
    peaks: dict[str, int] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)

    def allocator(self) -> CachingAllocator:
        """A fresh device for a replay, whose segments lie where this run's lay: that decides between equal blocks."""
        places = iter([address for _, size, address in self.segments if size > 0])
        return CachingAllocator(self.capacity, place=lambda size: next(places))

    def save(self, path: str | Path) -> None:
        """Write the recording as gzipped JSON, the same bytes each time."""
        text = json.dumps({"format": 1, **asdict(self)}, separators=(",", ":"))
        Path(path).write_bytes(gzip.compress(text.encode(), 9, mtime=0))

    @staticmethod
    def load(path: str | Path) -> Recording:
        """The inverse of `save`.

        Raises:
            ValueError: the file holds no recording of this format.
        """
        try:
            data = json.loads(gzip.decompress(Path(path).read_bytes()))
            if data.pop("format") != 1:
                raise KeyError("format")
            for name in ("marks", "segments"):
                data[name] = [tuple(item) for item in data[name]]
            return Recording(**data)
        except (EOFError, gzip.BadGzipFile, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} holds no recording of allocations that this version reads: {error}") from error
