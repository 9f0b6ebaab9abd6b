"""Quantized weights as bitsandbytes holds them: made, taken apart, put together, and read from a checkpoint.

A quantized weight is several tensors. LLM.int8 has the codes (`weight`, int8) and a scale for each row (`SCB`). A 4-bit
weight has two codes in each byte, a scale for each block of 64 (`absmax`) and the 16 values that a code stands for
(`quant_map`); with double quantization the scales are 8-bit codes too, with scales (`nested_absmax`) and a table
(`nested_quant_map`) of their own and a mean (`offset`) that was taken off before.

`take_apart` gives those that grow with the weight, and `put_together` makes a weight around others like them, which may
be views of any memory: that is how a quantized weight travels (`CODECS`). A checkpoint has the names that
Transformers writes: the mean and what else is no tensor stand there as JSON in a tensor of bytes
(`quant_state.bitsandbytes__nf4`).

Leaves out: which layers are quantized, and loading them (`quantize/load.py`); the arithmetic, which is bitsandbytes'
own. Sources: Dettmers et al., "LLM.int8()" (2022), "QLoRA" (2023); `QuantState.as_dict` of bitsandbytes.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Container, Mapping
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.format import CheckpointError
from ..offload.codec import CODECS, TensorCodec

PACKED = "quant_state.bitsandbytes__"  # and "nf4" or "fp4": the JSON
_FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256  # scales that share a scale of their own
SLICE = 2**18  # weights that are quantized at a time on a CPU: whole blocks


@cache
def bitsandbytes() -> ModuleType:
    """The library; its weights can travel from then on.

    Raises:
        ImportError: it is not installed, or does not run here.
    """
    # It warns on some CPUs of a kernel that it cannot download, which bigkit's layers would not use; and in every
    # forward of every int8 layer that inputs are rounded to float16, which is how LLM.int8 works.
    for module in ("backends.cpu.ops", "autograd._functions"):
        logging.getLogger(f"bitsandbytes.{module}").addFilter(_matters)
    try:
        import bitsandbytes
    except Exception as error:  # a native library that is missing or too new fails in its own way
        raise ImportError(
            f"8-bit and 4-bit weights need bitsandbytes, which cannot be imported here ({error}): "
            "pip install 'bitsandbytes>=0.46'; everything else in bigkit works without it"
        ) from error
    for cls, suffixes in (("Params4bit", ("", "absmax", "nested_absmax")), ("Int8Params", ("", "SCB"))):
        CODECS[getattr(bitsandbytes.nn, cls)] = TensorCodec(take_apart, put_together, skeleton, suffixes, nbytes)
    return bitsandbytes


def _matters(record: logging.LogRecord) -> bool:
    return not any(words in str(record.msg) for words in ("gemm_4bit_forward", "inputs will be cast"))


@cache
def _linear_8bit() -> type[nn.Module]:
    bnb: Any = bitsandbytes()

    class Linear8bitLt(bnb.nn.Linear8bitLt):
        """bitsandbytes' layer, with a weight that stays whole: theirs takes the scales away when it first runs.

        Without outliers and gradients it calls the kernels itself, to the same bits and with less Python around them.
        """

        def forward(self, x: Tensor) -> Tensor:
            weight, state, bias = self.weight, self.state, self.bias
            if weight.SCB is None:  # not quantized yet
                return super().forward(x)
            learns = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
            if not (self.training or learns or torch.compiler.is_compiling()) and x.numel():
                rows = x.reshape(-1, self.in_features).to(torch.float16)
                if not state.threshold or not _reach(rows, state.threshold):
                    return _int8_product(rows, weight, bias, x.dtype).view(*x.shape[:-1], self.out_features)
            state.CB, state.SCB, weight.CB = weight.data, weight.SCB, None
            output: Tensor = super().forward(x)
            if not output.requires_grad:  # a backward needs them
                state.CB = state.SCB = None
            return output

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            super()._apply(fn, recurse)
            if self.weight is not None and self.weight.SCB is not None:
                self.weight.SCB = self.weight.SCB.to(self.weight.device)
            return self

    Linear8bitLt.__module__, Linear8bitLt.__qualname__ = __name__, "Linear8bitLt"
    return Linear8bitLt


def _reach(x: Tensor, threshold: float) -> bool:
    """Whether there are outliers of LLM.int8: values that reach the threshold, or are no numbers."""
    return not torch.linalg.vector_norm(x, math.inf).item() < threshold


def _int8_product(x: Tensor, weight: Any, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x (rows, in) float16, without outliers, times an int8 weight (out, in): (rows, out) in `dtype`."""
    kernels = torch.ops.bitsandbytes
    codes, scales, _ = kernels.int8_vectorwise_quant.default(x, 0.0)
    product = kernels.int8_linear_matmul.default(codes, weight.data)
    bias = None if bias is None else bias.to(dtype)
    output: Tensor = kernels.int8_mm_dequant.default(product, scales, weight.SCB, dtype=dtype, bias=bias)
    return output


@cache
def _linear_4bit() -> type[nn.Module]:
    bnb: Any = bitsandbytes()

    class Linear4bit(bnb.nn.Linear4bit):
        """bitsandbytes' layer, right on a CPU too where blocks of weights go on from one row to the next.

        Its kernel for CPUs with AVX512 then takes the wrong scales (seen in 0.50 with 32, 48, 96 and 160 inputs in
        blocks of 64): rounding off by tens of percents, and no error.
        """

        def forward(self, x: Tensor) -> Tensor:
            state = getattr(self.weight, "quant_state", None)
            if x.device.type != "cpu" or state is None or self.in_features % state.blocksize == 0:
                output: Tensor = super().forward(x)
                return output
            dtype = self.compute_dtype or x.dtype
            bias = None if self.bias is None else self.bias.to(dtype)
            return nn.functional.linear(x.to(dtype), dequantized(self.weight, dtype), bias).to(x.dtype)

    Linear4bit.__module__, Linear4bit.__qualname__ = __name__, "Linear4bit"
    return Linear4bit


def __getattr__(name: str) -> Any:
    if name == "Linear8bitLt":  # where pickle looks for it
        return _linear_8bit()
    if name == "Linear4bit":
        return _linear_4bit()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def empty_layer(module: nn.Module, inputs: int, outputs: int, quantization: str, threshold: float, dtype: Any) -> Any:
    """A layer of bitsandbytes on meta, for weights of shape (outputs, inputs).

    Args:
        module: what it stands for: has it a bias?
        inputs, outputs: features.
        quantization: one of `layers.QUANTIZATIONS`.
        threshold: of LLM.int8.
        dtype: that 4-bit weights are multiplied in.
    """
    bias = module.bias is not None
    if quantization == "int8":
        make: Any = _linear_8bit()
        return make(inputs, outputs, bias, has_fp16_weights=False, threshold=threshold, device="meta")
    kind, _, double = quantization.partition("-")
    layer: Any = _linear_4bit()(inputs, outputs, bias, dtype, bool(double), kind, device="meta")
    # It would pack the codes anew on some CPUs, in place, and round the scales: no longer what was loaded.
    layer.support_avx512bf16_for_cpu = False
    return layer


# ---------------------------------------------------------------------------------------------------------------------
# Making


def int8_weight(codes: Tensor, scales: Tensor) -> nn.Parameter:
    """A weight of a `Linear8bitLt`: `codes` (out, in) int8, `scales` (out,) float32."""
    made: nn.Parameter = bitsandbytes().nn.Int8Params(codes, requires_grad=False, CB=codes, SCB=scales)
    return made


def int4_weight(codes: Tensor, state: Any) -> nn.Parameter:
    """A weight of a `Linear4bit`: `codes` (n / 2, 1) uint8 and their `QuantState`."""
    made: nn.Parameter = bitsandbytes().nn.Params4bit(
        codes, requires_grad=False, quant_state=state, blocksize=state.blocksize, compress_statistics=state.nested,
        quant_type=state.quant_type, quant_storage=codes.dtype, bnb_quantized=True,
    )  # fmt: skip
    return made


def quantized(weight: Tensor, quantization: str) -> nn.Parameter:
    """A weight quantized where it lies.

    Args:
        weight: (out, in), floating.
        quantization: one of `layers.QUANTIZATIONS`.

    >>> parts = take_apart(quantized(torch.randn(8, 64), "nf4"))
    >>> {name: (tuple(part.shape), part.dtype) for name, part in parts.items()}
    {'': ((256, 1), torch.uint8), 'absmax': ((8,), torch.float32)}
    """
    functional = bitsandbytes().functional
    weight = weight.contiguous()
    # On a CPU bitsandbytes takes ten times the memory of what it is given: it gets a slice at a time.
    slice_size = SLICE if weight.device.type == "cpu" else max(weight.numel(), 1)
    if quantization == "int8":
        rows = weight.split(max(1, slice_size // weight.shape[1]))
        made = [functional.int8_vectorwise_quant(part.to(torch.float16))[:2] for part in rows]
        codes, scales = map(torch.cat, zip(*made))
        return int8_weight(codes, scales)
    kind, _, double = quantization.partition("-")
    made = [functional.quantize_4bit(part, quant_type=kind) for part in weight.view(-1).split(slice_size)]
    codes, state = torch.cat([part for part, _ in made]), made[0][1]
    state.absmax, state.shape = torch.cat([part.absmax for _, part in made]), weight.shape
    if double:
        state.offset = state.absmax.mean()
        state.absmax, state.state2 = functional.quantize_blockwise(state.absmax - state.offset, blocksize=NESTED_BLOCK)
        state.nested = True
    return int4_weight(codes, state)


# ---------------------------------------------------------------------------------------------------------------------
# Taking apart and putting together


def is_quantized(tensor: object) -> bool:
    """Whether a tensor is a weight that bitsandbytes has quantized (found by its class's name: imports nothing)."""
    kind = {cls.__name__ for cls in type(tensor).__mro__}
    if "Params4bit" in kind:
        return getattr(tensor, "quant_state", None) is not None
    return "Int8Params" in kind and getattr(tensor, "SCB", None) is not None


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
    if hasattr(state, "original_qshape"):
        raise ValueError("a 4-bit weight was packed anew for this CPU by a forward, which rounded its scales")
    return {"": weight.data, "absmax": state.absmax, **({"nested_absmax": state.state2.absmax} if state.nested else {})}


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
    state: Any = getattr(weight, "quant_state", None)
    parts = take_apart(weight)
    if state is None:
        raise ValueError("an int8 weight has no 4-bit codes: expected one in nf4 or fp4")
    scales = parts["absmax"]
    if state.nested:
        scales = bitsandbytes().functional.dequantize_blockwise(scales, state.state2) + state.offset
    bytes_ = parts[""].view(torch.uint8).reshape(-1)
    count = math.prod(state.shape)
    values = state.code[torch.stack((bytes_ >> 4, bytes_ & 15), 1).view(-1)[:count].int()]
    values *= scales.float().repeat_interleave(state.blocksize)[:count]
    return values.view(state.shape).to(dtype or state.dtype)


def put_together(like: Tensor, parts: Mapping[str, Tensor]) -> nn.Parameter:
    """A weight like another one, around these tensors: what `take_apart` gave, copied or moved. They are not copied.

    Tables and the mean, which are small, are taken from `like`, to the device of the codes.
    """
    state, codes = getattr(like, "quant_state", None), parts[""]
    if state is None:
        return int8_weight(codes, parts["SCB"])
    make, nested, offset = type(state), None, None
    if state.nested:
        table = state.state2.code.to(codes.device)
        nested = make(parts["nested_absmax"], code=table, blocksize=state.state2.blocksize, dtype=state.state2.dtype)
        offset = state.offset.to(codes.device)
    return int4_weight(
        codes,
        make(
            parts["absmax"], state.shape, state.code.to(codes.device), state.blocksize, state.quant_type, state.dtype,
            offset, nested,
        ),
    )  # fmt: skip


def skeleton(weight: Tensor) -> nn.Parameter:
    """A weight like this one on meta: only the tables and the mean of a 4-bit weight are there, in RAM."""
    made = put_together(weight, {name: part.to("meta") for name, part in take_apart(weight).items()})
    state, real = getattr(made, "quant_state", None), getattr(weight, "quant_state", None)
    for new, old in ((state, real), (getattr(state, "state2", None), getattr(real, "state2", None))):
        if new is not None and old is not None:
            new.code = old.code.cpu()
            new.offset = None if old.offset is None else old.offset.cpu()
    return made


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor, or of all tensors that a quantized weight consists of."""
    if not is_quantized(tensor):
        return tensor.nbytes
    state = getattr(tensor, "quant_state", None)
    tables = [] if state is None else [state.code, *([state.state2.code, state.offset] if state.nested else [])]
    return sum(part.nbytes for part in (*take_apart(tensor).values(), *tables))


# ---------------------------------------------------------------------------------------------------------------------
# As a checkpoint has them


def stored_kind(keys: Container[str], name: str) -> str | None:
    """How the weight called `name` is stored among the keys of a checkpoint: "int8", "nf4", "fp4", or None if plain."""
    for kind in ("nf4", "fp4"):
        if f"{name}.{PACKED}{kind}" in keys:
            return kind
    return "int8" if name.removesuffix("weight") + "SCB" in keys else None


def stored_keys(name: str, kind: str) -> list[str]:
    """The keys under which the weight called `name` may be stored, the codes first."""
    if kind == "int8":
        base = name.removesuffix("weight")
        return [name, f"{base}SCB", f"{base}weight_format"]
    return [name, *(f"{name}.{end}" for end in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")),
            f"{name}.{PACKED}{kind}"]  # fmt: skip


def travelling_keys(name: str, weight: Tensor) -> dict[str, str]:
    """Part, as `take_apart` calls it -> the key under which it is stored."""
    base = name.removesuffix("weight")
    return {part: f"{base}SCB" if part == "SCB" else f"{name}.{part}" if part else name for part in take_apart(weight)}


def from_stored(name: str, shape: tuple[int, int], quantization: str, tensors: Mapping[str, Tensor]) -> nn.Parameter:
    """The weight that stored tensors make, once they have been checked: a kernel reads as far as they claim.

    Args:
        name: the weight's full name.
        shape: (out, in) in the model.
        quantization: what it is expected to be, one of `layers.QUANTIZATIONS`.
        tensors: by the names of `stored_keys`, on their device; the JSON may be anywhere.

    Raises:
        CheckpointError: names the tensor and what is wrong with it.
    """
    if quantization == "int8":
        base = name.removesuffix("weight")
        order = tensors.get(f"{base}weight_format")
        if order is not None and (order.numel() != 1 or order.item() != 0):
            raise CheckpointError(f"{base}weight_format is {order.tolist()}, expected 0 (codes row after row)")
        codes, scales = tensors[name], tensors[f"{base}SCB"]
        _expect(name, codes, shape, torch.int8)
        _expect(f"{base}SCB", scales, (shape[0],), torch.float32)
        return int8_weight(codes, scales)
    return _int4_from_stored(name, shape, quantization, tensors)


def _int4_from_stored(
    name: str, shape: tuple[int, int], quantization: str, tensors: Mapping[str, Tensor]
) -> nn.Parameter:
    kind, _, double = quantization.partition("-")
    label = f"{name}.{PACKED}{kind}"
    facts = _facts(label, tensors[label])
    blocksize, dtype = facts.get("blocksize"), _FLOATS.get(str(facts.get("dtype")))
    if facts.get("quant_type") != kind or blocksize not in _BLOCKSIZES or dtype is None:
        raise CheckpointError(f"{label} says {facts}, expected quant_type {kind!r}, a blocksize and a dtype")
    if facts.get("shape") != list(shape):
        raise CheckpointError(f"{name} was quantized from shape {facts.get('shape')}, the model has {list(shape)}")
    nested = "nested_blocksize" in facts
    if nested != bool(double):
        stored = f"{kind}-double" if nested else kind
        raise CheckpointError(f"{name} is stored as {stored}, expected {quantization}: see bnb_4bit_use_double_quant")
    elements = math.prod(shape)
    blocks = math.ceil(elements / blocksize)

    def part(end: str, size: int, of: torch.dtype) -> Tensor:
        key = f"{name}.{end}"
        if key not in tensors:
            raise CheckpointError(f"{key} is missing, without which {name} cannot be read")
        _expect(key, tensors[key], (size,), of)
        return tensors[key]

    codes = tensors[name]
    _expect(name, codes, (math.ceil(elements / 2), 1), torch.uint8)
    state = bitsandbytes().functional.QuantState
    offset, state2 = None, None
    if nested:
        if facts["nested_blocksize"] != NESTED_BLOCK or facts.get("nested_dtype") != "float32":
            raise CheckpointError(f"{label} says {facts}, expected nested_blocksize {NESTED_BLOCK} and float32")
        if not isinstance(facts.get("nested_offset"), (int, float)):
            raise CheckpointError(f"{label} has the nested_offset {facts.get('nested_offset')!r}, expected a number")
        state2 = state(
            absmax=part("nested_absmax", math.ceil(blocks / NESTED_BLOCK), torch.float32),
            code=part("nested_quant_map", 256, torch.float32), blocksize=NESTED_BLOCK, dtype=torch.float32,
        )  # fmt: skip
        offset = torch.tensor(float(facts["nested_offset"]), device=codes.device)
    return int4_weight(
        codes,
        state(
            absmax=part("absmax", blocks, torch.uint8 if nested else torch.float32),
            code=part("quant_map", 16, torch.float32), shape=torch.Size(shape), blocksize=blocksize, quant_type=kind,
            dtype=dtype, offset=offset, state2=state2,
        ),
    )  # fmt: skip


def _facts(label: str, packed: Tensor) -> dict[str, Any]:
    """What the JSON of a 4-bit weight says."""
    try:
        facts = json.loads(bytes(packed.cpu().to(torch.uint8).tolist()).decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{label} is no valid JSON: {error}") from error
    if not isinstance(facts, dict):
        raise CheckpointError(f"{label} is a {type(facts).__name__}, expected an object")
    return facts


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        found = f"{tuple(tensor.shape)} {tensor.dtype}"
        raise CheckpointError(f"{name} is {found}, expected {shape} {dtype}")
