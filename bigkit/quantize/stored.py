"""Quantized weights as a checkpoint stores them, in the keys that Transformers writes.

    int8    `weight` (codes), `SCB` (a scale for each row), `weight_format` (0: the codes lie row after row)
    4 bit   `weight` (codes), `weight.absmax`, `weight.quant_map`, with double quantization `weight.nested_absmax` and
            `weight.nested_quant_map`, and `weight.quant_state.bitsandbytes__nf4` (or fp4): JSON in a tensor of bytes,
            with the shape, the mean of the scales and all else that is no tensor

A kernel reads as far as these claim, so `from_stored` checks each against the model first. Source: `QuantState.as_dict`
of bitsandbytes.

Leaves out: reading the tensors (`checkpoints/load.py`), and writing them (`checkpoints/save.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.fits import NESTED
from ..checkpoints.format import CheckpointError
from .bnb import bitsandbytes, int4_weight, int8_weight, take_apart

PACKED = "quant_state.bitsandbytes__"  # and "nf4" or "fp4": the key of the JSON
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_FLOATS = ("float32", "float16", "bfloat16")
_FACTS = ("quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset")


def stored_kind(keys: Container[str], name: str) -> str | None:
    """How the weight called `name` is stored among the keys of a checkpoint: "int8", "nf4", "fp4", or None if plain."""
    for kind in ("nf4", "fp4"):
        if f"{name}.{PACKED}{kind}" in keys:
            return kind
    return "int8" if name.removesuffix("weight") + "SCB" in keys else None


def stored_keys(name: str, kind: str) -> list[str]:
    """The keys under which the weight called `name` may be stored: the codes first, last what Python reads."""
    if kind == "int8":
        base = name.removesuffix("weight")
        return [name, f"{base}SCB", f"{base}weight_format"]
    ends = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", f"{PACKED}{kind}")
    return [name, *(f"{name}.{end}" for end in ends)]


def travelling_keys(name: str, weight: Tensor) -> dict[str, str]:
    """Part, as `take_apart` calls it -> the key under which it is stored."""
    base = name.removesuffix("weight")
    return {part: f"{base}SCB" if part == "SCB" else f"{name}.{part}" if part else name for part in take_apart(weight)}


def from_stored(name: str, shape: tuple[int, int], quantization: str, tensors: Mapping[str, Tensor]) -> nn.Parameter:
    """The weight that stored tensors make, once they have been checked.

    Args:
        name: the weight's full name.
        shape: (out, in) in the model.
        quantization: what it is expected to be, one of `QUANTIZATIONS` of `model/spec.py`.
        tensors: by the names of `stored_keys`, on their device; the last of them may be anywhere.

    Raises:
        CheckpointError: names the tensor and what is wrong with it.
    """
    if quantization == "int8":
        base = name.removesuffix("weight")
        order = tensors.get(f"{base}weight_format")
        if order is not None and (order.numel() != 1 or order.item() != 0):
            raise CheckpointError(f"{base}weight_format is {order.tolist()}, expected 0 (codes row after row)")
        return int8_weight(
            _checked(tensors, name, name, shape, torch.int8),
            _checked(tensors, f"{base}SCB", name, shape[:1], torch.float32),
        )
    kind, _, double = quantization.partition("-")
    label = f"{name}.{PACKED}{kind}"
    facts = _read_json(label, tensors[label])
    _check_facts(facts, label, name, shape, quantization)
    elements = math.prod(shape)
    blocks = math.ceil(elements / facts["blocksize"])
    forms = {
        "absmax": (blocks, torch.uint8 if double else torch.float32),
        "quant_map": (16, torch.float32),
        **({"nested_absmax": (math.ceil(blocks / NESTED), torch.float32)} if double else {}),
        **({"nested_quant_map": (256, torch.float32)} if double else {}),
    }
    parts = {end: _checked(tensors, f"{name}.{end}", name, (size,), dtype) for end, (size, dtype) in forms.items()}
    codes = _checked(tensors, name, name, (math.ceil(elements / 2), 1), torch.uint8)
    known = {key: facts[key] for key in _FACTS if key in facts}
    state = bitsandbytes().functional.QuantState.from_dict({**known, **parts}, device=codes.device)
    return int4_weight(codes, state)


def _read_json(label: str, packed: Tensor) -> dict[str, Any]:
    try:
        facts = json.loads(bytes(packed.cpu().to(torch.uint8).tolist()).decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{label} is no valid JSON: {error}") from error
    if not isinstance(facts, dict):
        raise CheckpointError(f"{label} is a {type(facts).__name__}, expected an object")
    return facts


def _check_facts(facts: dict[str, Any], label: str, name: str, shape: tuple[int, int], quantization: str) -> None:
    """Compare the JSON of a 4-bit weight with the model and with what is expected."""
    kind, _, double = quantization.partition("-")
    known = facts.get("quant_type") == kind and facts.get("dtype") in _FLOATS and facts.get("blocksize") in BLOCKSIZES
    if not known:
        raise CheckpointError(f"{label} says {facts}, expected quant_type {kind!r}, a blocksize and a dtype")
    if facts.get("shape") != list(shape):
        raise CheckpointError(f"{name} was quantized from shape {facts.get('shape')}, the model has {list(shape)}")
    nested = "nested_blocksize" in facts
    if nested != bool(double):
        stored = f"{kind}-double" if nested else kind
        raise CheckpointError(f"{name} is stored as {stored}, expected {quantization}: see bnb_4bit_use_double_quant")
    if not nested:
        return
    if facts["nested_blocksize"] != NESTED or facts.get("nested_dtype") != "float32":
        raise CheckpointError(f"{label} says {facts}, expected nested_blocksize {NESTED} and float32")
    if not isinstance(facts.get("nested_offset"), (int, float)):
        raise CheckpointError(f"{label} has the nested_offset {facts.get('nested_offset')!r}, expected a number")


def _checked(tensors: Mapping[str, Tensor], key: str, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A stored tensor that is there and has the form that is expected."""
    if key not in tensors:
        raise CheckpointError(f"{key} is missing, without which {name} cannot be read")
    tensor = tensors[key]
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise CheckpointError(f"{key} is {tuple(tensor.shape)} {tensor.dtype}, expected {shape} {dtype}")
    return tensor
