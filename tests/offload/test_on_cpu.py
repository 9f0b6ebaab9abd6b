"""MLPs that the CPU computes where they rest, for few tokens: who works where, the same outputs, all given back."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import bigkit
from bigkit.maps.on_cpu import FEW, mlps_of
from bigkit.offload.on_cpu import BlockHook, MlpHook
from bigkit.zoo.gpt import encode, heldout_text, load_pygpt
from tests.spread import STAND_IN, Net, check_at_rest, handles, same, spread

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4}
MLP = 2 * (2 * 4 * 256 * 256 + 4 * 256 + 256)  # bytes of pygpt's


@pytest.fixture(scope="module")
def whole():
    return load_pygpt().eval().requires_grad_(False)


def told(model):
    """What streamers say from now on, as (device, kind, unit)."""
    found = {id(hook.streamer): hook.streamer for module in model.modules() for hook in _hooks(module) if hook.streamer}
    events = []
    for streamer in found.values():
        streamer.listeners.append(lambda event: events.append((event.device, event.kind, event.unit)))
    return events


def _hooks(module):
    from bigkit.offload.hooks import AlignDevicesHook, hooks_in

    return [hook for hook in hooks_in(module) if isinstance(hook, AlignDevicesHook)]


@pytest.mark.parametrize("main", [0, [0, 1]])
def test_few_tokens_are_computed_where_the_weights_rest_and_many_are_streamed(whole, main):
    model = spread(copy.deepcopy(whole), {"": "cpu"}, main_device=main, on_cpu=4 * MLP)
    events = told(model)
    for count in (1, FEW, FEW + 1, 1):
        tokens = torch.randint(0, 256, (1, count))
        events.clear()
        assert same(model(tokens), whole(tokens))
        check_at_rest(model)
        on_cpu = [unit for device, kind, unit in events if device == "cpu" and kind == "work"]
        chosen = [f"transformer.h.{i}.mlp" for i in ((0, 2, 5, 7) if main == 0 else (0, 1, 4, 5))]
        assert on_cpu == (chosen if count <= FEW else []), count


@pytest.mark.parametrize("slots", [2, 3])
def test_a_token_after_a_prompt_brings_what_it_needs(whole, slots):
    """What followed what in the prompt is no guess for a token: other units come, in another order."""
    model = spread(copy.deepcopy(whole), {"": "cpu"}, main_device=0, on_cpu=4 * MLP, slots=slots)
    hooks = [hook for module in model.modules() for hook in _hooks(module) if isinstance(hook, BlockHook)]
    streamer, brought = hooks[0].streamer, []
    streamer.lane.fill = lambda slot, unit, own=streamer.lane.fill: (brought.append(unit.index), own(slot, unit))
    every = {unit.index for unit in streamer.units}
    needed = {True: every - {hook.unit.index for hook in hooks}, False: every - {hook.few.unit.index for hook in hooks}}
    for count in (FEW + 1, 1, FEW + 1, 1, 1, FEW + 1):
        brought.clear()
        model(torch.randint(0, 256, (1, count)))
        own = needed[count <= FEW]
        assert sum(i not in own for i in brought) < slots  # fetched ahead at the end, before anyone knew what comes
        assert len(own) - slots <= sum(i in own for i in brought) <= len(own) + slots


class Wave(BaseException):
    """What nobody expects."""


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_anything_that_is_raised_gives_all_back(whole, data):
    main = data.draw(st.sampled_from([0, [0, 1]]), "main")
    slots, count = data.draw(st.integers(1, 4), "slots"), data.draw(st.integers(1, 10), "MLPs")
    model = spread(copy.deepcopy(whole), {"": "cpu"}, main_device=main, on_cpu=count * MLP, slots=slots, cpu_threads=1)
    threads = torch.get_num_threads()
    for size in data.draw(st.lists(st.sampled_from([1, FEW, FEW + 9]), min_size=1, max_size=3), "tokens"):
        tokens = torch.randint(0, 256, (1, size))
        block = model.transformer.h[data.draw(st.integers(0, 9), "block")]
        part = data.draw(st.sampled_from([block.mlp.act, block.mlp.c_proj, block.attn.c_proj, block.ln_2]), "part")
        hook = part.register_forward_pre_hook(_raise)
        with pytest.raises(Wave):
            model(tokens)
        hook.remove()
        check_at_rest(model)
        assert torch.get_num_threads() == threads
        assert same(model(tokens)[0], whole(tokens)[0])
    bigkit.remove_hook_from_module(model, recurse=True)
    assert not handles(model) and same(model(tokens)[0], whole(tokens)[0])


def _raise(*_):
    raise Wave


def test_what_is_changed_between_two_forwards_is_computed_with(whole):
    model, own = spread(copy.deepcopy(whole), {"": "cpu"}, main_device=0, on_cpu="1GB"), copy.deepcopy(whole)
    few, many = torch.randint(0, 256, (1, 3)), torch.randint(0, 256, (1, 30))
    assert same(model(few)[0], own(few)[0])
    for net in (model, own):
        with torch.no_grad():
            net.transformer.h[2].mlp.c_fc.weight.mul_(0.5)  # in place
        other = torch.full_like(whole.transformer.h[4].mlp.c_proj.bias, 0.25)
        net.transformer.h[4].mlp.c_proj.bias = torch.nn.Parameter(other, requires_grad=False)
    for tokens in (few, many, few):
        assert same(model(tokens)[0], own(tokens)[0])
    adapter = torch.nn.Linear(256, 1024, bias=True).to(torch.bfloat16).requires_grad_(False)
    for net in (model, own):  # modules that are put into an MLP work on the GPU, with all of the block
        net.transformer.h[6].mlp.c_fc = torch.nn.Sequential(net.transformer.h[6].mlp.c_fc, torch.nn.Identity())
        net.transformer.h[8].mlp.c_fc = copy.deepcopy(adapter)
    for tokens in (few, many, few):
        assert same(model(tokens)[0], own(tokens)[0])
    assert model.state_dict().keys() == own.state_dict().keys()
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in model.state_dict().items())


def test_greedy_text_of_what_was_held_out(whole):
    """What the GPU does, the CPU does here, too: the two paths, and the cache between them, give one text."""
    model = spread(copy.deepcopy(whole), {"": "cpu"}, main_device=[0, 1], on_cpu="6MB")
    tokens = torch.tensor([encode(heldout_text()[:40])])
    with torch.no_grad():
        assert same(model.generate(tokens, 12), whole.generate(tokens, 12))


def test_a_model_without_such_parts_is_refused_and_left_as_it_was(whole):
    net = Net()
    with pytest.raises(ValueError, match="on_cpu: no block has an MLP"):
        spread(net, {"": "cpu"}, main_device=0, on_cpu=10**6)
    assert not handles(net)
    half = copy.deepcopy(whole).half()
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        bigkit.cpu_offload(half, 0, stand_in=STAND_IN, on_cpu="1GB")


def test_experts_are_refused_with_the_reason():
    config = tf.MixtralConfig(**SIZES, vocab_size=100, num_local_experts=4, num_key_value_heads=2)
    with pytest.raises(ValueError, match="experts are not computed there, since only their router's choice says which"):
        spread(tf.MixtralForCausalLM(config).eval(), {"": "cpu"}, main_device=0, on_cpu="1GB")


KINDS = [(tf.LlamaForCausalLM, tf.LlamaConfig), (tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig)]


@pytest.mark.parametrize("cls, config", KINDS)
def test_a_plan_and_a_model_agree_on_what_an_mlp_is(cls, config):
    model = cls(config(**SIZES, vocab_size=100)).eval().requires_grad_(False)
    plan = bigkit.plan(model, {0: "1GB", "cpu": "1GB"}, strategy=dict.fromkeys([""], "cpu"))
    layers = [replace(layer, device="cpu", works=0) for layer in plan.layers]
    told = mlps_of(bigkit.describe(model), replace(plan, layers=tuple(layers)))
    spread(model, {"": "cpu"}, main_device=0, on_cpu="1GB")
    hooks = {name: _hooks(module) for name, module in model.named_modules()}
    units = [hook.unit for own in hooks.values() for hook in own if isinstance(hook, MlpHook)]
    assert {unit.name.rpartition(".")[0]: sum(part.nbytes for part in unit.parts()) for unit in units} == told
    assert len(units) == 5


def test_a_hook_that_is_taken_away_and_put_back_lends_again():
    """Of a block, for many tokens and for few, which have streamers of their own."""
    torch.manual_seed(0)
    own = {**SIZES, "vocab_size": 32, "num_hidden_layers": 2}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**own)).eval().requires_grad_(False)
    places = {"": 0, "model.layers.0": "cpu", "model.layers.1": "cpu"}
    parts = bigkit.dispatch_model(copy.deepcopy(model), places, stand_in=STAND_IN, on_cpu="1MB")
    block, ids = parts.model.layers[0], torch.tensor([[1, 2, 3] * FEW])
    hook = block._hf_hook
    assert isinstance(hook, BlockHook)
    for _ in range(2):
        bigkit.remove_hook_from_module(block)
        torch.testing.assert_close(parts(ids[:, :1]).logits, model(ids[:, :1]).logits)
        bigkit.add_hook_to_module(block, hook)
        for tokens in (1, ids.shape[1], 1):
            torch.testing.assert_close(parts(ids[:, :tokens]).logits, model(ids[:, :tokens]).logits)
