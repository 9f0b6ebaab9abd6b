"""What `measure/_torch.py` needs of PyTorch's private parts is there; a failure says what no longer works."""

import pytest
import torch


@pytest.mark.parametrize(
    ("owner", "name", "use"),
    [
        (torch._C, "_cuda_clearCublasWorkspaces", "settle() cannot free what cuBLAS keeps"),
        (torch._C, "_cuda_isHistoryEnabled", "record_allocations() cannot ask whether a history is being recorded"),
        (torch.cuda.memory, "_record_memory_history", "record_allocations() cannot record"),
        (torch.cuda.memory, "_snapshot", "record_allocations() cannot read what was recorded"),
    ],
)
def test_private_parts_of_torch(owner, name, use):
    if owner is torch._C and not torch.backends.cuda.is_built():
        pytest.skip("this torch was built without CUDA")
    assert hasattr(owner, name), f"torch {torch.__version__} has no {owner.__name__}.{name}: {use}"
