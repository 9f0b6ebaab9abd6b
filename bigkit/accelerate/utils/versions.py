"""`accelerate.utils.versions`: comparing versions of libraries."""

from __future__ import annotations

import operator
from importlib.metadata import version
from typing import Any

import torch
from torch.torch_version import TorchVersion

_OPERATORS: dict[str, Any] = {
    ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne, "<=": operator.le, "<": operator.lt,
}  # fmt: skip


def compare_versions(library_or_version: Any, operation: str, requirement_version: str) -> bool:
    """Compare the version of an installed library, or a version, with another.

    >>> compare_versions("torch", ">=", "1.0")
    True
    """
    if operation not in _OPERATORS:
        raise ValueError(f"unknown operation {operation!r}: expected one of {', '.join(_OPERATORS)}")
    if isinstance(library_or_version, str) and not library_or_version[:1].isdigit():
        library_or_version = version(library_or_version)
    return bool(_OPERATORS[operation](TorchVersion(str(library_or_version)), requirement_version))


def is_torch_version(operation: str, version: str) -> bool:
    """Compare PyTorch's version with another."""
    return compare_versions(torch.__version__, operation, version)
