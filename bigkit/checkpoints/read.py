"""Reading many tensors of a checkpoint at once, to the devices where they go.

Leaves out: which tensor goes where (`load.py`), and the fast way to a GPU (`to_gpu.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ..devices import Device
from ..units import GB
from .format import Checkpoint, Stored


def read_tensors(
    source: Checkpoint, places: Mapping[Device | torch.device, Mapping[str, torch.dtype | None]]
) -> dict[str, Tensor]:
    """Read tensors to their devices, as (device -> name -> dtype) says; those for a GPU all in one go."""
    values: dict[str, Tensor] = {}
    for place, dtypes in places.items():
        device = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
        if device.type == "cuda":
            from .to_gpu import read_to_gpu

            values |= read_to_gpu({n: source.stored[n] for n in dtypes if n in source.stored}, device, dtypes)
            made = [n for n in dtypes if n in source.made and source.stored.keys() >= {*source.made[n].sources}]
            for names in _batches(source, made):
                parts = {part: source.stored[part] for name in names for part in source.made[name].sources}
                read = read_to_gpu(parts, device)
                values |= {name: source.made[name].make(read).to(dtype=dtypes[name]) for name in names}
        for name in (name for name in dtypes if name not in values):
            values[name] = source.read(name).to(device=device, dtype=dtypes[name])
    return values


def _batches(source: Checkpoint, names: Iterable[str], most: int = 4 * GB) -> Iterator[list[str]]:
    """Tensors that are made of stored ones, in groups of not many bytes, since their parts are on the GPU as well."""
    batch: list[str] = []
    size = 0
    for name in names:
        own = sum(source.stored[part].nbytes for part in source.made[name].sources)
        if batch and size + own > most:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += own
    if batch:
        yield batch


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
        if name in source.pickled:
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
