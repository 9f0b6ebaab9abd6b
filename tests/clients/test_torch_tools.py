"""PyTorch's own tools on spread models: parametrizations, pruning, functional calls, averages, traces, exports."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from bigkit import cpu_offload, remove_hook_from_module
from tests.clients.places import AWAY, STAND_IN, WAYS, compare, spread_ways
from tests.spread import Net, check_at_rest

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return Net().eval()


def state(model):
    return [*model.state_dict()], [value.clone() for value in model.state_dict().values()]


def parametrized(tool):
    """In a block and at a layer that travels alone; run, written to, and taken off again."""

    def use(model):
        torch.manual_seed(1)
        for layer in (model.h[1].a, model.out):
            tool(layer)
        before = model(X)
        with torch.no_grad():
            for original in [*model.h[1].a.parametrizations.weight.parameters()]:
                original.mul_(1.5)
        between, saved = model(X), state(model)
        for layer in (model.h[1].a, model.out):
            parametrize.remove_parametrizations(layer, "weight")
        return before, between, saved, model(X)

    return use


def old_weight_norm(model):
    nn.utils.weight_norm(model.h[1].a)
    before = model(X)
    nn.utils.remove_weight_norm(model.h[1].a)
    return before, model(X)


def pruned(model):
    prune.l1_unstructured(model.h[1].a, "weight", 0.5)
    prune.l1_unstructured(model, "scale", 2)  # the root's own
    pairs = [(model.h[i].b, "weight") for i in range(4)]
    prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.3)
    before, saved = model(X), state(model)
    for layer in (model.h[1].a, model.h[2].b):
        prune.remove(layer, "weight")
    return before, saved, model(X), model(X)


def functional_call(model):
    """Tensors that take the weights' places for one call are no new weights."""
    other = {name: 2 * tensor.detach() for name, tensor in model.named_parameters()}
    call = torch.func.functional_call
    results = [call(model, other, (X,)), model(X)]
    results += [call(model, {name: nn.Parameter(value) for name, value in other.items()}, (X,)), model(X)]
    results += [call(model, {"h.1.a.weight": other["h.2.a.weight"]}, (X,)), model(X)]
    results += [call(model.h[1], {"a.weight": other["h.2.a.weight"]}, (X,)), model(X)]
    results += [call(model, {name: tensor.detach() for name, tensor in model.named_parameters()}, (X,)), model(X)]
    return results


def averaged(model):
    average = torch.optim.swa_utils.AveragedModel(
        model.h[1], avg_fn=lambda mean, new, count: mean + (new - mean) / (count + 1)
    )
    with torch.no_grad():
        model.h[1].a.weight.mul_(3)
    average.update_parameters(model.h[1])
    average.update_parameters(model.h[1])
    return average(X), model(X)


def vectors(model):
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(2 * vector, model.parameters())
    return vector, model(X), nn.utils.get_total_norm([parameter.detach() for parameter in model.parameters()])


def like_a_weight(model):
    weight = model.scale
    return (
        weight.new_tensor([1, 2]), weight.new_zeros(2), weight.new(2).shape, torch.zeros_like(weight),
        nn.Parameter(weight), isinstance(nn.Parameter(weight), nn.Parameter), weight.is_meta, weight.is_leaf,
        type(weight.data + 0) is torch.Tensor,
    )  # fmt: skip


def set_to(model):
    model.h[1].a.weight.data.copy_(torch.ones(8, 8))
    with torch.no_grad():
        model.h[2].a.weight.set_(torch.full((8, 8), 0.5))
        model.h[3].a.weight.set_(model.h[2].a.weight)
    return model(X), model(X)


def renamed(model):
    """A weight under another name, and under two."""
    block = model.h[1]
    block.a.register_parameter("other", block.a.weight)
    del block.a.weight
    block.a.weight = block.a.other
    model.h[2].b.weight = nn.Parameter(model.h[3].b.weight)
    first = model(X)
    with torch.no_grad():
        block.a.other.mul_(2)
    return first, model(X), model(X)


def copied_part(model):
    part = copy.deepcopy(model.h[1])
    with torch.no_grad():
        part.a.weight.zero_()
    return part(X), model(X), [type(parameter) is nn.Parameter for parameter in part.parameters()]


def compiled(model):
    torch._dynamo.reset()
    run = torch.compile(model, backend="eager")
    with torch.no_grad():
        return run(X), run(X + 1)


def symbolic(model):
    return torch.fx.symbolic_trace(model)(X), model(X)


def hooked(model):
    seen = []
    for layer in (model.h[1], model.h[1].a, model.out):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))
    return model(X), seen


def seeded_init(model):
    torch.manual_seed(2)
    for layer in (model.h[1].a, model.out):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model(X)


USES = {
    "weight_norm": parametrized(parametrizations.weight_norm),
    "spectral_norm": parametrized(parametrizations.spectral_norm),
    "orthogonal": parametrized(parametrizations.orthogonal),
    **{
        use.__name__: use
        for use in (
            old_weight_norm, pruned, functional_call, averaged, vectors, like_a_weight, set_to, renamed, copied_part,
            compiled, symbolic, hooked, seeded_init,
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_tools(use, tmp_path):
    expected = use(net())
    for way, parts in spread_ways(net(), tmp_path):
        compare(use(parts), expected, way)
        check_at_rest(parts)
        after = parts(X)
        remove_hook_from_module(parts, recurse=True)
        own = [*parts.parameters(), *parts.buffers()]
        assert all(type(tensor) in (nn.Parameter, torch.Tensor) for tensor in own), way  # no handle is left
        assert torch.equal(parts(X), after), way
        torch.testing.assert_close(parts.double()(X.double()).float(), after, msg=way)


TRACES = {
    "torch.export": lambda model: torch.export.export(model, (X,)).module(),
    "jit.trace": lambda model: torch.jit.trace(model, X),
    "make_fx": lambda model: torch.fx.experimental.proxy_tensor.make_fx(model)(X),
}


@pytest.mark.parametrize("trace", TRACES.values(), ids=TRACES)
def test_traces(trace, tmp_path):
    """Of what is resident they are right; of the rest refused, and the model goes on."""
    import torch.fx.experimental.proxy_tensor

    with torch.no_grad():
        traced = trace(WAYS["GPUs"](net(), tmp_path))
        for x in (X, X + 1):
            torch.testing.assert_close(traced(x), net()(x))
        for way, parts in spread_ways(net(), tmp_path, AWAY):
            with pytest.raises(RuntimeError, match="rest elsewhere, so it cannot be traced or exported: call remove_"):
                trace(parts)
            assert torch.equal(parts(X), net()(X)), way
            check_at_rest(parts)
            torch.testing.assert_close(trace(remove_hook_from_module(parts, recurse=True))(X), net()(X))


def swapped_state_dict(model):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict({name: torch.ones_like(value) for name, value in model.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def gradients_of_a_function(model):
    weights = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    torch.func.grad(lambda given: torch.func.functional_call(model, given, (X,)).sum())(weights)


REFUSED = {
    "swapped tensors": (lambda model: torch.utils.swap_tensors(model.scale, torch.ones(8)), "weakref"),
    "a swapped state dict": (swapped_state_dict, "rests elsewhere and cannot be swapped"),
    "torch.func.grad": (gradients_of_a_function, "offloaded weights are for inference"),
}


@pytest.mark.parametrize(("use", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_one_error_and_changes_nothing(use, words, tmp_path):
    for way, parts in spread_ways(net(), tmp_path, AWAY):
        with pytest.raises(RuntimeError, match=words):
            use(parts)
        assert torch.equal(parts(X), net()(X)), way
        check_at_rest(parts)


# ---------------------------------------------------------------------------------------------------------------------
# What leaves a forward never changes later

VIEWS = {
    "itself": lambda weight: weight,
    "detached": lambda weight: weight.detach(),
    "data": lambda weight: weight.data,
    "rows": lambda weight: weight[2:5],
    "a column": lambda weight: weight[:, 1],
    "transposed": lambda weight: weight.T,
    "flat": lambda weight: weight.view(-1)[3:11],
    "strided": lambda weight: weight.as_strided((3, 2), (8, 2), 1),
    "expanded": lambda weight: weight[:1].expand(4, 8),
    "bits": lambda weight: weight.detach().view(torch.int32),
    "split": lambda weight: weight.chunk(2)[1],
    "a diagonal": lambda weight: weight.diagonal(),
    "in NumPy": lambda weight: weight.detach().numpy(),
    "a slice of NumPy": lambda weight: weight.detach().numpy()[1:3],
    "by DLPack": lambda weight: torch.from_dlpack(weight.detach()),
}
KEPT = {
    "returned": lambda layer, view: view,
    "in a list": lambda layer, view: [view],
    "in a closure": lambda layer, view: lambda: view,
    "as attribute": lambda layer, view: setattr(layer, "cache", view) or (lambda: layer.cache),
    "as attribute of a child": lambda layer, view: setattr(layer.inner, "cache", view) or (lambda: layer.inner.cache),
    "in a global": lambda layer, view: CACHE.setdefault(id(layer), view),
    "under two names": lambda layer, view: (view, {"again": view}),
}
CACHE = {}


class Layer(nn.Module):
    """A block that works with its weight, and gives a view of it away."""

    def __init__(self, view, kept, below):
        super().__init__()
        self.view, self.kept, self.below = view, kept, below
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        weight = self.inner.weight
        given = KEPT[self.kept](self, VIEWS[self.view](weight))
        if self.below:  # an alias of an output, as a residual is
            return F.linear(x, weight), given
        return self.inner(x), given


class Stack(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.h = nn.ModuleList(Layer(*layer) for layer in layers)

    def forward(self, x):
        given = []
        for layer in self.h:
            x, one = layer(x)
            given.append(one)
        return x, given


def flat(value):
    """Copies of the arrays in what a layer gave away."""
    if callable(value):
        return flat(value())
    if isinstance(value, dict):
        return flat([*value.values()])
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in flat(item)]
    return [torch.as_tensor(value).detach().clone()]


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.sampled_from([*VIEWS]), st.sampled_from([*KEPT]), st.booleans()), min_size=2, max_size=5),
    st.integers(1, 3),
    st.booleans(),
)
def test_what_leaves_a_forward_never_changes_later(layers, slots, inference):
    torch.manual_seed(0)
    model = Stack(layers)
    parts = cpu_offload(copy.deepcopy(model), 0, stand_in=STAND_IN, slots=slots)
    with torch.inference_mode() if inference else torch.no_grad():
        CACHE.clear()
        expected_output, expected = model(X)
        expected = flat(expected)
        CACHE.clear()
        for _ in range(2):
            output, given = parts(X)
            parts(X + 1)
            assert torch.equal(output, expected_output)
            compare(flat(given), expected, str(layers))
    check_at_rest(parts)


@pytest.mark.parametrize("part", [lambda model: model, lambda model: next(model.children())], ids=["model", "part"])
def test_a_model_with_hooks_cannot_be_scripted(part, tmp_path):
    for way, spread in WAYS.items():
        parts = spread(net(), tmp_path)
        with pytest.raises(AttributeError, match="has hooks, .* cannot be scripted: call remove_hook_from_module"):
            torch.jit.script(part(parts))
        assert torch.jit.script(part(remove_hook_from_module(parts, recurse=True))), way
