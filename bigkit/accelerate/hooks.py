"""`accelerate.hooks`: bigkit's hooks under their old address, and those that are put by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..devices import join
from ..offload.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from ..offload.whole_model import CpuOffload, UserCpuOffloadHook
from .differences import refuse_unknown as __getattr__
from .utils.offload import PrefixedDataset

DeviceLike = torch.device | str | int


def remove_hook_from_submodules(module: nn.Module) -> None:
    """`remove_hook_from_module(module, recurse=True)`."""
    remove_hook_from_module(module, recurse=True)


class LayerwiseCastingHook(ModelHook):
    """Keeps a module's weights in one dtype, and casts them to another for each forward.

    Args:
        storage_dtype, compute_dtype, non_blocking: see `attach_layerwise_casting_hooks`.
    """

    def __init__(self, storage_dtype: torch.dtype, compute_dtype: torch.dtype, non_blocking: bool) -> None:
        self.storage_dtype, self.compute_dtype, self.non_blocking = storage_dtype, compute_dtype, non_blocking

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module.to(dtype=self.storage_dtype, non_blocking=self.non_blocking)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        module.to(dtype=self.compute_dtype, non_blocking=self.non_blocking)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.on_error(module)
        return output

    def on_error(self, module: nn.Module) -> None:
        module.to(dtype=self.storage_dtype, non_blocking=self.non_blocking)


def attach_align_device_hook(
    module: nn.Module, execution_device: DeviceLike | None = None, offload: bool = False,
    weights_map: Mapping[str, Tensor] | None = None, offload_buffers: bool = False, module_name: str = "",
    skip_keys: str | Iterable[str] | None = None, preload_module_classes: Iterable[str] | None = None,
    tied_params_map: Any = None,
) -> None:  # fmt: skip
    """Put an `AlignDevicesHook` on every module with tensors of its own; other than `dispatch_model`s none looks ahead.

    Args:
        module: the model, or the part of one that is called `module_name` in `weights_map`.
        execution_device, offload, weights_map, offload_buffers, skip_keys: see `AlignDevicesHook`.
        preload_module_classes: classes whose modules bring all that is in them at once.
        tied_params_map: accepted for compatibility.
    """
    whole = offload and type(module).__name__ in (preload_module_classes or ())
    if whole or any(tensor is not None for tensor in (*module._parameters.values(), *module._buffers.values())):
        prefix = f"{module_name}." if module_name else ""
        weights = None if weights_map is None else PrefixedDataset(weights_map, prefix)
        hook = AlignDevicesHook(
            execution_device, offload, False, weights, offload_buffers, place_submodules=whole, skip_keys=skip_keys
        )
        add_hook_to_module(module, hook, append=True)
    for name, child in () if whole else module.named_children():
        attach_align_device_hook(
            child, execution_device, offload, weights_map, offload_buffers, join(module_name, name), skip_keys,
            preload_module_classes,
        )  # fmt: skip


def attach_execution_device_hook(
    module: nn.Module, execution_device: DeviceLike, skip_keys: str | Iterable[str] | None = None,
    preload_module_classes: Iterable[str] | None = None, tied_params_map: Any = None,
) -> None:  # fmt: skip
    """Put an `AlignDevicesHook` on every module that has no hook yet, so that its inputs come to where it works.

    Args:
        module: the model, or a part of one.
        execution_device, skip_keys: see `AlignDevicesHook`.
        preload_module_classes: classes in whose modules no hooks are put.
        tied_params_map: accepted for compatibility.
    """
    if "_hf_hook" not in vars(module) and any(True for _ in (*module.parameters(), *module.buffers())):
        add_hook_to_module(module, AlignDevicesHook(execution_device, skip_keys=skip_keys))
    if type(module).__name__ not in (preload_module_classes or ()):
        for child in module.children():
            attach_execution_device_hook(child, execution_device, skip_keys, preload_module_classes)


def attach_align_device_hook_on_blocks(
    module: nn.Module, execution_device: DeviceLike | Mapping[str, DeviceLike] | None = None,
    offload: bool | Mapping[str, bool] = False, weights_map: Mapping[str, Tensor] | None = None,
    offload_buffers: bool = False, module_name: str = "", skip_keys: str | Iterable[str] | None = None,
    preload_module_classes: Iterable[str] | None = None, tied_params_map: Any = None,
) -> None:  # fmt: skip
    """Put hooks on blocks: each works on its device, and its weights stay there or are brought for each forward.

    Args:
        module: the model, or the part of one that is called `module_name` in the maps.
        execution_device: one device, or name of a block -> device.
        offload: for all, or name of a block -> whether its weights are sent away.
        weights_map, offload_buffers, skip_keys: see `AlignDevicesHook`.
        preload_module_classes, tied_params_map: see `attach_align_device_hook`.
    """
    root = module_name == ""
    if not isinstance(execution_device, Mapping) and not isinstance(offload, Mapping):
        if offload:
            attach_align_device_hook(
                module, execution_device, True, weights_map, offload_buffers, module_name, skip_keys
            )
        else:
            hook = AlignDevicesHook(execution_device, io_same_device=True, place_submodules=True, skip_keys=skip_keys)
            add_hook_to_module(module, hook)
        return
    devices: Any = execution_device
    if not isinstance(devices, Mapping):
        devices = dict.fromkeys(offload, devices)  # type: ignore[arg-type]
    away = offload if isinstance(offload, Mapping) else dict.fromkeys(devices, offload)
    if module_name in devices and module_name in away:
        device: Any = devices[module_name]
        if away[module_name]:
            attach_align_device_hook(
                module, device, True, weights_map, offload_buffers, module_name, skip_keys, preload_module_classes
            )
        if "_hf_hook" not in vars(module):
            stays = not away[module_name]
            hook = AlignDevicesHook(device, io_same_device=root, place_submodules=stays, skip_keys=skip_keys)
            add_hook_to_module(module, hook)
        attach_execution_device_hook(module, device, skip_keys, preload_module_classes)
    elif root:
        add_hook_to_module(
            module, AlignDevicesHook(devices.get(""), io_same_device=True, skip_keys=skip_keys), append=True
        )
    for name, child in module.named_children():
        attach_align_device_hook_on_blocks(
            child, devices, away, weights_map, offload_buffers, join(module_name, name), skip_keys,
            preload_module_classes,
        )  # fmt: skip
