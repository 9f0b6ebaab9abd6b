"""The memory of a process, watched from outside: what it wrote, what it mapped, when, and how it failed."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import psutil
import pytest

from bigkit.measure.memory import trace_memory

MB = 10**6


def test_anonymous_and_file_backed_memory_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(60 * MB))

    def mapped() -> mmap.mmap:
        return mmap.mmap(os.open(file, os.O_RDONLY), 0, access=mmap.ACCESS_READ)

    def touch(view: mmap.mmap) -> int:
        return sum(view[i] for i in range(0, len(view), mmap.PAGESIZE))

    def copy(view: mmap.mmap) -> int:
        return len(bytes(view))

    trace = trace_memory({"map": mapped, "touch": touch, "copy": copy})
    assert trace.result == 60 * MB and list(trace.ends) == ["start", "map", "touch", "copy"]
    assert trace.ends["map"].file_backed < 5 * MB
    if psutil.LINUX:
        assert abs(trace.ends["touch"].file_backed - 60 * MB) < 5 * MB
        assert trace.peak("touch") < 5 * MB
    assert 50 * MB < trace.peak() < 70 * MB, "the copy was held only inside the last step"
    assert trace.ends["copy"].anonymous < 20 * MB


def test_steps_are_timed_and_looked_at_in_order() -> None:
    trace = trace_memory({"a": lambda: time.sleep(0.2), "b": lambda _: time.sleep(0.05)}, lambda: time.sleep(0.1))
    assert 0.2 <= trace.seconds("a") and 0.05 <= trace.seconds("b")
    assert trace.looks == sorted(trace.looks) and trace.looks[0] == (0, 0, 0)
    assert len(trace.looks) > 10, "it looks every 5 ms"


def test_a_step_that_fails_is_told() -> None:
    with pytest.raises(RuntimeError, match="(?s)a step failed.*ZeroDivisionError"):
        trace_memory({"a": lambda: 1 / 0})
    with pytest.raises(RuntimeError, match="ended from outside"):
        trace_memory({"a": lambda: os._exit(3)})
