"""Running a pipeline of Diffusers as a plan says: what stays, what comes for its phase, and what comes by block.

Leaves out: choosing (`maps/pipeline.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..devices import Device
from ..maps.pipeline import PipelinePlan
from .dispatch import dispatch_model
from .grouping import Layout
from .hooks import ModelHook, SequentialHook, add_hook_to_module
from .inputs import send_to_device
from .lenders import streamers_in
from .stream import Streamer
from .whole_model import cpu_offload_with_hook


def dispatch_pipeline(
    pipe: Any,
    plan: PipelinePlan,
    *,
    offload_dir: str | None = None,
    stand_in: Mapping[Device, torch.device | str] | None = None,
) -> Any:
    """Place a pipeline's components as a plan says; `pipe(...)` then runs as ever.

    Args:
        pipe: a pipeline of Diffusers, loaded on the CPU.
        plan: `bigkit.plan` of the same pipeline, which names the GPUs.
        offload_dir: where weights for "disk" are written.
        stand_in: GPU number -> another device in its place, to try a plan out without a GPU.

    Returns:
        The pipeline. What came for a phase, and the place for blocks in flight, stays on its GPU until another
        component works there. Outputs of all components are on the plan's first GPU.

    Raises:
        ValueError: the plan names a component that the pipeline has not.
        TypeError: the plan is none of a pipeline.
    """
    if not isinstance(plan, PipelinePlan):
        raise TypeError(f"a pipeline follows bigkit.plan of its name or folder, not a {type(plan).__name__}")
    missing = [one.name for one in plan.components if getattr(pipe, one.name, None) is None]
    if missing:
        raise ValueError(f"{type(pipe).__name__} has no {', '.join(missing)}: the plan is for {plan.cls}")
    layout = Layout({"": plan.gpus[0]}, plan.gpus[0], {k: torch.device(v) for k, v in (stand_in or {}).items()})
    main = layout.device(plan.gpus[0])
    begins = {one.name: Begins(main) for one in plan.components}
    leaves: dict[str, list[Callable[[], None]]] = {one.name: [] for one in plan.components}
    for one in plan.components:
        component = add_hook_to_module(getattr(pipe, one.name), begins[one.name])
        if one.how == "comes":
            leaves[one.name] = [cpu_offload_with_hook(component, layout.device(one.gpus[0]))[1].offload]
        elif one.how == "stays" and one.gpus[0] == plan.gpus[0]:
            component.to(main)
        else:
            places = one.plan or one.away or {"": one.gpus[0]}
            dispatch_model(component, places, one.gpus, offload_dir=offload_dir, stand_in=stand_in, force_hooks=True)
            leaves[one.name] = [partial(give_slots_back, streamer) for streamer in streamers_in(component)]
        if isinstance(hook := vars(component)["_hf_hook"], SequentialHook):
            vars(hook)["execution_device"] = main  # Diffusers asks the whole hook
    for one in plan.components:
        others = [other for other in plan.components if other is not one and {*other.gpus} & {*one.gpus}]
        begins[one.name].leaving = [leave for other in others for leave in leaves[other.name]]
    pipe._all_hooks = []  # what stands here Diffusers takes off after an image, and puts hooks of its own in its place
    return pipe


def give_slots_back(streamer: Streamer) -> None:
    """Let go of the memory for blocks in flight, until a block is needed again."""
    with streamer.lock:
        streamer.let_go()


class Begins(ModelHook):
    """Before a component works, what came to its GPUs for another one leaves: the plan counts with one at a time. After
    it, what it returns is brought to the main GPU.

    Args:
        execution_device: the main GPU: where Diffusers, which asks the hooks of a pipeline, makes its tensors.
    """

    def __init__(self, execution_device: torch.device) -> None:
        self.execution_device = execution_device
        self.leaving: list[Callable[[], None]] = []

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for leave in self.leaving:
            leave()
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return send_to_device(output, self.execution_device)
