"""Which unit is in which slot: a few stretches of memory on the device that all units share.

A slot knows what it holds, so a unit that was skipped, repeated or called out of order is found or fetched. The next
units go to the slots that were used longest ago. In the steady state nothing is allocated and the host waits for
nothing, except for a disk that is slower than the link.

Leaves out: how a slot is filled (`offload/transfer.py`), and how its weights get into the model (`offload/stream.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..maps.partition import spread
from ._torch import detect_fake_mode
from .stream import Streamer, Views
from .transfer import CudaLane, PlainLane, Slot
from .weights import Slab, Unit


class Slots(Streamer):
    """Lends weights from a few fixed slots on the device.

    Args:
        device, units, prefetch, name: see `Streamer`.
        count: number of slots; one more is made when forwards are nested so deeply that all are in use.
        cache: bytes of RAM that may keep units from the disk after their first forward. Always the same units: if those
            used last were kept, a cycle longer than the cache would never find the next one in it.
    """

    def __init__(
        self,
        device: torch.device,
        units: Sequence[Unit],
        *,
        count: int = 2,
        prefetch: bool = True,
        cache: int = 0,
        name: str = "",
    ) -> None:
        super().__init__(device, units, prefetch=prefetch, name=name)
        self.count = count
        self.cached = spread([unit.nbytes if unit.rests_in() == "disk" else 0 for unit in units], cache)
        self.lane = CudaLane(device) if is_real_cuda(device) else PlainLane(device)
        self.slots: list[Slot] = []
        self.holder: dict[int, Slot] = {}  # unit's index -> the slot that holds it
        self.loans = 0  # so far: the clock by which slots are used

    def close(self) -> None:
        for slot in self.slots:
            self.lane.settle(slot)
        self.lane.close()

    def _bring(self, unit: Unit) -> Views:
        slot = self.holder.get(unit.index)
        shared = sum(slot.owner is None for slot in self.slots) or self.count
        following = self._following(unit, shared - 1) if self.prefetch else []
        if slot is None:
            slot = self._fetch(unit, following)
        slot.lent = True
        self.loans += 1
        slot.used = self.loans
        try:
            self._prefetch(following)
            self.lane.arrive(slot)
            if unit.index not in slot.visits:
                slot.visits[unit.index] = self._make_views(unit, [weight.over(slot.base) for weight in unit.weights])
        except BaseException:
            slot.lent = False
            self._empty(slot)
            raise
        slot.version = slot.base._version
        views: Views = slot.visits[unit.index]
        return views

    def _prefetch(self, following: list[Unit]) -> None:
        for unit in following:
            if unit.index in self.holder or (unit.loose and self._loan_of(unit) is not None):
                continue
            if not unit.loose and self._idle(following) is None:
                return
            try:
                self._fetch(unit, following)
            except OSError:
                return  # it was a guess: if the unit is needed, the error comes then

    def _idle(self, spared: list[Unit]) -> Slot | None:
        """The slot to fill next: not lent, not holding what is needed soon, and used longest ago."""
        free = [slot for slot in self.slots if not slot.lent and slot.owner is None and slot.unit not in spared]
        return min(free, key=lambda slot: slot.used) if free else None

    def _fetch(self, unit: Unit, following: list[Unit]) -> Slot:
        slot = self._own_slot(unit) if unit.loose else self._shared_slot(following)
        unit.check()
        self._empty(slot)
        self.lane.fill(slot, unit)
        slot.unit, self.holder[unit.index] = unit, slot
        if self.listeners:
            self._tell("fetch", unit, self.slots.index(slot))
        return slot

    def _shared_slot(self, following: list[Unit]) -> Slot:
        """A slot for any unit; the first time all are made, and one more when forwards are nested too deeply."""
        while (slot := self._idle(following) or self._idle([])) is None:
            size = max(unit.nbytes for unit in self.units if not unit.loose)
            first = all(slot.owner is not None for slot in self.slots)
            self.slots += [self.lane.slot(size) for _ in range(self.count if first else 1)]
        return slot

    def _own_slot(self, unit: Unit) -> Slot:
        """The slot of a loose unit: it is lent while other units come and go, and must not keep one from them."""
        slot = next((slot for slot in self.slots if slot.owner is unit), None)
        if slot is None:
            slot = self.lane.slot(unit.nbytes)
            slot.owner = unit
            self.slots.append(slot)
        return slot

    def _empty(self, slot: Slot) -> None:
        self.lane.settle(slot)
        if slot.unit is not None:
            del self.holder[slot.unit.index]
        slot.unit = None

    def _leave(self, unit: Unit, views: Views) -> None:
        slot = self.holder[unit.index]
        written = self._written(unit, views)
        slot.lent = False
        self.lane.leave(slot)
        if written:
            self._absorb(unit, views)
        elif unit.index in self.cached:
            self._cache(unit, slot)

    def _cache(self, unit: Unit, slot: Slot) -> None:
        """Keep a unit from the disk in RAM, as it lies in the slot."""
        slab = Slab(unit.nbytes, pin=is_real_cuda(self.device))
        slab.pin()
        slab.bytes.copy_(slot.base[: unit.nbytes])
        for part in unit.parts():
            part.slab, part.at, part.source = slab, part.offset, None
        unit.forget_moves()
        self.cached.discard(unit.index)

    def _all_views(self, unit: Unit) -> list[Views]:
        return [slot.visits[unit.index] for slot in self.slots if unit.index in slot.visits]

    def _written(self, unit: Unit, views: Views) -> bool:
        slot = self.holder.get(unit.index)
        return slot is not None and slot.lent and slot.base._version != slot.version

    def _reset(self) -> None:
        for slot in self.slots:
            self.lane.settle(slot)
            if slot.lent:
                self.lane.leave(slot)  # work that was started may still read it
            slot.unit, slot.lent = None, False
        self.holder = {}

    def _forget(self, units: Iterable[Unit]) -> None:
        for unit in units:
            unit.forget_moves()
            for slot in self.slots:
                slot.visits.pop(unit.index, None)
            held = self.holder.get(unit.index)
            if held is not None and not held.lent:
                self._empty(held)


def is_real_cuda(device: torch.device) -> bool:
    """Whether a device is a CUDA GPU that exists, not one of a dry run."""
    return device.type == "cuda" and detect_fake_mode() is None
