"""What is private in bitsandbytes and needed here, each named once. All of it was seen in bitsandbytes 0.50.

Its public classes and functions are used where they are needed; `layers.py` says what bigkit's layers do otherwise than
bitsandbytes'. `tests/quantize/test_private_parts.py` says in a sentence what is gone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

# Logger, words of its message. The first names a kernel for some CPUs that cannot be downloaded, when bitsandbytes is
# imported; bigkit's layers would not use it. The second says at every forward of every int8 layer how LLM.int8 works.
KERNEL_WARNING = ("bitsandbytes.backends.cpu.ops", "gemm_4bit_forward")
CAST_WARNING = ("bitsandbytes.autograd._functions", "inputs will be cast")


@contextmanager
def without(warning: tuple[str, str]) -> Iterator[None]:
    """Within it, one of the warnings above is not logged; others are, and its logger is afterwards as it was."""
    name, words = warning
    logger = logging.getLogger(name)

    def is_another(record: logging.LogRecord) -> bool:
        return words not in str(record.msg)

    logger.addFilter(is_another)
    try:
        yield
    finally:
        logger.removeFilter(is_another)


@contextmanager
def compiling_later() -> Iterator[None]:
    """Within it, `torch.compile` compiles when a function is first called, in place of importing the compiler at once.

    bitsandbytes decorates functions with it that few call, and the compiler takes seconds to import.
    """
    compiler = torch.compile

    def later(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        if function is None:
            return partial(later, **options)
        compiled = cache(partial(compiler, function, **options))
        return wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


def int8_product(x: Tensor, weight: Any, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The three kernels of a forward of LLM.int8 without outliers: x (rows, in) float16 -> (rows, out) in `dtype`."""
    kernels = torch.ops.bitsandbytes
    codes, scales, _ = kernels.int8_vectorwise_quant.default(x, 0.0)
    product = kernels.int8_linear_matmul.default(codes, weight.data)
    bias = None if bias is None else bias.to(dtype)
    output: Tensor = kernels.int8_mm_dequant.default(product, scales, weight.SCB, dtype=dtype, bias=bias)
    return output


def keep_codes(layer: nn.Module) -> None:
    """Keep a 4-bit layer from packing its codes anew on CPUs with AVX512-BF16: in place, and with rounded scales."""
    layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def is_packed_anew(state: Any) -> bool:
    """Whether a forward on such a CPU has packed the codes of this `QuantState` anew."""
    return hasattr(state, "original_qshape")


def give_scales_back(weight: Any, layer: Any) -> None:
    """Undo what bitsandbytes' int8 layer does when it first runs: it takes the scales from its weight.

    From now on it does not: it becomes one of bigkit's layers. `MatmulLtState.CB` and `.SCB`.
    """
    from .layers import adopt

    adopt(layer)
    state: Any = getattr(layer, "state", None)
    if getattr(weight, "SCB", state) is None and getattr(state, "SCB", None) is not None:
        weight.CB, weight.SCB = state.CB, state.SCB
        state.CB = state.SCB = None
