"""Tests that need a CUDA device: skipped, with the reason, where there is none."""

import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _needs_cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(params=[2, 4, 8])
def gpus(request: pytest.FixtureRequest) -> int:
    """How many GPUs a test spreads its model over: each number that is there."""
    if torch.cuda.device_count() < request.param:
        pytest.skip(f"needs {request.param} GPUs")
    return int(request.param)


@pytest.fixture(autouse=True)
def _no_tables_are_kept(_needs_cuda):
    """bitsandbytes keeps a table on the GPU, which tests of the allocator would see."""
    yield
    if functional := sys.modules.get("bitsandbytes.functional"):
        functional.name2qmap.clear()
