"""What several links do at once, and what the CPU reads beside them: two parts of `calibrate()`.

Boards share lanes, and links and CPU share the RAM: each alone says too much. So all GPUs are copied to at once, again
and again, and each link's rate is what arrived; meanwhile the CPU multiplies vectors by matrices that lie in RAM, more
than its caches hold, as it would in a model (`offload/on_cpu.py`).

Leaves out: what is done with it (`maps/links.py`, `maps/on_cpu.py`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints.ring import Slab
from ..offload.on_cpu import READ
from ..units import MiB

PIECE = 64 * MiB  # bytes of one copy


class Traffic:
    """Copies from pinned RAM to devices, all at once, in the background.

    Args:
        devices: CUDA devices.
        nbytes: of RAM from which is copied to each.
    """

    def __init__(self, devices: Sequence[torch.device], nbytes: int) -> None:
        self.devices = list(devices)
        self.slabs = [Slab(nbytes, pin=True) for _ in self.devices]
        for slab in self.slabs:
            slab.pin()
        self.targets = [torch.empty(min(nbytes, PIECE), dtype=torch.uint8, device=device) for device in self.devices]
        self.streams = [torch.cuda.Stream(device) for device in self.devices]
        self.events: list[list[Any]] = []

    def start(self, pieces: int) -> None:
        """Queue copies of so many pieces to each device."""
        self.events = [[] for _ in self.devices]
        for k in range(pieces):
            for slab, target, stream, events in zip(self.slabs, self.targets, self.streams, self.events):
                at = k * target.nbytes % max(slab.bytes.nbytes - target.nbytes + 1, 1)
                with torch.cuda.stream(stream):
                    target.copy_(slab.bytes[at : at + target.nbytes], non_blocking=True)
                    events.append(torch.cuda.Event(enable_timing=True))
                    events[-1].record(stream)

    def rates(self) -> tuple[float, ...]:
        """Bytes a second to each device, by what has arrived so far."""
        done = [[event for event in events if event.query()] for events in self.events]
        return tuple(
            (len(events) - 1) * target.nbytes / (events[0].elapsed_time(events[-1]) / 1000) if len(events) > 1 else 0.0
            for events, target in zip(done, self.targets)
        )

    def finish(self) -> tuple[float, ...]:
        """Wait for all copies; the rates."""
        for stream in self.streams:
            stream.synchronize()
        return self.rates()


def measure_together(nbytes: int, matrices: int) -> tuple[tuple[float, ...], dict[str, Any]]:
    """Bytes a second to each GPU while all are copied to, and what the CPU reads meanwhile (`measure_cpu`).

    Args:
        nbytes: of pinned RAM for each GPU.
        matrices: bytes of matrices in RAM.
    """
    traffic = Traffic([torch.device("cuda", i) for i in range(torch.cuda.device_count())], nbytes)
    traffic.start(48)
    return traffic.finish(), measure_cpu(matrices, traffic=traffic)


def measure_cpu(
    nbytes: int, seconds: float = 0.15, traffic: Traffic | None = None, width: int = 4096
) -> dict[str, tuple[tuple[int, float, float], ...]]:
    """What the CPU reads: dtype -> (threads, bytes of weights a second, bytes a second of all links meanwhile).

    Args:
        nbytes: of matrices, more than the processor's caches hold.
        seconds: for each figure.
        traffic: the links; None measures the CPU alone.
        width: of a matrix of 11/4 of it in height.

    >>> [*measure_cpu(2**18, 0.001, width=64)]
    ['bfloat16', 'float32']
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = sorted({max(1, cores * k // 8) for k in (4, 6, 7, 8)})
    before = torch.get_num_threads()
    found = {}
    try:
        for dtype in READ:
            tall = torch.randn(width * 11 // 4, width).mul_(0.02).to(dtype)
            count = max(1, nbytes // (3 * tall.nbytes))
            mlps = [(tall.clone(), tall.clone(), tall.t().contiguous()) for _ in range(count)]
            rows = []
            for threads in counts:
                torch.set_num_threads(threads)
                rows.append((threads, *_reading(mlps, seconds, traffic)))
            found[str(dtype).removeprefix("torch.")] = tuple(rows)
    finally:
        torch.set_num_threads(before)
    return found


def _reading(mlps: list[tuple[Tensor, Tensor, Tensor]], seconds: float, traffic: Traffic | None) -> tuple[float, float]:
    x = torch.randn(1, mlps[0][0].shape[1]).to(mlps[0][0].dtype)
    with torch.inference_mode():
        one = _timed(lambda: _pass(mlps[:1], x))
        if traffic is not None:
            traffic.start(int(2 + 1.5 * (seconds + len(mlps) * one) * 64e9 / PIECE))  # more than arrive in that time
        done, begin = 0, time.perf_counter()
        while (took := time.perf_counter() - begin) < seconds or not done:
            done += _pass(mlps, x)
    links = sum(traffic.rates()) if traffic is not None else 0.0
    if traffic is not None:
        traffic.finish()
    return done / took, links


def _pass(mlps: list[tuple[Tensor, Tensor, Tensor]], x: Tensor) -> int:
    """Bytes that were read."""
    for gate, up, down in mlps:
        F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    return 3 * len(mlps) * mlps[0][0].nbytes


def _timed(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
