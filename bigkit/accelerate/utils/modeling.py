"""`accelerate.utils.modeling`: sizes, maps and tensors of a model, on bigkit's own records."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints.load import load_checkpoint_in_model
from ...checkpoints.state_dict import load_state_dict
from ...devices import Device, collapse, join, placement
from ...maps.device_map import (
    check_device_map,
    compute_module_sizes,
    find_tied_parameters,
    get_balanced_memory,
    get_max_memory,
    infer_auto_device_map,
)
from ...meta.empty import twin
from ...meta.skeleton import repeated_blocks
from ...offload.handle import Away
from ...offload.hooks import AlignDevicesHook, hooks_in
from ...offload.inputs import torch_device
from ...units import dtype_bits, dtype_name, parse_bytes
from ..differences import refuse_unknown as __getattr__
from .offload import OffloadedWeightsLoader

convert_file_size_to_int = parse_bytes  # "5GB" -> 5000000000

# ---------------------------------------------------------------------------------------------------------------------
# Tensors of a module


def named_module_tensors(
    module: nn.Module, include_buffers: bool = True, recurse: bool = False, remove_non_persistent: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers, with their names.

    Args:
        module: any module.
        include_buffers: buffers too.
        recurse: those of the modules in it, too.
        remove_non_persistent: without buffers that are not saved.
    """
    yield from module.named_parameters(recurse=recurse)
    lost = get_non_persistent_buffers(module, recurse, fqns=True) if remove_non_persistent else ()
    for name, buffer in module.named_buffers(recurse=recurse) if include_buffers else ():
        if name not in lost:
            yield name, buffer


def get_non_persistent_buffers(module: nn.Module, recurse: bool = False, fqns: bool = False) -> set[str]:
    """Names of buffers that are not saved; with `fqns` the full ones, as seen from the module."""
    parts = module.named_modules() if recurse else [("", module)]
    return {join(name, own) if fqns else own for name, part in parts for own in part._non_persistent_buffers_set}


def set_module_tensor_to_device(
    module: nn.Module, tensor_name: str, device: torch.device | str | int, value: Tensor | None = None,
    dtype: torch.dtype | str | None = None, fp16_statistics: Tensor | None = None, tied_params_map: Any = None,
    non_blocking: bool = False, clear_cache: bool = True,
) -> None:  # fmt: skip
    """Put one parameter or buffer on a device, with new data if a value is given.

    Args:
        module: the model.
        tensor_name: such as "h.0.weight"; other names of a tied tensor keep the old one.
        device: where to; "meta" drops the data.
        value: the data, of the same shape; None takes what the tensor has.
        dtype: what a floating value becomes; None takes the tensor's own.
        non_blocking: see `torch.Tensor.to`.
        fp16_statistics, tied_params_map, clear_cache: accepted for compatibility.

    Raises:
        ValueError: no such tensor, another shape, or a tensor on meta and no value.

    >>> layer = nn.Linear(2, 2, device="meta")
    >>> set_module_tensor_to_device(layer, "bias", "cpu", torch.ones(2))
    >>> layer.bias.device
    device(type='cpu')
    """
    path, _, own = tensor_name.rpartition(".")
    owner = module.get_submodule(path)
    tensors: Any = owner._parameters if own in owner._parameters else owner._buffers
    old, target = tensors.get(own), torch_device(device)
    if old is None:
        raise ValueError(f"{type(module).__name__} has no tensor {tensor_name!r}")
    if value is None and old.is_meta and target.type != "meta":
        raise ValueError(f"{tensor_name!r} is on meta and has no data to put on {target}: give a value")
    if value is not None and value.shape != old.shape:
        raise ValueError(
            f'Trying to set a tensor of shape {value.shape} in "{own}" (which has shape {old.shape}), this looks '
            "incorrect."
        )
    data = (old if value is None else value).detach()
    like = old.weight.template if isinstance(old, Away) else old
    cast = data.dtype
    if value is not None and value.is_floating_point():
        cast = old.dtype if dtype is None else getattr(torch, dtype_name(dtype))
    if value is not None or data.device != target:
        with torch.no_grad():
            tensors[own] = twin(like, data.to(target, cast, non_blocking=non_blocking))


def retie_parameters(model: nn.Module, tied_params: Iterable[Sequence[str]]) -> None:
    """Make the tensors of each group one: the first of them that is not on meta."""
    for names in tied_params:
        owners = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
        found = [getattr(owner, own) for owner, own in owners]
        real = next((tensor for tensor in found if not tensor.is_meta), None)
        for owner, own in owners if real is not None else ():
            setattr(owner, own, real)


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """What tensors that share memory have in common: the device, the address and the bytes of their storage."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and maps


def dtype_byte_size(dtype: torch.dtype | str) -> float:
    """Bytes of one element; of a bool an eighth, as Accelerate counts it.

    >>> dtype_byte_size(torch.float16), dtype_byte_size("int4")
    (2, 0.5)
    """
    bits = 1 if dtype is torch.bool else dtype_bits(dtype)
    return bits / 8 if bits % 8 else bits // 8


def compute_module_total_buffer_size(
    model: nn.Module, dtype: torch.dtype | str | None = None,
    special_dtypes: Mapping[str, torch.dtype | str] | None = None,
) -> int:  # fmt: skip
    """Bytes of all buffers; see `compute_module_sizes`."""
    return compute_module_sizes(model, dtype, special_dtypes, buffers_only=True).get("", 0)


def get_max_layer_size(
    modules: Iterable[tuple[str, nn.Module | Tensor]], module_sizes: Mapping[str, int],
    no_split_module_classes: Iterable[str] | str,
) -> tuple[int, list[str]]:  # fmt: skip
    """Bytes of the largest layer, and the names of those that are as large. A layer is a tensor, a module without
    children, or one of a class that is not split.
    """
    classes = [no_split_module_classes] if isinstance(no_split_module_classes, str) else [*no_split_module_classes]
    sizes: dict[str, int] = {}
    waiting = [*modules]
    while waiting:
        name, module = waiting.pop(0)
        children = [] if isinstance(module, Tensor) else [*module.named_children()]
        if not children or type(module).__name__ in classes:
            sizes[name] = module_sizes[name]
        else:
            waiting = [(join(name, own), child) for own, child in children] + waiting
    largest = max(sizes.values(), default=0)
    return largest, [name for name, size in sizes.items() if size == largest]


def calculate_maximum_sizes(model: nn.Module) -> tuple[int, tuple[int, list[str]]]:
    """Bytes of a model, and its largest layers; see `get_max_layer_size`."""
    sizes = compute_module_sizes(model)
    direct: list[tuple[str, Any]] = [*model.named_parameters(recurse=False), *model.named_children()]
    return sizes[""], get_max_layer_size(direct, sizes, repeated_blocks(model))


def clean_device_map(device_map: dict[str, Device], module_name: str = "") -> dict[str, Device]:
    """Merge entries of modules that lie on one device, in the map itself.

    >>> clean_device_map({"h.0": 0, "h.1": 0, "head": 1})
    {'h': 0, 'head': 1}
    """
    prefix = f"{module_name}." if module_name else ""
    names = [name for name in device_map if name == module_name or name.startswith(prefix)]
    inside = collapse({name.removeprefix(prefix): device_map.pop(name) for name in names if name != module_name})
    device_map.update({join(module_name, name): device for name, device in inside.items()})
    return device_map


def check_tied_parameters_on_same_device(
    tied_params: Iterable[Sequence[str]], device_map: Mapping[str, Device]
) -> None:
    """Warn of tied tensors that a map puts on several devices."""
    device_of = placement(device_map)
    for names in tied_params:
        devices = {name: device_of(name) for name in names}
        if len({*devices.values()}) > 1:
            warnings.warn(f"tied tensors are on different devices: {devices}", stacklevel=2)


# ---------------------------------------------------------------------------------------------------------------------
# Weights that rest elsewhere


def is_spread(model: nn.Module) -> bool:
    """Whether a model was dispatched, so that each part has its place."""
    return any("hf_device_map" in vars(part) or has_offloaded_params(part) for part in model.modules())


def has_offloaded_params(module: nn.Module) -> bool:
    """Whether weights of the module itself rest elsewhere, or a hook of its own sends them away."""
    away = any(isinstance(tensor, Away) for tensor in module._parameters.values())
    return away or any(isinstance(hook, AlignDevicesHook) and hook.offload for hook in hooks_in(module))


@contextmanager
def align_module_device(module: nn.Module, execution_device: torch.device | str | int | None = None) -> Iterator[None]:
    """Have a module's own parameters on one device within the block. What is written to them stays.

    Args:
        module: a layer; parameters of modules in it are not looked at.
        execution_device: None takes where those that rest elsewhere work, and leaves the others.
    """
    device = None if execution_device is None else torch_device(execution_device)
    old = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
    moved: dict[str, Any] = {}
    for name, tensor in old.items():
        if isinstance(tensor, Away):
            moved[name] = tensor.load(device)
        elif device not in (None, tensor.device):
            moved[name] = twin(tensor, tensor.detach().to(device))
    versions = {name: tensor._version for name, tensor in moved.items()}
    module._parameters.update(moved)
    try:
        yield
    finally:
        for name, tensor in moved.items():
            new: Any = module._parameters[name]
            if new is not tensor or new._version != versions[name]:
                old[name].data = new.detach().to(old[name].device)
        module._parameters.update(old)


def get_state_dict_offloaded_model(model: nn.Module) -> dict[str, Any]:
    """Name -> tensor; those that rest elsewhere are brought to the CPU."""
    return {name: value.load("cpu") if isinstance(value, Away) else value for name, value in model.state_dict().items()}


def get_state_dict_from_offload(
    module: nn.Module, module_name: str, state_dict: dict[str, Any],
    device_to_put_offload: torch.device | str | int = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Fill in those entries of a state dict that a module has tensors for, on a device.

    Args:
        module: the part of a model.
        module_name: its name, or that of a tensor in it.
        state_dict: full name -> anything.
        device_to_put_offload: where to.
    """
    root = module_name.rpartition(".")[0] if module_name.rpartition(".")[2] in module._parameters else module_name
    device = torch_device(device_to_put_offload)
    for name, tensor in module.state_dict().items():
        if (full := join(root, name)) in state_dict:
            state_dict[full] = tensor.load(device) if isinstance(tensor, Away) else tensor.to(device)
    return state_dict


def load_offloaded_weights(
    model: nn.Module, index: Mapping[str, Any] | None, offload_folder: str | os.PathLike[str]
) -> None:
    """Read tensors that `offload_weight` wrote into a model, on the CPU."""
    for name, tensor in OffloadedWeightsLoader(save_folder=offload_folder, index=index).items() if index else ():
        set_module_tensor_to_device(model, name, "cpu", tensor)
