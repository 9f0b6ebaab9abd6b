"""LSTM, GRU and plain recurrent layers on a GPU that is not there: cuDNN's kernel, which PyTorch would choose.

Left alone, PyTorch looks for cuDNN on the real GPU. Leaves out: dropout between layers, and cuDNN's workspace.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._torch import RECURRENT

# Function -> (its number in cuDNN, gates: how many times as many rows as the hidden size its weights have).
KINDS = {torch.rnn_relu: (0, 1), torch.rnn_tanh: (1, 1), torch.lstm: (2, 4), torch.gru: (3, 3)}


def run_recurrent(func: Any, *args: Any) -> tuple[Tensor, ...]:
    """`torch.lstm` and its kin, with their arguments: (output, h) or, of an LSTM, (output, h, c).

    The first is what comes in, (batch, tokens, width) or (tokens, batch, width), or the rows of a PackedSequence with
    how many sequences each step has.
    """
    kind, gates = KINDS[func]
    packed = not isinstance(args[3], bool)  # the argument after the weights says whether they have biases
    sizes: list[int] = args[1].tolist() if packed else []
    state, weights, biases, layers, _, training, both_ways = args[2:9] if packed else args[1:8]
    h, c = state if kind == 2 else (state, None)
    hidden = weights[0].shape[0] // gates
    projected = h.shape[-1] if h.shape[-1] != hidden else 0
    each = (4 if biases else 2) + bool(projected)  # tensors of one layer in one direction
    batch_first = not packed and args[8]
    shape = (hidden, projected, layers, batch_first, 0.0, training, both_ways)
    found = RECURRENT(args[0], weights, each, None, h, c, kind, *shape, sizes, None)
    return tuple(found[: 3 if kind == 2 else 2])
