"""Draw the moving picture of the README, notebooks/images/moving.svg, from a plan and its schedule.

    .venv/bin/python scripts/draw_readme.py

The plan is bigkit's for the model and the machine below; the schedule has its layers, its slots and the machine's
rates. Animations are SMIL, which runs in an `<img>`; where it does not, the picture stands at a moment of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import bigkit
from bigkit.devices import device_label
from bigkit.draw.bars import PART_COLOURS
from bigkit.draw.colours import BLACK, BLUE, GREEN, GREY, ORANGE, PALE, SOFT, TRACK, VERMILLION, WHITE, YELLOW, ink
from bigkit.draw.plan import PARTS
from bigkit.machine.hardware import machine_of
from bigkit.machine.streams import Schedule, Span, Turn, schedule
from bigkit.maps.plan import Plan
from bigkit.units import MiB, format_bytes, format_seconds

PATH = Path(__file__).resolve().parent.parent / "notebooks" / "images" / "moving.svg"
MODEL, MACHINE, PROMPT = "llama-3.1-8b", "RTX 3060 12GB", 1024  # tokens that the run reads

WIDTH, HEIGHT = 900, 408
LEFT, RIGHT = 76, 800  # of the columns and the axis
BOX = 18
ROWS = {"GPU": 148, "slot 0": 178, "slot 1": 208, "RAM": 238}  # y of each place
LANES = {"work": 286, "copies": 312}
PLAY, HOLD = 12.0, 2.0  # seconds that the run takes in the picture, and that it then stands still
POSTER = 0.4  # share of the run that has passed where nothing moves


def run(tokens: int) -> tuple[Plan, Schedule]:
    """The plan, and when what happens in one pass over so many tokens. Layers of less than a MiB are left out.

    A layer takes the longer of two times: to read its weights, and to multiply every token with them.
    """
    machine = machine_of(MACHINE)
    gpu = machine.gpus[0]
    plan = bigkit.plan(MODEL, hardware=machine, context=4 * PROMPT)
    turns = []
    for layer in plan.layers:
        if layer.bytes > MiB:  # two bytes a weight; all layers but the embedding and the head see every token
            products = 0 if "embed" in layer.name or "head" in layer.name else 2 * layer.bytes / 2 * tokens
            seconds = max(layer.bytes / gpu.bandwidth, products / gpu.flops)
            turns.append(Turn(layer.name, layer.bytes, seconds, layer.device))
    return plan, schedule(turns, link=gpu.link, slots=plan.slots)


class Film:
    """SVG elements whose looks change over the run; `seconds` of the run last `PLAY` seconds in the picture."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def share(self, time: float) -> float:
        """A time of the run as a share of the picture's."""
        return time / self.seconds * PLAY / (PLAY + HOLD)

    def animate(self, attribute: str, values: Sequence[tuple[float, str]], smooth: bool = False) -> str:
        """An attribute that has these values from these times on, or moves between them."""
        if values[0][0] > 0:
            values = [(0.0, values[0][1]), *values]
        if smooth:
            values = [*values, (self.seconds * (PLAY + HOLD) / PLAY, values[-1][1])]
        texts, times = ";".join(value for _, value in values), ";".join(f"{self.share(t):.4f}" for t, _ in values)
        kind = 'animateTransform type="translate"' if attribute == "transform" else "animate"
        mode = "linear" if smooth else "discrete"
        return (f'<{kind} attributeName="{attribute}" values="{texts}" keyTimes="{times}" calcMode="{mode}" '
                f'dur="{PLAY + HOLD:g}s" repeatCount="indefinite"/>')  # fmt: skip

    def box(self, x: float, y: float, width: float, colour: str, label: str, inside: str = "", more: str = "",
            dark: bool = False) -> str:  # fmt: skip
        """A box with a label in its middle."""
        rect = f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BOX}" rx="2" fill="{colour}">{inside}</rect>'
        return f"<g{more}>{rect}{words(x + width / 2, y + 13, label, 9, WHITE if dark else ink(colour), 'middle')}</g>"


def words(x: float, y: float, text: str, size: float = 12, colour: str = BLACK, anchor: str = "start",
          bold: bool = False) -> str:  # fmt: skip
    """A text whose base line is at `y`."""
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>{text}</text>'


def budget(plan: Plan) -> Iterator[str]:
    """The GPU's memory: what fills it, against what it has."""
    share = plan.shares[0]
    assert share.budget is not None
    scale, x, y = (RIGHT - LEFT) / share.budget, float(LEFT), 84
    yield words(LEFT - 10, y + 13, device_label(share.device), anchor="end")
    yield f'<rect x="{LEFT}" y="{y}" width="{RIGHT - LEFT}" height="{BOX}" fill="{TRACK}"/>'
    for part, name in PARTS.items():
        size = getattr(share, part)
        colour = {"weights": BLUE, "reserve": YELLOW, "activations": PALE}.get(part, PART_COLOURS[name])
        known = {"weights": f"weights {format_bytes(size)}", "reserve": f"{plan.slots} slots", "overhead": "CUDA"}
        label = {**known, "kv_cache": "KV"}.get(part, "")
        yield f'<rect x="{x:.1f}" y="{y}" width="{size * scale:.1f}" height="{BOX}" fill="{colour}" stroke="{WHITE}"/>'
        yield words(x + size * scale / 2, y + 13, label, 9.5, ink(colour), "middle")
        x += size * scale
    yield f'<path d="M{RIGHT} {y - 5}v{BOX + 10}" stroke="{BLACK}" stroke-width="2"/>'
    yield words(RIGHT + 8, y + 13, f"of {format_bytes(share.budget)}")


def theatre(film: Film, plan: Plan, played: Schedule) -> Iterator[str]:
    """A column for each layer, a row for each place: what rests where, and what travels into which slot."""
    column = (RIGHT - LEFT) / len(played.turns)
    now = POSTER * film.seconds
    copies = {span.turn: span for span in played.spans if span.lane == "link"}
    for name, y in ROWS.items():
        size = sum(turn.nbytes for turn in played.turns if device_label(turn.rests).startswith(name))
        yield words(LEFT - 10, y + 13, name, colour=SOFT if "slot" in name else BLACK, anchor="end")
        yield words(RIGHT + 8, y + 13, format_bytes(size)) if size else ""
        if "slot" in name:
            yield f'<path d="M{LEFT} {y + BOX / 2}H{RIGHT}" stroke="{TRACK}" stroke-width="3"/>'
    for span in played.spans:
        if span.lane != "compute":
            continue
        turn, x = played.turns[span.turn], LEFT + span.turn * column + 1
        last = turn.name.rpartition(".")[2]
        label = last if last.isdigit() else ""
        home = ROWS["RAM" if turn.travels else "GPU"]
        rest = GREY if turn.travels else BLUE
        if not turn.travels:
            looks = [(0.0, rest), (span.start, ORANGE), (span.end, rest)]
            yield film.box(x, home, column - 2, at(looks, now), label, film.animate("fill", looks), dark=True)
            continue
        yield film.box(x, home, column - 2, rest, label)
        yield flight(film, x, column - 2, label, copies[span.turn], span, now)


def flight(film: Film, x: float, width: float, label: str, copy: Span, work: Span, now: float) -> str:
    """A layer's visit: its bytes move up into a slot, wait there, work, and are gone."""
    y = ROWS[f"slot {copy.slot}"]
    far = ROWS["RAM"] - y
    fills = [(0.0, YELLOW), (copy.end, GREEN), (work.start, ORANGE), (work.end, YELLOW)]
    shown = [(0.0, "0"), (copy.start, "1"), (work.end, "0")]
    moves = [(copy.start, f"0 {far}"), (copy.end, "0 0")]
    way = max(0.0, min(1.0, (copy.end - now) / (copy.end - copy.start)))
    more = f' opacity="{at(shown, now)}" transform="translate(0 {far * way:.1f})"'
    inside = film.animate("fill", fills)
    moving = film.animate("opacity", shown) + film.animate("transform", moves, smooth=True)
    return film.box(x, y, width, at(fills, now), label, inside, more).removesuffix("</g>") + moving + "</g>"


def at(values: Sequence[tuple[float, str]], now: float) -> str:
    """The value that holds at a moment."""
    return [value for time, value in values if time <= now][-1]


def clock(film: Film, played: Schedule) -> Iterator[str]:
    """What works and what is copied over time, with a line at the moment."""
    scale = (RIGHT - LEFT) / film.seconds
    for name, y in LANES.items():
        lane = {"work": "compute", "copies": "link"}[name]
        busy = 100 * played.busy[lane] / film.seconds
        yield words(LEFT - 10, y + 13, name, anchor="end")
        yield words(RIGHT + 8, y + 13, f"busy {busy:.0f} %")
        yield f'<rect x="{LEFT}" y="{y}" width="{RIGHT - LEFT}" height="{BOX}" fill="{TRACK}"/>'
        for span in played.spans:
            if span.lane == lane:
                travels = played.turns[span.turn].travels
                colour = YELLOW if lane == "link" else ORANGE if travels else BLUE
                x, width = LEFT + span.start * scale, max(0.5, (span.end - span.start) * scale - 0.6)
                yield f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BOX}" fill="{colour}"/>'
    top, height, path = LANES["work"] - 5, 54, film.animate(
        "transform", [(0.0, "0 0"), (film.seconds, f"{RIGHT - LEFT} 0")], smooth=True
    )  # fmt: skip
    x = POSTER * (RIGHT - LEFT)
    yield (f'<g transform="translate({x:.1f} 0)"><path d="M{LEFT} {top}v{height}" stroke="{VERMILLION}" '
           f'stroke-width="2"/>{path}</g>')  # fmt: skip


def draw(plan: Plan, played: Schedule, token: float) -> str:
    """The whole picture as SVG text; `token` is the seconds of a token after the prompt."""
    film = Film(played.seconds)
    away = sum(turn.nbytes for turn in played.turns if turn.travels)
    whole = format_bytes(sum(turn.nbytes for turn in played.turns))
    title = f"{MODEL} has {whole} of weights. This GPU has {format_bytes(plan.shares[0].budget or 0)}, and it runs."
    label = (f"{title} {format_bytes(away)} rest in RAM, and each of those layers arrives in one of two slots just "
             f"before it works. A prompt of {PROMPT:,} tokens takes {format_seconds(played.seconds)}.")  # fmt: skip
    legend = [(BLUE, "rests on the GPU"), (GREY, "rests in RAM"), (YELLOW, "on its way"), (GREEN, "ready"),
              (ORANGE, "works")]  # fmt: skip
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f"font-family=\"'DejaVu Sans', Verdana, sans-serif\"><title>{label}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{WHITE}"/>',
        words(16, 28, title, 16, bold=True),
        words(16, 50, f"bigkit’s plan: {format_bytes(away)} rest in RAM, spread evenly, and each layer of it arrives "
              "in a slot just before it works.", 12.5, SOFT),
        *budget(plan),
    ]  # fmt: skip
    x = float(LEFT)
    for colour, text in legend:
        parts += [f'<rect x="{x}" y="119" width="12" height="12" rx="2" fill="{colour}"/>',
                  words(x + 17, 130, text, 11, SOFT)]  # fmt: skip
        x += 44 + 6.4 * len(text)
    parts += [*theatre(film, plan, played), *clock(film, played)]
    parts += [
        words(LEFT, 362, f"A prompt of {PROMPT:,} tokens takes {format_seconds(played.seconds)}, as if all were on the "
              f"GPU. A token after it takes {format_seconds(token)}: that of the copies.", 12),
        words(LEFT, 384, f"1 x {MACHINE}, weights in bfloat16; times follow the vendor’s rates, and pass "
              f"{PLAY / film.seconds:.0f} times slower here.", 11, SOFT),
        "</svg>",
    ]  # fmt: skip
    return "\n".join(part for part in parts if part) + "\n"


def main() -> None:
    """Write the picture, and say what it shows."""
    plan, played = run(PROMPT)
    alone = sum(turn.seconds for turn in played.turns)
    assert played.seconds < 1.001 * alone, "the picture says that the copies hide behind the work"
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(draw(plan, played, run(1)[1].seconds), encoding="utf-8")
    print(f"{PATH.name}: {plan!r}, {format_seconds(played.seconds)}")


if __name__ == "__main__":
    main()
