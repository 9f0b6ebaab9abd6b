"""Tiny models of Transformers over two and three devices: the plain model's values, every operation on one device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from bigkit import compute_module_sizes, dispatch_model, init_empty_weights, plan
from bigkit.dryrun.fake_gpu import fake_gpus
from bigkit.dryrun.workload import fill
from tests.maps.tiny_models import inputs_of, model_class, tiny_config
from tests.sweeps import check_every

SHARES = [(0.35, 0.7), (0.6, 0.7), (0.3, 0.4, 0.5)]  # of the model's bytes, for each GPU; RAM has room for all
STAND_IN = dict.fromkeys(range(3), "cpu")
MOST = 30_000_000  # parameters: what the sizes of a configuration do not cut down is left out
DATA = ("DataDependentOutputException", "DynamicOutputShapeException")  # what fake tensors do not know

# Those that name no blocks, or not all, and others that once met tensors of two devices.
CHOSEN = [
    "albert", "audioflamingo3", "bart", "bert-generation", "big_bird", "biogpt", "blenderbot-small", "canine",
    "cohere2_vision", "convbert", "cosmos3_edge", "ctrl", "deberta", "deepseek_vl", "deformable_detr",
    "idefics3_vision", "internvl_vision", "llama", "luke", "marian", "mpnet", "pegasus", "t5",
]  # fmt: skip


class NotMade(Exception):
    """A configuration of which no small model runs as it is."""


def make(model_type: str) -> tuple[type[nn.Module], Any, nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """A class, its configuration, the plain model, its inputs and its output."""
    try:
        config = tiny_config(model_type)
        cls = model_class(config)
        with init_empty_weights():
            if sum(parameter.numel() for parameter in cls(copy.deepcopy(config)).parameters()) > MOST:
                raise ValueError("it stays large")
        torch.manual_seed(0)
        model = cls(copy.deepcopy(config)).eval()
    except Exception as error:
        raise NotMade(f"{type(error).__name__}: {error}") from error
    problem: Exception = ValueError("its inputs are not known")
    for inputs in inputs_of(model):
        try:
            return cls, config, model, inputs, run(model, inputs)
        except Exception as error:
            problem = error
    raise NotMade(f"{type(problem).__name__}: {problem}") from problem


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: value for name, value in model(**inputs).items() if isinstance(value, Tensor)}


def sweep(model_type: str) -> str:
    """Plan a model for the devices of each entry of `SHARES`, run it there, and compare values for the last: "runs".

    Raises:
        NotMade: there is no such model.
    """
    cls, config, whole, inputs, expected = make(model_type)
    size = compute_module_sizes(whole)[""]
    for shares in SHARES:
        with init_empty_weights():
            empty = cls(copy.deepcopy(config)).eval()
        budgets = {**{i: int(size * share) for i, share in enumerate(shares)}, "cpu": size}
        places = plan(empty, budgets, strict=False).device_map
        try:
            with fake_gpus(), torch.no_grad():
                parts = dispatch_model(fill(empty, places), places, 0)
                parts(**{name: value.to("cuda:0") for name, value in inputs.items()})
        except Exception as error:
            if type(error).__name__ not in DATA:
                raise AssertionError(f"over {places}: {type(error).__name__}: {error}") from error
    parts = dispatch_model(copy.deepcopy(whole), places, 0, stand_in=STAND_IN)
    found = run(parts, inputs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, equal_nan=True)
    return "runs"


@pytest.mark.filterwarnings("ignore")  # of Transformers
@pytest.mark.parametrize("model_type", CHOSEN)
def test_over_two_and_three_devices(model_type):
    sweep(model_type)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_every_type_over_two_and_three_devices():
    check_every(transformers.CONFIG_MAPPING, sweep, NotMade)
