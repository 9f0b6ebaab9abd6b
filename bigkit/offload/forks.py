"""A process that is forked while another thread is inside a forward.

The child has that thread's lock and the weights it was lent, but not the thread: nobody would ever give them back. So
in the child every streamer gets a lock of its own, and takes back what was lent.

Leaves out: CUDA, which does not survive a fork at all.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING
from weakref import WeakSet

if TYPE_CHECKING:
    from .stream import Streamer

STREAMERS: WeakSet[Streamer] = WeakSet()  # those of this process


def _renew() -> None:
    for streamer in [*STREAMERS]:
        streamer.lock = threading.RLock()
        streamer.lock.acquire()
        for slot in streamer.slots:
            slot.pending.clear()  # readers that are gone
        streamer.recover()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
