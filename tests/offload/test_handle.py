"""Weights that are used or changed while they rest: always what the whole model would have done."""

import copy
import io
import operator
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from bigkit.offload.handle import Away
from bigkit.offload.hooks import remove_hook_from_module
from bigkit.offload.one_place import cpu_offload
from tests.spread import STAND_IN, Net, check_at_rest, same, spread_ways

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def weight(model):
    return model.h[1].a.weight


def in_place(model):
    with torch.no_grad():
        weight(model).mul_(2)


def row(model):
    with torch.no_grad():
        weight(model)[0] = 0.0


def out(model):
    with torch.no_grad():
        torch.mul(model.h[0].a.weight, 3, out=weight(model))


def swap(model):
    one, two = model.h[1].a, model.h[2].b
    one.weight, two.weight = two.weight, one.weight


def tie_and_edit(model):
    model.h[1].a.weight = model.h[2].a.weight
    model.h[2].a.weight.data.add_(1)


def init(model):
    torch.manual_seed(1)
    nn.init.normal_(weight(model))
    nn.init.zeros_(model.h[2].b.bias)


def optimizer_step(model):
    model.zero_grad()
    for parameter in model.parameters():
        parameter.data.add_(torch.full(parameter.shape, 0.1), alpha=-0.5)


def new_layer(model):
    model.h[1].a = nn.Linear(8, 8)
    nn.init.ones_(model.h[1].a.weight)
    nn.init.zeros_(model.h[1].a.bias)


def swap_blocks(model):
    model.h[1], model.h[2] = model.h[2], model.h[1]


def remove_block(model):
    del model.h[2]


def vector(model):
    vector_to_parameters(parameters_to_vector(model.parameters()) * 2, model.parameters())


def load(model):
    model.load_state_dict({name: torch.full(value.shape, 0.1) for name, value in model.state_dict().items()})


def assign(model):
    state = {name: torch.full(value.shape, 0.1) for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


EDITS = {
    "in place": in_place,
    "through .data": lambda model: weight(model).data.mul_(2),
    "new .data": lambda model: setattr(weight(model), "data", torch.ones(8, 8)),
    "own .data, transposed": lambda model: setattr(weight(model), "data", weight(model).data.t().contiguous()),
    "a row": row,
    "an element": lambda model: weight(model).data.__setitem__((1, 2), 5.0),
    "a masked part": lambda model: weight(model).data.__setitem__(weight(model).data > 0, 0.5),
    "what float() gave": lambda model: weight(model).data.float().mul_(2),
    "what cpu() gave": lambda model: weight(model).data.cpu().mul_(2),
    "out=": out,
    "new parameter": lambda model: setattr(model.h[1].a, "weight", nn.Parameter(torch.ones(8, 8))),
    "no bias": lambda model: setattr(model.h[1].a, "bias", None),
    "other shape": lambda model: setattr(model.h[1].a, "bias", nn.Parameter(torch.ones(1))),
    "swapped weights": swap,
    "tied later": tie_and_edit,
    "init": init,
    "gradient step": optimizer_step,
    "new layer": new_layer,
    "swapped blocks": swap_blocks,
    "removed block": remove_block,
    "extra parameter": lambda model: model.h[1].register_parameter("extra", nn.Parameter(torch.ones(2))),
    "an activation in place": lambda model: F.relu(weight(model).data, inplace=True),
    "by position": lambda model: F.threshold(weight(model).data, 0.1, 0.0, True),
    "rows of a greatest norm": lambda model: F.embedding(torch.tensor([0, 1]), weight(model), max_norm=0.1),
    "a function of each element": lambda model: weight(model).data.apply_(lambda value: 2 * value),
    "foreach": lambda model: torch._foreach_mul_([parameter.data for parameter in model.parameters()], 2.0),
    "vector": vector,
    "load_state_dict": load,
    "load_state_dict, assign": assign,
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edit_between_forwards_counts(edit, tmp_path):
    torch.manual_seed(0)
    model = Net()
    for run_before in (False, True):
        whole = copy.deepcopy(model)
        edit(whole)
        expected = whole(X)
        for way, parts in spread_ways(model, tmp_path):
            if run_before:
                parts(X)
            edit(parts)
            for _ in range(3):
                assert same(parts(X), expected), (way, run_before)
            check_at_rest(parts)


def test_a_parameter_that_is_replaced_takes_its_place_in_ram(tmp_path):
    for _, model in spread_ways(Net(), tmp_path):
        model.h[1].a.weight = nn.Parameter(torch.ones(8, 8), requires_grad=False)
        model(X)
        assert isinstance(weight(model), Away) and not weight(model).requires_grad
        assert torch.equal(weight(model).clone(), torch.ones(8, 8))


def test_questions_are_answered_without_data(tmp_path):
    model = cpu_offload(Net(), 0, stand_in=STAND_IN)
    handle = weight(model)
    asked = []
    handle.streamer.load = lambda *given: asked.append(given)  # nothing may ask for the data
    assert handle.shape == (8, 8) and handle.dtype == torch.float32 and handle.device == torch.device("cpu")
    assert handle.numel() == 64 and len(handle) == 8 and handle.nbytes == 256 and not handle.is_meta
    assert handle.requires_grad and handle.is_leaf and handle.grad is None and isinstance(handle, nn.Parameter)
    assert handle.is_contiguous() and handle.stride() == (8, 1) and handle.is_floating_point()
    assert {handle: 1}[handle] == 1 and "rests in RAM" in repr(handle)
    assert sum(parameter.numel() for parameter in model.parameters()) == Net().scale.numel() + 9 * 72
    model.state_dict()
    assert not asked


def test_weights_used_elsewhere_than_in_their_module(tmp_path):
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x):
            return F.linear(x, self.lin.weight) + self.lin.bias

    class Across(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Inside(), Inside()
            self.alone = nn.Linear(8, 8)

        def forward(self, x):
            x = self.second(self.first(x)) @ self.first.lin.weight.T  # another block's
            return F.linear(x, self.alone.weight[:4]) + torch.cat([self.second.lin.bias, self.alone.bias])[2:6]

    model = Across()
    for way, parts in spread_ways(model, tmp_path):
        assert same(parts(X), model(X)) and same(parts(X), model(X)), way
        assert same(F.linear(X, parts.alone.weight), F.linear(X, model.alone.weight)), way
        check_at_rest(parts)


def test_values_come_out(tmp_path):
    model = Net()
    for way, parts in spread_ways(model, tmp_path):
        handle, real = parts.scale, model.scale
        assert handle.tolist() == real.tolist() and handle[3].item() == real[3].item(), way
        assert np.array_equal(handle.detach().numpy(), real.detach().numpy())
        assert torch.equal(torch.stack([handle, handle]), torch.stack([real, real]))
        assert (handle == real).all() and bool(handle.sum() == real.sum())
        with pytest.raises(ValueError, match="read-only"):
            handle.detach().numpy()[0] = 1
        assert handle.detach().load().device.type == "cpu"


def test_state_dict_is_a_snapshot_once_copied_or_saved(tmp_path):
    model = Net()
    for way, parts in spread_ways(model, tmp_path):
        snapshot, file = copy.deepcopy(parts.state_dict()), io.BytesIO()
        torch.save(parts.state_dict(), file)
        in_place(parts)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)  # plain tensors, no handles
        for name, value in model.state_dict().items():
            assert torch.equal(loaded[name], value) and torch.equal(snapshot[name], value), (way, name)
            assert type(snapshot[name]) is torch.Tensor
        parts.load_state_dict(snapshot)
        assert same(parts(X), model(X))


def test_requires_grad_can_be_switched(tmp_path):
    for way, parts in spread_ways(Net(), tmp_path):
        assert parts(X).requires_grad
        parts.requires_grad_(False)
        assert not parts(X).requires_grad and not any(p.requires_grad for p in parts.parameters()), way
        parts.h[3].a.weight.requires_grad = True
        assert parts(X).requires_grad and not parts.h[0](X).requires_grad


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    assert file.tell() < 12_000  # bytes: the weights alone, not what they rest in
    file.seek(0)
    return torch.load(file, weights_only=True)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "torch.save": saved,
}
THINGS = {
    "a weight": weight,
    "the root's own": lambda model: model.scale,
    "parameters": lambda model: dict(model.named_parameters()),
    "tied": lambda model: [model.h[0].a.weight, model.h[0].a.weight],
    "detached": lambda model: {"w": weight(model).detach()},
    "state dict": lambda model: dict(model.state_dict()),
    "state dict of handles": lambda model: dict(model.state_dict(keep_vars=True)),
}


@pytest.mark.parametrize("way_to_copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("thing", THINGS.values(), ids=THINGS)
def test_handles_copy_and_pickle_as_the_weights(way_to_copy, thing, tmp_path):
    model = Net()
    expected = thing(model)
    for way, parts in spread_ways(model, tmp_path):
        before = parts(X)
        given = thing(parts)
        copied = way_to_copy(given)
        if way_to_copy is copy.copy and not isinstance(given, torch.Tensor):
            continue  # a new container of the same handles
        assert same(copied, expected), way
        pairs = [(copied, expected)] if isinstance(copied, torch.Tensor) else []
        if isinstance(copied, dict):
            pairs = [(copied[name], expected[name]) for name in expected]
        elif isinstance(copied, list):
            assert copied[0] is copied[1]
        with torch.no_grad():
            for new, old in pairs:
                assert type(new) is type(old) and new.requires_grad == old.requires_grad, way
                new.zero_()
        assert same(parts(X), before)
        check_at_rest(parts)


def test_a_spread_model_does_not_copy_but_a_part_of_it_does(tmp_path):
    model = Net()
    for way, parts in spread_ways(model, tmp_path):
        for work in (copy.deepcopy, pickle.dumps, lambda thing: torch.save(thing, io.BytesIO())):
            for thing in (parts, {"model": parts}, nn.Sequential(parts)):
                with pytest.raises(TypeError, match="is spread out by bigkit and cannot be copied or pickled: call"):
                    work(thing)
        for copied in (copy.deepcopy(parts.h[1]), copy.deepcopy(parts.h)[1]):
            assert type(copied.a.weight) is nn.Parameter and same(copied(X), model.h[1](X)), way
            with torch.no_grad():
                copied.a.weight.zero_()
        assert same(copy.deepcopy(parts.h[1].a)(X), model.h[1].a(X)) and same(parts(X), model(X)), way
        check_at_rest(parts)


def test_weights_have_addresses_of_their_own(tmp_path):
    """By these Accelerate, safetensors, Transformers and others tell what is tied."""
    import accelerate
    import safetensors.torch

    model = Net()
    model.out.weight = model.h[0].a.weight
    for i, (way, parts) in enumerate(spread_ways(model, tmp_path)):
        for state in (parts.state_dict(), parts.state_dict(keep_vars=True)):
            storages = [tensor.untyped_storage() for tensor in state.values()]
            pointers = {storage.data_ptr(): name for name, storage in zip(state, storages)}
            assert len(pointers) == len(state) - 1 and 0 not in pointers, way
            assert [storage.nbytes() for storage in storages] == [tensor.nbytes for tensor in state.values()]
            assert state["out.weight"].data_ptr() == state["h.0.a.weight"].untyped_storage().data_ptr()
        accelerate.Accelerator(cpu=True).save_model(parts, tmp_path / f"a{i}")
        safetensors.torch.save_model(parts, tmp_path / f"s{i}")
        for file in (tmp_path / f"a{i}" / "model.safetensors", tmp_path / f"s{i}"):
            loaded = safetensors.torch.load_file(file)
            assert len(loaded) == len(pointers)
            for name, value in loaded.items():
                assert torch.equal(value, model.state_dict()[name]), (way, name)
        assert same(parts(X), model(X)), way


VIEWS = {
    "a row": lambda w: w[0].zero_(),
    "a row of the data": lambda w: w.data[0].mul_(2),
    "a view of a view": lambda w: w.data.view(-1)[3:9].mul_(2),
    "transposed": lambda w: w.data.T.mul_(torch.arange(8.0)),
    "half of it": lambda w: w.data.chunk(2)[1].zero_(),
    "an element of a view": lambda w: w.data[0].__setitem__(1, 5.0),
    "in place, by an operator": lambda w: operator.iadd(w.data[2:4], 1),
    "views in one call": lambda w: torch._foreach_mul_([w.data[0], w.data[1]], 3.0),
    "out=": lambda w: torch.mul(w.data[1], 3, out=w.data[0]),
    "init": lambda w: nn.init.normal_(w[:4]),
    "an activation in place": lambda w: F.relu(w[:4], inplace=True),
}


@pytest.mark.parametrize("write", VIEWS.values(), ids=VIEWS)
def test_a_write_into_a_view_is_refused(write, tmp_path):
    model = Net()
    for way, parts in spread_ways(model, tmp_path):
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"would write into a view of 'h\.1\.a\.weight'"):
            write(weight(parts))
        assert same(parts(X), model(X)), way
        check_at_rest(parts)


HIDDEN = {
    "storage": lambda w: w.untyped_storage().fill_(0),
    "typed storage": lambda w: w.data._typed_storage().fill_(0),
    "an element of the storage": lambda w: w.data.untyped_storage().__setitem__(0, 1),
    "DLPack": lambda w: np.from_dlpack(w.data).fill(0),
    "DLPack of a view": lambda w: torch.from_dlpack(w.data[0]).zero_(),
    "numpy": lambda w: w.data.numpy().fill(0),
    "an array": lambda w: np.asarray(w.data[0]).fill(0),
}


@pytest.mark.parametrize("write", HIDDEN.values(), ids=HIDDEN)
def test_a_write_that_nobody_would_see_is_refused(write, tmp_path):
    """The storage of a weight in RAM is that of its whole block."""
    model = Net()
    for way, parts in spread_ways(model, tmp_path):
        with torch.no_grad(), pytest.raises((RuntimeError, ValueError), match="would write|would go unseen|read-only"):
            write(weight(parts))
        assert same(parts(X), model(X)), way
        storage = weight(parts).data.untyped_storage()
        assert len(storage) == len(storage.tolist()) == weight(model).nbytes
        assert storage.tolist() == weight(model).untyped_storage().tolist()
        check_at_rest(parts)


def test_numpy_cannot_write_to_what_is_lent(tmp_path):
    model = Net()
    for way, parts in spread_ways(model, tmp_path):
        for read in (lambda w: w.data.numpy(), lambda w: w.detach().numpy(), lambda w: np.asarray(w.detach())):
            seen = []
            hook = parts.h[1].a.register_forward_pre_hook(lambda layer, _, r=read, s=seen: s.append(r(layer.weight)))
            with torch.no_grad():
                assert same(parts(X), model(X)), way
            hook.remove()
            assert not seen[0].flags.writeable and np.array_equal(seen[0], weight(model).detach().numpy()), way
        with torch.no_grad():
            assert same(parts(X), model(X)), way


def test_a_gradient_is_refused_in_one_sentence(tmp_path):
    for way, parts in spread_ways(Net(), tmp_path):
        with pytest.raises(RuntimeError, match=r"'h\.1\.a\.weight' rests elsewhere and takes no gradient"):
            weight(parts).grad = torch.ones(8, 8)
        weight(parts).grad = None
        assert weight(parts).grad is None, way


def test_views_can_be_read(tmp_path):
    model = Net()
    for way, parts in spread_ways(model, tmp_path):
        view, expected = weight(parts)[2:4], weight(model)[2:4]
        assert torch.equal(view, expected) and torch.equal(view.T, expected.T) and view[0, 1].item() == expected[0, 1]
        assert type(view + 1) is torch.Tensor and same(F.linear(X, view), F.linear(X, expected)), way
        changed = view.clone().mul_(2)
        assert torch.equal(changed, expected * 2) and same(parts(X), model(X))
        assert type(view.load()) is torch.Tensor and torch.equal(view.load("cpu"), expected)
        assert type(copy.deepcopy(view)) is torch.Tensor and torch.equal(copy.deepcopy(view), expected)
        assert torch.equal(pickle.loads(pickle.dumps(view)), expected)
        with pytest.raises(ValueError, match="read-only"):
            view.detach().numpy()[0] = 1
        with torch.inference_mode():
            assert torch.equal(weight(parts)[2:4].T, expected.T)
        first, second = weight(parts).data.chunk(2)
        assert torch.equal(torch.cat([first, second]), weight(model))


def test_a_weight_of_another_form(tmp_path):
    """Other shapes and dtypes, as when embeddings are resized."""
    model = Net()
    for way, parts in spread_ways(model, tmp_path):
        whole = copy.deepcopy(model)
        for each in (whole, parts):
            each(X)
            inner = each.h[1]
            inner.a.weight.data = torch.cat([inner.a.weight.data, 2 * inner.a.weight.data[:3]])
            inner.a.bias.data = torch.arange(11.0)
            inner.b.weight.data = F.pad(inner.b.weight.data, (0, 3), value=0.5)
            each.h[2].a.weight = each.h[3].a.weight
            each.h[3].a.weight.data = each.h[3].a.weight.data.T.contiguous()
        for _ in range(2):
            assert same(parts(X), whole(X)), way
        check_at_rest(parts)
        assert repr(parts.h[1].a.weight).startswith("<h.1.a.weight: 11 x 8 torch.float32, rests in RAM")
        for each in (whole, parts):
            for parameter in each.parameters():
                parameter.data = parameter.data.double()
        assert same(parts(X.double()), whole(X.double())), way
        assert same(dict(parts.state_dict()), dict(whole.state_dict())), way
        remove_hook_from_module(parts, recurse=True)
        assert same(parts(X.double()), whole(X.double())), way


def test_a_form_that_cannot_be_is_refused():
    parts, seen = cpu_offload(Net(), 0, stand_in=STAND_IN), []
    with pytest.raises(RuntimeError, match=r"this is a detached 'h\.1\.a\.weight'"):
        weight(parts).data.data = torch.zeros(8, 8)
    with pytest.raises(ValueError, match=r"rests as \(8, 8\) torch.float32 and cannot become \(2, 2\)"):
        weight(parts).data = torch.zeros(2, 2, device="meta")

    def change(*_):
        with pytest.raises(ValueError, match="while a forward runs: change it between forwards") as error:
            parts.h[3].a.weight.data = torch.zeros(2, 2)
        seen.append(error)

    parts.h[1].register_forward_hook(change)
    before = parts(X)
    assert seen and same(parts(X), before)


def test_a_leaf_that_requires_grad_is_not_written_to_outside_no_grad():
    for model in (Net(), cpu_offload(Net(), 0, stand_in=STAND_IN)):
        with pytest.raises(RuntimeError, match="leaf"):
            weight(model).mul_(2)
        with pytest.raises(RuntimeError, match="leaf"):
            weight(model)[0] = 0.0
