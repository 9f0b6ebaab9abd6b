"""Dry runs of tiny models: what runs on the CPU is rehearsed; what does not is refused in one sentence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from bigkit import dry_run, init_empty_weights
from bigkit.dryrun.workload import Workload, fill, work
from tests.maps.tiny_models import model_class, tiny_config
from tests.sweeps import check_every

LOAD = Workload(2, 7, 3)
MOST = 30_000_000  # parameters: what the sizes of a configuration do not cut down is left out
CHOSEN = [
    "aria_text", "bart", "big_bird", "clip", "falcon_mamba", "gemma3_text", "llama", "mamba",
    "mixtral", "parakeet_tdt", "t5", "vit", "wav2vec2", "whisper",
]  # fmt: skip


class NotMade(Exception):
    """A configuration of which no small model can be made."""


def empty(model_type: str) -> Any:
    try:
        config = tiny_config(model_type)
        if "use_cache" in vars(config):
            config.use_cache = True
        with init_empty_weights():
            model = model_class(config)(copy.deepcopy(config)).eval()
    except Exception as error:
        raise NotMade(f"{type(error).__name__}: {error}") from error
    if sum(parameter.numel() for parameter in model.parameters()) > MOST:
        raise NotMade("it stays large")
    return model


def steps_on_the_cpu(model_type: str) -> list[str]:
    torch.manual_seed(0)
    phases: list[str] = []
    work(fill(empty(model_type), {"": "cpu"}), LOAD, "cpu", lambda step: phases.append(step.phase))
    return phases


def check(model_type: str) -> str:
    """Rehearse a model type, and run it for real if it was refused: "runs", or why it was refused."""
    model = empty(model_type)
    try:
        run = dry_run(model, None, LOAD.batch, LOAD.prompt, LOAD.new, "H200")
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
        try:
            real = steps_on_the_cpu(model_type)
        except Exception:
            return "refused, and does not run on the CPU either"
        if "its code asks for" in str(error):
            return f"refused: {error}"
        raise AssertionError(f"runs on the CPU ({len(real)} steps) and is refused: {error}") from error
    assert len(run.times) in (1, 1 + LOAD.new) and run.peak_allocated[0] > 0
    return "runs"


@pytest.mark.filterwarnings("ignore")  # of Transformers
@pytest.mark.parametrize("model_type", CHOSEN)
def test_rehearsed(model_type):
    assert check(model_type) == "runs"


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_every_type_is_rehearsed_or_refused():
    check_every(transformers.CONFIG_MAPPING, check, NotMade)
