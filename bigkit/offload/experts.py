"""Experts that rest elsewhere: of a block's experts only those travel that the router has chosen.

The choice is known only inside the block, when its experts are called with it. So they are a unit of their own, and
their hook looks at the call:

    few tokens    the chosen experts are brought, before the forward, to their places in a slot as large as all experts
                  of the block. The model's parameters become views of that slot, in their full shape, so that whatever
                  computes (Transformers' eager loop, `batched_mm`, `grouped_mm`) finds them by their numbers. The rows
                  of the others hold nothing, and none of the three reads them.
    many tokens   if the choice comes to as many bytes as all experts of the block, these are streamed whole, the next
                  block's while this one's work, as any other unit is

    RAM -> GPU    a row of each parameter is copied for each chosen expert
    disk -> any   the ranges of the files are read into memory that is set aside for all experts of the block, but of
                  which only what is read takes RAM. What was read stays there until more than a given number of bytes
                  are kept; the experts that were used longest ago go first. Where the CPU works, this memory is lent.

What holds for dense units holds for these too, as `ExpertStreamer` is a `Streamer`: views that outlive the forward,
writes, backwards, interrupts. Experts that are modules of their own (a ModuleList) need no more than to be units of
their own, none of which is fetched ahead: who is not called does not travel.

Leaves out: the gather of the GPU itself (`gather.py`), and a cache of experts on the GPU.
"""

from __future__ import annotations

import math
import mmap
import os
import random
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.ring import Slab
from ..devices import Device
from ..model.experts import visited
from ..units import parse_bytes
from ._torch import detect_fake_mode
from .grouping import Layout
from .hooks import AlignDevicesHook
from .inputs import torch_device
from .mapped import PageLane
from .source import Range
from .stream import Streamer, Views, is_real_cuda
from .transfer import PlainLane, Slot, readers
from .weights import Move, Part, Unit

KNOWN = (None, "eager", "batched_mm", "grouped_mm")  # implementations of Transformers that read only chosen experts
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


class Rows:
    """Some of a unit's experts, as a lane fills them into a slot: it sees them as it sees a unit.

    Args:
        unit: the unit.
        parts: a plain tensor for each parameter and expert, where it rests and where in the slot it belongs.
    """

    def __init__(self, unit: Unit, parts: Sequence[Part]) -> None:
        self.name, self.weights = unit.name, unit.weights
        self._parts = [*parts]
        self.nbytes = sum(part.nbytes for part in parts)

    def parts(self) -> list[Part]:
        """The parts, in the order of the slot."""
        return self._parts

    def moves(self) -> list[Move]:
        """What has to be copied: neighbours where they rest and in the slot in one piece."""
        moves: list[Move] = []
        for part in sorted(self._parts, key=lambda part: part.offset):
            end = moves[-1].offset + moves[-1].nbytes if moves else -1
            if moves and part.offset == end and moves[-1].continued_by(part):
                moves[-1].parts.append(part)
            else:
                moves.append(Move(part.slab, part.source, part.at, part.offset, [part]))
        return moves

    def madvise(self, advice: int) -> None:
        """Tell the system what is going to happen to the mapped pages of their files."""


def rows_of(unit: Unit, rows: Iterable[int]) -> dict[int, list[Part]]:
    """Number of an expert -> its plain tensors, each where it rests and where it belongs in a slot."""
    parts = [part for part in unit.parts() if part.nbytes]
    return {row: [_row(part, row) for part in parts] for row in rows}


def _row(part: Part, number: int) -> Part:
    start = part.nbytes // part.shape[0] * number
    shape, stride = part.shape[1:], part.stride[1:]
    return Part(shape, stride, part.dtype, part.offset + start, part.at + start, part.slab, part.source)


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

    Attributes:
        hits, misses: experts that were there, and that were read, so far.
        bytes_read: bytes that were read, so far.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.kept: OrderedDict[Kept, int] = OrderedDict()  # -> its bytes; used last comes last
        self.held = 0
        self.hits = self.misses = self.bytes_read = 0
        self._memory: dict[int, Reserved] = {}

    def memory(self, unit: Unit) -> Reserved:
        """The memory for all experts of a unit, laid out as a slot."""
        if unit.index not in self._memory:
            self._memory[unit.index] = Reserved(unit.nbytes)
        return self._memory[unit.index]

    def bring(self, unit: Unit, rows: Iterable[int]) -> list[Part]:
        """Make experts be in RAM, and say where.

        Raises:
            OSError: a file could not be read; what could be read is kept.
        """
        memory = self.memory(unit)
        parts = rows_of(unit, rows)
        missing = {row: own for row, own in parts.items() if (unit.index, row) not in self.kept}
        jobs = [readers().submit(_read, own, memory.bytes) for own in missing.values()]
        for job in jobs:
            job.exception()  # all have ended before any error is raised: nobody writes to the memory any more
        for (row, own), job in zip(missing.items(), jobs):
            self.bytes_read += job.result()
            self.kept[unit.index, row] = size = sum(part.nbytes for part in own)
            self.held += size
        for row in parts:
            self.kept.move_to_end((unit.index, row))
        self.misses += len(missing)
        self.hits += len(parts) - len(missing)
        return [replace(part, slab=memory, source=None, at=part.offset) for own in parts.values() for part in own]

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
        for start, nbytes in self.stretches[index](row):
            self._memory[index].drop(start, nbytes)

    def serve(self, units: Sequence[Unit]) -> None:
        """Know the units: where in a slot the bytes of an expert lie."""
        self.stretches = {
            unit.index: lambda row, unit=unit: [(part.offset, part.nbytes) for part in rows_of(unit, [row])[row]]
            for unit in units
        }


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


# ---------------------------------------------------------------------------------------------------------------------
# The streamer


class ExpertStreamer(Streamer):
    """Lends the experts of blocks, each block's a unit: all of them, or the chosen ones.

    Args:
        device: where they work.
        units: in the model's order; each module is one that `count_rows` knows.
        cache: bytes of RAM that may keep experts from disk.
        on_pages: whether the device is the CPU itself, to which RAM is lent as it is.
        options: see `Streamer`.
    """

    def __init__(
        self, device: torch.device, units: Sequence[Unit], *, cache: int = 0, on_pages: bool = False, **options: Any
    ) -> None:
        super().__init__(device, units, PlainLane(device) if on_pages else None, **options)
        self.on_pages = on_pages
        self.counts = [count_rows(unit.module) for unit in units]  # experts of each
        self.cache = ExpertCache(cache)
        self.cache.serve(self.units)
        self.filled: dict[int, set[int]] = {}  # index of a unit in a slot -> its experts there; absent: all
        self._wanted: list[int] | None = None

    def lend_rows(self, unit: Unit, rows: list[int] | None) -> None:
        """Like `lend`, for some of the unit's experts; None for all."""
        with self.lock:
            self._wanted = rows
            self.lend(unit)

    def lend_for(self, unit: Unit, module: nn.Module, given: Sequence[Any]) -> None:
        """Like `lend`, for what the experts are called with."""
        self.lend_rows(unit, chosen_rows(self, unit, module, given))

    def pays(self, unit: Unit, choices: int) -> bool:
        """Whether an expert for each of so many choices is less to copy than all of the unit; of pages it always is."""
        return self.on_pages or choices * (unit.nbytes // self.counts[unit.index]) < unit.nbytes

    # -- what differs from other units

    def _borrowed(self, unit: Unit) -> tuple[Unit, Views, Any]:
        if self._loan_of(unit) is not None:  # it calls itself, perhaps with another choice
            self._bring_rows(unit, self._rows(unit))
        return super()._borrowed(unit)

    def _rows(self, unit: Unit) -> list[int]:
        rows, self._wanted = self._wanted, None
        return [*range(self.counts[unit.index])] if rows is None else rows

    def _bring(self, unit: Unit) -> Views:
        if self._wanted is None and not self.on_pages:
            if unit.index in self.filled:
                self._empty(self.holder[unit.index])
            return super()._bring(unit)
        rows = self._rows(unit)
        self._bring_rows(unit, rows)
        prefetch, self.prefetch = self.prefetch, False
        try:
            return super()._bring(unit)
        finally:
            self.prefetch = prefetch
            if self.on_pages and len(rows) * 2 > self.counts[unit.index]:  # a prompt: the next block will want most too
                for following in self._following(unit, 1):
                    following.madvise(mmap.MADV_WILLNEED)

    def _following(self, unit: Unit, most: int) -> list[Unit]:
        # What comes after the last block is another token, which may want a few experts only.
        return [following for following in super()._following(unit, most) if following.index > unit.index]

    def _bring_rows(self, unit: Unit, rows: list[int]) -> None:
        """Make a slot hold some of a unit's experts, beside those that it holds already."""
        slot = self.holder.get(unit.index)
        if slot is None:
            slot = self._memory_slot(unit) if self.on_pages else self._shared_slot([])
            self._empty(slot)
            slot.unit, self.holder[unit.index], self.filled[unit.index] = unit, slot, set()
        there = self.filled.get(unit.index)
        missing = [row for row in rows if there is not None and (self.on_pages or row not in there)]
        if there is None or not missing:
            return
        unit.check()
        try:
            if self.on_pages:
                self.cache.bring(unit, missing)
            else:
                if unit.rests_in() == "disk" and detect_fake_mode() is None:
                    parts = self.cache.bring(unit, missing)
                else:
                    parts = [part for own in rows_of(unit, missing).values() for part in own]
                self.lane.fill(slot, Rows(unit, parts))  # type: ignore[arg-type]
                if self.listeners:
                    self._tell("fetch", unit, self.slots.index(slot))
        except BaseException:
            if not slot.lent:
                self._empty(slot)
            raise
        there.update(missing)

    def _memory_slot(self, unit: Unit) -> Slot:
        """The slot of a unit whose memory is lent to the CPU as it is."""
        memory = self.cache.memory(unit).bytes
        slot = next((slot for slot in self.slots if slot.base is memory), None)
        if slot is None:
            slot = Slot(memory, owner=unit)
            self.slots = [*(other for other in self.slots if other.owner is not unit), slot]
        return slot

    def _empty(self, slot: Slot) -> None:
        if slot.unit is not None:
            self.filled.pop(slot.unit.index, None)
        super()._empty(slot)

    def _leave(self, loan: Any, failed: bool) -> None:
        slot = self.holder[loan.unit.index]
        super()._leave(loan, failed)
        if slot not in self.slots:  # somebody keeps a view of it
            self.cache.forget(loan.unit)
        self.cache.trim(other.unit.index for other in self._loans)

    def _absorb(self, loan: Any) -> None:
        """Keep what a forward wrote into the experts that it was lent; of the others the slot holds nothing."""
        index = loan.unit.index
        rows = {row for unit, row in self.cache.kept if unit == index} if self.on_pages else self.filled.get(index)
        for weight, value in zip(loan.unit.weights, loan.views.weights):
            if rows is not None:
                chosen, full = sorted(rows), weight.load().detach().clone()
                full[chosen] = value.detach()[chosen].to(full.device)
                value = full
            weight.keep(value)
            self._update(weight)

    def forget(self, weight: Any) -> None:
        super().forget(weight)
        with self.lock:
            for unit in {self._unit_of[id(same)] for same in (weight, *weight.aliases)}:
                if all(loan.unit is not unit for loan in self._loans):  # what is lent has been written to as well
                    self.cache.forget(unit)

    def recover(self) -> None:
        if self.held():
            super().recover()
            self._wanted, self.filled = None, {}


def streamers_of(
    layout: Layout, units: Sequence[Unit], slots: int, prefetch: bool, ram_cache: int | str | None
) -> dict[Unit, Streamer]:
    """Who lends each unit of experts; other units are left out.

    Args:
        layout: where they rest and work.
        units: all of a model.
        slots, prefetch, ram_cache: see `dispatch_model`; experts may have what others from disk leave of the cache.
    """
    found: dict[Unit, Streamer] = {}
    by_device: dict[tuple[Device, bool], list[Unit]] = {}
    for unit in units:
        if unit.routed:
            by_device.setdefault((layout.works(unit.name), has_rows(unit)), []).append(unit)
    others = sum(unit.nbytes for unit in units if not unit.routed and unit.rests_in() == "disk")
    on_disk = sum(unit.nbytes for unit in units if unit.routed and unit.rests_in() == "disk")
    cache = max(0, (_half_of_ram() if ram_cache is None and on_disk else parse_bytes(ram_cache or 0)) - others)
    for (place, rows), own in by_device.items():
        device, name = layout.device(place), str(torch_device(place))
        is_cpu = device.type == "cpu" and place not in layout.stand_in
        share = cache * sum(unit.nbytes for unit in own if unit.rests_in() == "disk") // max(on_disk, 1)
        streamer: Streamer
        if rows:
            cls: type[ExpertStreamer] = ExpertStreamer
            if is_real_cuda(device):
                from .gather import GatherStreamer as cls
            streamer = cls(device, own, cache=share, on_pages=is_cpu, count=slots, prefetch=prefetch, name=name)
        else:
            lane = PageLane(device) if is_cpu else None
            streamer = Streamer(device, own, lane, count=slots, prefetch=False, cache=0 if is_cpu else share, name=name)
        found.update(dict.fromkeys(own, streamer))
    return found


def _half_of_ram() -> int:
    import psutil

    return int(psutil.virtual_memory().available // 2)


def has_rows(unit: Unit) -> bool:
    """Whether each of a unit's weights is plain, and has one expert after another."""
    parts = [part for weight in unit.weights for part in weight.parts.values()]
    plain = all([*weight.parts] == [""] for weight in unit.weights)
    count = count_rows(unit.module)
    in_order = all(part.shape[:1] == (count,) and part.stride[0] * count == math.prod(part.shape) for part in parts)
    return plain and in_order and count > 0


# ---------------------------------------------------------------------------------------------------------------------
# The hook


class ExpertsHook(AlignDevicesHook):
    """The hook of a block's experts: it sees which are chosen, and asks for these."""

    def _lend(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        assert isinstance(self.streamer, ExpertStreamer) and self.unit is not None
        self.streamer.lend_for(self.unit, module, (*args, *kwargs.values()))


def hook_class(streamer: Streamer) -> type[AlignDevicesHook]:
    """The class of the hooks of units that a streamer lends."""
    return ExpertsHook if isinstance(streamer, ExpertStreamer) else AlignDevicesHook


def chosen_rows(streamer: ExpertStreamer, unit: Unit, module: nn.Module, given: Sequence[Any]) -> list[int] | None:
    """The numbers of the experts that a call is going to read; None if all are to be brought.

    Args:
        streamer, unit: who lends, and what.
        module, given: see `choice_of`.
    """
    choice = choice_of(module, given)
    if choice is None or not streamer.pays(unit, choice.numel()):
        return None
    if detect_fake_mode() is not None:  # a dry run: nobody chooses
        tokens, per_token = choice.shape
        return by_chance(streamer.counts[unit.index], tokens, per_token, seed=streamer.loans)
    rows = sorted(set(choice.flatten().tolist()))  # of a GPU's, the host waits for it here
    return rows if not rows or 0 <= rows[0] and rows[-1] < streamer.counts[unit.index] else None


def choice_of(module: nn.Module, given: Sequence[Any]) -> Tensor | None:
    """The router's choice, shape (tokens, k), if what computes with it is known to read no other experts.

    Args:
        module: the experts.
        given: what their forward is called with; the choice is the only tensor of whole numbers.
    """
    choices = [value for value in given if isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)]
    known = getattr(module.config, "_experts_implementation", None) in KNOWN
    if len(choices) != 1 or choices[0].is_meta or choices[0].ndim != 2 or not known:
        return None
    return choices[0]


def by_chance(count: int, tokens: int, per_token: int, seed: int) -> list[int]:
    """As many different experts as are chosen on average if each token chooses by chance; which ones is drawn.

    >>> len(by_chance(128, 1, 8, seed=0)), len(by_chance(8, 4, 2, seed=0))
    (8, 5)
    """
    distinct = round(count * visited(tokens, per_token, count))
    return sorted(random.Random(seed).sample(range(count), distinct))
