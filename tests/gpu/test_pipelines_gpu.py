"""Pipelines of Diffusers on real GPUs: the image of the whole pipeline, whichever way its components are placed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bigkit
from bigkit.dryrun.components import describe_pipeline
from bigkit.offload.pipeline import dispatch_pipeline

pytest.importorskip("diffusers")
from tests.clients.test_pipelines import flux

pytestmark = pytest.mark.filterwarnings("ignore")
COUNT = max(2, torch.cuda.device_count())
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def image(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    ids = torch.arange(7, device="cuda:0")[None]
    with torch.no_grad():
        given = {"prompt_embeds": pipe.text_encoder_2(ids)[0], "pooled_prompt_embeds": pipe.text_encoder(ids)[1]}
    generator = torch.Generator().manual_seed(0)
    made = pipe(**given, height=32, width=32, num_inference_steps=2, generator=generator, output_type="pt")
    return made[0].cpu()  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", [
    "one at a time", "by the block", *(pytest.param(way, marks=needs_two) for way in ("apart", "split", "small")),
])  # fmt: skip
def test_the_image_is_that_of_the_whole_pipeline(tmp_path: Path, way: str) -> None:
    pipe = flux()
    pipe.save_pretrained(tmp_path)
    whole = image(flux().to("cuda:0"))
    spec: Any = describe_pipeline(tmp_path, image=32)
    spec = replace(spec, components=tuple(replace(one, activations=0) for one in spec.components))
    size = next(one.weights for one in spec.components if one.phase == "denoise")
    ways: Any = bigkit.estimate_memory(spec).ways  # type: ignore[attr-defined]
    budgets: dict[str, dict[Any, int]] = {
        "apart": {0: spec.weights - size, 1: size},
        "split": {**dict.fromkeys(range(COUNT), size * 9 // 10), "cpu": 2**30},
        "small": {**dict.fromkeys(range(COUNT), ways["by the block"]), "cpu": 2**30},
    }  # fmt: skip
    plan: Any = bigkit.plan(spec, budgets.get(way) or {0: ways[way], "cpu": 2**30}, overhead=0)
    assert plan.feasible
    pipe = dispatch_pipeline(pipe, plan)
    assert pipe._execution_device == torch.device("cuda:0")
    for _ in range(2):
        assert torch.equal(image(pipe), whole), plan.explain()
