"""A run that has not happened: `dry_run(...)` executes a model on fake GPUs and says what the real ones would hold.

The real code of the model runs, operation by operation, on devices that do not exist (`rehearse.py`). What it asks for
is played through a model of PyTorch's allocator (`machine/allocator.py`), which says how much each device has allocated
and reserved at every moment; what it computes and moves is timed with a roofline (`machine/roofline.py`).

    peak_allocated   what `torch.cuda.max_memory_allocated()` would say
    peak_reserved    what `torch.cuda.max_memory_reserved()` would say; this, and the CUDA context, must fit

Leaves out: pictures (`bigkit.draw.dryrun`), and what happens once for a process (see `machine/roofline.py`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoints.as_stored import AsStored, keep_as_stored
from ..devices import Device, device_label, read_device, whole_on
from ..machine.allocator import CachingAllocator, OutOfMemory, Recording, replay
from ..machine.hardware import CONTEXT_BYTES, HARDWARE, Hardware, machine_of
from ..machine.ledger import Calibration, calibration_of, overhead_of
from ..machine.roofline import Operation, Rates, StepTime, run_steps
from ..machine.streams import Span
from ..maps.advise import rates_of
from ..maps.links import DeviceMap, links_of
from ..maps.plan import Plan
from ..maps.strategies import place
from ..meta.skeleton import spec_from_module
from ..model.config import facts
from ..model.estimate import remarks
from ..model.stored import tensors_told
from ..quantize.load import BnbQuantizationConfig
from ..units import format_bytes, format_seconds, three_figures
from .export import chrome_trace
from .rehearse import rehearse, target_of
from .replay import Unlike
from .workload import Workload, in_words

KINDS = ("weights", "slots", "KV cache", "activations", "workspace")


@dataclass(frozen=True)
class Timeline:
    """What one device holds, event by event. An event is a request for memory, or a free.

    Args:
        device: the GPU's number.
        allocated, reserved: bytes after each event.
        kinds: kind -> bytes that live requests of that kind asked for, after each event.
        marks: (name of the step, number of events up to its end).
        capacity: bytes that the allocator can have: the device's memory without the CUDA context; None if unknown.
    """

    device: Device
    allocated: Sequence[int]
    reserved: Sequence[int]
    kinds: Mapping[str, Sequence[int]]
    marks: Sequence[tuple[str, int]]
    capacity: int | None = None

    @property
    def peak_allocated(self) -> int:
        """The most bytes that were allocated at any moment."""
        return max(self.allocated, default=0)

    @property
    def peak_reserved(self) -> int:
        """The most bytes that were reserved at any moment."""
        return max(self.reserved, default=0)

    def at_peak(self) -> dict[str, int]:
        """Kind -> bytes at the moment when most was allocated."""
        if not self.allocated:
            return dict.fromkeys(KINDS, 0)
        moment = max(range(len(self.allocated)), key=self.allocated.__getitem__)
        return {kind: values[moment] for kind, values in self.kinds.items()}

    def step_of(self, event: int) -> str:
        """The step in which an event lies: "fill", "prefill", "token 1", ..."""
        return next((name for name, end in self.marks if event < end), "end")


@dataclass(frozen=True)
class DryRun:
    """The memory and the time that a run would need.

    Args:
        model: the model's name.
        load: the work.
        device_map: module name -> where it rests.
        hardware: the machine's name.
        recordings: device -> what was asked of its allocator.
        kinds: device -> what each request was for, one of `KINDS`.
        operations, steps: see `roofline.run_steps`.
        rates: device -> the rates by which times are predicted.
        capacity: device -> bytes that its allocator can have.
        asked: the work in words.
        notes: what must be said beside the figures.
    """

    model: str
    load: Workload
    device_map: Mapping[str, Device]
    hardware: str
    recordings: Mapping[Device, Recording] = field(repr=False)
    kinds: Mapping[Device, Sequence[str]] = field(repr=False)
    operations: Sequence[Operation] = field(repr=False)
    steps: Sequence[tuple[str, int]] = field(repr=False)
    rates: Mapping[str, Rates] = field(repr=False)
    capacity: Mapping[Device, int] = field(repr=False)
    asked: str = ""
    notes: tuple[str, ...] = ()

    @cached_property
    def timelines(self) -> dict[Device, Timeline]:
        """Device -> its timeline, with unlimited memory."""
        return {device: self._timeline(device) for device in self.recordings}

    def timeline(self, device: Device = 0) -> Timeline:
        """One device's timeline.

        Raises:
            KeyError: nothing ran there.
        """
        return self.timelines[read_device(device)]

    @property
    def peak_allocated(self) -> dict[Device, int]:
        """Device -> what `torch.cuda.max_memory_allocated` would say."""
        return {device: line.peak_allocated for device, line in self.timelines.items()}

    @property
    def peak_reserved(self) -> dict[Device, int]:
        """Device -> what `torch.cuda.max_memory_reserved` would say, with unlimited memory."""
        return {device: line.peak_reserved for device, line in self.timelines.items()}

    @cached_property
    def problem(self) -> str:
        """Why the run would fail; empty if it fits.

        A device that is full gives its free segments back before it fails, as the real allocator does.
        """
        for device, recording in self.recordings.items():
            if (failed := self.fails_with(device, self.capacity.get(device))) is not None:
                line = self.timelines[device]
                step = line.step_of(failed)
                return (
                    f"{device_label(device)} runs out of memory in step {step!r} (event {failed + 1:,} of "
                    f"{len(recording.events):,}): {format_bytes(line.peak_allocated)} would be allocated at the peak, "
                    f"and its allocator can have {format_bytes(self.capacity[device])}"
                )
        return ""

    @property
    def fits(self) -> bool:
        """Whether no device runs out of memory."""
        return not self.problem

    def fails_with(self, device: Device, capacity: int | None) -> int | None:
        """The event at which a device with so many bytes runs out of memory, or None.

        >>> run = dry_run("pygpt", batch_size=1, prompt_tokens=8)
        >>> run.fails_with(0, run.peak_reserved[0]), run.fails_with(0, run.peak_allocated[0] // 2) is None
        (None, False)
        """
        device = read_device(device)
        if capacity is None or self.peak_reserved[device] <= capacity:
            return None
        gpu = CachingAllocator(capacity)
        blocks = []
        for i, event in enumerate(self.recordings[device].events):
            try:
                if event > 0:
                    blocks.append(gpu.malloc(event))
                else:
                    gpu.free(blocks[-event - 1])
            except OutOfMemory:
                return i
        return None

    @cached_property
    def _times_and_spans(self) -> tuple[list[StepTime], list[Span]]:
        spans: list[Span] = []
        return run_steps(self.operations, self.steps, self.rates, spans), spans

    @property
    def times(self) -> list[StepTime]:
        """The prefill and each token: seconds, and how long each lane was busy."""
        return self._times_and_spans[0]

    @property
    def spans(self) -> list[Span]:
        """What each lane did, and when."""
        return self._times_and_spans[1]

    @property
    def seconds(self) -> dict[str, float]:
        """ "prefill", and "token": the mean of the tokens generated (only if some were)."""
        if not self.times:
            return {}
        prefill, *tokens = (step.seconds for step in self.times)
        return {"prefill": prefill, **({"token": sum(tokens) / len(tokens)} if tokens else {})}

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of all sequences together while decoding; 0 if none were generated."""
        return self.load.batch / self.seconds["token"] if "token" in self.seconds else 0.0

    @property
    def speed(self) -> str:
        """The same in words; empty if no tokens were generated."""
        return f"{three_figures(self.tokens_per_second)} tokens/s" if self.tokens_per_second else ""

    @property
    def busy(self) -> dict[str, float]:
        """Lane -> the share of the whole time that it works."""
        whole = sum(step.seconds for step in self.times) or 1.0
        lanes = dict.fromkeys(lane for step in self.times for lane in step.busy)
        return {lane: sum(step.busy.get(lane, 0.0) for step in self.times) / whole for lane in lanes}

    def explain(self) -> str:
        """The run as a short story."""
        lines = [f"{self.model} on {self.hardware}: {self.asked}"]
        for device, line in self.timelines.items():
            parts = ", ".join(f"{kind} {format_bytes(n)}" for kind, n in line.at_peak().items() if n)
            limit = f" of {format_bytes(line.capacity)}" if line.capacity else ""
            lines.append(
                f"  {device_label(device)}: {format_bytes(line.peak_allocated)} allocated, "
                f"{format_bytes(line.peak_reserved)} reserved{limit}; at the peak: {parts}"
            )
        for name, seconds in self.seconds.items():
            step = self.times[0] if name == "prefill" else self.times[-1]
            lines.append(f"  {name}: {format_seconds(seconds)}, longest busy: {step.bottleneck}")
        lines += [f"  {text}" for text in (self.speed, *self.notes) if text]
        lines.append(f"  DOES NOT FIT: {self.problem}" if self.problem else "  Fits.")
        return "\n".join(lines)

    __str__ = explain

    def __repr__(self) -> str:
        peak = max(self.peak_reserved.values(), default=0)
        verdict = "fits" if self.fits else "OUT OF MEMORY"
        text = f"DryRun({self.model}, {self.asked}: {verdict}, peak {format_bytes(peak)})"
        return text if len(text) < 110 else text[:105] + "...)"

    def to_json(self) -> str:
        """The figures as JSON text: peaks and their parts in bytes, times in seconds."""
        devices = {
            str(device): {
                "peak_allocated": line.peak_allocated,
                "peak_reserved": line.peak_reserved,
                "capacity": line.capacity,
                "at_peak": line.at_peak(),
            }
            for device, line in self.timelines.items()
        }
        times = [asdict(step) for step in self.times]
        load = {"batch": self.load.batch, "prompt": self.load.prompt, "new": self.load.new}
        figures = {
            "model": self.model,
            "hardware": self.hardware,
            "load": load,
            "devices": devices,
            "times": [{"step": time.pop("name"), **time} for time in times],
            "seconds": self.seconds,
            "problem": self.problem,
        }
        return json.dumps(figures, indent=1)

    def save_chrome_trace(self, path: str | os.PathLike[str]) -> Path:
        """Write what each lane does as JSON for chrome://tracing or ui.perfetto.dev."""
        path = Path(path)
        path.write_text(chrome_trace(self.spans, f"{self.model} on {self.hardware}"), encoding="utf-8")
        return path

    def _timeline(self, device: Device) -> Timeline:
        recording = self.recordings[device]
        requests = [event for event in recording.events if event > 0]
        live = dict.fromkeys(KINDS, 0)
        kinds: dict[str, list[int]] = {kind: [] for kind in KINDS}
        requested = 0
        for event in recording.events:
            number = requested if event > 0 else -event - 1
            requested += event > 0
            live[self.kinds[device][number]] += requests[number] if event > 0 else -requests[number]
            for kind, values in kinds.items():
                values.append(live[kind])
        curves = replay(recording.events)
        return Timeline(device, curves.allocated, curves.reserved, kinds, recording.marks, self.capacity.get(device))


def dry_run(
    model: str | nn.Module | Callable[[], nn.Module],
    plan: Plan | Mapping[str, Device] | Device | None = None,
    batch_size: int = 1,
    prompt_tokens: int = 512,
    new_tokens: int = 0,
    hardware: Hardware | str | None = None,
    *,
    dtype: object = None,
    all_logits: bool = False,
    cache: bool = True,
    generate: bool = True,
    slots: int | None = None,
    resident_memory: int | str = 0,
    calibration: Calibration | None = None,
    quantization: BnbQuantizationConfig | str | None = None,
    replay: bool = True,
) -> DryRun:
    """Run a model on GPUs that do not exist.

    Args:
        model: a name, an empty model (on the meta device, see `init_empty_weights`; it is left without memory, on fake
            devices), or a function that builds one.
        plan: where its parts rest: a `Plan`, a device map, one device, or a strategy of `bigkit.plan`; None puts all on
            GPU 0, or spreads it over a machine with several ("auto").
        batch_size: sequences, or images.
        prompt_tokens: tokens of each sequence's prompt.
        new_tokens: tokens that are then generated for each sequence, one at a time.
        hardware: the machine, or its name in `HARDWARE` or `GPUS`; None takes as many H100s as the plan names.
        dtype: of the weights if `model` is a name; None takes the plan's, then the config's; those of a quantized
            repository stay as they are stored.
        all_logits: keep the logits of every prompt token, as a plain call of the model does.
        cache: keep the KV cache of a prompt after which nothing is generated.
        generate: run the model's own `generate`, where it has one; False calls the model itself, once for the prompt
            and once a token.
        slots, resident_memory: see `dispatch_model`; None takes the plan's slots, or two.
        calibration: rates measured on that machine; None takes the ones in the ledger if the hardware is this machine
            (`Hardware.detect()`) and `calibrate()` was called here, else the vendors' figures.
        quantization: of the linear layers: a `BnbQuantizationConfig` or one of `QUANTIZATIONS`; None takes the plan's.
            bitsandbytes' own Python for CUDA is followed (`dryrun/fake_bnb.py`).
        replay: trace blocks that are surely equal twice, then note the same again (`dryrun/replay.py`); False runs all.

    Returns:
        The run: peaks, timelines and times.

    Raises:
        ValueError: an unknown device or quantization, or the hardware has too few GPUs.
        ImportError: it is quantized, and bitsandbytes is not there.

    >>> run = dry_run("pygpt", batch_size=2, prompt_tokens=32, new_tokens=2)
    >>> run.fits, [step.name for step in run.times]
    (True, ['prefill', 'token 1', 'token 2'])
    """
    load = Workload(batch_size, prompt_tokens, new_tokens, all_logits, cache, generate)
    given: Any = whole_on(plan)
    if isinstance(given, str) or (given is None and hardware is not None and len(_machine(hardware, 1).gpus) > 1):
        given = _plan(model, _machine(hardware, 1), given or "auto", dtype, quantization, load)
    places = _places(given)
    if isinstance(given, Plan):
        dtype, quantization = dtype or given.dtype, quantization or given.quantization
        slots = slots or given.slots
    working = (*places.values(), *getattr(places, "works", {}).values())
    numbers = sorted({device for device in working if isinstance(device, int)}) or [0]
    machine = _machine(hardware, max(numbers) + 1)
    calibration = calibration or calibration_of(machine)
    config = None
    if quantization is not None:
        from .fake_bnb import config_of

        config = config_of(quantization, dtype)
        dtype = config.torch_dtype
    target = target_of(machine.gpus[numbers[0]], calibration)
    name, empty = _model(model, dtype, config)
    try:
        trace = rehearse(empty, places, load, target, slots or 2, resident_memory, config, replay)
    except Unlike:
        if isinstance(model, nn.Module):  # it is half run, and cannot be built again
            raise RuntimeError(
                f"blocks of {type(model).__name__} look alike and are not: build it again and give replay=False"
            ) from None
        name, empty = _model(model, dtype, config)
        trace = rehearse(empty, places, load, target, slots or 2, resident_memory, config)
    known: Any = getattr(empty, "config", None)
    about = facts(known.to_dict()) if hasattr(known, "to_dict") else {}
    about |= {"decoding": 0} if any(isinstance(part, AsStored) for part in empty.modules()) else {}
    context = calibration.context if calibration and calibration.context else CONTEXT_BYTES
    rates = rates_of(machine, calibration)
    return DryRun(
        model=name,
        load=load,
        device_map=places,
        hardware=machine.name,
        recordings={read_device(device): recording for device, recording in trace.recordings.items()},
        kinds={read_device(device): kinds for device, kinds in trace.kinds.items()},
        operations=trace.operations,
        steps=trace.steps[1:],
        rates={f"cuda:{i}": rates[i] for i in numbers},
        capacity={i: machine.gpus[i].memory - context for i in numbers},
        asked=in_words(empty, load),
        notes=remarks(name, about, load.prompt + load.new),
    )


def _plan(
    model: str | nn.Module | Callable[[], nn.Module],
    machine: Hardware,
    strategy: str,
    dtype: object,
    quantization: BnbQuantizationConfig | str | None,
    load: Workload,
) -> Plan:
    """What `bigkit.plan` gives on a machine."""
    if isinstance(model, str):
        from .. import zoo

        spec = zoo.describe(model)
    else:
        spec = spec_from_module(model if isinstance(model, nn.Module) else model(), trace_cache=True)
    kind = quantization.quantization if isinstance(quantization, BnbQuantizationConfig) else quantization
    return place(
        spec, machine.max_memory(), strategy, dtype=dtype, quantization=kind, batch=load.batch,
        context=load.prompt + load.new, overhead=overhead_of(machine), strict=False,
        links=links_of(machine, calibration_of(machine)),
    )  # fmt: skip


def _places(plan: Plan | Mapping[str, Device] | None) -> dict[str, Device]:
    """Module name -> where it rests, devices as plans name them."""
    device_map = {"": 0} if plan is None else plan.device_map if isinstance(plan, Plan) else plan
    places = {name: read_device(device) for name, device in device_map.items()}
    if "mps" in places.values():
        raise ValueError("a dry run knows GPUs, 'cpu' and 'disk', not mps")
    return DeviceMap(places, works) if (works := getattr(device_map, "works", {})) else places


def _machine(hardware: Hardware | str | None, gpus: int) -> Hardware:
    """The machine, or one with so many of the GPUs that are named."""
    machine = machine_of("H100-80GB" if hardware is None else hardware)
    counted = isinstance(hardware, str) and (hardware in HARDWARE or re.match(r"\s*\d+\s*x", hardware))
    if not isinstance(hardware, Hardware) and not counted and len(machine.gpus) == 1 and not machine.unified:
        machine = machine_of(f"{gpus} x {machine.gpus[0].name}")
    if len(machine.gpus) < gpus:
        raise ValueError(f"the plan uses GPU {gpus - 1}, and {machine.name} has {len(machine.gpus)} GPUs")
    return machine


def _model(
    model: str | nn.Module | Callable[[], nn.Module], dtype: object, quantization: BnbQuantizationConfig | None
) -> tuple[str, nn.Module]:
    """The model's name, and the model, empty."""
    if isinstance(model, str):
        from .. import zoo

        name, empty = model, zoo.empty_model(model, dtype=dtype)
        tensors = zoo.stored_tensors(model) if dtype is None and quantization is None else {}
    else:
        empty = model if isinstance(model, nn.Module) else model()
        config = getattr(empty, "config", None)
        name = getattr(config, "_name_or_path", "") or type(empty).__name__
        told = dtype is None and quantization is None and isinstance(getattr(config, "quantization_config", None), dict)
        tensors = tensors_told(spec_from_module(empty)) if told else {}
    if tensors:
        keep_as_stored(empty, tensors, name)
    if real := next((name for name, parameter in empty.named_parameters() if not parameter.is_meta), None):
        raise ValueError(f"{real!r} has memory: a dry run needs an empty model, built under init_empty_weights()")
    if quantization is not None:
        from .fake_bnb import quantize_empty

        quantize_empty(empty, quantization)
    return name, empty
