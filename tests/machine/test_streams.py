"""A schedule is what the rules say, tick by tick, and follows what the real streamer does with a real model.

Two oracles: the streamer itself, run on real modules, says what is fetched in which order and into which slot; a clock
that advances by one tick at a time says when each of these operations can begin, knowing nothing of the recursion in
`schedule`.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bigkit import dispatch_model
from bigkit.machine.streams import CHUNK, RING, Schedule, Turn, schedule
from bigkit.offload import transfer as lanes
from bigkit.offload.events import Event
from bigkit.offload.observe import observe

RESTS = st.sampled_from([0, "cpu", "cpu", "disk"])


def turn(rests: Any, nbytes: int, seconds: int, i: int = 0) -> Turn:
    return Turn(str(i), nbytes, seconds, rests)


@st.composite
def turn_lists(draw: Any, rests: Any = RESTS) -> list[Turn]:
    places = draw(st.lists(rests, min_size=1, max_size=7))
    return [turn(place, draw(st.integers(0, 9)), draw(st.integers(0, 9)), i) for i, place in enumerate(places)]


# ---------------------------------------------------------------------------------------------------------------------
# The real streamer


def real(
    rests: list[Any], slots: int, prefetch: bool, tokens: int, folder: Any
) -> tuple[nn.Module, Callable[[], None]]:
    """A chain of layers, spread out, and a function that runs it."""
    torch.manual_seed(0)
    whole = nn.Sequential(*[nn.Linear(2, 2) for _ in rests])
    x = torch.ones(1, 2)
    expected = whole(x)
    model = dispatch_model(
        whole, {str(i): place for i, place in enumerate(rests)}, 0, offload_dir=folder, slots=slots, prefetch=prefetch,
        stand_in={0: "cpu"}, force_hooks=True,
    )  # fmt: skip

    def run() -> None:
        with torch.no_grad():
            for _ in range(tokens):
                assert torch.equal(model(x), expected)

    return model, run


@settings(max_examples=60)
@given(
    rests=st.lists(RESTS, min_size=2, max_size=7),
    slots=st.integers(1, 5), prefetch=st.booleans(), tokens=st.integers(1, 3),
)  # fmt: skip
def test_order_and_slots_are_those_of_the_real_streamer(
    tmp_path_factory: pytest.TempPathFactory, rests: list[Any], slots: int, prefetch: bool, tokens: int
) -> None:
    model, run = real(rests, slots, prefetch, tokens, tmp_path_factory.mktemp("offload"))
    recording = observe(model, run)
    timing = recording.schedule(1.0, 1.0, 1.0)  # raises if fetches or slots differ
    assert [t.rests for t in timing.turns] == rests and timing.tokens == tokens
    works = [event.unit for event in recording.events if event.kind == "work"]
    assert works == [str(span.turn) for span in timing.spans if span.lane == "compute"]
    if any(place != 0 for place in rests):
        assert (recording.slots, recording.prefetch) == (slots, prefetch)
    for kind in ("work", "return"):
        mine = [moment.turn for moment in timing.moments if moment.kind == kind]
        assert [str(i) for i in mine] == [event.unit for event in recording.events if event.kind == kind]


def test_a_schedule_refuses_what_it_does_not_model(tmp_path: Any) -> None:
    model, _ = real(["cpu"] * 4, 2, True, 1, tmp_path)

    def in_another_order() -> None:
        with torch.no_grad():
            model(torch.ones(1, 2))
            for layer in reversed(list(model)):  # type: ignore[arg-type]
                layer(torch.ones(1, 2))

    with pytest.raises(ValueError, match="same order"):
        observe(model, in_another_order).schedule(1.0, 1.0, 1.0)

    def one_skipped() -> None:  # always the same order, but not a circle at first
        with torch.no_grad():
            for i in (0, 2, 3) * 2:
                model[i](torch.ones(1, 2))  # type: ignore[index]

    with pytest.raises(ValueError, match="by the rules"):
        observe(model, one_skipped).schedule(1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="not spread out"):
        observe(nn.Linear(2, 2), lambda: None)
    with pytest.raises(ValueError, match="nothing in"):
        observe(model, lambda: None)


def test_recording_leaves_nothing_behind(tmp_path: Any) -> None:
    model, run = real([0, "cpu", "disk"], 2, True, 1, tmp_path)

    def fails() -> None:
        model(torch.ones(1, 3))

    with pytest.raises(RuntimeError):
        observe(model, fails)
    first, second = observe(model, run), observe(model, run)
    assert [e.unit for e in first.events if e.kind == "work"] == ["0", "1", "2"]
    assert len(second.events) <= len(first.events)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_chunks_are_those_of_the_lane() -> None:
    assert (CHUNK, RING) == (lanes.CHUNK, lanes.RING)


# ---------------------------------------------------------------------------------------------------------------------
# A clock


def tick_by_tick(
    turns: list[Turn], events: list[Event], slow: int, chunk: int, ring: int, ahead: bool
) -> dict[tuple[str, int, int], tuple[int, int]]:
    """Run the streamer's operations against a clock: one byte a tick over the link, `slow` ticks a byte from the disk.

    Returns:
        (lane, turn, how often before) -> (start, end).
    """
    spans: dict[tuple[str, int, int], list[int]] = {}
    host: deque[tuple[str, int, int]] = deque((e.kind, int(e.unit), e.slot) for e in events if e.kind != "return")
    count: dict[tuple[str, int], int] = {}
    slot_of: dict[int, int] = {}
    last_reader: dict[int, dict[str, Any]] = {}  # slot -> job
    arrived: dict[int, list[dict[str, Any]]] = {}  # turn -> the jobs that fill its slot
    read: dict[int, list[dict[str, Any]]] = {}
    queues: dict[str, deque[dict[str, Any]]] = {"disk": deque(), "link": deque(), "compute": deque()}
    running: dict[str, dict[str, Any] | None] = dict.fromkeys(queues)
    in_ring = 0
    last_asked: list[dict[str, Any]] = []  # what the host waits for if it does not run ahead

    def job(lane: str, i: int, ticks: int, needs: list[dict[str, Any]], n: int, takes: int = 0, gives: int = 0) -> Any:
        task = {"lane": lane, "key": (lane, i, n), "left": ticks, "needs": needs, "done": False,
                "takes": takes, "gives": gives}  # fmt: skip
        queues[lane].append(task)
        return task

    def number(lane: str, i: int) -> int:
        count[lane, i] = count.get((lane, i), -1) + 1
        return count[lane, i]

    def host_steps() -> bool:
        if not host or (not ahead and not all(asked["done"] for asked in last_asked)):
            return False
        kind, i, slot = host[0]
        if kind == "fetch":
            host.popleft()
            n, before = number("link", i), [last_reader[slot]] if slot in last_reader else []
            if turns[i].rests == "disk":
                sizes = [min(chunk, turns[i].nbytes - at) for at in range(0, turns[i].nbytes, chunk)] or [0]
                read[i] = [job("disk", i, size * slow, [], n, takes=1) for size in sizes]
                arrived[i] = [job("link", i, size, [*before, piece], n, gives=1) for size, piece in zip(sizes, read[i])]
            else:
                read[i], arrived[i] = [], [job("link", i, turns[i].nbytes, before, n)]
            slot_of[i], last_asked[:] = slot, arrived[i]
            return True
        if not turns[i].travels:
            host.popleft()
            last_asked[:] = [job("compute", i, int(turns[i].seconds), [], number("compute", i))]
            return True
        if not all(piece["done"] for piece in read[i]):
            return False
        host.popleft()
        last_reader[slot_of[i]] = job("compute", i, int(turns[i].seconds), arrived[i], number("compute", i))
        last_asked[:] = [last_reader[slot_of[i]]]
        return True

    now = 0
    while host or any(queues.values()) or any(running.values()):
        moved = True
        while moved:
            moved = host_steps()
            for lane, queue in queues.items():
                current = running[lane]
                if current is not None and not current["left"]:
                    current["done"], running[lane], moved = True, None, True
                    in_ring -= current["gives"]
                    spans[current["key"]][1] = now
                if running[lane] is None and queue:
                    head = queue[0]
                    if all(need["done"] for need in head["needs"]) and in_ring + head["takes"] <= ring:
                        running[lane], moved = queue.popleft(), True
                        in_ring += head["takes"]
                        spans.setdefault(head["key"], [now, now])
        now += 1
        for current in running.values():
            if current is not None:
                current["left"] -= 1
        assert now < 5000
    return {key: (start, end) for key, (start, end) in spans.items()}


@settings(max_examples=150)
@given(
    turns=turn_lists(), slots=st.integers(1, 4), prefetch=st.booleans(), tokens=st.integers(1, 3),
    slow=st.integers(1, 3), chunk=st.integers(1, 5), ring=st.integers(1, 4), ahead=st.booleans(),
)  # fmt: skip
def test_every_span_is_where_a_clock_has_it(
    tmp_path_factory: pytest.TempPathFactory, turns: list[Turn], slots: int, prefetch: bool, tokens: int, slow: int,
    chunk: int, ring: int, ahead: bool,
) -> None:  # fmt: skip
    model, run = real([t.rests for t in turns], slots, prefetch, tokens, tmp_path_factory.mktemp("offload"))
    events = list(observe(model, run).events)
    timing = schedule(
        turns, link=1, disk=1 / slow, slots=slots, prefetch=prefetch, tokens=tokens, ahead=ahead, chunk=chunk, ring=ring
    )
    mine: dict[tuple[str, int, int], tuple[float, float]] = {}
    for span in timing.spans:
        n = sum(key[:2] == (span.lane, span.turn) for key in mine)
        mine[span.lane, span.turn, n] = (span.start, span.end)
    assert mine == tick_by_tick(turns, events, slow, chunk, ring, ahead)


# ---------------------------------------------------------------------------------------------------------------------
# What always holds


@given(turns=turn_lists(), slots=st.integers(1, 4), prefetch=st.booleans(), tokens=st.integers(1, 3))
def test_no_lane_does_two_things_and_no_slot_is_overwritten(
    turns: list[Turn], slots: int, prefetch: bool, tokens: int
) -> None:
    timing = schedule(turns, link=2, disk=1, slots=slots, prefetch=prefetch, tokens=tokens, chunk=3, ring=2)
    for lane in ("compute", "link", "disk"):
        own = [span for span in timing.spans if span.lane == lane]
        assert all(one.start <= one.end <= two.start for one, two in zip(own, own[1:])), lane
    reading = dict.fromkeys(range(slots), 0.0)
    for span in timing.spans:
        if span.lane == "compute" and span.slot >= 0:
            reading[span.slot] = span.end
        elif span.lane == "link":
            assert span.start >= reading[span.slot], "a slot was refilled while it was read"
    for t, before in ((m.time, n.time) for m, n in zip(timing.moments[1:], timing.moments)):
        assert t >= before
    assert timing.seconds >= timing.busy["compute"] * tokens
    if timing.busy["link"] and slots < sum(t.travels for t in turns):
        assert timing.seconds >= timing.busy["link"] * tokens - slots * max(t.nbytes for t in turns) / 2


@given(turns=turn_lists(), slots=st.integers(1, 4), prefetch=st.booleans(), tokens=st.integers(1, 3))
def test_scenes_make_sense(turns: list[Turn], slots: int, prefetch: bool, tokens: int) -> None:
    timing = schedule(turns, link=2, disk=1, slots=slots, prefetch=prefetch, tokens=tokens)
    legal = {("empty", "arriving"), ("arriving", "ready"), ("ready", "working"), ("working", "done"),
             ("done", "arriving"), ("done", "working")}  # fmt: skip
    for step in range(1, len(timing.moments) + 1):
        before, scene = timing.scene(step - 1), timing.scene(step)
        assert sum(state == "working" for _, state in scene.slots) <= 1
        for (held, was), (holds, now) in zip(before.slots, scene.slots):
            assert (held, was) == (holds, now) or (was, now) in legal
            assert held == holds or now == "arriving"
        if scene.working is not None and turns[scene.working].travels:
            assert (scene.working, "working") in scene.slots
    assert timing.scene(0).moment is None and timing.scene(len(timing.moments)).working is None
    times = [timing.moments[step - 1].time for step in timing.frames[1:]]
    assert timing.frames[0] == 0 and times == sorted({moment.time for moment in timing.moments})
    with pytest.raises(IndexError, match="moments"):
        timing.scene(len(timing.moments) + 1)


@given(turns=turn_lists(), slots=st.integers(1, 4), tokens=st.integers(1, 3))
def test_filled_follows_the_link(turns: list[Turn], slots: int, tokens: int) -> None:
    timing = schedule(turns, link=2, disk=1, slots=slots, tokens=tokens)
    line = timing.filled()
    room = slots * max((t.nbytes for t in turns), default=0)
    assert all(-1e-9 <= value <= room + 1e-9 for _, value in line)
    assert [time for time, _ in line] == sorted(time for time, _ in line)
    held: dict[int, int] = {}
    for span in timing.spans:
        if span.lane == "link":
            held[span.slot] = turns[span.turn].nbytes
    assert line[-1][1] == pytest.approx(sum(held.values()))


@given(
    n=st.integers(3, 8), size=st.integers(1, 9), work=st.integers(0, 9), slots=st.integers(2, 4),
    rests=st.sampled_from(["cpu", "disk"]),
)  # fmt: skip
def test_equal_blocks_in_the_steady_state(n: int, size: int, work: int, slots: int, rests: str) -> None:
    """One by one, a token is the sum of copies and work; with a slot to spare, the larger of the two."""
    slots = min(slots, n - 1)
    blocks = [turn(rests, size, work, i) for i in range(n)]
    options: dict[str, Any] = {"link": 1, "disk": 1, "tokens": 8, "chunk": 10}
    each = {"cpu": size, "disk": 2 * size}[rests]  # a file of one chunk is read, then copied
    assert schedule(blocks, slots=slots, ahead=False, **options).per_token == n * (each + work)
    one = schedule(blocks, slots=1, **options).per_token
    assert one == n * (each + work) if rests == "cpu" else one <= n * (each + work), "a file is read ahead of its slot"
    overlapped = schedule(blocks, slots=slots, **options)
    if rests == "cpu":
        assert overlapped.per_token == n * max(size, work)
        # The host runs ahead, so over RAM two slots overlap even if nothing is fetched before it is needed.
        assert schedule(blocks, slots=2, prefetch=False, **options).per_token == n * max(size, work)
    else:
        assert n * max(size, work) <= overlapped.per_token <= n * (each + work)


@given(turns=turn_lists(), tokens=st.integers(1, 3))
def test_room_for_everything_copies_once(turns: list[Turn], tokens: int) -> None:
    timing = schedule(turns, link=1, slots=len(turns), tokens=tokens)
    assert sum(span.lane == "link" for span in timing.spans) == sum(t.travels for t in turns)


def test_spread_residents_hide_copies() -> None:
    """Half of the blocks stay: a copy has two blocks' work to hide behind, if they alternate."""
    size, work = 4, 3
    front = [turn(0 if i < 4 else "cpu", size, work, i) for i in range(8)]
    spread = [turn(0 if i % 2 else "cpu", size, work, i) for i in range(8)]
    times = [schedule(turns, link=1, tokens=9).per_token for turns in (front, spread)]
    assert times[1] == 8 * work < times[0]


def test_the_disk_may_be_a_ring_ahead() -> None:
    blocks = [turn("disk", 10, 0, i) for i in range(3)]
    timing = schedule(blocks, link=1, disk=2, slots=1, chunk=1, ring=4)
    (first, *_), (copy, *_) = ([s for s in timing.spans if s.lane == lane] for lane in ("disk", "link"))
    assert (first.start, copy.start) == (0, 0.5) and copy.end == 10.5
    assert first.end == 7.0  # the last chunk is read once chunk 6 of 10 has been copied, at 6.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"link": 0}, "link must be positive"), ({"disk": -1}, "disk"), ({"slots": 0}, "slots"),
        ({"tokens": 0}, "tokens"), ({"link": math.nan}, "link"), ({"chunk": 0}, "chunk"), ({"ring": 0}, "ring"),
    ],
)  # fmt: skip
def test_bad_numbers(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule([turn("cpu", 1, 1)], **{"link": 1.0, **wrong})


def test_bad_turns() -> None:
    with pytest.raises(ValueError, match="at least one"):
        schedule([], link=1)
    with pytest.raises(ValueError, match="negative"):
        schedule([turn("cpu", -1, 1)], link=1)
    with pytest.raises(ValueError, match="one device"):
        schedule([Turn("a", 1, 1, "cpu", 0), Turn("b", 1, 1, "cpu", 1)], link=1)


def test_no_torch_is_needed() -> None:
    code = "import sys, bigkit.machine.streams; print({'torch', 'numpy'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_a_schedule_of_ten_thousand_turns_is_quick_to_make() -> None:
    timing: Schedule = schedule([turn("cpu", 1, 1, i) for i in range(1000)], link=1, tokens=10)
    assert timing.per_token == 1000
