"""Which layers are quantized."""

import copy
import types

import pytest
import torch
import transformers
from torch import nn

from bigkit import (
    load_and_quantize_model,
    load_checkpoint_and_dispatch,
    plan,
    replace_with_bnb_layers,
    save_model,
)
from bigkit.meta.skeleton import spec_from_module
from bigkit.model.spec import tensor_bytes
from bigkit.quantize.bnb import nbytes
from tests.quantize.helpers import CPU, config, empty, every_kind, quantized_names, states_equal

bnb = pytest.importorskip("bitsandbytes")


class Odd(nn.Module):
    """Everything that is not simply a linear layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 32)
        self.attention = nn.MultiheadAttention(32, 2)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32, bias=False)
        self.tied = nn.Linear(32, 10, bias=False)
        self.tied.weight = self.embed.weight
        self.shared = self.down
        self.head = nn.Linear(32, 7)


def test_only_plain_linear_layers_are_quantized():
    model = load_and_quantize_model(Odd(), config("nf4"), device_map=CPU)
    assert quantized_names(model) == ["up.weight"]
    assert model.tied.weight is model.embed.weight and model.shared is model.down
    model = load_and_quantize_model(Odd(), config("nf4", skip_modules=[]), device_map=CPU)
    assert quantized_names(model) == ["up.weight", "head.weight"]
    assert model.attention(torch.ones(1, 1, 32), torch.ones(1, 1, 32), torch.ones(1, 1, 32))[0].isfinite().all()


@pytest.mark.parametrize(
    ("skip", "kept"),
    [
        (["lm_head"], set()),
        (["c_fc"], {"c_fc"}),
        (["mlp"], {"c_fc", "c_proj"}),
        (["c"], {"c_fc"}),
        (["c_"], set()),
        (["mlp.c_proj"], {"c_proj"}),
    ],
)
def test_modules_are_skipped_by_the_ends_of_their_names(saved, skip, kept):
    _, folder = saved
    model = load_and_quantize_model(empty(), config("int8", skip_modules=skip), folder, CPU)
    mlp = model.transformer["h"][0].mlp
    assert {name for name in ("c_fc", "c_proj") if type(getattr(mlp, name)) is nn.Linear} == kept
    assert isinstance(model.lm_head, bnb.nn.Linear8bitLt) == (skip != ["lm_head"])


class Encoder(nn.Module):
    """PyTorch's encoder computes with `linear1.weight` by itself where it is fast."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 1)
        self.mid, self.head = nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x):
        return self.head(self.mid(self.encoder(x)))


class Heads(nn.Module):
    """Inner layers whose names end as that of the output head does, a subclass, and some that cannot be quantized."""

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({"fc": nn.Linear(64, 64), "skip_fc": nn.Linear(64, 64)})
        self.attention = nn.MultiheadAttention(64, 4)
        self.complex = nn.Linear(64, 64, dtype=torch.complex64)
        self.nothing = nn.Linear(0, 64)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(64, 64))
        self.weight_norm = nn.utils.weight_norm(nn.Linear(64, 64))
        self.fc = nn.Linear(64, 8)


def t5():
    sizes = {"vocab_size": 100, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def falcon():
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.FalconForCausalLM(transformers.FalconConfig(**sizes))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Initializing zero-element")
@pytest.mark.parametrize(("kind", "half"), [("int8", "float16"), ("nf4-double", "bfloat16"), ("nf4-double", "float32")])
@pytest.mark.parametrize("make", [Encoder, Heads, t5, falcon, Odd])
def test_a_plan_counts_as_quantized_what_loading_quantizes(make, kind, half):
    spec = spec_from_module(make())
    precision = spec.precision(half, kind)
    model = load_and_quantize_model(make(), config(kind, torch_dtype=half), device_map=CPU)
    assert [f"{name}.weight" for name in spec.quantized(precision)] == quantized_names(model)
    for name, parameter in model.named_parameters():
        if "." in name and "complex" not in name:
            assert nbytes(parameter) == tensor_bytes(name, *spec.tensors[name], precision), name
    if make is Encoder:
        assert model.encoder.layers[0].linear1.weight.is_floating_point() == (kind == "int8")
    if make is t5:
        wo = model.encoder.block[0].layer[1].DenseReluDense.wo.weight
        assert wo.dtype == (torch.float32 if half == "float16" else getattr(torch, half))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_layers_are_kept_whose_weights_other_code_reads(kind):
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = model(x)
        model = load_and_quantize_model(model, config(kind), device_map=CPU)
        assert (model(x) - expected).norm() < 0.2 * expected.norm()
    torch.manual_seed(0)
    model, ids = t5().eval(), {"input_ids": torch.arange(7)[None], "decoder_input_ids": torch.arange(4)[None]}
    with torch.no_grad():
        expected = model(**ids).logits
        model = load_and_quantize_model(model, config(kind), device_map=CPU)
        assert (model(**ids).logits - expected).norm() < 0.3 * expected.norm()


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_what_a_class_needs_in_float32_is_loaded_and_planned_so(half, tmp_path):
    class Net(nn.Module):
        _keep_in_fp32_modules = ["norm"]
        _keep_in_fp32_modules_strict = ["gate.weight"]

        def __init__(self):
            super().__init__()
            self.input_norm, self.gate, self.up = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    for make, fp32 in ((t5, {"wo"} if half == "float16" else set()),
                       (Net, {"input_norm", "gate"} if half == "float16" else {"gate"})):  # fmt: skip
        save_model(make(), tmp_path / make.__name__)
        model = load_checkpoint_and_dispatch(empty(make), tmp_path / make.__name__, CPU, dtype=half)
        loaded = {n.split(".")[-2] for n, p in model.named_parameters() if p.dtype == torch.float32}
        assert loaded == fp32
        planned = plan(empty(make), {"cpu": "1GiB"}, dtype=half).used["cpu"]
        assert planned == sum(parameter.nbytes for parameter in model.parameters())


def _times_ten(layer):
    layer.register_forward_hook(lambda module, inputs, output: output * 10)


def _plus_five(layer):
    layer.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] + 5,), kwargs), with_kwargs=True)


def _removed(layer):
    layer.handle = layer.register_forward_hook(lambda module, inputs, output: output * 10)


def _attribute(layer):
    layer.scale, layer.extra = 3.0, nn.Linear(64, 64)
    layer.register_buffer("shift", torch.ones(64))
    layer.register_forward_hook(lambda module, i, output: output * module.scale + module.shift + module.extra(output))


@pytest.mark.parametrize("change", [_times_ten, _plus_five, _removed, _attribute])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_what_users_put_on_a_layer_stays_on_it(kind, change):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8)).eval(), torch.randn(4, 64)
    change(model[0])
    with torch.no_grad():
        if change is _removed:  # a handle still finds its hook
            expected = model[2](model[1](nn.functional.linear(x, model[0].weight, model[0].bias)))
        else:
            expected = model(x)
        model = load_and_quantize_model(model, config(kind), device_map=CPU)
        if change is _removed:
            model[0].handle.remove()
        assert (model(x) - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("how", [
    "forward", "register_state_dict_post_hook", "register_load_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
])  # fmt: skip
def test_what_is_bound_to_a_layer_is_refused_before_anything_changes(how):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8))
    if how == "forward":
        model[1].forward = types.MethodType(lambda self, x: type(self).forward(self, x) * 3, model[1])
    else:
        getattr(model[1], how)(lambda *args: None)
    with pytest.raises(ValueError, match="'1.weight': the layer's forward was replaced or has hooks .* skip_modules"):
        load_and_quantize_model(model, config("int8"), device_map=CPU)
    assert type(model[0]) is nn.Linear
    load_and_quantize_model(model, config("int8", skip_modules=["1", "2"]), device_map=CPU)


def test_what_a_layer_does_not_save_is_not_saved_afterwards():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    for name, persistent in (("mask", False), ("mean", True)):
        model[0].register_buffer(name, torch.ones(64), persistent=persistent)
    state = load_and_quantize_model(model, config("nf4"), device_map=CPU).state_dict()
    assert model[0].mask.sum() == 64 and "0.mean" in state and "0.mask" not in state


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(
        ValueError, match="no layer of Sequential would be quantized: it has no nn.Linear and no Conv1D"
    ):
        load_and_quantize_model(nn.Sequential(nn.Conv2d(3, 3, 3)), config("int8"), device_map=CPU)
    with pytest.raises(ValueError, match="it has Linear, all of them kept"):
        load_and_quantize_model(nn.Sequential(nn.Linear(3, 3)), config("int8"), device_map=CPU)


@every_kind
def test_replacing_takes_the_weights_over_and_moving_quantizes(saved, kind):
    model, folder = saved
    full = model.transformer["h"][0].attn.c_attn.weight.clone()
    replaced = replace_with_bnb_layers(copy.deepcopy(model), config(kind))
    assert torch.equal(replaced.transformer["h"][0].attn.c_attn.weight, full)
    assert not states_equal(replaced.to("cpu"), load_and_quantize_model(empty(), config(kind), folder, CPU))
