"""dispatch_model and the calls around it: maps, files, faults."""

import copy
import dataclasses
import errno
import gc
import json
import linecache
import os
import random
import resource
import signal
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import bigkit
from bigkit import init_empty_weights
from bigkit.checkpoints.format import Checkpoint, CheckpointError, read_header
from bigkit.checkpoints.load import load_checkpoint_in_model
from bigkit.checkpoints.save import save_model
from bigkit.dryrun.fake_gpu import fake_gpus
from bigkit.dryrun.workload import fill
from bigkit.maps.strategies import place
from bigkit.meta.skeleton import spec_from_module
from bigkit.offload.dispatch import dispatch_model
from bigkit.offload.handle import Away
from bigkit.offload.hooks import ModelHook, add_hook_to_module, hooks_in, remove_hook_from_module
from bigkit.offload.lenders import streamers_in
from bigkit.offload.load_and_dispatch import load_checkpoint_and_dispatch
from bigkit.offload.on_cpu import MlpHook
from bigkit.offload.one_place import cpu_offload, disk_offload
from bigkit.offload.whole_model import cpu_offload_with_hook
from tests.spread import STAND_IN, WAYS, Net, check_at_rest, handles, memory_beside_disk, same, spread, spread_ways

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
MIXED = {"scale": "disk", "h.0": 0, "h.1": "cpu", "h.2": "disk", "h.3": 1, "out": "cpu"}


def saved(folder, model=None, **options):
    model = model or Net()
    save_model(model, folder, **options)
    return model


def empty(*args):
    with init_empty_weights():
        return Net(*args)


# ---------------------------------------------------------------------------------------------------------------------
# Maps


@pytest.mark.parametrize(
    "device_map",
    [
        {"": 0},
        {"": "cpu"},
        {"": "disk"},
        MIXED,
        {**MIXED, "h.0": "cuda:0", "h.3": torch.device("cuda:1")},
        {"scale": "cpu", "h": "disk", "out": 1},
        {"scale": 1, "h.0": 0, "h.1": "cpu", "h.2.a": "disk", "h.2.b": 1, "h.3.a": "cpu", "h.3.b": 0, "out": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("main", [None, 0, 1, "cpu"])
def test_maps(device_map, main, tmp_path):
    model = Net()
    parts = spread(copy.deepcopy(model), device_map, main_device=main, offload_dir=tmp_path, force_hooks=True)
    for _ in range(2):
        assert same(parts(X), model(X))
    check_at_rest(parts)
    assert parts.hf_device_map.keys() == device_map.keys()
    assert set(parts.hf_device_map.values()) <= {0, 1, "cpu", "disk"}
    assert sum(p.numel() for p in parts.parameters()) == sum(p.numel() for p in model.parameters())
    assert [name for name, _ in parts.named_parameters()] == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(
    ("device_map", "named"),
    [
        ({"h": 0, "scale": 0}, "'out'"),
        ({"h.0": 0, "h.1": 0, "h.2": 0, "out": 0, "scale": 0}, r"'h\.3'"),
        ({"h": 0, "scale": 0, "out.weight": 0}, r"'out\.bias'|'out'"),
        ({}, "no device"),
    ],
)
def test_a_map_that_misses_modules_is_refused_with_the_names(device_map, named):
    model = Net()
    with pytest.raises(ValueError, match=named):
        spread(model, device_map)
    assert not handles(model) and not hasattr(model, "hf_device_map")


@pytest.mark.parametrize("invented", [["h.7"], ["head", "tail"]])
def test_names_that_the_model_lacks_are_told(invented):
    model = Net()
    with pytest.warns(UserWarning, match=", ".join(f"'{name}'" for name in invented)):
        spread(model, {"": 0, **dict.fromkeys(invented, 1)}, force_hooks=True)


def test_the_innermost_entry_of_a_map_counts():
    model = Net()
    parts = spread(copy.deepcopy(model), {"": 0, "h.3": 1})
    assert same(parts(X), model(X)) and parts.hf_device_map == {"": 0, "h.3": 1}


def test_a_map_that_is_none_is_refused():
    with pytest.raises(ValueError, match="must map module names to devices, not 'auto'"):
        dispatch_model(Net(), "auto")
    with pytest.raises(ValueError, match="device"):
        spread(Net(), {"": "tpu"})


def test_where_weights_rest_and_work(tmp_path):
    parts = spread(Net(), MIXED, offload_dir=tmp_path)
    assert type(parts.h[0].a.weight) is nn.Parameter and type(parts.h[3].a.weight) is nn.Parameter
    assert "rests in RAM" in repr(parts.h[1].a.weight) and "rests on disk" in repr(parts.h[2].b.bias)
    assert "rests on disk" in repr(parts.scale)


def test_a_plan_runs_with_its_own_number_of_slots(tmp_path):
    whole = Net()
    sizes = bigkit.compute_module_sizes(whole)
    budget = sizes[""] - 2 * sizes["h.0"] + sizes["h.0"]  # with two slots three blocks of four would have to go
    plan = bigkit.plan(whole, {0: budget, "cpu": 10**6}, no_split=["Block"])
    assert (plan.slots, plan.offloaded) == (1, 2 * sizes["h.0"]), plan
    x = torch.randn(2, 8)
    expected = whole(x)
    save_model(whole, tmp_path)
    loaded = load_checkpoint_and_dispatch(Net(), tmp_path, plan, stand_in=STAND_IN)
    for model in (dispatch_model(copy.deepcopy(whole), plan, stand_in=STAND_IN), loaded):
        assert torch.equal(model(x), expected)
        assert {handle.streamer.count for handle in handles(model)} == {1}


def test_one_device_needs_no_hooks():
    model = spread(Net(), {"": 0})
    assert not hasattr(model, "_hf_hook") and model.hf_device_map == {"": 0} and model.to("cpu") is model
    assert hasattr(spread(Net(), {"": 0}, force_hooks=True), "_hf_hook")
    filled = dispatch_model(empty(), {"": "cpu"}, state_dict=Net().state_dict())
    assert not filled.scale.is_meta and filled(X).shape == (3, 8)


@pytest.mark.parametrize(
    "move",
    [lambda m: m.to("cpu"), lambda m: m.half(), lambda m: m.cpu(), lambda m: m.float(), lambda m: m.to(torch.float64)],
)
def test_moving_is_refused(move):
    model = cpu_offload(Net(), 0, stand_in=STAND_IN)
    with pytest.raises(RuntimeError, match=r"hf_device_map.*remove_hook_from_module"):
        move(model)
    whole = remove_hook_from_module(model, recurse=True)
    assert move(whole) is whole


def test_a_part_is_cast_where_it_rests():
    whole = Net()
    parts = cpu_offload(copy.deepcopy(whole), 0, stand_in=STAND_IN)
    for each in (whole, parts):
        each(X)
        each.h.double()
        each.h[0].to("cpu", torch.float64)
        with pytest.raises(RuntimeError, match="dtype"):
            each(X)
        each.h.float()
    assert same(parts(X), whole(X)) and isinstance(parts.h[0].a.weight, Away)


# ---------------------------------------------------------------------------------------------------------------------
# Parameters of dispatch_model


def test_state_dict_gives_data_to_an_empty_model(tmp_path):
    whole = Net()
    for device_map in (MIXED, {"": "disk"}, {"": 0}):
        parts = spread(empty(), device_map, state_dict=whole.state_dict(), offload_dir=tmp_path)
        assert same(parts(X), whole(X))
    with pytest.raises(ValueError, match="on meta and has no data: load a checkpoint"):
        spread(empty(), MIXED, offload_dir=tmp_path)
    with pytest.raises(ValueError, match="on meta and has no data"):
        spread(empty(), {"": 0})


def test_offload_index_of_safetensors_files(tmp_path):
    whole = saved(tmp_path / "model")
    file = str(tmp_path / "model" / "model.safetensors")
    index = {name: {"safetensors_file": file, "weight_name": name, "dtype": "float32"} for name in whole.state_dict()}
    parts = dispatch_model(empty(), {"": "disk"}, offload_index=index)
    assert same(parts(X), whole(X)) and "rests on disk" in repr(parts.scale)
    index["scale"] = {"safetensors_file": file, "weight_name": "scales"}
    with pytest.raises(ValueError, match="'scale' is 'scales' in .*which lacks it"):
        dispatch_model(empty(), {"": "disk"}, offload_index=index)


def test_offload_index_of_accelerates_dat_files(tmp_path):
    from accelerate.utils import offload_state_dict

    whole = Net()
    whole.scalar = nn.Parameter(torch.tensor(3.0))
    offload_state_dict(tmp_path, whole.state_dict())
    index = json.loads((tmp_path / "index.json").read_text())
    parts = empty()
    parts.scalar = nn.Parameter(torch.empty((), device="meta"))
    dispatch_model(parts, {"": "disk"}, offload_dir=tmp_path, offload_index=index)
    assert same(parts(X), whole(X)) and parts.scalar.item() == 3.0
    assert not list(tmp_path.glob("*.safetensors"))


class Buffered(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.lin = nn.Linear(8, 8)
        self.register_buffer("kept", torch.ones(8))
        self.register_buffer("lost", torch.full((8,), 2.0), persistent=False)

    def forward(self, x):
        self.kept += 1
        return self.lin(self.norm(x)) + self.kept + self.lost


@pytest.mark.parametrize("buffers", [False, True])
def test_buffers_and_running_statistics(buffers, tmp_path):
    for way in ({"": "cpu"}, {"": "disk"}):
        for main, options in ((0, {"stand_in": STAND_IN}), ("cpu", {"force_hooks": True})):
            whole = nn.Sequential(Buffered(), Buffered())
            parts = dispatch_model(copy.deepcopy(whole), way, main, offload_dir=tmp_path, offload_buffers=buffers,
                                   **options)  # fmt: skip
            away = [handle.weight.name for handle in handles(parts)]
            if main == 0 or way == {"": "disk"}:
                assert ("0.kept" in away) == ("1.norm.running_mean" in away) == buffers and "0.lost" not in away
            for train in (True, True, False):
                whole.train(train), parts.train(train)
                assert same(parts(X), whole(X)) and same(parts(X + 1), whole(X + 1))
            state = parts.state_dict()
            assert all(torch.equal(state[name], value) for name, value in whole.state_dict().items())
            assert whole[1].norm.num_batches_tracked == 4 == parts[1].norm.num_batches_tracked


def test_skip_keys_reach_every_hook():
    model = spread(Net(), {"scale": "cpu", "h": "cpu", "out": 0}, skip_keys="past")
    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    assert hooks and all(hook.skip_keys == ("past",) for hook in hooks)


def test_preload_module_classes_make_one_unit():
    model = nn.Sequential(Net(2), nn.Linear(8, 8))
    plain = spread(copy.deepcopy(model), {"": "cpu"}, main_device=0)
    whole = spread(copy.deepcopy(model), {"": "cpu"}, main_device=0, preload_module_classes=["Net"])
    assert {unit.name for unit in handles(whole)[0].streamer.units} == {"0", "1"}
    assert len(handles(plain)[0].streamer.units) > 2
    assert same(whole(X), model(X)) and same(plain(X), model(X))


def test_resident_memory_spreads_blocks():
    model = Net(8)
    block = sum(p.nbytes for p in model.h[0].parameters())
    parts = spread(copy.deepcopy(model), {"": "cpu"}, main_device=0, resident_memory=4 * block)
    resident = [i for i in range(8) if type(parts.h[i].a.weight) is nn.Parameter]
    assert 3 <= len(resident) <= 4 and max(b - a for a, b in zip(resident, resident[1:])) <= 3
    assert {parts.hf_device_map[f"h.{i}"] for i in resident} == {0} and same(parts(X), model(X))


WRONG = [
    ({"slots": 0}, "slots must be a number of blocks, at least 1, not 0"),
    ({"main_device": []}, "main_device names no device"),
    ({"cpu_threads": True}, "cpu_threads must be a number of threads, at least 1, not True"),
    ({"slots": -1}, "at least 1, not -1"),
    ({"slots": 1.5}, "at least 1, not 1.5"),
    ({"slots": True}, "at least 1, not True"),
    ({"resident_memory": "lots"}, "lots"),
    ({"resident_memory": -1}, "-1"),
    ({"ram_cache": "lots"}, "lots"),
    ({"ram_cache": -5}, "-5"),
    ({"main_device": "disk"}, "main_device must be where weights work"),
    ({"main_device": "tpu"}, "unknown device 'tpu'"),
    ({"stand_in": {"tpu": "cpu"}}, "unknown device 'tpu'"),
    ({"stand_in": {0: "nowhere"}}, "nowhere"),
    ({"stand_in": {}, "main_device": 99}, r"there is no GPU \d+: this machine has \d+ GPUs? that PyTorch sees"),
    ({"preload_module_classes": 3}, "a name or several, not 3"),
    ({"skip_keys": 3}, "a name or several, not 3"),
    ({"many_slots": 3}, "many_slots"),
]


@pytest.mark.parametrize(("options", "named"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_option_is_refused_before_anything_changes(options, named, tmp_path):
    options = {"stand_in": STAND_IN} | options
    errors = (ValueError, TypeError, RuntimeError)
    model = saved(tmp_path / "model")
    on_meta = empty()
    calls = [
        (model, lambda: dispatch_model(model, MIXED, offload_dir=tmp_path / "rest", **options)),
        (on_meta, lambda: load_checkpoint_and_dispatch(on_meta, tmp_path / "model", MIXED, **options)),
        (on_meta, lambda: load_checkpoint_and_dispatch(on_meta, tmp_path / "model", "auto", {0: "1MB"}, **options)),
    ]
    if "main_device" not in options:
        calls.append((model, lambda: cpu_offload(model, 0, **options)))
        calls.append((model, lambda: disk_offload(model, tmp_path / "rest", 0, **options)))
    else:
        calls.append((model, lambda: disk_offload(model, tmp_path / "rest", options["main_device"])))
    for changed, call in calls:
        before = {name: id(tensor) for name, tensor in changed.named_parameters()}
        with pytest.raises(errors, match=named):
            call()
        assert before == {name: id(tensor) for name, tensor in changed.named_parameters()}
        assert not hasattr(changed, "hf_device_map") and not hasattr(changed, "_hf_hook")
        assert all(parameter.is_meta == (changed is on_meta) for parameter in changed.parameters())
    assert model(X).shape == (3, 8) and not (tmp_path / "rest").exists()


def test_stand_ins_are_named_as_devices_are():
    for name in ("cuda:0", "cuda", torch.device("cuda", 0), 0):
        model, whole = Net(), None
        whole = copy.deepcopy(model)
        assert same(cpu_offload(model, name, stand_in={name: "cpu"})(X), whole(X))
        parts = dispatch_model(copy.deepcopy(whole), {"": 0}, stand_in={name: "cpu"}, force_hooks=True)
        assert same(parts(X), whole(X))


# ---------------------------------------------------------------------------------------------------------------------
# Dispatching again


def test_again_with_other_maps(tmp_path):
    whole = saved(tmp_path / "model")
    parts = load_checkpoint_and_dispatch(empty(), tmp_path / "model", {"": "disk"})
    calls = []
    hook = ModelHook()
    hook.pre_forward = lambda module, *args, **kwargs: (calls.append(1), (args, kwargs))[1]
    add_hook_to_module(parts.h[0], hook, append=True)
    maps = [{"": "cpu"}, MIXED, {"": "disk"}, {"": 0}, {"scale": 0, "h": 1, "out": "disk"}, {"": 1}, {"": "disk"}]
    for i, device_map in enumerate(maps):
        spread(parts, device_map, main_device=0, offload_dir=tmp_path / "rest")
        assert same(parts(X), whole(X)) and len(calls) == i + 1
        assert parts.hf_device_map == device_map
        check_at_rest(parts)


def test_what_lies_in_files_is_used_in_place_again(tmp_path):
    whole = saved(tmp_path / "model", max_shard_size="1KB")
    parts = load_checkpoint_and_dispatch(empty(), tmp_path / "model", {"": "disk"})
    for device_map in ({"": "disk"}, dict.fromkeys(MIXED, "disk")):
        dispatch_model(parts, device_map)
        assert same(parts(X), whole(X))
        files = {part.source.path.parent for handle in handles(parts) for part in handle.weight.parts.values()}
        assert files == {tmp_path / "model"}


@pytest.mark.parametrize("bad", [{"h": 0}, {"": "disk"}, {"": "nowhere"}])
def test_an_error_leaves_the_model_as_it_was(bad, tmp_path):
    model = Net()
    for way, parts in spread_ways(model, tmp_path):
        if bad == {"": "disk"} and "disk" in way:
            continue
        before = [id(parameter) for parameter in parts.parameters()], parts.hf_device_map, parts._hf_hook
        with pytest.raises(ValueError):
            spread(parts, bad)
        assert before == ([id(parameter) for parameter in parts.parameters()], parts.hf_device_map, parts._hf_hook)
        assert same(parts(X), model(X)), way
        check_at_rest(parts)
    with pytest.raises(ValueError):
        spread(model, bad)
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())


def test_an_old_offload_folder_is_never_mistaken(tmp_path):
    from accelerate.utils import offload_state_dict

    first, second = Net(), Net()
    offload_state_dict(tmp_path, first.state_dict())
    kept = disk_offload(copy.deepcopy(first), tmp_path)
    parts = disk_offload(copy.deepcopy(second), tmp_path)
    assert same(parts(X), second(X)) and same(kept(X), first(X))


def test_temporary_files_go_with_the_model(tmp_path):
    saved(tmp_path / "model")
    rest = tmp_path / "rest"
    makers = [
        lambda: disk_offload(Net(), rest),
        lambda: disk_offload(Net(), rest, 0, stand_in=STAND_IN),
        lambda: load_checkpoint_and_dispatch(empty(), tmp_path / "model", {"": "disk"}, dtype="float16",
                                             offload_folder=rest),
        lambda: load_checkpoint_in_model(m := empty(), tmp_path / "model", {"": "disk"}, rest, torch.bfloat16) and m,
    ]  # fmt: skip
    for make in makers:
        model = make()
        assert list(rest.iterdir())
        if handles(model):
            assert model(X.to(model.scale.dtype)).shape == (3, 8)
            spread(model, {"": "disk"}, main_device=0)
            assert model(X.to(model.scale.dtype)).shape == (3, 8)
        del model
        gc.collect()
        assert not list(rest.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.mark.parametrize("strategy", ["auto", "balanced", "balanced_low_0", "sequential", "exact", MIXED, {"": "disk"}])
@pytest.mark.parametrize("shards", ["10GB", "1KB"])
def test_load_and_dispatch(strategy, shards, tmp_path):
    whole = saved(tmp_path, max_shard_size=shards)
    parts = load_checkpoint_and_dispatch(
        empty(), tmp_path, strategy, {0: 2500, 1: 2000, "cpu": "2KiB", "disk": "1GB"}, stand_in=STAND_IN
    )
    assert same(parts(X), whole(X)) and len({*parts.hf_device_map.values()}) >= (1 if isinstance(strategy, dict) else 2)
    check_at_rest(parts)


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16, None])
def test_load_and_dispatch_with_a_dtype(dtype, tmp_path):
    whole = saved(tmp_path / "model")
    wanted = torch.float32 if dtype is None else torch.float16 if dtype == "float16" else dtype
    for device_map in (MIXED, {"": "disk"}, None):
        parts = load_checkpoint_and_dispatch(empty(), tmp_path / "model", device_map, dtype=dtype,
                                             offload_folder=tmp_path / "rest", stand_in=STAND_IN)  # fmt: skip
        assert {parameter.dtype for parameter in parts.parameters()} == {wanted}
        assert same(parts(X.to(wanted)), copy.deepcopy(whole).to(wanted)(X.to(wanted)))
    with pytest.raises(ValueError, match="give an offload_folder"):
        load_checkpoint_and_dispatch(empty(), tmp_path / "model", {"": "disk"}, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("h.2.a.bias"), "missing in the checkpoint"),
        (lambda state: state.update({"h.2.a.bias": torch.ones(9)}), "wrong shape"),
        (lambda state: state.update({"h.2.a.bias": torch.ones(8).int()}), "wrong dtype"),
    ],
)
def test_what_does_not_match_is_named(tmp_path, change, said):
    whole = Net()
    state = whole.state_dict()
    change(state)
    torch.save(state, tmp_path / "pytorch_model.bin")
    for device_map in (MIXED, {"": "disk"}, {"": "cpu"}):
        with (
            pytest.warns(UserWarning, match=r"does not fit Net"),
            pytest.raises(ValueError, match=rf"does not fill Net: {said}: 'h\.2\.a\.bias'"),
        ):
            load_checkpoint_and_dispatch(empty(), tmp_path, device_map, offload_folder=tmp_path, stand_in=STAND_IN)
        with pytest.raises(CheckpointError, match=r"'h\.2\.a\.bias'"):
            load_checkpoint_and_dispatch(Net(), tmp_path, device_map, offload_folder=tmp_path, strict=True,
                                         stand_in=STAND_IN)  # fmt: skip
    with pytest.raises(ValueError, match="unknown device_map 'best'"):
        load_checkpoint_and_dispatch(empty(), tmp_path, "best")
    with pytest.raises(FileNotFoundError):
        load_checkpoint_and_dispatch(empty(), tmp_path / "nothing", "auto")


@pytest.mark.parametrize("device_map", [MIXED, {"": "cpu"}, {"": "disk"}], ids=str)
def test_save_and_load_again(device_map, tmp_path):
    whole = saved(tmp_path / "model", max_shard_size="1KB")
    parts = load_checkpoint_and_dispatch(empty(), tmp_path / "model", device_map, stand_in=STAND_IN, main_device=0)
    with torch.no_grad():
        parts.scale.mul_(2), whole.scale.mul_(2)
    for folder, safe in (("new", True), ("pickled", False), ("model", True), ("model", True)):  # over its own files too
        save_model(parts, tmp_path / folder, "2KB", safe)
        again = Net()
        assert load_checkpoint_in_model(again, tmp_path / folder, strict=True).clean
        assert same(again(X), whole(X)) and same(parts(X), whole(X))
    check_at_rest(parts)


def test_saving_takes_the_memory_of_one_shard(tmp_path):
    assert memory_beside_disk(tmp_path, 'save_model(model, sys.argv[1] + "/new", "20MB")') < 70  # MB, of 200


# ---------------------------------------------------------------------------------------------------------------------
# Faults of disks


@contextmanager
def full_disk():
    """No file may grow beyond 512 bytes: not for a whole test, since pytest writes to a file as well, perhaps."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_model_as_it_was(tmp_path):
    model, empty_model = Net(), empty()
    expected = model(X)
    for one in (model, cpu_offload(copy.deepcopy(model), 0, stand_in=STAND_IN)):
        message = "could not write weights to .*File too large.*the model is as it was"
        with pytest.raises(OSError, match=message), full_disk():
            spread(one, {"": "disk"}, main_device=0, offload_dir=tmp_path)
        assert same(one(X), expected) and not list(tmp_path.iterdir())
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    with pytest.raises(OSError, match="could not write"), full_disk():
        spread(empty_model, {"": "disk"}, main_device=0, offload_dir=tmp_path, state_dict=model.state_dict())
    assert all(parameter.is_meta for parameter in empty_model.parameters())


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    model = Net()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not write weights to .*file"):
        disk_offload(model, tmp_path / "file")

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    with pytest.raises(OSError, match="could not write weights to .*Permission denied"):
        disk_offload(model, tmp_path)
    assert model(X).shape == (3, 8) and not handles(model)


@pytest.mark.parametrize("options", [{}, {"main_device": 0, "stand_in": STAND_IN}], ids=["mapped", "slots"])
@pytest.mark.parametrize("fault", ["truncated", "emptied", "rewritten"])
def test_a_file_that_changes_under_a_model_is_an_error(fault, options, tmp_path):
    whole = saved(tmp_path)
    parts = load_checkpoint_and_dispatch(empty(), tmp_path, {"": "disk"}, **options)
    assert same(parts(X), whole(X))
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes({"truncated": content[:900], "emptied": b"", "rewritten": content[::-1]}[fault])
    for use in (lambda: parts(X), lambda: parts.scale.clone(), lambda: parts.h[0](X)):
        try:
            result = use()
        except OSError as error:
            assert str(file) in str(error) and "load the checkpoint again" in str(error)
        else:  # a slot held it already
            assert same(result, whole.scale if result.shape == (8,) else whole.h[0](X))
    with pytest.raises(OSError, match="changed under a model"):
        parts(X)
    assert not handles(parts)[0].streamer._loans


@pytest.mark.parametrize("options", [{}, {"main_device": 0, "stand_in": STAND_IN}], ids=["mapped", "slots"])
def test_a_file_that_is_replaced_or_removed_stays_readable(options, tmp_path):
    whole = saved(tmp_path)
    parts = load_checkpoint_and_dispatch(empty(), tmp_path, {"": "disk"}, **options)
    saved(tmp_path, Net())  # another checkpoint, put in place by renaming
    assert same(parts(X), whole(X))
    (tmp_path / "model.safetensors").unlink()
    assert same(parts(X), whole(X)) and same(parts(X), whole(X))


def test_models_over_one_file_do_not_see_each_others_edits(tmp_path):
    whole = saved(tmp_path)
    models = [load_checkpoint_and_dispatch(empty(), tmp_path, {"": "disk"}) for _ in range(3)]
    assert all(handles(model)[0].streamer.maps for model in models)
    for model in models[::2]:
        with torch.no_grad():
            model.h[1].a.weight.zero_()
        remove_hook_from_module(model, recurse=True)
        model.h[2].a.weight.data.zero_()
        assert not same(model(X), whole(X))
    assert same(models[1](X), whole(X))
    assert read_header(tmp_path / "model.safetensors") and len(Checkpoint.open(tmp_path)) == 19


# ---------------------------------------------------------------------------------------------------------------------
# The short ways


def test_cpu_and_disk_offload(tmp_path):
    model = Net()
    for way, parts in spread_ways(model, tmp_path):
        assert len(handles(parts)) == 19 and same(parts(X), model(X)), way
        whole = remove_hook_from_module(parts, recurse=True)
        assert not handles(whole) and same(whole(X), model(X)) and type(whole.scale) is nn.Parameter
        whole.to(torch.float64)
    parts = cpu_offload(empty(), 0, state_dict=model.state_dict(), stand_in=STAND_IN)
    assert same(parts(X), model(X))
    assert bigkit.cpu_offload is cpu_offload and bigkit.disk_offload is disk_offload


def test_ties_survive_the_removal_of_hooks(tmp_path):
    model = Net()
    model.out.weight = model.h[0].a.weight
    for way, parts in spread_ways(model, tmp_path):
        whole = remove_hook_from_module(parts, recurse=True)
        assert whole.out.weight is whole.h[0].a.weight, way


def test_a_chain_of_three_models():
    """As in a pipeline of diffusers: each works on the device until the next one is called."""
    models = [nn.Linear(8, 8), Net(2), nn.Linear(8, 8)]
    chain, hooks = [], []
    for model in models:
        model, hook = cpu_offload_with_hook(copy.deepcopy(model), "cpu", hooks[-1] if hooks else None)
        chain.append(model), hooks.append(hook)
    for _ in range(2):
        x = expected = X
        for i, (model, whole) in enumerate(zip(chain, models)):
            for _ in range(2):
                x, expected = model(x), whole(expected)
            assert same(x, expected)
            assert [bool(hook.hook.in_ram) for hook in hooks] == [k == i for k in range(3)]
        hooks[-1].offload()
        assert not any(hook.hook.in_ram for hook in hooks)
    with torch.no_grad():
        chain[0](X)
        chain[0].weight.mul_(2), models[0].weight.mul_(2)
    hooks[0].offload()
    assert same(chain[0](X), models[0](X))
    hooks[0].remove()
    assert not hasattr(chain[0], "_hf_hook") and same(chain[0](X), models[0](X))


def test_a_chains_hook_takes_only_itself_away():
    class Counts(ModelHook):
        calls = detached = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

        def detach_hook(self, module):
            self.detached += 1
            return module

    model = nn.Linear(8, 8)
    before, after = Counts(), Counts()
    add_hook_to_module(model, before)
    _, first = cpu_offload_with_hook(model, "cpu")
    add_hook_to_module(model, after, append=True)
    _, second = cpu_offload_with_hook(model, "cpu", first)
    for hook, count in ((first, 1), (second, 2), (second, 3)):  # the last has gone already
        hook.remove()
        model(X)
        assert before.calls == after.calls == count and not hook.hook.in_ram
    assert not before.detached and not after.detached
    remove_hook_from_module(model)
    assert before.detached == after.detached == 1 and vars(model).keys() == vars(nn.Linear(8, 8)).keys()


def test_open_files_do_not_grow_with_the_weights(tmp_path):
    saved(tmp_path / "model", Net(30))
    before = len(os.listdir("/proc/self/fd"))
    parts = load_checkpoint_and_dispatch(empty(30), tmp_path / "model", {"": "disk"}, dtype="float16",
                                         offload_folder=tmp_path)  # fmt: skip
    parts(X.half())
    assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_a_layer_works_in_one_place():
    with fake_gpus(), torch.no_grad():
        model = fill(nn.Sequential(nn.Linear(4, 4, device="meta"), nn.Linear(4, 4, device="meta")), {"": 0})
        message = r"'0.weight' is to work on cuda:0 and '0.bias' on cuda:1, but '0', a Linear, computes with both"
        with pytest.raises(ValueError, match=message):
            dispatch_model(model, {"0.weight": 0, "0.bias": 1, "1": 1})
        assert not hasattr(model, "hf_device_map")


@pytest.mark.parametrize("asked", [None, 1, 4])
@pytest.mark.parametrize("call", ["dispatch", "load", "auto"])
def test_slots_are_those_that_are_asked_for_or_else_the_plans(call, asked, tmp_path):
    """In every call; and what is planned there leaves room for as many."""
    model = Net(depth=8)
    block = sum(tensor.nbytes for tensor in model.h[0].parameters())
    budgets = {0: 7 * block, "cpu": 100 * block}
    options = {} if asked is None else {"slots": asked}
    planned = place(spec_from_module(model), budgets, slots=3)
    assert planned.slots == 3 and "cpu" in planned.device_map.values()
    if call == "dispatch":
        parts = dispatch_model(copy.deepcopy(model), planned, stand_in=STAND_IN, **options)
    else:
        save_model(model, tmp_path)
        with init_empty_weights():
            parts = Net(depth=8)
        how = (planned,) if call == "load" else ("auto", budgets)
        parts = load_checkpoint_and_dispatch(parts, tmp_path, *how, stand_in=STAND_IN, **options)
    expected = asked or (3 if call != "auto" else place(spec_from_module(model), budgets).slots)
    (streamer,) = streamers_in(parts)
    assert streamer.count == expected
    assert same(parts(X), model(X))
    if call == "auto":
        tensors = [*parts.named_parameters(), *parts.named_buffers()]
        stays = sum(tensor.nbytes for _, tensor in tensors if not isinstance(tensor, Away))
        assert stays + expected * block <= budgets[0]


def test_threads_of_the_cpu_are_those_that_are_asked_for_or_else_the_plans(tmp_path):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=32
    ))  # fmt: skip
    save_model(model, tmp_path)
    places = {"": 0, **{f"model.layers.{i}": "cpu" for i in range(3)}}
    planned = place(spec_from_module(model), {0: "1GB", "cpu": "1GB"}, places)
    planned = dataclasses.replace(planned, slots=2, on_cpu=(10**6, 3))
    for options, threads in (({}, 3), ({"cpu_threads": 2}, 2), ({"on_cpu": 0}, 3), ({"on_cpu": 10**6}, None)):
        for parts in (
            dispatch_model(copy.deepcopy(model), planned, stand_in=STAND_IN, **options),
            load_checkpoint_and_dispatch(copy.deepcopy(model), tmp_path, planned, stand_in=STAND_IN, **options),
        ):
            hook = next(hook for hook in hooks_in(parts.model.layers[0].mlp) if isinstance(hook, MlpHook))
            assert hook.threads == threads, options


def test_there_are_no_more_slots_than_blocks():
    model = Net(depth=3)
    parts = dispatch_model(copy.deepcopy(model), {"": "cpu"}, 0, stand_in=STAND_IN, slots=np.int64(50))
    assert same(parts(X), model(X))
    (streamer,) = streamers_in(parts)
    assert sum(slot.base.nbytes for slot in streamer.slots) <= sum(unit.nbytes for unit in streamer.units) + 512 * 16


class Interrupt:
    """Raises KeyboardInterrupt at the `at`-th line of bigkit that runs, where a signal could: not as a block ends."""

    def __init__(self, at):
        self.at, self.lines = at, 0

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(os.path.dirname(bigkit.__file__)):
            return None
        self.lines += event == "line"
        code = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if event == "line" and self.lines >= self.at and not code.startswith("with "):
            self.at = 10**9
            raise KeyboardInterrupt
        return self


def interrupted(work, at):
    """Lines of bigkit that some work takes, interrupted at one of them."""
    tracer = Interrupt(at)
    sys.settrace(tracer)
    try:
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return tracer.lines


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of one that comes in a finalizer
@pytest.mark.parametrize("what", ["dispatch", "again", "remove", "state dict", "load"])
def test_a_change_of_place_may_be_interrupted_at_any_point(what, tmp_path):
    """No weight is lost: the model is as it was, as it should be, or whole; and may be spread or taken back again."""
    model, rng = saved(tmp_path / "model"), random.Random(0)
    state, expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model(X)

    def once(at):
        parts = copy.deepcopy(model)
        if what != "dispatch":
            spread(parts, MIXED, offload_dir=tmp_path / "rest")
        works = {
            "dispatch": lambda: spread(parts, MIXED, offload_dir=tmp_path / "rest"),
            "again": lambda: spread(parts, {"": "disk"}, main_device=0, offload_dir=tmp_path / "rest"),
            "remove": lambda: remove_hook_from_module(parts, recurse=True),
            "state dict": lambda: parts.load_state_dict(state),
            "load": lambda: load_checkpoint_in_model(parts, tmp_path / "model"),
        }
        lines = interrupted(works[what], at)
        assert same(parts(X), expected), at
        assert all(torch.equal(tensor, state[name]) for name, tensor in parts.state_dict().items()), at
        remove_hook_from_module(parts, recurse=True)
        assert not handles(parts) and same(parts(X), expected), at
        assert same(spread(parts, {"": "cpu"}, main_device=0)(X), expected), at
        return lines

    whole = once(10**9)
    for _ in range(60):
        once(rng.randint(1, whole))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("what", ["in place", "state dict"])
def test_after_an_interrupted_change_forwards_and_state_dict_agree(what, tmp_path):
    """Whatever has been changed by then: no slot has what was there before."""
    model, rng = Net(), random.Random(0)
    double = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    works = {
        "in place": lambda parts: [parameter.data.mul_(2) for parameter in parts.parameters()],
        "state dict": lambda parts: parts.load_state_dict(double),
    }
    for way in WAYS:
        lines = 10**9
        for i in range(12):
            parts, whole = WAYS[way](tmp_path / f"{way}{i}")(copy.deepcopy(model)), copy.deepcopy(model)
            parts(X)
            at = rng.randint(1, lines)
            seen = interrupted(lambda: works[what](parts), at)  # noqa: B023
            lines = seen if lines == 10**9 else lines
            whole.load_state_dict({name: tensor.clone() for name, tensor in parts.state_dict().items()})
            for _ in range(2):
                assert same(parts(X), whole(X)), (way, at)
            remove_hook_from_module(parts, recurse=True)
            assert same(parts(X), whole(X)), (way, at)
