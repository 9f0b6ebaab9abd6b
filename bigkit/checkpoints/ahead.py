"""A block's next stack is decoded while its first one multiplies: on a stream of its own, so that the link never rests.

A token's experts work in two products, of `gate_up_proj` and of `down_proj`, and the second needs nothing of the first
but its turn. Out of pinned RAM a kernel's reads are what the token waits for; so when the first stack's are done, those
of the second begin, beside the product.

Leaves out: what a stack is, and whether a kernel can read it (`decoded.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_BEGUN = "bigkit_begun"  # attribute of a tensor of chosen experts: a stack that is begun for them


class Begun(NamedTuple):
    """A stack that is being decoded before it is asked for. The choice of its experts holds it: where a forward fails
    between two products, both are gone with it.

    Args:
        module: whose it is.
        own: its name.
        weights: what will hold the chosen experts; nothing may touch it before `done`.
        done: the event at which it does.
    """

    module: nn.Module
    own: str
    weights: Tensor
    done: Any


def decoded_in_turn(module: nn.Module, own: str, experts: Tensor, decode: Callable[[str], Tensor]) -> Tensor:
    """Chosen experts of a stack, on the current stream; its follower's are begun beside what comes next there.

    Args:
        module: it has `stacks`, the names of its stacks in the order of their use.
        own: the stack's name.
        experts: numbers of the chosen ones, on a GPU. The follower's are taken from here if it is asked for the same
            tensor, and decoded anew otherwise.
        decode: the name of a stack -> weights, on whatever stream is current.
    """
    current, begun = torch.cuda.current_stream(experts.device), vars(experts).pop(_BEGUN, None)
    if begun is not None and begun.module is module and begun.own == own:
        current.wait_event(begun.done)
        return begun.weights
    weights = decode(own)
    stacks: Any = module.stacks
    if own != stacks[-1]:
        following, stream = stacks[stacks.index(own) + 1], _stream(experts.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            # Its memory is this stream's. Who takes it next, on this stream, has waited for whoever read it; and what
            # nobody has asked for (an error came between) is let go without a wait.
            ahead = decode(following)
            vars(experts)[_BEGUN] = Begun(module, following, ahead, stream.record_event())
    return weights


@cache
def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)
