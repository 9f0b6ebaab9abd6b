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


def test_experts_are_put_together_in_their_order():
    config = transformers.MixtralConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=16,
        intermediate_size=4, num_local_experts=11,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    parts = {f"model.layers.0.block_sparse_moe.experts.{i}.w2.weight": torch.randn(8, 4) for i in range(11)}
    renamed, made = _transformers.conversions(
        model, dict(model.named_parameters()), reversed(parts), lambda name: ((8, 4), torch.float32)
    )
    down = made["model.layers.0.mlp.experts.down_proj"]
    assert not renamed and down.shape == (11, 8, 4) and down.sources == tuple(parts)
    assert torch.equal(down.make(parts), torch.stack([*parts.values()]))
    assert _transformers.conversions(torch.nn.Linear(2, 2), {}, parts, lambda name: ((8, 4), torch.float32)) == ({}, {})


def test_a_class_says_what_may_be_missing():
    model = torch.nn.Linear(2, 2)
    assert _transformers.ignored_names(model, "missing") == []
    model._keys_to_ignore_on_load_missing = [r"bias$"]
    assert _transformers.ignored_names(model, "missing")[0].search("h.bias")
    assert hasattr(transformers.PreTrainedModel, "_keys_to_ignore_on_load_missing")
    assert hasattr(transformers.PreTrainedModel, "_keys_to_ignore_on_load_unexpected")
