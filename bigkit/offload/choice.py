"""What a router has chosen, as far as it can be seen from outside: the experts' forward is called with it.

Leaves out: bringing what was chosen (`experts.py`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..model.experts import visited
from ._torch import detect_fake_mode
from .weights import Unit

if TYPE_CHECKING:
    from .experts import ExpertStreamer

KNOWN = (None, "eager", "batched_mm", "grouped_mm")  # implementations of Transformers that read only chosen experts


def in_any_order(choice: Tensor, implementation: str | None) -> bool:
    """Whether experts may have other numbers, as rows of smaller tensors, and all results stay what they are.

    Transformers' eager loop adds experts in the order of their numbers, so of more than two the sum would be rounded
    otherwise; `grouped_mm` needs them all.

    >>> in_any_order(torch.tensor([[3, 1]]), "eager"), in_any_order(torch.tensor([[3, 1, 2]]), "eager")
    (True, False)
    """
    return implementation == "batched_mm" or (implementation == "eager" and choice.shape[1] <= 2)


def chosen_rows(streamer: ExpertStreamer, unit: Unit, choice: Tensor | None) -> list[int] | None:
    """The numbers of the experts that a call is going to read; None if all are to be brought.

    Args:
        streamer, unit: who lends, and what.
        choice: see `choice_of`.
    """
    if choice is None:
        return None
    recorded: list[int] | None = None
    if streamer.recorded is not None:  # of a dry run, in which nobody chooses
        recorded = streamer.recorded.next(unit.index, choice.shape[0])
    if not streamer.pays(unit, choice.numel()):
        return None
    if detect_fake_mode() is not None:
        tokens, per_token = choice.shape
        return recorded or by_chance(streamer.counts[unit.index], tokens, per_token, seed=streamer.loans)
    rows = sorted(set(choice.flatten().tolist()))  # of a GPU's, the host waits for it here
    return rows if not rows or 0 <= rows[0] and rows[-1] < streamer.counts[unit.index] else None


class Recorded:
    """A recorded routing as it is read, token by token; after its last token comes its first.

    Args:
        layers: for each unit, the experts that each token chose.

    >>> recorded = Recorded([[(0, 1), (1, 2), (3, 1)]])
    >>> recorded.next(0, 2), recorded.next(0, 2)
    ([0, 1, 2], [0, 1, 3])
    """

    def __init__(self, layers: Sequence[Sequence[Sequence[int]]]) -> None:
        self.layers, self.passed = layers, [0] * len(layers)
        self.latest: dict[int, list[int]] = {}  # number of a unit -> what was read last, token after token

    def next(self, unit: int, tokens: int) -> list[int]:
        """The experts of a unit that the next tokens chose."""
        layer, start = self.layers[unit], self.passed[unit]
        self.passed[unit] += tokens
        self.latest[unit] = [expert for token in range(start, start + tokens) for expert in layer[token % len(layer)]]
        return sorted({*self.latest[unit]})


def choice_of(given: Sequence[Any]) -> Tensor | None:
    """The router's choice, shape (tokens, k), among what the forward of experts is called with.

    It is the only tensor of whole numbers; None if there is no such tensor, or several.
    """
    choices = [value for value in given if isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)]
    return choices[0] if len(choices) == 1 and choices[0].ndim == 2 and not choices[0].is_meta else None


def by_chance(count: int, tokens: int, per_token: int, seed: int) -> list[int]:
    """As many different experts as are chosen on average if each token chooses by chance; which ones is drawn.

    >>> len(by_chance(128, 1, 8, seed=0)), len(by_chance(8, 4, 2, seed=0))
    (8, 5)
    """
    distinct = round(count * visited(tokens, per_token, count))
    return sorted(random.Random(seed).sample(range(count), distinct))
