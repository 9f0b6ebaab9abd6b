"""Weights as quantized checkpoints store them: how each format packs numbers, and the weight that they stand for.

A format is told by the names, shapes and dtypes of the tensors that lie where the weight should be, not by what a
config says: the file is the truth. All decode to the same thing, a weight of the shape that the model's class has:

    fp8, int8   `weight` in one byte and `weight_scale(_inv)`: weight = code * scale, with one scale for the whole, for
                each row, or for each block of 128 x 128 (DeepSeek-V3; compressed-tensors); of stacked experts
                `*` and `*_scale_inv`. MXFP8 is the same with a power of two, in a byte, for each 32
    int4, int8  `weight_packed`, numbers of few bits in int32 (compressed-tensors): weight = (code - zero) * scale, with
                a scale for each group of inputs
    GPTQ, AWQ   `qweight`, the same transposed: (in, out), packed along the inputs (GPTQ) or the outputs (AWQ)
    NVFP4       `weight_packed` (compressed-tensors) or `weight` and `weight_scale_2` (ModelOpt) in bytes: two numbers
                of 4 bits, a float8 scale for 16 of them, one scale for all
    MXFP4       `*_blocks` and `*_scales` of stacked experts (gpt-oss): 4 bits, and a power of two for each 32
    nf4, fp4,   `*_nf4` and `*_absmax`, `*_int8` and `*_scb` of stacked experts: each is quantized alone, as
    int8        bitsandbytes quantizes a linear layer; bigkit writes these (`quantize/stacks.py`)

What PyTorch's operations say here is what a weight is. On a GPU with Triton, kernels do the same in one pass, to the
same bits (`kernels.py`), for all but NVFP4.

Leaves out: which modules hold such tensors, and running them (`as_stored.py`); bitsandbytes' layers (`quantize/`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .fits import BLOCK, BLOCK_4BIT, CODES, NESTED, layer_misfit

Parts = Mapping[str, Tensor]  # own name -> a tensor as it is stored
Kinds = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # own name -> shape and dtype in the file

# What the 16 codes of E2M1 (a sign, two bits of exponent, one of mantissa) stand for, as MXFP4 and NVFP4 use them.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # which of the eight numbers of an int32 is the first, second, ... output


class Codec(NamedTuple):
    """A format of one weight.

    Args:
        format: what it is called.
        decode: its tensors by name, and a floating dtype -> the weight, in the shape that the model's class has.
    """

    format: str
    decode: Callable[[Parts, torch.dtype], Tensor]


class StackCodec(NamedTuple):
    """A format of stacked weights, (experts, ...): any experts can be decoded without the others.

    Args:
        format: what it is called.
        suffixes: what the names of its tensors end in, after the weight's own name.
        decode: its tensors by suffix, of all experts or of some, and a floating dtype -> these experts' weights.
        in_place: whether `decode` also takes chosen experts, of which a kernel then reads these alone.
    """

    format: str
    suffixes: tuple[str, ...]
    decode: Callable[..., Tensor]
    in_place: bool = False

    def __reduce__(self) -> Any:
        """Copies and pickles are the same one, so that the classes that are made for it are, too."""
        return _called, (self.format,) if self in STACK_CODECS else (self.format, *self[1:])

    def reads_in_place(self, parts: Parts) -> bool:
        """Whether a kernel reads chosen experts where they lie, so that nothing is copied before it is decoded."""
        return self.in_place and kernels_for(parts[self.suffixes[0]]) is not None

    def chosen(self, parts: Parts, experts: Any, dtype: torch.dtype) -> Tensor:
        """The weights of some experts of all, as an index or a slice says."""
        if isinstance(experts, Tensor) and self.reads_in_place(parts):
            return self.decode(parts, dtype, experts)
        return self.decode({suffix: rows_of(part, experts) for suffix, part in parts.items()}, dtype)


def find_stack_codec(own: str, names: Iterable[str]) -> StackCodec | None:
    """How a stacked weight is stored, by the names that a checkpoint has beside it; None if it is not quantized.

    >>> find_stack_codec("down_proj", ["down_proj_nf4", "down_proj_absmax", "down_proj_bias"]).format
    'nf4'
    """
    present = {name.removeprefix(own) for name in names if name.startswith(own)}
    found = [codec for codec in STACK_CODECS if present.issuperset(codec.suffixes)]
    return max(found, key=lambda codec: len(codec.suffixes), default=None)


def find_codec(shape: tuple[int, ...], kinds: Kinds, gptq_offset: int = 1) -> Codec | None:
    """How a linear layer's weight is stored, by the tensors that a checkpoint has under the layer's name.

    Args:
        shape: (out, in) of the weight.
        kinds: what the checkpoint has there.
        gptq_offset: what GPTQ's files add to a zero point when it is used: 1, or 0 in version 2 of the format.

    Returns:
        None if the weight is not quantized.

    Raises:
        ValueError: it is quantized in a way that is not known here.

    >>> find_codec((4, 8), {"weight": ((4, 8), torch.float8_e4m3fn), "weight_scale": ((4, 1), torch.float32)}).format
    'fp8'
    """
    rows, columns = shape
    weight, packed, qweight = kinds.get("weight"), kinds.get("weight_packed"), kinds.get("qweight")
    scaled = kinds.keys() & {"weight_scale", "weight_scale_inv"}
    found, halves = None, ((rows, columns // 2), torch.uint8)
    if weight and weight[0] == shape and weight[1] in CODES and scaled:
        found = Codec("int8" if weight[1] == torch.int8 else "fp8", decode_scaled)
    elif weight == halves and kinds.keys() >= {"weight_scale", "weight_scale_2"}:
        found = Codec("nvfp4", decode_nvfp4)
    elif packed and packed[1] == torch.uint8 and kinds.keys() >= {"weight_scale", "weight_global_scale"}:
        found = Codec("nvfp4", decode_nvfp4) if packed == halves else None
    elif packed and packed[1] == torch.int32 and "weight_scale" in kinds:
        for bits in (4, 8):
            if packed[0] == (rows, -(-columns * bits // 32)):
                found = Codec(f"int{bits}", partial(decode_packed, bits=bits, shape=shape))
    elif qweight and qweight[1] == torch.int32 and kinds.keys() >= {"qzeros", "scales"}:
        for bits in (4, 8):
            if qweight[0] == (columns * bits // 32, rows):
                found = Codec(f"gptq-int{bits}", partial(decode_gptq, bits=bits, offset=gptq_offset))
        if qweight[0] == (columns, rows // 8):
            found = Codec("awq-int4", decode_awq)
    elif not (scaled or packed or qweight):
        return None
    wrong = layer_misfit(found.format, shape, kinds) if found else "this is no format that bigkit reads"
    if wrong:
        raise ValueError(f"a weight of shape {list(shape)} is stored as {described(kinds)}: {wrong}")
    return found


def described(kinds: Kinds) -> str:
    """Tensors as text."""
    return ", ".join(f"{name} {dtype} {list(size)}" for name, (size, dtype) in sorted(kinds.items()))


def decode_scaled(parts: Parts, dtype: torch.dtype) -> Tensor:
    """One byte a weight, and scales: one, one a row, or one a block. codes (out, in) -> (out, in).

    The last block of a row or column may be cut. Source: the files of DeepSeek-V3 (arXiv 2412.19437, section 3.3), and
    compressed-tensors' "float-quantized" and "int-quantized". Scales in a byte without a sign are exponents (E8M0) of
    OCP's Microscaling Formats, version 1.0.
    """
    return _scaled(parts["weight"], parts["weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"], dtype)


def _scaled(codes: Tensor, scales: Tensor, dtype: torch.dtype, experts: Tensor | None = None) -> Tensor:
    """Codes (..., rows, columns) times their scales in float32, rounded to a dtype; few copies in between.

    Where blocks are whole no scale is repeated: the codes are seen as (..., blocks, rows of one, blocks, columns of
    one).
    """
    works = torch.bfloat16 if codes.dtype != torch.int8 else torch.float16  # in which all codes are exact
    # A number alone would be rounded to the codes' dtype. MXFP8 has exponents.
    scales = powers_of_two(scales) if scales.dtype == torch.uint8 else scales.to(torch.float32)
    scales = scales.reshape(*(() if scales.numel() == 1 else scales.shape), *[1] * codes.ndim)
    scales = scales.reshape(scales.shape[: codes.ndim])
    sizes, counts = codes.shape[-2:], scales.shape[-2:]
    block = [BLOCK if -(-size // BLOCK) == count else -(-size // count) for size, count in zip(sizes, counts)]
    if kernels := kernels_for(codes):
        return kernels.scaled(codes, scales if experts is None else rows_of(scales, experts), experts, block, dtype)
    for dim in (-2, -1):
        if block[dim] * counts[dim] != sizes[dim] and counts[dim] > 1:
            scales = scales.repeat_interleave(block[dim], dim).narrow(dim, 0, sizes[dim])
    codes = codes.unflatten(-1, (scales.shape[-1], -1)).unflatten(-3, (scales.shape[-2], -1))
    decoded = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    torch.mul(codes.to(works), scales[..., :, None, :, None], out=decoded)
    return decoded.flatten(-2).flatten(-3, -2)


def decode_packed(parts: Parts, dtype: torch.dtype, bits: int, shape: tuple[int, ...]) -> Tensor:
    """compressed-tensors' "pack-quantized": int32 of 32 / bits numbers along the inputs, the first in the lowest bits.

    The numbers are stored without a sign, moved up by half of their range, and so are zero points.
    """
    half = 1 << (bits - 1)
    if kernels := kernels_for(parts["weight_packed"]):
        codes, zeros, index = parts["weight_packed"], parts.get("weight_zero_point"), parts.get("weight_g_idx")
        offset = half if zeros is None else 0  # by which both are moved up
        return kernels.packed(codes, zeros, parts["weight_scale"], index, shape, bits, 1, offset, dtype)
    codes = unpack(parts["weight_packed"], bits, 1)[:, : shape[1]] - half
    scales = parts["weight_scale"].to(torch.float32)
    group = _groups(parts.get("weight_g_idx"), shape[1], scales.shape[1], codes.device)
    if "weight_zero_point" in parts:
        zeros = unpack(parts["weight_zero_point"], bits, 0)[: shape[0]] - half
        codes = codes - zeros[:, group]
    return (codes * scales[:, group]).to(dtype)


def decode_gptq(parts: Parts, dtype: torch.dtype, bits: int, offset: int) -> Tensor:
    """GPTQ's files: `qweight` (in x bits / 32, out), `qzeros` (groups, out x bits / 32), `scales` (groups, out).

    weight = (code - (zero + offset)) * scale. `g_idx` names the group of each input. Source: arXiv 2210.17323, and the
    files that AutoGPTQ and its successors write.
    """
    if kernels := kernels_for(parts["qweight"]):
        return _transposed(kernels, parts, bits, 1, offset, dtype)
    codes = unpack(parts["qweight"], bits, 0)
    zeros = unpack(parts["qzeros"], bits, 1)[:, : codes.shape[1]] + offset
    scales = parts["scales"].to(torch.float32)
    group = _groups(parts.get("g_idx"), codes.shape[0], scales.shape[0], codes.device)
    return ((codes - zeros[group]) * scales[group]).to(dtype).t().contiguous()


def decode_awq(parts: Parts, dtype: torch.dtype) -> Tensor:
    """AWQ's files ("gemm"): `qweight` (in, out / 8), `qzeros` (groups, out / 8), `scales` (groups, out).

    The eight numbers of an int32 are outputs 0, 2, 4, 6, 1, 3, 5, 7, from the lowest bits up. Source: arXiv 2306.00978.
    """

    if kernels := kernels_for(parts["qweight"]):
        return _transposed(kernels, parts, 4, 2, 0, dtype)

    def outputs(packed: Tensor) -> Tensor:
        eights = unpack(packed, 4, 1).view(packed.shape[0], -1, 8)
        return eights[:, :, torch.tensor(AWQ_ORDER, device=packed.device)].reshape(packed.shape[0], -1)

    codes, zeros, scales = outputs(parts["qweight"]), outputs(parts["qzeros"]), parts["scales"].to(torch.float32)
    group = _groups(None, codes.shape[0], scales.shape[0], codes.device)
    return ((codes - zeros[group]) * scales[group]).to(dtype).t().contiguous()


def _transposed(kernels: Any, parts: Parts, bits: int, along: int, offset: int, dtype: torch.dtype) -> Tensor:
    """GPTQ's and AWQ's tensors, seen with the outputs first."""
    codes, zeros, scales = (parts[name].t() for name in ("qweight", "qzeros", "scales"))
    shape = scales.shape[0], codes.shape[1] * (32 // bits if along == 1 else 1)
    return kernels.packed(codes, zeros, scales, parts.get("g_idx"), shape, bits, along, offset, dtype)


def decode_nvfp4(parts: Parts, dtype: torch.dtype) -> Tensor:
    """Two E2M1 in a byte, a float8 scale for 16, and one for all: compressed-tensors' "nvfp4-pack-quantized" divides by
    that, ModelOpt's `weight_scale_2` is multiplied with.
    """
    ours = "weight_packed" in parts
    values, scales = e2m1(parts["weight_packed" if ours else "weight"]), parts["weight_scale"].to(torch.float32)
    whole = parts["weight_global_scale" if ours else "weight_scale_2"].to(torch.float32)
    scales = scales / whole if ours else scales * whole
    return (values.unflatten(1, (scales.shape[1], -1)) * scales[:, :, None]).flatten(1).to(dtype)


def decode_mxfp4(parts: Parts, dtype: torch.dtype, experts: Tensor | None = None) -> Tensor:
    """Experts in MXFP4: `_blocks` (experts, out, groups, 16), `_scales` (experts, out, groups) -> (experts, in, out).

    A byte has two E2M1, the first in the low half; a scale is the exponent of a power of two, plus 127. Source: OCP
    Microscaling Formats, version 1.0; the files of gpt-oss. Any shape may come before `out`, or none.
    """
    if kernels := kernels_for(parts["_blocks"]):
        return kernels.mxfp4(parts["_blocks"], parts["_scales"], experts, dtype)
    works = dtype if dtype == torch.bfloat16 else torch.float32  # in which these products are exact
    scales = powers_of_two(parts["_scales"]).to(works).transpose(-2, -1)
    values = e2m1(parts["_blocks"], works)  # (..., out, groups, 32)
    *around, outputs, groups, size = values.shape
    decoded = torch.empty((*around, groups, size, outputs), dtype=works, device=values.device)
    torch.mul(values.movedim(-3, -1), scales.unsqueeze(-2), out=decoded)
    return decoded.flatten(-3, -2).to(dtype)


def decode_4bit(parts: Parts, dtype: torch.dtype, experts: Tensor | None = None, *, kind: str) -> Tensor:
    """Stacked experts in nf4 or fp4: codes (experts, rows, columns / 2) -> (experts, rows, columns).

    Two codes in a byte, a scale for each 64 weights of an expert: `_absmax` (experts, blocks). With double quantization
    these are 8-bit codes of bitsandbytes' dynamic map, with a scale for 256 of them, `_nested_absmax`, and the mean
    that was subtracted before, `_offset` (experts,). Source: QLoRA, arXiv 2305.14314.
    """
    from bitsandbytes import functional

    codes, scales = parts[f"_{kind}"], parts["_absmax"]
    shape = (*codes.shape[:-1], codes.shape[-1] * 2)
    whole = shape[1] * shape[2] % BLOCK_4BIT == 0  # else the last block of each expert is a shorter one
    if whole and "_offset" not in parts and (kernels := kernels_for(codes)):
        return kernels.looked_up(codes, scales.contiguous(), experts, kind, dtype)
    if experts is not None:
        codes, scales = rows_of(codes, experts), rows_of(scales, experts)
        shape = (*codes.shape[:-1], shape[-1])
    if "_offset" in parts:
        table = functional.create_dynamic_map().to(scales.device)
        nested = parts["_nested_absmax"].repeat_interleave(NESTED, 1)[:, : scales.shape[1]]
        scales = table[scales.int()] * nested + parts["_offset"][:, None]
    pieces = [(codes, scales)] if whole else [*zip(codes, scales)]
    op = torch.ops.bitsandbytes.dequantize_4bit.default
    # As one row: for CPUs with AVX-512, bitsandbytes 0.50 begins a block anew in each row.
    made = [op(few.reshape(-1, 1), own.flatten(), BLOCK_4BIT, kind, (2 * few.numel(),), dtype) for few, own in pieces]
    return (made[0] if whole else torch.stack(made)).view(shape)


def decode_rows(parts: Parts, dtype: torch.dtype) -> Tensor:
    """Stacked experts in int8: `_int8` (experts, rows, columns), and `_scb`, the largest of each row, which is 127."""
    return (parts["_int8"] * parts["_scb"][..., None] * (1 / 127)).to(dtype)


def powers_of_two(exponents: Tensor) -> Tensor:
    """2^(exponent - 127) for each byte, float32: the bits of the number, since a GPU's `exp2` is not exact everywhere.

    >>> powers_of_two(torch.tensor([127, 129, 0], dtype=torch.uint8))
    tensor([1.0000e+00, 4.0000e+00, 5.8775e-39])
    """
    bits = exponents.to(torch.int32) << 23
    return bits.masked_fill(exponents == 0, 1 << 22).view(torch.float32)


def e2m1(packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bytes of two E2M1 -> numbers, twice as many in the last dimension.

    >>> e2m1(torch.tensor([[0x21]], dtype=torch.uint8))
    tensor([[0.5000, 1.0000]])
    """
    return _pairs(dtype, packed.device)[packed.int()].view(dtype)


def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """For each byte the two numbers in it as one whole number, so that one lookup is enough; made once for a device."""
    if (dtype, device) in _known:
        return _known[dtype, device]
    with torch.inference_mode(False):
        pairs = torch.tensor([(E2M1[byte & 15], E2M1[byte >> 4]) for byte in range(256)], dtype=dtype)
        table = pairs.view(torch.int64 if dtype.itemsize == 4 else torch.int32).flatten().to(device)
    if not hasattr(table, "fake_mode"):  # a dry run's has no data
        _known[dtype, device] = table
    return table


_known: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Numbers without a sign in int32, the first in the lowest bits -> int32, 32 / bits as many along `dim`.

    >>> unpack(torch.tensor([[0x21]], dtype=torch.int32), 4, 1)[0, :3].tolist()
    [1, 2, 0]
    """
    shifts = torch.arange(0, 32, bits, device=packed.device, dtype=torch.int32)
    numbers = (packed.unsqueeze(dim + 1) >> shifts.view(-1, *[1] * (packed.ndim - dim - 1))) & ((1 << bits) - 1)
    return numbers.flatten(dim, dim + 1)


def decode_scaled_stack(parts: Parts, dtype: torch.dtype, experts: Tensor | None = None) -> Tensor:
    """Stacked experts in one byte: codes (experts, rows, columns), `_scale_inv` (experts, blocks down, blocks across).

    Blocks are whole: a stack of weights with a cut block is not made (`merged.py`).
    """
    return _scaled(parts[""], parts["_scale_inv"], dtype, experts)


STACK_CODECS = (
    StackCodec("fp8", ("", "_scale_inv"), decode_scaled_stack, in_place=True),
    StackCodec("mxfp4", ("_blocks", "_scales"), decode_mxfp4, in_place=True),
    *(StackCodec(kind, (f"_{kind}", "_absmax"), partial(decode_4bit, kind=kind), True) for kind in ("nf4", "fp4")),
    *(StackCodec(f"{one}-double", (f"_{one}", "_absmax", "_nested_absmax", "_offset"), partial(decode_4bit, kind=one))
      for one in ("nf4", "fp4")),
    StackCodec("int8", ("_int8", "_scb"), decode_rows),
)  # fmt: skip


def _called(format: str, *other: Any) -> StackCodec:
    return StackCodec(format, *other) if other else next(codec for codec in STACK_CODECS if codec.format == format)


def _groups(given: Tensor | None, inputs: int, groups: int, device: torch.device) -> Tensor:
    """The group of each input."""
    if given is not None:
        return given.long()
    return torch.arange(inputs, device=device) // -(-inputs // groups)


def rows_of(part: Tensor, experts: Any) -> Tensor:
    """Rows of a tensor, `part[experts]`: copied in words of up to 8 bytes, if they are copied.

    A GPU that gathers bytes one by one, and out of RAM, does not come near the rate of the link.

    >>> rows_of(torch.arange(16, dtype=torch.uint8).view(2, 8), torch.tensor([1])).tolist()
    [[8, 9, 10, 11, 12, 13, 14, 15]]
    """
    if not isinstance(experts, Tensor) or not part.is_contiguous() or part.ndim < 2 or part.dtype.itemsize > 2:
        return part[experts]
    row = part[0].nbytes if part.shape[0] else 1
    word = next((word for word in (torch.int64, torch.int32, torch.int16) if not row % word.itemsize), None)
    if word is None or part.storage_offset() * part.dtype.itemsize % word.itemsize:
        return part[experts]
    return part.flatten(1).view(word)[experts].view(part.dtype).unflatten(-1, part.shape[1:])


def kernels_for(tensor: Tensor) -> Any:
    """The module of kernels, if they can run on a tensor; None on a CPU, without Triton, or while code is compiled."""
    if not tensor.is_cuda or torch.compiler.is_compiling():
        return None
    if hasattr(tensor, "fake_mode"):
        from . import like_kernels

        return like_kernels
    return _kernels() if tensor.is_contiguous() else None


@cache
def _kernels() -> Any:
    try:
        from . import kernels

        kernels.try_out()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        if torch.version.cuda:
            warnings.warn(
                f"weights are decoded by PyTorch's operations, which takes longer: Triton makes no kernel ({reason})",
                stacklevel=2,
            )
        return None
    return kernels
