"""The model of the caching allocator against the real one, recorded here and now."""

import random

import pytest
import torch

from bigkit.machine.allocator import replay
from bigkit.measure.allocations import record_allocations
from bigkit.units import MiB


def test_a_recorded_run_replays_to_the_byte():
    chance = random.Random(0)
    with record_allocations() as mark:
        held = []
        for step in range(400):
            if held and chance.random() < 0.45:
                held.pop(chance.randrange(len(held)))
            else:
                size = int(2 ** chance.uniform(0, 27))
                held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            if step == 200:
                mark("half")
        del held
    recording = mark.recording
    replayed = replay(recording.events, recording.streams, recording.allocator())
    assert {"allocated": replayed.peak_allocated, "reserved": replayed.peak_reserved} == recording.peaks
    assert recording.about["held"] == "0" and recording.marks[0][0] == "half" and replayed.peak_allocated > MiB


def test_the_memory_limit_is_afterwards_what_it_was():
    before = torch.cuda.get_per_process_memory_fraction(0)
    torch.cuda.set_per_process_memory_fraction(0.5, 0)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError), record_allocations(capacity=64 * MiB):
            torch.empty(128 * MiB, dtype=torch.uint8, device="cuda")
        assert torch.cuda.get_per_process_memory_fraction(0) == 0.5
    finally:
        torch.cuda.set_per_process_memory_fraction(before, 0)


def test_a_history_of_the_users_own_is_not_ended():
    torch.cuda.memory._record_memory_history("all")
    try:
        with pytest.raises(RuntimeError, match="records its memory history already"), record_allocations():
            pass
    finally:
        torch.cuda.memory._record_memory_history(None)
    with record_allocations() as mark:
        pass
    assert mark.recording.peaks["allocated"] == 0
