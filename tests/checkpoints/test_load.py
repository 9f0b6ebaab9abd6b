"""Loading: pages of files, dtypes, identity, device maps, and Accelerate."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bigkit.checkpoints.index import SINGLE
from bigkit.checkpoints.load import load_checkpoint_in_model
from bigkit.checkpoints.save import save_model
from bigkit.checkpoints.state_dict import load_state_dict
from tests.checkpoints.nets import Net, empty, same


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


@pytest.mark.parametrize("device_map", [None, {"": "cpu"}, {"": "disk"}])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_integers_take_the_dtype_of_the_model(tmp_path, dtype, device_map):
    """As torch's own load_state_dict and Accelerate's set_module_tensor_to_device cast them."""
    model = nn.Module()
    model.register_buffer("ids", torch.arange(3))
    model.register_buffer("mask", torch.ones(2, dtype=torch.bool))
    save_file({"ids": torch.arange(3, dtype=torch.int32), "mask": torch.tensor([0, 2])}, tmp_path / SINGLE)
    expected = nn.Module()
    expected.register_buffer("ids", torch.zeros(3, dtype=torch.int64))
    expected.register_buffer("mask", torch.ones(2, dtype=torch.bool))
    expected.load_state_dict(load_file(tmp_path / SINGLE))
    options = {"dtype": dtype, "offload_buffers": True, "offload_folder": tmp_path / "off"}
    assert load_checkpoint_in_model(model, tmp_path, device_map, **options).clean
    save_model(model, tmp_path / "saved")
    state = load_state_dict(tmp_path / "saved")
    assert state["ids"].dtype == torch.int64 and state["mask"].dtype == torch.bool
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.named_buffers())


@pytest.mark.parametrize("theirs, ours", [("int64", "float32"), ("float32", "int64"), ("complex64", "float32"),
                                          ("complex64", "int64"), ("float32", "complex64")])  # fmt: skip
def test_no_cast_between_kinds_of_numbers(tmp_path, theirs, ours):
    model = nn.Module()
    model.register_buffer("x", torch.zeros(2, dtype=getattr(torch, ours)))
    save_file({"x": torch.ones(2, dtype=getattr(torch, theirs))}, tmp_path / SINGLE)
    with pytest.warns(UserWarning, match="does not fit"):
        assert load_checkpoint_in_model(model, tmp_path).wrong_dtype == (("x", theirs, ours),)
    assert model.x.dtype == getattr(torch, ours) and not model.x.any()


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
