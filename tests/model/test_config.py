"""bigkit.model.config against the facts of real configs; caches are compared in tests/meta/test_cache.py."""

from __future__ import annotations

import pytest

from bigkit.model import config as reader
from bigkit.model.spec import ModuleSpec

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def settings_of(family: str, **settings) -> dict:
    return transformers.CONFIG_MAPPING[family](**settings).to_dict()


def test_facts_of_a_mixture_of_experts():
    sizes = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
    heads = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "first_k_dense_replace": 1, "num_hidden_layers": 3}
    found = reader.facts(settings_of("deepseek_v3", **sizes, **heads))
    assert (found["num_experts"], found["experts_per_token"], found["shared_experts"]) == (4, 2, 1)
    assert (found["moe_intermediate_size"], found["dense_layers"], found["head_dim"]) == (16, 1, 12)


@pytest.mark.parametrize(
    ("family", "positions"),
    [("gpt2", "learned"), ("opt", "learned"), ("llama", "rotary"), ("bloom", "alibi"), ("mpt", "alibi")],
)
def test_positions(family, positions):
    assert reader.facts(settings_of(family))["positions"] == positions


def test_layers_that_are_not_counted_are_named():
    found = reader.facts({"model_type": "new", "layer_types": ["linear_attention", "full_attention"]})
    assert found["uncounted_cache"] == ["linear_attention"]
    assert "uncounted_cache" not in reader.facts({"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2})


def test_a_config_without_a_class_is_counted_by_formula():
    blocks = {str(i): ModuleSpec("Block") for i in range(4)}
    root = ModuleSpec("Model", children={"layers": ModuleSpec("ModuleList", children=blocks)})
    config = {"model_type": "new", "use_cache": True, "num_hidden_layers": 4, "hidden_size": 32, "sliding_window": 6,
              "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    assert [(block.per_token, block.window) for block in reader.attention(config, root)] == [(32, 6)] * 4
    kinds = {"layer_types": ["sliding_attention", "full_attention", "linear_attention", "sliding_attention"]}
    found = reader.attention({**config, **kinds}, root)
    assert [(block.layer, block.window) for block in found] == [("layers.0", 6), ("layers.1", None), ("layers.3", 6)]
    mla = {**config, "sliding_window": None, "kv_lora_rank": 16, "qk_rope_head_dim": 4}
    assert [block.per_token for block in reader.attention(mla, root)] == [20] * 4


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
