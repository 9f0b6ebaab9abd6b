"""Where weights rest while other blocks work: slabs of RAM, or ranges of the files that they came from.

    Weight   one parameter or buffer of a model, the places in the model that refer to it, and the tensors it is made of
    Part     one plain tensor of a weight: its shape, and where its bytes lie, in a `Slab` or in a `Source`
    Unit     the weights that travel together (a block), laid out one after another as a slot on the device holds them
    Slab     RAM for one unit, pinned where a GPU is to read it (`checkpoints/ring.py`)
    Source   an open file; nothing is ever copied out of it to another file (`offload/source.py`)

Most weights have one part. A quantized one has several (packed bits, scales, a code book): `offload/codec.py` says how
a class of tensors is taken apart, and put together again around the bytes that have travelled.

Leaves out: when bytes travel (`offload/stream.py`), and what a file claims about itself (`checkpoints/load.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.ring import Slab
from ..meta.held import Place
from .codec import PLAIN, codec_of
from .outside import Outside
from .source import Source

ALIGN = 512  # bytes; as PyTorch's allocator does, so that a kernel sees a travelling weight as it sees a resident one


@dataclass(eq=False)
class Part:
    """One plain tensor of a weight, and where its bytes lie: in RAM or in a file.

    Attributes:
        shape, stride, dtype: of the tensor.
        offset: byte at which it begins in a slot, and in its unit's slab.
        slab: the RAM that holds it, or None.
        source: the file that holds it, or None.
        at: byte at which it begins in the slab or the file.
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
        return math.prod(self.shape) * self.dtype.itemsize

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
        raw = torch.frombuffer(self.source.mapped(), dtype=torch.uint8, offset=self.at, count=self.nbytes)
        return self.over(raw, 0)


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

    Attributes:
        name: its first name in the model.
        template: a tensor of its class, attributes and requires_grad, without data.
        places: every reference to it in its unit.
        parts: suffix -> plain tensor it is made of.
        away: the handle that stands in the model while it rests (`handle.Away`).
        aliases: the same weight in other units.
        outside: the tensor that stood there before, if something else still holds it (`outside.py`).
        lender, index: the streamer that lends it, and the number of its unit there.
    """

    name: str
    template: Tensor
    places: list[Place]
    parts: dict[str, Part]
    away: Any = None
    aliases: list[Weight] = field(default_factory=list)
    outside: Outside = field(default_factory=Outside)
    lender: Any = None
    index: int = 0

    def alias(self, places: list[Place]) -> Weight:
        """The same weight for another unit: it rests where this one does."""
        parts = {suffix: replace(part, offset=0) for suffix, part in self.parts.items()}
        other = Weight(self.name, self.template, places, parts, None, [self, *self.aliases], self.outside)
        for weight in other.aliases:
            weight.aliases.append(other)
        return other

    def rests_in(self) -> str:
        """Where it rests: "disk" if any part of it does, else "cpu"."""
        return "disk" if any(part.source is not None for part in self.parts.values()) else "cpu"

    def order(self) -> tuple[str, int]:
        """A key that sorts weights as they lie in their files; those in RAM keep their order, and come first."""
        part = next(iter(self.parts.values()))
        return (str(part.source.path), part.at) if part.source else ("", 0)

    @torch.inference_mode(False)  # so that the tensor can be used in every mode
    def over(self, memory: Tensor) -> Tensor:
        """The weight around its bytes in a slot."""
        return self.around({suffix: part.over(memory, part.offset) for suffix, part in self.parts.items()})

    @torch.inference_mode(False)
    def load(self, device: torch.device | None = None) -> Tensor:
        """The weight as it rests: no copy on the CPU, and a copy on any other device.

        Raises:
            OSError: its file was changed.
        """
        for part in self.parts.values():
            if part.source is not None:
                part.source.check()
        return self.around({suffix: part.on_cpu().to(device or "cpu") for suffix, part in self.parts.items()})

    def around(self, tensors: dict[str, Tensor]) -> Tensor:
        """A tensor of the weight's class made of plain ones."""
        return codec_of(self.template).put_together(self.template, tensors)

    def fits(self, value: Tensor) -> bool:
        """Whether a tensor has the shape and dtype of what rests."""
        new = codec_of(self.template).take_apart(value)
        return all(
            suffix in new and tuple(new[suffix].shape) == part.shape and new[suffix].dtype == part.dtype
            for suffix, part in self.parts.items()
        )

    @torch.inference_mode(False)
    def keep(self, value: Tensor) -> None:
        """Let `value`, which must fit, rest in the place of the old one; in RAM, since a file is never written to."""
        codec = codec_of(self.template)
        for place in self.places:
            codec.collect(value, place[0])
        new = codec.take_apart(value)
        for suffix, part in self.parts.items():
            rest = part if part.slab is not None else replace(part, slab=Slab(part.nbytes), source=None, at=0)
            rest.on_cpu().copy_(new[suffix])
            part.slab, part.source, part.at = rest.slab, None, rest.at  # only now: an interrupt may come anywhere
            for alias in self.aliases:
                same = alias.parts[suffix]
                same.slab, same.source, same.at = part.slab, None, part.at
        if codec is not PLAIN:  # the tables of a quantized weight, and the mean of its scales, are the new ones
            for weight in (self, *self.aliases):
                weight.template = codec.template(value)
        self.outside.follow(self, value)

    def write_to(self, value: Tensor) -> None:
        """Write what rests into another copy of the weight."""
        with torch.no_grad():
            for suffix, plain in codec_of(self.template).take_apart(value).items():
                plain.copy_(self.parts[suffix].on_cpu())

    def madvise(self, advice: int) -> None:
        """Tell the system what is going to happen to the mapped pages of its files."""
        for part in self.parts.values():
            if part.source is not None:
                part.source.madvise(advice, part.at, part.nbytes)


@dataclass(eq=False)
class Unit:
    """Weights that travel together.

    Attributes:
        name: name of the module around them.
        module: that module.
        weights: in the order in which they lie in a slot.
        loose: whether they are only what the module registers itself, without the modules in it.
        routed: whether they are experts, which a router chooses.
        nbytes: bytes of a slot that holds them.
        index: the unit's number in its streamer.
    """

    name: str
    module: nn.Module
    weights: list[Weight]
    loose: bool = False
    routed: bool = False
    nbytes: int = 0
    index: int = 0
    _moves: list[Move] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.lay_out()

    def lay_out(self) -> None:
        """Give every part its place in a slot."""
        self.nbytes, self._moves = 0, None
        for part in self.parts():
            part.offset = self.nbytes
            self.nbytes += -(-part.nbytes // ALIGN) * ALIGN

    def modules(self) -> list[nn.Module]:
        """The modules whose weights these are."""
        if not self.loose:
            return [*self.module.modules()]
        return [*dict.fromkeys(module for weight in self.weights for module, _, _ in weight.places)]

    def parts(self) -> list[Part]:
        """The parts of all weights, in the order in which they lie in a slot."""
        return [part for weight in self.weights for part in weight.parts.values()]

    def moves(self) -> list[Move]:
        """What has to be copied to fill a slot: as few stretches of RAM and ranges of files as there are."""
        if self._moves is None:
            moves: list[Move] = []
            for part in self.parts():
                if part.nbytes and not (moves and moves[-1].take(part)):
                    moves.append(Move(part.slab, part.source, part.at, part.offset, [part], part.nbytes))
            self._moves = moves  # only now that all are known: an interrupt may come anywhere
        return self._moves

    def forget_moves(self) -> None:
        """To be called when a part rests elsewhere than before."""
        self._moves = None

    def check(self) -> None:
        """Make sure that the files are what they were.

        Raises:
            OSError: one is not.
        """
        for source in {move.source for move in self.moves()}:
            if source is not None:
                source.check()

    def madvise(self, advice: int) -> None:
        """Tell the system what is going to happen to the mapped pages of its files."""
        for move in self.moves():
            if move.source is not None:
                move.source.madvise(advice, move.at, move.nbytes)

    def rests_in(self) -> str:
        """Where its weights rest: "disk" if any of them does, else "cpu"."""
        return "disk" if any(weight.rests_in() == "disk" for weight in self.weights) else "cpu"


@dataclass
class Move:
    """Parts that lie one after another where they rest: in a slab as they will in the slot, in a file without gaps.

    Attributes:
        slab, source: the RAM or the file that holds them; the other is None.
        at: byte at which the first begins there.
        offset: byte at which it begins in the slot.
        parts: the parts.
        nbytes: bytes from the first part's beginning to the last part's end, where they rest.
    """

    slab: Slab | None
    source: Source | None
    at: int
    offset: int
    parts: list[Part]
    nbytes: int

    def take(self, part: Part) -> bool:
        """Take in a part, if it comes next in the same slab or file."""
        follows = part.at - self.at == (self.nbytes if self.slab is None else part.offset - self.offset)
        if part.slab is not self.slab or part.source is not self.source or not follows:
            return False
        self.parts.append(part)
        self.nbytes = part.at + part.nbytes - self.at
        return True


def rest_in_ram(unit: Unit, values: Iterable[dict[str, Tensor]], pin: bool) -> None:
    """Give a unit a slab, filled with the values of its weights; parts that rest somewhere already stay there.

    Args:
        unit: the unit.
        values: for each weight its plain tensors.
        pin: whether a CUDA device will read it.
    """
    slab: Slab | None = None
    for weight, tensors in zip(unit.weights, values, strict=True):
        for suffix, part in weight.parts.items():
            if part.slab is None and part.source is None:
                slab = slab or Slab(unit.nbytes, pin)
                part.slab, part.at = slab, part.offset
                if tensors[suffix].is_cuda:
                    slab.pin()  # a GPU copies into pinned RAM at the rate of its link
                part.on_cpu().copy_(tensors[suffix])
    if slab is not None:
        slab.pin(filled=True)
