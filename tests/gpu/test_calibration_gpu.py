"""What `calibrate()` finds on a GPU is of the right order, and again when it is called again."""

import torch

from bigkit import calibrate
from bigkit.measure.calibrate import _plan


def test_every_rate_of_a_gpu_is_found(tmp_path):
    found = calibrate(tmp_path, save=False, quick=True)
    assert found.gpu == torch.cuda.get_device_name(0)
    assert 1e-6 < found.issue < 1e-4 and 1e-7 < found.kernel < 1e-4
    assert 1e10 < found.gather < 1e13 and found.disk_readers > 1e8
    [(_, odd)] = found.products["bfloat16, odd rows"]
    assert 1e11 < odd < max(rate for _, rate in found.products["bfloat16"])
    if torch.cuda.get_device_capability(0) >= (9, 0):
        assert _plan() > 0.1 * found.plan > 1e-3
        assert all(rate > 1e11 for _, rate in found.grouped) and len(found.grouped) == 2
