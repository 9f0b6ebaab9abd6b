"""Quantized checkpoints: the bytes of Transformers and bitsandbytes, checked before a kernel reads them."""

import json
import warnings

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import bigkit
from bigkit import (
    init_empty_weights,
    load_and_quantize_model,
    load_checkpoint_in_model,
    save_model,
)
from bigkit.checkpoints.format import Checkpoint, CheckpointError
from bigkit.model.spec import QUANTIZATIONS
from bigkit.quantize import load
from bigkit.quantize.bnb import (
    nbytes,
    take_apart,
)
from bigkit.quantize.stored import PACKED
from tests.quantize.helpers import CPU, config, empty, every_kind, four, llama, run, states_equal, tokens

bnb = pytest.importorskip("bitsandbytes")


def spoil(folder, **changes):
    """The checkpoint in one file with some of its tensors changed, or left out (None)."""
    source = Checkpoint.open(folder)
    tensors = {name: source.read(name).clone() for name in source}
    for name, change in changes.items():
        name = next(key for key in tensors if key.endswith(name))
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name])
    spoilt = folder.parent / "spoilt"
    spoilt.mkdir(exist_ok=True)
    save_file(tensors, spoilt / "model.safetensors")
    return spoilt


def json_tensor(facts):
    return torch.tensor(list(facts if isinstance(facts, bytes) else json.dumps(facts).encode()), dtype=torch.uint8)


def facts_with(**changes):
    return lambda tensor: json_tensor({**json.loads(bytes(tensor.tolist())), **changes})


STORED = f"1.mlp.c_fc.weight.{PACKED}nf4"


SPOILT = {
    "missing in the checkpoint: 'transformer.h.1.mlp.c_fc.weight'": ("full", {"1.mlp.c_fc.weight": None}),
    "missing in the checkpoint: 'transformer.ln_f.bias'": ("full", {"ln_f.bias": None}),
    "wrong shape: 'transformer.h.1.mlp.c_fc.weight'": ("full", {"1.mlp.c_fc.weight": lambda t: t[1:].clone()}),
    "wrong dtype: 'transformer.h.1.mlp.c_fc.weight'": ("full", {"1.mlp.c_fc.weight": lambda t: t.int()}),
    "absmax is .* expected": ("nf4", {"1.mlp.c_fc.weight.absmax": lambda t: t[1:].clone()}),
    "absmax is missing": ("nf4", {"1.mlp.c_fc.weight.absmax": None}),
    "quant_map is .* expected": ("nf4", {"1.mlp.c_fc.weight.quant_map": lambda t: t[1:].clone()}),
    "is no valid JSON": ("nf4", {STORED: lambda t: json_tensor(b"{")}),
    "is a list, expected an object": ("nf4", {STORED: lambda t: json_tensor([1])}),
    "expected quant_type 'nf4', a blocksize and a dtype": ("nf4", {STORED: facts_with(blocksize=63)}),
    "expected quant_type 'nf4', a block": ("nf4", {STORED: facts_with(dtype="int64")}),
    "expected quant_type 'nf4'": ("nf4", {STORED: facts_with(quant_type="fp4")}),
    "was quantized from shape": ("nf4", {STORED: facts_with(shape=[64, 256])}),
    "is stored as nf4-double, expected nf4": ("nf4", {STORED: facts_with(nested_blocksize=256)}),
    "c_fc.weight is .* expected": ("nf4", {"1.mlp.c_fc.weight": lambda t: t[1:].clone()}),
    "nested_absmax is .* expected": ("nf4-double", {"1.mlp.c_fc.weight.nested_absmax": lambda t: torch.ones(0)}),
    "the nested_offset None, expected a number": ("nf4-double", {STORED: facts_with(nested_offset=None)}),
    "SCB is .* expected": ("int8", {"1.mlp.c_fc.SCB": lambda t: t[1:].clone()}),
    "weight_format is 1, expected 0": ("int8", {"1.mlp.c_fc.weight_format": lambda t: t + 1}),
}


@pytest.mark.parametrize("said", SPOILT)
def test_a_spoilt_checkpoint_is_named_and_leaves_the_model(saved, said):
    kind, changes = SPOILT[said]
    _, folder = saved
    wanted = "nf4" if kind == "full" else kind
    if kind != "full":
        quantized_model = load_and_quantize_model(empty(), config(kind), folder, CPU)
        folder = folder.parent / kind
        save_model(quantized_model, folder)
    folder = spoil(folder, **changes)
    model = empty()
    with pytest.raises(CheckpointError, match=said):
        load_and_quantize_model(model, config(wanted), folder, CPU)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert type(model.transformer["h"][0].mlp.c_fc) is nn.Linear and not hasattr(model, "is_loaded_in_4bit")


def test_the_wrong_config_is_refused(saved):
    _, folder = saved
    model = load_and_quantize_model(empty(), config("nf4"), folder, CPU)
    save_model(model, folder.parent / "nf4")
    for kind in ("fp4", "int8"):
        with pytest.raises(CheckpointError, match=f"is stored as nf4, but the config asks for {kind}"):
            load_and_quantize_model(empty(), config(kind), folder.parent / "nf4", CPU)
    with pytest.raises(CheckpointError, match="stored as nf4, but would be kept: see skip_modules"):
        load_and_quantize_model(empty(), config("nf4", skip_modules=["c_fc"]), folder.parent / "nf4", CPU)
    with pytest.raises(ValueError, match="'transformer.h.0.attn.c_attn'.* is quantized: load_and_quantize_model"):
        load_checkpoint_in_model(model, folder)
    with pytest.raises(ValueError, match="is on meta and has no data to quantize: give weights_location"):
        load_and_quantize_model(empty(), config("nf4"), device_map=CPU)
    with pytest.raises(FileNotFoundError):
        load_and_quantize_model(empty(), config("nf4"), folder.parent / "nowhere", CPU)
    with pytest.raises(ValueError, match="unknown device_map 'swiftest'"):
        load_and_quantize_model(empty(), config("nf4"), folder, "swiftest")
    with pytest.raises(ValueError, match="gives no device for"):
        load_and_quantize_model(empty(), config("nf4"), folder, {"transformer": "cpu"})


def test_scales_go_where_their_codes_go(four_saved, monkeypatch):
    """Older checkpoints have no `weight_format`, which is the one tensor that stays for Python to read."""

    folder, saved_as = four_saved
    saved_as("int8")
    spoilt = spoil(folder / "int8", **{f"{i}.mlp.c_fc.weight_format": None for i in range(4)})
    asked = []

    def read(source, places):
        asked.append(places)
        raise InterruptedError

    monkeypatch.setattr(load, "read_tensors", read)
    with pytest.raises(InterruptedError):
        load_and_quantize_model(empty(four), config("int8"), spoilt, {"": 0}, stand_in={"cuda:0": "cuda:1"})
    [places] = asked
    on_gpu = {name.rpartition(".")[2] for name in places[torch.device("cuda:1")]}
    assert on_gpu == {"weight", "SCB"} and all(name.endswith("format") for name in places[torch.device("cpu")])


@every_kind
@pytest.mark.parametrize("shard", ["30KB", "10GB"])
def test_reload_is_bit_equal(saved, kind, shard):
    _, folder = saved
    model = load_and_quantize_model(empty(), config(kind), folder, CPU)
    before = run(model)
    save_model(model, folder.parent / kind, shard)  # after a forward, which must not have changed it
    again = load_and_quantize_model(empty(), config(kind), folder.parent / kind, CPU)
    assert not states_equal(model, again) and torch.equal(run(again), before)
    save_model(again, folder.parent / kind, shard)  # over the files that its pages come from
    third = load_and_quantize_model(empty(), config(kind), folder.parent / kind, CPU)
    assert not states_equal(again, third) and torch.equal(run(third), before)


@every_kind
def test_files_hold_what_torch_saves(saved, kind):
    _, folder = saved
    model = load_and_quantize_model(empty(), config(kind), folder, CPU)
    save_model(model, folder.parent / kind)
    stored, expected = load_file(folder.parent / kind / "model.safetensors"), model.state_dict()
    assert stored.keys() == expected.keys() and all(torch.equal(stored[name], expected[name]) for name in stored)
    assert not list((folder.parent / kind).glob(".saving-*"))


@every_kind
def test_partly_quantized_checkpoints(saved, kind):
    """Weights that are stored in full are quantized, those that are quantized are taken."""
    _, folder = saved
    model = load_and_quantize_model(empty(), config(kind, skip_modules=["lm_head", "c_fc"]), folder, CPU)
    save_model(model, folder.parent / kind)
    again = load_and_quantize_model(empty(), config(kind), folder.parent / kind, CPU)
    assert not states_equal(again, load_and_quantize_model(empty(), config(kind), folder, CPU))


@settings(max_examples=25)
@given(
    kind=st.sampled_from(QUANTIZATIONS), outputs=st.integers(1, 40), inputs=st.integers(1, 150),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_survives_a_file(tmp_path_factory, kind, outputs, inputs, dtype, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(inputs, outputs, dtype=dtype), nn.Linear(outputs, 2, dtype=dtype))
    made = config(kind, torch_dtype=dtype)
    load_and_quantize_model(model, made, device_map=CPU)
    folder = tmp_path_factory.mktemp("any")
    save_model(model, folder)
    with init_empty_weights():
        again = nn.Sequential(nn.Linear(inputs, outputs), nn.Linear(outputs, 2))
    assert not states_equal(model, load_and_quantize_model(again, made, folder, CPU))


def tied_llama():
    model = llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=96, n_positions=64)
    )


@pytest.fixture(scope="module", params=[llama, tied_llama, gpt2], ids=lambda make: make.__name__)
def pretrained(request, tmp_path_factory):
    """A model of Transformers, saved in full precision by its own `save_pretrained`."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    model = request.param()
    model.save_pretrained(folder / "full")
    return type(model), folder


def from_pretrained(cls, folder, kind=None):
    options = {}
    if kind:
        wanted = config(kind).to_dict()
        options["quantization_config"] = transformers.BitsAndBytesConfig.from_dict(wanted)
    return cls.from_pretrained(folder, device_map=CPU, dtype=torch.float32, **options).eval()


@pytest.mark.parametrize("kind", ["int8", "nf4-double"])
def test_a_model_of_transformers_is_planned_and_saved_by_itself(pretrained, kind, tmp_path):
    cls, folder = pretrained
    with init_empty_weights():
        model = cls(transformers.AutoConfig.from_pretrained(folder / "full"))
    planned = bigkit.plan(model, {"cpu": "1GB"}, dtype="float32", quantization=kind).used["cpu"]
    model = load_and_quantize_model(model, config(kind), folder / "full", CPU)
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    assert planned == sum(map(nbytes, tensors.values()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it takes a device map for offloading
        model.save_pretrained(tmp_path)
    assert not states_equal(model, from_pretrained(cls, tmp_path))


def ours(cls, folder, kind):
    made = transformers.AutoConfig.from_pretrained(folder)
    with init_empty_weights():
        model = cls(made)
    return load_and_quantize_model(model, config(kind), folder, CPU)


@every_kind
def test_transformers_quantizes_loads_and_saves_the_same(pretrained, kind):
    """The same bytes: quantized by them and by us; saved by us, loaded by them; and the other way round."""
    cls, folder = pretrained
    model, theirs = ours(cls, folder / "full", kind), from_pretrained(cls, folder / "full", kind)
    assert not states_equal(model, theirs)

    save_model(model, folder / f"ours-{kind}", "40KB")
    model.config.save_pretrained(folder / f"ours-{kind}")
    assert not states_equal(model, from_pretrained(cls, folder / f"ours-{kind}"))

    theirs.save_pretrained(folder / f"theirs-{kind}", max_shard_size="40KB")
    assert not states_equal(model, ours(cls, folder / f"theirs-{kind}", kind))
    assert (
        Checkpoint.open(folder / f"theirs-{kind}").stored.keys()
        == Checkpoint.open(folder / f"ours-{kind}").stored.keys()
    )

    with torch.no_grad():
        theirs(tokens())  # their 4-bit layers may now be packed for this CPU
    if kind != "int8" and bnb.functional.has_avx512bf16():
        with pytest.raises(ValueError, match="was packed anew for this CPU by a forward"):
            save_model(theirs, folder / "never")
        packed = [module.weight for module in theirs.modules() if isinstance(module, bnb.nn.Linear4bit)]
        with pytest.raises(ValueError, match="was packed anew"):
            take_apart(packed[0])
        assert bigkit.describe(theirs).bytes() and not (folder / "never").exists()
    with torch.no_grad():
        generated = model.generate(tokens()[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 9)
