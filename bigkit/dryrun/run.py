"""A run that has not happened: `dry_run(...)` executes a model on fake GPUs and says what the real ones would hold.

The real code of the model runs, operation by operation, on devices that do not exist (`dryrun/fake_gpu.py`). What it
asks for is played through a model of PyTorch's allocator (`machine/allocator.py`), which says how much each device has
allocated and reserved at every moment; what it computes and moves is timed with a roofline (`machine/roofline.py`).

    peak_allocated   what `torch.cuda.max_memory_allocated()` would say
    peak_reserved    what `torch.cuda.max_memory_reserved()` would say; this, and the CUDA context, must fit

Weights that rest in RAM or on disk are dispatched as in a real run: the same hooks borrow them, into slots on a fake
GPU, through a lane that notes what it is asked to bring and when (`FakeLane`).

Leaves out: blocks that are kept in RAM after they were read from disk.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..devices import Device, device_label, prefixes
from ..machine.allocator import CachingAllocator, OutOfMemory, Recording, replay
from ..machine.hardware import CONTEXT_BYTES, GPUS, Gpu, Hardware, machine_of
from ..machine.ledger import Calibration
from ..machine.roofline import ARRIVE, FILL, LEAVE, Operation, Rates, Span, StepTime, run_steps
from ..maps.advise import calibration_of, rates_of
from ..maps.plan import Plan
from ..offload.dispatch import dispatch_model
from ..offload.hooks import AlignDevicesHook, SequentialHook
from ..offload.transfer import PlainLane, Slot
from ..offload.weights import Unit
from ..quantize.load import BnbQuantizationConfig
from ..units import KiB, MiB, format_bytes
from .export import chrome_trace, memory_snapshot
from .fake_gpu import Notebook, Target, Trace, fake_gpus
from .replay import Unlike, replaying
from .workload import Workload, fill, passes

KINDS = ("weights", "slots", "KV cache", "activations", "workspace")


@dataclass(frozen=True)
class Timeline:
    """What one device holds, event by event; bytes.

    Args:
        device: its number.
        allocated, reserved: after each request and each free.
        kinds: kind -> bytes that live requests of that kind asked for, after each event.
        marks: (name of the step, number of events up to its end).
        capacity: what the allocator can have: the device's memory without the CUDA context; None if unknown.
    """

    device: Device
    allocated: Sequence[int]
    reserved: Sequence[int]
    kinds: Mapping[str, Sequence[int]]
    marks: Sequence[tuple[str, int]]
    capacity: int | None = None

    @property
    def peak_allocated(self) -> int:
        """The most that was allocated at any moment."""
        return max(self.allocated, default=0)

    @property
    def peak_reserved(self) -> int:
        """The most that was reserved at any moment."""
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
    """What a run would hold and take.

    Args:
        model: the model's name.
        load: what it was asked to do.
        device_map: where its parts lie.
        hardware: the machine that was foretold.
        recordings: device -> what was asked of its allocator.
        kinds: device -> what each request was for.
        operations, steps: see `roofline.run_steps`.
        rates: device -> what the times were foretold with.
        capacity: device -> what its allocator can have.
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

    @cached_property
    def timelines(self) -> dict[Device, Timeline]:
        """Device -> its timeline, as if its memory had no end."""
        return {device: self._timeline(device) for device in self.recordings}

    def timeline(self, device: Device = 0) -> Timeline:
        """One device's timeline.

        Raises:
            KeyError: nothing ran there.
        """
        return self.timelines[device]

    @property
    def peak_allocated(self) -> dict[Device, int]:
        """Device -> what `torch.cuda.max_memory_allocated` would say."""
        return {device: line.peak_allocated for device, line in self.timelines.items()}

    @property
    def peak_reserved(self) -> dict[Device, int]:
        """Device -> what `torch.cuda.max_memory_reserved` would say, if memory had no end."""
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
    def _played(self) -> tuple[list[StepTime], list[Span]]:
        spans: list[Span] = []
        return run_steps(self.operations, self.steps, self.rates, spans), spans

    @property
    def times(self) -> list[StepTime]:
        """The prefill and each token: seconds, and how long each lane was busy."""
        return self._played[0]

    @property
    def spans(self) -> list[Span]:
        """What each lane did, and when."""
        return self._played[1]

    @property
    def seconds(self) -> dict[str, float]:
        """ "prefill", and "token": the mean of the tokens generated (only if some were)."""
        tokens = [step.seconds for step in self.times if step.name != "prefill"]
        found = {"prefill": self.times[0].seconds} if self.times else {}
        return {**found, "token": sum(tokens) / len(tokens)} if tokens else found

    @property
    def planning(self) -> float:
        """Seconds that a step takes more at a length that the process meets for the first time: cuDNN, which PyTorch
        prefers for attention on Hopper and Blackwell, plans anew for each. 0 where another kernel is chosen.
        """
        planned = (op.device for op in self.operations if "_cudnn_attention" in op.name)
        return max((self.rates[device].plan for device in planned), default=0.0)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all sequences together while decoding, lengths met before; 0 if none were generated."""
        return self.load.batch / self.seconds["token"] if "token" in self.seconds else 0.0

    def explain(self) -> str:
        """The run as a short story."""
        load = self.load
        lines = [f"{self.model} on {self.hardware}: {load.batch} x {load.prompt} tokens, then {load.new} more each"]
        for device, line in self.timelines.items():
            parts = ", ".join(f"{kind} {format_bytes(n)}" for kind, n in line.at_peak().items() if n)
            limit = f" of {format_bytes(line.capacity)}" if line.capacity else ""
            lines.append(
                f"  {device_label(device)}: {format_bytes(line.peak_allocated)} allocated, "
                f"{format_bytes(line.peak_reserved)} reserved{limit}; at the peak: {parts}"
            )
        for name, seconds in self.seconds.items():
            step = self.times[0] if name == "prefill" else self.times[-1]
            lines.append(f"  {name}: {1000 * seconds:,.1f} ms, longest busy: {step.bottleneck}")
        if self.tokens_per_second:
            lines.append(f"  {self.tokens_per_second:,.1f} tokens/s")
        if self.planning:
            lines.append(
                f"  the first time at each length: {1000 * self.planning:,.0f} ms more, in which cuDNN plans its "
                "attention (torch.backends.cuda.enable_cudnn_sdp(False) does without it)"
            )
        lines.append(f"  DOES NOT FIT: {self.problem}" if self.problem else "  Fits.")
        return "\n".join(lines)

    __str__ = explain

    def __repr__(self) -> str:
        peak = max(self.peak_reserved.values(), default=0)
        verdict = "fits" if self.fits else "OUT OF MEMORY"
        load = f"{self.load.batch} x {self.load.prompt}+{self.load.new}"
        text = f"DryRun({self.model} {load}, {verdict}, peak {peak / 2**30:.2f} GiB)"
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
        times = [{"step": step.name, "seconds": step.seconds, "busy": dict(step.busy)} for step in self.times]
        load = {"batch": self.load.batch, "prompt": self.load.prompt, "new": self.load.new}
        return json.dumps(
            {"model": self.model, "hardware": self.hardware, "load": load, "devices": devices, "times": times,
             "seconds": self.seconds, "planning": self.planning, "problem": self.problem},
            indent=1,
        )  # fmt: skip

    def save_chrome_trace(self, path: str | os.PathLike[str]) -> Path:
        """Write what each lane does as JSON for chrome://tracing or ui.perfetto.dev."""
        path = Path(path)
        path.write_text(chrome_trace(self.spans, f"{self.model} on {self.hardware}"), encoding="utf-8")
        return path

    def save_snapshot(self, path: str | os.PathLike[str]) -> Path:
        """Write a memory snapshot, a pickle, for PyTorch's viewer at docs.pytorch.org/memory_viz."""
        path = Path(path)
        numbers = {int(device): device for device in self.recordings}
        snapshot = memory_snapshot(
            {i: self.recordings[device] for i, device in numbers.items()},
            {i: self.kinds[device] for i, device in numbers.items()},
        )
        path.write_bytes(pickle.dumps(snapshot))
        return path

    def _timeline(self, device: Device) -> Timeline:
        recording = self.recordings[device]
        told = replay(recording.events)
        kinds: dict[str, list[int]] = {kind: [] for kind in KINDS}
        live = dict.fromkeys(KINDS, 0)
        sizes = [event for event in recording.events if event > 0]
        asked = 0
        for event in recording.events:
            number = asked if event > 0 else -event - 1
            asked += event > 0
            live[self.kinds[device][number]] += sizes[number] if event > 0 else -sizes[number]
            for kind, values in kinds.items():
                values.append(live[kind])
        return Timeline(device, told.allocated, told.reserved, kinds, recording.marks, self.capacity.get(device))


def dry_run(
    model: str | nn.Module | Callable[[], nn.Module],
    plan: Plan | Mapping[str, Device] | None = None,
    batch_size: int = 1,
    prompt_tokens: int = 512,
    new_tokens: int = 0,
    hardware: Hardware | str | None = None,
    *,
    dtype: object = None,
    all_logits: bool = False,
    cache: bool = True,
    slots: int = 2,
    resident_memory: int | str = 0,
    calibration: Calibration | None = None,
    quantization: BnbQuantizationConfig | str | None = None,
    replay: bool = True,
) -> DryRun:
    """Run a model on GPUs that do not exist.

    Args:
        model: a name, an empty model (on the meta device, see `init_empty_weights`; it is left without memory, on fake
            devices), or a function that builds one.
        plan: where its parts lie: a `Plan`, a device map, or None for all on GPU 0.
        batch_size, prompt_tokens, new_tokens: what it is asked to do.
        hardware: the machine, or its name in `HARDWARE` or `GPUS`; None takes as many H100s as the plan names.
        dtype: of the weights if `model` is a name; None takes the plan's, then the config's.
        all_logits: keep the logits of every prompt token, as a plain call of the model does.
        cache: keep the KV cache of a prompt after which nothing is generated.
        slots, resident_memory: see `dispatch_model`.
        calibration: rates measured on that machine; None takes the ones in the ledger if the hardware is this machine
            (`Hardware.detect()`) and `calibrate()` was called here, else the vendors' figures.
        quantization: of the linear layers: a `BnbQuantizationConfig` or one of `layers.QUANTIZATIONS`; None takes the
            plan's. bitsandbytes' own Python for CUDA is followed (`dryrun/fake_bnb.py`).
        replay: trace blocks that are surely equal twice, then note the same again (`dryrun/replay.py`); False runs all.

    Returns:
        The run: peaks, timelines and times.

    Raises:
        ValueError: no part lies on a GPU and there is none, the hardware has too few, or an unknown quantization.
        ImportError: it is quantized, and bitsandbytes is not there.

    >>> run = dry_run("pygpt", batch_size=2, prompt_tokens=32, new_tokens=2)
    >>> run.fits, [step.name for step in run.times]
    (True, ['prefill', 'token 1', 'token 2'])
    """
    places = {"": 0} if plan is None else plan.device_map if isinstance(plan, Plan) else dict(plan)
    if wrong := sorted({str(d) for d in places.values() if not isinstance(d, int) and d not in ("cpu", "disk")}):
        raise ValueError(f"a dry run knows GPUs, 'cpu' and 'disk', not {', '.join(wrong)}")
    numbers = sorted({d for d in places.values() if isinstance(d, int)}) or [0]
    machine = _machine(hardware, max(numbers) + 1)
    known = calibration or calibration_of(machine)
    every = rates_of(machine, known)
    rates = {f"cuda:{i}": every[i] for i in numbers}
    if isinstance(plan, Plan):
        dtype, quantization = dtype or plan.dtype, quantization or plan.quantization
    config = None
    if quantization is not None:
        from .fake_bnb import config_of, quantize_empty

        config = config_of(quantization, dtype)
        dtype = config.torch_dtype
    load = Workload(batch_size, prompt_tokens, new_tokens, all_logits, cache)
    target = target_of(machine.gpus[numbers[0]], known)

    def run(replay: bool) -> tuple[str, Trace]:
        name, empty = _model(model, dtype)
        if config is not None:
            quantize_empty(empty, config)
        return name, rehearse(empty, places, load, target, slots, resident_memory, config, replay)

    try:
        name, trace = run(replay)
    except Unlike:
        if isinstance(model, nn.Module):  # it is half run, and cannot be built again
            raise RuntimeError(
                f"blocks of {type(model).__name__} look alike and are not: build it again and give replay=False"
            ) from None
        name, trace = run(False)
    context = known.context if known and known.context else CONTEXT_BYTES
    ids = {f"cuda:{i}": i for i in numbers}
    return DryRun(
        model=name,
        load=load,
        device_map=places,
        hardware=machine.name,
        recordings={ids[device]: recording for device, recording in trace.recordings.items()},
        kinds={ids[device]: kinds for device, kinds in trace.kinds.items()},
        operations=trace.operations,
        steps=trace.steps[1:],
        rates=rates,
        capacity={i: machine.gpus[i].memory - context for i in numbers},
    )


PROCESSORS = {"T4": 40, "L4": 58, "RTX 3090": 82, "RTX 4090": 128, "A100-40GB": 108, "A100-80GB": 108}  # others: 132


def target_of(gpu: Gpu, calibration: Calibration | None = None) -> Target:
    """What the code can ask of a GPU.

    Hopper's cuBLAS takes 32 MiB of workspace, others 8.125 MiB. On Hopper and Blackwell PyTorch tries cuDNN's attention
    first: seen on an H200 with PyTorch 2.11 and cuDNN 9.19.

    >>> target_of(GPUS["T4"]).workspace
    8519680
    """
    capability = calibration.capability if calibration and calibration.capability else gpu.capability
    usual = 32 * MiB if capability[0] == 9 else 8 * MiB + 128 * KiB
    attention = ("cudnn", "flash", "efficient") if capability in ((9, 0), (10, 0)) else ("flash", "efficient")
    workspace = (calibration.workspace if calibration else None) or usual
    return Target(capability, attention, workspace, PROCESSORS.get(gpu.name, 132))


def rehearse(
    model: nn.Module,
    places: Mapping[str, Device],
    load: Workload,
    target: Target,
    slots: int = 2,
    resident_memory: int | str = 0,
    quantization: BnbQuantizationConfig | None = None,
    replay: bool = False,
) -> Trace:
    """Fill an empty model on fake GPUs, spread it as a map says, and run the work; returns what was noted."""
    main = next((device for device in places.values() if isinstance(device, int)), 0)
    in_ram = {name: "cpu" if device == "disk" else device for name, device in places.items()}
    with fake_gpus(target) as notes, ExitStack() as stack:
        notes.kind = "weights"
        if quantization is None:
            fill(model.eval(), in_ram)
        else:
            from .fake_bnb import fake_bitsandbytes, fill_quantized

            stack.enter_context(fake_bitsandbytes(notes))
            fill_quantized(model.eval(), in_ram, torch.device("cuda", main), quantization)
        if set(places.values()) != {main}:
            dispatch_model(model, in_ram, main, slots=slots, resident_memory=resident_memory)
            for streamer in {hook.streamer for hook in _hooks(model) if hook.streamer is not None}:
                streamer.lane = FakeLane(streamer.device, notes, places)
        notes.trace.mark("fill")
        notes.kind = "activations"
        if replay:
            stack.enter_context(replaying(model, notes))
        for i, (_, cache) in enumerate(passes(model, load, torch.device("cuda", main))):
            label_cache(notes, cache)
            notes.trace.mark(f"token {i}" if i else "prefill")
    notes.live.clear()
    for recording in notes.trace.recordings.values():
        del recording.events[recording.marks[-1][1] :]  # what is freed when everything is over
    return notes.trace


class FakeLane(PlainLane):
    """Brings nothing, and notes what it was asked to bring, into which slot, and when the work needs it."""

    def __init__(self, device: torch.device, notes: Notebook, places: Mapping[str, Device]) -> None:
        super().__init__(device)
        self.notes, self.places = notes, places
        self.numbers: dict[int, int] = {}

    def slot(self, nbytes: int) -> Slot:
        kind, self.notes.kind = self.notes.kind, "slots"
        try:
            slot = super().slot(nbytes)
        finally:
            self.notes.kind = kind
        self.numbers[id(slot)] = len(self.numbers)
        return slot

    def fill(self, slot: Slot, unit: Unit) -> None:
        self._note(FILL, slot, unit)

    def arrive(self, slot: Slot) -> None:
        self._note(ARRIVE, slot, slot.unit)

    def leave(self, slot: Slot) -> None:
        self._note(LEAVE, slot, slot.unit)

    def _note(self, name: str, slot: Slot, unit: Unit | None) -> None:
        assert unit is not None
        inside = [unit.name, *(weight.name for weight in unit.weights)]
        rests = {self.places[prefix] for name in inside for prefix in prefixes(name) if prefix in self.places}
        source = "disk" if "disk" in rests else "cpu"
        self.notes.trace.operations.append(
            Operation(name, str(self.device), 0, unit.nbytes, "uint8", 0, source, self.numbers[id(slot)], unit.name)
        )


def _hooks(model: nn.Module) -> Iterator[AlignDevicesHook]:
    for module in model.modules():
        hook = vars(module).get("_hf_hook")
        for part in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
            if isinstance(part, AlignDevicesHook):
                yield part


def label_cache(notes: Notebook, cache: Any) -> None:
    """Say which storages are the KV cache: every tensor that the cache object holds, however deep."""
    seen: set[int] = set()
    waiting = [cache]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or thing is None or isinstance(thing, (str, int, float, nn.Module)):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            notes.label([thing], "KV cache")
        elif isinstance(thing, (list, tuple)):
            waiting += thing
        elif isinstance(thing, dict):
            waiting += thing.values()
        elif hasattr(thing, "__dict__"):
            waiting += vars(thing).values()


def _machine(hardware: Hardware | str | None, gpus: int) -> Hardware:
    if isinstance(hardware, Hardware):
        machine = hardware
    else:
        one = hardware is None or hardware in GPUS
        machine = machine_of(f"{gpus} x {hardware or 'H100-80GB'}" if one else str(hardware))
    if len(machine.gpus) < gpus:
        raise ValueError(f"the plan uses GPU {gpus - 1}, and {machine.name} has {len(machine.gpus)} GPUs")
    return machine


def _model(model: str | nn.Module | Callable[[], nn.Module], dtype: object) -> tuple[str, nn.Module]:
    if isinstance(model, str):
        from .. import zoo

        return model, zoo.empty_model(model, dtype=dtype)
    empty = model if isinstance(model, nn.Module) else model()
    name = getattr(getattr(empty, "config", None), "_name_or_path", "") or type(empty).__name__
    real: Iterable[str] = (name for name, parameter in empty.named_parameters() if not parameter.is_meta)
    if first := next(iter(real), None):
        raise ValueError(f"{first!r} has memory: a dry run needs an empty model, built under init_empty_weights()")
    return name, empty
