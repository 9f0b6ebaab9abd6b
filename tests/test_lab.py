"""`make lab` opens copies: a reader's changes stay, all others follow the course, and the checkout stays clean."""

from __future__ import annotations

import json
import runpy
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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


def test_git_sees_no_copy_and_lab_asks_no_question() -> None:
    ignored = subprocess.run(["git", "check-ignore", "-q", str(LAB["OWN"] / "a.ipynb")], cwd=ROOT)
    assert ignored.returncode in (0, 128)  # 128: no checkout
    (settings,) = LAB["SETTINGS"].rglob("*.json")
    assert json.loads(settings.read_text())["@jupyterlab/apputils-extension:notification"]["fetchNews"] == "false"
