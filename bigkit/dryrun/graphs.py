"""CUDA graphs on fake GPUs: what `graph_decode` records, and what the recording keeps.

A graph's memory cannot be given to others as long as the graph lives, so PyTorch takes it from a pool of its own: here
the pool of another stream. A recording computes nothing, but Python takes its steps; a replay computes all of it, and
Python takes one step.

MLPs that the CPU computes are called by the graph. It ends when all that it fetches ahead has arrived.

Leaves out: what the driver keeps for a graph beside PyTorch's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar
from unittest import mock

import torch

from ..machine.roofline import CALL, HOST, Operation
from ..offload import graphs, recording
from ..offload.captured import Found, Rings
from ..offload.host_calls import HostCalls
from .fake_gpu import OperationLog

Result = TypeVar("Result")


class FakeRecording:
    """Takes the place of `offload.recording.Recording`.

    Args:
        log: notes the run.
        rings: the slots that the recorded work fills.
    """

    error = None  # nothing but what `record` raises

    def __init__(self, log: OperationLog, rings: Rings) -> None:
        self.log, self.rings, self.calls = log, rings, HostCalls()  # none: no data, nothing for the host to compute
        self._operations: list[Operation] = []
        self._found: Found = {}

    def record(self, function: Callable[[], Result]) -> Result:
        """Call a function; its memory comes from a pool of its own, and its operations are not yet done."""
        trace = self.log.trace
        first = len(trace.operations)
        trace.pools += 1
        warm, self.log.warm = self.log.warm, set()  # it is recorded on new streams, and libraries take memory for each
        with self.rings.borrowed():
            trace.pool = trace.pools
            try:
                result, self._found = self.rings.recorded(function)
                for streamer, slots in self._found.items():
                    for slot in slots.values():
                        streamer.lane.arrive(slot)
            finally:
                trace.pool, self.log.warm = 0, warm
        self._operations = [
            replace(operation, issued=0, name=CALL if operation.name == HOST else operation.name)
            for operation in trace.operations[first:]
        ]
        issued = sum(operation.issued for operation in trace.operations[first:])
        del trace.operations[first:]
        trace.unissued += issued
        return result

    def replay(self) -> None:
        """Note all of it, in one step of Python."""
        trace = self.log.trace
        with self.rings.ready(self._found):
            trace.operations += self._operations
            trace.unissued += 1


@contextmanager
def fake_recordings(log: OperationLog) -> Iterator[None]:
    """Let `graph_decode` record fake GPUs meanwhile."""

    class Recording(FakeRecording):
        def __init__(self, devices: Sequence[torch.device], rings: Rings) -> None:
            super().__init__(log, rings)

        refuse = staticmethod(recording.Recording.refuse)

    idle = mock.patch.object(torch.cuda, "synchronize", lambda device=None: None)
    with mock.patch.object(graphs, "Recording", Recording), idle:
        yield
