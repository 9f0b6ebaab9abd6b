"""Writing one safetensors file, one tensor in memory at a time.

Leaves out: which tensors go into which file (`save.py`, `shards.py`). Format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..model.header import CheckpointError as CheckpointError
from ..units import listed
from .format import NAMES


class Form(NamedTuple):
    """What a tensor is, without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def check_dtypes(forms: Mapping[str, Form]) -> None:
    """Make sure that a safetensors file can hold tensors.

    Raises:
        ValueError: it has no name for a dtype.
    """
    if nameless := [name for name, form in forms.items() if form.dtype not in NAMES]:
        dtype = str(forms[nameless[0]].dtype).removeprefix("torch.")
        raise ValueError(f"{listed(nameless)} is {dtype}, which safetensors files cannot hold: convert it first")


def write_safetensors(file: BinaryIO, forms: Mapping[str, Form], read: Callable[[str], Tensor]) -> None:
    """Write tensors into an empty file, one after another, so that no more than one is in memory.

    Args:
        file: where to.
        forms: name -> shape and dtype, checked by `check_dtypes`; large elements are written first, else in this order.
        read: name -> the tensor, on any device.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # which Transformers asks for
    end = 0
    order = sorted(forms, key=lambda name: -forms[name].dtype.itemsize)  # so that each starts at a multiple of its own
    for name in order:
        shape, dtype = forms[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        plain = read(name).detach().to("cpu").resolve_conj().resolve_neg().contiguous()
        file.write(plain.reshape(-1).view(torch.uint8).numpy().data)
