"""Try the course where it is opened (`make places`): on Colab's side and on Binder's, as far as one machine can.

    .venv/bin/python scripts/try_places.py colab /path/to/python3.13    # ipywidgets 7.7, in an environment of its own
    .venv/bin/python scripts/try_places.py binder                       # one core and 2 GB for each notebook
    .venv/bin/python scripts/try_places.py binder notebooks/07-*.ipynb

`colab` makes build/places, with the pinned versions but for ipywidgets, and runs the tests of the explorers and every
notebook's kernel side. `binder` runs each notebook on one core and stops it when its processes hold more than 2 GB.
Stored outputs are compared, as `make notebooks` does. Either takes up to an hour: no test runs it.

Leaves out: the front ends of those places.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
PLACES = ROOT / "build" / "places"
LIMIT = 2 * 2**30  # bytes that a Binder has
OLD = "ipywidgets>=7.7,<8"
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]


def colab(python: str, notebooks: list[Path]) -> int:
    """Make the environment if it is not there, and run tests and notebooks in it; the exit status."""
    own = PLACES / "bin" / "python"
    if not (PLACES / "made").exists():
        subprocess.run([python, "-m", "venv", "--clear", str(PLACES)], check=True)
        lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        free = ("ipywidgets", "jupyterlab_widgets", "widgetsnbextension")
        pins = PLACES / "constraints.txt"
        pins.write_text("\n".join([line for line in lines if not line.startswith(free)]))
        wanted = ["-e", f"{ROOT}[torch,lab,quant,peft,diffusers,test]", OLD]
        subprocess.run([str(own), "-m", "pip", "install", "-q", "-c", str(pins), *wanted], check=True)
        (PLACES / "made").touch()
    said = "import sys, ipywidgets; print('Python', sys.version.split()[0], 'ipywidgets', ipywidgets.__version__)"
    subprocess.run([str(own), "-c", said], check=True)
    explorers = subprocess.run([str(own), *PYTEST, "tests/widgets"], cwd=ROOT)
    course = subprocess.run([str(own), *PYTEST, "--nbval", *map(str, notebooks)], cwd=ROOT)
    return explorers.returncode or course.returncode


def binder(notebooks: list[Path]) -> int:
    """Run each notebook within a Binder's means, and say what it took; the exit status."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # what is started from here keeps to this core
    wrong = 0
    for path in notebooks:
        started, most = time.monotonic(), 0
        running = subprocess.Popen([sys.executable, *PYTEST, "--nbval", str(path)], cwd=ROOT, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True)  # fmt: skip
        while running.poll() is None and most <= LIMIT:
            most = max(most, held(running.pid))
            time.sleep(0.1)
        if most > LIMIT:
            for process in [*psutil.Process(running.pid).children(recursive=True), running]:
                process.kill()
        output, _ = running.communicate()
        verdict = "too much memory" if most > LIMIT else "failed" if running.returncode else "ok"
        wrong += verdict != "ok"
        print(f"{path.name}: {verdict}, {time.monotonic() - started:.0f} s, {most / 1e9:.2f} GB", flush=True)
        if verdict == "failed":
            print(output[-3000:])
    return min(wrong, 1)


def held(pid: int) -> int:
    """Bytes that a process and its children hold; what they share counts once."""
    total = 0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description="Try the course where it is opened.")
    places = parser.add_subparsers(dest="place", required=True)
    old = places.add_parser("colab", help="another Python, and ipywidgets 7.7")
    old.add_argument("python", help="the interpreter to make the environment with")
    small = places.add_parser("binder", help="one core, 2 GB")
    for place in (old, small):
        place.add_argument("notebooks", nargs="*", type=Path, default=sorted((ROOT / "notebooks").glob("*.ipynb")))
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    paths = [path.resolve() for path in options.notebooks]
    return colab(options.python, paths) if options.place == "colab" else binder(paths)


if __name__ == "__main__":
    sys.exit(main())
