"""A dry run's twin: the same work on the real GPU, its allocations recorded and its steps timed.

`measure` does for real what `dryrun.rehearse` does on fake devices: it fills the model with random weights, spreads it
by the same map and runs the same passes. `draw_dryrun` lays what it finds over what was foretold.

Leaves out: plans with more than one GPU or with weights on disk.
"""

from __future__ import annotations

import statistics
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..devices import Device, device_label
from ..dryrun.run import DryRun
from ..dryrun.workload import Workload, fill, passes
from ..machine.allocator import Recording, replay
from ..machine.hardware import CONTEXT_BYTES, Hardware
from ..offload.dispatch import dispatch_model
from ..units import format_bytes
from .allocations import record_allocations, settle


@dataclass(frozen=True)
class Measurement:
    """What a real run on one GPU held and took.

    Args:
        recording: what was asked of the GPU's allocator; its marks are the ends of the fill and of each step.
        seconds: of the prefill and of each token, in order.
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
        end = self.recording.marks[-1][1] if self.recording.marks else len(self.recording.events)
        events = self.recording.events[:end]
        allocated = replay(events, self.recording.streams, self.recording.allocator()).allocated
        reserved = [0] * end
        for before, size, _ in self.recording.segments:
            if before < end:
                reserved[before] += size
        for i in range(1, end):
            reserved[i] += reserved[i - 1]
        return allocated, reserved

    def over(self, marks: Sequence[tuple[str, int]]) -> list[float]:
        """Where each event lies over a foretold run with these marks: each step takes as much room as there."""
        mine, theirs = [0, *(end for _, end in self.recording.marks)], [0, *(end for _, end in marks)]
        found = []
        for i in range(mine[-1]):
            step = min(max(1, bisect_left(mine, i + 1)), len(theirs) - 1)
            share = (i - mine[step - 1]) / max(1, mine[step] - mine[step - 1])
            found.append(theirs[step - 1] + share * (theirs[step] - theirs[step - 1]))
        return found


def obstacle(run: DryRun, machine: Hardware, in_ram: int = 0) -> str:
    """Why a run cannot be measured on a machine, in a few words; empty if it can.

    Args:
        run: the run as it was foretold.
        machine: usually `Hardware.detect()`.
        in_ram: bytes of weights that rest in RAM.

    >>> from bigkit import dry_run
    >>> obstacle(dry_run("pygpt", batch_size=1, prompt_tokens=8), Hardware("a laptop", (), 2**34, 0))
    'no CUDA GPU here'
    """
    if not machine.gpus:
        return "no CUDA GPU here"
    others = {device for device in run.device_map.values() if device not in (0, "cpu")}
    if others:
        return f"only GPU 0 and RAM are measured, and the plan uses {', '.join(sorted(map(device_label, others)))}"
    need, has = run.peak_reserved.get(0, 0) + CONTEXT_BYTES, machine.gpus[0].memory
    if need > has:
        return f"it needs {format_bytes(need)}, and the GPU here has {format_bytes(has)}"
    if 2 * in_ram > machine.ram:
        return f"{format_bytes(in_ram)} rest in RAM, of which there are {format_bytes(machine.ram)}"
    return ""


def measure(
    model: nn.Module, device_map: Mapping[str, Device], load: Workload, slots: int = 2, repeats: int = 3
) -> Measurement:
    """Run a model with random weights on GPU 0, as a dry run foretold it.

    Args:
        model: empty, as `zoo.empty_model` makes it; it gets memory, and should be let go of afterwards.
        device_map: places, GPU 0 and "cpu" alone.
        load: what to run.
        slots: see `dispatch_model`.
        repeats: of the timed runs, which follow the recorded one; medians are kept.

    Raises:
        ValueError: the map names another device.
        torch.cuda.OutOfMemoryError: it does not fit.
    """
    if wrong := {device for device in device_map.values() if device not in (0, "cpu")}:
        raise ValueError(f"only GPU 0 and RAM can be measured, not {', '.join(sorted(map(device_label, wrong)))}")
    times: list[list[float]] = []
    try:
        with record_allocations(0) as mark:
            fill(model.eval(), device_map)
            if set(device_map.values()) != {0}:
                dispatch_model(model, dict(device_map), 0, slots=slots)
            mark("fill")
            for i, _ in enumerate(passes(model, load, "cuda:0")):
                mark(f"token {i}" if i else "prefill")
        for _ in range(repeats):
            torch.cuda.synchronize()
            start, row = time.perf_counter(), []
            for _ in passes(model, load, "cuda:0"):
                torch.cuda.synchronize()
                now = time.perf_counter()
                row.append(now - start)
                start = now
            times.append(row)
    finally:
        del model
        settle(0)
    recording: Recording = mark.recording  # type: ignore[attr-defined]
    return Measurement(recording, tuple(map(statistics.median, zip(*times))))
