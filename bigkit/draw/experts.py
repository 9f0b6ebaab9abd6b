"""The picture of a recorded routing, with its text twin: which experts a token takes, what a cache of them would have.

Leaves out: recording (`measure/routing.py`), what caches hold (`machine/routing.py`), controls
(`widgets/expert_explorer.py`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

from ..machine.mixture import Mixture, TokenTime
from ..machine.routing import Routing
from ..units import counted, format_bytes, format_seconds, text_table, three_figures
from .canvas import ABOVE, GROUND, TOP, WIDTH, Picture, shorten, text_width, time_unit
from .colours import BLACK, BLUE, GREEN, GREY, ORANGE, PALE, PURPLE, SKY, SOFT, TRACK, VERMILLION, YELLOW

LANES = {"GPU": BLUE, "disk": PALE, "link": YELLOW}
LINES = {"static": PURPLE, "LRU": BLUE, "best": GREEN}  # policies whose hit rate grows with the cache
DASHES = {"static": "2 2", "LRU": "", "best": "6 3"}
LETTER, CURVE, BAR = 12.0, 90.0, 17.0  # points: width of a token, height of the curves, and of a bar
MOST_CELLS = 1024  # that have marks
MARKS = {" ": "␣", "\n": "⏎", "\t": "⇥", "": "·"}


class Scene(NamedTuple):
    """What is drawn: a moment of a routing, a cache, and a token's time with each policy.

    Args:
        routing: what was recorded.
        token: number of the token that is shown.
        policy, slots: the cache.
        mixture: the model whose bytes travel.
        times: policy -> what a token waits for.
    """

    routing: Routing
    token: int
    policy: str
    slots: int
    mixture: Mixture
    times: Mapping[str, TokenTime]

    @property
    def asked(self) -> dict[int, bool]:
        """layer * experts + expert, for each that the token takes -> whether it was in the cache."""
        few = self.routing.layers * self.routing.per_token
        part = slice(self.token * few, (self.token + 1) * few)
        return dict(zip(self.routing.requests()[part], self.routing.hits(self.policy, self.slots)[part]))


def experts_figure(scene: Scene) -> Picture:
    """A routing as a picture: the text, the experts of each layer, the hit rate by size of the cache, a token's time.

    A bar in an expert's cell says how often it is chosen, compared with the most used one of its layer.

    >>> from bigkit.machine.mixture import token_time
    >>> routing = Routing("tiny", 4, (((0, 1), (0, 2), (0, 1)),), ("a", "b", "c"))
    >>> mixture = Mixture("tiny", 1, 4, 2, 9, 9)
    >>> rates = {"memory": 1e3, "link": 1e2}
    >>> times = {name: token_time(mixture, routing, name, 2, **rates) for name in ("static", "LRU", "best")}
    >>> experts_figure(Scene(routing, 2, "LRU", 2, mixture, times))  # doctest: +ELLIPSIS
    <Picture: tiny, token 3 of 3, 'c': of 2 experts 1 is in the cache and 1 travels. LRU has 33 % over the text; a ...>
    """
    routing, mixture = scene.routing, scene.mixture
    picture = Picture(f"Routing of {routing.model}", experts_label(scene), left=58, right=112)
    picture.head(f"{routing.shape}, {counted(routing.tokens, 'token')}; token {scene.token + 1}: {_news(scene)}")
    _draw_text(picture, scene)
    picture.legend(
        [("hit: was in the cache", GREEN), ("miss: travels", ORANGE), ("kept after this token", BLACK),
         ("how often", SKY), ("never chosen", GREY)],
        {"kept after this token": "-", "never chosen": "x"},
    )  # fmt: skip
    _draw_layers(picture, scene)
    picture.heading("Chosen experts that were in the cache, by its size as a share of all experts")
    _draw_curves(picture, scene)
    picture.heading(f"What a token of {mixture.model} waits for, without the time of Python")
    picture.legend([(lane, LANES[lane]) for lane in scene.times[scene.policy].waits])
    _draw_times(picture, scene)
    return picture


def experts_text(scene: Scene) -> str:
    """The text twin of `experts_figure`."""
    routing, asked, counts = scene.routing, scene.asked, scene.routing.counts
    rows = []
    for layer, row in enumerate(counts):
        own = {key % routing.experts: hit for key, hit in asked.items() if key // routing.experts == layer}
        there, travels = (", ".join(str(one) for one, hit in own.items() if hit is kind) for kind in (True, False))
        most = max(range(routing.experts), key=row.__getitem__)
        share = f"{most} ({_percent(row[most] / sum(row))})"
        never = ", ".join(str(expert) for expert, count in enumerate(row) if not count)
        rows.append([f"layer {layer}", there or "-", travels or "-", share, never or "-"])
    lines = [f"{routing.model}, token {scene.token + 1} of {routing.tokens}{_quoted(scene)}: {_news(scene)}"]
    lines += ["", text_table(["experts of", "in the cache", "travel", "most used", "never"], rows, "<<<<<"), ""]
    waits = list(scene.times[scene.policy].waits)
    rows = [
        [f"{policy}{' *' * (policy == scene.policy)}", _percent(time.hit_rate), format_bytes(time.travels, "si"),
         *(format_seconds(time.waits[lane]) for lane in waits), format_seconds(time.seconds), _speed(time)]
        for policy, time in scene.times.items()
    ]  # fmt: skip
    cache = format_bytes(scene.times[scene.policy].cache, "si")
    lines.append(f"{scene.mixture.model}, a cache of {_percent(_share(scene))} of all experts, {cache}; * is shown")
    lines += ["", text_table(["policy", "hits", "travels", *waits, "a token", "speed"], rows)]
    return "\n".join(lines)


def experts_label(scene: Scene) -> str:
    """One sentence for those who cannot see the picture of a routing."""
    time = scene.times[scene.policy]
    return (
        f"{scene.routing.model}, token {scene.token + 1} of {scene.routing.tokens}{_quoted(scene)}: {_news(scene)}. "
        f"{scene.policy} has {_percent(time.hit_rate)} over the text; a token of {scene.mixture.model} takes "
        f"{format_seconds(time.seconds)}, of which {format_seconds(time.waits['link'])} for the link."
    )


def _news(scene: Scene) -> str:
    asked = scene.asked
    there = sum(asked.values())
    away = len(asked) - there
    verb = "is" if there == 1 else "are"
    return f"of {len(asked)} experts {there} {verb} in the cache and {away} travel{'s' * (away == 1)}"


def _quoted(scene: Scene) -> str:
    return f", {scene.routing.text[scene.token]!r}" if scene.routing.text else ""


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _speed(time: TokenTime) -> str:
    return f"{three_figures(1 / time.seconds)} tokens/s"


def _share(scene: Scene) -> float:
    return scene.slots / scene.routing.all_experts


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def _draw_text(picture: Picture, scene: Scene) -> None:
    """The tokens around the one that is shown."""
    text = scene.routing.text
    if not text:
        return
    room = int((WIDTH - 16) / LETTER)
    start = max(0, min(scene.token - room // 2, len(text) - room))
    for i, token in enumerate(text[start : start + room]):
        x, now = 8 + i * LETTER, start + i == scene.token
        picture.box("token", x + 0.5, picture.y, LETTER - 1, 16, YELLOW if now else TRACK)
        word = "".join(MARKS.get(letter, letter) for letter in token) or MARKS[""]
        picture.mark(f"token:{start + i + 1}", f"Token {start + i + 1}: {token!r}.", x, picture.y, LETTER, 16)
        picture.text(x + LETTER / 2, picture.y + 8, shorten(word, LETTER, 8.5), 8.5, BLACK, "middle", bold=now)
    picture.y += 24


def _draw_layers(picture: Picture, scene: Scene) -> None:
    """A row for each layer, a cell for each expert."""
    routing, asked = scene.routing, scene.asked
    kept = routing.kept(scene.policy, scene.slots, scene.token)
    left, cell = 58.0, (WIDTH - 66.0) / routing.experts
    height = max(6.0, min(22.0, 220 / routing.layers))
    gap = min(1.5, cell / 8, height / 8)
    every = math.ceil((text_width(str(routing.experts - 1), 8) + 4) / cell)
    for expert in range(0, routing.experts, every):
        picture.text(left + (expert + 0.5) * cell, picture.y + 5, str(expert), 8, SOFT, "middle")
    picture.y += 13
    labels = math.ceil(10 / height)
    for layer, row in enumerate(routing.counts):
        if layer % labels == 0:
            picture.text(left - 6, picture.y + height / 2, f"layer {layer}", 9, anchor="end")
        for expert, count in enumerate(row):
            key, x, y = layer * routing.experts + expert, left + expert * cell + gap, picture.y + gap
            wide, tall = cell - 2 * gap, height - 2 * gap
            if routing.layers * routing.experts <= MOST_CELLS:
                says = _cell_text(scene, layer, expert, asked, kept)
                picture.mark(f"expert:{layer}:{expert}", says, x, y, wide, tall)
            ground = (GREEN if asked[key] else ORANGE) if key in asked else TRACK
            picture.box("cell", x, y, wide, tall, ground, "" if count else "x", GREY, depth=GROUND)
            full = tall * count / max(row)
            if key in asked:
                picture.label_in(x, y + tall / 2, wide, ("hit" if asked[key] else "miss",), 8, ground)
            else:
                picture.box("how often", x, y + tall - full, wide, full, SKY)
            if key in kept:
                picture.frame("kept", x, y, wide, tall, BLACK, 1.2, depth=ABOVE)
        picture.y += height
    picture.y += 6


def _cell_text(scene: Scene, layer: int, expert: int, asked: Mapping[int, bool], kept: Collection[int]) -> str:
    key, row = layer * scene.routing.experts + expert, scene.routing.counts[layer]
    news = "not chosen now" if key not in asked else "chosen, a hit" if asked[key] else "chosen, a miss: it travels"
    stays = ", kept after this token" if key in kept else ""
    return f"Layer {layer}, expert {expert}: {_percent(row[expert] / sum(row))} of its layer's choices, {news}{stays}."


def _draw_curves(picture: Picture, scene: Scene) -> None:
    """The hit rate of each policy over the size of the cache, with a mark where the scene is."""
    routing, top, bottom = scene.routing, picture.y, picture.y + CURVE
    sizes = sorted({round(i * routing.all_experts / 48) for i in range(49)})
    for rate in (0.0, 0.5, 1.0):
        picture.text(picture.left - 6, bottom - rate * CURVE, _percent(rate), 8, SOFT, "end")
        picture.box("grid", picture.left, bottom - rate * CURVE - 0.25, picture.room, 0.5, GREY, depth=GROUND)
    for policy, colour in LINES.items():
        rates = [routing.hit_rate(policy, size) for size in sizes]
        points = [(picture.left + picture.room * size / routing.all_experts, bottom - rate * CURVE)
                  for size, rate in zip(sizes, rates)]  # fmt: skip
        picture.line(policy, points, colour, 2.4 if policy == scene.policy else 1.4, DASHES[policy], depth=ABOVE)
    x, y = picture.left + picture.room * _share(scene), bottom - scene.times[scene.policy].hit_rate * CURVE
    picture.line("now", [(x, top), (x, bottom)], VERMILLION, 1)
    picture.line("now", [(x - 4, y), (x, y - 4), (x + 4, y), (x, y + 4)], VERMILLION, depth=TOP + 1)
    for i, (policy, colour) in enumerate(LINES.items()):
        y = top + 12 + 18 * i
        start = WIDTH - picture.right + 10
        picture.line("key", [(start, y), (start + 20, y)], colour, 2, DASHES[policy])
        words = f"{policy} {_percent(scene.times[policy].hit_rate)}"
        picture.text(start + 26, y, words, 9, bold=policy == scene.policy)
    picture.y = bottom
    picture.axis(100, "%", top)


def _draw_times(picture: Picture, scene: Scene) -> None:
    """A bar for each policy: what a token waits for, one after the other."""
    longest, top = max(time.seconds for time in scene.times.values()), picture.y
    for policy, time in scene.times.items():
        x, middle, shown = picture.left, picture.y + BAR / 2, policy == scene.policy
        picture.text(picture.left - 6, middle, policy, 9.5, anchor="end", bold=shown)
        for lane, seconds in time.waits.items():
            width = picture.room * seconds / longest
            picture.box(lane, x, picture.y + 2, width, BAR - 4, LANES[lane])
            says = f"{policy}: {lane} takes {format_seconds(seconds)} of {format_seconds(time.seconds)} a token."
            picture.mark(f"time:{policy}:{lane}", says, x, picture.y, width, BAR)
            picture.label_in(x, middle, width, (format_seconds(seconds),), 8, LANES[lane])
            x += width
        picture.text(WIDTH - 8, middle, _speed(time), 9.5, anchor="end", bold=shown)
        picture.y += BAR
    unit, name = time_unit(longest)
    picture.axis(longest / unit, name, top)
