"""A person at JupyterLab: a real server, a real Chromium, and the few verbs that the browser tests need.

    with running_lab(folder, home) as address, chromium(find_chromium()) as browser:
        notebook = LabNotebook.open(browser.new_page(), address, "02-place-layers.ipynb")
        notebook.run_all()
        notebook.run("explorer")

Leaves out: what the widgets should show, which the tests say.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

# Headless Chromium asks the network for nothing, and runs as root in a container.
CHROMIUM_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip

# JupyterLab keeps cells that are off screen out of the page, and asks about news; a test wants neither.
SETTINGS = {
    "notebook-extension/tracker": '{"windowingMode": "none"}',
    "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
}


def find_chromium() -> str | None:
    """The path of a Chromium or Chrome on this machine; `BIGKIT_CHROMIUM` overrules what is on PATH."""
    names = (os.environ.get("BIGKIT_CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_lab(notebooks: Path, home: Path) -> Iterator[str]:
    """JupyterLab serving the folder `notebooks`; yields its address, and stops it and its kernels at the end.

    `home` is an empty folder that takes all of Jupyter's settings, so that those of the user play no part.

    Raises:
        RuntimeError: the server ended or did not answer within a minute; its log is in the message.
    """
    for name, text in SETTINGS.items():
        path = home / "lab" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    ours = {f"JUPYTER_{kind}_DIR": str(home / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    ours |= {"IPYTHONDIR": str(home / "ipython"), "JUPYTERLAB_SETTINGS_DIR": str(home / "lab")}
    address = f"http://127.0.0.1:{free_port()}"
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--IdentityProvider.token=",
        "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={address.rpartition(':')[2]}", "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={notebooks}", "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    log = home / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(command, env=os.environ | ours, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 60
        while not answers(f"{address}/api/status"):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def answers(url: str) -> bool:
    """Whether a server at `url` says 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@contextmanager
def chromium(path: str) -> Iterator[Browser]:
    """A headless Chromium, started from the program at `path`."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        try:
            yield browser
        finally:
            browser.close()


class Lab(NamedTuple):
    """A JupyterLab that runs: where it answers, and the folder that it serves."""

    address: str
    folder: Path


@dataclass
class LabNotebook:
    """One notebook, open in a browser page and with a kernel."""

    page: Page

    @classmethod
    def open(cls, page: Page, address: str, name: str, timeout: float = 90) -> LabNotebook:
        """Open the notebook called `name` and wait, `timeout` seconds at most, until its kernel listens to the page."""
        page.goto(f"{address}/lab/workspaces/{Path(name).stem}/tree/{name}")  # one without the others' notebooks
        return cls.opened(page, address, name, timeout)

    @classmethod
    def opened(cls, page: Page, address: str, name: str, timeout: float = 90) -> LabNotebook:
        """The notebook called `name`, which is open, once its kernel listens: what is run before that is dropped."""
        deadline = time.monotonic() + timeout
        while not any(
            session["path"] == name
            and session["kernel"]["connections"]
            and session["kernel"]["execution_state"] == "idle"
            for session in page.request.get(f"{address}/api/sessions").json()
        ):
            assert time.monotonic() < deadline, f"{name} had no idle kernel after {timeout} s"
            page.wait_for_timeout(200)
        return cls(page)

    @property
    def cells(self) -> Locator:
        """The code cells, from the top."""
        return self.page.locator(".jp-Notebook .jp-CodeCell")

    def choose(self, menu: str, command: str) -> None:
        """Choose from the menu bar."""
        self.page.locator(".lm-MenuBar-item", has_text=re.compile(f"^{menu}$")).click()
        self.page.locator(f".lm-Menu-item[data-command='{command}']").click()

    def run_all(self, timeout: float = 120) -> None:
        """Clear the outputs and run all cells, through the menu as a person does; the first error fails the test."""
        self.choose("Edit", "editmenu:clear-all")
        prompts = self.cells.locator(".jp-InputArea-prompt")  # a cell whose code is folded has none
        waiting = prompts.filter(has_text=re.compile(r"\[[ *]\]"))  # not run, or running
        expect(waiting).to_have_count(prompts.count())
        self.choose("Run", "runmenu:run-all")
        deadline = time.monotonic() + timeout
        while waiting.count() and not self.errors():
            assert time.monotonic() < deadline, f"{waiting.count()} cells have not run after {timeout} s"
            self.page.wait_for_timeout(200)
        assert not self.errors(), "a cell failed:\n" + "\n".join(self.errors())

    def errors(self) -> list[str]:
        """The traceback of every cell that shows one. JupyterLab draws them like stderr, which is no error."""
        stderr = self.page.locator(".jp-Notebook [data-mime-type='application/vnd.jupyter.stderr']")
        return stderr.filter(has_text="Traceback (most recent call last)").all_inner_texts()

    def run(self, code: str) -> str:
        """Run `code` in a new last cell; its output as text."""
        count = self.cells.count()
        self.page.locator(".jp-Notebook-footer").click()
        expect(self.cells).to_have_count(count + 1)
        cell = self.cells.nth(count)
        cell.locator(".cm-content").click()
        self.page.keyboard.insert_text(code)
        self.page.keyboard.press("Control+Enter")
        expect(cell.locator(".jp-InputPrompt")).to_have_text(re.compile(r"\[\d+\]"), timeout=60_000)
        return cell.locator(".jp-OutputArea-output").inner_text().strip()
