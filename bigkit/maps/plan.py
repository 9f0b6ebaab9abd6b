"""The `Plan`: which layer rests on which device, as plain data.

A plan is what a strategy returns, what a device map shows, what a picture draws, what a dry run executes, what dispatch
applies and what JSON stores. It never changes.

Leaves out: finding a plan (`maps/strategies.py`) and drawing one (`draw/canvas.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from ..devices import Device, collapse, device_label, placement
from ..machine.hardware import named_machine
from ..model.estimate import load_text
from ..units import GiB, counted, format_bytes
from .experts import is_apart, why_apart
from .links import DeviceMap
from .llama_cpp import llama_cpp_command, llama_cpp_flags


@dataclass(frozen=True)
class Placed:
    """One layer of a plan: its name, class, bytes at rest and device; and if it rests there only, where it works."""

    name: str
    cls: str
    bytes: int
    device: Device
    works: Device | None = None


@dataclass(frozen=True)
class Share:
    """What one device holds, in bytes.

    Args:
        device: a GPU's number, "mps", "cpu" or "disk".
        budget: the most it may hold; None for no limit.
        runs: whether it runs layers, or only keeps them for devices that do.
        weights: the layers that rest here, tied tensors once.
        kv_cache: the cache of the layers that run here, offloaded ones included.
        activations: working memory of the largest step.
        reserve: room for offloaded layers in flight, and for their buffers if these stay.
        overhead: what the runtime itself takes (the CUDA context).
        why: why the stretch ends where it does.
    """

    device: Device
    budget: int | None
    runs: bool
    weights: int = 0
    kv_cache: int = 0
    activations: int = 0
    reserve: int = 0
    overhead: int = 0
    why: str = ""

    @property
    def used(self) -> int:
        """All parts together."""
        return self.weights + self.kv_cache + self.activations + self.reserve + self.overhead

    @property
    def over(self) -> int:
        """Bytes above the budget (0 in every feasible plan)."""
        return 0 if self.budget is None else max(0, self.used - self.budget)


@dataclass(frozen=True)
class Plan:
    """A placement: plain data that can be drawn, stored, rehearsed and applied.

    Args:
        model: the model's name.
        strategy: how it was found ("custom" for a given map).
        dtype, quantization: how the weights are stored.
        batch, context: the load it was made for (sequences, tokens each).
        max_context: the longest context that this placement can hold and the model's positions reach, in tokens; None
            if nothing grows with it.
        shares: what each device holds, in the order GPUs, RAM, disk.
        layers: every layer in the model's order, with its device.
        problem: why the plan is not feasible; empty if it is.
        slots: offloaded layers that each device holds in flight where such work (the `slots` of `dispatch_model`); 0 if
            none is offloaded.
        library: where the model comes from; see `ModelSpec`.
        options: what else the plan was made with, by the names of `bigkit.plan`'s arguments.
        stored: how the weights are stored, in words.
        positions: tokens that the model has positions for, or was trained with; None if nothing says so.
        notes: what must be said beside the figures, in sentences.
        experts: if experts are placed apart from their blocks, how many a token takes, and of how many.
        on_cpu: if the CPU computes MLPs that rest in RAM, the bytes of these and its threads; see `maps/on_cpu.py`.
    """

    model: str
    strategy: str
    dtype: str | None
    quantization: str | None
    batch: int
    context: int
    max_context: int | None
    shares: tuple[Share, ...]
    layers: tuple[Placed, ...]
    problem: str = ""
    slots: int = 0
    library: str = ""
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    stored: str = ""
    positions: int | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)
    experts: tuple[int, int] | None = None
    on_cpu: tuple[int, int] | None = None

    @property
    def feasible(self) -> bool:
        """Whether every device stays within its budget and every layer can run."""
        return not self.problem

    @property
    def used(self) -> dict[Device, int]:
        """Device -> bytes, reserve and overhead included."""
        return {share.device: share.used for share in self.shares}

    @property
    def budget(self) -> dict[Device, int | None]:
        """Device -> the most bytes it may hold (None: no limit)."""
        return {share.device: share.budget for share in self.shares}

    @cached_property
    def device_map(self) -> dict[str, Device]:
        """Module name -> device as a plain dict; a module that is whole on one device is one entry.

        It knows where what rests in RAM or on disk works (`links.DeviceMap`). A copy of it as a plain dict does not:
        then all GPUs that it names take turns. The plan itself brings its number of slots, too; else there are two.
        """
        inner = {layer.name for layer in is_apart(self.layers)}
        whole = collapse({layer.name: layer.device for layer in self.layers if layer.name not in inner})
        device_of = placement(whole)
        own = {layer.name: layer.device for layer in self.layers if layer.name in inner}
        apart = {name: device for name, device in own.items() if device != device_of(name)}
        works = {layer.name: layer.works for layer in self.layers if layer.works is not None}
        return DeviceMap({**whole, **apart}, works) if works else {**whole, **apart}

    @property
    def offloaded(self) -> int:
        """Bytes of weights that rest on a device that does not run them."""
        return sum(share.weights for share in self.shares if not share.runs)

    @property
    def longest(self) -> str:
        """The longest context in words; empty if nothing grows with it."""
        if self.max_context is None:
            return ""
        trained = self.positions is not None and self.positions < self.max_context
        return f"{self.max_context:,} tokens" + (f" (trained for {self.positions:,})" if trained else "")

    def explain(self) -> str:
        """The plan in sentences: which layers rest where, and why each boundary stands where it does."""
        stored = f"{self.quantization} (the rest {self.dtype})" if self.quantization else self.stored
        load = load_text(self.batch, self.context, self.options.get("kv_dtype"))
        lines = [f"{self.model}, {stored}, strategy {self.strategy!r}, {load}:"]
        for share in self.shares:
            own = [layer.name for layer in self.layers if layer.device == share.device]
            if not own and not share.used:
                lines.append(f"  {device_label(share.device)}: empty. {share.why}".rstrip())
                continue
            limit = "no limit" if share.budget is None else format_bytes(share.budget)
            full = f", {100 * share.used / share.budget:.0f} %" if share.budget else ""
            held = _stretches(self.layers, share.device) or "no layer rests here"
            lines.append(f"  {device_label(share.device)}: {format_bytes(share.used)} of {limit}{full}. {held}.")
            parts = [
                f"{name.replace('_', ' ')} {format_bytes(getattr(share, name))}"
                for name in ("weights", "kv_cache", "activations", "reserve", "overhead")
                if getattr(share, name)
            ]
            lines.append(f"      {' + '.join(parts)}." + (f" {share.why}" if share.why else ""))
        if about := why_apart(self, self.experts):
            flags = llama_cpp_flags(self) if self.library != "gguf" else ""
            lines += [f"  {about}", *([f"  llama.cpp places them so with {flags}"] if flags else [])]
        if self.library == "gguf" and self.feasible:
            there = ", where the CPU works on what rests in RAM" * bool(self.offloaded)
            lines.append(f"  Run it with llama.cpp{there}: {llama_cpp_command(self)}")
        if self.longest:
            lines.append(f"  Longest context this placement holds: {self.longest}.")
        lines += [f"  {note}" for note in self.notes]
        lines.append(f"  NOT FEASIBLE: {self.problem}" if self.problem else "  Every device is within its budget.")
        return "\n".join(lines)

    def to_code(self) -> str:
        """Python that makes this plan again; of a model that has no name, from the variable `model`."""
        budgets = {share.device: share.budget for share in self.shares if share.budget is not None}
        overhead = max((share.overhead for share in self.shares), default=0)
        machine = named_machine(budgets, overhead)
        arguments: dict[str, Any] = {
            "hardware": machine,
            "max_memory": {device: format_bytes(size, "exact") for device, size in budgets.items()},
            "strategy": self.device_map if self.strategy == "custom" else self.strategy,
            "dtype": self.dtype,
            "quantization": self.quantization,
            "batch": self.batch,
            "context": self.context,
            "overhead": format_bytes(overhead, "exact") if overhead else None,
            "strict": None if self.feasible else False,
            "on_cpu": True if self.on_cpu else None,
            **self.options,
        }
        if machine:  # it has both
            del arguments["max_memory"], arguments["overhead"]
        given = (f"    {name}={value!r},\n" for name, value in arguments.items() if value not in (None, "auto"))
        name, note = repr(self.model), ""
        if self.library == "module":
            name, note = "model", f"# A plan does not hold its model: here `model` is your {self.model}.\n"
        call = f"p = plan(\n    {name},\n{''.join(given)})"
        return f"from bigkit import plan\n\n{note}{call}\ndevice_map = p.device_map\n"

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """The inverse of `to_json`.

        Raises:
            ValueError: the text is not the JSON of a plan.
        """
        try:
            data = json.loads(text)
            shares = tuple(Share(**share) for share in data.pop("shares"))
            layers = tuple(Placed(**layer) for layer in data.pop("layers"))
            pairs: Any = {name: tuple(data.pop(name, None) or ()) or None for name in ("experts", "on_cpu")}
            notes = tuple(data.pop("notes", ()))
            return Plan(shares=shares, layers=layers, notes=notes, **pairs, **data)
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"this is not the JSON of a bigkit Plan: {error}") from error

    def __repr__(self) -> str:
        loads = ", ".join(
            f"{share.device}: {share.used / GiB:.1f}" + ("" if share.budget is None else f"/{share.budget / GiB:.4g}")
            for share in self.shares
            if share.used
        )
        verdict = "fits" if self.feasible else "DOES NOT FIT"
        text = f"Plan({self.model} {self.stored} {self.strategy}, {verdict}, GiB {{{loads}}})"
        return text if len(text) < 110 else text[:105] + "...)"

    __str__ = explain


def _stretches(layers: Sequence[Placed], device: Device) -> str:
    """The runs of layers on a device, as "embed .. h.3 (5 layers), head"."""
    runs: list[list[str]] = []
    previous: Device | None = None
    experts = is_apart(layers)
    inner = {layer.name for layer in experts}
    for layer in (layer for layer in layers if layer.name not in inner):
        if layer.device == device:
            if previous == device:
                runs[-1].append(layer.name)
            else:
                runs.append([layer.name])
        previous = layer.device
    texts = [run[0] if len(run) == 1 else f"{run[0]} .. {run[-1]} ({len(run)} layers)" for run in runs[:4]]
    here = sum(layer.device == device for layer in experts)
    texts += [f"and {len(runs) - 4} more runs"] if len(runs) > 4 else []
    return ", ".join([*texts, *([f"the experts of {counted(here, 'block')}"] if here else [])]).replace(", and", " and")


class PlanError(ValueError):
    """No placement keeps every device within its budget. The message says by how much, and what would help.

    `plan` is the placement that comes closest, `cure` the sentence that says what would help.
    """

    def __init__(self, plan: Plan, cure: str) -> None:
        super().__init__(f"{plan.model} does not fit: {plan.problem}. {cure}")
        self.plan, self.cure = plan, cure

    def __reduce__(self) -> tuple[type[PlanError], tuple[Plan, str]]:
        return type(self), (self.plan, self.cure)
