"""Blocks whose experts are too many for a slot: a few are on the device at a time, and nothing else changes."""

import copy

import pytest
import torch
import transformers as tf

from bigkit import dispatch_model, dry_run, init_empty_weights, load_checkpoint_and_dispatch, remove_hook_from_module
from bigkit.checkpoints import decoded
from bigkit.measure.routing import record_routing
from bigkit.offload import experts as experts_module
from bigkit.offload import pieces
from bigkit.offload.handle import Away
from bigkit.offload.observe import observe
from tests.checkpoints.test_as_stored import PROMPT, empty, write
from tests.offload.test_experts import (
    COUNT,
    FAMILIES,
    SMALL,
    apart,
    expert_names,
    generated,
    made,
    mixtral,
    qwen3_moe,
    streamer_of,
)


@pytest.fixture
def large(monkeypatch):
    """Every block counts as large; the slot holds three experts, and one passes at a time."""

    def of(model, some=3):
        module = model.get_submodule(expert_names(model)[0])
        each = sum(tensor.nbytes for tensor in module.parameters()) // COUNT
        monkeypatch.setattr(experts_module, "WHOLE", 0)
        monkeypatch.setattr(experts_module, "SOME", some * each)
        monkeypatch.setattr(pieces, "PIECE", each // 2)
        monkeypatch.setattr(decoded, "AT_A_TIME", 1)
        return each

    return of


def memory(streamer):
    """Bytes of all slots of a streamer."""
    own = [*streamer.slots, *streamer.pieces.slots, streamer.pieces.small]
    return sum(slot.base.nbytes for slot in {id(slot): slot for slot in own if slot is not None}.values())


@pytest.mark.parametrize("implementation", ["default", "eager", "batched_mm"])
@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("make", FAMILIES)
def test_tokens_are_those_of_the_resident_model(make, place, implementation, tmp_path, large):
    model = made(make)
    if implementation != "default":
        model.set_experts_implementation(implementation)
    each = large(model)
    expected = [generated(model), generated(model, rows=3)]
    found = dispatch_model(copy.deepcopy(model), apart(model, place), stand_in={0: "cpu"}, offload_dir=tmp_path)
    for _ in range(2):
        assert torch.equal(generated(found), expected[0])
        assert torch.equal(generated(found, rows=3), expected[1])
    streamer = streamer_of(found)
    # the slot for a few, and those for pieces (of gpt-oss also for biases): with two for all it were 16 experts
    assert memory(streamer) <= 3 * each + 3 * 512 * 8 + pieces.PIECES * max(each, 512 * 4) + each
    assert not streamer.held() and not any(slot.lent for slot in streamer.slots)
    again = generated(remove_hook_from_module(found, recurse=True))
    assert torch.equal(again, expected[0]) and not any(isinstance(p, Away) for p in found.parameters())


def test_only_what_is_chosen_travels(large):
    """Of a token two experts of a block, all in one; of a prompt those that some token chose, each stack in turn."""
    model = made(qwen3_moe)
    each = large(model)
    found = dispatch_model(copy.deepcopy(model), apart(model, "cpu"), stand_in={0: "cpu"})
    for implementation in ("batched_mm", "grouped_mm"):
        found.set_experts_implementation(implementation)
        with torch.no_grad():
            recording = observe(found, lambda: found(torch.tensor([[1]])).logits)
        moved = [event.nbytes for event in recording.events if event.kind == "fetch"]
        assert sum(moved) == 3 * 2 * each, implementation
        assert len(moved) == (3 if implementation == "batched_mm" else 3 * 2 * 2)
    ids = torch.randint(64, (1, 40))
    with torch.no_grad():
        recording = observe(found, lambda: found(ids).logits)
        routing = record_routing(model, lambda: model(ids))
    moved = [event.nbytes for event in recording.events if event.kind == "fetch"]
    chosen = sum(count > 0 for layer in routing.counts for count in layer)
    assert sum(moved) == chosen * each and max(moved) < each and chosen > COUNT


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_experts_that_are_stored_in_few_bits(place, implementation, tmp_path, monkeypatch):
    plain = write(tmp_path, "mxfp4")
    monkeypatch.setattr(experts_module, "WHOLE", 0)
    monkeypatch.setattr(experts_module, "SOME", 0)
    places = {"": 0, **{f"model.layers.{i}.mlp.experts": place for i in range(2)}}
    model = load_checkpoint_and_dispatch(empty(plain), tmp_path, places, strict=True, stand_in={0: "cpu"})
    plain.set_experts_implementation(implementation)
    model.set_experts_implementation(implementation)
    expected = plain.generate(PROMPT, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=8, do_sample=False), expected)
    streamer = model.model.layers[0].mlp.experts._hf_hook.streamer
    assert streamer.pieces.slots and streamer.room(streamer.units[0]) == 2
    assert (streamer.some is not None) == (implementation == "batched_mm")


def test_an_error_in_the_middle_gives_everything_back(large):
    model = made(mixtral)
    large(model)
    expected = generated(model)
    found = dispatch_model(copy.deepcopy(model), apart(model, "cpu"), stand_in={0: "cpu"})
    streamer = streamer_of(found)
    fill, count = streamer.lane.fill, 0

    def fails(slot, unit):
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        fill(slot, unit)

    streamer.lane.fill = fails
    with pytest.raises(KeyboardInterrupt):
        generated(found)
    assert not streamer.held() and all(isinstance(p, Away) for p in found.model.layers[0].mlp.experts.parameters())
    streamer.lane.fill = fill
    assert torch.equal(generated(found), expected)


def test_what_a_forward_must_not_do_is_refused(large):
    model = made(qwen3_moe)
    large(model)
    found = dispatch_model(copy.deepcopy(model), apart(model, "cpu"), stand_in={0: "cpu"})
    experts = found.get_submodule(expert_names(found)[0])
    ids = torch.randint(64, (1, 12))
    handle = experts.act_fn.register_forward_pre_hook(lambda module, args: experts.down_proj.data.add_(1))
    with torch.no_grad(), pytest.raises(RuntimeError, match="writes to stacked experts .*change them between forwards"):
        found(ids)
    handle.remove()
    with torch.no_grad():
        assert torch.equal(found(ids).logits, model(ids).logits)
        experts.down_proj.add_(1)
        model.get_submodule(expert_names(model)[0]).down_proj.add_(1)
        assert torch.equal(found(ids).logits, model(ids).logits)
    with pytest.raises(RuntimeError, match="offloaded weights are for inference"):
        found(ids).logits.sum().backward()
    with torch.no_grad():
        assert torch.equal(found(ids).logits, model(ids).logits)


def test_someone_reads_a_whole_stack_in_a_forward(large):
    model = made(qwen3_moe)
    large(model)
    found = dispatch_model(copy.deepcopy(model), apart(model, "cpu"), stand_in={0: "cpu"})
    name = expert_names(found)[1]
    experts, seen = found.get_submodule(name), []
    experts.act_fn.register_forward_pre_hook(lambda module, args: seen.append(experts.down_proj.sum(0)))
    with torch.no_grad():
        found(torch.randint(64, (1, 12)))
    assert torch.equal(seen[0], model.get_submodule(name).down_proj.sum(0))


def test_a_dry_run_counts_what_travels(monkeypatch):
    """The bytes of a real run: chosen experts of a token, all of a prompt, and slots that hold a few."""
    from bigkit.machine.roofline import FILL

    monkeypatch.setattr(experts_module, "WHOLE", 0)
    monkeypatch.setattr(experts_module, "SOME", 0)
    config = tf.Qwen3MoeConfig(**{**SMALL, "num_hidden_layers": 3}, num_experts=16, moe_intermediate_size=16)
    with init_empty_weights():
        model = tf.Qwen3MoeForCausalLM(config)
    experts = {f"model.layers.{i}.mlp.experts": "cpu" for i in range(3)}
    run = dry_run(model, {"": 0, **experts}, 1, 32, 2, "H200", dtype="float32", replay=False)
    each, start, moved = 3 * 32 * 16 * 4, 0, []
    for _, end in run.steps:
        moved.append(sum(op.bytes for op in run.operations[start:end] if op.name == FILL))
        start = end
    assert moved == [3 * 16 * each, 3 * 2 * each, 3 * 2 * each]
