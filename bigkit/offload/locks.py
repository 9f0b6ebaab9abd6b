"""Several locks at once.

A forward takes the locks of its streamers in an order of its own, so who wants all of them waits for one while it holds
none of the others.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def all_of(locks: Iterable[threading.RLock]) -> Iterator[None]:
    """A block in which this thread holds all of some locks.

    >>> with all_of([threading.RLock(), threading.RLock()]):
    ...     pass
    """
    wanted = [*locks]
    while True:
        with ExitStack() as held:
            for lock in wanted:
                if not lock.acquire(blocking=lock is wanted[0]):
                    wanted = [lock, *(other for other in wanted if other is not lock)]  # wait for this one
                    break
                held.callback(lock.release)
            else:
                yield
                return
