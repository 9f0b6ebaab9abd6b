"""Run notebooks in place and store their outputs as the policy wants them.

    .venv/bin/python scripts/run_notebooks.py                      # all of notebooks/
    .venv/bin/python scripts/run_notebooks.py notebooks/02-*.ipynb

Stored outputs are what `pytest --nbval notebooks/` compares with. Left out of them is what changes from run to run and
says nothing: widget models and views (the `repr` beside a view stays), stderr, timestamps, the kernel's version.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
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


def main() -> None:
    """Run the notebooks named on the command line, or all of them, and say how long each took."""
    parser = argparse.ArgumentParser(description="Run notebooks in place and normalise what they store.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of notebooks/")
    parser.add_argument("--timeout", type=int, default=120, help="seconds a cell may take (default: 120)")
    arguments = parser.parse_args()
    for path in arguments.notebooks or sorted((ROOT / "notebooks").glob("*.ipynb")):
        started = time.perf_counter()
        run(path, arguments.timeout)
        print(f"{path.name}: {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
