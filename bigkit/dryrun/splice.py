"""The same run on GPUs whose attention takes another kernel: all else is left as it was, and nothing is run again.

GPUs of two kinds often differ in the kernels of scaled_dot_product_attention alone. A dry run notes where each call of
it begins and ends. For another GPU each kind of call is made once on a fake GPU of that sort, and what it does is put
in the place of what the first one did.

Leaves out: GPUs on which more than attention differs, and kernels whose result lies otherwise in memory, which later
operations would see: these runs are made anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..devices import Device
from ..machine.allocator import Recording
from ..machine.roofline import Operation
from ._torch import storage_key
from .attention import Call, Target


class Attended(NamedTuple):
    """Where a call of attention lies in a trace.

    Args:
        device: where it ran.
        call: what it was asked for.
        layout: shape and strides of its result.
        event, request, operation: how many events and requests of the device, and operations, there were before it.
        events, requests, operations: how many are its own.
        result: which of its requests its result lies in, from 1.
        before, after: steps that Python had taken since the last kernel, at its beginning and at its end.
    """

    device: str
    call: Call
    layout: Any
    event: int
    request: int
    operation: int
    events: int
    requests: int
    operations: int
    result: int
    before: int
    after: int

    def moved(self, device: str, event: int, request: int, operation: int) -> Attended:
        """The same, on a device, so much further on."""
        event, request, operation = self.event + event, self.request + request, self.operation + operation
        return self._replace(device=device, event=event, request=request, operation=operation)


@dataclass(frozen=True)
class Spliced:
    """What `splice` gives: fields of a dry run."""

    operations: list[Operation]
    steps: list[tuple[str, int]]
    recordings: dict[Device, Recording]
    kinds: dict[Device, list[str]]
    workspaces: dict[Device, list[int]]


class Variant(NamedTuple):
    """What a call does on another GPU."""

    events: list[int]
    kinds: list[str]
    operations: list[Operation]
    result: int
    after: int


def splice(run: Any, target: Target) -> Spliced | None:
    """What a dry run would be on GPUs that differ in attention alone; None if results of attention lie otherwise.

    None, too, of a run with graphs, whose memory comes from pools of their own.

    Args:
        run: a `DryRun`, whose `attended` are in order.
        target: the other GPU.
    """
    if any(recording.streams for recording in run.recordings.values()):
        return None
    operations: list[Operation] = []
    made: dict[tuple[Call, int], Variant | None] = {}
    variants: list[Variant] = []
    at = late = 0  # operations that are done; steps of Python that come more before the next kernel
    ends = [0]  # how much longer the operations are, after each call
    for part in run.attended:
        late = _take(operations, run.operations[at : part.operation], late)
        key = part.call, part.before + late
        if key not in made:
            made[key] = variant_of(part, target, part.before + late)
        if (variant := made[key]) is None:
            return None
        operations += [replace(operation, device=part.device) for operation in variant.operations]
        variants.append(variant)
        late = variant.after - part.after
        at = part.operation + part.operations
        ends.append(len(operations) - at)
    _take(operations, run.operations[at:], late)
    counted = [part.operation + part.operations for part in run.attended]
    steps = [(name, end + ends[sum(place <= end for place in counted)]) for name, end in run.steps]
    spliced = Spliced(operations, steps, {}, {}, {})
    for device, recording in run.recordings.items():
        own = [pair for pair in zip(run.attended, variants) if pair[0].device == f"cuda:{device}"]
        spliced.recordings[device], spliced.kinds[device], number = _spliced(recording, run.kinds[device], own)
        if device in run.workspaces:
            spliced.workspaces[device] = [number[request] for request in run.workspaces[device]]
    return spliced


def _take(operations: list[Operation], more: Sequence[Operation], late: int) -> int:
    """Add operations, the first of them issued so many steps later; returns how many steps wait for the next ones."""
    if not more:
        return late
    operations += [replace(more[0], issued=more[0].issued + late), *more[1:]] if late else more
    return 0


def _spliced(
    recording: Recording, kinds: Sequence[str], parts: Sequence[tuple[Attended, Variant]]
) -> tuple[Recording, list[str], list[int]]:
    """One device's events and kinds, with other ones in the place of some calls', and the new numbers of requests."""
    events: list[int] = []
    names: list[str] = []
    number = [0]  # request -> its number now
    begin = 0
    longer: list[tuple[int, int]] = []  # (event, how many events more there are from it on)

    def keep(end: int) -> None:
        for event in recording.events[begin:end]:
            if event > 0:
                names.append(kinds[len(number) - 1])
                number.append(len(names))
            events.append(event if event > 0 else -number[-event])

    for part, variant in parts:
        keep(part.event)
        first = len(names)
        events += [event if event > 0 else event - first for event in variant.events]
        names += variant.kinds
        number += [first + variant.result if i == part.result else 0 for i in range(1, part.requests + 1)]
        begin = part.event + part.events
        longer.append((begin, len(events) - begin))
    keep(len(recording.events))
    marks = [
        (name, at + next((more for end, more in reversed(longer) if end <= at), 0)) for name, at in recording.marks
    ]
    return replace(recording, events=events, marks=marks), names, number


def variant_of(part: Attended, target: Target, before: int) -> Variant | None:
    """What a call does on a GPU, Python having taken so many steps before; None if its result lies otherwise."""
    from .fake_gpu import fake_gpus

    tensors, mask, is_causal, scale, grouped = part.call
    with fake_gpus(target) as log:
        log.warm.add("cuda:0")  # the workspace of products is there
        given: list[Any] = [
            None if about is None else torch.empty_strided(*about[:2], dtype=about[2], device="cuda:0")
            for about in (*tensors, mask)
        ]
        query, key, value, mask = given
        trace = log.trace
        recording, first, done = trace.recordings["cuda:0"], len(trace.kinds["cuda:0"]), len(trace.operations)
        begin, trace.unissued = len(recording.events), before
        options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": grouped}
        out = F.scaled_dot_product_attention(query, key, value, mask, **options)
        if layout_of(out) != part.layout:
            return None
        events = [event if event > 0 else event + first for event in recording.events[begin:]]
        result = log.live[storage_key(out)][1] - first
        return Variant(events, trace.kinds["cuda:0"][first:], trace.operations[done:], result, trace.unissued)


def layout_of(tensor: torch.Tensor) -> Any:
    """How a result lies in memory; what the stride of a dimension of one element is, nobody sees."""
    strides = tuple(step if size > 1 else 0 for size, step in zip(tensor.shape, tensor.stride()))
    return tuple(tensor.shape), strides, tensor.storage_offset(), tensor.untyped_storage().nbytes()
