"""The smallest writer of GGUF files, for tests: keys, tensors of zeros, and lies on request."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

from bigkit.model.gguf import TYPES

NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def value(item: Any) -> bytes:
    """A value with its type before it."""
    if isinstance(item, bool):
        return struct.pack("<I?", 7, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    if isinstance(item, str):
        return struct.pack("<I", 8) + text(item)
    inner = value(item[0])[:4]
    return struct.pack("<I", 9) + inner + struct.pack("<Q", len(item)) + b"".join(value(part)[4:] for part in item)


def write(
    path: Path,
    keys: dict[str, Any],
    tensors: dict[str, tuple[str, tuple[int, ...]]],
    lies: dict[str, Any] | None = None,
) -> int:
    """Write a file; `tensors` are name -> (type, sizes outermost first). Returns the bytes of its tensors."""
    lies = lies or {}
    head = lies.get("magic", b"GGUF") + struct.pack(
        "<IQQ", lies.get("version", 3), lies.get("tensors", len(tensors)), lies.get("keys", len(keys))
    )
    for name, item in keys.items():
        head += text(name) + value(item)
    data, total = b"", 0
    for name, (kind, shape) in tensors.items():
        _, values, block = TYPES[NUMBERS[kind]]
        size = math.prod(shape) // values * block
        head += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += struct.pack("<IQ", lies.get("type", NUMBERS[kind]), lies.get("offset", len(data)))
        data += b"\0" * size + b"\0" * (-size % 32)
        total += size
    path.write_bytes((head + b"\0" * (-len(head) % 32) + data)[: lies.get("length")])
    return total


def llama(blocks: int = 3, experts: int = 0, **more: Any) -> tuple[dict[str, Any], dict[str, tuple[str, tuple]]]:
    """Keys and tensors of a small model: width 256, 4 heads of which 2 keep keys and values, vocabulary of 64."""
    keys = {"general.architecture": "llama", "llama.block_count": blocks, "llama.embedding_length": 256,
            "llama.feed_forward_length": 512, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
            "llama.context_length": 4096, "tokenizer.ggml.tokens": [f"t{i}" for i in range(64)], **more}  # fmt: skip
    tensors: dict[str, tuple[str, tuple]] = {"token_embd.weight": ("Q6_K", (64, 256))}
    for i in range(blocks):
        for name, rows in (("attn_q", 256), ("attn_k", 128), ("attn_v", 128), ("attn_output", 256)):
            tensors[f"blk.{i}.{name}.weight"] = ("Q4_K", (rows, 256))
        if experts:
            tensors[f"blk.{i}.ffn_gate_inp.weight"] = ("F32", (experts, 256))
        for name, shape in (("gate", (512, 256)), ("up", (512, 256)), ("down", (256, 512))):
            full = f"blk.{i}.ffn_{name}_exps.weight" if experts else f"blk.{i}.ffn_{name}.weight"
            tensors[full] = ("Q4_K", (experts, *shape) if experts else shape)
        tensors[f"blk.{i}.attn_norm.weight"] = ("F32", (256,))
    tensors |= {"output_norm.weight": ("F32", (256,)), "output.weight": ("Q6_K", (64, 256))}
    if experts:
        keys |= {"llama.expert_count": experts, "llama.expert_used_count": 2, "llama.expert_feed_forward_length": 512}
    return keys, tensors
