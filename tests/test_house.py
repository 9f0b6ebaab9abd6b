"""The house: every floor imports only from below, examples in docstrings run, and public names are documented."""

import ast
import doctest
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import bigkit

ROOT = Path(bigkit.__file__).parent
# Bottom to top. A module may import those before it; a package counts as one module.
ORDER = [
    "units", "allocator", "layers", "shards", "shares", "config", "estimate", "chain", "plans", "schedule", "ledger",
    "hardware", "roofline", "export", "fastest", "planner", "advice",
    "meta", "bulk", "convert", "checkpoint", "zoo", "device_map", "front",
    "store", "away", "lanes", "stream", "resting", "hooks", "dispatch", "observe",
    "packed", "quantize", "rounding",
    "workload", "recording", "fake", "fake_replay", "fake_quantized", "dryrun", "measure", "calibration", "recorder",
    "distributed", "launch", "notebook", "batches", "examples",
    "draw", "draw_run", "draw_dryrun", "draw_advice", "widgets", "cli",
]  # fmt: skip
FLOOR_0 = [name for name in ORDER[: ORDER.index("meta")] if (ROOT / f"{name}.py").exists()]
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
            names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            yield from (part for name in names for part in [(base + [name])[1]] if part in ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    if module == "bigkit":
        return
    own = module.split(".")[1]
    assert own in ORDER, f"{own} has no floor yet"
    for other in inner_imports(module):
        assert ORDER.index(other) <= ORDER.index(own), f"{module} imports {other}, which lies above it"


def test_floor_0_is_plain_python():
    names = ", ".join(f"bigkit.{name}" for name in FLOOR_0)
    code = f"import {names}, bigkit.zoo, bigkit.front, bigkit.cli, sys; print({{'torch', 'numpy'}} & {{*sys.modules}})"
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


def test_library_never_imports_accelerate():
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "accelerate" for name in names), path
