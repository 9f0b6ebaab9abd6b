"""How much memory a process holds while it does something, watched from outside, in two kinds.

*Anonymous* memory is what a program has written: the system cannot drop it, and ends a process when it no longer fits.
*File-backed* memory is a view of a file: the system drops it when RAM is short, and reads it again when it is needed.

Leaves out: the memory of a GPU (`measure/allocations.py`).
"""

from __future__ import annotations

import linecache
import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import psutil

from ..distributed.notebook import pack

PRELOAD = ["torch", "bigkit.checkpoints.load", "bigkit.zoo.gpt"]  # imported once, before the processes are forked


class Look(NamedTuple):
    """What a process held at one moment, above what it held at the start."""

    seconds: float
    anonymous: int  # bytes
    file_backed: int  # bytes

    def above(self, start: Look) -> Look:
        """What has been added since the start."""
        seconds, anonymous, file_backed = start
        return Look(self.seconds - seconds, self.anonymous - anonymous, self.file_backed - file_backed)


@dataclass
class MemoryTrace:
    """What a process held over time, and how each of its steps ended.

    Attributes:
        looks: one every few milliseconds, in order.
        ends: step -> the look at its end; "start" is the first.
        result: what the last step returned; of a single step nothing, since that may be a whole model.
    """

    looks: list[Look] = field(default_factory=list)
    ends: dict[str, Look] = field(default_factory=dict)
    result: Any = None

    def peak(self, step: str | None = None) -> int:
        """The most anonymous bytes until a step ended, by default the last one."""
        end = self.ends[step or [*self.ends][-1]].seconds
        return max(look.anonymous for look in self.looks if look.seconds <= end)

    def seconds(self, step: str) -> float:
        """How long a step took."""
        order = [*self.ends]
        return self.ends[step].seconds - self.ends[order[order.index(step) - 1]].seconds


def trace_memory(
    steps: Mapping[str, Callable[..., Any]], warm_up: Callable[[], Any] | None = None, every: float = 0.005
) -> MemoryTrace:
    """Run steps in a process of their own, and watch its memory from here.

    The process is forked from one that has imported torch and nothing else, so that it starts small and at once; where
    Python cannot fork, it is started anew. Functions of a notebook are sent to it by value.

    Args:
        steps: name -> function. The first is called without arguments, the others with what the first returned.
        warm_up: called before the start. What the first use of a library costs is then not counted.
        every: seconds between two looks.

    Raises:
        RuntimeError: a step raised; its traceback is in the message.

    >>> trace = trace_memory({"build": lambda: bytearray(b"x" * 50_000_000), "use": len})
    >>> trace.result, 45e6 < trace.peak() < 120e6, list(trace.ends)
    (50000000, True, ['start', 'build', 'use'])
    """
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(PRELOAD)
    here, there = context.Pipe()
    child = context.Process(target=_child, args=(there, pack(_run, (dict(steps), warm_up))), daemon=True)
    child.start()
    there.close()
    try:
        return _watch(here, psutil.Process(child.pid), every)
    finally:
        here.close()
        child.terminate()
        child.join()


def _watch(pipe: Connection, process: psutil.Process, every: float) -> MemoryTrace:
    """Look at a process until it has sent its result; it waits for an answer after each step."""
    trace, start = MemoryTrace(), Look(0.0, 0, 0)
    while True:
        ended = pipe.poll(every)
        try:
            kind, value = pipe.recv() if ended else ("", None)
        except EOFError:
            raise RuntimeError("the process was ended from outside; often that means that memory ran out") from None
        if kind == "failed":
            raise RuntimeError(f"a step failed:\n{value}")
        if kind == "result":
            end = [*trace.ends.values()][-1].seconds
            trace.looks, trace.result = [look for look in trace.looks if look.seconds <= end], value
            return trace
        now = _held(process)
        if value:
            start = now if value == "start" else start
            trace.ends[value] = now.above(start)
            trace.looks.append(trace.ends[value])
            pipe.send(None)
        elif trace.ends:
            trace.looks.append(now.above(start))


def _held(process: psutil.Process) -> Look:
    """The clock and what a process holds. Linux counts both kinds; elsewhere the pages of its own come closest."""
    found = process.memory_info()
    shared = getattr(found, "shared", None)
    anonymous = process.memory_full_info().uss if shared is None else found.rss - shared
    return Look(time.perf_counter(), anonymous, found.rss - anonymous)


def _child(pipe: Connection, payload: bytes) -> None:
    """Run the steps, and wait after each of them until the parent has looked."""
    try:
        run, args, cells = pickle.loads(payload)
        linecache.cache.update(cells)  # the lines of a notebook, for a traceback
        pipe.send(("result", run(pipe, *args)))
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))


def _run(pipe: Connection, steps: dict[str, Callable[..., Any]], warm_up: Callable[[], Any] | None) -> Any:
    if warm_up is not None:
        warm_up()
    value = first = None
    every: dict[str, Callable[..., Any]] = {"start": lambda: None, **steps}
    for i, (name, step) in enumerate(every.items()):
        value = step(first) if i > 1 else step()
        first = value if i == 1 else first
        pipe.send(("end", name))
        pipe.recv()
    return value if len(steps) > 1 else None
