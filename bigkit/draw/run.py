"""Pictures of a model that runs while it is spread out, each with a text twin that tells the same figures.

    run_figure     a moment of it: where each unit rests, what the slots hold, what moves, what works; below, the charts
    gantt_figure   the charts alone: for each way to run, what each lane does over time

Leaves out: finding out what happens when (`machine/streams.py`), and controls (`widgets/`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from ..devices import Device, device_label
from ..machine.streams import LANES, Moment, Schedule
from ..units import format_bytes, format_seconds, text_table
from .canvas import (
    BLACK,
    DARK,
    GREEN,
    GREY,
    ORANGE,
    PALE,
    TRACK,
    VERMILLION,
    WIDTH,
    YELLOW,
    _Canvas,
    _ink,
    _nice_step,
    _text_width,
    device_colour,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Charts = Mapping[str, Schedule]  # a name for each way to run

STATES = {"arriving": YELLOW, "ready": GREEN, "working": ORANGE, "done": TRACK}  # of a slot, in order
LANE_COLOURS = {"compute": ORANGE, "link": YELLOW, "disk": PALE}
LEFT, RIGHT, ROW, BOX, LANE, STRIP = 58, 92, 22, 16, 15, 24
_ENDS = {"return": "returns", "arrive": "has arrived", "work": "begins to work", "fetch": "is fetched"}


def run_figure(charts: Charts, shown: str, step: int, title: str = "") -> Figure:
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
    >>> figure = run_figure({"prefetch": schedule(blocks, link=50e9)}, "prefetch", 3)
    >>> figure.savefig("run.png")  # doctest: +SKIP
    """
    found = charts[shown]
    canvas = _Run()
    if title:
        canvas.title(title, _settings(found))
    canvas.legend([(f"{state}{', may be refilled' * (state == 'done')}", (STATES[state],)) for state in STATES])
    canvas.places(found, step)
    canvas.charts(charts, shown, found.scene(step).moment)
    canvas.strips(found, found.scene(step).moment, _longest(charts))
    return canvas.figure()


def run_text(charts: Charts, shown: str, step: int) -> str:
    """The text twin of `run_figure`.

    >>> from bigkit.machine.streams import Turn, schedule
    >>> blocks = [Turn(f"h.{i}", 10**9, 0.01, "cpu") for i in range(4)]
    >>> print(run_text({"prefetch": schedule(blocks, link=50e9)}, "prefetch", 3).splitlines()[0])
    prefetch, after 20.0 ms: h.0 has arrived; h.1 is fetched from RAM into slot 1
    """
    found = charts[shown]
    scene = found.scene(step)
    rows = []
    for device in _devices(found):
        turns = [i for i, turn in enumerate(found.turns) if turn.rests == device]
        working = scene.working if scene.working in turns and not found.turns[scene.working].travels else None
        now = f"{_name(found, working)} works" if working is not None else ""
        rows.append([device_label(device), format_bytes(_bytes(found, device), "si"), now, _spans(found, turns)])
    for number, (holds, state) in enumerate(scene.slots):
        if any(turn.travels for turn in found.turns):
            held = "nothing" if holds is None else _name(found, holds)
            size = 0 if holds is None else found.turns[holds].nbytes
            rows.append([f"slot {number}", format_bytes(size, "si"), state, held])
    rows = [["place", "bytes", "now", "units"], *rows]
    widths = [max(len(row[i]) for row in rows) for i in (2, 3)]
    headers, *rows = [[place, size, now.ljust(widths[0]), held.ljust(widths[1])] for place, size, now, held in rows]
    table = text_table(headers, rows)
    return "\n".join([f"{shown}, {run_news(found, step)}", "", table, "", gantt_text(charts)])


def run_news(found: Schedule, step: int) -> str:
    """What happened at the time of the last of the first `step` moments, in words.

    >>> from bigkit.machine.streams import Turn, schedule
    >>> run_news(schedule([Turn("h.0", 10**9, 0.01, "cpu")], link=50e9), 1)
    'after 0 s: h.0 is fetched from RAM into slot 0'
    """
    if not step:
        return "before the start"
    time = found.moments[step - 1].time
    at_once = [moment for moment in found.moments[:step] if moment.time == time]
    return f"after {format_seconds(time)}: " + "; ".join(_said(found, moment) for moment in at_once)


def run_label(charts: Charts, shown: str, step: int) -> str:
    """One sentence for those who cannot see the picture of a run."""
    found = charts[shown]
    slots = [
        f"slot {number} {f'holds {_name(found, holds)}, {state}' if holds is not None else 'is empty'}"
        for number, (holds, state) in enumerate(found.scene(step).slots)
    ]
    return f"{shown}, {run_news(found, step)}. {', '.join(slots).capitalize()}. {gantt_label(charts)}"


def gantt_figure(charts: Charts, title: str = "") -> Figure:
    """For each way to run the same units, what each lane does over time, on one scale.

    Args:
        charts: name -> schedule.
        title: for instance the model's name.

    >>> from bigkit.machine.streams import Turn, schedule
    >>> blocks = [Turn(f"h.{i}", 10**9, 0.01, "cpu") for i in range(4)]
    >>> figure = gantt_figure({f"{n} slots": schedule(blocks, link=50e9, slots=n) for n in (1, 2)})
    >>> figure.savefig("gantt.png")  # doctest: +SKIP
    """
    canvas = _Run()
    if title:
        canvas.title(title, _settings(next(iter(charts.values()))))
    canvas.charts(charts, None, None)
    return canvas.figure()


def gantt_text(charts: Charts) -> str:
    """The text twin of `gantt_figure`: how long a token takes, and what each lane has to do for it."""
    rows = [
        [
            name,
            format_seconds(found.ends[0]),
            format_seconds(found.per_token),
            *(format_seconds(found.busy[lane]) for lane in LANES),
        ]
        for name, found in charts.items()
    ]
    table = text_table(["way to run", "first token", "last token", *LANES], rows)
    return f"time for a token, and how long each lane is busy for one\n\n{table}"


def gantt_label(charts: Charts) -> str:
    """One sentence for those who cannot see the charts."""
    said = [f"{name} {format_seconds(found.per_token)}" for name, found in charts.items()]
    return f"Time for the last token: {', '.join(said)}."


# ---------------------------------------------------------------------------------------------------------------------
# Words


def _short(name: str) -> str:
    return name.rpartition(".")[2] or "model"


def _name(found: Schedule, turn: int) -> str:
    return found.turns[turn].name or "the whole model"


def _said(found: Schedule, moment: Moment) -> str:
    turn = found.turns[moment.turn]
    words = f"{_name(found, moment.turn)} {_ENDS[moment.kind]}"
    if moment.kind == "fetch":
        return f"{words} from {device_label(turn.rests)} into slot {moment.slot}"
    return f"{words} in slot {moment.slot}" if moment.kind == "work" and moment.slot >= 0 else words


def _settings(found: Schedule) -> str:
    size = format_bytes(sum(turn.nbytes for turn in found.turns), "si")
    forwards = f"{found.tokens} forward{'s' * (found.tokens > 1)}"
    rates = [f"{lane} {getattr(found, lane) / 1e9:g} GB/s" for lane in ("link", "disk") if found.busy[lane]]
    return ", ".join([f"{len(found.turns)} units", size, forwards, *rates])


def _longest(charts: Charts) -> float:
    return max(found.seconds for found in charts.values()) or 1.0


def _devices(found: Schedule) -> list[Device]:
    """Where something rests: RAM and disk last, before them the GPUs, the one that the slots belong to last."""
    main = next((turn.works for turn in found.turns if turn.travels), 0)
    places = {turn.rests for turn in found.turns}
    working = sorted((device for device in places if device not in ("cpu", "disk")), key=str, reverse=True)
    working = [device for device in working if device != main] + [main] * (main in working)
    return [*working, *(device for device in ("cpu", "disk") if device in places)]


def _bytes(found: Schedule, device: Device) -> int:
    return sum(turn.nbytes for turn in found.turns if turn.rests == device)


def _spans(found: Schedule, turns: Sequence[int]) -> str:
    """Names of turns, neighbours as "h.2 .. h.5"."""
    runs = []
    for _, group in groupby(enumerate(turns), key=lambda pair: pair[1] - pair[0]):
        own = [_name(found, i) for _, i in group]
        runs += own if len(own) < 3 else [f"{own[0]} .. {own[-1]}"]
    return ", ".join(runs)


def _at(line: Sequence[tuple[float, float]], time: float) -> float:
    """The value of a line at a time; after a jump there."""
    before = [point for point in line if point[0] <= time][-1]
    after = next((point for point in line if point[0] > time), before)
    share = (time - before[0]) / (after[0] - before[0]) if after[0] > before[0] else 0.0
    return before[1] + share * (after[1] - before[1])


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


class _Run(_Canvas):
    """A canvas that can draw polygons and lines over its boxes."""

    def __init__(self) -> None:
        super().__init__(LEFT, RIGHT)
        self.shapes: list[tuple[str, list[tuple[float, float]], str, float, float]] = []

    def shape(
        self, kind: str, points: list[tuple[float, float]], colour: str, line: float = 0, depth: float = 5
    ) -> None:
        """A filled polygon or, with a line width, a line."""
        self.shapes.append((kind, points, colour, line, depth))

    def places(self, found: Schedule, step: int) -> None:
        """A column for each unit, a row for each place and slot."""
        scene = found.scene(step)
        wide = (WIDTH - self.left - self.right) / len(found.turns)
        rows: dict[Device, float] = {}
        slots: list[float] = []
        for device in _devices(found):
            if device in ("cpu", "disk") and not slots:
                slots = [*self._slot_rows(len(scene.slots))]
            rows[device] = self.y
            self.text(self.left - 6, self.y + ROW / 2, device_label(device), ha="right")
            self.text(WIDTH - 8, self.y + ROW / 2, format_bytes(_bytes(found, device), "si"), 9.5, ha="right")
            self.y += ROW
        for i, turn in enumerate(found.turns):
            busy = i == scene.working and not turn.travels
            self._unit(i, rows[turn.rests], wide, turn.name, ORANGE if busy else device_colour(turn.rests), busy)
        for y, (holds, state) in zip(slots, scene.slots):
            if holds is None:
                self.text(WIDTH - 8, y + ROW / 2, "empty", 9.5, ha="right", color="#333333")
                continue
            turn = found.turns[holds]
            self.text(WIDTH - 8, y + ROW / 2, state, 9.5, ha="right", weight="bold" if state == "working" else "normal")
            self._unit(holds, y, wide, turn.name, STATES[state], state == "working")
            if state == "arriving":
                self._arrow(self.left + (holds + 0.5) * wide, rows[turn.rests] + 1, y + ROW - 2)
        self.y += 8

    def _slot_rows(self, count: int) -> Iterator[float]:
        for number in range(count):
            self.text(self.left - 6, self.y + ROW / 2, f"slot {number}", 9.5, ha="right", color="#333333")
            self.box("slot", self.left, self.y + ROW / 2 - 1, WIDTH - self.left - self.right, 2, TRACK)
            yield self.y
            self.y += ROW

    def _unit(self, column: int, y: float, wide: float, name: str, colour: str, framed: bool) -> None:
        x, top = self.left + column * wide, y + (ROW - BOX) / 2
        gap = min(1.0, wide / 8)
        if framed:
            self.box("frame", x + gap - 1.2, top - 1.2, wide - 2 * gap + 2.4, BOX + 2.4, BLACK)
        elif colour == TRACK:
            self.box("frame", x + gap - 0.6, top - 0.6, wide - 2 * gap + 1.2, BOX + 1.2, GREY)
        self.box("units", x + gap, top, wide - 2 * gap, BOX, colour)
        said = next((text for text in (_short(name), name.rpartition("_")[2]) if _text_width(text, 8.5) < wide + 2), "")
        if said:
            self.text(x + wide / 2, top + BOX / 2, said, 8.5, ha="center", color=_ink(colour))

    def _arrow(self, x: float, start: float, end: float) -> None:
        self.shape("arrow", [(x, start), (x, end + 4)], BLACK, 1.4)
        self.shape("arrow", [(x - 3.5, end + 5), (x + 3.5, end + 5), (x, end)], BLACK)

    def charts(self, charts: Charts, shown: str | None, moment: Moment | None) -> None:
        """The lanes of each way to run, on one scale, with an axis below."""
        longest = _longest(charts)
        for name, found in charts.items():
            bold = "bold" if name == shown else "normal"
            per = f"{format_seconds(found.per_token)} for the last token"
            self.text(8, self.y + 9, f"{name}: {per}", 9.5, weight=bold)
            self.y += 19
            begin = self.y
            for lane in LANES:
                if lane == "compute" or found.busy[lane]:
                    self._lane(found, lane, longest)
            for end in found.ends:
                x = self._x(end, longest)
                self.shape("token", [(x, begin - 2), (x, self.y)], BLACK, 1.2)
            if name == shown:
                self._cursor(moment, begin - 3, self.y + 2, longest)
            self.y += 4
        self._axis(longest)

    def _lane(self, found: Schedule, lane: str, longest: float) -> None:
        self.text(self.left - 6, self.y + LANE / 2, lane, 9, ha="right")
        end = self._x(found.seconds, longest)
        self.box("room", self.left, self.y + 1, end - self.left, LANE - 2, TRACK)
        share = found.busy[lane] / found.per_token if found.per_token else 0.0
        said = f"busy {min(100, round(100 * share))} %"
        self.text(WIDTH - 8, self.y + LANE / 2, said, 9, ha="right", color="#333333")
        for span in found.spans:
            if span.lane != lane or span.start >= found.seconds:
                continue
            x, stop = self._x(span.start, longest), self._x(min(span.end, found.seconds), longest)
            turn = found.turns[span.turn]
            colour = device_colour(turn.works) if lane == "compute" and not turn.travels else LANE_COLOURS[lane]
            self.box(lane, x, self.y + 1, stop - x, LANE - 2, colour)
            if stop - x > 2:
                self.box("seams", stop - 0.5, self.y + 1, 0.5, LANE - 2, "#FFFFFF")
            if _text_width(_short(turn.name), 7.5) < stop - x:
                self.text((x + stop) / 2, self.y + LANE / 2, _short(turn.name), 7.5, ha="center", color=_ink(colour))
        self.y += LANE

    def strips(self, found: Schedule, moment: Moment | None, longest: float) -> None:
        """How full each place is over time."""
        whole = sum(turn.nbytes for turn in found.turns) or 1
        self.y += 2
        self.text(8, self.y + 8, "how full each place is, as a share of the whole model", 9.5)
        self.y += 18
        begin, main = self.y, next((turn.works for turn in found.turns if turn.travels), None)
        line = found.filled()
        shown = [*(point for point in line if point[0] < found.seconds), (found.seconds, _at(line, found.seconds))]
        right = self._x(found.seconds, longest)
        for device in _devices(found):
            here = _bytes(found, device)
            bottom, scale = self.y + STRIP - 3, (STRIP - 3) / whole
            self.text(self.left - 6, self.y + STRIP / 2, device_label(device), 9, ha="right")
            self.box("room", self.left, self.y, right - self.left, STRIP - 3, TRACK)
            self.box("rests", self.left, bottom - here * scale, right - self.left, here * scale, device_colour(device))
            if device == main:
                points = [(self._x(time, longest), bottom - (here + value) * scale) for time, value in shown]
                floor = bottom - here * scale
                self.shape("slots", [(self.left, floor), *points, (right, floor)], GREEN, depth=3)
                here += round(_at(line, moment.time)) if moment else 0
                room = found.slots * max(turn.nbytes for turn in found.turns if turn.travels) * scale
                self.shape("room of the slots", [(self.left, floor - room), (right, floor - room)], BLACK, 0.8)
            self.text(WIDTH - 8, self.y + STRIP / 2, format_bytes(here, "si"), 9, ha="right")
            self.y += STRIP
        self._cursor(moment, begin - 2, self.y - 1, longest)
        self._axis(longest)

    def _x(self, time: float, longest: float) -> float:
        return self.left + (WIDTH - self.left - self.right) * min(time / longest, 1.0)

    def _cursor(self, moment: Moment | None, top: float, bottom: float, longest: float) -> None:
        x = self._x(moment.time if moment else 0.0, longest)
        self.shape("now", [(x, top), (x, bottom)], VERMILLION, 1.8, depth=8)

    def _axis(self, longest: float) -> None:
        unit, name = next(((u, n) for u, n in ((1, "s"), (1e-3, "ms")) if longest >= u), (1e-6, "µs"))
        step = _nice_step(longest / unit)
        count = int(longest / unit / step + 1e-9) + 1
        for i in range(count):
            x = self._x(i * step * unit, longest)
            self.box("grid", x - 0.25, self.y - 1, 0.5, 4, DARK)
            self.text(x, self.y + 8, f"{i * step:,g}" if i else f"0 {name}", 8, ha="center", color="#333333")
        self.y += 18

    def figure(self) -> Figure:
        from matplotlib.patches import Polygon
        from matplotlib.transforms import Affine2D

        figure = super().figure()
        points = Affine2D().scale(1 / 72, -1 / 72).translate(0, self.y / 72) + figure.dpi_scale_trans
        for kind, corners, colour, line, depth in self.shapes:
            figure.add_artist(
                Polygon(
                    corners, closed=not line, fill=not line, facecolor=colour, edgecolor=colour, linewidth=line,
                    label=kind, zorder=depth, transform=points,
                )
            )  # fmt: skip
        return figure
