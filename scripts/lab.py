"""Start JupyterLab on the index of the course (`make lab`).

The course's own notebooks are trusted, so that JupyterLab shows their stored pictures before anything has run.

You work on copies in my-notebooks/, which git ignores: what you write there stays yours, Lab may save as it likes, and
the checkout stays clean. A copy that you have not changed follows the course at the next start; one that you have
changed is kept, and a line says so. `scripts/lab.py --originals` opens notebooks/ itself, for those who write it.

Works as root, without a display (the address is printed instead of opened) and with the port taken (JupyterLab takes
the next free one). Other arguments are passed on: `.venv/bin/python scripts/lab.py --port 9000`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import nbformat
from nbformat.sign import NotebookNotary

ROOT = Path(__file__).resolve().parent.parent
COURSE, OWN = ROOT / "notebooks", ROOT / "my-notebooks"
SETTINGS = ROOT / "scripts" / "jupyter"  # defaults that a user's own settings overrule: no question about news


def refresh(course: Path, own: Path) -> list[str]:
    """Bring the copies in `own` up to the course; returns the names of those that were changed by both and are kept."""
    kept, noted = [], own / ".copied.json"
    own.mkdir(exist_ok=True)
    copied: dict[str, list[str]] = json.loads(noted.read_text()) if noted.exists() else {}
    for path in sorted([*course.glob("*.ipynb"), *course.glob("images/*")]):
        name = path.relative_to(course).as_posix()
        copy, new = own / name, [_written(path), _hash(path)]
        old = copied.get(name, ["", ""])
        if copy.exists() and _written(copy) not in (old[0], new[0]):
            if old != new:
                kept.append(name)
            continue
        if old == new and copy.exists():
            continue
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
        copied[name] = new
    noted.write_text(json.dumps(copied, indent=1))
    return kept


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _written(path: Path) -> str:
    """A hash of what somebody wrote there: of a notebook only its cells, as JupyterLab saves outputs unasked."""
    try:
        cells = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4).cells
    except Exception:  # no notebook
        return _hash(path)
    text = json.dumps([[cell.cell_type, cell.source] for cell in cells])
    return hashlib.sha256(text.encode()).hexdigest()


def options(folder: Path) -> list[str]:
    """JupyterLab's command line for this machine."""
    chosen = [
        f"--ServerApp.root_dir={ROOT}",
        "--ServerApp.answer_yes=True",  # Ctrl-C stops it at once, with no question
        "--LabApp.news_url=None",  # no look at the network
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        f"--LabApp.default_url=/lab/tree/{folder.name}/index.ipynb",
    ]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        chosen.append("--allow-root")
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        chosen.append("--no-browser")
    return chosen


def trust() -> None:
    """Sign the course's notebooks, as `jupyter trust` does; a copy that is the same is trusted with them."""
    notary = NotebookNotary()
    for path in COURSE.glob("*.ipynb"):
        notary.sign(nbformat.read(path, as_version=4))


def main() -> None:
    """Copy what is new, and start Lab in the place of this process."""
    originals = "--originals" in sys.argv
    passed = [argument for argument in sys.argv[1:] if argument != "--originals"]
    for name in [] if originals else refresh(COURSE, OWN):
        print(f"{OWN.name}/{name} is yours and stays as it is; the course has a newer one in {COURSE.name}/{name}")
    trust()
    paths = [str(SETTINGS), *filter(None, [os.environ.get("JUPYTER_CONFIG_PATH")])]
    os.environ["JUPYTER_CONFIG_PATH"] = os.pathsep.join(paths)
    os.chdir(ROOT)
    command = [sys.executable, "-m", "jupyterlab", *options(COURSE if originals else OWN), *passed]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
