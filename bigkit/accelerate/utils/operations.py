"""`accelerate.utils.operations`: tensors in containers, sent to a device or exchanged between processes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...distributed.gather import gather, gather_object
from ...distributed.state import exchange
from ...offload.inputs import find_device, map_leaves, torch_device
from ..differences import refuse_unknown as __getattr__


class CannotPadNestedTensorWarning(UserWarning):
    """Nested tensors cannot be padded."""


def send_to_device(
    tensor: Any, device: torch.device | str | int, non_blocking: bool = False,
    skip_keys: str | Iterable[str] | None = None,
) -> Any:  # fmt: skip
    """Tensors in nested lists, tuples, dicts and dataclasses, and objects with a `to` method, on a device.

    Args:
        tensor: anything; what is no tensor and holds none comes back as it is.
        device: where to.
        non_blocking: see `torch.Tensor.to`.
        skip_keys: keys of dicts whose values stay where they are.

    >>> send_to_device({"x": [torch.ones(1)], "n": 3}, "meta")
    {'x': [tensor(..., device='meta', size=(1,))], 'n': 3}
    """
    target = torch_device(device)

    def send(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(target, non_blocking=non_blocking)
        return leaf.to(target) if callable(getattr(leaf, "to", None)) else leaf

    return map_leaves(send, tensor, (skip_keys,) if isinstance(skip_keys, str) else tuple(skip_keys or ()))


def _each(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, value)


def broadcast(tensor: Any, from_process: int = 0) -> Any:
    """The tensors of one process, on every process; each holds tensors of the same shapes.

    Args:
        tensor: a tensor, or nested lists, tuples and dicts of them.
        from_process: whose.
    """
    return _each(lambda own: gather(own[None])[from_process], tensor)


def broadcast_object_list(object_list: list[Any], from_process: int = 0) -> list[Any]:
    """Make a list what it is on one process; for anything that pickles. It is changed itself, and returned."""
    object_list[:] = exchange(object_list, "broadcast_object_list")[from_process]
    return object_list


def reduce(tensor: Any, reduction: str = "mean", scale: float = 1.0) -> Any:
    """Tensors of all processes made one, on every process.

    Args:
        tensor: a tensor, or nested lists, tuples and dicts of them, of the same shapes everywhere.
        reduction: "sum", "mean", "max", or "none" (the process's own).
        scale: what the result is multiplied with.
    """
    if reduction not in ("sum", "mean", "max", "none"):
        raise ValueError(f"reduction is {reduction!r}: expected sum, mean, max or none")

    def one(own: Tensor) -> Tensor:
        if reduction == "none":
            return own * scale
        parts = gather(own[None])
        total = parts.amax(0) if reduction == "max" else parts.sum(0)
        return (total / len(parts) if reduction == "mean" else total) * scale

    return _each(one, tensor)


def pad_across_processes(tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
    """Tensors as long along a dimension as the longest of any process. `gather` needs no such padding along 0.

    Args:
        tensor: a tensor, or nested lists, tuples and dicts of them.
        dim: the dimension; tensors that lack it stay as they are.
        pad_index: what is filled in.
        pad_first: before what is there, not after it.
    """

    def one(own: Tensor) -> Tensor:
        if own.is_nested:
            warnings.warn("nested tensors cannot be padded", CannotPadNestedTensorWarning, stacklevel=5)
            return own
        if not -own.ndim <= dim < own.ndim:
            return own
        longest = max(exchange(own.shape[dim], "pad_across_processes"))
        missing = longest - own.shape[dim]
        if not missing:
            return own
        before = [0, 0] * (own.ndim - 1 - dim % own.ndim)  # F.pad counts from the last dimension
        return F.pad(own, [*before, *((missing, 0) if pad_first else (0, missing))], value=pad_index)

    return _each(one, tensor)


def is_torch_tensor(tensor: object) -> bool:
    """Whether something is a tensor."""
    return isinstance(tensor, Tensor)


def concatenate(data: Any, dim: int = 0) -> Any:
    """A list of tensors (or of dicts, lists or tuples of them) joined along a dimension.

    >>> concatenate([{"a": torch.ones(1)}, {"a": torch.zeros(1)}])
    {'a': tensor([1., 0.])}
    """
    first = data[0]
    if len(data) == 1:
        return first
    if isinstance(first, (tuple, list)):
        joined = [concatenate([one[i] for one in data], dim) for i in range(len(first))]
        return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)
    if hasattr(first, "keys"):
        return type(first)({key: concatenate([one[key] for one in data], dim) for key in first})
    if not isinstance(first, Tensor):
        raise TypeError(f"concatenate joins tensors, not a {type(first).__name__}")
    return torch.cat(data, dim=dim)
