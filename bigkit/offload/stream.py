"""Bringing weights in just in time.

A streamer serves one device. Before a unit's forward it lends the unit's weights to the model, afterwards it takes them
back:

    borrow   the unit is in a slot, or is fetched into one; the model's parameters become views of the slot
    work     the unit's forward; meanwhile the next units are fetched into the other slots
    return   handles (`offload/handle.py`) take the parameters' places; the slot may be filled anew

Which unit comes next is learned: it is the one that came next the last time, and before that the one that follows in
the model; the first follows the last, since after a token comes another. It is only a hint. A slot knows what it holds,
so a unit that was skipped, repeated or called out of order is found or fetched, and a wrong guess costs time, nothing
else.

In the steady state nothing is allocated and nothing waits on the host, except for a disk that is slower than the link.

`Slots` fills a few fixed slots through a lane (`offload/transfer.py`). `Mapped` serves the CPU: it lends the pages of
the files themselves, asks the system to read those of the next units, and lets go of those that have been used.

Leaves out: who borrows (`offload/hooks.py`), and which units there are (`offload/dispatch.py`).
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoints.ring import Slab
from ..maps.partition import spread
from ..units import MiB
from .handle import Away
from .transfer import CudaLane, PlainLane, Slot
from .weights import Unit, Weight

AHEAD = 64 * MiB  # how far `Mapped` has files read ahead


class Event(NamedTuple):
    """What a streamer tells its listeners.

    Args:
        kind: "fetch" (its bytes begin to move), "work" (its forward begins) or "return" (it has ended).
        unit: name of the unit.
        nbytes: bytes that move; 0 for the other kinds.
        rests: "cpu" or "disk".
        device: the device that it works on.
        slot: number of the slot, or -1 without slots.
    """

    kind: str
    unit: str
    nbytes: int
    rests: str
    device: str
    slot: int


class _Entry(NamedTuple):
    """One reference in the model to a weight of a unit."""

    tensors: Any  # a module's `_parameters` or `_buffers`
    own: str
    away: Away
    weight: Weight
    place: tuple[nn.Module, str, bool]


class _Visit(NamedTuple):
    """A unit's weights where they work: made once for each slot."""

    values: list[Tensor]  # one for each entry
    weights: list[Tensor]  # one for each weight
    storages: frozenset[int]


def _data(lent: Tensor) -> Tensor:
    return lent.detach()


def _set_data(lent: Tensor, value: Tensor) -> None:
    if value.shape != lent.shape or value.dtype != lent.dtype:
        raise ValueError(f"a weight of shape {tuple(lent.shape)} {lent.dtype} that was lent to a forward cannot become "
                         f"{tuple(value.shape)} {value.dtype} there: do so between forwards")  # fmt: skip
    lent.detach().copy_(value)


class LentParameter(nn.Parameter):
    """A parameter at work. Its `data` counts its versions too, so that no write goes unseen."""

    data = property(_data, _set_data)


class LentBuffer(Tensor):
    """A buffer at work."""

    data = property(_data, _set_data)
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


_LENT: dict[type, type] = {nn.Parameter: LentParameter, Tensor: LentBuffer}


class _Loan(NamedTuple):
    """One forward's use of a unit."""

    unit: Unit
    visit: _Visit
    guard: Any


class Streamer:
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
        self.after = {i: (i + 1) % len(self.units) for i in range(len(self.units))}
        self.lent = [0] * len(self.units)
        self._start()
        for i, unit in enumerate(self.units):
            unit.index = i
            for weight in unit.weights:
                shared = [twin.away for twin in weight.aliases if twin.away is not None]
                weight.away = shared[0] if shared else Away.of(weight, self)
        self._look()
        self.send_away()

    def _look(self) -> None:
        """Where in the model the units' weights are referred to, and which modules there are around them."""
        self._entries = [
            [
                _Entry(
                    module._buffers if buffer else module._parameters, own, weight.away, weight, (module, own, buffer)
                )
                for weight in unit.weights
                for module, own, buffer in weight.places
            ]
            for unit in self.units
        ]
        self._units_of: dict[int, list[int]] = {}  # weight -> the units that hold it, or its twins
        where = {id(weight): i for i, unit in enumerate(self.units) for weight in unit.weights}
        for unit in self.units:
            for weight in unit.weights:
                self._units_of[id(weight)] = [where[id(same)] for same in (weight, *weight.aliases)]
        self._children = [[module._modules for module in unit.modules()] for unit in self.units]
        self._shapes = [*map(_shape, self._children)]

    def _ready(self) -> None:
        if self._entries is None:  # a copy of a streamer: its modules were not complete before
            self._look()

    def _start(self) -> None:
        """What a copy or a pickle of the streamer makes anew."""
        self.lock = threading.RLock()
        self.last: int | None = None
        self._loans: list[_Loan] = []
        self._released: dict[int, Tensor] = {}  # weight -> what stands in the model for it, for good

    def __getstate__(self) -> dict[str, Any]:
        runtime = {"lock", "last", "_loans", "_entries", "_children", "_shapes", "_units_of", "_released", "listeners"}
        return {name: value for name, value in vars(self).items() if name not in runtime}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, listeners=[], lent=[0] * len(state["units"]), _entries=None)
        self._start()

    # -- the three verbs

    def lend(self, unit: Unit) -> None:
        """Put a unit's weights into the model, on the device; the calling thread holds the streamer until the return.

        Raises:
            OSError: a file could not be read; nothing is lent then.
        """
        self.lock.acquire()
        try:
            self._ready()
            if self.lent[unit.index]:  # it calls itself
                visit = next(loan.visit for loan in self._loans if loan.unit is unit)
            else:
                self._notice(unit)
                visit = self._bring(unit)
            self.lent[unit.index] += 1
            self._loans.append(_Loan(unit, visit, self._guard(unit, visit) if torch.is_grad_enabled() else None))
        except Exception:
            self.lock.release()
            raise  # anything else is an interrupt, which may come at any point: see `recover`
        try:
            for entry, value in zip(self._entries[unit.index], visit.values):
                entry.tensors[entry.own] = value
            if self.listeners:
                self._tell("work", unit)
        except Exception:
            self.take_back(unit)
            raise

    def take_back(self, unit: Unit) -> None:
        """Put the handles back into the model, and keep what the forward wrote into the weights."""
        try:
            loan = self._loans.pop()
            if loan.guard is not None:
                loan.guard.__exit__(None, None, None)
            self.lent[unit.index] -= 1
            if not self.lent[unit.index]:
                for entry, value in zip(self._entries[unit.index], loan.visit.values):
                    if entry.tensors.get(entry.own) is value:
                        entry.tensors[entry.own] = entry.away
                self._leave(unit, loan.visit)
            if self.listeners:
                self._tell("return", unit)
        except Exception:
            self.lock.release()
            raise
        self.lock.release()

    def held(self) -> bool:
        """Whether this thread has something of ours."""
        held: bool = self.lock._is_owned()  # type: ignore[attr-defined]
        return held

    def recover(self) -> None:
        """Take back all that this thread was lent: an interrupt came, perhaps in the middle of a lending."""
        if not self.held():
            return
        top = torch._C._autograd._top_saved_tensors_default_hooks
        while (hooks := top(False)) is not None and getattr(hooks[0], "streamer", None) is self:
            torch._C._autograd._pop_saved_tensors_default_hooks()
        self._ready()
        for unit in self.units:
            lent = {id(value): visit for visit in self._visits(unit) for value in visit.values}
            for entry in self._entries[unit.index]:
                if id(entry.tensors.get(entry.own)) in lent:
                    entry.tensors[entry.own] = entry.away
        for unit, visit in {loan.unit.index: (loan.unit, loan.visit) for loan in self._loans}.values():
            if self._written(unit, visit):
                self._absorb(unit, visit)
        self._loans = []
        self.lent = [0] * len(self.units)
        self._reset()
        while self.held():
            self.lock.release()

    def load(self, weight: Weight, device: torch.device | None = None) -> Tensor:
        """A weight's data outside of its unit's forward."""
        with self.lock:
            value = weight.load(device or self.device)
        if value.requires_grad:
            value.register_hook(_refuse(weight.name))
        return value

    def unload(self, weight: Weight) -> None:
        """A weight that was loaded is not needed any more: its pages may leave RAM. Nobody is to have written there."""
        with self.lock:
            if not self._loans:
                weight.madvise(mmap.MADV_DONTNEED)

    def keep(self, weight: Weight, value: Tensor) -> None:
        """Make `value` the data of a weight.

        Raises:
            ValueError: it has another shape or dtype.
        """
        with self.lock:
            self._ready()
            weight.keep(value)
            self._update(weight)

    def forget(self, weight: Weight) -> None:
        """Fetch a weight anew the next time: something about it has changed."""
        with self.lock:
            self._ready()
            self._forget([self.units[i] for i in self._units_of[id(weight)]])

    def rests_in(self, weight: Weight) -> str:
        """ "cpu" or "disk"."""
        return "disk" if any(part.source for part in weight.parts.values()) else "cpu"

    def send_away(self) -> None:
        """Put handles into the model for all weights."""
        for entries in self._entries:
            for entry in entries:
                entry.tensors[entry.own] = entry.away

    def release(self, unit: Unit) -> None:
        """Put a unit's weights into the model for good, on the CPU."""
        with self.lock:
            self._ready()
            self._notice(unit)
            values = self._released
            for weight in unit.weights:
                twins = [values[id(twin)] for twin in weight.aliases if id(twin) in values]
                values[id(weight)] = twins[0] if twins else weight.load()
            for entry in self._entries[unit.index]:
                if entry.tensors.get(entry.own) is entry.away:
                    entry.tensors[entry.own] = values[id(entry.weight)]

    def close(self) -> None:
        """Wait for what is under way."""

    # -- what differs between streamers

    def _bring(self, unit: Unit) -> _Visit:
        """Make a unit ready to work."""
        raise NotImplementedError

    def _leave(self, unit: Unit, visit: _Visit) -> None:
        """A unit's forward has ended."""
        raise NotImplementedError

    def _visits(self, unit: Unit) -> list[_Visit]:
        """The forms in which a unit may stand in the model."""
        raise NotImplementedError

    def _written(self, unit: Unit, visit: _Visit) -> bool:
        """Whether somebody wrote to the weights of a unit that is lent."""
        raise NotImplementedError

    def _reset(self) -> None:
        """Nothing is lent, and nothing that was fetched counts any more."""
        raise NotImplementedError

    def _forget(self, units: Iterable[Unit]) -> None:
        """What these units are made of has changed: what was fetched of them before does not count any more."""
        raise NotImplementedError

    def _update(self, weight: Weight) -> None:
        """A weight has changed where it rests: change it too where it is lent."""
        units = [self.units[i] for i in self._units_of[id(weight)]]
        for unit, visit in {loan.unit.index: (loan.unit, loan.visit) for loan in self._loans}.values():
            if unit in units:
                same = next(i for i, other in enumerate(unit.weights) if other is weight or other in weight.aliases)
                weight.write_to(visit.weights[same])
        self._forget(units)

    # -- order

    def _follow(self, unit: Unit, most: int) -> list[Unit]:
        """The units that probably come next."""
        if self.last is not None:
            self.after[self.last] = unit.index
        self.last = at = unit.index
        found: list[Unit] = []
        while len(found) < most and (at := self.after[at]) != unit.index and self.units[at] not in found:
            found.append(self.units[at])
        return found

    # -- changes that others make to the model

    def _notice(self, unit: Unit) -> None:
        """Keep parameters that were replaced since the last forward, and move modules that were added (adapters)."""
        for entry in self._entries[unit.index]:
            if entry.tensors.get(entry.own) is not entry.away:
                self._adopt(entry)
        if _shape(self._children[unit.index]) != self._shapes[unit.index]:
            for module in unit.modules():
                _move_own(module, self.device)
            self._look()

    def _adopt(self, entry: _Entry) -> None:
        """A place refers to something else now: send that away, if it fits and all places of the weight agree on it."""
        value, weight = entry.tensors.get(entry.own), entry.weight
        places = [place for same in (weight, *weight.aliases) for place in same.places]
        fits = value is not None and value.shape == weight.template.shape and value.dtype == weight.template.dtype
        if fits and not isinstance(value, Away) and all(_at(place) is value for place in places):
            self.keep(weight, value)
            if isinstance(entry.away, nn.Parameter) and value.requires_grad != entry.away.requires_grad:
                entry.away.requires_grad_(value.requires_grad)
            for module, own, buffer in places:
                (module._buffers if buffer else module._parameters)[own] = entry.away  # type: ignore[assignment]
            return
        weight.places.remove(entry.place)  # it is no longer ours
        if value is not None and not isinstance(value, Away):
            entry.tensors[entry.own] = _on(value, self.device)
        self._look()
        self.forget(weight)

    def _absorb(self, unit: Unit, visit: _Visit) -> None:
        """Keep what a forward wrote into its weights."""
        for weight, value in zip(unit.weights, visit.weights):
            weight.keep(value)
            self._update(weight)

    # -- training

    def _guard(self, unit: Unit, visit: _Visit) -> Any:
        """Make a backward through borrowed weights an error: they are gone by then."""

        def pack(tensor: Tensor) -> Any:
            # Detached: a node that kept its own output as it is would never be freed.
            return _Gone(unit.name) if _storage(tensor) in visit.storages else tensor.detach()

        pack.streamer = self  # type: ignore[attr-defined]
        guard = torch.autograd.graph.saved_tensors_hooks(pack, _unpack)
        guard.__enter__()
        return guard

    # --

    def _make_visit(self, unit: Unit, weights: list[Tensor]) -> _Visit:
        for weight, value in zip(unit.weights, weights, strict=True):
            value.__class__ = _LENT.get(type(value), type(value))
            if value.requires_grad:
                value.register_hook(_refuse(weight.name))
        found = {id(weight): value for weight, value in zip(unit.weights, weights)}
        values = [found[id(entry.weight)] for entry in self._entries[unit.index]]
        return _Visit(values, weights, frozenset(map(_storage, weights)))

    def _tell(self, kind: str, unit: Unit, slot: int = -1) -> None:
        event = Event(kind, unit.name, unit.nbytes if kind == "fetch" else 0, unit.rests_in(), self.name, slot)
        for listener in self.listeners:
            listener(event)


class Slots(Streamer):
    """Lends weights from a few fixed slots on the device.

    Args:
        device, units, prefetch, name: see `Streamer`.
        count: slots; one more is made when forwards are nested so deeply that all are in use.
        cache: bytes of RAM that may keep units from the disk after their first visit. Always the same units: of a cycle
            longer than the cache, the one used last is needed last.
    """

    def __init__(
        self, device: torch.device, units: Sequence[Unit], *, count: int = 2, prefetch: bool = True, cache: int = 0,
        name: str = "",
    ) -> None:  # fmt: skip
        self.count = count
        self.cached = spread([unit.nbytes if unit.rests_in() == "disk" else 0 for unit in units], cache)
        super().__init__(device, units, prefetch=prefetch, name=name)

    def _start(self) -> None:
        super()._start()
        self.lane = CudaLane(self.device) if _real_cuda(self.device) else PlainLane(self.device)
        self.slots: list[Slot] = []
        self.holder: dict[int, Slot] = {}  # unit's index -> the slot that holds it
        self.loans = 0

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k not in ("lane", "slots", "holder", "loans")}

    def close(self) -> None:
        for slot in self.slots:
            self.lane.finish(slot)
        self.lane.close()

    def _bring(self, unit: Unit) -> _Visit:
        slot = self.holder.get(unit.index)
        shared = sum(slot.owner is None for slot in self.slots) or self.count
        following = self._follow(unit, shared - 1) if self.prefetch else []
        if slot is None:
            slot = self._fetch(unit, following)
        slot.lent = True
        self.loans += 1
        slot.used = self.loans
        try:
            self._prefetch(following)
            self.lane.arrive(slot)
            if unit.index not in slot.visits:
                slot.visits[unit.index] = self._make_visit(unit, [weight.over(slot.base) for weight in unit.weights])
        except BaseException:
            slot.lent = False
            self._empty(slot)
            raise
        slot.version = slot.base._version
        visit: _Visit = slot.visits[unit.index]
        return visit

    def _prefetch(self, following: list[Unit]) -> None:
        for unit in following:
            if unit.index not in self.holder and not (unit.loose and self.lent[unit.index]):
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
        self.lane.finish(slot)
        if slot.unit is not None:
            del self.holder[slot.unit.index]
        slot.unit = None

    def _leave(self, unit: Unit, visit: _Visit) -> None:
        slot = self.holder[unit.index]
        written = self._written(unit, visit)
        slot.lent = False
        self.lane.leave(slot)
        if written:
            self._absorb(unit, visit)
        elif unit.index in self.cached:
            self._cache(unit, slot)

    def _cache(self, unit: Unit, slot: Slot) -> None:
        """Keep a unit from the disk in RAM, as it lies in the slot."""
        slab = Slab(unit.nbytes, pin=_real_cuda(self.device))
        slab.pin()
        slab.bytes.copy_(slot.base[: unit.nbytes])
        for part in unit.parts():
            part.slab, part.at, part.source = slab, part.offset, None
        unit.forget_moves()
        self.cached.discard(unit.index)

    def _visits(self, unit: Unit) -> list[_Visit]:
        return [slot.visits[unit.index] for slot in self.slots if unit.index in slot.visits]

    def _written(self, unit: Unit, visit: _Visit) -> bool:
        slot = self.holder.get(unit.index)
        return slot is not None and slot.lent and slot.base._version != slot.version

    def _reset(self) -> None:
        for slot in self.slots:
            self.lane.finish(slot)
            if slot.lent:
                self.lane.leave(slot)  # what was started may read it still
            slot.unit, slot.lent = None, False
        self.holder = {}

    def _forget(self, units: Iterable[Unit]) -> None:
        for unit in units:
            unit.forget_moves()
            for slot in self.slots:
                slot.visits.pop(unit.index, None)
            slot_of = self.holder.get(unit.index)
            if slot_of is not None and not slot_of.lent:
                self._empty(slot_of)


class Mapped(Streamer):
    """Lends the pages of files to a model on the CPU: nothing is copied, and nothing stays in memory after its use."""

    def _start(self) -> None:
        super()._start()
        self.visits: dict[int, _Visit] = {}
        self.versions: dict[int, int] = {}
        self.asked: set[int] = set()  # units whose pages the system has been asked to read

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k not in ("visits", "versions", "asked")}

    def _bring(self, unit: Unit) -> _Visit:
        unit.check()
        visit = self.visits.get(unit.index)
        if visit is None:
            visit = self.visits[unit.index] = self._make_visit(unit, [weight.load() for weight in unit.weights])
        self.versions[unit.index] = _version(visit)
        if self.listeners:
            self._tell("fetch", unit)
        if self.prefetch:
            self._read_ahead(unit)
        return visit

    def _read_ahead(self, unit: Unit) -> None:
        ahead = 0
        for following in self._follow(unit, 16):
            if following.index not in self.asked:
                self.asked.add(following.index)
                following.madvise(mmap.MADV_WILLNEED)
            ahead += following.nbytes
            if ahead >= AHEAD:
                return

    def _leave(self, unit: Unit, visit: _Visit) -> None:
        if self._written(unit, visit):
            self._absorb(unit, visit)
        unit.madvise(mmap.MADV_DONTNEED)
        self.asked.discard(unit.index)

    def _visits(self, unit: Unit) -> list[_Visit]:
        return [self.visits[unit.index]] if unit.index in self.visits else []

    def _written(self, unit: Unit, visit: _Visit) -> bool:
        return _version(visit) != self.versions[unit.index]

    def _reset(self) -> None:
        self.visits, self.asked = {}, set()

    def _forget(self, units: Iterable[Unit]) -> None:
        for unit in units:
            unit.forget_moves()
            if not self.lent[unit.index]:
                self.visits.pop(unit.index, None)


def _version(visit: _Visit) -> int:
    return sum(tensor._version for tensor in visit.weights)


def _real_cuda(device: torch.device) -> bool:
    return device.type == "cuda" and torch._guards.detect_fake_mode() is None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _shape(children: list[dict[str, nn.Module | None]]) -> list[int]:
    """What changes when modules are added to others."""
    return [id(child) for own in children for child in own.values()]


def _at(place: tuple[nn.Module, str, bool]) -> Tensor | None:
    module, own, buffer = place
    return (module._buffers if buffer else module._parameters).get(own)


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        tensor.data = tensor.data.to(device)
        return tensor
    return tensor.to(device)


def _move_own(module: nn.Module, device: torch.device) -> None:
    """Move what a module itself holds, handles aside, to a device."""
    for tensors in (module._parameters, module._buffers):
        for own, tensor in tensors.items():
            if tensor is not None and not isinstance(tensor, Away) and tensor.device != device and not tensor.is_meta:
                tensors[own] = _on(tensor, device)  # type: ignore[assignment]


class _Gone(NamedTuple):
    """What autograd keeps in place of a borrowed weight."""

    unit: str


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, _Gone):
        raise RuntimeError(_NO_TRAINING.format(kept.unit))
    tensor: Tensor = kept
    return tensor


_NO_TRAINING = (
    "backward reached {!r}, whose weights rest elsewhere and were only lent to the forward: offloaded weights are for "
    "inference. Place what is to be trained, and all that comes after it, on a GPU, or run under torch.no_grad()"
)


def _refuse(name: str) -> Callable[[Tensor], None]:
    def hook(grad: Tensor) -> None:
        raise RuntimeError(_NO_TRAINING.format(name))

    return hook
