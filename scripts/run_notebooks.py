"""Run notebooks in place and store their outputs as the policy wants them.

    .venv/bin/python scripts/run_notebooks.py                      # all of notebooks/
    .venv/bin/python scripts/run_notebooks.py notebooks/02-*.ipynb
    .venv/bin/python scripts/run_notebooks.py --links              # run nothing: renew links and folds alone

Stored outputs are what `pytest --nbval notebooks/` compares with. Left out of them is what changes from run to run and
says nothing: widget models and views (the `repr` beside a view stays), stderr, timestamps, the kernel's version.

Pictures are stored as images, which JupyterLab shows before anything has run. Two tags fold a cell: `reveal` its output
(run the cell, and it unfolds), `solution` its code too. The line of the first cell that begins with `**12 minutes**`
gets links to the notebooks before and after, and a last cell repeats them. In the index each row of the table gets the
minutes and the title of the notebook that it links to.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from bigkit.widgets._html import still

ROOT = Path(__file__).resolve().parent.parent
MINUTES = re.compile(r"^\*\*(\d+) minutes\*\*.*", re.MULTILINE)
# JupyterLab shows the first line of what is folded. It must not be the answer; nbval does not compare stderr.
FOLDED = nbformat.from_dict({"output_type": "stream", "name": "stderr", "text": "Run this cell to see the answer."})
ROW = re.compile(r"^\| [\d?]+ \| \[[^\]]*\]\((\S+\.ipynb)\)", re.MULTILINE)  # of the index
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def run(path: Path, timeout: int = 120) -> None:
    """Execute the notebook at `path`, in its own folder, and write it back normalised.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the file is then left as it was.
        nbclient.exceptions.CellTimeoutError: a cell ran longer than `timeout` seconds.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.kernelspec = dict(KERNEL)
    NotebookClient(
        notebook,
        timeout=timeout,
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
    ).execute()
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if output.get("name") == "stderr":
            print(f"{path.name}: readers will see this in red: {output.text.strip()[:200]}")
    normalise(notebook)
    nbformat.write(notebook, path)


def normalise(notebook: nbformat.NotebookNode) -> None:
    """Number the code cells 1..n and drop, in place, what differs between two equal runs."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for count, cell in enumerate(code, start=1):
        cell.execution_count = count
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            output.get("data", {}).pop(WIDGET_VIEW, None)
            if output.output_type == "execute_result":
                output.execution_count = count


def course() -> list[Path]:
    """The notebooks in reading order: the index, the numbered ones, the appendices."""
    found = sorted((ROOT / "notebooks").glob("*.ipynb"))
    return sorted(found, key=lambda path: (path.stem != "index", path.stem.startswith("appendix")))


def called(path: Path) -> tuple[str, str]:
    """A notebook's number and title, and how many minutes it says that it takes."""
    first = nbformat.read(path, as_version=4).cells[0].source
    title = first.partition("\n")[0].removeprefix("# ")
    minutes = MINUTES.search(first)
    return (f"{path.stem[:2]} " if path.stem[:2].isdigit() else "") + title, minutes[1] if minutes else "?"


def links(path: Path) -> str:
    """One line of Markdown: the notebook before the one at `path`, the index, the notebook after."""
    paths = course()
    place = next(number for number, other in enumerate(paths) if other.name == path.name)
    before = [f"[← {called(other)[0]}]({other.name})" for other in paths[max(1, place - 1) : place]]
    after = [f"[{called(other)[0]} →]({other.name})" for other in paths[place + 1 : place + 2]]
    return " · ".join([*before, "[index](index.ipynb)", *after])


def dress(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Store pictures as images, fold the cells tagged `reveal` and `solution`, and write the links, all in place."""
    for cell in notebook.cells:
        for data in (output.get("data", {}) for output in cell.get("outputs", [])):
            svg = data.pop("image/svg+xml", data.get("text/html", ""))
            if svg.startswith("<svg"):
                data["text/html"] = still(svg)
        tags = cell.metadata.get("tags", [])
        if {"reveal", "solution"} & {*tags}:
            cell.metadata["jupyter"] = {"outputs_hidden": True}
            answers = [output for output in cell.outputs if output.get("name") != "stderr"]
            cell.outputs = [FOLDED, *answers] if answers else []
        if "solution" in tags:
            cell.metadata["jupyter"]["source_hidden"] = True
            cell.metadata["cellView"] = "form"  # the same on Colab
    if path.stem == "index":
        for cell in notebook.cells:
            cell.source = ROW.sub(
                lambda row: "| {1} | [{0}]({2})".format(*called(path.parent / row[1]), row[1]), cell.source
            )
        return
    first, last = notebook.cells[0], notebook.cells[-1]
    if not MINUTES.search(first.source):
        return
    first.source = MINUTES.sub(lambda found: f"**{found[1]} minutes** · {links(path)}", first.source)
    if last.get("id") != "links":
        notebook.cells.append(last := nbformat.v4.new_markdown_cell(id="links"))
    last.source = links(path)


def main() -> None:
    """Run the notebooks named on the command line, or all of them, and say how long each took."""
    parser = argparse.ArgumentParser(description="Run notebooks in place and normalise what they store.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of notebooks/")
    parser.add_argument("--timeout", type=int, default=120, help="seconds a cell may take (default: 120)")
    parser.add_argument("--links", action="store_true", help="run nothing: renew the links and the folded cells alone")
    arguments = parser.parse_args()
    for path in arguments.notebooks or course():
        started = time.perf_counter()
        if not arguments.links:
            run(path, arguments.timeout)
        notebook = nbformat.read(path, as_version=4)
        dress(notebook, path)
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
