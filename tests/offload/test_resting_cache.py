"""A cache that rests in RAM: the keys, values, logits and tokens of `DynamicCache`, bit for bit."""

import copy
import gc
import pickle
import random
import weakref

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from bigkit.offload import resting_cache
from bigkit.offload.resting_cache import RestingCache, RestingLayer
from tests.fake_streams import World

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": 300, "max_position_embeddings": 1024,
}  # fmt: skip
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def llama(blocks=5):
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_hidden_layers=blocks)).eval()


def gemma():
    torch.manual_seed(0)
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**SIZES, num_hidden_layers=4, sliding_window=12)).eval()


def prompt(sequences=1, tokens=7, seed=1):
    return torch.randint(3, 300, (sequences, tokens), generator=torch.Generator().manual_seed(seed))


def same(cache, expected):
    return all(
        torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)
        for layer, other in zip(cache.layers, expected.layers, strict=True)
    )


@pytest.mark.parametrize("stay, room", [(0, None), (2, None), (0, "100KB"), (1, "10MB")])
@pytest.mark.parametrize("sequences, tokens", [(1, 1), (1, 7), (3, 300)])
@pytest.mark.parametrize("make", [llama, gemma])
def test_bits_of_a_dynamic_cache(make, sequences, tokens, stay, room):
    model, more = make(), {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(prompt(sequences, tokens), **more)
    cache = RestingCache(model.config, layers_on_device=stay, room=room)
    got = model.generate(prompt(sequences, tokens), past_key_values=cache, **more)
    assert torch.equal(got.sequences, expected.sequences)
    assert all(map(torch.equal, got.logits, expected.logits))
    assert same(cache, expected.past_key_values)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"prefill_chunk_size": 5},
        {"prompt_lookup_num_tokens": 4},
        {"num_return_sequences": 2, "num_beams": 2},
    ],
)
def test_ways_to_generate(options):
    model = llama()
    expected = model.generate(prompt(tokens=20), **GREEDY, **options)
    cache = RestingCache(model.config)
    assert torch.equal(model.generate(prompt(tokens=20), past_key_values=cache, **GREEDY, **options), expected)


@pytest.mark.parametrize("take", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("room", [0, "10MB"])
def test_a_prompt_that_many_requests_begin_with(take, room):
    model = llama(3)
    caches = RestingCache(model.config, layers_on_device=1, room=room), tf.DynamicCache(config=model.config)
    for cache in caches:
        model.generate(prompt(tokens=20), past_key_values=cache, **GREEDY)
    for seed in range(3):
        tokens = torch.cat([prompt(tokens=20), prompt(tokens=30, seed=seed)], 1)
        first, second = (model.generate(tokens, past_key_values=take(cache), **GREEDY) for cache in caches)
        assert torch.equal(first, second)
    assert same(*caches)


@pytest.mark.parametrize("one, other", [(2, 1), (1, 2), (3, 2)])
def test_another_batch(one, other):
    """What would fit by broadcasting is refused, too."""
    model = llama(2)
    cache = RestingCache(model.config)
    model.generate(prompt(one), past_key_values=cache, **GREEDY)
    with pytest.raises(ValueError, match=rf"holds keys and values of \[\({one}, 2, 8\).* got \[\({other}, 2, 8\)"):
        cache.update(torch.ones(other, 2, 1, 8), torch.ones(other, 2, 1, 8), 0)
    cache.reset()
    assert torch.equal(model.generate(prompt(other), past_key_values=cache, **GREEDY),
                       model.generate(prompt(other), **GREEDY))  # fmt: skip


@pytest.mark.parametrize("layers", [-1, 9, 1.5, "2", None])
def test_arguments(layers):
    with pytest.raises(ValueError, match="give a number from 0 to 2"):
        RestingCache(llama(2).config, layers_on_device=layers)
    with pytest.raises(ValueError, match="give model.config"):
        RestingCache(llama(2))


def test_a_talk_that_goes_on():
    model = llama()
    first, second, so_far = RestingCache(model.config), tf.DynamicCache(config=model.config), prompt(1, 0)
    for turn in range(3):
        tokens = torch.cat([so_far, prompt(1, 9, seed=turn)], 1)
        so_far, expected = (model.generate(tokens, past_key_values=cache, **GREEDY) for cache in (first, second))
        assert torch.equal(so_far, expected)
    assert same(first, second)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_calls(data):
    """Updates in the model's order and out of it, crops, and changes of the batch."""
    layers, rows = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 3, 256]))
    config = tf.LlamaConfig(**SIZES, num_hidden_layers=layers)
    room = data.draw(st.sampled_from([None, *range(0, 600_000, 70_000)]))
    cache, expected = RestingCache(config, room=room), tf.DynamicCache(config=config)
    batch, generator = 2, torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resting_cache, "ROWS", rows)
        for _ in range(data.draw(st.integers(1, 8))):
            kind = data.draw(
                st.sampled_from(["tokens", "tokens", "tokens", "layer", "crop", "select", "repeat", "reorder"])
            )
            if kind in ("tokens", "layer"):
                count = data.draw(st.integers(1, 5))
                for i in range(layers) if kind == "tokens" else [data.draw(st.integers(0, layers - 1))]:
                    new = torch.randn(2, batch, count, 2, 8, generator=generator).transpose(2, 3)  # as models have it
                    both = [one.update(new[0], new[1], i) for one in (cache, expected)]
                    assert all(map(torch.equal, *both))
                    assert [one.stride() for one in both[0]] == [one.stride() for one in both[1]]  # kernels look at it
            elif cache.layers[0].get_seq_length() > 2 and all(layer.is_initialized for layer in cache.layers):
                for one in (cache, expected):
                    if kind == "crop":
                        one.crop(-1)
                    elif kind == "select":
                        one.batch_select_indices(torch.tensor([0] * batch))
                    elif kind == "reorder":
                        one.reorder_cache(torch.tensor([*range(batch)][::-1]))
                    elif batch < 8:
                        one.batch_repeat_interleave(2)
                batch = batch * 2 if kind == "repeat" and batch < 8 else batch
    assert [layer.get_seq_length() for layer in cache.layers] == [layer.get_seq_length() for layer in expected.layers]
    if all(layer.is_initialized for layer in cache.layers):
        assert same(cache, expected)


def test_who_keeps_what_an_attention_was_given_keeps_it():
    cache = RestingCache(tf.LlamaConfig(**SIZES, num_hidden_layers=3))
    kept = []
    for step in range(3):
        for i in range(3):
            kept.append(cache.update(*torch.full((2, 1, 2, 2, 8), float(10 * step + i)), layer_idx=i)[0])
    for step in range(3):
        for i in range(3):
            assert torch.equal(kept[3 * step + i][0, 0, -1], torch.full((8,), float(10 * step + i)))


def test_only_a_layer_and_the_next_are_on_the_device():
    model = llama(8)
    cache = RestingCache(model.config)
    model.generate(prompt(tokens=50), past_key_values=cache, **GREEDY)
    (windows,) = cache.layers[0].windows.values()
    row = 2 * 2 * 8 * 4  # keys and values, heads, width, bytes
    assert len(windows.slots) == 2 and cache.resting_bytes() == 8 * 256 * row
    assert sum(slot.memory.nbytes for slot in windows.slots) == 2 * 256 * row


@pytest.mark.parametrize("stay", range(9))
def test_layers_stay_between_prompts_where_there_is_room(stay, monkeypatch):
    model, copies, copy = llama(8), [], resting_cache._Windows._copy
    size = 256 * 2 * 2 * 8 * 4  # tokens, keys and values, heads, width, bytes
    monkeypatch.setattr(resting_cache._Windows, "_copy", lambda *args: (copies.append(args[2]), copy(*args)))
    cache = RestingCache(model.config, room=stay * size + size // 2)
    past = model.generate(prompt(tokens=50), past_key_values=cache, **GREEDY, return_dict_in_generate=True)
    (windows,) = cache.layers[0].windows.values()
    assert len(windows.own) == cache.layers_that_stay() == stay
    held = sum(slot.memory.nbytes for slot in (*windows.own.values(), *windows.slots))
    assert held == (min(stay, 6) + 2) * size  # the last two are content with the slots of all
    copies.clear()
    with torch.no_grad():
        model(past.sequences[:, -1:], past_key_values=cache)
    away = 8 - stay
    assert len(copies) == (away if away > 2 else 0)  # two of them find both slots as they left them
    with torch.no_grad():
        model(torch.randint(300, (1, 257)), past_key_values=cache)  # a prompt gets the room
    assert not windows.own
    copies.clear()
    for _ in range(2):
        with torch.no_grad():
            model(past.sequences[:, -1:], past_key_values=cache)
    assert sum(slot.memory.nbytes for slot in windows.own.values()) <= (stay + 0.5) * size


def test_a_prompt_of_another_cache_gets_the_room_too():
    model, more = llama(6), {**GREEDY, "return_dict_in_generate": True}
    first, second = (RestingCache(model.config, room="1MB") for _ in range(2))
    past = model.generate(prompt(), past_key_values=first, **more).sequences
    assert first.layers_that_stay() == 6
    with torch.no_grad():
        model(prompt(2), past_key_values=second)
    assert first.layers_that_stay() == 0
    expected = model.generate(prompt(), **{**GREEDY, "max_new_tokens": 20})
    assert torch.equal(model.generate(past, past_key_values=first, **{**GREEDY, "max_new_tokens": 8}), expected)
    assert first.layers_that_stay() == 6


@pytest.mark.parametrize(
    "sequences, dtype, repeats, layers",
    [(1, "bfloat16", 2, 7), (1, "float32", 2, 5), (2, "bfloat16", 2, 5), (2, "bfloat16", 1, 7)],
)
def test_an_attention_keeps_the_memory_that_it_works_with(sequences, dtype, repeats, layers, monkeypatch):
    """Heads of keys are repeated where no kernel shares them: with a mask, and in float32."""
    config = tf.LlamaConfig(**{**SIZES, "num_key_value_heads": 4 // repeats}, num_hidden_layers=9)
    cache, dtype = RestingCache(config), getattr(torch, dtype)
    new = torch.ones(2, sequences, 4 // repeats, 1, 8, dtype=dtype)
    layer = 256 * new.nbytes
    monkeypatch.setattr(resting_cache, "_left_by_prompt", lambda device: 8 * layer)
    for _ in range(2):
        for i in range(9):
            cache.update(*new, layer_idx=i)
    assert cache.layers_that_stay() == layers


def test_no_room_where_the_allocator_has_none(monkeypatch):
    """What PyTorch has kept may be in pieces: then layers rest, as they did."""
    model = llama(6)
    expected, empty, failed = model.generate(prompt(), **GREEDY), torch.empty, []

    def refuse(*args, **kwargs):
        if len(windows.own) > 1 and not failed:
            failed.append(1)
            raise torch.OutOfMemoryError
        return empty(*args, **kwargs)

    cache = RestingCache(model.config, room="1MB")
    windows = cache.layers[0].windows[torch.device("cpu")]
    monkeypatch.setattr(torch, "empty", refuse)
    assert torch.equal(model.generate(prompt(), past_key_values=cache, **GREEDY), expected)
    assert failed and not windows.own


def test_memory_grows_in_few_pieces():
    layer = RestingCache(tf.LlamaConfig(**SIZES, num_hidden_layers=1)).layers[0]
    layer.update(*torch.zeros(2, 1, 2, 5000, 8))
    for _ in range(3000):
        layer.update(*torch.zeros(2, 1, 2, 1, 8))
    assert len(layer.rows.slabs) < 10 and layer.rows.capacity < 1.15 * 8000


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_it_goes_on(error, monkeypatch):
    model = llama()
    expected = model.generate(prompt(), **GREEDY)
    cache, calls = RestingCache(model.config), []
    copy = resting_cache._Windows._copy

    def fail(self, slot, layer):
        calls.append(1)
        if len(calls) == 8:
            raise error
        copy(self, slot, layer)

    monkeypatch.setattr(resting_cache._Windows, "_copy", fail)
    with pytest.raises(error):
        model.generate(prompt(), past_key_values=cache, **GREEDY)
    lengths = [layer.get_seq_length() for layer in cache.layers]
    for layer, length in zip(cache.layers, lengths):
        layer.crop(min(lengths) - length)
    tokens = expected[:, : min(lengths) + 1]
    more = {**GREEDY, "max_new_tokens": expected.shape[1] - tokens.shape[1]}
    assert torch.equal(model.generate(tokens, past_key_values=cache, **more), expected)


def test_what_is_refused():
    config = tf.LlamaConfig(**SIZES, num_hidden_layers=3)
    with pytest.raises(ValueError, match="layers_on_device is 4, and 3 layers of this model"):
        RestingCache(config, layers_on_device=4)
    with pytest.raises(RuntimeError, match="for inference"):
        RestingCache(config).update(*torch.ones(2, 1, 2, 3, 8, requires_grad=True), layer_idx=0)


def test_memory_goes_with_the_cache():
    model = llama()
    cache = RestingCache(model.config)
    model.generate(prompt(), past_key_values=cache, **GREEDY)
    slab = weakref.ref(cache.layers[0].rows.slabs[0][2])
    assert [type(layer) for layer in cache.layers] == [RestingLayer] * 5
    gc.disable()
    try:
        del cache
        assert slab() is None  # at once: pinned RAM is scarce
    finally:
        gc.enable()


def drawn_steps(data, layers, batch=2):
    """A prompt in chunks, tokens, crops and new prompts: a tensor of new rows for each step, or tokens to forget."""
    steps, length = [], 0
    for kind in data.draw(st.lists(st.sampled_from(["token", "token", "chunk", "crop", "reset"]), max_size=8)):
        if kind == "reset":
            steps, length = [*steps, "reset"], 0
        elif kind == "crop" and length > 1:
            steps.append(data.draw(st.integers(1, min(4, length - 1))))
            length -= steps[-1]
        if kind in ("token", "chunk") or not length:
            rows = 1 if kind == "token" and length else data.draw(st.integers(2, 6))
            steps.append(torch.randn(layers, 2, batch, 2, rows, 8))
            length += rows
    return steps


def played(cache, steps, make):
    """What attentions are given, step by step, of a cache or of those that follow it."""
    given = []
    for step in steps:
        if isinstance(step, str) and (own := getattr(cache, "reset", None)):
            own()
        if isinstance(step, str):
            cache = make(cache)
        elif isinstance(step, int):
            cache.crop(-step)
        else:
            given.append([[part.clone() for part in cache.update(*new, i)] for i, new in enumerate(step)])
    return given


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_no_copy_overtakes_whatever_the_streams_do(data):
    layers, rows = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1, 3, 256]))
    config = tf.LlamaConfig(**SIZES, num_hidden_layers=layers)
    steps = drawn_steps(data, layers)
    expected = played(tf.DynamicCache(config=config), steps, lambda cache: tf.DynamicCache(config=config))
    choice = random.Random(data.draw(st.integers(0, 1000)))
    favour = data.draw(st.sampled_from([None, 0, 1, 2]))  # the stream that works, brings or takes away goes first
    with pytest.MonkeyPatch.context() as patch:
        world = World(patch)
        patch.setattr(resting_cache, "ROWS", rows)
        patch.setattr(resting_cache, "is_real_cuda", lambda device: True)
        cache = RestingCache(config, room=data.draw(st.integers(0, layers)) * 2 * 2 * 2 * 8 * 4 * (rows + 8))
        world.inputs = {step.untyped_storage()._cdata for step in steps if isinstance(step, torch.Tensor)}
        with world, torch.no_grad():
            got = played(cache, steps, lambda cache: cache)
        del cache

        def choose(able):
            first = [stream for stream in able if favour is not None and world.streams.index(stream) == favour]
            return first[0] if first else choice.choice(able)

        world.run(choose)
    for one, other in zip(got, expected, strict=True):
        for mine, theirs in zip(one, other):
            assert all(map(torch.equal, mine, theirs))
