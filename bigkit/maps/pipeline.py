"""Which components of a pipeline stay on a GPU, which come for their phase, and which come block by block.

Components work one after another, so each phase has a peak of its own: what stays, and what works in that phase with
its activations. All ways are tried; the one that copies least for an image is taken, and of several the one whose
tensors change GPUs least:

    stays       on a GPU all the time; nothing is copied
    comes       waits in RAM, and is on a GPU as a whole while it works: its weights are copied once for an image
    by block    waits in RAM or on disk; what does not fit comes for every pass, of which a denoiser has many
    split       over several GPUs, each of which keeps some of its blocks

The first GPU is where the pipeline's own tensors are, and where images are decoded.

Leaves out: doing it (`offload/pipeline.py`), and running phases of several images at once.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

from ..devices import Device, device_label
from ..model.pipeline import Component, PipelineSpec
from ..units import format_bytes, parse_bytes, text_table
from .plan import Plan
from .strategies import place
from .task import SLOTS, read_budgets

STEPS = 30  # passes of a denoiser for one image
AWAY = ("cpu", "disk")
TRIED = 20  # ways of which blocks are placed: how they fit is known only then
ROAM = 3  # components that may work on any GPU; smaller ones work on the main one, else there would be too many ways


@dataclass(frozen=True)
class PlacedComponent:
    """What becomes of one component.

    Args:
        name, phase: see `Component`.
        how: "stays", "comes", "by block" or "split".
        gpus: where it works.
        weights, activations: bytes.
        peaks: GPU -> bytes there while it works.
        plan: where its blocks rest, if it comes by block or is split.
        away: the same, if all blocks rest in RAM or on disk: name -> place.
    """

    name: str
    phase: str
    how: str
    gpus: tuple[Device, ...]
    weights: int
    activations: int
    peaks: Mapping[Device, int]
    plan: Plan | None = None
    away: Mapping[str, Device] = field(default_factory=dict, repr=False)

    @property
    def peak(self) -> int:
        """Bytes on the fullest GPU while it works."""
        return max(self.peaks.values())


@dataclass(frozen=True)
class PipelinePlan:
    """A placement of a pipeline's components on GPUs and RAM; `explain` says it in words.

    Args:
        model, cls: the pipeline's name and class.
        budgets: device -> bytes; its first GPU is the main one.
        overhead: bytes that the runtime takes on each GPU.
        components: in the order in which they work.
        copied: bytes that are copied to the GPUs for an image of `steps` passes of the denoiser.
        problem: why it is not feasible; empty if it is.
    """

    model: str
    cls: str
    budgets: Mapping[Device, int | None]
    overhead: int
    components: tuple[PlacedComponent, ...]
    copied: int
    steps: int = STEPS
    problem: str = ""
    notes: tuple[str, ...] = ()

    @property
    def gpus(self) -> tuple[Device, ...]:
        """The GPUs, the main one first."""
        return tuple(device for device in self.budgets if device not in AWAY)

    @property
    def feasible(self) -> bool:
        """Whether every phase fits."""
        return not self.problem

    @property
    def peak(self) -> int:
        """Bytes of the fullest phase on the fullest GPU."""
        return max(one.peak for one in self.components)

    def explain(self) -> str:
        """What stays, what comes, and the peak of each phase."""
        several = len(self.gpus) > 1
        rows = [
            [one.name, one.phase, f"{one.how} on {', '.join(map(device_label, one.gpus))}" if several else one.how,
             *map(format_bytes, (one.weights, one.activations, *(one.peaks[gpu] for gpu in self.gpus)))]
            for one in self.components
        ]  # fmt: skip
        peaks = [f"peak of {device_label(gpu)}" for gpu in self.gpus] if several else ["peak of its phase"]
        table = text_table(["component", "phase", "how", "weights", "activations", *peaks], rows)
        end = self.problem or f"Copied for an image of {self.steps} steps: {format_bytes(self.copied)}."
        sizes = ", ".join(format_bytes(self.budgets[gpu] or 0) for gpu in self.gpus)
        where = f"{len(self.gpus)} GPUs of {sizes}" if several else f"a GPU of {sizes}"
        head = f"{self.model} ({self.cls}) on {where}: peak {format_bytes(self.peak)}"
        return "\n".join([head, table, end, *self.notes])

    def to_code(self) -> str:
        """Python that makes this plan and runs the pipeline by it."""
        budgets = {device: size for device, size in self.budgets.items() if size is not None}
        return "\n".join([
            "import bigkit", "import torch", "from bigkit.offload.pipeline import dispatch_pipeline",
            "from diffusers import DiffusionPipeline", "",
            f"plan = bigkit.plan({self.model!r}, {budgets!r}, overhead={self.overhead})",
            f'pipe = DiffusionPipeline.from_pretrained({self.model!r}, torch_dtype=torch.bfloat16)',
            "dispatch_pipeline(pipe, plan)",
        ])  # fmt: skip

    def to_json(self) -> str:
        """All of it as JSON text, sizes in bytes."""
        return json.dumps(asdict(self), indent=1, default=str)

    __str__ = explain

    def __repr__(self) -> str:
        ways = ", ".join(f"{one.name} {one.how}" for one in self.components)
        return f"PipelinePlan({self.model}: {ways}; peak {format_bytes(self.peak)})"


def place_pipeline(
    pipeline: PipelineSpec, max_memory: Mapping[Device, int | str], overhead: int | str = 0, steps: int = STEPS
) -> PipelinePlan:
    """Choose what stays on the GPUs of `max_memory`, and what waits in RAM or on disk.

    Args:
        pipeline: its components.
        max_memory: device -> budget: GPUs, "cpu", and perhaps "disk" for what comes by block.
        overhead: bytes that the runtime takes on each GPU.
        steps: passes of the denoiser for an image.

    Returns:
        The plan that copies least; not feasible if the largest block of a component and its activations do not fit.

    Raises:
        ValueError: no GPU is named.
    """
    budgets, taken = read_budgets(max_memory), parse_bytes(overhead)
    rooms = {device: (size or 0) - taken for device, size in budgets.items() if device not in AWAY}
    if not rooms:
        raise ValueError("a pipeline is planned for a GPU: give max_memory one, such as {0: '24GB', 'cpu': '64GB'}")
    ram = budgets.get("cpu", 0)
    tried = (_Trial.of(pipeline.components, ways, rooms, ram, steps) for ways in _ways(pipeline.components, rooms))
    trials = heapq.nsmallest(TRIED, tried, key=lambda trial: (trial.over, trial.copied, trial.hops))
    for number, trial in enumerate(trials):
        placed = _placed(trial, taken, budgets)
        lacks = max(trial.over, *(peak - (budgets[gpu] or 0) for one in placed for gpu, peak in one.peaks.items()))
        problems = [f"It lacks {format_bytes(lacks)}."] if lacks > 0 else []
        problems += [f"{one.name}: {one.plan.problem}" for one in placed if one.plan and one.plan.problem]
        if number == 0 or not problems:
            best = placed, problems
        if not problems or trial.over:
            break
    placed, problems = best
    copied = sum(_passes(one.phase, one.how, steps) * _travels(one) for one in placed)
    return PipelinePlan(
        pipeline.name, pipeline.cls, budgets, taken, placed, copied, steps, "".join(problems[:1]), pipeline.notes
    )


Way = tuple[str, tuple[Device, ...]]  # "stays", "comes", "by block" or "split", and the GPUs where it works


def _ways(
    components: tuple[Component, ...], rooms: Mapping[Device, int], chosen: tuple[Way, ...] = ()
) -> Iterator[tuple[Way, ...]]:
    """Ways for all components. Of GPUs that nothing works on yet, the roomiest and the smallest stand for all."""
    if len(chosen) == len(components):
        yield chosen
        return
    main, *others = rooms
    one = components[len(chosen)]
    large = heapq.nlargest(ROAM, (own for own in components if own.phase != "decode"), key=lambda own: own.weights)
    used = {gpus[0] for _, gpus in chosen if len(gpus) == 1}
    fresh = sorted((gpu for gpu in others if gpu not in used), key=lambda gpu: rooms[gpu])
    ends = {gpu for gpu in fresh if rooms[gpu] in (rooms[fresh[0]], rooms[fresh[-1]])}
    alone = [main]
    if any(one is own for own in large):
        alone += [gpu for gpu in others if gpu in used]
        alone += {rooms[gpu]: gpu for gpu in reversed(others) if gpu in ends}.values()
    here: list[Way] = [(how, (gpu,)) for gpu in alone for how in ("stays", "comes", "by block")]
    if others and one.phase == "denoise":
        here += [("split", tuple(rooms)), *([("by block", tuple(rooms))] if one.blocks is None else [])]
    for way in here:
        yield from _ways(components, rooms, (*chosen, way))


def _passes(phase: str, how: str, steps: int) -> int:
    """How often a component's weights are needed anew for an image."""
    return steps if phase == "denoise" and how == "by block" else 1


def _travels(one: PlacedComponent) -> int:
    """Bytes of a component that are copied for one pass."""
    if one.plan is None:
        return one.weights if one.how in ("comes", "by block") else 0
    return sum(layer.bytes for layer in one.plan.layers if layer.device in AWAY)


@dataclass(frozen=True)
class _Trial:
    """A way for each component, and what comes of it.

    Args:
        components, ways: the components, and how and where each works.
        room: of each, GPU -> bytes for it in every phase.
        ram: bytes that are left in RAM beside what comes; None: no limit.
        copied, over: bytes for an image, and bytes that are lacking.
        hops: how often tensors change GPUs for an image.
    """

    components: tuple[Component, ...]
    ways: tuple[Way, ...]
    room: tuple[dict[Device, int], ...]
    ram: int | None
    copied: int
    over: int
    hops: int

    @classmethod
    def of(
        cls, components: tuple[Component, ...], ways: tuple[Way, ...], rooms: Mapping[Device, int], ram: int | None,
        steps: int,
    ) -> _Trial:  # fmt: skip
        weights, main, spare = [one.weights for one in components], next(iter(rooms)), dict(rooms)
        room = [dict.fromkeys(gpus, one.weights if how == "stays" else 0)
                for one, (how, gpus) in zip(components, ways)]  # fmt: skip
        for gpu in rooms:
            needs = (_need(one, how) for one, (how, gpus) in zip(components, ways) if gpu in gpus)
            spare[gpu] -= sum(own.get(gpu, 0) for own in room) + max(needs, default=0)
        over, held = sum(max(0, -left) for left in spare.values()), [0] * len(ways)
        passes = [_passes(one.phase, how, steps) for one, (how, _) in zip(components, ways)]
        fills = [i for i, (how, _) in enumerate(ways) if how == "split" or (how == "by block" and passes[i] > 1)]
        for i in sorted(fills, key=lambda i: (ways[i][0] != "split", -weights[i]))[:1]:  # a denoiser has what is left
            for gpu in ways[i][1]:
                room[i][gpu] += max(0, spare[gpu])
                held[i] += max(0, spare[gpu])
        copied = hops = coming = 0
        for one, (how, gpus), size, kept, times in zip(components, ways, weights, held, passes):
            coming += size if how == "comes" else 0
            over += max(0, size - kept) if how == "split" else 0
            copied += times * max(0, size - kept) if how in ("comes", "by block") else 0
            hops += (steps if one.phase == "denoise" else 1) * (len(gpus) if len(gpus) > 1 else gpus[0] != main)
        left = None if ram is None else max(0, ram - coming)
        over += 0 if ram is None else max(0, coming - ram)
        return cls(components, ways, tuple(room), left, copied, over, hops)


def _need(one: Component, how: str) -> int:
    """Bytes that a component takes in its phase alone."""
    return one.working + (one.weights if how == "comes" else one.least if how == "by block" else 0)


def _placed(trial: _Trial, overhead: int, budgets: Mapping[Device, int | None]) -> tuple[PlacedComponent, ...]:
    """Place the blocks of what comes by block or is split, and count what each GPU then holds in each phase."""
    plans: list[tuple[Plan | None, Device]] = []
    ram = trial.ram
    for one, (how, gpus), room in zip(trial.components, trial.ways, trial.room):
        plan = _by_block(one, how, gpus, room, ram, budgets["disk"]) if how in ("by block", "split") else None
        in_ram = ram is None or one.weights <= ram
        plans.append((plan, "cpu" if in_ram else "disk"))
        if how == "by block" and ram is not None:
            ram -= plan.used.get("cpu", 0) if plan else one.weights * in_ram
    always = [_stays(plan) if plan else {} if how == "by block" else dict(room)
              for (plan, _), room, (how, _) in zip(plans, trial.room, trial.ways)]  # fmt: skip
    components = []
    for one, (how, gpus), (plan, rests) in zip(trial.components, trial.ways, plans):
        peaks = {
            gpu: overhead + sum(own.get(gpu, 0) for own in always) + (_need(one, how) if gpu in gpus else 0)
            for gpu in budgets if gpu not in AWAY
        }  # fmt: skip
        away = dict.fromkeys((layer.name for layer in one.layers), rests) if how == "by block" else {}
        components.append(PlacedComponent(one.name, one.phase, how, gpus, one.weights, one.working, peaks, plan, away))
    return tuple(components)


def _by_block(
    one: Component, how: str, gpus: tuple[Device, ...], room: dict[Device, int], ram: int | None, disk: int | None
) -> Plan | None:
    """Where the blocks of a component rest; None if all of them rest in one place, since nothing has room to stay."""
    rest = {"cpu": ram, "disk": disk} if how == "by block" else {"disk": 0}
    given: dict[Device, int | str] = {device: size for device, size in rest.items() if size is not None}
    flying = one.least if how == "by block" else 0  # bytes in flight, while it works
    sizes = {gpu: size + flying for gpu, size in room.items()}
    finer = one.blocks if how == "by block" else None
    for attempt in range(6) if how == "split" or any(room.values()) else ():
        plan = place(one.spec, {**sizes, **given}, strict=False, slots=SLOTS, no_split=finer)
        more = {gpu: max(0, _stays(plan).get(gpu, 0) - room[gpu]) for gpu in gpus}  # than may stay in other phases
        if how == "split" or (plan.problem and not attempt) or not (plan.problem or any(more.values())):
            return plan
        sizes = {gpu: size - more[gpu] for gpu, size in sizes.items()}
    return None


def _stays(plan: Plan) -> dict[Device, int]:
    """Device -> bytes that rest there for good."""
    return {share.device: share.used - share.reserve for share in plan.shares}
