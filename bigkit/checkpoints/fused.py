"""Chosen experts in four bits, gathered and decoded by one kernel of a GPU.

Plain PyTorch takes three steps: it gathers codes, gathers scales, and decodes both. If they rest in pinned RAM, the
link has nothing to do during the last one. Here each program of a kernel reads a piece of a chosen expert wherever it
lies, and writes the weights that it stands for, so decoding takes no time of its own beside the link.

The numbers are those of bitsandbytes, bit for bit: the 16 values are asked of it, and each is multiplied with its scale
in float32 and rounded once.

Leaves out: double quantization, experts whose last block is a short one, and machines on which Triton cannot make a
kernel: for these the three steps stay.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .codecs import BLOCK_4BIT

PIECE = 64  # blocks of scales that one program decodes: 2 KiB of codes


def decode_chosen(kind: str, parts: Mapping[str, Tensor], experts: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Some experts of a stack, (chosen, rows, columns); None where the kernel cannot serve.

    Args:
        kind: what the format is called: "nf4" or "fp4".
        parts: `_nf4` or `_fp4`, (experts, rows, columns / 2), and `_absmax`, (experts, blocks).
        experts: numbers of the chosen ones, shape (chosen,), on the device of the work; each is one of the stack's.
        dtype: of the result.
    """
    if kind not in ("nf4", "fp4") or experts.ndim != 1 or hasattr(experts, "fake_mode"):
        return None
    codes, scales = parts[f"_{kind}"], parts["_absmax"]
    whole = codes.shape[1] * codes.shape[2] * 2 == scales.shape[1] * BLOCK_4BIT
    if not (whole and codes.is_contiguous() and scales.is_contiguous() and triton_works(codes.device)):
        return None
    return _decode(kind, codes, scales, experts, dtype)


def _decode(kind: str, codes: Tensor, scales: Tensor, experts: Tensor, dtype: torch.dtype) -> Tensor:
    count, blocks = len(experts), scales.shape[1]
    decoded = torch.empty((count, codes.shape[1], 2 * codes.shape[2]), dtype=dtype, device=codes.device)
    if count:
        with torch.cuda.device_of(codes):
            _kernels()["decode"][-(-blocks // PIECE), count](
                codes,
                scales,
                _values(kind, codes.device),
                experts.contiguous(),
                decoded,
                blocks,
                PIECE,
                BLOCK_4BIT // 2,
            )
    return decoded


@cache
def _values(kind: str, device: torch.device) -> Tensor:
    """What the 16 codes stand for where the scale is 1, shape (16,), float32, as bitsandbytes has them."""
    with torch.inference_mode(False):
        pairs = torch.arange(16, dtype=torch.uint8, device=device) * 17  # each code twice in a byte
        op = torch.ops.bitsandbytes.dequantize_4bit.default
        values: Tensor = op(pairs.view(1, -1), torch.ones(1, device=device), BLOCK_4BIT, kind, (1, 32), torch.float32)
        return values.flatten()[::2].contiguous()


@cache
def triton_works(device: torch.device) -> bool:
    """Whether kernels can be made for a device: Triton must be there, and what it compiles with."""
    try:
        with torch.cuda.device(device):
            _kernels()["try"][(1,)](torch.zeros(1, dtype=torch.int32, device=device))
    except ImportError:
        return False
    except Exception as error:  # whatever a compiler may say
        warnings.warn(
            f"Triton makes no kernel for {device} ({type(error).__name__}: {error}): what experts need is done by "
            "plain PyTorch, which is slower",
            stacklevel=2,
        )
        return False
    return True


@cache
def _kernels() -> dict[str, Any]:
    import triton
    import triton.language as tl

    @triton.jit
    def write(number):  # type: ignore[no-untyped-def]
        tl.store(number, 1)

    @triton.jit
    def decode(codes, scales, values, experts, decoded, blocks, PIECE: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
        place, expert = tl.program_id(1).to(tl.int64), tl.load(experts + tl.program_id(1)).to(tl.int64)
        block = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
        there = (block < blocks)[:, None]
        scale = tl.load(scales + expert * blocks + block, mask=block < blocks)[:, None]
        byte = tl.load(codes + (expert * blocks + block[:, None]) * HALF + tl.arange(0, HALF)[None, :], mask=there)
        first, second = tl.load(values + (byte >> 4)) * scale, tl.load(values + (byte & 15)) * scale
        pair = tl.reshape(tl.join(first, second), (PIECE, 2 * HALF))
        to = (place * blocks + block[:, None]) * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
        tl.store(decoded + to, pair.to(decoded.dtype.element_ty), mask=there)

    return {"decode": decode, "try": write}
