"""Who gets what when items are split between processes: the arithmetic, and the split as data.

    3 items on 2 processes    0 1 | 2        the first processes take the remainder
    padded                    0 1 | 2 2      the last item is repeated until all shares are equally long

Leaves out: the items themselves (`split.py`) and the processes (`state.py`).
"""

from __future__ import annotations

from dataclasses import dataclass


def share(items: int, processes: int, process: int) -> range:
    """The positions that one process gets: contiguous, in order, and empty if there are too few items.

    Args:
        items: how many items there are in all.
        processes: how many processes share them.
        process: which of them, from 0.

    Raises:
        ValueError: a negative number of items, no process, or a process that does not exist.

    >>> [share(5, 3, process) for process in range(3)]
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    if items < 0 or not 0 <= process < processes:
        expected = "expected zero or more items and a process from 0 to the number of processes - 1"
        raise ValueError(f"cannot give process {process} of {processes} a share of {items} items: {expected}")
    each, remainder = divmod(items, processes)
    start = process * each + min(process, remainder)
    return range(start, start + each + (process < remainder))


def padded_length(items: int, processes: int) -> int:
    """How long every share is with padding: that of the longest without."""
    return -(-items // processes)


@dataclass(frozen=True)
class Shares:
    """A split of `items` items between `processes` processes.

    >>> split = Shares(3, 2, padding=True)
    >>> split.parts
    ((0, 1), (2, 2))
    >>> split.gathered, split.padded, split.idle
    ((0, 1, 2, 2), 1, 0)
    """

    items: int
    processes: int
    padding: bool = False

    def __post_init__(self) -> None:
        share(self.items, self.processes, 0)

    @property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """For each process the positions of its items, padding included. Without items there is nothing to repeat."""
        parts = [tuple(share(self.items, self.processes, process)) for process in range(self.processes)]
        if self.padding and self.items:
            longest = padded_length(self.items, self.processes)
            parts = [part + (self.items - 1,) * (longest - len(part)) for part in parts]
        return tuple(parts)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many items each process has, padding not counted."""
        return tuple(len(share(self.items, self.processes, process)) for process in range(self.processes))

    @property
    def gathered(self) -> tuple[int, ...]:
        """What `gather` returns: the shares one after another."""
        return tuple(position for part in self.parts for position in part)

    @property
    def padded(self) -> int:
        """Repeated items: work that is done and thrown away."""
        return len(self.gathered) - self.items

    @property
    def rounds(self) -> int:
        """Items that the busiest process takes: the time of the whole, if each item takes the same time."""
        return max(map(len, self.parts))

    @property
    def idle(self) -> int:
        """Turns in which a process has nothing to do while the busiest still works."""
        return self.rounds * self.processes - len(self.gathered)

    @property
    def speedup(self) -> float:
        """How much sooner the work is done than by one process, if each item takes the same time."""
        return self.items / self.rounds if self.rounds else 1.0
