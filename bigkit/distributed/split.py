"""One process's share of a list, tensor, dict of columns and the like, as the same type.

    split(["a dog", "a cat", "a chicken"], num_processes=2, process_index=0)  ->  ["a dog", "a cat"]

Which positions a process gets is the arithmetic of `shares.py`; here they are taken out of whatever the user has.

Leaves out: who the processes are (`state.py`), and putting their results together again (`gather.py`).
"""

from __future__ import annotations

import copy
import sys
from collections import UserDict
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from .shares import padded_length, share

T = TypeVar("T")
SPLITTABLE = "a list, tuple, range, dict of these, torch.Tensor, numpy.ndarray, datasets.Dataset or BatchEncoding"


def split(inputs: T, num_processes: int, process_index: int, apply_padding: bool = False) -> T:
    """One process's share of `inputs`: contiguous, in order; the first processes take the remainder.

    `inputs` are never changed. A share of a list, tuple, range or dict is a new one; one of a tensor or array is a view
    (padded: a copy), on the device where the tensor is.

    Args:
        inputs: a list, tuple, range, tensor (cut along dimension 0), ndarray, `datasets.Dataset`, `BatchEncoding`, or a
            dict of these, nested if you like: its values are columns of the same length.
        num_processes: how many share it.
        process_index: whose share.
        apply_padding: repeat the last item until all shares are equally long (`gather_for_results` drops it again). A
            range to which items are added becomes a list.

    Returns:
        The same type as `inputs`, with 0 items if there are too few.

    Raises:
        TypeError: anything else. A text would be cut into letters, a set has no order, and what cannot be cut would go
            whole to every process, which would then do all of the work.
        ValueError: columns of different lengths, the tokens of a single text, or a tensor without dimensions.

    >>> split(["a dog", "a cat", "a chicken"], 2, 1, apply_padding=True)
    ['a chicken', 'a chicken']
    >>> split({"id": range(3), "text": ["x", "y", "z"]}, 2, 0)
    {'id': range(0, 2), 'text': ['x', 'y']}
    """
    length = len_of(inputs)
    positions = share(length, num_processes, process_index)
    missing = padded_length(length, num_processes) - len(positions) if apply_padding and length else 0
    return map_columns(lambda column: take(column, positions, missing), inputs)


def take(column: Any, positions: range, missing: int = 0) -> Any:
    """The items at `positions`, then the last item of all `missing` times, as the type of `column`."""
    padded = [*positions, *[len(column) - 1] * missing]
    if is_a("datasets", "Dataset", column):
        return column.select(padded)
    if not missing:
        return column[positions.start : positions.stop]
    if isinstance(column, (list, tuple, range)):
        return (tuple if isinstance(column, tuple) else list)(column[position] for position in padded)
    return column[padded]  # a tensor or an array


def map_columns(function: Callable[[Any], Any], inputs: Any) -> Any:
    """`inputs` with `function` applied to each column: the values of a dict, nested ones too, or else `inputs`."""
    if not isinstance(inputs, (dict, UserDict)):
        return function(inputs)
    mapped = copy.copy(inputs)
    for name, column in inputs.items():
        mapped[name] = map_columns(function, column)
    encodings, make = getattr(inputs, "encodings", None), cast(Any, type(inputs))
    if encodings is None:
        return mapped
    # A fast tokenizer's output: `tokens(0)`, `char_to_token` and the like read its encodings, one for each text.
    return make(dict(mapped), function(encodings))


def len_of(inputs: object, path: str = "inputs") -> int:
    """How many items `inputs` hold: the common length of the columns of a dict, else its own.

    Raises:
        TypeError, ValueError: as `split`.

    >>> len_of({"a": [1, 2], "b": {"c": (3, 4)}})
    2
    """
    if isinstance(inputs, (dict, UserDict)):
        if isinstance(inputs, UserDict) and has_no_rows(inputs.get("input_ids")):
            raise ValueError(f"{path} holds the tokens of one text, which would be cut apart: tokenize a list of texts")
        lengths = {f"{path}[{name!r}]": len_of(column, f"{path}[{name!r}]") for name, column in inputs.items()}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise ValueError(f"the columns of {path} differ in length: {counts}. Give each as many items as the others")
        return next(iter(lengths.values()), 0)
    kind = type(inputs).__name__
    if isinstance(inputs, (str, bytes, bytearray)):
        text = f"{path} is one {kind} ({inputs[:30]!r})"
        raise TypeError(f"{text}, which would be cut into letters: put it in a list")
    if isinstance(inputs, torch.Tensor) or is_a("numpy", "ndarray", inputs):
        if not inputs.ndim:  # type: ignore[attr-defined]
            raise ValueError(f"{path} is a {kind} without dimensions: expected one item a row")
    elif is_record(inputs) or not (isinstance(inputs, (list, tuple, range)) or is_a("datasets", "Dataset", inputs)):
        raise TypeError(f"cannot split {path}, a {kind}: expected {SPLITTABLE}. Turn it into a list first")
    return len(inputs)  # type: ignore[arg-type]


def is_a(module: str, name: str, thing: object) -> bool:
    """Whether `thing` is of a class of a library that may be missing; if it is, the library has been imported."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(thing, kind)


def is_record(thing: object) -> bool:
    """Whether `thing` is a named tuple: its fields are no items."""
    return isinstance(thing, tuple) and hasattr(thing, "_fields")


def has_no_rows(token_ids: Any) -> bool:
    """Whether token ids are those of one text, plain numbers, instead of one row for each text."""
    if hasattr(token_ids, "ndim"):
        return bool(token_ids.ndim == 1)
    return isinstance(next(iter(token_ids or ()), None), int)
