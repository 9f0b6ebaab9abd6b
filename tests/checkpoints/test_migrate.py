"""What modules do in `load_state_dict` is done when a checkpoint is loaded: the values are those that torch loads."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bigkit import load_checkpoint_and_dispatch
from bigkit.checkpoints.format import Checkpoint
from bigkit.checkpoints.index import PICKLE, SINGLE
from bigkit.checkpoints.load import load_checkpoint_in_model
from bigkit.checkpoints.match import match
from bigkit.checkpoints.one_by_one import stream_tensors
from bigkit.checkpoints.save import save_model


class Fused(nn.Module):
    """A pre-hook makes one tensor of three; given a child of its kind, in the child's names too."""

    def __init__(self, child=None):
        super().__init__()
        self.qkv = nn.Linear(4, 12, bias=False)
        self.child = child
        self.register_load_state_dict_pre_hook(self.fuse)

    @staticmethod
    def fuse(module, state, prefix, *rest):
        if prefix + "q" in state:
            state[prefix + "qkv.weight"] = torch.cat([state.pop(prefix + name) for name in "qkv"])


class Scaled(nn.Linear):
    """A tensor of the same name, with other values: twice over, by a hook and by the class."""

    def __init__(self):
        super().__init__(4, 4)
        self.register_load_state_dict_pre_hook(self.scale)

    @staticmethod
    def scale(module, state, prefix, *rest):
        state[prefix + "weight"] = state[prefix + "weight"] * 2

    def _load_from_state_dict(self, state, prefix, *rest):
        state[prefix + "weight"] = state[prefix + "weight"] + 1
        super()._load_from_state_dict(state, prefix, *rest)


class Versioned(nn.Module):
    """Transposes what has no version, or an old one."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if metadata.get("version", 1) < 2:
            state[prefix + "weight"] = state[prefix + "weight"].T
        super()._load_from_state_dict(state, prefix, metadata, *rest)


class Dropping(nn.Linear):
    """Takes a name away, and looks at a value, which a tensor on meta does not have."""

    def __init__(self):
        super().__init__(4, 4)
        self.register_load_state_dict_pre_hook(self.drop)

    @staticmethod
    def drop(module, state, prefix, *rest):
        if state.pop(prefix + "format").item() == 2:
            state[prefix + "weight"] = state.pop(prefix + "w")


class Extra(nn.Linear):
    """Has a state beside its tensors, and hooks that run after loading."""

    def __init__(self):
        super().__init__(4, 4)
        self.register_buffer("twice", torch.zeros(4), persistent=False)
        self.register_load_state_dict_post_hook(self.after)

    @staticmethod
    def after(module, incompatible):
        module.twice = module.bias.detach() * 2

    def get_extra_state(self):
        return getattr(self, "extra", torch.zeros(2))

    def set_extra_state(self, state):
        self.extra = state
        self.twice_of_extra = state * 2


def scalar():
    model = nn.Module()
    model.s = nn.Parameter(torch.tensor(1.0))
    return model


def norm():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3)))


def qkv(*prefixes):
    return {prefix + name: torch.randn(4, 4) for prefix in prefixes for name in "qkv"}


OLD_NORM = {"0.bias": torch.randn(4), "0.weight_g": torch.rand(4, 1, 1), "0.weight_v": torch.randn(4, 4, 3)}
STATISTICS = {name: torch.rand(3) for name in ("weight", "bias", "running_var")}
CASES = {
    "a hook fuses": (Fused, qkv("")),
    "a hook has nothing to do": (Fused, Fused().state_dict()),
    "hooks of modules in modules": (lambda: Fused(Fused()), qkv("", "child.")),
    "values under one name": (lambda: nn.Sequential(Scaled()), nn.Sequential(Scaled()).state_dict()),
    "an old version": (lambda: nn.Sequential(Versioned()), {"0.weight": torch.randn(3, 3)}),
    "the present version": (lambda: nn.Sequential(Versioned()), nn.Sequential(Versioned()).state_dict()),
    "a hook reads": (Dropping, {"format": torch.tensor(2), "w": torch.randn(4, 4), "bias": torch.randn(4)}),
    "old names": (norm, OLD_NORM),
    "no counter": (lambda: nn.BatchNorm1d(3), {"running_mean": torch.ones(3), **STATISTICS}),
    "a scalar as a vector": (scalar, {"s": torch.tensor([2.5])}),
    "extra state": (Extra, {**nn.Linear(4, 4).state_dict(), "_extra_state": torch.tensor([3.0, 4.0])}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("safe", [True, False])
def test_what_torch_loads_is_loaded(tmp_path, case, safe):
    make, tensors = CASES[case]
    torch.manual_seed(0)
    expected, model, spread = make(), make(), make()
    if safe:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / SINGLE)
        tensors = dict(tensors)  # a safetensors file has no versions
    else:
        torch.save(tensors, tmp_path / PICKLE)
    if isinstance(expected, nn.BatchNorm1d):
        for net in (expected, model, spread):
            net.num_batches_tracked += 7  # which stays
    expected.load_state_dict(tensors)
    assert load_checkpoint_in_model(model, tmp_path, strict=True).clean
    if not isinstance(spread, Extra):  # its last hook computes with what would be on meta
        load_checkpoint_and_dispatch(spread, tmp_path, {"": "disk"}, offload_folder=tmp_path / "rest", strict=True)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
        assert isinstance(spread, Extra) or torch.equal(spread.state_dict()[name].to("cpu"), value), name
    if isinstance(model, Extra):
        assert torch.equal(model.twice, expected.twice) and torch.equal(model.twice_of_extra, expected.twice_of_extra)


def test_renamed_tensors_rest_where_they_are(tmp_path):
    save_file(OLD_NORM, tmp_path / SINGLE)
    report = load_checkpoint_in_model(norm(), tmp_path, {"": "disk"})
    assert report.clean and {where.file for where in report.on_disk.values()} == {tmp_path / SINGLE}


def test_a_hook_does_not_change_a_model_that_is_refused(tmp_path):
    save_file({"weight": torch.ones(4, 4), "stranger": torch.ones(1)}, tmp_path / SINGLE)
    model = Scaled()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="missing in the checkpoint: 'bias'; unknown to the model: 'stranger'"):
        load_checkpoint_in_model(model, tmp_path, strict=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_torch_has_what_loading_asks_for():
    version = f"is not in torch {torch.__version__} any more: see bigkit/checkpoints/_torch.py"
    for name in ("_load_from_state_dict", "set_extra_state"):
        assert hasattr(nn.Module, name), f"nn.Module.{name} {version}"
    for name in ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"):
        assert hasattr(nn.Linear(1, 1), name), f"nn.Module.{name} {version}"
    assert "_extra_state" in Extra().state_dict(), f"the name _extra_state {version}"


def test_extra_state_is_saved(tmp_path):
    model, again = Extra(), Extra()
    model.set_extra_state(torch.tensor([5.0, 6.0]))
    save_model(model, tmp_path)
    load_checkpoint_in_model(again, tmp_path, strict=True)
    assert torch.equal(again.extra, model.extra)
    model.extra = {"scale": 3}
    with pytest.warns(UserWarning, match="'_extra_state' is a dict, no tensor, and is not saved"):
        save_model(model, tmp_path)


def test_the_counter_in_a_file_comes_before_a_default(tmp_path):
    saved, model = nn.Sequential(nn.BatchNorm1d(3)), nn.DataParallel(nn.Sequential(nn.BatchNorm1d(3)))
    saved[0].num_batches_tracked += 5
    save_model(saved, tmp_path)
    load_checkpoint_in_model(model, tmp_path, strict=True)
    assert model.module[0].num_batches_tracked == 5


def test_what_is_made_is_streamed_too(tmp_path):
    save_file(qkv(""), tmp_path / SINGLE)
    source = Checkpoint.open(tmp_path)
    match(Fused(), source)
    assert {name: tensor.shape for name, tensor in stream_tensors(source, ["qkv.weight"], torch.device("cpu"))} == {
        "qkv.weight": (12, 4)
    }
