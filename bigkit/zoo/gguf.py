"""A model from the header of its GGUF file: sizes as they are stored, layers, experts and KV cache, and no weight read.

Types of llama.cpp are dtypes of the record ("q4_k"), which no cast changes. The experts of a block, three tensors
beside others in the file, become one module of it, so that plans can place them apart.

Leaves out: running it, which llama.cpp does (`maps/llama_cpp.py` writes its command line).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..model.attention import Attention
from ..model.gguf import GgufTensor, read_gguf
from ..model.header import CheckpointError
from ..model.spec import ModelSpec, ModuleSpec, TensorSpec
from ..units import listed
from .errors import NoConfig, UnknownModel
from .headers import spec_from_tensors

_DTYPES = {"BF16": "bfloat16", "F64": "float64", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
_EXPERTS = re.compile(r"(blk\.\d+\.)(ffn_\w*exps)\.(\w+)")


def describe_gguf(name: str) -> ModelSpec:
    """The record of the model in a GGUF file, or in all parts of a split one, of which any may be named.

    Raises:
        UnknownModel: there is no such file, or a part is missing.
        NoConfig: its header is wrong, or says too little.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise UnknownModel(f"there is no file {name!r}")
    try:
        headers = [read_gguf(part) for part in _parts(path)]
    except CheckpointError as error:
        raise NoConfig(str(error)) from error
    keys, tensors = headers[0].keys, {name: tensor for header in headers for name, tensor in header.tensors.items()}
    said = keys.get("split.tensors.count", len(tensors))
    if len(tensors) != said or len(tensors) != sum(len(header.tensors) for header in headers):
        raise NoConfig(f"{name} and its other parts have {len(tensors)} different tensors, expected {said}")
    return _spec(name, keys, tensors)


def _parts(path: Path) -> list[Path]:
    """The files of a split model in order; of another one, the file itself."""
    if not (match := _PART.fullmatch(path.name)):
        return [path]
    count = int(match[3])
    names = [f"{match[1]}-{i:05}-of-{match[3]}{path.suffix}" for i in range(1, min(count, 9999) + 1)]
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        raise UnknownModel(f"{path.name} is one of {count} files, and {listed(missing, 3)} are not beside it")
    return [path.parent / name for name in names]


def _spec(name: str, keys: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> ModelSpec:
    architecture = keys.get("general.architecture")
    if not isinstance(architecture, str):
        raise NoConfig(f"{name} does not name its architecture (general.architecture)")

    def about(key: str) -> Any:
        return keys.get(f"{architecture}.{key}")

    named = {
        _EXPERTS.sub(lambda found: f"{found[1]}experts.{found[2]}_{found[3]}", own): TensorSpec(
            tensor.shape, _DTYPES.get(tensor.type, tensor.type.lower())
        )
        for own, tensor in tensors.items()
    }
    spec = spec_from_tensors(name, named)
    kinds: dict[str, int] = {}
    for tensor in tensors.values():
        kinds[tensor.type] = kinds.get(tensor.type, 0) + tensor.nbytes
    vocabulary = keys.get("tokenizer.ggml.tokens") or about("vocab_size")
    facts = {
        "model_type": architecture,
        "hidden_size": _largest(about("embedding_length")),
        "intermediate_size": _largest(about("feed_forward_length")) or _largest(about("expert_feed_forward_length")),
        "num_hidden_layers": _largest(about("block_count")),
        "max_position_embeddings": _largest(about("context_length")),
        "vocab_size": len(vocabulary) if isinstance(vocabulary, list) else _largest(vocabulary),
        "num_experts": _largest(about("expert_count")),
        "experts_per_token": _largest(about("expert_used_count")),
        "shared_experts": _largest(about("expert_shared_count")),
        "moe_intermediate_size": _largest(about("expert_feed_forward_length")),
        "sliding_window": _largest(about("attention.sliding_window")),
        "positions": "rotary",
        "generates": True,
        "computes_in": "float16",  # llama.cpp's default for keys and values
        "stored_as": max(kinds, key=lambda kind: kinds[kind], default=""),
    }
    facts = {key: value for key, value in facts.items() if value}
    return replace(
        spec, root=_not_linear(spec.root, {}), attention=tuple(_attention(named, about)),
        facts={**facts, "has_head": "output.weight" in named}, library="gguf",
    )  # fmt: skip


def _attention(named: Mapping[str, TensorSpec], about: Any) -> list[Attention]:
    """What each block caches: keys and values, or MLA's latent; and the float32 states of recurrent layers.

    A window counts where the file says which blocks have one; else the whole context does.
    """
    heads, latent = about("attention.head_count"), _largest(about("attention.kv_lora_rank"))
    width = (_largest(about("embedding_length")) or 0) // max(1, _largest(heads) or 1)
    each = sum(_largest(about(f"attention.{part}_length")) or width for part in ("key", "value"))
    window, pattern = _largest(about("attention.sliding_window")), about("attention.sliding_window_pattern")
    inner, state, kernel, groups = (
        _largest(about(f"ssm.{part}")) or 0 for part in ("inner_size", "state_size", "conv_kernel", "group_count")
    )
    blocks: dict[int, set[str]] = {}
    for name in named:
        if match := re.match(r"blk\.(\d+)\.(\w+)", name):
            blocks.setdefault(int(match[1]), set()).add(match[2])
    found = []
    for number, parts in sorted(blocks.items()):
        counts = about("attention.head_count_kv") or heads
        count = counts[number] if isinstance(counts, list) and number < len(counts) else _largest(counts) or 0
        attends = any(part.startswith(("attn_k", "attn_qkv")) for part in parts)
        slides = isinstance(pattern, list) and number < len(pattern) and pattern[number]
        per_token = (latent + (_largest(about("rope.dimension_count")) or 0) if latent else count * each) * attends
        recurs = any(part.startswith("ssm_") for part in parts)
        fixed = (inner * state + max(0, kernel - 1) * (inner + 2 * groups * state)) * recurs
        if per_token or fixed:
            found.append(Attention(f"blk.{number}", int(per_token), window if slides else None, 0, fixed))
    return found


def _largest(value: Any) -> int | None:
    """A number, the largest of an array of them, or None."""
    numbers = [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int)]
    return int(max(numbers, default=0)) or None


def _not_linear(module: ModuleSpec, known: dict[int, ModuleSpec]) -> ModuleSpec:
    """The same tree without layers that bitsandbytes could quantize; equal modules stay one object."""
    if id(module) not in known:
        children = {name: _not_linear(child, known) for name, child in module.children.items()}
        known[id(module)] = ModuleSpec(module.cls, module.tensors, children)
    return known[id(module)]
