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
from bigkit.model.stored import as_stored, read_format, stored_sizes
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
    assert "stored_bytes" not in spec.facts
    sizes = stored_sizes(spec, CONFIGS[format])
    assert sizes is not None
    parameters = {name: size for name, size in sizes.items() if not spec.tensors[name][0].buffer}
    assert sum(parameters.values()) == sum(on_file.values())
    assert as_stored(spec)[0] == sum(sizes.values())  # type: ignore[index]

    (tmp_path / "away").rename(tmp_path / "model.safetensors")
    estimate = bigkit.estimate_memory(str(tmp_path))
    row = estimate.inference[0]
    assert row.stored == f"as stored ({CONFIGS[format]['quant_method']})" and row.weights == sum(on_file.values())
    assert "is quantized" in str(estimate) and f"as stored ({CONFIGS[format]['quant_method']})" in str(estimate)


def test_gpt_oss_has_its_published_size() -> None:
    """60.8 GiB for the larger, 12.8 for the smaller, by their model card (arXiv 2508.10925, table 1)."""
    for size, layers, experts in ((60.8, 36, 128), (12.8, 24, 32)):
        settings = GptOssConfig(num_hidden_layers=layers, num_local_experts=experts, dtype="bfloat16").to_dict()
        settings |= {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]}
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
        spec = build.spec_of(build.build(settings, dtype=None), "gpt-oss", settings)
        total, used = as_stored(spec)  # type: ignore[misc]
        assert round(total / 2**30, 1) == size
        assert used < total / 2
    assert round(as_stored(zoo.describe("gpt-oss-120b"))[0] / 2**30, 1) == 60.8  # type: ignore[index]


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
    spec = replace(spec, facts={**spec.facts, "quantization_config": settings})
    assert as_stored(spec)[0] == spec.bytes(spec.precision(None, "nf4"))  # type: ignore[index]
