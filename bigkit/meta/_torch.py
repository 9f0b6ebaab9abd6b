"""What is private in PyTorch and used here.

Seen in torch 2.11 to 2.15; `tests/meta/test_private_parts.py` fails when a name is gone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def twin(tensor: Tensor, data: Tensor) -> Tensor:
    """`data` as the same kind of tensor: class (nn.Parameter and its heirs), attributes and requires_grad."""
    if hasattr(data, "fake_mode"):  # a fake tensor stays one, and says itself whether it is a parameter
        fake: Any = data.detach()
        fake._is_param = isinstance(tensor, nn.Parameter)
        return fake
    twin = torch.Tensor._make_subclass(type(tensor), data, tensor.requires_grad and tensor.is_leaf)  # it detaches
    if attributes := vars(tensor):
        vars(twin).update(attributes)
    return twin
