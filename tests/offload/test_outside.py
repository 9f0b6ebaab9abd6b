"""A tensor that modules share stays one tensor if they are sent away one by one, or if one of them stays."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bigkit import cpu_offload, disk_offload, load_checkpoint_in_model, save_model
from bigkit.accelerate.hooks import attach_align_device_hook, attach_align_device_hook_on_blocks
from bigkit.offload._torch import WatchedParameter
from bigkit.offload.dispatch import dispatch_model
from bigkit.offload.handle import Away
from bigkit.offload.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from tests.spread import Tied

IDS = torch.arange(5)
GPU = {"stand_in": {0: "cpu", 1: "cpu:0"}}


def by_hooks(model, folder):
    attach_align_device_hook(model, "cpu", offload=True)


def by_hooks_with_a_map(model, folder):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    meta = nn.Parameter(torch.empty(8, 4, device="meta"))
    model.embed.weight = model.head.weight = meta
    attach_align_device_hook(model, "cpu", offload=True, weights_map=state)


def on_blocks(model, folder):
    devices = dict.fromkeys(("embed", "mid", "head"), "cpu")
    attach_align_device_hook_on_blocks(model, devices, {"embed": True, "mid": False, "head": True})


def on_some_blocks(model, folder):
    devices = dict.fromkeys(("embed", "mid", "head"), "cpu")
    attach_align_device_hook_on_blocks(model, devices, {"embed": False, "mid": True, "head": True})


def each_to_ram(model, folder):
    for part in model.children():
        cpu_offload(part, 0, **GPU)


def each_to_ram_for_another_device(model, folder):
    cpu_offload(model.head, 1, **GPU)
    cpu_offload(model.embed, 0, **GPU)


def each_to_disk(model, folder):
    for name, part in model.named_children():
        disk_offload(part, folder / name, 0, **GPU)


def ram_and_disk(model, folder):
    disk_offload(model.embed, folder / "embed", 0, **GPU)
    cpu_offload(model.head, "cpu")


def head_to_ram(model, folder):
    cpu_offload(model.head, 0, **GPU)


def embed_to_disk(model, folder):
    disk_offload(model.embed, folder / "embed", 0, **GPU)


def head_stays_by_a_map(model, folder):
    cpu_offload(model.embed, 0, **GPU)
    dispatch_model(model.head, {"": 0}, force_hooks=True, **GPU)


def whole_and_then_a_part(model, folder):
    cpu_offload(model, 0, **GPU)
    cpu_offload(model.head, 1, **GPU)


def whole_and_then_a_part_stays(model, folder):
    disk_offload(model, folder / "all", 0, **GPU)
    dispatch_model(model.embed, {"": "cpu"}, force_hooks=True)


def part_and_then_the_whole(model, folder):
    cpu_offload(model.head, 0, **GPU)
    dispatch_model(model, {"embed": 0, "mid": "disk", "head": "cpu"}, offload_dir=folder / "all", **GPU)


def hook_taken_away(model, folder):
    cpu_offload(model, 0, **GPU)
    remove_hook_from_module(model.embed)


def kept_in_a_variable(model, folder):
    model.variable = [model.head.weight]
    cpu_offload(model, 0, **GPU)


WAYS = [
    by_hooks, by_hooks_with_a_map, on_blocks, on_some_blocks, each_to_ram, each_to_ram_for_another_device, each_to_disk,
    ram_and_disk, head_to_ram, embed_to_disk, head_stays_by_a_map, whole_and_then_a_part, whole_and_then_a_part_stays,
    part_and_then_the_whole, hook_taken_away, kept_in_a_variable,
]  # fmt: skip


def new() -> torch.Tensor:
    return Tied(1).embed.weight.detach()


def load_one_name(model, folder):
    model.load_state_dict({"embed.weight": new()}, strict=False)


EDITS = {
    "nothing": lambda model, folder: None,
    "checkpoint": lambda model, folder: load_checkpoint_in_model(model, folder),
    "state dict": lambda model, folder: model.load_state_dict(Tied(1).state_dict()),
    "state dict with one name": load_one_name,
    "mul_": lambda model, folder: model.embed.weight.mul_(2),
    "copy_": lambda model, folder: model.head.weight.copy_(new()),
    "an element": lambda model, folder: model.embed.weight.__setitem__((0, 0), 7.0),
    "data": lambda model, folder: setattr(model.embed.weight, "data", new().clone()),
    "other data": lambda model, folder: setattr(model.head.weight, "data", new().clone()),
    "data.mul_": lambda model, folder: model.embed.weight.data.mul_(2),
    "other data.mul_": lambda model, folder: model.head.weight.data.mul_(2),
    "untied": lambda model, folder: setattr(model.head, "weight", Tied(1).head.weight),
    "tied again": lambda model, folder: setattr(model.head, "weight", model.embed.weight),
}
REFUSED = "rests elsewhere and would stay as it is"  # `weight.data.mul_` of a handle is an error that says so


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("edit", EDITS)
def test_what_is_changed_is_changed_everywhere(edit, way, tmp_path):
    save_model(Tied(1), tmp_path / "other")
    whole, parts = Tied(), Tied()
    way(parts, tmp_path)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        for _ in range(2):
            torch.testing.assert_close(parts(IDS), whole(IDS))
            try:
                EDITS[edit](parts, tmp_path / "other")
            except RuntimeError as error:
                if "detached" not in str(error) and REFUSED not in str(error):
                    raise
            else:
                EDITS[edit](whole, tmp_path / "other")
    for _ in range(2):
        torch.testing.assert_close(parts(IDS), whole(IDS), rtol=0, atol=0)
    same = {name: tensor.tolist() for name, tensor in whole.state_dict().items()}
    assert {name: tensor.tolist() for name, tensor in parts.state_dict().items()} == same
    save_model(parts, tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert {name: saved[name].tolist() for name in saved} == {name: same[name] for name in saved}
    remove_hook_from_module(parts, recurse=True)
    assert not any(isinstance(tensor, Away) for tensor in parts.parameters())
    torch.testing.assert_close(parts(IDS), whole(IDS), rtol=0, atol=0)
    with torch.no_grad():
        parts.embed.weight.mul_(3), whole.embed.weight.mul_(3)
    torch.testing.assert_close(parts(IDS), whole(IDS), rtol=0, atol=0)  # they are tied, or not, as they were
    assert len([*parts.parameters()]) == len([*whole.parameters()])


@pytest.mark.parametrize("way", [way for way in WAYS if way is not kept_in_a_variable])
def test_nothing_is_left_behind(way, tmp_path):
    model = Tied()
    way(model, tmp_path)
    model(IDS)
    remove_hook_from_module(model, recurse=True)
    assert {type(parameter) for parameter in model.parameters()} <= {nn.Parameter}
    assert type(copy.deepcopy(model).head.weight) is nn.Parameter


def test_a_forward_that_writes_is_seen_by_the_other():
    class Counts(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            with torch.no_grad():
                self.weight.add_(1)
            return x * self.weight

    weight = nn.Parameter(torch.zeros(2))
    first, second, third = Counts(weight), Counts(weight), Counts(weight)
    del weight
    for module in (first, second):
        add_hook_to_module(module, AlignDevicesHook("cpu", offload=True))
    with torch.no_grad():
        values = [module(torch.ones(2))[0].item() for module in (first, second, third, first, third, second)]
    assert values == [1, 2, 3, 4, 5, 6]


def test_another_shape_is_everywhere(tmp_path):
    for way in (each_to_ram, head_to_ram, embed_to_disk):
        model = Tied()
        way(model, tmp_path)
        model(IDS)
        model.embed.weight.data = torch.ones(9, 4)
        assert model.head.weight.shape == (9, 4) and model(IDS).shape == (5, 9), way


def test_a_dispatch_that_fails_leaves_ties_as_they_were(tmp_path):
    model = Tied()
    cpu_offload(model.embed, 0, **GPU)
    part = nn.ModuleList([model.head, nn.Linear(2, 2, device="meta")])
    with pytest.raises(ValueError, match="has no data"):
        cpu_offload(part, 0, **GPU)
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert torch.equal(model.embed(IDS), model.head.weight[:5])
    cpu_offload(model.head, 0, **GPU)
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert torch.equal(model.embed(IDS), model.head.weight[:5])
    assert torch.equal(model.embed.weight, Tied().embed.weight * 4)


def test_a_tensor_of_which_the_memory_was_freed_is_none():
    model = Tied()
    kept = model.head.weight
    cpu_offload(model, 0, **GPU)
    kept.data = torch.empty(0)
    assert torch.equal(model(IDS), Tied()(IDS))


def test_a_parameter_that_nobody_holds_is_not_watched():
    model = Tied()
    cpu_offload(model, 0, **GPU)
    assert model.embed.weight.weight.outside.tensor() is None
    kept = model.mid.weight
    assert type(kept) is not WatchedParameter


def test_quantized_layers_that_share_a_weight():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.ModuleDict({"a": bnb.nn.Linear4bit(64, 64, bias=False), "b": bnb.nn.Linear4bit(64, 64, bias=False)})
    model["b"].weight = model["a"].weight
    model.to("cpu")
    model["b"].weight = model["a"].weight
    x = torch.randn(2, 64)
    expected = model["a"](x)
    new = bnb.nn.Linear4bit(64, 64, bias=False).to("cpu")
    for name in ("a", "b"):
        add_hook_to_module(model[name], AlignDevicesHook("cpu", offload=True))
    with torch.no_grad():
        assert torch.equal(model["a"](x), expected) and torch.equal(model["b"](x), expected)
        model["a"].weight = new.weight
        model["b"].weight = new.weight
        assert torch.equal(model["a"](x), new(x)) and torch.equal(model["b"](x), new(x))
