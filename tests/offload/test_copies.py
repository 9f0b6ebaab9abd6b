"""A tensor that is tied over two devices stays one tensor, whatever is done to the model."""

import copy
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn

from bigkit import load_checkpoint_in_model, save_model
from bigkit.dryrun.fake_gpu import fake_gpus
from bigkit.dryrun.workload import fill
from bigkit.meta.empty import init_empty_weights
from bigkit.offload.dispatch import dispatch_model
from bigkit.offload.hooks import remove_hook_from_module
from tests.spread import Tied as TiedHead

IDS = torch.arange(5)
TWO = {0: "cpu", 1: "cpu:0"}  # PyTorch calls these two devices, so a copy lies on each
MAPS = [
    {"embed": 0, "mid": 0, "head": 1, "scale": 1},
    {"embed": 0, "mid": "disk", "head": 1, "scale": 0},
    {"embed": 1, "mid": 0, "head": "cpu", "scale": "disk"},
    {"embed": "cpu", "mid": 0, "head": 1, "scale": "cpu"},
    {"embed": "disk", "mid": 1, "head": "cpu", "scale": 0},
]


class Tied(TiedHead):
    """With two modules more that have one buffer, which one of them writes to."""

    def __init__(self, seed: int = 0):
        super().__init__(seed)
        self.scale = Counts()
        self.mid.register_buffer("count", self.scale.count)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.scale(self.mid(self.embed(ids)))) + self.mid.count.to(ids.device)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x * self.count


def spread(model, places, folder):
    return dispatch_model(model, places, offload_dir=folder, stand_in=TWO)


def _load(model, folder):
    load_checkpoint_in_model(model, folder)


def _load_one_name(model, folder):
    state = Tied(1).state_dict()
    model.load_state_dict({name: state[name] for name in state if name != "head.weight"}, strict=False)


def _one_of_two(edit):
    return lambda model, folder: edit(model.embed.weight, Tied(1).embed.weight.detach())


def _other_of_two(edit):
    return lambda model, folder: edit(model.head.weight, Tied(1).embed.weight.detach())


EDITS = {
    "checkpoint": _load,
    "state dict": lambda model, folder: model.load_state_dict(Tied(1).state_dict()),
    "state dict, assigned": lambda model, folder: model.load_state_dict(Tied(1).state_dict(), assign=True),
    "state dict with one name": _load_one_name,
    "mul_": _one_of_two(lambda weight, new: weight.mul_(2)),
    "copy_": _other_of_two(lambda weight, new: weight.copy_(new)),
    "an element": _other_of_two(lambda weight, new: weight.__setitem__((0, 0), 7.0)),
    "data": _one_of_two(lambda weight, new: setattr(weight, "data", new.clone())),
    "data.mul_": _one_of_two(lambda weight, new: setattr(weight, "data", weight.data.mul_(2))),
    "data.copy_": _other_of_two(lambda weight, new: setattr(weight, "data", weight.data.copy_(new))),
    "untied": lambda model, folder: setattr(model.head, "weight", Tied(1).head.weight),
    "tied again": lambda model, folder: setattr(model.head, "weight", model.embed.weight),
}


@pytest.mark.parametrize("places", MAPS)
@pytest.mark.parametrize("edit", EDITS)
def test_what_is_changed_is_changed_everywhere(edit, places, tmp_path):
    save_model(Tied(1), tmp_path / "other")
    whole, parts = Tied(), spread(Tied(), places, tmp_path)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        for model in (whole, parts):
            model(IDS)
            EDITS[edit](model, tmp_path / "other")
        for _ in range(2):
            torch.testing.assert_close(parts(IDS), whole(IDS))
    assert {name: tensor.tolist() for name, tensor in parts.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in whole.state_dict().items()
    }


def test_both_uses_of_a_tied_weight_are_learned_from(tmp_path):
    whole, parts = Tied(), spread(Tied(), MAPS[0], tmp_path)
    for model in (whole, parts):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(IDS).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(parts.embed.weight, whole.embed.weight)
    assert len([*parts.parameters()]) == len([*whole.parameters()])


def test_a_copy_is_made_once_and_is_a_parameter(tmp_path):
    seen = []

    class Sees(nn.Linear):
        def forward(self, x):
            seen.append(self.weight)
            return super().forward(x)

    model = Tied()
    model.head.__class__ = Sees
    parts = spread(model, MAPS[0], tmp_path)
    with torch.no_grad():
        parts(IDS), parts(IDS)
        parts.embed.weight.add_(1)
        parts(IDS)
    first, second, third = seen
    assert first is second and second is not third and all(isinstance(one, nn.Parameter) for one in seen)
    assert parts.head.weight is parts.embed.weight is not third


def test_an_error_in_a_forward_and_other_threads_leave_the_tie(tmp_path):
    parts = spread(Tied(), MAPS[0], tmp_path)
    expected, errors = Tied().head(torch.ones(4)), []
    with pytest.raises(RuntimeError):
        parts.head(torch.ones(3))
    assert parts.head.weight is parts.embed.weight

    def work():
        with torch.no_grad():
            for _ in range(200):
                if not torch.equal(parts.head(torch.ones(4)), expected):
                    errors.append("another value")

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors and parts.head.weight is parts.embed.weight


def test_copies_pickles_and_models_without_hooks_are_tied(tmp_path):
    parts, expected = spread(Tied(), MAPS[0], tmp_path), Tied()(IDS)
    parts(IDS)
    for other in (copy.deepcopy(parts), pickle.loads(pickle.dumps(parts))):
        other.scale.count.zero_()
        assert other.head.weight is other.embed.weight is not parts.embed.weight
        torch.testing.assert_close(other(IDS), expected)
    again = spread(parts, {"": 0}, tmp_path)
    assert again.head.weight is again.embed.weight and not hasattr(again.head, "_hf_hook")
    whole = remove_hook_from_module(spread(Tied(), MAPS[0], tmp_path), recurse=True)
    assert whole.head.weight is whole.embed.weight
    torch.testing.assert_close(whole(IDS), expected)


def test_each_operation_is_on_one_device():
    for places in MAPS:
        places = {name: "cpu" if place == "disk" else place for name, place in places.items()}
        with fake_gpus(), torch.no_grad():
            with init_empty_weights():
                model = Tied()
            parts = dispatch_model(fill(model, places), places, 0)
            assert parts(IDS.to("cuda:0")).device.index == 0
            assert parts.head.weight is parts.embed.weight and parts.scale.count is parts.mid.count
