"""Which layer rests on which device: `plan()` and its strategies.

A model is a chain of layers. Devices stand in a fixed order: the GPUs that run layers, then RAM ("cpu"), then "disk".
Every strategy cuts the chain into one stretch per GPU; they differ in where they cut:

    sequential       fill each GPU before the next one is touched
    balanced, auto   make the fullest GPU as empty as possible (fullest: the largest share of its budget)
    balanced_low_0   leave GPU 0 as empty as possible, balance the others
    exact            make the context (weights + KV cache + activations) as long as possible
    fastest          where something must be offloaded: make a token come soonest (`maps/fastest.py`); else as "auto"

What fits on no GPU rests in RAM, then on disk, and is brought to the first GPU when its turn comes; for that the first
GPU keeps a reserve, and only then. Without a GPU the CPU runs everything. Layers that share a tied tensor stay
together, or each copy is counted.

Leaves out: the arithmetic of cutting (`maps/partition.py`), what a run takes (`dryrun/run.py`), and moving anything
(`offload/dispatch.py`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from ..devices import Device, collapse, device_label, prefixes, read_device
from ..machine.hardware import GPUS
from ..machine.roofline import Rates
from ..model.estimate import activation_bytes
from ..model.spec import Attention, Layer, ModelSpec, Precision
from ..units import dtype_bits, dtype_name, format_bytes, parse_bytes
from .fastest import Piece, search, token_seconds
from .partition import Chain, last_true, spread
from .plan import Placed, Plan, Share

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential", "exact", "fastest")
SLOTS = 2  # offloaded layers in flight on the first GPU: one works while the next one arrives
LONGEST = 2**24  # tokens: `exact` looks no further


class PlanError(ValueError):
    """No placement keeps every device within its budget. The message says by how much, and what would help.

    `plan` is the placement that comes closest, `cure` the sentence that says what would help.
    """

    def __init__(self, plan: Plan, cure: str) -> None:
        super().__init__(f"{plan.model} does not fit: {plan.problem}. {cure}")
        self.plan, self.cure = plan, cure

    def __reduce__(self) -> tuple[type[PlanError], tuple[Plan, str]]:
        return type(self), (self.plan, self.cure)


def plan(
    model: ModelSpec,
    max_memory: Mapping[Device, int | str],
    strategy: str | Mapping[str, Device] = "auto",
    *,
    dtype: object = None,
    quantization: str | None = None,
    keep: Iterable[str] | None = None,
    special_dtypes: Mapping[str, object] | None = None,
    no_split: Iterable[str] | None = None,
    batch: int = 1,
    context: int = 0,
    overhead: int | str = 0,
    offload_buffers: bool = False,
    strict: bool = True,
    rates: Rates | None = None,
) -> Plan:
    """Place a model's layers on devices so that no device holds more than its budget.

    Args:
        model: the model's skeleton.
        max_memory: device -> budget in bytes or as text ("10GiB"). Devices are GPU numbers, "mps", "cpu" and "disk".
            A disk that is not named has no limit; RAM that is not named is not used.
        strategy: one of `STRATEGIES`, or a device map of your own (module name -> device) to be checked and measured.
        dtype: floating weights are cast to it; None keeps them as they are.
        quantization: None or one of `layers.QUANTIZATIONS`.
        keep: modules that stay in `dtype` then; None takes the output head and tied modules.
        special_dtypes: tensor name -> dtype, for tensors that differ.
        no_split: classes whose modules stay whole; None takes the model's own list, or the repeated blocks that its
            facts name where it has no list (timm).
        batch, context: sequences and tokens (prompt and answer) that KV cache and activations are counted for;
            context 0 counts neither. With `exact` the context is what is looked for, and this is the least accepted.
        overhead: bytes that the runtime takes on each GPU.
        offload_buffers: whether buffers of offloaded layers leave the GPU too.
        strict: raise if the plan is not feasible; False returns it, with `problem` set.
        rates: of the first GPU, for `fastest`; None takes those of an A100.

    Returns:
        The plan. Nothing given is changed.

    Raises:
        PlanError: no placement fits, with the bytes that are missing and what would help.
        ValueError: a budget, device, strategy or map makes no sense.

    >>> from bigkit import zoo
    >>> plan(zoo.describe("llama-2-7b"), {0: "10GiB", 1: "10GiB"}, dtype="float16").device_map["lm_head"]
    1
    """
    if batch < 1 or context < 0:
        raise ValueError(f"batch must be at least 1 and context at least 0, not {batch} and {context}")
    if quantization and dtype is None:
        dtype = "float16"
    special = {name: dtype_name(value) for name, value in (special_dtypes or {}).items()}
    kept = (model.kept if keep is None else frozenset(keep)) if quantization else frozenset()
    if no_split is None:
        no_split = model.no_split or model.facts.get("blocks", ())
    task = _Task(
        model=model,
        layers=model.layers(no_split),
        budgets=read_budgets(max_memory),
        precision=Precision(None if dtype is None else dtype_name(dtype), quantization, kept, tuple(special.items())),
        batch=batch,
        context=context,
        overhead=parse_bytes(overhead),
        offload_buffers=offload_buffers,
        rates=rates,
    )
    if not isinstance(strategy, str):
        task, places = _read_map(task, strategy)
        found = task.measure(places, "custom")
    elif strategy in STRATEGIES:
        found = task.solve(strategy)
    else:
        raise ValueError(f"unknown strategy {strategy!r}: expected one of {STRATEGIES} or a device map")
    if strict and not found.feasible:
        raise PlanError(found, _cures(task, found))
    return found


def read_budgets(max_memory: Mapping[Device, int | str]) -> dict[Device, int | None]:
    """Budgets in bytes, devices in the order GPUs, "mps", "cpu", "disk"; a disk that is not named has no limit.

    >>> read_budgets({"cpu": "1KB", 0: 10})
    {0: 10, 'cpu': 1000, 'disk': None}
    """
    for device in max_memory:
        gpu = isinstance(device, int) and not isinstance(device, bool) and device >= 0
        if not gpu and device not in ("mps", "cpu", "disk"):
            raise ValueError(f"unknown device {device!r} in max_memory: expected a GPU number, 'mps', 'cpu' or 'disk'")
    gpus = sorted(device for device in max_memory if isinstance(device, int))
    order: list[Device] = [*gpus, *(name for name in ("mps", "cpu") if name in max_memory)]
    budgets: dict[Device, int | None] = {device: parse_bytes(max_memory[device]) for device in order}
    if not any(budgets[device] for device in order if device != "cpu"):
        budgets.setdefault("cpu", 0)  # it must run everything
    return {**budgets, "disk": parse_bytes(max_memory["disk"]) if "disk" in max_memory else None}


# ---------------------------------------------------------------------------------------------------------------------
# One planning task


@dataclass(frozen=True)
class _Unit:
    """Layers that are placed together: one, or several that share a tied tensor."""

    layers: tuple[int, ...]
    weights: int  # tied tensors once
    largest: int  # the biggest layer: what travels at a time if the unit is offloaded
    buffers: int  # what stays on the first runner even then
    attention: tuple[Attention, ...]


@dataclass(frozen=True)
class _Task:
    model: ModelSpec
    layers: tuple[Layer, ...]
    budgets: dict[Device, int | None]
    precision: Precision
    batch: int
    context: int
    overhead: int
    offload_buffers: bool
    rates: Rates | None = None

    # -- the model's side

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
        for prefix in reversed(prefixes(name)):
            if prefix in self.index:
                return self.index[prefix]
        return next(i for other, i in self.index.items() if other.startswith(name + "."))

    @cached_property
    def ties(self) -> list[list[tuple[int, int]]]:
        """Each tied group as (layer, bytes of the tensor there), its owner first."""
        return [
            [(i, self.layers[i].tensor_bytes(name, self.precision)) for name in group for i in [self.layer_of(name)]]
            for group in self.model.ties
        ]

    @cached_property
    def attention(self) -> dict[int, list[Attention]]:
        """Layer -> the caches that it fills."""
        records: dict[int, list[Attention]] = defaultdict(list)
        for record in self.model.attention:
            records[self.layer_of(record.layer)].append(record)
        return records

    @cached_property
    def units(self) -> list[_Unit]:
        """The layers, each joined to the owner of its tied tensor if that is most of it (an output head, mostly)."""
        home = list(range(len(self.layers)))
        for (owner, _), *others in self.ties:
            for i, size in others:
                if 2 * size >= self.sizes[i] and home[i] == i:
                    home[i] = home[owner]
        groups: dict[int, list[int]] = defaultdict(list)
        for i, first in enumerate(home):
            groups[first].append(i)
        twice = Counter[int]()  # bytes that a group would count again
        for (owner, _), *others in self.ties:
            for i, size in others:
                twice[home[i]] += size if home[i] == home[owner] else 0
        return [
            _Unit(
                tuple(group),
                sum(self.sizes[i] for i in group) - twice[first],
                max(self.sizes[i] for i in group),
                sum(map(self.staying, group)),
                tuple(record for i in group for record in self.attention.get(i, ())),
            )
            for first, group in groups.items()
        ]

    def staying(self, layer: int) -> int:
        """Bytes of a layer's buffers, if they stay on the runner when the layer is offloaded."""
        return 0 if self.offload_buffers else self.layers[layer].bytes(self.precision, buffers_only=True)

    # -- the devices' side

    @cached_property
    def runners(self) -> list[Device]:
        """Devices that run layers: every accelerator with a budget, or the CPU where there is none."""
        return [d for d, budget in self.budgets.items() if d not in ("cpu", "disk") and budget] or ["cpu"]

    @cached_property
    def shelves(self) -> list[Device]:
        """Devices on which layers only rest, nearest first."""
        return [d for d in ("cpu", "disk") if self.budgets.get(d, 0) != 0 and d not in self.runners]

    def kv(self, attention: Iterable[Attention], context: int) -> int:
        """Bytes of KV cache."""
        return self.batch * sum(record.elements(context) for record in attention) * dtype_bits(self.computes_in) // 8

    def working(self, context: int) -> int:
        """Bytes of activations on each runner."""
        return activation_bytes(self.model, self.batch, context, self.computes_in)

    def rooms(self, context: int) -> list[int]:
        """Bytes that each runner has for weights and cache; negative if not even its overhead fits."""
        working = self.working(context)
        return [(self.budgets.get(runner) or 0) - self.extra(runner) - working for runner in self.runners]

    def extra(self, runner: Device) -> int:
        return 0 if runner == "cpu" else self.overhead

    # -- placing

    def solve(self, strategy: str) -> Plan:
        if not self.fits(self.context):
            return self.soonest() if strategy == "fastest" else self.offload(strategy)
        context = self.context
        if strategy == "exact":
            context = last_true(self.fits, context, LONGEST)
        chain, rooms = self.chain(context), self.rooms(context)
        if strategy in ("auto", "balanced", "fastest"):
            ends = chain.balance(rooms)
        elif strategy == "balanced_low_0":
            skipped = min(1, len(rooms) - 1)
            start = chain.reach_back(rooms)[skipped]
            ends = [start] * skipped + chain.balance(rooms[skipped:], start)
        elif strategy == "exact":
            ends = chain.even(rooms, rooms)
        else:
            ends = chain.reach(rooms)
        starts = [0, *ends[:-1]]
        places = [runner for runner, a, b in zip(self.runners, starts, ends) for _ in range(a, b)]
        return self.measure(self.by_layer(places), strategy, context)

    def chain(self, context: int) -> Chain:
        return Chain([unit.weights + self.kv(unit.attention, context) for unit in self.units])

    def fits(self, context: int) -> bool:
        """Whether the runners hold everything, stretch after stretch."""
        return self.chain(context).reach(self.rooms(context))[-1] == len(self.units)

    def by_layer(self, places: Sequence[Device]) -> list[Device]:
        """Unit -> device as layer -> device."""
        devices: dict[int, Device] = {i: device for unit, device in zip(self.units, places) for i in unit.layers}
        return [devices[i] for i in range(len(self.layers))]

    def offload(self, strategy: str) -> Plan:
        """Rest elsewhere what the runners cannot hold, with room in flight on the first runner.

        Tried in turn: nothing in flight, if all layers fit out of order; two slots; one slot. If the largest layers are
        too large to travel, they rest on the runners before all others. What comes nearest is returned if nothing fits.
        """
        sizes = sorted({unit.largest for unit in self.units}, reverse=True)[:8]
        trials = []
        for slots in (0, SLOTS, 1):
            for size in (None, *sizes):
                places = self.by_layer(self.fill(slots, size))
                if slots or set(places) <= set(self.runners):
                    trials.append(self.measure(places, strategy, slots=slots))
                    if trials[-1].feasible:
                        return trials[-1]
        return min(trials, key=lambda trial: sum(share.over for share in trial.shares))

    def soonest(self) -> Plan:
        """Of all ways to offload that `offload` tries, the one from which the search finds the fastest token."""
        start = self.offload("fastest")
        main = self.runners[0]
        if not start.feasible or main == "cpu":
            return start
        rates = self.rates or Rates.of_gpu(GPUS["A100-80GB"])
        pieces = [
            Piece(unit.weights, self.kv(unit.attention, self.context), bool(unit.attention),
                  (unit.weights, unit.largest, unit.buffers, unit.attention and len(unit.attention),
                   self.kv(unit.attention, self.context)))
            for unit in self.units
        ]  # fmt: skip
        by_name = {layer.name: layer.device for layer in start.layers}
        first = [by_name[self.layers[unit.layers[0]].name] for unit in self.units]
        found, least = start, float("inf")
        for slots in (SLOTS, 1):

            def fits(places: Sequence[Device], slots: int = slots) -> bool:
                return self.measure(self.by_layer(places), "fastest", slots=slots, longest=False).feasible

            def seconds(places: Sequence[Device], slots: int = slots) -> float:
                return token_seconds(pieces, places, main, rates, slots)

            for places in (
                first,
                *(self.fill(slots, size) for size in (None, max(unit.largest for unit in self.units))),
            ):
                if fits(places):
                    best, taken = search(pieces, places, main, [*self.runners, *self.shelves], seconds, fits)
                    if taken < least:
                        found, least = self.measure(self.by_layer(best), "fastest", slots=slots), taken
        return found

    def fill(self, slots: int, first_size: int | None) -> list[Device]:
        """Unit -> device: the runners in order, then the gaps they leave, then RAM and disk.

        Units with a layer of `first_size` bytes or more go first.
        """
        units = self.units
        order = sorted(range(len(units)), key=lambda i: first_size is not None and units[i].largest < first_size)
        needs = [units[i].weights + self.kv(units[i].attention, self.context) for i in order]
        stays = [self.kv(units[i].attention, self.context) + units[i].buffers for i in order]
        rooms, chain = self.rooms(self.context), Chain(needs)
        largest = [*accumulate((units[i].largest for i in reversed(order)), max, initial=0)][::-1]
        staying = [*accumulate(reversed(stays), initial=0)][::-1]

        def reserve(resident: int) -> list[int]:
            """Rooms that are left when all units from the rank `resident` on are offloaded."""
            held = slots * largest[resident] + staying[resident] if slots else 0
            return [rooms[0] - held, *rooms[1:]]

        # The longest stretch that leaves room for what it leaves out. A shorter one never needs a smaller reserve.
        resident = len(order)
        while (ends := chain.reach(left := reserve(resident)))[-1] < resident:
            resident = ends[-1]
        places: list[Device] = [""] * len(units)
        gaps, start = {}, 0
        for runner, room, end in zip(self.runners, left, ends):
            end = min(end, resident)
            for i in order[start:end]:
                places[i] = runner
            gaps[runner] = room - chain.load(start, end)
            start = end
        shelves = {shelf: self.budgets[shelf] for shelf in self.shelves} or {self.runners[-1]: None}
        for rank in range(resident, len(order)):
            i = order[rank]
            with_a_gap = next((device for device, gap in gaps.items() if needs[rank] <= gap), None)
            if with_a_gap is not None:
                gaps[with_a_gap] -= needs[rank]
                places[i] = with_a_gap
                continue
            room_left = (shelf for shelf, room in shelves.items() if room is None or units[i].weights <= room)
            places[i] = shelf = next(room_left, [*shelves][-1])
            if (free := shelves[shelf]) is not None:
                shelves[shelf] = free - units[i].weights
        return places

    # -- judging

    def measure(self, places: Sequence[Device], strategy: str, context: int | None = None, slots: int = SLOTS,
                longest: bool = True) -> Plan:  # fmt: skip
        """Count what every device holds under a placement, and say whether it fits."""
        context = self.context if context is None else context
        weights, cache = Counter[Device](), defaultdict[Device, list[Attention]](list)
        for place, size in zip(places, self.sizes):
            weights[place] += size
        for (owner, _), *others in self.ties:
            here = {places[owner]}
            for i, size in others:
                weights[places[i]] -= size if places[i] in here else 0
                here.add(places[i])
        away = [i for i, place in enumerate(places) if place not in self.runners]
        main = self.runners[0]
        for i, records in self.attention.items():
            cache[places[i] if places[i] in self.runners else main] += records
        in_flight = slots * max((self.sizes[i] for i in away), default=0) + sum(map(self.staying, away))
        used = {*places, *([main] if away else [])}

        def share(device: Device, context: int) -> Share:
            runs = device in self.runners
            busy = runs and device in used
            return Share(
                device=device,
                budget=self.budgets.get(device, 0),
                runs=runs,
                weights=weights[device],
                kv_cache=self.kv(cache[device], context),
                activations=self.working(context) if busy else 0,
                reserve=in_flight if device == main else 0,
                overhead=self.extra(device) if busy else 0,
            )

        shares = [share(device, context) for device in self.budgets]
        fits = all(s.over == 0 for s in shares)
        most = None
        if self.model.attention and fits and longest:
            most = last_true(lambda n: all(share(runner, n).over == 0 for runner in self.runners), context, LONGEST)
        placed = tuple(
            Placed(layer.name, layer.cls, size, place) for layer, size, place in zip(self.layers, self.sizes, places)
        )
        short = [f"{device_label(s.device)} lacks {format_bytes(s.over)}" for s in shares if s.over]
        precision = self.precision
        found = Plan(self.model.name, strategy, precision.dtype, precision.quantization, self.batch, context, most,
                     tuple(shares), placed, " and ".join(short))  # fmt: skip
        return replace(found, shares=tuple(replace(s, why=_why(found, s)) for s in shares))


# ---------------------------------------------------------------------------------------------------------------------
# A map of the user's own


def _read_map(task: _Task, device_map: Mapping[str, Device]) -> tuple[_Task, list[Device]]:
    """The task cut as finely as the map asks for, and the device of each of its layers.

    Raises:
        ValueError: the map misses layers, names one twice or one that is not there, or a device without a budget.
    """
    devices = {name: read_device(device) for name, device in device_map.items()}
    modules = {name for name, _ in task.model.root.walk()} | set(task.index)
    if strange := [name for name in devices if name not in modules]:
        raise ValueError(f"the device map names {_some(strange)}, but {task.model.name} has no such module")
    if nested := [name for name in devices for outer in prefixes(name)[:-1] if outer in devices]:
        raise ValueError(f"the device map places {_some(nested)} twice: a module around is in the map too")
    if strange_devices := sorted({str(device) for device in devices.values() if device not in task.budgets}):
        raise ValueError(f"the device map uses {_some(strange_devices)}, but max_memory gives no budget for it")
    if any(not set(prefixes(name)) & set(devices) and any(key.startswith(name + ".") for key in devices)
           for name in task.index):  # fmt: skip
        task = replace(task, layers=task.model.layers(()))
    places = [
        next((devices[prefix] for prefix in prefixes(layer.name) if prefix in devices), None) for layer in task.layers
    ]
    if missing := [layer.name for layer, place in zip(task.layers, places) if place is None]:
        raise ValueError(f"the device map gives no device for {_some(missing)}")
    return task, [place for place in places if place is not None]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ---------------------------------------------------------------------------------------------------------------------
# Saying why


def _why(plan: Plan, share: Share) -> str:
    """Why the stretch of layers on one device ends where it does."""
    if not share.runs:
        if not share.weights:
            return ""
        return f"These visit {device_label(plan.shares[0].device)} when their turn comes."
    notes = []
    if share.reserve:
        notes.append("The reserve is for offloaded layers in flight.")
    own = [i for i, layer in enumerate(plan.layers) if layer.device == share.device]
    if not own:
        return " ".join(notes)
    after = next((i for i in range(own[0], len(plan.layers)) if plan.layers[i].device != share.device), None)
    following = None if after is None else plan.layers[after]
    if following is None or share.budget is None:
        return " ".join(notes)
    free = share.budget - share.used
    if free < 0:
        notes.append(f"It is {format_bytes(-free)} over its budget.")
    elif following.bytes > free:
        notes.append(f"Next is {following.name} ({format_bytes(following.bytes)}), but {format_bytes(free)} is free.")
    elif plan.strategy == "balanced_low_0" and share is plan.shares[0]:
        notes.append("It holds only what the other GPUs cannot.")
    elif plan.strategy == "exact":
        notes.append(f"With {following.name} here too, the longest context would be shorter.")
    elif plan.strategy in ("auto", "balanced", "balanced_low_0"):
        fullest = max(s.used / s.budget for s in plan.shares if s.runs and s.budget)
        then = (share.used + following.bytes) / share.budget
        if then > fullest:
            notes.append(
                f"With {following.name} too it would be {100 * then:.0f} % full; now {100 * fullest:.0f} % is the most."
            )
        else:
            notes.append("The cut lies where the devices are most evenly filled.")
    return " ".join(notes)


def _cures(task: _Task, found: Plan) -> str:
    """Which single changes would make a plan feasible, each tried."""
    strategy = found.strategy if found.strategy != "custom" else "auto"
    worst = max(found.shares, key=lambda share: share.over)
    changes: list[tuple[str, _Task]] = [("strategy='auto'", task)] if found.strategy == "custom" else []
    if task.precision.dtype in (None, "float32", "float64"):
        changes.append(("dtype='float16'", replace(task, precision=replace(task.precision, dtype="float16"))))
    for quantization in ("int8", "nf4"):
        if task.precision.quantization is None:
            precision = Precision("float16", quantization, task.model.kept, task.precision.special)
            changes.append((f"quantization={quantization!r}", replace(task, precision=precision)))
    if task.context:
        least = replace(task, context=0)
        if least.solve(strategy).feasible:
            longest = last_true(lambda n: replace(task, context=n).solve(strategy).feasible, 0, task.context)
            changes.append((f"context={longest}", replace(task, context=longest)))
    for device in ("cpu", "disk"):
        if task.budgets.get(device, 0) is not None and device not in task.runners:
            changes.append((f"an unlimited {device!r}", replace(task, budgets={**task.budgets, device: None})))
    enough = (worst.budget or 0) + worst.over
    helped = [text for text, changed in changes if changed.solve(strategy).feasible]
    more = f"{worst.device!r}: {enough}"
    if replace(task, budgets={**task.budgets, worst.device: enough}).solve(strategy).feasible:
        helped.insert(0, f"max_memory {{{more}}} ({format_bytes(enough)})")
    return "It would fit with " + ", or ".join(helped) + "." if helped else "No single change would make it fit."


def interleaved(found: Plan) -> dict[str, Device]:
    """The device map of a plan, with the blocks that stay on the first runner spread among those that are offloaded.

    Blocks of one class and size change places, so that every device holds what it held.

    >>> from bigkit import plan
    >>> found = plan("gpt2", {0: "400MiB", "cpu": "1GiB"})
    >>> [found.device_map[f"transformer.h.{i}"] for i in range(12)]
    [0, 0, 0, 0, 0, 0, 0, 'cpu', 'cpu', 'cpu', 'cpu', 'cpu']
    >>> [interleaved(found)[f"transformer.h.{i}"] for i in range(12)]
    [0, 0, 'cpu', 0, 'cpu', 0, 0, 'cpu', 0, 'cpu', 0, 'cpu']
    """
    main = next((share.device for share in found.shares if share.runs), "cpu")
    kinds: dict[tuple[str, int], list[Placed]] = {}
    for layer in found.layers:
        if layer.device in (main, "cpu", "disk"):
            kinds.setdefault((layer.cls, layer.bytes), []).append(layer)
    devices = {layer.name: layer.device for layer in found.layers}
    for alike in kinds.values():
        free = [layer.name for layer in alike]
        for device in (main, "disk", "cpu"):
            count = sum(layer.device == device for layer in alike)
            chosen = spread([1] * len(free), count)
            devices.update({free[i]: device for i in chosen})
            free = [name for i, name in enumerate(free) if i not in chosen]
    return collapse(devices)
