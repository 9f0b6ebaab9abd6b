"""Files of pickled tensors (`.bin`, `.pt`): those that `torch.save` wrote, and the dicts in them that hold tensors.

Leaves out: which of the dicts is wanted, and what is found in it (`format.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.header import CheckpointError, no_weights


def read_pickle(file: Path) -> dict[str, dict[str, Any]]:
    """The dicts in a `.bin` file that hold tensors, each under the key that leads there, "" for the outermost.

    Files of before PyTorch 1.6 are read too. Nothing in a file is ever executed.

    Raises:
        CheckpointError: it holds no dict, or something else than tensors and plain values.
    """
    with open(file, "rb") as stream:
        start = stream.read(256)
    if fault := no_weights(start):
        raise CheckpointError(f"{file} {fault}")
    try:  # before PyTorch 1.6 files were no zip archives, and such files cannot be mapped
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=start[:4] == b"PK\3\4")
    except Exception as error:  # every broken pickle fails in its own way
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{file} is no file of tensors that can be loaded safely: {reason}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, expected a dict of tensors by name")
    return dict(_by_key(content))


def _by_key(content: dict[str, Any], key: str = "", depth: int = 3) -> Iterator[tuple[str, dict[str, Any]]]:
    """A dict, and dicts in it that hold tensors, each with the key that leads there."""
    if not key or tensors_of(content):
        yield key, content
    for name, value in content.items():
        if depth and isinstance(value, dict) and all(isinstance(inner, str) for inner in value):
            yield from _by_key(value, f"{key}.{name}" if key else name, depth - 1)


def tensors_of(content: dict[str, Any]) -> dict[str, Tensor]:
    """What of a dict is a tensor."""
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}
