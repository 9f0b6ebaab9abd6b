"""How the weights of a model are stored: the dtype, the quantization, and what a quantized weight takes.

Leaves out: which tensors of a model are concerned (`spec.py`), and the values (`quantize/`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..units import dtype_name

QUANTIZATIONS = ("int8", "nf4", "nf4-double", "fp4", "fp4-double")


@dataclass(frozen=True)
class Precision:
    """How a model's tensors are stored: the dtype they are cast to, then the quantization of its linear layers.

    Args:
        dtype: floating tensors are cast to it, integers and bools keep theirs; None keeps every tensor as it is.
        quantization: None, or one of `QUANTIZATIONS`, sized as bitsandbytes stores them: "int8" is LLM.int8 (one byte
            an element and a float32 scale per output row), "nf4" and "fp4" half a byte and a float32 scale per block of
            64, "-double" quantizes those scales to 8 bits in groups of 256.
        keep: full names of modules that stay in `dtype` though they are linear (the output head, tied modules).
        special: exact tensor name -> dtype, which overrides the rest.

    >>> Precision("torch.float16").dtype
    'float16'
    """

    dtype: str | None = None
    quantization: str | None = None
    keep: frozenset[str] = frozenset()
    special: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.dtype is not None:
            object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if isinstance(self.quantization, str):
            object.__setattr__(self, "quantization", self.quantization.lower())
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise ValueError(f"unknown quantization {self.quantization!r}: expected None or one of {QUANTIZATIONS}")
        object.__setattr__(self, "keep", frozenset(self.keep))
        items = dict(self.special).items()
        object.__setattr__(self, "special", tuple(sorted((name, dtype_name(dtype)) for name, dtype in items)))

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """`special` as a dict: exact tensor name -> dtype."""
        return dict(self.special)

    @property
    def label(self) -> str:
        """What a table calls this precision: the quantization if there is one, else the dtype."""
        return self.quantization or self.dtype or "as stored"


def is_named(name: str, names: Iterable[str]) -> bool:
    """Whether a module or tensor is one of `names`, or inside of one: each is a full name, or the end of one.

    Accelerate and Transformers match so too: "norm" is the end of "input_layernorm", "h.1" is not in "h.11".

    >>> [is_named("h.0.self_attn.q.weight", names) for names in (["attn"], ["h.0"], ["q.weight"], ["self"])]
    [True, True, True, False]
    """
    return any(f"{other}." in f"{name}." for other in names)


def float32_modules(facts: Mapping[str, Any], dtype: str | None) -> tuple[str, ...]:
    """Modules and tensors that a model's classes need in float32 when the rest is loaded in `dtype`.

    Transformers' classes list them in `_keep_in_fp32_modules` (for float16) and `_keep_in_fp32_modules_strict` (for
    float16 and bfloat16). See `is_named`.

    Args:
        facts: those of a `ModelSpec`.
        dtype: its plain name.
    """
    strict = tuple(facts.get("keep_in_fp32_strict", ())) if dtype in ("float16", "bfloat16") else ()
    return (*facts.get("keep_in_fp32", ()), *strict) if dtype == "float16" else strict


def quantized_bytes(shape: tuple[int, ...], quantization: str, rows: int, blocksize: int = 64) -> int:
    """Bytes that bitsandbytes needs to rest one weight, its scales and tables included.

    Args:
        shape: the weight's shape.
        quantization: one of `QUANTIZATIONS`.
        rows: output features, each of which has one float32 scale in LLM.int8.
        blocksize: elements that share one scale in 4 bit.

    Source: the bitsandbytes storage layout (`SCB`; `absmax`, `code`, `nested_absmax`, `nested_code`, `offset`).

    >>> quantized_bytes((4096, 4096), "nf4", 4096) * 8 / 4096**2   # bits per parameter: 4 + 32/64, and a 64-byte table
    4.500030517578125
    """
    elements = math.prod(shape)
    if quantization == "int8":
        return elements + 4 * rows
    blocks = math.ceil(elements / blocksize)
    code = 16 * 4  # the 16 values a 4-bit code stands for, float32
    if quantization.endswith("-double"):
        nested = 4 * math.ceil(blocks / 256) + 256 * 4 + 4  # scales of the scales, their 256-value table, their mean
        return math.ceil(elements / 2) + blocks + code + nested
    return math.ceil(elements / 2) + 4 * blocks + code
