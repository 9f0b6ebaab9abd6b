"""Quantized weights that rest elsewhere: state dicts, saving and adapters find the scales too."""

import copy
import io
import subprocess
import sys
import tempfile

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

from bigkit import dispatch_model, load_and_quantize_model, remove_hook_from_module
from bigkit.quantize.bnb import bitsandbytes
from tests.clients.places import compare
from tests.quantize.helpers import CPU, config, llama

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

IDS = torch.arange(7)[None]
# Of a logit: bitsandbytes computes 4-bit products in bfloat16, with rounded scales, on CPUs that can.
ROUNDED = 1e-2 if bnb.functional.has_avx512bf16() else 1e-3
KINDS = ["int8", "nf4", "nf4-double"]


def base(kind, where, folder):
    """A small Llama whose blocks rest in RAM or on disk, or work where they rest (None)."""
    torch.manual_seed(0)
    if where is None:
        return load_and_quantize_model(llama(), config(kind), device_map=CPU)
    places = {"model.embed_tokens": 0, "model.layers": where, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    return load_and_quantize_model(
        llama(), config(kind), device_map=places, stand_in={0: "cpu"}, offload_folder=folder, force_hooks=True
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_state_dict_and_what_transformers_saves_have_the_scales(kind, where, tmp_path):
    here, away = base(kind, None, tmp_path), base(kind, where, tmp_path)
    expected, state = here.state_dict(), away.state_dict()
    assert list(state) == list(expected)
    torch.save(state, tmp_path / "state.pt")
    read = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(read[name].equal(expected[name]) for name in expected)
    away.save_pretrained(tmp_path / "saved")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map=CPU)
    with torch.no_grad():
        assert torch.allclose(theirs(IDS).logits.float(), here(IDS).logits, atol=ROUNDED)


def adapter(model, **options):
    torch.manual_seed(1)
    return peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **options)
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("step", ["LoRA", "merge", "unmerge", "DoRA"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_on_weights_that_rest_elsewhere(kind, step, where, tmp_path):
    def logits(model):
        model = adapter(model, use_dora=step == "DoRA")
        if step in ("merge", "unmerge"):
            model.merge_adapter()
            first = model(IDS).logits
            if step == "unmerge":
                model.unmerge_adapter()
                first = model(IDS).logits
            return first
        return model(IDS).logits

    with torch.no_grad():
        expected, model = logits(base(kind, None, tmp_path)), base(kind, where, tmp_path)
        assert torch.allclose(logits(model), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_handle_has_the_attributes_of_its_weight(kind, tmp_path):
    weight, handle = (base(kind, where, tmp_path).model.layers[0].self_attn.q_proj.weight for where in (None, "cpu"))
    if kind == "int8":
        assert handle.SCB.equal(weight.SCB)
    else:
        assert handle.quant_state.absmax.equal(weight.quant_state.absmax)
        for name in ("quant_type", "compress_statistics", "blocksize", "bnb_quantized"):
            assert getattr(handle, name) == getattr(weight, name)
    assert isinstance(handle, type(weight)) and type(handle).__name__ == type(weight).__name__
    made = type(handle)(weight, requires_grad=False)  # as Accelerate and peft make one like it
    assert type(made) is type(weight)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = handle.nothing


def q_proj(model):
    return model.model.layers[0].self_attn.q_proj


def pickled(thing):
    torch.save(thing, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


def safetensors_file(model):
    safetensors.torch.save_model(model, file := tempfile.mkdtemp() + "/model.safetensors")
    return [*safetensors.torch.load_file(file).items()]


def changed_scales(model):
    state = {name: value * 2 if name.endswith("SCB") else value for name, value in model.state_dict().items()}
    model.load_state_dict(state, strict=False)  # of 4-bit weights bitsandbytes loads the codes alone
    return model(IDS).logits


def learning(model):
    model = peft.prepare_model_for_kbit_training(model)
    return model(IDS).logits, sum(parameter.requires_grad for parameter in model.parameters())


READERS = {
    "pickled": lambda model: [pickled(q_proj(model).weight), pickled(dict(model.named_parameters()))["lm_head.weight"]],
    "copied": lambda model: [copy.deepcopy(thing)(torch.ones(1, 64)) for thing in (
        q_proj(model), model.model.layers[0].mlp.gate_proj)],
    "copied block": lambda model: copy.deepcopy(model.model.layers)[0].self_attn.q_proj.weight.data,
    "safetensors": safetensors_file,
    "kept vars": lambda model: [value.data + 0 for value in model.state_dict(keep_vars=True).values()],
    "by peft": lambda model: peft.utils.integrations.dequantize_module_weight(q_proj(model)),
    "scales loaded": changed_scales,
    "for training": learning,
    "codes": lambda model: (q_proj(model).weight.data.copy_(q_proj(model).weight.data.flip(0)), model(IDS).logits),
    "part moved": lambda model: model.model.layers[0].to("cpu") and model(IDS).logits,
    "replaced for a call": lambda model: [
        torch.func.functional_call(model, {"lm_head.weight": 2 * model.lm_head.weight.detach()}, (IDS,)).logits,
        model(IDS).logits,
    ],
    "counted": lambda model: [model.num_parameters(), model.get_memory_footprint()],
    "no longer spread": lambda model: remove_hook_from_module(model, recurse=True)(IDS).logits,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("kind", ["int8", "nf4-double"])
def test_readers_of_weights_that_rest_elsewhere(kind, read, tmp_path):
    with torch.no_grad():
        expected = read(base(kind, None, tmp_path))
        for where in ("cpu", "disk"):
            compare(read(base(kind, where, tmp_path)), expected, where)


def test_attributes_of_plain_parameters_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.tag, model[0].weight.mask = "mine", torch.ones(4)
    model = dispatch_model(model, CPU, main_device=0, stand_in={0: "cpu"}, force_hooks=True)
    assert model[0].weight.tag == "mine" and model[0].weight.mask.equal(torch.ones(4))


@pytest.mark.parametrize("ran", [False, True])
def test_bitsandbytes_own_int8_layers_may_have_run(ran: bool) -> None:
    """Theirs takes the scales from its weight when it first runs."""
    bitsandbytes()
    layer = bnb.nn.Linear8bitLt(32, 16, has_fp16_weights=False)
    layer.load_state_dict(nn.Linear(32, 16).state_dict())
    model = nn.Sequential(layer.to("cpu"), nn.Identity()).eval()
    x = torch.randn(3, 32)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
        if ran:
            model(x)
        dispatch_model(model, {"0": "cpu", "1": 0}, stand_in={0: "cpu"})
        assert torch.equal(model(x), expected) and torch.equal(model(x), expected)
        dispatch_model(model, {"0": 0, "1": "cpu"}, stand_in={0: "cpu"}, force_hooks=True)
        assert torch.equal(model(x), expected)


BY_OTHERS = """
import copy, logging, sys, warnings
logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from bigkit import dispatch_model
folder = sys.argv[1]
torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
ids = torch.arange(7)[None]
kinds = [(dict(load_in_8bit=True), "cpu", 2), (dict(load_in_4bit=True, bnb_4bit_use_double_quant=True), "disk", 3)]
for options, where, count in kinds:
    config = BitsAndBytesConfig(**options)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    if count == 2:
        assert not any(name.startswith("bigkit.quantize") for name in sys.modules)
    with torch.no_grad():
        state = {name: value.clone() for name, value in model.state_dict().items()}
        expected = copy.deepcopy(model)(ids).logits  # a forward packs 4-bit weights anew on some CPUs
        places = {"model.embed_tokens": 0, "model.layers": where, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
        parts = dispatch_model(model, places, offload_dir=folder, stand_in={0: "cpu"})
        for _ in range(2):
            torch.testing.assert_close(parts(ids).logits, expected, rtol=1e-4, atol=float(sys.argv[2]))
        layer = parts.model.layers[0].mlp.up_proj
        assert len(layer.weight.weight.parts) == count, "the scales do not travel"
        assert count == 3 or layer.state.CB is layer.state.SCB is None, "the layer keeps what it was lent"
        found = parts.state_dict()
        assert all(found[name].equal(state[name]) for name in state)
"""


def test_layers_that_others_have_quantized_travel_with_their_scales(tmp_path):
    """In a fresh process, which has not imported the wing."""
    done = subprocess.run(
        [sys.executable, "-c", BY_OTHERS, str(tmp_path), str(ROUNDED)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
