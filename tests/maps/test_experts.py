"""Experts apart from their blocks: budgets hold, the order of places is the documented one, maps say it, words too."""

import json
from itertools import combinations_with_replacement

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bigkit import plan, zoo
from bigkit.devices import placement
from bigkit.maps.experts import is_apart
from bigkit.maps.llama_cpp import llama_cpp_flags
from bigkit.maps.plan import Plan, PlanError
from bigkit.model.experts import experts_of
from bigkit.model.spec import Attention, ModelSpec, ModuleSpec, TensorSpec

FACTS = {"num_experts": 4, "experts_per_token": 1, "num_hidden_layers": 6}


def mixture(blocks=6, dense=10, expert=25):
    """Blocks of `dense` bytes and 4 experts of `expert` bytes each, between an embedding and a head of 20 bytes."""
    leaf = ModuleSpec("Linear", {"weight": TensorSpec((dense,), "int8")})
    experts = ModuleSpec("Experts", {"up": TensorSpec((4, expert, 1), "int8")}, {"act": ModuleSpec("SiLU")})
    mlp = ModuleSpec("Mlp", {}, {"experts": experts})
    block = ModuleSpec("Block", {}, {"attn": leaf, "mlp": mlp})
    end = ModuleSpec("Linear", {"weight": TensorSpec((20,), "int8")})
    body = ModuleSpec("ModuleList", {}, {str(i): block for i in range(blocks)})
    root = ModuleSpec("Net", {}, {"embed": end, "h": body, "head": end})
    caches = tuple(Attention(f"h.{i}", 1) for i in range(blocks))
    return ModelSpec("mixture", root, (), ("Block",), caches, FACTS, "module")


def where(found):
    """For each block: where its experts rest, as one letter."""
    names = {layer.name: layer.device for layer in found.layers}
    return "".join(str(names[f"h.{i}.mlp.experts"])[0] for i in range(6))


def test_what_fits_is_left_as_it_was():
    found = plan(mixture(), {0: 1000, "cpu": 1000})
    assert found.device_map == {"": 0} and found.experts is None and not is_apart(found.layers)


@pytest.mark.parametrize("gpu", range(305, 700, 13))
def test_everything_else_first_then_as_many_experts_as_there_is_room(gpu):
    found = plan(mixture(), {0: gpu, "cpu": 250})
    dense, experts, count = 100, 100, (gpu - 100 - 200) // 100  # two slots for 100 bytes of experts in flight
    assert found.used[0] <= gpu and found.feasible
    assert where(found).count("0") == count and where(found).count("c") == min(2, 6 - count)
    share = found.shares[0]
    assert (share.weights, share.reserve) == (dense + experts * count, 200)
    assert {layer.device for layer in found.layers if "experts" not in layer.name} == {0}


def test_those_that_stay_are_spread():
    found = plan(mixture(), {0: 610, "cpu": 1000})
    assert where(found) == "0c0c0c" and found.slots == 2


def test_one_slot_if_two_do_not_fit():
    found = plan(mixture(), {0: 250, "cpu": 1000})
    assert (found.slots, found.shares[0].reserve, where(found)) == (1, 100, "cccccc")


def test_blocks_are_placed_whole_where_the_rest_does_not_fit():
    found = plan(mixture(), {0: 240, "cpu": 1000}, strict=False)
    assert not found.feasible or not is_apart(found.layers) or found.used[0] <= 240
    assert plan(mixture(), {0: 460, "cpu": 1000}, "sequential").experts is None


def test_a_block_works_in_one_place():
    """Experts rest on their block's GPU or away; a GPU has a reserve, unless all experts of its blocks are there."""
    found = plan(mixture(12), {0: 500, 1: 500, "cpu": 1000})
    names = {layer.name: layer.device for layer in found.layers}
    blocks = [names[f"h.{i}"] for i in range(12)]
    assert blocks == sorted(blocks) and set(blocks) == {0, 1}
    experts = [names[f"h.{i}.mlp.experts"] for i in range(12)]
    assert all(place in (block, "cpu") for place, block in zip(experts, blocks))
    assert sorted(map(experts.count, (0, 1))) == [2, 4], "with blocks shared evenly it was two and two"
    assert sorted(share.reserve for share in found.shares[:2]) == [0, 200]
    assert all(share.used <= share.budget for share in found.shares[:2])


def kept(found):
    """Of how many blocks the experts rest where the block works."""
    runners = {share.device for share in found.shares if share.runs}
    return sum(layer.device in runners for layer in is_apart(found.layers))


def most_kept(model, rooms, reserve):
    """The most blocks whose experts may stay, over every cut of the layers into stretches: an oracle."""
    blocks = {one.name.removesuffix(".mlp.experts"): one.spec.bytes() for one in experts_of(model)}
    dense = [layer.bytes() - blocks.get(layer.name, 0) for layer in model.layers_to_place()]
    own = [layer.name in blocks for layer in model.layers_to_place()]
    size, found = max(blocks.values()), []
    for inner in combinations_with_replacement(range(len(dense) + 1), len(rooms) - 1):
        edges, stay = [0, *inner, len(dense)], 0
        for room, start, end in zip(rooms, edges, edges[1:]):
            left = room - reserve - sum(dense[start:end])
            if end > start and left < 0:
                break
            count = sum(own[start:end])
            stay += count if count * size <= left + reserve else min(count, left // size)
        else:
            found.append(stay)
    return max(found)


SHAPES = st.tuples(st.integers(4, 10), st.integers(1, 12), st.integers(3, 12))  # blocks, bytes: dense, an expert
ROOMS = st.lists(st.integers(30, 220), min_size=1, max_size=4)


def check_most_stay(shape, rooms):
    model = mixture(*shape)
    found = plan(model, {**dict(enumerate(rooms)), "cpu": 10**6}, strict=False)
    if not found.experts:
        return
    assert all(share.used <= share.budget for share in found.shares if share.runs)
    assert kept(found) == most_kept(model, rooms, 4 * shape[2] * found.slots)


@settings(max_examples=150)
@given(SHAPES, ROOMS)
@example((12, 10, 25), [200] * 4)
@example((6, 1, 12), [96, 126, 126])  # one device holds all of its blocks, and keeps nothing free for visitors
def test_as_many_experts_stay_as_in_the_best_of_all_cuts(shape, rooms):
    check_most_stay(shape, rooms)


@pytest.mark.soak
@settings(max_examples=4000)
@given(SHAPES, ROOMS)
def test_as_many_experts_stay_as_in_the_best_of_all_cuts_of_thousands(shape, rooms):
    check_most_stay(shape, rooms)


@settings(max_examples=100)
@given(SHAPES, ROOMS, st.integers(30, 220))
def test_another_gpu_keeps_no_fewer_experts(shape, rooms, more):
    before, after = (plan(mixture(*shape), {**dict(enumerate(each)), "cpu": 10**6}, strict=False)
                     for each in (rooms, [*rooms, more]))  # fmt: skip
    if before.experts and after.experts and before.slots == after.slots:
        assert kept(after) >= kept(before)
    assert after.feasible >= before.feasible


def test_of_eight_gpus_none_is_left_empty():
    """The first had the embedding and the blocks without experts, and nothing else: 42 of 58."""
    memory = {**dict.fromkeys(range(8), "140GiB"), "cpu": "600GiB"}
    found = plan("deepseek-v3", memory, dtype="bfloat16")
    assert kept(found) == 48 and all(share.used > 0.9 * share.budget for share in found.shares[:8])
    assert {layer.works for layer in found.layers} == {None, *range(8)}, "what travels has all links"
    held = plan("deepseek-v3", memory, dtype="bfloat16", experts_on_cpu=15)
    assert held.feasible and kept(held) == 43


def test_without_a_gpu_experts_rest_on_disk():
    found = plan(mixture(), {"cpu": 400})
    assert set(where(found)) == {"c", "d"} and found.used["cpu"] <= 400
    assert llama_cpp_flags(found) == "" and "llama.cpp" not in found.explain()


def test_device_map_is_an_ordinary_one():
    """It gives each tensor the device of its layer, and read back it is the same plan."""
    model = mixture()
    found = plan(model, {0: 620, "cpu": 200})
    assert found.device_map[""] == 0 or "h.1.mlp.experts" in found.device_map
    device_of = placement(found.device_map)
    for layer in found.layers:
        assert device_of(layer.name) == layer.device
    again = plan(model, {0: 620, "cpu": 200}, found.device_map)
    assert again.shares[0].used == found.shares[0].used and again.device_map == found.device_map
    by_hand = plan(model, {0: 10**4, "cpu": 10**4}, {"": 0, "h.3.mlp.experts": "cpu"})
    assert where(by_hand) == "000c00" and by_hand.shares[0].reserve == 200
    finer = plan(model, {0: 10**4, "cpu": 10**4}, {"": 0, "h.3.attn": "cpu"})  # not experts: cut as before
    assert finer.experts is None and finer.options["no_split"] == []


def test_json_and_code_keep_it():
    found = plan(mixture(), {0: 620, "cpu": 200})
    assert Plan.from_json(found.to_json()) == found
    old = json.loads(found.to_json())
    del old["experts"]  # as stored before there were any
    assert Plan.from_json(json.dumps(old)).device_map == found.device_map
    named = plan("mixtral-8x7b", {0: "40GiB", "cpu": "128GiB"}, dtype="bfloat16", experts_on_cpu=25)
    space = {}
    exec(named.to_code(), space)
    assert space["device_map"] == named.device_map


def test_experts_on_cpu_and_llama_cpp():
    found = plan(mixture(), {0: 10**4, "cpu": 10**4}, experts_on_cpu=4)
    assert where(found) == "cccc00" and llama_cpp_flags(found) == "--n-gpu-layers 99 --n-cpu-moe 4"
    assert "experts of 4 of 6 blocks" in found.explain() and "--n-cpu-moe 4" in found.explain()
    spread = plan(mixture(), {0: 610, "cpu": 1000})
    assert llama_cpp_flags(spread) == r'--n-gpu-layers 99 -ot "blk\.(1|3|5)\.ffn_.*_exps\.=CPU"'
    assert set(where(plan(mixture(), {0: 10**4, "cpu": 10**4}, experts_on_cpu=0))) == {"0"}
    assert plan(mixture(), {0: 10**4, "cpu": 10**4}, experts_on_cpu=6).shares[0].weights == 100
    with pytest.raises(PlanError, match="GPU 0 lacks"):
        plan(mixture(), {0: 350, "cpu": 10**4}, experts_on_cpu=2)
    for arguments, message in [
        ((mixture(), {0: 10**4, "cpu": 10**4}, 7), "has experts in 6 blocks"),
        ((zoo.describe("gpt2"), {0: "1GB", "cpu": "1GB"}, 1), "gpt2 has no experts"),
        ((mixture(), {"cpu": 10**4}, 1), "needs a GPU for the rest"),
    ]:
        with pytest.raises(ValueError, match=message):
            plan(*arguments[:2], experts_on_cpu=arguments[2])


def test_explain_says_why():
    found = plan("mixtral-8x7b", {0: "24GiB", "cpu": "128GiB"}, dtype="bfloat16")
    text = found.explain()
    assert "The experts of 26 of 32 blocks rest apart" in text and "takes 2 of 8" in text
    assert "17.06 GiB of these 68.25 GiB" in text and "the experts of 26 blocks" in text
    assert len(experts_of(zoo.describe("mixtral-8x7b"))) == 32


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3"])
@pytest.mark.parametrize("budget", ["20GiB", "70GiB"])
def test_less_travels_for_a_token_than_with_whole_blocks(name, budget):
    memory = {0: budget, "cpu": "512GiB"}
    whole = plan(name, memory, "sequential", dtype="bfloat16", strict=False)
    found = plan(name, memory, dtype="bfloat16", strict=False)
    if found.experts:
        few, count = found.experts
        assert found.offloaded * few / count < whole.offloaded
    else:  # deepseek's experts in flight alone are 42 GiB
        assert name == "deepseek-v3" and budget == "20GiB"
