"""The GPU gathers the chosen experts itself, out of pinned RAM.

A GPU can read RAM that is pinned: CUDA gives it the same address there. So a tensor on the GPU can be made over a slab
(`__cuda_array_interface__`), and lent as a block's experts. Transformers' `batched_mm` begins with
`gate_up_proj[expert_ids]`, and that indexing then is the copy over the link: of the chosen experts alone, at nearly the
rate of the link, and the host need not even know which these are.

It reads an expert once for each token that chose it. So it is for one token at a time, in which no expert is chosen
twice; for several, each expert is copied once (`experts.py`), and of what is copied the first stack, `gate_up_proj`, is
multiplied with while the others are still on their way.

Where some experts may stay on the GPU, it looks up itself which are there (`table.py`).

Leaves out: experts from disk, unpinned RAM, other implementations than `batched_mm` (`generate` switches to that while
it decodes): for all of these chosen experts are copied into a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.as_stored import AsStored
from ..checkpoints.codecs import kernels_for
from ..checkpoints.decoded import Elsewhere
from ..checkpoints.ring import Slab
from ._torch import detect_fake_mode
from .escapes import count_holders
from .experts import ExpertStreamer
from .pieces import stand_ins
from .rows import bytes_of_one, count_chosen
from .stream import Views
from .table import Table, can_look_up, form_of
from .transfer import CudaLane, PlainLane, Slot
from .weights import Part, Unit


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


class Arriving(Elsewhere):
    """A stack in a slot that is still being filled: who reads it waits for that.

    Args:
        lane, slot: what fills it, and where it lies.
        stack: the stack there.
    """

    def __init__(self, lane: PlainLane, slot: Slot, stack: Tensor) -> None:
        super().__init__(stack.shape, stack.dtype, stack.device)
        self.lane, self.slot, self.stack = lane, slot, stack

    def take(self, parts: Mapping[str, Any], experts: Any) -> dict[str, Tensor]:
        self.lane.arrive(self.slot)
        return {suffix: part.stack[experts] for suffix, part in parts.items()}


class GatherStreamer(ExpertStreamer):
    """Lends the chosen experts of one token as a view of pinned RAM, and others as `ExpertStreamer` does."""

    def __init__(self, device: torch.device, units: Sequence[Unit], **options: Any) -> None:
        super().__init__(device, units, **options)
        self.windows: dict[int, Slot] = {}  # index of a unit -> a slot whose memory is the RAM in which it rests
        self.see = seen_by_gpu  # a dry run has its own
        self._accounts: dict[int, bool] = {}  # index of a unit -> `keeps_account`
        self.tables: dict[int, Table] = {}  # index of a unit -> the account of its rows on the GPU
        self._served: set[int] = set()  # indices of units that are lent by a table
        self._ended: list[Tensor] = []  # counts of tables that are gone
        self.note: Callable[[Slot, Unit, int], None] | None = None  # in a dry run, what is told of each gather
        self._in_turn = False  # whether the next unit's first stack may be read before the others are there
        self._others: Callable[[], None] | None = None  # begins to copy these

    def lend_for(self, unit: Unit, choice: Tensor | None, implementation: str | None) -> Tensor | None:
        one_token = choice is not None and choice.shape[0] == 1 and implementation == "batched_mm"
        if not one_token or not self._can_gather(unit) or self._loan_of(unit) is not None:
            self._in_turn = implementation == "batched_mm" and self._has_stacks_alone(unit)
            try:
                rows, others = super().lend_for(unit, choice, implementation), self._others
            finally:
                self._in_turn, self._others = False, None
            if others is not None:
                others()
                slot = self.holder[unit.index]
                slot.version = slot.base._version  # that was no write of the forward's
            return rows
        assert choice is not None
        if self.rows[unit.index]:
            few = self.pays(unit, choice.numel()) and not hasattr(choice, "fake_mode")
            in_a_table = few and self.keeps_account(unit)
            return self._look_up(unit, choice) if in_a_table else super().lend_for(unit, choice, implementation)
        with self.lock:
            if self.recorded is not None:
                self.recorded.next(unit.index, 1)
            if unit.index in self.filled:
                self._empty(self.holder[unit.index])
            bring = None
            if unit.index not in self.holder:  # all of its experts are in a slot, if it is there
                window = self._window(unit)
                bring = partial(self._bring_from, window)
                nbytes = choice.numel() * bytes_of_one(unit)
                self.tell_fetch(unit, self.slots.index(window), nbytes)
                if self.note is not None:
                    self.note(window, unit, nbytes)
            self.lend(unit, bring)
        return None

    # -- experts that are copied, one stack after another

    def _has_stacks_alone(self, unit: Unit) -> bool:
        plain = not isinstance(unit.module, AsStored) and self._can_gather(unit) and can_look_up(unit)
        return plain and self._loan_of(unit) is None

    def _copy(self, unit: Unit, slot: Slot, parts: Iterable[Part], experts: int) -> None:
        if not self._in_turn:
            return super()._copy(unit, slot, parts, experts)
        rest, first = iter(parts), unit.parts()[0]
        nbytes = experts * (first.nbytes // first.shape[0])
        self._fill(unit, slot, islice(rest, experts), nbytes)
        self._others = partial(self._fill, unit, slot, rest, experts * bytes_of_one(unit) - nbytes)

    # -- experts that stay on the GPU

    def keeps_account(self, unit: Unit) -> bool:
        if unit.index not in self._accounts:
            fits = self._can_gather(unit) and can_look_up(unit)
            self._accounts[unit.index] = fits and kernels_for(self._window(unit).base) is not None
        return self._accounts[unit.index]

    def prepare(self) -> None:
        """Take what the first token would else be late for: memory for rows, and their kernels."""
        for unit in (unit for unit in self.units if self.rows[unit.index]):
            with suppress(torch.OutOfMemoryError):  # then the first forward says so
                slot = self.rows_for(unit).slot
                assert slot is not None
                if detect_fake_mode() is None and self.keeps_account(unit):
                    self._table(unit).try_out(count_chosen(unit.module))
                    self.lane.leave(slot)  # copies into the rows wait for that

    def _table(self, unit: Unit) -> Table:
        kept = self.rows_for(unit)
        if unit.index not in self.tables:
            self.tables[unit.index] = Table(kept, self._window(unit).base)
        return self.tables[unit.index]

    def _look_up(self, unit: Unit, choice: Tensor) -> Tensor:
        """Lend what finds a token's experts in the rows of the GPU, or brings them there."""
        choice = choice.contiguous()
        with self.lock:
            table, slot = self._table(unit), self.rows_for(unit).slot
            assert slot is not None
            self.lane.arrive(slot)  # what the host has brought
            table.choose(choice)
            if self.listeners and not (choice.is_cuda and torch.cuda.is_current_stream_capturing()):
                # They are told how much, for which the host waits.
                missing = int((table.hit == 0).sum())
                self.tell_fetch(unit, self.slots.index(slot), missing * bytes_of_one(unit))
            self.lend(unit, partial(self._bring_table, table))
        return choice

    def _bring_table(self, table: Table, unit: Unit) -> Views:
        self._served.add(unit.index)
        return self._lend_objects(unit, table.lent)

    def _borrowed(self, unit: Unit, bring: Callable[[Unit], Views]) -> Views:
        views = super()._borrowed(unit, bring)
        return views if self._others is None else self._arriving(unit, views)

    def _arriving(self, unit: Unit, views: Views) -> Views:
        """What is lent, with stacks that are waited for in the place of all but the first."""
        slot = self.holder[unit.index]
        made = stand_ins(unit, lambda number: Arriving(self.lane, slot, views.weights[number]))
        stands = dict(zip(map(id, views.weights[1:]), made[1:]))
        values = [stands.get(id(value), value) for value in views.values]
        slot.holders = count_holders(slot.base, values)
        return views._replace(values=values)

    def _on_device(self, unit: Unit, rows: list[int], choice: Tensor) -> tuple[Slot, Tensor]:
        if unit.index in self.tables:
            self.tables[unit.index].read()
        return super()._on_device(unit, rows, choice)

    def _clear_device(self, unit: Unit) -> None:
        table = self.tables.get(unit.index)
        if table is not None and table.kept.slot in self.slots and table.form == form_of(unit):
            table.forget()  # it stays where it is: a CUDA graph may use it
            return
        if table is not None:
            self._ended.append(self.tables.pop(unit.index).counts)
        super()._clear_device(unit)

    def before_replay(self) -> None:
        """Let tables on the GPU know what the host knows, before a CUDA graph uses them."""
        for table in self.tables.values():
            table.write()

    def found(self) -> tuple[int, int]:
        counts = [one.tolist() for one in (*self._ended, *(table.counts for table in self.tables.values()))]
        hits, misses = super().found()
        return hits + sum(one[0] for one in counts), misses + sum(one[1] for one in counts)

    # -- experts that are read out of RAM

    def _can_gather(self, unit: Unit) -> bool:
        places = {(part.slab, part.at - part.offset) for part in unit.parts()}
        slab, start = next(iter(places))  # in one slab, as in a slot: so it is unless some are tied to another unit's
        return len(places) == 1 and slab is not None and slab.pinned and start >= 0

    def _window(self, unit: Unit) -> Slot:
        """The slot over the RAM of a unit. Its parts lie there as in any slot, from the first one's place on."""
        if unit.index not in self.windows:
            first = unit.parts()[0]
            assert first.slab is not None
            memory = self.see(first.slab, self.device)[first.at - first.offset :]
            slot = Slot(memory, owner=unit)
            if isinstance(self.lane, CudaLane):
                slot.ready, slot.free = torch.cuda.Event(), torch.cuda.Event()
            self.windows[unit.index] = slot
            self.slots.append(slot)
        return self.windows[unit.index]

    def _leave(self, loan: Any, failed: bool) -> None:
        super()._leave(loan, failed)
        if loan.unit.index in self._served:
            self._served.discard(loan.unit.index)
            table = self.tables.get(loan.unit.index)
            if table is not None and (failed or not table.whole()):
                self._clear_device(loan.unit)  # its rows have not what the table says
            elif table is not None:
                assert table.kept.slot is not None
                self.lane.leave(table.kept.slot)
            return
        slot = self.windows.get(loan.unit.index)
        if slot is not None and slot not in self.slots:  # somebody keeps a view of it
            del self.windows[loan.unit.index]
        elif slot is not None and slot.unit is not None:
            self._empty(slot)  # a prompt must not find it: it would read all experts over the link again and again

    def _forget(self, unit: Unit) -> None:
        super()._forget(unit)
        self.windows.pop(unit.index, None)
        self._accounts.pop(unit.index, None)

    def recover(self) -> None:
        if self.held():
            self._served = set()
            super().recover()
