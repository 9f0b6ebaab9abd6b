"""Placing experts apart from their blocks: a block works in one place, but its parts may rest in several.

A token takes a few experts of each block and all of everything else. So attention, norms, routers, shared experts and
the KV cache go first, onto the devices that run layers; then as many blocks' experts as these devices hold, each on the
device of its own block; the rest in RAM, then on disk. What rests elsewhere works where its block works.

    >>> from bigkit import plan
    >>> p = plan("mixtral-8x7b", {0: "24GiB", "cpu": "128GiB"}, dtype="bfloat16")
    >>> p.device_map["model.layers.1.mlp.experts"], p.device_map[""], p.slots
    ('cpu', 0, 2)

Leaves out: how the chosen experts travel (`offload/experts.py`), and models whose other parts fit on no device: their
blocks are placed whole (`strategies.py`).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

from ..devices import Device, prefixes
from ..model.experts import Experts, experts_of
from ..model.spec import Layer, ModuleSpec
from ..units import counted, format_bytes
from .partition import Chain, spread

if TYPE_CHECKING:
    from .plan import Placed, Plan
    from .task import Task

MOST = 256  # dense units of which every cut is tried
SLOTS = (2, 1)  # a block's experts arrive while another's work; or the next ones only when these are done


def apart(task: Task) -> Task | None:
    """The task with the experts of each block as a layer of their own, after what is left of the block; None if the
    model has none that are in a block.
    """
    experts = experts_of(task.model)
    inside: dict[str, list[Experts]] = {}
    for one in experts:
        for prefix in prefixes(one.name)[1:-1]:
            if prefix in task.index:
                inside.setdefault(prefix, []).append(one)
    if not inside:
        return None
    layers: list[Layer] = []
    for layer in task.layers:
        own = inside.get(layer.name, [])
        names = tuple(one.name[len(layer.name) + 1 :] for one in own)
        spec = _without(layer.spec, names) if own else layer.spec
        layers.append(Layer(layer.name, layer.cls, spec, layer.ties, layer.with_previous))
        layers += [Layer(one.name, one.spec.cls, one.spec) for one in own]
    return replace(task, layers=tuple(layers))


@lru_cache(64)
def _without(spec: ModuleSpec, names: tuple[str, ...]) -> ModuleSpec:
    """A module without some of the modules in it; of equal blocks one object, whose size is counted once."""
    children = dict(spec.children)
    for name in names:
        own, _, rest = name.partition(".")
        if rest:
            children[own] = _without(children[own], (rest,))
        else:
            del children[own]
    return replace(spec, children=children)


def is_apart(layers: Sequence[Placed]) -> list[Placed]:
    """Those of a plan's layers that lie in another one of them: the experts that are placed apart."""
    names = {layer.name for layer in layers}
    return [layer for layer in layers if not names.isdisjoint(prefixes(layer.name)[:-1])]


def plan_apart(task: Task, strategy: str) -> Plan | None:
    """A plan with experts apart; None if the model has no experts, its other parts do not fit, or nothing is gained.

    With `task.experts_on_cpu` the experts of so many blocks rest in RAM, the first ones, and all others stay where they
    work; else as many stay as there is room for, spread evenly along the model.

    Raises:
        ValueError: experts_on_cpu is given, and there are no experts, fewer blocks that have some, or no RAM for them.
    """
    finer, on_cpu = apart(task), task.experts_on_cpu
    if on_cpu is not None:
        blocks, name = len(experts_of(task.model)), task.model.name
        if finer is None:
            raise ValueError(f"experts_on_cpu={on_cpu}, but {name} has no experts")
        if "cpu" not in task.shelves:
            raise ValueError(f"experts_on_cpu={on_cpu} needs a GPU for the rest, and a budget for 'cpu' in max_memory")
        if not 0 <= on_cpu <= blocks:
            raise ValueError(f"experts_on_cpu={on_cpu}, but {name} has experts in {counted(blocks, 'block')}")
    if finer is None or (strategy == "sequential" and on_cpu is None):
        return None
    nested = set(finer.around)
    experts = [k for k, unit in enumerate(finer.units) if nested.issuperset(unit.layers)]
    dense = sorted({*range(len(finer.units))}.difference(experts))
    for slots in SLOTS:
        reserve = max(finer.in_flight(i, slots)[True] for k in experts for i in finer.units[k].layers)
        places = _fill(finer, dense, experts, reserve)
        if places is not None:
            plan = finer.to_plan(finer.by_layer(places), strategy, slots=slots)
            return plan if plan.feasible or on_cpu is not None else None
    return None


def _fill(task: Task, dense: Sequence[int], experts: Sequence[int], reserve: int) -> list[Device] | None:
    """The place of each unit; None if the dense ones do not fit beside the reserve on each runner."""
    on_cpu, units = task.experts_on_cpu, task.units
    rooms = [room - reserve for room in task.rooms(task.context)]
    chain = Chain([task.needs[k] for k in dense])
    if chain.reach(rooms)[-1] < len(dense):
        return None
    rank = {i: at for at, k in enumerate(dense) for i in units[k].layers}
    home = [rank[task.around[units[k].layers[0]]] for k in experts]  # of each block's experts: the rank of the block
    sizes = [units[k].weights if at >= (on_cpu or 0) else 0 for at, k in enumerate(experts)]
    largest = max(sizes)
    holds = sum(max(room + reserve, 0) // max(largest, 1) for room in rooms)  # of no more blocks all experts can stay
    limit = min(sum(sizes), holds * largest)
    best, most = list[Device](), -1
    for ends in _cuts(chain, rooms, [at for at, size in zip(home, sizes) if size], largest, reserve):
        places, gain = [task.runners[0]] * len(units), 0
        for runner, room, start, end in zip(task.runners, rooms, [0, *ends], ends):
            for k in dense[start:end]:
                places[k] = runner
            first, last = bisect_left(home, start), bisect_left(home, end)
            own, left = sizes[first:last], room - chain.load(start, end)
            left += reserve if sum(own) <= left + reserve else 0  # nothing is in flight if all are there
            chosen = _last(own, left) if task.in_order else spread(own, left)
            for i, k in enumerate(experts[first:last]):
                places[k] = runner if (i in chosen if on_cpu is None else first + i >= on_cpu) else ""
                gain += own[i] * (i in chosen)
        if gain > most:
            best, most = places, gain
        if most >= limit:
            break
    away = [k for k in experts if best[k] == ""]
    ram = task.budgets.get("cpu") if "cpu" in task.shelves else 0
    in_ram = range(len(away)) if ram is None or on_cpu else spread([units[k].weights for k in away], ram)
    for i, k in enumerate(away):
        best[k] = "cpu" if i in in_ram else "disk"
    return best


def _cuts(chain: Chain, rooms: Sequence[int], home: Sequence[int], size: int, reserve: int) -> Iterator[Sequence[int]]:
    """Ways to cut the dense units: each room has its share of them; or of them and their experts; or most experts stay.

    With the first alone, the first of eight GPUs may hold the embedding, blocks without experts, and nothing else. The
    second may ask too much of a room; where as many stay with it, experts travel over more links than with the third.
    For that every cut is tried (dynamic programming): of each number of units that the rooms so far may hold, the best
    way to do so is known, and the next room extends each of them by what it can take.

    Args:
        chain: the dense units.
        rooms: bytes of each device, without what is kept for experts in flight.
        home: the rank of the block of each experts that may stay.
        size: bytes of the experts of a block.
        reserve: bytes for experts in flight, which a device keeps unless all experts of its blocks are there.
    """
    yield chain.balance(rooms)
    if len(rooms) == 1 or not home:
        return
    prefix, before = chain.prefix, [bisect_left(home, at) for at in range(chain.length + 1)]
    needs = [chain.load(at, at + 1) + (before[at + 1] - before[at]) * size for at in range(chain.length)]
    shares = Chain(needs).balance([room * (1 + sum(needs)) for room in rooms])  # so large that all fits
    if all(chain.load(start, end) <= max(room, 0) for room, start, end in zip(rooms, [0, *shares], shares)):
        yield shares
    if chain.length > MOST:
        return
    best, cuts = [0] + [-1] * chain.length, list[list[int]]()  # units -> experts that stay; where the last cut is
    for room in rooms:
        longer, cut = best[:], [*range(chain.length + 1)]  # with nothing in this room
        for start, kept in enumerate(best):
            free, others = prefix[start] + room, before[start]
            for end in range(start + 1, bisect_right(prefix, free) if kept >= 0 else 0):
                own, left = before[end] - others, free - prefix[end]
                total = kept + (own if own * size <= left + reserve else left // size)
                if total > longer[end]:
                    longer[end], cut[end] = total, start
        best = longer
        cuts.append(cut)
    ends = [chain.length]
    for cut in reversed(cuts[1:]):
        ends.append(cut[ends[-1]])
    yield ends[::-1]


def _last(sizes: Sequence[int], room: int) -> range:
    """The last ones that fit: of the first ones llama.cpp's `--n-cpu-moe` says how many do not."""
    sums = accumulate(reversed(sizes))
    return range(len(sizes) - sum(size <= room for size in sums), len(sizes))


# ---------------------------------------------------------------------------------------------------------------------
# In words


def why_apart(plan: Plan, chosen: tuple[int, int] | None) -> str:
    """Why experts rest apart from their blocks; empty if none do.

    Args:
        plan: the plan.
        chosen: experts of a block that a token takes, and those that there are.
    """
    experts = is_apart(plan.layers)
    runners = {share.device for share in plan.shares if share.runs}
    away = [layer for layer in experts if layer.device not in runners]
    if not away or chosen is None:
        return ""
    few, count = chosen
    all_bytes = sum(layer.bytes for layer in away)
    return (
        f"The experts of {len(away)} of {counted(len(experts), 'block')} rest apart from their blocks: a token takes "
        f"{few} of {count}, so no more than {format_bytes(all_bytes * few // count)} of these "
        f"{format_bytes(all_bytes)} travel for it."
    )
