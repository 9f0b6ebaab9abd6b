"""Cutting a chain of weights into stretches, one for each room: the arithmetic under every placement strategy.

A chain is a list of needs in bytes, in order; a room is the bytes one device can take. All results are lists of ends:
room k gets the links from the previous end up to, but not including, `ends[k]`.

The greedy walk `reach` gets as far as any cut can, because a longer first stretch never hurts the rest. Minimising the
fullest room is then a search for the smallest share of the rooms with which the walk still gets to the end (linear
partitioning: Skiena, The Algorithm Design Manual, section 10.7). Each walk takes O(rooms * log(links)) steps.

Leaves out: what the links are and what happens to those that find no room (`maps/strategies.py`).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate


class Chain:
    """A chain of needs with its prefix sums.

    >>> chain = Chain([4, 1, 1, 1, 1])
    >>> chain.reach([5, 2]), chain.balance([9, 9])
    ([2, 4], [1, 5])
    """

    def __init__(self, needs: Sequence[int]) -> None:
        self.length = len(needs)
        self.prefix = [0, *accumulate(needs)]  # prefix[i]: the needs of the links before i

    def load(self, start: int, end: int) -> int:
        """Bytes of the links from `start` up to `end`."""
        return self.prefix[end] - self.prefix[start]

    def reach(self, rooms: Sequence[int], start: int = 0) -> list[int]:
        """Fill the rooms in order, each as far as it goes. A negative room takes nothing."""
        ends = []
        for room in rooms:
            if room >= 0:
                start = bisect_right(self.prefix, self.prefix[start] + room) - 1
            ends.append(start)
        return ends

    def reach_back(self, rooms: Sequence[int]) -> list[int]:
        """Fill the rooms from the last link backwards: the earliest start of each room's stretch."""
        starts, end = [], self.length
        for room in reversed(rooms):
            if room >= 0:
                end = bisect_left(self.prefix, self.prefix[end] - room)
            starts.append(end)
        return starts[::-1]

    def balance(self, rooms: Sequence[int], start: int = 0) -> list[int]:
        """Make the fullest room, measured as a share of its size, as empty as possible, and the others even.

        The chain from `start` on must fit into the rooms in order.
        """
        return self.even(self._level(rooms, start), rooms, start)

    def even(self, limits: Sequence[int], rooms: Sequence[int], start: int = 0) -> list[int]:
        """Cut so that no stretch is above its limit and each boundary is as near as it can be to an even share.

        The chain from `start` on must fit into the limits in order.
        """
        earliest, ends = [*self.reach_back(limits), self.length], []
        free = sum(max(room, 0) for room in rooms)
        for k, (limit, room) in enumerate(zip(limits, rooms, strict=True)):
            latest = self.reach([limit], start)[0]
            share = self.load(start, self.length) * max(room, 0) // max(free, 1)
            ideal = self.prefix[start] + share
            above = bisect_left(self.prefix, ideal)
            nearest = above - (above > 0 and ideal - self.prefix[above - 1] < self.prefix[above] - ideal)
            first = bisect_right(self.prefix, self.prefix[start])  # never an empty room before a full one
            start = min(max(nearest, earliest[k + 1], first), latest)
            free -= max(room, 0)
            ends.append(start)
        return ends

    def _level(self, rooms: Sequence[int], start: int) -> list[int]:
        """The rooms, each scaled down to the smallest common share with which the chain still fits."""

        def fits(limits: Sequence[int]) -> list[int] | None:
            ends = self.reach(limits, start)
            return ends if ends[-1] == self.length else None

        low, high = 0.0, 1.0
        for _ in range(40):  # close in with floats, then settle with exact fractions
            share = (low + high) / 2
            fit = fits([int(room * share) for room in rooms])
            low, high = (low, share) if fit else (share, high)
        limits = [int(room * high) for room in rooms] if high < 1 else list(rooms)
        while (ends := fits(limits)) is not None:
            starts = [start, *ends[:-1]]
            loads = [self.load(a, b) for a, b in zip(starts, ends, strict=True)]
            shares = (Fraction(load, room) for load, room in zip(loads, rooms, strict=True) if room > 0)
            fullest = max(shares, default=Fraction(0))
            best = [min(room, int(fullest * room)) for room in rooms]  # a negative room stays one
            if not fullest:
                break
            # the most bytes that fill less than that share of each room
            limits = [-1 if room < 0 else (fullest.numerator * room - 1) // fullest.denominator for room in rooms]
        return best


def last_true(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The largest value from `low` to `high` for which a condition holds that is true at `low` and fails ever after."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def spread(sizes: Sequence[int], budget: int) -> set[int]:
    """Which units of these sizes (0: not wanted) to choose within a budget, as evenly along the model as it goes.

    >>> sorted(spread([10] * 8, 40))
    [0, 2, 4, 6]
    """
    wanted = [i for i, size in enumerate(sizes) if size]
    most = bisect_right([*accumulate(sorted(sizes[i] for i in wanted))], budget)
    chosen: set[int] = set()
    for i in (wanted[k * len(wanted) // most] for k in range(most)):
        if sizes[i] <= budget:
            chosen.add(i)
            budget -= sizes[i]
    return chosen
