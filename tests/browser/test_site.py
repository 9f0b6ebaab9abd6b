"""The static pages in a real browser, built, served under a path prefix, and with no other host in reach."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest

import bigkit
from bigkit.machine.hardware import machine_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the pages, as a host serves them that has other pages too."""
    from make_site import Missing, build

    served = tmp_path_factory.mktemp("served")
    try:
        build(served / "some" / "prefix", ROOT / "build" / "npm")
    except Missing as error:
        pytest.skip(f"the pages cannot be built: {error}")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(served)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/some/prefix/"
    server.shutdown()
    server.server_close()


@pytest.fixture
def page(browser: Browser, site: str) -> Iterator[Page]:
    """A page that fails the test if it asks another host for something, or if its scripts fail."""
    page = browser.new_page()
    wrong: list[str] = []
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith(site) else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    yield page
    page.close()
    assert wrong == []


def settle(page: Page) -> None:
    """Wait until Python has answered the last question."""
    page.wait_for_function("document.body.dataset.state === 'idle'", timeout=60_000)


def test_the_pages_answer_keep_their_state_and_take_bad_input(page: Page, site: str) -> None:
    from playwright.sync_api import expect

    page.goto(site)
    expect(page.locator(".picture svg").first).to_be_visible()  # made by the build: it waits for no Python
    settle(page)
    expect(page.locator("#headline")).to_contain_text("tokens/s")

    page.fill("#field-machine", "2 x L4")  # whatever is named under one question is meant under the others
    page.press("#field-machine", "Enter")
    page.click("#tab-plan")
    settle(page)
    page.select_option("#field-stored", "nf4")
    page.get_by_label("GPU 1, GiB").first.fill("10")
    settle(page)
    machine = machine_of("2 x L4")
    budgets = {0: round(22.49 * 2**30), 1: "10GiB", "cpu": machine.ram, "disk": machine.disk}
    plan = bigkit.plan("qwen3-32b", budgets, dtype="bfloat16", quantization="nf4", context=4096, hardware=machine)
    expect(page.locator("#verdict")).to_contain_text(f"{plan.max_context:,} tokens")

    said = page.locator("#verdict").inner_text()
    page.reload()  # what somebody sees who was sent the address
    settle(page)
    assert page.locator("#verdict").inner_text() == said
    assert page.get_by_label("GPU 1, GiB").first.input_value() == "10"

    page.focus("#pictures")  # the last mark of the picture is a boundary, which keys move as a hand does
    page.keyboard.press("End")
    page.keyboard.press("Shift+ArrowLeft")
    expect(page.locator("#facts")).to_contain_text("a map of your own")
    assert "custom=" in page.url
    page.keyboard.press("Control+z")
    expect(page.locator("#verdict")).to_have_text(said.replace("\n", " "))

    page.fill("#field-model", "<img src=x onerror=alert(1)>")
    page.press("#field-model", "Enter")
    settle(page)
    expect(page.locator("#error")).to_contain_text("<img src=x onerror=alert(1)>")
    assert page.locator("#answer.stale").count() == 1 and page.locator("img").count() == 0
    page.click("#reset")
    settle(page)
    expect(page.locator("#error")).to_be_hidden()

    page.goto(f"{site}#files?model=gpt2&limit=200MB&find={quote('h.3.')}")
    settle(page)
    expect(page.locator("#headline")).to_have_text("3 files.")
    page.goto(f"{site}#watch?preset=everything+in+RAM&step=9999")
    settle(page)
    expect(page.locator("#facts")).to_contain_text("as the whole model does")
    for tab, field in (("split", "items"), ("fit", "batch"), ("plan", "custom"), ("plan", "gpus"), ("files", "limit")):
        page.goto(f"{site}#{tab}?{field}=99999999999999999999")  # an answer at once, whatever a link says
        settle(page)
        expect(page.locator("#error")).to_contain_text("99999999999999999999")
    page.goto(f"{site}#fit?model=gpt2&machine=a+toaster")
    settle(page)
    expect(page.locator("#error")).to_contain_text("unknown hardware 'a toaster'")
