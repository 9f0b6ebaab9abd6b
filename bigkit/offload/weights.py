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

import copy
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..machine.hardware import ram_limit
from ..meta.empty import twin
from ..units import MiB

ALIGN = 512  # bytes; as PyTorch's allocator does, so that a kernel sees a travelling weight as it sees a resident one
PINNED_SHARE = 0.9  # of the machine's RAM, or of what its control group allows


# ---------------------------------------------------------------------------------------------------------------------
# RAM


class Slab:
    """RAM that a GPU reads at the speed of the link, if the system lets it be pinned; ordinary RAM otherwise.

    Registering huge pages that are already there is several times faster than `pin_memory`, and does not round up.

    Args:
        nbytes: its size.
        pin: whether a CUDA device will read it.
    """

    def __init__(self, nbytes: int, pin: bool = False) -> None:
        self.bytes = _anonymous(nbytes, huge=pin)  # shape (nbytes,), uint8
        self.wants_pin = pin
        self.pinned = False

    def pin(self, filled: bool = False) -> None:
        """Pin the RAM if it should be.

        Args:
            filled: it has been written to, so that its pages exist; else they are made first, which is faster than
                leaving it to the driver.
        """
        if not self.wants_pin or self.pinned or not _may_pin(self.bytes.nbytes):
            return
        if not filled:
            self.bytes.zero_()
        address, nbytes = self.bytes.data_ptr(), self.bytes.nbytes
        if int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)) == 0:
            self.pinned = True
            _count_pinned(nbytes)
            weakref.finalize(self, _unpin, address, nbytes, self.bytes).atexit = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Slab:
        return self._like(self.bytes, self.wants_pin)

    def __reduce__(self) -> Any:
        return Slab._like, (self.bytes, self.wants_pin)

    @staticmethod
    def _like(content: Tensor, pin: bool) -> Slab:
        slab = Slab(content.nbytes, pin)
        slab.bytes.copy_(content)
        slab.pin(filled=True)
        return slab


def _anonymous(nbytes: int, huge: bool) -> Tensor:
    if torch._guards.detect_fake_mode() is not None:
        return torch.empty(nbytes, dtype=torch.uint8)
    step = 2 * MiB if huge else mmap.PAGESIZE
    memory = mmap.mmap(-1, max(1, -(-nbytes // step)) * step)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]


_pinned = 0  # bytes, by all slabs of this process
_pinned_lock = threading.Lock()


def _count_pinned(nbytes: int) -> None:
    global _pinned
    with _pinned_lock:
        _pinned += nbytes


def _unpin(address: int, nbytes: int, memory: Tensor) -> None:
    torch.cuda.synchronize()  # a copy out of it may still be under way
    torch.cuda.cudart().cudaHostUnregister(address)
    _count_pinned(-nbytes)


def _may_pin(nbytes: int) -> bool:
    return _pinned + nbytes <= PINNED_SHARE * ram_limit()


# ---------------------------------------------------------------------------------------------------------------------
# Files


class Source:
    """An open file that weights rest in. It stays readable if the name is given to another file meanwhile.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be opened, or (when a pickled model is brought back) is not the file that it was.
    """

    def __init__(self, path: str | os.PathLike[str], identity: tuple[int, int] | None = None) -> None:
        self.path = Path(path).resolve()
        self.descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        status = os.fstat(self.descriptor)
        self.identity = (status.st_size, status.st_mtime_ns)
        if identity not in (None, self.identity):
            raise OSError(
                f"{self.path} has changed since weights of a model were left in it: load the checkpoint again"
            )
        self._map: mmap.mmap | None = None
        self._origin: Source | None = None
        self.owner: Any = None

    def private(self, owner: Any = None) -> Source:
        """The same open file with pages of its own: what is written into them is seen by nobody else.

        Args:
            owner: kept alive as long as the file is in use.
        """
        other = Source.__new__(Source)
        # The first one closes the file, when all are gone.
        vars(other).update(vars(self), _map=None, _origin=self, owner=owner or self.owner)
        return other

    def check(self) -> None:
        """Make sure that the file is what it was; touching a mapped page that it lacks would end the process.

        Raises:
            OSError: somebody wrote to it.
        """
        status = os.fstat(self.descriptor)
        if (status.st_size, status.st_mtime_ns) != self.identity:
            raise OSError(f"{self.path} was changed under a model whose weights rest in it: load the checkpoint again")

    def read(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset` on.

        Raises:
            OSError: the file is shorter than it was.
        """
        done = 0
        while done < len(view):
            count = os.preadv(self.descriptor, [view[done:]], offset + done)
            if not count:
                raise OSError(f"{self.path} is shorter than when it was opened: nothing at byte {offset + done}")
            done += count

    def mapped(self) -> mmap.mmap:
        """The file as memory: its pages are read when touched, and copied when written to."""
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

    def __deepcopy__(self, memo: dict[int, Any]) -> Source:
        return memo.setdefault(id(self), self.private())

    def __reduce__(self) -> Any:
        return Source, (str(self.path), self.identity)


_sources: weakref.WeakValueDictionary[tuple[Path, int, int], Source] = weakref.WeakValueDictionary()


def open_source(path: str | os.PathLike[str]) -> Source:
    """The open file at `path`, one object for all weights in it."""
    found = Path(path).resolve()
    status = found.stat()
    key = (found, status.st_ino, status.st_mtime_ns)
    source = _sources.get(key)
    if source is None:
        source = _sources[key] = Source(found)
    return source


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

    def __deepcopy__(self, memo: dict[int, Any]) -> Weight:
        new = memo[id(self)] = Weight.__new__(Weight)
        memo[id(self.like)] = self.like  # it never changes, and not every class of tensors can be copied on meta
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new

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
        """ "disk" if any of it does, else "cpu"."""
        return "disk" if any(part.source is not None for part in self.parts()) else "cpu"


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
