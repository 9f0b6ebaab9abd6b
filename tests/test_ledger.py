"""The ledger: kept whole, read back, and refused when it is none."""

import json

import pytest

from bigkit.calibration import calibrate
from bigkit.ledger import Calibration, Ledger, ledger_path


def test_what_is_measured_is_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGKIT_LEDGER", str(tmp_path / "deep" / "ledger.json"))
    found = calibrate(folder=tmp_path, quick=True)
    assert list(tmp_path.glob("bigkit-calibrate*")) == [], "the test file is gone"
    again = Ledger.load()
    assert again.calibrations == {found.machine: found} and again.path == ledger_path()
    assert found.disk_warm > 1e6 and found.host_memory > 1e8 and 1e-7 < found.issue < 1e-2
    assert all(rate > 1e6 for rows in found.products.values() for _, rate in rows)
    calibrate(folder=tmp_path, quick=True)
    assert len(Ledger.load().calibrations) == 1


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
    with pytest.raises(ValueError, match="ledger.json is no ledger"):
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
