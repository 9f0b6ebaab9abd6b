"""What the wing uses of PyTorch's private parts, in one place. Seen in torch 2.11 to 2.15."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors
from torch.nn.modules.module import _IncompatibleKeys

from ..meta.skeleton import parts_that

# -> the fake-tensor mode that is on (a dry run's), or None. `torch._guards`, 2.11 to 2.15.
detect_fake_mode: Callable[[], Any] = torch._guards.detect_fake_mode

# Context in which a tensor's own `__torch_function__` is not asked: an operation sees its data as those of a plain one.
# `torch._C`, 2.11 to 2.15.
DisableTorchFunctionSubclass: Callable[[], AbstractContextManager[None]] = torch._C.DisableTorchFunctionSubclass


def cut_like(flat: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Views of a flat tensor, one after another, shaped like others. `_unflatten_dense_tensors`, 2.11 to 2.15."""
    views: tuple[Tensor, ...] = _unflatten_dense_tensors(flat, tensors)
    return views


def copy_all(targets: list[Tensor], sources: tuple[Tensor, ...]) -> None:
    """Copy many small tensors in few kernels, casts included. `torch._foreach_copy_`, 2.11 to 2.15."""
    torch._foreach_copy_(targets, sources)


def loads_its_own_way(module: nn.Module) -> bool:
    """Whether a module changes a state dict before it is loaded. `_load_state_dict_pre_hooks`, 2.11 to 2.15."""
    own = type(module)._load_from_state_dict
    changes = own is not nn.Module._load_from_state_dict and not hasattr(own, "only_refuses")
    return changes or bool(module._load_state_dict_pre_hooks)


def load_own_way(
    module: nn.Module, prefix: str, metadata: Mapping[str, Any], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What a module makes of a state dict; it keeps its own tensors. `_load_from_state_dict`, 2.11 to 2.15."""
    state = {name: tensor for name, tensor in state.items() if name != f"{prefix}_extra_state"}
    stand_in = object.__new__(type(module))
    stand_in.__dict__ |= module.__dict__
    stand_in.__dict__ |= {"_parameters": {**module._parameters}, "_buffers": {**module._buffers}}
    options = {**metadata, "assign_to_params_buffers": True}  # nothing is copied
    stand_in._load_from_state_dict(state, prefix, options, False, [], [], [])
    return state


def run_post_hooks(model: nn.Module, missing: list[str], unexpected: list[str]) -> None:
    """What modules do after loading, parts first; they may take names from the lists. `_load_state_dict_post_hooks`."""
    for _, module in reversed(parts_that(model, lambda module: module._load_state_dict_post_hooks)):
        for hook in module._load_state_dict_post_hooks.values():
            hook(module, _IncompatibleKeys(missing, unexpected))


def extra_states(model: nn.Module, among: Iterable[str] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Name -> module, for those that give and take a state beside their tensors. `_extra_state`, 2.11 to 2.15.

    Args:
        model: any module.
        among: names; of these alone (most checkpoints have none, and the model is not searched).
    """
    wanted = None if among is None else {name for name in among if name.endswith("_extra_state")}
    for name, module in model.named_modules() if wanted is None or wanted else ():
        own, plain, full = type(module), nn.Module, f"{name}._extra_state".lstrip(".")
        if own.set_extra_state is not plain.set_extra_state and own.get_extra_state is not plain.get_extra_state:
            if wanted is None or full in wanted:
                yield full, module
