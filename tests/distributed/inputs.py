"""Every type that can be split, how to compare two of them, and an oracle that joins them."""

import copy
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding


def dataset(n: int) -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({"id": list(range(n)), "text": [f"prompt {i}" for i in range(n)]})


def encoding(n: int) -> BatchEncoding:
    return BatchEncoding({"input_ids": torch.arange(2 * n).view(n, 2), "length": [2] * n})


# Every type that can be split, with n items in it.
MAKERS = {
    "list": lambda n: [f"prompt {i}" for i in range(n)],
    "tuple": lambda n: tuple(range(n)),
    "range": lambda n: range(3, 3 + 2 * n, 2),
    "tensor": lambda n: torch.arange(3 * n, dtype=torch.float32).view(n, 3),
    "bfloat16": lambda n: torch.arange(n).to(torch.bfloat16),
    "bool": lambda n: torch.arange(n) % 2 == 0,
    "no width": lambda n: torch.zeros(n, 0),
    "ndarray": lambda n: np.arange(2 * n).reshape(n, 2),
    "objects": lambda n: np.array([f"prompt {i}" for i in range(n)], dtype=object),
    "dict": lambda n: {"id": list(range(n)), "x": torch.arange(n), "y": np.arange(n)},
    "nested": lambda n: {"a": {"b": list(range(n)), "c": {"d": tuple(range(n))}}, "e": torch.arange(n)},
    "ordered": lambda n: OrderedDict(b=list(range(n)), a=tuple(range(n))),
    "encoding": encoding,
    "dataset": dataset,
}


def same(one: Any, other: Any) -> bool:
    """Equal in type, order and content."""
    if isinstance(one, range):
        return list(one) == list(other)
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if hasattr(one, "column_names"):
        return one.to_dict() == other.to_dict()
    if hasattr(one, "items"):
        return list(one) == list(other) and all(same(one[name], other[name]) for name in one)
    return bool(one == other)


def join(parts: list[Any]) -> Any:
    """Shares put together by hand, an oracle for `gather_for_results`."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(parts)
    if isinstance(first, np.ndarray):
        return np.concatenate(parts)
    if isinstance(first, range):
        return [item for part in parts for item in part]
    if hasattr(first, "column_names"):
        import datasets

        return datasets.concatenate_datasets(parts)
    if hasattr(first, "items"):
        made = copy.copy(first)
        for name in first:
            made[name] = join([part[name] for part in parts])
        return made
    return type(first)(item for part in parts for item in part)
