"""The ledger: kept whole, read back, and refused when it is none."""

import json
from dataclasses import asdict
from multiprocessing import get_context

import pytest

from bigkit.machine.hardware import GPUS, Hardware
from bigkit.machine.ledger import Calibration, Ledger, calibration_of


def test_a_calibration_of_an_older_form_is_read(tmp_path):
    plain = asdict(Calibration("a", issue=1e-5, disk_warm=1e9))
    older = {name: value for name, value in plain.items() if name not in ("workspace", "context")}
    richer = {**plain, "gather": 1e12, "grouped": [[1.0, 2.0]], "plan": 0.04, "disk_readers": 9e9}
    for data, disk in ((older, 1e9), (richer, 9e9)):
        assert Calibration.from_json(json.loads(json.dumps(data))) == Calibration("a", issue=1e-5, disk_warm=disk)


def test_several_machines_and_runs(tmp_path):
    ledger = Ledger.load(tmp_path / "ledger.json")
    assert not ledger.calibrations
    table = Calibration("a", capability=(9, 0), products={"float16": ((8.0, 1.5),)}, attention=((2.0, 3.0),))
    ledger.add(table)
    ledger.add(Calibration("b"))
    ledger.runs.append({"model": "gpt2"})
    ledger.save()
    again = Ledger.load(tmp_path / "ledger.json")
    assert again.calibrations == {"a": table, "b": Calibration("b")} and again.runs == [{"model": "gpt2"}]
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.json"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "calibrations": {"a": 1}, "runs": []}']
)
def test_what_is_no_ledger_is_refused(tmp_path, text):
    (tmp_path / "ledger.json").write_text(text)
    with pytest.raises(ValueError, match="ledger.json is not a ledger"):
        Ledger.load(tmp_path / "ledger.json")


@pytest.mark.parametrize(
    "change",
    [
        {"link_pinned": "fast"}, {"issue": -1.0}, {"memory": float("nan")}, {"kernel": True}, {"disk_warm": [1.0]},
        {"products": {"float16": [[1.0]]}}, {"products": {"float16": [["a", 2.0]]}}, {"products": [1]},
        {"attention": 7}, {"capability": 9}, {"versions": []}, {"machine": None}, {"context": 0},
    ],
)  # fmt: skip
def test_odd_values_of_a_calibration_name_the_file(tmp_path, change):
    data = {"format": 1, "calibrations": {"a": {**asdict(Calibration("a", issue=1e-5)), **change}}, "runs": []}
    (tmp_path / "ledger.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="ledger.json is not a ledger"):
        Ledger.load(tmp_path / "ledger.json")


@pytest.mark.parametrize("run", ["fast", 7, None, {"predicted": [1]}, {"measured": {"token": "soon"}}])
def test_odd_runs_name_the_file(tmp_path, run):
    (tmp_path / "ledger.json").write_text(json.dumps({"format": 1, "calibrations": {}, "runs": [run]}))
    with pytest.raises(ValueError, match="ledger.json is not a ledger"):
        Ledger.load(tmp_path / "ledger.json")


def test_a_ledger_is_never_half_written(tmp_path, monkeypatch):
    ledger = Ledger.load(tmp_path / "ledger.json")
    ledger.add(Calibration("a"))
    before = (tmp_path / "ledger.json").read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        ledger.add(Calibration("b"))
    assert (tmp_path / "ledger.json").read_text() == before and json.loads(before)["format"] == 1
    assert len(list(tmp_path.iterdir())) == 1


def _adds_runs(path, first):
    ledger = Ledger.load(path)
    for i in range(first, first + 10):
        ledger.add_run({"run": i})


def test_writers_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "ledger.json"
    Ledger.load(path).add(Calibration("a"))
    processes = [get_context("spawn").Process(target=_adds_runs, args=(path, first)) for first in (0, 100, 200)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    again = Ledger.load(path)
    assert sorted(run["run"] for run in again.runs) == [*range(10), *range(100, 110), *range(200, 210)]
    assert again.calibrations == {"a": Calibration("a")} and [file.name for file in tmp_path.iterdir()] == [path.name]


def test_old_runs_go_and_the_file_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr("bigkit.machine.ledger.MOST_RUNS", 3)
    ledger = Ledger.load(tmp_path / "ledger.json")
    for i in range(5):
        ledger.add_run({"run": i})
    assert [run["run"] for run in Ledger.load(ledger.path).runs] == [2, 3, 4]


def test_bias_counts_only_runs_with_a_prediction(tmp_path):
    ledger = Ledger(tmp_path / "ledger.json")
    ledger.runs += [
        {"machine": "a", "predicted": {"token": 1.0, "prefill": 2.0}, "measured": {"token": 1.1}},
        {"machine": "a", "predicted": {"token": 1.0}, "measured": {"token": 1.5}},
        {"machine": "b", "predicted": {"token": 1.0}, "measured": {"token": 9.0}},
        {"machine": "a", "predicted": {}, "measured": {"token": 7.0}},
        {"other": "entry"},
    ]
    assert ledger.bias("a") == {"token": (pytest.approx(1.3), 2, 1)}
    assert ledger.bias()["token"].runs == 3 and "1 of 3 within 15 %" in ledger.explain()


def test_of_hosts_with_one_gpu_and_with_eight_each_has_its_own_links(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGKIT_LEDGER", str(tmp_path / "ledger.json"))
    for count in (1, 8, 2):
        Ledger.load().add(Calibration(f"H200, {16 * count} cores", gpu="H200", links=(5e10,) * count))
    for count in (8, 1, 2):
        here = Hardware(f"this machine ({count} x H200)", (GPUS["H200"],) * count, 2**40, 2**40)
        assert len(calibration_of(here).links) == count
    assert calibration_of(Hardware("another one", (GPUS["H200"],), 2**40, 2**40)) is None
