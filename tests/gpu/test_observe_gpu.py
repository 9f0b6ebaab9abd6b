"""On a GPU the streamer fetches in the order, and into the slots, that a schedule says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from bigkit import dispatch_model
from bigkit.offload.observe import observe


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_order_and_slots_are_those_of_a_schedule(tmp_path: Path, slots: int, prefetch: bool) -> None:
    rests = [0, "cpu", "cpu", "disk", 0, "disk", "cpu", "cpu"]
    torch.manual_seed(0)
    whole = nn.Sequential(*[nn.Linear(512, 512) for _ in rests])
    x = torch.randn(4, 512, device="cuda")
    with torch.no_grad():
        expected = whole.to("cuda")(x)
        model = dispatch_model(
            whole.to("cpu"), {str(i): place for i, place in enumerate(rests)}, offload_dir=tmp_path, slots=slots,
            prefetch=prefetch, ram_cache=0,
        )  # fmt: skip
        recording = observe(model, lambda: [model(x) for _ in range(3)])
    assert all(torch.equal(output, expected) for output in recording.result)
    found = recording.schedule(rate=1e12, link=50e9, disk=2e9)  # raises where fetches or slots differ
    assert found.tokens == 3 and [turn.rests for turn in found.turns] == rests
