"""Tensors whose bytes lie in a checkpoint as several ranges, which have only to be read one after another.

Files hold the experts of a block one by one (`experts.3.gate_proj.weight`), a model of Transformers all in one tensor.
Such a tensor is made by stacking and joining, which moves no element within a part: its bytes are those of the parts,
in some order. So it can rest on disk in the checkpoint's own files, and one expert is a few ranges of them.

Leaves out: tensors that are transposed, permuted or computed; they are made, and written to a file of their own.
"""

from __future__ import annotations

import torch

from .format import Checkpoint, Stored

FEW = 6  # elements of each dimension: with 2, halves that are interleaved would look as if they were not


def ranges_in_order(source: Checkpoint, name: str) -> tuple[Stored, ...]:
    """The ranges whose bytes, one after another, are a tensor that is made of others; empty if it is not so simple.

    What a conversion does is seen from what it makes of parts with very few elements, each of which is different.

    Args:
        source: an open checkpoint.
        name: of a tensor in its `made`.
    """
    made = source.made[name]
    if any(part not in source.stored or source.stored[part].dtype != made.dtype for part in made.sources):
        return ()
    shapes = [tuple(min(size, FEW) for size in source.stored[part].shape) for part in made.sources]
    counts = [torch.Size(shape).numel() for shape in shapes]
    most = max(counts, default=1)
    small = {
        part: (torch.arange(count, dtype=torch.float64) + number * most).view(shape)
        for number, (part, shape, count) in enumerate(zip(made.sources, shapes, counts))
    }
    try:
        elements = made.make(small).flatten().tolist()
    except Exception:  # it depends on the real shapes
        return ()
    order: list[int] = []
    at = 0
    while at < len(elements):
        number = int(elements[at] // most)
        if not 0 <= number < len(counts):
            return ()
        if elements[at : at + counts[number]] != small[made.sources[number]].flatten().tolist():
            return ()
        order.append(number)
        at += counts[number]
    if sorted(order) != [*range(len(made.sources))]:
        return ()
    return tuple(source.stored[made.sources[number]] for number in order)


def joined(source: Checkpoint, name: str) -> Stored | None:
    """Where a tensor that is made of others lies in the checkpoint's files, if it does in `ranges_in_order`."""
    ranges = ranges_in_order(source, name)
    made, nbytes = source.made[name], sum(where.nbytes for where in ranges)
    if not ranges or nbytes != torch.Size(made.shape).numel() * made.dtype.itemsize:
        return None
    return Stored(ranges[0].file, ranges[0].offset, nbytes, made.dtype, made.shape, ranges)
