"""Which components of a pipeline stay on the GPU, which come for their phase, and which come block by block.

Components work one after another, so each phase has a peak of its own: what stays, and what works in that phase with
its activations. All ways are tried; the one that copies least for an image is taken:

    stays       on the GPU all the time; nothing is copied
    comes       waits in RAM, and is on the GPU as a whole while it works: its weights are copied once for an image
    by block    waits in RAM or on disk; what does not fit comes for every pass, of which a denoiser has many

Leaves out: several GPUs, and doing it (`offload/pipeline.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from ..devices import Device
from ..model.pipeline import Component, PipelineSpec
from ..units import format_bytes, parse_bytes, text_table
from .plan import Plan
from .strategies import place
from .task import read_budgets

STEPS = 30  # passes of a denoiser for one image
HOW = ("stays", "comes", "by block")


@dataclass(frozen=True)
class PlacedComponent:
    """What becomes of one component.

    Args:
        name, phase: see `Component`.
        how: one of `HOW`.
        weights, activations: bytes.
        peak: bytes on the GPU while it works.
        plan: where its blocks rest, if it comes by block.
    """

    name: str
    phase: str
    how: str
    weights: int
    activations: int
    peak: int
    plan: Plan | None = None


@dataclass(frozen=True)
class PipelinePlan:
    """A placement of a pipeline's components on one GPU and RAM; `explain` says it in words.

    Args:
        model, cls: the pipeline's name and class.
        budget: bytes of the GPU.
        overhead: bytes that the runtime takes there.
        components: in the order in which they work.
        copied: bytes that are copied to the GPU for an image of `steps` passes of the denoiser.
        problem: why it is not feasible; empty if it is.
    """

    model: str
    cls: str
    budget: int
    overhead: int
    components: tuple[PlacedComponent, ...]
    copied: int
    steps: int = STEPS
    problem: str = ""
    notes: tuple[str, ...] = ()

    @property
    def feasible(self) -> bool:
        """Whether every phase fits."""
        return not self.problem

    @property
    def peak(self) -> int:
        """Bytes of the fullest phase."""
        return max(one.peak for one in self.components)

    def explain(self) -> str:
        """What stays, what comes, and the peak of each phase."""
        rows = [
            [one.name, one.phase, one.how, *map(format_bytes, (one.weights, one.activations, one.peak))]
            for one in self.components
        ]
        table = text_table(["component", "phase", "how", "weights", "activations", "peak of its phase"], rows)
        end = self.problem or f"Copied for an image of {self.steps} steps: {format_bytes(self.copied)}."
        return "\n".join([
            f"{self.model} ({self.cls}) on a GPU of {format_bytes(self.budget)}: peak {format_bytes(self.peak)}",
            table, end, *self.notes,
        ])  # fmt: skip

    def to_code(self) -> str:
        """Python that makes this plan and runs the pipeline by it."""
        return "\n".join([
            "import bigkit", "from bigkit.offload.pipeline import dispatch_pipeline", "",
            f"plan = bigkit.plan({self.model!r}, {{0: {self.budget}, 'cpu': '64GB'}}, overhead={self.overhead})",
            "dispatch_pipeline(pipe, plan)  # a pipeline of Diffusers, loaded on the CPU",
        ])  # fmt: skip

    def to_json(self) -> str:
        """All of it as JSON text, sizes in bytes."""
        return json.dumps(asdict(self), indent=1, default=str)

    def __str__(self) -> str:
        return self.explain()

    def __repr__(self) -> str:
        ways = ", ".join(f"{one.name} {one.how}" for one in self.components)
        return f"PipelinePlan({self.model}: {ways}; peak {format_bytes(self.peak)})"


def place_pipeline(
    pipeline: PipelineSpec, max_memory: Mapping[Device, int | str], overhead: int | str = 0, steps: int = STEPS
) -> PipelinePlan:
    """Choose what stays on the first GPU of `max_memory`.

    Args:
        pipeline: its components.
        max_memory: device -> budget: a GPU, "cpu", and perhaps "disk" for what comes by block.
        overhead: bytes that the runtime takes on the GPU.
        steps: passes of the denoiser for an image.

    Returns:
        The plan that copies least; not feasible if the largest block of a component and its activations do not fit.

    Raises:
        ValueError: no GPU is named.
    """
    budgets = read_budgets(max_memory)
    gpu = next((device for device in budgets if device not in ("cpu", "disk")), None)
    if gpu is None:
        raise ValueError("a pipeline is planned for a GPU: give max_memory one, such as {0: '24GB', 'cpu': '64GB'}")
    room, ram = (budgets[gpu] or 0) - parse_bytes(overhead), budgets.get("cpu")
    trials = (_Trial.of(pipeline.components, ways, room, ram, steps)
              for ways in product(HOW, repeat=len(pipeline.components)))  # fmt: skip
    best = min(trials, key=lambda trial: (trial.over, trial.copied))
    placed = tuple(_placed(best, i, parse_bytes(overhead), max_memory, gpu) for i in range(len(best.ways)))
    problem = f"It lacks {format_bytes(best.over)}." if best.over else ""
    return PipelinePlan(
        pipeline.name, pipeline.cls, budgets[gpu] or 0, parse_bytes(overhead), placed, best.copied, steps, problem,
        pipeline.notes,
    )  # fmt: skip


@dataclass(frozen=True)
class _Trial:
    """A way for each component, and what comes of it.

    Args:
        components, ways: the components, and one of `HOW` for each.
        resident: bytes of each that are on the GPU in every phase.
        copied, over: bytes for an image, and bytes that are lacking.
    """

    components: tuple[Component, ...]
    ways: tuple[str, ...]
    resident: tuple[int, ...]
    copied: int
    over: int

    @classmethod
    def of(
        cls, components: tuple[Component, ...], ways: tuple[str, ...], room: int, ram: int | None, steps: int
    ) -> _Trial:
        weights = [one.spec.bytes() for one in components]
        resident = [size if how == "stays" else 0 for size, how in zip(weights, ways)]
        needs = [_need(one, how) for one, how in zip(components, ways)]
        coming = sum(size for size, how in zip(weights, ways) if how == "comes")
        spare = room - sum(resident) - max(needs)
        passes = [steps if one.phase == "denoise" and how == "by block" else 1 for one, how in zip(components, ways)]
        streamed = [i for i, count in enumerate(passes) if count > 1]
        if streamed:  # what is left over goes to a denoiser that comes again and again
            most = max(streamed, key=weights.__getitem__)
            resident[most] = min(weights[most], max(0, spare))
        copied = sum(n * (size - held) for n, size, held in zip(passes, weights, resident))
        over = max(0, -spare) + (max(0, coming - ram) if ram is not None else 0)
        return cls(components, ways, tuple(resident), copied, over)


def _need(one: Component, how: str) -> int:
    """Bytes that a component takes in its phase alone."""
    return {"stays": 0, "comes": one.spec.bytes(), "by block": one.least}[how] + one.working


def _placed(
    trial: _Trial, i: int, overhead: int, max_memory: Mapping[Device, int | str], gpu: Device
) -> PlacedComponent:
    one, how, plan = trial.components[i], trial.ways[i], None
    if how == "by block":
        others: dict[Device, Any] = {device: size for device, size in max_memory.items() if device in ("cpu", "disk")}
        plan = place(one.spec, {gpu: one.least + trial.resident[i], **others}, strict=False)
    peak = overhead + sum(trial.resident) + _need(one, how)
    return PlacedComponent(one.name, one.phase, how, one.spec.bytes(), one.working, peak, plan)
