"""The picture of a plan, with its text twin: what each device holds, and which layers rest where.

Leaves out: time (`draw/dryrun.py`), and controls (`widgets/plan_explorer.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from ..devices import Device, device_label
from ..maps.plan import Plan, Share
from ..model.estimate import load_text
from ..units import counted, format_bytes, text_table
from .bars import HATCHES, PART_ABOUT, PART_COLOURS, Bar, draw_bars
from .canvas import ABOVE, WIDTH, Picture, text_width
from .colours import BLACK, SOFT, VERMILLION, WHITE, device_colour

MOST_HANDLES = 12  # that are drawn
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
    picture.head(plan_settings(plan))
    picture.legend(_legend(plan), HATCHES)
    draw_bars(picture, [plan_bar(plan, share) for share in working])
    if any(share.used for share in resting):
        needs = list(dict.fromkeys(layer.works for layer in plan.layers if layer.works is not None))
        who = f"{device_label(needs[0])} needs" if len(needs) == 1 else "GPUs need"
        picture.heading(f"Resting until {who} them, on a scale of their own")
        draw_bars(picture, [plan_bar(plan, share) for share in resting])
    elif resting:
        _draw_free(picture, resting)
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
    return "\n".join([f"{plan.model}: {plan_verdict(plan)}", plan_settings(plan), *plan.notes, "",
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


def plan_settings(plan: Plan) -> str:
    """How the weights are stored, the strategy, and the load."""
    stored = f"{plan.quantization} + {plan.dtype}" if plan.quantization else plan.stored
    return f"{stored}, strategy {plan.strategy}, {load_text(plan.batch, plan.context, plan.options.get('kv_dtype'))}"


def plan_bar(plan: Plan, share: Share) -> Bar:
    """What a device holds, as a bar against its capacity."""
    colours = {**PART_COLOURS, "weights": device_colour(share.device)}
    parts = [(name, getattr(share, part), colours[name]) for part, name in PARTS.items()]
    here = counted(sum(layer.device == share.device for layer in plan.layers), "layer")
    load = load_text(plan.batch, plan.context, plan.options.get("kv_dtype"))
    about = {**PART_ABOUT, "weights": here, "KV cache": load}
    says = share_text(plan, share.device)
    return Bar(device_label(share.device), parts, share.budget, f"device:{share.device}", says, about)


def share_text(plan: Plan, device: Device) -> str:
    """What one device holds of its budget, and why no more: one or two sentences."""
    share = next(share for share in plan.shares if share.device == device)
    full = f", {100 * share.used / share.budget:.0f} % full" if share.budget else ""
    over = f", {format_bytes(share.over)} over budget" if share.over else ""
    used = f"{device_label(device)}: {format_bytes(share.used)} of {_limit(share)}{full}{over}"
    here = counted(sum(layer.device == device for layer in plan.layers), "layer")
    return f"{used}, {here}. {share.why}".rstrip()


def layer_text(plan: Plan, number: int) -> str:
    """A layer's name, class, bytes and place, and why its stretch ends where it does."""
    layer = plan.layers[number]
    share = next(share for share in plan.shares if share.device == layer.device)
    first = next((other for other in plan.shares if other.runs), share).device if layer.works is None else layer.works
    where = f"rests {'in' if layer.device == 'cpu' else 'on'} {device_label(layer.device)}"
    work = "works there" if share.runs else f"works on {device_label(first)}"
    size = f"{layer.name or 'the whole model'} ({layer.cls}), {format_bytes(layer.bytes)}"
    return f"{size}, {where} and {work}. {share.why}".rstrip()


def plan_differences(old: Plan, new: Plan) -> list[str]:
    """How a plan differs from another, in sentences; none if nothing does.

    >>> from bigkit import plan
    >>> p, q = (plan("gpt2", {0: size, 1: "300MiB"}) for size in ("300MiB", "400MiB"))
    >>> plan_differences(p, q)[:2]
    ['GPU 0 holds 285.43 MiB instead of 231.35 MiB.', 'GPU 1 holds 189.27 MiB instead of 243.35 MiB.']
    """
    said = []
    for device in dict.fromkeys([*old.used, *new.used]):
        one, other = old.used.get(device, 0), new.used.get(device, 0)
        if one != other:
            said.append(f"{device_label(device)} holds {format_bytes(other)} instead of {format_bytes(one)}.")
    fields = ("model", "stored", "strategy", "batch", "context")
    compared = [(name, getattr(old, name), getattr(new, name)) for name in fields]
    compared.append(("longest context", old.longest or "none", new.longest or "none"))
    compared.append(("verdict", plan_verdict(old), plan_verdict(new)))
    for name, one, other in compared:
        if one != other:
            said.append(f"{name.capitalize()}: {other} (before: {one}).")
    places = {layer.name: layer.device for layer in old.layers}
    ways = Counter((places[layer.name], layer.device) for layer in new.layers if layer.name in places)
    moves = [f"{counted(count, 'layer')} from {device_label(one)} to {device_label(other)}"
             for (one, other), count in ways.items() if one != other]  # fmt: skip
    return [*said, f"Moved: {', '.join(moves)}."] if moves else said


def moved(plan: Plan, key: str, onto: str) -> dict[str, Device]:
    """The device map after a mark of the picture was dragged onto another: layer name -> device.

    Args:
        plan: what is drawn.
        key: "layer:3", or "boundary:3", which stands before layer 3.
        onto: "device:cpu", or "layer:7": for a layer, the device of that one; for a boundary, the last layer that it
            passes over.

    Raises:
        ValueError: the picture has no such mark.

    >>> from bigkit import plan
    >>> p = plan("gpt2", {0: "300MiB", 1: "300MiB"})
    >>> moved(p, "layer:3", "device:1")["transformer.h.0"]
    1
    """
    names, places = [layer.name for layer in plan.layers], [layer.device for layer in plan.layers]
    kind, _, number = key.partition(":")
    target, _, where = onto.partition(":")
    devices = {str(share.device): share.device for share in plan.shares}
    i, j = (int(text) if text.isdigit() and int(text) < len(places) else None for text in (number, where))
    if kind == "layer" and i is not None and target == "device" and where in devices:
        places[i] = devices[where]
    elif kind == "layer" and i is not None and target == "layer" and j is not None:
        places[i] = places[j]
    elif kind == "boundary" and i and target == "layer" and j is not None:
        start, end = min(i, j), max(i, j + 1)
        places[start:end] = [places[i - 1] if j >= i else places[i]] * (end - start)
    else:
        raise ValueError(f"cannot drag {key!r} onto {onto!r}: expected a layer or a boundary, and a device or a layer")
    return dict(zip(names, places))


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
    return [(device, [layer.name for layer in own], sum(layer.bytes for layer in own)) for device, own in groups]


def _whole_span(names: Sequence[str]) -> str:
    """First and last of some names: "model.layers.0 .. model.layers.9 (10)"."""
    return names[0] or "the whole model" if len(names) == 1 else f"{names[0]} .. {names[-1]} ({len(names)})"


def _short_span(names: Sequence[str]) -> str:
    """The same in few letters: "0 – 9" in one list of blocks, else "embed_tokens – layers.9"."""
    ends = [names[0].split("."), names[-1].split(".")]
    one_list = ends[0][:-1] == ends[1][:-1]
    return " – ".join(dict.fromkeys(".".join(end[-1 if one_list or not end[-1].isdigit() else -2 :]) for end in ends))


def _draw_layers(picture: Picture, plan: Plan) -> None:
    """The layers in order, each as wide as its bytes; below each stretch, its device and layers."""
    whole = sum(layer.bytes for layer in plan.layers) or 1
    picture.heading(f"{len(plan.layers)} layers in the model's order, each as wide as its bytes ({_sizes(plan)})")
    x, room = 8.0, WIDTH - 16
    edges: list[float] = []
    for i, layer in enumerate(plan.layers):
        width = room * layer.bytes / whole
        picture.box("layers", x, picture.y, width, 20, device_colour(layer.device))
        if width > 2:
            picture.box("seams", x - 0.25, picture.y, 0.5, 20, WHITE, depth=ABOVE)
        at = f"device:{layer.device}"
        picture.mark(f"layer:{i}", layer_text(plan, i), x, picture.y, width, 20, onto="device layer", at=at)
        edges.append(x)
        x += width
    _mark_boundaries(picture, plan, [*edges, x])
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


def _mark_boundaries(picture: Picture, plan: Plan, edges: Sequence[float]) -> None:
    """A handle wherever the device changes; `edges` are where the layers begin, and the end of the last."""
    few = len(_stretches(plan)) <= MOST_HANDLES
    for i in range(1, len(plan.layers)):
        before, after = plan.layers[i - 1], plan.layers[i]
        if before.device == after.device:
            continue
        half = min(4.0, max(0.5, 0.3 * min(edges[i] - edges[i - 1], edges[i + 1] - edges[i])))
        if few:
            picture.line("handle", [(edges[i], picture.y - 4), (edges[i], picture.y + 24)], BLACK, 1)
        says = f"Boundary: {device_label(before.device)} up to {before.name}, "
        says += f"{device_label(after.device)} from {after.name} on."
        place = edges[i] - half, picture.y - 5, 2 * half, 30
        picture.mark(f"boundary:{i}", says, *place, onto="layer", at=f"layer:{i}", along="x")


def _draw_free(picture: Picture, shares: Sequence[Share]) -> None:
    """Name the devices on which nothing rests."""
    text = "Not needed: "
    for i, share in enumerate(shares):
        text += " and " * bool(i)
        words = f"{device_label(share.device)} ({_limit(share)})"
        x, width = 8 + text_width(text, 9.5), text_width(words, 9.5)
        says = f"{device_label(share.device)}: nothing rests here. {share.why}".rstrip()
        picture.mark(f"device:{share.device}", says, x - 2, picture.y - 1, width + 4, 18)
        text += words
    picture.heading(f"{text}.")
