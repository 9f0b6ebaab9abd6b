"""The model of the caching allocator against the real one, recorded here and now."""

import random

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
    told = replay(recording.events, recording.streams, recording.allocator())
    assert {"allocated": told.peak_allocated, "reserved": told.peak_reserved} == recording.peaks
    assert recording.about["held"] == "0" and recording.marks[0][0] == "half" and told.peak_allocated > MiB
