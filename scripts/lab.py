"""Start JupyterLab on the first notebook (`make lab`).

Works as root, without a display (the address is printed instead of opened) and with the port taken (JupyterLab takes
the next free one). Arguments are passed on: `.venv/bin/python scripts/lab.py --port 9000`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def options() -> list[str]:
    """JupyterLab's command line for this machine."""
    first = min((ROOT / "notebooks").glob("*.ipynb"), default=None)
    chosen = [
        f"--ServerApp.root_dir={ROOT}",
        "--ServerApp.answer_yes=True",  # Ctrl-C stops it at once, with no question
        "--LabApp.news_url=None",  # no question about announcements, no look at the network
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    if first is not None:
        chosen.append(f"--LabApp.default_url=/lab/tree/{first.relative_to(ROOT).as_posix()}")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        chosen.append("--allow-root")
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        chosen.append("--no-browser")
    return chosen


if __name__ == "__main__":
    os.chdir(ROOT)
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", *options(), *sys.argv[1:]])
