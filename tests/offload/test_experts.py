"""Chosen experts alone travel, and nothing else changes: tokens are those of the resident model, bytes are counted."""

import copy
import gc
import mmap
import os
import random
from functools import cache

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from bigkit import (
    cpu_offload,
    describe,
    disk_offload,
    dispatch_model,
    init_empty_weights,
    load_checkpoint_and_dispatch,
    plan,
    remove_hook_from_module,
    save_model,
)
from bigkit.machine.routing import Routing
from bigkit.meta.skeleton import spec_from_module
from bigkit.model.experts import experts_of
from bigkit.offload import gather, lenders, on_device
from bigkit.offload.choice import choice_of, chosen_rows
from bigkit.offload.experts import ExpertsHook, ExpertStreamer, expert_hits
from bigkit.offload.handle import Away
from bigkit.offload.hooks import AlignDevicesHook, hooks_in
from bigkit.offload.observe import observe
from bigkit.offload.on_device import DeviceRows
from bigkit.offload.rows import Rows, count_rows, rows_of
from bigkit.offload.transfer import CudaLane
from tests.fake_streams import World

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "num_experts_per_tok": 2, "intermediate_size": 48,
}  # fmt: skip
COUNT = 8


def mixtral():
    return tf.MixtralForCausalLM(tf.MixtralConfig(**SMALL, num_local_experts=COUNT))


def qwen3_moe():
    config = tf.Qwen3MoeConfig(**SMALL, num_experts=COUNT, moe_intermediate_size=16)
    return tf.Qwen3MoeForCausalLM(config)


def gpt_oss():
    return tf.GptOssForCausalLM(tf.GptOssConfig(**SMALL, num_local_experts=COUNT, layer_types=["full_attention"] * 3))


def deepseek():
    own = {name: size for name, size in SMALL.items() if name not in ("head_dim", "num_key_value_heads")}
    config = tf.DeepseekV3Config(
        **own, num_key_value_heads=4, n_routed_experts=COUNT, moe_intermediate_size=16, n_group=2, topk_group=2,
        first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    return tf.DeepseekV3ForCausalLM(config)


FAMILIES = [mixtral, qwen3_moe, gpt_oss, deepseek]


def made(make, seed=0):
    torch.manual_seed(seed)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)  # so that routers choose
    return model


def generated(model, tokens=8, rows=1):
    torch.manual_seed(1)
    ids = torch.randint(64, (rows, 5))
    return model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)


def expert_names(model):
    return [name for name, module in model.named_modules() if count_rows(module)]


def apart(model, place, rest=0):
    return {"": rest, **dict.fromkeys(expert_names(model), place)}


def streamer_of(model) -> ExpertStreamer:
    found = {
        hook.streamer for module in model.modules() if isinstance(hook := vars(module).get("_hf_hook"), ExpertsHook)
    }
    return found.pop() if len(found) == 1 else None


def hooks_of(model):
    hooks = [hook for module in model.modules() for hook in hooks_in(module)]
    return [hook for hook in hooks if isinstance(hook, AlignDevicesHook) and hook.streamer is not None]


def spread(model, kind, folder):
    """A copy of a model, its experts resting elsewhere in one of the ways there are."""
    model = copy.deepcopy(model)
    stand_in = {0: "cpu"}
    if "device" in kind:
        model.set_experts_implementation("batched_mm")
    size = sum(
        module.gate_up_proj.nbytes + module.down_proj.nbytes for module in map(model.get_submodule, expert_names(model))
    )
    keeping = {"stand_in": stand_in, "expert_cache": size * 3 // 4, "offload_dir": folder}
    return {
        "RAM": lambda: dispatch_model(model, apart(model, "cpu"), stand_in=stand_in),
        "disk": lambda: dispatch_model(model, apart(model, "disk"), stand_in=stand_in, offload_dir=folder),
        "disk, the CPU works": lambda: dispatch_model(model, apart(model, "disk", "cpu"), offload_dir=folder),
        "blocks in RAM": lambda: cpu_offload(model, 0, stand_in=stand_in),
        "all on disk": lambda: disk_offload(model, folder, "cpu"),
        "RAM, some on the device": lambda: dispatch_model(model, apart(model, "cpu"), **keeping),
        "disk, some on the device": lambda: dispatch_model(model, apart(model, "disk"), **keeping),
    }[kind]()


ON_DEVICE = ["RAM, some on the device", "disk, some on the device"]
KINDS = ["RAM", "disk", "disk, the CPU works", "blocks in RAM", "all on disk", *ON_DEVICE]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", FAMILIES)
def test_tokens_are_those_of_the_resident_model(make, kind, tmp_path):
    model = made(make)
    expected = generated(model)
    found = spread(model, kind, tmp_path)
    assert torch.equal(generated(found), expected)
    streamer = streamer_of(found)
    assert len(streamer.units) == len(expert_names(model)) == (2 if make is deepseek else 3)
    again = generated(remove_hook_from_module(found, recurse=True))
    assert torch.equal(again, expected) and not any(isinstance(p, Away) for p in found.parameters())


def test_a_model_around_that_has_a_weight_of_its_own():
    """Its weight is lent by another streamer than the experts are, which come first among the units."""

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.factor = made(qwen3_moe), nn.Parameter(torch.randn(64))
            self.config = self.inner.config

        def forward(self, ids):
            return self.inner(ids).logits * self.factor

    model, ids = Around().eval(), torch.randint(64, (1, 5))
    found = dispatch_model(copy.deepcopy(model), {"": "cpu"}, 0, stand_in={0: "cpu"})
    with torch.no_grad():
        assert torch.equal(found(ids), model(ids))
    kinds = {type(found.factor.weight.lender), *(type(hook.streamer) for hook in hooks_of(found.inner))}
    assert ExpertStreamer in kinds and type(found.factor.weight.lender) is not ExpertStreamer


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("make", [qwen3_moe, gpt_oss])
def test_what_is_not_chosen_is_not_read(make, implementation, monkeypatch):
    """All in a slot is NaN before the chosen experts come: outputs are those of the resident model, bit by bit."""
    model = made(make)
    model.set_experts_implementation(implementation)
    found = dispatch_model(copy.deepcopy(model), apart(model, "cpu"), stand_in={0: "cpu"})
    streamer = streamer_of(found)
    fill = streamer.lane.fill

    def poisoned(slot, unit):
        if isinstance(unit, Rows):
            slot.base.view(torch.float32).fill_(torch.nan)
        fill(slot, unit)

    monkeypatch.setattr(streamer.lane, "fill", poisoned)
    events = []
    streamer.listeners.append(events.append)
    ids = torch.randint(64, (1, 3))  # 6 choices of 8 experts
    with torch.no_grad():
        assert torch.equal(found(ids).logits, model(ids).logits)
    assert [event.kind for event in events].count("fetch") == 3 and streamer.filled


def test_a_recording_tells_of_blocks_and_of_their_chosen_experts():
    """Blocks and experts have a streamer each: both are heard, in the order of the host, with slots of their own."""
    model = made(qwen3_moe)
    places = {**apart(model, "cpu"), "model.layers.0.self_attn": "cpu", "model.layers.2.self_attn": "cpu"}
    found = dispatch_model(copy.deepcopy(model), places, stand_in={0: "cpu"}, slots=2)
    with torch.no_grad():
        recording = observe(found, lambda: found(torch.tensor([[1]])).logits)
        assert torch.equal(recording.result, model(torch.tensor([[1]])).logits)
    one, attention = streamer_of(found).units[0].nbytes // COUNT, "model.layers.{}.self_attn"
    experts = [f"model.layers.{i}.mlp.experts" for i in range(3)]
    fetched = [(event.unit, event.nbytes) for event in recording.events if event.kind == "fetch"]
    assert [size for name, size in fetched if name in experts] == [2 * one] * 3, "two experts are chosen in each block"
    assert {name for name, _ in fetched} == {*experts, attention.format(0), attention.format(2)}
    works = [event.unit for event in recording.events if event.kind == "work"]
    named = [name for name in works if name in experts or name.endswith("self_attn")]
    assert named == [name for i in range(3) for name in (attention.format(i), experts[i])]
    slots = {name: {e.slot for e in recording.events if e.kind == "fetch" and e.unit in name} for name in
             (tuple(experts), (attention.format(0), attention.format(2)))}  # fmt: skip
    assert recording.streamers == 2 and set.isdisjoint(*slots.values()) and recording.slots == 2
    assert recording.units[attention.format(1)][1:] == (0, 0) and recording.units[experts[1]][1:] == ("cpu", 0)
    with pytest.raises(ValueError, match="2 streamers have slots of their own .*dry_run"):
        recording.schedule(1.0, 1.0, 1.0)
    assert not any(streamer.listeners for streamer in {hook.streamer for hook in hooks_of(found)})


def test_bytes_that_travel_are_those_of_the_chosen(monkeypatch):
    model = made(qwen3_moe)
    found = dispatch_model(copy.deepcopy(model), apart(model, "cpu"), stand_in={0: "cpu"}, slots=3)
    streamer = streamer_of(found)
    moved = []
    fill = streamer.lane.fill

    def counted(slot, unit):
        moves = [*unit.moves()]
        unit.moves = lambda: iter(moves)
        moved.append(sum(part.nbytes for move in moves for part in move.parts))
        assert moved[-1] == unit.nbytes, "what listeners and dry runs are told"
        fill(slot, unit)

    monkeypatch.setattr(streamer.lane, "fill", counted)
    one = streamer.units[0].nbytes // COUNT
    with torch.no_grad():
        found(torch.tensor([[1]]))
        assert moved == [2 * one] * 3
        found(torch.tensor([[1]]))
        assert moved == [2 * one] * 3, "three slots hold the experts of all blocks: the same ones are there"
        found(torch.randint(64, (1, 4)))  # 8 choices are as much as all experts
    assert moved[3:6] == [8 * one] * 3, "a prompt streams whole layers"


@pytest.mark.parametrize("stand_in", [{}, {0: "cpu"}])
def test_what_is_read_is_counted_where_none_is_kept(stand_in, tmp_path):
    model = made(qwen3_moe)
    places = apart(model, "disk", 0 if stand_in else "cpu")
    found = dispatch_model(model, places, stand_in=stand_in, offload_dir=tmp_path, ram_cache=0)
    streamer = streamer_of(found)
    one = sum(part.nbytes for part in streamer.units[0].parts()) // COUNT
    with torch.no_grad():
        found(torch.tensor([[7]]))
    assert (streamer.cache.misses, streamer.cache.bytes_read) == (6, 6 * one)


@pytest.mark.parametrize("stand_in", [{}, {0: "cpu"}])
def test_disk_is_read_once_for_each_expert_that_is_kept(stand_in, tmp_path):
    model = made(qwen3_moe)
    places = apart(model, "disk", 0 if stand_in else "cpu")
    found = dispatch_model(copy.deepcopy(model), places, stand_in=stand_in, offload_dir=tmp_path, ram_cache="1GB")
    streamer = streamer_of(found)
    one = sum(part.nbytes for part in streamer.units[0].parts()) // COUNT
    with torch.no_grad():
        for _ in range(3):
            found(torch.tensor([[7]]))
    cache = streamer.cache
    assert (cache.misses, cache.bytes_read) == (6, 6 * one)
    assert cache.held == 6 * one
    if not stand_in:  # where slots are copied to, they hold the experts that were used last as well
        assert cache.hits == 12


def test_experts_used_longest_ago_go_first(tmp_path):
    model = made(qwen3_moe)
    one = 3 * 32 * 16 * 4
    found = dispatch_model(
        copy.deepcopy(model), apart(model, "disk", "cpu"), offload_dir=tmp_path, ram_cache=5 * one, slots=1
    )
    cache = streamer_of(found).cache
    with torch.no_grad():
        for token in range(20):
            expected = model(torch.tensor([[token]])).logits
            assert torch.equal(found(torch.tensor([[token]])).logits, expected)
            assert cache.held <= 5 * one and cache.held == sum(cache.kept.values())
    assert cache.hits + cache.misses == 20 * 6 and cache.hits < cache.misses
    last = [*cache.kept][-2:]
    assert {index for index, _ in last} == {2}, "the last block's experts were used last"
    big = dispatch_model(copy.deepcopy(model), apart(model, "disk", "cpu"), offload_dir=tmp_path, ram_cache=0)
    with torch.no_grad():
        assert torch.equal(big(torch.arange(9)[None]).logits, model(torch.arange(9)[None]).logits)
    assert streamer_of(big).cache.held == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/pagemap"), reason="only Linux says which pages are there")
def test_memory_for_experts_that_nobody_chose_is_not_touched(tmp_path):
    """Of the memory that is set aside for a block's experts only the pages of the chosen ones are there."""
    config = tf.Qwen3MoeConfig(**{**SMALL, "num_hidden_layers": 1}, num_experts=64, moe_intermediate_size=512)
    model = made(lambda: tf.Qwen3MoeForCausalLM(config))
    found = dispatch_model(model, apart(model, "disk", "cpu"), offload_dir=tmp_path, ram_cache="1GB")
    with torch.no_grad():
        found(torch.tensor([[7]]))
    streamer = streamer_of(found)
    (unit,) = streamer.units
    memory = streamer.cache.memory(unit)
    address, nbytes = memory.bytes.data_ptr(), memory.bytes.nbytes
    with open("/proc/self/pagemap", "rb") as pages:  # 8 bytes a page, of which the highest bit says that it is there
        pages.seek(address // mmap.PAGESIZE * 8)
        resident = sum(byte >> 7 for byte in pages.read(-(-nbytes // mmap.PAGESIZE) * 8)[7::8]) * mmap.PAGESIZE
    assert 2 * unit.nbytes // 64 <= resident <= 2 * unit.nbytes // 64 + 10 * 4096 < nbytes / 8


def test_moves_are_the_chosen_rows_and_nothing_between():
    model = made(gpt_oss)
    unit = streamer_of(dispatch_model(model, apart(model, "cpu"), stand_in={0: "cpu"})).units[0]
    for rows, pieces in (([0, 1, 2], 4), ([1, 3, 4, 7], 12), ([6], 4)):
        parts = [*rows_of(unit, rows)]
        moves = [*Rows(unit, parts, unit_bytes(unit) * len(rows)).moves()]
        assert len(moves) == pieces, "a piece for each parameter and stretch of neighbours"
        assert sum(move.nbytes for move in moves) == sum(part.nbytes for part in parts) == unit_bytes(unit) * len(rows)
        slot = torch.zeros(unit.nbytes, dtype=torch.uint8)
        for move in moves:
            slot[move.offset : move.offset + move.nbytes] = move.slab.bytes[move.at : move.at + move.nbytes]
        for weight in unit.weights:
            there = weight.over(slot)
            assert torch.equal(there[rows], weight.load()[rows])
            assert not there[[row for row in range(COUNT) if row not in rows]].any()


def unit_bytes(unit):
    return sum(part.nbytes for part in unit.parts()) // COUNT


def test_threshold_follows_from_the_choice():
    model = made(qwen3_moe)
    found = dispatch_model(model, apart(model, "cpu"), stand_in={0: "cpu"})
    streamer, module = streamer_of(found), model.model.layers[0].mlp.experts
    unit = streamer.units[0]

    def rows(choice):
        return chosen_rows(streamer, unit, choice_of([torch.zeros(1, 32), torch.tensor(choice), torch.ones(1, 2)]))

    assert rows([[3, 1], [1, 3], [1, 0]]) == [0, 1, 3]
    assert rows([[3, 1]] * 4) is None, "8 choices of 8 experts"
    assert rows([[3, 8]]) is None and rows([[-1, 2]]) is None, "not numbers of experts: the forward says what it does"
    assert choice_of([torch.zeros(1, 32)]) is None and chosen_rows(streamer, unit, None) is None
    module.config._experts_implementation, lent = "sonicmoe", []  # may read any expert
    lend_rows = streamer.lend_rows
    streamer.lend_rows = lambda unit, rows: lent.append(rows) or lend_rows(unit, rows)
    hook = module._hf_hook
    hook._lend(module, (torch.zeros(1, 32), torch.tensor([[3, 1]]), torch.ones(1, 2)), {})
    streamer.take_back(unit)
    assert lent == [None]


# ---------------------------------------------------------------------------------------------------------------------
# The files of a checkpoint, in which each expert may lie alone


def loaded(model, folder, places, **options):
    with init_empty_weights():
        empty = type(model)(copy.deepcopy(model.config)).eval()
    return load_checkpoint_and_dispatch(empty, folder, places, strict=True, **options)


@pytest.mark.parametrize("stand_in", [{}, {0: "cpu"}])
@pytest.mark.parametrize("make", FAMILIES)
def test_experts_rest_in_the_files_they_came_in(make, stand_in, tmp_path):
    """No folder to write to is given, nor needed."""
    model = made(make)
    expected = generated(model)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    files = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    for more in ({}, {"ram_cache": 0}):
        found = loaded(model, tmp_path, apart(model, "disk", 0 if stand_in else "cpu"), stand_in=stand_in, **more)
        assert torch.equal(generated(found), expected)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == files
    with pytest.raises(ValueError, match='must be written as bfloat16: give an offload_folder, or dtype="float32"'):
        loaded(model, tmp_path, apart(model, "disk", "cpu"), dtype="bfloat16")
    again = dispatch_model(found, apart(model, "disk", "cpu"))  # where they rest is known from the model
    assert torch.equal(generated(again), expected)
    save_model(again, tmp_path / "saved")
    model.config.save_pretrained(tmp_path / "saved")
    assert torch.equal(generated(type(model).from_pretrained(tmp_path / "saved")), expected)


def test_a_plan_is_made_and_applied(tmp_path):
    """From a checkpoint to tokens: the plan's experts rest on the GPU, in RAM and on disk, and its slots are taken."""
    config = tf.MixtralConfig(**{**SMALL, "num_hidden_layers": 5}, num_local_experts=COUNT)
    model = made(lambda: tf.MixtralForCausalLM(config))
    expected = generated(model)
    model.save_pretrained(tmp_path)
    spec = spec_from_module(model)
    experts = experts_of(spec)[0].bytes()
    dense = spec.bytes() - 5 * experts
    memory = {0: dense + 3 * experts, "cpu": experts, "disk": "1GB"}  # two for what is in flight
    found = plan(spec, memory)
    places = [found.device_map.get(name, 0) for name in expert_names(model)]
    assert (places.count(0), places.count("cpu"), places.count("disk")) == (1, 1, 3)
    spread = loaded(model, tmp_path, "auto", max_memory=memory, stand_in={0: "cpu"})
    assert spread.hf_device_map == found.device_map
    assert torch.equal(generated(spread), expected)
    streamer = streamer_of(spread)
    assert streamer.count == found.slots == 2
    assert [unit.rests_in() for unit in streamer.units] == [place for place in places if place]


def test_what_lies_together_is_read_at_once(tmp_path, monkeypatch):
    """In a file of its own names an expert is one range: gate, up and down come in one call, and nothing else."""
    model = made(mixtral)
    state = {}
    for name, tensor in model.state_dict().items():
        block, _, own = name.partition(".mlp.experts.")
        for number in range(COUNT if own else 0):
            expert = f"{block}.block_sparse_moe.experts.{number}"
            if own == "down_proj":
                state[f"{expert}.w2.weight"] = tensor[number].clone()
            else:
                state[f"{expert}.w1.weight"], state[f"{expert}.w3.weight"] = (
                    part.clone() for part in tensor[number].chunk(2)
                )
        if not own:
            state[name.replace(".mlp.gate", ".block_sparse_moe.gate")] = tensor
    save_file(state, tmp_path / "model.safetensors")
    found = loaded(model, tmp_path, apart(model, "disk", "cpu"))
    calls, preadv = [], os.preadv

    def counted(descriptor, views, offset):
        calls.append((offset, sum(map(len, views)), len(views)))
        return preadv(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", counted)
    with torch.no_grad():
        assert torch.equal(found(torch.tensor([[7]])).logits, model(torch.tensor([[7]])).logits)
    one = 3 * 32 * 48 * 4
    assert len(calls) == 2 * 3 and {call[1:] for call in calls} == {(one, 3)}
    assert streamer_of(found).cache.bytes_read == 6 * one


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.w2(torch.relu(self.w1(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.experts = nn.ModuleList(Expert() for _ in range(4))

    def forward(self, x):
        weights, chosen = self.gate(x).topk(2)
        out = torch.zeros_like(x)
        for number in chosen.unique().tolist():
            row, place = torch.where(chosen == number)
            out[row] += weights[row, place, None] * self.experts[number](x[row])
        return x + out


class Remote(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = tf.MixtralConfig(**SMALL, num_local_experts=4)
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return x


@pytest.mark.parametrize("place", ["cpu", "disk", "blocks"])
def test_experts_that_are_modules(place, tmp_path):
    """Each is a unit of its own, and only those that are called travel."""
    torch.manual_seed(0)
    model, x = Remote().eval(), torch.randn(1, 16)
    with torch.no_grad():
        expected = model(x)
    places = {"": 0, **{f"layers.{i}.experts": place for i in range(3)}} if place != "blocks" else {"": "cpu"}
    found = dispatch_model(model, places, 0, stand_in={0: "cpu"}, offload_dir=tmp_path)
    hooks = [part._hf_hook for block in found.layers for part in block.experts]
    assert all(type(hook) is AlignDevicesHook and hook.unit.routed for hook in hooks)
    (streamer,) = {hook.streamer for hook in hooks}
    fetched = []
    streamer.listeners.append(lambda event: fetched.append(event.unit) if event.kind == "fetch" else None)
    with torch.no_grad():
        assert torch.equal(found(x), expected)
    assert len(fetched) == 6 and len(streamer.units) == 12


def test_a_block_works_in_one_place():
    """Experts that rest in RAM work where their block does, not on the first GPU."""
    model = made(qwen3_moe)
    expected = generated(model)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1,
              "model.layers.2": 1, "model.norm": 1, "lm_head": 1,
              **dict.fromkeys(expert_names(model), "cpu")}  # fmt: skip
    stand_in = {0: "cpu", 1: "cpu"}
    found = dispatch_model(model, places, stand_in=stand_in)
    streamers = [block.mlp.experts._hf_hook.streamer for block in found.model.layers]
    assert [streamer.name for streamer in streamers] == ["cuda:0", "cuda:1", "cuda:1"]
    assert streamers[1] is streamers[2] is not streamers[0]
    assert torch.equal(generated(found), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Nothing silently wrong


@pytest.mark.parametrize("kind", KINDS)
def test_errors_and_interrupts_give_everything_back(kind, tmp_path, monkeypatch):
    model = made(qwen3_moe)
    expected = generated(model)
    found = spread(model, kind, tmp_path)
    target = found.model.layers[1].mlp.experts
    for error in (RuntimeError("broken"), KeyboardInterrupt()):

        def broken(*args, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(target, "_apply_gate", broken)
            with pytest.raises(type(error)):
                generated(found)
        assert all(isinstance(parameter, Away) for parameter in target.parameters())
        assert not streamer_of(found).held()
        assert torch.equal(generated(found), expected)


def test_a_file_that_was_changed_is_an_error(tmp_path):
    model = made(qwen3_moe)
    expected = generated(model)
    found = dispatch_model(copy.deepcopy(model), apart(model, "disk", "cpu"), offload_dir=tmp_path, ram_cache=0)
    assert torch.equal(generated(found), expected)
    for file in tmp_path.glob("*.safetensors"):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match="was changed"):
        generated(found)


@pytest.mark.parametrize("kind", ["RAM", "disk, the CPU works", *ON_DEVICE])
def test_training_is_refused(kind, tmp_path):
    found = spread(made(qwen3_moe), kind, tmp_path)
    loss = found(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss
    with pytest.raises(RuntimeError, match="offloaded weights are for inference"):
        loss.backward()
    with torch.no_grad():
        assert found(torch.tensor([[1]])).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["RAM", "disk", "disk, the CPU works"])
def test_what_is_written_into_experts_is_kept(kind, tmp_path):
    """Outside of a forward by the handle, and within one by the forward, whatever else the slot held."""
    model = made(qwen3_moe)
    found = spread(model, kind, tmp_path)
    for target in (model, found):
        with torch.no_grad():
            target.model.layers[1].mlp.experts.down_proj.mul_(2)
    assert torch.equal(generated(found), generated(model))
    before = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    chosen = []

    def write(module, args):
        with torch.no_grad():
            chosen[:] = args[1].flatten().tolist()
            module.down_proj[chosen] += 1

    experts = found.model.layers[0].mlp.experts
    handle = experts.act_fn.register_forward_pre_hook(lambda act, args: write(experts, (None, current[0])))
    current = []
    looking = experts.register_forward_pre_hook(lambda module, args: current.insert(0, args[1]))
    with torch.no_grad():
        found(torch.tensor([[5]]))
    handle.remove()
    looking.remove()
    before[chosen] += 1
    assert torch.equal(found.model.layers[0].mlp.experts.down_proj.cpu().detach() + 0, before)


@pytest.mark.parametrize("kind", ["RAM", "disk, the CPU works", *ON_DEVICE])
def test_a_view_that_is_kept_stays_as_it_is(kind, tmp_path):
    model = made(qwen3_moe)
    found = spread(model, kind, tmp_path)
    experts, kept = found.model.layers[0].mlp.experts, []
    handle = experts.act_fn.register_forward_hook(lambda *_: kept.append(experts.down_proj[:]) if not kept else None)
    with torch.no_grad():
        found(torch.tensor([[5]]))
        handle.remove()
        before = kept[0].clone()
        expected = generated(model)
        assert torch.equal(generated(found), expected)
    assert torch.equal(kept[0].nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_tied_experts_rest_once(place, tmp_path):
    """Blocks that share their experts: both lend the same ones, also after they were written to."""
    model = made(qwen3_moe)
    first, second = (model.model.layers[i].mlp.experts for i in (0, 1))
    second.gate_up_proj, second.down_proj = first.gate_up_proj, first.down_proj
    expected = generated(model)
    whole = copy.deepcopy(model)
    found = dispatch_model(model, apart(model, place, "cpu" if place == "disk" else 0), stand_in={0: "cpu"},
                           offload_dir=tmp_path, main_device=None if place == "cpu" else "cpu")  # fmt: skip
    assert torch.equal(generated(found), expected)
    with torch.no_grad():
        first.down_proj.mul_(3)
        whole.model.layers[0].mlp.experts.down_proj.mul_(3)
    assert torch.equal(second.down_proj.cpu() + 0, first.down_proj.cpu() + 0)
    assert torch.equal(generated(found), generated(whole)), "the cache has forgotten both blocks' experts"


@pytest.mark.filterwarnings("ignore")  # peft and transformers disagree on names
def test_lora_on_experts():
    peft = pytest.importorskip("peft")
    model = made(qwen3_moe)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=names, init_lora_weights=False)
    torch.manual_seed(3)
    whole = peft.get_peft_model(copy.deepcopy(model), config).eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = whole(ids).logits
        assert not torch.equal(expected, model(ids).logits)
        torch.manual_seed(3)
        found = peft.get_peft_model(dispatch_model(model, apart(model, "cpu"), stand_in={0: "cpu"}), config).eval()
        assert torch.equal(found(ids).logits, expected) and torch.equal(found(ids).logits, expected)
        with found.disable_adapter():
            assert not torch.equal(found(ids).logits, expected)


def test_dispatched_anew_and_forgotten(tmp_path):
    model = made(qwen3_moe)
    expected = generated(model)
    for place in ("cpu", "disk", 0, "cpu"):
        model = dispatch_model(model, apart(model, place), stand_in={0: "cpu"}, offload_dir=tmp_path, force_hooks=True)
        assert torch.equal(generated(model), expected)
    del model
    gc.collect()
    assert not [*tmp_path.iterdir()], "files that were written for a model go with it"


# ---------------------------------------------------------------------------------------------------------------------
# Pinned RAM lent as it is, tried with the CPU in the GPU's place: the view is the slab, and nothing is copied


@pytest.fixture
def pretend(monkeypatch):
    """A stand-in passes for a GPU where the streamer is chosen, and its slabs for pinned ones."""
    monkeypatch.setattr(lenders, "ExpertStreamer", gather.GatherStreamer)
    monkeypatch.setattr(gather, "seen_by_gpu", lambda slab, device: slab.bytes[:])


def unit_bytes_of(model):
    return sum(p.nbytes for p in model.get_submodule(expert_names(model)[0]).parameters()) // COUNT


def spread_pinned(model, pinned=True, **options):
    found = dispatch_model(copy.deepcopy(model), apart(model, "cpu"), stand_in={0: "cpu"}, **options)
    streamer = streamer_of(found)
    assert type(streamer) is gather.GatherStreamer
    for unit in streamer.units:
        for part in unit.parts():
            part.slab.pinned = pinned
            part.slab._release = lambda: None
    moved, fill = [], streamer.lane.fill
    streamer.lane.fill = lambda slot, unit: (moved.append(unit.nbytes), fill(slot, unit))
    return found, streamer, moved


@pytest.mark.parametrize("make", [qwen3_moe, gpt_oss])
def test_one_token_is_gathered_and_a_prompt_streamed(make, pretend):
    model = made(make)
    model.set_experts_implementation("batched_mm")
    found, streamer, moved = spread_pinned(model)
    whole = streamer.units[0].nbytes
    with torch.no_grad():
        for ids in ([[1]], [[2]], [[1, 2, 3, 4, 5, 6]], [[7]], [[1, 2]]):
            ids = torch.tensor(ids)
            assert torch.equal(found(ids).logits, model(ids).logits)
            tokens = ids.numel()
            assert (moved == []) == (tokens == 1) and all(n == whole for n in moved) == (tokens != 2)
            assert not any(slot.unit is not None for slot in streamer.windows.values())
            moved.clear()
    assert len(streamer.windows) == 3 and all(
        isinstance(p, Away) for p in found.model.layers[0].mlp.experts.parameters()
    )


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_others_are_copied(implementation, pretend):
    model = made(qwen3_moe)
    model.set_experts_implementation(implementation)
    found, streamer, moved = spread_pinned(model)
    with torch.no_grad():
        assert torch.equal(found(torch.tensor([[3]])).logits, model(torch.tensor([[3]])).logits)
    assert len(moved) == 3 and not streamer.windows
    unpinned, streamer, moved = spread_pinned(model, pinned=False)
    model.set_experts_implementation("batched_mm")
    unpinned.set_experts_implementation("batched_mm")
    with torch.no_grad():
        assert torch.equal(unpinned(torch.tensor([[3]])).logits, model(torch.tensor([[3]])).logits)
    assert moved == [2 * streamer.units[0].nbytes // COUNT] * 3


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("seed", range(6))
def test_no_copy_overtakes_whatever_the_streams_do(seed, rows, pretend, monkeypatch):
    """Several tokens: the first stack is multiplied with while the second is on its way, and is waited for."""
    model = made(qwen3_moe, seed)
    model.set_experts_implementation("batched_mm")
    found, streamer, moved = spread_pinned(model, expert_cache=rows * 3 * unit_bytes_of(model))
    draws = [
        torch.randint(64, (1, tokens), generator=torch.Generator().manual_seed(tokens)) for tokens in (2, 3, 2, 9, 1, 2)
    ]
    with torch.no_grad():
        expected = [model(ids).logits for ids in draws]
    world = World(monkeypatch)
    streamer.lane = CudaLane(torch.device("cpu"))
    own = [*draws, *model.buffers(), *(p for p in found.parameters() if not isinstance(p, Away)), *found.buffers()]
    own += [part.slab.bytes for unit in streamer.units for part in unit.parts()]
    world.inputs = {tensor.untyped_storage()._cdata for tensor in own}
    filled, fill = [], streamer.lane.fill
    streamer.lane.fill = lambda slot, unit: (filled.append(unit.nbytes / streamer.units[0].nbytes), fill(slot, unit))
    with world, torch.no_grad():
        got = [found(ids).logits for ids in draws]
    assert {whole for whole in filled if whole < 1}, "some experts are copied, a stack at a time"
    with torch.no_grad():
        world.run(random.Random(seed).choice)
    assert all(map(torch.equal, got, expected))


def test_experts_that_call_themselves_wait_for_what_the_inner_call_chose(pretend):
    model = made(qwen3_moe)
    model.set_experts_implementation("grouped_mm")
    found, streamer, _ = spread_pinned(model)
    x, weights, choices = (
        torch.randn(2, 32),
        torch.ones(2, 2),
        [torch.tensor([[0, 1], [1, 2]]), torch.tensor([[5, 6], [7, 6]])],
    )
    inner, told, fill = [], [], streamer.lane.fill
    streamer.lane.fill = lambda slot, unit: (told.append("fill"), fill(slot, unit))
    streamer.lane.arrive = lambda slot: told.append("arrive")

    def call(model):
        experts = model.model.layers[0].mlp.experts

        def again(*_):
            handle.remove()
            told.append("inner")
            inner.append(experts(x, choices[1], weights))

        handle = experts.act_fn.register_forward_hook(again)
        return experts(x, choices[0], weights)

    with torch.no_grad():
        assert torch.equal(call(found), call(model)) and torch.equal(*inner)
    began = told.index("inner")
    assert told[began : began + 3] == ["inner", "fill", "arrive"]


def test_writes_views_and_errors(pretend):
    model = made(qwen3_moe)
    model.set_experts_implementation("batched_mm")
    found, streamer, _ = spread_pinned(model)
    token, own = torch.tensor([[3]]), found.model.layers[1].mlp.experts
    with torch.no_grad():
        found(token)
        for target in (model, found):
            target.model.layers[1].mlp.experts.down_proj.mul_(2)
        assert torch.equal(found(token).logits, model(token).logits)
        kept = []
        handle = own.act_fn.register_forward_hook(lambda *_: kept.append(own.down_proj[0]))
        found(token)
        handle.remove()
        before = kept[0].clone()
        assert 1 not in streamer.windows and torch.equal(found(token).logits, model(token).logits)
        assert torch.equal(kept[0], before)
        handle = own.act_fn.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            found(token)
        handle.remove()
        assert not streamer.held() and all(isinstance(parameter, Away) for parameter in own.parameters())
        assert torch.equal(found(token).logits, model(token).logits)
    with pytest.raises(RuntimeError, match="offloaded weights are for inference"):
        found(token).logits.sum().backward()


# ---------------------------------------------------------------------------------------------------------------------
# Experts that stay on the device


def test_rows_are_those_of_the_experts_chosen_last():
    """By hand: three rows for eight experts."""
    rows = DeviceRows(streamer_of(spread(made(qwen3_moe), "RAM", None)).units[0], 3)
    found = []
    for chosen in ([1, 2], [2, 5], [1, 7], [5, 7], [0, 3, 4]):
        missing = rows.take(chosen)
        found.append((missing, dict(rows.row_of)))
    assert found == [
        ([1, 2], {1: 0, 2: 1}),
        ([5], {1: 0, 2: 1, 5: 2}),
        ([7], {5: 2, 1: 0, 7: 1}),
        ([], {1: 0, 5: 2, 7: 1}),
        ([0, 3, 4], {0: 0, 3: 2, 4: 1}),
    ]
    assert rows.renumbered(torch.tensor([[4, 0], [3, 0]])).tolist() == [[1, 0], [2, 0]]


@cache
def some_unit():
    return streamer_of(spread(made(qwen3_moe), "RAM", None)).units[0]


@given(st.lists(st.sets(st.integers(0, 7), min_size=1, max_size=3), max_size=12), st.integers(3, 8))
def test_no_expert_takes_the_row_of_another_that_is_needed(choices, count):
    rows = DeviceRows(some_unit(), count)
    for chosen in choices:
        kept = dict(rows.row_of)
        missing = rows.take(sorted(chosen))
        assert missing == sorted(chosen - kept.keys())
        assert chosen <= rows.row_of.keys() and len(set(rows.row_of.values())) == len(rows.row_of) <= count
        assert all(rows.row_of[expert] == row for expert, row in kept.items() if expert in rows.row_of)


@pytest.mark.parametrize("kind", ON_DEVICE)
@pytest.mark.parametrize("make", FAMILIES)
def test_what_is_on_the_device_does_not_travel(make, kind, tmp_path, monkeypatch):
    """Bytes are those of the experts that were not there; a prompt leaves the rows as they are."""
    found = spread(made(make), kind, tmp_path)
    streamer, copied = streamer_of(found), []
    fill = streamer.lane.fill
    monkeypatch.setattr(streamer.lane, "fill", lambda slot, unit: copied.append(unit.nbytes) or fill(slot, unit))
    with torch.no_grad():
        found(torch.tensor([[5]]))
        first, before = streamer.misses, {i: dict(rows.row_of) for i, rows in streamer.on_device.items()}
        unit = streamer.units[0]
        assert sum(copied) == first * unit.nbytes // COUNT and streamer.hits == 0
        found(torch.arange(40)[None])
        assert {i: dict(rows.row_of) for i, rows in streamer.on_device.items()} == before
        assert (streamer.hits, streamer.misses) == (0, first)
        copied.clear()
        found(torch.tensor([[5]]))
    assert copied == [] and streamer.hits == first
    assert expert_hits(found) == (first, first)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_refused_leaves_nothing_behind(kind, tmp_path):
    """How a block was about to be lent when its forward was refused is not how the next one is."""
    parts = spread(made(qwen3_moe), kind, tmp_path)
    with torch.no_grad():
        prompt = torch.arange(24)[None]
        expected = parts(prompt).logits
        with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="cannot be traced"):
            patch.setattr("bigkit.offload.stream.is_traced", lambda: True)
            parts(prompt[:, :1])
        assert torch.equal(parts(prompt).logits, expected)


@pytest.mark.parametrize("kind", ON_DEVICE)
def test_what_is_written_into_rows_is_kept(kind, tmp_path):
    model = made(qwen3_moe)
    found = spread(model, kind, tmp_path)
    name = "model.layers.0.mlp.experts"
    experts, before = found.get_submodule(name), model.get_submodule(name).down_proj.detach().clone()
    rows = []

    def write(*args):
        rows[:] = streamer_of(found).on_device[0].row_of
        experts.down_proj.data.add_(1)

    handle = experts.act_fn.register_forward_pre_hook(write)
    with torch.no_grad():
        found(torch.tensor([[5]]))
    handle.remove()
    before[rows] += 1
    assert torch.equal(experts.down_proj.cpu().detach() + 0, before)
    with torch.no_grad():
        model.get_submodule(name).down_proj.copy_(before)
    assert torch.equal(generated(found), generated(model)), "the rows are brought anew"


def test_what_does_not_fit_on_the_device_is_said_before_anything_changes():
    model = made(qwen3_moe)
    names = expert_names(model)
    for places, size, message in [
        (apart(model, "cpu"), 100, "less than the experts that one token takes .2 of each of 3 blocks"),
        ({"": 0, "lm_head": "cpu"}, "1MB", "no experts of a mixture rest away from a GPU"),
    ]:
        with pytest.raises(ValueError, match=message):
            dispatch_model(model, places, stand_in={0: "cpu"}, expert_cache=size)
        assert not any(isinstance(parameter, Away) for parameter in model.parameters())
    found = dispatch_model(model, apart(model, "cpu"), stand_in={0: "cpu"}, expert_cache="1GB")
    assert streamer_of(found).rows == [COUNT] * len(names), "no more rows than experts"


def test_bad_input_gets_one_sentence(monkeypatch):
    """Experts that a map names and a model has not, a cache larger than the GPU, more experts for a token than there
    are, a routing of another model.
    """
    dense = tf.LlamaForCausalLM(tf.LlamaConfig(**{**SMALL, "num_experts_per_tok": None}))
    said = "the device map names 'model.layers.1.mlp.experts', but LlamaForCausalLM has no such module"
    with pytest.warns(UserWarning, match=said):
        dispatch_model(dense, {"": 0, "model.layers.1.mlp.experts": "cpu"}, stand_in={0: "cpu"})
    model = made(qwen3_moe)
    monkeypatch.setattr(on_device, "is_real_cuda", lambda device: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000, 10_000))
    with pytest.raises(ValueError, match=r"expert_cache takes 144\.00 KiB of GPU 0, of which 9\.77 KiB are free"):
        dispatch_model(copy.deepcopy(model), apart(model, "cpu"), stand_in={0: "cpu"}, expert_cache="1GB")
    monkeypatch.undo()
    assert not any(isinstance(parameter, Away) for parameter in model.parameters())
    model.config.num_experts_per_tok = COUNT + 1
    with pytest.raises(ValueError, match="says that a token takes 9 experts, but its blocks have 8 each"):
        plan(spec_from_module(model), {0: "90KB", "cpu": "1GB"})
    routing = Routing("pymoe", 16, (((0, 1),),))
    with pytest.raises(
        ValueError, match=r"recorded from pymoe \(1 layer, 2 of 16 experts\), and mixtral-8x7b has 32 l"
    ):
        routing.bytes_each(describe("mixtral-8x7b"))
