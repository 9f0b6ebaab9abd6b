"""Checkpoints: there and back, against Transformers, Accelerate and the safetensors library, and with every fault."""

import gc
import json
import os
import signal
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from bigkit import init_empty_weights
from bigkit.checkpoints.format import INDEX, PICKLE, PICKLE_INDEX, SINGLE, Checkpoint, CheckpointError, read_header
from bigkit.checkpoints.load import load_checkpoint_in_model, load_state_dict
from bigkit.checkpoints.save import save_model


class Net(nn.Module):
    def __init__(self, width=16, depth=3, tie=True):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))
        self.embed = nn.Embedding(20, width)
        self.h = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 20, bias=False)
        self.register_buffer("cache", torch.arange(4.0), persistent=False)
        if tie:
            self.head.weight = self.embed.weight


def empty(**options):
    with init_empty_weights():
        return Net(**options)


def same(a, b):
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        first[n].dtype == second[n].dtype and torch.equal(first[n], second[n]) for n in first
    )


# ---------------------------------------------------------------------------------------------------------------------
# There and back


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("size", ["10GB", "3KB", 1])
def test_round_trip(tmp_path, safe, size):
    model, again = Net(), empty()
    save_model(model, tmp_path, size, safe)
    report = load_checkpoint_in_model(again, tmp_path, strict=True)
    assert report.clean and same(model, again)
    assert again.head.weight is again.embed.weight and isinstance(again.scale, nn.Parameter)
    names = {file.name for file in tmp_path.iterdir()}
    if size == "10GB":
        assert names == {SINGLE if safe else PICKLE}
    else:
        assert (INDEX if safe else PICKLE_INDEX) in names and not any(name.startswith(".") for name in names)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=8),
    st.integers(1, 400),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]),
)
def test_any_tensors_in_any_shards_come_back(tmp_path_factory, shapes, size, dtype):
    folder = tmp_path_factory.mktemp("any")

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            for i, shape in enumerate(shapes):
                self.register_buffer(f"t{i}", torch.ones(shape).mul(i).to(dtype))

    save_model(Bag(), folder, size)
    again = Bag()
    for name in list(again._buffers):
        again._buffers[name] = torch.zeros_like(again._buffers[name], dtype=torch.uint8).to(dtype)
    assert load_checkpoint_in_model(again, folder, strict=True).clean
    for name, tensor in Bag().named_buffers():
        assert again._buffers[name].dtype == dtype and torch.equal(tensor.float(), again._buffers[name].float())


def test_index_is_the_one_that_transformers_writes(tmp_path):
    save_model(Net(), tmp_path, "2KB")
    index = json.loads((tmp_path / INDEX).read_text())
    held = {name: file.name for file in tmp_path.glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == held and "head.weight" not in held
    assert index["metadata"]["total_size"] == sum(t.nbytes for n, t in Net().state_dict().items() if n != "head.weight")


def mapping(address):
    """The line of /proc/self/maps for an address: what is mapped there."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= address < last:
            return line


def test_cpu_tensors_are_the_pages_of_the_file(tmp_path):
    save_model(Net(), tmp_path)
    first, second = empty(), empty()
    load_checkpoint_in_model(first, tmp_path)
    for tensor in first.state_dict().values():
        assert str(tmp_path / SINGLE) in mapping(tensor.data_ptr())
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # not shared, which others would take for tied
    before = (tmp_path / SINGLE).read_bytes()
    with torch.no_grad():
        first.embed.weight.zero_()
    load_checkpoint_in_model(second, tmp_path)
    assert second.embed.weight.abs().sum() > 0 and (tmp_path / SINGLE).read_bytes() == before


def test_dtypes(tmp_path):
    model = Net()
    save_model(model, tmp_path)
    again = empty()
    load_checkpoint_in_model(again, tmp_path, dtype=torch.bfloat16, keep_in_fp32_modules=["norm"])
    assert again.h[0].weight.dtype == torch.bfloat16 and again.norm.weight.dtype == torch.float32
    assert again.norm.num_batches_tracked.dtype == torch.int64
    assert torch.equal(again.h[0].weight, model.h[0].weight.bfloat16())
    half = Net().half()
    load_checkpoint_in_model(half, tmp_path)
    assert half.scale.dtype == torch.float16  # the model's own


def test_a_real_parameter_stays_the_same_object(tmp_path):
    save_model(Net(), tmp_path)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    load_checkpoint_in_model(model, tmp_path)
    assert optimizer.param_groups[0]["params"][0] is model.scale


def test_parameters_that_share_a_storage_still_share_it(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = nn.Parameter(model["a"].weight.data)  # another object, the same numbers in memory
    save_model(model, tmp_path)
    assert list(load_file(tmp_path / SINGLE)) == ["a.weight"]
    with torch.no_grad():
        model["a"].weight.zero_()
    load_checkpoint_in_model(model, tmp_path, strict=True)
    assert model["b"].weight.data_ptr() == model["a"].weight.data_ptr() and model["b"].weight.abs().sum() > 0


def test_device_map_with_disk_leaves_ranges_of_the_original_file(tmp_path):
    model = Net()
    save_model(model, tmp_path)
    again = empty()
    device_map = {"scale": "cpu", "embed": "cpu", "h": "disk", "norm": "disk", "head": "cpu"}
    report = load_checkpoint_in_model(again, tmp_path, device_map)
    assert again.h[1].weight.is_meta and again.embed.weight.device.type == "cpu"
    assert again.norm.running_mean.device.type == "cpu" and "norm.weight" in report.on_disk
    where = report.on_disk["h.1.weight"]
    with open(where.file, "rb") as file:
        file.seek(where.offset)
        raw = torch.frombuffer(bytearray(file.read(where.nbytes)), dtype=where.dtype).view(where.shape)
    assert torch.equal(raw, model.h[1].weight)
    with pytest.raises(ValueError, match="no device for 'scale'"):
        load_checkpoint_in_model(empty(), tmp_path, {"h": "cpu"})
    with pytest.raises(ValueError, match="give an offload_folder"):
        load_checkpoint_in_model(empty(), tmp_path, device_map, dtype=torch.float16)
    report = load_checkpoint_in_model(empty(), tmp_path, device_map, tmp_path / "off", dtype=torch.float16)
    assert report.on_disk["h.1.weight"].dtype == torch.float16


def test_a_model_on_disk_is_saved_from_its_files(tmp_path):
    model = Net()
    save_model(model, tmp_path / "a", "2KB")
    again = empty()
    load_checkpoint_in_model(again, tmp_path / "a", {"": "disk"}, offload_buffers=True)
    assert all(tensor.is_meta for tensor in again.parameters())
    save_model(again, tmp_path / "b", "3KB")
    back = empty()
    assert load_checkpoint_in_model(back, tmp_path / "b", strict=True).clean and same(model, back)
    with pytest.raises(ValueError, match="rest in"):
        save_model(again, tmp_path / "a", "1KB", safe_serialization=False)
    save_model(again, tmp_path / "a", "1KB")  # over the files that it rests in
    save_model(again, os.path.relpath(tmp_path / "a"), "4KB")  # the same folder by another name
    save_model(again, tmp_path / "a", "2KB")
    assert load_checkpoint_in_model(back, tmp_path / "a", strict=True).clean and same(model, back)


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
    report = load_checkpoint_in_model(model, tmp_path)
    assert report.duplicates == ("weight",) and model.weight.sum() == 4


def test_fp8_with_scales_is_not_taken_for_weights(tmp_path):
    weight = torch.ones(4, 4).to(torch.float8_e4m3fn)
    save_file({"weight": weight, "weight_scale_inv": torch.ones(1), "bias": torch.zeros(4)}, tmp_path / SINGLE)
    report = load_checkpoint_in_model(nn.Linear(4, 4), tmp_path)
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
    with pytest.raises(ValueError, match="give an offload_folder"):
        load_checkpoint_in_model(disk, folder, {"": "disk"})
    report = load_checkpoint_in_model(disk, folder, {"": "disk"}, tmp_path / "off")
    assert report.clean and "model.layers.0.mlp.experts.gate_up_proj" in report.on_disk
    save_model(disk, tmp_path / "ours", "20KB")
    config.save_pretrained(tmp_path / "ours")
    assert same(ours, cls.from_pretrained(tmp_path / "ours"))


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
    state["model.layers.0.mlp.experts.3.w2.weight_scale_inv"] = torch.ones(1)
    save_file(state, tmp_path / SINGLE)
    report = load_checkpoint_in_model(ours, tmp_path)
    assert report.wrong_dtype == (("model.layers.0.mlp.experts.down_proj", "float8_e4m3fn", "float32"),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("safe", [True, False])
def test_accelerate_and_we_read_each_other(tmp_path, safe, dtype):
    import accelerate

    model = Net().to(dtype)
    save_model(model, tmp_path / "ours", "2KB", safe)
    again = empty().to(dtype)
    accelerate.load_checkpoint_in_model(again, str(tmp_path / "ours"), device_map={"": "cpu"})
    again.tie_weights = lambda: None
    again.head.weight = again.embed.weight
    assert same(model, again)
    accelerate.Accelerator(cpu=True).save_model(model, str(tmp_path / "theirs"), "2KB", safe)
    ours = empty().to(dtype)
    assert load_checkpoint_in_model(ours, tmp_path / "theirs", strict=True).clean and same(model, ours)
    accelerate.Accelerator(cpu=True).save_model(ours, str(tmp_path / "passed on"), "2KB", safe)
    again = empty().to(dtype)
    assert load_checkpoint_in_model(again, tmp_path / "passed on", strict=True).clean and same(model, again)


def test_load_state_dict(tmp_path):
    model = Net()
    save_model(model, tmp_path, "2KB")
    state = load_state_dict(tmp_path, {"": "cpu"})
    assert state.keys() == model.state_dict().keys() - {"head.weight"}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())


# ---------------------------------------------------------------------------------------------------------------------
# Faults


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    save_model(Net(), folder, "2KB")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@settings(max_examples=4000, deadline=None)
@given(st.data())
def test_broken_checkpoints_give_one_clear_error(tmp_path_factory, good, data):
    """Flipped, cut, inserted and swapped bytes, in headers, indexes and data: right values or CheckpointError."""
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    files = dict(good)
    victim = data.draw(st.sampled_from(sorted(files)))
    content = bytearray(files[victim])
    header = 8 + int.from_bytes(content[:8], "little") if victim.endswith("safetensors") else len(content)
    place = data.draw(st.integers(0, min(header, len(content)) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "length", "missing", "digits", "text"]))
    if kind == "flip":
        content[place] = data.draw(st.integers(0, 255))
    elif kind == "cut":
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    elif kind == "insert":
        content[place:place] = data.draw(st.binary(min_size=1, max_size=9))
    elif kind == "length":
        content[:8] = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    elif kind == "digits":
        digits = [i for i in range(header) if chr(content[i]).isdigit()]
        content[data.draw(st.sampled_from(digits))] = ord(data.draw(st.sampled_from("0123456789-.e")))
    elif kind == "text":
        old = data.draw(
            st.sampled_from([b"F32", b"shape", b"data_offsets", b"weight_map", b".safetensors", b"model", b"["])
        )
        new = data.draw(
            st.sampled_from([b"F16", b"../../x", b"/etc/passwd", b"null", b"{", b"I64", b"{}", b"[[", b"\\u0000"])
        )
        content = bytearray(bytes(content).replace(old, new, 1))
    files[victim] = bytes(content)
    for name, body in files.items():
        if kind != "missing" or name != victim:
            (folder / name).write_bytes(body)
    model = empty()
    try:
        report = load_checkpoint_in_model(model, folder)
    except (CheckpointError, FileNotFoundError) as error:
        assert str(folder) in str(error) and "\n" not in str(error)
        assert all(parameter.is_meta for parameter in model.parameters())
        return
    for name, tensor in model.state_dict().items():
        assert name in report.missing or tensor.is_meta or tensor.sum() is not None
    assert isinstance(str(report), str)


@settings(max_examples=3000, deadline=None)
@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(0, 300)))
def test_random_bytes_are_no_safetensors_file(tmp_path_factory, body, length):
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes((length.to_bytes(8, "little") if length is not None else b"") + body)
    try:
        theirs = set(load_file(path))
    except Exception:
        theirs = None
    try:
        ours = set(read_header(path))
    except CheckpointError:
        ours = None
    assert ours == theirs or theirs is None


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "I8", "F99", 7]),
        "shape": st.one_of(st.lists(st.integers(-1, 4), max_size=2), st.just("x"), st.just([2**63])),
        "data_offsets": st.one_of(st.lists(st.integers(-4, 40), min_size=2, max_size=2), st.just([0]), st.just(None)),
    }
)


@settings(max_examples=3000, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), ENTRY, max_size=3), st.integers(0, 40))
def test_whatever_we_accept_the_library_reads_alike(tmp_path_factory, header, size):
    path = tmp_path_factory.getbasetemp() / "entries.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(size)))
    try:
        ours = Checkpoint.open(path)
    except CheckpointError:
        return
    theirs = load_file(path)
    assert set(theirs) == set(ours)
    for name, tensor in theirs.items():
        assert torch.equal(ours.read(name).reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/../../x.bin", "", 7, None, "x.txt", "C:x.bin", "a\\b.bin"]
)
def test_an_index_cannot_point_out_of_its_folder(tmp_path, name):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"weight": name}}))
    with pytest.raises(CheckpointError, match="weight"):
        Checkpoint.open(tmp_path)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/bigkit-evil",))


def test_pickles_run_no_code(tmp_path):
    Path("/tmp/bigkit-evil").unlink(missing_ok=True)
    torch.save({"weight": Evil()}, tmp_path / PICKLE)
    with pytest.raises(CheckpointError, match="cannot be loaded|can be loaded safely"):
        load_checkpoint_in_model(nn.Linear(2, 2), tmp_path)
    assert not Path("/tmp/bigkit-evil").exists()


def test_nothing_to_load(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        Checkpoint.open(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        Checkpoint.open(tmp_path / "x.safetensors")
    for name in "ab":
        save_file({"w": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="several files and no index"):
        Checkpoint.open(tmp_path)


def test_safetensors_come_before_pickles(tmp_path):
    torch.save({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, tmp_path / PICKLE)
    save_file({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, tmp_path / SINGLE)
    model = nn.Linear(2, 2)
    load_checkpoint_in_model(model, tmp_path)
    assert model.weight.sum() == 4


# ---------------------------------------------------------------------------------------------------------------------
# Saving safely

FORMATS = [("10GB", True), ("1KB", True), ("10GB", False), ("1KB", False)]


@pytest.mark.parametrize("before", FORMATS)
@pytest.mark.parametrize("after", FORMATS)
def test_a_new_checkpoint_replaces_any_old_one(tmp_path, before, after):
    (tmp_path / "config.json").write_text("{}")
    save_model(Net(), tmp_path, *before)
    model = Net()
    save_model(model, tmp_path, *after)
    again = empty()
    assert load_checkpoint_in_model(again, tmp_path, strict=True).clean and same(model, again)
    held = {file.name for file in tmp_path.iterdir()} - {"config.json"}
    source = Checkpoint.open(tmp_path)
    assert held == {file.name for file in source.files} | ({INDEX, PICKLE_INDEX} & held)
    assert len(held & {SINGLE, INDEX, PICKLE, PICKLE_INDEX}) == 1


def test_meta_and_bad_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'scale', 'embed.weight'.* on meta"):
        save_model(empty(), tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        save_model(Net(), tmp_path / "file")
    with pytest.raises(ValueError, match="at least one byte"):
        save_model(Net(), tmp_path, 0)


def test_a_failing_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    old = Net()
    save_model(old, tmp_path, "1KB")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    import bigkit.checkpoints.save as module

    calls = []

    def full(tensors, file):
        calls.append(file)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        save_file(tensors, file)

    monkeypatch.setattr(module, "_write_safetensors", full)
    with pytest.raises(OSError, match="No space left on device.*untouched"):
        save_model(Net(), tmp_path, "1KB")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.terminal_size((0, 0)) and type("U", (), {"free": 10})())
    with pytest.raises(OSError, match="no room for the checkpoint"):
        save_model(Net(), tmp_path, "1KB")


@pytest.mark.parametrize("safe", [True, False])
def test_a_file_that_cannot_grow_leaves_the_old_checkpoint(tmp_path, safe):
    """What a full disk does to the libraries that write: here the limit is one of the process."""
    import resource

    old = Net()
    save_model(old, tmp_path, "1KB", safe)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not save to .*model.*untouched"):
            save_model(nn.Linear(2000, 1000), tmp_path, safe_serialization=safe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


TOUCHES_DISK = ("open", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "chmod")


def filled(value):
    net = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
    for parameter in net.parameters():
        nn.init.constant_(parameter, value)
    return net


def save_and_die(folder, size, point):
    """Save in a child that kills itself before or after the given call that touches the disk; whether it got there."""
    child = os.fork()
    if child == 0:
        steps = iter(range(10**6))

        def traced(real):
            def stepped(*arguments, **options):
                if next(steps) == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = real(*arguments, **options)
                if next(steps) == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return stepped

        try:
            for name in TOUCHES_DISK:
                setattr(os, name, traced(getattr(os, name)))
            save_model(filled(2.0), folder, size)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_killed_saver_leaves_the_old_checkpoint_or_the_new_one(tmp_path):
    """SIGKILL before and after every call that touches the disk, over three kinds of saves."""
    killed, seen = 0, set()
    for old_size, new_size in (("1200", "1200"), ("1GB", "1200"), ("1200", "1GB")):
        for point in range(10**6):
            folder = tmp_path / f"{old_size}-{new_size}-{point}"
            save_model(filled(1.0), folder, old_size)
            died = save_and_die(folder, new_size, point)
            again = filled(0.0)
            assert load_checkpoint_in_model(again, folder, strict=True).clean
            values = {float(parameter.detach().unique()) for parameter in again.parameters()}
            assert len(values) == 1 and values <= {1.0, 2.0}, (point, values)
            seen |= values
            save_model(filled(3.0), folder, new_size)  # the next save clears up what the dead one left
            assert not list(folder.glob(".saving-*"))
            if not died:
                break
            killed += 1
    assert killed >= 50 and seen == {1.0, 2.0}


def test_saving_while_a_model_uses_the_old_pages(tmp_path):
    save_model(Net(), tmp_path, "1KB")
    user = empty()
    load_checkpoint_in_model(user, tmp_path)
    before = {name: tensor.clone() for name, tensor in user.state_dict().items()}
    save_model(Net(), tmp_path, "1KB")
    assert all(torch.equal(before[name], tensor) for name, tensor in user.state_dict().items())


def test_a_loaded_model_goes_when_it_is_let_go(tmp_path):
    """No cycle keeps its pages until garbage is collected."""
    save_model(Net(), tmp_path)
    model = empty()
    load_checkpoint_in_model(model, tmp_path)
    gone = weakref.ref(model.embed)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
