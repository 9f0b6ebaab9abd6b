"""Weights that rest on disk and work on the CPU: the pages of the files themselves are lent.

Nothing is copied. The system is asked to read the pages of the next units while one works, and to let go of a unit's
pages when it has worked; so of a model on disk a few blocks are in memory at a time.

Leaves out: weights in RAM that work on the CPU, which stay where they are.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from ..units import MiB
from .transfer import PlainLane, Slot
from .weights import Unit

AHEAD = 64 * MiB  # bytes of the next units that the system is asked to read while one works
MOST_AHEAD = 16  # units, however small


class PageLane(PlainLane):
    """Brings pages of files into memory. A slot has no memory of its own, and is for one unit alone."""

    def fill(self, slot: Slot, unit: Unit) -> None:
        unit.madvise(mmap.MADV_WILLNEED)

    def leave(self, slot: Slot) -> None:
        assert slot.unit is not None
        slot.unit.madvise(mmap.MADV_DONTNEED)


def pages_ahead(units: Sequence[Unit]) -> int:
    """How many units are in memory at a time: one that works, and the next ones."""
    largest = max(unit.nbytes for unit in units)
    return 1 + min(max(AHEAD // max(largest, 1), 1), MOST_AHEAD)
