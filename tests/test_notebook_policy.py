"""Every notebook keeps the rules that make it open, run and compare well (CONTRIBUTING.md lists them).

`problems(notebook, name)` names every broken rule; the course must have none, and a sound small notebook spoilt in one
place must have exactly the one meant.
"""

from __future__ import annotations

import copy
import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = runpy.run_path(str(ROOT / "scripts/run_notebooks.py"))
NOTEBOOKS: list[Path] = SCRIPT["course"]()
COLAB = "https://colab.research.google.com/github/bigkit/bigkit/blob/main/notebooks/{name}"
BINDER = "https://mybinder.org/v2/gh/bigkit/bigkit/main?labpath=notebooks%2F{name}"
HEADINGS = ("What you'll do", "What you'll learn", "What you'll need")
FOLDERS = "home|root|tmp|work|Users|usr|opt|var|mnt|private|content"
MACHINE_PATH = re.compile(rf"(?<![\w:/.~])/(?:{FOLDERS})/|[A-Z]:\\+Users")
AFTER_EXERCISES = re.compile(r"^##? (Solutions?|Further reading|Next)\b")
NO_PROSE = re.compile(r"```.*?```|<[^>]*>|\$\$.*?\$\$|\[!\[.*?\)\]\(.*?\)", re.DOTALL)  # code, tags, formulas, badges

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
    if '"bigkit[torch' not in source(cell):  # pip then brings what Colab lacks, and leaves the torch that is there
        return "the Colab install cell does not ask for the extra torch"
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


def tags(cell: dict[str, Any]) -> set[str]:
    return {*cell["metadata"].get("tags", [])}


def words(cells: list[dict[str, Any]]) -> int:
    """Words of prose: no code, no targets of links, no badges, and not the links to the neighbours."""
    prose = "\n".join(source(cell) for cell in cells if cell["cell_type"] == "markdown" and cell.get("id") != "links")
    prose = re.sub(r"^\*\*\d+ minutes\*\*.*", "", NO_PROSE.sub(" ", prose), flags=re.MULTILINE)
    return len(re.findall(r"\w[\w'’.,-]*", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", prose)))


def work_problem(cells: list[dict[str, Any]]) -> str | None:
    """What is wrong with the cells of the exercises: to work in, checked, unanswered; then solutions, folded."""
    start = next((i for i, cell in enumerate(cells) if "\n## Exercises" in f"\n{source(cell)}"), len(cells))
    code = [cell for cell in cells[start:] if cell["cell_type"] == "code"]
    if not all(tags(cell) & {"exercise", "solution"} for cell in code):
        return "a cell below '## Exercises' is neither an exercise nor a solution"
    work = [cell for cell in code if "exercise" in tags(cell)]
    if not work or not any("solution" in tags(cell) for cell in code):
        return "no cell tagged 'exercise', or none tagged 'solution'"
    for cell in work:
        said = "".join("".join(out.get("text", "")) for out in cell["outputs"])
        if "check(" not in source(cell) or "not answered yet" not in said:
            return "a cell to work in does not call check(), or is answered already"
    return None


def newer_problems(notebook: Notebook, path: Path) -> list[str]:
    """Broken rules on length, links, folded cells and exercises."""
    cells = notebook["cells"]
    found = [None if path.stem == "index" else work_problem(cells)]
    if (count := words(cells)) > 1000:
        found.append(f"{count} words of prose: at most 1,000")
    if path.stem != "index" and not SCRIPT["MINUTES"].search(source(cells[0])):
        found.append("the first cell does not say how many minutes it takes")
    dressed = copy.deepcopy(notebook)
    SCRIPT["dress"](dressed, path)
    if dressed != notebook:
        found.append("links, folds or stored pictures are out of date: run scripts/run_notebooks.py --links")
    return [problem for problem in found if problem]


def exercises_problem(cells: list[dict[str, Any]]) -> str | None:
    """What is wrong with the exercises: the last part, each with a hint, and with solutions that run."""
    headings = [cell for cell in cells if cell["cell_type"] == "markdown" and "\n## Exercises" in f"\n{source(cell)}"]
    if not headings:
        return "no '## Exercises'"
    tail = cells[cells.index(headings[-1]) :]
    text = "\n".join(source(cell) for cell in tail if cell["cell_type"] == "markdown")
    text = text[text.rindex("## Exercises") :]
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
    if len([cell for cell in code if not tags(cell) & {"exercise", "solution"}]) > 15:
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
    found.append(exercises_problem(cells) if name != "index.ipynb" else None)
    return [problem for problem in found if problem]


def test_the_course_is_numbered_without_gaps() -> None:
    index, *numbered, appendix = NOTEBOOKS
    assert index.stem == "index" and appendix.stem.startswith("appendix-")
    assert [path.name[:3] for path in numbered] == [f"{number:02}-" for number in range(len(numbered))]


def test_index_and_map_name_every_notebook() -> None:
    from bigkit.draw.diagrams_count import QUESTIONS

    index = "".join(source(cell) for cell in json.loads(NOTEBOOKS[0].read_text(encoding="utf-8"))["cells"])
    assert re.findall(r"^\| [\d?]+ \| \[.*?\]\((.*?)\)", index, flags=re.MULTILINE) == [
        path.name for path in NOTEBOOKS[1:]
    ]
    on_the_map = sorted(number for own in QUESTIONS.values() for number in own)
    assert on_the_map == [int(path.stem[:2]) for path in NOTEBOOKS if path.stem[:2].isdigit()]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_between_notebooks_lead_somewhere(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "".join(source(cell) for cell in cells if cell["cell_type"] == "markdown")
    linked = set(re.findall(r"\]\(([\w-]+\.ipynb)\)", text))
    assert linked <= {other.name for other in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_keeps_the_policy(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert problems(notebook, path.name) == []
    assert newer_problems(notebook, path) == []


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
    install = 'import sys\nif "google.colab" in sys.modules:\n    %pip install -q "bigkit[torch]"'
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
    "the first code cell is not the guarded Colab install": edit(1, '%pip install -q "bigkit[torch]"', "pass"),
    "the Colab install cell does not ask for the extra torch": edit(1, "[torch]", ""),
    "the Colab install cell has stored output": lambda n: n["cells"][1]["outputs"].append({"name": "stdout"}),
    "the Colab install cell installs outside Colab too": edit(1, "in sys.modules", "not in sys.modules"),
    "no '## Exercises'": edit(3, "## Exercises", "Exercises"),
    "'## Exercises' is not the last part": lambda n: n["cells"].append(ONE_MORE),
    "the exercises have no hint (<details>)": edit(3, "<details>", ""),
    "the exercises have no solution that runs": lambda n: n["cells"].pop(),
}


def work(notebook: Notebook) -> Notebook:
    """The sound notebook with what the newer rules want, dressed as if it were notebook 02."""
    cells = notebook["cells"]
    cells[0]["source"] += "\n**5 minutes**"
    said = {"output_type": "stream", "name": "stdout", "text": "not answered yet\n"}
    cells.insert(4, code_cell("answer = None\ncheck(answer, 4)", 3, said) | {"metadata": {"tags": ["exercise"]}})
    cells[5]["metadata"]["tags"], cells[5]["execution_count"] = ["solution"], 4
    made: Notebook = nbformat.from_dict(notebook)
    SCRIPT["dress"](made, NOTEBOOKS[3])
    return made


SPOILT_NEWER: dict[str, Callable[[Notebook], object]] = {
    "1001 words of prose: at most 1,000": lambda n: n["cells"][3].update(source="## Exercises\n" + "word " * 988),
    "the first cell does not say how many minutes it takes": edit(0, "5 minutes", "5 pages"),
    "a cell below '## Exercises' is neither an exercise nor a solution": lambda n: n["cells"][4]["metadata"].clear(),
    "no cell tagged 'exercise', or none tagged 'solution'": lambda n: n["cells"][5]["metadata"].update(
        tags=["exercise"]
    ),
    "a cell to work in does not call check(), or is answered already": edit(4, "check", "print"),
    "links, folds or stored pictures are out of date: run scripts/run_notebooks.py --links": edit(6, "index", "map"),
}


def test_sound_notebook_keeps_the_newer_rules() -> None:
    made = work(sound())
    assert newer_problems(made, NOTEBOOKS[3]) == []
    assert made["cells"][5]["metadata"]["jupyter"] == {"outputs_hidden": True, "source_hidden": True}
    links = made["cells"][-1]["source"]
    assert f"]({NOTEBOOKS[2].name})" in links and "(index.ipynb)" in links and f"]({NOTEBOOKS[4].name})" in links
    assert links in made["cells"][0]["source"]


@pytest.mark.parametrize("problem", SPOILT_NEWER)
def test_spoilt_notebook_breaks_one_newer_rule(problem: str) -> None:
    notebook = work(sound())
    SPOILT_NEWER[problem](notebook)
    assert problem in newer_problems(notebook, NOTEBOOKS[3])


@pytest.mark.parametrize("problem", SPOILT)
def test_spoilt_notebook_is_caught(problem: str) -> None:
    notebook = sound()
    SPOILT[problem](notebook)
    assert problems(notebook, NAME) == [problem]
