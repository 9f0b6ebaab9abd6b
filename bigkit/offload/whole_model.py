"""Offloading by the whole model: for pipelines in which one model works at a time, several times in a row.

Leaves out: models that are larger than the device (`offload/dispatch.py`).
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.ring import Slab
from ..devices import Device
from ._torch import is_real_cuda
from .grouping import records
from .hooks import ModelHook, add_hook_to_module, drop_hooks
from .inputs import send_to_device, torch_device
from .weights import ALIGN


class CpuOffload(ModelHook):
    """Brings a whole model to a device when it is called, and keeps it there until `offload()`.

    Its weights stay in RAM too: to send them away again nothing needs to be copied, unless something wrote to them.
    They lie together there, pinned for a GPU, and come in one copy; those that are no plain tensors come one by one.
    """

    def __init__(
        self, execution_device: torch.device | Device | None = None, prev_module_hook: UserCpuOffloadHook | None = None
    ) -> None:
        self.execution_device = torch_device("cuda" if execution_device is None else execution_device)
        self.previous = prev_module_hook
        self.in_ram: list[tuple[Tensor, Tensor, int]] = []  # tensor of the model, its data in RAM, its version
        self.slab: Slab | None = None
        self.starts: dict[int, int] = {}  # address of a tensor's data in RAM -> where it begins in the slab

    def init_hook(self, module: nn.Module) -> nn.Module:
        module.to("cpu")
        tensors = [record.tensor for record in records(module)]
        plain = (type(one) in (Tensor, nn.Parameter) and one.is_contiguous() and not one.is_meta for one in tensors)
        if tensors and all(plain):
            self._lay_together(tensors)
        return module

    def _lay_together(self, tensors: list[Tensor]) -> None:
        ends = list(accumulate(-(-tensor.nbytes // ALIGN) * ALIGN for tensor in tensors))
        slab = self.slab = Slab(ends[-1], pin=is_real_cuda(self.execution_device))
        slab.pin()
        for tensor, start in zip(tensors, [0, *ends]):
            place = _view(slab.bytes, start, tensor)
            place.copy_(tensor.data)
            tensor.data = place
            self.starts[place.data_ptr()] = start

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.previous is not None:
            self.previous.offload()
        if not self.in_ram:
            together = None
            if self.slab is not None:
                together = torch.empty_like(self.slab.bytes, device=self.execution_device)
                together.copy_(self.slab.bytes, non_blocking=True)
            for record in records(module):
                ram = record.tensor.data
                start = self.starts.get(ram.data_ptr())
                if together is None or start is None:  # it has been replaced
                    record.tensor.data = ram.to(self.execution_device)
                else:
                    record.tensor.data = _view(together, start, ram)
                self.in_ram.append((record.tensor, ram, record.tensor._version))
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)

    def offload(self) -> None:
        """Send the weights back to RAM."""
        for tensor, ram, version in self.in_ram:
            if tensor._version != version:
                ram.copy_(tensor.data)
            tensor.data = ram
        self.in_ram = []

    def detach_hook(self, module: nn.Module) -> nn.Module:
        self.offload()
        return module


def _view(memory: Tensor, start: int, like: Tensor) -> Tensor:
    """A tensor like another one, over a stretch of memory."""
    return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)


class UserCpuOffloadHook:
    """What `cpu_offload_with_hook` returns beside the model: sends it away, or ends the offloading."""

    def __init__(self, model: nn.Module, hook: CpuOffload) -> None:
        self.model, self.hook = model, hook

    def offload(self) -> None:
        """Send the model's weights back to RAM."""
        self.hook.offload()

    def remove(self) -> None:
        """Take this hook away; others on the model stay."""
        self.hook.offload()
        drop_hooks(self.model, [self.hook])


def cpu_offload_with_hook(
    model: nn.Module,
    execution_device: torch.device | Device | None = None,
    prev_module_hook: UserCpuOffloadHook | None = None,
) -> tuple[nn.Module, UserCpuOffloadHook]:
    """Keep a model in RAM until it is called, and on the device from then until the next of a chain is called.

    Args:
        model: the model.
        execution_device: where it works; None takes the first GPU.
        prev_module_hook: that of the model before it in the chain, which is sent away when this one is called.

    Returns:
        The model, and the hook that sends it away (`offload()`) or ends the offloading (`remove()`).

    >>> first, hook = cpu_offload_with_hook(nn.Linear(2, 2), "cpu")
    >>> second, hook_2 = cpu_offload_with_hook(nn.Linear(2, 2), "cpu", prev_module_hook=hook)
    >>> second(first(torch.ones(1, 2))).shape
    torch.Size([1, 2])
    """
    hook = CpuOffload(execution_device, prev_module_hook)
    add_hook_to_module(model, hook, append=True)
    return model, UserCpuOffloadHook(model, hook)
