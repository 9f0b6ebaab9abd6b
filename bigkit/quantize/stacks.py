"""Experts of a mixture in few bits: the matrices of a stack (experts, rows, columns) are quantized one by one.

bitsandbytes quantizes matrices of linear layers; Transformers holds all experts of a block in two stacks, which are no
layers. Here each expert is quantized as bitsandbytes quantizes a matrix. No block of scales crosses from one expert to
the next, so the codes and scales of an expert are rows of a few plain tensors: they can be read, moved and decoded
without the others. What holds them and decodes the chosen ones is `checkpoints/as_stored.py`.

    nf4, fp4    _nf4 (experts, rows, columns / 2) uint8, _absmax (experts, blocks) float32
    -double     _absmax in uint8, and _nested_absmax (experts, groups) and _offset (experts,) in float32
    int8        _int8 (experts, rows, columns), _scb (experts, rows) float32; weights only, inputs stay in 16 bit

Leaves out: which stacks are quantized (`ModelSpec.quantized_stacks`), and kernels that multiply with the codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.as_stored import hold_stack
from ..checkpoints.codecs import STACK_CODECS, StackCodec
from ..checkpoints.fits import BLOCK_4BIT, NESTED
from ..meta.skeleton import spec_from_module
from ..model.precision import is_named, quantized_stacks
from .bnb import quantized, take_apart
from .config import BnbQuantizationConfig

OWN = {"absmax": "_absmax", "nested_absmax": "_nested_absmax", "SCB": "_scb"}  # bitsandbytes' name of a part -> ours


def stacks_to_quantize(model: nn.Module, config: BnbQuantizationConfig) -> list[str]:
    """Names of the stacked weights of a model that are to be quantized: those that plans and estimates count so."""
    spec, fp32 = spec_from_module(model), config.keep_in_fp32_modules or ()
    stacks = quantized_stacks(spec, spec.precision(config.torch_dtype, config.quantization, config.skip_modules))
    return [name for name in stacks if not is_named(name, fp32)]


def codec_for(quantization: str) -> StackCodec:
    """The format of one of `QUANTIZATIONS`."""
    return next(codec for codec in STACK_CODECS if codec.format == quantization)


def quantized_stack(
    experts: Iterable[Tensor], count: int, quantization: str, memory: torch.device
) -> dict[str, nn.Parameter]:
    """Quantize the experts of a stack where they lie, one after another.

    Args:
        experts: the matrices, (rows, columns) each, with an even number of columns.
        count: how many there are.
        quantization: one of `QUANTIZATIONS`.
        memory: where the result goes.

    Returns:
        The suffixes of the format -> its tensors, of all experts.

    >>> stack = torch.randn(3, 8, 64)
    >>> {name: (tuple(part.shape), part.dtype) for name, part in quantized_stack(stack, 3, "nf4", stack.device).items()}
    {'_nf4': ((3, 8, 32), torch.uint8), '_absmax': ((3, 8), torch.float32)}
    """
    kind = quantization.partition("-")[0]
    parts: dict[str, Tensor] = {}
    for number, expert in enumerate(experts):
        for suffix, part in _parts(expert, quantization, kind).items():
            if suffix not in parts:
                parts[suffix] = torch.empty((count, *part.shape), dtype=part.dtype, device=memory)
            parts[suffix][number] = part
    return {suffix: nn.Parameter(part, requires_grad=False) for suffix, part in parts.items()}


def _parts(expert: Tensor, quantization: str, kind: str) -> dict[str, Tensor]:
    weight: Any = quantized(expert, quantization)
    apart = take_apart(weight)
    codes = apart.pop("")
    found = {f"_{kind}": codes.view(len(expert), -1), **{OWN[name]: part for name, part in apart.items()}}
    if quantization.endswith("-double"):
        found["_offset"] = weight.quant_state.offset
    return found


def empty_stack(shape: tuple[int, ...], quantization: str) -> dict[str, nn.Parameter]:
    """What `quantized_stack` gives for a stack of this shape, on meta."""
    count, rows, columns = shape
    kind, blocks = quantization.partition("-")[0], -(-rows * columns // BLOCK_4BIT)
    forms: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        f"_{kind}": ((rows, columns // 2), torch.uint8),
        "_int8": ((rows, columns), torch.int8),
        "_scb": ((rows,), torch.float32),
        "_absmax": ((blocks,), torch.uint8 if quantization.endswith("-double") else torch.float32),
        "_nested_absmax": ((-(-blocks // NESTED),), torch.float32),
        "_offset": ((), torch.float32),
    }
    return {
        suffix: nn.Parameter(
            torch.empty((count, *forms[suffix][0]), dtype=forms[suffix][1], device="meta"), requires_grad=False
        )
        for suffix in codec_for(quantization).suffixes
    }


def hold(model: nn.Module, name: str, config: BnbQuantizationConfig, parts: Mapping[str, nn.Parameter]) -> None:
    """Put a quantized stack into a model in the place of a weight; it is decoded to the dtype of what stays."""
    module, _, own = name.rpartition(".")
    holder: Any = model.get_submodule(module)
    hold_stack(holder, own, codec_for(config.quantization), parts)
    holder.works_in = config.torch_dtype


def replace_stacks(model: nn.Module, config: BnbQuantizationConfig) -> nn.Module:
    """Give an empty model quantized stacks, without data."""
    for name in stacks_to_quantize(model, config):
        shape = tuple(model.get_parameter(name).shape)
        hold(model, name, config, empty_stack(shape, config.quantization))
    return model
