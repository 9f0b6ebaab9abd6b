"""Accelerate's own tests, with `bigkit.accelerate` in the place of `accelerate`.

    python -m tests.accelerate.adapter path/to/accelerate/tests/test_hooks.py    prints the test as it would run

The change is the one that a user makes: the imports. A name that bigkit leaves out becomes something that skips the
test which uses it. What helps the tests themselves (`accelerate.test_utils`) stays Accelerate's.
"""

import ast
import importlib
import inspect
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bigkit.accelerate.differences import reason_left_out

HELPERS = ("accelerate.test_utils", "accelerate.commands")


class LeftOut:
    """Stands for a name that bigkit leaves out."""

    def __init__(self, name):
        self.__dict__["name"] = name

    def __call__(self, *args, **kwargs):
        if self.name.endswith("_available"):
            return False
        reason = f"{self.name} is left out: {reason_left_out(self.name) or 'its module is'}"
        decorated = args and (inspect.isclass(args[0]) or inspect.isfunction(args[0]))
        if decorated and "<locals>" not in args[0].__qualname__:  # a test
            return pytest.mark.skip(reason=reason)(args[0])
        pytest.skip(reason)

    def __getattr__(self, attribute):
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return self()


class _Adapter(ast.NodeTransformer):
    def visit_ImportFrom(self, node):
        if node.module is None or node.module.split(".")[0] != "accelerate" or node.module.startswith(HELPERS):
            return node
        path, lines = f"bigkit.{node.module}", []
        whole = find_spec(path) is None  # a module that is out of scope, such as accelerate.data_loader
        there = {} if whole else vars(importlib.import_module(path))
        for alias in node.names:
            name = alias.asname or alias.name
            if alias.name in there:
                lines.append(f"from {path} import {alias.name} as {name}")
            else:
                assert whole or reason_left_out(alias.name), f"{path} has no {alias.name}, and no reason says why"
                lines += ["from tests.accelerate.adapter import LeftOut", f"{name} = LeftOut({alias.name!r})"]
        return ast.parse("\n".join(lines)).body

    def visit_Constant(self, node):
        if isinstance(node.value, str) and node.value.startswith("accelerate."):
            return ast.Constant("bigkit." + node.value)  # what a test patches, or whose log it reads
        return node


def adapt(source: str) -> str:
    """The source of a test with `bigkit.accelerate` in the place of `accelerate`."""
    return ast.unparse(ast.fix_missing_locations(_Adapter().visit(ast.parse(source))))


if __name__ == "__main__":
    print(adapt(Path(sys.argv[1]).read_text(encoding="utf-8")))
