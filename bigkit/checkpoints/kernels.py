"""Decoding on a GPU in one pass: each code is read once, each weight written once, and nothing lies in between.

PyTorch's operations decode in several passes, each of which reads and writes as much as the weights take; the kernels
here, in Triton, do the same arithmetic in registers, so they give the same bits. With `experts` they read those experts
alone, wherever the GPU can read: out of pinned RAM the codes come over the link as the weights are written.

    mxfp4     (experts, out, bytes) -> (experts, in, out): rows and columns change places on the way
    scaled    one byte a weight: FP8 or int8, times the scale of its block
    packed    numbers of 4 or 8 bits in int32, less a zero point, times the scale of their group
    looked_up two codes in a byte, each a place in a table of 16 values, times the scale of their block (nf4, fp4)

Imports Triton, which comes with PyTorch for NVIDIA and AMD GPUs on Linux. Leaves out: the formats, what happens
where there is no Triton (`codecs.py`), and NVFP4, which PyTorch's operations decode on a GPU, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fits import BLOCK_4BIT

OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}  # a product is rounded before anything is added to it
PROGRAMS = 264  # that read out of RAM at once: two for each processor of an H100 keep the link busy
READERS = 96  # the same of MXFP4, in larger pieces: some processors stay free for the products beside them
PIECE = 2**14  # bytes that one of these reads at a time, at most
KINDS = {torch.float8_e4m3fn: 0, torch.float8_e5m2: 1, torch.int8: 2}


@triton.jit
def _e2m1(code):  # type: ignore[no-untyped-def]
    half = ((code & 8) << 12) | ((code & 7) << 9)  # the same bits in float16 stand for 2^14 times less
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def _byte(code, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    if KIND == 2:
        return code.to(tl.int8).to(tl.float32)
    bits = code.to(tl.int32)
    if KIND == 1:  # E5M2 is the upper half of a float16
        return (bits << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    half = ((bits & 128) << 8) | ((bits & 127) << 7)  # E4M3's bits in float16 stand for 2^8 times less
    value = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((bits & 127) == 127, float("nan"), value)


@triton.jit
def _mxfp4(  # type: ignore[no-untyped-def]
    blocks, scales, out, outputs, width, groups, GROUP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    expert = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    inside = (row < outputs) & (column < width)
    byte = tl.load(blocks + (expert * outputs + row) * width + column, inside, 0)
    power = tl.load(scales + (expert * outputs + row) * groups + column // GROUP, inside, 0)
    _two_e2m1(byte, power, out + (expert * 2 * width + 2 * column) * outputs + row, outputs, inside)


@triton.jit
def _two_e2m1(byte, power, target, step, inside):  # type: ignore[no-untyped-def]
    """Write the two numbers of a byte, one `step` after the other."""
    code, power = byte.to(tl.int32), power.to(tl.int32)
    scale = tl.where(power == 0, 0x400000, power << 23).to(tl.float32, bitcast=True)  # 2^(power - 127)
    tl.store(target, (_e2m1(code & 15) * scale).to(target.dtype.element_ty), inside)
    tl.store(target + step, (_e2m1(code >> 4) * scale).to(target.dtype.element_ty), inside)


@triton.jit
def _mxfp4_chosen(  # type: ignore[no-untyped-def]
    blocks, scales, experts, out, aside, outputs, width, groups, down, tiles, GROUP: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, BYTES: tl.constexpr, POWERS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """A link brings whole lines of memory, and some rows are one piece of them: they come as one into the GPU's memory
    (its cache, in truth), with their powers, and are read there as rows and columns.
    """
    aside += tl.program_id(0).to(tl.int64) * (BYTES + POWERS)
    byte, power = tl.arange(0, BYTES), tl.arange(0, POWERS)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        place, first = (tile // down).to(tl.int64), tile % down * ROWS
        start, rows = tl.load(experts + place).to(tl.int64) * outputs + first, tl.minimum(outputs - first, ROWS)
        at, many = start * groups, rows * groups
        if WORDS:
            at, many = tl.multiple_of(at, 16), tl.multiple_of(many, 16)
        some = tl.load(blocks + start * width + byte, byte < rows * width, 0)
        powers = tl.load(scales + at + power, power < many, 0)
        tl.debug_barrier()  # what was put aside before has been read
        tl.store(aside + byte, some)
        tl.store(aside + BYTES + power, powers)
        tl.debug_barrier()
        row = tl.arange(0, ROWS)[:, None]
        for left in range(0, width, COLS):
            column = left + tl.arange(0, COLS)[None, :]
            inside = (row < rows) & (column < width)
            code = tl.load(aside + row * width + column, inside, 0)
            scale = tl.load(aside + BYTES + row * groups + column // GROUP, inside, 0)
            target = out + (place * 2 * width + 2 * column) * outputs + first + row
            _two_e2m1(code, scale, target, outputs, inside)


@triton.jit
def _scaled(  # type: ignore[no-untyped-def]
    codes, scales, experts, out, rows, columns, height, width, grid_down, grid_across, down, across, tiles,
    KIND: tl.constexpr, CHOSEN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        place = (tile // (down * across)).to(tl.int64)
        expert = place
        if CHOSEN:
            expert = tl.load(experts + place).to(tl.int64)
        row = tile // across % down * ROWS + tl.arange(0, ROWS)[:, None]
        column = tile % across * COLS + tl.arange(0, COLS)[None, :]
        inside = (row < rows) & (column < columns)
        code = tl.load(codes + (expert * rows + row) * columns + column, inside, 0)
        scale = tl.load(scales + (place * grid_down + row // height) * grid_across + column // width, inside, 0)
        weight = (_byte(code, KIND) * scale).to(out.dtype.element_ty)
        tl.store(out + (place * rows + row) * columns + column, weight, inside)


@triton.jit
def _number(  # type: ignore[no-untyped-def]
    words, row, column, row_step, column_step, inside, BITS: tl.constexpr, ALONG: tl.constexpr
):
    """A number of a matrix whose int32 hold several along its rows (0), columns (1), or rows in AWQ's order (2)."""
    per: tl.constexpr = 32 // BITS
    if ALONG == 1:
        word, place = row * row_step + (column // per) * column_step, column % per + 0 * row
    else:
        word, place = (row // per) * row_step + column * column_step, row % per + 0 * column
    if ALONG == 2:
        place = place // 2 + 4 * (place % 2)
    return (tl.load(words + word, inside, 0) >> (place * BITS)) & ((1 << BITS) - 1)


@triton.jit
def _packed(  # type: ignore[no-untyped-def]
    codes, zeros, scales, index, out, rows, columns, group, code_row, code_column, zero_row, zero_column, scale_row,
    scale_column, offset, BITS: tl.constexpr, ALONG: tl.constexpr, ZEROS: tl.constexpr, INDEX: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    inside = (row < rows) & (column < columns)
    which = column // group
    if INDEX:
        which = tl.load(index + column, column < columns, 0)
    number = _number(codes, row, column, code_row, code_column, inside, BITS, ALONG) - offset
    if ZEROS:
        number -= _number(zeros, row, which, zero_row, zero_column, inside, BITS, 2 if ALONG == 2 else 0)
    scale = tl.load(scales + row * scale_row + which * scale_column, inside, 0).to(tl.float32)
    tl.store(
        out + row.to(tl.int64) * columns + column, (number.to(tl.float32) * scale).to(out.dtype.element_ty), inside
    )


@triton.jit
def _looked_up(  # type: ignore[no-untyped-def]
    codes, scales, values, experts, out, rows, down, tiles, CHOSEN: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        place = (tile // down).to(tl.int64)
        expert = place
        if CHOSEN:
            expert = tl.load(experts + place).to(tl.int64)
        row = tile % down * ROWS + tl.arange(0, ROWS)[:, None]
        column = tl.arange(0, COLS)[None, :]
        byte = tl.load(codes + (expert * rows + row) * COLS + column, row < rows, 0)
        scale = tl.load(scales + expert * rows + row, row < rows, 0)
        pair = tl.join(tl.load(values + (byte >> 4)) * scale, tl.load(values + (byte & 15)) * scale)
        target = out + (place * rows + row) * (2 * COLS) + tl.arange(0, 2 * COLS)[None, :]
        tl.store(target, tl.reshape(pair, (ROWS, 2 * COLS)).to(out.dtype.element_ty), row < rows)


def looked_up(
    codes: Tensor, scales: Tensor, experts: Tensor | None, kind: str, dtype: torch.dtype, rows: int = 64,
    programs: int = 0,
) -> Tensor:  # fmt: skip
    """Codes of four bits, two in a byte, as places in a table, times the scale of their block.

    Args:
        codes: (experts, rows, columns / 2), of which each expert is whole blocks.
        scales: float32 (experts, blocks), of all experts.
        experts: which of both; None for all.
        kind: what bitsandbytes calls the table, "nf4" or "fp4".
        dtype: of the result.
        rows: blocks that a program reads at a time.
        programs: how many there are; 0 takes as many as suit.

    Returns:
        (chosen experts, rows, columns).
    """
    count, blocks = len(codes) if experts is None else len(experts), scales.shape[1]
    out = torch.empty((count, codes.shape[1], 2 * codes.shape[2]), dtype=dtype, device=codes.device)
    down = triton.cdiv(blocks, rows)
    tiles = count * down
    chosen = scales if experts is None else experts.contiguous()
    given = codes, scales, _values(kind, codes.device), chosen, out, blocks, down, tiles, experts is not None
    grid = (min(tiles, programs or (tiles if experts is None else PROGRAMS)),)
    _run(_looked_up, grid, (*given, rows, BLOCK_4BIT // 2))
    return out


@cache
def _values(kind: str, device: torch.device) -> Tensor:
    """What the 16 codes stand for where the scale is 1, shape (16,), float32, as bitsandbytes has them."""
    with torch.inference_mode(False):
        pairs = torch.arange(16, dtype=torch.uint8, device=device) * 17  # each code twice in a byte
        op = torch.ops.bitsandbytes.dequantize_4bit.default
        values: Tensor = op(pairs.view(1, -1), torch.ones(1, device=device), BLOCK_4BIT, kind, (1, 32), torch.float32)
        return values.flatten()[::2].contiguous()


def mxfp4(
    blocks: Tensor, scales: Tensor, experts: Tensor | None, dtype: torch.dtype, tile: tuple[int, int] = (128, 64)
) -> Tensor:
    """Weights of MXFP4.

    Args:
        blocks: bytes (experts, out, groups, bytes of one).
        scales: powers of two (experts, out, groups).
        experts: which of them; None for all, which then lie in the GPU's memory.
        dtype: of the result.
        tile: of all experts, rows and bytes of a row that a program decodes at a time.

    Returns:
        (chosen experts, in, out).
    """
    *around, outputs, groups = scales.shape
    size, scales = blocks.shape[-1], scales.contiguous()
    width, count = groups * size, math.prod(around) if experts is None else len(experts)
    out = torch.empty(
        (*(around if experts is None else (count,)), 2 * width, outputs), dtype=dtype, device=blocks.device
    )
    if experts is None:
        grid = triton.cdiv(width, tile[1]), triton.cdiv(outputs, tile[0]), count
        _run(_mxfp4, grid, (blocks, scales, out, outputs, width, groups, size, *tile))
        return out
    rows = 1 << max(1, min(8, PIECE // width)).bit_length() - 1
    down = triton.cdiv(outputs, rows)
    programs = min(READERS, count * down)
    sizes = triton.next_power_of_2(rows * width), triton.next_power_of_2(rows * groups)
    aside = torch.empty(programs * sum(sizes), dtype=torch.uint8, device=blocks.device)
    words = rows * groups % 16 == outputs * groups % 16 == 0
    given = blocks, scales, experts.contiguous(), out, aside, outputs, width, groups, down, count * down
    _run(_mxfp4_chosen, (programs,), (*given, size, rows, 512, *sizes, words))
    return out


def scaled(
    codes: Tensor, scales: Tensor, experts: Tensor | None, block: Sequence[int], dtype: torch.dtype,
    tile: tuple[int, int] = (16, 512), programs: int = 0,
) -> Tensor:  # fmt: skip
    """Codes of one byte times their scales.

    Args:
        codes: (experts, rows, columns).
        scales: float32 (chosen experts or 1, blocks down, blocks across).
        experts: which of `codes`; None for all.
        block: rows and columns that share a scale.
        dtype: of the result.
        tile: rows and columns that a program reads at a time.
        programs: how many work at once.

    Returns:
        (chosen experts, rows, columns).
    """
    rows, columns = codes.shape[-2:]
    around, grid = codes.shape[:-2] if experts is None else experts.shape, scales.shape[-2:]
    scales = scales.expand(*around, *grid).contiguous()
    down, across = triton.cdiv(rows, tile[0]), triton.cdiv(columns, tile[1])
    tiles = math.prod(around) * down * across
    out = torch.empty((*around, rows, columns), dtype=dtype, device=codes.device)
    chosen = scales if experts is None else experts
    kind = KINDS[codes.dtype], experts is not None
    given = codes.view(torch.uint8), scales, chosen, out, rows, columns, *block, *grid, down, across, tiles, *kind
    _run(_scaled, (min(tiles, programs or (tiles if experts is None else PROGRAMS)),), (*given, *tile))
    return out


def packed(
    codes: Tensor, zeros: Tensor | None, scales: Tensor, index: Tensor | None, shape: tuple[int, int], bits: int,
    along: int, offset: int, dtype: torch.dtype, tile: tuple[int, int] = (128, 32),
) -> Tensor:  # fmt: skip
    """Numbers of few bits in int32, less a zero point and an offset, times their scales.

    Args:
        codes: seen as (out, in), one of the dimensions packed.
        zeros: seen as (out, groups), with the outputs packed; None if there are none.
        scales: seen as (out, groups).
        index: the group of each input; None where groups are of equal size.
        shape: (out, in) of the weight.
        bits: of a number, 4 or 8.
        along: how `codes` are packed: 0 along `out`, 1 along `in`, 2 along `out` in AWQ's order. Zeros: 2, or else 0.
        offset: is subtracted as well.
        dtype: of the result.
        tile: rows and columns that a program writes.

    Returns:
        (out, in).
    """
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    steps = *codes.stride(), *(codes if zeros is None else zeros).stride(), *scales.stride()
    read = codes, codes if zeros is None else zeros, scales, codes if index is None else index
    settings = offset, bits, along, zeros is not None, index is not None
    given = (*read, out, *shape, -(-shape[1] // scales.shape[1]), *steps, *settings)
    _run(_packed, (triton.cdiv(shape[1], tile[1]), triton.cdiv(shape[0], tile[0])), (*given, *tile))
    return out


def _run(kernel: Any, grid: tuple[int, ...], given: Sequence[Any]) -> None:
    """Start so many programs; of none, nothing."""
    if all(grid):
        with torch.cuda.device_of(given[0]):
            kernel[grid](*given, **OPTIONS)


def try_out() -> None:
    """Raise whatever keeps kernels from being compiled here."""
    codes = torch.zeros((1, 1, 1), dtype=torch.int8, device="cuda")
    scaled(codes, torch.ones((1, 1, 1), device="cuda"), None, (1, 1), torch.float32)
