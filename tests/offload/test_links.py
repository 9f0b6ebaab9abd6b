"""Weights at rest work on all GPUs in turn: the same outputs, every link busy, and everything given back."""

import copy

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import bigkit
from bigkit.maps.links import DeviceMap
from bigkit.offload.hooks import hooks_in
from bigkit.offload.resting_cache import RestingCache
from bigkit.zoo.gpt import load_pygpt
from tests.spread import STAND_IN, Net, check_at_rest, handles, same, spread

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def working(model):
    """Block -> the streamers' device names, as events call them."""
    return {
        hook.unit.name: hook.streamer.name
        for module in model.modules()
        for hook in hooks_in(module)
        if getattr(hook, "unit", None) is not None
    }


def test_blocks_take_turns_on_the_gpus_that_a_map_names():
    whole = Net(6)
    model = spread(copy.deepcopy(whole), {"scale": 0, "h": "cpu", "out": 1})
    assert working(model) == {f"h.{i}": f"cuda:{i % 2}" for i in range(6)}
    assert same(model(X), whole(X)) and model.hf_device_map == {"scale": 0, "h": "cpu", "out": 1}
    check_at_rest(model)


def test_a_main_device_that_is_named_does_all(tmp_path):
    whole = Net(4)
    model = spread(copy.deepcopy(whole), {"scale": 0, "h": "disk", "out": 1}, main_device=1, offload_dir=tmp_path)
    assert set(working(model).values()) == {"cuda:1"} and same(model(X), whole(X))


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_several_main_devices(offload, tmp_path):
    whole = Net(5)
    if offload == "cpu":
        model = bigkit.cpu_offload(copy.deepcopy(whole), [0, "cuda:1"], stand_in=STAND_IN)
    else:
        model = bigkit.disk_offload(copy.deepcopy(whole), tmp_path, [0, 1], stand_in=STAND_IN)
    for _ in range(3):
        assert same(model(X), whole(X))
    blocks = {name: device for name, device in working(model).items() if name.startswith("h.")}
    assert [*blocks.values()] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]
    with pytest.raises(ValueError, match="GPUs or 'cpu'"):
        spread(Net(), {"": "cpu"}, main_device=[0, "cpu"])


def test_each_gpu_prefetches_its_own_next_block():
    model = spread(Net(8), {"scale": 0, "h": "cpu", "out": 1})
    model(X)
    streamers = {id(handle.streamer): handle.streamer for handle in handles(model)}.values()
    order = []
    for streamer in streamers:
        streamer.listeners.append(lambda event: order.append((event.kind, event.unit, event.device)))
    model(X)
    work = [unit for kind, unit, _ in order if kind == "work"]
    assert work == [f"h.{i}" for i in range(8)]
    at = order.index(("work", "h.4", "cuda:0"))  # on either link the next one is under way, or there
    fetched = [unit for kind, unit, _ in order[:at] if kind == "fetch"]
    assert "h.5" in fetched and "h.6" in fetched


def test_a_plan_brings_its_turns_with_it():
    model = load_pygpt().eval()
    tokens = torch.randint(0, 256, (1, 30))
    sizes = bigkit.compute_module_sizes(model)
    budget = 4 * sizes["transformer.h.0"]
    plan = bigkit.plan(model, {0: budget, 1: budget, "cpu": "1GiB"}, no_split=["Block"], context=30)
    works = {layer.name: layer.works for layer in plan.layers if layer.works is not None}
    assert set(works.values()) == {0, 1} and plan.device_map.works == works
    expected = model(tokens)[0]
    for device_map in (plan, plan.device_map, dict(plan.device_map)):
        parts = bigkit.dispatch_model(copy.deepcopy(model), device_map, stand_in=STAND_IN)
        assert same(parts(tokens)[0], expected)
        assert working(parts) == {name: f"cuda:{device}" for name, device in works.items()}
    for device_map in (plan.device_map, copy.copy(plan.device_map), copy.deepcopy(plan.device_map)):
        assert isinstance(device_map, DeviceMap) and device_map.works == works


class Wave(BaseException):
    """What nobody expects."""


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_map_gives_the_outputs_of_the_whole_model_and_anything_raised_gives_all_back(data):
    depth = data.draw(st.integers(1, 6))
    names = ["scale", *(f"h.{i}" for i in range(depth)), "out"]
    places = {name: data.draw(st.sampled_from([0, 1, 2, "cpu", "cpu"]), name) for name in names}
    main = data.draw(st.sampled_from([None, [0, 1], [2, 0, 1]]), "main")
    whole = Net(depth)
    stand = {0: "cpu", 1: "cpu", 2: "cpu"}
    slots = data.draw(st.integers(1, 3), "slots")
    model = bigkit.dispatch_model(
        copy.deepcopy(whole), places, main, stand_in=stand, slots=slots, force_hooks=True,
        resident_memory=data.draw(st.sampled_from([0, 600, 2000]), "residents"),
    )  # fmt: skip
    broken = data.draw(st.integers(0, depth - 1), "broken")
    forward = type(model.h[broken].b).forward

    def fail(self, x):
        if self is model.h[broken].b:
            raise Wave
        return forward(self, x)

    for _ in range(2):
        assert same(model(X), whole(X))
        check_at_rest(model)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Wave):
            patch.setattr(type(model.h[broken].b), "forward", fail)
            model(X)
        check_at_rest(model)
    bigkit.remove_hook_from_module(model, recurse=True)
    assert not handles(model) and same(model(X), whole(X))


def test_residents_are_on_every_gpu():
    whole = Net(8)
    block = sum(p.nbytes for p in whole.h[0].parameters())
    model = spread(copy.deepcopy(whole), {"scale": 0, "h": "cpu", "out": 1}, resident_memory=4 * block)
    resident = {name: place for name, place in model.hf_device_map.items() if name.startswith("h.")}
    assert [place for place in resident.values() if place != "cpu"] == [0, 1, 0, 1], resident
    assert same(model(X), whole(X))


# ---------------------------------------------------------------------------------------------------------------------
# Four GPUs and eight

SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 20,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
MIXTURE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def decoder(mixture=False):
    torch.manual_seed(0)
    if mixture:
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **MIXTURE))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def shares(count, own=""):
    """A decoder over GPUs, in stretches of blocks; with `own`, these parts of all blocks are in RAM."""
    ends = {"model.embed_tokens": 0, "model.norm": count - 1, "model.rotary_emb": 0, "lm_head": count - 1}
    ends |= {f"model.layers.{i}": i * count // 20 for i in range(20)}
    return ends | ({f"model.layers.{i}.{own}": "cpu" for i in range(20)} if own else {})


def said(model, **options):
    """Logits of a prompt, and those of tokens that are drawn from it, with a cache."""
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    made = model.generate(ids, output_logits=True, return_dict_in_generate=True, **options)
    return [model(ids).logits, made.sequences, *made.logits]


def in_ram(model, count, folder):
    return bigkit.cpu_offload(model, range(count), stand_in=dict.fromkeys(range(count), "cpu"), slots=1)


def on_disk(model, count, folder):
    stand_in = dict.fromkeys(range(count), "cpu")
    return bigkit.disk_offload(model, folder, range(count), stand_in=stand_in, ram_cache=0)


def by_a_plan(model, count, folder):
    sizes = bigkit.compute_module_sizes(model)
    budget = 18 * sizes["model.layers.0"] // count + sizes["lm_head"]
    plan = bigkit.plan(model, {**dict.fromkeys(range(count), budget), "cpu": "1GiB"})
    assert plan.offloaded and all(share.weights and share.reserve for share in plan.shares[:count])
    return bigkit.dispatch_model(model, plan, stand_in=dict.fromkeys(range(count), "cpu"))


def experts(model, count, folder):
    places = shares(count, "mlp.experts")
    return bigkit.dispatch_model(model, places, stand_in=dict.fromkeys(range(count), "cpu"))


def experts_cached(model, count, folder):
    places, cache = shares(count, "mlp.experts"), 12 * bigkit.compute_module_sizes(model)["model.layers.0.mlp.experts"]
    return bigkit.dispatch_model(model, places, stand_in=dict.fromkeys(range(count), "cpu"), expert_cache=cache)


@pytest.mark.parametrize("count", [4, 8])
@pytest.mark.parametrize("way", [in_ram, on_disk, by_a_plan, experts, experts_cached])
def test_many_gpus_say_what_one_does(way, count, tmp_path):
    mixture = way in (experts, experts_cached)
    whole = decoder(mixture)
    expected = said(whole)
    model = way(copy.deepcopy(whole), count, tmp_path)
    assert {*working(model).values()} == {f"cuda:{gpu}" for gpu in range(count)}
    for _ in range(2):
        assert same(said(model), expected)
        check_at_rest(model)
    resting = RestingCache(model.config, layers_on_device=1)
    assert same(said(model, past_key_values=resting)[1:], expected[1:])
    halfway = model.model.layers[11].post_attention_layernorm
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Wave):
        patch.setattr(halfway, "forward", raises)
        said(model)
    check_at_rest(model)
    assert same(said(model), expected)


def raises(*_, **__):
    raise Wave


@pytest.mark.parametrize("count", [4, 8])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_many_gpus_with_few_bits(kind, count):
    pytest.importorskip("bitsandbytes")
    bits = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = bigkit.BnbQuantizationConfig(**bits, torch_dtype=torch.bfloat16)
    expected = said(bigkit.load_and_quantize_model(decoder(), config, device_map={"": "cpu"}))
    stand_in = dict.fromkeys(range(count), "cpu")
    for places in (shares(count), {**shares(count), **{f"model.layers.{i}": "cpu" for i in range(20)}}):
        places |= {"model.rotary_emb": count - 2} if places["model.layers.3"] == "cpu" else {}
        model = bigkit.load_and_quantize_model(decoder(), config, device_map=places, stand_in=stand_in)
        assert same(said(model), expected)
        check_at_rest(model)


@pytest.mark.parametrize("count", [4, 8])
def test_many_gpus_are_loaded(count, tmp_path):
    whole = decoder()
    bigkit.save_model(whole, tmp_path, "50KB")
    stand_in, models = dict.fromkeys(range(count), "cpu"), []
    for places in ({"": "cpu"}, "balanced"):
        with bigkit.init_empty_weights():
            empty = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
        budgets = {**dict.fromkeys(range(count), "600KB"), "cpu": "1GB"}
        models.append(bigkit.load_checkpoint_and_dispatch(empty, tmp_path, places, budgets, stand_in=stand_in).eval())
    assert {*range(count)} <= {*models[1].hf_device_map.values()}
    assert same(*map(said, models))
