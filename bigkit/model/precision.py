"""How the weights of a model are stored: the dtype, the quantization, and what a quantized weight takes.

Leaves out: what a model consists of (`spec.py`), and the values (`quantize/`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from ..devices import prefixes
from ..units import dtype_bits, dtype_name, is_floating

if TYPE_CHECKING:
    from .spec import ModelSpec, ModuleSpec, TensorSpec

QUANTIZATIONS = ("int8", "nf4", "nf4-double", "fp4", "fp4-double")
READ = ("dt_proj",)  # layers that are never quantized: the code of state spaces multiplies their weights by itself


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

    @cached_property
    def named(self) -> frozenset[str]:
        """Every name in `keep` and `special`."""
        return self.keep.union(self.dtypes)

    @cached_property
    def around(self) -> frozenset[str]:
        """These, and the names of all modules around them."""
        return frozenset(prefix for name in self.named for prefix in prefixes(name))

    @cached_property
    def sizes(self) -> dict[tuple[ModuleSpec, str, bool], int]:
        """What `ModuleSpec.bytes` has counted of modules whose size depends on their name."""
        return {}

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
    ended = f"{name}."
    return any(f"{other}." in ended for other in names)


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


@lru_cache(16)  # a model never changes
def precision_of(
    model: ModelSpec,
    dtype: str | None,
    quantization: str | None,
    keep: tuple[str, ...] | None,
    special: tuple[tuple[str, str], ...],
) -> Precision:
    """What `ModelSpec.precision` returns, for plain names of dtypes."""
    own = float32_modules(model.facts, dtype)
    tensors = model.tensors.items() if own else ()
    floats = [name for name, (tensor, _) in tensors if is_named(name, own) and is_floating(tensor.dtype)]
    names = [*(keep or ()), *model.facts.get("keep_in_fp32", ()), *READ]
    exact = model.kept if keep is None else model.tied
    if quantization == "int8":
        exact = exact.union(model.facts.get("keep_in_int8", ()))
    walk = model.root.walk() if quantization else ()
    able = [name for name, module in walk if module.linear or is_stacked(module)]
    kept = frozenset(name for name in able if exact.intersection(prefixes(name)) or is_named(name, names))
    return Precision(dtype, quantization, kept, tuple({**dict.fromkeys(floats, "float32"), **dict(special)}.items()))


def tensor_bytes(name: str, tensor: TensorSpec, owner: ModuleSpec, precision: Precision) -> int:
    """Bytes that the tensor called `name` takes when its module `owner` is stored with `precision`."""
    if name in precision.dtypes:
        return math.ceil(tensor.elements * dtype_bits(precision.dtypes[name]) / 8)
    if not precision.quantization or tensor.buffer or precision.keep.intersection(prefixes(name)[:-1]):
        return tensor.bytes(precision.dtype)
    if is_stack(tensor, owner):
        count, *shape = tensor.shape
        return count * stacked_bytes(tuple(shape), precision.quantization)
    if owner.linear and len(tensor.shape) == 2:
        rows = tensor.shape[1] if owner.cls == "Conv1D" else tensor.shape[0]  # Conv1D stores (in, out)
        return quantized_bytes(tensor.shape, precision.quantization, rows)
    return tensor.bytes(precision.dtype)


def is_stacked(module: ModuleSpec) -> bool:
    """Whether a module's weights are stacks (experts, ...), as Transformers holds the experts of a block."""
    shapes = [tensor.shape for tensor in module.tensors.values() if not tensor.buffer]
    return module.cls.endswith(("Experts", "NaiveMoe")) and len({shape[:1] for shape in shapes}) == 1


def is_stack(tensor: TensorSpec, owner: ModuleSpec) -> bool:
    """Whether a tensor is a stack of matrices that can be quantized: two columns of one fill a byte in 4 bit."""
    matrices = len(tensor.shape) == 3 and tensor.shape[2] % 2 == 0 and is_floating(tensor.dtype)
    return matrices and not tensor.buffer and is_stacked(owner)


def quantized_stacks(model: ModelSpec, precision: Precision) -> list[str]:
    """Names of the stacked weights of experts that are quantized with this precision, each expert alone."""
    return [
        name
        for name, (tensor, owner) in (model.tensors.items() if precision.quantization else ())
        if is_stack(tensor, owner)
        if not precision.keep.intersection(prefixes(name)[:-1])
    ]


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
    tables = 0 if quantization == "int8" else 16 * 4  # the 16 values a 4-bit code stands for, float32
    tables += 256 * 4 if quantization.endswith("-double") else 0  # and those of a scale's code
    return _packed_bytes(math.prod(shape), quantization, rows, blocksize) + tables


def stacked_bytes(shape: tuple[int, ...], quantization: str, blocksize: int = 64) -> int:
    """Bytes of one expert of a stack, which is quantized alone, with its scales; tables are not stored.

    Args:
        shape: of the expert's weight.
        quantization: one of `QUANTIZATIONS`.
        blocksize: elements that share one scale in 4 bit.

    >>> stacked_bytes((4096, 4096), "nf4") * 8 / 4096**2
    4.5
    """
    return _packed_bytes(math.prod(shape), quantization, shape[0], blocksize)


def _packed_bytes(elements: int, quantization: str, rows: int, blocksize: int) -> int:
    """Bytes of a weight's codes and scales."""
    if quantization == "int8":
        return elements + 4 * rows
    blocks = math.ceil(elements / blocksize)
    # Of double quantization: scales of a byte, a scale for 256 of them, and the mean.
    scales = blocks + 4 * math.ceil(blocks / 256) + 4 if quantization.endswith("-double") else 4 * blocks
    return math.ceil(elements / 2) + scales
