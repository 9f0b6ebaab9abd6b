"""Decode steps as graphs, with a tape in the place of a CUDA graph: tokens of `generate` with a static cache, by
replays that run no Python of the model.
"""

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
import transformers as tf
from packaging.version import Version

import bigkit
from bigkit.offload import graphs, host_calls
from bigkit.offload.experts import ExpertStreamer
from bigkit.offload.host_calls import call
from bigkit.offload.lenders import streamers_in
from bigkit.offload.on_cpu import BlockHook
from bigkit.offload.recording import Recording
from bigkit.offload.transfer import PlainLane
from tests import fake_graph

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": 300, "max_position_embeddings": 256,
}  # fmt: skip
GREEDY = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
AROUND = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
STAND_IN = {0: "cpu", 1: "cpu"}


@pytest.fixture(autouse=True)
def tape(monkeypatch):
    monkeypatch.setattr(graphs, "Recording", fake_graph.Recording)


def llama(blocks=5, **options):
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_hidden_layers=blocks, **options)).eval()


def gemma(window):
    torch.manual_seed(0)
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**SIZES, num_hidden_layers=4, sliding_window=window)).eval()


def prompt(sequences=1, tokens=7, seed=1):
    return torch.randint(3, 300, (sequences, tokens), generator=torch.Generator().manual_seed(seed))


def plain(model, tokens, **options):
    return model.generate(tokens, cache_implementation="static", **GREEDY, **options)


def spread(blocks, slots=2, **options):
    places = {**AROUND, "model.layers": "cpu"}
    return bigkit.dispatch_model(llama(blocks), places, slots=slots, stand_in=STAND_IN, **options)


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("make", [llama, lambda: gemma(12), lambda: gemma(4)])
def test_tokens_of_a_static_cache(make, sequences):
    model, tokens = make(), prompt(sequences)
    expected = plain(model, tokens)
    assert torch.equal(expected, model.generate(tokens, **GREEDY))
    with bigkit.graph_decode(model) as decoder:
        assert torch.equal(model.generate(tokens, **GREEDY), expected)
        captured = decoder.captured
        assert torch.equal(model.generate(tokens, **GREEDY), expected)
    assert decoder.captured == captured and decoder.replayed > 20  # the second call records nothing


def test_a_replay_runs_nothing_of_the_model():
    model, calls = llama(), []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with bigkit.graph_decode(model) as decoder:
        model.generate(prompt(), **GREEDY)
    assert len(calls) == decoder.eager + decoder.captured == 3


@pytest.mark.parametrize("slots", [1, 2, 3, 9])
@pytest.mark.parametrize("blocks", [1, 4, 5])
def test_streamed_blocks(blocks, slots):
    model = spread(blocks, slots)
    expected = [plain(model, prompt(seed=seed)) for seed in range(3)]
    with bigkit.graph_decode(model) as decoder:
        got = [model.generate(prompt(seed=seed), **GREEDY) for seed in range(3)]
    assert all(map(torch.equal, got, expected)) and decoder.captured == 1
    assert torch.equal(plain(model, prompt(seed=2)), expected[2])  # eager again, with what replays left in the slots
    streamer = model.model.layers[0]._hf_hook.streamer
    assert not streamer.listeners and not streamer.held() and not any(slot.lent for slot in streamer.slots)


@pytest.mark.parametrize("first_on", [0, 1, "cpu"])
def test_some_blocks_elsewhere(first_on):
    layers = {f"model.layers.{i}": first_on if i < 2 else 1 if i == 2 else "cpu" for i in range(6)}
    model = bigkit.dispatch_model(llama(6), {**AROUND, **layers}, stand_in=STAND_IN)
    expected = plain(model, prompt(2))
    with bigkit.graph_decode(model):
        assert torch.equal(model.generate(prompt(2), **GREEDY), expected)
        assert torch.equal(model.generate(prompt(2), **GREEDY), expected)


def test_all_of_a_model_away():
    model = bigkit.dispatch_model(llama(), {"": "cpu"}, 0, stand_in=STAND_IN)
    expected = plain(model, prompt())
    with bigkit.graph_decode(model) as decoder:
        assert torch.equal(model.generate(prompt(), **GREEDY), expected)
    assert decoder.replayed > 5


def with_mlps_on_the_cpu(blocks=5, slots=3, **options):
    size = sum(parameter.nbytes for parameter in llama().model.layers[0].mlp.parameters())
    return spread(blocks, slots, on_cpu=size * (blocks * 2 // 3), **options)


def computed(model):
    """Blocks whose MLP the CPU computes."""
    return [layer for layer in model.model.layers if type(layer._hf_hook) is BlockHook]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("sequences, slots", [(1, 1), (3, 2), (1, 4)])
def test_mlps_that_the_cpu_computes(sequences, slots, mode, monkeypatch):
    """The host is called for them, and runs no more of the model than these."""
    model, called = with_mlps_on_the_cpu(slots=slots, cpu_threads=1), []
    prompts = [prompt(sequences, seed=seed) for seed in range(3)]
    expected = [plain(model, tokens) for tokens in prompts]
    monkeypatch.setattr(fake_graph, "call", lambda number: called.append(number) or call(number))
    with mode(), bigkit.graph_decode(model) as decoder:
        for tokens, text in zip(prompts, expected):
            assert torch.equal(model.generate(tokens, **GREEDY), text)
    assert len(computed(model)) == 3 and len(set(called)) == 3 * decoder.captured
    assert len(called) == 3 * decoder.replayed
    assert torch.equal(plain(model, prompts[0]), expected[0])
    del decoder
    gc.collect()
    assert not host_calls._functions


def test_mlps_that_the_cpu_computes_and_that_change():
    model = with_mlps_on_the_cpu()
    with bigkit.graph_decode(model) as decoder:
        assert torch.equal(model.generate(prompt(), **GREEDY), plain(model, prompt()))
        for layer in model.model.layers:  # in place: the same memory
            with torch.no_grad():
                layer.mlp.down_proj.weight.mul_(-2)
        expected, captured = plain(model, prompt()), decoder.captured
        assert torch.equal(model.generate(prompt(), **GREEDY), expected)
        for layer in model.model.layers:
            layer.mlp.up_proj.weight = torch.nn.Parameter(torch.randn(64, 32), requires_grad=False)
        other = plain(model, prompt())
        assert torch.equal(model.generate(prompt(), **GREEDY), other) and not torch.equal(other, expected)
        assert decoder.captured > captured


def test_the_cpus_part_fails():
    model, failing, steps = with_mlps_on_the_cpu(), [], []

    def fail(*_):
        if failing:
            raise ValueError("no more")

    def count(ids, scores, **_):
        steps.append(1)
        failing.extend([1] * (len(steps) == 7))
        return torch.zeros(len(ids), dtype=torch.bool)

    computed(model)[1].mlp.act_fn.register_forward_pre_hook(fail)
    expected = plain(model, prompt())
    with bigkit.graph_decode(model) as decoder:
        assert torch.equal(model.generate(prompt(), **GREEDY), expected)
        counted = decoder.replayed
        with pytest.raises(RuntimeError, match="the CPU's part of a decode step failed.*no more"):
            model.generate(prompt(), stopping_criteria=[count], **GREEDY)
        assert len(steps) == 7 and decoder.replayed > counted
        failing.clear()
        assert torch.equal(model.generate(prompt(), **GREEDY), expected)
    assert torch.equal(plain(model, prompt()), expected)


@pytest.mark.parametrize("part", ["mlp", "mlp.up_proj"])
def test_users_hooks_of_what_the_cpu_computes_run_once(part):
    model = with_mlps_on_the_cpu()
    module = computed(model)[1].get_submodule(part)
    module.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    module.register_forward_hook(lambda module, args, output: output * 3)
    more = {"output_logits": True, "return_dict_in_generate": True}
    expected = plain(model, prompt(), **more)
    with bigkit.graph_decode(model) as decoder:
        got = model.generate(prompt(), **GREEDY, **more)
    assert all(map(torch.equal, got.logits, expected.logits)) and decoder.replayed > 5


@pytest.mark.parametrize("part", ["mlp", "mlp.act_fn"])
@pytest.mark.parametrize("wrap", [lambda own: lambda x: own(x) * 2, functools.partial])
def test_a_forward_of_its_own_is_refused(part, wrap):
    model = llama()
    module = model.model.layers[2].get_submodule(part)
    module.forward = wrap(module.forward)
    model = bigkit.dispatch_model(model, {**AROUND, "model.layers": "cpu"}, stand_in=STAND_IN, on_cpu="1GB")
    with bigkit.graph_decode(model), pytest.raises(RuntimeError, match="cannot be recorded.*forward of its own"):
        model.generate(prompt(), **GREEDY)


def test_weights_that_change_between_calls():
    model, whole = spread(5), llama(5)
    with bigkit.graph_decode(model) as decoder, torch.no_grad():
        assert torch.equal(model.generate(prompt(), **GREEDY), plain(whole, prompt()))
        for one in (model, whole):
            for layer in one.model.layers:
                layer.mlp.down_proj.weight.mul_(-1)  # where it rests
        assert torch.equal(model.generate(prompt(), **GREEDY), plain(whole, prompt())) and decoder.captured == 1
        for one in (model, whole):
            one.lm_head.weight = torch.nn.Parameter(one.lm_head.weight.flip(0))  # another tensor
        assert torch.equal(model.generate(prompt(), **GREEDY), plain(whole, prompt())) and decoder.captured == 2


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2},
                                     {"do_sample": True, "top_k": 3}])  # fmt: skip
def test_other_ways_to_choose(options):
    model, options = llama(), {**GREEDY, **options}
    torch.manual_seed(3)
    expected = model.generate(prompt(2), cache_implementation="static", **options)
    with bigkit.graph_decode(model) as decoder:
        for _ in range(2):
            torch.manual_seed(3)
            assert torch.equal(model.generate(prompt(2), **options), expected)
    assert decoder.captured == 1


def test_padded_prompts():
    model, tokens = llama(), prompt(3)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]])
    expected = plain(model, tokens, attention_mask=mask)
    with bigkit.graph_decode(model):
        for _ in range(2):
            assert torch.equal(model.generate(tokens, attention_mask=mask, **GREEDY), expected)


def test_outputs_and_caches_have_memory_of_their_own():
    model, more = llama(), {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}
    expected = [plain(model, prompt(seed=seed), **more) for seed in (1, 2)]
    with bigkit.graph_decode(model):
        got = [model.generate(prompt(seed=seed), **GREEDY, **more) for seed in (1, 2)]
    for one, other in zip(got, expected):
        assert all(map(torch.equal, one.logits, other.logits))
        for step, same in zip(one.hidden_states, other.hidden_states):
            assert all(map(torch.equal, step, same))
        for layer, same in zip(one.past_key_values.layers, other.past_key_values.layers):
            assert torch.equal(layer.keys, same.keys) and torch.equal(layer.values, same.values)


EXCHANGED = {
    "a number": lambda model: setattr(model.model.layers[1].self_attn, "scaling", 0.9),
    "a module": lambda model: setattr(model.model.layers[1].mlp, "act_fn", torch.nn.ReLU()),
    "a forward": lambda model: setattr(model.model.layers[1].mlp, "forward", torch.zeros_like),
    "a hook": lambda model: model.model.layers[1].register_forward_hook(lambda module, args, output: -output),
}


@pytest.mark.parametrize("make, what", [*zip([llama, spread, llama, spread], EXCHANGED)])
def test_what_is_exchanged_between_calls(make, what):
    model, plain_one, more = make(2), llama(2), {"output_logits": True, "return_dict_in_generate": True}
    with bigkit.graph_decode(model) as decoder:
        model.generate(prompt(), **GREEDY)
        EXCHANGED[what](model)
        EXCHANGED[what](plain_one)
        got = [model.generate(prompt(), **GREEDY, **more) for _ in range(2)]
    expected = plain(plain_one, prompt(), **more)
    assert all(all(map(torch.equal, one.logits, expected.logits)) for one in got) and decoder.captured == 2


def test_a_model_dispatched_anew(tmp_path):
    model = spread(3)
    expected = plain(model, prompt())
    with bigkit.graph_decode(model) as decoder:
        for layers in ("cpu", 1, "cpu"):
            bigkit.dispatch_model(model, {**AROUND, "model.layers": layers}, stand_in=STAND_IN, slots=3)
            assert torch.equal(model.generate(prompt(), **GREEDY), expected)
            assert set(decoder._rings.streamers) == set(streamers_in(model))
        bigkit.dispatch_model(model, {**AROUND, "model.layers": "cpu"}, stand_in=STAND_IN, on_cpu="1MB")
        assert torch.equal(model.generate(prompt(), **GREEDY), expected)
        bigkit.dispatch_model(model, {**AROUND, "model.layers": "disk"}, offload_dir=tmp_path, stand_in=STAND_IN)
        with pytest.raises(ValueError, match="rests on disk"):
            model.generate(prompt(), **GREEDY)


def test_within_another_one_it_is_that_one():
    model = spread(2)
    before, expected = dict(vars(model)), plain(model, prompt())
    with bigkit.graph_decode(model) as outer:
        with bigkit.graph_decode(model) as inner:
            assert torch.equal(model.generate(prompt(), **GREEDY), expected)
        assert torch.equal(model.generate(prompt(), **GREEDY), expected)
    assert inner is outer and outer.captured == 1 and vars(model)["forward"] is before["forward"]


@pytest.mark.parametrize("take", [copy.deepcopy, pickle.dumps])
def test_no_copy_within(take):
    model = llama(1)
    with bigkit.graph_decode(model), pytest.raises(TypeError, match="within graph_decode and cannot be copied"):
        take(model)
    take(model)


def test_an_encoder_is_asked_in_the_first_step_of_each_call():
    torch.manual_seed(0)
    sizes = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    config = tf.BartConfig(vocab_size=300, d_model=16, encoder_layers=1, decoder_layers=2, **sizes)
    model = tf.BartForConditionalGeneration(config).eval()
    expected = [plain(model, prompt(seed=seed)) for seed in range(4)]
    if Version(tf.__version__) < Version("5.20"):
        pytest.skip(f"Transformers {tf.__version__} asks the host in each step of a Bart")
    with bigkit.graph_decode(model) as decoder:
        got = [model.generate(prompt(seed=seed), **GREEDY) for seed in range(4)]
    assert all(map(torch.equal, got, expected)) and decoder.captured == 1


def test_a_cache_that_goes_on():
    """A second turn of a talk, with the cache of the first, and another talk in between."""
    model = llama()

    def talk(between):
        cache = tf.StaticCache(config=model.config, max_cache_len=64)
        first = model.generate(prompt(), past_key_values=cache, **GREEDY)
        between()
        return model.generate(torch.cat([first, prompt(1, 3, seed=5)], 1), past_key_values=cache, **GREEDY)

    expected = talk(lambda: None)
    with bigkit.graph_decode(model) as decoder:
        other = tf.StaticCache(config=model.config, max_cache_len=64)
        assert torch.equal(talk(lambda: model.generate(prompt(seed=9), past_key_values=other, **GREEDY)), expected)
    assert decoder.captured == 1


def test_the_second_prompt_takes_no_memory_of_its_own():
    model, homes = llama(), []
    with bigkit.graph_decode(model) as decoder:
        for _ in range(2):
            out = model.generate(prompt(), return_dict_in_generate=True, **GREEDY)
            homes.append({layer.keys.data_ptr() for layer in out.past_key_values.layers})
            del out
            gc.collect()
        assert homes[0] == homes[1] == {own.data_ptr() for own in decoder._homes[0]._tensors} & homes[0]


def test_all_is_as_before_afterwards():
    model = spread(4)
    plain(model, prompt())
    before = dict(vars(model))
    with bigkit.graph_decode(model) as decoder:
        model.generate(prompt(), **GREEDY)
        home = weakref.ref(decoder._homes[0])
    assert dict(vars(model)).keys() == before.keys() and model.forward == before["forward"]
    del decoder
    gc.collect()
    assert home() is None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_a_step_is_recorded_gives_everything_back(error):
    model = spread(4)
    expected, calls = plain(model, prompt()), []

    def fail(*_):
        calls.append(1)
        if len(calls) == 4:  # the prompt, two steps as ever, the recording
            raise error("in the middle")

    handle = model.model.layers[2].mlp.register_forward_hook(fail)
    raised = RuntimeError if error is ValueError else error
    with bigkit.graph_decode(model):
        with pytest.raises(raised, match="in the middle"):
            model.generate(prompt(), **GREEDY)
        streamer = model.model.layers[0]._hf_hook.streamer
        assert not streamer.listeners and not streamer.held() and not any(slot.lent for slot in streamer.slots)
        handle.remove()
        assert torch.equal(model.generate(prompt(), **GREEDY), expected)
    assert torch.equal(plain(model, prompt()), expected)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_at_any_copy_gives_everything_back(error, monkeypatch):
    model, calls, fill = spread(5, slots=3), [], PlainLane.fill
    expected, at = plain(model, prompt()), 0

    def fail(self, slot, unit):
        calls.append(1)
        if len(calls) == at:
            raise error("in the middle")
        fill(self, slot, unit)

    monkeypatch.setattr(PlainLane, "fill", fail)
    with bigkit.graph_decode(model):
        for at in range(1, 40, 3):  # in prompts, steps as ever, recordings, and between replays
            calls.clear()
            try:
                model.generate(prompt(), **GREEDY)
                model.generate(prompt(seed=2), **GREEDY)
            except (OSError, RuntimeError, KeyboardInterrupt) as caught:
                assert "in the middle" in str(caught)
            calls.extend([1] * 1000)
            assert torch.equal(model.generate(prompt(), **GREEDY), expected), at


def test_a_step_that_waits_says_so():
    model = llama()
    model.model.layers[1].register_forward_hook(lambda module, args, output: None if output.max().item() > 0 else None)
    with bigkit.graph_decode(model), pytest.raises(RuntimeError, match="cannot be recorded as a CUDA graph .operation"):
        model.generate(prompt(), **GREEDY)
    model.generate(prompt(), **GREEDY)


def test_who_watches_sees_every_step():
    model, seen = spread(4), []
    streamer = model.model.layers[0]._hf_hook.streamer
    with bigkit.graph_decode(model) as decoder:
        model.generate(prompt(), **GREEDY)
        streamer.listeners.append(seen.append)
        model.generate(prompt(), **GREEDY)
    assert sum(event.kind == "work" for event in seen) == 4 * GREEDY["max_new_tokens"]
    assert decoder.eager > GREEDY["max_new_tokens"]


def test_what_is_refused(tmp_path):
    with (
        pytest.raises(ValueError, match="'model.layers' rests on disk"),
        bigkit.graph_decode(
            bigkit.dispatch_model(llama(), {**AROUND, "model.layers": "disk"}, offload_dir=tmp_path, stand_in=STAND_IN)
        ),
    ):
        pass
    with pytest.raises(ValueError, match="works on cpu, and only GPUs of CUDA"):
        Recording.refuse([torch.device("cuda", 0), torch.device("cpu")])
    with pytest.raises(ValueError, match="needs a model of Transformers"), bigkit.graph_decode(torch.nn.Linear(2, 2)):
        pass
    with pytest.raises(ValueError, match="training mode"), bigkit.graph_decode(llama().train()):
        pass
    model = llama()
    with bigkit.graph_decode(model):
        with pytest.raises(ValueError, match="prompt_lookup_num_tokens makes longer ones"):
            model.generate(prompt(), prompt_lookup_num_tokens=3, **GREEDY)
        with pytest.raises(ValueError, match="a DynamicCache has none"):
            model.generate(prompt(), past_key_values=tf.DynamicCache(config=model.config), **GREEDY)


def test_int8_with_outliers_is_refused():
    pytest.importorskip("bitsandbytes")
    config = bigkit.BnbQuantizationConfig(load_in_8bit=True, torch_dtype=torch.bfloat16)
    model = bigkit.load_and_quantize_model(llama(2), config, device_map={"": "cpu"})
    with pytest.raises(ValueError, match="looks for outliers on the host"), bigkit.graph_decode(model):
        pass


def mixture():
    torch.manual_seed(0)
    sizes = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_hidden_layers": 3}
    model = tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**sizes)).eval()
    layers = {f"model.layers.{i}.{name}": "cpu" if name == "mlp.experts" else 0 for i in range(3) for name in
              ("self_attn", "mlp.gate", "mlp.experts", "input_layernorm", "post_attention_layernorm")}  # fmt: skip
    return model, {**AROUND, **layers}


def test_experts_that_the_host_chooses_are_refused():
    model, places = mixture()
    size = sum(p.nbytes for p in model.model.layers[0].mlp.experts.parameters())
    cached = bigkit.dispatch_model(model, places, stand_in=STAND_IN, expert_cache=3 * size)
    with pytest.raises(ValueError, match="with expert_cache the host looks here"), bigkit.graph_decode(cached):
        pass
    model, places = mixture()
    model = bigkit.dispatch_model(model, places, stand_in=STAND_IN)
    assert isinstance(model.model.layers[0].mlp.experts._hf_hook.streamer, ExpertStreamer)
    with bigkit.graph_decode(model), pytest.raises(ValueError, match="for 2 sequences the host looks which are chosen"):
        model.generate(prompt(2), **GREEDY)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_adapters():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(llama(), config).eval()
    expected = model.generate(input_ids=prompt(), cache_implementation="static", **GREEDY)
    with bigkit.graph_decode(model) as decoder:
        assert torch.equal(model.generate(input_ids=prompt(), **GREEDY), expected)
    assert decoder.replayed > 5


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_adapters_that_are_switched():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(llama(1), config)
    model.add_adapter("other", config)

    def answers(**options):
        for adapter in ("default", "other", "default"):
            model.eval().set_adapter(adapter)
            yield model.generate(input_ids=prompt(), output_logits=True, return_dict_in_generate=True, **options)
        with model.disable_adapter():
            yield model.generate(input_ids=prompt(), output_logits=True, return_dict_in_generate=True, **options)

    expected = [*answers(cache_implementation="static", **GREEDY)]
    with bigkit.graph_decode(model):
        for one, other in zip(answers(**GREEDY), expected):
            assert all(map(torch.equal, one.logits, other.logits))
