"""Build the reference from the docstrings (`make docs`), with pdoc: build/docs/index.html.

    .venv/bin/python scripts/make_docs.py build/docs

Public names are imported when they are first used; here all are, so that each has its page. A warning is an error: a
docstring that pdoc cannot read is mended, not shown half.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

import pdoc

import bigkit
from bigkit import widgets

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = {"accelerate", "examples", "__init__", "__main__", "__pycache__"}  # others' names, and scripts to start from


def main() -> None:
    """Write the pages, and say how many there are."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "docs"
    started = time.perf_counter()
    for module in (bigkit, widgets):
        for name in module.__all__:
            setattr(module, name, getattr(module, name))
    pdoc.render.configure(docformat="google", footer_text=f"bigkit {bigkit.__version__}", show_source=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # A NamedTuple's `__new__` does not say in which file its annotations are to be read; they are shown as text.
        warnings.filterwarnings("ignore", r"Error parsing type annotation ForwardRef")
        warnings.filterwarnings("ignore", r"Cannot determine where .*\._is_param is taken from")  # set by torch
        bigkit.__all__ += sorted({path.stem for path in (ROOT / "bigkit").iterdir()} - LEFT_OUT - {*bigkit.__all__})
        pdoc.pdoc("bigkit", r"!bigkit\.\w+\._\w+", output_directory=folder)  # without files for private names
    pages = len([*folder.rglob("*.html")])
    print(f"{folder / 'index.html'}: {pages} pages in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
