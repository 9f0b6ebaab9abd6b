"""A tensor that lies on another device than its module works on, because it is tied to one there.

The model has it once, so that it stays tied: who loads, edits, trains or saves it meets one tensor. For the time of its
forward the module is lent a copy. That stays where it is until the tensor changes, and gradients flow back through it.

Leaves out: what rests in RAM or on disk (`offload/stream.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..devices import join
from ..meta.held import Place, put, tensors_of
from ..meta.skeleton import own_tensors
from ._torch import mark_parameter, state_of, watch_writes
from .codec import on_device
from .grouping import Layout
from .handle import Away
from .hooks import ModelHook, add_hook_to_module, this_thread

_lock = threading.RLock()  # while a module is given a copy, or its tensor back


class Copies:
    """The copy of a tied tensor on a device.

    Args:
        device: where it is.

    Attributes:
        keep: whether it stays there between forwards.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.keep = device, False
        self._tensor: Tensor | None = None  # of which there is a copy
        self._state: tuple[int, int] | None = None  # what it was when it was copied
        self._copy: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_tensor": None, "_copy": None}

    @torch.inference_mode(False)
    def of(self, tensor: Tensor) -> Tensor:
        """A copy with the values that a tensor has now."""
        if self._copy is not None and self._tensor is tensor and self._state == state_of(tensor):
            return self._copy
        self._tensor = self._copy = None  # free before there is a new one
        with torch.enable_grad():
            copy = on_device(tensor, self.device)
        if isinstance(tensor, nn.Parameter):
            mark_parameter(copy)
        self.note(tensor, copy)
        return copy

    def note(self, tensor: Tensor, copy: Tensor) -> None:
        """Keep a copy of a tensor, if all that is written to the tensor will be seen."""
        if self.keep and watch_writes(tensor):
            self._tensor, self._copy, self._state = tensor, copy, state_of(tensor)


class _Lent:
    """A place in the model where a copy is lent."""

    def __init__(self, place: Place, copies: Copies) -> None:
        self.place, self.copies = place, copies
        self.users: set[int] = set()  # ids of the forwards that it is lent to
        self.tensor: Tensor | None = None  # what belongs there
        self.copy: Tensor | None = None
        self.version = 0  # of the copy when it was lent

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self.place, "copies": self.copies, "users": set(), "tensor": None, "copy": None, "version": 0}

    def lend(self, user: int) -> None:
        with _lock:
            self.users.add(user)
            tensors, own = tensors_of(self.place), self.place[1]
            tensor = tensors.get(own)
            if tensor is None or tensor is self.copy or isinstance(tensor, Away) or tensor.device == self.copies.device:
                return
            self.copy, self.tensor = self.copies.of(tensor), tensor
            self.version = self.copy._version
            tensors[own] = self.copy

    def take_back(self, user: int) -> None:
        with _lock:
            self.users.discard(user)
            copy, tensor = self.copy, self.tensor
            if self.users or copy is None or tensor is None:
                return
            if copy._version != self.version:
                with torch.no_grad():
                    tensor.copy_(copy)
                self.copies.note(tensor, copy)
            if tensors_of(self.place).get(self.place[1]) is copy:
                put([self.place], tensor)
            self.copy = self.tensor = None


class LendCopies(ModelHook):
    """Lends copies to a module for each forward."""

    is_placed = True  # by a dispatch: the next one takes it away

    def __init__(self, lent: Sequence[_Lent]) -> None:
        self.lent = list(lent)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if this_thread.module is module and self in this_thread.begun:  # else nobody would tell of the end
            for lent in self.lent:
                lent.lend(id(this_thread.begun))
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.on_error(module)
        return output

    def on_error(self, module: nn.Module) -> None:
        for lent in self.lent:
            lent.take_back(id(this_thread.begun))

    def retire(self) -> None:
        """Lend nothing from now on."""
        self.lent = []


def lend_copies(model: nn.Module, layout: Layout) -> None:
    """Put hooks on modules that work on another device than tensors of theirs lie on, and make the copies that stay."""
    copies: dict[tuple[int, torch.device], Copies] = {}
    for prefix, module in model.named_modules():
        lent = []
        for own, (tensor, buffer) in own_tensors(module).items():
            name = join(prefix, own)
            device = layout.device(layout.works(name))
            if not isinstance(tensor, Away) and tensor.device != device:
                copy = copies.setdefault((id(tensor), device), Copies(device))
                if not layout.is_away(name):
                    copy.keep = True
                    copy.of(tensor)
                lent.append(_Lent((module, own, buffer), copy))
        if lent:
            add_hook_to_module(module, LendCopies(lent), append=True)
