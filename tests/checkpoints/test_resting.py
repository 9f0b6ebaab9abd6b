"""Weights that rest on disk: whatever happens to a model, its own tensors are the truth."""

import os
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from bigkit.checkpoints.format import Checkpoint
from bigkit.checkpoints.index import SINGLE
from bigkit.checkpoints.load import load_checkpoint_in_model
from bigkit.checkpoints.resting import resting_place
from bigkit.checkpoints.save import save_model
from bigkit.checkpoints.state_dict import load_state_dict
from tests.checkpoints.nets import Net, empty, same


def test_a_model_on_disk_is_saved_from_its_files(tmp_path):
    model = Net()
    save_model(model, tmp_path / "a", "2KB")
    again = empty()
    load_checkpoint_in_model(again, tmp_path / "a", {"": "disk"}, offload_buffers=True)
    assert all(tensor.is_meta for tensor in again.parameters())
    save_model(again, tmp_path / "b", "3KB")
    back = empty()
    assert load_checkpoint_in_model(back, tmp_path / "b", strict=True).clean and same(model, back)
    save_model(again, tmp_path / "a", "1KB")  # over the files that it rests in
    save_model(again, os.path.relpath(tmp_path / "a"), "4KB")  # the same folder by another name
    save_model(again, tmp_path / "a", "2KB")
    assert load_checkpoint_in_model(back, tmp_path / "a", strict=True).clean and same(model, back)


def on_disk(folder, **options):
    """A model whose weights rest in a new checkpoint, and another one that has them."""
    model, resting = Net(**options), empty(**options)
    save_model(model, folder)
    load_checkpoint_in_model(resting, folder, {"": "disk"})
    return model, resting


def reloaded(model, folder, **options):
    """What another model has that loads what a model saves."""
    save_model(model, folder)
    other = empty(**options)
    assert load_checkpoint_in_model(other, folder, strict=True).clean
    return other


def new_parameter(like):
    return nn.Parameter(torch.randn(like.shape))


def assign(model):
    model.load_state_dict(
        {n: torch.full(t.shape, 5, dtype=t.dtype) for n, t in model.state_dict().items()}, assign=True
    )


def set_parameter(model):
    model.h[1].weight = new_parameter(model.h[1].weight)


def set_one_of_two_tied(model):
    model.head.weight = new_parameter(model.head.weight)


def replace_submodule(model):
    model.h[2] = nn.Linear(16, 16)


def fill_all(model):
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(3)


@pytest.mark.parametrize("change", [assign, set_parameter, set_one_of_two_tied, replace_submodule, fill_all])
def test_what_a_model_has_itself_is_saved_and_dispatched(tmp_path, change):
    from bigkit import dispatch_model

    _, model = on_disk(tmp_path / "a")
    change(model)
    real = {name: tensor.clone() for name, tensor in model.named_parameters() if not tensor.is_meta}
    assert real
    tied = model.head.weight is model.embed.weight
    saved = reloaded(model, tmp_path / "b", tie=tied).state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in real.items())
    dispatch_model(model, {"": "cpu"})
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


def test_aliases_of_a_tensor_on_disk_rest_where_it_rests(tmp_path):
    model, resting = on_disk(tmp_path / "a", tie=False)
    resting.head.weight = resting.embed.weight
    resting.h[0].weight = nn.Parameter(resting.h[1].weight)  # another object, the same storage
    del resting.embed.weight, resting.h[1]
    other = nn.Linear(16, 16)
    other.load_state_dict(resting.h[0].state_dict(), assign=True)
    saved = Checkpoint.open(save(resting, tmp_path / "b"))
    assert torch.equal(saved.read("head.weight"), model.embed.weight)
    assert torch.equal(saved.read("h.0.weight"), model.h[1].weight)
    assert torch.equal(Checkpoint.open(save(other, tmp_path / "c")).read("weight"), model.h[1].weight)


def save(model, folder):
    save_model(model, folder)
    return folder


@pytest.mark.parametrize(
    "change",
    [lambda m: m.half(), lambda m: setattr(m.h[0], "weight", nn.Parameter(torch.empty(16, 16, device="meta"))),
     lambda m: setattr(m.h[0], "weight", nn.Parameter(m.h[0].weight[:8]))],
)  # fmt: skip
def test_another_tensor_on_meta_has_no_data(tmp_path, change):
    _, model = on_disk(tmp_path / "a")
    change(model)
    with pytest.raises(ValueError, match=r"h\.0\.weight.* on meta and have no data to save: load a checkpoint first"):
        save_model(model, tmp_path / "b")


def test_a_real_model_lets_go_of_what_rests_on_disk(tmp_path):
    model, loaded = Net(), Net()
    save_model(model, tmp_path / "a", "2KB")
    report = load_checkpoint_in_model(loaded, tmp_path / "a", {"": "disk"})
    assert loaded.head.weight.is_meta and loaded.head.weight is loaded.embed.weight and report.clean
    assert same(reloaded(loaded, tmp_path / "b"), model)


def test_a_model_on_disk_has_the_dtype_that_lies_there(tmp_path):
    model, half = Net(), empty()
    save_model(model, tmp_path / "a")
    load_checkpoint_in_model(half, tmp_path / "a", {"": "disk"}, tmp_path / "off", dtype=torch.float16)
    assert half.scale.is_meta and half.scale.dtype == torch.float16
    save_model(half, tmp_path / "b")
    assert Checkpoint.open(tmp_path / "b").stored["scale"].dtype == torch.float16
    assert list((tmp_path / "off").iterdir())
    del half
    assert not list((tmp_path / "off").iterdir())


@pytest.mark.parametrize("size", ["2KB", "10GB"])
def test_shards_take_the_place_of_the_file_in_which_a_model_rests(tmp_path, size):
    from bigkit import dispatch_model

    model, resting = on_disk(tmp_path)
    save_model(resting, tmp_path, size)
    assert {resting_place(tensor).parts[""].file for tensor in resting.parameters()} == {
        *Checkpoint.open(tmp_path).files
    }
    save_model(resting, tmp_path, "3KB")
    assert same(reloaded(resting, tmp_path / "b"), model)
    dispatch_model(resting, {"": "cpu"})
    assert same(resting, model)


@pytest.mark.parametrize("change", ["saved over", "removed", "written to"])
def test_a_file_that_another_changes_is_an_error(tmp_path, change):
    from bigkit import dispatch_model

    _, resting = on_disk(tmp_path / "a")
    file = tmp_path / "a" / SINGLE
    if change == "saved over":
        save_model(Net(), tmp_path / "a")
    elif change == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes() + b" ")
    for use in (lambda: save_model(resting, tmp_path / "b"), lambda: dispatch_model(resting, {"": "cpu"})):
        with pytest.raises(OSError, match="was changed or removed while weights of a model rest in it"):
            use()
    assert not (tmp_path / "b").exists() and resting.scale.is_meta


def test_a_resting_place_goes_with_its_tensor(tmp_path):
    from bigkit.checkpoints.resting import _places

    before = len(_places)
    _, model = on_disk(tmp_path)
    assert len(_places) > before and not {"_on_disk", "_written"} & vars(model).keys()
    del model
    assert len(_places) == before


NAMES = "abcd"
STEP = st.one_of(
    st.tuples(st.just("load"), st.dictionaries(st.sampled_from(NAMES), st.sampled_from(["disk", "cpu"]))),
    st.tuples(st.sampled_from(["set", "assign", "set data", "delete"]), st.sampled_from(NAMES)),
    st.tuples(st.just("tie"), st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES))),
    st.tuples(st.just("save"), st.tuples(st.integers(0, 2), st.sampled_from([1, 70, "1GB"]))),
)


class Cell:
    """What one tensor must hold; tied names share one."""

    def __init__(self, value):
        self.value = value


class Compared:
    """A model beside a dictionary of what must be in it, changed alike."""

    def __init__(self, root):
        self.root, self.count = root, 0
        self.model, self.cells = nn.Module(), {}
        for name in NAMES:
            self.set(name)

    def fresh(self):
        self.count += 1
        return torch.full((4, 4), float(self.count))

    def set(self, name):
        self.cells[name] = Cell(self.fresh())
        setattr(self.model, name, nn.Parameter(self.cells[name].value.clone()))

    def assign(self, name):
        if name in self.cells:
            self.cells[name] = Cell(self.fresh())
            self.model.load_state_dict({name: self.cells[name].value.clone()}, strict=False, assign=True)

    def set_data(self, name):  # seen under every tied name
        if name in self.cells and not getattr(self.model, name).is_meta:  # torch refuses it on meta
            self.cells[name].value = self.fresh()
            getattr(self.model, name).data = self.cells[name].value.clone()

    def delete(self, name):
        if self.cells.pop(name, None):
            delattr(self.model, name)

    def tie(self, names):
        first, second = names
        if first in self.cells:
            self.cells[second] = self.cells[first]
            setattr(self.model, second, getattr(self.model, first))

    def load(self, places):
        state = {name: self.fresh() for name in NAMES}
        folder = self.root / f"loaded{self.count}"
        folder.mkdir()
        save_file(state, folder / SINGLE)
        for cell in {id(cell): cell for cell in self.cells.values()}.values():
            cell.value = state[next(name for name in self.cells if self.cells[name] is cell)]
        load_checkpoint_in_model(self.model, folder, {"": "cpu", **places})

    def save(self, target):
        number, size = target
        folder = self.root / f"saved{number}"
        if not self.cells:
            return
        save_model(self.model, folder, size)
        saved = load_state_dict(folder)
        assert {self.cells[name] for name in saved} == {*self.cells.values()}
        assert len(saved) == len({*self.cells.values()})
        for name, tensor in saved.items():
            assert torch.equal(tensor, self.cells[name].value), name
        # From now on it rests in the folder that later saves replace.
        load_checkpoint_in_model(self.model, folder, {"": "disk"})


def stays_what_a_dictionary_would_be(tmp_path_factory, steps):
    compared = Compared(tmp_path_factory.mktemp("compared"))
    for step, argument in steps:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a file may hold what was deleted
            getattr(compared, step.replace(" ", "_"))(argument)
    compared.save((0, "1GB"))


STEPS = given(steps=st.lists(STEP, max_size=12))
test_a_model_stays_what_a_dictionary_would_be = settings(max_examples=50)(STEPS(stays_what_a_dictionary_would_be))
test_the_same_for_long = pytest.mark.soak(settings(max_examples=3000)(STEPS(stays_what_a_dictionary_would_be)))


@pytest.mark.parametrize("size", ["2KB", "1GB"])
def test_a_process_may_go_to_another_folder(size, tmp_path, monkeypatch):
    model, again = Net(), empty()
    monkeypatch.chdir(tmp_path)
    save_model(model, "a", size)
    load_checkpoint_in_model(again, "a", {"": "disk"}, offload_buffers=True)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    save_model(again, tmp_path / "b")
    whole = empty()
    load_checkpoint_in_model(whole, tmp_path / "b")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in whole.state_dict().items())
