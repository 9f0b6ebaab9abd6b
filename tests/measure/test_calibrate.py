"""Measuring this machine: quickly, and kept in the ledger."""

from bigkit.machine.ledger import Ledger, ledger_path
from bigkit.measure.calibrate import _as_units, calibrate
from bigkit.units import MiB
from tests import fake_cuda


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


def test_files_are_read_by_the_code_that_brings_units(monkeypatch, tmp_path):
    fake_cuda.install(monkeypatch)
    (path := tmp_path / "file").write_bytes(bytes(16 * MiB))
    whole, rows = _as_units(str(path), 16 * MiB, "cpu")
    assert [size for size, _ in rows] == [8 * MiB, 16 * MiB, 64 * MiB, 192 * MiB]
    assert all(1e6 < rate < 1e12 for rate in (whole, *(rate for _, rate in rows)))
