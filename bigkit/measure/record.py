"""Real runs, measured and held against what was foretold: `record()`.

    with record(model, predicted=dry_run(...)) as recorder:
        model.generate(...)
    print(recorder.explain())        predicted, measured, error; the same goes to the ledger

Every call of the model is timed from an idle device to an idle device, as `dry_run` counts its steps. A call whose
cache already holds tokens is a "token" if it brings one more of each sequence; all others are a "prefill".

Leaves out: what runs between the calls (sampling, stopping), and compiled models.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..machine.ledger import Ledger
from ..units import format_bytes
from .calibrate import machine_name

if TYPE_CHECKING:
    from ..dryrun.run import DryRun


class Call(NamedTuple):
    """One call of the model: "prefill" or "token", sequences, new tokens of each, seconds."""

    phase: str
    batch: int
    tokens: int
    seconds: float


@dataclass
class Recorder:
    """What a run took, and what it was foretold to take.

    Args:
        name: of the run, in the ledger.
        machine: where it ran.
        predicted: quantity -> seconds or bytes; empty if nothing was foretold.
        expected: (sequences, tokens) of the prompt that was foretold.
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
        kinds: dict[str, list[float]] = {}
        for call in self.calls:
            kinds.setdefault(call.phase, []).append(call.seconds)
        return {kind: statistics.median(found) for kind, found in kinds.items()}

    @property
    def measured(self) -> dict[str, float]:
        """Quantity -> seconds or bytes."""
        return {**self.seconds, **self.peaks}

    @property
    def problem(self) -> str:
        """Why the prediction cannot be held against the run; empty if it can, or if there is none."""
        prompts = sorted({(call.batch, call.tokens) for call in self.calls if call.phase == "prefill"})
        if self.expected is None or prompts == [self.expected]:
            return ""
        ran = ", ".join(f"{batch} x {tokens}" for batch, tokens in prompts) or "no prompt"
        return f"{self.expected[0]} x {self.expected[1]} tokens were foretold, and {ran} ran"

    def rows(self) -> list[tuple[str, float, float, float]]:
        """(quantity, predicted, measured, predicted / measured - 1) of what was both foretold and measured.

        Raises:
            ValueError: another prompt was foretold than ran.
        """
        if self.problem:
            raise ValueError(self.problem)
        real = self.measured
        return [
            (name, told, real[name], told / real[name] - 1) for name, told in self.predicted.items() if real.get(name)
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
        calls = f"{len(self.calls)} calls" if len(self.calls) != 1 else "1 call"
        lines = [f"{self.name} on {self.machine}: {calls}"]
        if self.problem:
            lines.append(f"  no comparison: {self.problem}")
        told = {} if self.problem else self.predicted
        for name, real in self.measured.items():
            line = f"  {name:22} {_text(name, real):>12}"
            if told.get(name) and real:
                line += f"   foretold {_text(name, told[name]):>12}  {100 * (told[name] / real - 1):+7.1f} %"
            lines.append(line)
        return "\n".join(lines)

    __str__ = explain

    def __repr__(self) -> str:
        parts = ", ".join(f"{name} {_text(name, seconds)}" for name, seconds in self.seconds.items())
        return f"Recorder({self.name}, {len(self.calls)} calls{', ' + parts if parts else ''})"


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
    after each call costs a little where Python would run ahead.

    Args:
        model: with memory, wherever its parts lie. What it computes does not change.
        predicted: the dry run of the same work, to hold the run against.
        name: of the run, in the ledger; the model's own if empty.
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
    recorder = Recorder(name or _name(model), machine_name())
    if predicted is not None:
        recorder.expected = predicted.load.batch, predicted.load.prompt
        recorder.predicted = {
            **predicted.seconds,
            **{f"allocated cuda:{i}": peak for i, peak in predicted.peak_allocated.items()},
            **{f"reserved cuda:{i}": peak for i, peak in predicted.peak_reserved.items()},
        }
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    began: list[tuple[float, tuple[str, int, int]]] = []

    def starts(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        work = _work(args, kwargs)
        _wait(gpus)
        began.append((time.perf_counter(), work))

    def ends(*_: Any) -> None:
        _wait(gpus)
        start, work = began.pop()
        recorder.calls.append(Call(*work, time.perf_counter() - start))
        if not gpus:
            recorder.peaks["resident memory"] = max(recorder.peaks.get("resident memory", 0), _resident())

    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    hooks = [
        model.register_forward_pre_hook(starts, with_kwargs=True, prepend=True),
        model.register_forward_hook(ends),
    ]
    try:
        yield recorder
    finally:
        for hook in hooks:
            hook.remove()
        for gpu in gpus:
            if peak := torch.cuda.max_memory_reserved(gpu):
                recorder.peaks |= {
                    f"allocated cuda:{gpu}": torch.cuda.max_memory_allocated(gpu),
                    f"reserved cuda:{gpu}": peak,
                }
    if save and recorder.calls:
        (ledger if isinstance(ledger, Ledger) else Ledger.load(ledger)).add_run(recorder.entry())


def _work(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, int, int]:
    """What a call is asked to do: phase, sequences, new tokens of each."""
    names = ("decoder_input_ids", "input_ids", "inputs_embeds", "pixel_values")
    inputs = next((kwargs[name] for name in names if isinstance(kwargs.get(name), Tensor)), None)
    if inputs is None:
        inputs = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), torch.empty(0, 0))
    batch, tokens = (inputs.shape[0], inputs.shape[1]) if inputs.dim() in (2, 3) else (inputs.shape[0], 1)
    cached = _cached(kwargs.get("past_key_values", kwargs.get("cache")))
    if "decoder_input_ids" in kwargs and isinstance(kwargs.get("input_ids"), Tensor) and not cached:
        tokens = kwargs["input_ids"].shape[1]  # the encoder's, whose prompt it is
    return "token" if cached and tokens == 1 else "prefill", batch, tokens


def _cached(cache: Any) -> int:
    """Tokens that a KV cache holds: one of Transformers, or the shipped GPT's."""
    if cache is None:
        return 0
    length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else getattr(cache, "length", 0)
    return int(length)


def _wait(gpus: range) -> None:
    for gpu in gpus:
        torch.cuda.synchronize(gpu)


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _name(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__


def _text(name: str, value: float) -> str:
    return f"{1000 * value:,.2f} ms" if name in ("prefill", "token") else format_bytes(int(value))
