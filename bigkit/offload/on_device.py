"""Experts that stay on the GPU: of each block those that were chosen last.

A GPU that holds all but the experts has room left. There each block keeps some of its experts, as rows of tensors like
the block's own but with fewer rows. What is chosen again need not travel; what is not there takes the row of the expert
that was used longest ago. The block then computes with these tensors, and with a choice that is renumbered: row numbers
in place of experts' numbers.

Every block has a share of its own and keeps to it, so a token's way through the other blocks empties no rows. A prompt
chooses more experts than there are rows; then all of a block are streamed past the rows, which stay as they are.

Leaves out: what is chosen (`experts.py`), experts that are kept in RAM (`rows.py`), and a GPU that keeps account of its
rows itself, so that the host need not wait for the router (`table.py`).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..devices import Device, join
from ..units import format_bytes
from ._torch import is_real_cuda
from .codec import codec_of
from .grouping import Layout
from .rows import count_chosen, count_rows, starts_of
from .transfer import Slot
from .weights import Part, Unit


class DeviceRows:
    """The experts of one block that are on the device.

    Args:
        unit: the block's experts.
        count: the number of rows.

    Attributes:
        slot: the memory, once it is made.
        row_of: number of an expert -> its row; used last comes last.
        starts: where each plain tensor begins in the slot.
    """

    def __init__(self, unit: Unit, count: int) -> None:
        self.unit, self.count = unit, count
        self.slot: Slot | None = None
        self.row_of: OrderedDict[int, int] = OrderedDict()
        self.experts = count_rows(unit.module)
        self._table: Tensor | None = None  # number of an expert -> its row, on the device
        *self.starts, self.nbytes = starts_of(self._shortened(part).nbytes for part in unit.parts())

    def _shortened(self, part: Part) -> Part:
        return replace(part, shape=(self.count, *part.shape[1:]))

    def take(self, chosen: Sequence[int]) -> list[int]:
        """Give a row to each of some experts, at most `count`.

        Returns:
            Those that are not there yet: they must be brought to their rows.
        """
        missing = [expert for expert in chosen if expert not in self.row_of]
        for expert in chosen:
            if expert in self.row_of:
                self.row_of.move_to_end(expert)
        if missing:
            self._table = None
        free = sorted({*range(self.count)}.difference(self.row_of.values()), reverse=True) if missing else []
        for expert in missing:
            self.row_of[expert] = free.pop() if free else self.row_of.popitem(last=False)[1]
        for expert in chosen if missing else ():
            self.row_of.move_to_end(expert)  # in their order, as `Routing.hits` counts
        return missing

    def forget(self, kept: Iterable[tuple[int, int]] = ()) -> None:
        """Hold other experts from now on: pairs of an expert and its row, used last comes last."""
        self._table = None
        self.row_of = OrderedDict(kept)

    def targets(self, experts: Sequence[int], parts: Iterable[Part]) -> Iterator[Part]:
        """Parts of experts with their rows as the places where they belong.

        Args:
            experts: their numbers.
            parts: the first tensor of all of them, then the second, and so on.
        """
        for i, part in enumerate(parts):
            number, place = divmod(i, len(experts))
            yield replace(part, offset=self.starts[number] + self.row_of[experts[place]] * part.nbytes)

    def weights(self) -> list[Tensor]:
        """The tensors that stand for the block's own, shape (count, ...) each."""
        assert self.slot is not None
        with torch.inference_mode(False):  # each weight is one plain tensor: see `has_rows`
            return [
                weight.around({"": self._shortened(part).over(self.slot.base, start)})
                for weight, part, start in zip(self.unit.weights, self.unit.parts(), self.starts, strict=True)
            ]

    def renumbered(self, choice: Tensor) -> Tensor:
        """A router's choice with the rows of the experts in place of their numbers."""
        if self._table is None:
            rows = [self.row_of.get(expert, 0) for expert in range(self.experts)]
            self._table = torch.tensor(rows, dtype=choice.dtype).to(choice.device)
        return self._table[choice]

    def whole(self, full: Tensor, value: Tensor) -> Tensor:
        """A block's tensor, with the rows of `value` in the places of their experts."""
        full = full.detach().clone()
        experts, rows = [*self.row_of], [*self.row_of.values()]
        full[experts] = value.detach()[rows].to(full.device)
        return full


def rows_on_devices(model: nn.Module, layout: Layout, nbytes: int) -> dict[nn.Module, int]:
    """How many experts of each block may stay where they work: all blocks get an equal share of some bytes.

    Args:
        model, layout: the model, and where it is to rest and work.
        nbytes: bytes of all GPUs together.

    Returns:
        Module that holds a block's experts -> a number of them.

    Raises:
        ValueError: there are no experts, a block would keep fewer than a token takes, or a GPU has not so much memory
            free.
    """
    if not nbytes:
        return {}
    found: dict[nn.Module, int] = {}
    needed: Counter[Device] = Counter()  # bytes
    away = [
        (name, module)
        for name, module in model.named_modules()
        if count_rows(module)
        and layout.works(name) != "cpu"
        and any(layout.is_away(join(name, own)) for own, _ in module.named_parameters())
    ]
    for name, module in away:
        count = count_rows(module)
        each = sum(codec_of(tensor).nbytes(tensor) for tensor in module.parameters()) // count
        found[module] = min(count, nbytes // len(away) // each)
        needed[layout.works(name)] += found[module] * each
        per_token = count_chosen(module)
        if found[module] < per_token:
            raise ValueError(
                f"expert_cache is {format_bytes(nbytes)}, which is less than the experts that one token takes "
                f"({per_token} of each of {len(away)} blocks, {format_bytes(each * per_token * len(away))}): give "
                "several times that, or leave it out"
            )
    if not found:
        raise ValueError(
            f"expert_cache is {format_bytes(nbytes)}, but no experts of a mixture rest away from a GPU that they work "
            "on: leave it out, or let modules of experts rest on 'cpu' or 'disk'"
        )
    for place, size in needed.items():
        device = layout.device(place)
        if is_real_cuda(device) and size > (free := torch.cuda.mem_get_info(device)[0]):
            raise ValueError(
                f"expert_cache takes {format_bytes(size)} of GPU {place}, of which {format_bytes(free)} are free"
            )
    return found
