"""Streaming: whatever the order of use, the slots, the exceptions and the edits, the output is the whole model's."""

import copy
import gc
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bigkit import init_empty_weights
from bigkit.checkpoints.save import save_model
from bigkit.maps.partition import spread
from bigkit.offload.dispatch import dispatch_model
from bigkit.offload.hooks import remove_hook_from_module
from bigkit.offload.lenders import streamers_in
from bigkit.offload.load_and_dispatch import load_checkpoint_and_dispatch
from bigkit.offload.one_place import cpu_offload, disk_offload
from tests.spread import STAND_IN, Block, Net, check_at_rest, handles, memory_beside_disk, same, spread_ways
from tests.spread import spread as spread_by

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Stop(Exception):
    pass


class Played(nn.Module):
    """Runs a list of steps over its blocks: (block, what happens)."""

    def __init__(self, depth, tied):
        super().__init__()
        self.h = nn.ModuleList(Counting() for _ in range(depth))
        self.head = nn.Linear(8, 8, bias=False)
        self.scale = nn.Parameter(torch.randn(8))
        if tied:
            self.head.weight = self.h[0].a.weight

    def forward(self, x, steps):
        for i, (kind, at) in enumerate(steps):
            block, other = self.h[at % len(self.h)], self.h[(at + 1) % len(self.h)]
            if kind == "call":
                x = block(x)
            elif kind == "twice":
                x = block(x, depth=2)
            elif kind == "nested":
                x = block(x, inner=other)
            elif kind == "foreign":
                x = F.linear(x, block.a.weight) + other.b.bias
            elif kind == "edit":
                x = block(x, edit=1.0 + i)
            elif kind == "edit around":
                x = block(x, edit=1.0 + i, inner=other)
            elif kind == "head":
                x = self.head(x)
            elif kind == "root edit":
                self.scale.data.mul_(0.5)
            elif kind == "root data":
                self.scale.data = self.scale.data + 1
            elif kind == "stop":
                block(x, stop=True)
            elif kind == "stop inside":
                block(x, inner=other, stop=True, edit=2.0)
        return x * self.scale


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, depth=1, inner=None, edit=None, stop=False):
        x = torch.tanh(self.a(x)) + self.calls
        with torch.no_grad():
            self.calls += 1
            if edit is not None:
                self.b.weight.mul_(edit).clamp_(-1, 1)
        if inner is not None:
            x = inner(x, edit=None if edit is None else edit / 2)
        if stop:
            raise Stop
        if depth > 1:
            x = self(x, depth=depth - 1)
        return self.b(x)


KINDS = ["call", "call", "call", "twice", "nested", "foreign", "edit", "edit around", "head", "root edit", "root data",
         "stop", "stop inside"]  # fmt: skip
STEPS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 7)), max_size=10)


@settings(max_examples=100)  # more of the kind: scripts/soak.py
@given(
    depth=st.integers(1, 6),
    tied=st.booleans(),
    slots=st.integers(1, 4),
    prefetch=st.booleans(),
    buffers=st.booleans(),
    places=st.lists(st.sampled_from([0, "cpu", "disk"]), min_size=8, max_size=8),
    mapped=st.booleans(),
    cache=st.sampled_from([0, 700, 10**6]),
    runs=st.lists(STEPS, min_size=1, max_size=4),
    mode=st.sampled_from([torch.no_grad, torch.inference_mode, torch.enable_grad]),
)
def test_any_use_is_that_of_the_whole_model(
    depth, tied, slots, prefetch, buffers, places, mapped, cache, runs, mode, tmp_path_factory
):
    torch.manual_seed(depth)
    whole = Played(depth, tied)
    parts = copy.deepcopy(whole)
    device_map = {f"h.{i}": places[i] for i in range(depth)} | {"head": places[6], "scale": places[7]}
    options = {"ram_cache": cache, "slots": slots, "stand_in": STAND_IN}
    if mapped:
        device_map, options = {name: "cpu" if at == 0 else at for name, at in device_map.items()}, {}
    folder = tmp_path_factory.mktemp("rest")
    dispatch_model(parts, device_map, offload_dir=folder, offload_buffers=buffers, prefetch=prefetch,
                   force_hooks=True, **options)  # fmt: skip
    for steps in runs:
        results = []
        for model in (whole, parts):
            try:
                with mode():
                    results.append(model(X, steps))
            except Stop:
                results.append("stopped")
        assert same(*results)
        check_at_rest(parts)
    state = parts.state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(state[name], value), name


# ---------------------------------------------------------------------------------------------------------------------
# Order, slots and events


def events_of(model):
    found = []
    handles(model)[0].streamer.listeners.append(found.append)
    return found


def test_the_steady_state_fetches_each_block_once_and_ahead():
    model = cpu_offload(nn.Sequential(*[nn.Linear(8, 8) for _ in range(5)]), 0, stand_in=STAND_IN)
    model(X)
    events = events_of(model)
    for _ in range(2):
        model(X)
    fetched = [event.unit for event in events if event.kind == "fetch"]
    assert sorted(fetched) == sorted([str(i) for i in range(5)] * 2)
    works = [event.unit for event in events if event.kind == "work"]
    assert works == [str(i) for i in range(5)] * 2
    for i, event in enumerate(events):  # the next unit begins to move before this one works
        if event.kind == "fetch":
            following = next(later for later in events[i:] if later.kind == "work")
            assert following.unit != event.unit
    assert {event.slot for event in events if event.kind == "fetch"} == {0, 1}
    assert all(event.nbytes > 0 and event.rests == "cpu" for event in events if event.kind == "fetch")


def test_without_prefetch_a_block_is_fetched_when_it_is_called():
    model = cpu_offload(
        nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)]), 0, stand_in=STAND_IN, prefetch=False, slots=1
    )
    events = events_of(model)
    model(X)
    assert [(event.kind, event.unit) for event in events] == [
        (kind, str(i)) for i in range(3) for kind in ("fetch", "work", "return")
    ]


def test_a_changed_order_is_learned():
    model = Played(4, tied=False)
    parts = spread_by(model, {"h": "cpu", "head": 0, "scale": 0}, slots=2)
    events = events_of(parts)
    order = [("call", i) for i in (0, 2, 3)]  # block 1 is skipped from now on
    for _ in range(2):
        parts(X, order)
    events.clear()
    parts(X, order)
    assert "h.1" not in {event.unit for event in events}


def test_the_cache_of_disk_blocks_keeps_the_same_ones(tmp_path):
    model = Net(depth=8)
    one = 2 * (512 + 512)  # bytes of a block in a slot
    parts = disk_offload(copy.deepcopy(model), tmp_path, 0, stand_in=STAND_IN, ram_cache=3 * one)
    for _ in range(3):
        assert same(parts(X), model(X))
    units = handles(parts)[0].streamer.units
    in_ram = [unit.name for unit in units if unit.rests_in() == "cpu"]
    assert 2 <= len(in_ram) <= 3 or sum(unit.nbytes for unit in units if unit.rests_in() == "cpu") <= 3 * one
    before = list(in_ram)
    parts(X)
    assert [unit.name for unit in units if unit.rests_in() == "cpu"] == before
    in_place = parts.h[0].a.weight.data
    in_place.mul_(2)
    model.h[0].a.weight.data.mul_(2)
    assert same(parts(X), model(X)) and same(parts(X), model(X))


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(0, 500))
def test_spread_never_exceeds_its_budget(sizes, budget):
    chosen = spread(sizes, budget)
    assert sum(sizes[i] for i in chosen) <= budget and all(sizes[i] for i in chosen)


def test_modules_that_were_added_go_where_their_block_works_and_no_others(monkeypatch):
    moved = []
    monkeypatch.setattr("bigkit.offload.sites.move_own", lambda module, device: moved.append(module))
    parts = spread_by(Net(), {"scale": "cpu", "h.0": 1, "h.1": "cpu", "h.2": 0, "h.3": "cpu", "out": 0})
    for block in parts.h[:2]:
        block.a = nn.Sequential(block.a, nn.Linear(8, 8))
    parts(X)
    assert parts.h[1].a[1] in moved and not {*moved} & {*parts.h[0].modules(), *parts.out.modules()}
    moved.clear()
    parts(X)
    assert not moved
    parts.h[3].a = nn.Sequential(parts.h[3].a, nn.Linear(8, 8))
    parts.h[3].b.bias = None  # at once with another change
    parts(X)
    assert parts.h[3].a[1] in moved


# ---------------------------------------------------------------------------------------------------------------------
# Modes, training, threads


def test_modes_mix(tmp_path):
    model = Net()
    for way, parts in spread_ways(model, tmp_path):
        for mode in (torch.inference_mode, torch.enable_grad, torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                result = parts(X)
                assert same(result, model(X)), (way, mode)
                assert result.requires_grad == torch.is_grad_enabled() and result.is_inference() == (
                    mode is torch.inference_mode
                )
        expected = copy.deepcopy(model)
        with torch.inference_mode():
            parts.h[0].a.weight.mul_(2)
            expected.h[0].a.weight.mul_(2)
            assert same(parts(X), expected(X))
        assert same(parts(X.clone().requires_grad_()), expected(X)), way
        check_at_rest(parts)


def test_backward_through_lent_weights_is_one_clear_error(tmp_path):
    for way, parts in spread_ways(Net(), tmp_path):
        output = parts(X)
        with pytest.raises(RuntimeError, match="whose weights rest elsewhere|offloaded weights are for inference"):
            output.sum().backward()
        parts.requires_grad_(False)
        with pytest.raises(RuntimeError, match="whose weights rest elsewhere"):  # the input's gradient needs them too
            parts(X.clone().requires_grad_()).sum().backward()
        with pytest.raises(RuntimeError, match=r"'out\.weight'"):
            F.linear(X, parts.requires_grad_(True).out.weight).sum().backward()
        assert not any(parameter.grad is not None for parameter in parts.parameters()), way
        check_at_rest(parts)


def test_python_ends_well_after_a_backward_was_refused():
    """PyTorch keeps nodes that waited in its queue, and their hooks outlive Python."""
    code = """if True:
        import torch
        from torch import nn
        from bigkit import dispatch_model

        class Block(nn.Linear):
            def forward(self, x):
                return x[torch.tensor([0, 1])].sum() + (x @ self.weight).sum()

        model = dispatch_model(nn.Sequential(Block(4, 4)), {"": "cpu"}, 0, stand_in={0: "cpu"})
        x = torch.ones(4, 4, requires_grad=True) * 2
        try:
            model(x).backward()
        except RuntimeError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "are for inference" in done.stdout and done.returncode == 0, done


def test_a_resident_part_trains_on_a_frozen_offloaded_base():
    torch.manual_seed(0)
    whole = Net().requires_grad_(False)
    whole.out.requires_grad_(True)
    parts = spread_by(copy.deepcopy(whole), {"h": "cpu", "out": 0, "scale": 0})
    for model in (whole, parts):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
    assert same(whole(X), parts(X)) and torch.equal(whole.out.weight.grad, parts.out.weight.grad)


def test_two_threads_run_one_model(tmp_path):
    model = Net()
    inputs = [X * k for k in range(1, 7)]
    for way, parts in spread_ways(model, tmp_path):
        results = {}

        def work(i):
            for _ in range(5):
                results[i] = parts(inputs[i])  # noqa: B023

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert all(same(results[i], model(inputs[i])) for i in range(6)), way
        check_at_rest(parts)


def test_forwards_leave_nothing_behind(tmp_path):
    """In grad mode too: a node of the graph must not keep what it saved for a backward that never comes."""
    import gc
    import weakref

    for way, parts in spread_ways(Net(), tmp_path):
        seen = []
        parts.h[1].register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output)))  # noqa: B023
        parts(X)
        model = weakref.ref(parts)
        del parts
        gc.collect()
        assert seen[0]() is None and model() is None, way
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def test_memory_is_bounded_by_the_blocks_in_flight(tmp_path):
    """A model of 200 MB that rests on disk runs in far less, in RAM on the CPU and in slots."""
    work = "with torch.no_grad(): [model(torch.ones(1, 1024)) for _ in range(2)]"
    assert memory_beside_disk(tmp_path, work) < 40  # MB; a block is 4 MB


def test_many_cycles_hold_on_to_nothing(tmp_path):
    import gc
    import os

    import psutil

    process = psutil.Process()
    model, device_maps = Net(2), [{"": "disk"}, {"": "cpu"}, {"h": "disk", "out": "cpu", "scale": 0}]
    expected = model(X)
    counts = []
    for i in range(200):
        spread_by(model, device_maps[i % 3], main_device=0, offload_dir=tmp_path)
        assert same(model(X), expected)
        if i in (80, 199):
            gc.collect()
            counts.append((process.num_threads(), len(os.listdir("/proc/self/fd")), process.memory_info().rss))
            assert len(list(tmp_path.iterdir())) <= 6
    (threads, files, memory), (threads_after, files_after, memory_after) = counts
    assert threads_after <= threads and files_after <= files + 3 and memory_after - memory < 8e6


def test_a_checkpoint_is_read_in_place(tmp_path):
    whole, rest = Net(), tmp_path / "rest"
    save_model(whole, tmp_path / "model")
    with init_empty_weights():
        parts = Net()
    load_checkpoint_and_dispatch(parts, tmp_path / "model", {"": "disk"}, offload_folder=rest)
    assert same(parts(X), whole(X)) and not rest.exists()
    assert not handles(spread_by(parts, {"": "cpu"}, main_device=0))[0].streamer.maps
    assert isinstance(parts.h[0], Block) and same(parts(X), whole(X))


class WithRoot(nn.Module):
    """Blocks between a use of a parameter that the model holds itself and another one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((8,), 1.5))
        self.h = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(5)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.scale
        for block in self.h:
            x = block(x)
        return x * self.scale


def test_what_the_model_itself_holds_keeps_no_slot_from_its_blocks() -> None:
    model, x = WithRoot().requires_grad_(False), torch.randn(2, 8)
    expected = model(x)
    spread = cpu_offload(model, 0, stand_in=STAND_IN, slots=2)
    streamer = spread._hf_hook.streamer
    events: list[tuple[str, str]] = []
    streamer.listeners.append(lambda event: events.append((event.kind, event.unit)))
    for _ in range(2):
        events.clear()
        assert torch.equal(spread(x), expected)
        for before, after in zip(range(4), range(1, 5)):
            if ("fetch", f"h.{after}") in events:
                assert events.index(("fetch", f"h.{after}")) < events.index(("return", f"h.{before}"))
    assert [slot.base.numel() for slot in streamer.slots if slot.owner is not None] == [512]
    assert sum(slot.owner is None for slot in streamer.slots) == 2


@torch.no_grad()
def test_memory_that_is_let_go_is_made_anew():
    """Slots for any unit, and those for one alone."""
    net = Played(3, tied=False)
    whole, steps = copy.deepcopy(net), [("call", 0), ("call", 1), ("head", 0)]
    found = dispatch_model(net, {"": "cpu"}, 0, stand_in=STAND_IN)
    assert torch.equal(found(X, steps), whole(X, steps))
    (streamer,) = streamers_in(found)
    before = [weakref.ref(slot) for slot in streamer.slots]
    assert {slot.owner is None for slot in streamer.slots} == {True, False}
    streamer.let_go()
    gc.collect()
    assert not streamer.slots and not any(slot() for slot in before)
    assert torch.equal(found(X, steps), whole(X, steps))
    assert {id(slot) for slot in streamer.holder.values()} <= {id(slot) for slot in streamer.slots}


@pytest.mark.parametrize("anew", [False, True])
def test_hooks_that_are_taken_away_under_a_forward_that_is_about_to_begin(anew, tmp_path):
    """It had left handles behind, in a model without hooks."""
    model = Net()
    for way, parts in spread_ways(model, tmp_path):
        asked, free, raised = threading.Event(), threading.Event(), []

        def forward(parts=parts, raised=raised):
            try:
                raised.append(same(parts(X), model(X)))
            except RuntimeError as error:
                raised.append(str(error))

        # torch looks up what to call before it runs this.
        hook = parts.register_forward_pre_hook(lambda *_, a=asked, f=free: (a.set(), f.wait(60))[:0] or None)
        thread = threading.Thread(target=forward)
        thread.start()
        assert asked.wait(60)
        remove_hook_from_module(parts, recurse=True)
        if anew:
            dispatch_model(parts, {"": "cpu"}, main_device=0, stand_in=STAND_IN)
        free.set()
        thread.join(60)
        hook.remove()
        assert not thread.is_alive() and "'Net' were removed" in raised[0], (way, raised)
        assert same(parts(X), model(X)), way
        check_at_rest(parts)
        remove_hook_from_module(parts, recurse=True)
        assert not handles(parts), way


def test_a_dispatch_waits_for_what_another_thread_is_lent(tmp_path):
    model = Net()
    for way, parts in spread_ways(model, tmp_path):
        lent, results = threading.Event(), []

        def wait(*_, lent=lent):
            lent.set()
            threading.Event().wait(0.1)  # the other one tries meanwhile

        hook = parts.h[1].a.register_forward_hook(wait)
        thread = threading.Thread(target=lambda p=parts, r=results: r.append(p(X)))
        thread.start()
        assert lent.wait(60)
        dispatch_model(parts, {"": "cpu"}, main_device=0, stand_in=STAND_IN)
        thread.join(60)
        hook.remove()
        assert results and same(results[0], model(X)) and same(parts(X), model(X)), way
        check_at_rest(parts)
