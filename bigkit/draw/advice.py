"""The picture of an advice: the memory of each way to store a model against what a machine has, and what a token waits
for. Its text twin is `Advice.explain`.

Leaves out: finding the options (`maps/advise.py`), and controls (`widgets/fit_explorer.py`).
"""

from __future__ import annotations

from ..devices import Device
from ..maps.advise import Advice
from ..maps.plan import Plan
from ..maps.predict import Option
from ..model.estimate import load_text
from ..units import GiB, KiB, MiB, format_bytes, format_seconds, three_figures
from .bars import BAR, PART_ABOUT, PART_COLOURS
from .canvas import ABOVE, WIDTH, Picture, text_width
from .colours import BLACK, BLUE, DARK, PALE, SOFT, TRACK, VERMILLION, WHITE

ROW = 42  # points from one way to the next
PARTS = {  # name -> colour: where weights rest, and what works beside them
    "weights": BLUE, "KV cache": PART_COLOURS["KV cache"], "activations": PART_COLOURS["activations"],
    "overhead": DARK, "in flight": PALE, "weights in RAM": BLUE, "weights on disk": DARK,
}  # fmt: skip
ABOUT = {**PART_ABOUT, "in flight": "room for weights on their way"}
HATCHES = {"weights in RAM": "/", "weights on disk": "/", "in flight": "/"}
NAMES = {"cpu": "RAM", "disk": "disk"}


def advice_figure(advice: Advice) -> Picture:
    """An advice as a picture: for each way to store the weights a bar of bytes, on one scale with lines where the GPUs
    end, and RAM after them; below it the seconds that each part of the machine works for one token (of a model that
    does not generate: for one pass). A token takes the longest of them.

    A star: more exact than all above it, which are better by the target.

    >>> from bigkit import advise
    >>> advice_figure(advise("llama-2-70b", "1 x RTX 4090"))  # doctest: +ELLIPSIS
    <Picture: llama-2-70b on 1 x RTX 4090. Fits with ... GiB in RAM: ... tokens/s, stored as nf4-double. ...>
    """
    picture = Picture(advice.model, advice_label(advice), left=92, right=98)
    picture.head(f"on {advice.hardware}, {load_text(advice.batch, advice.context, advice.kv_dtype)}")
    bars = [_parts(plan) for plan, _ in advice.ways]
    if not bars:
        return picture
    used = {name for bar in bars for name, size in bar.items() if size}
    picture.legend([(name, colour) for name, colour in PARTS.items() if name in used], HATCHES)
    ends = _ends(advice.ways[0][0])
    longest = max([ends[0][1], *(sum(bar.values()) for bar in bars)])
    ends = [(name, end) for name, end in ends if end <= longest * 1.001]
    unit, unit_name = next(((u, name) for u, name in ((GiB, "GiB"), (MiB, "MiB")) if longest >= u), (KiB, "KiB"))
    picture.y += 14
    top = picture.y
    for (plan, option), bar in zip(advice.ways, bars):
        _draw_way(picture, plan, option, bar, picture.room / longest, unit, unit_name)
    _draw_ends(picture, [(f"{name} {three_figures(end / unit)}", end / longest) for name, end in ends], top, unit_name)
    picture.axis(longest / unit, unit_name, top)
    if advice.options:
        picture.text(8, picture.y + 4, "* more exact than all above it. A token waits for the slowest part.", 8, SOFT)
        picture.y += 14
    return picture


def _parts(plan: Plan) -> dict[str, int]:
    """What each part of the bar of a plan takes, in bytes, over all devices."""
    running = [share for share in plan.shares if share.runs]
    resting: dict[Device, int] = {share.device: share.weights for share in plan.shares if not share.runs}
    return {
        "weights": sum(share.weights for share in running),
        "KV cache": sum(share.kv_cache for share in running),
        "activations": sum(share.activations for share in running),
        "overhead": sum(share.overhead for share in running),
        "in flight": sum(share.reserve for share in running),
        "weights in RAM": resting.get("cpu", 0),
        "weights on disk": resting.get("disk", 0),
    }


def _ends(plan: Plan) -> list[tuple[str, int]]:
    """Where the memory of a machine ends: that of its GPUs together (without one: RAM), then RAM, then disk."""
    running = [share for share in plan.shares if share.runs]
    count = len(running)
    name = NAMES.get(str(running[0].device), "GPU" if count == 1 else f"{count} GPUs")
    ends = [(name, sum(share.budget or 0 for share in running))]
    for share in plan.shares:
        if not share.runs and share.budget:
            ends.append((f"+ {NAMES[str(share.device)]}", ends[-1][1] + share.budget))
    return ends


def _draw_way(
    picture: Picture, plan: Plan, option: Option | None, bar: dict[str, int], scale: float, unit: int, unit_name: str
) -> None:
    """One way: its name, its bar with the bytes, its speed, and what a token waits for."""
    x, y, front = picture.left, picture.y + 4, option is not None and option.front
    middle, total = y + BAR / 2, sum(bar.values())
    news = f"{option.fit}: {option.speed}. {option.reason}" if option else f"Does not fit: {plan.problem}."
    picture.mark(f"way:{plan.stored}", f"{plan.stored}. {news}", 0, picture.y, WIDTH, ROW)
    picture.box("room", x, y, picture.room, BAR, TRACK, depth=0)
    picture.text(x - 8, middle, f"{'* ' if front else ''}{plan.stored}", 9.5, anchor="end", bold=front)
    for name, size in bar.items():
        if size:
            picture.box(name, x, y, size * scale, BAR, PARTS[name], HATCHES.get(name, ""), "#FFFFFF")
            about = f": {ABOUT[name]}" if name in ABOUT else ""
            says = f"{plan.stored}: {name} {format_bytes(size)}{about}."
            picture.mark(f"way:{plan.stored}:{name}", says, x, y, size * scale, BAR)
            number = three_figures(size / unit)
            picture.label_in(x, middle, size * scale, (f"{name} {number}", number), ground=PARTS[name],
                             plate=name in HATCHES)  # fmt: skip
            x += size * scale
    speed, colour = (option.speed, BLACK) if option else ("does not fit", "#B00000")
    picture.text(WIDTH - 8, middle, speed, 9.5, colour, "end", bold=front or option is None)
    below = y + BAR + 8
    picture.text(WIDTH - 8, below, f"{three_figures(total / unit)} {unit_name}", 8, SOFT, "end")
    if option is None:
        picture.text(picture.left, below, plan.problem, 8, "#B00000")
    else:
        _write_waits(picture, option, below)
    picture.y += ROW


def _write_waits(picture: Picture, option: Option, y: float) -> None:
    x = picture.left
    for lane, seconds in sorted(option.waits.items(), key=lambda item: -item[1]):
        if seconds:
            bold = lane == option.bottleneck
            text = f"{'waits for ' if bold else ''}{lane} {format_seconds(seconds)}"
            width = text_width(text, 8, bold)
            picture.box("words", x, y - 5, width, 10, WHITE)  # no line of the grid goes through them
            picture.text(x, y, text, 8, BLACK if bold else SOFT, bold=bold)
            x += width + 10


def _draw_ends(picture: Picture, ends: list[tuple[str, float]], top: float, unit: str) -> None:
    """A line for each end across every bar, and its name above, beside those before it."""
    start = 8.0
    for i, (name, share) in enumerate(ends):
        x, colour, width = picture.left + share * picture.room, DARK if i else VERMILLION, text_width(name, 8.5, not i)
        for y in [top + 4 + ROW * row for row in range(round((picture.y - top) / ROW))]:
            picture.line("capacity", [(x, y - 4), (x, y + BAR + 4)], colour, 2, depth=ABOVE)
        says = f"{name} {unit}: what is left of this line fits there."
        picture.mark(f"end:{i}", says, x - 3, top, 6, picture.y - top)
        start = max(start, min(x - width / 2, WIDTH - 8 - width))
        picture.text(start, top - 8, name, 8.5, bold=not i)
        start += width + 6


def advice_label(advice: Advice) -> str:
    """Some sentences for those who cannot see the picture of an advice."""
    ways = [f"{option.label} {option.speed}, {option.fit[0].lower()}{option.fit[1:]}, waiting for {option.bottleneck}"
            for option in advice.options]  # fmt: skip
    ways += [f"{plan.stored} does not fit, {plan.problem}" for plan in advice.misfits]
    return f"{advice.model} on {advice.hardware}. {advice.verdict} Best first: {'; '.join(ways)}."
