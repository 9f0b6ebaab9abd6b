"""What Transformers keeps for itself and bigkit asks for: each name is there and says what it is asked."""

import importlib

import pytest
import torch

from bigkit.checkpoints import _transformers

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "module, name",
    [
        ("conversion_mapping", "get_model_conversion_mapping"),
        ("core_model_loading", "WeightConverter"),
        ("core_model_loading", "WeightRenaming"),
        ("core_model_loading", "dot_natural_key"),
        ("core_model_loading", "rename_source_key"),
    ],
)
def test_a_name_is_there(module, name):
    assert hasattr(importlib.import_module(f"transformers.{module}"), name), (
        f"transformers {transformers.__version__} has no {module}.{name} any more: "
        "bigkit/checkpoints/_transformers.py must find another way"
    )


def test_rules_rename_order_and_convert():
    config = transformers.MixtralConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=16,
        intermediate_size=4, num_local_experts=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    rules = _transformers.conversion_rules(model)
    assert rules.converters and _transformers.conversion_rules(torch.nn.Linear(2, 2)) is None
    assert _transformers.in_order({"e.10.w", "e.2.w"}) == ["e.2.w", "e.10.w"]
    tensors = dict(model.named_parameters())
    stem = "model.layers.0.block_sparse_moe.experts"
    target, pattern = _transformers.target_of(f"{stem}.0.w2.weight", rules, model, tensors)
    assert target == "model.layers.0.mlp.experts.down_proj"
    converter = next(rule for rule in rules.converters if pattern in rule.source_patterns)
    patterns = {f"{stem}.{i}.w2.weight": pattern for i in range(2)}
    parts = {name: torch.randn(8, 4) for name in patterns}
    joined = _transformers.convert(converter, target, patterns, parts, model)
    assert torch.equal(joined[target], torch.stack([*parts.values()]))


def test_a_class_says_what_may_be_missing():
    model = torch.nn.Linear(2, 2)
    assert _transformers.ignored_names(model, "missing") == []
    model._keys_to_ignore_on_load_missing = [r"bias$"]
    assert _transformers.ignored_names(model, "missing")[0].search("h.bias")
    assert hasattr(transformers.PreTrainedModel, "_keys_to_ignore_on_load_missing")
    assert hasattr(transformers.PreTrainedModel, "_keys_to_ignore_on_load_unexpected")
