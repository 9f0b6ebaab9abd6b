"""Real runs beside their predictions: `record` times a model's calls, `measure` does the work of a dry run for real.

    with record(model, predicted=dry_run(...)) as recorder:
        model.generate(...)
    print(recorder.explain())        predicted, measured, error; the same goes to the ledger

Every call is timed from an idle device to an idle device, as `dry_run` counts its steps. A call whose cache already
holds tokens is a "token" if it brings one more of each sequence; all others are a "prefill".

`measure` fills an empty model with random weights, spreads it by the map of a dry run and runs the same steps on GPU 0:
once with its allocations recorded, then with `record` around it. `draw/dryrun.py` draws the result over the prediction.

Leaves out: what runs between the calls (sampling, stopping), and compiled models; for `measure` more than one GPU, and
weights on disk.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..devices import Device, device_label
from ..dryrun.result import DryRun
from ..dryrun.workload import Workload, fill, step_name, work
from ..machine.allocator import Recording, replay
from ..machine.hardware import CONTEXT_BYTES, Hardware
from ..machine.ledger import Ledger
from ..offload.dispatch import dispatch_model
from ..units import counted, format_bytes, format_seconds
from .allocations import record_allocations, settle
from .calibrate import machine_name

# ---------------------------------------------------------------------------------------------------------------------
# The calls of any model


class Call(NamedTuple):
    """One call of the model: "prefill" or "token", sequences, new tokens of each, seconds."""

    phase: str
    batch: int
    tokens: int
    seconds: float


@dataclass
class Recorder:
    """What a run took, and what it was predicted to take.

    Args:
        name: the run's name in the ledger.
        machine: where it ran.
        predicted: quantity -> seconds or bytes; empty without a prediction.
        expected: (sequences, tokens) of the prompt that the prediction is for.
        calls: the model's calls, in order.
        peaks: "allocated cuda:0" and "reserved cuda:0" -> bytes at the peak; without a GPU "resident memory", the most
            that the process had at the end of a call.
    """

    name: str
    machine: str
    predicted: Mapping[str, float] = field(default_factory=dict)
    expected: tuple[int, int] | None = None
    calls: list[Call] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)

    @property
    def seconds(self) -> dict[str, float]:
        """ "prefill" and "token" -> the median of the calls of that kind."""
        phases: dict[str, list[float]] = {}
        for call in self.calls:
            phases.setdefault(call.phase, []).append(call.seconds)
        return {phase: statistics.median(seconds) for phase, seconds in phases.items()}

    @property
    def measured(self) -> dict[str, float]:
        """Quantity -> seconds or bytes."""
        return {**self.seconds, **self.peaks}

    @property
    def problem(self) -> str:
        """Why the prediction cannot be compared with the run; empty if it can, or if there is none."""
        prompts = sorted({(call.batch, call.tokens) for call in self.calls if call.phase == "prefill"})
        if self.expected is None or prompts == [self.expected]:
            return ""
        ran = ", ".join(f"{batch} x {tokens}" for batch, tokens in prompts) or "no prompt"
        return f"{self.expected[0]} x {self.expected[1]} tokens were predicted, and {ran} ran"

    def rows(self) -> list[tuple[str, float, float, float]]:
        """(quantity, predicted, measured, predicted / measured - 1) of all that was both predicted and measured.

        Raises:
            ValueError: the prediction is for another prompt than the one that ran.
        """
        if self.problem:
            raise ValueError(self.problem)
        measured = self.measured
        return [
            (name, predicted, measured[name], predicted / measured[name] - 1)
            for name, predicted in self.predicted.items()
            if measured.get(name)
        ]

    def entry(self) -> dict[str, Any]:
        """What goes to the ledger, ready for JSON. A prediction of other work is left out."""
        prompt = next((call for call in self.calls if call.phase == "prefill"), None)
        return {
            "name": self.name,
            "machine": self.machine,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "batch": prompt.batch if prompt else None,
            "prompt": prompt.tokens if prompt else None,
            "calls": len(self.calls),
            "measured": self.measured,
            "predicted": {} if self.problem else dict(self.predicted),
        }

    def explain(self) -> str:
        """The run as a table."""
        lines = [f"{self.name} on {self.machine}: {counted(len(self.calls), 'call')}"]
        if self.problem:
            lines.append(f"  no comparison: {self.problem}")
        compared = {} if self.problem else {name: row for name, *row in self.rows()}
        for name, measured in self.measured.items():
            line = f"  {name:22} {_text(name, measured):>12}"
            if name in compared:
                predicted, _, error = compared[name]
                line += f"   predicted {_text(name, predicted):>12}  {100 * error:+7.1f} %"
            lines.append(line)
        return "\n".join(lines)

    __str__ = explain

    def __repr__(self) -> str:
        medians = "".join(f", {phase} {format_seconds(seconds)}" for phase, seconds in self.seconds.items())
        return f"Recorder({self.name}, {counted(len(self.calls), 'call')}{medians})"


@contextmanager
def record(
    model: nn.Module,
    predicted: DryRun | None = None,
    name: str = "",
    *,
    ledger: Ledger | str | os.PathLike[str] | None = None,
    save: bool = True,
) -> Iterator[Recorder]:
    """Measure the calls of a model in a block of code, and note them in the ledger.

    The first call on a GPU also chooses kernels and loads libraries: warm up before the block. Waiting for the device
    after each call costs a little where Python would run ahead. PyTorch's peak statistics start anew with the block.

    Args:
        model: with memory, wherever its parts lie. What it computes does not change.
        predicted: the dry run of the same work, to compare the run with.
        name: the run's name in the ledger; the model's own if empty.
        ledger: where to note it, or its path; None takes the user's.
        save: False notes nothing. Nothing is noted either if the block raises, or if the model was not called in it.

    Yields:
        The recorder; its figures are complete once the block is left.

    >>> from bigkit.zoo.gpt import load_pygpt
    >>> model = load_pygpt()
    >>> with record(model, save=False) as recorder:
    ...     _ = model(torch.zeros((2, 8), dtype=torch.long))
    >>> [(call.phase, call.batch, call.tokens) for call in recorder.calls]
    [('prefill', 2, 8)]
    """
    config = getattr(model, "config", None)
    recorder = Recorder(name or getattr(config, "_name_or_path", "") or type(model).__name__, machine_name())
    if predicted is not None:
        recorder.expected = predicted.load.batch, predicted.load.prompt
        recorder.predicted = {
            **predicted.seconds,
            **{f"allocated cuda:{i}": peak for i, peak in predicted.peak_allocated.items()},
            **{f"reserved cuda:{i}": peak for i, peak in predicted.peak_reserved.items()},
        }
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    began: list[tuple[float, tuple[str, int, int]]] = []

    def clock() -> float:
        for gpu in gpus:
            torch.cuda.synchronize(gpu)
        return time.perf_counter()

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        work = work_of(args, kwargs)
        began.append((clock(), work))

    def after(*_: Any) -> None:
        end = clock()
        start, work = began.pop()
        recorder.calls.append(Call(*work, end - start))
        if not gpus:
            recorder.peaks["resident memory"] = max(recorder.peaks.get("resident memory", 0), _resident())

    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        model.register_forward_hook(after),
    ]
    try:
        yield recorder
    finally:
        for hook in hooks:
            hook.remove()
        for gpu in gpus:
            if peak := torch.cuda.max_memory_reserved(gpu):
                recorder.peaks[f"allocated cuda:{gpu}"] = torch.cuda.max_memory_allocated(gpu)
                recorder.peaks[f"reserved cuda:{gpu}"] = peak
    if save and recorder.calls:
        (ledger if isinstance(ledger, Ledger) else Ledger.load(ledger)).add_run(recorder.entry())


def work_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, int, int]:
    """What a call is asked to do: phase, sequences, new tokens of each."""
    names = ("decoder_input_ids", "input_ids", "inputs_embeds", "pixel_values")
    values = (*map(kwargs.get, names), *args, *kwargs.values())
    inputs = next((value for value in values if isinstance(value, Tensor)), torch.empty(0, 0))
    batch, tokens = (inputs.shape[0], inputs.shape[1]) if inputs.dim() in (2, 3) else (inputs.shape[0], 1)
    cached = _cached(kwargs.get("past_key_values", kwargs.get("cache")))
    if "decoder_input_ids" in kwargs and isinstance(kwargs.get("input_ids"), Tensor) and not cached:
        tokens = kwargs["input_ids"].shape[1]  # the encoder's, whose prompt it is
    return "token" if cached and tokens == 1 else "prefill", batch, tokens


def _cached(cache: Any) -> int:
    """Tokens that a KV cache holds: one of Transformers, or the shipped GPT's."""
    return int(cache.get_seq_length() if hasattr(cache, "get_seq_length") else getattr(cache, "length", 0))


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _text(name: str, value: float) -> str:
    return format_seconds(value) if name in ("prefill", "token") else format_bytes(value)


# ---------------------------------------------------------------------------------------------------------------------
# The work of a dry run, on GPU 0


@dataclass(frozen=True)
class Measurement:
    """What a real run on one GPU held and took.

    Args:
        recording: what was asked of the GPU's allocator; its marks are the ends of the fill and of each step.
        seconds: seconds of the prefill and of each token, in order.
        device: the GPU's number.
    """

    recording: Recording = field(repr=False)
    seconds: Sequence[float]
    device: Device = 0

    @property
    def gpu(self) -> str:
        """The GPU's name."""
        return self.recording.about.get("gpu", "this GPU")

    @property
    def token(self) -> float:
        """Seconds a token: the mean of those generated; 0 if none were."""
        return statistics.mean(self.seconds[1:]) if len(self.seconds) > 1 else 0.0

    def curves(self) -> tuple[list[int], list[int]]:
        """Bytes allocated and bytes reserved after each event, up to the end of the last step."""
        recording = self.recording
        end = recording.marks[-1][1] if recording.marks else len(recording.events)
        allocated = replay(recording.events[:end], recording.streams, recording.allocator()).allocated
        changes = [0] * end
        for before, size, _ in recording.segments:
            if before < end:
                changes[before] += size
        return allocated, list(accumulate(changes))

    def over(self, marks: Sequence[tuple[str, int]]) -> list[float]:
        """Where to draw each event over a dry run with these marks: each step gets the room that it has there."""
        ends = [0, *(end for _, end in self.recording.marks)]
        steps = list(zip(ends, [0, *(end for _, end in marks)]))  # (events here, events there) at the end of each
        places = []
        for (start, start_there), (end, end_there) in zip(steps, steps[1:]):
            scale = (end_there - start_there) / max(1, end - start)
            places += [start_there + scale * i for i in range(end - start)]
        return places + [float(steps[-1][1])] * (ends[-1] - len(places))


def obstacle(run: DryRun, machine: Hardware, in_ram: int = 0) -> str:
    """Why a run cannot be measured on a machine, in a few words; empty if it can.

    Args:
        run: the dry run.
        machine: usually `Hardware.detect()`.
        in_ram: bytes of weights that rest in RAM.

    >>> from bigkit import dry_run
    >>> obstacle(dry_run("pygpt", batch_size=1, prompt_tokens=8), Hardware("a laptop", (), 2**34, 0))
    'no CUDA GPU here'
    """
    if not machine.gpus:
        return "no CUDA GPU here"
    if others := _not_measured(run.device_map):
        return f"only GPU 0 and RAM are measured, and the plan uses {others}"
    need, memory = run.peak_reserved.get(0, 0) + CONTEXT_BYTES, machine.gpus[0].memory
    if need > memory:
        return f"it needs {format_bytes(need)}, and the GPU here has {format_bytes(memory)}"
    if 2 * in_ram > machine.ram:
        return f"{format_bytes(in_ram)} rest in RAM, of which there are {format_bytes(machine.ram)}"
    return ""


def _not_measured(device_map: Mapping[str, Device]) -> str:
    return ", ".join(sorted(map(device_label, {*device_map.values()} - {0, "cpu"})))


def measure(
    model: nn.Module, device_map: Mapping[str, Device], load: Workload, slots: int = 2, repeats: int = 3
) -> Measurement:
    """Run a model with random weights on GPU 0: the work of a dry run, for real.

    Args:
        model: empty, as `zoo.empty_model` makes it; it gets memory, and should be let go of afterwards.
        device_map: module name -> GPU 0 or "cpu".
        load: what to run.
        slots: see `dispatch_model`.
        repeats: how many timed runs follow the recorded one; each step's median is kept.

    Raises:
        ValueError: the map names another device.
        torch.cuda.OutOfMemoryError: it does not fit.
    """
    if others := _not_measured(device_map):
        raise ValueError(f"only GPU 0 and RAM can be measured, not {others}")
    times: list[list[float]] = []
    try:
        with record_allocations(0) as mark:
            fill(model.eval(), device_map)
            if set(device_map.values()) != {0}:
                dispatch_model(model, dict(device_map), 0, slots=slots)
            mark("fill")
            numbers = count()
            work(model, load, "cuda:0", lambda step: mark(step_name(next(numbers))))
        for _ in range(repeats):
            with record(model, save=False) as recorder:
                work(model, load, "cuda:0", lambda step: None)
            times.append([call.seconds for call in recorder.calls])
    finally:
        del model
        settle(0)
    recording: Recording = mark.recording  # type: ignore[attr-defined]
    return Measurement(recording, tuple(map(statistics.median, zip(*times))))
