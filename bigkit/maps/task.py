"""What every strategy counts with: the units of a model, the room on each device, and what a placement takes there.

A unit is a layer, or layers that share a tied tensor: what is placed as one. A place is a device; places are given for
each unit or for each layer, in the model's order.

Leaves out: choosing places (`strategies.py`) and saying why (`reasons.py`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from operator import attrgetter
from typing import Any, NamedTuple

from ..devices import Device, device_label, read_device
from ..model.activations import working_bytes
from ..model.estimate import longest_context, remarks, stacked_experts, stored_as
from ..model.experts import experts_of, in_flight
from ..model.spec import Attention, Layer, ModelSpec, Precision
from ..units import format_bytes, listed, parse_bytes
from .links import take_turns
from .partition import Chain, last_true
from .plan import Placed, Plan, Share
from .reasons import why

SLOTS = 2  # offloaded layers in flight on each GPU where such work: one works while the next one arrives
LONGEST = 2**24  # tokens: no longer context is looked for
_KIND = attrgetter("per_token", "window", "fixed", "float32", "every")  # of an `Attention`: all but its layer


class Unit(NamedTuple):
    """Layers that are placed together.

    Args:
        layers: their numbers.
        weights: bytes at rest, tied tensors counted once.
        largest: bytes of the largest layer, which is what travels at a time if the unit is offloaded.
        buffers: bytes that stay where the unit works even then.
        kind: equal for units that may change places, because they hold the same and share nothing with others.
    """

    layers: tuple[int, ...]
    weights: int
    largest: int
    buffers: int
    kind: Hashable


class Loads(NamedTuple):
    """What devices hold under a placement, at a context.

    Args:
        works: where each layer works that rests in RAM or on disk.
        shares: context -> the share of every device.
        fits: context -> whether none is over its budget.
    """

    works: dict[int, Device]
    shares: Callable[[int], tuple[Share, ...]]
    fits: Callable[[int], bool]


@dataclass(frozen=True)
class Task:
    """A model, the devices, and the load; the arguments of `strategies.place`, read and checked.

    `options` are the arguments that only `Plan.to_code` needs again, `asked` the context before positions limit it,
    `links` the bytes a second of the link of each GPU (none: all are equal), `slots` the
    numbers of layers in flight that may be tried.
    """

    model: ModelSpec
    layers: tuple[Layer, ...]
    budgets: dict[Device, int | None]
    precision: Precision
    batch: int
    context: int
    overhead: int
    offload_buffers: bool
    experts_on_cpu: int | None = None
    kv_dtype: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    asked: int = 0
    links: tuple[float, ...] = ()
    slots: tuple[int, ...] = (SLOTS, 1)

    # -- the model's side

    @property
    def in_order(self) -> bool:
        """Whether what stays is not to be spread among what does not: llama.cpp computes with that where it rests."""
        return self.model.library == "gguf"

    @cached_property
    def computes_in(self) -> str:
        return self.model.computes_in(self.precision)

    @cached_property
    def sizes(self) -> list[int]:
        """Bytes of each layer alone."""
        return [layer.bytes(self.precision) for layer in self.layers]

    @cached_property
    def index(self) -> dict[str, int]:
        return {layer.name: i for i, layer in enumerate(self.layers)}

    def layer_of(self, name: str) -> int:
        """The layer that holds a module or tensor: itself, the one around it, or else the first one within it."""
        if (around := self._around(name)) is not None:
            return around
        return next(i for other, i in self.index.items() if other.startswith(name + "."))

    def _around(self, name: str) -> int | None:
        """The innermost layer that is called `name` or lies around it."""
        while name and name not in self.index:
            name = name.rpartition(".")[0]
        return self.index.get(name)

    @cached_property
    def ties(self) -> list[list[tuple[int, int]]]:
        """Each tied group as (layer, bytes of the tensor there), its owner first."""
        return [
            [(i, self.layers[i].tensor_bytes(name, self.precision)) for name in group for i in [self.layer_of(name)]]
            for group in self.model.ties
        ]

    @cached_property
    def attention(self) -> dict[int, list[Attention]]:
        """Layer -> the caches that it fills; records that differ in nothing but the layer are one object."""
        caches: dict[int, list[Attention]] = defaultdict(list)
        kinds: dict[tuple[Any, ...], Attention] = {}
        for record in self.model.attention:
            caches[self.layer_of(record.layer)].append(kinds.setdefault(_KIND(record), record))
        return caches

    @cached_property
    def units(self) -> list[Unit]:
        """The layers, each joined to the owner of its tied tensor if that is most of it (an output head, mostly)."""
        home = list(range(len(self.layers)))
        for (owner, _), *others in self.ties:
            for i, size in others:
                if 2 * size >= self.sizes[i] and home[i] == i:
                    home[i] = home[owner]
        for i, layer in enumerate(self.layers):
            if layer.with_previous:
                home = [home[i - 1] if other == home[i] else other for other in home]
        groups: dict[int, list[int]] = defaultdict(list)
        for i, first in enumerate(home):
            groups[first].append(i)
        twice = Counter[int]()  # bytes that a group would count again
        for (owner, _), *others in self.ties:
            for i, size in others:
                twice[home[i]] += size if home[i] == home[owner] else 0
        tied = {home[i] for group in self.ties for i, _ in group}
        units = []
        for first, group in groups.items():
            weights = sum([self.sizes[i] for i in group]) - twice[first]
            buffers = sum([self.staying[i] for i in group])
            kind = first if first in tied else (self.layers[first].cls, weights, buffers)
            units.append(Unit(tuple(group), weights, max([self.sizes[i] for i in group]), buffers, kind))
        return units

    def in_flight(self, layer: int, slots: int) -> dict[bool, int]:
        """Bytes of a device that layers of this size take which rest elsewhere, while they visit it.

        Experts, also those inside of a layer, have slots of their own: True -> bytes of these, False -> of the others.
        """
        dense, experts = self.parts[layer]
        return {False: slots * dense, True: in_flight(*experts, slots) if experts else 0}

    @cached_property
    def parts(self) -> list[tuple[int, tuple[int, int, int] | None]]:
        """Of each layer: bytes beside fused experts; and of these, how many there are, and how many a token takes."""
        found: dict[int, tuple[int, int, int]] = {}
        for one in experts_of(self.model):
            if one.fused:
                found[self.layer_of(one.name)] = one.bytes(self.precision), one.count, one.per_token
        return [(size - found[i][0] if i in found else size, found.get(i)) for i, size in enumerate(self.sizes)]

    @cached_property
    def staying(self) -> list[int]:
        """Bytes of each layer's buffers, if they stay where it works when the layer is offloaded."""
        return [0 if self.offload_buffers else layer.bytes(self.precision, buffers_only=True) for layer in self.layers]

    @cached_property
    def around(self) -> dict[int, int]:
        """Layer that lies in another one (experts that are placed apart) -> that one, with which it works."""
        parents = [layer.name.rpartition(".")[0] for layer in self.layers]
        outer = {name: self._around(name) for name in {*parents}}
        return {i: other for i, name in enumerate(parents) if (other := outer[name]) is not None and other != i}

    @property
    def longest(self) -> int:
        """Tokens beyond which no context is looked for: learned positions are a hard limit."""
        learned = self.model.facts.get("positions") == "learned"
        return (longest_context(self.model.facts) if learned else None) or LONGEST

    # -- the devices' side

    @cached_property
    def runners(self) -> list[Device]:
        """Devices that run layers: every accelerator with a budget, or the CPU where there is none."""
        return [d for d, budget in self.budgets.items() if d not in ("cpu", "disk") and budget] or ["cpu"]

    @cached_property
    def shelves(self) -> list[Device]:
        """Devices on which layers only rest, nearest first."""
        return [d for d in ("cpu", "disk") if self.budgets.get(d, 0) != 0 and d not in self.runners]

    def _kv(self, record: int, context: int) -> int:
        """Bytes of KV cache of a record of `attention`, by its `id`; a plan asks for it again and again."""
        known = self._known.get((record, context))
        if known is None:
            one = self.batch * self._records[record].bytes(context, self.computes_in, self.kv_dtype)
            known = self._known[record, context] = one
        return known

    @cached_property
    def _known(self) -> dict[tuple[int, int], int]:
        return {}

    @cached_property
    def _records(self) -> dict[int, Attention]:
        return {id(record): record for records in self.attention.values() for record in records}

    def caches(self, context: int) -> list[int]:
        """Bytes of KV cache of each layer."""
        caches = [0] * len(self.layers)
        for i, records in self.attention.items():
            caches[i] = sum([self._kv(id(record), context) for record in records])
        return caches

    @cached_property
    def cache(self) -> list[int]:
        """The same for the load that was asked for."""
        return self.caches(self.context)

    @cached_property
    def visiting(self) -> list[int]:
        """Bytes that each layer takes where it works even when it rests elsewhere: buffers that stay, and its cache."""
        return [staying + cache for staying, cache in zip(self.staying, self.cache)]

    @cached_property
    def needs(self) -> list[int]:
        """What each unit takes on the device that runs it, for that load: weights and cache."""
        return self._needs(self.cache)

    def _needs(self, caches: Sequence[int]) -> list[int]:
        return [unit.weights + sum([caches[i] for i in unit.layers]) for unit in self.units]

    def working(self, context: int) -> int:
        """Bytes of activations on each device that runs layers, and of a weight that is decoded there."""
        return working_bytes(self.model, self.precision, self.batch, context)

    def extra(self, runner: Device) -> int:
        """Bytes that the runtime takes on a device."""
        return 0 if runner == "cpu" else self.overhead

    def rooms(self, context: int) -> list[int]:
        """Bytes that each runner has for weights and cache; negative if not even its overhead fits."""
        working = self.working(context)
        return [(self.budgets.get(runner) or 0) - self.extra(runner) - working for runner in self.runners]

    def chain(self, context: int) -> Chain:
        """What each unit needs on the device that runs it: weights and cache."""
        return Chain(self.needs if context == self.context else self._needs(self.caches(context)))

    def fits(self, context: int) -> bool:
        """Whether the runners hold everything, stretch after stretch."""
        rooms = self.rooms(context)
        if self.model.bytes(self.precision) > sum(max(room, 0) for room in rooms):
            return False
        return self.chain(context).reach(rooms)[-1] == len(self.units)

    # -- a placement

    def by_layer(self, places: Sequence[Device]) -> list[Device]:
        """The place of each unit as the place of each layer."""
        return [places[k] for k in self.unit_of]

    @cached_property
    def unit_of(self) -> list[int]:
        """The number of each layer's unit."""
        numbers = {i: k for k, unit in enumerate(self.units) for i in unit.layers}
        return [numbers[i] for i in range(len(self.layers))]

    def turns(self, layers: Iterable[int], workers: Sequence[Device]) -> dict[int, Device]:
        """Where each of some layers works that rest in RAM or on disk: see `maps/links.py`."""
        away = sorted(layers)
        speeds = dict(zip(self.budgets, self.links))
        links = [speeds.get(worker, 1.0) for worker in workers]
        turns = take_turns([self.sizes[i] - self.staying[i] for i in away], links)
        return {i: workers[turn] for i, turn in zip(away, turns)}

    def working_places(self, places: Sequence[Device], workers: Sequence[Device] | None = None) -> dict[int, Device]:
        """Where each layer works that rests in RAM or on disk; None for `workers`: on all that run layers."""
        away = [i for i, place in enumerate(places) if place not in self.runners]
        works = self.turns((i for i in away if i not in self.around), workers or self.runners)
        inside = {i: self.around[i] for i in away if i in self.around}
        return works | {i: works.get(outer, places[outer]) for i, outer in inside.items()}

    def weights(self, places: Sequence[Device]) -> Mapping[Device, int]:
        """Bytes that rest on every device, for the place of each layer; tied tensors once on each."""
        weights = dict.fromkeys(self.budgets, 0)
        for place, size in zip(places, self.sizes):
            weights[place] += size
        for (owner, _), *others in self.ties:
            holders = {places[owner]}
            for i, size in others:
                weights[places[i]] -= size if places[i] in holders else 0
                holders.add(places[i])
        return weights

    def loads(self, places: Sequence[Device], slots: int, workers: Sequence[Device] | None = None) -> Loads:
        """What every device holds at a context, for the place of each layer."""
        weights, works = self.weights(places), self.working_places(places, workers)
        caches = defaultdict[Device, dict[int, int]](dict)  # `id` of a record -> how many
        for i, records in self.attention.items():
            held = caches[works.get(i, places[i])]
            for record in map(id, records):
                held[record] = held.get(record, 0) + 1
        flying: dict[tuple[Device, bool], int] = {}  # experts have slots of their own
        for i, place in works.items():
            for kind, size in self.in_flight(i, slots).items():
                flying[place, kind] = max(flying.get((place, kind), 0), size)
        reserve = Counter[Device]()
        for (place, _), size in flying.items():
            reserve[place] += size
        for i, place in works.items():
            reserve[place] += self.staying[i]
        busy = {*places, *works.values()} & {*self.runners}

        def kv(device: Device, context: int) -> int:
            return sum([count * self._kv(record, context) for record, count in caches[device].items()])

        def shares(context: int) -> tuple[Share, ...]:
            working = self.working(context)
            return tuple(
                Share(
                    device=device,
                    budget=self.budgets.get(device, 0),
                    runs=device in self.runners,
                    weights=weights[device],
                    kv_cache=kv(device, context),
                    activations=working if device in busy else 0,
                    reserve=reserve[device],
                    overhead=self.extra(device) if device in busy else 0,
                )
                for device in self.budgets
            )

        def fits(context: int) -> bool:
            working = self.working(context)
            for device, budget in self.budgets.items():
                used = weights[device] + kv(device, context) + reserve[device]
                if budget is not None and used + (working + self.extra(device) if device in busy else 0) > budget:
                    return False
            return True

        return Loads(works, shares, fits)

    def to_plan(
        self, places: Sequence[Device], strategy: str, context: int | None = None, slots: int = SLOTS,
        workers: Sequence[Device] | None = None,
    ) -> Plan:  # fmt: skip
        """The plan for the place of each layer, feasible or not."""
        context = self.context if context is None else context
        experts = experts_of(self.model)
        loads = self.loads(places, slots, workers)
        shares = loads.shares(context)
        short = [f"{device_label(share.device)} lacks {format_bytes(share.over)}" for share in shares if share.over]
        longest = None
        if self.model.attention and not short:
            start = min(context, self.longest)
            longest = last_true(loads.fits, start, self.longest)
        works, layers = loads.works, zip(self.layers, self.sizes, places)
        plan = Plan(
            model=self.model.name,
            strategy=strategy,
            dtype=self.precision.dtype,
            quantization=self.precision.quantization,
            batch=self.batch,
            context=context,
            max_context=longest,
            shares=shares,
            layers=tuple(Placed(own.name, own.cls, size, at, works.get(i)) for i, (own, size, at) in enumerate(layers)),
            problem=" and ".join(short),
            slots=slots if any(place not in self.runners for place in places) else 0,
            library=self.model.library,
            options=dict(self.options),
            stored=stored_as(self.model, self.precision),
            positions=longest_context(self.model.facts),
            notes=remarks(self.model.name, self.model.facts, max(self.asked, context))
            + stacked_experts(self.model, self.precision),
            experts=next(((one.per_token, one.count) for one in experts), None) if self.around else None,
        )
        return replace(plan, shares=tuple(replace(share, why=why(plan, share)) for share in shares))


class Queue:
    """The units in an order in which they may be placed: a chain of their needs, and what is in flight from each on."""

    def __init__(self, task: Task, order: Sequence[int]) -> None:
        self.order, self.chain = order, Chain([task.needs[i] for i in order])
        parts = [[task.parts[i] for i in task.units[k].layers] for k in reversed(order)]
        dense = [max(dense for dense, _ in own) for own in parts]
        experts = [max((experts or (0, 1, 1) for _, experts in own)) for own in parts]
        self.largest = [*accumulate(dense, max, initial=0)][::-1]
        self.experts = [*accumulate(experts, max, initial=(0, 1, 1))][::-1]

    def in_flight(self, rank: int, slots: int) -> int:
        """Bytes that those from a rank on take on a device where they work, if they rest elsewhere."""
        return slots * self.largest[rank] + in_flight(*self.experts[rank], slots)


def read_budgets(max_memory: Mapping[Device, int | str]) -> dict[Device, int | None]:
    """Budgets in bytes, devices in the order GPUs, "mps", "cpu", "disk"; a disk that is not named has no limit.

    >>> read_budgets({"cpu": "1KB", 0: 10})
    {0: 10, 'cpu': 1000, 'disk': None}
    """
    if not isinstance(max_memory, Mapping):
        raise ValueError(
            f"max_memory must map devices to budgets, as {{0: '10GiB', 'cpu': '9GiB'}}, not {max_memory!r}"
        )
    given, max_memory = max_memory, {read_device(device): size for device, size in max_memory.items()}
    if len(max_memory) < len(given):
        raise ValueError(f"max_memory names a device twice: {listed([str(device) for device in given])}")
    gpus = sorted(device for device in max_memory if isinstance(device, int))
    order: list[Device] = [*gpus, *(name for name in ("mps", "cpu") if name in max_memory)]
    budgets: dict[Device, int | None] = {device: parse_bytes(max_memory[device]) for device in order}
    if not any(budgets[device] for device in order if device != "cpu"):
        budgets.setdefault("cpu", 0)  # it must run everything
    return {**budgets, "disk": parse_bytes(max_memory["disk"]) if "disk" in max_memory else None}
