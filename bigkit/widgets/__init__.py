"""Explorers: ipywidgets panels that turn a question about memory or files with sliders.

Each is imported when it is first used, so that `import bigkit.widgets` is cheap. Plain ipywidgets, 7.7 (Colab) or 8.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

_HOMES = {
    "DryRunExplorer": "dryrun_explorer",
    "MemoryExplorer": "memory_explorer",
    "PlanExplorer": "plan_explorer",
    "ShardExplorer": "shard_explorer",
    "SplitExplorer": "split_explorer",
}

__all__ = ["DryRunExplorer", "MemoryExplorer", "PlanExplorer", "ShardExplorer", "SplitExplorer"]

if TYPE_CHECKING:
    from .dryrun_explorer import DryRunExplorer
    from .memory_explorer import MemoryExplorer
    from .plan_explorer import PlanExplorer
    from .shard_explorer import ShardExplorer
    from .split_explorer import SplitExplorer


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'bigkit.widgets' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
