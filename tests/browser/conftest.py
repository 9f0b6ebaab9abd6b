"""Fixtures of the browser tests. Without Playwright or a browser they skip and say why.

`BIGKIT_REQUIRE_BROWSER=1`, which CI sets, makes a failure of what would be a skip.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.browser.lab import Lab

ROOT = Path(__file__).resolve().parent.parent.parent


def missing(what: str) -> None:
    """Skip the test for want of `what`, or fail it where a browser is required."""
    if os.environ.get("BIGKIT_REQUIRE_BROWSER", "0") not in ("", "0"):
        pytest.fail(f"BIGKIT_REQUIRE_BROWSER is set, but {what}", pytrace=False)
    pytest.skip(what)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium, shared by all browser tests."""
    if importlib.util.find_spec("playwright") is None:
        missing("Playwright is not installed: pip install playwright")
    from playwright.sync_api import expect

    from tests.browser.lab import chromium, find_chromium

    expect.set_options(timeout=15_000)  # other tests run meanwhile
    path = find_chromium()
    if path is None:
        missing("no Chromium or Chrome is on PATH: install one, or name it in BIGKIT_CHROMIUM")
    with chromium(str(path)) as started:
        yield started


@pytest.fixture(scope="session")
def lab(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """JupyterLab, shared by all browser tests."""
    from tests.browser.lab import Lab, running_lab

    folder = tmp_path_factory.mktemp("notebooks")
    with running_lab(folder, tmp_path_factory.mktemp("home")) as address:
        yield Lab(address, folder)


@pytest.fixture(scope="session")
def screenshots() -> Path:
    """Where screenshots go: screenshots/, which git ignores."""
    folder = ROOT / "screenshots"
    folder.mkdir(exist_ok=True)
    return folder
