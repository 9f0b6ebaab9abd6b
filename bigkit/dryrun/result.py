"""What a dry run gives: what each device holds, event by event, how long each step takes, and whether it fits.

    Timeline   one device: bytes allocated, reserved, and held by kind, after each request and free
    DryRun     all of them, with the times, as text and as JSON

Leaves out: the run itself (`rehearse.py`) and pictures (`bigkit.draw.dryrun`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from ..devices import Device, device_label, read_device
from ..machine.allocator import CachingAllocator, OutOfMemory, Recording, replay
from ..machine.ledger import HostStep, Twin
from ..machine.ranges import ALIKE, GUESSED, MEASURED, PLAIN, VENDOR, Range, range_of_memory, range_of_steps
from ..machine.roofline import Operation, Rates, StepTime, run_steps
from ..machine.streams import Span
from ..units import format_bytes, format_seconds, three_figures
from .attention import Target
from .export import chrome_trace
from .splice import Attended
from .workload import Workload

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
        twin: the pace of the host in this architecture, if it was measured.
        met: whether the memory of runs on such a GPU was compared with dry runs.
        recorded: quantity -> measured / predicted, of this model's runs that were recorded on this machine.
        expert_hits: chosen experts that were on the GPU already, and those that had to be brought (`expert_cache`).
        alike: GPUs on which the same would be done: see `run.on_machine`.
        workspaces: device -> the numbers of the requests by which cuBLAS took workspaces.
        attended, but_attention: where calls of attention lie; GPUs on which the same would be done but in these.
        quantized: whether bitsandbytes quantizes its linear layers, whose Python takes longer than that of others.
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
    twin: Twin | None = None
    met: bool = False
    recorded: Mapping[str, Sequence[float]] = field(default_factory=dict, repr=False)
    expert_hits: tuple[int, int] = (0, 0)
    alike: frozenset[Target] = field(default=frozenset(), repr=False)
    workspaces: Mapping[Device, Sequence[int]] = field(default_factory=dict, repr=False)
    attended: Sequence[Attended] = field(default=(), repr=False)
    but_attention: frozenset[Target] = field(default=frozenset(), repr=False)
    quantized: bool = False

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
                when = "while weights are placed" if step == "fill" else f"in step {step!r}"
                return (
                    f"{device_label(device)} runs out of memory {when} (event {failed + 1:,} of "
                    f"{len(recording.events):,}): {format_bytes(line.peak_allocated)} would be allocated at the peak, "
                    f"and beside the CUDA context it has {format_bytes(self.capacity[device])}"
                )
        return ""

    @property
    def fits(self) -> bool:
        """Whether no device runs out of memory."""
        return not self.problem

    @property
    def narrowly(self) -> str:
        """What to add to "fits" if a device's range reaches beyond what it has; else nothing."""
        for device, capacity in self.capacity.items():
            found = self.ranges.get(f"reserved cuda:{device}")
            if found and found.high > capacity:
                return f", but {device_label(device)} may need {format_bytes(found.high)} of {format_bytes(capacity)}"
        return ""

    def fails_with(self, device: Device, capacity: int | None) -> int | None:
        """The event at which a device with so many bytes runs out of memory, or None.

        >>> from bigkit import dry_run
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

    def _paces(self) -> dict[str, HostStep]:
        """Step -> the host's pace in it, where it was measured; nothing passes before a plain call of the model."""
        if self.twin is None:
            return {}
        prefill, token = self.twin.prefill, self.twin.token or self.twin.prefill
        if self.load.prompt == 1:
            prefill = self.twin.single or prefill
        if not self.load.generate:
            prefill, token = prefill.without_before(), (self.twin.plain or token).without_before()
        return {name: token if i else prefill for i, (name, _) in enumerate(self.steps)}

    @cached_property
    def times(self) -> list[StepTime]:
        """The prefill and each token: seconds, and how long each lane was busy."""
        return run_steps(self.operations, self.steps, self.rates, None, self._paces())

    @cached_property
    def spans(self) -> list[Span]:
        """What each lane did, and when."""
        spans: list[Span] = []
        run_steps(self.operations, self.steps, self.rates, spans, self._paces())
        return spans

    @property
    def seconds(self) -> dict[str, float]:
        """ "prefill", and "token": the mean of the tokens generated (only if some were)."""
        if not self.times:
            return {}
        prefill, *tokens = (step.seconds for step in self.times)
        return {"prefill": prefill, **({"token": sum(tokens) / len(tokens)} if tokens else {})}

    @cached_property
    def ranges(self) -> dict[str, Range]:
        """Quantity -> what it should lie between, and what that rests on.

        The quantities are those that `record` measures: "prefill", "token", "allocated cuda:0", "reserved cuda:0".

        >>> from bigkit import dry_run
        >>> run = dry_run("pygpt", batch_size=1, prompt_tokens=8)
        >>> run.ranges["prefill"].low < run.seconds["prefill"] < run.ranges["prefill"].high
        True
        """
        measured = any(rates.measured for rates in self.rates.values())
        host, others = (ALIKE, MEASURED) if measured else (GUESSED, VENDOR)
        host = MEASURED if self.twin else PLAIN if self.quantized else host
        prefill, tokens = self.times[:1], self.times[1:]
        ranges = {name: range_of_steps(steps, host, others)
                  for name, steps in (("prefill", prefill), ("token", tokens)) if steps}  # fmt: skip
        for device, line in self.timelines.items():
            ranges[f"allocated cuda:{device}"] = range_of_memory("allocated", line.peak_allocated, self.met)
            ranges[f"reserved cuda:{device}"] = range_of_memory("reserved", line.peak_reserved, self.met)
        return {name: found.narrowed(self.recorded.get(name, ())) for name, found in ranges.items()}

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
        """Lane -> the share of the whole time that it works. A link that ends on copies for one more token has all."""
        whole = sum(step.seconds for step in self.times) or 1.0
        lanes = dict.fromkeys(lane for step in self.times for lane in step.busy)
        return {lane: min(1.0, sum(step.busy.get(lane, 0.0) for step in self.times) / whole) for lane in lanes}

    @property
    def hits(self) -> str:
        """How many of the chosen experts were on the GPU, in words; empty without a cache of experts."""
        found, brought = self.expert_hits
        if not found + brought:
            return ""
        return f"{100 * found / (found + brought):.0f} % of the chosen experts were on the GPU already"

    def explain(self) -> str:
        """The run as a short story."""
        lines = [f"{self.model} on {self.hardware}: {self.asked}"]
        for device, line in self.timelines.items():
            parts = ", ".join(f"{kind} {format_bytes(n)}" for kind, n in line.at_peak().items() if n)
            limit = f" of {format_bytes(line.capacity)} beside the CUDA context" if line.capacity else ""
            told = self.ranges[f"reserved cuda:{device}"].told(format_bytes)
            lines.append(
                f"  {device_label(device)}: {format_bytes(line.peak_allocated)} allocated, "
                f"{format_bytes(line.peak_reserved)} reserved{limit} ({told}); at the peak: {parts}"
            )
        for name, seconds in self.seconds.items():
            step = self.times[0] if name == "prefill" else self.times[-1]
            told = self.ranges[name].told(format_seconds)
            lines.append(f"  {name}: {format_seconds(seconds)} ({told}), longest busy: {step.bottleneck}")
        lines += [f"  {text}" for text in (self.speed, self.hits, *self.notes) if text]
        lines.append(f"  DOES NOT FIT: {self.problem}" if self.problem else f"  Fits{self.narrowly}.")
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
            "ranges": {name: asdict(found) for name, found in self.ranges.items()},
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
        kinds = held_by_kind(recording.events, self.kinds[device])
        curves = replay(recording.events, recording.streams)
        return Timeline(device, curves.allocated, curves.reserved, kinds, recording.marks, self.capacity.get(device))


def held_by_kind(events: Sequence[int], kinds: Sequence[str]) -> dict[str, list[int]]:
    """Kind -> bytes that live requests of that kind asked for, after each event.

    Args:
        events: a size for a request, -k to free the k-th, from 1.
        kinds: what each request was for, one of `KINDS`.

    >>> held_by_kind([5, 7, -1], ["weights", "slots"])["slots"]
    [0, 7, 7]
    """
    requests = [event for event in events if event > 0]
    live = dict.fromkeys(KINDS, 0)
    held: dict[str, list[int]] = {kind: [] for kind in KINDS}
    requested = 0
    for event in events:
        number = requested if event > 0 else -event - 1
        requested += event > 0
        live[kinds[number]] += requests[number] if event > 0 else -requests[number]
        for kind, values in held.items():
            values.append(live[kind])
    return held
