"""What to do with a model and a machine: `advise(...)` ranks ways to store and to place it.

Each way is a plan, and the plan says what a token waits for; four things work side by side, and the slowest counts:

    Python      takes about `ISSUED` steps for each block, most where bitsandbytes multiplies
    GPUs        read the weights that rest on them and the KV cache, one after another; of experts, those that are met
    link        brings what rests in RAM, whole blocks
    disk        brings what rests there

No model is built and nothing is traced: sizes alone, so that 600 B parameters take as long as one. `dry_run` checks the
way that you choose.

Leaves out: speculation, tensor parallelism, and what quantized kernels cost beyond the bytes they read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..machine.hardware import CONTEXT_BYTES, Hardware
from ..machine.ledger import Calibration, Ledger, machine_key
from ..machine.roofline import Rates
from ..model.spec import ModelSpec
from ..units import dtype_bits, format_bytes, text_table
from .plan import Plan
from .strategies import PlanError, plan

ISSUED = {  # steps of Python for one block (see `Operation.issued`) of a Llama; GPT-2 has 70
    None: 130, "int8": 330, "nf4": 160, "fp4": 160, "nf4-double": 160, "fp4-double": 160,
}  # fmt: skip
RAM_RATE = 40e9  # bytes a second from RAM, for machines without a GPU
STORED = (None, "int8", "nf4", "nf4-double")
LOSS = {None: 0, "int8": 1, "nf4": 2, "fp4": 3, "nf4-double": 3, "fp4-double": 4}  # rank: how far from the 16-bit model
TARGETS = ("speed", "quality", "memory", "context")


@dataclass(frozen=True)
class Option:
    """One way to run a model: a plan, and what it costs.

    Args:
        plan: where everything lies.
        token: seconds for one token of each sequence, predicted.
        prefill: seconds for a prompt of the whole context, predicted.
        waits: what a token waits for, in seconds: "Python", "GPU", "link", "disk".
        loss: rank of the loss by quantization: 0 none.
        front: whether no other option is at least as good in speed, memory and quality, and better in one.
    """

    plan: Plan
    token: float
    prefill: float
    waits: dict[str, float]
    loss: int
    front: bool = False

    @property
    def label(self) -> str:
        """How the weights are stored, and the strategy."""
        return f"{self.plan.quantization or self.plan.dtype}, {self.plan.strategy}"

    @property
    def bottleneck(self) -> str:
        """What a token waits for longest."""
        return max(self.waits, key=lambda lane: self.waits[lane])

    @property
    def memory(self) -> int:
        """Bytes on all devices that run layers."""
        return sum(share.used for share in self.plan.shares if share.runs)


@dataclass(frozen=True)
class Advice:
    """The ways to run a model on a machine, best first; `cures` say what would have to change if there is none.

    `measured` says whether rates were measured on that machine; else they are the vendors'.
    """

    model: str
    hardware: str
    batch: int
    context: int
    target: str
    options: tuple[Option, ...]
    cures: tuple[str, ...] = field(default=())
    measured: bool = False

    @property
    def best(self) -> Option | None:
        """The first option, or None."""
        return self.options[0] if self.options else None

    @property
    def front(self) -> tuple[Option, ...]:
        """The options that no other beats in speed, memory and quality together."""
        return tuple(option for option in self.options if option.front)

    def explain(self) -> str:
        """The options as a table, and a sentence."""
        head = f"{self.model} on {self.hardware}, batch {self.batch}, context {self.context:,}; best by {self.target}"
        if self.best is None:
            return "\n".join([head, "Nothing fits.", *(f"  {cure}" for cure in self.cures)])
        rows = [
            [("* " if option.front else "  ") + option.label, f"{self.batch / option.token:,.2f}",
             f"{1000 * option.token:,.1f} ms", option.bottleneck, f"{option.prefill:,.2f} s",
             format_bytes(option.memory), format_bytes(option.plan.offloaded),
             f"{option.plan.max_context:,}" if option.plan.max_context else "-"]
            for option in self.options
        ]  # fmt: skip
        headers = ["  stored, strategy", "tokens/s", "token", "waits for", "prefill", "where it runs",
                   "rests elsewhere", "longest context"]  # fmt: skip
        notes = ["* on the front: no other beats it in speed, memory and quality together"]
        if self.measured:
            notes.append("Times follow the rates that bigkit calibrate measured on this machine.")
        return "\n".join([head, "", text_table(headers, rows), "", *notes])

    __str__ = explain

    def __repr__(self) -> str:
        if self.best is None:
            return f"Advice({self.model[:30]} on {self.hardware[:30]}: nothing fits)"
        best = f"{self.best.label}, {self.batch / self.best.token:,.2f} tokens/s"
        return f"Advice({self.model[:30]} on {self.hardware[:24]}: {best}, {len(self.options)} options)"

    def to_json(self) -> str:
        """The options as JSON text; sizes in bytes, times in seconds."""
        options: list[dict[str, Any]] = [
            {"stored": option.plan.quantization or option.plan.dtype, "strategy": option.plan.strategy,
             "token": option.token, "prefill": option.prefill, "waits": option.waits, "loss": option.loss,
             "memory": option.memory, "offloaded": option.plan.offloaded, "max_context": option.plan.max_context,
             "front": option.front, "device_map": option.plan.device_map}
            for option in self.options
        ]  # fmt: skip
        return json.dumps(
            {"model": self.model, "hardware": self.hardware, "batch": self.batch, "context": self.context,
             "target": self.target, "measured": self.measured, "options": options, "cures": self.cures}, indent=1,
        )  # fmt: skip


def advise(
    model: ModelSpec,
    hardware: Hardware,
    batch: int = 1,
    context: int = 2048,
    target: str = "speed",
    *,
    stored: Iterable[str | None] = STORED,
    calibration: Calibration | None = None,
) -> Advice:
    """Rank ways to store and place a model on a machine.

    Args:
        model: the model's skeleton.
        hardware: the machine.
        batch, context: the load: sequences, and tokens of each.
        target: what ranks first: "speed", "quality" (then speed), "memory", or "context" (the longest that fits: the
            plans are then made, and timed, for that).
        stored: quantizations to try; None is 16 bits (bfloat16; float16 on GPUs before Ampere).
        calibration: what was measured on that machine; None takes the one in the ledger if the hardware is this
            machine (`Hardware.detect()`) and `calibrate()` was called here, else the vendors' figures.

    Returns:
        The options that fit, best first; if there are none, what would have to change.

    Raises:
        ValueError: an unknown target.

    >>> from bigkit import zoo
    >>> from bigkit.machine.hardware import HARDWARE
    >>> found = advise(zoo.describe("llama-3.1-8b"), HARDWARE["1 x RTX 4090"])
    >>> found.best.plan.quantization, found.best.plan.offloaded
    (None, 0)
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}: expected one of {', '.join(TARGETS)}")
    half = "float16" if hardware.gpus and hardware.gpus[0].capability < (8, 0) else "bfloat16"
    known = calibration or calibration_of(hardware)
    overhead = hardware.overhead + (known.context - CONTEXT_BYTES if known and known.context else 0)
    options, cures = [], []
    for quantization in stored:
        try:
            found = plan(
                model, hardware.max_memory(), "exact" if target == "context" else "auto", dtype=half,
                quantization=quantization, batch=batch, context=context, overhead=overhead,
            )  # fmt: skip
        except PlanError as error:
            cures.append(f"{quantization or half}: {error.plan.problem}. {error.cure}")
            continue
        options.append(_cost(model, found, hardware, known))
    ranked = sorted(options, key=lambda option: _rank(option, target))
    marked = [
        Option(o.plan, o.token, o.prefill, o.waits, o.loss, not any(_beats(other, o) for other in ranked))
        for o in ranked
    ]
    said = () if marked else (*dict.fromkeys(cures),)
    return Advice(model.name, hardware.name, batch, context, target, tuple(marked), said, known is not None)


def _rank(option: Option, target: str) -> tuple[float, ...]:
    longest = -(option.plan.max_context or 0)
    return {
        "speed": (option.token, option.loss, option.memory),
        "quality": (option.loss, option.token, option.memory),
        "memory": (option.memory, option.token, option.loss),
        "context": (longest, option.token, option.loss),
    }[target]


def _beats(a: Option, b: Option) -> bool:
    mine, other = (a.token, a.memory, a.loss), (b.token, b.memory, b.loss)
    return all(x <= y for x, y in zip(mine, other)) and mine != other


def calibration_of(hardware: Hardware) -> Calibration | None:
    """What the ledger knows of a machine, if it is this one (`Hardware.detect()`)."""
    if not hardware.name.startswith("this machine"):
        return None
    known = Ledger.load().calibrations
    if not hardware.gpus:
        return known.get(machine_key())
    return next((item for item in known.values() if item.gpu == hardware.gpus[0].name), None)


def rates_of(hardware: Hardware, calibration: Calibration | None) -> list[Rates]:
    """The rates of each GPU: measured, else the vendors'."""
    if calibration is None:
        return [Rates.of_gpu(gpu, hardware.disk_rate) for gpu in hardware.gpus]
    return [Rates.of_calibration(calibration, gpu, hardware.disk_rate) for gpu in hardware.gpus]


def _cost(model: ModelSpec, found: Plan, hardware: Hardware, known: Calibration | None) -> Option:
    """What a token and a prompt take under a plan."""
    precision = model.precision(found.dtype, found.quantization)
    shares = {share.device: share for share in found.shares}
    runners = [share for share in found.shares if share.runs]
    bits = dtype_bits(model.computes_in(precision))
    active = _met(model, found.batch)
    flops = 2 * found.batch * _active_parameters(model)
    blocks = max(1, len(model.attention) or model.facts.get("num_hidden_layers", 1))
    speeds = rates_of(hardware, known)
    ram = (known.host_memory if known else None) or RAM_RATE
    issue = speeds[0].issue if speeds else (known.issue if known else None) or 4e-6
    disk = speeds[0].disk if speeds else (known.disk_warm if known else None) or hardware.disk_rate
    products = known.products.get("bfloat16" if bits == 16 else "float32") if known and not speeds else None
    cpu = products[-1][1] if products else 1e11
    reading = computing = 0.0
    for share in runners:
        rate = speeds[share.device] if isinstance(share.device, int) else None
        kept = share.weights + (found.offloaded if share is runners[0] and rate is not None else 0)
        reading += (active * kept + share.kv_cache) / (rate.memory if rate else ram)
        part = kept / max(1, sum(s.weights for s in found.shares))
        computing += part * flops / (rate.table("bfloat16" if bits == 16 else "float32")[-1][1] if rate else cpu)
    away = {name: shares[name].weights for name in ("cpu", "disk") if name in shares and not shares[name].runs}
    link = speeds[0].link if speeds else ram
    waits = {
        "Python": ISSUED[found.quantization] * blocks * issue,
        "GPU" if speeds else "RAM": max(reading, computing),
        "link": (away.get("cpu", 0) + away.get("disk", 0)) / link if speeds else 0.0,
        "disk": away.get("disk", 0) / disk,
    }
    prompt = max(found.context, 1) * computing
    prefill = max(waits["Python"], reading, prompt, waits["link"], waits["disk"])
    return Option(found, max(waits.values()), prefill, waits, LOSS[found.quantization])


def _experts(model: ModelSpec) -> list[str]:
    return [name for name in model.tensors if ".experts." in name]


def _met(model: ModelSpec, batch: int) -> float:
    """The share of the weights that a token of each sequence meets: of experts, those that the router picks.

    With n experts of which k work, b tokens leave one untouched with probability (1 - k/n)^b.
    """
    experts, picked = model.facts.get("num_experts"), model.facts.get("experts_per_token", 1)
    if not experts:
        return 1.0
    names = _experts(model)
    part = sum(model.tensors[name][0].elements for name in names) / max(1, model.parameters)
    return 1 - part * (1 - picked / experts) ** batch


def _active_parameters(model: ModelSpec) -> int:
    """Parameters that one token is multiplied with."""
    experts, picked = model.facts.get("num_experts"), model.facts.get("experts_per_token", 1)
    if not experts:
        return model.parameters
    routed = sum(model.tensors[name][0].elements for name in _experts(model))
    return model.parameters - routed + routed * picked // experts
