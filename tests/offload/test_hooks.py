"""Hooks: the verbs, what they do to a module's inputs, and that whatever is raised gives everything back."""

import copy
import gc
import inspect
import pickle
import random
import signal
import threading
from collections import OrderedDict, UserDict, defaultdict, namedtuple

import accelerate.hooks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from bigkit.offload.hooks import (
    AlignDevicesHook,
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    hooks_in,
    remove_hook_from_module,
)
from bigkit.offload.inputs import find_device, send_to_device, torch_device
from bigkit.offload.one_place import cpu_offload, disk_offload
from tests.spread import STAND_IN, Block, Net, check_at_rest, same, spread, spread_ways

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
META = torch.device("meta")


class Stop(Exception):
    pass


class Log(ModelHook):
    """Writes down what happens, and changes the input by one."""

    def __init__(self, name="", events=None):
        self.name, self.events = name, [] if events is None else events

    def init_hook(self, module):
        self.events.append(f"init {self.name}")
        return module

    def pre_forward(self, module, x, *args, **kwargs):
        self.events.append(f"pre {self.name}")
        return (x + 1, *args), kwargs

    def post_forward(self, module, output):
        self.events.append(f"post {self.name}")
        return output * 2

    def on_error(self, module):
        self.events.append(f"error {self.name}")

    def detach_hook(self, module):
        self.events.append(f"detach {self.name}")
        return module


# ---------------------------------------------------------------------------------------------------------------------
# The verbs


def test_add_and_remove_do_what_accelerate_does():
    class Theirs(Log, accelerate.hooks.ModelHook):
        pass

    for append in (False, True):
        ours, theirs = nn.Linear(8, 8), nn.Linear(8, 8)
        theirs.load_state_dict(ours.state_dict())
        events, expected = [], []
        for name in "ab":
            add_hook_to_module(ours, Log(name, events), append=append)
            accelerate.hooks.add_hook_to_module(theirs, Theirs(name, expected), append=append)
        assert same(ours(X), theirs(X))
        calls = [[event for event in log if event[0] == "p"] for log in (events, expected)]
        assert calls[0] == calls[1] and len(calls[0]) == (4 if append else 2)
        # A hook that goes is told so once; one that stays is not told that it goes.
        assert [event for event in events if "detach" in event] == ([] if append else ["detach a"])
        remove_hook_from_module(ours)
        accelerate.hooks.remove_hook_from_module(theirs)
        assert [event for event in events if "detach" in event] == ["detach a", "detach b"] and same(ours(X), theirs(X))
        assert vars(ours).keys() == vars(nn.Linear(8, 8)).keys()


def test_sequential_hook_is_its_hooks_one_after_another():
    events = []
    layer = add_hook_to_module(nn.Identity(), SequentialHook(Log("a", events), Log("b", events)))
    assert layer(torch.zeros(1)).item() == 8 and events[-4:] == ["pre a", "pre b", "post a", "post b"]
    add_hook_to_module(layer, Log("c", events), append=True)
    assert layer(torch.zeros(1)).item() == 24 and [hook.name for hook in layer._hf_hook.hooks] == ["a", "b", "c"]
    remove_hook_from_module(layer)
    assert events[-3:] == ["detach a", "detach b", "detach c"] and layer(X) is X


def test_recurse():
    model = Net()
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    remove_hook_from_module(model.h[0])
    assert hasattr(model.h[0].a, "_hf_hook") and not hasattr(model.h[0], "_hf_hook")
    remove_hook_from_module(model, recurse=True)
    assert not any("forward" in vars(module) or "_hf_hook" in vars(module) for module in model.modules())
    remove_hook_from_module(model)  # nothing to do


def test_a_forward_of_the_instance_comes_back():
    layer = nn.Linear(8, 8)
    layer.forward = own = lambda x: x - 1
    add_hook_to_module(add_hook_to_module(layer, Log()), Log(), append=True)
    assert torch.equal(layer(torch.zeros(2)), torch.full((2,), 4.0))
    assert remove_hook_from_module(layer).forward is own


def test_no_grad():
    hook = ModelHook()
    hook.no_grad = True
    layer = add_hook_to_module(nn.Linear(8, 8), hook)
    assert not layer(X).requires_grad
    add_hook_to_module(layer, ModelHook(), append=True)
    assert not layer(X).requires_grad and torch.is_grad_enabled()


def test_signature_documentation_and_direct_calls(tmp_path):
    whole = Net()
    for _, model in spread_ways(whole, tmp_path):
        assert inspect.signature(model.forward) == inspect.signature(whole.forward)
        assert model.forward.__doc__ == Net.forward.__doc__ and model.forward.__name__ == "forward"
        assert same(model.forward(X), whole(X)) and same(model.h[0].forward(X), whole.h[0](X))
        check_at_rest(model)


def test_user_hooks_compose(tmp_path):
    net = Net()
    for way, model in spread_ways(net, tmp_path):
        seen = []
        whole = copy.deepcopy(net)
        for one in (model, whole):
            one.h[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
            one.h[1].register_forward_hook(lambda module, args, output: output + 1)
            one.h[1].a.register_forward_hook(lambda module, *_: seen.append(module.weight.sum().item()))  # noqa: B023
            handle = one.register_forward_hook(lambda module, args, output: output.relu())
        assert same(model(X), whole(X)) and seen[0] == seen[1], way
        handle.remove()
        assert same(model(X)[0], model(X)[0])
        check_at_rest(model)


# ---------------------------------------------------------------------------------------------------------------------
# Whatever is raised


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("where", ["forward", "inner", "pre hook", "post hook", "listener", "added hook"])
def test_what_is_raised_gives_every_weight_back_and_the_lock(kind, where, tmp_path):
    def boom(*_):
        raise kind("stop")

    model = Net()
    for way, parts in spread_ways(model, tmp_path):
        parts(X)
        streamer = parts.scale.streamer
        block = parts.h[2]
        if where == "forward":
            block.b.forward = boom
        elif where == "inner":
            handle = block.b.register_forward_pre_hook(boom)
        elif where == "pre hook":
            handle = block.register_forward_pre_hook(boom)
        elif where == "post hook":
            handle = block.register_forward_hook(boom)
        elif where == "listener":
            streamer.listeners.append(lambda event: event.unit == "h.2" and boom())
        else:
            hook = ModelHook()
            hook.post_forward = boom
            add_hook_to_module(block, hook, append=True)
        with pytest.raises(kind):
            parts(X)
        check_at_rest(parts)
        if where == "forward":
            del block.b.forward
        elif where == "listener":
            streamer.listeners.clear()
        elif where == "added hook":
            hook.post_forward = lambda module, output: output
        else:
            handle.remove()
        results = []
        thread = threading.Thread(target=lambda: results.append(parts(X)), daemon=True)  # noqa: B023
        thread.start()
        thread.join(20)
        assert results and same(results[0], model(X)), way


# One that comes while a finalizer runs is swallowed by Python, with this warning.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", [KeyboardInterrupt, Stop, TimeoutError, OSError])
def test_an_interrupt_may_come_at_any_point(kind, tmp_path):
    """A timer interrupts forwards of tiny blocks, so that most interrupts come in the midst of lending.

    The handler of a signal may raise anything, as those of timeouts do.
    """

    def interrupt(*_):
        raise kind

    model, interrupted, rng = Net(6), 0, random.Random(0)
    expected, ways = model(X), [*spread_ways(model, tmp_path)]
    before = signal.signal(signal.SIGALRM, interrupt)
    gc.disable()  # so that few come there
    try:
        for i in range(200):
            way, parts = ways[i % len(ways)]
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(2e-5, 2e-3))
                for _ in range(3):
                    parts(X)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except kind:
                interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            check_at_rest(parts)
            assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
            assert same(parts(X), expected), way
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        gc.enable()
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 20


def test_an_interrupt_that_is_caught_within_a_forward():
    class Catches(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(8))
            self.h = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            for layer in self.h:
                try:
                    x = layer(x)
                except KeyboardInterrupt:
                    x = x + 1
            return x * self.scale

    model = Catches()
    parts = cpu_offload(copy.deepcopy(model), 0, stand_in=STAND_IN)
    expected = model(X)
    streamer = parts.scale.streamer

    def boom(event):
        if event.kind == "work" and event.unit == "h.1":
            raise KeyboardInterrupt

    streamer.listeners.append(boom)
    assert same(parts(X), (model.h[2](model.h[0](X) + 1)) * model.scale)
    streamer.listeners.clear()
    check_at_rest(parts)
    assert same(parts(X), expected)


class Coder(nn.Module):
    """Calls its hook as the decorator `apply_forward_hook` of Diffusers does."""

    def __init__(self):
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.tensor(2.0)), nn.Linear(8, 8)

    def encode(self, x):
        if hasattr(self, "_hf_hook"):
            self._hf_hook.pre_forward(self)
        return self.inner(x) * self.scale

    def forward(self, x):
        return self.encode(x) + self.scale


class Pipe(nn.Module):
    def __init__(self):
        super().__init__()
        self.coder, self.gain = Coder(), nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        return self.coder.encode(x) * self.gain + self.coder(x)


def by_hand(model):
    args, kwargs = model._hf_hook.pre_forward(model, X) if hasattr(model, "_hf_hook") else ((X,), {})
    output = type(model).forward(model, *args, **kwargs)
    return model._hf_hook.post_forward(model, output) if hasattr(model, "_hf_hook") else output


ALONE = {
    "alone": (Coder, lambda model: model.encode(X)),
    "within its own forward": (Coder, lambda model: model(X)),
    "within another forward": (Pipe, lambda model: model(X)),
    "by hand": (Coder, by_hand),
}


@pytest.mark.parametrize(("kind", "call"), ALONE.values(), ids=ALONE)
def test_a_hook_that_is_called_alone_leaves_no_loan(kind, call, tmp_path):
    model = kind()
    expected = call(model)
    for way, parts in spread_ways(model, tmp_path):
        results = []
        for _ in range(2):
            assert same(call(parts), expected), way
            check_at_rest(parts)
        thread = threading.Thread(target=lambda: results.append(parts(X)), daemon=True)  # noqa: B023
        thread.start()
        thread.join(20)
        assert results and same(results[0], model(X)), way


class Duck:
    """A hook with nothing that a hook need not have."""

    def init_hook(self, module):
        return module

    detach_hook = init_hook

    def pre_forward(self, module, *args, **kwargs):
        return args, kwargs

    def post_forward(self, module, output):
        return output


@pytest.mark.parametrize("hook", [accelerate.hooks.ModelHook, Duck, lambda: SequentialHook(Duck(), ModelHook())])
@pytest.mark.parametrize("append", [False, True])
def test_a_hook_without_on_error_hides_no_error(hook, append):
    block = Block()
    block.b.forward = lambda x: [][1]
    parts = cpu_offload(nn.Sequential(block, Block()), 0, stand_in=STAND_IN)
    add_hook_to_module(parts[0], hook(), append=append)
    with pytest.raises(IndexError, match="list index out of range"):
        parts(X)
    if append:  # else the block is no longer spread
        check_at_rest(parts)


TAKEN = {
    "all": lambda model: accelerate.hooks.remove_hook_from_module(model, recurse=True),
    "submodules": accelerate.hooks.remove_hook_from_submodules,
    "the root": accelerate.hooks.remove_hook_from_module,
    "a block": lambda model: accelerate.hooks.remove_hook_from_module(model.h[1]),
    "replaced": lambda model: accelerate.hooks.add_hook_to_module(model.h[1], accelerate.hooks.ModelHook()),
    "another": lambda model: accelerate.hooks.add_hook_to_module(model.h[1], accelerate.hooks.ModelHook(), append=True),
    "another, at the root": lambda model: accelerate.hooks.add_hook_to_module(
        model, accelerate.hooks.ModelHook(), append=True
    ),
}


@pytest.mark.parametrize("take", TAKEN.values(), ids=TAKEN)
def test_functions_of_accelerate_that_handle_hooks(take, tmp_path):
    model = Net()
    for way, parts in spread_ways(model, tmp_path):
        take(parts)
        assert same(parts(X), model(X)) and same(parts(X), model(X)), way
        remove_hook_from_module(parts, recurse=True)
        assert same(parts(X), model(X)), way
    parts = cpu_offload(copy.deepcopy(model), 0, stand_in=STAND_IN)
    accelerate.hooks.remove_hook_from_module(parts, recurse=True)
    assert same(parts.double()(X.double()), model.double()(X.double()))


def test_a_hook_that_is_taken_and_put_on_again(tmp_path):
    """As Transformers does when it resizes embeddings."""
    for way, parts in spread_ways(Net(), tmp_path):
        for factor in (1, 2, 3):
            hook = parts.h[1]._hf_hook
            remove_hook_from_module(parts.h[1])
            parts.h[1].a.weight.data = torch.full((8, 8), factor / 8)
            add_hook_to_module(parts.h[1], hook)
            parts(X)
            parts.h[1].b.weight.data.mul_(2)
            expected = parts(X)
            check_at_rest(parts)
        remove_hook_from_module(parts, recurse=True)
        assert same(parts(X), expected), way


def test_a_hook_that_never_began_is_not_told_of_an_error():
    """A block that calls itself, whose first hook fails in the inner call: the outer call keeps its weights."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x, again=True):
            if again:
                try:
                    self(x, again=False)
                except ValueError:
                    pass
            return self.lin(x)

    class Fails(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            if kwargs.get("again") is False:
                raise ValueError
            return args, kwargs

    model = nn.Sequential(Twice(), nn.Linear(8, 8))
    parts = cpu_offload(copy.deepcopy(model), 0, stand_in=STAND_IN)
    align = parts[0]._hf_hook
    remove_hook = AlignDevicesHook.placed(align.execution_device, None, align.streamer, align.unit)
    parts[0].__dict__.pop("forward"), parts[0].__dict__.pop("_hf_hook"), parts[0].__dict__.pop("_old_forward")
    add_hook_to_module(parts[0], Fails())
    add_hook_to_module(parts[0], remove_hook, append=True)
    assert same(parts(X), model(X)) and same(parts(X), model(X))
    check_at_rest(parts)


class Sub(SequentialHook):
    pass


class CallsSuper(SequentialHook):
    def pre_forward(self, module, *args, **kwargs):
        return super().pre_forward(module, *args, **kwargs)

    def post_forward(self, module, output):
        return super().post_forward(module, output)


class ByItself(SequentialHook):
    """Calls its hooks in its own way."""

    def pre_forward(self, module, *args, **kwargs):
        for hook in self.hooks:
            args, kwargs = hook.pre_forward(module, *args, **kwargs)
        return args, kwargs

    def post_forward(self, module, output):
        for hook in self.hooks:
            output = hook.post_forward(module, output)
        return output


class Around(ModelHook):
    """Stands around another hook, and knows nothing of `on_error`: Accelerate has no such method."""

    def __init__(self, *hooks):
        self.inner = SequentialHook(*hooks) if len(hooks) > 1 else hooks[0]

    def init_hook(self, module):
        return self.inner.init_hook(module)

    def pre_forward(self, module, *args, **kwargs):
        return self.inner.pre_forward(module, *args, **kwargs)

    def post_forward(self, module, output):
        return self.inner.post_forward(module, output)

    def detach_hook(self, module):
        return self.inner.detach_hook(module)


class Boom(ModelHook):
    """Raises in one of its methods, while it is armed."""

    def __init__(self, where, kind):
        self.where, self.kind, self.armed = where, kind, False

    def boom(self, where):
        if self.armed and where == self.where:
            raise self.kind("stop")

    def pre_forward(self, module, *args, **kwargs):
        self.boom("pre")
        return args, kwargs

    def post_forward(self, module, output):
        self.boom("post")
        return output

    def on_error(self, module):
        self.boom("error")


SIBLINGS = st.lists(st.sampled_from(["pre", "post", "error"]), max_size=2)
NESTING = st.lists(
    st.tuples(st.sampled_from([SequentialHook, Sub, CallsSuper, ByItself, Around]), SIBLINGS, SIBLINGS), max_size=4
)


@settings(max_examples=60)
@given(NESTING, st.sampled_from([ValueError, KeyboardInterrupt]), st.booleans(), st.booleans())
def test_hooks_nested_in_any_way_give_everything_back(nesting, kind, forward_fails, recursive):
    """Whatever class of hooks stands around the one that lends, and whoever of them raises: also in a second call of
    the module, from within its own forward, of which the outer one catches the error.
    """

    class Layer(nn.Linear):
        fails = False

        def forward(self, x, depth=int(recursive)):
            if depth:
                try:
                    self(x, depth=depth - 1)
                except BaseException:  # noqa: B902
                    booms_off()
            if self.fails and not depth:
                raise kind("stop")
            return super().forward(x)

    booms = []

    def booms_off():
        for boom in booms:
            boom.armed = False

    def made(places):
        booms.extend(Boom(where, kind) for where in places)
        return booms[-len(places) :] if places else []

    layer, align = Layer(8, 8), AlignDevicesHook("cpu", offload=True)
    expected = layer(X)
    hook = align
    for cls, before, after in nesting:
        hook = cls(*made(before), hook, *made(after))
    add_hook_to_module(layer, hook)
    assert [one for one in hooks_in(layer) if one is align] or any(cls is Around for cls, *_ in nesting)
    assert same(layer(X), expected)
    for boom in booms:
        boom.armed = True
    layer.fails = forward_fails
    try:
        assert same(layer(X), expected)
    except BaseException as error:  # noqa: B902
        assert type(error) is kind
    check_at_rest(layer)
    layer.fails = False
    booms_off()
    results = []
    thread = threading.Thread(target=lambda: results.append(layer(X)), daemon=True)
    thread.start()
    thread.join(20)
    assert results and same(results[0], expected)
    remove_hook_from_module(layer)
    assert type(layer.weight) is nn.Parameter and same(layer(X), expected)


def test_dispatching_again_retires_its_hooks_in_any_nest():
    model = Net()
    parts = cpu_offload(copy.deepcopy(model), 0, stand_in=STAND_IN)
    own = ModelHook()
    own.post_forward = lambda module, output: output + 1
    for name in ("0", "2"):
        block = parts.h.get_submodule(name)
        placed = block._hf_hook
        placed_by_dispatch = vars(block).pop("_hf_hook"), vars(block).pop("_old_forward"), vars(block).pop("forward")
        assert placed_by_dispatch[0] is placed
        add_hook_to_module(block, Sub(own, CallsSuper(placed)))
    cpu_offload(parts, 0, stand_in=STAND_IN)
    for block in (parts.h[0], parts.h[2]):
        lending = [hook for hook in hooks_in(block) if isinstance(hook, AlignDevicesHook) and hook.streamer]
        assert len(lending) == 1 and lending[0].streamer is parts.scale.streamer
    for block in (model.h[0], model.h[2]):
        block.register_forward_hook(lambda module, args, output: output + 1)
    assert same(parts(X), model(X))
    check_at_rest(parts)


def test_errors_in_order():
    events = []
    layer = add_hook_to_module(nn.Identity(), Log("a", events))
    add_hook_to_module(layer, Log("b", events), append=True)
    layer.register_forward_hook(lambda *_: events.append("user"))
    with pytest.raises(TypeError):
        layer("no tensor")
    assert events[2:] == ["pre a", "error a"]


# ---------------------------------------------------------------------------------------------------------------------
# Inputs

Pair = namedtuple("Pair", "x n")


class Movable:
    def __init__(self, device="cpu"):
        self.device = device

    def to(self, device):
        return Movable(device)


def test_containers_keep_their_classes():
    from transformers import BatchEncoding
    from transformers.modeling_outputs import BaseModelOutput

    one = torch.ones(2)
    nested = {
        "list": [one, (one, 3)],
        "named": Pair(one, "text"),
        "ordered": OrderedDict(b=one, a=one),
        "default": defaultdict(list, {"k": [one]}),
        "output": BaseModelOutput(last_hidden_state=one, hidden_states=(one, one)),
        "encoding": BatchEncoding({"input_ids": one}),
        "user": UserDict(x=one),
        "size": torch.Size([2]),
        "maximum": torch.ones(2, 2).max(0),
        "object": Movable(),
        "text": "cuda",
        "none": None,
    }
    moved = send_to_device(nested, META)
    for name, value in nested.items():
        assert type(moved[name]) is type(value), name
    assert moved["list"][0].is_meta and moved["list"][1][0].is_meta and moved["list"][1][1] == 3
    assert moved["named"].x.is_meta and moved["named"].n == "text" and list(moved["ordered"]) == ["b", "a"]
    assert moved["default"]["k"][0].is_meta and moved["default"]["new"] == []
    assert moved["output"].last_hidden_state.is_meta and moved["output"].hidden_states[1].is_meta
    assert moved["output"]["last_hidden_state"] is moved["output"].last_hidden_state
    assert moved["encoding"]["input_ids"].is_meta and moved["user"]["x"].is_meta
    assert moved["maximum"].values.is_meta and moved["object"].device == META
    assert not nested["encoding"]["input_ids"].is_meta and not nested["output"].hidden_states[0].is_meta  # untouched
    assert send_to_device(nested["list"], torch.device("cpu")) is nested["list"]
    assert find_device(nested) == torch.device("cpu") and find_device([None, {"x": 3}]) is None


def test_packed_sequence_keeps_its_sizes_on_the_cpu():
    packed = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    moved = send_to_device([packed], META)[0]
    assert isinstance(moved, PackedSequence) and moved.data.is_meta and not moved.batch_sizes.is_meta


def test_skip_keys_stay_at_any_depth():
    one = torch.ones(1)
    moved = send_to_device({"past": one, "x": one, "inner": [{"past": one, "x": one}]}, META, ["past"])
    assert not moved["past"].is_meta and moved["x"].is_meta
    assert not moved["inner"][0]["past"].is_meta and moved["inner"][0]["x"].is_meta

    class Takes(nn.Module):
        def forward(self, x, cache, cache2):
            return {"cache": cache, "devices": (x.device.type, cache.device.type, cache2.device.type)}

    layer = add_hook_to_module(Takes(), AlignDevicesHook("meta", skip_keys="cache"))
    assert layer(one, cache=one, cache2=one)["devices"] == ("meta", "cpu", "meta")
    layer = add_hook_to_module(Takes(), AlignDevicesHook("meta", skip_keys=["cache", "cache2"]))
    assert layer(one, cache=one, cache2=one)["devices"] == ("meta", "cpu", "cpu")


def test_output_goes_back_to_the_device_of_the_input():
    class Count(nn.Module):
        def forward(self, x):
            return {"at": x, "was": x.device.type}

    layer = add_hook_to_module(Count(), AlignDevicesHook("meta", io_same_device=True))
    assert layer(torch.ones(1, device="meta"))["at"].is_meta
    with pytest.raises(NotImplementedError):  # nothing can come back from meta: it was tried
        layer(torch.ones(1))


def test_device_names():
    assert torch_device(1) == torch.device("cuda:1") and torch_device("cuda") == torch.device("cuda:0")
    assert torch_device("cpu") == torch.device("cpu") and torch_device(torch.device("mps")).type == "mps"


# ---------------------------------------------------------------------------------------------------------------------
# AlignDevicesHook by itself


@pytest.mark.parametrize("submodules", [False, True])
def test_align_devices_hook_offloads_one_module(submodules):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(8))
            self.register_buffer("shift", torch.randn(8))
            self.lin = nn.Linear(8, 8)

        def forward(self, x):
            return self.lin(x * self.scale) + self.shift

    model = Own()
    for buffers in (False, True):
        parts = copy.deepcopy(model)
        hook = AlignDevicesHook("cpu", offload=True, offload_buffers=buffers, place_submodules=submodules)
        add_hook_to_module(parts, hook)
        assert "rests in RAM" in repr(parts.scale)
        assert ("rests in RAM" in repr(parts.lin.weight)) == submodules
        assert ("rests in RAM" in repr(parts.shift)) == buffers
        assert same(parts(X), model(X)) and same(parts(X), model(X))
        remove_hook_from_module(parts)
        assert type(parts.scale) is nn.Parameter and same(parts(X), model(X))


def test_weights_map_fills_an_empty_module():
    layer, whole = nn.Linear(8, 8, device="meta"), nn.Linear(8, 8)
    add_hook_to_module(layer, AlignDevicesHook("cpu", offload=True, weights_map=dict(whole.state_dict())))
    assert same(layer(X), whole(X))
    with pytest.raises(ValueError, match="'weight' is on meta and has no data"):
        add_hook_to_module(nn.Linear(8, 8, device="meta"), AlignDevicesHook("cpu", offload=True))


def test_offloading_without_a_device_is_refused():
    """Accelerate takes it, and fails in the first forward: "device() received an invalid combination of arguments"."""
    layer = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"AlignDevicesHook\(offload=True\) has no execution_device: name the device"):
        add_hook_to_module(layer, AlignDevicesHook(offload=True))
    assert type(layer.weight) is nn.Parameter and not hasattr(layer, "_hf_hook") and layer(X).shape == (3, 8)
    assert same(add_hook_to_module(layer, AlignDevicesHook(io_same_device=True))(X), layer(X))


def test_a_spread_model_is_not_copied(tmp_path):
    """The copy would share a streamer, and its lock, with the original."""
    model = Net()
    for way, parts in spread_ways(model, tmp_path):
        for one in (parts, parts.scale.streamer):
            for copied in (copy.copy, copy.deepcopy) if one is parts.scale.streamer else (copy.deepcopy,):
                with pytest.raises(TypeError, match=r"cannot be copied or pickled: call remove_hook_from_module\("):
                    copied(one)
        for one in (parts, parts.h[1], parts.h[1]._hf_hook, parts._hf_hook, parts.scale.streamer):
            with pytest.raises(TypeError, match="cannot be copied or pickled"):
                pickle.dumps(one)
        assert same(parts(X), model(X)), way
        again = copy.deepcopy(remove_hook_from_module(parts, recurse=True))
        assert same(again(X), model(X)) and same(pickle.loads(pickle.dumps(again))(X), model(X))


def test_modules_with_hooks_that_lend_nothing_copy_and_pickle():
    """peft copies the head that is to be trained, with the hook that dispatch has put there."""
    model = spread(Net(), {"h": "cpu", "scale": 0, "out": 0})
    for other in (copy.deepcopy(model.out), pickle.loads(pickle.dumps(model.out))):
        assert same(other(X), model.out(X)) and other._hf_hook is not model.out._hf_hook
        with torch.no_grad():
            other.weight.zero_()
        assert not same(other(X), model.out(X))


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile


def test_compiled_models_are_right(tmp_path):
    torch.manual_seed(0)
    model = Net(depth=3)
    torch._dynamo.reset()
    for way in (lambda m: cpu_offload(m, 0, stand_in=STAND_IN), lambda m: disk_offload(m, tmp_path)):
        with torch.no_grad():
            parts = way(copy.deepcopy(model))
            compiled = torch.compile(parts, backend="eager")
            for scale in (1, 2, 3):
                assert same(compiled(X * scale), model(X * scale))
            parts.h[0].a.weight.mul_(2)
            changed = copy.deepcopy(model)
            changed.h[0].a.weight.mul_(2)
            assert same(compiled(X), changed(X))
            check_at_rest(parts)
            by_block, graphs = way(copy.deepcopy(model)), []

            def backend(graph, inputs, graphs=graphs):
                graphs.append(graph)
                return graph

            for block in by_block.h:
                block.compile(backend=backend)
            for _ in range(3):
                assert same(by_block(X), model(X))
            check_at_rest(by_block)
            called = {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"}
            assert sum("linear" in name for name in called) == 1  # what is in the blocks, and nothing of the hooks
            assert len(called) <= 3, called
    torch._dynamo.reset()


def test_a_module_can_hold_a_spread_one():
    inner = spread(Net(), {"": "cpu"}, main_device=0)
    outer = nn.Sequential(nn.Linear(8, 8), inner)
    assert outer(X).shape == (3, 8)
    check_at_rest(outer)
