"""A slot is filled anew only when nobody sees it: not the caller of a forward, not the module, not another thread."""

import copy
import dataclasses
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.utils import ModelOutput

from bigkit.checkpoints.save import save_model
from bigkit.checkpoints.state_dict import load_state_dict
from bigkit.offload.one_place import cpu_offload
from tests.spread import STAND_IN, Net, check_at_rest, same, spread_ways

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@dataclasses.dataclass(frozen=True)
class Record:
    rows: torch.Tensor
    number: int = 3


@dataclasses.dataclass
class Output(ModelOutput):
    rows: torch.Tensor | None = None


class Opaque:
    """Nothing that one looks into for tensors."""

    def __init__(self, rows):
        self.rows = rows


def kept(layer, rows):
    layer.kept = rows
    return lambda: layer.kept


# What a layer returns for its weight, as a function that gives it; called when all layers have worked.
WAYS = {
    "itself": lambda layer: layer.weight,
    "buffer": lambda layer: layer.table,
    "rows": lambda layer: layer.weight[:3],
    "transposed": lambda layer: layer.weight.T,
    "expanded": lambda layer: layer.weight[0].expand(3, 8),
    "tuple": lambda layer: (1, layer.weight[:3], layer.weight),
    "dict": lambda layer: {"rows": [layer.weight[2:5]]},
    "dataclass": lambda layer: Record(layer.weight[:3]),
    "output": lambda layer: Output(rows=layer.weight[:3]),
    "opaque": lambda layer: Opaque(layer.weight[:3]),
    "closure": lambda layer: (lambda rows: lambda: rows)(layer.weight[:3]),
    "attribute": lambda layer: kept(layer, layer.weight[:3]),
    "detached attribute": lambda layer: kept(layer, layer.weight.detach()),
    "parameter as attribute": lambda layer: kept(layer, [layer.weight]),
}


class Layer(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way, self.kept = way, None
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.register_buffer("table", torch.randn(8, 8))

    def forward(self):
        return WAYS[self.way](self)


def plain(value):
    """Copies of the tensors in a value, in a list."""
    if isinstance(value, torch.Tensor):
        return [value.detach().clone()]
    if callable(value):
        return plain(value())
    if isinstance(value, (Record, Opaque)):
        return plain(value.rows)
    if isinstance(value, dict):
        return plain([*value.values()])
    return [leaf for item in value for leaf in plain(item)] if isinstance(value, (list, tuple)) else []


class Collects(nn.Module):
    def __init__(self, ways):
        super().__init__()
        self.h = nn.ModuleList(map(Layer, ways))

    def forward(self):
        return [layer() for layer in self.h]


@settings(max_examples=40)
@given(st.lists(st.sampled_from([*WAYS]), min_size=1, max_size=6), st.integers(1, 3), st.booleans())
def test_what_a_layer_gives_away_of_its_weight_stays(ways, slots, grad):
    if grad:  # the graph refers to parameters too: who takes one gets no copy
        ways = ["rows" if way == "parameter as attribute" else way for way in ways]
    model = Collects(ways)
    parts = cpu_offload(copy.deepcopy(model), 0, stand_in=STAND_IN, slots=slots, offload_buffers=True)
    expected = plain(model())
    with torch.set_grad_enabled(grad):
        first = parts()
        second = parts()
    assert same(plain(first), expected) and same(plain(second), expected)
    check_at_rest(parts)


@pytest.mark.parametrize("way", WAYS)
def test_wherever_it_rests(way, tmp_path):
    model = Collects([way] * 4)
    expected = plain(model())
    with torch.no_grad():
        for name, parts in spread_ways(Collects([way] * 4), tmp_path):
            parts.load_state_dict(model.state_dict())
            assert same(plain(parts()), expected) and same(plain(parts()), expected), name
            check_at_rest(parts)


@pytest.mark.parametrize("grad", [False, True])
def test_slots_stay_where_nothing_leaves_them(grad):
    parts = cpu_offload(Net(), 0, stand_in=STAND_IN)
    with torch.set_grad_enabled(grad):
        outputs = [parts(X)]  # kept, with their graphs
        slots = [*parts.scale.streamer.slots]
        outputs += [parts(X) for _ in range(5)]
        with pytest.raises(RuntimeError):
            parts(X[:, :3])
        outputs.append(parts(X))
    assert [*map(id, parts.scale.streamer.slots)] == [*map(id, slots)]


READERS = {
    "state dict": lambda model, folder: model.state_dict(),
    "parameters": lambda model, folder: dict(model.named_parameters()),
    "detached": lambda model, folder: {name: tensor.detach() for name, tensor in model.named_parameters()},
    "views": lambda model, folder: {name: tensor.view(-1) for name, tensor in model.named_parameters()},
    "saved": lambda model, folder: save_model(model, folder) or load_state_dict(folder),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_another_thread_reads_during_a_forward(read, tmp_path):
    """It gets the weights themselves, whatever the forward does with the slots afterwards."""
    model = nn.Sequential(*Net().h)
    expected = read(model, tmp_path / "plain")
    for way, parts in spread_ways(model, tmp_path):
        results, threads = [], []

        def look(*_, parts=parts, results=results, threads=threads):
            thread = threading.Thread(target=lambda: results.append(read(parts, tmp_path / "parts")), daemon=True)
            threads.append(thread)
            thread.start()
            thread.join(0.05)  # a reader may also wait for the forward's end

        handles = [parts[i].b.register_forward_hook(look) for i in (1, 2)]
        with torch.no_grad():
            parts(X)
            for handle in handles:
                handle.remove()
            parts(X)
        for thread in threads:
            thread.join(10)
        assert len(results) == 2, way
        for tensors in results:
            assert tensors.keys() == expected.keys()
            for name, tensor in tensors.items():
                assert torch.equal(tensor.detach().clone(), expected[name].detach()), (way, name)
        check_at_rest(parts)
