"""Where a model refers to the weights of a unit, and what users change there between two forwards.

They assign parameters (`block.weight = nn.Parameter(...)`), tie or untie them, and put adapters into blocks. Before a
unit is lent, its site is compared with the model and takes such changes in.

Leaves out: what is written into a weight, in place or through `data` (`offload/handle.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from ..meta.held import Place, held_by, put, tensors_of
from ._torch import in_functional_call, stop_watching
from .codec import PLAIN, codec_of
from .handle import Away, take_notes
from .outside import Outside, settled, take_news
from .weights import Unit, Weight

if TYPE_CHECKING:
    from .stream import Streamer


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
        released: whether the weights themselves have been put into the model.
    """

    def __init__(self, unit: Unit, streamer: Streamer) -> None:
        self.unit, self.streamer, self.released = unit, streamer, False
        self.look()

    def look(self) -> None:
        """Read the model again; a handle may lie under another name (pruning and weight norm do that)."""
        weights = {id(same): weight for weight in self.unit.weights for same in (weight, *weight.aliases)}
        places = {(id(place[0]), place[1]) for weight in self.unit.weights for place in weight.places}
        for place, tensor in held_by(self.unit.modules()):
            if isinstance(tensor, Away) and id(tensor.weight) in weights and (id(place[0]), place[1]) not in places:
                weight = weights[id(tensor.weight)]
                weight.places.append(place)
                put([place], weight.away)
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

    def _is_served(self) -> bool:
        """Whether a hook of the module still asks for the unit: who was about to take it away was interrupted."""
        from .hooks import hooks_in

        hooks = [vars(hook) for hook in hooks_in(self.unit.module)]
        streamers = [vars(one).get("streamer") for hook in hooks for one in [hook.get("few")] if one is not None]
        return self.streamer in [*(hook.get("streamer") for hook in hooks), *streamers]

    def serve_again(self) -> None:
        """A hook that was taken away has been put back."""
        self.released = False
        self.take_in_changes()

    def take_in_changes(self) -> None:
        """Move modules that were added to where the unit works, and keep parameters that were replaced.

        Raises:
            RuntimeError: a forward was about to begin when another thread took its hooks away.
        """
        if self.released and not self._is_served():
            raise RuntimeError(
                f"the hooks of {self.unit.name or type(self.unit.module).__name__!r} were removed, or the model was "
                "dispatched anew, by another thread while this forward was on its way: run it again"
            )
        self.released = False
        if self._ids() != self._modules:
            for module in self.unit.modules():
                move_own(module, self.streamer.device)
            self.look()
        changed = [entry for entry in self.entries if entry.tensors.get(entry.own) is not entry.handle]
        if changed and not in_functional_call():  # that puts other tensors into modules for the time of a call
            for entry in changed:
                self._adopt(entry)
        for weight in self.unit.weights:
            if weight.outside.ref is not None:
                take_news(weight)
        if self.unit.index in self.streamer.stale:
            self.streamer.stale.discard(self.unit.index)
            self.streamer._forget(self.unit)

    def release(self) -> None:
        """Put the weights themselves in the place of all handles in the unit's modules."""
        if not self.released:
            self.take_in_changes()
        self.released = True
        places = [place for weight in self.unit.weights for place in weight.places]
        for place, handle in held_by(self.unit.modules()):
            if isinstance(handle, Away):
                weights = (handle.weight, *handle.weight.aliases)
                if any(same.lender is self.streamer for same in weights):
                    put([place], settled(handle.weight, last=not has_handles(handle.weight, places)))

    def _adopt(self, entry: Entry) -> None:
        """An entry refers to another tensor now: send that away, if it fits and all places of the weight refer to it.

        Else the entry is no longer the weight's: it may have been untied, or removed.
        """
        value, weight, handle = entry.tensors.get(entry.own), entry.weight, entry.handle
        served = [same for same in (weight, *weight.aliases) if not same.lender.sites[same.index].released]
        places = [place for same in served for place in same.places]
        if _fits(value, weight) and all(tensors_of(place).get(place[1]) is value for place in places):
            if (old := weight.outside.tensor()) is not value:  # that is the weight's no longer
                if old is not None:
                    stop_watching(old)
                weight.outside = Outside()
                for same in weight.aliases:
                    same.outside = weight.outside
                if codec_of(weight.template) is PLAIN:
                    take_notes(weight, value)
            self.streamer.keep(weight, value)
            weight.outside.note(value, weight)
            weight.outside.watch()
            if isinstance(handle, nn.Parameter) and value.requires_grad != handle.requires_grad:
                handle.requires_grad_(value.requires_grad)
            put(places, handle)
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


def settle_rest(model: nn.Module) -> None:
    """Put weights in the place of handles in modules that no hook serves: users have tied these to others."""
    for place, handle in held_by(model.modules()):
        if isinstance(handle, Away) and not has_handles(handle.weight, ()):
            put([place], settled(handle.weight, last=True))


def has_handles(weight: Weight, but: Iterable[Place]) -> bool:
    """Whether the handle on a weight, or on an alias of it, stands anywhere but in some places."""
    known = {(id(module), own) for module, own, _ in but}
    return any(
        tensors_of(place).get(place[1]) is same.away and (id(place[0]), place[1]) not in known
        for same in (weight, *weight.aliases)
        for place in same.places
    )


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; a parameter stays the same object."""
    if isinstance(tensor, nn.Parameter):
        tensor.data = tensor.data.to(device)
        return tensor
    return tensor.to(device)


def move_own(module: nn.Module, device: torch.device) -> None:
    """Move what a module itself holds to a device, handles aside."""
    for place, tensor in held_by([module]):
        if not isinstance(tensor, Away) and tensor.device != device and not tensor.is_meta:
            put([place], moved(tensor, device))
