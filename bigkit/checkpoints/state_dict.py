"""The tensors of a checkpoint without a model: a dict, as `load_state_dict` of a module takes it.

Leaves out: loading them into a model (`load.py`), which holds no such dict.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from ..devices import Device, placement
from .format import Checkpoint
from .load import read_tensors


def load_state_dict(
    checkpoint_file: str | os.PathLike[str],
    device_map: Mapping[str, Device] | None = None,
    key: str = "",
    prefix: str = "",
) -> dict[str, Tensor]:
    """The tensors of a checkpoint, on the CPU or where a device map puts them.

    Args:
        checkpoint_file: a file, an index, or a folder.
        device_map: module name -> device; tensors that it leaves on "disk" or does not name stay on the CPU, mapped
            from the file.
        key, prefix: see `load_checkpoint_in_model`.

    Raises:
        FileNotFoundError, CheckpointError: there is none, or it is broken.

    >>> import tempfile
    >>> from bigkit import save_model
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(torch.nn.Linear(2, 3), folder)
    ...     load_state_dict(folder)["weight"].shape
    torch.Size([3, 2])
    """
    checkpoint = Checkpoint.open(checkpoint_file, key, prefix)
    device_of = placement(device_map)
    places: dict[Device | torch.device, dict[str, torch.dtype | None]] = {}
    for name in checkpoint:
        place = device_of(name)
        places.setdefault("cpu" if place in ("disk", None) else place, {})[name] = None
    return read_tensors(checkpoint, places)
