"""What `calibrate()` finds on a GPU is of the right order."""

import torch

from bigkit import calibrate


def test_every_rate_of_a_gpu_is_found(tmp_path):
    calibration = calibrate(tmp_path, save=False, quick=True)
    assert calibration.gpu == torch.cuda.get_device_name(0)
    assert 1e-6 < calibration.issue < 1e-4 and 1e-7 < calibration.kernel < 1e-4
    assert calibration.disk_warm > 1e8 and calibration.link_pinned > calibration.link_pageable > 1e8
    assert all(rate > 1e10 for _, rate in (*calibration.products["bfloat16"], *calibration.attention))
