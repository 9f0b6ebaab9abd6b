"""Every model type of Transformers as small as its default configuration can be cut down, with inputs for a forward."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn

# Names of configuration fields -> the number that each is cut down to. The first pattern that matches counts.
SIZES = {
    r"num_experts_per_tok|moe_topk|top_k|num_selected_experts": 2,
    r"num_(local_|routed_)?experts|moe_num_experts|n_routed_experts": 4,
    r"num_key_value_heads|num_kv_heads|n_head_kv": 2,
    r"(num|n|encoder|decoder)_?(self_|cross_)?(attention_)?heads?|heads|num_(encoder|decoder)_attention_heads": 4,
    r"(num_|n_|encoder_|decoder_)?(hidden_|encoder_|decoder_)?(hidden_)?layers?|depth|num_blocks": 3,
    r"vocab_size|.*_vocab_size": 99,
    r"max_position_embeddings|n_positions|max_(source|target)_positions|n_ctx": 64,
    r"hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|hidden_dim|d_embed|word_embed_proj_dim": 32,
    r"head_dim|d_kv|attention_head_size|qk_rope_head_dim|qk_nope_head_dim|v_head_dim": 8,
    r"(.*_)?intermediate_size|.*ffn_dim|d_ff|n_inner|d_inner|ffn_hidden_size": 48,
    r"projection_dim|.*_lora_rank": 16,
    r"image_size": 32,
    r"patch_size": 8,
}
BATCH, TOKENS = 2, 7


def shrink(config: Any) -> Any:
    """Cut a configuration, and those in it, down in place."""
    before = dict(vars(config))
    if "use_cache" in before:
        config.use_cache = False
    for name, value in before.items():
        if isinstance(value, transformers.PreTrainedConfig):
            shrink(value)
        elif name.endswith("token_id") and type(value) is int:
            setattr(config, name, value % 99)
        elif type(value) is int and value > 1:
            size = next((size for pattern, size in SIZES.items() if re.fullmatch(pattern, name)), value)
            setattr(config, name, min(size, value))
        elif name in ("layer_types", "mlp_layer_types") and isinstance(value, list):
            setattr(config, name, value[:3] if {*value[:3]} == {*value} else value[-3:])
    if before.get("num_key_value_heads", 0) == before.get("num_attention_heads"):
        config.num_key_value_heads = 4
    return config


def tiny_config(model_type: str) -> Any:
    """The default configuration of a model type, cut down.

    Raises:
        Exception: it cannot be made without arguments, or not without another library.
    """
    return shrink(transformers.CONFIG_MAPPING[model_type]())


def model_class(config: Any) -> type[nn.Module]:
    """The class that generates text, if a configuration has one, or else the plain model's.

    Raises:
        LookupError: the configuration is that of a part of a model.
    """
    for mapping in (
        transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_MAPPING,
    ):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise LookupError(f"no model is made of {type(config).__name__} alone")


def inputs_of(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs by the names of the forward's parameters; what a model does not like is followed by more."""
    names = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(BATCH * TOKENS).reshape(BATCH, TOKENS) % 90 + 5
    texts = {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    given = {name: value for name, value in texts.items() if name in names}
    if given:
        yield given
    config = model.config
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 32)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    mels, frames = getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 64)
    shapes = {
        "pixel_values": (BATCH, getattr(vision, "num_channels", 3), height, width),
        "input_values": (BATCH, 4000),
        "input_features": (BATCH, mels, frames),
    }
    for name, shape in shapes.items():
        if name in names:
            yield {name: torch.randn(shape, generator=generator)}
            yield {**given, name: torch.randn(shape, generator=generator)}
