"""The short ways to spread a model: all of its weights rest in RAM, or all on disk.

Leaves out: weights that rest in several places (`dispatch.py`), and bringing a whole model at once (`whole_model.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..devices import Device, read_device
from .dispatch import dispatch_model


def cpu_offload(
    model: nn.Module,
    execution_device: torch.device | Device | Iterable[torch.device | Device] | None = None,
    offload_buffers: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    preload_module_classes: Iterable[str] | None = None,
    **options: Any,
) -> nn.Module:
    """Keep a model's weights in RAM and bring each block to a device for its forward.

    Args:
        model: the model.
        execution_device: where it works, one device or several in turn; None takes the device of its first parameter.
        state_dict: name -> tensor, for weights that the model has on meta.
        offload_buffers, preload_module_classes, options: see `dispatch_model`.

    >>> model = cpu_offload(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 0, stand_in={0: "cpu"})
    >>> model[0].weight
    <0.weight: 2 x 2 torch.float32, rests in RAM, works on cpu>
    >>> model(torch.ones(1, 2)).shape
    torch.Size([1, 2])
    """
    device = _execution_device(model, execution_device)
    return dispatch_model(
        model, {"": "cpu"}, device, state_dict, offload_buffers=offload_buffers,
        preload_module_classes=preload_module_classes, **{"force_hooks": True, **options},
    )  # fmt: skip


def disk_offload(
    model: nn.Module,
    offload_dir: str | os.PathLike[str],
    execution_device: torch.device | Device | Iterable[torch.device | Device] | None = None,
    offload_buffers: bool = False,
    preload_module_classes: Iterable[str] | None = None,
    **options: Any,
) -> nn.Module:
    """Keep a model's weights on disk and bring each block to a device for its forward.

    Args:
        model: the model. Weights that `load_checkpoint_in_model` left on "disk" stay in the files of their checkpoint.
        offload_dir: where the others are written; the files go with the model.
        execution_device: where it works, one device or several in turn; None takes the device of its first parameter.
        offload_buffers, preload_module_classes, options: see `dispatch_model`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model = disk_offload(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), folder)
    ...     model(torch.ones(1, 2)).shape
    torch.Size([1, 2])
    """
    device = _execution_device(model, execution_device)
    return dispatch_model(
        model, {"": "disk"}, device, offload_dir=offload_dir, offload_buffers=offload_buffers,
        preload_module_classes=preload_module_classes, **options,
    )  # fmt: skip


def _execution_device(model: nn.Module, given: Any) -> Any:
    if given is not None:
        return given
    first = next(model.parameters(), None)
    return "cpu" if first is None or first.is_meta else read_device(first.device)
