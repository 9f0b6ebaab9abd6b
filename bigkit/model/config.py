"""What a model's config.json says: the numbers that estimates use, and what each block adds to the KV cache.

Every family names its numbers in its own way (`n_embd`, `d_model`, `hidden_size`); `facts` gives them one name each.
`attention` says how many elements a token leaves in the cache of each block by the formulas of a textbook: keys and
values of the KV heads (MHA, GQA), the shared latent of MLA, a sliding window, self- and cross-attention of an
encoder-decoder. Models that an installed class can build are not counted so, but by running them (`meta/cache.py`).

Leaves out: recurrent and convolutional layers, and the cached image tokens of cross-attention layers.
`facts(config)["uncounted_cache"]` names the kinds of layers that a config lists and this file does not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..devices import join
from .spec import Attention, ModuleSpec

# One meaning, many names; the first that is set wins.
_NAMES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "n_embed", "dim", "embed_dim"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size", "decoder_ffn_dim"),
    "vocab_size": ("vocab_size",),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads",
                            "attention_heads"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length",
                                "max_sequence_length", "max_target_positions", "block_size"),
    "num_experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "experts_per_token": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"),
    "shared_experts": ("n_shared_experts", "num_shared_experts"),
    "dense_layers": ("first_k_dense_replace",),
    "torch_dtype": ("torch_dtype", "dtype"),
    "tie_word_embeddings": ("tie_word_embeddings",),
    "sliding_window": ("sliding_window",),
    "image_size": ("image_size",),
    "patch_size": ("patch_size",),
}  # fmt: skip
# Other fields that must be numbers, and those that must be lists, to be counted with.
_NUMBERS = frozenset(name for key, names in _NAMES.items() for name in names
                     if key not in ("torch_dtype", "tie_word_embeddings")) | frozenset(
    "attention_chunk_size attention_head_size d_kv encoder_layers expansion_ratio head_dim kv_channels kv_lora_rank "
    "expand mamba_d_state mamba_expand moe_intermediate_size num_decoder_layers num_key_value_heads num_kv_heads "
    "qk_nope_head_dim qk_rope_head_dim state_size".split()
)  # fmt: skip
_LISTS = ("architectures", "cross_attention_layers", "layer_types")
_TEXT = ("text_config", "llm_config", "language_config", "thinker_config", "decoder")

# Families whose feed-forward is 4 x hidden_size when the config is silent.
_FOURFOLD = ("gpt2", "bloom", "falcon", "gptj", "gpt_bigcode", "gpt_neo", "codegen", "mpt", "bigkit-gpt")
_ROTARY = ("llama", "idefics", "mistral", "mixtral", "gpt_neox", "gptj", "codegen", "falcon", "gemma", "gemma2", "phi",
           "qwen2", "qwen3", "deepseek_v2", "deepseek_v3", "starcoder2", "stablelm", "olmo", "cohere")  # fmt: skip
_ALIBI = ("bloom", "mpt")

# Encoders that become decoders, and so keep a cache, only when `is_decoder` is set.
_ENCODERS = frozenset(
    "albert bert big_bird bridgetower camembert convbert data2vec-text deberta deberta-v2 distilbert electra ernie esm "
    "megatron-bert modernbert mpnet rembert roberta roberta-prelayernorm roc_bert roformer tapas xlm-roberta "
    "xlm-roberta-xl xmod".split()
)
_GENERATORS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForVisionText2Text", "GPT")
_ANSWERS = ("ForMaskedLM", "Classification", "ForQuestionAnswering", "ForMultipleChoice")  # in one pass
_SENSES = ("vision", "visual", "image", "audio", "speech")
_FULL = "full_attention"
_SLIDING = ("sliding_attention", "chunked_attention")


def facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a config under one name each; what the config does not say is left out.

    Args:
        config: a parsed config.json, or a Transformers config's `to_dict()`. Of a number given for each layer the
            largest counts; what should be a number and is none (a dict, a text) is left out.

    Returns:
        `model_type`, `architecture`, `torch_dtype`, `hidden_size`, `intermediate_size`, `vocab_size`,
        `num_hidden_layers`, `num_attention_heads`, `num_key_value_heads`, `head_dim` (elements of one query head),
        `max_position_embeddings`, `positions` ("learned" is a hard limit; "rotary", "alibi", "relative" are not),
        `is_encoder_decoder`, `generates` (token by token, so that it keeps a cache), and where they apply
        `encoder_layers`, `num_experts`, `experts_per_token`, `shared_experts`, `dense_layers`, `moe_intermediate_size`,
        `routes_in_float32`, `state_size` and `state_width` (of a state space), `sliding_window`, `image_size`,
        `patch_size`, `quantization` and `quantization_config` (of a checkpoint that is quantized already),
        `uncounted_cache`.

    Source: the configuration classes of Hugging Face Transformers.

    >>> gpt2 = facts({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024})
    >>> gpt2["hidden_size"], gpt2["intermediate_size"], gpt2["head_dim"], gpt2["positions"]
    (768, 3072, 64, 'learned')
    """
    config = _checked(config)
    inner = _text(config)
    result: dict[str, Any] = {"model_type": str(config.get("model_type", ""))}
    if architectures := config.get("architectures"):
        result["architecture"] = architectures[0]
    for name, spellings in _NAMES.items():
        if value := _first(inner, *spellings):
            result[name] = value
    if "torch_dtype" in result:
        result["torch_dtype"] = str(result["torch_dtype"]).removeprefix("torch.")
    hidden, heads = result.get("hidden_size"), result.get("num_attention_heads")
    if isinstance(hidden, int):
        if "intermediate_size" not in result and inner.get("model_type") in _FOURFOLD:
            result["intermediate_size"] = (_first(inner, "expansion_ratio") or 4) * hidden
        if isinstance(heads, int):
            own = _first(inner, "num_key_value_heads", "num_kv_heads")
            result["num_key_value_heads"] = own if isinstance(own, int) else 1 if inner.get("multi_query") else heads
            result["head_dim"] = _head_dim(inner, hidden, heads)
    if "num_experts" in result:
        result["moe_intermediate_size"] = inner.get("moe_intermediate_size") or result.get("intermediate_size")
    if "routed_scaling_factor" in inner:  # what these routers give is not cast
        result["routes_in_float32"] = True
    if isinstance(hidden, int) and (state := _first(inner, "state_size", "mamba_d_state")):
        result["state_size"], result["state_width"] = state, (_first(inner, "expand", "mamba_expand") or 2) * hidden
    result["positions"] = _positions(inner, result)
    result["is_encoder_decoder"] = bool(config.get("is_encoder_decoder", False))
    names = config.get("architectures") or ()
    result["generates"] = _caches(config) and not any(str(name).endswith(_ANSWERS) for name in names)
    if result["is_encoder_decoder"]:
        result["encoder_layers"] = _first(inner, "encoder_layers", "num_layers", "num_hidden_layers")
        result["num_hidden_layers"] = _decoder_layers(inner)
    if isinstance(quantization := config.get("quantization_config"), Mapping):
        method = str(quantization.get("quant_method", "unknown"))
        algorithm = quantization.get("quant_algo") if method.startswith("modelopt") else None
        result["quantization"] = str(algorithm).lower() if algorithm else method
        result["quantization_config"] = dict(quantization)
    result["uncounted_cache"] = _uncounted(inner) or None
    return {name: value for name, value in result.items() if value is not None}


def stored_dtype(config: Mapping[str, Any]) -> str:
    """The dtype of a checkpoint's weights, by its config; float32 if that names none that weights are made in.

    >>> stored_dtype({"torch_dtype": "torch.bfloat16"}), stored_dtype({"dtype": "auto"})
    ('bfloat16', 'float32')
    """
    named = facts(config).get("torch_dtype")
    return named if named in ("float16", "bfloat16", "float64") else "float32"


def attention(config: Mapping[str, Any], root: ModuleSpec) -> tuple[Attention, ...]:
    """What each block adds to the KV cache, in order; empty for a model that keeps none (BERT, ViT, ResNet).

    The figures hold once decoding is under way. A sliding window of W tokens then takes the room of W: Transformers
    keeps the last W - 1, as a view of the W it attended to. The *prefill* of a longer prompt is dearer: that view
    still holds the whole prompt's keys and values until the first decoded token replaces it.

    An encoder-decoder's block holds its own keys and values and those of the encoder's output; `context` then counts
    source and target tokens alike.

    Args:
        config: a parsed config.json, or a Transformers config's `to_dict()`.
        root: the model's tree, in which the list of decoder blocks is found.

    Returns:
        One `Attention` for each block that caches; elements, whatever their dtype.

    >>> leaf = ModuleSpec("Block")
    >>> root = ModuleSpec("GPT", children={"h": ModuleSpec("ModuleList", children={"0": leaf, "1": leaf})})
    >>> attention({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"],
    ...            "n_embd": 8, "n_layer": 2, "n_head": 2}, root)[1].per_token
    16
    """
    config = _checked(config)
    if not _caches(config):
        return ()
    inner = _text(config)
    if not {"num_key_value_heads", "head_dim"} <= facts(config).keys():
        return ()
    blocks = _blocks(root, _decoder_layers(inner), bool(config.get("is_encoder_decoder")))
    window, per_token = _window(inner), _per_token(inner)
    kinds = inner.get("layer_types") or ["sliding_attention" if window else _FULL] * len(blocks)
    skipped = set(inner.get("cross_attention_layers") or ())
    return tuple(
        Attention(layer, per_token, window if kind in _SLIDING else None)
        for index, (layer, kind) in enumerate(zip(blocks, kinds))
        if kind in (_FULL, *_SLIDING) and index not in skipped
    )


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the language model inside: the nested one, if there is one, over the outer one."""
    for name in _TEXT:
        if isinstance(inner := config.get(name), Mapping) and inner:
            return {**config, **{key: value for key, value in _text(inner).items() if value is not None}}
    return config


def experts_per_token(config: object) -> int | None:
    """How many experts a token takes, as a config of Transformers says by any of its names; None if it does not."""
    said = (getattr(config, name, None) for name in _NAMES["experts_per_token"])
    found = next((one for one in said if one is not None), None)
    return max(found) if isinstance(found, list) else found  # of layers that differ the largest counts


def _first(config: Mapping[str, Any], *names: str) -> Any:
    """The value of the first of `names` that the config sets to something other than None."""
    return next((config[name] for name in names if config.get(name) is not None), None)


def _checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose numbers are whole numbers and whose lists are lists; what is something else is None.

    Of a number for each layer, side or kind of layer the largest counts.
    """
    result: dict[str, Any] = {}
    for name, value in config.items():
        if name in _NUMBERS:
            numbers = [number for number in (value if isinstance(value, (list, tuple)) else [value]) if _counts(number)]
            result[name] = int(max(numbers)) if numbers else None
        elif name == "model_type":
            result[name] = str(value)
        elif name in _LISTS:
            result[name] = value if isinstance(value, (list, tuple)) else None
        else:
            result[name] = _checked(value) if name in _TEXT and isinstance(value, Mapping) else value
    return result


def _counts(value: Any) -> bool:
    """Whether a value is a whole number from 0, also one that is written as 8.0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return value >= 0 and (isinstance(value, int) or value.is_integer())


def _caches(config: Mapping[str, Any]) -> bool:
    """Whether the model generates token by token, and so keeps a cache."""
    inner = _text(config)
    if config.get("is_encoder_decoder") or inner.get("is_decoder"):
        return True
    if inner.get("model_type") in _ENCODERS:
        return False
    names = config.get("architectures") or ()
    return bool(inner.get("use_cache")) or any(str(name).endswith(_GENERATORS) for name in names)


def _head_dim(config: Mapping[str, Any], hidden: int, heads: int) -> int:
    if config.get("kv_lora_rank") and config.get("qk_rope_head_dim"):
        return int((config.get("qk_nope_head_dim") or 0) + config["qk_rope_head_dim"])
    value = _first(config, "head_dim", "d_kv", "attention_head_size", "kv_channels")
    return value if isinstance(value, int) else hidden // heads


def _per_token(config: Mapping[str, Any]) -> int:
    """Elements that a block caches for each token."""
    if config.get("kv_lora_rank"):  # MLA: one latent for all heads, and one rotary key beside it
        return int(config["kv_lora_rank"] + (config.get("qk_rope_head_dim") or 0))
    numbers = facts(config)
    both = 2 if numbers["is_encoder_decoder"] else 1  # its own, and those of the source
    return int(both * 2 * numbers["num_key_value_heads"] * numbers["head_dim"])


def _window(config: Mapping[str, Any]) -> int | None:
    """The window or chunk that a config names, unless it says that it is not used."""
    used = config.get("use_sliding_window") is not False
    return _first(config, *(["sliding_window"] if used else []), "attention_chunk_size")


def _uncounted(config: Mapping[str, Any]) -> list[str]:
    """Kinds of layers whose cached state `attention` leaves out."""
    kinds = set(config.get("layer_types") or ()) - {_FULL, *_SLIDING, "moe", "mlp"}
    if config.get("cross_attention_layers"):
        kinds.add("cross_attention")
    return sorted(kinds)


def _decoder_layers(config: Mapping[str, Any]) -> int:
    if config.get("is_encoder_decoder"):
        return _first(config, "num_decoder_layers", "decoder_layers", *_NAMES["num_hidden_layers"]) or 0
    return _first(config, *_NAMES["num_hidden_layers"]) or 0


def _positions(config: Mapping[str, Any], known: Mapping[str, Any]) -> str | None:
    """How the model knows where a token stands."""
    family = config.get("model_type")
    if family in _ALIBI or config.get("alibi"):
        return "alibi"
    if config.get("relative_attention_num_buckets"):
        return "relative"
    rotary = _first(config, "rope_parameters", "rope_theta", "rope_scaling", "rotary_dim", "rotary_pct")
    if rotary is not None or family in _ROTARY:
        return "rotary"
    return "learned" if "max_position_embeddings" in known or "image_size" in known else None


def _blocks(root: ModuleSpec, count: int, decoder_only: bool) -> list[str]:
    """Names of the decoder's blocks: the numbered list of `count` children that weighs most.

    Multimodal models hold other such lists (a vision tower, a resampler), which are recognised by their names.
    """
    numbers = [str(index) for index in range(count)]
    lists = [
        (not any(word in name for word in _SENSES), module.bytes(), name)
        for name, module in root.walk()
        if count
        and list(module.children) == numbers
        and (not decoder_only or "decoder" in name.split(".") or name.startswith("decoder"))
    ]
    if not lists:
        return []
    name = max(lists, key=lambda item: item[:2])[-1]  # of equals, the first
    return [join(name, number) for number in numbers]
