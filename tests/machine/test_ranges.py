"""Ranges of predictions: what they rest on, and what recorded runs make of them."""

import math

import pytest

from bigkit import dry_run
from bigkit.machine.ledger import Calibration, Ledger
from bigkit.machine.ranges import GUESSED, MEASURED, SPREADS, VENDOR, Range, range_of_memory, range_of_steps
from bigkit.machine.roofline import StepTime


def test_the_slowest_lane_counts():
    step = StepTime("token 1", 1.0, {"python": 0.9, "cuda:0": 1.0, "disk": 0.0, "copy to cuda:0": 0.1})
    found = range_of_steps([step], GUESSED, VENDOR)
    assert found.rests_on == VENDOR and found.value == 1.0
    assert found.low == SPREADS["gpu", VENDOR][0], "the GPU may be faster, and the host is not surely slower"
    assert found.high == pytest.approx(0.9 * SPREADS["python", GUESSED][1]), "a slow host would be waited for"
    both = range_of_steps([step, StepTime("token 2", 3.0, {"python": 3.0, "cuda:0": 0.1})], MEASURED, VENDOR)
    assert both.value == 2.0 and both.rests_on == MEASURED and both.low < 2.0 < both.high


def test_runs_narrow_a_range_and_widen_it():
    found = Range(10.0, 5.0, 20.0, GUESSED)
    widths = []
    for runs in range(1, 6):
        narrower = found.narrowed([1.05] * runs)
        assert narrower.low < 10 * 1.05 < narrower.high and narrower.runs == runs
        widths.append(narrower.high / narrower.low)
    assert widths == sorted(widths, reverse=True) and widths[0] < 4
    assert found.narrowed([4.0] * 3).high > 20
    wrong = Range(10.0, 8.5, 11.5, MEASURED).narrowed([2.0] * 30)
    assert wrong.high == pytest.approx(20, rel=0.1), "many runs alone say how far it is off"
    assert found.narrowed([]) is found
    assert math.isclose(found.narrowed([1.0]).low, 10 * math.exp(-math.sqrt(3 / 4) * math.log(2)))


def test_memory_says_whether_such_a_gpu_was_met():
    met, other = range_of_memory("reserved", 100, True), range_of_memory("reserved", 100, False)
    assert met.high - met.low < other.high - other.low and "not yet compared" in other.rests_on
    run = dry_run("pygpt", None, 1, 8, 0, "T4")
    assert "not yet compared" in run.ranges["allocated cuda:0"].rests_on and "not yet compared" in str(run)
    assert "as on an H200" in dry_run("pygpt", None, 1, 8, 0, "H200").ranges["allocated cuda:0"].rests_on


def test_recorded_runs_of_the_same_model_count(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGKIT_LEDGER", str(tmp_path / "ledger.json"))
    ledger = Ledger.load()
    ledger.add(Calibration("a"))
    for name, ratio in (("pygpt", 1.1), ("pygpt", 1.2), ("gpt2", 9.0)):
        ledger.add_run({"machine": "a", "name": name, "predicted": {"token": 1.0}, "measured": {"token": ratio}})
    assert Ledger.load().ratios("a", "pygpt") == {"token": [1.1, 1.2]}
    assert Ledger.load().ratios() == {"token": [1.1, 1.2, 9.0]} and Ledger.load().ratios("b") == {}
