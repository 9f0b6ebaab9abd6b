"""The account that a GPU keeps of its experts, by Triton's interpreter: what `DeviceRows` keeps, and the same bytes."""

import copy
import os
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers as tf

from bigkit import BnbQuantizationConfig, dispatch_model, load_and_quantize_model
from bigkit.offload import gather, lenders, table
from bigkit.offload.experts import ExpertStreamer, expert_hits
from bigkit.offload.on_device import DeviceRows
from bigkit.offload.rows import count_rows
from bigkit.offload.weights import Unit, Weight, part_of

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="tests/gpu has these kernels compiled")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    table._kernels.cache_clear()
    yield
    table._kernels.cache_clear()


def rows_for(tensors, count, monkeypatch):
    """`DeviceRows` with memory for a block of stacked tensors, and the RAM in which these rest."""
    weights = [Weight(f"w{i}", one, [], {"": part_of(one)}) for i, one in enumerate(tensors)]
    unit = Unit("experts", torch.nn.Linear(1, 1), weights)
    monkeypatch.setattr("bigkit.offload.on_device.count_rows", lambda module: tensors[0].shape[0])
    kept = DeviceRows(unit, count)
    kept.slot = SimpleNamespace(base=torch.zeros(kept.nbytes, dtype=torch.uint8))
    ram = torch.zeros(unit.nbytes, dtype=torch.uint8)
    for part, one in zip(unit.parts(), tensors):
        part.over(ram, part.offset).copy_(one)
    return kept, ram


@pytest.mark.parametrize("experts, room, per_token", [(8, 3, 2), (20, 7, 3), (16, 16, 4), (5, 1, 1)])
def test_the_same_experts_are_kept(experts, room, per_token, monkeypatch):
    """Token after token, by turns on the GPU and on the host: hits, rows and bytes."""
    torch.manual_seed(experts)
    tensors = [torch.randn(experts, 6, 4), torch.randn(experts, 2, 700, dtype=torch.float64).bfloat16()]
    (kept, ram), (other, _) = rows_for(tensors, room, monkeypatch), rows_for(tensors, room, monkeypatch)
    found, hits, misses = table.Table(kept, ram), 0, 0
    for token in range(40):
        choice = torch.randperm(experts)[:per_token][None]
        missing = other.take(sorted(choice.flatten().tolist()))
        if token % 10 == 7:  # the host's turn: what it brings, it copies
            found.read()
            assert sorted(kept.take(sorted(choice.flatten().tolist()))) == sorted(missing)
            for number in range(len(tensors)):
                rows = kept.weights()[number]
                for expert in missing:
                    rows[kept.row_of[expert]] = tensors[number][expert]
            continue
        found.choose(choice)
        for number, tensor in enumerate(tensors):
            assert not found.whole()
            assert torch.equal(found.bring(number, choice[0]), tensor[choice[0]])
        hits, misses = hits + per_token - len(missing), misses + len(missing)
        assert found.whole() and found.counts[:2].tolist() == [hits, misses]
    found.read()
    assert [*kept.row_of] == [*other.row_of]
    for number, rows in enumerate(kept.weights()):
        for expert, row in kept.row_of.items():
            assert torch.equal(rows[row], tensors[number][expert])


# ---------------------------------------------------------------------------------------------------------------------
# In a model


@pytest.fixture
def pretend(monkeypatch):
    """A stand-in passes for a GPU, its slabs for pinned ones, and kernels are interpreted."""
    monkeypatch.setattr(lenders, "ExpertStreamer", gather.GatherStreamer)
    monkeypatch.setattr(gather, "seen_by_gpu", lambda slab, device: slab.bytes[:])
    monkeypatch.setattr(gather, "kernels_for", lambda tensor: "kernels")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())


def mixture(make=tf.Qwen3MoeForCausalLM, **more):
    torch.manual_seed(0)
    config = make.config_class(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_experts_per_tok=2, intermediate_size=48, num_experts=8, num_local_experts=8, moe_intermediate_size=16,
        **more,
    )  # fmt: skip
    model = make(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    model.set_experts_implementation("batched_mm")
    return model.requires_grad_(False)


def apart(model):
    return {"": 0, **{name: "cpu" for name, module in model.named_modules() if count_rows(module)}}


def spread(model, rows=5, **more):
    size = sum(p.nbytes for module in model.modules() if count_rows(module) for p in module.parameters())
    found = dispatch_model(model, apart(model), stand_in={0: "cpu"}, expert_cache=size * rows // 8, **more)
    streamer = found.model.layers[0].mlp.experts._hf_hook.streamer
    for part in (part for unit in streamer.units for part in unit.parts()):
        part.slab.pinned, part.slab._release = True, lambda: None
    return found, streamer


TEXTS = ([[1]], [[2]], [[1, 2, 3, 4, 5, 6]], [[7]], [[8, 9]], [[2]], [[7]], [[60]], [[33]])


def test_tokens_and_hits_are_those_of_the_host(pretend, monkeypatch):
    model = mixture()
    found, streamer = spread(copy.deepcopy(model))
    assert type(streamer) is gather.GatherStreamer
    with monkeypatch.context() as patch:
        patch.setattr(lenders, "ExpertStreamer", ExpertStreamer)
        other, plain = spread(copy.deepcopy(model))
    assert type(plain) is ExpertStreamer
    for ids in map(torch.tensor, TEXTS):
        expected = model(ids).logits
        assert torch.equal(found(ids).logits, expected) and torch.equal(other(ids).logits, expected)
        assert expert_hits(found) == expert_hits(other)
        assert not any(slot.lent for slot in streamer.slots) and not streamer._served
    hits, misses = expert_hits(found)
    assert hits > 0 < misses and len(streamer.tables) == 3


@pytest.mark.parametrize("quantization", ["nf4", "nf4-double", "int8"])
def test_quantized_experts(quantization, pretend):
    pytest.importorskip("bitsandbytes")
    kind, _, double = quantization.partition("-")
    own = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": kind}
    model = mixture()
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    config = BnbQuantizationConfig(
        **own, bnb_4bit_use_double_quant=bool(double), torch_dtype=torch.float32, skip_modules=linear
    )
    here = load_and_quantize_model(copy.deepcopy(model), config, device_map={"": "cpu"})
    found, streamer = spread(load_and_quantize_model(copy.deepcopy(model), config, device_map={"": "cpu"}))
    for ids in map(torch.tensor, TEXTS):
        assert torch.equal(found(ids).logits, here(ids).logits)
    assert min(expert_hits(found)) > 0
    assert len(streamer.tables) == (0 if double else 3), "an offset of 4 bytes is no whole word"


def test_errors_writes_and_others_who_ask(pretend):
    """What a failed forward has left in the rows is not believed; whoever asks for other experts gets them."""
    model = mixture()
    found, streamer = spread(copy.deepcopy(model))
    token, own = torch.tensor([[3]]), found.model.layers[1].mlp.experts
    found(token)
    seen = []
    handle = own.act_fn.register_forward_hook(lambda *_: seen.append(own.down_proj[torch.tensor([6, 6])].clone()))
    assert torch.equal(found(token).logits, model(token).logits)
    handle.remove()
    assert torch.equal(seen[0], model.model.layers[1].mlp.experts.down_proj[[6, 6]])
    before = expert_hits(found)
    handle = own.act_fn.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        found(torch.tensor([[9]]))
    handle.remove()
    assert not streamer.held() and not streamer.tables[1].current and sum(expert_hits(found)) > sum(before)
    for ids in map(torch.tensor, TEXTS):
        assert torch.equal(found(ids).logits, model(ids).logits)
    for target in (model, found):
        target.model.layers[1].mlp.experts.down_proj.mul_(2)
    for ids in map(torch.tensor, TEXTS):
        assert torch.equal(found(ids).logits, model(ids).logits)
    handle = own.act_fn.register_forward_hook(lambda *_: own.down_proj.mul_(2))
    with pytest.raises(RuntimeError, match="it would be lost"):
        found(token)
    handle.remove()
    assert torch.equal(found(token).logits, model(token).logits)
    found, _ = spread(mixture().requires_grad_(True))
    with pytest.raises(RuntimeError, match="offloaded weights are for inference"):
        found(token).logits.sum().backward()


CHANGES = {
    "another parameter": lambda p: torch.nn.Parameter(p.detach() * 3, requires_grad=False),
    "in another order": lambda p: torch.nn.Parameter((p.detach() * 3).mT.contiguous().mT, requires_grad=False),
    "another dtype": lambda p: (p.detach() * 3).bfloat16(),
}


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_experts_that_are_replaced_between_tokens(change, on_gpu, request):
    """What is on the GPU is of the old ones: the next token must not find it."""
    if on_gpu:
        request.getfixturevalue("pretend")
    model = mixture()
    found, _ = spread(copy.deepcopy(model))
    for ids in map(torch.tensor, TEXTS):
        assert torch.equal(found(ids).logits, model(ids).logits)
    for target in (model, found):
        experts = target.model.layers[1].mlp.experts
        for own in ("gate_up_proj", "down_proj"):
            new = CHANGES[change](getattr(experts, own))
            if isinstance(new, torch.nn.Parameter):
                setattr(experts, own, new)
            else:
                getattr(experts, own).data = new
    with torch.autocast("cpu", torch.bfloat16, change == "another dtype"):
        for ids in map(torch.tensor, TEXTS):
            assert torch.equal(found(ids).logits, model(ids).logits)


def test_a_weight_in_another_form(pretend):
    """Another dtype rests elsewhere, and the rows have another size: the account is made anew, or there is none."""
    model = mixture()
    found, streamer = spread(copy.deepcopy(model))
    for ids in map(torch.tensor, TEXTS):
        found(ids)
    for target in (model, found):
        own = target.model.layers[1].mlp.experts
        own.down_proj.data = (own.down_proj.data * 2).double()
        own.down_proj.data = own.down_proj.data.float()
    before = expert_hits(found)
    for ids in map(torch.tensor, TEXTS):
        assert torch.equal(found(ids).logits, model(ids).logits)
    assert sum(expert_hits(found)) > sum(before)


def test_experts_that_come_in_another_tensor(pretend, monkeypatch):
    """Some versions of Transformers index with a copy of the choice; and a hook may index with another choice."""
    model, take = mixture(), table.Looked.take
    found, _ = spread(copy.deepcopy(model))
    clones = lambda self, parts, experts: take(self, parts, experts.clone())  # noqa: E731
    monkeypatch.setattr(table.Looked, "take", clones)
    for ids in map(torch.tensor, TEXTS):
        assert torch.equal(found(ids).logits, model(ids).logits)
    assert min(expert_hits(found)) > 0
    others = lambda self, parts, experts: (take(self, parts, experts.flip(0)), take(self, parts, experts))[1]  # noqa: E731
    monkeypatch.setattr(table.Looked, "take", others)
    for ids in map(torch.tensor, TEXTS * 2):
        assert torch.equal(found(ids).logits, model(ids).logits)


def test_what_a_first_token_would_wait_for_can_be_done_before(pretend):
    """Memory and kernels are there; what is in the rows, and what is counted, is as if nothing had been."""
    model = mixture()
    found, streamer = spread(copy.deepcopy(model))
    with mock.patch.object(streamer.lane, "leave") as left:
        streamer.prepare()
    slots = [kept.slot for kept in streamer.on_device.values()]
    assert [call.args for call in left.call_args_list] == [(slot,) for slot in slots], "copies into the rows must wait"
    assert len(streamer.tables) == len(streamer.on_device) == 3 and expert_hits(found) == (0, 0)
    assert not any(table.kept.row_of or table.current for table in streamer.tables.values())
    other, _ = spread(copy.deepcopy(model))
    for ids in map(torch.tensor, TEXTS):
        assert torch.equal(found(ids).logits, model(ids).logits) and other(ids) is not None
        assert expert_hits(found) == expert_hits(other)
    assert [kept.slot for kept in streamer.on_device.values()] == slots


def test_memory_that_a_first_token_needs_may_be_short_until_then(pretend, monkeypatch):
    model = mixture()
    found, streamer = spread(copy.deepcopy(model))
    with monkeypatch.context() as patch:
        patch.setattr(streamer, "rows_for", mock.Mock(side_effect=torch.OutOfMemoryError))
        streamer.prepare()
    assert not streamer.on_device
    assert torch.equal(found(torch.tensor([[3]])).logits, model(torch.tensor([[3]])).logits)


def test_who_listens_is_told(pretend):
    found, streamer = spread(mixture())
    events = []
    streamer.listeners.append(lambda event: events.append(event) if event.kind == "fetch" else None)
    found(torch.tensor([[3]]))
    found(torch.tensor([[3]]))
    each = streamer.units[0].nbytes // 8
    assert [event.nbytes for event in events] == [2 * each] * 3 + [0] * 3
