"""The calls with Accelerate's names: same results where Accelerate is right, better ones where it is not."""

import numpy as np
import pytest
import torch
from torch import nn

import bigkit
from bigkit import (
    PlanError,
    check_device_map,
    compute_module_sizes,
    find_tied_parameters,
    get_balanced_memory,
    get_max_memory,
    infer_auto_device_map,
    init_empty_weights,
)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)


class Model(nn.Module):
    def __init__(self, depth=6, width=8, tie=True):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.embed = nn.Embedding(20, width)
        self.h = nn.ModuleList([Block(width) for _ in range(depth)])
        self.head = nn.Linear(width, 20, bias=False)
        if tie:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_module_sizes_are_accelerates(dtype):
    from accelerate.utils import compute_module_sizes as oracle

    assert compute_module_sizes(Model(), dtype=dtype) == dict(oracle(Model(), dtype=dtype))
    assert compute_module_sizes(Model(), buffers_only=True)[""] == oracle(Model(), buffers_only=True)[""]
    special = {"embed.weight": torch.float16}
    ours = compute_module_sizes(Model(), special_dtypes=special)
    assert ours == dict(oracle(Model(), special_dtypes=special))


def test_a_wider_dtype_is_counted_as_it_will_be():
    assert compute_module_sizes(nn.Linear(3, 2).half(), dtype="float32")[""] == 32


def test_ties_are_accelerates():
    from accelerate.utils import find_tied_parameters as oracle

    with init_empty_weights():
        model = Model()
    assert find_tied_parameters(model) == oracle(model) == [["embed.weight", "head.weight"]]
    assert find_tied_parameters(Model(tie=False)) == []


@pytest.mark.filterwarnings("ignore:Current model requires")
@pytest.mark.parametrize("budget", [4000, 7000, 11000, 15000])
def test_gpus_hold_what_accelerates_hold_but_for_the_second_slot(budget):
    """Two blocks are in flight here on each GPU, and one on the first there; buffers that stay are counted."""
    from accelerate import infer_auto_device_map as oracle

    model, memory = Model(depth=40, tie=False), {0: budget, 1: budget, "cpu": 10**6}

    def on_gpus(device_map):
        sizes = compute_module_sizes(model)
        return sum(sizes[name] for name, device in device_map.items() if device in (0, 1))

    ours = infer_auto_device_map(model, memory, ["Block"])
    theirs = oracle(model, dict(memory), ["Block"])
    check_device_map(model, ours)
    extra = 3 * compute_module_sizes(model)["h.0"] + compute_module_sizes(model, buffers_only=True)[""]
    assert on_gpus(ours) > on_gpus(theirs) - extra - compute_module_sizes(model)["h.0"]
    if on_gpus(theirs) == compute_module_sizes(model)[""]:
        assert on_gpus(ours) == on_gpus(theirs)


def test_no_split_classes_and_clean_result():
    memory = {0: 3000, 1: 10**6}
    whole = infer_auto_device_map(Model(), memory, "Block")
    assert {name for name in whole if name.startswith("h.")} == {f"h.{i}" for i in range(6)}
    fine = infer_auto_device_map(Model(), memory, [], clean_result=False)
    assert "h.0.norm" in fine and "h.0" not in fine
    assert infer_auto_device_map(Model(), {0: 10**6}) == {"": 0}


def test_buffers_on_a_split_module_and_tied_parameters_on_it_are_placed():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.ones(4), persistent=False)
            self.inner = nn.Linear(4, 4)
            self.alias = self.inner.weight

    model = nn.Sequential(Odd(), nn.Linear(4, 4))
    found = infer_auto_device_map(model, {0: 90, 1: 200}, [])
    check_device_map(model, found)
    assert found["0.inner"] == found["0.alias"] and "0.mask" in found


def test_verbose_explains(capsys):
    infer_auto_device_map(Model(), {0: 3000, 1: 10**6}, ["Block"], verbose=True)
    assert "Next is" in capsys.readouterr().out


def test_balanced_memory_leads_to_the_balanced_map():
    model = Model(depth=8)
    memory = {0: 10**5, 1: 10**5, 2: 10**5}
    budgets = get_balanced_memory(model, memory, ["Block"])
    found = infer_auto_device_map(model, budgets, ["Block"])
    assert found == bigkit.plan(model, memory, no_split=["Block"]).device_map
    assert memory == {0: 10**5, 1: 10**5, 2: 10**5}
    low = get_balanced_memory(model, memory, ["Block"], low_zero=True)
    assert low[0] == 0 and 0 not in infer_auto_device_map(model, low, ["Block"]).values()
    assert get_balanced_memory(model, {0: 900, 1: 900, "cpu": 10**6}, ["Block"]) == {0: 900, 1: 900, "cpu": 10**6}


def test_max_memory_reads_this_machine_and_changes_nothing_given():
    given = {"cpu": "1GiB", 1: "2GB", 0: 5}
    assert list(get_max_memory(given).items()) == [(0, 5), (1, 2 * 10**9), ("cpu", 2**30)]
    assert given == {"cpu": "1GiB", 1: "2GB", 0: 5}
    import psutil

    assert 0 < get_max_memory()["cpu"] <= psutil.virtual_memory().total


def test_check_device_map_names_what_is_wrong():
    model = Model()
    check_device_map(model, {"": "cpu"})
    with pytest.raises(ValueError, match="no device for 'head'"):
        check_device_map(model, {"scale": 0, "embed": 0, "h": 1})
    with pytest.warns(UserWarning, match="names 'nonsense', but Model has no such module"):
        check_device_map(model, {"": 0, "nonsense": 1})


@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), 0, np.int64(0), "cuda:0", {"": "cpu", "1": "disk"}])
def test_device_maps_as_users_have_them(device_map, tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    expected = model(torch.ones(2, 8))
    bigkit.save_model(model, tmp_path)
    options = {"stand_in": {0: "cpu"}, "offload_folder": tmp_path / "offload"}
    with init_empty_weights():
        empty = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    placed = bigkit.load_checkpoint_and_dispatch(empty, tmp_path, device_map, **options)
    assert torch.equal(placed(torch.ones(2, 8)), expected)
    if isinstance(device_map, dict):
        assert "rests on disk" in repr(placed[1].weight) and "rests" not in repr(placed[0].weight)
    else:
        assert placed.hf_device_map in ({"": "cpu"}, {"": 0})
        assert torch.equal(bigkit.dispatch_model(model, device_map, stand_in={0: "cpu"})(torch.ones(2, 8)), expected)


@pytest.mark.parametrize(
    "budgets",
    [{0: np.int64(5000)}, {"cuda:0": 5000.0}, {torch.device("cuda:0"): "5KB"}, {np.int32(0): np.float32(5000)}],
)
def test_budgets_as_users_have_them(budgets):
    assert get_max_memory(budgets) == {0: 5000}
    assert infer_auto_device_map(nn.Linear(8, 8), budgets) == {"": 0}


def test_a_device_named_twice_in_the_budgets_is_refused():
    with pytest.raises(ValueError, match="names a device twice"):
        get_max_memory({0: 5, "cuda:0": 6})


def test_infeasible_budgets_are_an_error_with_the_missing_bytes():
    with pytest.raises(PlanError, match="lacks"):
        infer_auto_device_map(Model(), {0: 100, "disk": 0})


def test_an_empty_model_gives_the_same_map():
    with init_empty_weights():
        empty = Model()
    memory = {0: 2500, 1: 2500, "cpu": 10**6}
    assert infer_auto_device_map(empty, memory, ["Block"]) == infer_auto_device_map(Model(), memory, ["Block"])
