"""What `traced_attention` finds without memory, against the caches that real models on the CPU fill."""

from __future__ import annotations

import pytest

from bigkit.meta.cache import traced_attention
from bigkit.meta.skeleton import spec_from_module
from bigkit.model import config as reader

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BATCH, PROMPT, TOTAL = 2, 5, 9  # windows are of 6 tokens
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50,
         "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GQA = SMALL | {"num_key_value_heads": 2}
MLA = SMALL | {"kv_lora_rank": 8, "q_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
MOE = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
       "n_shared_experts": 1, "first_k_dense_replace": 1}  # fmt: skip

# family -> (class of the model, settings of its config)
DECODERS = {
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 50, "n_positions": 64}),
    "gptj": ("GPTJForCausalLM", {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 50, "rotary_dim": 4}),
    "gpt_neox": ("GPTNeoXForCausalLM", SMALL),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 50,
                                             "multi_query": True}),
    "opt": ("OPTForCausalLM", SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 50}),
    "mpt": ("MptForCausalLM", {"d_model": 32, "n_layers": 3, "n_heads": 4, "vocab_size": 50, "max_seq_len": 64}),
    "falcon": ("FalconForCausalLM", SMALL | {"multi_query": True}),
    "falcon, all heads": ("FalconForCausalLM", SMALL | {"multi_query": False}),
    "falcon, new": ("FalconForCausalLM", SMALL | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "llama": ("LlamaForCausalLM", SMALL),
    "llama, grouped": ("LlamaForCausalLM", GQA),
    "llama, base": ("LlamaModel", GQA),
    "mistral": ("MistralForCausalLM", GQA | {"sliding_window": 6}),
    "mistral, no window": ("MistralForCausalLM", GQA | {"sliding_window": None}),
    "mixtral": ("MixtralForCausalLM", GQA | {"num_local_experts": 4, "sliding_window": None}),
    "phi3": ("Phi3ForCausalLM", GQA),
    "qwen2": ("Qwen2ForCausalLM", GQA),
    "qwen2, half sliding": ("Qwen2ForCausalLM", GQA | {"use_sliding_window": True, "sliding_window": 6,
                                                       "max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", GQA | {"head_dim": 16}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", GQA | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                                        "moe_intermediate_size": 16}),
    "gemma2": ("Gemma2ForCausalLM", GQA | {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3ForCausalLM", GQA | {"head_dim": 16, "sliding_window": 6, "num_hidden_layers": 7}),
    "cohere2": ("Cohere2ForCausalLM", GQA | {"sliding_window": 6, "num_hidden_layers": 5}),
    "gpt_oss": ("GptOssForCausalLM", GQA | {"head_dim": 16, "sliding_window": 6, "num_local_experts": 4}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", MLA | MOE | {"topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", MLA | MOE),
    "deepseek_v32": ("DeepseekV32ForCausalLM", MLA | MOE | {"index_head_dim": 8, "index_n_heads": 2, "index_topk": 4}),
    "gemma4": ("Gemma4ForCausalLM", GQA | {"head_dim": 16, "global_head_dim": 24, "sliding_window": 6,
                                           "num_hidden_layers": 6, "hidden_size_per_layer_input": 8,
                                           "vocab_size_per_layer_input": 50}),
    "gemma4, large": ("Gemma4ForCausalLM", GQA | {"head_dim": 16, "global_head_dim": 24, "sliding_window": 6,
                                                  "num_hidden_layers": 6, "hidden_size_per_layer_input": 0,
                                                  "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
                                                  "moe_intermediate_size": 16}),
    "qwen3_next": ("Qwen3NextForCausalLM", GQA | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                                                  "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
                                                  "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                                                  "linear_key_head_dim": 6, "linear_value_head_dim": 8,
                                                  "num_hidden_layers": 4}),
    "xglm": ("XGLMForCausalLM", {"d_model": 32, "num_layers": 3, "attention_heads": 4, "ffn_dim": 48,
                                 "vocab_size": 50}),
    "minicpm3": ("MiniCPM3ForCausalLM", MLA),
    "bert as decoder": ("BertLMHeadModel", SMALL | {"is_decoder": True}),
}  # fmt: skip
MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50, "state_size": 8, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
HEADS = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_ssm": 64,
         "mamba_expand": 2, "mamba_chunk_size": 4}  # fmt: skip
# Recurrent, convolutional and compressing layers, alone and beside attention.
HYBRIDS = {
    "mamba": ("MambaForCausalLM", MAMBA),
    "mamba2": ("Mamba2ForCausalLM", MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4}),
    "falcon_mamba": ("FalconMambaForCausalLM", MAMBA),
    "falcon_h1": ("FalconH1ForCausalLM", GQA | HEADS),
    "jamba": ("JambaForCausalLM", GQA | {"attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 4,
                                         "num_experts_per_tok": 2, "use_mamba_kernels": False, "mamba_d_state": 8}),
    "bamba": ("BambaForCausalLM", GQA | HEADS | {"attn_layer_indices": [1]}),
    "nemotron_h": ("NemotronHForCausalLM", GQA | {"hybrid_override_pattern": "M*-M", "num_hidden_layers": 4,
                   "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 4,
                   "head_dim": 8, "n_routed_experts": 4, "moe_intermediate_size": 16}),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM", GQA | HEADS | {"layer_types": ["mamba", "attention", "mamba"],
                         "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16}),
    "zamba2": ("Zamba2ForCausalLM", SMALL | {"layers_block_type": ["mamba", "hybrid", "mamba"], "num_mem_blocks": 1,
               "mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 1, "chunk_size": 4,
               "use_mem_rope": False, "adapter_rank": 4}),
    "lfm2": ("Lfm2ForCausalLM", GQA | {"layer_types": ["conv", "full_attention", "conv"]}),
    "minimax": ("MiniMaxForCausalLM", GQA | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
                "layer_types": ["linear_attention", "full_attention", "linear_attention"], "block_size": 4}),
    "minimax_m2": ("MiniMaxM2ForCausalLM", GQA | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmo_hybrid": ("OlmoHybridForCausalLM", GQA | {"linear_num_key_heads": 2, "linear_num_value_heads": 4,
                    "linear_key_head_dim": 6, "linear_value_head_dim": 8}),
    "llama4_text": ("Llama4ForCausalLM", GQA | {"head_dim": 8, "attention_chunk_size": 6, "num_local_experts": 4,
                    "intermediate_size_mlp": 48, "num_hidden_layers": 4}),
    "gemma3n_text": ("Gemma3nForCausalLM", GQA | {"head_dim": 8, "sliding_window": 6, "num_hidden_layers": 6,
                     "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 50,
                     "laurel_rank": 4,
                     "layer_types": ["sliding_attention", "full_attention"] * 3}),
    "kimi_linear": ("KimiLinearForCausalLM", {key: value for key, value in (MLA | MOE).items() if key != "q_lora_rank"}
                    | {"num_hidden_layers": 4, "head_dim": 12, "linear_attn_config": {
                        "full_attn_layers": [4], "kda_layers": [1, 2, 3], "head_dim": 8, "num_heads": 4,
                        "short_conv_kernel_size": 4}}),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM", MLA | MOE | {"index_head_dim": 8, "index_n_heads": 2, "index_topk": 4}),
    "mistral4": ("Mistral4ForCausalLM", MLA | MOE),
    "minimax_m3": ("MiniMaxM3VLForCausalLM", GQA | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "minimax_m3, sparse": ("MiniMaxM3VLForCausalLM", GQA | {
        "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "index_head_dim": 8, "index_n_heads": 2,
        "index_block_size": 4, "index_topk_blocks": 2, "rotary_dim": 4,
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]}),
    "qwen3_5_text": ("Qwen3_5ForCausalLM", GQA | {"head_dim": 16, "linear_num_key_heads": 2, "linear_value_head_dim": 8,
                     "linear_num_value_heads": 4, "linear_key_head_dim": 6, "num_hidden_layers": 4}),
}  # fmt: skip


def build(cls: str, settings: dict, dtype=None):
    torch.manual_seed(0)
    kind = getattr(transformers, cls, None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {cls}")
    config = kind.config_class(**settings)
    config.architectures = [cls]
    return kind(config).eval().to(dtype or torch.bfloat16)


def held(item, seen) -> dict[int, int]:
    """Storage -> its bytes, of every floating tensor that an object holds, however deep."""
    if torch.is_tensor(item):
        return {item.untyped_storage().data_ptr(): item.untyped_storage().nbytes()} if item.is_floating_point() else {}
    if id(item) in seen or isinstance(item, torch.nn.Module):
        return {}
    seen.add(id(item))
    inner = item.values() if isinstance(item, dict) else item if isinstance(item, (list, tuple)) else None
    inner = vars(item).values() if inner is None and hasattr(item, "__dict__") else inner or ()
    return {key: size for part in inner for key, size in held(part, seen).items() if size}


def cached_bytes(cache) -> int:
    return sum(held(cache, set()).values())


def expected_bytes(blocks, context: int, dtype: str = "bfloat16") -> int:
    return BATCH * sum(block.bytes(context, dtype) for block in blocks)


FEW = ["gpt2", "mistral", "qwen2, half sliding", "gemma3", "deepseek_v3", "gemma4", "qwen3_next", "mamba2", "falcon_h1",
       "jamba", "nemotron_h", "minimax", "kimi_linear", "glm_moe_dsa"]  # fmt: skip
LATER = [family for family in (*DECODERS, *HYBRIDS) if family not in FEW]


@pytest.mark.parametrize("family", [*FEW, *(pytest.param(family, marks=pytest.mark.soak) for family in LATER)])
def test_what_is_traced_is_what_the_cache_holds(family):
    """Prefill a prompt and decode to TOTAL tokens: at every step the cache's storages weigh what was found on meta."""
    model = build(*{**DECODERS, **HYBRIDS}[family])
    blocks = traced_attention(model)
    modules = dict(model.named_modules())
    assert blocks and all(block.layer in modules for block in blocks)
    tokens = torch.randint(3, 50, (BATCH, TOTAL))
    with torch.no_grad():
        out = model(tokens[:, :PROMPT], use_cache=True)
        name = "past_key_values" if getattr(out, "past_key_values", None) is not None else "cache_params"
        for step in range(PROMPT, TOTAL):
            out = model(tokens[:, step : step + 1], use_cache=True, **{name: getattr(out, name)})
            assert cached_bytes(getattr(out, name)) == expected_bytes(blocks, step + 1), (family, step)


@pytest.mark.soak
def test_compressed_keys_are_counted_in_groups():
    """DeepSeek-V4 keeps an entry for every 4 or 128 tokens; at the end of a group its buffers are full, as counted."""
    model = build("DeepseekV4ForCausalLM", SMALL | {"num_hidden_layers": 4})
    blocks = traced_attention(model)
    assert {block.every for block in blocks} == {1, 4, 128}
    tokens = torch.randint(3, 50, (BATCH, 257))
    with torch.no_grad():
        cache = model(tokens[:, :255], use_cache=True).past_key_values
        cache = model(tokens[:, 255:256], use_cache=True, past_key_values=cache).past_key_values
    assert cached_bytes(cache) <= expected_bytes(blocks, 256) < 1.01 * cached_bytes(cache)


def test_states_that_stay_in_float32():
    """The recurrent states of Mamba-2 have 32 bits whatever the model computes in."""
    model = build(*HYBRIDS["mamba2"])
    [block, _] = traced_attention(model)
    assert block.float32 > 0 and block.bytes(8, "bfloat16") == 2 * block.fixed + 4 * block.float32
    assert block.bytes(8, "bfloat16", "int4") == block.bytes(9999, "bfloat16")  # nothing of it grows or is quantized


SEQ2SEQ = {
    "t5": ("T5ForConditionalGeneration", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
                                          "num_decoder_layers": 3, "vocab_size": 50, "decoder_start_token_id": 0}),
    "bart": ("BartForConditionalGeneration", {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3,
                                              "encoder_attention_heads": 4, "decoder_attention_heads": 4,
                                              "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 50,
                                              "max_position_embeddings": 64}),
}  # fmt: skip


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_encoder_decoder_caches_source_and_target(family):
    model = build(*SEQ2SEQ[family])
    blocks = traced_attention(model)
    assert [block.layer.split(".")[-1] for block in blocks] == ["0", "1", "2"] and "decoder" in blocks[0].layer
    tokens = torch.randint(3, 50, (BATCH, TOTAL))
    with torch.no_grad():
        out = model(input_ids=tokens, decoder_input_ids=tokens[:, :PROMPT], use_cache=True)
        for step in range(PROMPT, TOTAL):
            out = model(encoder_outputs=(out.encoder_last_hidden_state,), decoder_input_ids=tokens[:, step : step + 1],
                        past_key_values=out.past_key_values, use_cache=True)  # fmt: skip
    assert cached_bytes(out.past_key_values) == expected_bytes(blocks, TOTAL)


def test_whisper_source_is_fixed():
    settings = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
                "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 50,
                "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 64, "pad_token_id": 0,
                "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip
    model = build("WhisperForConditionalGeneration", settings)
    blocks = traced_attention(model)
    with torch.no_grad():
        sound = torch.randn(BATCH, 8, 20, dtype=torch.bfloat16)
        tokens = torch.ones(BATCH, TOTAL, dtype=torch.long)
        cache = model(input_features=sound, decoder_input_ids=tokens, use_cache=True).past_key_values
    assert len(blocks) == 2 and blocks[0].fixed == 2 * 32 * 10
    assert cached_bytes(cache) == expected_bytes(blocks, TOTAL)


def test_vision_language_model_caches_its_text_layers():
    text = {"model_type": "llama"} | GQA
    vision = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3,
              "num_attention_heads": 4, "image_size": 8, "patch_size": 4}  # fmt: skip
    both = {"text_config": text, "vision_config": vision, "image_token_index": 49}
    model = build("LlavaForConditionalGeneration", both)
    blocks = traced_attention(model)
    with torch.no_grad():
        cache = model(torch.randint(3, 48, (BATCH, TOTAL)), use_cache=True).past_key_values
    assert all("language_model" in block.layer for block in blocks)
    assert len(blocks) == 3 and cached_bytes(cache) == expected_bytes(blocks, TOTAL)


def test_encoders_cache_nothing():
    for cls in ("BertModel", "BertForMaskedLM", "ViTForImageClassification"):
        settings = {**SMALL, "image_size": 8, "patch_size": 4} if cls.startswith("ViT") else SMALL
        assert spec_from_module(build(cls, settings), trace_cache=True).attention == ()


def test_the_model_is_neither_run_nor_changed():
    model = build(*DECODERS["llama"])
    model.forward = None
    before = {name: id(value) for name, value in vars(model).items()}
    assert len(traced_attention(model)) == 3
    assert {name: id(value) for name, value in vars(model).items()} == before


def test_what_cannot_be_run_follows_from_the_config():
    """Idefics asks its images for values; a state that modules keep themselves is no cache that can be read."""
    settings = SMALL | {
        "num_hidden_layers": 4, "cross_layer_interval": 2, "additional_vocab_size": 2, "use_resampler": False,
        "vision_config": {"embed_dim": 32, "image_size": 8, "patch_size": 4, "num_hidden_layers": 4,
                          "num_attention_heads": 4, "intermediate_size": 48},
    }  # fmt: skip
    model = build("IdeficsForVisionText2Text", settings, torch.float32)
    assert traced_attention(model) is None
    blocks = spec_from_module(model, trace_cache=True).attention
    assert [block.layer for block in blocks] == [f"model.layers.{i}" for i in range(4)]
    with torch.no_grad():
        tokens = torch.randint(3, 50, (BATCH, TOTAL))
        cache = model(tokens, pixel_values=torch.randn(BATCH, 1, 3, 8, 8), use_cache=True,
                      image_attention_mask=torch.ones(BATCH, TOTAL, 1)).past_key_values  # fmt: skip
    assert cached_bytes(cache) == expected_bytes(blocks, TOTAL, "float32")
    mine = build("RecurrentGemmaForCausalLM", GQA | {"lru_width": 32, "attention_window_size": 6})
    assert traced_attention(mine) is None


def test_prefill_of_a_long_prompt_holds_more_than_the_window():
    """Right after a long prefill the window's view keeps the whole prompt alive; the first token ends that."""
    model = build(*DECODERS["mistral"])
    blocks = traced_attention(model)
    whole = 2 * BATCH * TOTAL * sum(block.per_token for block in blocks)
    with torch.no_grad():
        tokens = torch.randint(3, 50, (BATCH, TOTAL))
        cache = model(tokens, use_cache=True).past_key_values
        assert cached_bytes(cache) == whole > expected_bytes(blocks, TOTAL)
        cache = model(tokens[:, :1], past_key_values=cache, use_cache=True).past_key_values
    assert cached_bytes(cache) == expected_bytes(blocks, TOTAL + 1)


@pytest.mark.parametrize("family", ["gpt2", "llama, grouped", "mistral", "mistral, no window", "deepseek_v3"])
def test_the_formula_of_a_config_agrees_where_it_applies(family):
    """What stands for models that no installed class builds."""
    model = build(*DECODERS[family])
    assert reader.attention(model.config.to_dict(), spec_from_module(model).root) == traced_attention(model)


def test_a_cache_in_float8():
    """Transformers' own float8 cache holds what `kv_dtype` says, but for its scales."""
    model = build(*DECODERS["llama, grouped"])
    cache = transformers.QuantizedCache("fp8", model.config)
    tokens = torch.randint(3, 50, (BATCH, TOTAL))
    with torch.no_grad():
        model(tokens[:, :-1], past_key_values=cache)
        model(tokens[:, -1:], past_key_values=cache)
    scales = 4 * 2 * 3
    counted = BATCH * sum(block.bytes(TOTAL, "bfloat16", "float8") for block in traced_attention(model))
    assert cached_bytes(cache) == counted + scales


def test_a_config_that_would_take_hours_is_given_up(monkeypatch):
    monkeypatch.setattr("bigkit.meta.cache.OPERATIONS", 50)
    assert traced_attention(build("LlamaForCausalLM", GQA | {"vocab_size": 51})) is None
