"""Recording what a real run asks of PyTorch's CUDA allocator, as the events that the model in `machine/allocator.py`
replays.

Leaves out: fake runs, which `trace.py` records in the same form.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..machine.allocator import Recording

MOST_EVENTS = 2_000_000


def settle(device: int = 0) -> int:
    """Give back everything that the allocator can give back; returns the bytes that are still reserved."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


@contextmanager
def record_allocations(device: int = 0, capacity: int | None = None) -> Iterator[Callable[[str], None]]:
    """Record the allocations of a block of code on one GPU.

    Args:
        device: the GPU's number. Other GPUs are not recorded.
        capacity: the most bytes that its segments may take in this block, which then must not empty the cache itself;
            None leaves the limit as it is.

    Yields:
        A function that marks a moment by name; its attribute `recording` is complete once the block is left.

    A replay starts from nothing. What is held from before the block, in bytes, is said in `about["held"]` (0 if no
    tensor lies on the GPU) and left out of the peaks.
    """
    held = {"reserved": settle(device), "allocated": torch.cuda.memory_allocated(device)}
    total = torch.cuda.get_device_properties(device).total_memory
    if capacity is not None:
        torch.cuda.set_per_process_memory_fraction(capacity / total, device)
    recording = Recording(capacity=None if capacity is None else int(capacity / total * total))
    moments: list[tuple[str, int]] = []
    before = _count(device)

    def mark(name: str) -> None:
        moments.append((name, _count(device) - before))

    mark.recording = recording  # type: ignore[attr-defined]
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.memory._record_memory_history("all", context=None, max_entries=MOST_EVENTS)
    try:
        yield mark
    finally:
        torch.cuda.synchronize(device)
        stats = torch.cuda.memory_stats(device)
        entries = torch.cuda.memory._snapshot()["device_traces"][device]
        torch.cuda.memory._record_memory_history(None)
        if capacity is not None:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        _read(entries, moments, recording)
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
    """Turn PyTorch's trace into events.

    Segments are given back when the cache is emptied, or when a request finds no room below the capacity. The first is
    an event of its own, and so is the second if the request failed in the end; otherwise it belongs to the request.
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
