"""What a streamer tells those who listen to it.

Leaves out: making a record of it (`observe.py`).
"""

from __future__ import annotations

from typing import NamedTuple


class Event(NamedTuple):
    """What a streamer tells its listeners.

    Args:
        kind: "fetch" (the unit's bytes begin to move), "work" (its forward begins) or "return" (its forward has ended).
        unit: the unit's name.
        nbytes: bytes that move (of experts those of the chosen ones); 0 unless `kind` is "fetch".
        rests: where the unit's weights rest, "cpu" or "disk".
        device: the device on which the unit works.
        slot: the slot's number; -1 unless `kind` is "fetch".
    """

    kind: str
    unit: str
    nbytes: int
    rests: str
    device: str
    slot: int
