"""All explorers as one page of Voilà, under a path prefix, as a JupyterHub or a proxy shows it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def app(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the page."""
    if importlib.util.find_spec("voila") is None:
        pytest.skip("Voilà is not installed: pip install 'bigkit[app]'")
    from tests.browser.lab import answers, free_port

    home = tmp_path_factory.mktemp("home")
    ours = {f"JUPYTER_{kind}_DIR": str(home / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    address = f"http://127.0.0.1:{free_port()}/some/prefix/"
    options = ["--no-browser", "--port", address.split(":")[2].partition("/")[0], "--Voila.base_url=/some/prefix/"]
    log = home / "server.log"
    with log.open("w") as out:
        command = [sys.executable, "-m", "bigkit.widgets.app", *options]
        server = subprocess.Popen(command, env=os.environ | ours, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 60
        while not answers(f"{address}voila/static/voila.js") and server.poll() is None:
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        assert server.poll() is None, log.read_text()[-3000:]
        yield address
    finally:
        server.terminate()
        server.wait(20)


def test_the_page_has_every_explorer_and_no_code(browser: Browser, app: str, screenshots: Path) -> None:
    from playwright.sync_api import expect

    from bigkit.widgets.app import TABS

    with browser.new_page(viewport={"width": 1440, "height": 900}) as page:
        page.goto(app)
        expect(page.locator(".bigkit-explorer svg").first).to_be_visible(timeout=60_000)
        tabs = page.get_by_role("tab")
        assert tabs.all_inner_texts() == [*TABS] and page.get_by_text("import App").count() == 0
        explorer = page.locator(".bigkit-explorer").first
        model = explorer.get_by_label("Model").first
        model.fill("<b>no such/model</b>")
        model.press("Enter")
        expect(explorer.locator("[role=alert]")).to_contain_text("<b>no such/model</b>", timeout=30_000)
        page.screenshot(path=screenshots / "app.png")
        tabs.filter(has_text="Who gets which prompt?").click()
        expect(page.locator(".bigkit-items-slider:visible")).to_have_count(1)
