"""Quantized models on fake GPUs: bitsandbytes' own code for CUDA runs, and only its native kernels do nothing.

bitsandbytes' operations (`torch.ops.bitsandbytes.gemm_4bit`, ...) have a Python part for CUDA, which decides between a
fused kernel and dequantizing, and asks for every temporary tensor; then it calls a native library with pointers. Here
that Python part is read a second time with another library in the place of the native one: it gets the tensors
instead of their pointers, and notes what a kernel reads, writes and computes. So every version's own decisions are the
ones that are foretold. Weights are quantized where they will work and then go where they rest, as in
`load_and_quantize_model`.

Leaves out: outliers of LLM.int8 (no input reaches the threshold: those that do add their columns in 16 bit), and
int8 products' own rate (that of 16-bit ones is taken). Needs bitsandbytes, on a machine without a GPU too.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..devices import Device
from ..model.spec import QUANTIZATIONS
from ..offload.codec import CODECS, TensorCodec
from ..quantize import bnb as packed
from ..quantize.load import BnbQuantizationConfig, replace_with_bnb_layers
from ..units import dtype_name
from .fake_gpu import Notebook
from .workload import device_of, fill

PRODUCTS = ("cgemm_4bit", "cigemmlt")  # native functions that multiply: their first three whole numbers are the sizes
VECTORS = 8  # rows below which a 4-bit product waits for memory alone


def config_of(quantization: BnbQuantizationConfig | str, dtype: object = None) -> BnbQuantizationConfig:
    """The config that a name of `layers.QUANTIZATIONS` stands for; `dtype` is of the rest, float16 if None.

    Raises:
        ValueError: there is no such quantization.

    >>> config_of("nf4-double", "bfloat16").bnb_4bit_use_double_quant
    True
    """
    if isinstance(quantization, BnbQuantizationConfig):
        return quantization
    kind, _, double = quantization.partition("-")
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"unknown quantization {quantization!r}: expected one of {', '.join(QUANTIZATIONS)}")
    rest = getattr(torch, dtype_name(dtype or "float16"))
    if kind == "int8":
        return BnbQuantizationConfig(load_in_8bit=True, torch_dtype=rest)
    return BnbQuantizationConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=bool(double),
        bnb_4bit_compute_dtype=rest, torch_dtype=rest,
    )  # fmt: skip


@contextmanager
def fake_bitsandbytes(notes: Notebook) -> Iterator[None]:
    """Within it, a fake run's quantized operations do what bitsandbytes does on CUDA, as far as Python sees it."""
    bnb: Any = packed.bitsandbytes()
    module, functions, native = _kernels()
    native.notes = notes
    target = notes.target
    with ExitStack() as stack:
        enter = stack.enter_context
        props = (target.processors, *target.capability)
        if hasattr(module, "_gpu_dispatch_props"):
            enter(mock.patch.object(module, "_gpu_dispatch_props", lambda index: props))
        if hasattr(module, "_gemm_4bit_use_custom_cuda"):  # remembers what it decided, for one GPU of each number
            module._gemm_4bit_use_custom_cuda.cache_clear()
        enter(mock.patch.object(FakeTensor, "data_ptr", lambda tensor: tensor, create=True))
        enter(mock.patch.dict(bnb.functional.name2qmap, clear=True))
        enter(mock.patch.object(bnb.functional, "create_dynamic_map", lambda: torch.empty(256)))
        enter(mock.patch.object(packed, "int4_weight", _int4_weight))
        enter(mock.patch.object(packed, "int8_weight", _int8_weight))
        enter(mock.patch.object(packed, "has_outliers", partial(_reach, notes)))
        enter(mock.patch.dict(CODECS, dict.fromkeys((Params4bit, Int8Params), _CODEC)))
        enter(mock.patch.object(notes, "kernels", functions))
        enter(mock.patch.object(logging.getLogger("bitsandbytes.autograd._functions"), "disabled", True))
        yield


def _reach(notes: Notebook, x: Tensor, threshold: float) -> bool:
    torch.linalg.vector_norm(x, math.inf)
    notes.wait(x.device)
    return False


def fill_quantized(
    model: nn.Module, device_map: Mapping[str, Device], main: torch.device, quantization: BnbQuantizationConfig
) -> nn.Module:
    """`workload.fill` for a model with bitsandbytes' layers: each weight is quantized where it works, then put away.

    Works on real devices too: what is foretold and measured is the same work.
    """
    bnb: Any = packed.bitsandbytes()
    made: dict[str, tuple[nn.Module, Tensor]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            continue
        rests = device_of(f"{name}.weight", device_map)
        works = main if rests.type == "cpu" else rests
        shape: Any = module.weight.shape
        whole = torch.empty(shape, dtype=quantization.torch_dtype, device=works).normal_(0, 0.02)
        weight: Tensor = packed.quantized(whole, quantization.quantization)
        del whole
        if rests != works:
            parts = {part: data.to(rests) for part, data in packed.take_apart(weight).items()}
            weight = packed.put_together(weight, parts)
        made[name] = module, weight
        module._parameters["weight"] = None
    fill(model, device_map)
    for module, weight in made.values():
        module._parameters["weight"] = weight  # type: ignore[assignment]
    return model


def quantize_empty(model: nn.Module, quantization: BnbQuantizationConfig) -> nn.Module:
    """Put bitsandbytes' layers into an empty model, and cast the rest, as `load_and_quantize_model` would."""
    replace_with_bnb_layers(model, quantization)
    fp32 = tuple(quantization.keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            kept = any(f".{other}." in f".{name}." for other in fp32)
            parameter.data = parameter.data.to(torch.float32 if kept else quantization.torch_dtype)
    return model


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
    made: Any = codes.detach()
    made.__class__ = cls
    made._is_param = True
    vars(made).update(attributes)
    return made


_CODEC = TensorCodec(packed.take_apart, packed.put_together, packed.skeleton, ("", "absmax", "nested_absmax", "SCB"))


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


class _Native:
    """Stands for bitsandbytes' native library: every function of it takes tensors, notes them and does nothing."""

    notes: Notebook

    def __getattr__(self, name: str) -> Any:
        def function(*arguments: Any) -> int:
            values = [getattr(argument, "value", argument) for argument in arguments]
            tensors = [value for value in values if isinstance(value, Tensor)]
            sizes = [value for value in values if type(value) is int][:3]
            flops = 0
            if name.startswith(PRODUCTS):
                vector = "naive" in name or tensors[0].numel() < VECTORS * tensors[0].shape[-1]
                flops = 2 * sizes[0] * sizes[1] * sizes[2] if not vector or name.startswith("cigemmlt") else 0
            self.notes.kernel(name, tensors, flops, "float16" if name.startswith("cigemmlt") else "")
            return 0

        setattr(self, name, function)
        return function


@cache
def _kernels() -> tuple[types.ModuleType, dict[Any, Callable[..., Any]], _Native]:
    """bitsandbytes' Python for CUDA, read again: the module, operation -> function, and the library it calls."""
    bnb: Any = packed.bitsandbytes()
    native = _Native()
    found: dict[str, Callable[..., Any]] = {}

    def register_kernel(name: str, device: str) -> Any:
        def note(function: Callable[..., Any]) -> Callable[..., Any]:
            found[name] = function
            return function

        return note

    with ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch("bitsandbytes._ops.register_kernel", register_kernel))
        enter(mock.patch("bitsandbytes.cextension.lib", native))
        enter(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: None, create=True))
        _read_again(bnb, "default")
        module = _read_again(bnb, "cuda")
    nothing: Any = lambda *_: None  # noqa: E731
    for name, value in {
        "get_ptr": lambda tensor: tensor, "_cuda_device_of": lambda tensor: nullcontext(), "_get_raw_stream": nothing,
        "_get_tensor_stream": nothing, "CUBLAS_Context": mock.MagicMock(),
    }.items():  # fmt: skip
        if hasattr(module, name):
            setattr(module, name, value)
    functions = {}
    for name, function in found.items():
        packet, _, overload = name.removeprefix("bitsandbytes::").partition(".")
        functions[getattr(getattr(torch.ops.bitsandbytes, packet), overload or "default")] = function
    return module, functions, native


def _read_again(bnb: Any, backend: str) -> types.ModuleType:
    path = Path(bnb.__file__).parent / "backends" / backend / "ops.py"
    name = f"bitsandbytes.backends.{backend}._rehearsed"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.exists():
        raise ImportError(f"{path} is missing: quantized dry runs read it, which bitsandbytes 0.46 and later have")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module
