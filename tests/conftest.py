"""What every test shares: no network, no display, and randomness that repeats.

A connection to anything but this machine fails the test that tried it: what bigkit does for shipped models must work
on a plane.
"""

from __future__ import annotations

import gc
import glob
import ipaddress
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["MPLBACKEND"] = "Agg"
if not glob.glob("/dev/nvidia[0-9]*"):
    os.environ["TRITON_INTERPRET"] = "1"  # kernels of a GPU are tried without one

# Timings belong to benchmarks/; a shared machine must not fail a property because it was slow once.
settings.register_profile("bigkit", deadline=None, print_blob=True)
settings.register_profile("bigkit-ci", settings.get_profile("bigkit"), derandomize=True)
settings.load_profile("bigkit-ci" if os.environ.get("CI") else "bigkit")


# A process of `make test` takes a file at a time: long ones come first, so that no core is left with one at the end.
FIRST, LAST = ("tests/browser", "notebooks", "tests/distributed", "tests/dryrun"), ("tests/draw", "tests/machine")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        folder = next((one for one in (*FIRST, *LAST) if item.nodeid.startswith(f"{one}/")), "")
        return [*FIRST, "", *LAST].index(folder)

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what was imported: looking at it took a twentieth of the time of tests."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def is_this_machine(address: Any) -> bool:
    """Whether a socket address stays on this machine (a Unix socket, loopback, or a name for it)."""
    if not isinstance(address, tuple):
        return True
    host = str(address[0])
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", "")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail whatever connects to another machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if not is_this_machine(address):
            raise AssertionError(f"a test connected to {address!r}: tests use this machine only")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    yield
