"""`accelerate.launchers`: a function in several processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..distributed.notebook import notebook_launcher
from ..distributed.state import USE_CPU
from .differences import refuse_unknown as __getattr__
from .utils.environment import patch_environment


def debug_launcher(function: Callable[..., Any], args: Sequence[Any] = (), num_processes: int = 2) -> list[Any]:
    """`notebook_launcher` on the CPU.

    Args:
        function, args: see `notebook_launcher`.
        num_processes: how many processes to start.
    """
    with patch_environment(**{USE_CPU: 1}):
        return notebook_launcher(function, args, num_processes)
