"""What is private in PyTorch and needed here: the history of its CUDA allocator, and the workspaces that cuBLAS keeps.

All of it was seen in torch 2.15. `tests/measure/test_private_parts.py` says in a sentence what is gone.
"""

from __future__ import annotations

from typing import Any

import torch

MOST_EVENTS = 2_000_000  # requests, frees and segments that a history holds before it forgets the first


def clear_cublas_workspaces() -> None:
    """Free the memory that cuBLAS keeps for its next matrix product, on all GPUs."""
    torch._C._cuda_clearCublasWorkspaces()


def records_history() -> bool:
    """Whether somebody records what is asked of the allocator. With what options cannot be asked."""
    return torch.cuda.is_initialized() and bool(torch._C._cuda_isHistoryEnabled())  # before, the call is a crash


def start_history() -> None:
    """Record what is asked of the allocator from now on, without Python's stacks."""
    torch.cuda.memory._record_memory_history("all", context=None, max_entries=MOST_EVENTS)


def history(device: int) -> list[dict[str, Any]]:
    """What was asked of one GPU since `start_history`, in order: each event's "action", "addr", "size" and "stream"."""
    events: list[dict[str, Any]] = torch.cuda.memory._snapshot()["device_traces"][device]
    return events


def stop_history() -> None:
    """Record no more."""
    torch.cuda.memory._record_memory_history(None)
