"""Turn a GPU slider in a real browser, with the keyboard, and see the picture, its text twin and the `repr` follow.

The same steps are made twice: on a notebook written here with plain ipywidgets, which tests the harness, and on
notebook 02 with its `PlanExplorer`.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import nbformat
import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.browser.lab import Lab

ROOT = Path(__file__).resolve().parent.parent.parent

# An explorer in miniature: the same CSS classes as bigkit's, one slider, a picture, a text twin and a repr.
MINIATURE = """import ipywidgets as widgets

class Miniature(widgets.VBox):
    def __init__(self):
        self.size = widgets.IntSlider(80, 0, 160, step=8, description="GPU 0", continuous_update=False)
        self.size.add_class("bigkit-gpu-slider")
        self.picture, self.text = widgets.HTML(), widgets.HTML()
        self.picture.add_class("bigkit-picture")
        self.text.add_class("bigkit-text")
        super().__init__([self.size, self.picture, self.text])
        self.add_class("bigkit-explorer")
        self.size.observe(self.draw, "value")
        self.draw()

    def draw(self, change=None):
        gib = self.size.value
        self.picture.value = (
            f'<svg role="img" aria-label="GPU 0 holds {gib} GiB" width="200" height="20">'
            f'<rect width="{gib}" height="20" fill="#0072B2"/></svg>'
        )
        self.text.value = f"<pre>GPU 0   {gib} GiB</pre>"

    def __repr__(self):
        return f"Miniature({self.size.value} GiB)"

explorer = Miniature()
"""


class Seen(NamedTuple):
    """What a person sees of an explorer."""

    label: str  # of the picture, as a screen reader says it
    picture: str  # the SVG itself
    text: str
    value: str  # of the first GPU slider
    repr: str


def turn_a_slider(browser: Browser, lab: Lab, name: str, screenshots: Path) -> tuple[Seen, Seen, Seen]:
    """Open the notebook called `name`, run all, and turn the first GPU slider right, then back.

    Returns:
        What was seen before, after ArrowRight (ArrowLeft where the slider stood at its end), and after the way back.
    """
    from playwright.sync_api import expect

    from tests.browser.lab import LabNotebook

    with browser.new_page(viewport={"width": 1440, "height": 1000}) as page:
        notebook = LabNotebook.open(page, lab.address, name)
        notebook.run_all()
        explorer = page.locator(".bigkit-explorer").first
        slider = explorer.locator(".bigkit-gpu-slider [role=slider]").first
        picture = explorer.locator(".bigkit-picture svg[role=img]").first

        def look(shot: str) -> Seen:
            seen = Seen(
                label=picture.get_attribute("aria-label") or "",
                picture=picture.inner_html(),
                text=explorer.locator(".bigkit-text").first.inner_text(),
                value=slider.get_attribute("aria-valuenow") or "",
                repr=notebook.run("repr(explorer)"),
            )
            explorer.scroll_into_view_if_needed()
            page.screenshot(path=screenshots / f"{Path(name).stem}-{shot}.png")
            return seen

        def press(key: str) -> None:
            before = picture.inner_html()
            slider.focus()
            page.keyboard.press(key)
            expect(picture).not_to_have_js_property("innerHTML", before)

        before = look("1-before")
        at_the_end = slider.get_attribute("aria-valuenow") == slider.get_attribute("aria-valuemax")
        there, back = ("ArrowLeft", "ArrowRight") if at_the_end else ("ArrowRight", "ArrowLeft")
        press(there)
        turned = look("2-turned")
        press(back)
        returned = look("3-returned")
    return before, turned, returned


def check(before: Seen, turned: Seen, returned: Seen) -> None:
    """Each thing a person sees changed with the slider, and came back with it."""
    for field in Seen._fields:
        assert getattr(before, field), f"the explorer shows no {field}"
        assert getattr(before, field) != getattr(turned, field), f"the {field} did not follow the slider"
    assert (before.value, before.text, before.repr) == (returned.value, returned.text, returned.repr)


def write_notebook(path: Path, *sources: str) -> str:
    """A notebook with one code cell for each source; returns its name."""
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(metadata=metadata, cells=[*map(nbformat.v4.new_code_cell, sources)]), path)
    return path.name


def test_harness_on_plain_ipywidgets(browser: Browser, lab: Lab, screenshots: Path) -> None:
    name = write_notebook(lab.folder / "miniature.ipynb", MINIATURE, "explorer")

    before, turned, returned = turn_a_slider(browser, lab, name, screenshots)

    check(before, turned, returned)
    assert (float(before.value), float(turned.value)) == (80, 88)
    assert (before.text, turned.text) == ("GPU 0   80 GiB", "GPU 0   88 GiB")
    assert turned.label == "GPU 0 holds 88 GiB"
    assert turned.repr == "'Miniature(88 GiB)'"


def test_harness_sees_a_failing_cell(browser: Browser, lab: Lab, screenshots: Path) -> None:
    name = write_notebook(lab.folder / "failing.ipynb", "1 + 1", "1 / 0", "2 + 2")
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        turn_a_slider(browser, lab, name, screenshots)


def test_notebook_02_follows_its_gpu_slider(browser: Browser, lab: Lab, screenshots: Path) -> None:
    found = sorted((ROOT / "notebooks").glob("02-*.ipynb"))
    assert len(found) == 1, "notebooks/ should hold one 02-*.ipynb"
    shutil.copy(found[0], lab.folder)

    before, turned, returned = turn_a_slider(browser, lab, found[0].name, screenshots)

    check(before, turned, returned)
    assert len(before.repr) < 112  # 110 and the quotes: more would be cut where a widget is shown
    assert re.search(r"\d", turned.label), "the picture's label tells no figure"


THEATRE = "from bigkit.widgets import HookTheatre\nexplorer = HookTheatre()"


def test_the_theatre_steps_plays_and_switches(browser: Browser, lab: Lab, screenshots: Path) -> None:
    """Arrow keys step, Play goes on by itself, and the two ways to bring weights have charts of their own."""
    from playwright.sync_api import expect

    from tests.browser.lab import LabNotebook

    name = write_notebook(lab.folder / "theatre.ipynb", THEATRE, "explorer")
    with browser.new_page(viewport={"width": 1440, "height": 1100}) as page:
        notebook = LabNotebook.open(page, lab.address, name)
        notebook.run_all()
        explorer = page.locator(".bigkit-explorer").first
        picture = explorer.locator(".bigkit-picture svg[role=img]").first
        verdict, text = explorer.locator(".bigkit-verdict"), explorer.locator(".bigkit-text")
        slider = explorer.locator(".bigkit-step-slider [role=slider]").first
        expect(picture).to_have_attribute("aria-label", re.compile("before the start"))
        slider.focus()
        for step in range(1, 6):
            page.keyboard.press("ArrowRight")
            expect(verdict).to_contain_text(f"Step {step} of")
        expect(picture).to_have_attribute("aria-label", re.compile("begins to work"))
        page.keyboard.press("ArrowLeft")
        expect(verdict).to_contain_text("Step 4 of")
        page.screenshot(path=screenshots / "theatre-1-stepped.png")
        explorer.locator(".bigkit-mode button", has_text="one by one").click()
        expect(text).to_contain_text(re.compile("^one by one, after"))
        expect(picture).to_have_attribute("aria-label", re.compile("^one by one, after"))
        explorer.locator(".widget-play button").first.click()
        expect(verdict).not_to_contain_text("Step 4 of")
        explorer.locator(".widget-play button").first.click()
        page.set_viewport_size({"width": 760, "height": 900})
        wide = page.locator(".jp-Notebook .bigkit-picture").first.bounding_box()
        assert wide is not None and wide["width"] > 250, "in a narrow window the picture goes below the controls"
        page.screenshot(path=screenshots / "theatre-2-narrow.png")
        assert re.fullmatch(
            r"'HookTheatre\(blocks 2\+2\+3\+3, one by one, step .{10,}\)'", notebook.run("repr(explorer)")
        )


REHEARSAL = "from bigkit.widgets import DryRunExplorer\nexplorer = DryRunExplorer('gpt2', batch=1, prompt=64, new=1)"


def test_a_rehearsal_says_that_it_works_and_then_what_it_found(browser: Browser, lab: Lab, screenshots: Path) -> None:
    from playwright.sync_api import expect

    from tests.browser.lab import LabNotebook

    name = write_notebook(lab.folder / "rehearsal.ipynb", REHEARSAL, "explorer")
    with browser.new_page(viewport={"width": 1280, "height": 1100}) as page:
        notebook = LabNotebook.open(page, lab.address, name)
        notebook.run_all()
        explorer = page.locator(".bigkit-explorer").first
        verdict, picture = explorer.locator(".bigkit-verdict"), explorer.locator(".bigkit-picture svg[role=img]")
        expect(verdict).to_contain_text("It fits. At most")
        verdict.evaluate(  # what is shown for less than a second is seen too
            "at => { window.said = []; new MutationObserver(() => window.said.push(at.innerText))"
            ".observe(at, {childList: true, subtree: true, characterData: true}) }"
        )
        batch = explorer.locator("input[type=number]").nth(1)
        batch.fill("2")
        batch.press("Enter")
        expect(picture).to_contain_text("2 x 64 tokens", timeout=60_000)
        expect(verdict).to_contain_text("It fits. At most")
        assert any("Rehearsing gpt2" in words for words in page.evaluate("window.said"))
        measure = explorer.locator("button", has_text="Measure")
        if "no CUDA GPU here" in measure.inner_text():
            expect(measure).to_be_disabled()
        page.screenshot(path=screenshots / "rehearsal.png")
