"""Whether tensors are what their format says: dtypes and shapes, before any of them is decoded.

A file comes from a stranger, and numbers of eight bits can be multiplied with anything. So a format is not found by
names alone; what does not fit is refused with a sentence that says what there is and what there should be.

Leaves out: the tables of contents of files (`model/header.py`), and what formats mean (`codecs.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .codecs import Kinds

BLOCK_4BIT, NESTED = 64, 256  # weights that share a scale, and scales that share one, in bitsandbytes' 4-bit formats
BLOCK = 128  # rows and columns that share a scale, where the grid of scales leaves a choice
CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCALES = (*FLOATS, torch.float8_e8m0fnu, torch.uint8)  # the last two are exponents of two, plus 127
WHOLE = (torch.int32, torch.int64)
Shape = tuple[int, ...]


def layer_misfit(format: str, shape: Shape, kinds: Kinds) -> str | None:
    """What is wrong with the tensors of a linear layer, as the end of a sentence; None if nothing is.

    Args:
        format: as `find_codec` calls it.
        shape: (out, in) of the weight.
        kinds: own name -> shape and dtype of what the checkpoint has there.

    >>> kinds = {"weight": ((4, 8), torch.int8), "weight_scale": ((3,), torch.float32)}
    >>> layer_misfit("int8", (4, 8), kinds)
    'weight_scale must have one number, one for each row, or one for each block'
    """
    rows, columns = shape
    bits = 8 if format.endswith("8") else 4
    if format == "nvfp4":
        ours = "weight_packed" in kinds
        whole = "weight_global_scale" if ours else "weight_scale_2"
        scales: dict[str, tuple[Shape, tuple[torch.dtype, ...]]] = {
            "weight_scale": ((rows, columns // 16), (torch.float8_e4m3fn,)), whole: ((1,), FLOATS),
        }  # fmt: skip
        return _unread(kinds, "weight_packed" if ours else "weight", *scales) or _differs(kinds, **scales)
    if "weight" in kinds:
        scale = "weight_scale_inv" if "weight_scale_inv" in kinds else "weight_scale"
        return _unread(kinds, "weight", scale) or _scale_misfit(scale, shape, kinds[scale])
    packed = "weight_packed" in kinds
    index, zeros, scale = (
        ("weight_g_idx", "weight_zero_point", "weight_scale") if packed else ("g_idx", "qzeros", "scales")
    )
    groups = kinds[scale][0][-1 if packed else 0] if len(kinds[scale][0]) == 2 else 0
    if not groups or (index not in kinds and columns % groups):
        return f"{scale} must have a row for each group of inputs, and {columns} inputs make no groups of equal size"

    def turned(out: int, group: int) -> Shape:
        return (out, group) if packed else (group, out)

    own = {"weight_packed", "weight_shape"} if packed else {"qweight"}
    return _unread(kinds, *own, index, zeros, scale) or _differs(
        kinds,
        **{
            scale: (turned(rows, groups), FLOATS),
            zeros: (turned(-(-rows * bits // 32), groups), (torch.int32,)),
            index: ((columns,), WHOLE),
            "weight_shape": ((2,), WHOLE),
        },
    )


def stack_misfit(format: str, shape: Shape, kinds: Kinds) -> str | None:
    """The same for stacked experts.

    Args:
        format: as `find_stack_codec` calls it.
        shape: (experts, ...) of the weight as its class has it.
        kinds: suffix -> shape and dtype.
    """
    count, rows, columns = shape
    if format == "fp8":
        codes, scale = kinds[""], kinds["_scale_inv"]
        if codes[0] != shape or codes[1] not in CODES or scale[0][:1] != (count,) or len(scale[0]) != 3:
            return f"codes of one byte must have the shape {list(shape)}, and scales one grid for each expert"
        return _scale_misfit("_scale_inv", shape[1:], (scale[0][1:], scale[1]))
    if format == "mxfp4":
        return _differs(kinds, _blocks=((count, columns, rows // 32, 16), (torch.uint8,)),
                        _scales=((count, columns, rows // 32), (torch.uint8,)))  # fmt: skip
    if format == "int8":
        return _differs(kinds, _int8=(shape, (torch.int8,)), _scb=((count, rows), (torch.float32,)))
    blocks = -(-rows * columns // BLOCK_4BIT)
    return _differs(
        kinds,
        **{f"_{format.partition('-')[0]}": ((count, rows, columns // 2), (torch.uint8,))},
        _absmax=((count, blocks), (torch.float32, torch.uint8)),
        _nested_absmax=((count, -(-blocks // NESTED)), (torch.float32,)),
        _offset=((count,), (torch.float32,)),
    )


def values_misfit(shape: Shape, groups: int, values: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the small tensors that say where numbers belong: `g_idx`, and `weight_shape`.

    Args:
        shape: (out, in) of the weight.
        groups: how many groups of inputs there are.
        values: own name -> tensor.
    """
    for name, tensor in values.items():
        if name == "weight_shape" and tensor.tolist() != list(shape):
            return f"weight_shape says {tensor.tolist()}"
        if name.endswith("g_idx") and (int(tensor.min()) < 0 or int(tensor.max()) >= groups):
            return f"{name} names group {int(tensor.max())} of {groups} (or a negative one)"
    return None


def _scale_misfit(name: str, sizes: Shape, kind: tuple[Shape, torch.dtype]) -> str | None:
    counts, dtype = kind
    if dtype not in SCALES:
        return f"{name} must be numbers with a point, or exponents in one byte, not {dtype}"
    grid = len(counts) == 2 and all(
        count == -(-size // BLOCK) or (count > 0 and size % count == 0) for size, count in zip(sizes, counts)
    )
    if math.prod(counts) == 1 or counts == sizes[:1] or grid:
        return None
    return f"{name} must have one number, one for each row, or one for each block"


def _differs(kinds: Kinds, **expected: tuple[Shape, tuple[torch.dtype, ...]]) -> str | None:
    """The first of some tensors that is not as expected; those that are not there are left out."""
    for name, (shape, dtypes) in expected.items():
        if name not in kinds:
            continue
        size, dtype = kinds[name]
        if (size or (1,)) != shape or dtype not in dtypes:
            return f"{name} must be {' or '.join(str(dtype) for dtype in dtypes)} {list(shape)}"
    return None


def _unread(kinds: Kinds, *names: str) -> str | None:
    """Whether there is something that belongs to a weight and that decoding would not read."""
    found = [name for name in kinds if name.startswith(("weight", "q", "scale", "g_idx")) and name not in names]
    return f"{min(found)} would not be read" if found else None
