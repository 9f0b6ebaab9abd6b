"""The tensor outside: what a weight was before it was sent away, where somebody still holds it.

A model may be sent away module by module (hooks that are put one by one, `cpu_offload` of its parts). A tensor that two
of the modules share is then met twice, or one of the two stays where it is. It is one weight all the same:

    both are sent away     the second finds here what the first has become, and rests where that rests (`known`)
    one of the two stays   what is written to its tensor is taken in before the weight is lent or read (`news`), and
                           what is written to the weight is written to the tensor too (`follow`)

The same holds for a variable that keeps a parameter. A tensor is known as the object that it is: another one over the
same memory is tied to it within one call alone.

Leaves out: ties over two devices within one call (`copies.py`).
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from ._torch import is_fake, state_of, stop_watching, watch_writes
from .codec import PLAIN, codec_of, own_copy

if TYPE_CHECKING:
    from .weights import Weight

_outsides = WeakTensorKeyDictionary()  # tensor -> the `Outside` that it is in


class Outside:
    """The tensor outside of one weight and its aliases.

    Attributes:
        ref: a weak reference to it; None once nobody holds it.
        weights: those that it is, as long as they live.
    """

    def __init__(self) -> None:
        self.ref: TensorWeakRef | None = None
        self.weights: weakref.WeakSet[Weight] = weakref.WeakSet()
        self._state: tuple[int, int] | None = None  # version and memory when it was last equal to the weight

    def note(self, tensor: Tensor, weight: Weight) -> None:
        """From now on this tensor is the weight's."""
        if not is_fake(tensor):
            self.ref, self._state = TensorWeakRef(tensor), state_of(tensor)
            self.weights.add(weight)
            _outsides[tensor] = self

    def watch(self) -> None:
        """Forget the tensor if nobody holds it, else let no write to it go unseen."""
        tensor = self.tensor()
        if tensor is not None and not tensor.is_meta:
            watch_writes(tensor)
            self._state = state_of(tensor)

    def tensor(self) -> Tensor | None:
        """The tensor, if somebody holds it."""
        tensor: Tensor | None = self.ref() if self.ref is not None else None
        if tensor is None:
            self.ref = None
        return tensor

    def real(self) -> Tensor | None:
        """The same if it has data."""
        tensor = self.tensor()
        return None if tensor is None or tensor.is_meta else tensor

    def news(self) -> Tensor | None:
        """The tensor if it was written to, or given other data, since it was last equal to the weight."""
        tensor = self.real()
        if tensor is None or (self._state is not None and self._state == state_of(tensor)):
            return None
        if not tensor.numel():  # its memory was freed: it holds nothing that could be the weight's
            self.ref = None
            return None
        self._state = state_of(tensor)
        return tensor

    def follow(self, weight: Weight, value: Tensor) -> None:
        """The weight has become `value`: so does the tensor."""
        tensor = self.real()
        if tensor is None:
            return
        with torch.no_grad(), torch.inference_mode(tensor.is_inference()):
            if (tensor.shape, tensor.dtype) != (weight.template.shape, weight.template.dtype):
                tensor.data = weight.load(tensor.device).data
            elif tensor is not value:
                weight.write_to(tensor)
        self._state = state_of(tensor)


def known(tensor: Tensor) -> list[Weight]:
    """The weights that a tensor has become elsewhere; some may be in use no longer."""
    outside = _outsides.get(tensor)
    return [] if outside is None else [*outside.weights]


def take_news(weight: Weight) -> None:
    """Keep what was written to the tensor outside of a weight."""
    value = weight.outside.news()
    if value is not None:
        weight.lender.keep(weight, value)


def write_where_lent(weight: Weight) -> None:
    """Write what rests into the copies of a weight that are lent at the moment."""
    for lender in {same.lender for same in (weight, *weight.aliases)}:
        for loan in [*lender._loans]:
            for own, value in zip(loan.unit.weights, loan.views.weights):
                if own is weight or own in weight.aliases:
                    own.write_to(value)


def settled(weight: Weight, last: bool) -> Tensor:
    """A weight that rests elsewhere no longer, as a tensor: the one that others hold, or else a new one, on the CPU.

    Args:
        weight: the weight.
        last: whether no other module refers to its handle.
    """
    tensor = weight.outside.real()
    if tensor is None:
        tensor = weight.load() if last else own_copy(weight.load())  # which others may untie from this one
        weight.outside.note(tensor, weight)
        if not last:
            weight.outside.watch()
        return tensor
    vars(tensor).update(vars(weight.template))
    if tensor.is_leaf and tensor.requires_grad != weight.template.requires_grad:
        tensor.requires_grad_(weight.template.requires_grad)
    if last:
        stop_watching(tensor)
    if codec_of(tensor) is PLAIN and tensor.device.type != "cpu" and isinstance(tensor, nn.Parameter):
        tensor.data = tensor.data.to("cpu")
    return tensor
