"""`accelerate.logging`: one line for all processes, or one for each in their order."""

from __future__ import annotations

import logging
import os
from collections.abc import MutableMapping
from functools import cache
from typing import Any

from ..distributed.state import PartialState


class MultiProcessAdapter(logging.LoggerAdapter):
    """A logger for several processes. Each call takes two options more.

    main_process_only: only process 0 logs (True).
    in_order: every process logs, one after the other; all must come to this call (False).
    """

    def log(self, level: int, msg: Any, *args: Any, **kwargs: Any) -> None:
        """Log on this process, if it is its turn."""
        only_main, in_order = kwargs.pop("main_process_only", True), kwargs.pop("in_order", False)
        if not self.isEnabledFor(level):
            return
        state = PartialState()
        msg, options = self.process(msg, kwargs)
        if not in_order:
            if state.is_main_process or not only_main:
                self.logger.log(level, msg, *args, **options)
            return
        for turn in range(state.num_processes):
            if turn == state.process_index:
                self.logger.log(level, msg, *args, **options)
            state.wait_for_everyone()

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """The message after the number of the process; the line that is shown is the caller's."""
        kwargs.setdefault("stacklevel", 2)
        return f"[RANK {PartialState().process_index}] {msg}", kwargs

    @cache  # noqa: B019 - loggers live as long as the program
    def warning_once(self, *args: Any, **kwargs: Any) -> None:
        """`warning`, once for the same arguments."""
        self.warning(*args, **kwargs)


def get_logger(name: str, log_level: str | None = None) -> MultiProcessAdapter:
    """The logger of this name, made for several processes.

    Args:
        name: usually `__name__`.
        log_level: such as "INFO"; None takes that of the environment variable ACCELERATE_LOG_LEVEL, if it is set.

    >>> get_logger("demo").name
    'demo'
    """
    logger = logging.getLogger(name)
    if level := log_level or os.environ.get("ACCELERATE_LOG_LEVEL"):
        logger.setLevel(level.upper())
        logger.root.setLevel(level.upper())
    return MultiProcessAdapter(logger, {})
