"""A newcomer's first minutes: from the index by a link to notebook 00, an answer that unfolds, an exercise."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.browser.lab import Lab

NOTEBOOKS = Path(__file__).resolve().parent.parent.parent / "notebooks"


def test_from_the_index_to_a_right_answer(browser: Browser, lab: Lab, screenshots: Path) -> None:
    from playwright.sync_api import expect

    from tests.browser.lab import LabNotebook

    for name in ("index.ipynb", "00-does-it-fit.ipynb"):
        shutil.copy(NOTEBOOKS / name, lab.folder)
    with browser.new_page(viewport={"width": 1000, "height": 900}) as page:
        LabNotebook.open(page, lab.address, "index.ipynb")
        image = page.locator(".jp-Notebook img[alt^='The course by question']")  # nothing has run, nothing is trusted
        expect(image).to_be_visible()
        assert image.evaluate("image => image.naturalWidth > 0 && image.width <= image.parentElement.clientWidth")
        page.screenshot(path=screenshots / "course-index.png")

        page.get_by_role("link", name="00 Does it fit?").click()
        notebook = page.locator(".jp-NotebookPanel:visible")
        reveal = notebook.locator(".jp-CodeCell", has_text="bars_figure").first
        expect(reveal).to_contain_text("Run this cell to see the answer.")
        expect(reveal).not_to_contain_text("14.96")
        expect(notebook.locator(".jp-CodeCell", has_text="# Solutions")).not_to_contain_text("128")
        LabNotebook.opened(page, lab.address, "00-does-it-fit.ipynb")
        reveal.locator(".cm-content").click()
        page.keyboard.press("Shift+Enter")
        expect(reveal.locator("svg[role=img]")).to_be_visible(timeout=90_000)
        expect(reveal).not_to_contain_text("Run this cell")

        exercise = notebook.locator(".jp-CodeCell").nth(5)
        expect(exercise).to_contain_text("answer = None")
        said = exercise.locator(".jp-OutputArea-output")
        for answer, expected in (("100", "not yet: 22.2 % too small"), ("128.5", "right")):
            exercise.locator(".cm-content").click()
            page.keyboard.press("Control+a")
            code = f"from bigkit.course import check\nanswer = {answer}\n"
            page.keyboard.insert_text(code + "check(answer, 2 * bigkit.describe('llama-2-70b').parameters / 2**30)")
            page.keyboard.press("Control+Enter")
            expect(said).to_have_text(expected, timeout=60_000)
        page.screenshot(path=screenshots / "course-00.png")
