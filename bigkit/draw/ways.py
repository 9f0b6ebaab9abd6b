"""What links, GPUs and the CPU do for a token, way by way (`machine/ways.py`), on one scale, with a text twin.

Leaves out: the slots, and every moment of a run (`draw/run.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

from ..machine.streams import Span
from ..machine.ways import Way
from ..units import format_seconds, text_table
from .canvas import ABOVE, GROUND, WIDTH, Picture, shorten, time_unit
from .colours import BLACK, GREEN, ORANGE, SOFT, TRACK, WHITE, YELLOW

LANE = 15
_KINDS = {"link": ("copied to a GPU", YELLOW), "GPU": ("works on a GPU", ORANGE), "CPU": ("works in RAM", GREEN)}
_DOES = {"link": "travels", "GPU": "works on the GPU", "CPU": "has its MLP computed by the CPU"}


def ways_figure(ways: Mapping[str, Way], title: str, names: str = "h.") -> Picture:
    """For each way, what every lane does over time.

    Args:
        ways: a name for each.
        title: what all of them run.
        names: what the names of the blocks begin with.

    >>> from bigkit.machine.ways import play
    >>> ways_figure({f"{n} GPU": play(4, 1e9, 0.01, 50e9, gpus=n) for n in (1, 2)}, "Four blocks")
    <Picture: Four blocks. A token takes: 1 GPU 80.0 ms, 2 GPU 40.0 ms.>
    """
    times = ", ".join(f"{name} {format_seconds(way.per_token)}" for name, way in ways.items())
    picture = Picture(title, f"{title}. A token takes: {times}.", left=50, right=74)
    picture.head()
    kinds = {_kind(span) for way in ways.values() for span in way.spans}
    picture.legend([entry for kind, entry in _KINDS.items() if kind in kinds])
    longest = max(way.ends[-1] for way in ways.values())
    for name, way in ways.items():
        text = f"{name}: {format_seconds(way.per_token)} for the last token"
        picture.text(8, picture.y + 9, shorten(text, WIDTH - 16, 9.5), 9.5)
        picture.y += 19
        begin = picture.y
        for lane in _lanes(way):
            _draw_lane(picture, way, lane, longest, names)
        for end in way.ends:
            x = picture.left + picture.room * end / longest
            picture.line("token", [(x, begin - 2), (x, picture.y)], BLACK, 1.2)
        picture.y += 4
    unit, unit_name = time_unit(longest)
    picture.axis(longest / unit, unit_name, picture.y - 2)  # no lines through the names above
    return picture


def ways_text(ways: Mapping[str, Way]) -> str:
    """The text twin of `ways_figure`: a token's time, and the share of it that each lane is busy.

    >>> from bigkit.machine.ways import play
    >>> print(ways_text({"streamed": play(4, 1e9, 0.01, 50e9)}))
    way       a token  link 0 busy  GPU 0 busy  CPU busy
    --------  -------  -----------  ----------  --------
    streamed  80.0 ms        100 %        50 %       0 %
    """
    lanes = list(dict.fromkeys([lane for way in ways.values() for lane in _lanes(way)] + ["CPU"]))
    rows = [
        [name, format_seconds(way.per_token), *(f"{100 * busy(way, lane):.0f} %" for lane in lanes)]
        for name, way in ways.items()
    ]
    return text_table(["way", "a token", *(f"{lane} busy" for lane in lanes)], rows)


def busy(way: Way, lane: str) -> float:
    """The share of a token's time that a lane does something, over the tokens after the first."""
    last = len(way.ends) - 1
    return sum(span.end - span.start for span in way.spans if span.lane == lane and span.token == last) / way.per_token


def _lanes(way: Way) -> list[str]:
    """GPUs with their links first, then the CPU."""
    lanes = {span.lane for span in way.spans}
    return sorted(lanes, key=lambda lane: (lane == "CPU", lane.rpartition(" ")[2], lane.startswith("GPU")))


def _kind(span: Span) -> str:
    return span.lane.partition(" ")[0]


def _draw_lane(picture: Picture, way: Way, lane: str, longest: float, names: str) -> None:
    middle, top, height, scale = picture.y + LANE / 2, picture.y + 1, LANE - 2, picture.room / longest
    picture.text(picture.left - 6, middle, lane, 9, anchor="end")
    picture.box("room", picture.left, top, way.ends[-1] * scale, height, TRACK, depth=GROUND)
    picture.text(WIDTH - 8, middle, f"busy {min(100, round(100 * busy(way, lane)))} %", 9, SOFT, "end")
    for span in way.spans:
        if span.lane != lane or span.start >= way.ends[-1]:
            continue
        kind, x = _kind(span), picture.left + span.start * scale
        wide = (min(span.end, way.ends[-1]) - span.start) * scale
        colour = _KINDS[kind][1]
        picture.box(kind, x, top, wide, height, colour)
        lasts = f"{format_seconds(span.end - span.start)}, from {format_seconds(span.start)} on"
        picture.mark(f"span:{lane}:{span.turn}", f"{names}{span.turn} {_DOES[kind]} for {lasts}.", x, top, wide, height)
        if wide > 2:
            picture.box("seams", x + wide - 0.5, top, 0.5, height, WHITE, depth=ABOVE)
        picture.label_in(x, middle, wide, (str(span.turn),), 7.5, colour, margin=1)
    picture.y += LANE
