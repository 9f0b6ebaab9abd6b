"""What to do with a model and a machine: `advise(...)` ranks ways to store and to place it.

Each way is a plan, and the plan says what a token waits for (`predict.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial

from ..devices import Device
from ..machine.hardware import Hardware
from ..machine.ledger import Calibration, calibration_of, overhead_of
from ..model.attention import kv_dtype_name
from ..model.estimate import generates, load_text, longest_context, remarks, tokens_seen, whole_number
from ..model.spec import ModelSpec, Precision
from ..model.stored import is_as_stored
from ..units import format_bytes, format_seconds, text_table
from . import on_cpu
from .cures import cures
from .draft import ACCEPTANCE, Speculation, best_guesses, draft_bytes, keep_room, warning
from .links import links_of
from .partition import last_true
from .plan import Plan
from .predict import Option, picked, predict
from .strategies import place
from .task import LONGEST

STORED = (None, "int8", "nf4", "nf4-double")
TARGETS = ("speed", "quality", "memory", "context")


@dataclass(frozen=True)
class Advice:
    """The ways to run a model on a machine, best first; `cures` say what would have to change if there is none.

    `misfits` are the plans of the ways that do not fit, the closest first. `measured` says whether rates were measured
    on that machine; else they are the vendors'. `notes` are what must be said beside the figures, `kv_dtype` that of
    keys and values in the cache (None: as the model computes).
    """

    model: str
    hardware: str
    batch: int
    context: int
    target: str
    options: tuple[Option, ...]
    cures: tuple[str, ...] = field(default=())
    measured: bool = False
    notes: tuple[str, ...] = ()
    kv_dtype: str | None = None
    misfits: tuple[Plan, ...] = ()

    @property
    def best(self) -> Option | None:
        """The first option, or None."""
        return self.options[0] if self.options else None

    @property
    def front(self) -> tuple[Option, ...]:
        """The options worth a thought: each is more exact than all that are better by the target."""
        return tuple(option for option in self.options if option.front)

    @property
    def verdict(self) -> str:
        """Whether the model fits and how fast it is, in one line."""
        best = self.best
        if best is None:
            return "Does not fit."
        stored = best.label if best.label.endswith("as stored") else f"stored as {best.label}"
        return f"{best.fit}: {best.pace}, {stored}."

    @property
    def ways(self) -> list[tuple[Plan, Option | None]]:
        """The plan of every way that was tried, best first, with its option if it fits."""
        return [*((option.plan, option) for option in self.options), *((plan, None) for plan in self.misfits)]

    def explain(self) -> str:
        """A verdict, and the options as a table."""
        load = load_text(self.batch, self.context, self.kv_dtype)
        head = [self.verdict, f"{self.model} on {self.hardware}, {load}; best by {self.target}"]
        if self.best is None:
            return "\n".join([*head, *(f"  {cure}" for cure in self.cures), *self.notes])
        rows = [
            [("* " if option.front else "  ") + option.label, option.speed, option.bottleneck,
             format_seconds(option.prefill), format_bytes(option.memory), format_bytes(option.plan.offloaded),
             f"{option.plan.max_context:,}" if option.plan.max_context else "-"]
            for option in self.options
        ]  # fmt: skip
        rows += [[f"  {plan.stored}", "does not fit", *4 * ["-"], "-"] for plan in self.misfits]
        headers = ["  stored as", "speed", "waits for", "prefill", "memory", "elsewhere", "longest context"]
        if any(option.speculation for option in self.options):
            headers.append("with the draft")
            said = [option.speculation.text if option.speculation else "-" for option in self.options]
            rows = [[*row, text] for row, text in zip(rows, [*said, *["-"] * len(self.misfits)])]
        notes = ["* more exact than all above it", *self.notes]
        if self.measured:
            notes.append("Times follow the rates that bigkit calibrate measured on this machine.")
        return "\n".join([*head, "", text_table(headers, rows), "", *notes])

    __str__ = explain

    def __repr__(self) -> str:
        best = "nothing fits"
        if self.best is not None:
            best = f"{self.best.label}, {self.best.speed}, {len(self.options)} options"
        return f"Advice({self.model[:30]} on {self.hardware[:24]}: {best})"

    def to_json(self) -> str:
        """The options as JSON text; sizes in bytes, times in seconds."""
        names = ("token", "prefill", "speed", "waits", "loss", "memory", "front")
        plan_names = ("strategy", "offloaded", "max_context", "device_map")
        options = [
            {"stored": option.plan.stored}
            | {name: getattr(option, name) for name in names}
            | {name: getattr(option.plan, name) for name in plan_names}
            | ({"speculation": asdict(option.speculation)} if option.speculation else {})
            for option in self.options
        ]
        own = ("model", "hardware", "batch", "context", "target", "measured", "cures", "notes", "kv_dtype")
        misfits = {plan.stored: plan.problem for plan in self.misfits}
        content = {**{name: getattr(self, name) for name in own}, "options": options, "misfits": misfits}
        return json.dumps(content, indent=1)


def advise(
    model: ModelSpec,
    hardware: Hardware,
    batch: int = 1,
    context: int = 2048,
    target: str = "speed",
    *,
    stored: Iterable[str | None] = STORED,
    kv_dtype: object = None,
    calibration: Calibration | None = None,
    draft: ModelSpec | None = None,
    acceptance: float = ACCEPTANCE,
) -> Advice:
    """Rank ways to store and place a model on a machine.

    Args:
        model: the model's skeleton.
        hardware: the machine.
        batch, context: the load: sequences, and tokens of each.
        target: what ranks first: "speed", "quality" (then speed), "memory" (on all devices together), or "context" (the
            longest that fits, as many weights as need be resting elsewhere, and that the model was trained for: the
            plans are then made, and timed, for that).
        stored: quantizations to try; None is as a quantized checkpoint has it, or else 16 bits
            (bfloat16; float16 on GPUs before Ampere).
        kv_dtype: of keys and values in the cache, see `place`; what it takes to decode them is not timed.
        calibration: what was measured on that machine; None takes the one in the ledger if the hardware is this
            machine (`Hardware.detect()`) and `calibrate()` was called here, else the vendors' figures.
        draft: a small model that guesses tokens for this one to check; every plan keeps room for it.
        acceptance: probability that a guess is accepted, see `measure.acceptance`.

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
    batch, context = whole_number(batch, "batch", 1), whole_number(context, "context")
    half = "float16" if hardware.gpus and hardware.gpus[0].capability < (8, 0) else "bfloat16"
    calibration = calibration or calibration_of(hardware)
    overhead = overhead_of(hardware, calibration)
    options, misfits, said = list[Option](), list[tuple[Plan, partial[Plan]]](), list[str]()
    budgets: Mapping[Device, int | str] = hardware.max_memory()
    if draft is not None:
        budgets, room = keep_room(budgets, draft_bytes(draft, half, batch, context), draft.name)
        said.append(room)
    for quantization in [stored] if isinstance(stored, str) else stored:
        if quantization and not model.quantized(model.precision(half, quantization)):
            continue  # no layer of the model can be
        stays = quantization is None and (is_as_stored(model, Precision()) or model.library == "gguf")
        ask = partial(
            place, model, budgets, dtype=None if stays else half, quantization=quantization, batch=batch,
            overhead=overhead, kv_dtype=kv_dtype, links=links_of(hardware, calibration),
        )  # fmt: skip
        plan = ask(context=context, strict=False)
        if not plan.feasible:
            misfits.append((plan, ask))
        elif target == "context" and plan.max_context is not None:
            plan = _longest(ask, plan.context, max(plan.context, longest_context(model.facts) or LONGEST))
        said += plan.notes
        if plan.feasible:
            options.append(predict(model, plan, hardware, calibration))
            if calibration and calibration.cpu_reads:
                _, about = best_with_cpu(model, partial(ask, context=plan.context), hardware, calibration)
                said += [f"{plan.stored}: {about}"] if about else []
    if draft is not None and generates(model):
        options = [replace(option, speculation=_speculation(model, option, draft, acceptance, hardware, calibration))
                   for option in options]  # fmt: skip
        most = max((option.speculation.guesses for option in options if option.speculation), default=0)
        said += [said for said in [warning(model, partial(picked, model), most or 4)] if said]
    ranked = sorted(options, key=lambda option: _rank(option, target))
    fronts = [all(option.loss < better.loss for better in ranked[:i]) for i, option in enumerate(ranked)]
    marked = tuple(replace(option, front=front) for option, front in zip(ranked, fronts))
    misfits.sort(key=lambda misfit: sum(share.over for share in misfit[0].shares))  # what is closest to fit first
    notes = tuple(dict.fromkeys([*remarks(model.name, model.facts, context), *said]))
    if is_as_stored(model, Precision()) and any(option.plan.quantization for option in marked):
        notes += ("Ways other than as stored need a checkpoint that is not quantized.",)
    if not generates(model) and "vocab_size" not in model.facts:
        notes += ("Times are the least that a pass takes: its operations do not follow from sizes.",)
    return Advice(
        model.name, hardware.name, batch, tokens_seen(model, context), target, marked,
        () if marked else cures(model, misfits, context, hardware, calibration),
        calibration is not None, notes, kv_dtype_name(kv_dtype), tuple(plan for plan, _ in misfits),
    )  # fmt: skip


def _longest(ask: Callable[..., Plan], least: int, most: int) -> Plan:
    """The plan for the longest context that is feasible, in steps of 256 tokens."""
    steps = last_true(lambda n: ask(context=256 * n, strict=False).feasible, least // 256, most // 256)
    return ask(context=max(least, 256 * steps))


def _rank(option: Option, target: str) -> tuple[float, ...]:
    speed, quality, memory = option.seconds, option.loss, option.memory
    return {
        "speed": (speed, quality, memory),
        "quality": (quality, speed, memory),
        "memory": (memory, speed, quality),
        "context": (-option.plan.context, speed, quality),
    }[target]


def best_with_cpu(
    model: ModelSpec, ask: Callable[..., Plan], hardware: Hardware, calibration: Calibration | None
) -> tuple[Plan, str]:
    """The plan in which the CPU computes MLPs, and a sentence: with as many slots as make a token shortest.

    Args:
        model, hardware, calibration: see `predict`.
        ask: a function from `slots` to a plan (see `place`).
    """
    best: tuple[float, Plan, str] | None = None
    alone = 0.0
    for slots in on_cpu.SLOTS:
        plan = ask(slots=slots, strict=False) if slots else ask()
        option = predict(model, plan, hardware, calibration)
        if best is None and (option.bottleneck != "link" or option.token is None):
            return plan, ""
        gpu, python = option.waits.get("GPU", 0.0), option.waits["Python"]
        alone = option.seconds if best is None else alone
        plan, seconds, about = on_cpu.with_cpu(model, plan, calibration, alone, gpu, python)
        if best is None or (plan.feasible and seconds < best[0]):
            best = seconds, plan, about
    assert best is not None
    return best[1:]


def _speculation(
    model: ModelSpec, option: Option, draft: ModelSpec, acceptance: float, hardware: Hardware,
    calibration: Calibration | None,
) -> Speculation:  # fmt: skip
    """What a draft brings to one way to run a model."""
    assert option.token is not None

    def seconds(tokens: int) -> float:
        return predict(model, replace(option.plan, context=tokens), hardware, calibration).prefill

    alone = place(draft, {next(iter(hardware.max_memory())): 2**60}, dtype=option.plan.dtype, batch=option.plan.batch)
    guess = predict(draft, alone, hardware, calibration).token
    if guess is None:
        raise ValueError(f"the draft {draft.name} does not generate: give a small model of the same tokens")
    return best_guesses(acceptance, option.token, seconds, guess, draft.name)
