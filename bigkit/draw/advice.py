"""The picture of an advice: what a token waits for, option by option. Its text twin is `Advice.explain`.

Leaves out: finding the options (`maps/advise.py`) and controls (`widgets/advisor.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..maps.advise import Advice
from .canvas import BLUE, DARK, GREY, PURPLE, WIDTH

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"Python": GREY, "GPU": BLUE, "RAM": BLUE, "link": PURPLE, "disk": DARK}


def advice_figure(advice: Advice) -> Figure:
    """An advice as a picture: for each option a bar for each lane, its length the time of one token, on a log scale.

    The longest bar of an option is what a token takes. A star marks the front of speed, memory and quality.

    >>> from bigkit import advise
    >>> figure = advice_figure(advise("llama-2-70b", "1 x RTX 4090"))
    >>> figure.savefig("advice.png")  # doctest: +SKIP
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    height = 96 + 52 * max(1, len(advice.options))
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    title = f"{advice.batch} x {advice.context:,} tokens on {advice.hardware}"
    figure.text(8 / WIDTH, 1 - 14 / height, advice.model, fontsize=12, weight="bold", va="center", parse_math=False)
    figure.text(8 / WIDTH, 1 - 30 / height, title, fontsize=9.5, color="#333333", va="center", parse_math=False)
    if not advice.options:
        figure.text(0.5, 0.4, "Nothing fits.", fontsize=12, ha="center")
        return figure
    axes = figure.add_axes((84 / WIDTH, 40 / height, (WIDTH - 188) / WIDTH, (height - 84) / height))
    lanes = list(advice.options[0].waits)
    longest = max(option.token for option in advice.options)
    shortest = longest / 1000
    for row, option in enumerate(advice.options):
        for i, lane in enumerate(lanes):
            seconds = max(option.waits[lane], shortest)
            if option.waits[lane]:
                axes.barh(row + (i - 1.5) * 0.19, seconds - shortest, 0.17, shortest, **_look(lane))
        said = f"{advice.batch / option.token:,.2f} tokens/s"
        figure.text(1 - 8 / WIDTH, row, said, fontsize=9, va="center", ha="right", transform=_right_of(axes, figure))
    axes.set_xscale("log")
    axes.set_xlim(shortest, longest)
    axes.set_ylim(len(advice.options) - 0.5, -0.5)
    stored = [option.plan.quantization or option.plan.dtype for option in advice.options]
    names = [f"{'* ' if option.front else ''}{how}" for how, option in zip(stored, advice.options)]
    axes.set_yticks(range(len(names)), names, fontsize=9.5)
    axes.xaxis.set_major_formatter(lambda seconds, _: _time(seconds))
    axes.set_xlabel("time for one token; the longest bar is what it takes", fontsize=8.5)
    axes.tick_params(labelsize=8, length=2)
    axes.tick_params(axis="y", labelsize=9.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    handles = [Patch(label=lane, **_look(lane)) for lane in lanes]
    figure.legend(handles=handles, loc="upper right", ncols=4, fontsize=8.5, frameon=False)
    return figure


def _look(lane: str) -> dict[str, Any]:
    """The colour of a lane; the disk is hatched too, as its grey and the GPU's blue are equally dark."""
    hatched = {"hatch": "////", "edgecolor": "white"} if lane == "disk" else {}
    return {"facecolor": COLOURS[lane], "linewidth": 0, **hatched}


def _right_of(axes: Any, figure: Figure) -> Any:
    """Across: a share of the figure. Down: a row of the axes."""
    from matplotlib.transforms import blended_transform_factory

    return blended_transform_factory(figure.transFigure, axes.transData)


def _time(seconds: float) -> str:
    """A time as a tick says it.

    >>> _time(0.0001), _time(0.01), _time(10)
    ('0.1 ms', '10 ms', '10 s')
    """
    return f"{1000 * seconds:g} ms" if seconds < 1 else f"{seconds:g} s"


def advice_label(advice: Advice) -> str:
    """One sentence for those who cannot see the picture of an advice."""
    if advice.best is None:
        return f"Nothing fits: {advice.model} on {advice.hardware}."
    options = ", ".join(
        f"{option.plan.quantization or option.plan.dtype} {advice.batch / option.token:,.2f} tokens a second, "
        f"waiting for {option.bottleneck}"
        for option in advice.options
    )
    return f"Ways to run {advice.model} on {advice.hardware}, best first: {options}."
