"""Where a module's inputs are, and bringing them to another device.

Leaves out: when that is done (`offload/hooks.py`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


def send_to_device(value: Any, device: torch.device, skip_keys: Iterable[str] = ()) -> Any:
    """Tensors in nested lists, tuples, dicts, dataclasses and objects with a `to` method, on a device.

    Args:
        value: anything; what is no tensor and holds none comes back as it is, and so does what is there already.
        device: where to.
        skip_keys: keys of dicts whose values stay where they are.

    >>> send_to_device({"x": [torch.ones(1)], "n": 3}, torch.device("meta"))
    {'x': [tensor(..., device='meta', size=(1,))], 'n': 3}
    """

    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device)

    def send(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return send_to_device(leaf, device)
        if isinstance(leaf, nn.Module) or not callable(getattr(leaf, "to", None)):
            return leaf
        return leaf.to(device)  # a PackedSequence knows what of it stays on the CPU

    return map_leaves(send, value, skip_keys)


def map_leaves(change: Callable[[Any], Any], value: Any, skip_keys: Iterable[str] = ()) -> Any:
    """A copy of nested lists, tuples, dicts and dataclasses with what lies in them changed.

    Args:
        change: what lies in a container (mostly a tensor) -> what is to lie there. Objects with a `to` method count as
            such too.
        value: anything; a container in which nothing changes comes back itself.
        skip_keys: keys of dicts whose values stay as they are.

    >>> map_leaves(lambda leaf: leaf + 1, {"x": [1, (2,)], "y": 3}, ["y"])
    {'x': [2, (3,)], 'y': 3}
    """
    if isinstance(value, (Tensor, PackedSequence, str, bytes, int, float, type(None), torch.device, torch.dtype)):
        return change(value)
    if isinstance(value, (list, tuple)):
        items = [map_leaves(change, item, skip_keys) for item in value]
        if all(new is old for new, old in zip(items, value)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        pairs = {k: item if k in skip_keys else map_leaves(change, item, skip_keys) for k, item in value.items()}
        if all(pairs[key] is item for key, item in value.items()):
            return value
        if isinstance(value, defaultdict):
            return defaultdict(value.default_factory, pairs)
        return type(value)(pairs)  # type: ignore[call-arg]
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, nn.Module)) and not hasattr(value, "to"):
        pairs = {k: map_leaves(change, item, skip_keys) for k, item in vars(value).items() if k not in skip_keys}
        if all(getattr(value, key) is item for key, item in pairs.items()):
            return value
        changed = copy.copy(value)
        for key, item in pairs.items():
            object.__setattr__(changed, key, item)  # it may be frozen
        return changed
    return change(value)


def find_device(value: Any) -> torch.device | None:
    """The device of the first tensor in nested lists, tuples and dicts.

    >>> find_device([1, {"x": torch.ones(1)}])
    device(type='cpu')
    """
    if isinstance(value, Tensor):
        return value.device
    if isinstance(value, (list, tuple, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            if (device := find_device(item)) is not None:
                return device
    return None


def torch_device(device: torch.device | str | int) -> torch.device:
    """A device as PyTorch names it: 0 and "cuda" are cuda:0.

    >>> torch_device(1)
    device(type='cuda', index=1)
    """
    named = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device("cuda", 0) if named.type == "cuda" and named.index is None else named
