"""Explorers: ipywidgets panels that turn a question about memory, files or time with sliders.

Each is imported when it is first used, so that `import bigkit.widgets` is cheap. Plain ipywidgets, 7.7 (Colab) or 8.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

_HOMES = {
    "Advisor": "advisor",
    "DryRunExplorer": "dryrun_explorer",
    "HookTheatre": "hook_theatre",
    "MemoryExplorer": "memory_explorer",
    "PlanExplorer": "plan_explorer",
    "QuantizationLab": "quantization_lab",
    "ShardExplorer": "shard_explorer",
    "SplitExplorer": "split_explorer",
}

__all__ = [
    "Advisor",
    "DryRunExplorer",
    "HookTheatre",
    "MemoryExplorer",
    "PlanExplorer",
    "QuantizationLab",
    "ShardExplorer",
    "SplitExplorer",
]

if TYPE_CHECKING:
    from .advisor import Advisor
    from .dryrun_explorer import DryRunExplorer
    from .hook_theatre import HookTheatre
    from .memory_explorer import MemoryExplorer
    from .plan_explorer import PlanExplorer
    from .quantization_lab import QuantizationLab
    from .shard_explorer import ShardExplorer
    from .split_explorer import SplitExplorer


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'bigkit.widgets' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
