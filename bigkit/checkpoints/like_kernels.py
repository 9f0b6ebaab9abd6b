"""What stands for the kernels in a dry run: the same calls, and one operation that has nothing to compute.

It reads the codes and scales and writes the weights, as a kernel does, so that a dry run counts its bytes and its time.
Leaves out: the kernels (`kernels.py`), and what an operation costs (`dryrun/costs.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.library.custom_op("bigkit::decode", mutates_args=())
def decode(read: list[Tensor], shape: list[int], dtype: torch.dtype) -> Tensor:
    """Weights of a shape from the tensors that are read for them; on fake tensors only."""
    raise NotImplementedError("bigkit::decode stands for kernels in a dry run: it computes nothing")


@decode.register_fake
def _(read: list[Tensor], shape: list[int], dtype: torch.dtype) -> Tensor:
    return read[0].new_empty(shape, dtype=dtype)


def mxfp4(blocks: Tensor, scales: Tensor, experts: Tensor | None, dtype: torch.dtype) -> Tensor:
    blocks, scales = _few(blocks, experts), _few(scales, experts)
    *around, outputs, groups = scales.shape
    return decode([blocks, scales], [*around, 2 * groups * blocks.shape[-1], outputs], dtype)


def scaled(codes: Tensor, scales: Tensor, experts: Tensor | None, block: Sequence[int], dtype: torch.dtype) -> Tensor:
    few = _few(codes, experts)
    return decode([few, scales], list(few.shape), dtype)


def packed(
    codes: Tensor, zeros: Tensor | None, scales: Tensor, index: Tensor | None, shape: tuple[int, int], bits: int,
    along: int, offset: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return decode([tensor for tensor in (codes, zeros, scales, index) if tensor is not None], list(shape), dtype)


def looked_up(codes: Tensor, scales: Tensor, experts: Tensor | None, kind: str, dtype: torch.dtype) -> Tensor:
    few = _few(codes, experts)
    return decode([few, _few(scales, experts)], [*few.shape[:-1], 2 * few.shape[-1]], dtype)


def _few(codes: Tensor, experts: Tensor | None) -> Tensor:
    """As many experts as are chosen."""
    return codes if experts is None else codes[: len(experts)]
