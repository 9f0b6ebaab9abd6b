"""Decode steps as CUDA graphs, a cache that rests in pinned RAM, and drafts: tokens and logits of the plain ways."""

import gc
import random

import pytest
import torch
import transformers as tf

import bigkit
from bigkit.checkpoints import ring
from bigkit.offload import resting_cache
from bigkit.offload.resting_cache import RestingCache

SIZES = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4,
         "head_dim": 64, "vocab_size": 1000, "max_position_embeddings": 4096, "tie_word_embeddings": False}  # fmt: skip
GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
AROUND = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
LLAMA, GEMMA, QWEN = (
    (tf.LlamaForCausalLM, tf.LlamaConfig), (tf.Gemma2ForCausalLM, tf.Gemma2Config),
    (tf.Qwen3MoeForCausalLM, tf.Qwen3MoeConfig),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _attention_repeats_itself():
    """cuDNN's attention, which PyTorch prefers on Hopper, gives other bits from call to call for one query."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


def build(kind=LLAMA, blocks=5, dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    with torch.device("cuda:0"):
        model = kind[0]._from_config(kind[1](**SIZES, num_hidden_layers=blocks, **options), dtype=dtype)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.06)
    return model.eval().requires_grad_(False)


def prompt(sequences=1, tokens=16, seed=1):
    return torch.randint(3, 1000, (sequences, tokens), generator=torch.Generator().manual_seed(seed)).cuda()


def plain(model, tokens, **options):
    return model.generate(tokens, cache_implementation="static", disable_compile=True, **GREEDY, **options)


def same_by_graphs(model, sequences=1):
    """Three calls by graphs, and one as ever afterwards, give the tokens of a static cache."""
    prompts = [prompt(sequences, seed=seed) for seed in range(3)]
    expected = [plain(model, tokens) for tokens in prompts]
    with bigkit.graph_decode(model) as decoder:
        got = [model.generate(tokens, **GREEDY) for tokens in prompts]
    assert all(map(torch.equal, got, expected))
    assert len({*expected[0][0, 16:].tolist()}) > 1  # not one token again and again
    assert decoder.captured <= 2 and decoder.replayed > 50
    assert torch.equal(plain(model, prompts[2]), expected[2])
    return decoder


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize(
    "kind, options", [(LLAMA, {}), (GEMMA, {"sliding_window": 24}), (GEMMA, {"sliding_window": 8})]
)
def test_all_on_the_gpu(kind, options, sequences):
    assert same_by_graphs(build(kind, **options), sequences).captured == (2 if options == {"sliding_window": 24} else 1)


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("blocks", [4, 5])
def test_streamed_blocks(blocks, slots):
    model = bigkit.dispatch_model(build(blocks=blocks), {**AROUND, "model.layers": "cpu"}, 0, slots=slots)
    same_by_graphs(model)
    streamer = model.model.layers[0]._hf_hook.streamer
    assert not streamer.held() and not any(slot.lent for slot in streamer.slots)


def test_half_of_the_blocks_and_all_of_a_model_in_ram():
    half = {f"model.layers.{i}": 0 if i % 2 else "cpu" for i in range(5)}
    same_by_graphs(bigkit.dispatch_model(build(), {**AROUND, **half}, 0), 2)
    same_by_graphs(bigkit.dispatch_model(build(), {"": "cpu"}, 0))


@pytest.mark.parametrize("sequences, mode", [(1, torch.inference_mode), (3, torch.no_grad)])
def test_mlps_that_the_cpu_computes(sequences, mode):
    mlps_that_the_cpu_computes(0, sequences, mode)


@pytest.mark.parametrize("sequences, mode", [(1, torch.inference_mode), (3, torch.no_grad)])
def test_mlps_that_the_cpu_computes_beside_several_links(gpus, sequences, mode):
    mlps_that_the_cpu_computes(range(gpus), sequences, mode)


def mlps_that_the_cpu_computes(main, sequences, mode):
    """A graph calls the host for them: the tokens, and logits, of a step in Python."""
    blocks = 5 if main == 0 else 2 * len(main) + 1
    mlps = 3 * sum(parameter.nbytes for parameter in build(blocks=1).model.layers[0].mlp.parameters())
    model = bigkit.cpu_offload(build(blocks=blocks).cpu(), main, on_cpu=mlps, slots=3)
    more = {"output_logits": True, "return_dict_in_generate": True}
    expected = [plain(model, prompt(sequences, seed=seed), **more) for seed in range(3)]
    with mode(), bigkit.graph_decode(model) as decoder:
        for seed in range(3):
            got = model.generate(prompt(sequences, seed=seed), **GREEDY, **more)
            assert torch.equal(got.sequences, expected[seed].sequences)
            assert all(map(torch.equal, got.logits, expected[seed].logits))
    assert decoder.captured == 1 and decoder.replayed > 50
    assert torch.equal(plain(model, prompt(sequences)), expected[1].sequences)


@pytest.mark.parametrize("first", [0, "cpu"])
def test_several_gpus(first, gpus):
    blocks = 4 + gpus
    layers = {f"model.layers.{i}": first if i < 2 else i % gpus for i in range(blocks)}
    ends = {"model.norm": gpus - 1, "lm_head": gpus - 1}
    model = bigkit.dispatch_model(build(blocks=blocks), {**AROUND, **layers, **ends}, 0)
    same_by_graphs(model, 2)


@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "int8"])
def test_few_bits(kind, away):
    pytest.importorskip("bitsandbytes")
    bits = {"load_in_8bit": True, "llm_int8_threshold": 0.0} if kind == "int8" else {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16,
        "bnb_4bit_use_double_quant": kind == "nf4-double",
    }  # fmt: skip
    config = bigkit.BnbQuantizationConfig(**bits, torch_dtype=torch.bfloat16)
    places = {**AROUND, "model.layers": "cpu"} if away else {"": 0}
    model = build().cpu() if away else build()
    same_by_graphs(bigkit.load_and_quantize_model(model, config, device_map=places, main_device=0))


def test_experts():
    options = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
    same_by_graphs(build(QWEN, **options), 3)
    places = {"": 0, **{f"model.layers.{i}.mlp.experts": "cpu" for i in range(5)}}
    model = bigkit.dispatch_model(build(QWEN, **options), places, 0)
    same_by_graphs(model)
    with bigkit.graph_decode(model), pytest.raises(ValueError, match="for 2 sequences the host looks"):
        model.generate(prompt(2), **GREEDY)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("away", [False, True])
def test_an_error_while_a_step_is_recorded(away, error):
    model = build()
    if away:
        model = bigkit.dispatch_model(model, {**AROUND, "model.layers": "cpu"}, 0)
    expected, calls = plain(model, prompt()), []

    def fail(*_):
        calls.append(1)
        if torch.cuda.is_current_stream_capturing():
            raise error("in the middle")

    handle = model.model.layers[2].mlp.register_forward_hook(fail)
    with bigkit.graph_decode(model):
        with pytest.raises(RuntimeError if error is ValueError else error, match="in the middle"):
            model.generate(prompt(), **GREEDY)
        handle.remove()
        assert torch.equal(model.generate(prompt(), **GREEDY), expected)
    assert torch.equal(plain(model, prompt()), expected)
    assert torch.randn(4, device="cuda:0").isfinite().all()  # random numbers are drawn again


def test_a_step_that_waits_for_the_gpu_says_so():
    model = build()
    handle = model.model.layers[1].register_forward_hook(lambda module, args, output: print(output.sum().item()))
    with bigkit.graph_decode(model), pytest.raises(RuntimeError, match="cannot be recorded as a CUDA graph"):
        model.generate(prompt(), **GREEDY)
    handle.remove()
    same_by_graphs(model)


def test_graphs_give_their_memory_back():
    model = build()
    plain(model, prompt())
    gc.collect()
    before = torch.cuda.memory_allocated()
    with bigkit.graph_decode(model):
        model.generate(prompt(), **GREEDY)
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 64e6  # a workspace of cuBLAS may stay


@pytest.mark.parametrize("rows", [3, 256])
@pytest.mark.parametrize("sequences, tokens", [(1, 5), (2, 700), (1, 3000)])
@pytest.mark.parametrize("kind, options", [(LLAMA, {}), (GEMMA, {"sliding_window": 24})])
def test_bits_of_a_dynamic_cache(kind, options, sequences, tokens, rows, monkeypatch):
    monkeypatch.setattr(resting_cache, "ROWS", rows)
    model, more = build(kind, **options), {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(prompt(sequences, tokens), **more)
    before = ring.pinned_bytes()
    for stay, room in ((0, None), (1, 0), (0, "100MB")):
        cache = RestingCache(model.config, layers_on_device=stay, room=room)
        got = model.generate(prompt(sequences, tokens), past_key_values=cache, **more)
        assert torch.equal(got.sequences, expected.sequences)
        assert all(map(torch.equal, got.logits, expected.logits))
        for layer, other in zip(cache.layers, expected.past_key_values.layers):
            assert torch.equal(layer.keys.cpu(), other.keys.cpu()) and torch.equal(
                layer.values.cpu(), other.values.cpu()
            )
        assert ring.pinned_bytes() - before == cache.resting_bytes() > 0
        del cache, got, layer
        gc.collect()
    assert ring.pinned_bytes() == before


@pytest.mark.parametrize("busy", [False, True])
def test_no_copy_overtakes_attention(busy):
    """Rows of many layers, on a GPU that is behind its host."""
    config = tf.LlamaConfig(**SIZES, num_hidden_layers=6)
    cache, whole = RestingCache(config), tf.DynamicCache(config=config)
    noise, sums = torch.randn(2048, 2048, device="cuda:0"), []
    for step in range(30):
        for i in range(6):
            new = torch.randn(2, 1, 4, 2045 if step == 0 else 1, 64, device="cuda:0", dtype=torch.bfloat16)
            both = [one.update(new[0], new[1], i) for one in (cache, whole)]
            if busy:
                for _ in range(20):
                    noise = noise @ noise * 1e-3
            sums.append(torch.stack([(a != b).sum() for a, b in zip(*both)]).sum())
            del both
    assert int(torch.stack(sums).sum()) == 0


def late_copies(patch, seed):
    """Each copy of a resting cache begins or ends late by chance, and so does what is computed before it is asked."""
    choice = random.Random(seed)

    def sleep():
        torch.cuda._sleep(choice.choice([0, 0, 10**5, 10**6]))  # cycles on the current stream: up to half a millisecond

    for owner, name in (
        (resting_cache._Windows, "_copy"), (resting_cache._Rows, "write"), (resting_cache.RestingLayer, "update")
    ):  # fmt: skip

        def late(*args, own=getattr(owner, name), **kwargs):
            sleep()
            result = own(*args, **kwargs)
            sleep()
            return result

        patch.setattr(owner, name, late)


def rows_that_differ(seed, layers=5):
    """Elements in which attentions were given other rows than of a `DynamicCache`: chunks, tokens, crops, prompts."""
    choice, config = random.Random(seed), tf.LlamaConfig(**SIZES, num_hidden_layers=layers)
    cache, whole = RestingCache(config, room=choice.choice([0, "4MB", "100MB"])), tf.DynamicCache(config=config)
    kinds, counts = ["prompt", *choice.choices(["token", "token", "token", "chunk", "crop", "prompt"], k=16)], []
    for kind in kinds:
        if kind == "prompt":
            cache.reset()
            whole = tf.DynamicCache(config=config)
        elif kind == "crop" and whole.get_seq_length() > 3:
            for own in (cache, whole):
                own.crop(-3)
        rows = {"prompt": choice.choice([5, 700, 2045]), "chunk": choice.choice([4, 300])}.get(kind, 1)
        for i in range(layers):
            new = torch.randn(2, 1, 4, rows, 64, device="cuda:0", dtype=torch.bfloat16)
            given, expected = (own.update(*new, i) for own in (cache, whole))
            counts.append(torch.stack([(a != b).sum() for a, b in zip(given, expected)]).sum())
    held = [(layer.keys.cpu(), own.keys.cpu()) for layer, own in zip(cache.layers, whole.layers)]
    return int(torch.stack(counts).sum()) + sum(int((a != b).sum()) for a, b in held)


def test_late_copies_change_nothing():
    with pytest.MonkeyPatch.context() as patch:
        late_copies(patch, 0)
        assert [rows_that_differ(seed) for seed in range(24)] == [0] * 24


@pytest.mark.parametrize("careless", ["computes", "brings", "takes away"])
def test_a_stream_that_does_not_wait_would_show(careless):
    """The same, where one of the three streams waits for nothing: so the test above can fail."""
    wait, streams, ours = torch.cuda.Stream.wait_event, [], resting_cache._Windows.__init__

    def begin(self, *args):
        ours(self, *args)
        streams[:] = [torch.cuda.current_stream(), *self.streams]

    def wait_event(self, event):
        if not streams or self != streams[["computes", "brings", "takes away"].index(careless)]:
            wait(self, event)

    with pytest.MonkeyPatch.context() as patch:
        late_copies(patch, 0)
        patch.setattr(resting_cache._Windows, "__init__", begin)
        patch.setattr(torch.cuda.Stream, "wait_event", wait_event)
        assert any(rows_that_differ(seed) for seed in range(12))
        torch.cuda.synchronize()


@pytest.mark.parametrize("backend", ["MATH", "FLASH_ATTENTION"])
def test_late_copies_give_the_logits_of_a_dynamic_cache(backend):
    model, more = build(blocks=6), {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    more["max_new_tokens"] = 10
    with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
        for tokens in (prompt(1, 3000), prompt(1, 300, seed=2)):
            expected = model.generate(tokens, **more).logits
            assert all(map(torch.equal, model.generate(tokens, **more).logits, expected))
            for seed, room in enumerate((0, "3MB", None)):
                with pytest.MonkeyPatch.context() as patch:
                    late_copies(patch, seed)
                    cache = RestingCache(model.config, room=room)
                    for _ in range(2):
                        got = model.generate(tokens, past_key_values=cache, **more).logits
                        cache.reset()
                        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 5}, {"assistant_model": None}])
def test_several_tokens_a_pass_of_a_model_in_ram(options):
    # In bfloat16 a pass over several tokens rounds otherwise than one over one, and texts part at a near tie.
    model = bigkit.dispatch_model(build(dtype=torch.float32), {**AROUND, "model.layers": "cpu"}, 0)
    expected = model.generate(prompt(), **GREEDY)
    options = {"assistant_model": build(dtype=torch.float32)} if "assistant_model" in options else options
    assert torch.equal(model.generate(prompt(), **GREEDY, **options), expected)
    cache = RestingCache(model.config)
    assert torch.equal(model.generate(prompt(), past_key_values=cache, **GREEDY, **options), expected)


@torch.no_grad()
def test_layers_that_stay_take_no_more_than_the_prompt_did():
    model, tokens = build(blocks=8), prompt(8, 4000)
    gc.collect()
    torch.cuda.empty_cache()
    cache = RestingCache(model.config)
    last = model(tokens, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_reserved()
    for _ in range(4):
        last = model(last, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    torch.cuda.synchronize()
    assert cache.layers_that_stay() > 0
    assert torch.cuda.memory_reserved() <= reserved + 40e6  # a layer, and what is rounded up


@pytest.mark.parametrize("room", [None, "40MB"])
def test_a_cache_that_rests_where_memory_is_tight(room):
    """The GPU has room for what a prompt needs and hardly more, and less than the cache."""
    model, tokens, total = build(blocks=24), prompt(4, 3000), torch.cuda.get_device_properties(0).total_memory
    expected = model.generate(tokens, **GREEDY)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    assert torch.equal(model.generate(tokens, past_key_values=RestingCache(model.config, room=0), **GREEDY), expected)
    most = torch.cuda.max_memory_reserved() + 40e6  # a layer, and what is rounded up
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(most / total)
    try:
        for _ in range(2):
            cache = RestingCache(model.config, room=room)
            assert torch.equal(model.generate(tokens, past_key_values=cache, **GREEDY), expected)
            assert torch.cuda.memory_reserved() <= most
            assert 0 < cache.layers_that_stay() < 24
            del cache
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@torch.no_grad()
def test_two_caches_that_rest_at_once():
    """Two texts of one model by turns, one of which gets a second prompt meanwhile: each has its own rows."""
    model = build(blocks=6)
    before, texts = ring.pinned_bytes(), [prompt(1, 900, seed=2), prompt(2, 500, seed=3)]
    caches = [
        [make(), make()] for make in (lambda: RestingCache(model.config), lambda: tf.DynamicCache(config=model.config))
    ]
    last = [[*texts], [*texts]]
    for step in range(16):
        for i in (0, 1) if step % 3 else (1, 0):
            logits = []
            for own, tokens in zip(caches, last):
                more = prompt(2, 300, seed=9) if step == 7 and i else tokens[i]
                logits.append(model(more, past_key_values=own[i], logits_to_keep=1).logits)
                tokens[i] = logits[-1].argmax(-1)
            assert torch.equal(*logits), (step, i)
    assert ring.pinned_bytes() - before == sum(cache.resting_bytes() for cache in caches[0]) > 0
    del caches, own
    gc.collect()
    assert ring.pinned_bytes() == before


MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}


def experts_of(model):
    return [layer.mlp.experts for layer in model.model.layers]


@pytest.mark.parametrize("cache", [0, "10MB"])
@pytest.mark.parametrize("away", [False, True])
def test_experts_that_are_replaced_between_two_calls(away, cache):
    """Another parameter, other data of the same one, a write: the next call of `generate` has the new tokens."""
    plain, model = build(QWEN, **MIXTURE), build(QWEN, **MIXTURE)
    if away:
        places = {"": 0, **{f"model.layers.{i}.mlp.experts": "cpu" for i in range(5)}}
        model = bigkit.dispatch_model(model, places, 0, expert_cache=cache)
    static, seen = {"cache_implementation": "static", "disable_compile": True}, set()
    with bigkit.graph_decode(model) as decoder:
        for change in (None, "parameter", "data", "write", "parameter", None):
            for one in (plain, model):
                torch.manual_seed(len(seen))
                for own in experts_of(one)[1:4]:
                    new = torch.randn(own.down_proj.shape, device="cuda:0").mul(0.06).to(torch.bfloat16)
                    if change == "parameter":
                        own.down_proj = torch.nn.Parameter(new, requires_grad=False)
                    elif change == "data":
                        own.down_proj.data = new
                    elif change == "write":
                        with torch.no_grad():
                            own.down_proj.copy_(new)
            expected = plain.generate(prompt(), **GREEDY, **static)
            for _ in range(2):
                assert torch.equal(model.generate(prompt(), **GREEDY), expected), change
            seen.add(tuple(expected[0].tolist()))
    assert len(seen) == 5 and decoder.replayed > 100


@pytest.mark.parametrize("away", [False, True])
def test_a_stack_that_is_decoded_ahead(away):
    """In a graph, and after an error between a block's two products, while a step runs and while it is recorded."""
    pytest.importorskip("bitsandbytes")
    model = build(QWEN, **MIXTURE)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    config = bigkit.BnbQuantizationConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", torch_dtype=torch.bfloat16, skip_modules=linear
    )
    places = {"": 0, **{f"model.layers.{i}.mlp.experts": "cpu" for i in range(5) if away}}
    model = bigkit.load_and_quantize_model(model, config, device_map=places)
    expected = [plain(model, prompt(seed=seed)) for seed in range(2)]
    armed = []

    def fail(_, args):
        if armed and len(args[0]) == 2 and torch.cuda.is_current_stream_capturing() == armed[0]:
            armed.clear()
            raise KeyboardInterrupt

    experts_of(model)[2].act_fn.register_forward_pre_hook(fail)
    for recorded in (False, True):
        with bigkit.graph_decode(model) as decoder:
            armed.append(recorded)
            with pytest.raises(KeyboardInterrupt):
                model.generate(prompt(seed=1), **GREEDY)
            assert not armed
            for seed in (1, 0):
                assert torch.equal(model.generate(prompt(seed=seed), **GREEDY), expected[seed])
            assert decoder.replayed > 30
    assert torch.equal(plain(model, prompt(seed=1)), expected[1])
