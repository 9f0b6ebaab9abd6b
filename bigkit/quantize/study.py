"""What quantization does to a layer: which values its weights may take, how far they move, and how far its output does.

`study` quantizes a weight as bitsandbytes does and measures it on inputs that the layer really gets (`layers_of`
records them in a forward of the model). `planted` is a layer whose inputs have outliers, the case that LLM.int8 was
made for. A `Study` is plain numbers, so that a picture of it needs no torch. Errors are relative: the length of the
difference over the length of the original.

Leaves out: whole models (`load.py`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .bnb import block_scales, dequantized, empty_layer, nbytes, quantized
from .stored import BLOCKSIZES as BLOCKSIZES

BINS = 80


@dataclass(frozen=True)
class Scheme:
    """A way to quantize.

    Args:
        kind: "int8", "nf4" or "fp4".
        blocksize: weights that share a scale (4 bit); int8 has a scale for each row.
        double: whether the scales are quantized too (4 bit).
        threshold: inputs of this magnitude or more are multiplied in 16 bit (int8); 0 for none.

    Raises:
        ValueError: a kind or block size that does not exist, or a negative threshold.

    >>> Scheme("nf4", double=True).label
    'nf4, blocks of 64, double'
    """

    kind: str = "nf4"
    blocksize: int = 64
    double: bool = False
    threshold: float = 6.0

    def __post_init__(self) -> None:
        if self.kind not in ("int8", "nf4", "fp4"):
            raise ValueError(f"unknown kind {self.kind!r}: expected 'int8', 'nf4' or 'fp4'")
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"unknown block size {self.blocksize}: expected one of {BLOCKSIZES}")
        if not 0 <= self.threshold < float("inf"):
            raise ValueError(f"the threshold must be a number of 0 or more, not {self.threshold}")

    @property
    def label(self) -> str:
        """The scheme in words."""
        if self.kind == "int8":
            return f"int8, outliers from {self.threshold:g}" if self.threshold else "int8, no outliers apart"
        return f"{self.kind}, blocks of {self.blocksize}{', double' if self.double else ''}"


@dataclass(frozen=True)
class Study:
    """What a scheme does to one layer.

    Args:
        layer: its name.
        scheme: the scheme.
        shape: (out, in) of the weight.
        counts: how many weights, each divided by its scale, lie in each of `BINS` bins from -1 to 1.
        codes: the values that a code can stand for, from -1 to 1.
        nbytes: bytes of the quantized weight, scales and tables included.
        weight_error, output_error: how far weights and outputs move, relative to their length.
        outliers: how many inputs (features) reach the threshold for some token.
        features: the largest magnitude of each input (feature) over all tokens.
    """

    layer: str
    scheme: Scheme
    shape: tuple[int, int]
    counts: tuple[int, ...]
    codes: tuple[float, ...]
    nbytes: int
    weight_error: float
    output_error: float
    outliers: int
    features: tuple[float, ...] = ()

    @property
    def bits(self) -> float:
        """Bits for each weight."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def to_dict(self) -> dict[str, Any]:
        """The study as plain data."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Sample:
    """A layer to study: its weight (out, in), and inputs (tokens, in) that it gets."""

    name: str
    weight: Tensor
    inputs: Tensor

    @cached_property
    def outputs(self) -> Tensor:
        """(tokens, out), in full precision."""
        return F.linear(self.inputs, self.weight)


def study(sample: Sample, scheme: Scheme) -> Study:
    """Quantize a layer and measure it.

    Raises:
        ImportError: bitsandbytes is not there.

    >>> result = study(planted(), Scheme("int8", threshold=6.0))
    >>> result.outliers, result.output_error < study(planted(), Scheme("int8", threshold=0.0)).output_error / 2
    (3, True)
    """
    weight, x = sample.weight, sample.inputs
    double = scheme.double and scheme.kind != "int8"
    codes = quantized(weight, scheme.kind + "-double" * double, scheme.blocksize)
    if scheme.kind == "int8":
        outputs, inputs = weight.shape
        layer = empty_layer(nn.Linear(1, 1, bias=False), inputs, outputs, "int8", scheme.threshold, None)
        layer._parameters["weight"] = codes
        layer.eval()  # in training mode it would multiply without quantizing its inputs
        with torch.no_grad():
            output = layer(x.half()).float()  # all tokens at once: an outlier anywhere sets its feature apart
        scale = codes.SCB[:, None].expand_as(weight)  # type: ignore[attr-defined]
        rounded = codes.data.float() * scale / 127
        values = torch.arange(-127, 128) / 127
    else:
        scale = block_scales(codes).repeat_interleave(scheme.blocksize)[: weight.numel()].view_as(weight)
        rounded = dequantized(codes, torch.float32)
        output = F.linear(x, rounded)
        values = codes.quant_state.code  # type: ignore[attr-defined]
    return Study(
        layer=sample.name, scheme=scheme, shape=(weight.shape[0], weight.shape[1]),
        counts=tuple((weight / scale.clamp(min=1e-30)).clamp(-1, 1).histc(BINS, -1, 1).int().tolist()),
        codes=tuple(values.unique().tolist()), nbytes=nbytes(codes), weight_error=_error(rounded, weight),
        output_error=_error(output, sample.outputs),
        outliers=int((x.abs() >= scheme.threshold).any(0).sum()) if scheme.threshold else 0,
        features=tuple(x.abs().amax(0).tolist()),
    )  # fmt: skip


def _error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def planted(features: int = 256, outliers: int = 3, size: float = 60.0) -> Sample:
    """A layer of normally distributed weights and inputs; a few features are far larger, and their weights smaller.

    >>> planted().inputs.abs().amax(0).topk(4).values.round().tolist()[:3]
    [60.0, 60.0, 60.0]
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(features, features, generator=generator) / features**0.5
    x = torch.randn(128, features, generator=generator)
    chosen = torch.arange(outliers) * (features // outliers)
    x[:, chosen] = size
    weight[:, chosen] /= 4
    return Sample("planted outliers", weight, x)


def layers_of(model: nn.Module, tokens: Tensor) -> dict[str, Sample]:
    """The linear layers of a model with the inputs that they get for some tokens.

    Args:
        model: in full precision; it runs once.
        tokens: what it is called with, of shape (1, tokens).
    """
    samples: dict[str, Sample] = {}

    def record(name: str) -> Any:
        def hook(layer: Any, args: Any, output: Any) -> None:
            samples[name] = Sample(name, layer.weight.detach().float(), args[0].detach().float().flatten(0, -2))

        return hook

    hooks = [
        layer.register_forward_hook(record(name))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return samples
