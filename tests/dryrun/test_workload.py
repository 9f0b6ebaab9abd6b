"""The work that is predicted: filling a model, and a prompt with decoding after it."""

from functools import partial

import pytest
import torch
from torch import nn

from bigkit import init_empty_weights
from bigkit.dryrun.workload import Step, Workload, at_random, fill, passes, torch_places, work
from bigkit.zoo.gpt import load_pygpt
from tests.dryrun.test_fake_gpu import TINY, tiny


def test_every_tensor_gets_memory_and_ties_stay():
    with init_empty_weights():
        model = nn.ModuleDict({"table": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
        model["head"].weight = model["table"].weight
        model["norm"] = nn.BatchNorm1d(4)
    fill(model, {"": "cpu"})
    assert model["head"].weight is model["table"].weight and not model["head"].weight.requires_grad
    assert all(t.device.type == "cpu" for t in (*model.parameters(), *model.buffers()))
    assert 0 < model["table"].weight.std() < 0.1


def test_the_nearest_entry_of_a_map_decides():
    place = torch_places({"": 3, "h": "cuda:1", "h.2.mlp": "cpu", "head": torch.device("cuda:2")})
    assert [str(place(name)) for name in ("wte", "h.0", "h.2.mlp.weight", "h.21", "head.bias")] == [
        "cuda:3", "cuda:1", "cpu", "cuda:1", "cuda:2",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no entry for 'wte'"):
        torch_places({"h": 0})("wte")


@pytest.mark.parametrize("name", ["llama-3.1-8b", "t5-large", "gpt2"])
def test_tokens_are_those_of_greedy_generation(name):
    """Against `generate` of Transformers, on the same prompt."""
    model = fill(tiny(name, **TINY[name]), {"": "cpu"}, partial(at_random, std=0.5))
    steps = list(passes(model, Workload(2, 8, 3), "cpu"))
    generated: list[Step] = []
    work(model, Workload(2, 8, 3), "cpu", generated.append)
    assert [step.phase for step in generated] == [step.phase for step in steps]
    prompt = torch.arange(7, 23).reshape(2, 8)
    options = {"decoder_start_token_id": 0} if name == "t5-large" else {}
    real = model.generate(
        prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True,
        **options,
    )  # fmt: skip
    for mine in (steps[-1].cache, generated[-1].cache[0]):
        cache, other = (c.self_attention_cache if name == "t5-large" else c for c in (mine, real.past_key_values))
        assert cache.get_seq_length() == other.get_seq_length() == (4 if name == "t5-large" else 11)
        for a, b in zip(cache.layers, other.layers):
            torch.testing.assert_close(a.keys, b.keys)


def test_a_model_that_cannot_generate_stops_after_the_prompt():
    model = fill(tiny("bert-base-cased", **TINY["bert-base-cased"]), {"": "cpu"})
    assert list(passes(model, Workload(1, 8, 5), "cpu")) == [Step("prefill")]


def test_the_shipped_gpt_keeps_its_cache():
    steps = list(passes(load_pygpt(), Workload(2, 8, 2), "cpu"))
    assert [step.phase for step in steps] == ["prefill", "decode", "decode"] and steps[-1].cache.length == 10


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Workload(batch=0)

    class Speech(nn.Linear):
        main_input_name = "query_embeds"

    with pytest.raises(ValueError, match="Speech takes 'query_embeds'"):
        list(passes(Speech(2, 2), Workload(), "cpu"))
