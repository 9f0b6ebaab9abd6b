"""When which bytes move, and when what works: the timing of a model that is spread out, as plain arithmetic.

    disk      reads a unit's bytes from files                  bytes / rate of the disk
    link      copies them into a slot on the device            bytes / rate of the link
    compute   its forward, from the slot                       seconds of its own

Each lane does one thing at a time, in the order in which it is asked. Between lanes the rules are those of
`offload/stream.py` and `offload/transfer.py`, which move the real bytes:

    - The order is a circle: after the last unit comes the first, since after a token comes another.
    - When a unit is about to work, it and (with prefetch) the next ones are fetched, as far as there are slots.
    - A slot is refilled only when the work that last read it is done; among those, the one used longest ago.
    - A unit works when its bytes have arrived and the work before it is done.
    - What rests where it works needs no slot: it works when the work before it is done.
    - The host runs ahead. It does not wait for a copy or for work, but it waits for bytes from a file: a copy can be
      asked for only when they have been read. Until then it asks for nothing else.
    - A file is read in chunks through a ring of RAM: the link carries one chunk while the disk reads the next, and the
      disk may be as far ahead of the link as the ring is long.

So each span's start is the latest of a few earlier ends, and one pass over the model is enough to know all of them.

Leaves out: how long work takes (the caller says), latencies, orders that change from one token to the next, units that
work twice in a forward, units that a cache in RAM keeps after their first visit (give them as resting in RAM), and a
copy from RAM that overtakes one from a file.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from ..devices import Device
from ..units import MiB

LANES = ("compute", "link", "disk")
CHUNK, RING = 16 * MiB, 20  # of `offload/transfer.py`, with all readers: bytes of a chunk, chunks of the ring


class Turn(NamedTuple):
    """A unit's part in each forward.

    Args:
        name: of the unit.
        nbytes: that move if it rests elsewhere.
        seconds: that it works.
        rests: "cpu", "disk", or a device that works.
        works: the device on which it works. All that travels works on one device.
    """

    name: str
    nbytes: int
    seconds: float
    rests: Device
    works: Device = 0

    @property
    def travels(self) -> bool:
        """Whether it rests elsewhere than it works."""
        return self.rests != self.works


class Span(NamedTuple):
    """A stretch of time in which a lane is busy with a turn.

    Args:
        lane: "compute", "link" or "disk". On the link, a unit from a file may have pauses while the disk reads.
        turn: number of the turn.
        token: number of the forward.
        slot: number of the slot, or -1 for what rests where it works.
        start, end: seconds.
    """

    lane: str
    turn: int
    token: int
    slot: int
    start: float
    end: float


class Moment(NamedTuple):
    """Something that begins or ends.

    Args:
        time: seconds.
        kind: "fetch" (its bytes begin to move), "arrive" (they are there), "work" (its forward begins) or "return" (it
            has ended, and the slot may be refilled).
        turn, token, slot: see `Span`.
    """

    time: float
    kind: str
    turn: int
    token: int
    slot: int


class Scene(NamedTuple):
    """How things stand right after a moment.

    Args:
        moment: the moment; None before the first.
        slots: for each slot the turn that it holds (None: nothing yet) and "empty", "arriving", "ready", "working" or
            "done" (it may be refilled).
        working: the turn whose forward is under way.
    """

    moment: Moment | None
    slots: tuple[tuple[int | None, str], ...]
    working: int | None

    @property
    def arriving(self) -> list[int]:
        """The turns whose bytes are on the way."""
        return [turn for turn, state in self.slots if state == "arriving" and turn is not None]


@dataclass(frozen=True)
class Schedule:
    """What happens when. Made by `schedule`.

    Args:
        turns: the units in the order in which they work.
        link, disk: bytes a second.
        slots: how many there are.
        prefetch: whether the next units are fetched while one works.
        tokens: how many forwards.
        ahead: whether the host runs ahead.
        spans: every lane's, in the order in which they were asked for.
        moments: in the order of time.
    """

    turns: tuple[Turn, ...]
    link: float
    disk: float
    slots: int
    prefetch: bool
    tokens: int
    ahead: bool
    spans: tuple[Span, ...] = field(repr=False)
    moments: tuple[Moment, ...] = field(repr=False)

    @cached_property
    def ends(self) -> tuple[float, ...]:
        """When each forward has ended, in seconds."""
        last = len(self.turns) - 1
        return tuple(span.end for span in self.spans if span.lane == "compute" and span.turn == last)

    @property
    def seconds(self) -> float:
        """From the start to the end of the last forward."""
        return self.ends[-1]

    @property
    def per_token(self) -> float:
        """Seconds of the last forward alone: with a few before it, those of any further one."""
        return self.ends[-1] - (self.ends[-2] if self.tokens > 1 else 0.0)

    @cached_property
    def busy(self) -> dict[str, float]:
        """Lane -> seconds in which it moves bytes or works, in one forward."""
        link = sum(turn.nbytes for turn in self.turns if turn.travels) / self.link
        disk = sum(turn.nbytes for turn in self.turns if turn.travels and turn.rests == "disk") / self.disk
        return {"compute": sum(turn.seconds for turn in self.turns), "link": link, "disk": disk}

    @property
    def bound(self) -> str:
        """The lane with the most to do: no schedule gives a token in less than its `busy` seconds, on average."""
        return max(LANES, key=lambda lane: self.busy[lane])

    @cached_property
    def frames(self) -> tuple[int, ...]:
        """The steps at which the clock is about to move on: 0, and the number of moments up to each distinct time."""
        times = [moment.time for moment in self.moments]
        return (0, *(i for i in range(1, len(times) + 1) if i == len(times) or times[i] > times[i - 1]))

    def scene(self, step: int) -> Scene:
        """How things stand after the first `step` moments.

        Raises:
            IndexError: there are not so many moments.
        """
        if not 0 <= step <= len(self.moments):
            raise IndexError(f"step {step} of a schedule with {len(self.moments)} moments")
        slots: list[tuple[int | None, str]] = [(None, "empty")] * self.slots
        working = None
        for moment in self.moments[:step]:
            state = {"fetch": "arriving", "arrive": "ready", "work": "working", "return": "done"}[moment.kind]
            if moment.slot >= 0:
                slots[moment.slot] = (moment.turn, state)
            if moment.kind in ("work", "return"):
                working = moment.turn if moment.kind == "work" else None
        return Scene(self.moments[step - 1] if step else None, tuple(slots), working)

    def filled(self) -> list[tuple[float, float]]:
        """(seconds, bytes in all slots together): between two entries it changes evenly.

        What a slot held counts until the next copy into it begins.
        """
        changes: list[tuple[float, float, float, float]] = []  # start, end, bytes at once, bytes by the end
        held = [0] * self.slots
        for span in self.spans:
            if span.lane == "link":
                size = self.turns[span.turn].nbytes
                changes.append((span.start, span.end, -held[span.slot], size))
                held[span.slot] = size
        times = sorted({0.0, self.seconds, *(t for start, end, *_ in changes for t in (start, end))})
        found: list[tuple[float, float]] = []
        for time in times:
            for inclusive in (False, True):  # before and after what happens at once
                begun = [c for c in changes if c[0] < time or (inclusive and c[0] == time)]
                share = [1.0 if end <= time else (time - start) / (end - start) for start, end, *_ in begun]
                value = sum(at_once + size * part for (_, _, at_once, size), part in zip(begun, share))
                if not found or found[-1] != (time, value):
                    found.append((time, value))
        return found


@dataclass
class _Slot:
    number: int
    holds: int | None = None
    used: int = 0  # number of the loan for which it was last used
    free: float = 0.0  # when the work that last read it was done
    ready: float = 0.0  # when its bytes have arrived
    read: float = 0.0  # when they had been read from the file


def schedule(
    turns: Sequence[Turn],
    *,
    link: float,
    disk: float = math.inf,
    slots: int = 2,
    prefetch: bool = True,
    tokens: int = 1,
    ahead: bool = True,
    chunk: int = CHUNK,
    ring: int = RING,
) -> Schedule:
    """Find when every unit is read, copied and worked with.

    Args:
        turns: the units in the order in which they work.
        link: bytes a second from RAM to the device.
        disk: bytes a second from the files.
        slots: units that the device holds in flight. With one, a copy waits for the work before it.
        prefetch: fetch the next units while one works.
        tokens: forwards, one after another. The first finds all slots empty.
        ahead: False if the host waits for each copy and each forward before it asks for the next thing, as it does
            without streams, and as hooks do that copy from memory which is not pinned. Then nothing overlaps.
        chunk, ring: bytes of a chunk of a file, and how many there may be in RAM.

    Raises:
        ValueError: a rate or number that is not positive, or travelling units that work on several devices.

    Ten blocks of 1 GB over a link of 50 GB/s, each with 5 ms of work: one by one a token takes 10 x (20 + 5) ms. With
    two slots the work hides behind the copies.

    >>> blocks = [Turn(f"h.{i}", 10**9, 0.005, "cpu") for i in range(10)]
    >>> round(schedule(blocks, link=50e9, slots=1, tokens=3).per_token, 3)
    0.25
    >>> round(schedule(blocks, link=50e9, slots=2, tokens=3).per_token, 3)
    0.2
    """
    numbers = {"link": link, "disk": disk, "slots": slots, "tokens": tokens, "chunk": chunk, "ring": ring}
    for name, value in numbers.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, not {value!r}")
    if not turns:
        raise ValueError("a schedule needs at least one turn")
    if any(turn.nbytes < 0 or turn.seconds < 0 for turn in turns):
        raise ValueError("a turn has negative bytes or seconds")
    away = [i for i, turn in enumerate(turns) if turn.travels]
    if len({turns[i].works for i in away}) > 1:
        raise ValueError("units that travel must all work on one device")

    spans: list[Span] = []
    moments: list[Moment] = []
    pool = [_Slot(number) for number in range(slots)]
    holder: dict[int, _Slot] = {}  # turn -> the slot that holds it
    carried: deque[float] = deque([0.0] * ring, maxlen=ring)  # when the link was done with each of the ring's chunks
    host = link_free = disk_free = done = 0.0  # until when each is busy
    loans = 0

    def idle(spared: Sequence[int], lent: _Slot | None) -> _Slot | None:
        """The slot to fill next: not in use, not holding what is needed soon, used longest ago."""
        found = [slot for slot in pool if slot is not lent and slot.holds not in spared]
        return min(found, key=lambda slot: slot.used) if found else None

    def fetch(i: int, slot: _Slot, token: int) -> None:
        nonlocal link_free, disk_free, host
        turn = turns[i]
        if slot.holds is not None:
            del holder[slot.holds]
        slot.holds, holder[i] = i, slot
        if turn.rests == "disk":
            reads: list[float] = []
            copies: list[float] = []
            for size in _cut(turn.nbytes, chunk):
                begin = max(host, disk_free, carried[0])
                disk_free = begin + size / disk
                copy = max(disk_free, link_free, slot.free)
                link_free = copy + size / link
                carried.append(link_free)
                reads.append(begin)
                copies.append(copy)
            start, slot.read = copies[0], disk_free
            spans.append(Span("disk", i, token, slot.number, reads[0], disk_free))
            begins = max(reads[0], slot.free)  # the ring may fill earlier
        else:
            begins = start = max(host, link_free, slot.free)
            link_free = start + turn.nbytes / link
            slot.read = 0.0
        slot.ready = link_free
        if not ahead:
            host = link_free
        spans.append(Span("link", i, token, slot.number, start, link_free))
        moments.append(Moment(begins, "fetch", i, token, slot.number))
        moments.append(Moment(link_free, "arrive", i, token, slot.number))

    for token in range(tokens):
        for i, turn in enumerate(turns):
            number, start = -1, done
            if turn.travels:
                at = away.index(i)
                circle = [away[(at + k) % len(away)] for k in range(1, min(slots, len(away)))]
                following = circle if prefetch else []
                if i not in holder:
                    slot = idle(following, None) or idle([], None)
                    assert slot is not None
                    fetch(i, slot, token)
                lent = holder[i]
                loans += 1
                lent.used = loans
                for j in following:
                    if j not in holder:
                        slot = idle(following, lent)
                        if slot is None:
                            break
                        fetch(j, slot, token if j > i else token + 1)
                if turn.rests == "disk":
                    host = max(host, lent.read)
                number, start = lent.number, max(done, lent.ready)
            start = max(start, host) if not ahead else start
            done = start + turn.seconds
            if not ahead:
                host = done
            if number >= 0:
                pool[number].free = done
            spans.append(Span("compute", i, token, number, start, done))
            moments.append(Moment(start, "work", i, token, number))
            moments.append(Moment(done, "return", i, token, number))
    # Each moment was noted after those that it had to wait for, so a stable sort keeps causes before effects.
    moments.sort(key=lambda moment: moment.time)
    return Schedule(tuple(turns), link, disk, slots, prefetch, tokens, ahead, tuple(spans), tuple(moments))


def _cut(nbytes: int, chunk: int) -> list[int]:
    """The sizes of the chunks of a file that hold so many bytes; one of 0 bytes for none."""
    return [min(chunk, nbytes - start) for start in range(0, nbytes, chunk)] or [0]
