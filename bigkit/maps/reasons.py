"""Words about a plan: why each boundary stands where it does, and which single change would make a model fit.

Leaves out: finding plans (`strategies.py`) and telling a whole one (`Plan.explain`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ..devices import device_label
from ..units import GiB, KiB, MiB, PiB, TiB, counted, format_bytes, parse_bytes
from .partition import last_true
from .plan import Plan, Share

if TYPE_CHECKING:
    from .task import Task


def why(plan: Plan, share: Share) -> str:
    """Why the stretch of layers on one device ends where it does."""
    if not share.runs:
        works = [layer.works for layer in plan.layers if layer.device == share.device and layer.works is not None]
        places = sorted(set(map(device_label, works)))
        where = "the devices of their blocks" if plan.experts else " and ".join(places)
        turns = ", each the one whose link would bring it first" if len(places) > 1 and not plan.experts else ""
        return f"These visit {where} when their turn comes{turns}." if share.weights else ""
    notes = []
    if share.reserve:
        spread = "" if plan.strategy in ("sequential", "custom") else "; the layers that stay are spread among those"
        notes.append(f"The reserve is for {counted(plan.slots, 'offloaded layer')} in flight{spread}.")
    start = next((i for i, layer in enumerate(plan.layers) if layer.device == share.device), len(plan.layers))
    following = next((layer for layer in plan.layers[start:] if layer.device != share.device), None)
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
    elif plan.strategy in ("auto", "balanced", "balanced_low_0") and not plan.offloaded:
        fullest = max(other.used / other.budget for other in plan.shares if other.runs and other.budget)
        then = (share.used + following.bytes) / share.budget
        if then > fullest:
            full = f"{100 * then:.0f} % full; as it is, none is fuller than {100 * fullest:.0f} %"
            notes.append(f"With {following.name} it would be {full}.")
        else:
            notes.append("The cut lies where the devices are most evenly filled.")
    return " ".join(notes)


def cures(task: Task, plan: Plan, solve: Callable[[Task, str], Plan]) -> str:
    """Which single changes would make a plan feasible, each tried with `solve`."""
    strategy = plan.strategy if plan.strategy != "custom" else "auto"

    def helps(**changes: object) -> bool:
        return solve(replace(task, **changes), strategy).feasible  # type: ignore[arg-type]

    worst = max(plan.shares, key=lambda share: share.over)
    enough = (worst.budget or 0) + worst.over
    unit = next((unit for unit in (PiB, TiB, GiB, MiB, KiB) if enough >= unit), 1)
    size = format_bytes(math.ceil(100 * enough / unit) * unit / 100).replace(" ", "")  # rounded up, for people
    helpful = []
    if helps(budgets={**task.budgets, worst.device: parse_bytes(size)}):
        helpful.append(f"max_memory {{{worst.device!r}: {size!r}}}")
    if plan.strategy == "custom" and helps():
        helpful.append("strategy='auto'")
    precision = task.precision
    if precision.dtype in (None, "float32", "float64") and helps(precision=replace(precision, dtype="float16")):
        helpful.append("dtype='float16'")
    for quantization in ("int8", "nf4") if precision.quantization is None else ():
        if helps(precision=task.model.precision("float16", quantization, special=precision.dtypes)):
            helpful.append(f"quantization={quantization!r}")
    if task.context and helps(context=0):
        longest = last_true(lambda context: helps(context=context), 0, task.context)
        helpful.append(f"context={longest}")
    for device in ("cpu", "disk"):
        if task.budgets.get(device, 0) is not None and device not in task.runners:
            if helps(budgets={**task.budgets, device: None}):
                helpful.append(f"an unlimited {device!r}")
    return "It would fit with " + ", or ".join(helpful) + "." if helpful else "No single change would make it fit."
