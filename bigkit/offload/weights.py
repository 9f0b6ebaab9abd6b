"""Where weights rest while other blocks work: slabs of RAM, or ranges of the files that they came from.

    Weight   one parameter or buffer of a model, the places in the model that refer to it, and the tensors it is made of
    Part     one plain tensor of a weight: its shape, and where its bytes lie, in a `Slab` or in a `Source`
    Unit     the weights that travel together (a block), laid out one after another as a slot on the device holds them
    Slab     RAM for one unit, pinned where a GPU is to read it
    Source   an open file; nothing is ever copied out of it to another file

Most weights have one part. A quantized one has several (packed bits, scales, a code book): `ANATOMY` says how a class
of tensors is taken apart, and put together again around the bytes that have travelled.

Leaves out: when bytes travel (`offload/stream.py`), and what a file claims about itself (`checkpoints/load.py`).
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoints.ring import Slab, read_fully
from ..meta.empty import twin

ALIGN = 512  # bytes; as PyTorch's allocator does, so that a kernel sees a travelling weight as it sees a resident one


# ---------------------------------------------------------------------------------------------------------------------
# Files


class Source:
    """An open file that weights of one model rest in. It stays readable if its name is given to another file.

    Args:
        path: the file.
        owner: kept alive as long as the file is in use (what removes the file when it goes).

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], owner: Any = None) -> None:
        self.path = Path(path).resolve()
        self.owner = owner
        self.descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        self._state = self._size_and_time()
        self._map: mmap.mmap | None = None

    def _size_and_time(self) -> tuple[int, int]:
        status = os.fstat(self.descriptor)
        return status.st_size, status.st_mtime_ns

    def check(self) -> None:
        """Make sure that the file is what it was; touching a mapped page that it lacks would end the process.

        Raises:
            OSError: somebody wrote to it.
        """
        if self._size_and_time() != self._state:
            raise OSError(f"{self.path} was changed under a model whose weights rest in it: load the checkpoint again")

    def read(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset` on.

        Raises:
            OSError: the file is shorter than it was.
        """
        read_fully(self.descriptor, view, offset, self.path)

    def mapped(self) -> mmap.mmap:
        """The file as memory: pages are read when touched and copied when written to, so that nobody else sees it."""
        if self._map is None:
            self._map = mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_COPY)
        return self._map

    def advise(self, advice: int, start: int, nbytes: int) -> None:
        """Tell the system what is going to happen to these bytes; of pages to drop, only those that hold no others."""
        drop = advice == mmap.MADV_DONTNEED
        begin = (start + drop * (mmap.PAGESIZE - 1)) // mmap.PAGESIZE * mmap.PAGESIZE
        end = (start + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE if drop else start + nbytes
        if begin < end:
            self.mapped().madvise(advice, begin, end - begin)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


class Anatomy(NamedTuple):
    """How a class of tensors is taken apart into plain ones and put together again.

    Args:
        take_apart: tensor -> {suffix: plain tensor}.
        put_together: (skeleton, {suffix: plain tensor}) -> tensor; the plain tensors are views that must not be copied.
        skeleton: tensor -> one of the same class and attributes on meta, which keeps no data alive.
        suffixes: all that there may be; "" is the tensor under its own name in a checkpoint, "absmax" one that lies
            there as `name.absmax`.
        nbytes: tensor -> bytes of all that it consists of.
    """

    take_apart: Callable[[Tensor], dict[str, Tensor]]
    put_together: Callable[[Tensor, dict[str, Tensor]], Tensor]
    skeleton: Callable[[Tensor], Tensor]
    suffixes: tuple[str, ...] = ("",)
    nbytes: Callable[[Tensor], int] = lambda tensor: tensor.nbytes


def _plain_skeleton(tensor: Tensor) -> Tensor:
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return twin(tensor, meta) if isinstance(tensor, nn.Parameter) else meta


def _plain_whole(like: Tensor, parts: dict[str, Tensor]) -> Tensor:
    return twin(like, parts[""]) if isinstance(like, nn.Parameter) else parts[""]


ANATOMY: dict[type, Anatomy] = {}
PLAIN = Anatomy(lambda tensor: {"": tensor.detach()}, _plain_whole, _plain_skeleton)


def anatomy(cls: type) -> Anatomy:
    """The entry of `ANATOMY` for a class or one that it inherits from; `PLAIN` without one."""
    return next((ANATOMY[base] for base in cls.__mro__ if base in ANATOMY), PLAIN)


@dataclass(eq=False)
class Part:
    """One plain tensor of a weight, and where its bytes lie.

    Args:
        shape, stride, dtype: of the tensor.
        offset: where its bytes begin in a slot (and in its unit's slab).
        slab, at: RAM and the first byte there, or
        source, at: a file and the first byte there.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int = 0
    at: int = 0
    slab: Slab | None = None
    source: Source | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of data; strides never leave holes."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize

    def over(self, memory: Tensor, offset: int) -> Tensor:
        """The tensor whose bytes are those of `memory` (shape (n,), uint8) from `offset` on."""
        raw = memory[offset : offset + self.nbytes]
        if offset % self.dtype.itemsize:
            raw = raw.clone()  # in a file a tensor may start between two elements
        return raw.view(self.dtype).as_strided(self.shape, self.stride)

    def on_cpu(self) -> Tensor:
        """The tensor in RAM or, as mapped pages, in its file. Nothing is copied."""
        if self.slab is not None:
            return self.over(self.slab.bytes, self.at)
        assert self.source is not None
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        # A root tensor for each call, so that a write is seen in the version of this tensor and of no other.
        return self.over(
            torch.frombuffer(self.source.mapped(), dtype=torch.uint8, offset=self.at, count=self.nbytes), 0
        )


def part_of(tensor: Tensor) -> Part:
    """The record of a plain tensor that has no resting place yet."""
    dense = tensor.layout == torch.strided and _dense(tensor)
    stride = tensor.stride() if dense else torch.empty(tensor.shape, device="meta").stride()
    return Part(tuple(tensor.shape), tuple(stride), tensor.dtype)


def _dense(tensor: Tensor) -> bool:
    """Whether a tensor fills its stretch of memory without holes or overlaps, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape) if n != 1):
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


@dataclass(eq=False)
class Weight:
    """One parameter or buffer that rests away from the device it works on.

    Args:
        name: its first name in the model.
        like: its class, attributes and requires_grad, without data.
        places: (module, own name, whether a buffer) of every reference to it.
        parts: suffix -> plain tensor it is made of.
    """

    name: str
    like: Tensor
    places: list[tuple[nn.Module, str, bool]]
    parts: dict[str, Part]
    away: Any = None  # the handle that stands in the model while it rests (`away.Away`)
    twins: list[Weight] = field(default_factory=list)  # the same weight in other units

    def rests_in(self) -> str:
        """Where it rests: "disk" if any of it does, else "cpu"."""
        return "disk" if any(part.source is not None for part in self.parts.values()) else "cpu"

    def order(self) -> tuple[str, int]:
        """What sorts weights as they lie in their files; those in RAM keep their order, and come first."""
        part = next(iter(self.parts.values()))
        return (str(part.source.path), part.at) if part.source else ("", 0)

    def again(self, places: list[tuple[nn.Module, str, bool]]) -> Weight:
        """The same weight for another unit: it rests where this one does."""
        parts = {suffix: replace(part, offset=0) for suffix, part in self.parts.items()}
        other = Weight(self.name, self.like, places, parts, twins=[self, *self.twins])
        for weight in other.twins:
            weight.twins.append(other)
        return other

    def build(self, tensors: dict[str, Tensor]) -> Tensor:
        """The weight around plain tensors."""
        return anatomy(type(self.like)).put_together(self.like, tensors)

    @torch.inference_mode(False)
    def over(self, memory: Tensor) -> Tensor:
        """The weight around its bytes in a slot."""
        return self.build({suffix: part.over(memory, part.offset) for suffix, part in self.parts.items()})

    @torch.inference_mode(False)  # what is made once serves every mode
    def load(self, device: torch.device | None = None) -> Tensor:
        """The weight from where it rests, on its own memory if `device` is another than the CPU.

        Raises:
            OSError: its file was changed.
        """
        for part in self.parts.values():
            if part.source is not None:
                part.source.check()
        return self.build({suffix: part.on_cpu().to(device or "cpu") for suffix, part in self.parts.items()})

    @torch.inference_mode(False)
    def keep(self, value: Tensor) -> None:
        """Make `value` what rests, in RAM: a file is never written to.

        Raises:
            ValueError: it has another shape or dtype.
        """
        new = anatomy(type(self.like)).take_apart(value)
        for suffix, part in self.parts.items():
            found = new.get(suffix)
            if found is None or tuple(found.shape) != part.shape or found.dtype != part.dtype:
                given = "nothing" if found is None else f"{tuple(found.shape)} {found.dtype}"
                raise ValueError(f"{self.name!r} rests as {part.shape} {part.dtype} and cannot become {given}")
        for suffix, part in self.parts.items():
            if part.slab is None:
                part.slab, part.source, part.at = Slab(part.nbytes), None, 0
            part.on_cpu().copy_(new[suffix])
            for other in self.twins:
                there = other.parts[suffix]
                there.slab, there.source, there.at = part.slab, None, part.at

    def advise(self, advice: int) -> None:
        """Tell the system what is going to happen to the mapped pages of its files."""
        for part in self.parts.values():
            if part.source is not None:
                part.source.advise(advice, part.at, part.nbytes)

    def write_to(self, value: Tensor) -> None:
        """Write what rests into another copy of the weight."""
        with torch.no_grad():
            for suffix, plain in anatomy(type(self.like)).take_apart(value).items():
                plain.copy_(self.parts[suffix].on_cpu())


@dataclass(eq=False)
class Unit:
    """Weights that travel together.

    Args:
        name: of the module around them.
        module: that module.
        weights: laid out one after another.
        loose: whether they are not all in the module, but what it holds itself.
        nbytes: of a slot that holds them.
    """

    name: str
    module: nn.Module
    weights: list[Weight]
    loose: bool = False
    nbytes: int = 0
    index: int = 0
    _moves: list[Move] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for part in self.parts():
            part.offset = self.nbytes
            self.nbytes += -(-part.nbytes // ALIGN) * ALIGN

    def modules(self) -> list[nn.Module]:
        """The modules whose weights these are."""
        if not self.loose:
            return [*self.module.modules()]
        return [*dict.fromkeys(module for weight in self.weights for module, _, _ in weight.places)]

    def parts(self) -> list[Part]:
        return [part for weight in self.weights for part in weight.parts.values()]

    def moves(self) -> list[Move]:
        """What has to be copied to fill a slot: as few stretches of RAM and ranges of files as there are."""
        if self._moves is not None:
            return self._moves
        self._moves = found = list[Move]()
        for part in self.parts():
            last = found[-1] if found else None
            if part.nbytes and (last is None or not last.continued_by(part)):
                found.append(Move(part.slab, part.source, part.at, part.offset, [part]))
            elif part.nbytes and last is not None:
                last.parts.append(part)
        return found

    def check(self) -> None:
        """Make sure that the files are what they were.

        Raises:
            OSError: one is not.
        """
        for source in {move.source for move in self.moves()}:
            if source is not None:
                source.check()

    def advise(self, advice: int) -> None:
        """Tell the system what is going to happen to the mapped pages of its files."""
        for move in self.moves():
            if move.source is not None:
                move.source.advise(advice, move.at, move.nbytes)

    def forget_moves(self) -> None:
        """To be called when a part rests elsewhere than before."""
        self._moves = None

    def rests_in(self) -> str:
        """Where its weights rest: "disk" if any of them does, else "cpu"."""
        return "disk" if any(weight.rests_in() == "disk" for weight in self.weights) else "cpu"


@dataclass
class Move:
    """Parts that lie one after another where they rest: in a slab as they will in the slot, in a file without gaps."""

    slab: Slab | None
    source: Source | None
    at: int
    offset: int
    parts: list[Part]

    @property
    def nbytes(self) -> int:
        last = self.parts[-1]
        if self.slab is not None:
            return last.offset + last.nbytes - self.offset
        return last.at + last.nbytes - self.at

    def continued_by(self, part: Part) -> bool:
        if part.slab is not self.slab or part.source is not self.source:
            return False
        if self.slab is not None:
            return part.at - self.at == part.offset - self.offset
        return part.at == self.at + self.nbytes


def rest_in_ram(unit: Unit, values: Iterable[dict[str, Tensor]], pin: bool) -> None:
    """Give a unit a slab, filled with the values of its weights; parts that rest in RAM already stay where they are.

    Args:
        unit: the unit.
        values: for each weight its plain tensors.
        pin: whether a CUDA device will read it.
    """
    homeless = [(part, tensors[suffix]) for weight, tensors in zip(unit.weights, values, strict=True)
                for suffix, part in weight.parts.items() if part.slab is None and part.source is None]  # fmt: skip
    if not homeless:
        return
    slab = Slab(unit.nbytes, pin)
    for part, tensor in homeless:
        part.slab, part.at = slab, part.offset
        part.on_cpu().copy_(tensor)
    slab.pin(filled=True)
