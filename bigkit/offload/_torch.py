"""What the wing uses of PyTorch's private parts, in one place. Seen in torch 2.11 to 2.15."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# -> the fake-tensor mode that is on (a dry run's), or None. `torch._guards`, 2.11 to 2.15.
detect_fake_mode: Callable[[], Any] = torch._guards.detect_fake_mode

# Context in which a tensor's own `__torch_function__` is not asked: an operation sees the data of a handle as torch
# does. `torch._C`, 2.11 to 2.15.
DisableTorchFunctionSubclass: Callable[[], AbstractContextManager[None]] = torch._C.DisableTorchFunctionSubclass


def storage_id(tensor: Tensor) -> int:
    """The same number for all tensors that share memory. `UntypedStorage._cdata`, 2.11 to 2.15."""
    return tensor.untyped_storage()._cdata


def make_subclass(cls: type, data: Tensor, requires_grad: bool) -> Any:
    """A tensor of class `cls` with the data of another, as a new leaf. `Tensor._make_subclass`, 2.11 to 2.15."""
    return Tensor._make_subclass(cls, data, requires_grad)


def real_tensors() -> AbstractContextManager[Any]:
    """Context in which new tensors are real, also in a dry run. `unset_fake_temporarily`, 2.11 to 2.15."""
    if detect_fake_mode() is None:
        return nullcontext()
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def tree_leaves(tree: Any) -> list[Any]:
    """What lies in nested lists, tuples and dicts. `torch.utils._pytree`, 2.11 to 2.15."""
    return pytree.tree_leaves(tree)


def tree_map_only(types: Any, function: Callable[[Any], Any], tree: Any) -> Any:
    """A copy of nested lists, tuples and dicts with what has one of the types replaced. `torch.utils._pytree`."""
    return pytree.tree_map_only(types, function, tree)
