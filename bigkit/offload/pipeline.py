"""Running a pipeline of Diffusers as a plan says: what stays, what comes for its phase, and what comes by block.

Leaves out: choosing (`maps/pipeline.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..devices import Device
from ..maps.pipeline import PipelinePlan
from .dispatch import dispatch_model
from .grouping import Layout
from .hooks import ModelHook, add_hook_to_module
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
        The pipeline. What came for a phase stays on the GPU until another component works.

    Raises:
        ValueError: the plan names a component that the pipeline has not.
    """
    missing = [one.name for one in plan.components if getattr(pipe, one.name, None) is None]
    if missing:
        raise ValueError(f"{type(pipe).__name__} has no {', '.join(missing)}: the plan is for {plan.cls}")
    place = Layout({"": device}, device, {k: torch.device(v) for k, v in (stand_in or {}).items()}).device(device)
    hooks: dict[str, UserCpuOffloadHook] = {}
    for one in plan.components:
        component = getattr(pipe, one.name)
        if one.how == "stays":
            component.to(place)
        elif one.how == "comes":
            _, hooks[one.name] = cpu_offload_with_hook(component, place)
        else:
            assert one.plan is not None
            dispatch_model(
                component, one.plan, torch_device(device), offload_dir=offload_dir, stand_in=stand_in, force_hooks=True
            )
    for one in plan.components:
        others = [hook for name, hook in hooks.items() if name != one.name]
        if others:
            add_hook_to_module(getattr(pipe, one.name), SendsAway(others, place), append=True)
    pipe._all_hooks = []  # what stands here Diffusers takes off after an image, and puts hooks of its own in its place
    return pipe


class SendsAway(ModelHook):
    """Before a component works, sends those away that came for another phase: the plan counts with one at a time.

    Args:
        others: their hooks.
        execution_device: where the component works, which Diffusers asks the hooks of a pipeline.
    """

    def __init__(self, others: list[UserCpuOffloadHook], execution_device: torch.device) -> None:
        self.others, self.execution_device = others, execution_device

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for other in self.others:
            other.offload()
        return args, kwargs
