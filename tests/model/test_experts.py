"""Experts in layer records, against published figures, a second count, and both forms in which models hold them."""

import json
from dataclasses import replace
from itertools import combinations

import pytest
import transformers as tf
from torch import nn

from bigkit import estimate_memory, init_empty_weights, zoo
from bigkit.meta.skeleton import spec_from_module
from bigkit.model.estimate import estimate
from bigkit.model.experts import active_bytes, active_parameters, experts_of, sentence, visited
from bigkit.model.precision import Precision

TINY = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}


def described(cls, config):
    with init_empty_weights():
        return spec_from_module(cls(config), name=config.model_type)


def gpt_oss():
    return described(tf.GptOssForCausalLM, tf.GptOssConfig(num_hidden_layers=24, num_local_experts=32))


@pytest.mark.parametrize(
    ("describe", "total", "active", "shape"),
    [
        (lambda: zoo.describe("mixtral-8x7b"), 46.7, 12.9, (32, 8, 2, 0)),
        (lambda: zoo.describe("deepseek-v3"), 671.0, 37.6, (58, 256, 8, 1)),  # published as 37, without the embeddings
        (lambda: zoo.describe("qwen3-30b-a3b"), 30.5, 3.35, (48, 128, 8, 0)),
        (
            lambda: zoo.describe("gpt-oss-120b"),
            116.8,
            5.71,
            (36, 128, 4, 0),
        ),  # published as 5.1, without the embeddings
        (gpt_oss, 20.9, 4.19, (24, 32, 4, 0)),  # published as 3.6, without the embeddings: see below
    ],
)
def test_published_figures(describe, total, active, shape):
    model = describe()
    experts = experts_of(model)
    first = experts[0]
    assert (len(experts), first.count, first.per_token, len(first.shared)) == shape
    assert model.parameters / 1e9 == pytest.approx(total, rel=0.002)
    assert active_parameters(model) / 1e9 == pytest.approx(active, rel=0.004)
    if model.name == "gpt_oss":
        embeddings = model.tensors["model.embed_tokens.weight"][0].elements
        assert (active_parameters(model) - embeddings) / 1e9 == pytest.approx(3.6, rel=0.005)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_bytes_are_those_of_the_tensors(quantization):
    model = gpt_oss()
    precision = model.precision("bfloat16", quantization)
    first = experts_of(model)[0]
    weights, biases = 2880 * 5760 + 2880 * 2880, 2 * (5760 + 2880)
    one = biases + (weights * 9 // 16 if quantization else 2 * weights)  # 4 bits, and 32 for a scale of 64 weights
    assert first.bytes_each(precision) == one and first.bytes(precision) == 32 * one
    assert model.bytes(precision) - active_bytes(model, precision) == 24 * 28 * one


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.experts = nn.ModuleList(Expert() for _ in range(4))
        self.shared_experts = Expert()
        self.shared_expert_gate = nn.Linear(16, 1)


class Remote(nn.Module):
    """Experts as modules, as code that comes with checkpoints holds them."""

    def __init__(self):
        super().__init__()
        self.config = tf.MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2)
        self.layers = nn.ModuleList(Block() for _ in range(3))


def test_experts_as_modules():
    model = spec_from_module(Remote())
    experts = experts_of(model)
    assert [one.name for one in experts] == [f"layers.{i}.experts" for i in range(3)]
    assert {(one.count, one.per_token, one.shared[0][9:]) for one in experts} == {(4, 2, "shared_experts")}
    assert all(len(one.shared) == 1 for one in experts)  # its gate is a router's
    assert active_parameters(model) == model.parameters - 3 * 2 * 2 * 16 * 32
    assert experts[0].bytes_each(Precision("float16")) == 2 * 2 * 16 * 32


def test_other_models_have_none():
    dense = zoo.describe("llama-3.1-8b")
    assert experts_of(dense) == () and sentence(dense) == ""
    assert active_parameters(dense) == dense.parameters and active_bytes(dense) == dense.bytes()
    found = estimate_memory("llama-3.1-8b")
    assert found.active == found.parameters and "token uses" not in str(found)
    assert "for a token" not in repr(found)


def test_estimate_shows_total_and_active():
    found = estimate_memory("mixtral-8x7b", stored=["bfloat16"])
    row = found.inference[0]
    spec = zoo.describe("mixtral-8x7b")
    assert found.active == active_parameters(spec) and row.active == active_bytes(spec, spec.precision("bfloat16"))
    for text in (str(found), found._repr_html_()):
        assert "used by a token" in text and "23.99 GiB" in text and "12.9 B, 2 of 8 experts" in text
    data = json.loads(found.to_json())
    assert data["active"] == found.active and data["inference"][0]["active"] == row.active
    assert "for a token" in repr(found) and len(repr(found)) < 110
    assert estimate(spec, stored=["nf4"]).inference[0].active < row.active


def test_visited_is_what_chance_gives():
    """Against a count of all the ways in which three tokens can choose 2 of 4."""
    pairs = [*combinations(range(4), 2)]
    ways = [len({*a, *b, *c}) for a in pairs for b in pairs for c in pairs]
    assert visited(3, 2, 4) == pytest.approx(sum(ways) / len(ways) / 4)


def test_more_experts_per_token_than_there_are():
    model = spec_from_module(Remote())
    wrong = replace(model, facts={**model.facts, "experts_per_token": 5})
    with pytest.raises(ValueError, match="Remote says that a token takes 5 experts, but its blocks have 4 each"):
        estimate(wrong)
    for none in (0, -2):
        with pytest.raises(ValueError, match=f"Remote says that a token takes {none} experts: expected at least 1"):
            estimate(replace(model, facts={**model.facts, "experts_per_token": none}))
