"""What is private in bitsandbytes and quantized dry runs need, in one place. Seen in bitsandbytes 0.49 and 0.50.

bitsandbytes' operations (`torch.ops.bitsandbytes.gemm_4bit`, ...) have a Python part for CUDA, which decides between a
fused kernel and dequantizing, and asks for every temporary tensor; then it calls a native library with pointers. That
Python part is read a second time here, with another library in the place of the native one: it gets the tensors instead
of their pointers, and can note what a kernel reads, writes and computes. So every version's own decisions are followed.

tests/dryrun/test_private_parts.py says which name is gone.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from ..quantize.bnb import bitsandbytes
from ._torch import FakeTensor

Call = Callable[[str, tuple[Any, ...]], None]


class NativeLibrary:
    """Stands for the native library: each of its functions gives its name and arguments to `call`, and does nothing.

    Arguments are plain: tensors and numbers.
    """

    call: Call | None = None

    def __getattr__(self, name: str) -> Any:
        def function(*arguments: Any) -> int:
            assert self.call is not None, f"{name} is called outside of a dry run"
            self.call(name, tuple(getattr(argument, "value", argument) for argument in arguments))
            return 0

        setattr(self, name, function)
        return function


@contextmanager
def native_calls(call: Call, processors: int, capability: tuple[int, int]) -> Iterator[dict[Any, Callable[..., Any]]]:
    """Within it, bitsandbytes' Python for CUDA can run on fake tensors.

    Args:
        call: gets the name and the arguments of each native function.
        processors, capability: what bitsandbytes asks of the GPU to choose its kernels.

    Yields:
        operation -> the function that does it on CUDA.
    """
    functional: Any = bitsandbytes().functional
    module, functions, library = _cuda_kernels()
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(library, "call", call))
        if hasattr(module, "_gpu_dispatch_props"):
            enter(mock.patch.object(module, "_gpu_dispatch_props", lambda index: (processors, *capability)))
        if hasattr(module, "_gemm_4bit_use_custom_cuda"):  # remembers what it decided, for one GPU of each number
            module._gemm_4bit_use_custom_cuda.cache_clear()
        enter(mock.patch.object(FakeTensor, "data_ptr", lambda tensor: tensor, create=True))
        enter(mock.patch.dict(functional.name2qmap, clear=True))  # tables that it keeps would be fake, and stay
        enter(mock.patch.object(functional, "create_dynamic_map", lambda: torch.empty(256)))
        enter(mock.patch.object(logging.getLogger("bitsandbytes.autograd._functions"), "disabled", True))  # on dtypes
        yield functions


@cache
def _cuda_kernels() -> tuple[ModuleType, dict[Any, Callable[..., Any]], NativeLibrary]:
    """bitsandbytes' Python for CUDA, read again: the module, operation -> function, and the library that it calls."""
    library = NativeLibrary()
    kernels: dict[str, Callable[..., Any]] = {}

    def register_kernel(name: str, device: str) -> Any:
        def note(function: Callable[..., Any]) -> Callable[..., Any]:
            kernels[name] = function
            return function

        return note

    with (
        mock.patch("bitsandbytes._ops.register_kernel", register_kernel),
        mock.patch("bitsandbytes.cextension.lib", library),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: None, create=True),
    ):
        _read_again("default")
        module = _read_again("cuda")
    stand_ins: dict[str, Any] = {
        "get_ptr": lambda tensor: tensor,
        "_cuda_device_of": lambda tensor: nullcontext(),
        "_get_raw_stream": lambda *_: None,
        "_get_tensor_stream": lambda *_: None,
        "CUBLAS_Context": mock.MagicMock(),
    }
    for name in stand_ins.keys() & vars(module).keys():
        setattr(module, name, stand_ins[name])
    functions = {}
    for name, function in kernels.items():
        packet, _, overload = name.removeprefix("bitsandbytes::").partition(".")
        functions[getattr(getattr(torch.ops.bitsandbytes, packet), overload or "default")] = function
    return module, functions, library


def _read_again(backend: str) -> ModuleType:
    """Execute `bitsandbytes/backends/<backend>/ops.py` as a new module."""
    path = Path(str(bitsandbytes().__file__)).parent / "backends" / backend / "ops.py"
    name = f"bitsandbytes.backends.{backend}._dry_run"
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
