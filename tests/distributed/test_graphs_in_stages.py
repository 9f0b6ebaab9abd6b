"""Decode steps of each stage replayed as graphs, one group at a time and in flight: the tokens of one process.

What stands for a graph on the CPU is `tests/fake_graph.py`; on GPUs see `tests/gpu/test_pipeline_gpu.py`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as tf

from bigkit import graph_decode, map_in_flight
from bigkit.distributed.pipeline import stage_of
from tests.distributed import stages

PROMPTS = [[[3, 9, 2, 4], [6, 6, 1, 2]], [[5, 2, 9, 1], [8, 3, 7, 7]], [[1, 1, 4, 13], [2, 12, 2, 3]], [[4, 9, 9, 1]]]
NEW = 7


def ask(model: Any, rows: list[list[int]], **options: Any) -> torch.Tensor:
    return model.generate(torch.tensor(rows), max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options)


def replayed(state: Any, family: str, folder: Path, ends: list[int]) -> dict[str, Any]:
    from tests.fake_graph import Recording

    model = stages.staged(state, family, folder)
    said: dict[str, Any] = {}
    with mock.patch("bigkit.offload.graphs.Recording", Recording):
        with graph_decode(model) as decoder:
            said["alone"] = [ask(model, rows) for rows in PROMPTS[:3]]
            said["alone, counts"] = (decoder.captured, decoder.replayed, decoder.eager)
        with graph_decode(model) as decoder:
            said["in flight"] = map_in_flight(partial(ask, model), PROMPTS[:3] * 2, model)
            said["in flight, counts"] = (decoder.captured, decoder.replayed, decoder.eager)
            said["one stops early"] = map_in_flight(partial(ask, model, eos_token_id=ends), PROMPTS, model)
            said["logits"] = model(torch.tensor(PROMPTS[0])).logits.detach()
    said["afterwards"] = [ask(model, PROMPTS[0])]
    said["as before"] = stage_of(model).compute == stage_of(model).local
    return said


@pytest.mark.parametrize(("family", "size"), [("llama, grouped", "two"), ("gemma3", "three")])
def test_tokens_are_those_of_one_process(family: str, size: str, tmp_path: Path, request: Any) -> None:
    folder, count = stages.saved(family, tmp_path), {"two": 2, "three": 3}[size]
    whole = getattr(tf, stages.FAMILIES[family][0]).from_pretrained(folder, dtype=torch.float32).eval()
    fixed = partial(ask, whole, cache_implementation="static", disable_compile=True)
    expected = [fixed(rows) for rows in PROMPTS[:3]]
    ends = sorted({int(answer[0, 6]) for answer in expected})
    early = [fixed(rows, eos_token_id=ends) for rows in PROMPTS]
    assert any(answer.shape[1] < 4 + NEW for answer in early) or any(0 in answer[0].tolist() for answer in early)
    for said in request.getfixturevalue(size)(replayed, family, folder, ends):
        assert all(map(torch.equal, said["alone"], expected))
        assert all(map(torch.equal, said["in flight"], expected * 2))
        assert all(map(torch.equal, said["one stops early"], early))
        assert torch.allclose(said["logits"], whole(torch.tensor(PROMPTS[0])).logits, atol=1e-5)
        assert torch.equal(said["afterwards"][0], ask(whole, PROMPTS[0]))
        # a prompt and one step run as ever; the second step is recorded; later calls meet the recording
        kinds = 2 if family == "gemma3" else 1  # of steps: while a window fills, and afterwards
        assert said["alone, counts"] == (kinds, 3 * (NEW - 1) - 2 * kinds, 3 + kinds)
        assert said["in flight, counts"] == (kinds * count, 6 * (NEW - 1) - 2 * kinds * count, 6 + kinds * count)
        assert said["as before"]
