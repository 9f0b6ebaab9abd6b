"""Several tokens a pass: the text of plain greedy decoding, in fewer passes, also of a model that is spread out."""

import pytest
import torch
import transformers as tf

import bigkit
from bigkit.measure.acceptance import acceptance
from bigkit.zoo.gpt import GPT, PYDRAFT, GPTConfig, encode, heldout_text, load_pydraft, load_pygpt
from bigkit.zoo.guesses import Draft, look_up

STAND_IN = {0: "cpu"}


def passes(model, run):
    """What a call gives, and how many forwards of the model it took."""
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        return run(), len(calls)
    finally:
        handle.remove()


def small(seed=0, block_size=48, n_layer=2):
    torch.manual_seed(seed)
    return GPT(GPTConfig(n_layer=n_layer, n_head=2, n_embd=16, vocab_size=12, block_size=block_size)).eval()


@pytest.mark.parametrize("tokens, new", [(1, 1), (1, 30), (7, 41), (7, 60), (48, 5), (60, 3)])
@pytest.mark.parametrize("kind", ["another", "itself", "lookup"])
def test_text_of_greedy_decoding(kind, tokens, new):
    model, idx = small(), torch.randint(0, 12, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    draft = {"another": small(1, 32), "itself": model, "lookup": None}[kind]
    options = {"assistant_model": draft} if draft else {"prompt_lookup_num_tokens": 4}
    assert torch.equal(model.generate(idx, new, **options), model.generate(idx, new))


def test_a_perfect_draft_needs_a_sixth_of_the_passes():
    model, twin = small(), small()
    _, count = passes(model, lambda: model.generate(torch.tensor([[1, 2]]), 36, assistant_model=twin))
    assert count == 6


def test_pydraft_guesses_for_pygpt():
    assert sum(file.stat().st_size for file in PYDRAFT.iterdir()) < 3_000_000
    model, draft = load_pygpt(dtype=torch.float32), load_pydraft(dtype=torch.float32)
    idx = torch.tensor([encode(heldout_text()[:120])])
    expected = model.generate(idx, 40)
    got, count = passes(model, lambda: model.generate(idx, 40, assistant_model=draft))
    assert torch.equal(got, expected) and count < 30
    spread = bigkit.dispatch_model(model, {"": "cpu"}, 0, stand_in=STAND_IN)
    got, again = passes(spread, lambda: spread.generate(idx, 40, assistant_model=draft))
    assert torch.equal(got, expected) and again == count
    share = acceptance(model, draft, torch.tensor(encode(heldout_text()[:512])))
    assert 0.5 < share < 0.9


def test_what_is_refused():
    model = small()
    with pytest.raises(ValueError, match="greedy text of one prompt"):
        model.generate(torch.ones(1, 2, dtype=torch.long), 3, do_sample=True, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="greedy text of one prompt"):
        model.generate(torch.ones(2, 2, dtype=torch.long), 3, assistant_model=model)
    with pytest.raises(ValueError, match="at least two tokens"):
        acceptance(model, model, torch.tensor([1]))
    with pytest.raises(ValueError, match="knows 12 tokens and the draft 256"):
        acceptance(model, load_pydraft(), torch.tensor([1, 2]))


def test_guesses():
    assert look_up(torch.tensor([[1, 2, 3]]), 4).shape == (1, 0)
    assert look_up(torch.tensor([[7, 8, 9, 1, 8, 9]]), 3).tolist() == [[1, 8, 9]]
    draft = Draft(small())
    assert draft(torch.zeros(1, 47, dtype=torch.long), 5).shape == (1, 1)  # no more than it attends to


def llama(blocks, seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, vocab_size=50, num_hidden_layers=blocks)).eval()


@pytest.mark.parametrize("kind", ["another", "itself", "lookup"])
def test_transformers_on_a_model_that_is_spread_out(kind):
    greedy = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    idx = torch.randint(3, 50, (1, 6), generator=torch.Generator().manual_seed(0))
    expected = llama(4, 0).generate(idx, **greedy)
    model = bigkit.dispatch_model(llama(4, 0), {"": "cpu"}, 0, stand_in=STAND_IN)
    draft = {"another": llama(1, 1), "itself": llama(4, 0), "lookup": None}[kind]
    options = {"assistant_model": draft} if draft else {"prompt_lookup_num_tokens": 5}
    got, count = passes(model, lambda: model.generate(idx, **greedy, **options))
    assert torch.equal(got, expected) and count <= 21
    assert kind != "itself" or count < 12
