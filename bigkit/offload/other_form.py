"""A weight that rests elsewhere gets another shape or dtype, as `resize_token_embeddings` of Transformers wants.

Leaves out: values of the same form (`Weight.keep`), and parameters that are replaced by others (`offload/sites.py`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..checkpoints.ring import Slab
from ..meta.empty import twin
from ._torch import DisableTorchFunctionSubclass
from .codec import PLAIN, codec_of
from .weights import Weight, part_of


@torch.inference_mode(False)
def keep_other_form(weight: Weight, value: Tensor) -> None:
    """Let a weight rest in RAM as `value` is. Its handle stays; its units are laid out anew, and get new slots.

    Args:
        weight, value: the weight, and its new data.

    Raises:
        ValueError: the weight is quantized, a forward is running, or the value has no dense data.
    """
    given = f"{weight.name!r} rests as {tuple(weight.template.shape)} {weight.template.dtype} and cannot become"
    if codec_of(weight.template) is not PLAIN or value.layout != torch.strided or value.is_meta:
        raise ValueError(
            f"{given} {tuple(value.shape)} {value.dtype}: call remove_hook_from_module(model, recurse=True), change "
            "it, and dispatch the model again"
        )
    group = (weight, *weight.aliases)
    lenders = {same.lender for same in group}
    if any(lender._loans for lender in lenders):
        raise ValueError(f"{given} {tuple(value.shape)} {value.dtype} while a forward runs: change it between forwards")
    part = part_of(value)
    part.slab = Slab(part.nbytes)
    part.on_cpu().copy_(value.detach())
    meta = torch.empty_strided(part.shape, part.stride, dtype=part.dtype, device="meta")
    for lender in lenders:
        lender.let_go()
    for same in group:
        same.template = twin(same.template, meta) if isinstance(same.template, nn.Parameter) else meta
        same.parts = {"": replace(part)}
    for same in group:
        unit = same.lender.units[same.index]
        unit.lay_out()
        same.lender._forget(unit)
    with DisableTorchFunctionSubclass():
        weight.away.data = meta
    weight.outside.follow(weight, value)
