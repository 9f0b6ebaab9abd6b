"""Weights at rest work on all GPUs in turn: the same outputs, every link busy, and everything given back."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bigkit
from bigkit.maps.links import DeviceMap
from bigkit.offload.hooks import hooks_in
from bigkit.zoo.gpt import load_pygpt
from tests.spread import STAND_IN, Net, check_at_rest, handles, same, spread

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def working(model):
    """Block -> the streamers' device names, as events call them."""
    return {
        hook.unit.name: hook.streamer.name
        for module in model.modules()
        for hook in hooks_in(module)
        if getattr(hook, "unit", None) is not None
    }


def test_blocks_take_turns_on_the_gpus_that_a_map_names():
    whole = Net(6)
    model = spread(copy.deepcopy(whole), {"scale": 0, "h": "cpu", "out": 1})
    assert working(model) == {f"h.{i}": f"cuda:{i % 2}" for i in range(6)}
    assert same(model(X), whole(X)) and model.hf_device_map == {"scale": 0, "h": "cpu", "out": 1}
    check_at_rest(model)


def test_a_main_device_that_is_named_does_all(tmp_path):
    whole = Net(4)
    model = spread(copy.deepcopy(whole), {"scale": 0, "h": "disk", "out": 1}, main_device=1, offload_dir=tmp_path)
    assert set(working(model).values()) == {"cuda:1"} and same(model(X), whole(X))


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_several_main_devices(offload, tmp_path):
    whole = Net(5)
    if offload == "cpu":
        model = bigkit.cpu_offload(copy.deepcopy(whole), [0, "cuda:1"], stand_in=STAND_IN)
    else:
        model = bigkit.disk_offload(copy.deepcopy(whole), tmp_path, [0, 1], stand_in=STAND_IN)
    for _ in range(3):
        assert same(model(X), whole(X))
    blocks = {name: device for name, device in working(model).items() if name.startswith("h.")}
    assert [*blocks.values()] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]
    with pytest.raises(ValueError, match="GPUs or 'cpu'"):
        spread(Net(), {"": "cpu"}, main_device=[0, "cpu"])


def test_each_gpu_prefetches_its_own_next_block():
    model = spread(Net(8), {"scale": 0, "h": "cpu", "out": 1})
    model(X)
    streamers = {id(handle.streamer): handle.streamer for handle in handles(model)}.values()
    order = []
    for streamer in streamers:
        streamer.listeners.append(lambda event: order.append((event.kind, event.unit, event.device)))
    model(X)
    work = [unit for kind, unit, _ in order if kind == "work"]
    assert work == [f"h.{i}" for i in range(8)]
    at = order.index(("work", "h.4", "cuda:0"))  # on either link the next one is under way, or there
    fetched = [unit for kind, unit, _ in order[:at] if kind == "fetch"]
    assert "h.5" in fetched and "h.6" in fetched


def test_a_plan_brings_its_turns_with_it():
    model = load_pygpt().eval()
    tokens = torch.randint(0, 256, (1, 30))
    sizes = bigkit.compute_module_sizes(model)
    budget = 4 * sizes["transformer.h.0"]
    plan = bigkit.plan(model, {0: budget, 1: budget, "cpu": "1GiB"}, no_split=["Block"], context=30)
    works = {layer.name: layer.works for layer in plan.layers if layer.works is not None}
    assert set(works.values()) == {0, 1} and plan.device_map.works == works
    expected = model(tokens)[0]
    for device_map in (plan, plan.device_map, dict(plan.device_map)):
        parts = bigkit.dispatch_model(copy.deepcopy(model), device_map, stand_in=STAND_IN)
        assert same(parts(tokens)[0], expected)
        assert working(parts) == {name: f"cuda:{device}" for name, device in works.items()}
    for device_map in (plan.device_map, copy.copy(plan.device_map), copy.deepcopy(plan.device_map)):
        assert isinstance(device_map, DeviceMap) and device_map.works == works


class Wave(BaseException):
    """What nobody expects."""


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_map_gives_the_outputs_of_the_whole_model_and_anything_raised_gives_all_back(data):
    depth = data.draw(st.integers(1, 6))
    names = ["scale", *(f"h.{i}" for i in range(depth)), "out"]
    places = {name: data.draw(st.sampled_from([0, 1, 2, "cpu", "cpu"]), name) for name in names}
    main = data.draw(st.sampled_from([None, [0, 1], [2, 0, 1]]), "main")
    whole = Net(depth)
    stand = {0: "cpu", 1: "cpu", 2: "cpu"}
    slots = data.draw(st.integers(1, 3), "slots")
    model = bigkit.dispatch_model(
        copy.deepcopy(whole), places, main, stand_in=stand, slots=slots, force_hooks=True,
        resident_memory=data.draw(st.sampled_from([0, 600, 2000]), "residents"),
    )  # fmt: skip
    broken = data.draw(st.integers(0, depth - 1), "broken")
    forward = type(model.h[broken].b).forward

    def fail(self, x):
        if self is model.h[broken].b:
            raise Wave
        return forward(self, x)

    for _ in range(2):
        assert same(model(X), whole(X))
        check_at_rest(model)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Wave):
            patch.setattr(type(model.h[broken].b), "forward", fail)
            model(X)
        check_at_rest(model)
    bigkit.remove_hook_from_module(model, recurse=True)
    assert not handles(model) and same(model(X), whole(X))


def test_residents_are_on_every_gpu():
    whole = Net(8)
    block = sum(p.nbytes for p in whole.h[0].parameters())
    model = spread(copy.deepcopy(whole), {"scale": 0, "h": "cpu", "out": 1}, resident_memory=4 * block)
    resident = {name: place for name, place in model.hf_device_map.items() if name.startswith("h.")}
    assert [place for place in resident.values() if place != "cpu"] == [0, 1, 0, 1], resident
    assert same(model(X), whole(X))
