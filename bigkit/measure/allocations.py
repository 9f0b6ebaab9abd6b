"""Recording what a real run asks of PyTorch's CUDA allocator, as events that `machine/allocator.py` replays.

Leaves out: fake runs, whose events `dryrun/fake_gpu.py` records in the same form.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ..machine.allocator import Recording
from . import _torch


def settle(device: int = 0) -> int:
    """Give back everything that the allocator can give back; returns the bytes that are still reserved."""
    gc.collect()
    torch.cuda.synchronize(device)
    _torch.clear_cublas_workspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


@contextmanager
def record_allocations(device: int = 0, capacity: int | None = None) -> Iterator[Callable[[str], None]]:
    """Record the allocations of a block of code on one GPU.

    A replay starts from nothing: bytes that are held from before the block are left out of the peaks and stand in
    `about["held"]` (0 if no tensor lies on the GPU). PyTorch's peak statistics start anew with the block; the memory
    limit of the process is afterwards what it was.

    Args:
        device: the GPU's number. Other GPUs are not recorded.
        capacity: the most bytes that its segments may take in this block, which then must not empty the cache itself;
            None leaves the limit as it is.

    Yields:
        A function that marks a moment by name; its attribute `recording` is complete once the block is left.

    Raises:
        RuntimeError: PyTorch is recording its memory history already, which would end with this block.
    """
    if _torch.records_history():
        raise RuntimeError(
            "PyTorch records its memory history already, and records one at a time: end it with "
            "torch.cuda.memory._record_memory_history(None) first"
        )
    held = {"reserved": settle(device), "allocated": torch.cuda.memory_allocated(device)}
    recording = Recording()
    moments: list[tuple[str, int]] = []
    before = _count(device)

    def mark(name: str) -> None:
        moments.append((name, _count(device) - before))

    mark.recording = recording  # type: ignore[attr-defined]
    with ExitStack() as restore:
        if capacity is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            recording.capacity = int(capacity / total * total)
            limit = torch.cuda.get_per_process_memory_fraction(device)
            restore.callback(torch.cuda.set_per_process_memory_fraction, limit, device)
            torch.cuda.set_per_process_memory_fraction(capacity / total, device)
        torch.cuda.reset_peak_memory_stats(device)
        restore.callback(_torch.stop_history)
        _torch.start_history()
        try:
            yield mark
        finally:
            torch.cuda.synchronize(device)
            stats = torch.cuda.memory_stats(device)
            _read(_torch.history(device), moments, recording)
            recording.peaks = {name: stats[f"{name}_bytes.all.peak"] - kept for name, kept in held.items()}
            recording.about = {
                "gpu": torch.cuda.get_device_name(device),
                "torch": torch.__version__,
                "held": str(held["reserved"]),
            }


def _count(device: int) -> int:
    """Requests and frees so far."""
    stats = torch.cuda.memory_stats(device)
    return int(stats["allocation.all.allocated"] + stats["allocation.all.freed"])


def _read(entries: list[dict[str, Any]], moments: list[tuple[str, int]], into: Recording) -> None:
    """Turn PyTorch's history into events.

    Segments are given back when the cache is emptied, which is an event of its own, or to make room for a request. Then
    they belong to the request, unless it failed all the same: that too is an event of its own.
    """
    live: dict[int, int] = {}  # address -> number of the request
    streams: dict[int, int] = {0: 0}
    emptied = False
    waiting = list(moments)
    done = 0
    for i, entry in enumerate(entries):
        action, address, size = entry["action"], entry.get("addr", 0), entry["size"]  # an "oom" has no address
        while waiting and waiting[0][1] <= done:
            into.marks.append((waiting.pop(0)[0], len(into.events)))
        if action == "segment_free":
            if not emptied and (into.capacity is None or not _makes_room(entries, i)):
                into.events.append(0)
            emptied = True
            into.segments.append((len(into.events), -size, address))
            continue
        if action == "segment_alloc":
            into.segments.append((len(into.events), size, address))
        elif action == "alloc":
            into.events.append(size)
            into.addresses.append(address)
            into.streams.append(streams.setdefault(entry["stream"], len(streams)))
            live[address] = len(into.addresses)
            done += 1
        elif action == "free_completed" and address in live:
            into.events.append(-live.pop(address))
            done += 1
        emptied = False
    into.marks += [(name, len(into.events)) for name, _ in waiting]
    if not any(into.streams):
        into.streams = []


def _makes_room(entries: list[dict[str, Any]], i: int) -> bool:
    """Whether the segments given back from entry `i` on are followed by a new one."""
    for entry in entries[i:]:
        if entry["action"] != "segment_free":
            return bool(entry["action"] == "segment_alloc")
    return False
