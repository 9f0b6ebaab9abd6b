"""The picture of a plan, with its text twin: what each device holds, and which layers rest where.

Leaves out: time (`draw/dryrun.py`), and controls (`widgets/plan_explorer.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from ..devices import Device, device_label
from ..maps.plan import Plan, Share
from ..model.estimate import load_text
from ..units import format_bytes, text_table
from .bars import HATCHES, PART_COLOURS, Bar, draw_bars
from .canvas import ABOVE, WIDTH, Picture, text_width
from .colours import BLACK, SOFT, VERMILLION, WHITE, device_colour

PARTS = {"weights": "weights", "kv_cache": "KV cache", "activations": "activations", "reserve": "reserve",
         "overhead": "overhead"}  # field of a `Share` -> its name in pictures  # fmt: skip


def plan_figure(plan: Plan) -> Picture:
    """A plan as a picture: a bar per device against its capacity, and the layers in order, as wide as their bytes.

    Weights have the colour of their device, in the bars and in the strip of layers; KV cache, activations, reserve and
    overhead have their own. What lies above a budget is hatched. GPUs share one scale, RAM and disk another.

    >>> from bigkit import plan
    >>> plan_figure(plan("gpt2", {0: "300MiB", 1: "300MiB"}))
    <Picture: Memory of gpt2 on each device: GPU 0 231.35 MiB of 300.00 MiB, GPU 1 243.35 MiB of 300.00 MiB. It fits.>
    """
    working = [share for share in plan.shares if share.runs or share.device not in ("cpu", "disk")]
    resting = [share for share in plan.shares if share not in working and (share.used or share.budget != 0)]
    picture = Picture(plan.model, plan_label(plan))
    picture.head(_settings(plan))
    picture.legend(_legend(plan), HATCHES)
    draw_bars(picture, [_bar(share) for share in working])
    if any(share.used for share in resting):
        picture.heading(f"Resting until {device_label(working[0].device)} needs them, on a scale of their own")
        draw_bars(picture, [_bar(share) for share in resting])
    elif free := [f"{device_label(share.device)} ({_limit(share)})" for share in resting]:
        picture.heading(f"Not needed: {' and '.join(free)}.")
    _draw_layers(picture, plan)
    return picture


def plan_text(plan: Plan) -> str:
    """The text twin of `plan_figure`: what each device holds, and which layers.

    >>> from bigkit import plan
    >>> print(plan_text(plan("gpt2", {0: "300MiB", 1: "300MiB"})).splitlines()[0])
    gpt2: fits
    """
    parts = {part: name for part, name in PARTS.items()
             if part == "weights" or any(getattr(share, part) for share in plan.shares)}  # fmt: skip
    headers = ["device", "used", "capacity", "full", "layers", *parts.values()]
    shares = [share for share in plan.shares if share.used or share.budget != 0]
    rows = [
        [device_label(share.device), format_bytes(share.used), _limit(share),
         f"{100 * share.used / share.budget:.0f} %" if share.budget else "-",
         str(sum(layer.device == share.device for layer in plan.layers)),
         *(format_bytes(getattr(share, part)) for part in parts)]
        for share in shares
    ]  # fmt: skip
    strip = [f"  {device_label(device)}: {_whole_span(names)}" for device, names, _ in _stretches(plan)]
    return "\n".join([f"{plan.model}: {plan_verdict(plan)}", _settings(plan), *plan.notes, "",
                      text_table(headers, rows), "",
                      f"{len(plan.layers)} layers in order, {_sizes(plan)}:", *strip])  # fmt: skip


def plan_verdict(plan: Plan) -> str:
    """A plan in a few words: "fits", "fits, 12.50 GiB of weights rest in RAM", or "does not fit: ..."."""
    if not plan.feasible:
        return f"does not fit: {plan.problem}"
    away = [f"{format_bytes(share.weights)} of weights rest {'in RAM' if share.device == 'cpu' else 'on disk'}"
            for share in plan.shares if share.weights and not share.runs]  # fmt: skip
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
    stored = f"{plan.quantization} + {plan.dtype}" if plan.quantization else plan.stored
    return f"{stored}, strategy {plan.strategy}, {load_text(plan.batch, plan.context, plan.options.get('kv_dtype'))}"


def _bar(share: Share) -> Bar:
    colours = {**PART_COLOURS, "weights": device_colour(share.device)}
    parts = [(name, getattr(share, part), colours[name]) for part, name in PARTS.items()]
    return Bar(device_label(share.device), parts, share.budget)


def _legend(plan: Plan) -> list[tuple[str, str | Sequence[str]]]:
    used = {layer.device for layer in plan.layers}
    colours = tuple(dict.fromkeys(device_colour(share.device) for share in plan.shares if share.device in used))
    entries: list[tuple[str, str | Sequence[str]]] = [("weights, by device", colours)]
    for part, name in PARTS.items():
        if part != "weights" and any(getattr(share, part) for share in plan.shares):
            entries.append((name, PART_COLOURS[name]))
    return [*entries, ("over budget", VERMILLION)] if any(share.over for share in plan.shares) else entries


def _limit(share: Share) -> str:
    return "no limit" if share.budget is None else format_bytes(share.budget)


def _sizes(plan: Plan) -> str:
    """The bytes of all layers, and how many of them are tied and so counted twice."""
    total = sum(layer.bytes for layer in plan.layers)
    twice = total - sum(share.weights for share in plan.shares)
    return format_bytes(total) + (f", {format_bytes(twice)} of it tied" if twice else "")


def _stretches(plan: Plan) -> list[tuple[Device, list[str], int]]:
    """Neighbouring layers on one device, in the model's order: (device, names, bytes)."""
    groups = ((device, list(layers)) for device, layers in groupby(plan.layers, key=lambda layer: layer.device))
    return [
        (device, [layer.name for layer in layers], sum(layer.bytes for layer in layers)) for device, layers in groups
    ]


def _whole_span(names: Sequence[str]) -> str:
    """First and last of some names: "model.layers.0 .. model.layers.9 (10)"."""
    return names[0] or "the whole model" if len(names) == 1 else f"{names[0]} .. {names[-1]} ({len(names)})"


def _short_span(names: Sequence[str]) -> str:
    """The same in few letters: "0 – 9" in one list of blocks, else "10 layers"."""
    (parent, _, first), (last_parent, _, last) = (name.rpartition(".") for name in (names[0], names[-1]))
    if len(names) == 1:
        return first
    return f"{first} – {last}" if parent == last_parent else f"{len(names)} layers"


def _draw_layers(picture: Picture, plan: Plan) -> None:
    """The layers in order, each as wide as its bytes; below each stretch, its device and layers."""
    whole = sum(layer.bytes for layer in plan.layers) or 1
    picture.heading(f"{len(plan.layers)} layers in the model's order, each as wide as its bytes ({_sizes(plan)})")
    x, room = 8.0, WIDTH - 16
    for layer in plan.layers:
        width = room * layer.bytes / whole
        picture.box("layers", x, picture.y, width, 20, device_colour(layer.device))
        if width > 2:
            picture.box("seams", x - 0.25, picture.y, 0.5, 20, WHITE, depth=ABOVE)
        x += width
    x = 8.0
    for device, names, size in _stretches(plan):
        width, label = room * size / whole, device_label(device)
        for texts, below, font, colour in (
            ((label, label.removeprefix("GPU ")), 29, 9, BLACK),
            ((_short_span(names),), 42, 8.5, SOFT),
        ):
            text = next((text for text in texts if text_width(text, font) < width - 3), "")
            if text:
                picture.text(x + width / 2, picture.y + below, text, font, colour, "middle")
        x += width
    picture.y += 54
