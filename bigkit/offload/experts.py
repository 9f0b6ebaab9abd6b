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
    disk -> any   the ranges of the files are read into RAM, and those used last are kept there (`rows.py`); where the
                  CPU works, that memory is lent

What holds for dense units holds for these too, as `ExpertStreamer` is a `Streamer`: views that outlive the forward,
writes, backwards, interrupts. Experts that are modules of their own (a ModuleList) need no more than to be units of
their own, none of which is fetched ahead: who is not called does not travel.

Leaves out: the gather of the GPU itself (`gather.py`), and a cache of experts on the GPU.
"""

from __future__ import annotations

import mmap
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..devices import Device
from ..model.experts import visited
from ..units import parse_bytes
from ._torch import detect_fake_mode
from .grouping import Layout
from .hooks import AlignDevicesHook
from .inputs import torch_device
from .mapped import PageLane
from .rows import ExpertCache, Rows, count_rows, has_rows, rows_of
from .stream import Streamer, Views, is_real_cuda
from .transfer import PlainLane, Slot
from .weights import Unit

KNOWN = (None, "eager", "batched_mm", "grouped_mm")  # implementations of Transformers that read only chosen experts


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
