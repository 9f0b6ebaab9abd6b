"""Reading a module's skeleton: every tensor, its ties, and what a config says."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from bigkit import init_empty_weights
from bigkit.meta.skeleton import spec_from_module, tied_groups


def test_tied_buffers_are_found_unless_left_out():
    model = nn.Module()
    model.register_buffer("a", torch.arange(4))
    model.register_buffer("b", model.a)
    model.register_buffer("part", model.a[:2])
    assert tied_groups(model) == [["a", "b"]]
    assert tied_groups(model, buffers=False) == []


def test_spec_holds_every_tensor_with_its_dtype():
    model = nn.Sequential(nn.Linear(4, 3).half(), nn.BatchNorm1d(3), nn.MultiheadAttention(4, 2))
    model.register_parameter("root", nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)))
    model.register_buffer("temporary", torch.zeros(5, dtype=torch.int64), persistent=False)
    spec = spec_from_module(model)
    expected = {name: (tuple(t.shape), str(t.dtype)[6:]) for name, t in model.named_parameters()}
    expected |= {name: (tuple(t.shape), str(t.dtype)[6:]) for name, t in model.named_buffers()}
    assert {name: (tensor.shape, tensor.dtype) for name, (tensor, _) in spec.tensors.items()} == expected
    assert spec.bytes() == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    buffers = {name: tensor.persistent for name, (tensor, _) in spec.tensors.items() if tensor.buffer}
    assert buffers == {
        "temporary": False, "1.running_mean": True, "1.running_var": True, "1.num_batches_tracked": True
    }  # fmt: skip
    assert spec.root.children["0"].linear and not spec.root.children["1"].linear
    assert (spec.name, spec.library, spec.no_split) == ("Sequential", "module", ())


def test_identical_parts_are_one_object_and_shared_modules_are_tied():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2)), "b": nn.Sequential(shared), "c": nn.Sequential(shared)})
    spec = spec_from_module(model)
    assert spec.root.children["a"] is spec.root.children["b"] is spec.root.children["c"]
    assert spec.ties == (("b.0.weight", "c.0.weight"), ("b.0.bias", "c.0.bias"))
    assert spec.bytes() == 2 * 6 * 4


def test_no_split_is_collected_or_given():
    class Inner(nn.Module):
        _no_split_modules = {"B", "A"}

    class Outer(nn.Module):
        _no_split_modules = ["Z"]

        def __init__(self):
            super().__init__()
            self.one, self.two = Inner(), Inner()

    assert spec_from_module(Outer()).no_split == ("Z", "A", "B")
    assert spec_from_module(Outer(), name="mine", no_split="Block").no_split == ("Block",)
    with pytest.raises(TypeError, match="expected an nn.Module, not str"):
        spec_from_module("gpt2")


def test_spec_of_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model("gpt2")
    with init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(config)
    spec = spec_from_module(model, "gpt2")
    assert spec.parameters == model.num_parameters() == 124_439_808
    assert spec.ties == (("transformer.wte.weight", "lm_head.weight"),)
    assert spec.no_split == ("GPT2Block",) and spec.library == "transformers"
    blocks = spec.root.children["transformer"].children["h"].children
    assert len({id(block) for block in blocks.values()}) == 1
    assert blocks["0"].children["attn"].children["c_attn"].linear
    assert spec.facts["hidden_size"] == 768 and spec.facts["has_head"]
    assert spec.kv_bytes(1000) == 1000 * 12 * 2 * 768 * 2
    assert not spec_from_module(model.transformer).facts["has_head"]


class _Computed(nn.Module):
    """A layer whose weight is a property, and which saves itself in a way of its own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Parameter(torch.ones(4, 4))

    @property
    def weight(self):
        raise AssertionError("the model's code was run")

    def _save_to_state_dict(self, *args):
        raise RuntimeError("no values on meta")


def old_weight_norm():
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(4, 4))


@pytest.mark.parametrize(
    "make",
    [
        lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
        lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
        lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
        old_weight_norm,
        _Computed,
    ],
)
def test_planning_never_computes_a_weight(make):
    import bigkit

    real = nn.Sequential(make(), nn.Linear(4, 4))
    before = {name: tensor.clone() for name, tensor in [*real.named_parameters(), *real.named_buffers()]}
    with init_empty_weights():
        empty = nn.Sequential(make(), nn.Linear(4, 4))
    for model in (real, empty):
        size = bigkit.compute_module_sizes(model)[""]
        assert size == sum(tensor.nbytes for tensor in before.values())
        assert bigkit.infer_auto_device_map(model, {0: size}) == {"": 0}
        assert bigkit.estimate_memory(model).parameters > 0
    after = dict([*real.named_parameters(), *real.named_buffers()])
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
