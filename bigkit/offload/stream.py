"""Bringing weights in just in time.

A streamer serves one device. Before a unit's forward it lends the unit's weights to the model, afterwards it takes them
back:

    borrow   the unit is in a slot, or is fetched into one; the model's parameters become views of the slot
    work     the unit's forward; meanwhile the next units are fetched into the other slots
    return   handles (`offload/handle.py`) take the parameters' places; the slot may be filled anew

Units are fetched ahead in the order in which they worked the last time, at first in the model's order; the last is
followed by the first, since another token may come. This is only a guess. A slot knows what it holds, so a unit that
was skipped, repeated or called out of order is found or fetched: a wrong guess costs time, nothing else.

In the steady state nothing is allocated and the host waits for nothing, except for a disk that is slower than the link.

One thread at a time: the lock is taken where a unit is lent and released where it is taken back, so it is held during
the forward. It is reentrant, so the forwards of units may nest.

Leaves out: how bytes get into a slot (`offload/transfer.py`), weights that work on the CPU (`offload/mapped.py`), what
users change in the model (`offload/sites.py`), and who borrows (`offload/hooks.py`).
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoints.ring import Slab
from ..maps.partition import spread
from ._torch import held_by_this_thread, is_real_cuda, is_traced, mark_lent, storage_id
from .escapes import count_holders, own_copies
from .events import Event
from .forks import STREAMERS
from .handle import Away, refuse_copy
from .inference_only import end_guards, enter_guard, refuse_gradient, refuse_trace
from .mapped import PageLane, pages_ahead
from .other_form import keep_other_form
from .outside import take_news, write_where_lent
from .sites import Site
from .transfer import CudaLane, PlainLane, Slot
from .weights import Unit, Weight


class Views(NamedTuple):
    """A unit's weights as tensors over a slot. Made once for each slot.

    Args:
        values: the tensor for each entry of the unit's site.
        weights: the tensor for each weight of the unit.
        storages: `storage_id` of their memory.
    """

    values: list[Tensor]
    weights: list[Tensor]
    storages: frozenset[int]


class _Loan(NamedTuple):
    """One forward's use of a unit."""

    unit: Unit
    views: Views
    guard: torch.autograd.graph.saved_tensors_hooks | None  # against a backward, in grad mode


class Streamer:
    """Lends the weights of units to a model on one device, from a few slots there.

    Args:
        device: where they work.
        units: in the order in which the model is likely to use them.
        lane: what fills the slots; None takes the one that suits the device.
        count: number of slots; one more is made when forwards are nested so deeply that all are in use.
        prefetch: fetch the next units while one works.
        cache: bytes of RAM that may keep units from the disk after their first forward. Always the same units: if those
            used last were kept, a cycle longer than the cache would never find the next one in it.
        name: what events call the device.
    """

    def __init__(
        self, device: torch.device, units: Sequence[Unit], lane: PlainLane | None = None, *, count: int = 2,
        prefetch: bool = True, cache: int = 0, name: str = "",
    ) -> None:  # fmt: skip
        self.device, self.units, self.count, self.prefetch = device, list(units), count, prefetch
        self.name = name or str(device)
        self.lane = lane or (CudaLane(device) if is_real_cuda(device) else PlainLane(device))
        self.maps = isinstance(self.lane, PageLane)  # the pages of files are lent, there is nothing to copy
        if self.maps:
            self.count = pages_ahead(self.units)
        self.slots: list[Slot] = []
        self.own_slots: dict[int, Slot] = {}  # those of them that are for one unit alone: its index -> the slot
        self.holder: dict[int, Slot] = {}  # unit's index -> the slot that holds it
        self.model_id = 0  # `id` of the model that was dispatched
        self.loans = 0  # how many there have been: the clock by which slots are used
        self.cached = spread([unit.nbytes if unit.rests_in() == "disk" else 0 for unit in units], cache)
        self.listeners: list[Callable[[Event], None]] = []
        self.lock = threading.RLock()  # from `lend` to `take_back`
        self.after = {i: (i + 1) % len(self.units) for i in range(len(self.units))}  # unit -> the one that follows
        self.last: int | None = None  # the unit that worked last
        self._loans: list[_Loan] = []  # innermost last
        self.stale: set[int] = set()  # indices of units with a weight that was changed through another streamer
        for i, unit in enumerate(self.units):
            unit.index = i
            for weight in unit.weights:
                shared = [twin.away for twin in weight.aliases if twin.away is not None]
                weight.away = shared[0] if shared else Away.of(weight, self)
                weight.lender, weight.index = self, i
                weight.outside.watch()
        self.sites = [Site(unit, self) for unit in self.units]
        for site in self.sites:
            site.put_handles()
        STREAMERS.add(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        refuse_copy("this model")

    # -- borrow and return

    def lend(self, unit: Unit, bring: Callable[[Unit], Views] | None = None) -> None:
        """Put a unit's weights into the model, on the device. The calling thread holds the lock until `take_back`.

        What makes the unit ready may be given: experts know several ways.

        Whatever is raised here or in `take_back`, between any two lines (the handler of a signal may raise anything),
        the lock stays held and `recover` must be called.

        Raises:
            OSError: a file could not be read.
            RuntimeError: the forward is being traced.
        """
        if is_traced():
            refuse_trace(unit.name)
        self.lock.acquire()
        views = self._borrowed(unit, bring or self._bring)
        guard = enter_guard(self, unit.name, views.storages) if torch.is_grad_enabled() else None
        self._loans.append(_Loan(unit, views, guard))
        for entry, value in zip(self.sites[unit.index].entries, views.values):
            if entry.tensors.get(entry.own) is entry.handle:  # not in `functional_call`, nor if it is lent already
                entry.tensors[entry.own] = value
        if self.listeners:
            self._tell("work", unit)

    def _borrowed(self, unit: Unit, bring: Callable[[Unit], Views]) -> Views:
        if (loan := self._loan_of(unit)) is not None:  # the unit calls itself
            return loan.views
        self.sites[unit.index].take_in_changes()
        return bring(unit)

    def own_output(self, unit: Unit, output: Any) -> Any:
        """What the forward of a unit that is lent returns, with copies in place of its weights and of views of them."""
        loan = self._loan_of(unit)
        return output if loan is None else own_copies(output, loan.views.storages)

    def take_back(self, unit: Unit, failed: bool = False) -> None:
        """Put the handles back into the model, and keep what the forward wrote into the weights.

        Args:
            unit: the unit that was lent last.
            failed: its forward has raised something, and nobody needs what that had computed.
        """
        if not self._loans or self._loans[-1].unit is not unit:
            return  # user code has caught what was raised, and a loan was left open: `recover` ends all
        loan = self._loans.pop()
        if loan.guard is not None:
            loan.guard.__exit__(None, None, None)
        if self._loan_of(unit) is None:
            self._put_handles(loan)  # apart, so that no variable here refers to a tensor while `_leave` counts
            self._leave(loan, failed)
        if self.listeners:
            self._tell("return", unit)
        self.lock.release()  # in no `finally`: that the lock is still held tells `recover` of what was raised

    def _put_handles(self, loan: _Loan) -> None:
        for entry, value in zip(self.sites[loan.unit.index].entries, loan.views.values):
            if entry.tensors.get(entry.own) is value:
                entry.tensors[entry.own] = entry.handle

    def held(self) -> bool:
        """Whether something is lent to this thread."""
        return held_by_this_thread(self.lock)

    def recover(self) -> None:
        """Take back all that is lent to this thread, also after an interrupt in the middle of `lend` or `take_back`."""
        if not self.held():
            return
        end_guards(self)
        for site in self.sites:
            views = [slot.visits[site.unit.index] for slot in self.slots if site.unit.index in slot.visits]
            views += [loan.views for loan in self._loans if loan.unit is site.unit]
            lent = {id(value) for one in views for value in one.values}
            for entry in site.entries:
                if id(entry.tensors.get(entry.own)) in lent:
                    entry.tensors[entry.own] = entry.handle
        for loan in self._loans:
            if self._written(loan):
                self._absorb(loan)
        self._loans = []
        for slot in self.slots:
            self.lane.finish(slot)
            if slot.lent:
                self.lane.leave(slot)  # work that was started may still read it
            slot.unit, slot.lent = None, False
        self.holder = {}
        while self.held():
            self.lock.release()

    def _loan_of(self, unit: Unit) -> _Loan | None:
        for loan in self._loans:
            if loan.unit is unit:
                return loan
        return None

    # -- what handles ask for

    def load(self, weight: Weight, device: torch.device | None = None) -> Tensor:
        """A weight's data outside of its unit's forward."""
        with self.lock:
            take_news(weight)
            value = weight.load(device or self.device)
        refuse_gradient(value, weight.name)
        return value

    def unload(self, weight: Weight) -> None:
        """Let the pages of a weight that was loaded leave RAM. Nobody may have written to them."""
        with self.lock:
            if not self._loans:
                weight.madvise(mmap.MADV_DONTNEED)

    def keep(self, weight: Weight, value: Tensor) -> None:
        """Make `value` the data of a weight.

        Raises:
            ValueError: it has another shape or dtype, and the weight is quantized or a forward is running.
        """
        with self.lock:
            if weight.fits(value):
                self.forget(weight)  # first, as an interrupt may come anywhere
                weight.keep(value)
                self._update(weight)
            else:
                keep_other_form(weight, value)

    def forget(self, weight: Weight) -> None:
        """Fetch a weight anew the next time: it has changed where it rests, or in what it is."""
        for same in (weight, *weight.aliases):
            if same.lender is self:
                with self.lock:
                    self._forget(self.units[same.index])
            else:
                same.lender.stale.add(same.index)  # without its lock, which another thread may hold

    def _forget(self, unit: Unit) -> None:
        unit.forget_moves()
        for slot in self.slots:
            slot.visits.pop(unit.index, None)
        held = self.holder.get(unit.index)
        if held is not None and not held.lent:
            self._empty(held)

    def release(self, unit: Unit) -> None:
        """Put a unit's weights into the model for good, on the CPU."""
        with self.lock:
            self.sites[unit.index].release()

    def close(self) -> None:
        """Wait for copies that are under way."""
        for slot in self.slots:
            self.lane.finish(slot)
        self.lane.close()

    # -- slots

    def _bring(self, unit: Unit) -> Views:
        """Make a unit ready to work."""
        slot = self.holder.get(unit.index)
        most = self.count if self.maps else max(sum([slot.owner is None for slot in self.slots]), self.count)
        if self.maps and slot is not None and self.loans % max(self.count // 2, 1):
            most = 1  # the pages of the next units have been asked for before: not at each loan again
        following = self._following(unit, most - 1) if self.prefetch else {}
        if slot is None:
            slot = self._fetch(unit, following)
        if self.maps:
            unit.check()  # the file may have changed since its pages were asked for
        slot.lent = True
        slot.used = self.loans = self.loans + 1
        try:
            self._prefetch(following)
            self.lane.arrive(slot)
            if unit.index not in slot.visits:
                weights = [weight.load() if self.maps else weight.over(slot.base) for weight in unit.weights]
                slot.visits[unit.index] = self._make_views(unit, weights)
        except BaseException:
            slot.lent = False
            self._empty(slot)
            raise
        views: Views = slot.visits[unit.index]
        slot.version = self._version(slot, views)
        slot.holders = None if self.maps else count_holders(slot.base, views.values)
        return views

    def _prefetch(self, following: dict[Unit, None]) -> None:
        for unit in following:
            if unit.index in self.holder:
                continue
            if not (unit.loose or self.maps) and self._idle(following) is None:
                return
            try:
                self._fetch(unit, following)
            except TimeoutError:
                raise  # the handler of a signal may raise it
            except OSError:
                return  # it was a guess: if the unit is needed, the error comes then

    def _idle(self, spared: Container[Unit | None]) -> Slot | None:
        """The slot to fill next: not lent, not holding what is needed soon, and used longest ago."""
        free = [slot for slot in self.slots if not slot.lent and slot.owner is None and slot.unit not in spared]
        return min(free, key=lambda slot: slot.used) if free else None

    def _fetch(self, unit: Unit, following: Container[Unit | None]) -> Slot:
        slot = self._own_slot(unit) if unit.loose or self.maps else self._shared_slot(following)
        if not self.maps:
            unit.check()
        self._empty(slot)
        self.lane.fill(slot, unit)
        slot.unit, self.holder[unit.index] = unit, slot
        if self.listeners:
            self._tell("fetch", unit, self.slots.index(slot))
        return slot

    def _shared_slot(self, following: Container[Unit | None]) -> Slot:
        """A slot for any unit; the first time all are made, and one more when forwards are nested too deeply."""
        missing = min(self.count, len(self.units)) - sum([slot.owner is None for slot in self.slots])
        while missing > 0 or (slot := self._idle(following) or self._idle([])) is None:
            self.slots.append(self.lane.slot(max(unit.nbytes for unit in self.units if not unit.loose)))
            missing -= 1
        return slot

    def _own_slot(self, unit: Unit) -> Slot:
        """The slot of a loose unit, which is lent while other units come and go; of every unit where pages are lent."""
        if (slot := self.own_slots.get(unit.index)) is None:
            slot = self.own_slots[unit.index] = self.lane.slot(0 if self.maps else unit.nbytes)
            slot.owner = unit
            self.slots.append(slot)
        return slot

    def let_go(self) -> None:
        """Give back the memory of all slots, until a unit is needed again; none is lent."""
        for slot in self.slots:
            self.lane.finish(slot)
        self.slots, self.own_slots, self.holder = [], {}, {}

    def _empty(self, slot: Slot) -> None:
        self.lane.finish(slot)
        if slot.unit is not None:
            self.holder.pop(slot.unit.index, None)  # an interrupt may have come after it
        slot.unit = None

    def _leave(self, loan: _Loan, failed: bool) -> None:
        """A unit's forward has ended."""
        slot = self.holder[loan.unit.index]
        kept = not (failed or self.maps) and self._kept(slot, loan)
        written = self._written(loan)
        try:
            if written:
                self._absorb(loan)
            elif loan.unit.index in self.cached:
                self._cache(loan.unit, slot)
        finally:
            self.lane.leave(slot)
            slot.lent = False
        if written or self.maps or kept:
            self._empty(slot)
        if kept:
            self.own_slots.pop(loan.unit.index, None)
            self.slots.remove(slot)

    def _kept(self, slot: Slot, loan: _Loan) -> bool:
        """Whether a view of a slot's memory outlives the loan: the memory must not be filled anew then."""
        holders = count_holders(slot.base, loan.views.values)
        # In grad mode the graph refers to parameters.
        return holders.memory > slot.holders.memory or (loan.guard is None and holders.tensors > slot.holders.tensors)

    def _cache(self, unit: Unit, slot: Slot) -> None:
        """Keep a unit from the disk in RAM, as it lies in the slot."""
        slab = Slab(unit.nbytes, pin=is_real_cuda(self.device))
        slab.pin()
        slab.bytes.copy_(slot.base[: unit.nbytes])
        for part in unit.parts():
            part.slab, part.at, part.source = slab, part.offset, None
        unit.forget_moves()
        self.cached.discard(unit.index)

    def _following(self, unit: Unit, most: int) -> dict[Unit, None]:
        """The units that probably come next, in order."""
        if self.last is not None:
            self.after[self.last] = unit.index
        self.last = at = unit.index
        following: dict[Unit, None] = {}
        if len(self.holder) == len(self.units):
            return following  # all are in slots
        while len(following) < most and (at := self.after[at]) != unit.index and self.units[at] not in following:
            following[self.units[at]] = None
        return following

    # -- changes of weights

    def _version(self, slot: Slot, views: Views) -> int:
        """A number that every write to the weights in a slot raises."""
        return sum([tensor._version for tensor in views.weights]) if self.maps else slot.base._version

    def _written(self, loan: _Loan) -> bool:
        """Whether somebody has written to the weights that are lent."""
        slot = self.holder.get(loan.unit.index)
        return slot is not None and slot.lent and slot.version != self._version(slot, loan.views)

    def _absorb(self, loan: _Loan) -> None:
        """Keep what a forward wrote into its weights."""
        for weight, value in zip(loan.unit.weights, loan.views.weights):
            weight.keep(value)
            self._update(weight)

    def _update(self, weight: Weight) -> None:
        """A weight has changed where it rests: change it where it is lent, and fetch it anew the next time."""
        write_where_lent(weight)
        self.forget(weight)

    # -- tensors and events

    def _make_views(self, unit: Unit, weights: list[Tensor]) -> Views:
        for weight, value in zip(unit.weights, weights, strict=True):
            mark_lent(value)
            refuse_gradient(value, weight.name)
        value_of = {id(weight): value for weight, value in zip(unit.weights, weights)}
        values = [value_of[id(entry.weight)] for entry in self.sites[unit.index].entries]
        return Views(values, weights, frozenset(map(storage_id, weights)))

    def _tell(self, kind: str, unit: Unit, slot: int = -1) -> None:
        event = Event(kind, unit.name, unit.nbytes if kind == "fetch" else 0, unit.rests_in(), self.name, slot)
        for listener in self.listeners:
            listener(event)
