"""`accelerate.utils.tqdm`: a progress bar for all processes together."""

from __future__ import annotations

from typing import Any

from ...distributed.state import PartialState


def tqdm(*args: Any, main_process_only: bool = True, **kwargs: Any) -> Any:
    """`tqdm.auto.tqdm`, shown by process 0 of each host alone unless `main_process_only` is False."""
    from tqdm.auto import tqdm as bar

    hidden = main_process_only and not PartialState().is_local_main_process
    return bar(*args, **{**kwargs, "disable": hidden or kwargs.get("disable", False)})
