"""Plans: against brute force and an independent count, over thousands of random models and budgets."""

import copy
import json
from fractions import Fraction
from itertools import combinations_with_replacement

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bigkit.devices import collapse, read_device
from bigkit.maps import strategies
from bigkit.maps.plan import Plan, PlanError
from bigkit.maps.strategies import SLOTS, STRATEGIES
from bigkit.maps.strategies import place as plan
from bigkit.maps.task import Task, read_budgets
from bigkit.model.spec import Attention, ModelSpec, ModuleSpec, Precision, TensorSpec

# ---------------------------------------------------------------------------------------------------------------------
# Random models


def linear(size, buffer=0):
    tensors = {"weight": TensorSpec((size,), "float16")}
    if buffer:
        tensors["stat"] = TensorSpec((buffer,), "int64", buffer=True)
    return ModuleSpec("Linear", tensors)


@st.composite
def models(draw, ties=True, buffers=True, attention=True):
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=6))
    children, records = {}, []
    for i, size in enumerate(sizes):
        split = draw(st.booleans())
        buffer = draw(st.integers(0, 3)) if buffers else 0
        parts = {"a": linear(size, buffer), "b": linear(draw(st.integers(0, 10)))}
        children[f"b{i}"] = ModuleSpec("Block" if split else "Whole", {}, parts)
        if attention and draw(st.booleans()):
            records.append(Attention(f"h.b{i}", draw(st.integers(1, 4)), draw(st.sampled_from([None, 3]))))
    top, tied = {}, ()
    if draw(st.booleans()):
        top["embed"] = linear(draw(st.integers(1, 40)))
    top["h"] = ModuleSpec("ModuleList", {}, children)
    if ties and "embed" in top and draw(st.booleans()):
        extra = {"bias": TensorSpec((draw(st.integers(0, 60)),), "float16")}
        top["head"] = ModuleSpec("Linear", {**top["embed"].tensors, **extra})
        tied = (("embed.weight", "head.weight"),)
    own = {"scale": TensorSpec((draw(st.integers(0, 5)),), "float16")} if draw(st.booleans()) else {}
    facts = {"hidden_size": 1, "intermediate_size": 1, "torch_dtype": "float16"} if draw(st.booleans()) else {}
    return ModelSpec("random", ModuleSpec("Model", own, top), tied, ("Whole",), tuple(records), facts)


@st.composite
def budgets(draw):
    given = {i: draw(st.integers(0, 260)) for i in range(draw(st.integers(0, 4)))}
    if draw(st.booleans()) or not given:
        given["cpu"] = draw(st.integers(0, 300))
    if draw(st.booleans()):
        given["disk"] = draw(st.integers(0, 300))
    return given


def count(model, found, device):
    """What a device holds, counted naively from the layers' tensors."""
    here = [layer for layer in model.layers() if {p.name: p.device for p in found.layers}[layer.name] == device]
    owner = {name: group[0] for group in model.ties for name in group}
    stored = {}
    for layer in here:
        for name, tensor, _ in layer.spec.named_tensors(layer.name):
            stored[owner.get(name, name)] = tensor.bytes()
    return sum(stored.values())


# ---------------------------------------------------------------------------------------------------------------------
# Properties


def check_plan(model, memory, strategy, context, batch):
    before = copy.deepcopy(memory)
    found = plan(model, memory, strategy, context=context, batch=batch, strict=False)
    assert memory == before
    assert [layer.name for layer in found.layers] == [layer.name for layer in model.layers()]
    assert {layer.device for layer in found.layers} <= set(found.budget)
    for share in found.shares:
        assert share.weights == count(model, found, share.device)
        if found.feasible:
            assert share.budget is None or share.used <= share.budget
    assert found.feasible == (sum(share.over for share in found.shares) == 0)
    runners = [share for share in found.shares if share.runs]
    away = [layer for layer in found.layers if layer.device not in {share.device for share in runners}]
    for share in runners:  # blocks in flight have room, and the buffers that stay
        visitors = [layer.bytes for layer in away if layer.works == share.device]
        assert share.reserve >= found.slots * max(visitors, default=0) and (visitors or not share.reserve)
    assert all((layer.works is not None) == (layer in away) for layer in found.layers)
    if found.max_context is not None:
        assert found.max_context >= found.context
    assert Plan.from_json(found.to_json()) == found
    assert len(repr(found)) < 110
    expanded = {n: next(found.device_map[p] for p in parents(n) if p in found.device_map) for n in names(found)}
    assert expanded == {layer.name: layer.device for layer in found.layers}


@settings(max_examples=200)
@given(models(), budgets(), st.sampled_from(STRATEGIES), st.integers(0, 6), st.integers(1, 2))
def test_no_plan_is_over_budget_and_nothing_is_lost(model, memory, strategy, context, batch):
    check_plan(model, memory, strategy, context, batch)


@pytest.mark.soak
@settings(max_examples=6000)
@given(models(), budgets(), st.sampled_from(STRATEGIES), st.integers(0, 6), st.integers(1, 2))
def test_no_plan_is_over_budget_and_nothing_is_lost_in_thousands(model, memory, strategy, context, batch):
    check_plan(model, memory, strategy, context, batch)


def names(found):
    return [layer.name for layer in found.layers]


def parents(name):
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def stretches(model, memory, context, batch):
    """Loads of every in-order placement without offloading: an oracle that knows nothing of prefix sums."""
    gpus = [budget for device, budget in memory.items() if isinstance(device, int) and budget]
    layers = model.layers_to_place()
    need = [layer.bytes() for layer in layers]
    for record in model.attention:
        i = next(i for i, layer in enumerate(layers) if layer.name.startswith(record.layer))
        need[i] += batch * record.bytes(context, "bfloat16")
    working = batch * context * 7 * 2 if model.facts else 0
    cuts = [i for i in range(len(layers) + 1) if i == len(layers) or not layers[i].with_previous]
    for inner in combinations_with_replacement(cuts, len(gpus) - 1):
        edges = [0, *inner, len(layers)]
        loads = [sum(need[a:b]) for a, b in zip(edges, edges[1:])]
        rooms = [gpu - working for gpu in gpus]
        if all(a == b or load <= room for a, b, load, room in zip(edges, edges[1:], loads, rooms)):
            yield loads, rooms


GPUS_ONLY = st.lists(st.integers(1, 260), min_size=1, max_size=4).map(lambda sizes: dict(enumerate(sizes)))


def check_balanced(model, memory, context, batch):
    every = list(stretches(model, memory, context, batch))
    if not every:
        return
    share = lambda loads, rooms: max(Fraction(n, room) if room > 0 else 0 for n, room in zip(loads, rooms))  # noqa: E731
    best = min(share(*each) for each in every)
    found = plan(model, memory, "balanced", context=context, batch=batch)
    assert not found.offloaded
    rooms = every[0][1]
    loads = [found.shares[i].weights + found.shares[i].kv_cache for i in range(len(rooms))]
    assert share(loads, rooms) == best
    low = plan(model, memory, "balanced_low_0", context=context, batch=batch)
    assert low.shares[0].weights + low.shares[0].kv_cache == min(loads[0] for loads, _ in every) or len(memory) == 1
    for strategy in STRATEGIES:
        assert not plan(model, memory, strategy, context=context, batch=batch).offloaded


@settings(max_examples=150)
@given(models(ties=False), GPUS_ONLY, st.integers(0, 4), st.integers(1, 2))
def test_balanced_is_optimal_and_offloads_only_if_it_must(model, memory, context, batch):
    check_balanced(model, memory, context, batch)


@pytest.mark.soak
@settings(max_examples=3000)
@given(models(ties=False), GPUS_ONLY, st.integers(0, 4), st.integers(1, 2))
def test_balanced_is_optimal_for_thousands_of_models(model, memory, context, batch):
    check_balanced(model, memory, context, batch)


@settings(max_examples=60)
@given(models(ties=False).filter(lambda m: m.attention and not any(a.window for a in m.attention)), GPUS_ONLY)
def test_exact_finds_the_longest_context(model, memory):
    if not any(stretches(model, memory, 0, 1)):
        return
    found = plan(model, memory, "exact")
    assert any(stretches(model, memory, found.context, 1))
    assert not any(stretches(model, memory, found.context + 1, 1))
    assert found.max_context == found.context
    for other in STRATEGIES:
        assert plan(model, memory, other).max_context <= found.context


def cost(found):
    """What offloaded weights cost a token: bytes copied, those from disk several times, over all links that work."""
    disk = sum(share.weights for share in found.shares if share.device == "disk")
    works = {layer.works for layer in found.layers if layer.works is not None}
    return (found.offloaded + strategies.DISK * disk) / max(1, len(works))


def check_another_gpu(sizes, gpus, more, ram, tokens):
    """A model with a device more: still feasible, no longer a wait for weights, no shorter a context, no fuller GPU."""
    model = chain(*sizes, attention=tuple(Attention(str(i), tokens) for i in range(1, len(sizes)) if tokens))
    for strategy in ("balanced", "exact"):
        few, many = (plan(model, {**dict(enumerate(each)), "cpu": ram}, strategy, context=1, strict=False)
                     for each in (gpus, [*gpus, more]))  # fmt: skip
        if not few.feasible:
            continue
        assert many.feasible and cost(many) <= cost(few)
        if not few.offloaded and devices(few) == sorted(devices(few)):
            share = [max(Fraction(s.used, s.budget) for s in p.shares if s.runs and s.budget) for p in (few, many)]
            assert (many.max_context or 0) >= (few.max_context or 0) or strategy != "exact"
            assert share[1] <= share[0] or strategy == "exact"


BLOCKS = st.tuples(st.integers(1, 60), st.integers(1, 20), st.integers(2, 20)).map(lambda n: [n[0], *[n[1]] * n[2]])
UP_TO_SEVEN = st.lists(st.integers(5, 150), min_size=1, max_size=7)


@settings(max_examples=150)
@given(BLOCKS, UP_TO_SEVEN, st.integers(1, 150), st.sampled_from([0, 100, 10**6]), st.integers(0, 2))
@example([10] * 12, [45, 45, 45], 5, 10**6, 0)  # a device without room for slots: then one of the four worked
def test_another_gpu_makes_no_plan_worse(sizes, gpus, more, ram, tokens):
    check_another_gpu(sizes, gpus, more, ram, tokens)


@pytest.mark.soak
@settings(max_examples=3000)
@given(BLOCKS, UP_TO_SEVEN, st.integers(1, 150), st.sampled_from([0, 100, 10**6]), st.integers(0, 2))
def test_another_gpu_makes_none_of_thousands_of_plans_worse(sizes, gpus, more, ram, tokens):
    check_another_gpu(sizes, gpus, more, ram, tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Cases that other planners get wrong


def chain(*sizes, cls="Block", **options):
    """A model of leaf layers with these sizes in bytes."""
    layers = {str(i): ModuleSpec(cls, {"weight": TensorSpec((size,), "int8")}) for i, size in enumerate(sizes)}
    return ModelSpec("chain", ModuleSpec("Model", {}, layers), **options)


def devices(found):
    return [layer.device for layer in found.layers]


def test_no_reserve_where_nothing_is_offloaded():
    found = plan(chain(100, 100, 100), {0: 200, 1: 100}, "sequential")
    assert devices(found) == [0, 0, 1] and found.shares[0].reserve == 0


def test_reserve_is_held_for_the_largest_offloaded_layer():
    found = plan(chain(20, 20, 30, 40, 15), {0: 124, "cpu": 1000}, "sequential")
    assert devices(found) == [0, 0, "cpu", "cpu", "cpu"]  # 40 + 2 slots of 40 leave 4, and the last layer takes 15
    assert found.shares[0].reserve == SLOTS * 40 and found.shares[0].used == 120


def test_gaps_are_filled_before_anything_is_offloaded():
    found = plan(chain(25, 25, 50, 40, 10), {0: 140, "cpu": 1000}, "sequential")
    assert devices(found) == [0, "cpu", "cpu", "cpu", 0]  # 25 + 2 slots of 50 leave 15


def test_a_large_embedding_does_not_push_everything_to_the_last_gpu():
    model = chain(50, *[10] * 10)
    found = plan(model, dict.fromkeys(range(8), 75), "balanced")
    assert found.shares[0].used == 50 and not found.offloaded
    assert max(found.used.values()) == 50


def test_a_layer_that_only_fits_a_later_gpu_leaves_no_room_unused():
    found = plan(chain(60, 20, 20), {0: 40, 1: 60}, "sequential")
    assert not found.offloaded and devices(found) == [1, 0, 0]


def test_the_largest_layer_rests_on_the_gpu_when_it_cannot_travel():
    found = plan(chain(10, 10, 10, 60), {0: 85, "cpu": 100}, "sequential")
    assert found.feasible and devices(found)[-1] == 0


def test_one_slot_must_do_when_two_are_too_many():
    found = plan(chain(40, 40, 40), {0: 50, "cpu": 1000})
    assert found.feasible and found.shares[0].reserve == 40


def test_as_few_bytes_as_possible_are_offloaded():
    """The embedding and the head of Llama 3.1 (1 GiB each) stay, and smaller slots let more blocks stay too."""
    from bigkit import zoo

    model, memory = zoo.describe("llama-3.1-8b"), {0: "12GiB", "cpu": "64GiB"}
    first, fewest = (plan(model, memory, strategy, dtype="bfloat16") for strategy in ("sequential", "auto"))
    assert first.slots == fewest.slots == 2 and fewest.offloaded < 0.82 * first.offloaded
    assert first.device_map["lm_head"] == "cpu" and fewest.device_map["lm_head"] == 0


def test_one_slot_if_that_leaves_a_tenth_less_to_copy():
    few, many = (plan(chain(*[10] * count), {0: 95, "cpu": 10**6}) for count in (12, 100))
    assert (few.slots, few.offloaded) == (1, 40), "with two slots it would be 50"
    assert (many.slots, many.offloaded) == (2, 930), "920 are not worth waiting for"
    from_disk = plan(chain(*[10] * 40), {0: 95, "cpu": 290})
    assert (from_disk.slots, from_disk.offloaded) == (1, 320), "of 330 bytes 40 would come from disk, of 320 only 30"


def test_what_stays_is_spread_among_what_is_offloaded():
    model, memory = chain(*[10] * 20), {0: 100, "cpu": 1000}
    places = "".join("." if device == "cpu" else "0" for device in devices(plan(model, memory)))
    assert places.count("0") == 8 and "00" not in places and "..." not in places
    assert devices(plan(model, memory, "sequential")) == [0] * 8 + ["cpu"] * 12
    mixed = plan(chain(10, 7, 10, 7, 10, 7, 10, 7), {0: 45, "cpu": 1000})
    assert mixed.used[0] <= 45 and mixed.feasible, "only layers of one size change places"


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        ("llama-2-7b", {0: "8GiB", "cpu": "64GiB"}),
        ("gpt2-xl", {0: "2GiB", "cpu": "64GiB"}),
        ("mixtral-8x7b", {0: "24GiB", "cpu": "64GiB"}),
        ("llama-2-70b", {0: "80GiB", "cpu": "256GiB"}),
    ],
)
def test_auto_is_never_slower_than_sequential(name, memory):
    from bigkit import zoo
    from bigkit.machine.hardware import GPUS
    from bigkit.machine.roofline import Rates
    from bigkit.machine.streams import Turn, schedule

    rates = Rates.of_gpu(GPUS["RTX 4090"])

    def token(found):
        turns = [
            Turn(layer.name, layer.bytes, max(layer.bytes / rates.memory, 100 * rates.issue), layer.device)
            for layer in found.layers
            if layer.bytes
        ]
        played = schedule(turns, link=rates.link, disk=rates.disk, slots=found.slots, tokens=4, chunk=2**28, ring=2)
        return played.ends[-1] - played.ends[-3]

    first, spread = (plan(zoo.describe(name), memory, s, dtype="float16") for s in ("sequential", "auto"))
    assert spread.offloaded <= first.offloaded and token(spread) <= 1.001 * token(first)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_learned_positions_are_a_hard_limit(strategy):
    from bigkit import zoo

    found = plan(zoo.describe("gpt2"), {0: "40GiB"}, strategy)
    assert found.max_context == 1024
    assert plan(zoo.describe("gpt2"), {0: "40GiB"}, strategy, context=2000).max_context == 1024
    assert plan(zoo.describe("gpt2"), {0: "40GiB"}, "exact", context=2000).context == 1024
    assert plan(zoo.describe("pygpt"), {0: "40GiB"}, strategy).max_context == 512
    assert plan(zoo.describe("bloom"), {0: "40000GiB"}, strategy).max_context > 2**17, "ALiBi has no such limit"


def test_low_zero_with_any_gpu_numbers():
    found = plan(chain(10, 10, 10, 10), {1: 100, 2: 100, 5: 100}, "balanced_low_0")
    assert found.used[1] == 0 and found.used[2] == found.used[5] == 20


def test_dense_then_moe_blocks_are_measured_each():
    found = plan(chain(10, 10, 80, 80), {0: 100, 1: 100}, "balanced")
    assert devices(found) == [0, 0, 0, 1]


def test_root_parameters_and_buffers_are_placed():
    tensors = {"cls_token": TensorSpec((4,)), "mask": TensorSpec((8,), "bool", buffer=True, persistent=False)}
    model = ModelSpec("vit", ModuleSpec("ViT", tensors, {"head": linear(100)}))
    found = plan(model, {0: 24, 1: 200}, "sequential")
    assert found.device_map == {"cls_token": 0, "mask": 0, "head": 1}


def test_tied_head_stays_with_its_embedding_and_counts_once():
    embed = ModuleSpec("Embedding", {"weight": TensorSpec((50,), "int8")})
    parts = {"embed": embed, "block": ModuleSpec("B", {"w": TensorSpec((40,), "int8")}), "head": embed}
    model = ModelSpec("tied", ModuleSpec("LM", {}, parts), ties=(("embed.weight", "head.weight"),))
    found = plan(model, {0: 50, 1: 40})
    assert found.device_map == {"embed": 0, "block": 1, "head": 0} and found.used == {0: 50, 1: 40, "disk": 0}


def test_a_small_tied_part_is_counted_on_both_devices():
    def block(shared):
        return ModuleSpec("Block", {"w": TensorSpec((40,), "int8"), "shared": TensorSpec((5,), "int8")})

    parts = {"a": block(True), "b": block(True)}
    model = ModelSpec("tied", ModuleSpec("M", {}, parts), ties=(("a.shared", "b.shared"),))
    assert plan(model, {0: 45, 1: 45}).used == {0: 45, 1: 45, "disk": 0}
    assert plan(model, {0: 90}).used == {0: 85, "disk": 0}
    with pytest.raises(PlanError):
        plan(model, {0: 45, 1: 44, "disk": 0})


def test_the_cpu_runs_everything_where_there_is_no_gpu():
    found = plan(chain(10, 10, 10), {"cpu": 100})
    assert found.device_map == {"": "cpu"} and found.shares[0].reserve == 0
    found = plan(chain(30, 30, 30), {"cpu": 90 - 1})
    assert sorted(map(str, devices(found))) == ["cpu", "disk", "disk"] and found.shares[0].reserve == 30


def test_kv_cache_of_offloaded_layers_stays_on_the_gpu():
    model = chain(50, 50, attention=(Attention("0", 1), Attention("1", 1)))
    found = plan(model, {0: 100, "cpu": 100}, context=10)
    assert found.shares[0].kv_cache == 2 * 10 * 2
    assert found.offloaded and found.shares[0].used <= 100


# ---------------------------------------------------------------------------------------------------------------------
# Maps of one's own, errors, words


def test_custom_map_is_measured():
    found = plan(chain(10, 20, 30), {0: 30, 1: 30}, {"0": "cuda:0", "1": 0, "2": 1})
    assert found.strategy == "custom" and found.used == {0: 30, 1: 30, "disk": 0}
    with pytest.raises(PlanError, match="GPU 0 lacks 30 B.*strategy='auto'"):
        plan(chain(10, 20, 30), {0: 30, 1: 30}, {"": 0})


def test_custom_map_may_cut_through_a_block():
    block = ModuleSpec("Block", {}, {"a": linear(10), "b": linear(20)})
    model = ModelSpec("m", ModuleSpec("M", {}, {"h": block}), no_split=("Block",))
    assert plan(model, {0: 99, 1: 99}, {"h.a": 0, "h.b": 1}).used == {0: 20, 1: 40, "disk": 0}


@pytest.mark.parametrize(
    ("device_map", "says"),
    [
        ({"0": 0}, "gives no device for '1', '2'"),
        ({"": 7}, "uses '7', but max_memory gives no budget"),
        ({"": "gpu"}, "unknown device 'gpu'"),
    ],
)
def test_wrong_maps_are_refused_by_name(device_map, says):
    with pytest.raises(ValueError, match=says):
        plan(chain(1, 2, 3), {0: 30, 1: 30}, device_map)


def test_the_innermost_entry_of_a_map_counts():
    placed = plan(chain(1, 2, 3), {0: 30, 1: 30}, {"": 0, "1": 1})
    assert [layer.device for layer in placed.layers] == [0, 1, 0]
    with pytest.warns(UserWarning, match="names '9', but chain has no such module"):
        assert plan(chain(1, 2, 3), {0: 30, 1: 30}, {"": 0, "9": 1}).device_map == {"": 0}


def test_infeasible_says_how_much_is_missing_and_what_helps():
    model = ModelSpec("m", ModuleSpec("M", {}, {"a": ModuleSpec("L", {"weight": TensorSpec((100,), "float32")})}))
    with pytest.raises(PlanError, match=r"m does not fit: GPU 0 lacks 100 B.*dtype='float16'") as error:
        plan(model, {0: 300, "disk": 0})
    assert "max_memory {0: '400B'}" in str(error.value)


def test_the_cures_that_it_names_work():
    model = chain(100, 100, 100)
    with pytest.raises(PlanError) as error:
        plan(model, {0: 250, "cpu": 10, "disk": 10})
    assert "an unlimited 'cpu'" in str(error.value)
    assert plan(model, {0: 250, "cpu": 10**6, "disk": 10}).feasible


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"max_memory": {"gpu0": 1}}, "unknown device 'gpu0'"),
        ({"max_memory": {0: "10gb"}}, "ambiguous"),
        ({"max_memory": {0: -1}}, "zero or more"),
        ({"max_memory": "10GB"}, "must map devices to budgets, as {0: '10GiB', 'cpu': '9GiB'}, not '10GB'"),
        ({"max_memory": ["10GB"]}, "must map devices to budgets"),
        ({"strategy": "best"}, "unknown strategy 'best'"),
        ({"quantization": "int3"}, "unknown quantization"),
        ({"dtype": "float12"}, "unknown dtype"),
        ({"batch": 0}, "batch must be a whole number of at least 1"),
    ],
)
def test_bad_arguments_are_one_clear_sentence(arguments, says):
    with pytest.raises(ValueError, match=says):
        plan(chain(1), **{"max_memory": {0: 10}, **arguments})


def test_explain_says_why_each_boundary_stands():
    text = plan(chain(10, 20, 30), {0: 35, 1: 35}, "sequential").explain()
    assert "GPU 0: 30 B of 35 B, 86 %. 0 .. 1 (2 layers)." in text
    assert "Next is 2 (30 B), but 5 B is free." in text


def again(found, **names):
    exec(found.to_code(), names)
    assert names["device_map"] == found.device_map
    return names["p"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"strategy": "exact", "dtype": "float16", "batch": 2, "context": 64},
        {"special_dtypes": {"transformer.wte.weight": "float16"}, "overhead": "10MiB"},
        {"no_split": ()},
        {"no_split": "GPT2MLP"},
        {"max_memory": {0: "200MiB", "cpu": "1GiB"}, "offload_buffers": True},
        {"quantization": "nf4", "keep": ["transformer.h.0.mlp.c_fc"]},
        {"max_memory": {0: "800MiB", 1: "800MiB"}, "strategy": {"transformer": 0, "lm_head": 1}},
        {"strategy": {"transformer.wte": 0, "transformer.wpe": 0, "transformer.drop": 0, "transformer.ln_f": 0,
                      "lm_head": 0, **{f"transformer.h.{i}.{part}": 1 for i in range(12)
                                       for part in ("ln_1", "attn", "ln_2", "mlp")}}},
        {"max_memory": {0: "1MiB", "disk": 0}, "strict": False},
    ],
)  # fmt: skip
def test_to_code_makes_the_same_plan(arguments):
    from bigkit import zoo

    memory = {0: "400MiB", 1: "400MiB"}
    found = plan(zoo.describe("gpt2"), **{"max_memory": memory, **arguments})
    assert again(found) == found == Plan.from_json(found.to_json())


def test_repeated_blocks_stay_whole_where_a_model_has_no_list():
    from bigkit import zoo

    found = plan(zoo.describe("resnet50.a1_in1k"), {0: "60MiB", 1: "60MiB"})
    assert {layer.cls for layer in found.layers if layer.name.startswith("layer")} == {"Bottleneck"}


def test_to_code_of_a_machine_and_of_a_module():
    from torch import nn

    from bigkit import plan as plan_by_name

    found = plan_by_name("llama-2-7b", hardware="2 x T4", dtype="float16")
    assert found.shares[0].overhead and again(found) == found
    module = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    found = plan_by_name(module, {0: 400, 1: 400})
    assert "`model` is your Sequential" in found.to_code() and again(found, model=module) == found


def test_a_plan_of_an_older_form_is_read():
    found = plan(chain(10, 20), {0: 30})
    older = {k: v for k, v in json.loads(found.to_json()).items() if k not in ("slots", "library", "options")}
    assert Plan.from_json(json.dumps(older)).device_map == found.device_map


def test_from_json_refuses_something_else():
    for text in ("[]", "{}", "nonsense", json.dumps({"shares": [], "layers": []})):
        with pytest.raises(ValueError, match="not the JSON of a bigkit Plan"):
            Plan.from_json(text)


def test_collapse_merges_whole_modules_only():
    assert collapse({"a.0": 0, "a.1": 0, "b": 0}) == {"": 0}
    assert collapse({"a.0": 0, "a.1": 0, "b": 1}) == {"a": 0, "b": 1}
    assert collapse({"a.0": 0, "a.1": 1, "ab": 1}) == {"a.0": 0, "a.1": 1, "ab": 1}


def test_devices_and_budgets_are_read():
    assert [read_device(d) for d in (1, "cuda:2", "cuda", "cpu", "disk", "mps")] == [1, 2, 0, "cpu", "disk", "mps"]
    assert list(read_budgets({"cpu": 1, 1: 2, 0: 3})) == [0, 1, "cpu", "disk"]


def test_cache_and_activations_have_the_dtype_of_the_weights():
    from bigkit import zoo

    model, budgets = zoo.describe("gpt2"), {0: "8GiB"}
    halves, wholes = (plan(model, budgets, dtype=dtype, context=512) for dtype in ("float16", "float32"))
    as_stored = plan(model, budgets, context=512)
    assert wholes.shares[0].kv_cache == 2 * halves.shares[0].kv_cache == as_stored.shares[0].kv_cache
    assert wholes.shares[0].activations == 2 * halves.shares[0].activations == as_stored.shares[0].activations
    narrow = plan(model, budgets, dtype="fp8", context=512)
    assert narrow.shares[0].kv_cache == halves.shares[0].kv_cache


def test_quantized_plans_use_true_sizes():
    weight = ModuleSpec("Linear", {"weight": TensorSpec((128, 64))}, linear=True)
    model = ModelSpec("q", ModuleSpec("M", {}, {"a": weight, "head": weight}))
    found = plan(model, {0: 10**6}, quantization="int8")
    assert [layer.bytes for layer in found.layers] == [128 * 64 + 4 * 128, 2 * 128 * 64]  # the head stays float16
    assert Precision("float16", "nf4").label == "nf4"


def test_what_cannot_win_is_not_tried(monkeypatch):
    """A model that is too large for all GPUs is never filled without slots, and of fillings that copy no less nothing
    but the copied bytes is counted.
    """
    from bigkit import zoo

    filled, counted = [], []
    monkeypatch.setattr(strategies, "_fill", lambda *args, fill=strategies._fill: filled.append(args[1]) or fill(*args))
    monkeypatch.setattr(Task, "loads", lambda *args, loads=Task.loads: counted.append(args[2]) or loads(*args))
    plan(zoo.describe("llama-3.1-405b"), {**dict.fromkeys(range(8), "80GiB"), "cpu": "900GiB"}, dtype="float16")
    assert {*filled} == {1, 2} and len(counted) <= len(filled) // 2
