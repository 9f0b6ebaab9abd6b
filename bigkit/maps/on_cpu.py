"""How much of a model the CPU should compute where it rests, while the link brings the rest.

Leaves out: computing it (`offload/on_cpu.py`).
"""

from __future__ import annotations

# A block called with at most so many tokens is computed on the CPU: there it takes about as long as with one.
# (16 cores of an H200's host, PyTorch 2.11, bf16: 62 GB/s of weights for 1 token, 56 for 16, 38 for 64, 7 for 512.)
FEW = 16
