"""bitsandbytes' linear layers, with what bigkit needs them to do otherwise.

Importing this file imports bitsandbytes: `bnb.empty_layer` does, when the first layer is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..meta.skeleton import extra_tensors
from . import _bnb, bnb

bitsandbytes: Any = bnb.bitsandbytes()


class _SavesScales(nn.Module):
    """A layer whose state dict has the scales of its weight (in RAM) when that rests elsewhere, too."""

    weight: Any
    bias: Any
    state: Any
    compute_dtype: Any
    in_features: int
    out_features: Any

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not hasattr(self.weight, "streamer"):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        scales = extra_tensors(self, load=True)  # may be views of the memory where many weights rest
        destination.update({prefix + name: tensor.clone() for name, tensor in scales.items()})


class Linear8bitLt(_SavesScales, bitsandbytes.nn.Linear8bitLt):
    """bitsandbytes' int8 layer, with a weight that stays whole: theirs takes the scales away when it first runs.

    Without outliers and gradients it calls the kernels itself, to the same bits and with less Python around them.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        weight, state, bias = self.weight, self.state, self.bias
        _refuse_meta(weight, x)
        if weight.SCB is None:  # not quantized yet
            return super().forward(x)
        learns = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        if not (self.training or learns or torch.compiler.is_compiling()) and x.numel():
            rows = x.reshape(-1, self.in_features).to(torch.float16)
            if not state.threshold or not bnb.has_outliers(rows, state.threshold):
                return _bnb.int8_product(rows, weight, bias, x.dtype).view(*x.shape[:-1], self.out_features)
        state.CB, state.SCB, weight.CB = weight.data, weight.SCB, None
        if torch.compiler.is_compiling():
            output: Tensor = super().forward(x)
        else:
            with _bnb.without(_bnb.CAST_WARNING):
                output = super().forward(x)
        if not output.requires_grad:  # a backward needs them
            state.CB = state.SCB = None
        return output

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.weight is not None and self.weight.SCB is not None:
            self.weight.SCB = self.weight.SCB.to(self.weight.device)
        return self


class Linear4bit(_SavesScales, bitsandbytes.nn.Linear4bit):
    """bitsandbytes' 4-bit layer, right on a CPU too where blocks of weights go on from one row to the next.

    Its kernel for CPUs with AVX512 then takes the wrong scales (seen in 0.50 with 32, 48, 96 and 160 inputs in blocks
    of 64): rounding off by tens of percents, and no error.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _bnb.keep_codes(self)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        _refuse_meta(self.weight, x)
        state = getattr(self.weight, "quant_state", None)
        if x.device.type != "cpu" or state is None or self.in_features % state.blocksize == 0:
            output: Tensor = super().forward(x)
            return output
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return nn.functional.linear(x.to(dtype), bnb.dequantized(self.weight, dtype), bias).to(x.dtype)


def adopt(layer: nn.Module) -> None:
    """Let a layer of bitsandbytes' own class do what the one above does, with the weight and the settings it has."""
    if type(layer) is bitsandbytes.nn.Linear8bitLt:
        layer.__class__ = Linear8bitLt
    elif type(layer) is bitsandbytes.nn.Linear4bit:
        layer.__class__ = Linear4bit
        _bnb.keep_codes(layer)


def _refuse_meta(weight: Tensor, x: Tensor) -> None:
    """PyTorch's own products refuse a weight on meta; bitsandbytes' kernels would read from address 0."""
    if weight.is_meta and not x.is_meta:
        raise RuntimeError(
            f"a quantized weight of shape {tuple(weight.shape)} is on meta: it has no data to multiply "
            f"{tuple(x.shape)} with. Load the model again"
        )
