"""What is drawn of a routing is what was recorded, and the text says the same."""

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter

import pytest

from bigkit.draw.canvas import WIDTH, Box, Line
from bigkit.draw.colours import GREEN, ORANGE
from bigkit.draw.experts import LANES, Scene, experts_figure, experts_label, experts_text
from bigkit.machine.mixture import Mixture, token_time
from bigkit.machine.routing import POLICIES, Routing
from bigkit.units import format_seconds
from bigkit.widgets.expert_explorer import ROUTING


def scene(routing, token, policy, slots, disk=None):
    mixture = Mixture("a model", 10, 16, 2, 10**6, 10**7)
    rates = {"memory": 1e12, "link": 2e10, "disk": disk}
    times = {name: token_time(mixture, routing, name, slots, **rates) for name in POLICIES}
    return Scene(routing, token, policy, slots, mixture, times)


def wide():
    """60 layers of 128 experts, 8 at work, without a text."""
    chosen = tuple(tuple(tuple((7 * layer + 5 * token + 3 * i) % 128 for i in range(8)) for token in range(4))
                   for layer in range(60))  # fmt: skip
    return Routing("<b>wide & deep</b>", 128, chosen)


SCENES = {
    "pymoe": lambda: scene(Routing.load(ROUTING), 200, "LRU", 24),
    "from disk": lambda: scene(Routing.load(ROUTING), 511, "best", 40, disk=3e9),
    "no cache": lambda: scene(Routing.load(ROUTING), 0, "none", 96),
    "everything": lambda: scene(Routing.load(ROUTING), 300, "static", 96),
    "wide": lambda: scene(wide(), 3, "LRU", 1000),
    "one of one": lambda: scene(Routing("m", 1, (((0,),),), ("é\n",)), 0, "LRU", 1),
}


@pytest.fixture(params=SCENES)
def shown(request):
    return SCENES[request.param]()


def boxes(picture, kind):
    return [shape for shape in picture.shapes if isinstance(shape, Box) and shape.kind == kind]


def test_cells_are_what_was_recorded(shown):
    routing, picture = shown.routing, experts_figure(shown)
    cells = boxes(picture, "cell")
    assert len(cells) == routing.all_experts
    asked = [number for number, cell in enumerate(cells) if cell.colour in (GREEN, ORANGE)]
    chosen = {
        layer * routing.experts + expert for layer, row in enumerate(routing.chosen) for expert in row[shown.token]
    }
    assert set(asked) == chosen == set(shown.asked)
    assert [cells[number].colour == GREEN for number in sorted(asked)] == [shown.asked[key] for key in sorted(asked)]
    counts = Counter(routing.requests())
    assert all((cell.hatch == "x") == (number not in counts) for number, cell in enumerate(cells))
    kept = [line for line in picture.shapes if isinstance(line, Line) and line.kind == "kept"]
    assert len(kept) == len(routing.kept(shown.policy, shown.slots, shown.token)) <= shown.slots
    columns, rows = {}, routing.counts
    for number, cell in enumerate(cells):
        columns.setdefault(cell.x, []).append((number, cell))
    for bar in boxes(picture, "how often"):
        number, cell = next(one for one in columns[bar.x] if -1e-6 <= bar.y - one[1].y <= one[1].height + 1e-6)
        row = rows[number // routing.experts]
        assert bar.height / cell.height == pytest.approx(row[number % routing.experts] / max(row))


def test_bars_are_as_long_as_they_last(shown):
    picture = experts_figure(shown)
    longest = max(time.seconds for time in shown.times.values())
    for lane in LANES:
        widths = [box.width for box in boxes(picture, lane)]
        seconds = [time.waits[lane] for time in shown.times.values() if lane in time.waits]
        assert widths == pytest.approx([picture.room * value / longest for value in seconds])


def test_nothing_leaves_the_picture(shown):
    picture = experts_figure(shown)
    for shape in picture.shapes:
        points = shape.points if isinstance(shape, Line) else [(shape.x, shape.y), (shape.x + shape.width, shape.y)]
        assert all(-0.01 <= x <= WIDTH + 0.01 and 0 <= y <= picture.y for x, y in points), shape
    assert all(0 <= text.span[0] and text.span[1] <= WIDTH for text in picture.texts), picture.texts
    rows = sorted(picture.texts, key=lambda text: (text.y, text.x))
    for one, other in zip(rows, rows[1:]):
        assert one.y != other.y or one.span[1] <= other.span[0] + 1, f"{one.text} runs into {other.text}"
    root = ElementTree.fromstring(picture.svg)
    assert root.get("role") == "img" and root.get("aria-label") == experts_label(shown)


def test_the_text_says_the_same(shown):
    text, routing = experts_text(shown), shown.routing
    hits = sum(shown.asked.values())
    assert f"of {len(shown.asked)} experts {hits} " in text.splitlines()[0]
    assert f"of {len(shown.asked)} experts {hits} " in experts_label(shown)
    for layer, row in enumerate(routing.counts):
        line = next(line for line in text.splitlines() if re.match(rf"layer {layer} ", line))
        travels = [key % routing.experts for key, hit in shown.asked.items()
                   if key // routing.experts == layer and not hit]  # fmt: skip
        assert ", ".join(map(str, travels)) in line and f"{max(row) / sum(row):.0%}".replace("%", " %") in line
    for policy, time in shown.times.items():
        line = next(line for line in text.splitlines() if line.startswith(policy))
        assert format_seconds(time.seconds) in line and f"{100 * time.hit_rate:.0f} %" in line
        assert ("*" in line) == (policy == shown.policy)
