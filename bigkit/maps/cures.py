"""What would have to change where nothing fits: a budget, the context, or the place of the KV cache.

Keys and values are read once for each token, as weights are, so a byte of either that rests in RAM costs a token the
same. Weights can be stored in fewer bits and are shared by all sequences: so a plan keeps the cache on the GPU, and
lets weights go first. Where even that is not enough, layers of the cache rest in RAM (`offload/resting_cache.py`):
those that stay, and two slots, are what a GPU holds of it; and between prompts, layers for which there is room where
the prompt had its activations.

Leaves out: windows and recurrent states, which do not grow and stay; and caches in fewer bits (`kv_dtype`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ..machine.hardware import Hardware
from ..machine.ledger import Calibration
from ..machine.roofline import Rates
from ..model.attention import Attention
from ..model.spec import ModelSpec
from ..units import format_bytes, format_seconds
from .partition import last_true
from .plan import Plan, PlanError
from .strategies import place

SLOTS = 2  # layers of the cache that are on the GPU at a time


def cures(
    model: ModelSpec, misfits: Sequence[tuple[Plan, partial[Plan]]], context: int, hardware: Hardware,
    calibration: Calibration | None,
) -> tuple[str, ...]:  # fmt: skip
    """What is missing for each way that does not fit, and what would have to change.

    Args:
        model: the model.
        misfits: a plan that is not feasible, and the call that made it; the closest first.
        context: tokens that were asked for.
        hardware, calibration: the machine, and what was measured on it.
    """
    said = []
    for plan, ask in misfits:
        cure = ""
        try:
            ask(context=context)
        except PlanError as error:
            cure = error.cure
        said.append(f"{plan.stored}: {plan.problem}. {cure}")
    if hardware.gpus and misfits:
        plan, ask = misfits[0]

        def other(model: ModelSpec) -> Plan:
            options: dict[str, Any] = {**ask.keywords, "context": context, "strict": False}
            return place(model, *ask.args[1:], **options)

        gpu = hardware.gpus[0]
        rates = Rates.of_calibration(calibration, gpu) if calibration else Rates.of_gpu(gpu)
        more = cache_in_ram(model, other, sum(share.kv_cache for share in plan.shares), hardware.ram, rates.link)
        said[0] += f" {more}" if more else ""
    return tuple(said)


def cache_in_ram(model: ModelSpec, ask: Callable[[ModelSpec], Plan], kv_bytes: int, ram: int, link: float) -> str:
    """What is won if keys and values rest in RAM, as a sentence; "" if it is not enough.

    Args:
        model: a model that does not fit with its cache.
        ask: model -> its plan for the context, feasible or not.
        kv_bytes: bytes of its cache.
        ram: bytes of RAM.
        link: bytes a second from RAM.
    """
    grows = [record for record in model.attention if record.window is None and record.per_token]
    others = [record for record in model.attention if record not in grows]

    def plan(stay: int) -> Plan:
        held: list[Attention] = grows[: stay + SLOTS]
        return ask(replace(model, attention=(*others, *held)))

    if len(grows) <= SLOTS or not plan(0).feasible:
        return ""
    stay = last_true(lambda n: plan(n).feasible, 0, len(grows) - SLOTS)
    best, away, layer = plan(stay), len(grows) - stay, kv_bytes // len(grows)
    resting = away * layer
    if resting + sum(share.weights for share in best.shares if share.device == "cpu") > ram:
        return ""
    room = sum(share.activations for share in best.shares if share.runs)
    visits = max(0, away - max(0, room // layer - 1))  # a prompt's activations leave room, less a layer that works
    return (
        f"Or let the keys and values of {away} of {len(grows)} layers rest in RAM, "
        f"{format_bytes(resting)}: with generate(past_key_values=RestingCache(config, layers_on_device={stay})) each "
        f"token waits {format_seconds(visits * layer / link)} for those that do not stay between prompts."
    )
