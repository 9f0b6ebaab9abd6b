"""Quantized dry runs: what rests, what travels, which kernels bitsandbytes would choose, and what they ask for."""

import json
import sys
from collections import Counter

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from bigkit import (
    BnbQuantizationConfig,
    advise,
    dry_run,
    init_empty_weights,
    load_and_quantize_model,
    plan,
    save_model,
    zoo,
)
from bigkit.dryrun.attention import Target
from bigkit.dryrun.fake_gpu import fake_gpus
from bigkit.model.precision import QUANTIZATIONS, quantized_bytes
from bigkit.quantize import bnb as packed
from tests.dryrun.test_fake_gpu import tiny

pytest.importorskip("bitsandbytes")
from bigkit.dryrun.fake_bnb import config_of, fake_bitsandbytes, fill_quantized, quantize_empty

GPT2 = {"transformer.wte": 0, "transformer.wpe": 0, "transformer.ln_f": 0, "lm_head": 0, "transformer.drop": 0}
LLAMA = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, vocab_size=96,
                    num_key_value_heads=2, max_position_embeddings=64, dtype="bfloat16")  # fmt: skip
LAYERS = 6  # of GPT-2's twelve blocks, where all are run; one more travels than there are slots
HALF = {**GPT2, **{f"transformer.h.{i}": "cpu" if i % 2 else 0 for i in range(LAYERS)}}
SHAPES = ((2304, 768), (768, 768), (3072, 768), (768, 3072))  # of the linear layers of a block, (out, in)


def step(run, number):
    return run.operations[run.steps[number - 1][1] if number else 0 : run.steps[number][1]]


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_weights_rest_in_the_bytes_that_a_plan_counts(quantization):
    spec = zoo.describe("gpt2")
    run = dry_run("gpt2", None, 1, 32, 1, "T4", dtype="float16", quantization=quantization)
    rests = run.timeline().at_peak()["weights"]
    table = 1024 if quantization.endswith("double") else 0  # the one that the others are copied from
    assert rests == spec.bytes(spec.precision("float16", quantization)) + table


@pytest.mark.parametrize("kind", ["int8", "nf4-double"])
def test_a_repository_of_bitsandbytes_counts_as_it_is_stored(kind, tmp_path):
    """By its folder, and by an empty model: the weights of the plan, and those of a run that is told the same."""
    config = config_of(kind, "bfloat16")
    model = LlamaForCausalLM(LLAMA).bfloat16()
    model.save_pretrained(tmp_path / "plain")
    save_model(load_and_quantize_model(model, config, device_map={"": "cpu"}), tmp_path / "small")
    settings = {**LLAMA.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": config.to_dict()}
    (tmp_path / "small" / "config.json").write_text(json.dumps(settings))
    folder = str(tmp_path / "small")
    expected = dry_run(str(tmp_path / "plain"), None, 1, 8, 1, "T4", dtype="bfloat16", quantization=kind)
    weights = expected.timeline().at_peak()["weights"]
    table = 1024 if kind.endswith("double") else 0
    assert plan(folder, {0: "1GB"}).shares[0].weights == weights - table
    for given in (folder, zoo.empty_model(folder, dtype=None)):
        run = dry_run(given, None, 1, 8, 1, "T4")
        assert run.timeline().at_peak()["weights"] == weights and run.peak_reserved == expected.peak_reserved
    unpacked = dry_run(folder, None, 1, 8, 1, "T4", dtype="bfloat16")
    assert unpacked.timeline().at_peak()["weights"] > 1.4 * weights


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_experts_are_decoded_to_the_dtype_of_the_layers_that_stay(kind):
    """A model in bfloat16, and float16 for what is not quantized, as `load_and_quantize_model` does by default."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64, "num_local_experts": 4}
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=96)
    model = load_and_quantize_model(MixtralForCausalLM(config).bfloat16(), config_of(kind), device_map={"": "cpu"})
    model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, pad_token_id=0)
    with init_empty_weights():
        empty = MixtralForCausalLM(config).bfloat16()
    weights = sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
    run = dry_run(empty, None, 1, 3, 1, "T4", quantization=kind)
    assert run.timeline().at_peak()["weights"] == pytest.approx(weights, abs=4096)


def test_a_plan_says_how_its_weights_are_stored():
    placed = plan("gpt2", {0: "2GiB"}, dtype="float16", quantization="nf4", context=64)
    run = dry_run("gpt2", placed, 1, 32, 1, "T4")
    assert run.timeline().at_peak()["weights"] == placed.shares[0].weights
    config = BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float16")
    assert dry_run("gpt2", None, 1, 32, 1, "T4", quantization=config).peak_allocated == run.peak_allocated


@pytest.mark.parametrize("quantization", ["int8", "nf4", "nf4-double"])
@pytest.mark.parametrize("away", ["cpu", "disk"])
def test_quantized_weights_travel_quantized(quantization, away):
    places = {name: away if device == "cpu" else device for name, device in HALF.items()}
    few_blocks = tiny("gpt2", "float16", n_layer=LAYERS)
    run = dry_run(few_blocks, places, 1, 32, 1, "T4", dtype="float16", quantization=quantization)
    tables = {"int8": 0, "nf4": 64, "nf4-double": 64 + 1024 + 4}[quantization]
    linear = sum(quantized_bytes(shape, quantization, shape[0]) - tables for shape in SHAPES)
    rest = 2 * (sum(out for out, _ in SHAPES) + 4 * 768)  # biases and norms, in float16
    moved = sum(operation.bytes for operation in step(run, 1) if operation.name == "fill")
    assert moved == pytest.approx(LAYERS // 2 * (linear + rest), rel=0.002)
    assert run.timeline().at_peak()["slots"] == pytest.approx(2 * (linear + rest), rel=0.002)
    assert {operation.source for operation in step(run, 1) if operation.name == "fill"} == {away}


def test_a_long_prompt_is_dequantized_and_a_token_is_not():
    run = dry_run("gpt2", None, 2, 1000, 1, "H200", dtype="float16", quantization="nf4-double")
    prompt, token = (Counter(operation.name for operation in step(run, i)) for i in (0, 1))
    assert prompt["cdequantize_blockwise_fp16_nf4"] == 48 and not prompt["cgemm_4bit_fp16"], "2000 rows"
    assert prompt["cdequantize_blockwise_fp32"] == 48, "scales of scales"
    assert token["cgemm_4bit_fp16"] == 48 and not token["cdequantize_blockwise_fp16_nf4"]
    by_name = {operation.name: operation for operation in step(run, 0)}
    out, inputs = SHAPES[-1]
    weight = by_name["cdequantize_blockwise_fp16_nf4"].bytes
    assert weight == out * inputs // 2 + out * inputs // 64 * 4 + 2 * out * inputs, "codes, scales; the weight written"
    whole = dry_run("gpt2", None, 2, 1000, 0, "H200", dtype="float16")
    assert sum(operation.flops for operation in step(run, 0)) == sum(operation.flops for operation in step(whole, 0))
    kernel = next(operation for operation in reversed(step(run, 1)) if operation.name == "cgemm_4bit_fp16")
    assert kernel.flops == 0 and kernel.bytes < out * inputs * 0.54, "read once, in 4 bits"


def test_which_kernel_depends_on_the_gpu():
    """bitsandbytes' own thresholds: 48 rows are many for Hopper, few for Ampere."""
    few = {name: Counter(operation.name for operation in
           step(dry_run("gpt2", None, 1, 100, 0, name, dtype="float16", quantization="nf4"), 0))
           for name in ("H200", "RTX 4090")}  # fmt: skip
    assert few["H200"] != few["RTX 4090"]


class Single(nn.Module):
    """One linear layer, and a head that is kept."""

    def __init__(self):
        super().__init__()
        self.inner, self.lm_head = nn.Linear(256, 512), nn.Linear(512, 8)

    def forward(self, x):
        return self.lm_head(self.inner(x))


def events_of(quantization, rows):
    with init_empty_weights():
        model = Single()
    config = BnbQuantizationConfig(
        **({"load_in_8bit": True} if quantization == "int8" else
           {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}), skip_modules=["lm_head"]
    )  # fmt: skip
    quantize_empty(model, config)
    with fake_gpus(Target()) as notes, fake_bitsandbytes(notes):
        notes.kind = "weights"
        fill_quantized(model.eval(), {"": "cuda:0"}, "cuda", config)
        notes.kind = "activations"
        x = torch.empty(rows, 256, dtype=torch.float16, device="cuda:0")
        begin = len(notes.trace.recordings["cuda:0"].events)
        model.inner(x)
        return notes.trace.recordings["cuda:0"].events[begin:], notes.trace.operations


def test_what_int8_asks_for_tensor_by_tensor():
    """The largest |x|; scales of the rows, codes; int32 and float16."""
    events, operations = events_of("int8", 16)
    asked = [event for event in events if event > 0]
    assert asked == [2, 16 * 4, 16 * 256, 16 * 512 * 4, 16 * 1024]
    assert events[:2] == [2, events[1]] and events[1] < 0, "the largest |x| is compared and let go at once"
    assert [operation.name for operation in operations if operation.name[0] == "c"] == [
        "cint8_vector_quant", "cigemmlt_32", "cdequant_mm_int32_fp16"
    ]  # fmt: skip
    product = next(operation for operation in operations if operation.name == "cigemmlt_32")
    assert product.flops == 2 * 16 * 256 * 512 and product.bytes == 16 * 256 + 256 * 512 + 4 * 16 * 512
    assert sum(operation.name == "wait" for operation in operations) == 1, "Python asks whether there are outliers"


def test_what_4_bits_ask_for_tensor_by_tensor():
    weight, out = 2 * 256 * 512, 2 * 2048 * 512
    events, _ = events_of("nf4", 1)
    assert [event for event in events if event > 0] == [2 * 512]
    events, _ = events_of("nf4", 2048)
    asked = [event for event in events if event > 0]
    assert asked[0] == weight and out in asked, "the weight in 16 bits, then the product"


def test_advice_counts_what_a_dry_run_finds():
    for option in advise("gpt2", "T4", batch=2, context=128).options:
        run = dry_run("gpt2", option.plan, 2, 127, 1, "T4")
        parts, share = run.timeline().at_peak(), option.plan.shares[0]
        assert 0 <= parts["weights"] - share.weights <= 1024
        assert parts["KV cache"] == pytest.approx(share.kv_cache, rel=0.05)  # a copy of one layer's keys grows


def test_nothing_fake_is_left_behind():
    dry_run("gpt2", None, 1, 8, 1, "T4", dtype="float16", quantization="nf4-double")
    weight = packed.quantized(torch.randn(64, 64), "nf4-double")
    assert type(weight).__name__ == "Params4bit" and type(weight.quant_state.state2.code) is torch.Tensor
    layer = packed.empty_layer(nn.Linear(1, 1), 64, 64, "nf4", 0.0, torch.float32)
    layer._parameters.update(weight=weight, bias=nn.Parameter(torch.zeros(64), requires_grad=False))
    assert layer(torch.randn(2, 64)).isfinite().all()


def test_wrong_input():
    with pytest.raises(ValueError, match="unknown quantization 'int3': expected one of int8, nf4"):
        dry_run("gpt2", None, 1, 8, 0, "T4", quantization="int3")
    assert config_of("fp4").torch_dtype is torch.float16


def test_without_bitsandbytes(monkeypatch):
    packed.bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    try:
        with pytest.raises(ImportError, match="8-bit and 4-bit weights need bitsandbytes"):
            dry_run("gpt2", None, 1, 8, 0, "T4", quantization="nf4")
    finally:
        packed.bitsandbytes.cache_clear()
