"""What leaves a forward and lies in a slot, which is about to be filled with another unit.

A module may return its weight or a view of it (latents, learned positions): the caller gets a copy. A view may also be
kept as an attribute, or be read by another thread during the forward (a state dict, a checkpoint that is saved). Then
the slot holds on to its bytes: whoever has the view keeps that memory, and the streamer takes new memory in its place.

Leaves out: views that outlive a forward that failed; they do not count. And another thread that took a parameter itself
(not a state dict, not a view) during a forward in grad mode, where autograd holds parameters too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._torch import storage_id, storage_users
from .codec import PLAIN, codec_of, own_copy
from .handle import Away
from .inputs import map_leaves


class Holders(NamedTuple):
    """How often a slot's memory and the tensors over it are referred to.

    Args:
        memory: tensors over the memory, and a constant.
        tensors: references to the Python objects that stand in the model while they are lent, and a constant.
    """

    memory: int
    tensors: int


def count_holders(memory: Tensor, tensors: Sequence[Tensor]) -> Holders:
    """Count those who hold a slot's memory, or tensors over it, while the model refers to none of these."""
    return Holders(storage_users(memory), sum(map(sys.getrefcount, tensors)))


def own_copies(output: Any, storages: frozenset[int]) -> Any:
    """A forward's output, with a copy in place of each tensor that lies in one of these storages.

    Args:
        output: anything; tensors are looked for in lists, tuples, dicts and dataclasses.
        storages: `storage_id` of memory that is about to change.
    """

    if type(output) is Tensor and storage_id(output) not in storages:
        return output  # the usual case, in less time

    def own(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, Away) or value.layout != torch.strided:
            return value
        if storage_id(value) not in storages:
            return value
        return value.clone() if codec_of(value) is PLAIN else own_copy(value)

    return map_leaves(own, output)
