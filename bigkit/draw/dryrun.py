"""The picture of a dry run, with its text twin: what each device holds, event by event, and what each lane does when.

Leaves out: running it (`dryrun/run.py`) and controls (`widgets/dryrun_explorer.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ..devices import device_label
from ..dryrun.result import KINDS, DryRun, Timeline
from ..machine.ranges import Range
from ..machine.streams import Span
from ..measure.record import Measurement
from ..units import GiB, MiB, format_bytes, format_seconds, text_table
from .canvas import ABOVE, GROUND, TOP, WIDTH, Picture, ticks, time_unit
from .colours import BLACK, BLUE, DARK, GREEN, GREY, ORANGE, PURPLE, SOFT, TRACK, VERMILLION, WHITE, YELLOW

COLOURS = {"weights": BLUE, "slots": PURPLE, "KV cache": ORANGE, "activations": YELLOW, "workspace": DARK}
NAMES = {"slots": "slots: weights in flight", "workspace": "workspace of cuBLAS"}  # in the legend
POINTS = 400  # of a curve: each is the highest of the events that it stands for
CHART, LANE = 68, 16  # points of height: of a device's memory, and of a lane
LEFT, RIGHT = 76, 64  # points beside the charts


def dryrun_figure(run: DryRun, measured: Measurement | None = None) -> Picture:
    """A dry run as a picture, and what was measured over it.

    Above, for each device: what its live tensors were asked for, by kind, one column for each request and free, and the
    steps; the line above is what the allocator has reserved, the red one all that it can have. Below: what Python, each
    device, each link and the disk do when. Dashed green lines and outlined bars are what was measured.

    >>> from bigkit import dry_run
    >>> picture = dryrun_figure(dry_run("pygpt", batch_size=1, prompt_tokens=32, new_tokens=2))
    >>> picture.save("run.svg")  # doctest: +SKIP
    """
    picture = Picture(run.model, dryrun_label(run, measured), LEFT, RIGHT)
    picture.head(_settings(run, measured))
    picture.heading("Memory: from left to right, one column for each request and free")
    picture.y += 8
    timelines = list(run.timelines.values())
    for timeline in timelines:
        here = measured if measured is not None and measured.device == timeline.device else None
        found = run.ranges.get(f"reserved cuda:{timeline.device}")
        _draw_memory(picture, timeline, found, here, named=timeline is timelines[0])
    _draw_legend(picture, run, measured)
    picture.heading("Time: what is busy when; the higher a bar, the larger the share of the time at work")
    _draw_lanes(picture, run, measured)
    return picture


def dryrun_text(run: DryRun, measured: Measurement | None = None) -> str:
    """The text twin of `dryrun_figure`.

    >>> from bigkit import dry_run
    >>> print(dryrun_text(dry_run("pygpt", batch_size=1, prompt_tokens=32)).splitlines()[0])
    pygpt: fits
    """
    lines = list(run.timelines.values())
    kinds = [kind for kind in KINDS if any(line.at_peak()[kind] for line in lines)]
    rows = {
        "capacity": [format_bytes(line.capacity) if line.capacity else "-" for line in lines],
        "reserved": [format_bytes(line.peak_reserved) for line in lines],
        "allocated": [format_bytes(line.peak_allocated) for line in lines],
        **{f"  {kind}": [format_bytes(line.at_peak()[kind]) for line in lines] for kind in kinds},
    }
    headers = ["at the peak", *map(device_label, run.timelines)]
    memory = text_table(headers, [[name, *row] for name, row in rows.items()])
    few = run.times if len(run.times) < 7 else [*run.times[:3], *run.times[-2:]]
    times = text_table(
        ["step", "time", "busy longest"],
        [[step.name, format_seconds(step.seconds), _lane_name(step.bottleneck)] for step in few],
    )
    told = [
        f"{name}: {found.told(format_bytes if 'cuda' in name else format_seconds)}"
        for name, found in run.ranges.items()
    ]
    busy = ", ".join(f"{_lane_name(lane)} {100 * run.busy[lane]:.0f} %" for lane in sorted(run.busy, key=_order))
    speed = [f"busy: {busy}", *(text for text in (run.speed, run.hits) if text)]
    if not run.fits:
        times = "If there were memory enough:\n" + times
    real = [] if measured is None else ["", f"measured on {measured.gpu}", _compared(run, measured)]
    head = [f"{run.model}: {dryrun_verdict(run)}", _settings(run), *run.notes]
    return "\n".join([*head, "", memory, "", times, *speed, "", "ranges", *told, *real])


def _compared(run: DryRun, measured: Measurement) -> str:
    """A table of what was predicted and what was measured: the peaks, and the first and the last step."""
    rows = []
    for name, peaks in (("allocated", run.peak_allocated), ("reserved", run.peak_reserved)):
        predicted, real = peaks[measured.device], measured.recording.peaks[name]
        rows.append([f"peak {name}", format_bytes(predicted), format_bytes(real), _error(predicted, real)])
    steps = list(zip(run.times, measured.seconds))
    for step, seconds in steps[:1] + steps[1:][-1:]:
        rows.append([step.name, format_seconds(step.seconds), format_seconds(seconds), _error(step.seconds, seconds)])
    return text_table(["", "predicted", "measured", "off by"], rows)


def _error(predicted: float, real: float) -> str:
    return f"{100 * (predicted / real - 1):+.1f} %" if real else "-"


def dryrun_verdict(run: DryRun) -> str:
    """A dry run in a few words: "fits", or "does not fit: ..."."""
    return "fits" if run.fits else f"does not fit: {run.problem}"


def dryrun_differences(old: DryRun, new: DryRun) -> list[str]:
    """How a dry run differs from another, in sentences; none if nothing does."""
    said = []
    for device in dict.fromkeys([*old.peak_reserved, *new.peak_reserved]):
        one, other = (format_bytes(run.peak_reserved.get(device, 0)) for run in (old, new))
        said.append((f"{device_label(device)} reserves at most", one, other))
    for name in dict.fromkeys([*old.seconds, *new.seconds]):
        one, other = (format_seconds(run.seconds[name]) if name in run.seconds else "nothing" for run in (old, new))
        said.append((f"{name.capitalize()} takes", one, other))
    said.append(("It", dryrun_verdict(old), dryrun_verdict(new)))
    said.append(("It is", f"{old.model} on {old.hardware}, {old.asked}", f"{new.model} on {new.hardware}, {new.asked}"))
    return [f"{name} {other} (before: {one})." for name, one, other in said if one != other]


def dryrun_label(run: DryRun, measured: Measurement | None = None) -> str:
    """One sentence for those who cannot see the picture of a dry run."""
    loads = ", ".join(
        f"{device_label(device)} {format_bytes(line.peak_reserved)}"
        + (f" of {format_bytes(line.capacity)}" if line.capacity else "")
        for device, line in run.timelines.items()
    )
    times = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in run.seconds.items())
    label = f"Memory that {run.model} reserves over its run: at most {loads}. Time: {times}. It {dryrun_verdict(run)}."
    if measured is None:
        return label
    token = f", token {format_seconds(measured.token)}" if measured.token else ""
    peak = format_bytes(measured.recording.peaks["reserved"])
    return f"{label} Measured on {measured.gpu}: {peak}, prefill {format_seconds(measured.seconds[0])}{token}."


def _settings(run: DryRun, measured: Measurement | None = None) -> str:
    calibrated = any(rates.measured for rates in run.rates.values())
    real = f"; measured on {measured.gpu}" if measured else ""
    return f"{run.hardware}, {run.asked}, {'calibrated' if calibrated else 'nominal'} rates{real}"


def _draw_memory(
    picture: Picture, timeline: Timeline, found: Range | None, measured: Measurement | None, named: bool
) -> None:
    """What a device holds, event by event, by kind; what is reserved, and how surely, capacity, what was measured."""
    events = len(timeline.allocated)
    unit, unit_name = (GiB, "GiB") if timeline.peak_reserved >= GiB else (MiB, "MiB")
    curves = [] if measured is None else measured.curves()
    highest = max([timeline.peak_reserved, *(max(curve, default=0) for curve in curves)]) or 1
    near = _is_near(timeline, highest)
    if timeline.capacity and near:
        highest = max(highest, timeline.capacity)
    top, bottom = picture.y, picture.y + CHART
    right, level = picture.left + picture.room, (CHART - (10 if near else 18)) / highest

    def steps(places: Sequence[float], values: Sequence[int]) -> list[tuple[float, float]]:
        """The corners of a curve that keeps each value until the next; there is one place more than values."""
        xs = [picture.left + picture.room * place / events for place in places]
        ys = [bottom - value * level for value in values]
        return [corner for x, end, y in zip(xs, xs[1:], ys) for corner in ((x, y), (end, y))]

    picture.text(picture.left - 34, top + 14, device_label(timeline.device), 9, anchor="end")
    picture.text(picture.left - 34, top + 27, unit_name, 9, SOFT, "end")
    for value in ticks(highest / unit, parts=2):
        y = bottom - value * unit * level
        picture.box("grid", picture.left - 3, y - 0.25, 3, 0.5, GREY)
        picture.text(picture.left - 6, y, f"{value:,g}", 8, SOFT, "end")
    chosen = _sample(timeline.allocated)
    sums = [0] * len(chosen)
    stack = []
    for kind in KINDS:
        sums = [total + timeline.kinds[kind][i] for total, i in zip(sums, chosen)]
        if any(timeline.kinds[kind]):
            stack.append((kind, steps([*chosen, events], sums)))
    for kind, corners in reversed(stack):  # the lower ones cover the higher ones
        picture.line(kind, [(picture.left, bottom), *corners, (right, bottom)], COLOURS[kind], depth=GROUND)
    picture.line("reserved", steps([*chosen, events], [timeline.reserved[i] for i in chosen]), BLACK, 0.9, depth=ABOVE)
    if timeline.capacity and near:
        y = bottom - timeline.capacity * level
        picture.line("capacity", [(picture.left, y), (right, y)], VERMILLION, 1.4)
    elif timeline.capacity:
        text = f"capacity {format_bytes(timeline.capacity)}, far above"
        picture.text(right, top + 4, text, 8, SOFT, "end", plate=True)
    if found:
        x, low, high = right + 6, *(max(top, bottom - edge * level) for edge in (found.low, found.high))
        picture.line("range", [(x, low), (x, high)], DARK, 1.2)
        for y in (low, high):
            picture.line("range", [(x - 3, y), (x + 3, y)], DARK, 1.2)
        says = f"{device_label(timeline.device)} reserves {found.told(format_bytes)}."
        picture.mark(f"range:{timeline.device}", says, x - 3, high, 6, max(low - high, 1))
    peak = max(range(events), key=timeline.allocated.__getitem__, default=0)
    at, tip = picture.left + picture.room * (peak + 0.5) / (events or 1), bottom - timeline.peak_allocated * level
    picture.line("peak", [(at - 4, tip - 6), (at + 4, tip - 6), (at, tip)], VERMILLION, depth=TOP + 1)
    for curve in curves:
        places = measured.over(timeline.marks) if measured else []
        chosen = _sample(curve)
        corners = steps([*(places[i] for i in chosen), places[-1]], [curve[i] for i in chosen])
        picture.line("ground of measured", corners, WHITE, 2.6)
        picture.line("measured", corners, GREEN, 1.5, "6 3", TOP + 1)
    start = 0
    for step, end in timeline.marks:
        x, width = picture.left + picture.room * start / events, picture.room * (end - start) / events
        picture.box("mark", x + width - 0.25, top, 0.5, CHART, GREY, depth=ABOVE)
        if end > start:
            held, kept = (format_bytes(max(values[start:end])) for values in (timeline.allocated, timeline.reserved))
            says = f"{device_label(timeline.device)}, {step}: at most {held} allocated, {kept} reserved."
            picture.mark(f"step:{timeline.device}:{step}", says, x, top, width, CHART)
        if named:
            picture.label_in(x, top - 6, width, (step,), 8, margin=2)
        start = end
    says = f"{device_label(timeline.device)}: the peak, {format_bytes(timeline.peak_allocated)} allocated."
    picture.mark(f"peak:{timeline.device}", says, at - 5, tip - 7, 10, 9)
    picture.box("mark", picture.left, bottom, picture.room, 0.5, GREY)
    picture.y += CHART + 14


def _is_near(timeline: Timeline, highest: float) -> bool:
    """Whether the line of the capacity can be drawn without pressing all below it flat."""
    return bool(timeline.capacity and timeline.capacity < 2.5 * highest)


def _sample(values: Sequence[int]) -> list[int]:
    """About `POINTS` indices, in each stretch the one of the highest value: no peak is lost."""
    width = max(1, len(values) // POINTS)
    return [max(range(i, min(i + width, len(values))), key=values.__getitem__) for i in range(0, len(values), width)]


def _draw_legend(picture: Picture, run: DryRun, measured: Measurement | None) -> None:
    lines = run.timelines.values()
    entries = [(NAMES.get(kind, kind), COLOURS[kind]) for kind in KINDS if any(any(line.kinds[kind]) for line in lines)]
    entries.append(("reserved", BLACK))
    if any(_is_near(line, line.peak_reserved) for line in lines):
        entries.append(("capacity", VERMILLION))
    if measured is not None:
        entries.append(("measured", GREEN))
    picture.legend(entries, {"reserved": "-", "capacity": "-", "measured": "--"})


def _order(lane: str) -> tuple[int, str]:
    """Python, devices in order, then their links, what brings experts over them, and the disk."""
    kinds = ("python", "cuda", "copy", "experts", "disk")
    return next((i for i, kind in enumerate(kinds) if lane.startswith(kind)), 1), lane


def _draw_lanes(picture: Picture, run: DryRun, measured: Measurement | None) -> None:
    """A row for each lane, with a bar while it is busy, as high as its share of the time at work if it pauses between
    operations; below them what was measured, step by step.
    """
    last = max((span.end for span in run.spans), default=0.0) or 1e-9
    ends = _ends(run)
    took = sum(measured.seconds) if measured else 0.0
    longest = max(last, took, min(1.5 * last, max(end[2] for end in ends.values())))
    scale, top = picture.room / longest, picture.y
    for lane in sorted(run.busy, key=_order):
        colour = {"python": GREY, "disk": DARK, "copy": PURPLE, "experts": ORANGE}.get(lane.partition(" ")[0], GREEN)
        picture.text(picture.left - 6, picture.y + LANE / 2, _lane_name(lane), 8.5, anchor="end")
        picture.box("room", picture.left, picture.y + 2, last * scale, LANE - 4, TRACK, depth=GROUND)
        for start, end, busy in _stretches(run, lane, last / 600):
            height = (LANE - 4) * busy / (end - start)  # of a stretch with gaps too short to be seen: its share at work
            x = picture.left + start * scale
            picture.box(lane, x, picture.y + LANE - 2 - height, (end - start) * scale, height, colour)
            says = f"{_lane_name(lane)}: from {format_seconds(start)} to {format_seconds(end)} busy "
            says += f"{100 * busy / (end - start):.0f} % of the time."
            picture.mark(f"span:{lane}:{start:g}", says, x, picture.y, (end - start) * scale, LANE)
        picture.text(WIDTH - 8, picture.y + LANE / 2, f"busy {100 * run.busy[lane]:.0f} %", 8.5, SOFT, "end")
        picture.y += LANE
    passed = 0.0
    for step in run.times:
        passed += step.seconds
        picture.box("mark", picture.left + passed * scale - 0.25, top, 0.5, picture.y - top, GREY, depth=ABOVE)
    for name, (low, value, high, rests_on) in ends.items():
        y, edge = picture.y + LANE / 2, picture.left + picture.room
        left, at, right = (min(picture.left + seconds * scale, edge) for seconds in (low, value, high))
        picture.text(picture.left - 6, y, name, 8.5, anchor="end")
        picture.line("range", [(left, y), (right, y)], DARK, 1.2)
        for x, half in ((left, 3), (at, 5), (right, 3 if right < edge else 0)):
            picture.line("range", [(x, y - half), (x, y + half)], DARK, 1.2)
        says = f"The {name} between {format_seconds(low)} and {format_seconds(high)}: {rests_on}."
        picture.mark(f"range:{name}", says, left, picture.y, max(right - left, 1), LANE)
        picture.y += LANE
    if measured is not None:
        picture.text(picture.left - 6, picture.y + LANE / 2, "measured", 8.5, anchor="end")
        x = picture.left
        for seconds in measured.seconds:
            width = seconds * scale
            picture.box("measured step", x, picture.y + 2, width, LANE - 4, BLACK)
            picture.box("inside", x + 0.6, picture.y + 2.6, max(0, width - 1.2), LANE - 5.2, WHITE, depth=ABOVE)
            x += width
        picture.y += LANE
    unit, unit_name = time_unit(longest)
    picture.axis(longest / unit, unit_name, picture.y - 2)


def _ends(run: DryRun) -> dict[str, tuple[float, float, float, str]]:
    """When the prompt and the whole run end: seconds at least, as predicted, and at most, and what that rests on."""
    first, new = run.ranges["prefill"], len(run.times) - 1
    ends = {"prompt ends": (first.low, first.value, first.high, first.rests_on)}
    if new:
        token = run.ranges["token"]
        low, value, high = (getattr(first, edge) + new * getattr(token, edge) for edge in ("low", "value", "high"))
        ends["run ends"] = (low, value, high, token.rests_on)
    return ends


def _stretches(run: DryRun, lane: str, gap: float) -> list[tuple[float, float, float]]:
    """What a lane does, merged within each step: a step that pauses must not be hidden by one that does not."""
    found, start = [], 0.0
    spans = [span for span in run.spans if span.lane == lane]
    for end in [*accumulate(step.seconds for step in run.times)][:-1] + [float("inf")]:
        found += merge([span for span in spans if start <= span.start < end], gap)
        start = end
    return found


def merge(spans: Sequence[Span], gap: float) -> list[tuple[float, float, float]]:
    """Spans of one lane as stretches (start, end, seconds at work); what lies closer together than `gap` is one.

    >>> merge([Span("a", "x", 0, 1), Span("a", "y", 1.5, 2), Span("a", "z", 5, 6)], 0.6)
    [(0, 2, 1.5), (5, 6, 1)]
    """
    merged: list[tuple[float, float, float]] = []
    for span in spans:
        start, end, busy = merged.pop() if merged and span.start - merged[-1][1] < gap else (span.start, span.start, 0)
        merged.append((start, max(span.end, end), busy + max(0, span.end - max(span.start, end))))
    return merged


def _lane_name(lane: str) -> str:
    kind, _, name = lane.rpartition(" to ")
    gpu = f"GPU {name.partition(':')[2]}" if name.startswith("cuda") else name.replace("python", "Python")
    return {"": gpu, "copy": f"link to {gpu}"}.get(kind, f"{kind}, {gpu}")
