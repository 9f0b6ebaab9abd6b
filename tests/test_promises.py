"""Each promise in tests/README.md is held by tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
PAGE = (HERE / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (?!Promise)([^|]+) \| ([^|]+) \|$", PAGE.split("\n## ")[0], re.MULTILINE)


@pytest.mark.parametrize("promise, tests", ROWS, ids=[promise[:40] for promise, _ in ROWS])
def test_a_promise_is_held_by_tests_that_exist(promise: str, tests: str) -> None:
    named = re.findall(r"\[`(test_\w+)`\]\(([\w/]+\.py)\)", tests)
    assert named and len(named) == tests.count("](")
    for name, file in named:
        assert re.search(rf"^def {name}\(", (HERE / file).read_text(encoding="utf-8"), re.MULTILINE), f"{file}: {name}"


def test_every_file_that_the_page_names_exists() -> None:
    assert len(ROWS) > 10
    assert [link for link in re.findall(r"\]\(([\w/.]+)\)", PAGE) if not (HERE / link).exists()] == []
