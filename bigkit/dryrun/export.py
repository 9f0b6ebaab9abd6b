"""Dry runs for other viewers: a Chrome trace of the lanes, and a memory snapshot for PyTorch's memory viewer.

    chrome_trace      JSON; open it in chrome://tracing or https://ui.perfetto.dev
    memory_snapshot   what `torch.cuda.memory._snapshot()` gives after a real run: drop its pickle on
                      https://docs.pytorch.org/memory_viz, beside a real one

Each request in a snapshot has one frame: the kind of the tensor, and the step that made it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..machine.allocator import Block, CachingAllocator, Recording
from ..machine.roofline import Span


def chrome_trace(spans: Iterable[Span], name: str = "dry run") -> str:
    """Spans as a Chrome trace: one row for each lane.

    >>> json.loads(chrome_trace([Span("disk", "h.0", 0.0, 0.5)]))["traceEvents"][-1]["dur"]
    500000.0
    """
    spans = list(spans)
    rows = {lane: i for i, lane in enumerate(dict.fromkeys(span.lane for span in spans))}
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 0, "args": {"name": name}}]
    events += [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": row, "args": {"name": lane}} for lane, row in rows.items()
    ]
    events += [
        {"ph": "X", "name": span.name, "pid": 0, "tid": rows[span.lane], "ts": 1e6 * span.start,
         "dur": 1e6 * (span.end - span.start)}
        for span in spans
    ]  # fmt: skip
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def memory_snapshot(recordings: Mapping[int, Recording], kinds: Mapping[int, Sequence[str]]) -> dict[str, Any]:
    """The snapshot of all devices, as `torch.cuda.memory._snapshot()` would give it.

    Args:
        recordings: device number -> what was asked of its allocator.
        kinds: device number -> what each request was for.

    >>> snapshot = memory_snapshot({0: Recording([512, 2**20])}, {0: ["weights", "weights"]})
    >>> len(snapshot["segments"]), [entry["action"] for entry in snapshot["device_traces"][0]]
    (1, ['segment_alloc', 'alloc', 'alloc'])
    """
    traces: list[list[dict[str, Any]]] = [[] for _ in range(max(recordings, default=-1) + 1)]
    segments: list[dict[str, Any]] = []
    for device, recording in recordings.items():
        traces[device], held = _trace(recording, kinds[device])
        segments += [{"device": device, **segment} for segment in held]
    return {"segments": segments, "device_traces": traces, "allocator_settings": {}, "external_annotations": []}


def _trace(recording: Recording, kinds: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The entries of one device, and its segments at the end."""
    entries: list[dict[str, Any]] = []

    def note(action: str, address: int, size: int, frames: list[dict[str, Any]]) -> None:
        entries.append({"action": action, "addr": address, "size": size, "stream": 0, "frames": frames,
                        "time_us": len(entries)})  # fmt: skip

    def watch(size: int, address: int) -> None:
        note("segment_alloc" if size > 0 else "segment_free", address, abs(size), [])

    gpu = CachingAllocator(watch=watch)
    blocks: list[Block] = []
    frames: list[list[dict[str, Any]]] = []
    marks = [*recording.marks, ("end", len(recording.events))]
    step = 0
    for i, event in enumerate(recording.events):
        while i >= marks[step][1] and step + 1 < len(marks):
            step += 1
        if event > 0:
            frames.append([{"filename": kinds[len(blocks)], "line": 0, "name": marks[step][0]}])
            blocks.append(gpu.malloc(event))
            note("alloc", blocks[-1].address, event, frames[-1])
        elif event < 0:
            block = blocks[-event - 1]
            for action in ("free_requested", "free_completed"):
                note(action, block.address, block.requested, frames[-event - 1])
            gpu.free(block)
        else:
            gpu.empty_cache()
    owner = {id(block): frames[i] for i, block in enumerate(blocks) if block.used}
    return entries, [_segment(first, owner) for first in gpu.segments()]


def _segment(first: Block, owner: Mapping[int, list[dict[str, Any]]]) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    block: Block | None = first
    while block is not None:
        state = "active_allocated" if block.used else "inactive"
        requested = block.requested if block.used else 0
        parts.append({"address": block.address, "size": block.size, "requested_size": requested, "state": state,
                      "frames": owner.get(id(block), []) if block.used else []})  # fmt: skip
        block = block.after
    used = sum(part["size"] for part in parts if part["state"] == "active_allocated")
    return {
        "address": first.address, "total_size": sum(part["size"] for part in parts), "stream": first.pool[0],
        "segment_type": "small" if first.pool[1] else "large", "segment_pool_id": (0, 0), "is_expandable": False,
        "allocated_size": used, "active_size": used, "requested_size": sum(part["requested_size"] for part in parts),
        "blocks": parts, "frames": [],
    }  # fmt: skip
