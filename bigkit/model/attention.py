"""What a KV cache takes: its growth with the context, block by block, and the bytes of an element.

Leaves out: how much a given model's blocks keep (`meta/cache.py` finds it by running them, `config.py` by formula).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from ..units import dtype_bits, dtype_name

KV_DTYPES = ("float32", "float16", "bfloat16", "float8", "int8", "int4")  # of a KV cache


@dataclass(frozen=True)
class Attention:
    """What one block adds to the KV cache.

    Args:
        layer: name of the block that owns the cache.
        per_token: elements kept for each token: keys and values of all KV heads, or the latent of MLA.
        window: the most tokens that are kept (sliding window), or None for all.
        fixed: elements that do not grow with the context (the state of a recurrent layer).
        float32: more of these, which have 32 bits whatever the model computes in.
        every: tokens that share an entry (compressed keys and values).
    """

    layer: str
    per_token: int
    window: int | None = None
    fixed: int = 0
    float32: int = 0
    every: int = 1

    def growing(self, context: int) -> int:
        """Elements of keys and values for one sequence of `context` tokens, once decoding is under way."""
        return self.per_token * ((context if self.window is None else min(context, self.window)) // self.every)

    def bytes(self, context: int, dtype: str, kv_dtype: str | None = None) -> int:
        """Bytes cached for one sequence; see `ModelSpec.kv_bytes`."""
        kept = self.fixed * dtype_bits(dtype) // 8 + 4 * self.float32
        return kept + kv_bytes(self.growing(context), kv_dtype or dtype)


def kv_dtype_name(kv_dtype: object) -> str | None:
    """A dtype of `KV_DTYPES` by its plain name; None and "auto" are the model's own.

    Raises:
        ValueError: a cache is not kept in it.

    >>> kv_dtype_name("torch.float8_e4m3fn"), kv_dtype_name("bf16"), kv_dtype_name(None)
    ('float8', 'bfloat16', None)
    """
    if kv_dtype in (None, "auto"):
        return None
    try:
        name = dtype_name(kv_dtype).partition("_")[0]
    except ValueError:
        name = ""
    if name not in KV_DTYPES:
        raise ValueError(f"unknown kv_dtype {kv_dtype!r}: expected None (the model's dtype) or one of {KV_DTYPES}")
    return name


@lru_cache(4096)
def kv_bytes(elements: int, kv_dtype: str) -> int:
    """Bytes that keys and values take in a cache of a dtype of `KV_DTYPES`, their scales included.

    Of int8 and int4, 64 elements share a scale and a zero point of 16 bits each (half a bit an element). float8 has one
    scale for all keys of a block and one for its values, which are not counted. Transformers keeps up to 127 of the
    newest tokens of an integer cache in the model's dtype until they are quantized together; other programs do not, and
    they are not counted either.

    Source: `QuantizedCache` of Hugging Face Transformers with the backends "hqq", "quanto" and "fp8".

    >>> kv_bytes(1024, "bfloat16"), kv_bytes(1024, "float8"), kv_bytes(1024, "int8"), kv_bytes(1024, "int4")
    (2048, 1024, 1088, 576)
    """
    scales = 4 * math.ceil(elements / 64) if kv_dtype.startswith("int") else 0
    return math.ceil(elements * dtype_bits(kv_dtype) / 8) + scales
