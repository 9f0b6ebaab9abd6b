"""Pictures of a model that runs while it is spread out, each with a text twin that tells the same figures.

    run_figure     a moment of it: where each unit rests, what the slots hold, what moves, what works; below, the charts
    gantt_figure   the charts alone: for each way to run, what each lane does over time

Leaves out: finding out what happens when (`machine/streams.py`), and controls (`widgets/`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from ..devices import Device, device_label
from ..machine.streams import LANES, Moment, Schedule
from ..units import counted, format_bytes, format_seconds, text_table
from .canvas import ABOVE, GROUND, TOP, WIDTH, Picture, shorten, time_unit
from .colours import BLACK, GREEN, GREY, ORANGE, PALE, SOFT, TRACK, VERMILLION, WHITE, YELLOW, device_colour

Charts = Mapping[str, Schedule]  # a name for each way to run

STATES = {"arriving": YELLOW, "ready": GREEN, "working": ORANGE, "done": TRACK}  # of a slot, in order
LANE_COLOURS = {"compute": ORANGE, "link": YELLOW, "disk": PALE}
LEFT, RIGHT, ROW, BOX, LANE, STRIP = 58, 92, 22, 16, 15, 24
_DOES = {"compute": "works", "link": "travels over the link", "disk": "is read from disk"}
_ENDS = {"return": "returns", "arrive": "has arrived", "work": "begins to work", "fetch": "is fetched"}


def run_figure(charts: Charts, shown: str, step: int, title: str = "") -> Picture:
    """A moment of a run as a picture.

    On top, a column for each unit, in the order in which they work, and a row for each place. A unit is drawn in the
    row where it rests; a slot's row has a box in the column of the unit that it holds. Below, the charts of
    `gantt_figure` with a line at the moment, and how full each place is over time; a strip is as high as the whole
    model.

    Args:
        charts: ways to run the same units.
        shown: the one whose moment is drawn.
        step: how many of its moments have passed.
        title: for instance the model's name.

    >>> from bigkit.machine.streams import Turn, schedule
    >>> blocks = [Turn(f"h.{i}", 10**9, 0.01, "cpu") for i in range(4)]
    >>> run_figure({"prefetch": schedule(blocks, link=50e9)}, "prefetch", 3)  # doctest: +ELLIPSIS
    <Picture: prefetch, after 20.0 ms: h.0 has arrived; h.1 is fetched from RAM into slot 1. Slot 0 holds h.0, ready...>
    """
    schedule, longest = charts[shown], _longest(charts)
    scene = schedule.scene(step)
    time = scene.moment.time if scene.moment else 0.0
    picture = Picture(title or shown, run_label(charts, shown, step), LEFT, RIGHT)
    if title:
        picture.head(_settings(schedule))
    states = [(f"{state}{', may be refilled' * (state == 'done')}", colour) for state, colour in STATES.items()]
    picture.legend([*states, *_works_where_it_rests(schedule)])
    _draw_places(picture, schedule, step)
    _draw_charts(picture, charts, longest, shown, time)
    _draw_memory(picture, schedule, longest, time)
    return picture


def run_text(charts: Charts, shown: str, step: int) -> str:
    """The text twin of `run_figure`.

    >>> from bigkit.machine.streams import Turn, schedule
    >>> blocks = [Turn(f"h.{i}", 10**9, 0.01, "cpu") for i in range(4)]
    >>> print(run_text({"prefetch": schedule(blocks, link=50e9)}, "prefetch", 3).splitlines()[0])
    prefetch, after 20.0 ms: h.0 has arrived; h.1 is fetched from RAM into slot 1
    """
    schedule = charts[shown]
    scene = schedule.scene(step)
    rows = []
    for device in _devices(schedule):
        turns = [i for i, turn in enumerate(schedule.turns) if turn.rests == device]
        working = scene.working if scene.working in turns and not schedule.turns[scene.working].travels else None
        now = f"{_name(schedule, working)} works" if working is not None else ""
        rows.append([device_label(device), format_bytes(_bytes(schedule, device), "si"), now, _spans(schedule, turns)])
    for number, (holds, state) in enumerate(scene.slots):
        if any(turn.travels for turn in schedule.turns):
            held = "nothing" if holds is None else _name(schedule, holds)
            size = 0 if holds is None else schedule.turns[holds].nbytes
            rows.append([f"slot {number}", format_bytes(size, "si"), state, held])
    table = text_table(["place", "bytes", "now", "units"], rows, "<><<")
    return "\n".join([f"{shown}, {run_news(schedule, step)}", "", table, "", gantt_text(charts)])


def run_news(schedule: Schedule, step: int) -> str:
    """What happened at the time of the last of the first `step` moments, in words.

    >>> from bigkit.machine.streams import Turn, schedule
    >>> run_news(schedule([Turn("h.0", 10**9, 0.01, "cpu")], link=50e9), 1)
    'after 0 s: h.0 is fetched from RAM into slot 0'
    """
    if not step:
        return "before the start"
    at_once = _at_once(schedule, step)
    return f"after {format_seconds(at_once[0].time)}: " + "; ".join(_in_words(schedule, each) for each in at_once)


def run_caption(schedule: Schedule, step: int) -> str:
    """What happens at a moment and what for, in plain sentences.

    >>> from bigkit.machine.streams import Turn, schedule
    >>> run_caption(schedule([Turn("h.0", 10**9, 0.01, "cpu")], link=50e9), 1)
    'At 0 s the weights of h.0 leave RAM for slot 0. GPU 0 waits for those of h.0.'
    """
    if not step:
        return "Nothing has happened yet: press Play, or step with the arrow keys."
    at_once, scene = _at_once(schedule, step), schedule.scene(step)
    said = []
    for moment in at_once:
        turn, name = schedule.turns[moment.turn], _name(schedule, moment.turn)
        said.append({
            "fetch": f"the weights of {name} leave {device_label(turn.rests)} for slot {moment.slot}",
            "arrive": f"the weights of {name} are there",
            "work": f"{name} works {f'in slot {moment.slot}' if moment.slot >= 0 else 'where its weights rest'}",
            "return": f"{name} is done" + (", and its slot may be filled again" if turn.travels else ""),
        }[moment.kind])  # fmt: skip
    main = next((turn.works for turn in schedule.turns if turn.travels), 0)
    waits = ""
    if scene.working is None and scene.arriving:
        waits = f" {device_label(main)} waits for those of {_name(schedule, scene.arriving[0])}."
    return f"At {format_seconds(at_once[0].time)} {'; '.join(said)}.{waits}"


def _at_once(schedule: Schedule, step: int) -> list[Moment]:
    """Those of the first `step` moments that are at the time of the last."""
    time = schedule.moments[step - 1].time
    return [moment for moment in schedule.moments[:step] if moment.time == time]


def run_label(charts: Charts, shown: str, step: int) -> str:
    """One sentence for those who cannot see the picture of a run."""
    schedule = charts[shown]
    slots = [
        f"slot {number} {f'holds {_name(schedule, holds)}, {state}' if holds is not None else 'is empty'}"
        for number, (holds, state) in enumerate(schedule.scene(step).slots)
    ]
    return f"{shown}, {run_news(schedule, step)}. {', '.join(slots).capitalize()}. {gantt_label(charts)}"


def gantt_figure(charts: Charts, title: str = "") -> Picture:
    """For each way to run the same units, what each lane does over time, on one scale.

    Args:
        charts: name -> schedule.
        title: for instance the model's name.

    >>> from bigkit.machine.streams import Turn, schedule
    >>> blocks = [Turn(f"h.{i}", 10**9, 0.01, "cpu") for i in range(4)]
    >>> gantt_figure({name: schedule(blocks, link=50e9, slots=n) for n, name in ((1, "one slot"), (2, "two"))})
    <Picture: Time for the last token: one slot 120 ms, two 90.0 ms.>
    """
    picture = Picture(title or " and ".join(charts), gantt_label(charts), LEFT, RIGHT)
    if title:
        picture.head(_settings(next(iter(charts.values()))))
    copied = [("copied to the GPU", YELLOW), ("works after a copy", ORANGE)]
    schedule = next(iter(charts.values()))
    read = [("read from disk", PALE)] * bool(schedule.busy["disk"])
    picture.legend([*read, *copied, *_works_where_it_rests(schedule)])
    _draw_charts(picture, charts, _longest(charts))
    return picture


def gantt_text(charts: Charts) -> str:
    """The text twin of `gantt_figure`: how long a token takes, and what each lane has to do for it."""
    rows = [
        [name, *map(format_seconds, [schedule.ends[0], schedule.per_token, *(schedule.busy[lane] for lane in LANES)])]
        for name, schedule in charts.items()
    ]
    table = text_table(["way to run", "first token", "last token", *LANES], rows)
    return f"time for a token, and how long each lane is busy for one\n\n{table}"


def gantt_label(charts: Charts) -> str:
    """One sentence for those who cannot see the charts."""
    times = ", ".join(f"{name} {format_seconds(schedule.per_token)}" for name, schedule in charts.items())
    return f"Time for the last token: {times}."


# ---------------------------------------------------------------------------------------------------------------------
# Words


def _short(name: str) -> str:
    return name.rpartition(".")[2] or "model"


def _name(schedule: Schedule, turn: int) -> str:
    return schedule.turns[turn].name or "the whole model"


def _in_words(schedule: Schedule, moment: Moment) -> str:
    turn = schedule.turns[moment.turn]
    words = f"{_name(schedule, moment.turn)} {_ENDS[moment.kind]}"
    if moment.kind == "fetch":
        return f"{words} from {device_label(turn.rests)} into slot {moment.slot}"
    return f"{words} in slot {moment.slot}" if moment.kind == "work" and moment.slot >= 0 else words


def _settings(schedule: Schedule) -> str:
    size = format_bytes(sum(turn.nbytes for turn in schedule.turns), "si")
    busy = [lane for lane in ("link", "disk") if schedule.busy[lane]]
    rates = [f"{lane} {format_bytes(getattr(schedule, lane), 'si')}/s" for lane in busy]
    return ", ".join([counted(len(schedule.turns), "unit"), size, counted(schedule.tokens, "forward"), *rates])


def _works_where_it_rests(schedule: Schedule) -> list[tuple[str, list[str]]]:
    """The entry of a legend for the work of weights that are on a GPU anyway."""
    colours = dict.fromkeys(device_colour(turn.works) for turn in schedule.turns if not turn.travels)
    return [("on the GPU already", [*colours])] if colours else []


def _longest(charts: Charts) -> float:
    return max(schedule.seconds for schedule in charts.values()) or 1.0


def _devices(schedule: Schedule) -> list[Device]:
    """Where something rests: RAM and disk last, before them the GPUs, the one that the slots belong to last."""
    main = next((turn.works for turn in schedule.turns if turn.travels), 0)
    places = {turn.rests for turn in schedule.turns}
    working = sorted((device for device in places if device not in ("cpu", "disk")), key=str, reverse=True)
    working = [device for device in working if device != main] + [main] * (main in working)
    return [*working, *(device for device in ("cpu", "disk") if device in places)]


def _bytes(schedule: Schedule, device: Device) -> int:
    return sum(turn.nbytes for turn in schedule.turns if turn.rests == device)


def _spans(schedule: Schedule, turns: Sequence[int]) -> str:
    """Names of turns, neighbours as "h.2 .. h.5"."""
    runs = []
    for _, group in groupby(enumerate(turns), key=lambda pair: pair[1] - pair[0]):
        names = [_name(schedule, i) for _, i in group]
        runs += names if len(names) < 3 else [f"{names[0]} .. {names[-1]}"]
    return ", ".join(runs)


def _at(line: Sequence[tuple[float, float]], time: float) -> float:
    """The value of a line at a time; after a jump there."""
    before = [point for point in line if point[0] <= time][-1]
    after = next((point for point in line if point[0] > time), before)
    share = (time - before[0]) / (after[0] - before[0]) if after[0] > before[0] else 0.0
    return before[1] + share * (after[1] - before[1])


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def _draw_places(picture: Picture, schedule: Schedule, step: int) -> None:
    """A column for each unit, a row for each place and slot."""
    scene, width = schedule.scene(step), picture.room / len(schedule.turns)
    main = next((turn.works for turn in schedule.turns if turn.travels), 0)
    now = [moment for moment in schedule.moments[:step] if moment.time == schedule.moments[step - 1].time]
    fetched = {moment.turn for moment in now if moment.kind == "fetch"}
    rows: dict[Device, float] = {}
    slot_rows: list[float] = []
    for device in _devices(schedule):
        if device in ("cpu", "disk") and not slot_rows:
            for number in range(len(scene.slots)):
                picture.text(picture.left - 6, picture.y + ROW / 2, f"slot {number}", 9.5, SOFT, "end")
                picture.box("slot", picture.left, picture.y + ROW / 2 - 1, picture.room, 2, TRACK, depth=GROUND)
                slot_rows.append(picture.y)
                picture.y += ROW
        rows[device] = picture.y
        here = [turn for turn in schedule.turns if turn.rests == device]
        size = format_bytes(_bytes(schedule, device), "si")
        says = f"{device_label(device)}: {counted(len(here), 'unit')} of weights, {size}."
        picture.mark(f"place:{device}", says, 0, picture.y, picture.left, ROW)
        picture.text(picture.left - 6, picture.y + ROW / 2, device_label(device), anchor="end")
        picture.text(WIDTH - 8, picture.y + ROW / 2, format_bytes(_bytes(schedule, device), "si"), 9.5, anchor="end")
        picture.y += ROW
    for i, turn in enumerate(schedule.turns):
        works_here = i == scene.working and not turn.travels
        colour = ORANGE if works_here else device_colour(turn.rests)
        _draw_unit(picture, i, rows[turn.rests], width, turn.name, colour, works_here)
        way = f"travels to {device_label(turn.works)} to work" if turn.travels else "works where it rests"
        size, where = format_bytes(turn.nbytes, "si"), "in" if turn.rests == "cpu" else "on"
        says = f"{_name(schedule, i)}: {size}, rests {where} {device_label(turn.rests)}, {way}."
        picture.mark(f"unit:{i}", says, picture.left + i * width, rows[turn.rests], width, ROW)
    for number, (y, (holds, state)) in enumerate(zip(slot_rows, scene.slots)):
        what = "is empty" if holds is None else f"holds {_name(schedule, holds)}, {state}"
        picture.mark(f"slot:{number}", f"Slot {number} of {device_label(main)} {what}.", 0, y, WIDTH, ROW)
        if holds is None:
            picture.text(WIDTH - 8, y + ROW / 2, "empty", 9.5, SOFT, "end")
            continue
        turn = schedule.turns[holds]
        picture.text(WIDTH - 8, y + ROW / 2, state, 9.5, anchor="end", bold=state == "working")
        moved = rows[turn.rests] - y if state == "arriving" and holds in fetched else 0.0
        _draw_unit(picture, holds, y, width, turn.name, STATES[state], state == "working", moved)
        if state == "arriving":
            x, start, end = picture.left + (holds + 0.5) * width, rows[turn.rests] + 1, y + ROW - 2
            picture.line("arrow", [(x, start), (x, end + 4)], BLACK, 1.4)
            picture.line("arrow", [(x - 3.5, end + 5), (x + 3.5, end + 5), (x, end)], BLACK)
    picture.y += 8


def _draw_unit(
    picture: Picture, column: int, y: float, width: float, name: str, colour: str, framed: bool, moved: float = 0
) -> None:
    x, top = picture.left + column * width, y + (ROW - BOX) / 2
    gap = min(1.0, width / 8)
    edge = 1.2 if framed else 0.6 if colour == TRACK else 0.0
    if edge:
        ground = BLACK if framed else GREY
        picture.box("frame", x + gap - edge, top - edge, width - 2 * (gap - edge), BOX + 2 * edge, ground)
    picture.box("units", x + gap, top, width - 2 * gap, BOX, colour, depth=ABOVE, moved=moved)
    texts = (_short(name), name.rpartition("_")[2])
    picture.label_in(x, top + BOX / 2, width, texts, 8.5, colour, margin=2)


def _draw_charts(picture: Picture, charts: Charts, longest: float, shown: str | None = None, time: float = 0.0) -> None:
    """The lanes of each way to run, on one scale, with an axis below."""
    for name, schedule in charts.items():
        text = f"{name}: {format_seconds(schedule.per_token)} for the last token"
        picture.text(8, picture.y + 9, shorten(text, WIDTH - 16, 9.5, name == shown), 9.5, bold=name == shown)
        picture.y += 19
        begin = picture.y
        for lane in LANES:
            if lane == "compute" or schedule.busy[lane]:
                _draw_lane(picture, schedule, lane, longest)
        for end in schedule.ends:
            x = _x(picture, end, longest)
            picture.line("token", [(x, begin - 2), (x, picture.y)], BLACK, 1.2)
        if name == shown:
            _draw_cursor(picture, time, begin - 3, picture.y + 2, longest)
        picture.y += 4
    _draw_axis(picture, longest)


def _draw_lane(picture: Picture, schedule: Schedule, lane: str, longest: float) -> None:
    middle, top, height = picture.y + LANE / 2, picture.y + 1, LANE - 2
    picture.text(picture.left - 6, middle, lane, 9, anchor="end")
    end = _x(picture, schedule.seconds, longest)
    picture.box("room", picture.left, top, end - picture.left, height, TRACK, depth=GROUND)
    share = schedule.busy[lane] / schedule.per_token if schedule.per_token else 0.0
    picture.text(WIDTH - 8, middle, f"busy {min(100, round(100 * share))} %", 9, SOFT, "end")
    for span in schedule.spans:
        if span.lane != lane or span.start >= schedule.seconds:
            continue
        x, stop = _x(picture, span.start, longest), _x(picture, min(span.end, schedule.seconds), longest)
        turn = schedule.turns[span.turn]
        colour = device_colour(turn.works) if lane == "compute" and not turn.travels else LANE_COLOURS[lane]
        picture.box(lane, x, top, stop - x, height, colour)
        lasts = f"{format_seconds(span.end - span.start)}, from {format_seconds(span.start)} on"
        says = f"{_name(schedule, span.turn)}: {_DOES[lane]} for {lasts}."
        picture.mark(f"span:{lane}:{span.turn}", says, x, top, stop - x, height)
        if stop - x > 2:
            picture.box("seams", stop - 0.5, top, 0.5, height, WHITE, depth=ABOVE)
        picture.label_in(x, middle, stop - x, (_short(turn.name),), 7.5, colour, margin=1)
    picture.y += LANE


def _draw_memory(picture: Picture, schedule: Schedule, longest: float, time: float) -> None:
    """How full each place is over time."""
    whole = sum(turn.nbytes for turn in schedule.turns) or 1
    picture.text(8, picture.y + 10, "how full each place is, as a share of the whole model", 9.5)
    picture.y += 20
    begin, main = picture.y, next((turn.works for turn in schedule.turns if turn.travels), None)
    filled = schedule.filled()
    end = schedule.seconds
    shown = [*(point for point in filled if point[0] < end), (end, _at(filled, end))]
    left, right = picture.left, _x(picture, end, longest)
    height = STRIP - 3
    for device in _devices(schedule):
        nbytes = _bytes(schedule, device)
        bottom, scale = picture.y + height, height / whole
        floor = bottom - nbytes * scale
        picture.text(left - 6, picture.y + STRIP / 2, device_label(device), 9, anchor="end")
        picture.box("room", left, picture.y, right - left, height, TRACK, depth=GROUND)
        picture.box("rests", left, floor, right - left, nbytes * scale, device_colour(device))
        if device == main:
            points = [(_x(picture, moment, longest), floor - value * scale) for moment, value in shown]
            picture.line("slots", [(left, floor), *points, (right, floor)], GREEN, depth=ABOVE)
            nbytes += round(_at(filled, time))
            room = schedule.slots * max(turn.nbytes for turn in schedule.turns if turn.travels) * scale
            picture.line("room of the slots", [(left, floor - room), (right, floor - room)], BLACK, 0.8)
        picture.text(WIDTH - 8, picture.y + STRIP / 2, format_bytes(nbytes, "si"), 9, anchor="end")
        picture.y += STRIP
    _draw_cursor(picture, time, begin - 2, picture.y - 1, longest)
    _draw_axis(picture, longest)


def _draw_cursor(picture: Picture, time: float, top: float, bottom: float, longest: float) -> None:
    x = _x(picture, time, longest)
    picture.line("now", [(x, top), (x, bottom)], VERMILLION, 1.8, depth=TOP + 1)


def _draw_axis(picture: Picture, longest: float) -> None:
    unit, name = time_unit(longest)
    picture.axis(longest / unit, name, picture.y - 2)


def _x(picture: Picture, time: float, longest: float) -> float:
    return picture.left + picture.room * min(time / longest, 1.0)
