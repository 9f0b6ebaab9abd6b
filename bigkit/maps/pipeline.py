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
    room, extra, ram = budgets[gpu] or 0, parse_bytes(overhead), budgets.get("cpu")
    parts = pipeline.components
    best: tuple[tuple[int, int], tuple[str, ...]] | None = None
    for ways in product(HOW, repeat=len(parts)):
        staying = sum(one.spec.bytes() for one, how in zip(parts, ways) if how == "stays")
        coming = sum(one.spec.bytes() for one, how in zip(parts, ways) if how == "comes")
        over = max(0, coming - ram) if ram is not None else 0
        copied = coming
        for one, how in zip(parts, ways):
            left = room - extra - staying - one.working
            if how == "by block":
                over += max(0, 2 * one.block() - left)
                copied += _passes(one, steps) * max(0, one.spec.bytes() - max(0, left - 2 * one.block()))
            else:
                over += max(0, (one.spec.bytes() if how == "comes" else 0) - left)
        if best is None or (over, copied) < best[0]:
            best = ((over, copied), ways)
    assert best is not None
    (over, copied), ways = best
    staying = sum(one.spec.bytes() for one, how in zip(parts, ways) if how == "stays")
    placed = tuple(_placed(one, how, room, extra + staying, max_memory, gpu) for one, how in zip(parts, ways))
    problem = f"It lacks {format_bytes(over)}." if over else ""
    return PipelinePlan(
        pipeline.name, pipeline.cls, room, extra, placed, copied, steps, problem, pipeline.notes
    )


def _passes(component: Component, steps: int) -> int:
    return steps if component.phase == "denoise" else 1


def _placed(
    one: Component, how: str, room: int, taken: int, max_memory: Mapping[Device, int | str], gpu: Device
) -> PlacedComponent:
    weights, plan = one.spec.bytes(), None
    held = {"stays": 0, "comes": weights}.get(how, 0)
    if how == "by block":
        left = max(0, room - taken - one.working)
        others: dict[Device, Any] = {device: size for device, size in max_memory.items() if device in ("cpu", "disk")}
        plan = place(one.spec, {gpu: left, **others}, strict=False)
        held = sum(share.used for share in plan.shares if share.runs)
    return PlacedComponent(one.name, one.phase, how, weights, one.working, taken + held + one.working, plan)
