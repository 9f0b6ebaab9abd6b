"""Tensors of a checkpoint one after another, each of which may go before the next one comes.

Leaves out: reading many at once (`load.py`), and what is done with each (`quantize/load.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .format import Checkpoint, Stored


def stream_tensors(source: Checkpoint, names: Iterable[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Read tensors to a device one after another, in the order of the files: what is let go makes room for the next.

    On the CPU each is in memory of its own: no page of the file counts as the process's.
    """
    stored = {name: source.stored[name] for name in names if name in source.stored}
    if device.type == "cuda":
        from .to_gpu import stream_to_gpu

        yield from stream_to_gpu(stored, device)
    else:
        for name, where in sorted(stored.items(), key=lambda item: (str(item[1].file), item[1].offset)):
            yield name, _private(where).to(device)
    for name in names:
        if name in source.pickled or name in source.made:
            yield name, source.read(name).to(device)


def _private(where: Stored) -> Tensor:
    """A tensor read into memory of its own."""
    raw = torch.empty(where.nbytes, dtype=torch.uint8)
    with open(where.file, "rb") as stream:
        stream.seek(where.offset)
        count = stream.readinto(raw.numpy().data)
    if count < where.nbytes:
        end = where.offset + count
        raise OSError(f"{where.file} is shorter than when it was checked: nothing at byte {end}")
    return raw.view(where.dtype).view(where.shape)
