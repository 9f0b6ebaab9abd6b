"""The memory that a forward needs beside weights and KV cache: its widest moment, on the device where it runs.

Each formula below is a moment of a Transformers block, with what is alive then. Prompts and decode steps have moments
of their own; the largest counts:

    dense       a gated feed-forward: 3 x intermediate_size and 4 x hidden_size for each token
    experts     the rows of a token's experts, sorted: their inputs, both halves, and their products
    decoding    `generate` copies each chosen expert for each sequence (`batched_mm`), however short the prompt is
    scores      of attention, where a model's code stores them: tokens of a prompt count squared
    scans       of state spaces, without kernels of their own: a state for each token
    quantized   a weight in 16 bit while it multiplies; of stacked experts as many as are decoded at a time

Leaves out: memory that only a run can show (`dryrun/run.py`), and training (`training.py`).
Source: the live storages of fake runs of Transformers 5.17 to 5.23 and bitsandbytes 0.49 and 0.50.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from ..units import dtype_bits
from .experts import experts_of
from .precision import Precision, quantized_stacks
from .spec import ModelSpec
from .stored import AT_A_TIME, decoding_bytes, is_as_stored

MICRO_BATCH = 512  # tokens: llama.cpp's default for --ubatch-size


class Scores(NamedTuple):
    """Bytes of a score of attention, where PyTorch's fused attention is not used: the score, the same with a mask, and
    its softmax, which in 16 bit is computed in a float32 copy.

    Args:
        bfloat16, float16, float32: bytes, by what the model computes in.
        masks: of the model, each a number for a pair of tokens.
        held: whether the probabilities live on in the feed-forward.
        pairs: bytes of each pair of tokens, however many heads and sequences there are.
    """

    bfloat16: int
    float16: int
    float32: int
    masks: int = 1
    held: bool = False
    pairs: int = 0


SCORES = {
    "bloom": Scores(14, 12, 16), "mpt": Scores(12, 12, 12), "gemma2": Scores(10, 10, 8, 2, True),
    "gpt_oss": Scores(6, 6, 12, 2, True), "t5": Scores(4, 4, 8, 0, pairs=50),
}  # fmt: skip
IN_FULL = Scores(9, 9, 9)  # of grouped queries in float32, which no fused kernel takes
ALL_EXPERTS = ("llama4", "llama4_text")  # their code lets each token pass through all experts
HALVES = {"gpt_oss": 9}  # x moe_intermediate_size of each chosen expert at the widest moment; others: 4
STATES = ("mamba", "falcon_mamba", "jamba")
SCAN = 12  # bytes of each number of a token's state, in three copies


class _Decoded(NamedTuple):
    """Bytes that a quantized weight takes while it is decoded: for each number of all experts, and of chosen ones."""

    whole: float
    chosen: float
    at_a_time: int = AT_A_TIME


_KERNEL = _Decoded(2, 2, 2 * AT_A_TIME)  # reads codes where they lie
_DECODED = {"int8": _Decoded(8, 9), "nf4": _KERNEL, "fp4": _KERNEL}
_DOUBLE = _Decoded(2.25, 2.75)
_AS_STORED = _Decoded(0, 0)  # `decoding_bytes` counts it


def working_bytes(model: ModelSpec, precision: Precision, batch: int, tokens: int) -> int:
    """What a forward without gradients needs beside weights and KV cache: the widest moment of one block, and logits.

    batch * tokens * (3 * intermediate_size + 4 * hidden_size) elements, for blocks with a gated feed-forward and fused
    attention (the scores are never stored), plus one row of logits for each sequence, and weights that are decoded for
    it. In a mixture of experts a token visits `experts_per_token` experts and the shared ones. 0 if the model's facts
    do not say how wide it is.

    llama.cpp, which runs GGUF files, takes at most `MICRO_BATCH` tokens at a time, and keeps their states and scores in
    float32: 258.5 MiB for Llama 3 8B, as its log says ("CUDA0 compute buffer size").

    Args:
        model, precision: how it is stored.
        batch, tokens: sequences, and the tokens that each brings to this pass (the prompt, or 1 while decoding).

    >>> from bigkit import zoo
    >>> mixtral = zoo.describe("mixtral-8x7b")
    >>> working_bytes(mixtral, mixtral.precision("bfloat16", "int8"), 1, 1) > 2**30 / 2  # in float32 for a moment
    True
    """
    return _widest(model, precision, batch, tokens) + decoding_bytes(model, precision)


def generates(model: ModelSpec) -> bool:
    """Whether the model makes one token after another; one that no config describes does if it keeps a cache."""
    return bool(model.facts.get("generates", model.attention))


def _widest(model: ModelSpec, precision: Precision, batch: int, tokens: int) -> int:
    facts, dtype = model.facts, model.computes_in(precision)
    size = dtype_bits(dtype) // 8
    hidden = facts.get("hidden_size")
    if not tokens or not hidden:
        return 0
    if model.library == "gguf":
        return 4 * min(batch * tokens, MICRO_BATCH) * (facts.get("vocab_size", 0) + hidden)
    wide = facts.get("intermediate_size") or 4 * hidden
    found, last, n = _found(model, precision), size * batch * facts.get("vocab_size", 0), batch * tokens
    around = size * n * 4 * hidden
    most = around + size * n * found.halves * wide + last
    if found.linear:
        most = max(most, around + size * n * 2 * wide + found.linear)
    if found.int8:
        cast = 0 if dtype == "float16" else size
        most = max(most, around + n * (wide * (6 + cast + size) + hidden * (1 + min(cast, 2))))
    if facts.get("num_experts"):
        most = max(most, around + _of_experts(model, found, n, size))
        if generates(model):
            step = batch * size * (3 * wide + 4 * hidden) + last
            most = max(most, step + _copies(found, batch, size))
    if facts.get("model_type") in STATES and facts.get("state_size"):
        most = max(most, around + n * facts["state_width"] * (SCAN * facts["state_size"] + 8 * size))
    return max(most, _with_scores(facts, batch, tokens, dtype, most))


def _with_scores(facts: Mapping[str, Any], batch: int, tokens: int, dtype: str, most: int) -> int:
    """The most in a model that stores scores: while it attends, or while the probabilities live on."""
    number: dict[str, int] = {name: value for name, value in facts.items() if isinstance(value, int)}
    heads, hidden, size = number.get("num_attention_heads", 0), number["hidden_size"], dtype_bits(dtype) // 8
    stored = SCORES.get(str(facts.get("model_type", "")))
    if stored is None and dtype == "float32" and heads > number.get("num_key_value_heads", heads) > 0:
        stored = IN_FULL
    if stored is None or not number.get("intermediate_size"):
        return most
    pairs = batch * tokens**2
    masks = pairs * size * stored.masks
    scores = pairs * heads * getattr(stored, dtype, stored.float32) + masks + stored.pairs * tokens**2
    attending = scores + size * batch * tokens * (12 if size == 4 else 9) * hidden
    return max(attending, most + (pairs * heads * size + masks if stored.held else 0))


class _Found(NamedTuple):
    """What the formulas ask of a model's layers, found once.

    Args:
        halves: of a dense feed-forward's width that are alive at once: 4 where one layer gives both gate and input, and
            6 in BLOOM, whose GELU is no single kernel.
        linear: bytes of the largest linear weight in 4 bit, decoded.
        int8: whether linear layers are LLM.int8's.
        stacks: (experts, numbers of one, taken by a token, how it is decoded) of a block's two stacks; the decoding is
            None where they are not quantized.
    """

    halves: int
    linear: int
    int8: bool
    stacks: tuple[tuple[int, int, int, _Decoded | None], ...]


@lru_cache(64)  # a model never changes
def _found(model: ModelSpec, precision: Precision) -> _Found:
    kind, size = precision.quantization, dtype_bits(model.computes_in(precision)) // 8
    names = model.quantized(precision) if kind else []
    largest = max((prod(model.tensors[f"{name}.weight"][0].shape) for name in names), default=0)
    width = size + (0.125 if str(kind).endswith("-double") else 0)
    packed = {*quantized_stacks(model, precision)}
    stored = _AS_STORED if is_as_stored(model, precision) else None
    best: list[tuple[int, int, int, _Decoded | None]] = []
    for one in experts_of(model):
        own = [(f"{one.name}.{name}", tensor) for name, tensor, _ in one.spec.named_tensors() if len(tensor.shape) == 3]
        if own and one.fused:
            how = [_DECODED.get(str(kind), _DOUBLE) if name in packed else stored for name, _ in own]
            stacks = [(t.shape[0], prod(t.shape[1:]), one.per_token, each) for (_, t), each in zip(own, how)]
            best = max(best, stacks, key=lambda stacks: sum(stack[1] for stack in stacks))
    halves = 4 if any(name.endswith("mlp.gate_up_proj.weight") for name in model.tensors) else 3
    halves = 6 if model.facts.get("model_type") == "bloom" else halves
    return _Found(halves, 0 if kind == "int8" else round(largest * width), kind == "int8" and bool(names), tuple(best))


def _of_experts(model: ModelSpec, found: _Found, n: int, size: int) -> int:
    """What the experts of a block take for a prompt of n tokens, beside the states around them."""
    facts = model.facts
    hidden, wide = facts["hidden_size"], facts.get("moe_intermediate_size") or facts.get("intermediate_size", 0)
    taken, shared = facts.get("experts_per_token", 1), facts.get("shared_experts", 0)
    if not found.stacks:  # modules, one after another
        return size * n * 3 * wide * (taken + shared)
    rows, family = n * taken, str(facts.get("model_type", ""))
    if family in ALL_EXPERTS:
        whole = max(
            (max(size, how.whole) * count * one for count, one, _, how in found.stacks if how and how.whole), default=0
        )
        return size * n * (hidden + facts["num_experts"] * (hidden + 4 * wide)) + round(whole)
    # What the router says, numbers by which rows are sorted, and angles of positions.
    account = n * (8 * facts["num_experts"] + 44 * taken + 2 * size * facts.get("head_dim", 0))
    inputs, last = size * rows * hidden, 2 * size * rows * hidden
    if facts.get("routes_in_float32"):
        last += 2 * rows * hidden * (4 - size)
    halves = size * rows * HALVES.get(family, 4) * wide
    moments = [inputs + halves, 2 * inputs + last, size * n * (hidden + 3 * wide * shared)]
    for at, (count, one, _, decoded) in enumerate(found.stacks):
        if decoded is not None and decoded.whole:
            some = min(count, max(1, decoded.at_a_time // one))
            result = size * rows * (2 * wide if at == 0 else hidden) * (1 if some == count else 2)
            each = max(size, decoded.whole if some == count else decoded.chosen)
            before = inputs + (size * rows * wide if at else 0)
            before += size * rows * (hidden if at else 2 * wide) * (family in HALVES)  # biases, by rows
            moments += [before + round(each * some * one), before + result + size * some * one]
    return account + max(moments)


def _copies(found: _Found, batch: int, size: int) -> int:
    """What chosen experts take that `generate` copies for each sequence while it decodes."""
    kept, most = 0, 0
    for count, one, taken, decoded in found.stacks:
        chosen, before = batch * taken, kept
        kept += size * chosen * one
        if decoded is not None and chosen > count:  # all are decoded, then copied
            all_of_them = max(size, decoded.whole) * count * one
            most = max(most, before + round(all_of_them), kept + size * count * one)
        elif decoded is not None:
            most = max(most, before + round(max(size, decoded.chosen) * chosen * one))
        most = max(most, kept)
    return most
