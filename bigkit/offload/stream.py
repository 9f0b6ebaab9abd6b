"""Bringing weights in just in time.

A streamer serves one device. Before a unit's forward it lends the unit's weights to the model, afterwards it takes them
back:

    borrow   the unit is in a slot, or is fetched into one; the model's parameters become views of the slot
    work     the unit's forward; meanwhile the next units are fetched into the other slots
    return   handles (`offload/handle.py`) take the parameters' places; the slot may be filled anew

Units are fetched ahead in the order in which they worked the last time; at first, in the model's, and after the last
the first, since after a token comes another. The order is only a hint: a wrong guess costs time, nothing else.

One thread at a time: the lock is taken where a unit is lent and released where it is taken back, so it is held during
the forward. It is reentrant, so the forwards of units may nest.

Leaves out: which slot a unit goes to (`offload/slots.py`), the streamer of the CPU, which has none
(`offload/mapped.py`), how bytes travel (`offload/transfer.py`), and who borrows (`offload/hooks.py`).
"""

from __future__ import annotations

import mmap
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._torch import held_by_this_thread, mark_lent, storage_id
from .handle import Away, refuse_copy
from .inference_only import end_guards, enter_guard, refuse_gradient
from .sites import Site
from .weights import Unit, Weight


class Event(NamedTuple):
    """What a streamer tells its listeners.

    Args:
        kind: "fetch" (the unit's bytes begin to move), "work" (its forward begins) or "return" (its forward has ended).
        unit: the unit's name.
        nbytes: bytes that move; 0 unless `kind` is "fetch".
        rests: where the unit's weights rest, "cpu" or "disk".
        device: the device on which the unit works.
        slot: the slot's number; -1 where there are no slots, and unless `kind` is "fetch".
    """

    kind: str
    unit: str
    nbytes: int
    rests: str
    device: str
    slot: int


class Views(NamedTuple):
    """A unit's weights as tensors over a slot, or over pages of a file. Made once for each.

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


class Streamer(ABC):
    """Lends the weights of units to a model on one device.

    Args:
        device: where they work.
        units: in the order in which the model is likely to use them.
        prefetch: fetch the next units while one works.
        name: what events call the device.
    """

    def __init__(self, device: torch.device, units: Sequence[Unit], *, prefetch: bool = True, name: str = "") -> None:
        self.device, self.units, self.prefetch = device, list(units), prefetch
        self.name = name or str(device)
        self.listeners: list[Callable[[Event], None]] = []
        self.lock = threading.RLock()  # from `lend` to `take_back`
        self.after = {i: (i + 1) % len(self.units) for i in range(len(self.units))}  # unit -> the one that follows
        self.last: int | None = None  # the unit that worked last
        self._loans: list[_Loan] = []  # innermost last
        self._unit_of: dict[int, Unit] = {}  # id of a weight -> its unit
        self._released: dict[int, Tensor] = {}  # id of a weight -> the tensor that took its place for good
        for i, unit in enumerate(self.units):
            unit.index = i
            for weight in unit.weights:
                shared = [twin.away for twin in weight.twins if twin.away is not None]
                weight.away = shared[0] if shared else Away.of(weight, self)
                self._unit_of[id(weight)] = unit
        self.sites = [Site(unit, self) for unit in self.units]
        for site in self.sites:
            site.put_handles()

    def __reduce_ex__(self, protocol: Any) -> Any:
        refuse_copy("this model")

    # -- borrow and return

    def lend(self, unit: Unit) -> None:
        """Put a unit's weights into the model, on the device. The calling thread holds the lock until `take_back`.

        Raises:
            OSError: a file could not be read; nothing is lent then.
        """
        self.lock.acquire()
        loan: _Loan | None = None
        try:
            loan = _Loan(*self._borrowed(unit))
            self._loans.append(loan)
            for entry, value in zip(self.sites[unit.index].entries, loan.views.values):
                entry.tensors[entry.own] = value
            if self.listeners:
                self._tell("work", unit)
        except Exception:  # not a KeyboardInterrupt, which may come between any two lines: see `recover`
            if loan is None:
                self.lock.release()
            else:
                self.take_back(unit)
            raise

    def _borrowed(self, unit: Unit) -> tuple[Unit, Views, Any]:
        loan = self._loan_of(unit)  # there is one if the unit calls itself
        if loan is not None:
            views = loan.views
        else:
            self.sites[unit.index].take_in_changes()
            views = self._bring(unit)
        return unit, views, enter_guard(self, unit.name, views.storages) if torch.is_grad_enabled() else None

    def take_back(self, unit: Unit) -> None:
        """Put the handles back into the model, and keep what the forward wrote into the weights."""
        if not self._loans or self._loans[-1].unit is not unit:
            return  # user code has caught a KeyboardInterrupt, after which a loan was left open: `recover` ends all
        try:
            loan = self._loans.pop()
            if loan.guard is not None:
                loan.guard.__exit__(None, None, None)
            if self._loan_of(unit) is None:
                for entry, value in zip(self.sites[unit.index].entries, loan.views.values):
                    if entry.tensors.get(entry.own) is value:
                        entry.tensors[entry.own] = entry.handle
                self._leave(unit, loan.views)
            if self.listeners:
                self._tell("return", unit)
        except Exception:
            self.lock.release()
            raise
        self.lock.release()  # in no `finally`: after an interrupt, that the lock is held tells `recover` of it

    def held(self) -> bool:
        """Whether this thread is lent something."""
        return held_by_this_thread(self.lock)

    def recover(self) -> None:
        """Take back all that this thread is lent, also after an interrupt in the middle of `lend` or `take_back`."""
        if not self.held():
            return
        end_guards(self)
        for site in self.sites:
            lent = {id(value) for views in self._all_views(site.unit) for value in views.values}
            for entry in site.entries:
                if id(entry.tensors.get(entry.own)) in lent:
                    entry.tensors[entry.own] = entry.handle
        for loan in self._loans:
            if self._written(loan.unit, loan.views):
                self._absorb(loan.unit, loan.views)
        self._loans = []
        self._reset()
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
            value = weight.load(device or self.device)
        if value.requires_grad:
            value.register_hook(refuse_gradient(weight.name))
        return value

    def unload(self, weight: Weight) -> None:
        """Let the pages of a weight that was loaded leave RAM. Nobody may have written to them."""
        with self.lock:
            if not self._loans:
                weight.advise(mmap.MADV_DONTNEED)

    def keep(self, weight: Weight, value: Tensor) -> None:
        """Make `value` the data of a weight.

        Raises:
            ValueError: it has another shape or dtype.
        """
        with self.lock:
            weight.keep(value)
            self._update(weight)

    def forget(self, weight: Weight) -> None:
        """Fetch a weight anew the next time: something about it has changed."""
        with self.lock:
            self._forget(self._units_with(weight))

    def rests_in(self, weight: Weight) -> str:
        """Where a weight rests, "cpu" or "disk"."""
        return "disk" if any(part.source for part in weight.parts.values()) else "cpu"

    def release(self, unit: Unit) -> None:
        """Put a unit's weights into the model for good, on the CPU."""
        with self.lock:
            site = self.sites[unit.index]
            site.take_in_changes()
            for weight in unit.weights:
                twins = [self._released[id(twin)] for twin in weight.twins if id(twin) in self._released]
                self._released[id(weight)] = twins[0] if twins else weight.load()
            for entry in site.entries:
                if entry.tensors.get(entry.own) is entry.handle:
                    entry.tensors[entry.own] = self._released[id(entry.weight)]

    # -- what differs between streamers

    @abstractmethod
    def close(self) -> None:
        """Wait for copies that are under way."""

    @abstractmethod
    def _bring(self, unit: Unit) -> Views:
        """Make a unit ready to work."""

    @abstractmethod
    def _leave(self, unit: Unit, views: Views) -> None:
        """Note that a unit's forward has ended."""

    @abstractmethod
    def _all_views(self, unit: Unit) -> list[Views]:
        """All tensors that may stand in the model for a unit's weights while it is lent."""

    @abstractmethod
    def _written(self, unit: Unit, views: Views) -> bool:
        """Whether somebody wrote to the weights of a unit that is lent."""

    @abstractmethod
    def _reset(self) -> None:
        """Forget all that was lent and fetched."""

    @abstractmethod
    def _forget(self, units: Iterable[Unit]) -> None:
        """Forget what was fetched of these units: their weights have changed where they rest."""

    # -- order

    def _following(self, unit: Unit, most: int) -> list[Unit]:
        """The units that probably come next."""
        if self.last is not None:
            self.after[self.last] = unit.index
        self.last = at = unit.index
        following: list[Unit] = []
        while len(following) < most and (at := self.after[at]) != unit.index and self.units[at] not in following:
            following.append(self.units[at])
        return following

    # -- changes of weights

    def _absorb(self, unit: Unit, views: Views) -> None:
        """Keep what a forward wrote into its weights."""
        for weight, value in zip(unit.weights, views.weights):
            weight.keep(value)
            self._update(weight)

    def _update(self, weight: Weight) -> None:
        """A weight has changed where it rests: change it where it is lent, and fetch it anew the next time."""
        for loan in self._loans:
            for own, value in zip(loan.unit.weights, loan.views.weights):
                if own is weight or own in weight.twins:
                    own.write_to(value)
        self._forget(self._units_with(weight))

    def _units_with(self, weight: Weight) -> list[Unit]:
        return [self._unit_of[id(same)] for same in (weight, *weight.twins)]

    # -- tensors and events

    def _make_views(self, unit: Unit, weights: list[Tensor]) -> Views:
        for weight, value in zip(unit.weights, weights, strict=True):
            mark_lent(value)
            if value.requires_grad:
                value.register_hook(refuse_gradient(weight.name))
        value_of = {id(weight): value for weight, value in zip(unit.weights, weights)}
        values = [value_of[id(entry.weight)] for entry in self.sites[unit.index].entries]
        return Views(values, weights, frozenset(map(storage_id, weights)))

    def _tell(self, kind: str, unit: Unit, slot: int = -1) -> None:
        event = Event(kind, unit.name, unit.nbytes if kind == "fetch" else 0, unit.rests_in(), self.name, slot)
        for listener in self.listeners:
            listener(event)
