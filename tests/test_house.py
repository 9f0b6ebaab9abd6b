"""The house: every wing imports only from its left, examples in docstrings run, and public names are documented."""

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bigkit

ROOT = Path(bigkit.__file__).parent
# Left to right: a wing (a folder, or a file on top) imports only wings to its left, and `distributed` none at all.
ORDER = [
    "units", "course", "devices", "distributed", "model", "machine", "meta", "zoo", "maps", "checkpoints", "offload",
    "quantize", "hosts", "dryrun", "measure", "draw", "api", "listings", "examples", "widgets", "accelerate", "cli",
    "__main__",
]  # fmt: skip
WITHOUT_TORCH = {*ORDER[:3], "model", "machine", "zoo", "maps", "api", "listings", "cli", "__main__"}  # wings, but for:
WITH_TORCH = {"zoo.build", "zoo.gpt", "zoo.guesses", "zoo.kv_cache", "maps.device_map"}
MODULES = sorted(
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
)


def inner_imports(module):
    """Names of bigkit modules that a module imports, at its top or in functions; names for types alone left out."""
    path = ROOT.parent / Path(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            path = [*base, *(node.module.split(".") if node.module else [])]
            yield from {(path + [alias.name])[1] for alias in node.names} & {*ORDER}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_to_the_left(module):
    if module == "bigkit":
        return
    own = module.split(".")[1]
    assert own in ORDER, f"{own} has no place in the order yet"
    for other in inner_imports(module):
        assert ORDER.index(other) <= ORDER.index(own), f"{module} imports {other}, which lies to its right"
        assert own != "distributed" or other == own, f"{module} imports {other}: `distributed` stands alone"


def test_the_planner_needs_no_torch():
    own = [name.removeprefix("bigkit.") for name in MODULES if name != "bigkit"]
    names = [name for name in own if name.split(".")[0] in WITHOUT_TORCH and name not in WITH_TORCH]
    code = (
        f"import {', '.join('bigkit.' + name for name in names)}, sys; print({{'torch', 'numpy'}} & {{*sys.modules}})"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module):
    failed, _ = doctest.testmod(importlib.import_module(module))
    assert not failed


@pytest.mark.parametrize("name", [name for name in bigkit.__all__ if name not in ("__version__", "zoo", "HARDWARE")])
def test_public_names_are_documented_with_an_example(name):
    thing = getattr(bigkit, name)
    text = inspect.getdoc(thing) or ""
    assert len(text) > 40, name
    if inspect.isfunction(thing):
        assert ">>>" in text, f"{name} has no example"


def test_the_core_is_an_evening():
    """README's "Read it tonight" lists the core in reading order."""
    chapter = (ROOT.parent / "README.md").read_text(encoding="utf-8").split("## Read it tonight")[1].split("\n## ")[0]
    core = re.findall(r"\]\((bigkit/[\w/]+\.py)\)", chapter)
    assert len(core) == len(set(core)) == 16
    lines = {file: len((ROOT.parent / file).read_text(encoding="utf-8").splitlines()) for file in core}
    assert sum(lines.values()) <= 4000, lines


def test_library_never_imports_accelerate():
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "accelerate" for name in names), path


@pytest.mark.parametrize("module", [name for name in MODULES if name != "bigkit.units"])
def test_quantities_are_said_by_units(module):
    """No f-string divides by a million or 2**30 itself, or writes a unit behind a number that it rounds."""
    unit = re.compile(r"\s?([KMGT]i?B|[mµ]?s|M|B|tokens(/s| a second))\b")
    for node in ast.walk(ast.parse(inspect.getsource(importlib.import_module(module)))):
        if not isinstance(node, ast.JoinedStr):
            continue
        for value, following in zip(node.values, [*node.values[1:], None]):
            if isinstance(value, ast.FormattedValue) and value.format_spec is not None:
                rounds = ast.unparse(value.format_spec).rstrip("'\"").endswith(("f", "g"))
                text = str(following.value) if isinstance(following, ast.Constant) else ""
                divides = isinstance(value.value, ast.BinOp) and isinstance(value.value.op, ast.Div)
                by = ast.unparse(value.value.right) if divides else ""
                assert not (rounds and unit.match(text)), f"{module}: {ast.unparse(node)}"
                assert not re.fullmatch(r"1?0*e?\d{4,}.*|1e\d+|(2|10) \*\* \d+|1000|1024", by), (
                    f"{module}: {ast.unparse(node)}"
                )
