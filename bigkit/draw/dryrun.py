"""The picture of a dry run, with its text twin: what each device holds, event by event, and what each lane does when.

Leaves out: running it (`dryrun/run.py`) and controls (`widgets/dryrun_explorer.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..devices import device_label
from ..dryrun.run import KINDS, DryRun, Timeline
from ..machine.streams import Span
from ..measure.record import Measurement
from ..units import GiB, MiB, format_bytes, text_table
from .canvas import BLACK, BLUE, DARK, GREEN, GREY, ORANGE, PURPLE, VERMILLION, WIDTH, YELLOW

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"weights": BLUE, "slots": PURPLE, "KV cache": ORANGE, "activations": YELLOW, "workspace": DARK}
POINTS = 400  # of a curve: each is the highest of the events that it stands for
ROOM = 84  # points of height for each device
HEAD, LANE = 68, 16  # points above the first device, and for each lane


def dryrun_figure(run: DryRun, measured: Measurement | None = None) -> Figure:
    """A dry run as a picture, and what was measured over it.

    Above, for each device: what its live tensors were asked for, by kind, one column for each request and free, and the
    steps; the line above is what the allocator has reserved, the red one all that it can have. Below: what Python, each
    device, each link and the disk do when. Dashed green lines and outlined bars are what was measured.

    >>> from bigkit import dry_run
    >>> figure = dryrun_figure(dry_run("pygpt", batch_size=1, prompt_tokens=32, new_tokens=2))
    >>> figure.savefig("run.png")  # doctest: +SKIP
    """
    from matplotlib.figure import Figure

    lines = list(run.timelines.values())
    lanes = ["python", *sorted({span.lane for span in run.spans} - {"python"}, key=_order)]
    rows = len(lanes) + (measured is not None)
    height = HEAD + ROOM * len(lines) + 46 + LANE * rows + 30
    figure = Figure(figsize=(WIDTH / 72, height / 72))

    def write(x: float, down: float, text: str, **style: Any) -> None:
        figure.text(x / WIDTH, 1 - down / height, text, va="center", parse_math=False, **style)

    write(8, 14, run.model, fontsize=12, weight="bold")
    write(8, 30, _about(run, measured), fontsize=9.5, color="#333333")
    write(8, 48, "Memory, one column for each request and free", fontsize=9, color="#333333")
    top = height - HEAD
    for line in lines:
        box = (62 / WIDTH, (top - 66) / height, (WIDTH - 72) / WIDTH, 66 / height)
        mine = measured if measured is not None and measured.device == line.device else None
        _memory(figure.add_axes(box), line, mine, named=line is lines[0])
        top -= ROOM
    _key(figure, top, height, run, measured)
    write(8, height - top + 28, "Time, and what is busy when", fontsize=9, color="#333333")
    axes = figure.add_axes((62 / WIDTH, 30 / height, (WIDTH - 72) / WIDTH, LANE * rows / height))
    _lanes(axes, run, lanes, measured)
    return figure


def dryrun_text(run: DryRun, measured: Measurement | None = None) -> str:
    """The text twin of `dryrun_figure`.

    >>> from bigkit import dry_run
    >>> print(dryrun_text(dry_run("pygpt", batch_size=1, prompt_tokens=32)).splitlines()[0])
    pygpt: fits
    """
    kinds = [kind for kind in KINDS if any(line.at_peak()[kind] for line in run.timelines.values())]
    lines = list(run.timelines.values())
    rows = {
        "capacity": [format_bytes(line.capacity) if line.capacity else "-" for line in lines],
        "reserved": [format_bytes(line.peak_reserved) for line in lines],
        "allocated": [format_bytes(line.peak_allocated) for line in lines],
        **{f"  {kind}": [format_bytes(line.at_peak()[kind]) for line in lines] for kind in kinds},
    }
    memory = text_table(
        ["at the peak", *map(device_label, run.timelines)], [[name, *row] for name, row in rows.items()]
    )
    times = text_table(
        ["step", "time", "busy longest"],
        [[step.name, format_time(step.seconds), _lane_name(step.bottleneck)] for step in _few(run.times)],
    )
    speed = [f"{run.tokens_per_second:,.1f} tokens/s"] if run.tokens_per_second else []
    if not run.fits:
        times = "If there were memory enough:\n" + times
    real = [] if measured is None else ["", f"measured on {measured.gpu}", _compared(run, measured)]
    return "\n".join([f"{run.model}: {dryrun_verdict(run)}", _about(run), "", memory, "", times, *speed, *real])


def _compared(run: DryRun, measured: Measurement) -> str:
    rows = []
    for name, found in (("allocated", run.peak_allocated), ("reserved", run.peak_reserved)):
        real = measured.recording.peaks[name]
        said = found[measured.device]
        rows.append([f"peak {name}", format_bytes(said), format_bytes(real), _error(said, real)])
    names = [step.name for step in run.times]
    for step, seconds in zip(run.times, measured.seconds):
        if step.name in (names[0], names[-1]):
            rows.append([step.name, format_time(step.seconds), format_time(seconds), _error(step.seconds, seconds)])
    return text_table(["", "foretold", "measured", "off by"], rows)


def _error(said: float, real: float) -> str:
    return f"{100 * (said / real - 1):+.1f} %" if real else "-"


def format_time(seconds: float) -> str:
    """Seconds as text, with the unit that keeps it short.

    >>> format_time(0.0238), format_time(42.4347)
    ('23.8 ms', '42.4 s')
    """
    return f"{1000 * seconds:,.1f} ms" if seconds < 10 else f"{seconds:,.1f} s"


def dryrun_verdict(run: DryRun) -> str:
    """A dry run in a few words: "fits", or "does not fit: ..."."""
    return "fits" if run.fits else f"does not fit: {run.problem}"


def dryrun_label(run: DryRun, measured: Measurement | None = None) -> str:
    """What the picture of a dry run says, for those who cannot see it."""
    loads = ", ".join(
        f"{device_label(device)} {format_bytes(line.peak_reserved)}"
        + (f" of {format_bytes(line.capacity)}" if line.capacity else "")
        for device, line in run.timelines.items()
    )
    times = ", ".join(f"{name} {format_time(seconds)}" for name, seconds in run.seconds.items())
    said = f"Memory that {run.model} reserves over its run: at most {loads}. Time: {times}. It {dryrun_verdict(run)}."
    if measured is None:
        return said
    token = f", token {format_time(measured.token)}" if measured.token else ""
    peak = format_bytes(measured.recording.peaks["reserved"])
    return f"{said} Measured on {measured.gpu}: {peak}, prefill {format_time(measured.seconds[0])}{token}."


def _about(run: DryRun, measured: Measurement | None = None) -> str:
    tokens = f"{run.load.batch} x {run.load.prompt:,} tokens, then {run.load.new:,} more"
    calibrated = any(rates.measured for rates in run.rates.values())
    real = f"; measured on {measured.gpu}" if measured else ""
    return f"{run.hardware}, {tokens}, {'calibrated' if calibrated else 'nominal'} rates{real}"


def _memory(axes: Any, line: Timeline, measured: Measurement | None, named: bool) -> None:
    chosen = _sample(line.allocated)
    unit, name = (GiB, "GiB") if line.peak_reserved >= GiB else (MiB, "MiB")
    kinds = [kind for kind in KINDS if any(line.kinds[kind])]
    curves = [[line.kinds[kind][i] / unit for i in chosen] for kind in kinds]
    axes.stackplot(chosen, curves, colors=[COLOURS[kind] for kind in kinds], step="post", linewidth=0)
    axes.step(chosen, [line.reserved[i] / unit for i in chosen], color=BLACK, linewidth=0.9, where="post")
    highest = line.peak_reserved / unit
    if measured is not None:
        highest = max(highest, _measured(axes, line, measured, unit))
    if line.capacity and _is_near(line, highest * unit):
        axes.axhline(line.capacity / unit, color=VERMILLION, linewidth=1.4)
        highest = max(highest, line.capacity / unit)
    elif line.capacity:
        said = f"capacity {format_bytes(line.capacity)}, far above"
        axes.text(1, 0.98, said, fontsize=8, ha="right", va="top", color="#333333", transform=axes.transAxes)
        highest *= 1.25
    ends = [end for _, end in line.marks]
    for start, (step, end) in zip([0, *ends], line.marks):
        axes.axvline(end, color=GREY, linewidth=0.5)
        if named and end - start > 0.08 * len(line.allocated):
            axes.text(
                (start + end) / 2, 1.02, step, fontsize=8, ha="center", va="bottom", color="#333333",
                transform=axes.get_xaxis_transform(),
            )  # fmt: skip
    axes.set_xlim(0, len(line.allocated))
    axes.set_ylim(0, 1.12 * highest)
    axes.set_ylabel(f"{device_label(line.device)}\n{name}", fontsize=9)
    _plain(axes)
    axes.set_xticks([])


def _is_near(line: Timeline, highest: float) -> bool:
    """Whether the line of the capacity can be drawn without pressing all below it flat."""
    return bool(line.capacity and line.capacity < 2.5 * highest)


def _measured(axes: Any, line: Timeline, measured: Measurement, unit: int) -> float:
    """Draw what was allocated and reserved in the real run, step over step; returns the highest of it."""
    from matplotlib.patheffects import withStroke

    places = measured.over(line.marks)
    highest = 0.0
    for values in measured.curves():
        chosen = _sample(values)
        heights = [values[i] / unit for i in chosen]
        (drawn,) = axes.step([places[i] for i in chosen], heights, where="post")
        drawn.set(color=GREEN, linewidth=1.5, linestyle=(0, (4, 2)), zorder=4)
        drawn.set_path_effects([withStroke(linewidth=2.6, foreground="white")])
        highest = max(highest, *heights)
    return highest


def _sample(values: Sequence[int]) -> list[int]:
    """About `POINTS` indices, in each stretch the one of the highest value: no peak is lost."""
    width = max(1, len(values) // POINTS)
    return [max(range(i, min(i + width, len(values))), key=values.__getitem__) for i in range(0, len(values), width)]


def _key(figure: Any, top: float, height: float, run: DryRun, measured: Measurement | None) -> None:
    from matplotlib.patches import Rectangle

    used = [kind for kind in KINDS if any(any(line.kinds[kind]) for line in run.timelines.values())]
    near = any(_is_near(line, line.peak_reserved) for line in run.timelines.values())
    lines = {
        "reserved": BLACK,
        **({"capacity": VERMILLION} if near else {}),
        **({"measured": GREEN} if measured else {}),
    }
    x = 30.0
    for name, colour in [*((kind, COLOURS[kind]) for kind in used), *lines.items()]:
        for dash in (0, 7) if name == "measured" else (0,):
            box = ((x + dash) / WIDTH, (top + (5 if name in lines else 2)) / height)
            wide = 5 if name == "measured" else 12
            figure.add_artist(Rectangle(box, wide / WIDTH, (2 if name in lines else 9) / height, facecolor=colour))
        figure.text((x + 16) / WIDTH, (top + 6) / height, name, fontsize=8.5, va="center")
        x += 25 + 4.9 * len(name)


def _order(lane: str) -> tuple[int, str]:
    """Devices in order, then their links, then the disk."""
    return (2 if lane == "disk" else lane.startswith("copy"), lane)


def _lanes(axes: Any, run: DryRun, lanes: list[str], measured: Measurement | None) -> None:
    last = max((span.end for span in run.spans), default=1e-9)
    whole = max(last, sum(measured.seconds)) if measured else last
    scale, unit = (1, "s") if whole >= 10 else (1000, "ms")
    for row, lane in enumerate(lanes):
        spans = merge([span for span in run.spans if span.lane == lane], last / 600)
        colour = {"python": GREY, "disk": DARK}.get(lane, PURPLE if lane.startswith("copy") else GREEN)
        bars = [(scale * start, scale * (end - start)) for start, end in spans]
        axes.broken_barh(bars, (row + 0.15, 0.7), facecolors=colour, linewidth=0)
    names = [_lane_name(lane) for lane in lanes]
    passed = 0.0
    for step in run.times:
        passed += step.seconds
        axes.plot([scale * passed] * 2, [0, len(lanes)], color=GREY, linewidth=0.5)
    if measured is not None:
        start = 0.0
        for seconds in measured.seconds:
            axes.broken_barh(
                [(scale * start, scale * seconds)], (len(names) + 0.15, 0.7), facecolors="white", edgecolors=BLACK
            )
            start += seconds
        names.append("measured")
    axes.set_xlim(0, scale * whole)
    axes.set_ylim(len(names), 0)
    axes.set_yticks([row + 0.5 for row in range(len(names))], names, fontsize=8.5)
    _plain(axes)
    axes.set_xlabel(unit, fontsize=8.5, labelpad=0)


def merge(spans: Sequence[Span], gap: float) -> list[tuple[float, float]]:
    """Spans of one lane as stretches; what lies closer together than `gap` is one.

    >>> merge([Span("a", "x", 0, 1), Span("a", "y", 1.1, 2), Span("a", "z", 5, 6)], 0.5)
    [(0, 2), (5, 6)]
    """
    merged: list[tuple[float, float]] = []
    for span in spans:
        if merged and span.start - merged[-1][1] < gap:
            merged[-1] = (merged[-1][0], max(span.end, merged[-1][1]))
        else:
            merged.append((span.start, span.end))
    return merged


def _lane_name(lane: str) -> str:
    name = lane.removeprefix("copy to ")
    gpu = f"GPU {name.partition(':')[2]}" if name.startswith("cuda") else name.replace("python", "Python")
    return f"link to {gpu}" if lane.startswith("copy") else gpu


def _plain(axes: Any) -> None:
    axes.tick_params(labelsize=8, length=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)


def _few(steps: Sequence[Any]) -> list[Any]:
    """The first and the last of a long list."""
    return [*steps] if len(steps) < 7 else [*steps[:3], *steps[-2:]]
