"""What a model holds: its parameters and buffers, each with every place in the model that refers to it.

Leaves out: which tensors share memory (`skeleton.py`), and what is done with them: loading, saving, sending away.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .empty import twin
from .skeleton import named_parts, own_tensors, tied

Place = tuple[nn.Module, str, bool]  # a module, a tensor's own name in it, whether it is a buffer


@dataclass(eq=False, slots=True)
class Held:
    """One parameter or buffer of a model.

    Args:
        name: the first of its names.
        tensor: what the model has there; on meta if a streamer has sent it away.
        buffer: whether it is a buffer.
        persistent: whether it belongs to the state dict.
        places: each of its names -> its place; several if it is tied.
        source: its name in the checkpoint that is loaded, if it is there.
        away: the weight of the streamer that has sent it away, which says where it rests.
    """

    name: str
    tensor: Tensor
    buffer: bool
    persistent: bool
    places: dict[str, Place]
    source: str | None = None
    away: Any = None

    def fill(self, value: Tensor) -> None:
        """Give the model this value. A real parameter stays the same object, so that optimizers keep knowing it."""
        if not self.buffer and not self.tensor.is_meta and self.tensor.device.type == value.device.type:
            for module, own, _ in self.places.values():
                module._parameters[own].data = value  # type: ignore[union-attr]
        else:
            put(self.places.values(), value if self.buffer else twin(self.tensor, value))


def held_in(model: nn.Module, state: bool = False) -> list[Held]:
    """A model's parameters and buffers, tied ones together; with `state` those of its state dict alone."""
    found: dict[str, Held] = {}
    for prefix, module in named_parts(model):
        start, hidden = prefix and prefix + ".", module._non_persistent_buffers_set
        for buffer, tensors in ((False, module._parameters), (True, module._buffers)):
            for own, tensor in tensors.items():
                persistent = not (buffer and own in hidden)
                if tensor is not None and (persistent or not state):
                    name = start + own
                    found[name] = Held(name, tensor, buffer, persistent, {name: (module, own, buffer)})
    for first, *others in tied((name, one.tensor) for name, one in found.items()):
        for other in map(found.pop, others):
            found[first].places |= other.places
    return list(found.values())


def held_by(modules: Iterable[nn.Module]) -> Iterator[tuple[Place, Tensor]]:
    """Every tensor that some modules themselves hold, with its place."""
    for module in modules:
        for own, (tensor, buffer) in own_tensors(module).items():
            yield (module, own, buffer), tensor


def tensors_of(place: Place) -> dict[str, Tensor | None]:
    """The dict of a module in which a place lies."""
    module, _, buffer = place
    return module._buffers if buffer else module._parameters  # type: ignore[return-value]


def put(places: Iterable[Place], tensor: Tensor) -> None:
    """Make places refer to a tensor."""
    for place in places:
        tensors_of(place)[place[1]] = tensor
