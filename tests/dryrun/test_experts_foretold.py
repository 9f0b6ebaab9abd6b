"""Given the routing that a real run recorded, a dry run brings the same bytes in each forward; and tokens are right.

The CPU stands in for the GPU and passes for one, its RAM for pinned RAM, and kernels are interpreted: so what a GPU
would do is done, and is compared with a dry run of one, and with the whole model in plain PyTorch.
"""

import copy
import os
import tempfile
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bigkit import BnbQuantizationConfig, dispatch_model, dry_run, init_empty_weights, load_and_quantize_model
from bigkit.checkpoints import decoded
from bigkit.machine.roofline import FILL
from bigkit.measure.routing import record_routing
from bigkit.offload import experts as experts_module
from bigkit.offload import gather, lenders, pieces
from bigkit.offload.experts import expert_hits
from bigkit.offload.lenders import streamers_in
from bigkit.offload.rows import count_rows

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="of a machine without a GPU")

FAMILIES = {"mixtral": tf.MixtralForCausalLM, "qwen3": tf.Qwen3MoeForCausalLM, "gpt-oss": tf.GptOssForCausalLM}


@pytest.fixture
def pretend(monkeypatch):
    monkeypatch.setattr(lenders, "ExpertStreamer", gather.GatherStreamer)
    monkeypatch.setattr(gather, "seen_by_gpu", lambda slab, device: slab.bytes[:])
    monkeypatch.setattr(gather, "kernels_for", lambda tensor: "kernels")
    for name in ("device", "device_of"):
        monkeypatch.setattr(torch.cuda, name, lambda given: nullcontext())


def config_of(family, experts, per_token, blocks, implementation):
    own = FAMILIES[family].config_class(
        vocab_size=64, hidden_size=32, num_hidden_layers=blocks, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, num_experts_per_tok=per_token, intermediate_size=32, num_experts=experts,
        num_local_experts=experts, moe_intermediate_size=16,
        **({"layer_types": ["full_attention"] * blocks} if family == "gpt-oss" else {}),
    )  # fmt: skip
    own._experts_implementation = implementation
    return own


def real(config, family):
    torch.manual_seed(0)
    model = FAMILIES[family](config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model


def empty(config, family):
    with init_empty_weights():
        return FAMILIES[family](config).eval()


def work(model, prompt, new, forwards=None, sequences=1):
    """The prompt, then token by token; logits of each forward."""
    ids = torch.randint(64, (sequences, prompt), generator=torch.Generator().manual_seed(prompt))
    found, cache = [], None
    for step in range(1 + new):
        if forwards is not None:
            forwards.append(step)
        output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        found.append(output.logits)
        cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
    return torch.cat(found)


PLACES = st.sampled_from([0, "cpu", "disk"])


@st.composite
def cases(draw):
    experts = draw(st.integers(2, 9))
    places = draw(st.lists(PLACES, min_size=1, max_size=4).filter(lambda found: set(found) != {0}))
    per_token = draw(st.integers(1, min(3, experts)))
    return {
        "family": draw(st.sampled_from([*FAMILIES])),
        "experts": experts,
        "per_token": per_token,
        "places": places,
        "rows": draw(st.sampled_from([0, 0, per_token, experts])),  # of each block, that may stay on the GPU
        "slots": draw(st.integers(2, 3)),
        "prompt": draw(st.integers(1, 7)),
        "sequences": draw(st.sampled_from([1, 1, 1, 2, 3])),
        "new": draw(st.integers(1, 5)),
        "large": draw(st.booleans()),  # blocks too large for a slot that holds all
        "implementation": draw(st.sampled_from(["batched_mm", "batched_mm", "grouped_mm", "eager"])),
        "quantization": draw(st.sampled_from([None, None, "nf4", "int8"])),
    }


def check(case, monkeypatch):
    family, implementation = case["family"], case["implementation"]
    config = config_of(family, case["experts"], case["per_token"], len(case["places"]), implementation)
    if case["large"]:
        monkeypatch.setattr(experts_module, "WHOLE", 0)
        monkeypatch.setattr(experts_module, "SOME", 0)
        monkeypatch.setattr(pieces, "PIECE", 1 << 12)
        monkeypatch.setattr(decoded, "AT_A_TIME", 1 << 10)
    model, quantization = real(config, family), None
    if case["quantization"]:
        linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        own = {"load_in_8bit": True} if case["quantization"] == "int8" else {"load_in_4bit": True,
                                                                            "bnb_4bit_quant_type": "nf4"}  # fmt: skip
        quantization = BnbQuantizationConfig(**own, torch_dtype=torch.float32, skip_modules=linear)
        model = load_and_quantize_model(model, quantization, device_map={"": "cpu"})
        model = getattr(model, "_orig_mod", model)
    load, sequences = (case["prompt"], case["new"]), case["sequences"]
    expected = work(copy.deepcopy(model), *load, sequences=sequences)
    blocks = [name for name, module in model.named_modules() if count_rows(module)]
    places = {"": 0, **dict(zip(blocks, case["places"]))}
    each = sum(p.nbytes for p in model.get_submodule(blocks[0]).parameters()) // case["experts"]
    away = len([place for place in case["places"] if place != 0])
    options = {"slots": case["slots"], "expert_cache": case["rows"] * each * away}
    forwards, moved = [], Counter()
    with tempfile.TemporaryDirectory() as folder:
        found = dispatch_model(model, places, stand_in={0: "cpu"}, offload_dir=folder, **options)
        for streamer in streamers_in(found):
            for part in (part for unit in streamer.units for part in unit.parts() if part.slab is not None):
                part.slab.pinned, part.slab._release = True, lambda: None
            streamer.listeners.append(lambda e: moved.update({forwards[-1]: e.nbytes * (e.kind == "fetch")}))
        if implementation == "eager" or sequences > 1:  # a dry run has no values, and a routing is that of one sequence
            for _ in range(2):
                assert torch.equal(work(found, *load, forwards, sequences), expected)
            return
        logits = []
        routing = record_routing(found, lambda: logits.append(work(found, *load, forwards)))
        hits = expert_hits(found)
        assert torch.equal(logits[0], expected)
        del streamer.listeners[:]
        assert torch.equal(work(found, *load), expected)
    run = dry_run(
        empty(config, family), places, 1, case["prompt"], case["new"], "H200", generate=False,
        quantization=quantization, dtype=None if quantization else "float32", routing=routing, replay=False, **options,
    )  # fmt: skip
    told, start = [], 0
    for _, end in run.steps:
        told.append(sum(op.bytes for op in run.operations[start:end] if op.name == FILL))
        start = end
    assert told == [moved[step] for step in range(1 + case["new"])]
    assert run.expert_hits == hits


ONE = {
    "family": "qwen3", "experts": 8, "per_token": 3, "places": ["cpu"], "rows": 0, "slots": 2, "prompt": 1,
    "sequences": 1, "new": 2, "large": True, "implementation": "eager", "quantization": None,
}  # fmt: skip


@given(case=cases())
@example(case=ONE)  # the eager loop adds experts in the order of their numbers, which must not become another
@example(case={**ONE, "large": False, "rows": 5, "new": 6})
@example(case={**ONE, "implementation": "batched_mm", "large": False, "experts": 2, "per_token": 2, "rows": 2})
@example(case={**ONE, "implementation": "grouped_mm", "per_token": 2, "prompt": 5})
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_and_tokens(case, pretend, monkeypatch):
    with monkeypatch.context() as patch:
        check(case, patch)


@pytest.mark.soak
@given(case=cases())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_bytes_and_tokens_at_length(case, pretend, monkeypatch):
    with monkeypatch.context() as patch:
        check(case, patch)
