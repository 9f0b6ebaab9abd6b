"""What the wing uses of PyTorch's private parts, in one place. Seen in torch 2.11 to 2.15."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

# -> the fake-tensor mode that is on (a dry run's), or None. `torch._guards`, 2.11 to 2.15.
detect_fake_mode: Callable[[], Any] = torch._guards.detect_fake_mode


def cut_like(flat: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Views of a flat tensor, one after another, shaped like others. `_unflatten_dense_tensors`, 2.11 to 2.15."""
    views: tuple[Tensor, ...] = _unflatten_dense_tensors(flat, tensors)
    return views


def copy_all(targets: list[Tensor], sources: tuple[Tensor, ...]) -> None:
    """Copy many small tensors in few kernels, casts included. `torch._foreach_copy_`, 2.11 to 2.15."""
    torch._foreach_copy_(targets, sources)
