"""Whether a tensor that was made while a model is built comes from weights: of a forward within the block, say.

Such a tensor has no values, as the weights have none, so it stays on meta. All else has those that code gives it.

Leaves out: the steps themselves (`empty.py`).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, UntypedStorage

from .operations import signature_of, storages_of


class Tape(Protocol):
    """What is asked of `empty.py`'s.

    Attributes:
        steps: storage -> the steps that touch it; each has `func`, `done`, and the storages `written` and `touched`.
        parameters: the storages of parameters.
    """

    @property
    def steps(self) -> Mapping[UntypedStorage, Iterable[Any]]: ...
    @property
    def parameters(self) -> Container[UntypedStorage]: ...


def from_weights(tensor: Tensor, tape: Tape) -> bool:
    """Whether a deferred tensor lies in a parameter, or is computed from one in steps that are still to be done."""
    queue = [*storages_of([tensor])]
    seen = {*queue}
    while queue:
        storage = queue.pop()
        if storage in tape.parameters:
            return True
        for step in tape.steps.get(storage, ()):
            if not step.done and storage in step.written and not signature_of(step.func).only_shape:
                read = step.touched - seen
                seen |= read
                queue += read
    return False
