"""Ranges of predictions: what they rest on, and what recorded runs make of them."""

import json
import math
from pathlib import Path

import pytest

from bigkit import dry_run
from bigkit.dryrun.result import DryRun
from bigkit.dryrun.workload import Workload
from bigkit.machine.ledger import Calibration, HostStep, Ledger, Twin
from bigkit.machine.ranges import (
    ALIKE,
    GUESSED,
    MEASURED,
    PLAIN,
    SPREADS,
    VENDOR,
    Range,
    range_of_memory,
    range_of_steps,
)  # fmt: skip
from bigkit.machine.roofline import Operation, Rates, StepTime

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_the_slowest_lane_counts():
    step = StepTime("token 1", 1.0, {"python": 0.9, "cuda:0": 1.0, "disk": 0.0, "copy to cuda:0": 0.1})
    found = range_of_steps([step], GUESSED, VENDOR)
    assert found.rests_on == VENDOR and found.value == 1.0
    assert found.low == SPREADS["gpu", VENDOR][0], "the GPU may be faster, and the host is not surely slower"
    assert found.high == pytest.approx(0.9 * SPREADS["python", GUESSED][1]), "a slow host would be waited for"
    both = range_of_steps([step, StepTime("token 2", 3.0, {"python": 3.0, "cuda:0": 0.1})], MEASURED, VENDOR)
    assert both.value == 2.0 and both.rests_on == MEASURED and both.low < 2.0 < both.high


def held_out():
    """(kind of lane, what the host's pace rests on, measured / predicted) of each prompt and token."""
    for path in sorted(RESULTS.glob("held-out*.json")):
        for row in json.loads(path.read_text())["rows"]:
            quantized = row["case"].endswith(("/nf4", "/int8"))
            for i, name in enumerate(["prompt", "token"]):
                if name in row.get("compared", {}):
                    lane, (predicted, measured) = row["longest"][i], row["compared"][name]
                    kind = "python" if lane == "python" else "gpu" if lane.startswith("cuda") else "link"
                    yield kind, MEASURED, measured / predicted
                    yield kind, PLAIN if quantized else ALIKE, measured / row["without twin"][i]


def test_nine_of_ten_held_out_runs_lie_in_their_ranges():
    held = {}
    for kind, host, ratio in held_out():
        low, high = SPREADS[kind, host if kind == "python" else MEASURED]
        held.setdefault((kind, host), []).append(low <= ratio <= high)
    for rows in held.values():
        assert len(rows) < 10 or sum(rows) >= 0.9 * len(rows)
    for hosts in ((MEASURED,), (ALIKE, PLAIN)):
        rows = [one for (_, host), some in held.items() if host in hosts for one in some]
        assert len(rows) == 368 and sum(rows) >= 0.9 * len(rows)


def test_without_a_twin_a_quantized_model_may_take_much_longer():
    plain, quantized, timed = (
        DryRun("", Workload(), {}, "", {}, {}, [Operation("mm", "cuda:0", 0, 0, "float32")], [("prefill", 1)],
               {"cuda:0": Rates(1e9, {}, (), 1.0, 1e-6, 1e9, 1e9, 1e9)}, {}, quantized=quantized, twin=twin)
        for quantized, twin in ((False, None), (True, None), (True, Twin("", "nf4", HostStep(1.0, 0.0, 1))))
    )  # fmt: skip
    assert plain.ranges["prefill"].high < 2.5 < 5 < quantized.ranges["prefill"].high
    assert quantized.ranges["prefill"].rests_on == PLAIN and timed.ranges["prefill"].rests_on == MEASURED


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
