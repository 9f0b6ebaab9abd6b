"""Pictures of plans, estimates, checkpoints and quantized layers, each with a text twin that tells the same figures.

A picture is a matplotlib `Figure` made by a pure function of data; `svg` turns it into inline SVG for a notebook.
Colours are the palette of Okabe and Ito, which colour-blind readers can tell apart, and each has a label beside it.
Everything is measured in points and drawn with few artists, so that an explorer can redraw at each turn of a slider.

Leaves out: controls (`widgets/`), and time (`dryrun/run.py`).
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ..checkpoints.shards import Cut
from ..devices import Device, device_label
from ..distributed.shares import Shares
from ..maps.plan import Plan, Share
from ..model.estimate import MemoryEstimate
from ..units import GiB, KiB, MiB, format_bytes, text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..quantize.study import Study

# Source: Okabe and Ito, Color Universal Design, https://jfly.uni-koeln.de/color/
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
TRACK, PALE, GREY, DARK = "#EEEEEE", "#D9D9D9", "#B8B8B8", "#555555"

GPU_COLOURS = (BLUE, SKY, GREEN, PURPLE)  # in turn: neighbours always differ
PART_COLOURS = {"KV cache": ORANGE, "activations": YELLOW, "reserve": "#FFFFFF", "overhead": DARK,
                "weights": BLUE, "gradients": GREEN, "optimizer": PURPLE}  # fmt: skip
HATCHES = {"reserve": "////", "over budget": "xxxx", "larger than the limit": "////", "repeated": "////"}

WIDTH = 540  # points, which an inline picture scales to the room that it has
LEFT, RIGHT, ROW, BAR = 52, 116, 23, 16


def device_colour(device: Device) -> str:
    """The colour of a device: the GPUs take four in turn, RAM is grey and disk pale."""
    return GPU_COLOURS[device % 4] if isinstance(device, int) else {"cpu": GREY, "disk": PALE}.get(device, BLUE)


# ---------------------------------------------------------------------------------------------------------------------
# Plans


def plan_figure(plan: Plan) -> Figure:
    """A plan as a picture: a bar per device against its capacity, and the layers in order, as wide as their bytes.

    Weights have the colour of their device, in the bars and in the strip of layers; KV cache, activations, reserve and
    overhead have their own. What lies above a budget is hatched. GPUs share one scale, RAM and disk another.

    >>> from bigkit import plan
    >>> figure = plan_figure(plan("gpt2", {0: "300MiB", 1: "300MiB"}))
    >>> figure.savefig("plan.png")  # doctest: +SKIP
    """
    working = [share for share in plan.shares if share.runs or share.device not in ("cpu", "disk")]
    resting = [share for share in plan.shares if share not in working]
    needed = resting if any(share.used for share in resting) else []
    canvas = _Canvas()
    canvas.title(plan.model, _settings(plan))
    canvas.legend(_plan_legend(plan))
    canvas.bars([_device_bar(share) for share in working])
    if needed:
        canvas.heading(f"Resting until {device_label(working[0].device)} needs them, on a scale of their own")
        canvas.bars([_device_bar(share) for share in needed])
    elif free := [f"{device_label(share.device)} ({_limit(share)})" for share in resting if share.budget != 0]:
        canvas.heading(f"Not needed: {' and '.join(free)}.")
    canvas.strip(plan)
    return canvas.figure()


def plan_text(plan: Plan) -> str:
    """The text twin of `plan_figure`: what each device holds, and which layers.

    >>> from bigkit import plan
    >>> print(plan_text(plan("gpt2", {0: "300MiB", 1: "300MiB"})).splitlines()[0])
    gpt2: fits
    """
    parts = ["weights", "kv_cache", "activations", "reserve", "overhead"]
    parts = [part for part in parts if part == "weights" or any(getattr(share, part) for share in plan.shares)]
    headers = ["device", "used", "capacity", "full", "layers", *map(_part_name, parts)]
    shares = [share for share in plan.shares if share.used or share.budget != 0]
    rows = [
        [device_label(share.device), format_bytes(share.used), _limit(share),
         f"{100 * share.used / share.budget:.0f} %" if share.budget else "-",
         str(sum(layer.device == share.device for layer in plan.layers)),
         *(format_bytes(getattr(share, part)) for part in parts)]
        for share in shares
    ]  # fmt: skip
    strip = [f"  {device_label(device)}: {_span(names, full=True)}" for device, names, _ in _stretches(plan)]
    return "\n".join([f"{plan.model}: {plan_verdict(plan)}", _settings(plan), "", text_table(headers, rows), "",
                      f"{len(plan.layers)} layers in order, {_sizes(plan)}:", *strip])  # fmt: skip


def plan_verdict(plan: Plan) -> str:
    """A plan in a few words: "fits", "fits, 12.50 GiB of weights rest in RAM", or "does not fit: ..."."""
    if not plan.feasible:
        return f"does not fit: {plan.problem}"
    away = [f"{format_bytes(s.weights)} of weights rest {'in RAM' if s.device == 'cpu' else f'on {s.device}'}"
            for s in plan.shares if s.weights and not s.runs]  # fmt: skip
    return ", ".join(["fits", " and ".join(away)] if away else ["fits"])


def plan_label(plan: Plan) -> str:
    """One sentence for those who cannot see the picture of a plan."""
    loads = ", ".join(
        f"{device_label(share.device)} {format_bytes(share.used)}" + (f" of {_limit(share)}" if share.budget else "")
        for share in plan.shares
        if share.used
    )
    return f"Memory of {plan.model} on each device: {loads}. It {plan_verdict(plan)}."


def _settings(plan: Plan) -> str:
    stored = " + ".join(text for text in (plan.quantization, plan.dtype) if text) or "as stored"
    load = f"context {plan.context:,}" if plan.context else "no context counted"
    return f"{stored}, strategy {plan.strategy}, batch {plan.batch}, {load}"


def _part_name(part: str) -> str:
    return "KV cache" if part == "kv_cache" else part


def _device_bar(share: Share) -> _Bar:
    parts = [
        (name, getattr(share, part), device_colour(share.device) if name == "weights" else PART_COLOURS[name])
        for part in ("weights", "kv_cache", "activations", "reserve", "overhead")
        for name in [_part_name(part)]
    ]
    return _Bar(device_label(share.device), parts, share.budget)


def _plan_legend(plan: Plan) -> list[tuple[str, tuple[str, ...]]]:
    devices = [layer.device for layer in plan.layers]
    colours = tuple(dict.fromkeys(device_colour(share.device) for share in plan.shares if share.device in devices))
    parts = [_part_name(part) for part in ("kv_cache", "activations", "reserve", "overhead")
             if any(getattr(share, part) for share in plan.shares)]  # fmt: skip
    entries = [("weights, by device", colours), *((part, (PART_COLOURS[part],)) for part in parts)]
    return [*entries, ("over budget", (VERMILLION,))] if any(share.over for share in plan.shares) else entries


def _limit(share: Share) -> str:
    return "no limit" if share.budget is None else format_bytes(share.budget)


def _sizes(plan: Plan) -> str:
    """The bytes of all layers, and how many of them are tied and so counted twice."""
    total = sum(layer.bytes for layer in plan.layers)
    twice = total - sum(share.weights for share in plan.shares)
    return format_bytes(total) + (f", {format_bytes(twice)} of it tied" if twice else "")


def _stretches(plan: Plan) -> list[tuple[Device, list[str], int]]:
    """The runs of layers on one device, in the model's order: (device, names, bytes)."""
    runs = ((device, list(layers)) for device, layers in groupby(plan.layers, key=lambda layer: layer.device))
    return [(device, [layer.name for layer in layers], sum(layer.bytes for layer in layers)) for device, layers in runs]


def _span(names: Sequence[str], full: bool = False) -> str:
    """First and last name of a run: "model.layers.0 .. model.layers.9 (10)", or short, "0 – 9" or "10 layers"."""
    if full:
        return names[0] or "the whole model" if len(names) == 1 else f"{names[0]} .. {names[-1]} ({len(names)})"
    (around, _, first), (around_last, _, last) = (name.rpartition(".") for name in (names[0], names[-1]))
    if len(names) == 1:
        return first
    return f"{first} – {last}" if around == around_last else f"{len(names)} layers"


# ---------------------------------------------------------------------------------------------------------------------
# Estimates


def estimate_figure(estimate: MemoryEstimate) -> Figure:
    """An estimate as a picture: a stacked bar for each way to store the weights, and for each way to train.

    >>> from bigkit import estimate_memory
    >>> figure = estimate_figure(estimate_memory("bert-base-cased"))
    >>> figure.savefig("estimate.png")  # doctest: +SKIP
    """
    canvas = _Canvas(left=142, right=74)
    load = f", context {estimate.context:,}" if estimate.context else ""
    canvas.title(estimate.name, f"batch {estimate.batch}{load}")
    parts = ("weights", "KV cache", "activations", "gradients", "optimizer")
    canvas.legend([(part, (PART_COLOURS[part],)) for part in parts])
    canvas.heading(f"To run {estimate.classes[1]}, weights stored as")
    canvas.bars([_estimate_bar(row.stored, row, ("weights", "kv_cache", "activations")) for row in estimate.inference])
    canvas.heading(f"To train {estimate.classes[1]} (another scale)")
    stages = ("weights", "gradients", "optimizer", "activations")
    canvas.bars([_estimate_bar(row.method, row, stages) for row in estimate.training])
    return canvas.figure()


def estimate_text(estimate: MemoryEstimate) -> str:
    """The text twin of `estimate_figure`, with the classic table above it."""
    return str(estimate)


def estimate_label(estimate: MemoryEstimate) -> str:
    """One sentence for those who cannot see the picture of an estimate."""
    run = ", ".join(f"{row.stored} {format_bytes(row.total)}" for row in estimate.inference)
    train = ", ".join(f"{row.method} {format_bytes(row.total)}" for row in estimate.training)
    return f"Memory that {estimate.name} takes to run: {run}; to train: {train}."


def _estimate_bar(label: str, row: object, parts: Iterable[str]) -> _Bar:
    names = {part: _part_name(part) for part in parts}
    return _Bar(label, [(name, getattr(row, part), PART_COLOURS[name]) for part, name in names.items()])


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

STRIPS = 8  # rows that many files are wrapped into, about
LISTED = 24  # files that a text names; of more, the first and the last


def shards_figure(cut: Cut, find: str = "") -> Figure:
    """A cut checkpoint as a picture: its files in order, each as wide as its bytes, with its tensors as segments.

    A tensor larger than the limit, which has a file of its own, is hatched; one whose name contains `find` is yellow.
    The bar below shows how wide the limit is.

    >>> from bigkit import describe
    >>> from bigkit.checkpoints.shards import cut_model
    >>> figure = shards_figure(cut_model(describe("pygpt"), "5MB", "bfloat16"))
    >>> figure.savefig("shards.png")  # doctest: +SKIP
    """
    canvas = _Canvas()
    canvas.title(cut.model or "checkpoint", shards_verdict(cut))
    found, alone = _found(cut, find), set(cut.alone)
    colours = GPU_COLOURS[: len(cut.files) - len(alone)]
    kinds = [("tensors, by file", colours)] if colours else []
    kinds += [("larger than the limit", (ORANGE,))] if alone else []
    kinds += [(f"name contains {_shorten(find, 30)}", (YELLOW,))] if found else []
    canvas.legend(kinds)
    canvas.files(cut, found, alone)
    return canvas.figure()


def shards_text(cut: Cut, find: str = "") -> str:
    """The text twin of `shards_figure`: each file with its bytes, and its first and last tensor.

    >>> from bigkit import describe
    >>> from bigkit.checkpoints.shards import cut_model
    >>> print(shards_text(cut_model(describe("pygpt"), "5MB", "bfloat16")).splitlines()[0])
    pygpt, bfloat16: 4 files, 16.32 MB in all, limit 5.00 MB
    """
    rows, sizes, alone = [], cut.sizes, set(cut.alone)
    for file, tensors in cut.files.items():
        names = list(tensors)
        held = f"{names[0]}{f' .. {names[-1]}' if len(names) > 1 else ''}" if names else "nothing"
        note = ", larger than the limit" if alone & tensors.keys() else ""
        rows.append([file, format_bytes(sizes[file], "si"), f"{len(names):,}", held + note])
    if len(rows) > LISTED:
        between = [f"… {len(rows) - LISTED:,} more files", "", "", ""]
        rows[LISTED - 4 : -4] = [between]
    longest = max((len(row[-1]) for row in rows), default=0)
    rows = [[*row, last.ljust(longest)] for *row, last in rows]
    table = text_table(["file", "bytes", "tensors", "first .. last".ljust(longest)], rows)
    lines = [f"{cut.model or 'checkpoint'}: {shards_verdict(cut)}", "", table]
    if find:
        places = cut.find(find)
        lines += ["", f"names that contain {find!r}: {len(places):,}"]
        for name, file in list(places.items())[:LISTED]:
            lines.append(f"  {name}{f' (stored as {cut.ties[name]})' if name in cut.ties else ''}: {file}")
        lines += [f"  … {len(places) - LISTED:,} more"] if len(places) > LISTED else []
    return "\n".join(lines)


def shards_verdict(cut: Cut) -> str:
    """A cut in a few words: "4 files, 16.32 MB in all, limit 5.00 MB"."""
    files = f"{len(cut.files):,} files" if len(cut.files) != 1 else "1 file"
    return f"{files}, {format_bytes(cut.bytes, 'si')} in all, limit {format_bytes(cut.limit, 'si')}"


def shards_label(cut: Cut, find: str = "") -> str:
    """One sentence for those who cannot see the picture of a cut."""
    sizes = [format_bytes(size, "si") for size in cut.sizes.values()]
    shown = ", ".join([*sizes[:8], *(["and so on"] if len(sizes) > 8 else [])])
    label = f"Checkpoint of {cut.model or 'a model'}: {shards_verdict(cut)}; {shown}."
    if alone := len(cut.alone):
        label += f" {alone:,} {'tensor is' if alone == 1 else 'tensors are'} larger than the limit."
    if find:
        places = cut.find(find)
        label += f" Names that contain {find}: {len(places):,}, files that hold them: {len(set(places.values())):,}."
    return label


def _found(cut: Cut, find: str) -> set[str]:
    """Stored tensors that a name containing `find` leads to."""
    return {cut.ties.get(name, name) for name in cut.find(find)} if find else set()


# ---------------------------------------------------------------------------------------------------------------------
# Shares of processes


def shares_figure(split: Shares) -> Figure:
    """A split as a picture: a row for each process with its items from left to right, a column for each turn.

    Below it what `gather` returns, and what `gather_for_results` makes of it. Repeated items are hatched, turns without
    work are pale.

    >>> figure = shares_figure(Shares(3, 2, padding=True))
    >>> figure.savefig("shares.png")  # doctest: +SKIP
    """
    canvas = _Canvas(left=72)
    canvas.title(_count(split.items, "item") + " on " + _count(split.processes, "process", "processes"), _turns(split))
    kinds = [("items, by process", GPU_COLOURS[: split.processes])]
    kinds += [("repeated", ("#FFFFFF",))] if split.padded else []
    kinds += [("idle", (TRACK,))] if split.idle else []
    canvas.legend(kinds)
    canvas.shares(split)
    return canvas.figure()


def shares_text(split: Shares) -> str:
    """The text twin of `shares_figure`.

    >>> print(shares_text(Shares(3, 2, padding=True)))
    process    items  repeated  idle
    ---------  -----  --------  ----
    process 0      2         -     -
    process 1      1         1     -
    <BLANKLINE>
    gather returns 4: 0 1 | 2 2
    gather_for_results returns 3: 0 1 2
    """
    rows = [
        [f"process {process}", *(str(n or "-") for n in (real, len(part) - real, split.rounds - len(part)))]
        for process, (part, real) in enumerate(zip(split.parts, split.lengths))
    ]
    table = text_table(["process", "items", "repeated", "idle"], rows)
    parts = " | ".join(" ".join(map(str, part)) for part in split.parts)
    exact = " ".join(map(str, range(split.items)))
    gathered, results = f"gather returns {len(split.gathered)}", f"gather_for_results returns {split.items}"
    return f"{table}\n\n{gathered}: {parts}\n{results}: {exact}"


def shares_label(split: Shares) -> str:
    """One sentence for those who cannot see the picture of a split."""
    shares = "; ".join(f"process {i} gets {_positions(part) or 'nothing'}" for i, part in enumerate(split.parts))
    items, processes = _count(split.items, "item"), _count(split.processes, "process", "processes")
    return f"{items} on {processes}: {shares}. {_turns(split)}."


def _turns(split: Shares) -> str:
    """How long it takes: "2 turns instead of 3, 1 idle"."""
    said = f"{_count(split.rounds, 'turn')} instead of {split.items}"
    said += f", {split.idle} idle" if split.idle else ""
    return said + (f", {split.padded} repeated" if split.padded else "")


def _positions(part: Sequence[int]) -> str:
    """Positions as few words: "0, 1", "3 .. 9", or nothing."""
    return f"{part[0]} .. {part[-1]}" if len(part) > 4 else ", ".join(map(str, part))


def _count(count: int, noun: str, plural: str = "") -> str:
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


# ---------------------------------------------------------------------------------------------------------------------
# Quantized layers


def study_figure(study: Study, errors: Mapping[str, float]) -> Figure:
    """A quantized layer as a picture: its weights as a histogram over the values that a code can stand for, and the
    error of every layer's output below, the layer's own marked.

    Args:
        study: the layer.
        errors: layer -> relative error of its output, in the model's order.

    >>> from bigkit.quantize.study import Scheme, planted, study
    >>> figure = study_figure(study(planted(), Scheme("nf4")), {"planted outliers": 0.09})
    >>> figure.savefig("study.png")  # doctest: +SKIP
    """
    canvas = _Canvas()
    canvas.title(study.layer, _study_facts(study))
    canvas.legend([("weights", (BLUE,)), ("values of a code", (GREEN,))])
    canvas.histogram(study.counts, study.codes)
    canvas.heading("How far the output of each layer moves, relative to its length, in the model's order")
    canvas.columns(errors, study.layer)
    return canvas.figure()


def study_text(study: Study, errors: Mapping[str, float]) -> str:
    """The text twin of `study_figure`: the layer's figures, its codes, and the error of each kind of layer.

    >>> from bigkit.quantize.study import Scheme, planted, study
    >>> print(study_text(study(planted(), Scheme("nf4")), {"planted outliers": 0.09}).splitlines()[0])
    planted outliers
    """
    kinds: dict[str, list[float]] = {}
    for name, error in errors.items():
        kinds.setdefault(".".join(part for part in name.split(".") if not part.isdigit()), []).append(error)
    rows = [[kind, str(len(found)), *(f"{100 * pick(found):.2f} %" for pick in (min, max))]
            for kind, found in kinds.items()]  # fmt: skip
    few = len(study.codes) <= 16
    codes = f"{len(study.codes)}, evenly spaced from -1 to 1"
    if few:
        said = [f"{code:.3f}" for code in study.codes]
        codes = "\n  ".join(["", *(" ".join(said[i : i + 8]) for i in range(0, len(said), 8))])
    return "\n".join([
        study.layer, _study_facts(study), "",
        f"weights move by {100 * study.weight_error:.2f} %, the output by {100 * study.output_error:.2f} %",
        f"values of a code, times the scale: {codes}", "",
        text_table(["output error of", "layers", "least", "most"], rows),
    ])  # fmt: skip


def study_label(study: Study) -> str:
    """What a screen reader says of `study_figure`."""
    return (
        f"{study.layer} as {study.scheme.label}: {_study_facts(study)}; a histogram of its weights over "
        f"{len(study.codes)} values, and the error of each layer's output, here {100 * study.output_error:.2f} %."
    )


def _study_facts(study: Study) -> str:
    rows, columns = study.shape
    facts = (
        f"{study.scheme.label} · {rows:,} x {columns:,} · {format_bytes(study.nbytes)} · {study.bits:.2f} bits a weight"
    )
    return facts + (f" · {study.outliers} outlier features" if study.scheme.kind == "int8" else "")


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


@dataclass(frozen=True)
class _Bar:
    """A stacked bar: (part, bytes, colour) from the left, and the capacity that it stands against."""

    label: str
    parts: list[tuple[str, int, str]]
    capacity: int | None = None

    @property
    def used(self) -> int:
        return sum(size for _, size, _ in self.parts)


class _Canvas:
    """What is to be drawn, from the top downwards, in points: rectangles by kind, and texts."""

    def __init__(self, left: float = LEFT, right: float = RIGHT) -> None:
        self.left, self.right, self.y = left, right, 6.0
        self.boxes: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {}
        self.texts: list[tuple[float, float, str, dict[str, Any]]] = []

    def box(self, kind: str, x: float, y: float, width: float, height: float, colour: str) -> None:
        self.boxes.setdefault((kind, colour), []).append((x, y, width, height))

    def text(self, x: float, y: float, text: str, size: float = 10, **style: Any) -> None:
        # matplotlib would read $...$ as mathematics; a folder's name may hold a $
        style = {"fontsize": size, "color": BLACK, "va": "center", "parse_math": False, **style}
        self.texts.append((x, y, text, style))

    def title(self, name: str, rest: str) -> None:
        self.text(8, self.y + 8, _shorten(name, 48), 12, weight="bold")
        self.text(8, self.y + 24, rest, 9.5, color="#333333")
        self.y += 40

    def heading(self, text: str) -> None:
        self.text(8, self.y + 9, _shorten(text, 92), 9.5, color="#333333")
        self.y += 20

    def legend(self, entries: Sequence[tuple[str, tuple[str, ...]]]) -> None:
        x = 8.0
        for name, colours in entries:
            for i, colour in enumerate(colours):
                self.box(f"key {name}", x + 7 * i, self.y + 2, 7 if len(colours) > 1 else 12, 10, colour)
            x += max(12, 7 * len(colours)) + 5
            self.text(x, self.y + 7, name, 9)
            x += 0.9 * _text_width(name, 9) + 12
        self.y += 22

    def bars(self, bars: Sequence[_Bar]) -> None:
        """Stacked bars on one scale, with an axis below: it reaches to the longest bar or capacity.

        A disk much larger than what rests on it would squeeze the rest: its capacity is then written, not drawn.
        """
        most = max((bar.used for bar in bars), default=0) or 1
        drawn = [bar.capacity for bar in bars if bar.capacity and (bar.label != "disk" or bar.capacity <= 2 * most)]
        longest = max([most, *drawn])
        unit, unit_name = _unit(longest)
        scale = (WIDTH - self.left - self.right) / longest
        top = self.y
        for bar in bars:
            self.bar(bar, scale, unit, unit_name)
        step = _nice_step(longest / unit)
        for i in range(math.floor(longest / unit / step) + 1):
            x = self.left + i * step * unit * scale
            self.box("grid", x - 0.25, top, 0.5, self.y - top, GREY)
            self.text(x, self.y + 6, f"{i * step:,g}" if i else f"0 {unit_name}", 8, ha="center", color="#333333")
        self.y += 20

    def bar(self, bar: _Bar, scale: float, unit: int, unit_name: str) -> None:
        x, y = self.left, self.y + (ROW - BAR) / 2
        middle = self.y + ROW / 2
        self.text(self.left - 6, middle, bar.label, ha="right")
        room = (WIDTH - self.left - self.right) / scale
        over = bar.capacity is not None and bar.used > bar.capacity
        if bar.capacity:
            self.box("room", x, y, min(bar.capacity, room) * scale, BAR, TRACK)
        for name, size, colour in bar.parts:
            width = size * scale
            if not width:
                continue
            self.box(name, x, y, width, BAR, colour)
            number = _number(size / unit)
            said = next((text for text in (f"{name} {number}", number) if _text_width(text, 8.5) < width - 4), "")
            if said:
                hatched = name in HATCHES or over
                plate = {"bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1}} if hatched else {}
                ink = BLACK if hatched else _ink(colour)
                self.text(x + width / 2, middle, said, 8.5, ha="center", color=ink, **plate)
            x += width
        if bar.capacity is not None and bar.capacity <= room:
            end = self.left + bar.capacity * scale
            if over:
                self.box("over budget", end, y, x - end, BAR, VERMILLION)
            self.box("capacity", end - 0.9, y - 3, 1.8, BAR + 6, BLACK)
        total = _number(bar.used / unit) + ("" if bar.capacity is None else f" of {_number(bar.capacity / unit)}")
        self.text(WIDTH - 8, middle, f"{total} {unit_name}", 9.5, ha="right", weight="bold" if over else "normal",
                  color="#B00000" if over else BLACK)  # fmt: skip
        self.y += ROW

    def histogram(self, counts: Sequence[int], codes: Sequence[float], height: float = 92) -> None:
        """Counts of values from -1 to 1, and below it a line for each value of a code."""
        width, most = WIDTH - 32, max(counts, default=0) or 1
        wide = width / len(counts)
        for i, count in enumerate(counts):
            tall = height * count / most
            self.box("weights", 16 + i * wide, self.y + height - tall, wide - 0.6, tall, BLUE)
        self.y += height
        line = 0.6 if len(codes) > 64 else 1.6
        for code in codes:
            self.box("values of a code", 16 + (code + 1) / 2 * width - line / 2, self.y + 2, line, 12, GREEN)
        for value in (-1, -0.5, 0, 0.5, 1):
            said = f"{value:g}" if value else "0 x its scale"
            self.text(16 + (value + 1) / 2 * width, self.y + 21, said, 8, ha="center", color="#333333")
        self.y += 30

    def columns(self, values: Mapping[str, float], chosen: str, height: float = 64) -> None:
        """A column for each value, one of them marked, in percent."""
        most = max(values.values(), default=0) or 1
        wide = min((WIDTH - 32 - 44) / max(len(values), 1), 40)
        for i, (name, value) in enumerate(values.items()):
            tall, x = height * value / most, 60 + i * wide
            self.box("chosen" if name == chosen else "layers", x, self.y + height - tall, 0.8 * wide, tall,
                     ORANGE if name == chosen else SKY)  # fmt: skip
            if name == chosen:
                self.text(min(max(x + 0.4 * wide, 130), WIDTH - 130), self.y + height + 9,
                          f"{_shorten(name, 32)}: {100 * value:.2f} %", 9, ha="center", weight="bold")  # fmt: skip
        for value in (0, most):
            self.text(54, self.y + height * (1 - value / most), f"{100 * value:.2g} %", 8, ha="right", color="#333333")
        self.y += height + 20

    def strip(self, plan: Plan) -> None:
        """The layers in order, each as wide as its bytes; below each stretch, its device and layers."""
        whole = sum(layer.bytes for layer in plan.layers) or 1
        self.heading(f"{len(plan.layers)} layers in the model's order, each as wide as its bytes ({_sizes(plan)})")
        x, width = 8.0, WIDTH - 16
        for layer in plan.layers:
            wide = width * layer.bytes / whole
            self.box("layers", x, self.y, wide, 20, device_colour(layer.device))
            if wide > 2:
                self.box("seams", x - 0.25, self.y, 0.5, 20, "#FFFFFF")
            x += wide
        x = 8.0
        for device, names, size in _stretches(plan):
            stretch = width * size / whole
            label = device_label(device)
            label = label if _text_width(label, 9) < stretch else label.removeprefix("GPU ")
            for text, below, font, colour in ((label, 29, 9, BLACK), (_span(names), 42, 8.5, "#333333")):
                if _text_width(text, font) < stretch:
                    self.text(x + stretch / 2, self.y + below, text, font, ha="center", color=colour)
            x += stretch
        self.y += 54

    def files(self, cut: Cut, found: set[str], alone: set[str]) -> None:
        """Files from left to right, wrapped like words; below them the width of the limit."""
        left, room = 8.0, WIDTH - 16
        sizes = cut.sizes
        widest = max([*sizes.values(), cut.bytes / STRIPS, 1])
        scale = room / max(widest, cut.limit if cut.limit <= 1.5 * widest else 0)
        x = left
        for number, (file, tensors) in enumerate(cut.files.items(), start=1):
            wide = sizes[file] * scale
            if x > left and x + wide > left + room + 0.01:
                x, self.y = left, self.y + 40
            colour = GPU_COLOURS[(number - 1) % len(GPU_COLOURS)]
            start = x
            for name, size in tensors.items():
                self.tensor(name, x, size * scale, colour, name in found, name in alone)
                x += size * scale
            if wide > 6:
                self.box("gaps", x - 1, self.y, 2, 20, "#FFFFFF")
            texts = (f"{number}: {format_bytes(sizes[file], 'si')}", str(number))
            said = next((text for text in texts if _text_width(text, 8.5) < wide), None)
            if said:
                self.text(start + wide / 2, self.y + 28, said, 8.5, ha="center")
        self.y += 46
        limit = cut.limit * scale
        drawn = 2 <= limit <= room
        if drawn:
            self.box("limit", left, self.y, limit, 4, DARK)
        why = "" if drawn else ", wider than this picture" if limit > room else ", too narrow to draw"
        self.text(left, self.y + 13, f"the limit: {format_bytes(cut.limit, 'si')}{why}", 8.5, color="#333333")
        self.y += 24

    def tensor(self, name: str, x: float, wide: float, colour: str, found: bool, alone: bool) -> None:
        """One segment of a file, with as much of the tensor's name as there is room for."""
        kind = "larger than the limit" if alone else "found" if found else "tensors"
        ground = YELLOW if found else ORANGE if alone else colour
        if wide:
            self.box(kind, x, self.y, wide, 20, ground)
        if wide > 2:
            self.box("seams", x + wide - 0.5, self.y, 0.5, 20, "#FFFFFF")
        parts = name.removesuffix(".weight").split(".")
        names = (".".join(parts[i:]) for i in range(len(parts)))
        said = next((text for text in names if _text_width(text, 8) < wide - 4), None)
        if said:
            plate = {"bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1}} if kind in HATCHES else {}
            ink = BLACK if kind in HATCHES else _ink(ground)
            self.text(x + wide / 2, self.y + 10, said, 8, ha="center", color=ink, **plate)

    def shares(self, split: Shares) -> None:
        """A row for each process, then the two that gather returns."""
        room, rounds = WIDTH - self.left - 8, max(1, split.rounds)
        wide = min(room / rounds, 64)
        for process, (part, real) in enumerate(zip(split.parts, split.lengths)):
            self.text(self.left - 8, self.y + 9, f"process {process}", 9, ha="right")
            for turn in range(rounds):
                self.item(self.left + turn * wide, wide, process, part[turn : turn + 1], turn >= real)
            self.y += 21
        for turn in range(0, rounds + 1, max(1, math.ceil(rounds / 12))):
            self.text(self.left + turn * wide, self.y + 5, str(turn), 8, ha="center", color="#333333")
        self.text(self.left, self.y + 17, "turns", 8, ha="center", color="#333333")
        self.y += 30
        wide = min(room / max(1, len(split.gathered)), 32)
        for name, longest, count in (
            ("gather", split.rounds, len(split.gathered)), ("gather_for_results", 0, split.items),
        ):  # fmt: skip
            self.text(8, self.y + 8, f"{name} returns {_count(count, 'result')}", 9)
            self.y += 16
            x: float = self.left
            for process, (part, real) in enumerate(zip(split.parts, split.lengths)):
                for turn, position in enumerate(part[: max(real, longest)]):
                    self.item(x, wide, process, (position,), turn >= real)
                    x += wide
            self.y += 24

    def item(self, x: float, wide: float, process: int, position: Sequence[int], repeated: bool) -> None:
        """One turn of a process: its item, an item that is repeated, or nothing."""
        colour = GPU_COLOURS[process % len(GPU_COLOURS)]
        kind = "idle" if not position else "repeated" if repeated else "items"
        ground = TRACK if not position else "#FFFFFF" if repeated else colour
        self.box(kind, x + 0.5, self.y, wide - 1, 18, ground)
        said = str(position[0]) if position else ""
        if said and _text_width(said, 8.5) < wide:
            plate = {"bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1}} if repeated else {}
            self.text(x + wide / 2, self.y + 9, said, 8.5, ha="center", color=_ink(ground), **plate)

    def figure(self) -> Figure:
        """All boxes of one kind and colour become one path, which saves most of the time that drawing takes."""
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path
        from matplotlib.transforms import Affine2D

        with matplotlib.rc_context({"hatch.linewidth": 0.8, "font.family": ["DejaVu Sans"], "path.sketch": None}):
            figure = Figure((WIDTH / 72, self.y / 72), dpi=144, facecolor="white")
            figure.add_axes((0, 0, 1, 1)).axis("off")  # IPython shows no figure without axes
            points = Affine2D().scale(1 / 72, -1 / 72).translate(0, self.y / 72) + figure.dpi_scale_trans
            for (kind, colour), boxes in self.boxes.items():
                corners = [
                    corner
                    for x, y, w, h in boxes
                    for corner in ((x, y), (x + w, y), (x + w, y + h), (x, y + h), (x, y))
                ]
                codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(boxes)
                hatch = HATCHES.get(kind.removeprefix("key "))
                patch = PathPatch(
                    Path(corners, codes),
                    facecolor="none" if colour == VERMILLION else colour,
                    edgecolor=colour if colour == VERMILLION else DARK,
                    linewidth=0.6 if hatch else 0, hatch=hatch, label=kind, zorder=_depth(kind), transform=points,
                )  # fmt: skip
                figure.add_artist(patch)
            for x, y, text, style in self.texts:
                figure.text(x, y, text, transform=points, zorder=9, **style)
        return figure


def _depth(kind: str) -> int:
    """Which boxes lie above which: the grid above its ground, the parts above both, capacity on top."""
    return {"room": 0, "grid": 1, "over budget": 3, "seams": 3, "gaps": 3, "capacity": 4}.get(kind, 2)


def _text_width(text: str, size: float) -> float:
    """About how many points wide a text is; browsers differ by the font they have."""
    return 0.62 * size * len(text)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length // 2 - 1]}…{text[-(length // 2) :]}"


def _ink(colour: str) -> str:
    """Black or white, whichever reads better on a colour."""
    return "#FFFFFF" if colour in (BLACK, BLUE, DARK) else BLACK


def _number(value: float) -> str:
    """Three figures, or all of them before the point."""
    return f"{value:,.0f}" if value >= 99.95 or not value else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _unit(largest: int) -> tuple[int, str]:
    return next(((unit, name) for unit, name in ((GiB, "GiB"), (MiB, "MiB")) if largest >= unit), (KiB, "KiB"))


def _nice_step(longest: float) -> float:
    """A round step that cuts an axis into four to nine parts."""
    power = 10 ** math.floor(math.log10(longest / 4))
    return next(step * power for step in (5, 2, 1) if step * power <= longest / 4)


# ---------------------------------------------------------------------------------------------------------------------
# SVG


def svg(figure: Figure, label: str) -> str:
    """A figure as inline SVG that a screen reader announces with `label`; the same figure gives the same text.

    The text stays text, and the picture scales to the width of its place. A figure made here is unknown to pyplot, so
    nothing needs to be closed.

    Args:
        figure: any matplotlib figure.
        label: what the picture says, as a sentence.

    Returns:
        One `<svg role="img">` element, without XML prolog.
    """
    import matplotlib

    page = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bigkit"}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(page, format="svg", facecolor=figure.get_facecolor(), metadata=nothing)
    text = page.getvalue()
    root = re.search(r"<svg[^>]*>", text)
    assert root is not None
    viewbox = re.search(r'viewBox="[\d. ]+"', root[0])
    width = round(figure.get_figwidth() * 72)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'aria-label="{html.escape(label)}" {viewbox[0] if viewbox else ""} '
        f'style="display:block;width:100%;max-width:{1.6 * width:.0f}px;height:auto">'
    )
    body = text[root.end() :].rstrip()
    return head + body.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
