"""Checkpoints of Transformers whose tensors are named or cut otherwise than the model's, and what does not match."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bigkit import init_empty_weights, load_checkpoint_and_dispatch
from bigkit.checkpoints.format import CheckpointError
from bigkit.checkpoints.index import INDEX, PICKLE, SINGLE
from bigkit.checkpoints.load import load_checkpoint_in_model
from bigkit.checkpoints.save import save_model
from bigkit.checkpoints.state_dict import load_state_dict
from tests.checkpoints.nets import Net, same

# ---------------------------------------------------------------------------------------------------------------------
# What does not match


def test_the_report_names_everything_at_once(tmp_path):
    state = dict(Net().state_dict())
    del state["norm.bias"], state["head.weight"]
    state["h.0.weight"] = torch.zeros(2, 2)
    state["h.1.weight"] = torch.zeros(16, 16, dtype=torch.int32)
    state["stranger"] = torch.zeros(1)
    save_file(state, tmp_path / SINGLE)
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_checkpoint_in_model(model, tmp_path, strict=True)
    for said in ("norm.bias", "h.0.weight", "(2, 2)", "(16, 16)", "int32", "stranger"):
        assert said in str(error.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.warns(UserWarning, match="1 tensors missing, 1 unknown, 2 of another kind"):
        report = load_checkpoint_in_model(model, tmp_path)
    assert report.missing == ("norm.bias",) and report.unexpected == ("stranger",)
    assert [name for name, *_ in report.mismatched] == ["h.0.weight"]
    assert [name for name, *_ in report.wrong_dtype] == ["h.1.weight"]
    assert torch.equal(model.embed.weight, state["embed.weight"]) and torch.equal(
        model.h[0].weight, before["h.0.weight"]
    )


def test_duplicates_are_reported_and_the_index_decides(tmp_path):
    save_file({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, tmp_path / "a.safetensors")
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "b.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight": "b.safetensors", "bias": "a.safetensors"}))  # a bare index
    model = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="in more than one file: 'weight'"):
        report = load_checkpoint_in_model(model, tmp_path)
    assert report.duplicates == ("weight",) and model.weight.sum() == 4


def test_fp8_with_scales_is_not_taken_for_weights(tmp_path):
    weight = torch.ones(4, 4).to(torch.float8_e4m3fn)
    save_file({"weight": weight, "weight_scale_inv": torch.ones(1), "bias": torch.zeros(4)}, tmp_path / SINGLE)
    own = type("Own", (nn.Linear,), {})  # what its forward does with a weight is not known, so none is decoded for it
    with pytest.warns(UserWarning, match="wrong dtype: 'weight'"):
        report = load_checkpoint_in_model(own(4, 4), tmp_path)
    assert report.wrong_dtype == (("weight", "float8_e4m3fn", "float32"),)


def test_patterns_of_the_class_are_ignored(tmp_path):
    save_file({"weight": torch.zeros(2, 2), "bias": torch.zeros(2), "attn.bias": torch.zeros(1)}, tmp_path / SINGLE)
    model = nn.Linear(2, 2)
    model._keys_to_ignore_on_load_unexpected = [r"attn\.bias"]
    assert load_checkpoint_in_model(model, tmp_path, strict=True).clean


# ---------------------------------------------------------------------------------------------------------------------
# With others


def tiny_models():
    import transformers as tf

    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
        "intermediate_size": 48,
    }
    yield "gpt2", tf.GPT2LMHeadModel, tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)
    yield "llama", tf.LlamaForCausalLM, tf.LlamaConfig(**small, num_key_value_heads=2)
    yield "bert", tf.BertForMaskedLM, tf.BertConfig(**small, max_position_embeddings=32)
    yield (
        "t5",
        tf.T5ForConditionalGeneration,
        tf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64),
    )
    yield "mixtral", tf.MixtralForCausalLM, tf.MixtralConfig(**small, num_key_value_heads=2, num_local_experts=12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "mixtral"])
def test_transformers_and_we_read_each_other(tmp_path, name, dtype):
    cls, config = {n: (cls, config) for n, cls, config in tiny_models()}[name]
    torch.manual_seed(0)
    model = cls(config).to(dtype).eval()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    with init_empty_weights():
        ours = cls._from_config(config)
    load_checkpoint_in_model(ours, tmp_path / "theirs", dtype=dtype)
    ours.tie_weights()
    assert same(model, ours)
    save_model(model, tmp_path / "ours", "20KB")
    config.save_pretrained(tmp_path / "ours")
    again = cls.from_pretrained(tmp_path / "ours", dtype=dtype)
    assert same(model, again)


def test_fp8_weights_with_scales_go_both_ways(tmp_path):
    """A tied Llama of float8 blocks and their scales: Transformers, Accelerate and we read the same bytes."""
    import accelerate
    import transformers as tf
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
    config = tf.LlamaConfig(**sizes, intermediate_size=48, tie_word_embeddings=True)
    fp8 = tf.FineGrainedFP8Config(weight_block_size=(16, 16))

    def built():
        with init_empty_weights():
            model = tf.LlamaForCausalLM(config)
            replace_with_fp8_linear(model, ["lm_head"], fp8, pre_quantized=True)
        return model

    def raw(model):
        return {name: (tensor.dtype, tensor.view(torch.uint8).tolist()) for name, tensor in model.state_dict().items()}

    theirs = built().to_empty(device="cpu")
    for parameter in theirs.parameters():
        parameter.data = torch.rand(parameter.shape).to(parameter.dtype)
    theirs.tie_weights()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    ours = built()
    assert load_checkpoint_in_model(ours, tmp_path / "theirs", strict=True).clean
    assert raw(ours) == raw(theirs) and ours.lm_head.weight is ours.model.embed_tokens.weight
    assert ours.model.layers[0].mlp.up_proj.weight.dtype == torch.float8_e4m3fn

    save_model(ours, tmp_path / "ours", "10KB")
    again = built()
    accelerate.load_checkpoint_in_model(again, str(tmp_path / "ours"), device_map={"": "cpu"})
    again.tie_weights()
    assert raw(again) == raw(theirs)
    config.quantization_config = fp8.to_dict()
    config.save_pretrained(tmp_path / "ours")
    plain = tf.LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)  # without a GPU: dequantized
    weight, scale = (getattr(ours.model.layers[0].mlp.up_proj, name).float() for name in ("weight", "weight_scale_inv"))
    expected = weight * scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
    if not torch.cuda.is_available():
        torch.testing.assert_close(plain.model.layers[0].mlp.up_proj.weight, expected.bfloat16())


@pytest.mark.filterwarnings("ignore:.* does not fit")
@pytest.mark.parametrize("safe", [True, False])
def test_experts_that_transformers_saves_apart_are_put_together(tmp_path, safe):
    """Transformers fuses experts when it loads and cuts them when it saves: a file's names are not the model's."""
    cls, config = {n: (cls, config) for n, cls, config in tiny_models()}["mixtral"]
    model = cls(config).eval()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    held = {name for file in (tmp_path / "theirs").glob("*.safetensors") for name in load_file(file)}
    assert any("experts.11.w1.weight" in name for name in held)
    if not safe:
        state = {
            name: tensor
            for file in (tmp_path / "theirs").glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        torch.save(state, tmp_path / PICKLE)
    with init_empty_weights():
        ours, half, base, disk = (cls._from_config(config) for _ in range(4))
    folder = tmp_path / "theirs" if safe else tmp_path / PICKLE
    assert load_checkpoint_in_model(ours, folder, strict=True).clean and same(model, ours)
    assert load_checkpoint_in_model(half, folder, dtype="bfloat16").clean and same(model.bfloat16(), half)
    report = load_checkpoint_in_model(base.model, folder)
    assert report.unexpected == ("lm_head.weight",) and not report.missing
    if not safe:  # ranges of safetensors files serve as they are
        with pytest.raises(ValueError, match="give an offload_folder"):
            load_checkpoint_in_model(disk, folder, {"": "disk"})
    report = load_checkpoint_in_model(disk, folder, {"": "disk"}, tmp_path / "off")
    assert (tmp_path / "off").exists() == (not safe)
    assert report.clean and "model.layers.0.mlp.experts.gate_up_proj" in report.on_disk
    save_model(disk, tmp_path / "ours", "20KB")
    config.save_pretrained(tmp_path / "ours")
    assert same(ours, cls.from_pretrained(tmp_path / "ours"))


@pytest.mark.filterwarnings("ignore:.* does not fit")
def test_old_names_are_renamed_and_rest_where_they_are(tmp_path):
    """Files of older BERTs say gamma and beta; a tensor that has its present name as well keeps that one."""
    cls, config = {n: (cls, config) for n, cls, config in tiny_models()}["bert"]
    model = cls(config)
    state = {n: t for n, t in model.state_dict().items() if "decoder" not in n}
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma"): t.clone() for n, t in state.items()}
    both = {"cls.predictions.transform.LayerNorm.weight": torch.full((32,), 7.0)}
    save_file(old | both, tmp_path / SINGLE)
    with init_empty_weights():
        ours, disk = cls._from_config(config), cls._from_config(config)
    report = load_checkpoint_in_model(ours, tmp_path)
    assert not report.missing and report.unexpected == ("cls.predictions.transform.LayerNorm.gamma",)
    assert ours.cls.predictions.transform.LayerNorm.weight.mean() == 7
    assert torch.equal(ours.bert.embeddings.LayerNorm.weight, model.bert.embeddings.LayerNorm.weight)
    report = load_checkpoint_in_model(disk, tmp_path, {"": "disk"})
    assert report.on_disk["bert.embeddings.LayerNorm.weight"].file == tmp_path / SINGLE


@pytest.mark.filterwarnings("ignore:.* does not fit")
def test_experts_that_do_not_fit_together_are_reported(tmp_path):
    cls, config = {n: (cls, config) for n, cls, config in tiny_models()}["mixtral"]
    cls(config).save_pretrained(tmp_path)
    state = load_file(tmp_path / SINGLE)
    state = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in state.items()}
    del state["model.layers.0.mlp.experts.7.w3.weight"]  # one of two that become one
    state = {name: tensor for name, tensor in state.items() if "layers.1.mlp.experts.11." not in name}
    save_file(state, tmp_path / SINGLE)
    with init_empty_weights():
        ours = cls._from_config(config)
    report = load_checkpoint_in_model(ours, tmp_path)
    assert report.missing == ("model.layers.0.mlp.experts.gate_up_proj",)
    assert {name[-9:] for name in report.unexpected} == {"w1.weight", "w3.weight"}
    short = {f"model.layers.1.mlp.experts.{own}" for own in ("gate_up_proj", "down_proj")}
    assert {(name, shape[0], wanted[0]) for name, shape, wanted in report.mismatched} == {(n, 11, 12) for n in short}
    state = {n: t.to(torch.float8_e4m3fn) if "layers.0" in n and ".w2." in n else t for n, t in state.items()}
    state["model.layers.0.mlp.experts.3.w2.weight_scale_inv"] = torch.ones(1)  # of one expert alone
    save_file(state, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="one by one in few bits .*experts.3.w2.weight.* cannot be stacked"):
        load_checkpoint_in_model(ours, tmp_path)


def prefixed(prefix):
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def under(*keys):
    def nest(state):
        for key in reversed(keys):
            state = {key: state, "optimizer": {"state": {0: {"step": torch.ones(())}}, "lr": 1.0}, "epoch": 3}
        return state

    return nest


def inner(state):
    return {name.removeprefix("0."): tensor for name, tensor in state.items()}


UNLIKE = [
    (under("model"), "key='model'"),
    (under("state_dict"), "key='state_dict'"),
    (under("ema", "weights"), "key='ema.weights'"),
    (prefixed("module."), "prefix='module.'"),
    (prefixed("_orig_mod."), "prefix='_orig_mod.'"),
    (lambda state: under("state_dict")(prefixed("model.net.")(state)), "key='state_dict', prefix='model.net.'"),
    (inner, "loading into the model's part '0'"),
    (lambda state: under("module")(inner(state)), "key='module' and loading into the model's part '0'"),
]


@pytest.mark.parametrize(("change", "advice"), UNLIKE)
@pytest.mark.parametrize("dispatch", [False, True])
def test_a_warning_says_what_would_find_the_weights(tmp_path, change, advice, dispatch):
    def net():
        return nn.Sequential(nn.Linear(3, 3))

    good, model, file = net(), net(), tmp_path / "last.pt"
    torch.save(change(good.state_dict()), file)
    load = load_checkpoint_and_dispatch if dispatch else load_checkpoint_in_model
    message = (
        f"last.pt does not fit Sequential; .*2 tensors missing.*'0.weight', '0.bias'.*{advice} would find 2 of the 2"
    )
    with pytest.warns(UserWarning, match=message):
        load(model, file, {"": "cpu"})
    with pytest.raises(CheckpointError, match=f"{advice} would find 2 of the 2"):
        load(model, file, {"": "cpu"}, strict=True)
    if "part" not in advice:
        options = dict(option.split("=") for option in advice.replace("'", "").split(", "))
        load(model, file, {"": "cpu"}, strict=True, **options)
        assert torch.equal(model[0].weight, good[0].weight)
        assert torch.equal(load_state_dict(file, **options)["0.weight"], good[0].weight)


def test_a_key_that_is_not_there_is_an_error_that_names_those_that_are(tmp_path):
    torch.save({"model": nn.Linear(3, 3).state_dict()}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="no tensors under 'state_dict', but under 'model'"):
        load_checkpoint_in_model(nn.Linear(3, 3), tmp_path / "last.pt", key="state_dict")


@pytest.mark.parametrize("saved", [nn.Linear(3, 3, bias=False), nn.Linear(3, 4), nn.Bilinear(3, 3, 3), nn.Sequential()])
def test_no_difference_is_silent(tmp_path, saved):
    torch.save(saved.state_dict(), tmp_path / "last.pt")
    with pytest.warns(UserWarning, match="last.pt does not fit Linear"):
        assert not load_checkpoint_in_model(nn.Linear(3, 3), tmp_path / "last.pt").clean
