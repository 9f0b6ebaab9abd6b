"""Experts in pieces: of a block with many large experts a few are on the device at a time.

The experts of one block of DeepSeek-V3 take 11 GB in FP8, and 23 GB in 16 bit: a slot for all of them leaves no room on
most GPUs. A token takes 8 of 256, for which there is a slot of its own (`experts.py`). A prompt takes nearly all, but
multiplies with one after another. So its code is lent stacks that bring the experts it asks for
(`checkpoints/decoded.py`) through a few small slots in turn: one is filled while the GPU works on another.

    lent        for each stack an object in its place; for tensors that are no stack (biases) these themselves, whole
    asked       for experts: they are copied to the next slot, and may be read until others are asked for

Leaves out: blocks that are small enough to travel whole, and fetching before it is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoints.as_stored import AsStored
from ..checkpoints.decoded import PLAIN, DecodedStack, Elsewhere
from ..model.experts import PIECE, PIECES, visited
from .inference_only import guarded
from .rows import Rows, starts_of
from .transfer import Slot
from .weights import Part, Unit

if TYPE_CHECKING:
    from .experts import ExpertStreamer


class Brought(Elsewhere):
    """One tensor of a unit that is brought when it is asked for.

    Args:
        pieces, unit: who brings it, and whose it is.
        number: which of the unit's plain tensors.
    """

    def __init__(self, pieces: Pieces, unit: Unit, number: int) -> None:
        part = unit.parts()[number]
        super().__init__(part.shape, part.dtype, pieces.streamer.device)
        self.pieces, self.unit, self.number = pieces, unit, number

    def take(self, parts: Mapping[str, Any], experts: Any) -> dict[str, Tensor]:
        numbers = [part.number for part in parts.values()]
        if isinstance(experts, slice):
            experts = [*range(*experts.indices(self.shape[0]))]
        if isinstance(experts, list):
            found = self.pieces.bring(self.unit, numbers, experts)
        else:
            found = self.pieces.gather(self.unit, numbers, _numbers(experts, self.shape[0], self.recorded))
        return dict(zip(parts, found))

    @property
    def recorded(self) -> list[int] | None:
        recorded = self.pieces.streamer.recorded
        return None if recorded is None else recorded.latest.get(self.unit.index)


class Pieces:
    """The slots of pieces, for all blocks of a streamer."""

    def __init__(self, streamer: ExpertStreamer) -> None:
        self.streamer = streamer
        self.slots: list[Slot] = []
        self.turn = 0
        self.current: Slot | None = None  # read by the work that was asked for last
        self.small: Slot | None = None  # for tensors that are no stacks

    def lend(self, unit: Unit) -> list[Any]:
        """What stands for each weight of a unit while it works."""
        lent = stand_ins(unit, lambda number: Brought(self, unit, number))
        small = [number for number, one in enumerate(lent) if one is None]
        for number, tensor in zip(small, self._whole(unit, small)):
            lent[number] = tensor
        return lent

    def end(self) -> None:
        """What was asked for last may be overwritten once the work so far has read it."""
        if self.current is not None:
            self.streamer.lane.leave(self.current)
            self.current = None

    def close(self) -> None:
        """The forward has ended."""
        self.end()
        if self.small is not None:
            self.streamer.lane.leave(self.small)

    def bring(self, unit: Unit, numbers: Sequence[int], experts: Sequence[int]) -> list[Tensor]:
        """Some experts, of some of a unit's tensors: (experts, ...) each. They stay until the next call."""
        self.end()
        parts = [unit.parts()[number] for number in numbers]
        *starts, nbytes = starts_of(part.nbytes // part.shape[0] * len(experts) for part in parts)
        slot = self._slot(nbytes)
        self._fill(slot, unit, numbers, experts, starts)
        self.current = slot
        return [
            self._lent(unit, number, replace(part, shape=(len(experts), *part.shape[1:])), slot, start)
            for number, part, start in zip(numbers, parts, starts)
        ]

    def gather(self, unit: Unit, numbers: Sequence[int], experts: Sequence[int]) -> list[Tensor]:
        """The same for experts in any order, of which one may be asked for several times; each is brought once."""
        distinct, each = sorted(set(experts)), 0
        for number in numbers:
            part = unit.parts()[number]
            each += part.nbytes // part.shape[0]
        step, found = max(1, PIECE // max(1, each)), list[Tensor]()
        for first in range(0, len(distinct), step):
            some = distinct[first : first + step]
            places = [place for place, expert in enumerate(experts) if expert in some]
            brought = self.bring(unit, numbers, some)
            rows = torch.tensor([some.index(experts[place]) for place in places], device=self.streamer.device)
            found = found or [torch.empty((len(experts), *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
                              for tensor in brought]  # fmt: skip
            where = torch.tensor(places, device=self.streamer.device)
            for target, tensor in zip(found, brought):
                as_bytes(target)[where] = as_bytes(tensor)[rows]
        return found

    # -- slots

    def _slot(self, nbytes: int) -> Slot:
        """The slot whose turn it is; one of its own for more than a piece."""
        if nbytes > max([PIECE, *(slot.base.nbytes for slot in self.slots)]):
            return self.streamer.lane.slot(nbytes)
        if len(self.slots) < PIECES:
            self.slots.append(self.streamer.lane.slot(max(nbytes, PIECE)))
        self.turn = (self.turn + 1) % len(self.slots)
        return self.slots[self.turn]

    def _fill(self, slot: Slot, unit: Unit, numbers: Sequence[int], experts: Sequence[int], starts: list[int]) -> None:
        brought, wanted = [*self.streamer.in_ram(unit, [*experts])], list[Part]()
        for number, start in zip(numbers, starts):
            own = brought[number * len(experts) : (number + 1) * len(experts)]
            wanted += [replace(part, offset=start + place * part.nbytes) for place, part in enumerate(own)]
        rows, slot.unit = Rows(unit, wanted, sum(part.nbytes for part in wanted)), unit
        self.streamer.lane.fill(slot, rows)  # type: ignore[arg-type]
        self.streamer.tell_fetch(unit, -1, rows.nbytes)
        self.streamer.lane.arrive(slot)

    def _lent(self, unit: Unit, number: int, part: Part, slot: Slot, start: int) -> Tensor:
        with torch.inference_mode(False):
            tensor = part.over(slot.base, start)
        return guarded(tensor, unit.weights[number])

    def _whole(self, unit: Unit, numbers: Sequence[int]) -> list[Tensor]:
        """Tensors that are no stacks, in a slot that serves one unit after another."""
        if not numbers:
            return []
        parts = [unit.parts()[number] for number in numbers]
        *starts, nbytes = starts_of(part.nbytes for part in parts)
        if self.small is None or self.small.base.nbytes < nbytes:
            self.small = self.streamer.lane.slot(nbytes)
        self._fill(self.small, unit, numbers, range(parts[0].shape[0]), starts)
        return [self._lent(unit, n, part, self.small, start) for n, part, start in zip(numbers, parts, starts)]


def stand_ins(unit: Unit, make: Callable[[int], Any]) -> list[Any]:
    """What stands for each weight of a unit that is brought when it is asked for; None for what is no stack.

    Args:
        unit: the experts.
        make: number of a plain tensor -> what stands for it where it rests.
    """
    stored = unit.module.stored if isinstance(unit.module, AsStored) else ()
    found: list[Any] = []
    for number, (weight, part) in enumerate(zip(unit.weights, unit.parts(), strict=True)):
        if weight.name.rpartition(".")[2] in stored:
            found.append(make(number))
        else:
            stack = len(part.shape) == 3
            found.append(DecodedStack({"": make(number)}, PLAIN, part.dtype, part.shape[1:]) if stack else None)
    return found


def _numbers(experts: Any, count: int, recorded: list[int] | None) -> list[int]:
    """Experts as numbers; in a dry run, where nobody chooses, as recorded or as many different ones as chance gives."""
    if hasattr(experts, "fake_mode"):
        if recorded is not None and len(recorded) == len(experts):
            return recorded
        distinct = round(count * visited(len(experts), 1, count))
        return [place % distinct for place in range(len(experts))]
    return [int(expert) for expert in experts]


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's bytes, row by row: PyTorch cannot index all dtypes of eight bits."""
    return tensor.detach().flatten(1).view(torch.uint8)
