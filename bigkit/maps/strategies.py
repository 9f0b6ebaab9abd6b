"""Which layer rests on which device: `place()` and its strategies.

A model is a chain of layers. Devices stand in a fixed order: the GPUs that run layers, then RAM ("cpu"), then "disk".
Every strategy cuts the chain into one stretch per GPU; they differ in where they cut:

    sequential       fill each GPU before the next one is touched
    balanced, auto   make the fullest GPU as empty as possible (fullest: the largest share of its budget)
    balanced_low_0   leave GPU 0 as empty as possible, balance the others
    exact            make the context (weights + KV cache + activations) as long as possible

What fits on no GPU rests in RAM, then on disk, and is brought to the GPUs in turn (`links.py`); each has a reserve for
it. "sequential" offloads what comes last. The others offload as few bytes as they can, and spread what stays evenly
among what does not: copies hide behind work. Without a GPU the CPU runs everything. Layers that share a tied tensor
stay together, or each copy is counted.

Leaves out: the arithmetic of cutting (`partition.py`), the bytes on each device (`task.py`), a map of the user's own
(`own_map.py`), what a run takes (`dryrun/run.py`), and moving anything (`offload/dispatch.py`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import product
from typing import NamedTuple

from ..devices import Device, whole_on
from ..machine.hardware import DISKS, LINKS
from ..model.attention import kv_dtype_name
from ..model.estimate import tokens_seen, whole_number
from ..model.spec import ModelSpec
from ..units import dtype_name, parse_bytes
from .experts import plan_apart
from .own_map import read_map, warn_of_strangers
from .partition import last_true, spread
from .plan import Plan, PlanError
from .reasons import cures
from .task import SLOTS, Queue, Task, read_budgets

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential", "exact")
ONE_SLOT = 0.9  # with a single slot copies wait for work: it must leave a tenth less to copy to be worth it
DISK = LINKS["PCIe 4.0 x16"] / DISKS["NVMe, PCIe 3.0 x4"]  # reading a byte from disk takes as long as copying nine


def place(
    model: ModelSpec,
    max_memory: Mapping[Device, int | str],
    strategy: str | Mapping[str, Device] = "auto",
    *,
    dtype: object = None,
    quantization: str | None = None,
    keep: Iterable[str] | str | None = None,
    special_dtypes: Mapping[str, object] | None = None,
    no_split: Iterable[str] | str | None = None,
    batch: int = 1,
    context: int = 0,
    overhead: int | str = 0,
    offload_buffers: bool = False,
    strict: bool = True,
    experts_on_cpu: int | None = None,
    kv_dtype: object = None,
    links: Sequence[float] = (),
    slots: int | None = None,
) -> Plan:
    """Place a model's layers on devices so that no device holds more than its budget.

    Args:
        model: the model's skeleton.
        max_memory: device -> budget in bytes or as text ("10GiB"). Devices are GPU numbers, "mps", "cpu" and "disk".
            A disk that is not named has no limit; RAM that is not named is not used.
        strategy: one of `STRATEGIES`, or a device map of your own (module name -> device; or one device for all) to be
            checked and measured; of entries inside each other the innermost counts ({"": "cpu", "lm_head": 0}).
        dtype: floating weights are cast to it; None keeps them as stored. In 16 bit, those that the model's
            classes need in float32 (`_keep_in_fp32_modules` of Transformers) count as float32.
        quantization: None or one of `model.spec.QUANTIZATIONS`.
        keep: modules that quantization leaves in `dtype`; None takes the output head and tied modules. Always kept, as
            in loading, are subclasses of `nn.Linear` and the layers that the model's classes need in float32.
        special_dtypes: tensor name -> dtype, for tensors that differ.
        no_split: classes whose modules stay whole; None takes the model's own list. A model without one is cut between
            its repeated blocks, and never inside anything else but containers: a residual could run there.
        batch, context: sequences and tokens (prompt and answer) that KV cache and activations are counted for;
            context 0 counts neither. With "exact" the context is what is looked for, and this is the least accepted.
            Where positions are learned, none beyond them is looked for or counted.
        overhead: bytes that the runtime takes on each GPU.
        offload_buffers: whether buffers of offloaded layers leave the GPU too.
        experts_on_cpu: in a mixture of experts, of how many blocks the experts rest in RAM, from the first block on
            (llama.cpp's `--n-cpu-moe`); all others stay. None: of as many as must.
        strict: raise if the plan is not feasible; False returns it, with `problem` set.
        kv_dtype: of keys and values in the cache, one of `model.attention.KV_DTYPES`; None: as the model computes.
        links: bytes a second of each GPU's link while all are busy, in the order of `max_memory`; none: all are equal.
        slots: offloaded layers in flight on each GPU where such work; None: two, or one where that copies less.

    Returns:
        The plan. Nothing given is changed.

    Raises:
        PlanError: no placement fits, with the bytes that are missing and what would help.
        ValueError: a budget, device, strategy or map makes no sense.

    >>> from bigkit import zoo
    >>> place(zoo.describe("llama-2-7b"), {0: "10GiB", 1: "10GiB"}, dtype="float16").device_map["lm_head"]
    1
    """
    batch, context, strategy = whole_number(batch, "batch", 1), whole_number(context, "context"), whole_on(strategy)
    special = {name: dtype_name(value) for name, value in (special_dtypes or {}).items()}
    classes = [no_split] if isinstance(no_split, str) else no_split if no_split is None else list(no_split)
    options = {
        "keep": sorted([keep] if isinstance(keep, str) else keep) if quantization and keep is not None else None,
        "special_dtypes": special or None, "no_split": classes, "offload_buffers": offload_buffers or None,
        "experts_on_cpu": experts_on_cpu, "kv_dtype": kv_dtype_name(kv_dtype),
        "links": [*links] if len({*links}) > 1 else None, "slots": slots,
    }  # fmt: skip
    warn_of_strangers(model, "special_dtypes", special)
    task = Task(
        model=model, layers=model.layers_to_place() if classes is None else model.layers(classes),
        budgets=read_budgets(max_memory), precision=model.precision(dtype, quantization, keep, special), batch=batch,
        context=tokens_seen(model, context), overhead=parse_bytes(overhead), offload_buffers=offload_buffers,
        experts_on_cpu=experts_on_cpu, kv_dtype=kv_dtype_name(kv_dtype),
        options={name: value for name, value in options.items() if value is not None}, asked=context,
        links=tuple(links), slots=(SLOTS, 1) if slots is None else (whole_number(slots, "slots", 1),),
    )  # fmt: skip
    if not isinstance(strategy, str):
        task, places, named = read_map(task, strategy)
        plan = task.to_plan(places, "custom", None, task.slots[0], named)
    elif strategy in STRATEGIES:
        plan = _solve(task, strategy)
    else:
        raise ValueError(f"unknown strategy {strategy!r}: expected one of {STRATEGIES} or a device map")
    if strict and not plan.feasible:
        raise PlanError(plan, cures(task, plan, _solve))
    return plan


def _solve(task: Task, strategy: str) -> Plan:
    if task.experts_on_cpu is not None or not task.fits(task.context):
        return plan_apart(task, strategy) or _offload(task, strategy)
    context = task.context
    if strategy == "exact":
        context = last_true(task.fits, min(context, task.longest), task.longest)
    chain, rooms = task.chain(context), task.rooms(context)
    if strategy in ("auto", "balanced"):
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
    places = [runner for runner, start, end in zip(task.runners, starts, ends) for _ in range(start, end)]
    return task.to_plan(task.by_layer(places), strategy, context)


class _Trial(NamedTuple):
    """A way to offload.

    Args:
        places: the place of each unit.
        slots, workers: offloaded layers in flight, and where they work.
        copied: bytes to copy for a token, for each of these; a byte from disk counts as 1 + `DISK`.
        over: bytes over the budgets.
    """

    places: list[Device]
    slots: int
    workers: Sequence[Device]
    copied: float
    over: int


def _offload(task: Task, strategy: str) -> Plan:
    """Rest elsewhere what the runners cannot hold. What comes nearest is returned if nothing fits.

    Tried: nothing in flight, if all layers fit out of order; two slots (a layer arrives while another works); one slot.
    Each with all runners at work, without the smallest (slots may not fit there), at last with the first alone; in the
    model's order, and with the largest layers on the runners first: a slot must hold the largest that is offloaded.
    "sequential" takes the first that fits, the others the one that copies least.
    """
    largest = [unit.largest for unit in task.units]
    sizes = [0, *sorted({*largest}, reverse=True)[:8]]  # units with a layer of so many bytes or more go first
    orders = dict.fromkeys(tuple(sorted(range(len(largest)), key=lambda i: largest[i] < size)) for size in sizes)
    queues, rooms = [Queue(task, order) for order in orders], task.rooms(task.context)
    short = sum(task.needs) - sum(max(room, 0) for room in rooms)  # bytes that must rest elsewhere, at least
    least = short + DISK * max(short - (task.budgets.get("cpu") or 0), 0)  # and what copying them costs
    best = nearest = None
    teams = {tuple(r for r, room in zip(task.runners, rooms) if room >= small): None for small in sorted({*rooms})}
    teams |= {(task.runners[0],): None}
    for workers, slots, queue in product(teams, task.slots if task.shelves and short > 0 else (0, *task.slots), queues):
        if best and len(workers) < len(best.workers) and least / len(workers) >= best.copied:
            break
        places = _fill(task, slots, queue, workers)
        if not slots and not set(places) <= set(task.runners):
            continue
        by_layer = task.by_layer(places)
        weights = task.weights(by_layer)
        elsewhere = sum(size for device, size in weights.items() if device not in task.runners)
        copied = (elsewhere + DISK * weights.get("disk", 0)) / len(workers)
        if best and copied >= best.copied * (1 if slots == best.slots else ONE_SLOT):
            continue
        over = sum(share.over for share in task.loads(by_layer, slots, workers).shares(task.context))
        trial = _Trial(places, slots, workers, copied, over)
        if not over:
            best = trial
        elif nearest is None or over < nearest.over:
            nearest = trial
        if best and (strategy == "sequential" or not best.copied):
            break
    chosen = best or nearest
    assert chosen is not None  # the two slots were tried
    ways = [chosen.places] if strategy == "sequential" or task.in_order else [_spread(task, chosen), chosen.places]
    for way in ways:
        if (plan := task.to_plan(task.by_layer(way), strategy, None, chosen.slots, chosen.workers)).feasible:
            break
    return plan


def _fill(task: Task, slots: int, queue: Queue, workers: Sequence[Device]) -> list[Device]:
    """The place of each unit, taken in this order: the runners, then the gaps they leave, then RAM and disk."""
    units, rooms = task.units, task.rooms(task.context)
    order, chain = queue.order, queue.chain

    # Offloading more units needs a larger reserve, which may push out more: until that is stable.
    resident = len(order)
    while True:
        reserve = dict.fromkeys(task.runners, 0) | dict.fromkeys(workers, queue.in_flight(resident, slots))
        away = [i for k in order[resident:] for i in units[k].layers] if slots and any(task.visiting) else []
        for i, worker in task.turns(away, workers).items():
            reserve[worker] += task.visiting[i]
        left = [room - reserve[runner] for runner, room in zip(task.runners, rooms)]
        ends = chain.reach(left)
        if ends[-1] >= resident:
            break
        resident = ends[-1]

    places: list[Device] = [""] * len(units)
    free: dict[Device, int | None] = {}
    start = 0
    for runner, room, end in zip(task.runners, left, ends):
        end = min(end, resident)
        for i in order[start:end]:
            places[i] = runner
        free[runner], start = room - chain.load(start, end), end
    free |= {shelf: task.budgets[shelf] for shelf in task.shelves} or {task.runners[-1]: None}
    for i in order[resident:]:
        for device, space in free.items():  # the last one, if none has space
            size = units[i].weights
            if space is None or size <= space and (device in task.shelves or (size := task.needs[i]) <= space):
                break
        places[i], free[device] = device, space if space is None else space - size
    return places


def _spread(task: Task, trial: _Trial) -> list[Device]:
    """The same bytes on each device, but units of one kind that stay on a worker stand among the offloaded."""
    kinds: dict[Hashable, list[int]] = defaultdict(list)
    movable = {*trial.workers, "cpu", "disk"}
    for i, unit in enumerate(task.units):
        if trial.places[i] in movable:
            kinds[unit.kind].append(i)
    even = list(trial.places)
    for free in (several for several in kinds.values() if len(several) > 1):
        counts = Counter(trial.places[i] for i in free)
        for devices in (trial.workers, ["disk"], ["cpu"]):
            picked = {free[k] for k in spread([1] * len(free), sum(counts[device] for device in devices))}
            chosen, free = [i for i in free if i in picked], [i for i in free if i not in picked]
            for device in devices:
                for i in (own := {chosen[k] for k in spread([1] * len(chosen), counts[device])}):
                    even[i] = device
                chosen = [i for i in chosen if i not in own]
    return even
