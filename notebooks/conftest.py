"""What `pytest --nbval notebooks/` leaves out of its comparison: stderr, since warnings name process ids and paths."""

from __future__ import annotations

import pytest


def pytest_collectstart(collector: pytest.Collector) -> None:
    if hasattr(collector, "skip_compare"):  # nbval's notebook file
        collector.skip_compare += ("stderr",)
