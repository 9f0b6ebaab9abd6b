"""Transformers' own methods that change, count, save and train a model, on spread ones."""

import copy

import pytest
import torch
import transformers
from safetensors.torch import load_model, save_model
from torch import nn

from bigkit import dispatch_model
from tests.clients.places import AWAY, STAND_IN, WAYS, check, compare, language_model, quantized, seeded, spread_ways

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(7)[None]


def gpt():
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=1
    )
    return seeded(lambda: transformers.GPT2LMHeadModel(config))


def t5():
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return seeded(lambda: transformers.T5ForConditionalGeneration(config))


MODELS = {"Llama": language_model, "GPT-2, tied": gpt}


def wider(model):
    """More words: what is new gets a known value, since it is drawn from random numbers."""
    count = model.config.vocab_size
    model.resize_token_embeddings(count + 9, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight.data[count:] = 0.1
    return model(IDS).logits, model(IDS + count).logits, model.config.vocab_size


def wider_by_their_mean(model):
    count = model.config.vocab_size
    model.resize_token_embeddings(count + 3, pad_to_multiple_of=8)
    return model(IDS).logits[..., :count], model.get_input_embeddings().weight.shape


def narrower(model):
    model(IDS)
    model.resize_token_embeddings(20)
    return model(IDS).logits, model.state_dict()["lm_head.weight"].clone()


def other_embeddings(model):
    torch.manual_seed(4)
    embeddings = nn.Embedding(model.config.vocab_size, 16)
    nn.init.normal_(embeddings.weight)
    model.set_input_embeddings(embeddings)
    model.tie_weights()
    return model(IDS).logits


def fewer_layers(model):
    layers = model.model.layers if hasattr(model, "model") else model.transformer.h
    layers.pop(0)
    model.config.num_hidden_layers = 1
    for i, layer in enumerate(layers):
        (layer.self_attn if hasattr(layer, "self_attn") else layer.attn).layer_idx = i
    return model(IDS, use_cache=False).logits


def initialised(model):
    for parameter in model.parameters():
        torch.manual_seed(3)
        nn.init.normal_(parameter, std=0.1)
    return model(IDS).logits


def facts(model):
    return (
        model.num_parameters(), model.num_parameters(only_trainable=True, exclude_embeddings=True),
        model.get_memory_footprint(), str(model.device), model.dtype,
        [name for name, _ in model.named_parameters()], [name for name, _ in model.named_buffers()],
    )  # fmt: skip


def frozen(model):
    model.requires_grad_(False)
    without = model(IDS).logits.requires_grad
    model.enable_input_require_grads()
    return without, model(IDS).logits.requires_grad


def other_attention(model):
    model.set_attn_implementation("eager")
    output = model(IDS, output_hidden_states=True, output_attentions=True)
    return output.logits, output.hidden_states, output.attentions


def static_cache(model):
    return model.generate(IDS, max_new_tokens=4, do_sample=False, cache_implementation="static")


USES = [
    wider, wider_by_their_mean, narrower, other_embeddings, fewer_layers, initialised, facts, frozen, other_attention,
    static_cache,
]  # fmt: skip


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_editing_and_asking(make, use, tmp_path):
    check(make(), use, tmp_path)


def test_one_of_two_embeddings_rests_elsewhere(tmp_path):
    places = {"model.embed_tokens": 0, "model.layers": 1, "model.norm": 1, "model.rotary_emb": 1, "lm_head": "cpu"}
    whole = language_model()
    parts = dispatch_model(copy.deepcopy(whole), places, main_device=1, stand_in=STAND_IN)
    compare(wider(parts), wider(whole), "mixed")


def test_an_encoder_and_a_decoder(tmp_path):
    def use(model):
        model.resize_token_embeddings(60, mean_resizing=False)
        model.get_input_embeddings().weight.data[50:] = 0.0
        output = model(input_ids=IDS, decoder_input_ids=IDS).logits[..., :50]
        return output, model.generate(IDS, max_new_tokens=4, do_sample=False, num_beams=2)

    check(t5(), use, tmp_path)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_saved_and_loaded_again(make, tmp_path):
    model = make()
    expected = model(IDS).logits
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.mul_(2)
    save_model(other, tmp_path / "other.safetensors")
    for way, parts in spread_ways(model, tmp_path):
        parts.save_pretrained(tmp_path / f"{way} saved", max_shard_size="10KB")
        again = type(model).from_pretrained(tmp_path / f"{way} saved")
        assert torch.equal(again(IDS).logits, expected), way
        save_model(parts, tmp_path / "one.safetensors")
        torch.save(parts.state_dict(), tmp_path / "state.pt")
        for load in (
            lambda model: load_model(model, tmp_path / "one.safetensors"),
            lambda model: model.load_state_dict(torch.load(tmp_path / "state.pt")),
        ):
            load(again := type(model)(model.config).eval())
            assert torch.equal(again(IDS).logits, expected), way
        load_model(parts, tmp_path / "other.safetensors")
        assert torch.equal(parts(IDS).logits, other(IDS).logits), way


def test_the_trainer_evaluates_what_is_resident_and_refuses_to_move_the_rest(tmp_path):
    def loss(model):
        options = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
        data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
        return transformers.Trainer(model, options, eval_dataset=data).evaluate()["eval_loss"]

    expected = loss(language_model())
    assert abs(loss(WAYS["GPUs"](language_model(), tmp_path)) - expected) < 1e-6
    for way, parts in spread_ways(language_model(), tmp_path, AWAY):
        with pytest.raises(RuntimeError, match="cannot be moved or cast as a whole: call bigkit.remove_hook"):
            loss(parts)
        assert torch.equal(parts(IDS).logits, language_model()(IDS).logits), way


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_editing_fewer_bits(kind, where, tmp_path):
    pytest.importorskip("bitsandbytes")
    whole, parts = quantized(kind, None, tmp_path), quantized(kind, where, tmp_path)
    with torch.no_grad():
        for use in (wider, narrower, static_cache):
            compare(use(parts), use(whole), use.__name__)
        layer = parts.model.layers[0].self_attn.q_proj
        with pytest.raises(ValueError, match="rests as .* cannot become .* call remove_hook_from_module"):
            layer.weight.data = layer.weight.data[:8].clone()
        compare(parts(IDS).logits, whole(IDS).logits, "after an error")
    assert parts.num_parameters() == whole.num_parameters()
    assert parts.get_memory_footprint() == whole.get_memory_footprint()
