"""Dry runs for other viewers: a Chrome trace of the lanes; open it in chrome://tracing or https://ui.perfetto.dev.

Leaves out: memory, event by event (`bigkit.draw.dryrun` draws it).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from ..machine.streams import Span


def chrome_trace(spans: Iterable[Span], name: str = "dry run") -> str:
    """Spans as a Chrome trace, JSON text: one row for each lane.

    >>> json.loads(chrome_trace([Span("disk", "h.0", 0.0, 0.5)]))["traceEvents"][-1]["dur"]
    500000.0
    """
    spans = list(spans)
    rows = {lane: row for row, lane in enumerate(dict.fromkeys(span.lane for span in spans))}
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 0, "args": {"name": name}}]
    for lane, row in rows.items():
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": row, "args": {"name": lane}})
    for span in spans:
        times = {"ts": 1e6 * span.start, "dur": 1e6 * (span.end - span.start)}  # µs
        events.append({"ph": "X", "name": span.name, "pid": 0, "tid": rows[span.lane], **times})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
