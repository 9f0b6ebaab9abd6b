"""What bigkit uses of PyTorch's processes without a public name; seen in torch 2.11 to 2.15."""

from __future__ import annotations

from typing import Any

from torch.distributed import distributed_c10d
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

# Variables of processes that meet at their launcher's TCPStore; without them process 0 opens a store of its own.
MEET_AT_THE_LAUNCHER = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}


def default_store() -> Any:
    """The key-value store through which the processes of the default group met."""
    return distributed_c10d._get_default_store()


def record_failure(error: Exception) -> None:
    """Leave an exception and its traceback where torchrun looks for the root cause of a failure."""
    try:
        raise error  # what is recorded is the exception being handled
    except Exception as raised:
        get_error_handler().record_exception(raised)
