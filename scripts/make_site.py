"""Build the planner as static pages (`make site`): a folder that any web server can show, with no server behind it.

    .venv/bin/python scripts/make_site.py build/site
    python3 -m http.server -d build/site

The wings of bigkit that import no torch go in unchanged, and run in the browser under Pyodide, whose files are copied
in too: the built site asks no other host for anything. The pages themselves are in scripts/site/; the runs under
"Watch it move" are made here, of the shipped model, and recorded.

Leaves out: putting the folder on a host. All addresses in it are relative, so a path prefix does no harm.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "scripts" / "site"
PYODIDE = "pyodide@314.0.7"  # of npm, with the hash of its archive; both change together
INTEGRITY = "sha512-0YvXxEhfEdpLfb/XkM2BFAeMROq0iMUX2bzzH9pOttyMcWkwq+HbE5uyuGD82LN7y2q+SNvi/6V5JEsOlD2R1A=="
NEEDED = ("pyodide.mjs", "pyodide.asm.mjs", "pyodide.asm.wasm", "python_stdlib.zip", "pyodide-lock.json")
# What the planner imports of bigkit: wings, and single files of wings that otherwise need torch.
WINGS = ("model", "machine", "zoo", "maps", "draw")
FILES = (
    "__init__.py", "units.py", "devices.py", "api.py", "checkpoints/__init__.py", "checkpoints/shards.py",
    "distributed/__init__.py", "distributed/shares.py",
)  # fmt: skip


class Missing(Exception):
    """Something that the build needs is not on this machine."""


def pyodide(cache: Path) -> Path:
    """The archive of Pyodide in the folder `cache`, brought by npm if it is not there yet.

    Raises:
        Missing: npm is not installed, did not bring it, or brought other bytes than those that are pinned.
    """
    archive = cache / f"{PYODIDE.replace('@', '-')}.tgz"
    if not archive.exists():
        if (npm := shutil.which("npm")) is None:
            raise Missing(f"npm is not installed: install Node.js, or put the archive of {PYODIDE} at {archive}")
        cache.mkdir(parents=True, exist_ok=True)
        done = subprocess.run([npm, "pack", PYODIDE], cwd=cache, capture_output=True, text=True)
        if done.returncode or not archive.exists():
            why = (done.stderr.strip().splitlines() or ["it gave no reason"])[0]
            raise Missing(f"npm did not bring {PYODIDE} ({why}): put its archive at {archive}")
    found = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != INTEGRITY:
        raise Missing(f"{archive} is not {PYODIDE} as it was pinned: its hash is {found}; remove it and build again")
    return archive


def sources() -> Iterator[tuple[Path, str]]:
    """The files of bigkit that the planner needs, with their names in the archive."""
    package = ROOT / "bigkit"
    files = [package / name for name in FILES]
    for wing in WINGS:
        files += sorted(path for path in (package / wing).rglob("*") if path.suffix in (".py", ".json", ".gz"))
    trained = [package / "zoo" / name for name in ("pygpt", "pymoe")]  # their weights stay at home
    for path in files:
        if not any(path.is_relative_to(folder) for folder in trained) or path.name == "config.json":
            yield path, path.relative_to(ROOT).as_posix()


def recorded_runs(slots: dict[str, int]) -> dict[str, Any]:
    """The presets of `HookTheatre`, each run for real: its units, and what it wrote.

    Every way to bring the weights is run, and compared with the schedule that the page will compute.
    """
    from bigkit.widgets import HookTheatre
    from bigkit.widgets.hook_theatre import ONE_BY_ONE, PREFETCH, PRESETS

    runs = {}
    for preset in PRESETS:
        theatre = HookTheatre(preset)
        for way, count in slots.items():
            with theatre.together():
                theatre.mode.value = ONE_BY_ONE if way == ONE_BY_ONE else PREFETCH
                theatre.slots.value = count
            if theatre.error.value:
                raise RuntimeError(f"{preset}, {way}: {theatre.error.value}")
        wrote, equal = theatre.recording.result
        if not equal:
            raise RuntimeError(f"{preset}: it wrote {wrote!r}, and the whole model does not")
        turns = [[name.removeprefix("transformer."), *unit] for name, unit in theatre.recording.units.items()]
        runs[preset] = {"turns": turns, "wrote": wrote}
    return runs


def build(site: Path, cache: Path) -> None:
    """Build the site into the folder `site`, which is replaced.

    Raises:
        Missing: see `pyodide`.
    """
    archive = pyodide(cache)
    sys.path.insert(0, str(PAGES))
    import planner

    shutil.rmtree(site, ignore_errors=True)
    (site / "pyodide").mkdir(parents=True)
    for name in ("index.html", "site.css", "page.js", "worker.js"):
        shutil.copy(PAGES / name, site / name)
    for name in ("touch.js", "explorer.css"):
        shutil.copy(ROOT / "bigkit" / "widgets" / name, site / name)
    with tarfile.open(archive) as packed:
        for name in NEEDED:
            member = packed.extractfile(f"package/{name}")
            assert member is not None
            (site / "pyodide" / name).write_bytes(member.read())
    runs = site / "runs.json"
    runs.write_text(json.dumps(recorded_runs(planner.SLOTS)))
    planner.RUNS = runs
    planner._runs.cache_clear()
    with zipfile.ZipFile(site / "bigkit.zip", "w", zipfile.ZIP_DEFLATED) as packed_site:
        for path, name in sources():
            packed_site.write(path, name)
        packed_site.write(PAGES / "planner.py", "planner.py")
        packed_site.write(runs, "runs.json")
    form = planner.form()
    answers = {tab: planner.answer(tab, {}) for tab in form["tabs"]}
    if wrong := {tab: said["error"] for tab, said in answers.items() if "error" in said}:
        raise RuntimeError(f"a first answer is wrong: {wrong}")
    (site / "first.json").write_text(json.dumps({"form": form, "answers": answers}))
    runs.unlink()  # it is in the archive


def main() -> int:
    """Build, and say what was built and how to look at it."""
    parser = argparse.ArgumentParser(description="Build the planner as static pages.")
    parser.add_argument("site", nargs="?", type=Path, default=ROOT / "build" / "site", help="folder (build/site)")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "npm", help="where npm's archive is kept")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        build(arguments.site, arguments.cache)
    except Missing as error:
        print(f"make site: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in arguments.site.rglob("*") if path.is_file())
    print(f"{arguments.site}: {size / 1e6:.1f} MB. To look at it: python3 -m http.server -d {arguments.site}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
