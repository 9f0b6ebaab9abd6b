"""The picture of an advice: what a token waits for, option by option. Its text twin is `Advice.explain`.

Leaves out: finding the options (`maps/advise.py`), and controls (`widgets/advisor.py`).
"""

from __future__ import annotations

from ..maps.advise import Advice, Option
from ..model.estimate import load_text
from ..units import format_seconds
from .canvas import ABOVE, WIDTH, Picture
from .colours import BLACK, BLUE, DARK, GREY, PURPLE, SOFT, WHITE
from .plan import plan_verdict

COLOURS = {"Python": GREY, "GPU": BLUE, "RAM": BLUE, "link": PURPLE, "disk": DARK}
HATCHES = {"disk": "/"}  # its grey and the blue are equally dark
ROW, LANE = 56, 11  # points from one option to the next, and of a lane
NUMBER = 46  # points kept free for the number behind the longest bar


def advice_figure(advice: Advice) -> Picture:
    """An advice as a picture: for each option a bar for each lane, its length the time of one token (of a model that
    does not generate: of one pass), with the number behind it.

    The longest bar of an option is what a token takes. A star: whatever is better by the target loses more quality.

    >>> from bigkit import advise
    >>> advice_figure(advise("llama-2-70b", "1 x RTX 4090"))  # doctest: +ELLIPSIS
    <Picture: Ways to run llama-2-70b on 1 x RTX 4090, best first: ... tokens/s, waiting for ...>
    """
    picture = Picture(advice.model, advice_label(advice), left=92, right=104)
    picture.head(f"{load_text(advice.batch, advice.context, advice.kv_dtype)} on {advice.hardware}")
    if not advice.options:
        picture.text(WIDTH / 2, picture.y + 12, "Nothing fits.", 12, anchor="middle")
        picture.y += 32
        return picture
    picture.legend([(lane, COLOURS[lane]) for lane in advice.options[0].waits], HATCHES)
    scale = (picture.room - NUMBER) / max(max(option.waits.values()) for option in advice.options)
    for option in advice.options:
        _draw_option(picture, option, scale)
    whole = "one pass" if advice.options[0].token is None else "one token"
    picture.text(picture.left, picture.y + 7, f"time for {whole}; the longest bar is what it takes", 8.5, SOFT)
    picture.y += 18
    return picture


def _draw_option(picture: Picture, option: Option, scale: float) -> None:
    """A bar for each lane, as long as its time, which is written behind it."""
    name = f"{'* ' if option.front else ''}{option.plan.stored}"
    says = f"{option.plan.stored}: {option.speed}, waiting for {option.bottleneck}. {plan_verdict(option.plan)}."
    picture.mark(f"option:{option.plan.stored}", says, 0, picture.y, WIDTH, ROW)
    picture.text(picture.left - 8, picture.y + ROW / 2, name, 9.5, anchor="end", bold=option.front)
    picture.text(WIDTH - 8, picture.y + ROW / 2, option.speed, 9.5, anchor="end")
    for i, (lane, seconds) in enumerate(option.waits.items()):
        if seconds:
            y = picture.y + 5 + i * (LANE + 1)
            says = f"{option.plan.stored}: {lane} takes {format_seconds(seconds)}."
            picture.mark(f"option:{option.plan.stored}:{lane}", says, picture.left, y, seconds * scale, LANE)
            picture.box(lane, picture.left, y, seconds * scale, LANE, COLOURS[lane], HATCHES.get(lane, ""), WHITE)
            picture.text(picture.left + seconds * scale + 4, y + LANE / 2, format_seconds(seconds), 8, SOFT)
    picture.line("frame", [(picture.left, picture.y), (picture.left, picture.y + ROW)], BLACK, 0.8, depth=ABOVE)
    picture.y += ROW


def advice_label(advice: Advice) -> str:
    """One sentence for those who cannot see the picture of an advice."""
    if advice.best is None:
        return f"Nothing fits: {advice.model} on {advice.hardware}."
    options = ", ".join(
        f"{option.plan.stored} {option.speed}, waiting for {option.bottleneck}" for option in advice.options
    )
    return f"Ways to run {advice.model} on {advice.hardware}, best first: {options}."
