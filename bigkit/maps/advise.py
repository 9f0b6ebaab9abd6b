"""What to do with a model and a machine: `advise(...)` ranks ways to store and to place it.

Each way is a plan, and the plan says what a token waits for. Four things work side by side, and the slowest counts:

    Python      issues a number of steps for each block, most where bitsandbytes multiplies
    GPU         reads the weights that rest on it and the KV cache; of experts, those that the router picks
    link        copies what rests in RAM and on disk: whole blocks, but of experts those that the router picks
    disk        reads what rests there, likewise

Several GPUs work one after another. No model is built and nothing is traced: sizes alone, so that 600 B parameters take
as long as one. `dry_run` checks the way that you choose.

Leaves out: speculation, tensor parallelism, and what quantized kernels cost beyond the bytes they read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..devices import Device
from ..machine.hardware import CONTEXT_BYTES, GPUS, Hardware
from ..machine.ledger import Calibration, Ledger, machine_key
from ..machine.roofline import Rates
from ..model.experts import experts_of, visited
from ..model.spec import ModelSpec
from ..units import dtype_bits, format_bytes, format_seconds, text_table
from .plan import Plan, PlanError
from .strategies import place

STORED = (None, "int8", "nf4", "nf4-double")
LOSS = {None: 0, "int8": 1, "nf4": 2, "fp4": 3, "nf4-double": 3, "fp4-double": 4}  # rank: how far from the 16-bit model
TARGETS = ("speed", "quality", "memory", "context")


def _steps() -> dict[str | None, int]:
    return {None: 130, "int8": 330, "nf4": 160, "fp4": 160, "nf4-double": 160, "fp4-double": 160}


@dataclass(frozen=True)
class Assumed:
    """What `advise` counts with where neither `Rates` nor this machine's ledger has a figure.

    Args:
        steps: quantization -> steps of Python for one block (see `Operation.issued`). Counted in dry runs of a Llama;
            GPT-2 has 70 where Llama has 130.
        ram: bytes a second that a CPU reads from RAM. A round figure for a desktop, not measured.
        cpu: operations a second of a CPU's matrix products. An order of magnitude, not measured.
    """

    steps: Mapping[str | None, int] = field(default_factory=_steps)
    ram: float = 40e9
    cpu: float = 1e11


ASSUMED = Assumed()


@dataclass(frozen=True)
class Option:
    """One way to run a model: a plan, and what it costs.

    Args:
        plan: which layer rests on which device.
        token: predicted seconds for one token of each sequence.
        prefill: predicted seconds for a prompt of the whole context.
        waits: "Python", "GPU" (or "RAM"), "link", "disk" -> predicted seconds that it works for a token.
        loss: rank of the loss of quality by quantization; 0 is none.
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
             format_seconds(option.token), option.bottleneck, format_seconds(option.prefill),
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
        best = "nothing fits"
        if self.best is not None:
            best = f"{self.best.label}, {self.batch / self.best.token:,.2f} tokens/s, {len(self.options)} options"
        return f"Advice({self.model[:30]} on {self.hardware[:24]}: {best})"

    def to_json(self) -> str:
        """The options as JSON text; sizes in bytes, times in seconds."""
        names = ("token", "prefill", "waits", "loss", "memory", "front")
        plan_names = ("strategy", "offloaded", "max_context", "device_map")
        options = [
            {"stored": option.plan.quantization or option.plan.dtype}
            | {name: getattr(option, name) for name in names}
            | {name: getattr(option.plan, name) for name in plan_names}
            for option in self.options
        ]
        own = ("model", "hardware", "batch", "context", "target", "measured", "cures")
        return json.dumps({**{name: getattr(self, name) for name in own}, "options": options}, indent=1)


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
    >>> advice = advise(zoo.describe("llama-3.1-8b"), HARDWARE["1 x RTX 4090"])
    >>> advice.best.plan.quantization, advice.best.plan.offloaded
    (None, 0)
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}: expected one of {', '.join(TARGETS)}")
    half = "float16" if hardware.gpus and hardware.gpus[0].capability < (8, 0) else "bfloat16"
    calibration = calibration or calibration_of(hardware)
    overhead = hardware.overhead
    if calibration and calibration.context:
        overhead += calibration.context - CONTEXT_BYTES
    options, cures = [], []
    for quantization in stored:
        try:
            plan = place(
                model, hardware.max_memory(), "exact" if target == "context" else "auto", dtype=half,
                quantization=quantization, batch=batch, context=context, overhead=overhead,
            )  # fmt: skip
            options.append(_predict(model, plan, hardware, calibration))
        except PlanError as error:
            cures.append(f"{quantization or half}: {error.plan.problem}. {error.cure}")
    ranked = sorted(options, key=lambda option: _rank(option, target))
    marked = tuple(replace(a, front=not any(_beats(b, a) for b in ranked)) for a in ranked)
    needed = () if marked else tuple(dict.fromkeys(cures))
    return Advice(model.name, hardware.name, batch, context, target, marked, needed, calibration is not None)


def _rank(option: Option, target: str) -> tuple[float, ...]:
    speed, quality, memory = option.token, option.loss, option.memory
    return {
        "speed": (speed, quality, memory),
        "quality": (quality, speed, memory),
        "memory": (memory, speed, quality),
        "context": (-(option.plan.max_context or 0), speed, quality),
    }[target]


def _beats(a: Option, b: Option) -> bool:
    mine, other = (a.token, a.memory, a.loss), (b.token, b.memory, b.loss)
    return all(x <= y for x, y in zip(mine, other)) and mine != other


def calibration_of(hardware: Hardware) -> Calibration | None:
    """What the ledger has on a machine, if it is this one (`Hardware.detect()`)."""
    if not hardware.name.startswith("this machine"):
        return None
    calibrations = Ledger.load().calibrations
    if not hardware.gpus:
        return calibrations.get(machine_key())
    return next((item for item in calibrations.values() if item.gpu == hardware.gpus[0].name), None)


def rates_of(hardware: Hardware, calibration: Calibration | None) -> list[Rates]:
    """The rates of each GPU: measured, else the vendors'."""
    if calibration is None:
        return [Rates.of_gpu(gpu, hardware.disk_rate) for gpu in hardware.gpus]
    return [Rates.of_calibration(calibration, gpu, hardware.disk_rate) for gpu in hardware.gpus]


def _all_rates(hardware: Hardware, calibration: Calibration | None) -> dict[Device, Rates]:
    """The rates of every device that may run layers, the CPU among them."""
    cpu = replace(
        Rates.of_gpu(GPUS["A100-80GB"], hardware.disk_rate),
        memory=ASSUMED.ram,
        products={"float32": ((1, ASSUMED.cpu),)},
    )
    if calibration:
        measured: dict[str, Any] = {
            "memory": calibration.host_memory, "products": calibration.products, "issue": calibration.issue,
            "disk": calibration.disk_warm,
        }  # fmt: skip
        cpu = replace(cpu, **{name: value for name, value in measured.items() if value})
    return {"cpu": cpu, **dict(enumerate(rates_of(hardware, calibration)))}


def _predict(model: ModelSpec, plan: Plan, hardware: Hardware, calibration: Calibration | None) -> Option:
    """What a token and a prompt take under a plan."""
    rates = _all_rates(hardware, calibration)
    runners = [share for share in plan.shares if share.runs]
    first = rates[runners[0].device]
    on_gpus = runners[0].device != "cpu"
    bits = dtype_bits(model.computes_in(model.precision(plan.dtype, plan.quantization)))
    blocks = max(1, len(model.attention) or model.facts.get("num_hidden_layers", 1))
    routed = sum(experts.parameters for experts in experts_of(model))
    picked = _picked(model, 1)
    used = 1 - (1 - _picked(model, plan.batch)) * routed / max(1, model.parameters)  # share of the weights
    flops = 2 * plan.batch * (model.parameters - (1 - picked) * routed)
    total = max(1, sum(share.weights for share in plan.shares))
    reading = computing = 0.0
    for share in runners:
        rate = rates[share.device]
        weights = share.weights + (plan.offloaded if on_gpus and share is runners[0] else 0)
        reading += (used * weights + share.kv_cache) / rate.memory
        computing += weights / total * flops / rate.table("bfloat16" if bits == 16 else "float32")[-1][1]
    on_disk = sum(share.weights for share in plan.shares if share.device == "disk")
    link, disk = plan.offloaded / first.link if on_gpus else 0.0, on_disk / first.disk
    travels = _picked(model, plan.batch) if plan.experts else 1.0  # of experts that are apart, those that are chosen
    waits = {
        "Python": ASSUMED.steps[plan.quantization] * blocks * first.issue,
        "GPU" if on_gpus else "RAM": max(reading, computing),
        "link": link * travels,
        "disk": disk * travels,
    }
    prompt = max(plan.context, 1) * computing
    prefill = max(waits["Python"], reading, prompt, link, disk)
    return Option(plan, max(waits.values()), prefill, waits, LOSS[plan.quantization])


def _picked(model: ModelSpec, tokens: int) -> float:
    """The share of the routed experts that some of so many tokens visit; 1 in a model without experts."""
    experts = model.facts.get("num_experts")
    return visited(tokens, model.facts.get("experts_per_token", 1), experts) if experts else 1.0
