"""The strategy "fastest", held against every placement of small models."""

from itertools import product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigkit.api import plan
from bigkit.machine.roofline import Rates
from bigkit.maps import strategies as planner
from bigkit.maps.fastest import Piece, token_seconds
from bigkit.maps.strategies import SLOTS, PlanError
from bigkit.model.spec import Attention, ModelSpec, ModuleSpec, TensorSpec

SLOW = Rates(100.0, {"float32": ((1.0, 1.0),)}, (), issue=1e-3, kernel=0, link=10.0, peer=10.0, disk=4.0)


def model(sizes):
    blocks = {str(i): ModuleSpec("Block", {"w": TensorSpec((size,), "int8")}) for i, size in enumerate(sizes)}
    root = ModuleSpec("Model", {}, {"h": ModuleSpec("ModuleList", {}, blocks)})
    return ModelSpec("m", root, (), ("Block",), tuple(Attention(f"h.{i}", 1) for i in range(len(sizes))), {})


def seconds(found, rates=SLOW, slots=SLOTS):
    pieces = [Piece(layer.bytes, 0, True, layer.bytes) for layer in found.layers]
    main = next(share.device for share in found.shares if share.runs)
    return token_seconds(pieces, [layer.device for layer in found.layers], main, rates, slots)


def fitting(sizes, memory):
    """Every placement within the budgets, counted by hand, and how many slots have room beside it."""
    for places in product((0, "cpu", "disk"), repeat=len(sizes)):
        held = {device: sum(s for s, p in zip(sizes, places) if p == device) for device in (0, "cpu")}
        largest = max((s for s, p in zip(sizes, places) if p != 0), default=0)
        if held["cpu"] <= memory["cpu"]:
            yield from ((places, n) for n in (2, 1) if held[0] + n * largest <= memory[0])


def chosen(sizes, memory):
    """What a token takes as the planner places it; None if nothing fits."""
    try:
        found = planner.plan(model(sizes), memory, "fastest", rates=SLOW)
    except PlanError:
        return None
    largest = max((layer.bytes for layer in found.layers if layer.device != 0), default=1)
    return seconds(found, slots=found.shares[0].reserve // largest or SLOTS)


def best_of_all(sizes, memory):
    pieces = [Piece(size, 0, True, size) for size in sizes]
    times = [token_seconds(pieces, places, 0, SLOW, slots) for places, slots in fitting(sizes, memory)]
    return min(times, default=None)


def test_among_all_placements_of_small_models():
    """The search is no proof: of 300 models it misses the fastest placement for a few at most, and then by little."""
    draw = Random(0)
    ratios = []
    for _ in range(300):
        sizes = [draw.randint(1, 30) for _ in range(draw.randint(1, 5))]
        memory = {0: draw.randint(5, 100), "cpu": draw.randint(0, 100)}
        taken, least = chosen(sizes, memory), best_of_all(sizes, memory)
        assert (taken is None) == (least is None)
        if least:
            ratios.append(taken / least)
    assert len(ratios) > 150 and min(ratios) > 0.999
    assert sum(ratio > 1.001 for ratio in ratios) <= 3 and max(ratios) < 1.3


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(2, 6), st.integers(5, 100), st.integers(0, 100))
def test_equal_blocks_are_placed_best(size, count, gpu, ram):
    memory = {0: gpu, "cpu": ram}
    taken, least = chosen([size] * count, memory), best_of_all([size] * count, memory)
    assert (taken is None) == (least is None) and (least is None or taken <= 1.001 * least)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=6, max_size=12), st.integers(30, 200), st.integers(0, 200))
def test_it_is_never_slower_than_auto(sizes, gpu, ram):
    memory = {0: gpu, "cpu": ram}
    taken = chosen(sizes, memory)
    if taken is None:
        return
    auto = planner.plan(model(sizes), memory, "auto")
    largest = max((layer.bytes for layer in auto.layers if layer.device != 0), default=1)
    assert taken <= 1.000001 * seconds(auto, slots=auto.shares[0].reserve // largest or SLOTS)


def test_what_fits_is_placed_as_by_auto_and_what_does_not_is_spread():
    budgets = {0: "24GiB", "cpu": "200GiB"}
    assert plan("gpt2", budgets, "fastest").device_map == plan("gpt2", budgets, "auto").device_map
    found, auto = (plan("llama-2-70b", budgets, name, dtype="float16", context=512) for name in ("fastest", "auto"))
    assert found.offloaded <= auto.offloaded and found.feasible and found.strategy == "fastest"
    places = "".join("0" if layer.device == 0 else "." for layer in found.layers if "layers" in layer.name)
    assert "0000" not in places and "........." not in places, "a prompt hides copies behind work"


def test_a_disk_and_a_link_are_busy_at_once():
    """Eight blocks in RAM and eight on disk: in turns, the disk has time while others cross the link."""
    found = planner.plan(model([10] * 16), {0: 25, "cpu": 80}, "fastest", rates=SLOW)
    auto = planner.plan(model([10] * 16), {0: 25, "cpu": 80}, "auto")
    assert seconds(found) < 0.95 * seconds(auto)


def test_the_machine_decides():
    assert plan("gpt2", {0: "300MiB", "cpu": "1GiB"}, "fastest", dtype="float32", hardware="T4").feasible
    with pytest.raises(ValueError, match="unknown hardware 'PS5'"):
        plan("gpt2", {0: "300MiB"}, "fastest", hardware="PS5")
