"""What is recorded is what the routers said: against their own logits, read or written, whole or spread out."""

import json

import pytest
import torch
import transformers as tf

from bigkit import dispatch_model, init_empty_weights, load_checkpoint_and_dispatch, zoo
from bigkit.machine.routing import Routing
from bigkit.measure.routing import record_routing
from bigkit.meta.skeleton import spec_from_module
from bigkit.zoo.gpt import PYMOE, decode, encode, heldout_text

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
ONE = {**SIZES, "num_hidden_layers": 3, "num_experts_per_tok": 2}
IDS = torch.arange(1, 8)[None]
DENSE = tf.LlamaConfig(**SIZES, intermediate_size=16, num_hidden_layers=1)


def mixtral():
    torch.manual_seed(0)
    return tf.MixtralForCausalLM(tf.MixtralConfig(**ONE, intermediate_size=16, num_local_experts=4)).eval()


def qwen():
    torch.manual_seed(0)
    config = tf.Qwen3MoeConfig(**ONE, moe_intermediate_size=16, num_experts=8, head_dim=8)
    return tf.Qwen3MoeForCausalLM(config).eval()


@pytest.mark.parametrize("make", [mixtral, qwen])
@torch.no_grad()
def test_the_choice_is_that_of_the_router_logits(make):
    model = make()
    routing = record_routing(model, lambda: model(IDS), "tiny", chr)
    logits = model(IDS, output_router_logits=True).router_logits
    for layer, scores in zip(routing.chosen, logits, strict=True):
        assert [{*choice} for choice in layer] == [{*row} for row in scores.topk(2).indices.tolist()]
    assert routing.text == tuple(map(chr, range(1, 8))) and routing.model == "tiny"
    assert not any(module._forward_pre_hooks for module in model.modules()), "no hook stays"


@torch.no_grad()
def test_written_as_read_whole_as_spread_out():
    model = qwen()
    written = []
    routing = record_routing(model, lambda: written.append(model.generate(IDS, max_new_tokens=6, do_sample=False)))
    read = record_routing(model, lambda: model(written[0][:, :-1]))
    assert routing == read and routing.tokens == 12
    places = {"": 0, **{f"model.layers.{i}.mlp.experts": "cpu" for i in range(3)}}
    spread_out = dispatch_model(model, places, stand_in={0: "cpu"}, force_hooks=True)
    assert record_routing(spread_out, lambda: spread_out.generate(IDS, max_new_tokens=6, do_sample=False)) == read


@pytest.mark.parametrize("slots", [0, 6, 9, 14, 24])
@torch.no_grad()
def test_the_cache_in_ram_hits_what_the_policy_foretells(slots, tmp_path):
    model = qwen()
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[3]])
    routing = record_routing(model, lambda: model.generate(ids, max_new_tokens=24, do_sample=False))
    each = routing.bytes_each(spec_from_module(model))
    with init_empty_weights():
        empty = tf.Qwen3MoeForCausalLM(model.config).eval()
    places = {"": "cpu", **{f"model.layers.{i}.mlp.experts": "disk" for i in range(3)}}
    spread_out = load_checkpoint_and_dispatch(empty, tmp_path, places, ram_cache=slots * each)
    spread_out.generate(ids, max_new_tokens=24, do_sample=False)
    cache = spread_out.model.layers[0].mlp.experts._hf_hook.streamer.cache
    hits = routing.hits("LRU", slots)
    assert (cache.hits, cache.misses) == (sum(hits), len(hits) - sum(hits))
    assert cache.bytes_read / routing.tokens == routing.bytes_per_token("LRU", slots, each)


def test_the_shipped_routing_is_what_the_model_does():
    shipped = Routing.load(PYMOE / "routing.json")
    assert "".join(shipped.text) == heldout_text()[:512] and shipped.model == "pymoe"
    assert shipped.bytes_each(zoo.describe("pymoe")) == 196_608
    model = tf.AutoModelForCausalLM.from_pretrained(PYMOE, dtype=torch.float32).eval()
    with torch.no_grad():
        ids = torch.tensor([encode(heldout_text()[:512])])
        found = record_routing(model, lambda: model(ids), "pymoe", lambda byte: decode([byte]))
    pairs = [(set(a), set(b)) for x, y in zip(found.chosen, shipped.chosen) for a, b in zip(x, y)]
    assert sum(a == b for a, b in pairs) > 0.99 * len(pairs), "nearly equal scores may fall out differently elsewhere"


def test_the_shipped_figures_are_those_of_the_recorder():
    """Another machine counted all of the held-out text; its beginning is near."""
    shares = json.loads((PYMOE / "training.json").read_text())["routing"]
    shipped = Routing.load(PYMOE / "routing.json")
    for counts, row in zip(shipped.counts, shares, strict=True):
        total = sum(counts)
        assert sum(abs(count / total - share) for count, share in zip(counts, row, strict=True)) < 0.35
        assert not any(count for count, share in zip(counts, row) if share < 0.0001)


@pytest.mark.parametrize(
    ("make", "run", "said"),
    [
        (lambda: tf.LlamaForCausalLM(DENSE), lambda model: model(IDS), "LlamaForCausalLM has no experts"),
        (mixtral, lambda model: None, "were not called while it was recorded"),
        (mixtral, lambda model: model(IDS.repeat(3, 1)), "called with 3 sequences: record the routing of one"),
    ],
)
def test_errors_are_a_sentence(make, run, said):
    model = make()
    with pytest.raises(ValueError, match=said):
        record_routing(model, lambda: run(model))
    assert not any(module._forward_pre_hooks for module in model.modules())
