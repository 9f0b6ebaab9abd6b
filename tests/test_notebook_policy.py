"""Every notebook keeps the rules that make it open, run and compare well (CONTRIBUTING.md lists them).

`problems(notebook, name)` names every broken rule; the course must have none, and a sound small notebook spoilt in one
place must have exactly the one meant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COLAB = "https://colab.research.google.com/github/bigkit/bigkit/blob/main/notebooks/{name}"
BINDER = "https://mybinder.org/v2/gh/bigkit/bigkit/main?labpath=notebooks%2F{name}"
HEADINGS = ("What you'll do", "What you'll learn", "What you'll need")
FOLDERS = "home|root|tmp|work|Users|usr|opt|var|mnt|private|content"
MACHINE_PATH = re.compile(rf"(?<![\w:/.~])/(?:{FOLDERS})/|[A-Z]:\\+Users")
AFTER_EXERCISES = re.compile(r"^##? (Solutions?|Further reading|Next)\b")

Notebook = dict[str, Any]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def is_compared(cell: dict[str, Any]) -> bool:
    """Whether nbval compares some text that this cell has stored."""
    tags = cell["metadata"].get("tags", [])
    if {"nbval-ignore-output", "nbval-skip"} & set(tags) or re.search(r"#\s*NBVAL_(IGNORE_OUTPUT|SKIP)", source(cell)):
        return False
    return any(out.get("name") == "stdout" or "text/plain" in out.get("data", {}) for out in cell["outputs"])


def colab_cell_problem(cell: dict[str, Any]) -> str | None:
    """What is wrong with the first code cell, which installs bigkit on Colab and does nothing anywhere else."""
    if "google.colab" not in source(cell) or "pip install" not in source(cell):
        return "the first code cell is not the guarded Colab install"
    if cell["outputs"]:
        return "the Colab install cell has stored output"
    code = TransformerManager().transform_cell(source(cell))

    def no_ipython() -> None:
        raise RuntimeError("ran a magic")

    try:
        exec(code, {"get_ipython": no_ipython})
    except RuntimeError:
        return "the Colab install cell installs outside Colab too"
    return None


def exercises_problem(cells: list[dict[str, Any]]) -> str | None:
    """What is wrong with the exercises: the last part, each with a hint, and with solutions that run."""
    headings = [cell for cell in cells if cell["cell_type"] == "markdown" and "\n## Exercises" in f"\n{source(cell)}"]
    if not headings:
        return "no '## Exercises'"
    tail = cells[cells.index(headings[-1]) :]
    text = "\n".join(source(cell) for cell in tail if cell["cell_type"] == "markdown")
    later = [line for line in text.splitlines() if re.match(r"##? ", line) and not line.startswith("## Exercises")]
    if not all(AFTER_EXERCISES.match(line) for line in later):
        return "'## Exercises' is not the last part"
    if "<details>" not in text:
        return "the exercises have no hint (<details>)"
    if not any(cell["cell_type"] == "code" for cell in tail):
        return "the exercises have no solution that runs"
    return None


def problems(notebook: Notebook, name: str) -> list[str]:
    """Every rule that the notebook, called `name`, breaks; an empty list when it keeps them all."""
    cells = notebook["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    first = source(cells[0]) if cells and cells[0]["cell_type"] == "markdown" else ""
    outputs = json.dumps([cell["outputs"] for cell in code]).replace(r"\n", " ")
    found: list[str | None] = []
    if [cell["execution_count"] for cell in code] != list(range(1, len(code) + 1)):
        found.append("the code cells were not run once each, in order")
    if "widgets" in notebook["metadata"]:
        found.append("metadata.widgets is stored")
    if notebook["metadata"].get("kernelspec", {}).get("name") != "python3":
        found.append("the kernel is not python3")
    if not any(is_compared(cell) for cell in code):
        found.append("no stored output that nbval compares")
    if len(code) > 15:
        found.append("more than 15 code cells")
    if not first.startswith("# "):
        found.append("the first cell has no title")
    if f"({COLAB.format(name=name)})" not in first:
        found.append("the first cell has no Colab badge")
    if f"({BINDER.format(name=name)})" not in first:
        found.append("the first cell has no Binder badge")
    found += [f"the first cell lacks {part!r}" for part in HEADINGS if part not in first.replace("’", "'")]
    if MACHINE_PATH.search(outputs):
        found.append("an output names a path of the machine it ran on")
    found.append(colab_cell_problem(code[0]) if code else "no code cell")
    found.append(exercises_problem(cells))
    return [problem for problem in found if problem]


def test_the_course_is_numbered_without_gaps() -> None:
    assert NOTEBOOKS, "notebooks/ is empty"
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{number:02}-" for number in range(len(NOTEBOOKS))]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_keeps_the_policy(path: Path) -> None:
    assert problems(json.loads(path.read_text(encoding="utf-8")), path.name) == []


# ---------------------------------------------------------------------------------------------------------------------
# The policy itself: a sound notebook passes, and each way to spoil it is named


NAME = "00-x.ipynb"


def code_cell(text: str, count: int, *outputs: dict[str, Any]) -> dict[str, Any]:
    return {
        "cell_type": "code", "source": text, "execution_count": count, "outputs": list(outputs), "metadata": {},
    }  # fmt: skip


def sound() -> Notebook:
    """The smallest notebook that keeps every rule."""
    badges = f"[Colab]({COLAB.format(name=NAME)}) [Binder]({BINDER.format(name=NAME)})"
    intro = "\n".join(["# Title", badges, *(f"**{part}** …" for part in HEADINGS)])
    install = 'import sys\nif "google.colab" in sys.modules:\n    %pip install -q bigkit'
    result = {"output_type": "execute_result", "data": {"text/plain": "2"}, "execution_count": 2, "metadata": {}}
    return {
        "metadata": {"kernelspec": {"name": "python3"}},
        "cells": [
            {"cell_type": "markdown", "source": intro, "metadata": {}},
            code_cell(install, 1),
            code_cell("1 + 1", 2, result),
            {"cell_type": "markdown", "source": "## Exercises\n<details>hint</details>", "metadata": {}},
            code_cell("assert 2 + 2 == 4", 3),
        ],
    }


def test_sound_notebook_has_no_problem() -> None:
    assert problems(sound(), NAME) == []


def edit(cell: int, old: str, new: str) -> Callable[[Notebook], None]:
    """A change of one cell's source."""

    def change(notebook: Notebook) -> None:
        assert old in notebook["cells"][cell]["source"]
        notebook["cells"][cell]["source"] = notebook["cells"][cell]["source"].replace(old, new)

    return change


ONE_MORE = {"cell_type": "markdown", "source": "## One more idea", "metadata": {}}
HOME = {"text/plain": "saved in\n/home/someone/model"}
SPOILT: dict[str, Callable[[Notebook], object]] = {
    "the code cells were not run once each, in order": lambda n: n["cells"][2].update(execution_count=7),
    "metadata.widgets is stored": lambda n: n["metadata"].update(widgets={}),
    "the kernel is not python3": lambda n: n["metadata"].update(kernelspec={"name": "my-env"}),
    "no stored output that nbval compares": lambda n: n["cells"][2]["metadata"].update(tags=["nbval-ignore-output"]),
    "more than 15 code cells": lambda n: n["cells"].extend(code_cell("pass", count) for count in range(4, 17)),
    "the first cell has no title": edit(0, "# Title", "Title"),
    "the first cell has no Colab badge": edit(0, "colab.research", "example"),
    "the first cell has no Binder badge": edit(0, "mybinder", "example"),
    'the first cell lacks "What you\'ll learn"': edit(0, "learn", "see"),
    "an output names a path of the machine it ran on": lambda n: n["cells"][2]["outputs"][0]["data"].update(HOME),
    "the first code cell is not the guarded Colab install": edit(1, "%pip install -q bigkit", "pass"),
    "the Colab install cell has stored output": lambda n: n["cells"][1]["outputs"].append({"name": "stdout"}),
    "the Colab install cell installs outside Colab too": edit(1, "in sys.modules", "not in sys.modules"),
    "no '## Exercises'": edit(3, "## Exercises", "Exercises"),
    "'## Exercises' is not the last part": lambda n: n["cells"].append(ONE_MORE),
    "the exercises have no hint (<details>)": edit(3, "<details>", ""),
    "the exercises have no solution that runs": lambda n: n["cells"].pop(),
}


@pytest.mark.parametrize("problem", SPOILT)
def test_spoilt_notebook_is_caught(problem: str) -> None:
    notebook = sound()
    SPOILT[problem](notebook)
    assert problems(notebook, NAME) == [problem]
