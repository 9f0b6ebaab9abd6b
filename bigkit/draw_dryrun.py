"""The picture of a dry run, with its text twin: what each device holds, event by event, and what each lane does when.

Leaves out: running it (`dryrun.py`) and controls (`widgets/dryrun_explorer.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .draw import BLACK, BLUE, DARK, GREEN, GREY, ORANGE, PURPLE, VERMILLION, WIDTH, YELLOW
from .dryrun import KINDS, DryRun, Timeline
from .estimate import text_table
from .plans import device_label
from .roofline import Span
from .units import GiB, MiB, format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"weights": BLUE, "slots": PURPLE, "KV cache": ORANGE, "activations": YELLOW, "workspace": DARK}
POINTS = 400  # of a curve: each is the highest of the events that it stands for
ROOM = 96  # points of height for each device


def dryrun_figure(run: DryRun) -> Figure:
    """A dry run as a picture.

    Above, for each device: what its live tensors were asked for, by kind, one column for each request and free, and the
    steps; the line above is what the allocator has reserved, the red one all that it can have. Below: what Python, each
    device, each link and the disk do when.

    >>> from bigkit import dry_run
    >>> figure = dryrun_figure(dry_run("pygpt", batch_size=1, prompt_tokens=32, new_tokens=2))
    >>> figure.savefig("run.png")  # doctest: +SKIP
    """
    from matplotlib.figure import Figure

    lines = list(run.timelines.values())
    lanes = list(dict.fromkeys(["python", *(span.lane for span in run.spans)]))
    gantt = 34 + 16 * len(lanes)
    height = 46 + ROOM * len(lines) + gantt + 22
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    figure.text(8 / WIDTH, 1 - 14 / height, run.model, fontsize=12, weight="bold", va="center", parse_math=False)
    figure.text(8 / WIDTH, 1 - 30 / height, _about(run), fontsize=9.5, color="#333333", va="center", parse_math=False)
    top = height - 44
    for line in lines:
        box = (62 / WIDTH, (top - ROOM + 24) / height, (WIDTH - 72) / WIDTH, (ROOM - 30) / height)
        _memory(figure.add_axes(box), line)
        top -= ROOM
    _key(figure, top, height, run)
    axes = figure.add_axes((62 / WIDTH, 24 / height, (WIDTH - 72) / WIDTH, (gantt - 30) / height))
    _lanes(axes, run, lanes)
    return figure


def dryrun_text(run: DryRun) -> str:
    """The text twin of `dryrun_figure`.

    >>> from bigkit import dry_run
    >>> print(dryrun_text(dry_run("pygpt", batch_size=1, prompt_tokens=32)).splitlines()[0])
    pygpt: fits
    """
    kinds = [kind for kind in KINDS if any(line.at_peak()[kind] for line in run.timelines.values())]
    rows = [
        [device_label(device), format_bytes(line.peak_allocated), format_bytes(line.peak_reserved),
         format_bytes(line.capacity) if line.capacity else "-", *(format_bytes(line.at_peak()[kind]) for kind in kinds)]
        for device, line in run.timelines.items()
    ]  # fmt: skip
    memory = text_table(["device", "allocated", "reserved", "can have", *(f"{kind} then" for kind in kinds)], rows)
    times = text_table(
        ["step", "time", "longest busy"],
        [[step.name, f"{1000 * step.seconds:,.1f} ms", _lane_name(step.bottleneck)] for step in _few(run.times)],
    )
    speed = [f"{run.tokens_per_second:,.1f} tokens/s"] if run.tokens_per_second else []
    return "\n".join([f"{run.model}: {dryrun_verdict(run)}", _about(run), "", memory, "", times, *speed])


def dryrun_verdict(run: DryRun) -> str:
    """A dry run in a few words: "fits", or "does not fit: ..."."""
    return "fits" if run.fits else f"does not fit: {run.problem}"


def dryrun_label(run: DryRun) -> str:
    """One sentence for those who cannot see the picture of a dry run."""
    loads = ", ".join(
        f"{device_label(device)} {format_bytes(line.peak_reserved)}"
        + (f" of {format_bytes(line.capacity)}" if line.capacity else "")
        for device, line in run.timelines.items()
    )
    times = ", ".join(f"{name} {1000 * seconds:,.1f} ms" for name, seconds in run.seconds.items())
    return f"Memory that {run.model} reserves over its run: at most {loads}. Time: {times}. It {dryrun_verdict(run)}."


def _about(run: DryRun) -> str:
    tokens = f"{run.load.batch} x {run.load.prompt:,} tokens, then {run.load.new:,} more"
    measured = any(rates.measured for rates in run.rates.values())
    return f"{run.hardware}, {tokens}, {'measured' if measured else 'nominal'} rates"


def _memory(axes: Any, line: Timeline) -> None:
    chosen = _sample(line.allocated)
    unit, name = (GiB, "GiB") if line.peak_reserved >= GiB else (MiB, "MiB")
    kinds = [kind for kind in KINDS if any(line.kinds[kind])]
    curves = [[line.kinds[kind][i] / unit for i in chosen] for kind in kinds]
    axes.stackplot(chosen, curves, colors=[COLOURS[kind] for kind in kinds], step="post", linewidth=0)
    axes.step(chosen, [line.reserved[i] / unit for i in chosen], color=BLACK, linewidth=0.9, where="post")
    highest = line.peak_reserved / unit
    if line.capacity and line.capacity / unit < 2.5 * highest:
        axes.axhline(line.capacity / unit, color=VERMILLION, linewidth=1.4)
        highest = max(highest, line.capacity / unit)
    ends = [end for _, end in line.marks]
    for start, (step, end) in zip([0, *ends], line.marks):
        axes.axvline(end, color=GREY, linewidth=0.5)
        if end - start > 0.08 * len(line.allocated):
            axes.text((start + end) / 2, 1.14 * highest, step, fontsize=8, ha="center", va="top", color="#333333")
    axes.set_xlim(0, len(line.allocated))
    axes.set_ylim(0, 1.18 * highest)
    axes.set_ylabel(f"{device_label(line.device)}\n{name}", fontsize=9)
    _plain(axes)
    axes.set_xticks([])


def _sample(values: Sequence[int]) -> list[int]:
    """About `POINTS` indices, in each stretch the one of the highest value: no peak is lost."""
    width = max(1, len(values) // POINTS)
    return [max(range(i, min(i + width, len(values))), key=values.__getitem__) for i in range(0, len(values), width)]


def _key(figure: Any, top: float, height: float, run: DryRun) -> None:
    from matplotlib.patches import Rectangle

    used = [kind for kind in KINDS if any(any(line.kinds[kind]) for line in run.timelines.values())]
    x = 30.0
    for name, colour in [*((kind, COLOURS[kind]) for kind in used), ("reserved", BLACK), ("all there is", VERMILLION)]:
        line = name in ("reserved", "all there is")
        box = (x / WIDTH, (top + (14 if line else 11)) / height)
        figure.add_artist(Rectangle(box, 12 / WIDTH, (2 if line else 9) / height, facecolor=colour))
        figure.text((x + 16) / WIDTH, (top + 15) / height, name, fontsize=8.5, va="center")
        x += 25 + 4.9 * len(name)


def _lanes(axes: Any, run: DryRun, lanes: list[str]) -> None:
    last = max((span.end for span in run.spans), default=1e-9)
    for row, lane in enumerate(lanes):
        spans = merge([span for span in run.spans if span.lane == lane], last / 600)
        colour = {"python": GREY, "disk": DARK}.get(lane, PURPLE if lane.startswith("copy") else GREEN)
        bars = [(1000 * start, 1000 * (end - start)) for start, end in spans]
        axes.broken_barh(bars, (row + 0.15, 0.7), facecolors=colour, linewidth=0)
    passed = 0.0
    for step in run.times:
        passed += step.seconds
        axes.axvline(1000 * passed, color=GREY, linewidth=0.5)
    axes.set_xlim(0, 1000 * last)
    axes.set_ylim(len(lanes), 0)
    axes.set_yticks([row + 0.5 for row in range(len(lanes))], [_lane_name(lane) for lane in lanes], fontsize=8.5)
    _plain(axes)
    axes.set_xlabel("ms", fontsize=8.5, labelpad=0)


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
