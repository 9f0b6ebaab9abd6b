"""Measuring this machine: quickly, and kept in the ledger."""

from bigkit.machine.ledger import Ledger, ledger_path
from bigkit.measure.calibrate import calibrate


def test_what_is_measured_is_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGKIT_LEDGER", str(tmp_path / "deep" / "ledger.json"))
    calibration = calibrate(folder=tmp_path, quick=True)
    assert list(tmp_path.glob("bigkit-calibrate*")) == [], "the test file is gone"
    again = Ledger.load()
    assert again.calibrations == {calibration.machine: calibration} and again.path == ledger_path()
    assert calibration.disk_warm > 1e6 and calibration.host_memory > 1e8 and 1e-7 < calibration.issue < 1e-2
    assert all(rate > 1e6 for rows in calibration.products.values() for _, rate in rows)
    calibrate(folder=tmp_path, quick=True)
    assert len(Ledger.load().calibrations) == 1
