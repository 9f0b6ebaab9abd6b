"""The GPU gathers the chosen experts itself, out of pinned RAM.

A GPU can read RAM that is pinned: CUDA gives it the same address there. So a tensor on the GPU can be made over a slab
(`__cuda_array_interface__`), and lent as a block's experts. Transformers' `batched_mm` begins with
`gate_up_proj[expert_ids]`, and that indexing then is the copy over the link: of the chosen experts alone, at nearly the
rate of the link, and the host need not even know which these are.

It reads an expert once for each token that chose it. So it is for one token at a time, in which no expert is chosen
twice; for several, each expert is copied once (`experts.py`).

Leaves out: experts from disk, unpinned RAM, other implementations than `batched_mm` (`generate` switches to that while
it decodes): for all of these chosen experts are copied into a slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.ring import Slab
from .experts import ExpertStreamer
from .transfer import CudaLane, Slot
from .weights import Unit


class _Pinned:
    """What PyTorch asks for to make a tensor over memory that a GPU can read."""

    def __init__(self, slab: Slab) -> None:
        self.slab = slab  # the tensor refers to this object, and so keeps the RAM
        address, nbytes = slab.bytes.data_ptr(), slab.bytes.nbytes
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}


def seen_by_gpu(slab: Slab, device: torch.device) -> Tensor:
    """Pinned RAM as a tensor of bytes on a GPU, shape (bytes of the slab,). Nothing is copied."""
    with torch.inference_mode(False):
        return torch.as_tensor(_Pinned(slab), device=device)


class GatherStreamer(ExpertStreamer):
    """Lends the chosen experts of one token as a view of pinned RAM, and others as `ExpertStreamer` does."""

    def __init__(self, device: torch.device, units: Sequence[Unit], **options: Any) -> None:
        super().__init__(device, units, **options)
        self.windows: dict[int, Slot] = {}  # index of a unit -> a slot whose memory is the RAM in which it rests

    def lend_for(self, unit: Unit, choice: Tensor | None, implementation: str | None) -> Tensor | None:
        one_token = choice is not None and choice.shape[0] == 1 and implementation == "batched_mm"
        if not one_token or self.rows[unit.index] or not self._can_gather(unit):
            return super().lend_for(unit, choice, implementation)
        with self.lock:
            if unit.index in self.filled:
                self._empty(self.holder[unit.index])
            if unit.index not in self.holder:  # all of its experts are in a slot, if it is there
                self._as_is = window = self._window(unit)
                assert choice is not None
                self.tell_fetch(
                    unit, self.slots.index(window), choice.numel() * (unit.nbytes // self.counts[unit.index])
                )
            self.lend(unit)
        return None

    def _can_gather(self, unit: Unit) -> bool:
        places = {(part.slab, part.at - part.offset) for part in unit.parts()}
        slab, start = next(iter(places))  # in one slab, as in a slot: so it is unless some are tied to another unit's
        return len(places) == 1 and slab is not None and slab.pinned and start >= 0

    def _window(self, unit: Unit) -> Slot:
        """The slot over the RAM of a unit. Its parts lie there as in any slot, from the first one's place on."""
        if unit.index not in self.windows:
            first = unit.parts()[0]
            assert first.slab is not None
            memory = seen_by_gpu(first.slab, self.device)[first.at - first.offset :]
            slot = Slot(memory, owner=unit)
            if isinstance(self.lane, CudaLane):
                slot.ready, slot.free = torch.cuda.Event(), torch.cuda.Event()
            self.windows[unit.index] = slot
            self.slots.append(slot)
        return self.windows[unit.index]

    def _leave(self, loan: Any, failed: bool) -> None:
        super()._leave(loan, failed)
        slot = self.windows.get(loan.unit.index)
        if slot is not None and slot not in self.slots:  # somebody keeps a view of it
            del self.windows[loan.unit.index]
        elif slot is not None and slot.unit is not None:
            self._empty(slot)  # a prompt must not find it: it would read all experts over the link again and again

    def _forget(self, unit: Unit) -> None:
        super()._forget(unit)
        self.windows.pop(unit.index, None)
