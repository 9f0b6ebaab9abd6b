"""What quantized checkpoints take: by their config against real files, and against published sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import GptOssConfig

import bigkit
from bigkit import zoo
from bigkit.model.experts import active_bytes
from bigkit.model.spec import Precision
from bigkit.model.stored import read_format, stored_sizes, with_stored
from bigkit.zoo import build
from tests.checkpoints.test_as_stored import FORMATS, write

CONFIGS: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]},
    "int4": {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
             "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
                 "num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}}}},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
}  # fmt: skip


@pytest.mark.parametrize("format", [*FORMATS, "mxfp4"])
def test_sizes_by_the_config_are_those_of_the_file(tmp_path: Path, format: str) -> None:
    model = write(tmp_path, format)
    config = {**model.config.to_dict(), "quantization_config": CONFIGS[format], "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        on_file = {name: file.get_tensor(name).nbytes for name in file.keys()}
    (tmp_path / "model.safetensors").rename(tmp_path / "away")
    spec = zoo.describe(tmp_path)
    buffers = sum(tensor.bytes() for tensor, _ in spec.tensors.values() if tensor.buffer)
    assert spec.bytes() == sum(on_file.values()) + buffers

    (tmp_path / "away").rename(tmp_path / "model.safetensors")
    estimate = bigkit.estimate_memory(str(tmp_path))
    row = estimate.inference[0]
    assert row.stored == f"as stored ({CONFIGS[format]['quant_method']})"
    assert row.weights == sum(on_file.values()) + buffers
    assert "is quantized" in str(estimate) and f"as stored ({CONFIGS[format]['quant_method']})" in str(estimate)


def test_gpt_oss_has_its_published_size() -> None:
    """60.8 GiB for the larger, 12.8 for the smaller, by their model card (arXiv 2508.10925, table 1)."""
    for size, layers, experts in ((60.8, 36, 128), (12.8, 24, 32)):
        settings = GptOssConfig(num_hidden_layers=layers, num_local_experts=experts, dtype="bfloat16").to_dict()
        settings |= {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]}
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
        spec = with_stored(build.spec_of(build.build(settings, dtype=None), "gpt-oss", settings))
        total, used = spec.bytes(), active_bytes(spec, Precision())
        assert round(total / 2**30, 1) == size
        assert used < total / 2
    assert round(zoo.describe("gpt-oss-120b").bytes() / 2**30, 1) == 60.8


@pytest.mark.parametrize(
    "settings",
    [{}, {"quant_method": "new"}, {"quant_method": "awq", "bits": "few"}, {"quant_method": "compressed-tensors"},
     {"quant_method": "compressed-tensors", "config_groups": []}, {"quant_method": "fp8", "weight_block_size": [1]}],
)  # fmt: skip
def test_what_is_not_known_is_not_guessed(settings: dict[str, Any]) -> None:
    assert read_format(settings) is None
    assert stored_sizes(zoo.describe("gpt2"), settings) is None


def test_bitsandbytes_counts_as_planned() -> None:
    spec = zoo.describe("llama-2-7b")
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    packed = with_stored(replace(spec, facts={**spec.facts, "quantization_config": settings, "quantization": "bnb"}))
    buffers = [tensor for tensor, _ in spec.tensors.values() if tensor.buffer]  # float32; float16 with `nf4`
    cast = sum(tensor.bytes() - tensor.bytes("float16") for tensor in buffers)
    assert packed.bytes() - cast == spec.bytes(spec.precision(None, "nf4")) < spec.bytes() / 3
