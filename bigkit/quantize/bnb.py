"""Quantized weights as bitsandbytes holds them: made, taken apart, put together.

A quantized weight is several tensors. LLM.int8 has the codes (`weight`, int8) and a scale for each row (`SCB`). A 4-bit
weight has two codes in each byte, a scale for each block of 64 (`absmax`) and the 16 values that a code stands for
(`quant_map`); with double quantization the scales are 8-bit codes too, with scales (`nested_absmax`) and a table
(`nested_quant_map`) of their own, and the mean (`offset`) that was subtracted before.

`take_apart` gives those that grow with the weight, and `put_together` makes a weight around others like them, which may
be views of any memory: that is how a quantized weight travels (`CODECS` of `offload/codec.py`).

Leaves out: how a checkpoint stores them (`stored.py`), the layers that multiply with them (`layers.py`), which layers
are quantized (`load.py`), and the arithmetic, which is bitsandbytes' own. Sources: Dettmers et al., "LLM.int8()"
(2022), "QLoRA" (2023).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.fits import NESTED
from ..offload.codec import CODECS, TensorCodec
from . import _bnb

SLICE = 2**18  # weights that are quantized at a time on a CPU: whole blocks


@cache
def bitsandbytes() -> ModuleType:
    """The library; its weights can travel from then on.

    Raises:
        ImportError: it is not installed, or does not run here.
    """
    try:
        with _bnb.without(_bnb.KERNEL_WARNING), _bnb.compiling_later():
            import bitsandbytes
    except Exception as error:  # a native library that is missing or too new fails in its own way
        raise ImportError(
            f"8-bit and 4-bit weights need bitsandbytes, which cannot be imported here ({error}): "
            "pip install 'bitsandbytes>=0.46'; everything else in bigkit works without it"
        ) from error
    for cls, suffixes in (("Params4bit", ("", "absmax", "nested_absmax")), ("Int8Params", ("", "SCB"))):
        codec = TensorCodec(take_apart, put_together, skeleton, suffixes, nbytes, _bnb.give_scales_back)
        CODECS[getattr(bitsandbytes.nn, cls)] = codec
    return bitsandbytes


def empty_layer(
    module: nn.Module, inputs: int, outputs: int, quantization: str, threshold: float, dtype: torch.dtype | None
) -> nn.Module:
    """A layer of bitsandbytes on meta, for weights of shape (outputs, inputs).

    Args:
        module: the layer whose place it takes: it has a bias if that one has.
        inputs, outputs: features.
        quantization: one of `QUANTIZATIONS` of `model/spec.py`.
        threshold: inputs of this magnitude or more are outliers (int8).
        dtype: what weights become to be multiplied (4 bit).
    """
    bitsandbytes()
    from .layers import Linear4bit, Linear8bitLt

    bias = module.bias is not None
    if quantization == "int8":
        return Linear8bitLt(inputs, outputs, bias, has_fp16_weights=False, threshold=threshold, device="meta")
    kind, _, double = quantization.partition("-")
    return Linear4bit(inputs, outputs, bias, dtype, bool(double), kind, device="meta")


def has_outliers(x: Tensor, threshold: float) -> bool:
    """Whether there are outliers of LLM.int8: values that reach the threshold, or are NaN."""
    return not torch.linalg.vector_norm(x, math.inf).item() < threshold


# ---------------------------------------------------------------------------------------------------------------------
# Making


def int8_weight(codes: Tensor, scales: Tensor) -> nn.Parameter:
    """A weight of a `Linear8bitLt`: `codes` (out, in) int8, `scales` (out,) float32."""
    weight: nn.Parameter = bitsandbytes().nn.Int8Params(codes, requires_grad=False, CB=codes, SCB=scales)
    return weight


def int4_weight(codes: Tensor, state: Any) -> nn.Parameter:
    """A weight of a `Linear4bit`: `codes` (n / 2, 1) uint8 and their `QuantState`."""
    weight: nn.Parameter = bitsandbytes().nn.Params4bit(
        codes, requires_grad=False, quant_state=state, blocksize=state.blocksize, compress_statistics=state.nested,
        quant_type=state.quant_type, quant_storage=codes.dtype, bnb_quantized=True,
    )  # fmt: skip
    return weight


def quantized(weight: Tensor, quantization: str, blocksize: int = 64) -> nn.Parameter:
    """A weight quantized where it lies.

    Args:
        weight: (out, in), floating.
        quantization: one of `QUANTIZATIONS` of `model/spec.py`.
        blocksize: weights that share a scale (4 bit).

    >>> parts = take_apart(quantized(torch.randn(8, 64), "nf4"))
    >>> {name: (tuple(part.shape), part.dtype) for name, part in parts.items()}
    {'': ((256, 1), torch.uint8), 'absmax': ((8,), torch.float32)}
    """
    functional = bitsandbytes().functional
    weight = weight.contiguous()
    # On a CPU bitsandbytes needs ten times the memory of its input: it gets a slice at a time.
    slice_size = SLICE if weight.device.type == "cpu" else max(weight.numel(), 1)
    if quantization == "int8":
        rows = weight.split(max(1, slice_size // weight.shape[1]))
        slices = [functional.int8_vectorwise_quant(part.to(torch.float16))[:2] for part in rows]
        return int8_weight(torch.cat([codes for codes, _ in slices]), torch.cat([scales for _, scales in slices]))
    kind, _, double = quantization.partition("-")
    slices = [
        functional.quantize_4bit(part, blocksize=blocksize, quant_type=kind)
        for part in weight.view(-1).split(slice_size)
    ]
    state = slices[0][1]
    state.absmax, state.shape = torch.cat([part.absmax for _, part in slices]), weight.shape
    if double:
        state.offset = state.absmax.mean()
        state.absmax, state.state2 = functional.quantize_blockwise(state.absmax - state.offset, blocksize=NESTED)
        state.nested = True
    return int4_weight(torch.cat([codes for codes, _ in slices]), state)


# ---------------------------------------------------------------------------------------------------------------------
# Taking apart and putting together


def is_quantized(tensor: object) -> bool:
    """Whether a tensor is a weight that bitsandbytes has quantized (told by its class's name: imports nothing)."""
    if hasattr(tensor, "streamer"):  # a handle (`offload/handle.py`): it has no data
        return False
    classes = {cls.__name__ for cls in type(tensor).__mro__}
    if "Params4bit" in classes:
        return getattr(tensor, "quant_state", None) is not None
    return "Int8Params" in classes and getattr(tensor, "SCB", None) is not None


def take_apart(weight: Tensor) -> dict[str, Tensor]:
    """The tensors of a quantized weight that travel with it, "" for the codes; no copies.

    Raises:
        ValueError: it is not quantized, or a forward on the CPU has packed it anew.
    """
    if not is_quantized(weight):
        raise ValueError(f"a {type(weight).__name__} of shape {tuple(weight.shape)} is no quantized weight")
    state = getattr(weight, "quant_state", None)
    if state is None:
        return {"": weight.data, "SCB": weight.SCB}  # type: ignore[attr-defined]
    if _bnb.is_packed_anew(state):
        raise ValueError("a 4-bit weight was packed anew for this CPU by a forward, which rounded its scales")
    nested = {"nested_absmax": state.state2.absmax} if state.nested else {}
    return {"": weight.data, "absmax": state.absmax, **nested}


def put_together(like: Tensor, parts: Mapping[str, Tensor], tables: torch.device | str | None = None) -> nn.Parameter:
    """A weight like another one, around these tensors: what `take_apart` gave, copied or moved. They are not copied.

    Args:
        like: a quantized weight, which may be a `skeleton`. Its tables and mean, which are small, are copied.
        parts: the tensors, by the names that `take_apart` gives them.
        tables: the device of the copied tables; None takes that of the codes.
    """
    codes = parts[""]
    state: Any = copy.copy(getattr(like, "quant_state", None))
    if state is None:
        return int8_weight(codes, parts["SCB"])
    device = codes.device if tables is None else tables
    state.absmax, state.code = parts["absmax"], state.code.to(device)
    if state.nested:
        state.offset, state.state2 = state.offset.to(device), copy.copy(state.state2)
        state.state2.absmax, state.state2.code = parts["nested_absmax"], state.state2.code.to(device)
    return int4_weight(codes, state)


def skeleton(weight: Tensor) -> nn.Parameter:
    """A weight like this one on meta: only the tables and the mean of a 4-bit weight are there, in RAM."""
    return put_together(weight, {name: part.to("meta") for name, part in take_apart(weight).items()}, tables="cpu")


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor, or of all tensors that a quantized weight consists of."""
    if not is_quantized(tensor):
        return tensor.nbytes
    state = getattr(tensor, "quant_state", None)
    tables = [] if state is None else [state.code, *([state.state2.code, state.offset] if state.nested else [])]
    return sum(part.nbytes for part in (*take_apart(tensor).values(), *tables))


def block_scales(weight: Tensor) -> Tensor:
    """The scales of a 4-bit weight, one for each block: (blocks,) float32.

    Raises:
        ValueError: it is no 4-bit weight.
    """
    scales = take_apart(weight).get("absmax")
    state: Any = getattr(weight, "quant_state", None)
    if scales is None:
        raise ValueError("an int8 weight has no 4-bit codes: expected one in nf4 or fp4")
    if state.nested:
        scales = bitsandbytes().functional.dequantize_blockwise(scales, state.state2) + state.offset
    return scales.float()


def dequantized(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The numbers that a 4-bit weight stands for, in plain torch: what bitsandbytes computes elsewhere, bit for bit.

    Args:
        weight: quantized to 4 bit, on any device.
        dtype: of the result; None takes that of the weight before it was quantized.

    Returns:
        (out, in).

    >>> dequantized(quantized(torch.eye(4, 96), "nf4")).equal(torch.eye(4, 96))
    True
    """
    scales = block_scales(weight)
    state: Any = weight.quant_state  # type: ignore[attr-defined]
    count = math.prod(state.shape)
    pairs = weight.data.view(torch.uint8).view(-1)  # two codes in a byte, the first in the upper half
    values = state.code[torch.stack((pairs >> 4, pairs & 15), 1).view(-1)[:count].int()]
    values *= scales.repeat_interleave(state.blocksize)[:count]
    return values.view(state.shape).to(dtype or state.dtype)
