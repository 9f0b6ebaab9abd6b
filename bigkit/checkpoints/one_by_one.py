"""Tensors of a checkpoint one after another, each of which may go before the next one comes.

Leaves out: reading many at once (`load.py`), and what is done with each (`quantize/load.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from .format import Checkpoint, Stored
from .in_order import ranges_in_order
from .ring import read_fully


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


def stream_rows(source: Checkpoint, name: str) -> Iterator[Tensor]:
    """Read the rows of a tensor (experts of a stack) to RAM one after another, each in memory of its own.

    Of a tensor that is made of others in the order of its bytes only a row is in memory; of one that is computed, all.
    """
    ranges = ranges_in_order(source, name) if name in source.made else ()
    if name in source.stored:
        ranges = (source.stored[name],)
    if not ranges:
        yield from source.read(name)
        return
    (count, *shape), dtype = source.shape_and_dtype(name)
    row = torch.empty(shape, dtype=dtype).nbytes
    pieces = [(where.file, where.offset, where.nbytes) for where in ranges]
    for _ in range(count):
        raw = torch.empty(row, dtype=torch.uint8)
        done = 0
        while done < row:
            file, offset, left = pieces.pop(0)
            part = min(left, row - done)
            _read_into(raw[done : done + part], file, offset)
            done += part
            if left > part:
                pieces.insert(0, (file, offset + part, left - part))
        yield raw.view(dtype).view(shape)


def _private(where: Stored) -> Tensor:
    """A tensor read into memory of its own."""
    raw = torch.empty(where.nbytes, dtype=torch.uint8)
    _read_into(raw, where.file, where.offset)
    return raw.view(where.dtype).view(where.shape)


def _read_into(raw: Tensor, file: Path, offset: int) -> None:
    with open(file, "rb") as stream:
        read_fully(stream.fileno(), raw.numpy().data, offset, file)
