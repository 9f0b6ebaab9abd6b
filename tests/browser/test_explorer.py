"""Explorers in a real browser: what a hand does in them, with mouse and keyboard, and what is seen.

One notebook holds them; it is run once, and each test goes on from there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

    from tests.browser.lab import Lab, LabNotebook

CELLS = {
    "plan": "PlanExplorer('llama-2-7b', {0: '10GiB', 1: '10GiB', 'cpu': '32GiB'}, dtype='float16')",
    "theatre": "HookTheatre()",
    "run": "DryRunExplorer('gpt2', batch=1, prompt=64, new=1)",
}


def write_notebook(path: Path, *sources: str) -> str:
    """A notebook with one code cell for each source; returns its name."""
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(metadata=metadata, cells=[*map(nbformat.v4.new_code_cell, sources)]), path)
    return path.name


class Course:
    """A notebook with explorers, open in a browser."""

    def __init__(self, notebook: LabNotebook, still: bool) -> None:
        self.notebook, self.page, self.still = notebook, notebook.page, still

    def explorer(self, name: str) -> Locator:
        """One of `CELLS`, in view."""
        found = self.page.locator(".jp-OutputArea-output .bigkit-explorer").nth([*CELLS].index(name))
        found.scroll_into_view_if_needed()
        return found


@pytest.fixture(scope="module")
def course(browser: Browser, lab: Lab) -> Iterator[Course]:
    from bigkit.widgets import SplitExplorer
    from tests.browser.lab import LabNotebook

    sources = ["from bigkit.widgets import *", *(f"{name} = {make}\n{name}" for name, make in CELLS.items())]
    path = lab.folder / "explorers.ipynb"
    write_notebook(path, *sources)
    stored = nbformat.read(path, as_version=4)  # as a clone of the repository has it: outputs, and no trust
    data = {kind: text for kind, text in SplitExplorer()._repr_mimebundle_().items() if kind.startswith("text/")}
    stored.cells[1].outputs = [nbformat.v4.new_output("execute_result", data=data, execution_count=1)]
    nbformat.write(stored, path)
    with browser.new_page(viewport={"width": 1440, "height": 1000}) as page:
        notebook = LabNotebook.open(page, lab.address, path.name)
        still = page.get_by_alt_text(re.compile("^3 items on 2 processes")).is_visible()
        notebook.run_all()
        yield Course(notebook, still)


def mark(explorer: Locator, key: str) -> Locator:
    return explorer.locator(f".bigkit-picture rect[data-key='{key}']")


def middle(place: Locator) -> tuple[float, float]:
    box = place.bounding_box()
    assert box is not None
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def hold(page: Page, grip: Locator, goal: Locator) -> None:
    """Drag one mark over another, and let the hand rest there; both are looked for before the hand moves."""
    start, end = middle(grip), middle(goal)
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(*end, steps=5)


def tip(page: Page) -> Locator:
    return page.locator("body > [role=status]:visible")


def test_a_notebook_that_was_not_run_shows_a_picture(course: Course) -> None:
    assert course.still


def test_hover_and_keys_tell_about_a_layer(course: Course, screenshots: Path) -> None:
    from playwright.sync_api import expect

    explorer, page = course.explorer("plan"), course.page
    mark(explorer, "layer:3").hover()
    expect(tip(page)).to_contain_text("model.layers.2 (LlamaDecoderLayer), 386.02 MiB, rests on GPU 0")
    page.screenshot(path=screenshots / "plan-hover.png")
    page.mouse.move(5, 5)
    expect(tip(page)).to_have_count(0)
    explorer.locator(".bigkit-picture").focus()
    expect(tip(page)).to_be_visible()
    page.keyboard.press("Home")
    expect(tip(page)).to_contain_text(re.compile("^GPU 0: "))
    page.keyboard.press("Enter")
    expect(explorer.locator(".bigkit-about")).to_contain_text("model.embed_tokens")
    page.keyboard.press("End")
    expect(tip(page)).to_contain_text("Boundary")
    page.keyboard.press("Shift+ArrowLeft")
    expect(explorer.locator(".bigkit-verdict")).to_contain_text("Fits")
    expect(explorer.get_by_label("Strategy").and_(explorer.locator("select"))).to_have_value("custom")
    page.keyboard.press("Control+z")
    expect(explorer.get_by_label("Strategy").and_(explorer.locator("select"))).to_have_value("auto")
    page.keyboard.press("Escape")


def test_drag_compare_and_undo(course: Course, screenshots: Path) -> None:
    from playwright.sync_api import expect

    explorer, page = course.explorer("plan"), course.page
    picture, verdict = explorer.locator(".bigkit-picture svg[role=img]"), explorer.locator(".bigkit-verdict")
    before = picture.get_attribute("aria-label")
    explorer.get_by_role("button", name="Compare").click()
    expect(verdict).to_contain_text("no difference yet")
    explorer.scroll_into_view_if_needed()
    boundary = explorer.locator("rect[data-key^='boundary:']").last
    page.mouse.move(*middle(boundary))
    page.mouse.down()
    page.mouse.move(*middle(mark(explorer, "layer:30")), steps=8)
    expect(verdict).to_contain_text("Does not fit")  # before the hand lets go
    expect(picture).to_contain_text("over budget")
    page.screenshot(path=screenshots / "plan-dragged.png")
    page.mouse.up()
    expect(explorer.get_by_role("button", name="Back to the planner")).to_be_visible()
    expect(verdict).to_contain_text(re.compile("Moved: 1?[0-9] layers from GPU 1 to GPU 0"))
    expect(explorer.locator(".bigkit-before svg")).to_have_attribute("aria-label", before or "")
    hold(page, mark(explorer, "layer:2"), mark(explorer, "device:cpu"))
    page.mouse.up()
    expect(mark(explorer, "layer:2")).to_have_attribute("data-at", "device:cpu")
    expect(mark(explorer, "device:cpu:weights")).to_be_attached()
    explorer.get_by_role("button", name="Undo").click()
    expect(mark(explorer, "device:cpu:weights")).not_to_be_attached()
    explorer.get_by_role("button", name="Back to the planner").click()
    expect(picture).to_have_attribute("aria-label", before or "")
    explorer.get_by_role("button", name="Compare").click()
    assert course.notebook.run("plan.state").endswith("strategy=auto'")


def test_a_still_hand_keeps_its_aim_while_pictures_come(course: Course) -> None:
    """The picture of the first place has its marks elsewhere; what is aimed at is what stood there before."""
    from playwright.sync_api import expect

    explorer, page = course.explorer("plan"), course.page
    explorer.get_by_role("button", name="Reset").click()
    layer = mark(explorer, "layer:8")
    expect(layer).to_have_attribute("data-at", "device:0")
    explorer.scroll_into_view_if_needed()
    hold(page, layer, mark(explorer, "device:cpu"))
    expect(layer).to_have_attribute("data-at", "device:cpu")  # it is shown there already
    explorer.locator(".bigkit-picture").evaluate(
        "at => { window.pictures = 0; new MutationObserver(() => window.pictures++).observe(at, {childList: true}) }"
    )
    page.wait_for_timeout(1000)
    assert page.evaluate("window.pictures") == 0, "the aim went to and fro"
    page.mouse.up()
    expect(explorer.get_by_role("button", name="Back to the planner")).to_be_visible()
    expect(layer).to_have_attribute("data-at", "device:cpu")
    explorer.get_by_role("button", name="Reset").click()
    expect(layer).to_have_attribute("data-at", "device:0")


def test_keys_in_a_control_are_not_the_notebooks(course: Course) -> None:
    """In JupyterLab x cuts the cell and an arrow leaves it; neither, while a list or a pane has the focus."""
    from playwright.sync_api import expect

    explorer, page = course.explorer("plan"), course.page
    cells, strategy = course.notebook.cells.count(), explorer.get_by_label("Strategy").and_(explorer.locator("select"))
    pane = explorer.get_by_role("button", name="Device map")  # its name comes with the keys
    expect(pane).to_have_attribute("aria-expanded", "false")
    strategy.focus()
    page.keyboard.press("ArrowDown")
    expect(strategy).to_have_value("balanced")
    page.keyboard.press("x")
    assert course.notebook.cells.count() == cells
    expect(strategy).to_be_focused()
    page.keyboard.press("ArrowUp")
    expect(strategy).to_have_value("auto")
    pane.focus()
    page.keyboard.press("Enter")
    expect(explorer.get_by_text("model.embed_tokens").first).to_be_visible()
    expect(pane).to_have_attribute("aria-expanded", "true")
    page.keyboard.press("Enter")
    expect(pane).to_have_attribute("aria-expanded", "false")


def test_numbers_are_typed_and_sliders_have_names(course: Course) -> None:
    from playwright.sync_api import expect

    explorer = course.explorer("plan")
    slider = explorer.locator(".bigkit-gpu-slider [role=slider]").first
    expect(slider).to_have_attribute("aria-label", "GPU 0, GiB")
    wide = explorer.locator(".bigkit-gpu-slider .noUi-target").first.bounding_box()
    assert wide is not None and wide["width"] > 200, "a pixel or more for each step"
    size = explorer.get_by_label("GPU 0, GiB").and_(explorer.locator("input"))
    size.fill("7.3")
    size.press("Enter")
    expect(explorer.locator(".bigkit-picture svg")).to_contain_text("of 7.30 GiB")
    size.fill("lots")
    size.press("Enter")
    expect(explorer.get_by_role("alert")).to_contain_text("GPU 0, GiB takes a number from 0 to")
    expect(size).to_have_value("7.3")
    slider.focus()
    explorer.page.keyboard.press("ArrowRight")
    expect(size).not_to_have_value("7.3")
    expect(slider).to_have_attribute("aria-valuetext", size.input_value())
    explorer.get_by_role("button", name="Reset").click()


def test_narrow_and_dark(course: Course, screenshots: Path) -> None:
    from playwright.sync_api import expect

    explorer, page = course.explorer("plan"), course.page
    page.set_viewport_size({"width": 900, "height": 900})
    picture, model = explorer.locator(".bigkit-picture"), explorer.get_by_label("Model").and_(explorer.locator("input"))
    page.wait_for_timeout(300)
    top, side = picture.bounding_box(), model.bounding_box()
    assert top and side and top["width"] > 400 and top["y"] < side["y"], (
        "with the side bar open the picture comes first"
    )
    page.screenshot(path=screenshots / "plan-900-sidebar.png")
    page.locator(".jp-SideBar [data-id='filebrowser']").click()
    page.wait_for_timeout(500)
    top, side = picture.bounding_box(), model.bounding_box()
    assert top and side and top["width"] > 400 and side["x"] < top["x"], "without it, beside the controls"
    page.screenshot(path=screenshots / "plan-900.png")
    ground: Any = "at => getComputedStyle(at.querySelector('.ground')).fill"
    words: Any = "at => getComputedStyle(at.querySelector('text')).fill"
    svg = explorer.locator(".bigkit-picture svg")
    light = svg.evaluate(words)
    page.evaluate("document.body.dataset.jpThemeLight = 'false'")
    assert svg.evaluate(ground) == "none" and svg.evaluate(words) != light
    page.evaluate("document.body.dataset.jpThemeLight = 'true'")
    page.set_viewport_size({"width": 1440, "height": 1000})
    expect(explorer).to_be_visible()


def test_hosts_are_typed(course: Course, screenshots: Path) -> None:
    """The keyboard alone: two machines, a slower line, and one machine again."""
    from playwright.sync_api import expect

    explorer, page = course.explorer("plan"), course.page
    before = explorer.locator(".bigkit-picture svg").get_attribute("aria-label")
    hosts = explorer.get_by_label("Hosts").and_(explorer.locator("input"))
    hosts.focus()
    page.keyboard.type("4090 | 2 x L4")
    page.keyboard.press("Enter")
    svg, verdict = explorer.locator(".bigkit-picture svg"), explorer.locator(".bigkit-verdict")
    expect(verdict).to_contain_text("Fits 2 hosts.")
    page.keyboard.press("Tab")
    page.keyboard.type("WLAN")
    expect(svg).to_contain_text("WLAN: ")
    mark(explorer, "line:0").hover()
    expect(tip(page)).to_contain_text("From process 0 to 1, WLAN")
    page.screenshot(path=screenshots / "plan-hosts.png")
    page.set_viewport_size({"width": 900, "height": 900})
    page.evaluate("document.body.dataset.jpThemeLight = 'false'")
    explorer.scroll_into_view_if_needed()
    page.wait_for_timeout(300)
    page.screenshot(path=screenshots / "plan-hosts-900-dark.png")
    page.evaluate("document.body.dataset.jpThemeLight = 'true'")
    page.set_viewport_size({"width": 1440, "height": 1000})
    hosts.fill("")
    page.keyboard.press("Enter")
    expect(svg).to_have_attribute("aria-label", before or "")


def test_the_text_twin_is_read_aloud_and_opened(course: Course) -> None:
    from playwright.sync_api import expect

    explorer = course.explorer("plan")
    text = explorer.locator(".bigkit-text")
    small = text.evaluate("at => at.parentElement.getBoundingClientRect().width")
    assert small <= 1 and "GPU 0" in text.inner_text(), "not seen, and still there"
    explorer.get_by_text("As text").click()
    expect(text.locator("pre").first).to_be_visible()
    assert text.bounding_box()["width"] > 300  # type: ignore[index]


def test_the_theatre_steps_plays_and_switches(course: Course, screenshots: Path) -> None:
    """Arrow keys step, Play goes on by itself, and the two ways to bring weights have charts of their own."""
    from playwright.sync_api import expect

    explorer, page = course.explorer("theatre"), course.page
    picture, verdict = explorer.locator(".bigkit-picture svg[role=img]"), explorer.locator(".bigkit-verdict")
    slider = explorer.locator(".bigkit-step-slider [role=slider]")
    expect(picture).to_have_attribute("aria-label", re.compile("before the start"))
    slider.focus()
    for step in range(1, 6):
        page.keyboard.press("ArrowRight")
        expect(verdict).to_contain_text(f"Step {step} of")
    expect(picture).to_have_attribute("aria-label", re.compile("begins to work"))
    page.keyboard.press("ArrowLeft")
    expect(verdict).to_contain_text("Step 4 of")
    page.screenshot(path=screenshots / "theatre.png")
    explorer.locator(".bigkit-mode button", has_text="one by one").click()
    expect(picture).to_have_attribute("aria-label", re.compile("^one by one, after"))
    expect(verdict).to_contain_text("One by one:")
    explorer.locator(".widget-play button").first.click()
    expect(verdict).not_to_contain_text("Step 4 of")
    explorer.locator(".widget-play button").first.click()
    assert re.fullmatch(
        r"'HookTheatre\(blocks 2\+2\+3\+3, one by one, step .{10,}\)'", course.notebook.run("repr(theatre)")
    )


def test_a_rehearsal_says_that_it_works_and_then_what_it_found(course: Course, screenshots: Path) -> None:
    from playwright.sync_api import expect

    explorer, page = course.explorer("run"), course.page
    verdict, picture = explorer.locator(".bigkit-verdict"), explorer.locator(".bigkit-picture svg[role=img]")
    expect(verdict).to_contain_text("It fits. At its peak")
    explorer.locator(".bigkit-working").evaluate(  # what is shown for less than a second is seen too
        "at => { window.said = []; new MutationObserver(() => window.said.push(at.textContent))"
        ".observe(at, {childList: true, subtree: true, characterData: true}) }"
    )
    batch = explorer.get_by_label("Batch")
    batch.fill("2")
    batch.press("Enter")
    expect(picture).to_contain_text("2 x 64 tokens", timeout=60_000)
    expect(verdict).to_contain_text("It fits. At its peak")
    assert any("Rehearsing gpt2" in words for words in page.evaluate("window.said"))
    measure = explorer.locator("button", has_text="Measure")
    if "no CUDA GPU here" in measure.inner_text():
        expect(measure).to_be_disabled()
    page.screenshot(path=screenshots / "rehearsal.png")


def test_harness_sees_a_failing_cell(browser: Browser, lab: Lab) -> None:
    from tests.browser.lab import LabNotebook

    name = write_notebook(lab.folder / "failing.ipynb", "1 + 1", "1 / 0", "2 + 2")
    with browser.new_page() as page, pytest.raises(AssertionError, match="ZeroDivisionError"):
        LabNotebook.open(page, lab.address, name).run_all()
