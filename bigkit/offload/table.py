"""A GPU that keeps account itself of the experts it holds: the host waits for no router.

For one token at a time, whose experts rest in pinned RAM, two small kernels do what `on_device.py` does with Python:

    choose   looks up in a table which of the chosen experts have a row on the GPU, gives those that have none the rows
             that were used longest ago, and notes both
    bring    copies the chosen experts to where they are multiplied with: out of their rows, or out of RAM, and from
             there into their rows as well

What is kept is what `DeviceRows` would keep: whoever needs to know it on the host (several sequences, another
implementation) reads the table back, and what was known on the host is written to the table.

Leaves out: machines on which Triton makes no kernel, experts with biases, and rows that are no whole words of 8 bytes:
there the host knows and waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.as_stored import AsStored
from ..checkpoints.decoded import Elsewhere
from .inference_only import guarded
from .on_device import DeviceRows
from .pieces import stand_ins
from .weights import Part, Unit

PIECE = 1024  # words of 8 bytes that one program copies


class Table:
    """The account of one block's rows, on its GPU.

    Args:
        kept: the rows, with memory; what the host knows of them is taken over.
        ram: the RAM in which the experts rest, as the GPU sees it, laid out as a slot.

    Attributes:
        current: whether this is newer than what the host knows.
        taken: of the choice that was made last, the plain tensors that were brought.
        lent: what stands for each weight of the block meanwhile.
        form: where and how the experts rest.
    """

    def __init__(self, kept: DeviceRows, ram: Tensor) -> None:
        assert kept.slot is not None
        device = ram.device
        self.kept, self.ram, self.current = kept, ram, False
        self.row_of = torch.empty(kept.experts, dtype=torch.int32, device=device)
        self.owner = torch.empty(kept.count, dtype=torch.int32, device=device)
        self.used = torch.empty(kept.count, dtype=torch.int64, device=device)  # when; what is empty has been so longest
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)  # hits, misses, and what time it is
        self.choice = self.rows = self.hit = torch.empty(0, device=device)
        self.taken: set[int] = set()
        self.stacks = [self._words(*one) for one in zip(kept.unit.parts(), kept.starts)]
        self.lent, self.form = stand_ins(kept.unit, lambda number: Looked(self, number)), form_of(kept.unit)

    def _words(self, part: Part, start: int) -> tuple[int, Tensor, Tensor]:
        """Of a plain tensor: words of an expert, and all of its words, in RAM and in the rows."""
        assert self.kept.slot is not None
        words = part.nbytes // part.shape[0] // 8
        rows = self.kept.slot.base[start : start + self.kept.count * words * 8]
        return words, self.ram[part.offset : part.offset + part.nbytes].view(torch.int64), rows.view(torch.int64)

    def choose(self, choice: Tensor) -> None:
        """Give rows to what a token has chosen.

        Args:
            choice: numbers of different experts, shape (1, k), contiguous.
        """
        self.write()
        self.choice, count = choice.flatten(), choice.numel()
        self.rows = torch.empty(count, dtype=torch.int32, device=choice.device)
        self.hit = torch.empty_like(self.rows)
        self.taken = set()
        sizes = [_power(self.kept.experts), _power(self.kept.count), _power(count)]
        with torch.cuda.device_of(choice):
            _kernels()["choose"][(1,)](
                self.choice, self.row_of, self.owner, self.used, self.counts, self.rows, self.hit, self.kept.experts,
                self.kept.count, count, *sizes, num_warps=1,
            )  # fmt: skip

    def bring(self, number: int, experts: Tensor) -> Tensor:
        """Experts of one of the plain tensors, shape (k, ...).

        Args:
            number: which of the tensors.
            experts: shape (k,). They are those that were chosen; if one is not, it is read out of RAM, and what its
                place in the rows holds is believed no more.
        """
        part, (words, ram, rows), count = self.kept.unit.parts()[number], self.stacks[number], len(self.rows)
        out = torch.empty((count, *part.shape[1:]), dtype=part.dtype, device=ram.device)
        with torch.cuda.device_of(ram):
            _kernels()["bring"][-(-words // PIECE), count](
                experts.contiguous(), self.choice, self.rows, self.hit, self.row_of, self.owner, ram, rows,
                out.view(-1).view(torch.int64), words, PIECE,
            )  # fmt: skip
        self.taken.add(number)
        return out

    def whole(self) -> bool:
        """Whether all tensors of what was chosen are in their rows."""
        return len(self.taken) == len(self.kept.starts)

    def try_out(self, count: int) -> None:
        """Choose and bring so many experts, and forget it: Triton makes the kernels, which takes it up to a second."""
        self.choose(torch.arange(count, device=self.ram.device)[None])
        for number in range(len(self.kept.starts)):
            self.bring(number, self.choice)
        self.counts.zero_()
        self.forget()

    def read(self) -> None:
        """Tell the host what is in the rows; it waits."""
        if self.current:
            used, owner = self.used.tolist(), self.owner.tolist()
            order = sorted((row for row in range(self.kept.count) if owner[row] >= 0), key=used.__getitem__)
            self.kept.forget((owner[row], row) for row in order)
            self.current = False

    def forget(self) -> None:
        """Nothing is in the rows."""
        self.kept.forget()
        self.current = False

    def write(self) -> None:
        """Take over what the host knows, if it knows more."""
        if self.current:
            return
        row_of, owner = [-1] * self.kept.experts, [-1] * self.kept.count
        used = [row - self.kept.count for row in range(self.kept.count)]
        for time, (expert, row) in enumerate(self.kept.row_of.items()):
            row_of[expert], owner[row], used[row] = row, expert, time
        self.row_of.copy_(torch.tensor(row_of, dtype=torch.int32))
        self.owner.copy_(torch.tensor(owner, dtype=torch.int32))
        self.used.copy_(torch.tensor(used))
        self.counts[2] = self.kept.count
        self.current = True


class Looked(Elsewhere):
    """One plain tensor of a unit, of which the chosen experts are had by the table.

    Args:
        table, number: whose, and which of the unit's plain tensors.
    """

    def __init__(self, table: Table, number: int) -> None:
        part = table.kept.unit.parts()[number]
        super().__init__(part.shape, part.dtype, table.ram.device)
        self.table, self.part, self.number = table, part, number

    def take(self, parts: Mapping[str, Any], experts: Any) -> dict[str, Tensor]:
        if isinstance(experts, Tensor) and experts.shape == self.table.choice.shape:
            found = {suffix: part.table.bring(part.number, experts) for suffix, part in parts.items()}
        else:  # somebody else asks
            found = {suffix: part.in_ram()[experts] for suffix, part in parts.items()}
        weights = self.table.kept.unit.weights
        return {suffix: guarded(tensor, weights[parts[suffix].number]) for suffix, tensor in found.items()}

    def in_ram(self) -> Tensor:
        """All experts, where they rest."""
        return self.part.over(self.table.ram, self.part.offset)


def form_of(unit: Unit) -> list[Any]:
    """Where and how a unit's tensors rest: a table is good for as long as this stays."""
    return [(part.shape, part.dtype, part.offset, part.slab, part.at) for part in unit.parts()]


def can_look_up(unit: Unit) -> bool:
    """Whether a table can serve a unit: stacks, or what stands for stacks, in whole words."""
    stored = unit.module.stored if isinstance(unit.module, AsStored) else ()
    if any(len(weight.parts) > 1 for weight in unit.weights):
        return False
    return all(
        (len(part.shape) == 3 or weight.name.rpartition(".")[2] in stored)
        and not part.nbytes // part.shape[0] % 8
        and part.stride == tuple(torch.empty(part.shape, device="meta").stride())
        for weight, part in zip(unit.weights, unit.parts())
    )


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


@cache
def _kernels() -> dict[str, Any]:
    import triton
    import triton.language as tl

    @triton.jit
    def choose(  # type: ignore[no-untyped-def]
        ids, row_of, owner, used, counts, rows, hit, experts, room, count,
        E: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    ):  # fmt: skip
        e, r, k = tl.arange(0, E), tl.arange(0, R), tl.arange(0, K)
        of, own = tl.load(row_of + e, mask=e < experts, other=-1), tl.load(owner + r, mask=r < room, other=-1)
        time, now = tl.load(used + r, mask=r < room, other=1 << 62), tl.load(counts + 2)
        chosen, hits = tl.load(ids + k, mask=k < count, other=1 << 30).to(tl.int32), 0
        for i in range(count):  # what is there must not go
            one = tl.sum(tl.where(k == i, chosen, 0))
            row = tl.sum(tl.where(e == one, of, 0))
            rank = tl.sum(tl.where(chosen < one, 1, 0))
            time = tl.where(r == row, now + rank, time)
        for i in range(count):
            one = tl.sum(tl.where(k == i, chosen, 0))
            row = tl.sum(tl.where(e == one, of, 0))
            rank = tl.sum(tl.where(chosen < one, 1, 0))
            there = row >= 0
            place = tl.where(there, row, tl.argmin(time, 0))
            gone = tl.sum(tl.where(r == place, own, 0))
            of = tl.where(e == gone, -1, of)
            of = tl.where(e == one, place, of)
            own = tl.where(r == place, one, own)
            time = tl.where(r == place, now + rank, time)
            hits += there.to(tl.int32)
            tl.store(rows + i, place)
            tl.store(hit + i, there.to(tl.int32))
        tl.store(row_of + e, of, mask=e < experts)
        tl.store(owner + r, own, mask=r < room)
        tl.store(used + r, time, mask=r < room)
        tl.store(counts, tl.load(counts) + hits)
        tl.store(counts + 1, tl.load(counts + 1) + count - hits)
        tl.store(counts + 2, now + count)

    @triton.jit
    def bring(  # type: ignore[no-untyped-def]
        ids, chosen, rows, hit, row_of, owner, ram, kept, out, words, PIECE: tl.constexpr
    ):
        i = tl.program_id(1)
        at = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
        inside, row, one, known = at < words, tl.load(rows + i), tl.load(ids + i), tl.load(chosen + i)
        there, place = tl.load(hit + i) != 0, row.to(tl.int64) * words
        if there & (one == known):
            word = tl.load(kept + place + at, mask=inside)
        else:
            word = tl.load(ram + one.to(tl.int64) * words + at, mask=inside)
            if one == known:
                tl.store(kept + place + at, word, mask=inside)
            else:
                tl.store(row_of + known, -1)
                tl.store(owner + row, -1)
        tl.store(out + i.to(tl.int64) * words + at, word, mask=inside)

    return {"choose": choose, "bring": bring}
