"""Which ways to place a pipeline's components are tried: the best of all, in a time that many GPUs do not stretch."""

from __future__ import annotations

import random
from itertools import product

import pytest

from bigkit.devices import Device
from bigkit.maps.pipeline import _Trial, _ways, place_pipeline
from bigkit.model.pipeline import Component, PipelineSpec
from bigkit.model.spec import ModelSpec, ModuleSpec, TensorSpec


def component(draw: random.Random, name: str, phase: str) -> Component:
    block = ModuleSpec("Block", {"weight": TensorSpec((draw.randint(100, 4000), 1024), "float16")}, {}, False)
    blocks = ModuleSpec("ModuleList", {}, {str(i): block for i in range(draw.randint(1, 12))}, False)
    spec = ModelSpec(name, ModuleSpec("Model", {}, {"blocks": blocks}, False), no_split=("Block",))
    return Component(name, spec, phase, draw.randint(0, 4_000_000))


def pipeline(draw: random.Random, encoders: int) -> PipelineSpec:
    phases = [*["encode"] * encoders, "denoise", "decode"]
    return PipelineSpec("p", "P", tuple(component(draw, f"part{i}", phase) for i, phase in enumerate(phases)))


@pytest.mark.parametrize("seed", range(20))
def test_the_best_of_all_ways_is_tried(seed: int) -> None:
    draw = random.Random(seed)
    parts, gpus = pipeline(draw, draw.randint(1, 2)), range(draw.randint(1, 3))
    rooms: dict[Device, int] = {gpu: draw.randint(parts.weights // 10, parts.weights) for gpu in gpus}
    alone = [(how, (gpu,)) for gpu in gpus for how in ("stays", "comes", "by block")]
    several = [("split", tuple(gpus)), ("by block", tuple(gpus))] if len(gpus) > 1 else []
    choices = [
        [way for way in alone if one.phase != "decode" or way[1] == (0,)] + several * (one.phase == "denoise")
        for one in parts.components
    ]
    best = [
        min((trial.over, trial.copied) for trial in (_Trial.of(parts.components, way, rooms, None, 30) for way in ways))
        for ways in (product(*choices), _ways(parts.components, rooms))
    ]
    assert best[0] == best[1]


def test_many_gpus_and_components_are_few_ways() -> None:
    parts = pipeline(random.Random(0), 4)
    rooms: dict[Device, int] = {gpu: 30_000_000 + gpu for gpu in range(8)}
    assert sum(1 for _ in _ways(parts.components, rooms)) < 50_000
    assert place_pipeline(parts, {**rooms, "cpu": parts.weights}).feasible
