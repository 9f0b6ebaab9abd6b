"""What `pytest --nbval notebooks/` leaves out of its comparison (stderr, since warnings name process ids and paths).

And its kernels: each is forked from a process that has imported torch and matplotlib, once for all notebooks. `make
places` starts each as a reader does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest.mock import patch

import pytest

from tests.forked import Kernel


def pytest_collectstart(collector: pytest.Collector) -> None:
    if hasattr(collector, "skip_compare"):  # nbval's notebook file
        collector.skip_compare += ("stderr",)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_setup() -> Iterator[None]:
    if hasattr(os, "fork"):
        with patch("jupyter_client.provisioning.local_provisioner.launch_kernel", Kernel):
            yield
    else:
        yield
