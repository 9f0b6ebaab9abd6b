"""The picture of an advice: what a token waits for, option by option. Its text twin is `Advice.explain`.

Leaves out: finding the options (`maps/advise.py`), and controls (`widgets/advisor.py`).
"""

from __future__ import annotations

import math

from ..maps.advise import Advice, Option
from ..units import format_seconds
from .canvas import ABOVE, GROUND, WIDTH, Picture
from .colours import BLACK, BLUE, DARK, GREY, PURPLE, SOFT, WHITE

COLOURS = {"Python": GREY, "GPU": BLUE, "RAM": BLUE, "link": PURPLE, "disk": DARK}
HATCHES = {"disk": "/"}  # its grey and the blue are equally dark
ROW, LANE = 56, 11  # points from one option to the next, and of a lane
DECADES = 3  # of the axis, up to the longest time


def advice_figure(advice: Advice) -> Picture:
    """An advice as a picture: for each option a bar for each lane, its length the time of one token, on a log scale.

    The longest bar of an option is what a token takes. A star marks the front of speed, memory and quality.

    >>> from bigkit import advise
    >>> advice_figure(advise("llama-2-70b", "1 x RTX 4090"))  # doctest: +ELLIPSIS
    <Picture: Ways to run llama-2-70b on 1 x RTX 4090, best first: ... tokens a second, waiting for ...>
    """
    picture = Picture(advice.model, advice_label(advice), left=92, right=104)
    picture.head(f"{advice.batch} x {advice.context:,} tokens on {advice.hardware}")
    if not advice.options:
        picture.text(WIDTH / 2, picture.y + 12, "Nothing fits.", 12, anchor="middle")
        picture.y += 32
        return picture
    picture.legend([(lane, COLOURS[lane]) for lane in advice.options[0].waits], HATCHES)
    longest = max(option.token for option in advice.options)
    top = picture.y
    for option in advice.options:
        _draw_option(picture, option, longest)
        speed = f"{advice.batch / option.token:,.2f} tokens/s"
        picture.text(WIDTH - 8, picture.y - ROW / 2, speed, 9.5, anchor="end")
    _draw_axis(picture, longest, top)
    return picture


def _draw_option(picture: Picture, option: Option, longest: float) -> None:
    name = f"{'* ' if option.front else ''}{option.plan.quantization or option.plan.dtype}"
    picture.text(picture.left - 8, picture.y + ROW / 2, name, 9.5, anchor="end", bold=option.front)
    for i, (lane, seconds) in enumerate(option.waits.items()):
        width = _x(picture, seconds, longest) - picture.left
        if width > 0:
            y = picture.y + 5 + i * (LANE + 1)
            picture.box(lane, picture.left, y, width, LANE, COLOURS[lane], HATCHES.get(lane, ""), WHITE)
    picture.y += ROW


def _draw_axis(picture: Picture, longest: float, top: float) -> None:
    """A thin line for each power of ten, with its time below."""
    for power in range(math.ceil(math.log10(longest)) - DECADES, math.floor(math.log10(longest) + 1e-9) + 1):
        x = _x(picture, 10.0**power, longest)
        picture.box("grid", x - 0.25, top, 0.5, picture.y - top, GREY, depth=GROUND)
        time = format_seconds(10.0**power).replace(".00", "").replace(".0", "")
        picture.text(x, picture.y + 7, time, 8, SOFT, "middle")
    picture.line("frame", [(picture.left, top), (picture.left, picture.y)], BLACK, 0.8, depth=ABOVE)
    middle = picture.left + picture.room / 2
    picture.text(middle, picture.y + 21, "time for one token; the longest bar is what it takes", 8.5, SOFT, "middle")
    picture.y += 32


def _x(picture: Picture, seconds: float, longest: float) -> float:
    """Where a time lies on the axis; shorter ones than its start lie left of it."""
    share = 1 + math.log10(seconds / longest) / DECADES if seconds else 0
    return picture.left + share * picture.room


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
