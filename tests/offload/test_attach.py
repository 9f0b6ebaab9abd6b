"""Models over several devices, and what a fuzzer of random modules (`tests/fuzz`) once found."""

import os
import threading
import time
import warnings

import pytest
import torch
from torch import nn

from bigkit import init_empty_weights
from bigkit.dryrun.fake_gpu import fake_gpus
from bigkit.dryrun.workload import fill
from bigkit.offload.dispatch import dispatch_model
from bigkit.offload.hooks import remove_hook_from_module
from bigkit.offload.one_place import cpu_offload, disk_offload
from tests.spread import STAND_IN, Net, same, spread

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Walks(nn.Module):
    """Calls what is in its parts, not the parts."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.text = nn.ModuleDict({"embed": nn.Linear(8, 8), "rest": nn.Linear(8, 8)})
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x):
        y = self.text["embed"](x)
        for layer in self.layers:
            y = layer(y)
        return x + self.text["rest"](self.layers[:1](y)) + self.bias


@pytest.mark.parametrize(
    "places",
    [
        {"layers": 1, "text": 0, "bias": 0},
        {"layers": "cpu", "text": 1, "bias": 1},
        {"layers": 0, "text.embed": 1, "text.rest": 0, "bias": 1},
        {"layers.0": 1, "layers.1": 0, "text.embed": 0, "text.rest": "cpu", "bias": 1},
    ],
)
def test_whatever_is_called_every_operation_has_one_device(places):
    with fake_gpus(), torch.no_grad():
        with init_empty_weights():
            model = Walks()
        assert dispatch_model(fill(model, places), places, 0)(X.to("cuda:0")).device.index == 0
    whole = Walks()
    expected = whole(X)
    assert same(spread(whole, places, main_device=0)(X), expected)


def test_parts_of_a_sequential_that_is_iterated_add_what_they_are_given():
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x, y):
            return x + self.inner(y)

    class Iterates(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layers = nn.Linear(8, 8), nn.Sequential(Adds(), nn.Sequential(nn.ReLU(), nn.Linear(8, 8)))

        def forward(self, x):
            return self.layers[1](self.layers[0](self.first(x), x))

    places = {"first": 0, "layers": 1}
    with fake_gpus(), torch.no_grad():
        with init_empty_weights():
            model = Iterates()
        assert dispatch_model(fill(model, places), places, 0)(X.to("cuda:0")).device.index == 0


def test_a_map_may_take_a_layer_apart():
    whole = Net(depth=1)
    expected = whole(X)
    parts = spread(whole, {"scale": 0, "h": 0, "out.weight": "cpu", "out.bias": 0})
    assert same(parts(X), expected) and parts.hf_device_map["out.weight"] == "cpu"
    with pytest.raises(ValueError, match="no device for 'out.bias'"):
        spread(whole, {"scale": 0, "h": 0, "out.weight": "cpu"})


@pytest.mark.parametrize("make", [nn.ReLU, nn.Sequential, lambda: nn.Linear(8, 8, bias=False), lambda: Net(depth=1)])
def test_memory_for_residents_of_any_model(make):
    model = make()
    expected = model(X)
    assert same(spread(model, {"": "cpu"}, main_device=0, resident_memory=10**6)(X), expected)


def test_a_tie_between_two_places_that_one_device_stands_in_for():
    whole = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    whole[1].weight = whole[0].weight
    expected = whole(X)
    parts = dispatch_model(whole, {"0": "cpu", "1": 0}, "cpu", stand_in=STAND_IN, force_hooks=True)
    assert same(parts(X), expected)


class Noted(nn.Module):
    """Uses what is noted at the weight of a layer, which may be called or not."""

    def __init__(self, calls):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), calls
        self.exchange(2.0)

    def exchange(self, factor):
        self.a.weight = nn.Parameter(torch.full((4, 4), 0.5))
        if factor:
            self.a.weight.factor, self.a.weight.table = factor, {"k": torch.full((1,), factor)}

    def forward(self, x):
        weight = self.a.weight
        return self.b(self.a(x) if self.calls else x) * weight.factor * weight.table["k"] + weight.sum()


@pytest.mark.parametrize("calls", [True, False])
@torch.no_grad()
def test_another_tensor_has_other_notes(tmp_path, calls):
    x = torch.ones(2, 4)
    for way in (lambda model: cpu_offload(model, 0, stand_in=STAND_IN), lambda model: disk_offload(model, tmp_path)):
        whole, parts = Noted(calls), way(Noted(calls))
        for factor in (None, 3.0, 5.0, None):
            for model in (whole, parts):
                model.exchange(factor)
            if factor is None:
                with pytest.raises(AttributeError, match="factor"):
                    parts(x)
                continue
            assert torch.equal(parts(x), whole(x))
            for model in (whole, parts):
                model.a.weight.factor = 7.0
            assert torch.equal(parts(x), whole(x))
        for model in (whole, parts):
            model.exchange(11.0)
        remove_hook_from_module(parts, recurse=True)
        assert torch.equal(parts(x), whole(x))


def test_what_is_noted_at_a_weight_is_there_in_the_forward():
    class Reads(nn.Linear):
        def forward(self, x):
            return super().forward(x) * self.weight.factor

    model = nn.Sequential(Reads(8, 8), nn.Linear(8, 8))
    spread(model, {"": "cpu"}, main_device=0)
    for factor in (2.0, torch.tensor(3.0)):
        model[0].weight.factor = factor
        expected = model[1](nn.functional.linear(X, model[0].weight, model[0].bias) * factor)
        torch.testing.assert_close(model(X), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_that_is_forked_during_a_forward_can_run_the_model():
    inside, go_on = threading.Event(), threading.Event()

    class Waits(nn.Linear):
        waits = False

        def forward(self, x):
            if self.waits:
                inside.set()
                go_on.wait(60)
            return super().forward(x)

    model = nn.Sequential(Waits(8, 8), nn.Linear(8, 8))
    expected = model(X)
    spread(model, {"": "cpu"}, main_device=0)
    model[0].waits = True
    thread = threading.Thread(target=model, args=(X,))
    thread.start()
    inside.wait(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of forks of processes with threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            model[0].waits = False
            code = 0 if same(model(X), expected) else 2
        finally:
            os._exit(code)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
    go_on.set()
    thread.join()
    model[0].waits = False
    assert done and status == 0 and same(model(X), expected)
