"""What several links do at once, and what the CPU reads beside them: two parts of `calibrate()`.

Boards share lanes, and links and CPU share the RAM: each alone says too much. So all GPUs are copied to at once, again
and again, and each link's rate is what arrived; meanwhile the CPU multiplies vectors by matrices that lie in RAM, more
than its caches hold. It does so as in a model that `graph_decode` runs (`offload/host_calls.py`): one CUDA graph calls
it for MLP after MLP. What a call takes without an MLP is measured alone, and taken off.

Leaves out: what is done with it (`maps/links.py`, `maps/on_cpu.py`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints.ring import Slab
from ..offload.captured import Rings
from ..offload.host_calls import Desk
from ..offload.on_cpu import READ
from ..offload.recording import Recording
from ..units import MiB

PIECE = 64 * MiB  # bytes of one copy
Mlp = tuple[Tensor, Tensor, Tensor]  # gate and up, shape (height, width), and down, shape (width, height)


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


class Called:
    """MLPs that one CUDA graph has the CPU compute, one after the other, as a decode step does.

    Args:
        device: the GPU whose graph it is.
        mlps: (gate, up, down) of each; none: as many calls that compute nothing.
        x: what the first is given, shape (1, width).
        count: how many calls.
    """

    def __init__(self, device: torch.device, mlps: Sequence[Mlp], x: Tensor, count: int) -> None:
        self.mlps, self.threads, self.count = mlps, torch.get_num_threads(), count
        self.recording = Recording([device], Rings(nn.Identity()))
        self.desk, self.first = Desk(device, x.nbytes), x.to(device)
        self.recording.record(self._step)

    def _step(self) -> Tensor:
        value = self.first
        for k in range(self.count):
            given, place = self.desk.give(value), self.desk.place(value)
            mlp = self.mlps[k % len(self.mlps)] if self.mlps else None
            self.recording.calls.add(partial(_compute, mlp, self.threads, given, place), self.first.device)
            value = self.desk.take(value)
        return value

    def __call__(self) -> int:
        """Do it; returns bytes that were read, or the number of calls that read nothing."""
        self.recording.replay()
        return self.count * (3 * self.mlps[0][0].nbytes if self.mlps else 1)


def _compute(mlp: Mlp | None, threads: int, given: Tensor, place: Tensor) -> None:
    if mlp is not None:
        torch.set_num_threads(threads)
        with torch.no_grad():
            place.copy_(_product(mlp, given))


def measure_together(nbytes: int, matrices: int) -> tuple[tuple[float, ...], dict[str, Any], float]:
    """Bytes a second to each GPU while all are copied to, what the CPU reads meanwhile, and what a call of it takes.

    Args:
        nbytes: of pinned RAM for each GPU.
        matrices: bytes of matrices in RAM.

    Returns:
        The links' rates; `measure_cpu`'s rows; seconds of a call by a CUDA graph, links busy.
    """
    traffic = Traffic([torch.device("cuda", i) for i in range(torch.cuda.device_count())], nbytes)
    traffic.start(48)
    links = traffic.finish()
    empty = Called(traffic.devices[0], [], torch.zeros(1, 4096, dtype=torch.bfloat16), 32)
    call = 1 / _reading(empty, 0.1, traffic)[0]
    return links, measure_cpu(matrices, traffic=traffic, call=call), call


def measure_cpu(
    nbytes: int, seconds: float = 0.15, traffic: Traffic | None = None, call: float = 0.0, width: int = 4096
) -> dict[str, tuple[tuple[int, float, float], ...]]:
    """What the CPU reads: dtype -> (threads, bytes of weights a second, bytes a second of all links meanwhile).

    Args:
        nbytes: of matrices, more than the processor's caches hold.
        seconds: for each figure.
        traffic: the links, of whose first GPU a graph calls the CPU; None measures the CPU alone, called by Python.
        call: seconds of a call, which are taken off.
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
            tall, x = torch.randn(width * 11 // 4, width).mul_(0.02).to(dtype), torch.randn(1, width).to(dtype)
            count = max(1, nbytes // (3 * tall.nbytes))
            mlps = [(tall.clone(), tall.clone(), tall.t().contiguous()) for _ in range(count)]
            rows = []
            for threads in counts:
                torch.set_num_threads(threads)
                work: Callable[[], int] = partial(_pass, mlps, x)
                if traffic is not None:
                    work = Called(traffic.devices[0], mlps, x, max(count, 8))
                reads, links = _reading(work, seconds, traffic)
                one = 3 * tall.nbytes / reads
                rows.append((threads, 3 * tall.nbytes / max(one - call, one / 2), links))
            found[str(dtype).removeprefix("torch.")] = tuple(rows)
    finally:
        torch.set_num_threads(before)
    return found


def _reading(work: Callable[[], int], seconds: float, traffic: Traffic | None) -> tuple[float, float]:
    """What work does in a second, and bytes a second of all links meanwhile."""
    with torch.inference_mode():
        one = min(_timed(work) for _ in range(2))
        if traffic is not None:
            traffic.start(int(2 + 1.5 * (seconds + one) * 64e9 / PIECE))  # more than arrive in that time
        done, begin = 0, time.perf_counter()
        while (took := time.perf_counter() - begin) < seconds or not done:
            done += work()
    links = sum(traffic.rates()) if traffic is not None else 0.0
    if traffic is not None:
        traffic.finish()
    return done / took, links


def _product(mlp: Mlp, x: Tensor) -> Tensor:
    gate, up, down = mlp
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def _pass(mlps: Sequence[Mlp], x: Tensor) -> int:
    """Bytes that were read."""
    for mlp in mlps:
        _product(mlp, x)
    return 3 * len(mlps) * mlps[0][0].nbytes


def _timed(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
