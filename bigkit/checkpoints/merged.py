"""Experts whose codes and scales a checkpoint has one by one, as the stacks that the model's class has.

DeepSeek's and Qwen's FP8 files hold `experts.3.gate_proj.weight` in one byte and its `weight_scale_inv`; Transformers'
classes hold one `experts.gate_up_proj` of all. What is done to the codes (put side by side, stacked) is done to the
scales as well, if no block of 128 x 128 is cut where two weights meet: so the stack stays in FP8, with its scales.

Leaves out: other formats one by one, which are refused with a sentence; and decoding (`codecs.py`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from ..model.header import CheckpointError
from ..units import listed
from ._transformers import Made, conversions
from .codecs import Kinds, Parts
from .fits import BLOCK
from .format import Checkpoint

SCALES = (".weight_scale_inv", ".weight_scale")
_OTHERS = (".qweight", ".weight_packed", ".weight_blocks")


def stack_experts(model: nn.Module, source: Checkpoint) -> dict[str, Kinds]:
    """Let a checkpoint have stacked codes and scales in place of those of each expert.

    Args:
        model: only its stacks are looked at.
        source: the checkpoint; each expert's own tensors are set aside.

    Returns:
        Module -> own names of what it has now, with shape and dtype.

    Raises:
        CheckpointError: experts are stored one by one in a way that cannot be stacked.
    """
    modules = {name for name, _ in model.named_modules()}
    stacks = [name for name, tensor in model.named_parameters() if tensor.ndim == 3]
    around = {f"{name.rpartition('.')[0]}." for name in stacks}
    alone = [name for name in source if name.rpartition(".")[0] not in modules and name.startswith(tuple(around))]
    scale_of = {name.removesuffix(end) + ".weight": name for name in alone for end in SCALES if name.endswith(end)}
    if other := [name for name in alone if name.endswith(_OTHERS)]:
        raise CheckpointError(_refusal(source, other))
    codes = [name for name in scale_of if name in source and source.shape_and_dtype(name)[1].itemsize == 1]
    if not codes:
        return {}
    uneven = [name for name in codes if not _even(source, name, scale_of[name])]
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    of_codes = {} if uneven else conversions(model, tensors, codes, source.shape_and_dtype)[1]
    of_scales = conversions(model, tensors, codes, lambda name: source.shape_and_dtype(scale_of[name]))[1]
    if uneven or of_codes.keys() != of_scales.keys() or not of_codes:
        raise CheckpointError(_refusal(source, uneven or codes))
    aside = {name: source.set_aside(name) for name in (*codes, *(scale_of[name] for name in codes))}
    found: dict[str, dict[str, Any]] = {}
    for full in of_codes:
        module, _, own = full.rpartition(".")
        for name, made, places in (
            (full, of_codes[full], aside),
            (f"{full}_scale_inv", of_scales[full], {code: aside[scale_of[code]] for code in codes}),
        ):
            known = {part: places[part] for part in made.sources}
            convert = partial(_convert, made, full, name, known)
            source.made[name] = Made(name, made.shape, made.dtype, tuple(known.values()), convert)
            found.setdefault(module, {})[name[len(module) + 1 :]] = (made.shape, made.dtype)
    return found  # type: ignore[return-value]


def _convert(made: Made, full: str, name: str, places: dict[str, str], tensors: Parts) -> dict[str, Tensor]:
    return {name: made.convert({part: tensors[place] for part, place in places.items()})[full]}


def _even(source: Checkpoint, code: str, scale: str) -> bool:
    """Whether a weight is of whole blocks, so that another can be put beside it: one scale, or one for each 128."""
    (sizes, _), (counts, _) = source.shape_and_dtype(code), source.shape_and_dtype(scale)
    return len(counts) == len(sizes) and all(n in (1, size) or size == BLOCK * n for size, n in zip(sizes, counts))


def _refusal(source: Checkpoint, names: list[str]) -> str:
    return (
        f"{source.path} stores experts one by one in few bits ({listed(names, 2)}), in a way that cannot be stacked as "
        "the model's class has them: bigkit stacks FP8 with a scale for each weight, row or whole block of 128 x 128. "
        "Decode them with Transformers and save them, or run this file with vLLM"
    )
