"""Quantized models on fake GPUs: bitsandbytes' own Python for CUDA runs, and only its native kernels do nothing.

    quantize_empty      bitsandbytes' layers in an empty model
    fill_quantized      weights are quantized where they will work and then go where they rest, as in
                        `load_and_quantize_model`
    fake_bitsandbytes   its operations are followed into their Python (`_bnb.py` has how), and kernels are noted

Leaves out: outliers of LLM.int8 (no input reaches the threshold: those that do add their columns in 16 bit), and
int8 products' own rate (that of 16-bit ones is taken). Needs bitsandbytes, on a machine without a GPU too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from operator import attrgetter
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ..devices import Device
from ..machine.roofline import Operation
from ..model.spec import QUANTIZATIONS
from ..offload.codec import CODECS, TensorCodec
from ..offload.inputs import torch_device
from ..quantize import bnb as packed
from ..quantize.load import BnbQuantizationConfig, replace_with_bnb_layers
from ..quantize.replace import cast, layers_to_quantize
from ..quantize.stacks import replace_stacks, stacks_to_quantize
from ..units import dtype_name
from ._bnb import native_calls
from ._torch import QUESTIONS, FakeTensor, TorchDispatchMode, aten
from .costs import dense_bytes, tensors_in
from .fake_gpu import OperationLog
from .workload import at_random, fill, torch_places

PRODUCTS = ("cgemm_4bit", "cigemmlt")  # native functions that multiply: their first three whole numbers are the sizes
VECTORS = 8  # rows below which a 4-bit product waits for memory alone


def config_of(quantization: BnbQuantizationConfig | str, dtype: object = None) -> BnbQuantizationConfig:
    """The config that one of `QUANTIZATIONS` stands for; `dtype` is of the layers that stay, float16 if None.

    Raises:
        ValueError: there is no such quantization.

    >>> config_of("nf4-double", "bfloat16").bnb_4bit_use_double_quant
    True
    """
    if isinstance(quantization, BnbQuantizationConfig):
        return quantization
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"unknown quantization {quantization!r}: expected one of {', '.join(QUANTIZATIONS)}")
    kind, _, double = quantization.partition("-")
    half = getattr(torch, dtype_name(dtype or "float16"))
    if kind == "int8":
        return BnbQuantizationConfig(load_in_8bit=True, torch_dtype=half)
    return BnbQuantizationConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=bool(double),
        bnb_4bit_compute_dtype=half, torch_dtype=half,
    )  # fmt: skip


def quantize_empty(model: nn.Module, quantization: BnbQuantizationConfig) -> nn.Module:
    """Put bitsandbytes' layers into an empty model, and cast the rest, as `load_and_quantize_model` would."""
    stacks = stacks_to_quantize(model, quantization)
    replace_stacks(model, quantization)
    if layers_to_quantize(model, quantization, needed=not stacks):
        replace_with_bnb_layers(model, quantization)
    cast(model, quantization.torch_dtype, quantization.keep_in_fp32_modules or ())
    return model


def fill_quantized(
    model: nn.Module, device_map: Mapping[str, Device], main: torch.device | str | int,
    quantization: BnbQuantizationConfig, make: Callable[[Tensor, torch.device], nn.Parameter] = at_random,
) -> nn.Module:  # fmt: skip
    """`workload.fill` for a model with bitsandbytes' layers: each weight is quantized where it works, then put away.

    Works on real devices too, so that a prediction and a measurement are of the same work.

    Args:
        model: empty, with bitsandbytes' layers (`quantize_empty`); it is changed.
        device_map: module name -> where it rests.
        main: the device on which those work that rest in RAM.
        quantization: of the layers.
        make: gives other parameters: see `fill`.
    """
    bnb: Any = packed.bitsandbytes()
    place, main = torch_places(device_map), torch_device(main)
    weights: list[tuple[nn.Module, Tensor]] = []
    for name, module in model.named_modules():
        if not isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            continue
        rests = place(f"{name}.weight")
        works = main if rests.type == "cpu" else rests
        shape: Any = module.weight.shape
        whole = torch.empty(shape, dtype=quantization.torch_dtype, device=works).normal_(0, 0.02)
        weight: Tensor = packed.quantized(whole, quantization.quantization)
        del whole
        if rests != works:
            parts = {part: data.to(rests) for part, data in packed.take_apart(weight).items()}
            weight = packed.put_together(weight, parts)
        weights.append((module, weight))
        module._parameters["weight"] = None
    fill(model, device_map, make)
    for module, weight in weights:
        module._parameters["weight"] = weight  # type: ignore[assignment]
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Operations


@contextmanager
def fake_bitsandbytes(log: OperationLog) -> Iterator[None]:
    """Within it, a fake run's quantized operations do what bitsandbytes does on CUDA, as far as Python sees it."""
    asked = attrgetter("processors", "capability")
    log.trace.only_where(lambda other: asked(other) == asked(log.target))
    with ExitStack() as stack:
        enter = stack.enter_context
        kernels = enter(native_calls(partial(note_kernel, log), log.target.processors, log.target.capability))
        enter(mock.patch.object(packed, "int4_weight", _int4_weight))
        enter(mock.patch.object(packed, "int8_weight", _int8_weight))
        enter(mock.patch.dict(CODECS, dict.fromkeys((Params4bit, Int8Params), _CODEC)))
        enter(PythonKernels(log, kernels))
        yield


class PythonKernels(TorchDispatchMode):
    """Follows operations that are written in Python, so that what they ask for and call is noted one by one.

    Args:
        log: notes it.
        kernels: operation -> its function.
    """

    def __init__(self, log: OperationLog, kernels: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.log, self.kernels = log, kernels
        self.following = False
        self.norm: Callable[[], Any] = lambda: None  # of an int8 layer's input, which is compared with a threshold

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        filling = self.log.kind == "weights"
        if func in QUESTIONS and filling:  # the mean of scales, while a state dict is made
            return 0.0
        if func in QUESTIONS and (self.following or args[0] is self.norm()):  # whether there are outliers: no
            self.log.wait(args[0].device)
            return False
        if func is aten.linalg_vector_norm.default:
            norm = func(*args, **kwargs)
            self.norm = weakref.ref(norm)  # it dies as early as without us
            return norm
        if func not in self.kernels or not any(tensor.is_cuda for tensor in tensors_in(args)):
            return func(*args, **kwargs)
        before, self.following = self.following, True
        try:
            with self:
                return self.kernels[func](*args, **kwargs)
        finally:
            self.following = before


def note_kernel(log: OperationLog, name: str, arguments: tuple[Any, ...]) -> None:
    """Note a native kernel, which reads or writes each of its tensors once."""
    if log.kind == "weights":
        return
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    rows, columns, depth = ([value for value in arguments if type(value) is int] + [0, 0, 0])[:3]
    flops, dtype = 0, next((str(t.dtype) for t in tensors if t.is_floating_point()), "float32")
    if name.startswith("cigemmlt"):
        flops, dtype = 2 * rows * columns * depth, "float16"
    elif name.startswith(PRODUCTS) and "naive" not in name and tensors[0].numel() >= VECTORS * tensors[0].shape[-1]:
        flops = 2 * rows * columns * depth
    moved = sum(map(dense_bytes, tensors))
    rows_alone = tensors[0].numel() if name.startswith("cint8_vector_quant") else 0  # a block of threads for each
    device, dtype = str(tensors[0].device), dtype.removeprefix("torch.")
    log.trace.add(Operation(name, device, flops, moved, dtype, scattered=rows_alone))


# ---------------------------------------------------------------------------------------------------------------------
# Weights: bitsandbytes' classes cannot be made of fake tensors, so these stand for them


class Params4bit(FakeTensor):
    """A fake 4-bit weight: codes, with the attributes that bitsandbytes' layers read."""


class Int8Params(FakeTensor):
    """A fake int8 weight."""


def _int4_weight(codes: Tensor, state: Any) -> Any:
    return _weight(
        Params4bit, codes, quant_state=state, blocksize=state.blocksize, compress_statistics=state.nested,
        quant_type=state.quant_type, quant_storage=codes.dtype, bnb_quantized=True, module=None,
    )  # fmt: skip


def _int8_weight(codes: Tensor, scales: Tensor) -> Any:
    return _weight(Int8Params, codes, CB=codes, SCB=scales, has_fp16_weights=False)


def _weight(cls: type[FakeTensor], codes: Tensor, **attributes: Any) -> Any:
    weight: Any = codes.detach()
    weight.__class__ = cls
    weight._is_param = True
    vars(weight).update(attributes)
    return weight


_CODEC = TensorCodec(packed.take_apart, packed.put_together, packed.skeleton, ("", "absmax", "nested_absmax", "SCB"))
