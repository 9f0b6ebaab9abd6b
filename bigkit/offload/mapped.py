"""The streamer of the CPU: it lends the pages of the files themselves.

Nothing is copied. Before a unit works the system is asked to read the pages of the units after it, and when it has
worked, to let go of its own; so of a model on disk a few blocks are in memory at a time.

Leaves out: weights in RAM that work on the CPU; nothing has to be brought for those.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence

import torch

from ..units import MiB
from .stream import Streamer, Views
from .weights import Unit

AHEAD = 64 * MiB  # bytes of the next units that the system is asked to read while one works
MOST_AHEAD = 16  # units, however small


class Mapped(Streamer):
    """Lends mapped pages; see `Streamer` for the arguments."""

    def __init__(self, device: torch.device, units: Sequence[Unit], *, prefetch: bool = True, name: str = "") -> None:
        super().__init__(device, units, prefetch=prefetch, name=name)
        self.views: dict[int, Views] = {}  # unit's index -> its weights over the pages
        self.versions: dict[int, int] = {}  # unit's index -> the sum of their versions when it was lent
        self.asked: set[int] = set()  # units whose pages the system has been asked to read

    def close(self) -> None:
        pass

    def _bring(self, unit: Unit) -> Views:
        unit.check()
        views = self.views.get(unit.index)
        if views is None:
            views = self.views[unit.index] = self._make_views(unit, [weight.load() for weight in unit.weights])
        self.versions[unit.index] = _version(views)
        if self.listeners:
            self._tell("fetch", unit)
        if self.prefetch:
            self._read_ahead(unit)
        return views

    def _read_ahead(self, unit: Unit) -> None:
        ahead = 0
        for following in self._following(unit, MOST_AHEAD):
            if following.index not in self.asked:
                self.asked.add(following.index)
                following.advise(mmap.MADV_WILLNEED)
            ahead += following.nbytes
            if ahead >= AHEAD:
                return

    def _leave(self, unit: Unit, views: Views) -> None:
        if self._written(unit, views):
            self._absorb(unit, views)
        unit.advise(mmap.MADV_DONTNEED)
        self.asked.discard(unit.index)

    def _all_views(self, unit: Unit) -> list[Views]:
        return [self.views[unit.index]] if unit.index in self.views else []

    def _written(self, unit: Unit, views: Views) -> bool:
        return _version(views) != self.versions[unit.index]

    def _reset(self) -> None:
        self.views, self.asked = {}, set()

    def _forget(self, units: Iterable[Unit]) -> None:
        for unit in units:
            unit.forget_moves()
            if self._loan_of(unit) is None:
                self.views.pop(unit.index, None)


def _version(views: Views) -> int:
    return sum(tensor._version for tensor in views.weights)
