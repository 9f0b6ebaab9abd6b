"""Running a pipeline of Diffusers as a plan says: what stays, what comes for its phase, and what comes by block.

Leaves out: choosing (`maps/pipeline.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..devices import Device
from ..maps.pipeline import PipelinePlan
from .dispatch import dispatch_model
from .grouping import Layout
from .inputs import torch_device
from .whole_model import UserCpuOffloadHook, cpu_offload_with_hook


def dispatch_pipeline(
    pipe: Any,
    plan: PipelinePlan,
    device: Device = 0,
    *,
    offload_dir: str | None = None,
    stand_in: Mapping[Device, torch.device | str] | None = None,
) -> Any:
    """Place a pipeline's components as a plan says; `pipe(...)` then runs as ever.

    Args:
        pipe: a pipeline of Diffusers, loaded on the CPU.
        plan: `bigkit.plan` of the same pipeline.
        device: the GPU.
        offload_dir: where weights for "disk" are written.
        stand_in: GPU number -> another device in its place, to try a plan out without a GPU.

    Returns:
        The pipeline. Its component that came last stays on the GPU until the next image, or until
        `pipe.maybe_free_model_hooks()` sends all away.

    Raises:
        ValueError: the plan names a component that the pipeline has not.
    """
    missing = [one.name for one in plan.components if getattr(pipe, one.name, None) is None]
    if missing:
        raise ValueError(f"{type(pipe).__name__} has no {', '.join(missing)}: the plan is for {plan.cls}")
    place = Layout({"": device}, device, {k: torch.device(v) for k, v in (stand_in or {}).items()}).device(device)
    previous: UserCpuOffloadHook | None = None
    hooks = []
    for one in plan.components:
        component = getattr(pipe, one.name)
        if one.how == "stays":
            component.to(place)
        elif one.how == "comes":
            _, previous = cpu_offload_with_hook(component, place, previous)
            hooks.append(previous)
        else:
            assert one.plan is not None
            dispatch_model(
                component, one.plan, torch_device(device), offload_dir=offload_dir, stand_in=stand_in, force_hooks=True
            )
    if hooks:
        first: Any = hooks[0]
        first.hook.previous = hooks[-1] if len(hooks) > 1 else None  # the last of one image leaves before the next one
    pipe._all_hooks = hooks  # by which Diffusers sends them away, and takes them off
    return pipe
