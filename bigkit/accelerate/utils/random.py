"""`accelerate.utils.random`: one seed for all generators."""

from __future__ import annotations

import random

import torch

from ...distributed.state import PartialState
from ..differences import refuse_unknown as __getattr__


def set_seed(seed: int, device_specific: bool = False, deterministic: bool = False) -> None:
    """Seed Python, NumPy and PyTorch.

    Args:
        seed: the seed.
        device_specific: add the number of the process to it.
        deterministic: forbid algorithms of PyTorch whose results differ from run to run.
    """
    import numpy

    seed += PartialState().process_index if device_specific else 0
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)  # of all devices
    if deterministic:
        torch.use_deterministic_algorithms(True)
