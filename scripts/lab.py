"""Start JupyterLab on the index of the course (`make lab`).

The course's own notebooks are trusted, so that JupyterLab shows their stored pictures before anything has run.

Works as root, without a display (the address is printed instead of opened) and with the port taken (JupyterLab takes
the next free one). Arguments are passed on: `.venv/bin/python scripts/lab.py --port 9000`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
from nbformat.sign import NotebookNotary

ROOT = Path(__file__).resolve().parent.parent


def options() -> list[str]:
    """JupyterLab's command line for this machine."""
    chosen = [
        f"--ServerApp.root_dir={ROOT}",
        "--ServerApp.answer_yes=True",  # Ctrl-C stops it at once, with no question
        "--LabApp.news_url=None",  # no question about announcements, no look at the network
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.default_url=/lab/tree/notebooks/index.ipynb",
    ]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        chosen.append("--allow-root")
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        chosen.append("--no-browser")
    return chosen


def trust() -> None:
    """Sign the notebooks as they are in this folder, as `jupyter trust` does."""
    notary = NotebookNotary()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        notary.sign(nbformat.read(path, as_version=4))


if __name__ == "__main__":
    os.chdir(ROOT)
    trust()
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", *options(), *sys.argv[1:]])
