"""Device maps of an `nn.Module` under the names that Hugging Face Accelerate made known.

    infer_auto_device_map, get_balanced_memory, get_max_memory, compute_module_sizes, find_tied_parameters,
    check_device_map

They take and give what theirs do, and stand on `strategies.place`, so that a map is never over a budget, a reserve is
held only when something is offloaded, and buffers are placed. Differences: `no_split_module_classes=None` takes the
model's own list; budgets that nothing fits raise `PlanError`; the dict you give is never changed.

Leaves out: accelerators other than CUDA and MPS.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ..devices import Device, prefixes, read_device
from ..machine.hardware import is_unified
from ..machine.ram import ram_free
from ..meta.skeleton import spec_from_module, tied_groups
from ..model.spec import Precision, tensor_bytes
from ..units import dtype_name
from .strategies import place
from .task import read_budgets

if TYPE_CHECKING:
    import torch


def infer_auto_device_map(
    model: torch.nn.Module,
    max_memory: Mapping[Device, int | str] | None = None,
    no_split_module_classes: Iterable[str] | str | None = None,
    dtype: torch.dtype | str | None = None,
    special_dtypes: Mapping[str, torch.dtype | str] | None = None,
    verbose: bool = False,
    clean_result: bool = True,
    offload_buffers: bool = False,
    fallback_allocation: bool = False,
) -> dict[str, Device]:
    """A device map that fills the devices in order (strategy "sequential").

    Args:
        model: the model, empty or not.
        max_memory: device -> budget; None asks this machine. Disk has no limit unless it is named.
        no_split_module_classes: classes that stay on one device; None takes the model's own list.
        dtype: floating weights are counted in it.
        special_dtypes: tensor name -> dtype, for tensors that differ.
        verbose: print why each boundary stands where it does.
        clean_result: merge entries of modules that lie on one device.
        offload_buffers: whether buffers of offloaded layers leave the GPU too.
        fallback_allocation: accepted for compatibility; gaps are always filled before anything is offloaded.

    Returns:
        Module name -> GPU number, "mps", "cpu" or "disk".

    Raises:
        PlanError: a layer cannot run within the budgets.

    >>> import torch
    >>> infer_auto_device_map(torch.nn.Sequential(torch.nn.Linear(9, 9), torch.nn.Linear(9, 9)), {0: 400, 1: 400})
    {'0': 0, '1': 1}
    """
    plan = place(
        spec_from_module(model), get_max_memory(max_memory), "sequential", dtype=dtype, special_dtypes=special_dtypes,
        no_split=no_split_module_classes, offload_buffers=offload_buffers,
    )  # fmt: skip
    if verbose:
        print(plan.explain())
    return plan.device_map if clean_result else {layer.name: layer.device for layer in plan.layers}


def get_balanced_memory(
    model: torch.nn.Module,
    max_memory: Mapping[Device, int | str] | None = None,
    no_split_module_classes: Iterable[str] | str | None = None,
    dtype: torch.dtype | str | None = None,
    special_dtypes: Mapping[str, torch.dtype | str] | None = None,
    low_zero: bool = False,
) -> dict[Device, int]:
    """Budgets with which `infer_auto_device_map` gives the balanced map.

    Every GPU but the last one that is used gets what it holds in the balanced plan; if something must be offloaded, the
    budgets stay as they are. With no budgets given and a single GPU, a tenth of it is left free.

    Args:
        model, max_memory, no_split_module_classes, dtype, special_dtypes: as in `infer_auto_device_map`.
        low_zero: leave GPU 0 as empty as possible (strategy "balanced_low_0").

    >>> import torch
    >>> layers = [torch.nn.Linear(9, 9, bias=False) for _ in range(4)]  # 324 bytes each
    >>> get_balanced_memory(torch.nn.Sequential(*layers), {0: "1KiB", 1: "2KiB"})
    {0: 324, 1: 2048}
    """
    budgets = get_max_memory(max_memory)
    gpus = [device for device in budgets if device not in ("cpu", "disk") and budgets[device]]
    if len(gpus) == 1 and max_memory is None:
        budgets[gpus[0]] = int(0.9 * budgets[gpus[0]])
    if len(gpus) < 2:
        return budgets
    plan = place(
        spec_from_module(model), budgets, "balanced_low_0" if low_zero else "balanced", dtype=dtype,
        special_dtypes=special_dtypes, no_split=no_split_module_classes, strict=False,
    )  # fmt: skip
    used = [gpu for gpu in gpus if plan.used[gpu]]
    if plan.feasible and not plan.offloaded and used:
        budgets.update({gpu: plan.used[gpu] for gpu in gpus if gpu != used[-1]})
    return budgets


def get_max_memory(max_memory: Mapping[Device, int | str] | None = None) -> dict[Device, int]:
    """Budgets in bytes: those given, or what is free on this machine's GPUs (or MPS) and in RAM.

    Where a GPU has no memory but the RAM (`machine.hardware.is_unified`) there is one budget, not two.
    The order is GPUs, "mps", "cpu", "disk". The dict given is not changed.

    >>> get_max_memory({"cpu": "1GiB", 0: "2GB"})
    {0: 2000000000, 'cpu': 1073741824}
    """
    if max_memory is not None:
        budgets, given = read_budgets(max_memory), {read_device(device) for device in max_memory}
        return {device: budget for device, budget in budgets.items() if device in given and budget is not None}
    import torch

    available = ram_free()
    gpus: list[Device] = [*range(torch.cuda.device_count())]
    if is_unified():  # shared with the CPU, so not counted twice
        return dict.fromkeys(gpus[:1] or ["mps"], available)
    return {**{i: torch.cuda.mem_get_info(i)[0] for i in gpus}, "cpu": available}


def compute_module_sizes(
    model: torch.nn.Module,
    dtype: torch.dtype | str | None = None,
    special_dtypes: Mapping[str, torch.dtype | str] | None = None,
    buffers_only: bool = False,
) -> dict[str, int]:
    """Bytes of every module and tensor by name, "" for all; a tied tensor counts once, under its first name.

    >>> import torch
    >>> compute_module_sizes(torch.nn.Linear(3, 2), dtype=torch.float16)
    {'': 16, 'weight': 12, 'bias': 4}
    """
    spec = spec_from_module(model)
    special = {name: dtype_name(value) for name, value in (special_dtypes or {}).items()}
    precision = Precision(None if dtype is None else dtype_name(dtype), special=tuple(special.items()))
    repeated = {name for group in spec.ties for name in group[1:]}
    sizes: dict[str, int] = {}
    for name, (tensor, owner) in spec.tensors.items():
        if name not in repeated and (tensor.buffer or not buffers_only):
            size = tensor_bytes(name, tensor, owner, precision)
            for prefix in prefixes(name):
                sizes[prefix] = sizes.get(prefix, 0) + size
    return sizes


def find_tied_parameters(model: torch.nn.Module) -> list[list[str]]:
    """Groups of parameter names that share one storage, first name first.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    >>> model[1].weight = model[0].weight
    >>> find_tied_parameters(model)
    [['0.weight', '1.weight']]
    """
    return tied_groups(model, buffers=False)


def check_device_map(model: torch.nn.Module, device_map: Mapping[str, Device]) -> None:
    """Check that a device map gives every parameter and buffer a device; of entries inside each other the innermost.

    A name that is not in the model is warned of.

    Raises:
        ValueError: with the names that are missing.

    >>> import torch
    >>> check_device_map(torch.nn.Linear(2, 2), {"weight": 0})
    Traceback (most recent call last):
        ...
    ValueError: the device map gives no device for 'bias'
    """
    everywhere = {device: read_device(device) for device in device_map.values()}
    no_limit = dict.fromkeys(everywhere.values(), 2**62) or {"cpu": 2**62}
    place(spec_from_module(model), no_limit, device_map, strict=False)
