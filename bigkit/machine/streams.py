"""When which bytes move, and when what works: one clock for a model that is spread out, as plain arithmetic.

    host      asks for copies and for work                     runs ahead of both
    disk      reads a unit's bytes from files                  bytes / rate of the disk
    link      copies them into a slot on the device            bytes / rate of the link
    compute   the unit's forward, from the slot                seconds, which the caller knows

The rules are those of `offload/stream.py` and `offload/transfer.py`, which move the real bytes. Each is one method,
whose docstring states it:

    Clock.occupy        a lane does one thing at a time
    Clock.fill          when a slot is refilled
    Clock._read         how a file is read and copied, chunk by chunk
    Clock.arrive        when a unit can work, and what the host waits for
    Player.following    which units come next
    Player.lend         what is fetched, and when
    Player.idle_slot    into which slot

`Clock` says when. `schedule` plays whole forwards with it, in the order and with the slots that `Player` chooses; a dry
run (`machine/roofline.py`) plays what a real streamer asked for. Every start is the latest of a few earlier ends.

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
        name: the unit's name, such as "transformer.h.3".
        nbytes: bytes copied to the device for each forward, if the unit rests elsewhere.
        seconds: time that its forward takes on the device.
        rests: where its weights rest: a GPU's number, "cpu" or "disk".
        works: the device on which it works. All units that travel must work on one device.
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
    """A stretch of time in which a lane is busy with one thing.

    Args:
        lane: "compute", "link" or "disk" in a schedule; in a dry run "python", a device, "copy to" or "experts to" a
            device, or "disk". A copy of a unit from a file may have pauses in which the disk reads.
        name: the unit or operation, in a dry run; a schedule's spans have the number of the turn instead.
        start, end: seconds from the start of the run.
        turn: the number of the turn, in a schedule.
        token: the number of the forward, in a schedule.
        slot: the number of the slot; -1 for what rests where it works.
    """

    lane: str
    name: str
    start: float
    end: float
    turn: int = -1
    token: int = 0
    slot: int = -1


class Moment(NamedTuple):
    """Something that begins or ends.

    Args:
        time: seconds from the start of the run.
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
        turns, link, disk, slots, prefetch, tokens, ahead: what `schedule` was given.
        spans: what every lane did, in the order in which it was asked for.
        moments: every begin and end, in the order of time.
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
        changes, held = [], [0] * self.slots  # (start, end, bytes at once, bytes by the end) of each copy
        for span in self.spans:
            if span.lane == "link":
                size = self.turns[span.turn].nbytes
                changes.append((span.start, span.end, -held[span.slot], size))
                held[span.slot] = size
        times = sorted({0.0, self.seconds, *(t for start, end, *_ in changes for t in (start, end))})
        points: list[tuple[float, float]] = []
        for time in times:
            for inclusive in (False, True):  # before and after what happens at once
                begun = [c for c in changes if c[0] < time or (inclusive and c[0] == time)]
                share = [1.0 if end <= time else (time - start) / (end - start) for start, end, *_ in begun]
                value = sum(at_once + size * part for (_, _, at_once, size), part in zip(begun, share))
                if not points or points[-1] != (time, value):
                    points.append((time, value))
        return points


# ---------------------------------------------------------------------------------------------------------------------
# The clock


@dataclass
class SlotState:
    """Device memory that holds one unit in flight; times in seconds."""

    number: int = 0
    holds: int | None = None  # the turn whose weights it holds
    used: int = 0  # the number of the loan for which it was last used
    free: float = 0.0  # when the work that last read it is done
    read: float = 0.0  # when its bytes had been read from a file; 0 if they came from RAM
    ready: float = 0.0  # when its bytes have arrived


class Filling(NamedTuple):
    """When a unit's bytes begin to move into a slot, and start and end of copying and reading; seconds."""

    begins: float
    copied: tuple[float, float]
    read: tuple[float, float] | None = None


class Clock:
    """When the host and each lane are free, in seconds.

    Args:
        chunk, ring: bytes of a chunk of a file, and how many chunks RAM holds at once.

    >>> clock = Clock()
    >>> clock.occupy("link", 2.0), clock.occupy("link", 1.0), clock.occupy("compute", 1.0, after=2.0)
    ((0.0, 2.0), (2.0, 3.0), (2.0, 3.0))
    """

    def __init__(self, chunk: int = CHUNK, ring: int = RING) -> None:
        self.chunk = chunk
        self.now = 0.0  # until when the host is busy
        self.free: dict[str, float] = {}  # lane -> when it has done all that it was asked for
        self.busy: dict[str, float] = {}  # lane -> seconds in which it did something
        self.carried = deque([0.0] * ring, maxlen=ring)  # when the link was done with each of the ring's chunks

    def occupy(self, lane: str, seconds: float, after: float = 0.0) -> tuple[float, float]:
        """A lane does one thing at a time, in the order in which it is asked. Returns start and end."""
        start = max(self.now, self.free.get(lane, 0.0), after)
        end = self.free[lane] = start + seconds
        self.busy[lane] = self.busy.get(lane, 0.0) + seconds
        return start, end

    def wait(self, lane: str) -> None:
        """The host waits until a lane has done all that it was asked for."""
        self.now = max(self.now, self.free.get(lane, 0.0))

    def fill(self, slot: SlotState, nbytes: int, link: float, disk: float | None = None, lane: str = "link") -> Filling:
        """A slot is refilled when the work that last read it is done.

        Args:
            slot: the slot.
            nbytes: bytes to bring.
            link: bytes a second into the slot.
            disk: bytes a second from the files; None if the weights rest in RAM.
            lane: the link's name.
        """
        if disk is not None:
            return self._read(slot, nbytes, link, disk, lane)
        copied = self.occupy(lane, nbytes / link, slot.free)
        slot.read, slot.ready = 0.0, copied[1]
        return Filling(copied[0], copied)

    def _read(self, slot: SlotState, nbytes: int, link: float, disk: float, lane: str) -> Filling:
        """A file is read in chunks through a ring of RAM: the link carries one chunk while the disk reads the next, and
        the disk may be as far ahead of the link as the ring is long.
        """
        reads, copies = [], []
        for start in range(0, nbytes, self.chunk) or (0,):
            size = min(self.chunk, nbytes - start)
            reads.append(self.occupy("disk", size / disk, self.carried[0]))
            copies.append(self.occupy(lane, size / link, max(reads[-1][1], slot.free)))
            self.carried.append(copies[-1][1])
        slot.read, slot.ready = reads[-1][1], copies[-1][1]
        begins = max(reads[0][0], slot.free)  # the ring may fill before the slot is free
        return Filling(begins, (copies[0][0], slot.ready), (reads[0][0], slot.read))

    def arrive(self, slot: SlotState, lane: str = "compute") -> None:
        """A unit works when its bytes have arrived. The host does not wait for a copy, but it waits for bytes from a
        file: a copy can be asked for only when they have been read, and until then the host asks for nothing else.
        """
        self.now = max(self.now, slot.read)
        self.free[lane] = max(self.free.get(lane, 0.0), slot.ready)

    def leave(self, slot: SlotState, lane: str = "compute") -> None:
        """Note that the work asked for so far is the last that reads the slot."""
        slot.free = max(self.now, self.free.get(lane, 0.0))


# ---------------------------------------------------------------------------------------------------------------------
# Whole forwards


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
    if len({turn.works for turn in turns if turn.travels}) > 1:
        raise ValueError("units that travel must all work on one device")
    player = Player(turns, link, disk, slots, prefetch, ahead, Clock(chunk, ring))
    for token in range(tokens):
        for i in range(len(turns)):
            player.forward(i, token)
    # Each moment was noted after those that it had to wait for, so a stable sort keeps causes before effects.
    moments = sorted(player.moments, key=lambda moment: moment.time)
    return Schedule(tuple(turns), link, disk, slots, prefetch, tokens, ahead, tuple(player.spans), tuple(moments))


class Player:
    """Fetches, lends and works as the real streamer does, and notes when. See `schedule` for the arguments."""

    def __init__(
        self, turns: Sequence[Turn], link: float, disk: float, slots: int, prefetch: bool, ahead: bool, clock: Clock
    ) -> None:
        self.turns, self.link, self.disk, self.clock = turns, link, disk, clock
        self.prefetch, self.ahead = prefetch, ahead
        self.circle = [i for i, turn in enumerate(turns) if turn.travels]
        self.places = {turn: place for place, turn in enumerate(self.circle)}
        self.slots = [SlotState(number) for number in range(slots)]
        self.holder: dict[int, SlotState] = {}  # turn -> the slot that holds it
        self.loans = 0
        self.spans: list[Span] = []
        self.moments: list[Moment] = []

    def forward(self, i: int, token: int) -> None:
        """A unit works when the work before it is done. What rests where it works needs no slot."""
        slot = self.lend(i, token) if self.turns[i].travels else None
        if slot is not None:
            self.clock.arrive(slot)
        start, end = self.clock.occupy("compute", self.turns[i].seconds)
        if not self.ahead:
            self.clock.wait("compute")
        if slot is not None:
            self.clock.leave(slot)
        number = -1 if slot is None else slot.number
        self.spans.append(Span("compute", "", start, end, i, token, number))
        self.moments += [Moment(start, "work", i, token, number), Moment(end, "return", i, token, number)]

    def following(self, i: int) -> list[int]:
        """The order is a circle: after the last unit comes the first, since after a token comes another.

        With prefetch, those are the next ones, as many as there are slots beside this unit's.
        """
        if not self.prefetch:
            return []
        place, count = self.places[i], min(len(self.slots), len(self.circle))
        return [self.circle[(place + k) % len(self.circle)] for k in range(1, count)]

    def lend(self, i: int, token: int) -> SlotState:
        """When a unit is about to work, it and (with prefetch) the next ones are fetched, as far as there are slots."""
        following = self.following(i)
        if i not in self.holder:
            slot = self.idle_slot(following) or self.idle_slot([])
            assert slot is not None
            self.fetch(i, token, slot)
        lent = self.holder[i]
        self.loans += 1
        lent.used = self.loans
        for later in following:
            if later not in self.holder:
                slot = self.idle_slot(following, lent)
                if slot is None:
                    break
                self.fetch(later, token if later > i else token + 1, slot)
        return lent

    def idle_slot(self, spared: Sequence[int], lent: SlotState | None = None) -> SlotState | None:
        """The slot to refill is not in use and holds nothing that is spared; of those, it was used longest ago."""
        idle = [slot for slot in self.slots if slot is not lent and slot.holds not in spared]
        return min(idle, key=lambda slot: slot.used) if idle else None

    def fetch(self, i: int, token: int, slot: SlotState) -> None:
        """Bring a unit into a slot."""
        if slot.holds is not None:
            del self.holder[slot.holds]
        slot.holds, self.holder[i] = i, slot
        turn, about = self.turns[i], (i, token, slot.number)
        filling = self.clock.fill(slot, turn.nbytes, self.link, self.disk if turn.rests == "disk" else None)
        if not self.ahead:
            self.clock.wait("link")
        if filling.read is not None:
            self.spans.append(Span("disk", "", *filling.read, *about))
        self.spans.append(Span("link", "", *filling.copied, *about))
        self.moments += [Moment(filling.begins, "fetch", *about), Moment(filling.copied[1], "arrive", *about)]
