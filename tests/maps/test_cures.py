"""A KV cache that does not fit: how many of its layers may stay, so that the others rest in RAM."""

from dataclasses import replace

import pytest

import bigkit
from bigkit.machine.hardware import HARDWARE
from bigkit.maps.cures import cache_in_ram
from bigkit.maps.strategies import place
from bigkit.units import format_seconds

MODEL = bigkit.zoo.describe("llama-2-7b")


def ask(context, budget):
    return lambda model: place(model, {0: budget, "cpu": "200GiB"}, quantization="nf4", context=context, strict=False)


@pytest.mark.parametrize("budget, context", [("24GiB", 100_000), ("40GiB", 100_000), ("20GiB", 50_000)])
def test_as_many_layers_stay_as_fit(budget, context):
    plan = ask(context, budget)
    assert not plan(MODEL).feasible
    text = cache_in_ram(MODEL, plan, MODEL.kv_bytes(context), 2**38, 50e9)
    stay = int(text.partition("layers_on_device=")[2].partition(")")[0])
    assert f"{32 - stay} of 32 layers rest in RAM" in text

    def fits(layers):
        return plan(replace(MODEL, attention=MODEL.attention[:layers])).feasible

    assert fits(stay + 2) and not fits(stay + 3)
    layer = MODEL.kv_bytes(context) // 32
    room = plan(replace(MODEL, attention=MODEL.attention[: stay + 2])).shares[0].activations // layer
    assert room > 1  # of these one is for a copy
    assert f"token waits {format_seconds((32 - stay - room + 1) * layer / 50e9)} for" in text


def test_where_it_is_not_enough():
    plan = ask(100_000, "24GiB")
    assert cache_in_ram(MODEL, plan, MODEL.kv_bytes(100_000), 2**30, 50e9) == ""  # too little RAM
    assert cache_in_ram(MODEL, ask(100_000, "2GiB"), MODEL.kv_bytes(100_000), 2**38, 50e9) == ""  # nor the weights
    assert cache_in_ram(replace(MODEL, attention=()), plan, 0, 2**38, 50e9) == ""


def test_advice_says_it():
    advice = bigkit.advise(MODEL, replace(HARDWARE["1 x RTX 4090"], ram=2**38), context=100_000)
    assert advice.best is None and "RestingCache(config, layers_on_device=" in advice.cures[0]
    assert "waits" in advice.cures[0]
