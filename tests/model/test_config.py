"""bigkit.model.config against the caches that Transformers really fills, and against the facts of real configs."""

from __future__ import annotations

import pytest
import transformers
from packaging.version import Version

from bigkit.model import config as reader
from bigkit.model.spec import ModuleSpec

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BATCH, PROMPT, TOTAL = 2, 5, 12
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
SEQ2SEQ = {
    "t5": ("T5ForConditionalGeneration", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
                                          "num_decoder_layers": 3, "vocab_size": 50, "decoder_start_token_id": 0}),
    "bart": ("BartForConditionalGeneration", {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3,
                                              "encoder_attention_heads": 4, "decoder_attention_heads": 4,
                                              "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 50,
                                              "max_position_embeddings": 64}),
}  # fmt: skip


def tree(model) -> ModuleSpec:
    """The shape of a model, as far as `attention` looks at it."""
    from bigkit.meta.skeleton import spec_from_module

    return spec_from_module(model, "oracle").root


def build(cls: str, settings: dict):
    torch.manual_seed(0)
    kind = getattr(transformers, cls)
    config = kind.config_class(**settings)
    config.architectures = [cls]
    return kind(config).eval()


def cached_bytes(cache) -> int:
    """Bytes of every storage that the cache holds on to, encoder-decoder caches included."""
    crossed = hasattr(cache, "cross_attention_cache")
    parts = [cache.self_attention_cache, cache.cross_attention_cache] if crossed else [cache]
    layers = [layer for part in parts for layer in part.layers]
    names = ("keys", "values", "indexer_keys", "conv_states", "recurrent_states")
    found = [getattr(layer, name, None) for layer in layers for name in names]
    held = [t for item in found for t in (item.values() if isinstance(item, dict) else [item])]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held if t is not None}.values())


def expected_bytes(blocks, context: int) -> int:
    return 4 * BATCH * sum(block.elements(context) for block in blocks)


@pytest.mark.parametrize("family", DECODERS)
def test_attention_is_what_the_cache_holds(family):
    """Prefill a prompt and decode to TOTAL tokens: at every step the cache's storages weigh what `attention` says."""
    if family == "deepseek_v32" and Version(transformers.__version__) < Version("5.18"):
        pytest.skip("5.15 and 5.17 keep the keys and values of all its heads, which we do not count")
    model = build(*DECODERS[family])
    settings = model.config.to_dict()
    blocks = reader.attention(settings, tree(model))
    modules = dict(model.named_modules())
    assert len(blocks) == reader.facts(settings)["num_hidden_layers"]
    assert all(block.layer in modules for block in blocks)
    tokens = torch.randint(3, 50, (BATCH, TOTAL))
    with torch.no_grad():
        cache = model(tokens[:, :PROMPT], use_cache=True).past_key_values
        assert cached_bytes(cache) == expected_bytes(blocks, PROMPT)  # the prompt is shorter than every window here
        for step in range(PROMPT, TOTAL):
            cache = model(tokens[:, step : step + 1], past_key_values=cache, use_cache=True).past_key_values
            assert cached_bytes(cache) == expected_bytes(blocks, step + 1)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_encoder_decoder_caches_source_and_target(family):
    model = build(*SEQ2SEQ[family])
    settings = model.config.to_dict()
    blocks = reader.attention(settings, tree(model))
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
    blocks = reader.attention(model.config.to_dict(), tree(model))
    with torch.no_grad():
        sound = torch.randn(BATCH, 8, 20)
        tokens = torch.ones(BATCH, TOTAL, dtype=torch.long)
        cache = model(input_features=sound, decoder_input_ids=tokens, use_cache=True).past_key_values
    assert len(blocks) == 2 and cached_bytes(cache) == expected_bytes(blocks, TOTAL)


def test_idefics_caches_the_decoder_alone():
    """Cross-attention to images and the vision tower add nothing to the cache."""
    settings = SMALL | {
        "num_hidden_layers": 4, "cross_layer_interval": 2, "additional_vocab_size": 2, "use_resampler": False,
        "vision_config": {"embed_dim": 32, "image_size": 8, "patch_size": 4, "num_hidden_layers": 4,
                          "num_attention_heads": 4, "intermediate_size": 48},
    }  # fmt: skip
    model = build("IdeficsForVisionText2Text", settings)
    blocks = reader.attention(model.config.to_dict(), tree(model))
    assert [block.layer for block in blocks] == [f"model.layers.{i}" for i in range(4)]
    with torch.no_grad():
        tokens = torch.randint(3, 50, (BATCH, TOTAL))
        cache = model(tokens, pixel_values=torch.randn(BATCH, 1, 3, 8, 8), use_cache=True,
                      image_attention_mask=torch.ones(BATCH, TOTAL, 1)).past_key_values  # fmt: skip
    assert cached_bytes(cache) == expected_bytes(blocks, TOTAL)


def test_vision_language_model_caches_its_text_layers():
    text = {"model_type": "llama"} | GQA
    vision = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3,
              "num_attention_heads": 4, "image_size": 8, "patch_size": 4}  # fmt: skip
    both = {"text_config": text, "vision_config": vision, "image_token_index": 49}
    model = build("LlavaForConditionalGeneration", both)
    settings = model.config.to_dict()
    blocks = reader.attention(settings, tree(model))
    with torch.no_grad():
        cache = model(torch.randint(3, 48, (BATCH, TOTAL)), use_cache=True).past_key_values
    assert all("language_model" in block.layer for block in blocks)
    assert len(blocks) == 3 and cached_bytes(cache) == expected_bytes(blocks, TOTAL)
    assert reader.facts(settings)["hidden_size"] == 32


ENCODERS = ["BertModel", "BertForMaskedLM", "RobertaModel", "ViTModel", "ViTForImageClassification"]


@pytest.mark.parametrize("cls", ENCODERS)
def test_encoders_cache_nothing(cls):
    settings = {**SMALL, "image_size": 8, "patch_size": 4} if cls.startswith("ViT") else SMALL
    model = build(cls, settings)
    assert reader.attention(model.config.to_dict(), tree(model)) == ()


def test_prefill_of_a_long_prompt_holds_more_than_the_window():
    """What the docstring warns of: right after a long prefill the window's view keeps the whole prompt alive."""
    model = build(*DECODERS["mistral"])
    blocks = reader.attention(model.config.to_dict(), tree(model))
    whole = 4 * BATCH * TOTAL * sum(block.per_token for block in blocks)
    with torch.no_grad():
        tokens = torch.randint(3, 50, (BATCH, TOTAL))
        cache = model(tokens, use_cache=True).past_key_values
        assert cached_bytes(cache) == whole > expected_bytes(blocks, TOTAL)
        cache = model(tokens[:, :1], past_key_values=cache, use_cache=True).past_key_values
    assert cached_bytes(cache) == expected_bytes(blocks, TOTAL + 1)


@pytest.mark.parametrize("family", ["gemma2", "qwen2, half sliding", "mistral", "cohere2"])
def test_raw_config_json_means_the_same_as_the_resolved_one(family):
    """A config.json that leaves `layer_types` to its class gives the same cache."""
    model = build(*DECODERS[family])
    resolved = model.config.to_dict()
    raw = {key: value for key, value in resolved.items() if key != "layer_types"}
    assert reader.attention(raw, tree(model)) == reader.attention(resolved, tree(model))


def test_facts_of_a_mixture_of_experts():
    found = reader.facts(build(*DECODERS["deepseek_v3"]).config.to_dict())
    assert (found["num_experts"], found["experts_per_token"], found["shared_experts"]) == (4, 2, 1)
    assert (found["moe_intermediate_size"], found["dense_layers"], found["head_dim"]) == (16, 1, 12)


@pytest.mark.parametrize(
    ("family", "positions"),
    [("gpt2", "learned"), ("opt", "learned"), ("llama", "rotary"), ("bloom", "alibi"), ("mpt", "alibi")],
)
def test_positions(family, positions):
    assert reader.facts(build(*DECODERS[family]).config.to_dict())["positions"] == positions


def test_recurrent_layers_are_named_not_taken_for_zero():
    found = reader.facts({"model_type": "minimax", "layer_types": ["linear_attention", "full_attention"]})
    assert found["uncounted_cache"] == ["linear_attention"]
    assert reader.facts({"model_type": "mamba2"})["uncounted_cache"] == ["recurrent"]
    assert "uncounted_cache" not in reader.facts({"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2})


def test_facts_never_invent():
    assert reader.facts({}) == {"model_type": "", "is_encoder_decoder": False, "generates": False}
    assert reader.attention({}, ModuleSpec("Empty")) == ()


def check_estimate(family):
    """Every fact is one value, with which estimates, plans and advice count the same."""
    from bigkit.machine.hardware import machine_of
    from bigkit.maps.advise import advise
    from bigkit.maps.strategies import place
    from bigkit.model.estimate import estimate
    from bigkit.model.spec import ModelSpec, TensorSpec

    settings = transformers.CONFIG_MAPPING[family]().to_dict()
    facts = reader.facts(settings)
    assert not any(value is None or isinstance(value, (tuple, dict)) for value in facts.values())
    blocks = {str(i): ModuleSpec("Block", {"w": TensorSpec((4, 4))}) for i in range(facts.get("num_hidden_layers", 1))}
    root = ModuleSpec("Model", {}, {"decoder": ModuleSpec("ModuleList", {}, blocks)})
    spec = ModelSpec(family, root, (), ("Block",), reader.attention(settings, root), facts)
    [row] = estimate(spec, stored=["bfloat16"], context=64).inference
    planned = place(spec, {0: "1TiB"}, dtype="bfloat16", context=64)
    assert [planned.shares[0].kv_cache, planned.shares[0].activations] == [row.kv_cache, row.activations]
    told = advise(spec, machine_of("8 x H200"), context=64, target="context").best
    assert told.seconds > 0 and (told.token is None) == (not facts["generates"])
    return facts


@pytest.mark.parametrize("family", ["switch_transformers", "nllb-moe", "gemma3n", "ernie4_5_vl_moe", "lxmert", "llama"])
def test_facts_of_odd_configs_can_be_counted_with(family):
    """Experts without a size of their own, a size for each layer, a count for each kind of layer."""
    if family in transformers.CONFIG_MAPPING:
        check_estimate(family)


ODD = ([1, 2], [None], [], ["x"], {"a": 1}, None, "text", 2.5, -1, True)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "qwen3_next", "whisper", "mpt"])
def test_configs_of_other_peoples_code_may_hold_anything(family):
    from bigkit.model.estimate import estimate
    from bigkit.model.spec import ModelSpec

    settings = {**transformers.CONFIG_MAPPING[family]().to_dict(), "use_cache": True}
    blocks = {str(index): ModuleSpec("Block") for index in range(settings.get("num_hidden_layers") or 1)}
    root = ModuleSpec("Model", children={"decoder": ModuleSpec("ModuleList", children=blocks)})
    for name in settings:
        for odd in ODD:
            config = {**settings, name: odd}
            facts = reader.facts(config)
            numbers = facts.keys() & {"hidden_size", "intermediate_size", "num_hidden_layers", "head_dim", "vocab_size"}
            assert all(type(facts[number]) is int for number in numbers), (name, odd)
            spec = ModelSpec(family, root, attention=reader.attention(config, root), facts=facts)
            assert estimate(spec, context=64).inference[0].total >= 0


def test_experts_without_a_size_of_their_own_have_that_of_the_feed_forward():
    for family, size in (("switch_transformers", 2048), ("nllb-moe", 4096)):
        facts = check_estimate(family)
        assert facts["moe_intermediate_size"] == facts["intermediate_size"] == size


def can_be_made(family):
    try:
        transformers.CONFIG_MAPPING[family]()
    except Exception:  # some cannot be made without arguments, or need another library
        return False
    return True


def test_facts_of_configs_of_transformers_can_be_counted_with():
    for family in filter(can_be_made, list(transformers.CONFIG_MAPPING)[::12]):
        check_estimate(family)


@pytest.mark.soak
def test_facts_of_every_config_of_transformers_can_be_counted_with():
    for family in filter(can_be_made, transformers.CONFIG_MAPPING):
        check_estimate(family)
