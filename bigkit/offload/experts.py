"""Experts that rest elsewhere: of a block's experts only those travel that the router has chosen.

The choice is known only inside the block, when its experts are called with it. So they are a unit of their own, and
their hook looks at the call:

    few tokens    the chosen experts are brought, before the forward, to their places in a slot as large as all experts
                  of the block. The model's parameters become views of that slot, in their full shape, so that whatever
                  computes (Transformers' eager loop, `batched_mm`, `grouped_mm`) finds them by their numbers. The rows
                  of the others hold nothing, and none of the three reads them.
    many tokens   if the choice comes to as many bytes as all experts of the block, these are streamed whole, the next
                  block's while this one's work, as any other unit is
    large blocks  (more than 3 GiB of experts) never have a slot for all: one for as many as a few tokens choose,
                  numbered anew, serves all blocks; those of many tokens are brought in pieces (`pieces.py`)

    RAM -> GPU    a row of each parameter is copied for each chosen expert; those chosen last may stay (`on_device.py`)
    disk -> any   the ranges of the files are read into RAM, and those used last are kept there (`rows.py`); where the
                  CPU works, that memory is lent

What holds for dense units holds for these too, as `ExpertStreamer` is a `Streamer`: views that outlive the forward,
writes, backwards, interrupts. Experts that are modules of their own (a ModuleList) need no more than to be units of
their own, none of which is fetched ahead: who is not called does not travel.

Leaves out: what is chosen (`choice.py`), and the gather of the GPU itself (`gather.py`).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..model.experts import SOME, WHOLE
from ._torch import detect_fake_mode
from .choice import KNOWN, Recorded, choice_of, chosen_rows, in_any_order
from .escapes import count_holders
from .events import Event
from .hooks import AlignDevicesHook, hooks_in
from .on_device import DeviceRows
from .pieces import Pieces
from .rows import ExpertCache, Rows, bytes_of_one, count_chosen, count_rows, rows_of
from .stream import Streamer, Views
from .transfer import PlainLane, Slot
from .weights import Part, Unit

# ---------------------------------------------------------------------------------------------------------------------
# The streamer


class ExpertStreamer(Streamer):
    """Lends the experts of blocks, each block's a unit: all of them, or the chosen ones.

    Args:
        device: where they work.
        units: in the model's order; each module is one that `count_rows` knows.
        cache: bytes of RAM that may keep experts from disk.
        on_device: for each unit, how many of its experts may stay on the device.
        on_pages: whether the device is the CPU itself, to which RAM is lent as it is.
        options: see `Streamer`.
    """

    def __init__(
        self, device: torch.device, units: Sequence[Unit], *, cache: int = 0, on_device: Sequence[int] = (),
        on_pages: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(device, units, PlainLane(device) if on_pages else None, **options)
        self.on_pages = on_pages
        self.counts = [count_rows(unit.module) for unit in units]  # experts of each
        self.cache = ExpertCache(cache, self.units)
        self.filled: dict[int, set[int]] = {}  # index of a unit in a slot -> its experts there; absent: all
        self.rows = [*on_device] or [0] * len(self.units)
        self.on_device: dict[int, DeviceRows] = {}  # index of a unit -> its experts that stay on the device
        self.some: Slot | None = None  # the slot of all large units for a few of their experts
        self.pieces = Pieces(self)
        self.stands: dict[int, Slot] = {}  # index of a unit that is lent in pieces -> a slot without memory
        self.host_waits = False  # in a dry run, for the router's choice before the next experts are brought
        self.recorded: Recorded | None = None  # in a dry run, what the routers chose once
        self.hits = self.misses = 0  # chosen experts that were on the device, and that were not, so far

    def lend_rows(self, unit: Unit, rows: list[int] | None) -> None:
        """Like `lend`, for some of the unit's experts; None for all."""
        self.lend(unit, None if rows is None else partial(self._bring_some, rows=rows))

    def lend_for(self, unit: Unit, choice: Tensor | None, implementation: str | None) -> Tensor | None:
        """Like `lend`, for what the experts are called with.

        Args:
            unit: the experts.
            choice: the router's, see `choice_of`; None if all may be read.
            implementation: what Transformers calls the code that is going to read them.

        Returns:
            The choice by rows of the tensors that are lent; None if these have a row for each expert.
        """
        rows = chosen_rows(self, unit, choice)
        gathers = choice is not None and choice.shape[0] == 1 and implementation == "batched_mm"
        known_there = not self.rows[unit.index] or self.keeps_account(unit)
        self.host_waits = not (gathers and known_there) or unit.rests_in() == "disk"
        with self.lock:
            if self._loan_of(unit) is not None:  # it calls itself, perhaps with another choice
                kept = self.on_device.get(unit.index)
                if kept is not None and self.holder[unit.index] is kept.slot:
                    raise RuntimeError(f"{unit.name} calls itself: dispatch without expert_cache, its rows are in use")
                self._bring_rows(unit, self._all(unit) if rows is None else rows)
                self.lane.arrive(self.holder[unit.index])
                self.lend(unit)
                return None
            few = rows is not None and len(rows) <= self.room(unit)
            if rows is not None and choice is not None and few and in_any_order(choice, implementation):
                slot, renumbered = self._on_device(unit, rows, choice)
                self.lend(unit, partial(self._bring_from, slot))
                return renumbered
            if self.is_large(unit):
                self.lend(unit, self._bring_pieces)
            else:
                self.lend_rows(unit, rows)
        return None

    def take_in_changes(self, unit: Unit) -> None:
        """Before anything is chosen: what was brought may be of a tensor that the user has replaced."""
        if self._loan_of(unit) is None:
            self.sites[unit.index].take_in_changes()

    def keeps_account(self, unit: Unit) -> bool:
        """Whether the device itself knows which of a unit's experts are on it."""
        return False

    def found(self) -> tuple[int, int]:
        """Chosen experts that were on the device, and that were not, so far."""
        return self.hits, self.misses

    def is_large(self, unit: Unit) -> bool:
        """Whether a unit has too many experts for a slot that holds all."""
        return unit.nbytes > WHOLE and not self.on_pages

    def room(self, unit: Unit) -> int:
        """How many of a unit's experts tensors with fewer rows can hold."""
        each = max(1, unit.nbytes // self.counts[unit.index])
        few = max(SOME // each, count_chosen(unit.module)) if self.is_large(unit) else 0
        return self.rows[unit.index] or min(few, self.counts[unit.index])

    def pays(self, unit: Unit, choices: int) -> bool:
        """Whether an expert for each of so many choices is less to copy than all of the unit; of pages it always is."""
        return self.on_pages or choices * (unit.nbytes // self.counts[unit.index]) < unit.nbytes

    # -- what differs from other units

    def _all(self, unit: Unit) -> list[int]:
        return [*range(self.counts[unit.index])]

    def _bring(self, unit: Unit) -> Views:
        if self.on_pages:
            return self._bring_some(unit, self._all(unit))
        if unit.index in self.filled:
            self._empty(self.holder[unit.index])
        return super()._bring(unit)

    def _bring_from(self, slot: Slot, unit: Unit) -> Views:
        """Make a unit ready in a slot that has what is needed of it."""
        if unit.index in self.holder:
            self._empty(self.holder[unit.index])
        slot.unit, self.holder[unit.index] = unit, slot
        return self._bring_alone(unit)

    def _bring_some(self, unit: Unit, rows: list[int]) -> Views:
        self._bring_rows(unit, rows)
        try:
            return self._bring_alone(unit)
        finally:
            if self.on_pages and len(rows) * 2 > self.counts[unit.index]:  # a prompt: the next block will want most too
                for following in self._following(unit, 1):
                    following.madvise(mmap.MADV_WILLNEED)

    def _bring_pieces(self, unit: Unit) -> Views:
        """Objects that bring what is asked of them, in the place of the unit's tensors."""
        unit.check()
        return self._lend_objects(unit, self.pieces.lend(unit))

    def _lend_objects(self, unit: Unit, objects: list[Any]) -> Views:
        """Lend objects that bring what is asked of them, one for each of a unit's weights."""
        if unit.index in self.holder:
            self._empty(self.holder[unit.index])
        if unit.index not in self.stands:
            self.stands[unit.index] = self._own_slot(unit, 0)
        slot = self.stands[unit.index]
        self.slots = [*(other for other in self.slots if other is not slot), slot]
        slot.unit, self.holder[unit.index], slot.lent = unit, slot, True
        self.loans += 1
        slot.used, slot.version = self.loans, slot.base._version
        lent: Any = dict(zip(map(id, unit.weights), objects))
        values = [lent[id(entry.weight)] for entry in self.sites[unit.index].entries]
        slot.holders = count_holders(slot.base, values)
        return Views(values, [], frozenset())

    def _own_slot(self, unit: Unit, nbytes: int | None = None) -> Slot:
        if nbytes is None:
            return super()._own_slot(unit)
        slot = self.lane.slot(nbytes)
        slot.owner = unit
        self.slots.append(slot)
        return slot

    def _bring_alone(self, unit: Unit) -> Views:
        prefetch, self.prefetch = self.prefetch, False
        try:
            return super()._bring(unit)
        finally:
            self.prefetch = prefetch

    def _following(self, unit: Unit, most: int) -> dict[Unit, None]:
        # What comes after the last block is another token, which may want a few experts only.
        return {following: None for following in super()._following(unit, most) if following.index > unit.index}

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
                self._copy(unit, slot, self.in_ram(unit, missing), len(missing))
        except BaseException:
            if not slot.lent:
                self._empty(slot)
            raise
        there.update(missing)

    def in_ram(self, unit: Unit, rows: list[int]) -> Iterable[Part]:
        """The parts of some of a unit's experts, as `rows_of` has them; what RAM keeps is read from disk first."""
        on_disk = unit.rests_in() == "disk" and detect_fake_mode() is None
        if on_disk and self.cache.most:
            return self.cache.bring(unit, rows)
        if on_disk:  # they are copied out of the files
            self.cache.misses += len(rows)
            self.cache.bytes_read += len(rows) * bytes_of_one(unit)
        return rows_of(unit, rows)

    def _copy(self, unit: Unit, slot: Slot, parts: Iterable[Part], experts: int) -> None:
        self._fill(unit, slot, parts, experts * bytes_of_one(unit))

    def _fill(self, unit: Unit, slot: Slot, parts: Iterable[Part], nbytes: int) -> None:
        rows = Rows(unit, parts, nbytes)
        self.lane.fill(slot, rows)  # type: ignore[arg-type]
        self.tell_fetch(unit, self.slots.index(slot) if self.listeners else -1, rows.nbytes)

    def tell_fetch(self, unit: Unit, slot: int, nbytes: int) -> None:
        """Tell listeners that some of a unit's experts are brought."""
        for listener in self.listeners:
            listener(Event("fetch", unit.name, nbytes, unit.rests_in(), self.name, slot))

    def _on_device(self, unit: Unit, rows: list[int], choice: Tensor) -> tuple[Slot, Tensor]:
        """Bring experts to a unit's rows on the device; the slot of these, and the choice by their numbers."""
        kept = self.rows_for(unit)
        assert kept.slot is not None
        if kept.slot is self.some:
            for other in self.on_device.values():
                if other.slot is self.some and other is not kept:
                    other.row_of.clear()  # its experts have been there before
        missing = kept.take(rows)
        if self.rows[unit.index]:
            self.misses += len(missing)
            self.hits += len(rows) - len(missing)
        try:
            unit.check()
            renumbered = kept.renumbered(choice)  # the host waits for that, so it is done before the link is busy
            if missing:
                self._copy(unit, kept.slot, kept.targets(missing, self.in_ram(unit, missing)), len(missing))
        except BaseException:
            self._clear_device(unit)  # what is in its rows is not known
            raise
        return kept.slot, renumbered

    def rows_for(self, unit: Unit) -> DeviceRows:
        """A unit's rows on the device."""
        kept = self.on_device.get(unit.index)
        if kept is None:
            kept = self.on_device[unit.index] = DeviceRows(unit, self.room(unit))
            kept.slot = self._own_slot(unit, kept.nbytes) if self.rows[unit.index] else self._slot_for_some(unit)
        assert kept.slot is not None
        if unit.index not in kept.slot.visits:
            kept.slot.visits[unit.index] = self._make_views(unit, kept.weights())
        return kept

    def _slot_for_some(self, unit: Unit) -> Slot:
        if self.some is None:
            large = [own for own in self.units if self.is_large(own) and not self.rows[own.index]]
            self.some = self._own_slot(unit, max(DeviceRows(own, self.room(own)).nbytes for own in large))
        return self.some

    def _clear_device(self, unit: Unit) -> None:
        kept = self.on_device.pop(unit.index, None)
        if kept is not None:
            self.slots = [slot for slot in self.slots if slot is not kept.slot]
            self.on_device = {index: own for index, own in self.on_device.items() if own.slot is not kept.slot}
            self.some = None if kept.slot is self.some else self.some

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
        slot, kept = self.holder[loan.unit.index], self.on_device.get(loan.unit.index)
        super()._leave(loan, failed)
        if not loan.views.weights:  # it was lent in pieces
            self.pieces.close()
            self._empty(slot)
            self.slots = [other for other in self.slots if other is not slot]
        elif kept is not None and slot is kept.slot:
            if slot not in self.slots:
                self._clear_device(loan.unit)
            elif slot.unit is not None:
                self._empty(slot)  # it must not be found by who wants experts by their own numbers
        elif slot not in self.slots:  # somebody keeps a view of it
            self.cache.forget(loan.unit)
        self.cache.trim(other.unit.index for other in self._loans)

    def _absorb(self, loan: Any) -> None:
        """Keep what a forward wrote into the experts that it was lent; of the others the slot holds nothing."""
        index, kept = loan.unit.index, self.on_device.get(loan.unit.index)
        rows = {row for unit, row in self.cache.kept if unit == index} if self.on_pages else self.filled.get(index)
        on_device = kept is not None and self.holder.get(index) is kept.slot
        for weight, value in zip(loan.unit.weights, loan.views.weights):
            if on_device:
                assert kept is not None
                value = kept.whole(weight.load(), value)
            elif rows is not None:
                chosen, full = sorted(rows), weight.load().detach().clone()
                full[chosen] = value.detach()[chosen].to(full.device)
                value = full
            weight.keep(value)
            self._update(weight)

    def _forget(self, unit: Unit) -> None:
        super()._forget(unit)
        if all(loan.unit is not unit for loan in self._loans):  # what is lent has been written to as well
            self.cache.forget(unit)
        self._clear_device(unit)

    def recover(self) -> None:
        if self.held():
            super().recover()
            self.filled = {}
            self.pieces = Pieces(self)
            for unit in self.units:
                self._clear_device(unit)


def expert_hits(model: nn.Module) -> tuple[int, int]:
    """How many chosen experts were on their GPU already (`expert_cache`) since the model was dispatched.

    Returns:
        (those that were there, those that had to be brought).

    >>> expert_hits(nn.Linear(2, 2))
    (0, 0)
    """
    streamers = {
        hook.streamer for module in model.modules() for hook in hooks_in(module) if isinstance(hook, ExpertsHook)
    }
    counts = [one.found() for one in streamers if isinstance(one, ExpertStreamer)]
    return sum(hits for hits, _ in counts), sum(misses for _, misses in counts)


# ---------------------------------------------------------------------------------------------------------------------
# The hook


class ExpertsHook(AlignDevicesHook):
    """The hook of a block's experts: it sees which are chosen, and asks for these."""

    def _lend(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        assert isinstance(self.streamer, ExpertStreamer) and self.unit is not None
        implementation = getattr(module.config, "_experts_implementation", None)
        choice = choice_of((*args, *kwargs.values())) if implementation in KNOWN else None
        with self.streamer.lock:
            self.streamer.take_in_changes(self.unit)
        if is_parametrized(module):  # by an adapter, which reads a stack as a whole
            implementation = "grouped_mm"  # so that each expert has its number
        rows = self.streamer.lend_for(self.unit, choice, implementation)
        if rows is None:
            return args, kwargs
        return (
            tuple(rows if value is choice else value for value in args),
            {name: rows if value is choice else value for name, value in kwargs.items()},
        )
