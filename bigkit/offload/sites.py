"""Where a model refers to the weights of a unit, and what users change there between two forwards.

They assign parameters (`block.weight = nn.Parameter(...)`), tie or untie them, and put adapters into blocks. Before a
unit is lent, its site is compared with the model and takes such changes in.

Leaves out: what is written into a weight, in place or through `data` (`offload/handle.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from ._torch import in_functional_call
from .handle import Away
from .weights import Unit, Weight

if TYPE_CHECKING:
    from .stream import Streamer

Place = tuple[nn.Module, str, bool]  # a module, the own name of a tensor in it, whether it is a buffer


class Entry(NamedTuple):
    """One reference in the model to a weight of a unit."""

    tensors: dict[str, Tensor | None]  # the module's `_parameters` or `_buffers`
    own: str
    weight: Weight
    handle: Away
    place: Place


class Site:
    """The references to a unit's weights, and the modules around them.

    Args:
        unit: whose weights.
        streamer: who lends them.

    Attributes:
        entries: every reference, in the order of the unit's weights.
    """

    def __init__(self, unit: Unit, streamer: Streamer) -> None:
        self.unit, self.streamer = unit, streamer
        self.look()

    def look(self) -> None:
        """Read the model again; a handle may lie under another name (pruning and weight norm do that)."""
        weights = {id(same): weight for weight in self.unit.weights for same in (weight, *weight.aliases)}
        places = {(id(place[0]), place[1]) for weight in self.unit.weights for place in weight.places}
        for module in self.unit.modules():
            for tensors, buffer in ((module._parameters, False), (module._buffers, True)):
                for own, tensor in tensors.items():
                    if isinstance(tensor, Away) and id(tensor.weight) in weights and (id(module), own) not in places:
                        weight = weights[id(tensor.weight)]
                        weight.places.append((module, own, buffer))
                        tensors[own] = weight.away
                        self.streamer.forget(weight)  # the views that were made lack this place
        self.entries = [
            Entry(tensors_of(place), place[1], weight, weight.away, place)
            for weight in self.unit.weights
            for place in weight.places
        ]
        self._children = [module._modules for module in self.unit.modules()]
        self._modules = self._ids()

    def _ids(self) -> list[int]:
        return [id(child) for children in self._children for child in children.values()]

    def put_handles(self) -> None:
        """Let every reference be to the handle."""
        for entry in self.entries:
            entry.tensors[entry.own] = entry.handle

    def take_in_changes(self) -> None:
        """Move modules that were added to where the unit works, and keep parameters that were replaced."""
        if self._ids() != self._modules:
            for module in self.unit.modules():
                move_own(module, self.streamer.device)
            self.look()
        changed = [entry for entry in self.entries if entry.tensors.get(entry.own) is not entry.handle]
        if changed and not in_functional_call():  # that puts other tensors into modules for the time of a call
            for entry in changed:
                self._adopt(entry)

    def release(self, released: dict[int, Tensor]) -> None:
        """Put the weights themselves in the place of all handles in the unit's modules.

        Args:
            released: id of a weight -> the tensor that took its place before, for those that are in several units.
        """
        self.take_in_changes()
        for module in self.unit.modules():
            for tensors in (module._parameters, module._buffers):
                for own, handle in tensors.items():
                    if isinstance(handle, Away) and handle.streamer is self.streamer:
                        weight = handle.weight
                        known = [released[id(same)] for same in (weight, *weight.aliases) if id(same) in released]
                        released[id(weight)] = known[0] if known else weight.load()
                        tensors[own] = released[id(weight)]  # type: ignore[assignment]

    def _adopt(self, entry: Entry) -> None:
        """An entry refers to another tensor now: send that away, if it fits and all places of the weight refer to it.

        Else the entry is no longer the weight's: it may have been untied, or removed.
        """
        value, weight, handle = entry.tensors.get(entry.own), entry.weight, entry.handle
        places = [place for same in (weight, *weight.aliases) for place in same.places]
        if _fits(value, weight) and all(tensors_of(place).get(place[1]) is value for place in places):
            self.streamer.keep(weight, value)
            if isinstance(handle, nn.Parameter) and value.requires_grad != handle.requires_grad:
                handle.requires_grad_(value.requires_grad)
            for place in places:
                tensors_of(place)[place[1]] = handle
            return
        self.look()  # it may have another name now
        weight.places.remove(entry.place)
        if value is not None and not isinstance(value, Away) and not value.is_meta:
            entry.tensors[entry.own] = moved(value, self.streamer.device)
        self.look()
        self.streamer.forget(weight)


def _fits(value: Tensor | None, weight: Weight) -> TypeGuard[Tensor]:
    """Whether a tensor can become the data of a weight."""
    if value is None or isinstance(value, Away) or value.is_meta:
        return False
    return value.shape == weight.template.shape and value.dtype == weight.template.dtype


def tensors_of(place: Place) -> dict[str, Tensor | None]:
    """The dict of a module in which a place lies."""
    module, _, buffer = place
    return module._buffers if buffer else module._parameters  # type: ignore[return-value]


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; a parameter stays the same object."""
    if isinstance(tensor, nn.Parameter):
        tensor.data = tensor.data.to(device)
        return tensor
    return tensor.to(device)


def move_own(module: nn.Module, device: torch.device) -> None:
    """Move what a module itself holds to a device, handles aside."""
    for tensors in (module._parameters, module._buffers):
        for own, tensor in tensors.items():
            if tensor is not None and not isinstance(tensor, Away) and tensor.device != device and not tensor.is_meta:
                tensors[own] = moved(tensor, device)  # type: ignore[assignment]
