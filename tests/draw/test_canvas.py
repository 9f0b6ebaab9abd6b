"""A picture becomes one SVG element: accessible, escaped, the same each time, and without other libraries."""

from __future__ import annotations

import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from bigkit import HARDWARE, advise, describe, dry_run, plan
from bigkit.checkpoints.shards import cut
from bigkit.draw.advice import advice_figure
from bigkit.draw.canvas import WIDTH, Picture, shorten, text_width, ticks
from bigkit.draw.colours import BLUE, WHITE
from bigkit.draw.dryrun import dryrun_figure
from bigkit.draw.plan import plan_figure
from bigkit.draw.run import gantt_figure, run_figure
from bigkit.draw.shards import shards_figure
from bigkit.draw.study import study_figure
from bigkit.machine.streams import Turn, schedule

EVIL = "<script>alert('1')</script> & \"quotes\" ]]> \x00\x1b \udc80 é 中"


def evil_pictures() -> dict[str, Picture]:
    """Pictures of all topics that can hold text from outside, with such a text in every place."""
    from bigkit.quantize.study import Sample, Scheme, planted, study

    spec = replace(describe("gpt2"), name=EVIL)
    p = plan(spec, {0: "300MiB", 1: "300MiB"})
    evil_plan = replace(p, model=EVIL, layers=tuple(replace(layer, name=EVIL) for layer in p.layers))
    charts = {EVIL: schedule([Turn(EVIL, 10**9, 0.01, "cpu"), Turn(EVIL, 10**9, 0.01, 0)], link=50e9)}
    sample = planted()
    layer = study(Sample(EVIL, sample.weight, sample.inputs), Scheme("nf4"))
    run = replace(dry_run("pygpt", batch_size=1, prompt_tokens=8), model=EVIL, hardware=EVIL)
    return {
        "plan": plan_figure(evil_plan),
        "shards": shards_figure(replace(cut({EVIL: 10, "b": 5}, 8), model=EVIL), EVIL[:8]),
        "run": run_figure(charts, EVIL, 1, EVIL),
        "gantt": gantt_figure(charts, EVIL),
        "study": study_figure(layer, {EVIL: 0.1}),
        "dryrun": dryrun_figure(run),
        "advice": advice_figure(replace(advise("gpt2", "1 x RTX 4090"), model=EVIL, hardware=EVIL)),
    }


def test_text_from_outside_is_escaped_everywhere() -> None:
    for topic, picture in evil_pictures().items():
        text = picture.svg
        text.encode()
        assert "<script" not in text, topic
        root = ElementTree.fromstring(text)
        tags = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert tags == {"svg", "title", "path", "text", *({"g", "rect"} if picture.marks else ())}, topic
        for mark in picture.marks:
            assert mark.says.endswith("."), "a mark says a sentence"
            assert mark.x >= 0 and mark.x + mark.width <= WIDTH and 0 <= mark.y < picture.y, f"{topic}: {mark.key}"
        assert "<script>" in "".join(root.itertext()), f"{topic}: text stays text"
        assert set(root.attrib) == {"role", "aria-label", "viewBox", "width", "style", "font-family"}
        for span in (text.span for text in picture.texts):
            assert span[0] >= 0 and span[1] <= WIDTH, f"{topic}: a text leaves the picture"


def test_svg_is_one_accessible_element() -> None:
    picture = Picture("a title", 'a label "<&')
    picture.box("bar", 10, 10, 20, 5, BLUE, "x")
    picture.line("line", [(0, 0), (5, 0), (5, 7.123), (8, 9)], BLUE, 1, "4 2")
    picture.text(10, 20, "hatched", plate=True)
    text = picture.svg
    assert text.startswith("<svg ") and text.endswith("</svg>") and "M0 0L5 0L5 7.12L8 9" in text
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("role") == "img"
    assert root.get("aria-label") == 'a label "<&' and root[0].text == "a title"
    assert "id=" not in text and "url(" not in text, "several pictures of a page cannot disturb each other"
    assert picture._repr_html_() == text and repr(picture) == '<Picture: a label "<&>'


def test_hatches_lie_over_their_box_and_stay_inside() -> None:
    picture = Picture("", "")
    for hatch in "/x":
        picture.shapes.clear()
        picture.box("bar", 13, 11, 60, 9, WHITE, hatch)
        fill, strokes = (line for line in picture.svg.splitlines()[3:] if line.startswith("<path"))
        assert WHITE in fill and "stroke=" in strokes
        lines = [part.split("L") for part in strokes.split('d="')[1].rstrip('"/>').split("M") if "L" in part]
        assert len(lines) >= 12 * (1 + (hatch == "x"))
        for x, y in (map(float, point.split()) for line in lines for point in line):
            assert 13 <= x <= 73 and 11 <= y <= 20


def test_a_picture_is_saved(tmp_path: Path) -> None:
    picture = plan_figure(plan("gpt2", {0: "1GiB"}))
    path = picture.save(tmp_path / "plan.svg")
    assert ElementTree.parse(path).getroot().get("aria-label") == picture.label
    with pytest.raises(ValueError, match=r"'plan\.png': expected a name that ends in \.svg"):
        picture.save(tmp_path / "plan.png")


def test_pictures_need_no_other_library() -> None:
    code = (
        "import sys\nfrom bigkit import plan\nfrom bigkit.draw.plan import plan_figure\n"
        "plan_figure(plan('gpt2', {0: '1GiB'})).svg\n"
        "print([name for name in ('torch', 'matplotlib', 'numpy', 'ipywidgets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_redraw_takes_a_few_milliseconds() -> None:
    large = plan("llama-3.1-405b", HARDWARE["8 x A100-80GB"].max_memory(), dtype="bfloat16", context=4096)
    assert plan_figure(large).svg == plan_figure(large).svg
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert plan_figure(large).svg
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05, "matplotlib took twice as long"


def test_measures() -> None:
    assert text_width("W", 10) > text_width("i", 10) and text_width("中", 10) == 10
    assert shorten("short", 100, 10) == "short" and shorten("x" * 10_000, 60, 10).count("x") < 12
    assert shorten("anything", 0, 10) == "…"
    for longest in (1e-6, 0.07, 1, 9.99, 10, 12345):
        for parts in (2, 4):
            values = ticks(longest, parts)
            assert parts < len(values) <= 3 * parts and values[-1] <= longest * (1 + 1e-9)
