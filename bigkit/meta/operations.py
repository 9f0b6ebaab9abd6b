"""What a call of a torch operation reads, writes and returns: from its schema, and from the tensors in its arguments.

Leaves out: what is done with such calls (`empty.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, UntypedStorage

META = torch.device("meta")


class Signature:
    """What the schema of an operation says.

    Args:
        func: the operation, with an overload: `torch.ops.aten.add.Tensor`.
    """

    def __init__(self, func: Any) -> None:
        schema = func._schema
        arguments = list(enumerate(schema.arguments))
        self.writes = [(i, arg.name) for i, arg in arguments if arg.alias_info and arg.alias_info.is_write]
        self.takes_device = any(argument.name == "device" for argument in schema.arguments)
        self.takes_dtype = any(argument.name == "dtype" and argument.kwarg_only for argument in schema.arguments)
        self.returns_tensors = any("Tensor" in str(result.type) for result in schema.returns)
        self.is_view = any(result.alias_info and not result.alias_info.is_write for result in schema.returns)
        self.only_shape = schema.name.endswith("_like") or schema.name.startswith("aten::new_")
        random = schema.name.endswith("_") and torch.Tag.nondeterministic_seeded in func.tags
        self.initialises = random or schema.name in ("aten::fill_", "aten::zero_")

    def written(self, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors that a call changes in place."""
        return tensors_in([args[i] if i < len(args) else kwargs.get(name) for i, name in self.writes])

    def creates(self, tensors: list[Tensor], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call makes a tensor without looking at any values, or moves one to meta."""
        if not self.takes_device or kwargs.get("layout") not in (None, torch.strided):
            return False
        return self.only_shape or kwargs.get("device") == META or not tensors


@cache
def signature_of(func: Any) -> Signature:
    """The signature of an operation, read once."""
    return Signature(func)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `function` applied to every tensor in its lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([map_tensors(function, item) for item in value])
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in `value`, in the order of `map_tensors`."""
    if isinstance(value, Tensor):
        return [value]
    tensors: list[Tensor] = []
    if isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, (Tensor, list, tuple, dict)):
                tensors += tensors_in(item)
    return tensors


def replace_tensors(function: Callable[[Tensor], Tensor], value: Any, around: tuple[int, ...] = ()) -> Any:
    """`value` with `function` applied to every tensor in it: lists and dicts are changed in place, tuples made anew.

    Args:
        around: ids of the containers that it lies in, for a list may hold itself.
    """
    if isinstance(value, Tensor):
        return function(value)
    if not isinstance(value, (tuple, list, dict)) or id(value) in around:
        return value
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    replaced = [(key, replace_tensors(function, item, (*around, id(value)))) for key, item in items]
    changed = [(key, new) for (key, new), (_, old) in zip(replaced, items, strict=True) if new is not old]
    if isinstance(value, tuple) and changed:
        new_items = [item for _, item in replaced]
        return type(value)(*new_items) if hasattr(value, "_fields") else type(value)(new_items)
    for key, item in changed:
        value[key] = item  # type: ignore[index]
    return value


def storages_of(tensors: Iterable[Tensor]) -> set[UntypedStorage]:
    """The storages that tensors lie in."""
    return {tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided}


def to_meta(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and dtype without data."""
    if tensor.is_meta or tensor.layout != torch.strided:
        return tensor
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=META)
