"""Dry runs of what is decoded where it works: one operation for each weight, as a kernel does it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

import bigkit
from bigkit.checkpoints import like_kernels
from tests.checkpoints.test_as_stored import FORMATS, write
from tests.model.test_stored import CONFIGS


@pytest.mark.parametrize("format", [*(name for name in FORMATS if name != "nvfp4"), "mxfp4"])  # that has no kernel
def test_one_operation_for_each_weight(tmp_path: Path, format: str) -> None:
    model = write(tmp_path, format)
    config = {**model.config.to_dict(), "quantization_config": CONFIGS[format], "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = bigkit.dry_run(str(tmp_path), hardware="RTX 4090", prompt_tokens=6, new_tokens=0)
    found = [operation.bytes for operation in run.operations if operation.name == "bigkit.decode"]
    if format == "mxfp4":  # 4 experts of 64 x 128 and of 64 x 64: half a byte, a scale for 32, 2 bytes written
        assert found == [4 * 64 * size * (16 + 1 + 64) // 32 for size in (128, 64)] * 2
    else:  # seven layers of three blocks; the smallest are of 32 x 64
        least = 32 * 64 * (3 if format in ("fp8", "mxfp8") else 2.5)
        assert len(found) == 7 * 3 and least < min(found) < 1.1 * least


def test_a_forward_that_asks_for_the_dtype_of_a_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As T5's does."""
    model, asked, forward = write(tmp_path, "gptq"), [], LlamaMLP.forward

    def asks(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        asked.append(self.down_proj.weight.dtype)
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", asks)
    config = {**model.config.to_dict(), "quantization_config": CONFIGS["gptq"], "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    bigkit.dry_run(str(tmp_path), hardware="RTX 4090", prompt_tokens=6, new_tokens=0)
    assert {*asked} == {torch.bfloat16}


def test_it_stands_for_kernels_only_there() -> None:
    with pytest.raises(NotImplementedError, match="computes nothing"):
        like_kernels.decode([torch.ones(2)], [2], torch.float32)
