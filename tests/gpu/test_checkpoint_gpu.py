"""Loading to a real GPU: the same bytes as on the CPU, whatever the chunk, and little memory on the host."""

import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bigkit import init_empty_weights
from bigkit.checkpoints.format import Checkpoint
from bigkit.checkpoints.load import load_checkpoint_in_model
from bigkit.checkpoints.save import save_model
from bigkit.checkpoints.state_dict import load_state_dict
from bigkit.checkpoints.to_gpu import read_to_gpu

GPU = torch.device("cuda:0")


@pytest.fixture
def mixed(tmp_path):
    torch.manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]
    for f in range(3):
        tensors = {}
        for i in range(40):
            shape = [(), (0,), (3,), (1000, 7), (513, 257), (1, 1), (5,)][i % 7]
            tensors[f"{f}.{i}"] = torch.randint(0, 2, shape).to(dtypes[(i * 3 + f) % len(dtypes)])
        tensors[f"{f}.big"] = torch.randn(2000, 1500)
        save_file(tensors, tmp_path / f"part{f}.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("chunk", "ring", "readers"), [(4096, 2, 1), (100_003, 3, 4), (1 << 20, 1, 1), (16 << 20, 12, 12)]
)
def test_bytes_are_those_of_the_file(mixed, chunk, ring, readers):
    for f in range(3):
        source = Checkpoint.open(mixed / f"part{f}.safetensors")
        found = read_to_gpu(source.stored, GPU, chunk=chunk, ring=ring, readers=readers)
        for name, tensor in found.items():
            expected = source.read(name)
            assert tensor.device == GPU and tensor.dtype == expected.dtype and tensor.shape == expected.shape
            assert torch.equal(tensor.cpu().float(), expected.float()), name
        casts = dict.fromkeys(source.stored, torch.bfloat16)
        for name, tensor in read_to_gpu(source.stored, GPU, casts, chunk=chunk, ring=ring, readers=readers).items():
            assert torch.equal(tensor.cpu(), source.read(name).to(torch.bfloat16)), name


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(1000, 512)
        self.h = nn.ModuleList([nn.Linear(512, 512) for _ in range(20)])
        self.norm = nn.BatchNorm1d(512)
        self.head = nn.Linear(512, 1000, bias=False)
        self.head.weight = self.embed.weight


def test_a_model_on_a_gpu_cpu_and_disk_map(tmp_path):
    model = Net()
    save_model(model, tmp_path, "2MB")
    with init_empty_weights():
        empty = Net()
    report = load_checkpoint_in_model(empty, tmp_path, {"embed": 0, "h": 0, "norm": "cpu", "head": 0}, dtype="bfloat16")
    assert report.clean and empty.head.weight is empty.embed.weight and empty.embed.weight.device == GPU
    for name, tensor in empty.state_dict().items():
        expected = model.state_dict()[name]
        assert torch.equal(tensor.cpu(), expected.to(tensor.dtype)) and tensor.dtype != torch.float32
    assert load_state_dict(tmp_path, {"": 0})["h.3.bias"].device == GPU


def test_a_model_on_the_gpu_can_be_saved_and_loaded_in_place(tmp_path):
    model = Net().cuda()
    save_model(model, tmp_path, "2MB")
    weight, before = model.h[0].weight, model.h[0].weight.clone()
    with torch.no_grad():
        weight.zero_()
    load_checkpoint_in_model(model, tmp_path, strict=True)
    assert model.h[0].weight is weight and torch.equal(weight, before)


def test_a_file_cut_after_it_was_checked_is_an_error_and_leaves_the_model(tmp_path):
    save_file({"weight": torch.randn(4000, 4000)}, tmp_path / "model.safetensors")
    source = Checkpoint.open(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 1_000_000)
    with pytest.raises(OSError, match="is shorter than it was"):
        read_to_gpu(source.stored, GPU)
    torch.cuda.synchronize()


def test_busy_streams_see_finished_weights(tmp_path):
    """Loads while other kernels run on the current stream, many times: no tensor is used before it has arrived."""
    weight = torch.randn(3000, 3000)
    save_file({"weight": weight}, tmp_path / "model.safetensors")
    source = Checkpoint.open(tmp_path)
    expected = weight.cuda().sum()
    work = torch.randn(4096, 4096, device=GPU)
    for _ in range(20):
        work = work @ work * 1e-4
        assert torch.equal(read_to_gpu(source.stored, GPU, chunk=1 << 20)["weight"].sum(), expected)


def test_experts_that_transformers_saves_apart_are_put_together_on_the_gpu(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        intermediate_size=48, num_local_experts=12,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    with init_empty_weights():
        empty = transformers.MixtralForCausalLM._from_config(config)
    assert load_checkpoint_in_model(empty, tmp_path, {"": 0}, dtype="bfloat16").clean
    for name, tensor in empty.state_dict().items():
        assert tensor.device == GPU and torch.equal(tensor.cpu(), model.state_dict()[name].bfloat16()), name


def test_small_tensors_have_storages_of_their_own(tmp_path):
    save_file({f"t{i}": torch.full((i % 7, 3), float(i)) for i in range(300)}, tmp_path / "model.safetensors")
    found = read_to_gpu(Checkpoint.open(tmp_path).stored, GPU)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in found.values())
    assert all(
        torch.equal(tensor.cpu(), torch.full((i % 7, 3), float(i)))
        for i, tensor in ((int(n[1:]), t) for n, t in found.items())
    )
