"""`make lab` opens copies: a reader's changes stay, all others follow the course, and the checkout stays clean."""

from __future__ import annotations

import json
import runpy
import subprocess
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [*sorted((ROOT / "notebooks").glob("*.ipynb")), ROOT / "bigkit" / "widgets" / "app.ipynb"]
LAB = runpy.run_path(str(ROOT / "scripts" / "lab.py"))


def test_copies_follow_the_course_until_somebody_writes_in_them(tmp_path: Path) -> None:
    course, own = tmp_path / "course", tmp_path / "own"
    course.mkdir()
    for name in "ab":
        (course / f"{name}.ipynb").write_text("old")
    assert LAB["refresh"](course, own) == []
    (own / "a.ipynb").write_text("mine")
    assert LAB["refresh"](course, own) == [] and (own / "a.ipynb").read_text() == "mine"
    for name in "abc":
        (course / f"{name}.ipynb").write_text("new")
    assert LAB["refresh"](course, own) == ["a.ipynb"]
    assert {path.stem: path.read_text() for path in own.glob("*.ipynb")} == {"a": "mine", "b": "new", "c": "new"}
    (own / "a.ipynb").unlink()  # who wants the new one removes the old
    assert LAB["refresh"](course, own) == [] and (own / "a.ipynb").read_text() == "new"


def test_what_lab_saves_by_itself_is_no_change(tmp_path: Path) -> None:
    """Opening a notebook saves metadata, and running it outputs: both stay, until the course has a newer one."""
    course, own = tmp_path / "course", tmp_path / "own"
    course.mkdir()

    def write(path: Path, source: str, printed: str) -> None:
        cell = nbformat.v4.new_code_cell(source, outputs=[nbformat.v4.new_output("stream", text=printed)])
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)

    def shown(path: Path) -> tuple[str, str]:
        (cell,) = nbformat.read(path, as_version=4).cells
        return cell.source, cell.outputs[0].text

    write(course / "a.ipynb", "answer = None", "not yet")
    assert LAB["refresh"](course, own) == []
    write(own / "a.ipynb", "answer = None", "run here")
    assert LAB["refresh"](course, own) == [] and shown(own / "a.ipynb") == ("answer = None", "run here")
    write(course / "a.ipynb", "answer = 0", "newer")
    assert LAB["refresh"](course, own) == [] and shown(own / "a.ipynb") == ("answer = 0", "newer")
    write(own / "a.ipynb", "answer = 12", "right")
    write(course / "a.ipynb", "answer = 1", "newest")
    assert LAB["refresh"](course, own) == ["a.ipynb"] and shown(own / "a.ipynb") == ("answer = 12", "right")


def test_git_sees_no_copy_and_lab_asks_no_question() -> None:
    ignored = subprocess.run(["git", "check-ignore", "-q", str(LAB["OWN"] / "a.ipynb")], cwd=ROOT)
    assert ignored.returncode in (0, 128)  # 128: no checkout
    (settings,) = LAB["SETTINGS"].rglob("*.json")
    assert json.loads(settings.read_text())["@jupyterlab/apputils-extension:notification"]["fetchNews"] == "false"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_clean_wherever_it_is_opened(path: Path) -> None:
    """Valid, with an id for each cell as Notebook 7 and VS Code want, and written as Jupyter writes it: no diff."""
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    ids = [cell.id for cell in notebook.cells]
    assert len(ids) == len({*ids})
    assert text.rstrip("\n") == nbformat.writes(notebook).rstrip("\n")
