"""The header of a GGUF file (llama.cpp's format), read with a check on every claim that it makes, and without torch.

    magic "GGUF", version, number of tensors, number of keys
    keys        name, type, value: the architecture and its numbers, the vocabulary
    tensors     name, sizes (innermost first), type, offset
    data        from the next multiple of `general.alignment` on

A type packs the values of a tensor in blocks: Q4_K has 256 values in 144 bytes, scales included, which are 4.5 bits
for each. So a model's size is known to the byte from some megabytes of header, and no weight is read.

Leaves out: the values; llama.cpp computes with them. A model's record is made by `zoo/gguf.py`.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .header import CheckpointError

# Number of a type -> its name, values in a block, bytes of a block.
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
    26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
}  # fmt: skip
# Number of a value's type -> its form for `struct`.
_VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
MOST = 1_000_000  # keys, or tensors; real files have some thousands
LONGEST = 2**24  # texts in an array, such as a vocabulary; and bytes of a text
LISTED = 4096  # numbers of an array that are kept; of a longer one, and of texts, only the length is


class GgufTensor(NamedTuple):
    """What a header says of one tensor: the name of its type, its sizes outermost first, and its bytes."""

    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Length(int):
    """The length of an array that was not kept."""


class GgufHeader(NamedTuple):
    """Keys and tensors of a file."""

    keys: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(path: str | os.PathLike[str]) -> GgufHeader:
    """The header of a GGUF file, after checking that every tensor lies in the file and none in another.

    Raises:
        CheckpointError: it is no GGUF file of version 2 or 3, or something that it claims cannot be.
        OSError: it cannot be read.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        return _Reader(stream, size, Path(path).name).header()


class _Reader:
    """Reads a header from its start, and never past the end of the file."""

    def __init__(self, stream: BinaryIO, size: int, file: str) -> None:
        self.stream, self.left, self.size, self.file = stream, size, size, file

    def fault(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.file} is no usable GGUF file: {text}")

    def take(self, count: int, what: str) -> bytes:
        """The next bytes."""
        self.claim(count, what)
        data = self.stream.read(count)
        if len(data) != count:
            raise self.fault(f"it became shorter while it was read, at {what}")
        return data

    def claim(self, count: int, what: str) -> None:
        if count > self.left:
            raise self.fault(f"{what} would take {count} bytes, of which {self.left} are left (is it truncated?)")
        self.left -= count

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}"), what))[0]

    def count(self, what: str, most: int) -> int:
        count = self.number("Q", what)
        if count > most:
            raise self.fault(f"{what} is {count}, expected at most {most}")
        return int(count)

    def text(self, what: str) -> str:
        try:
            return self.take(self.count(f"the length of {what}", LONGEST), what).decode()
        except UnicodeDecodeError:
            raise self.fault(f"{what} is no text in UTF-8") from None

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        """A value; an array of texts, or a long one, is read over."""
        if kind in _VALUES:
            return self.number(_VALUES[kind], what)
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY or depth == 2:
            raise self.fault(f"{what} has the type {kind}" + (", an array in arrays" if kind == _ARRAY else ""))
        inner = self.number("I", what)
        if inner in _VALUES:
            form = _VALUES[inner]
            count = self.count(f"the length of {what}", self.left // struct.calcsize(form))
            if count <= LISTED:
                return [self.number(form, what) for _ in range(count)]
            self.skip(count * struct.calcsize(form), what)
            return Length(count)
        count = self.count(f"the length of {what}", min(LONGEST, self.left // 8))
        for _ in range(count):
            if inner == _STRING:
                self.skip(self.count(f"the length of a text in {what}", LONGEST), what)
            else:
                self.value(inner, what, depth + 1)
        return Length(count)

    def skip(self, count: int, what: str) -> None:
        self.claim(count, what)
        self.stream.seek(count, os.SEEK_CUR)

    def header(self) -> GgufHeader:
        magic = self.take(min(4, self.left), "the magic")
        if magic != b"GGUF":
            raise self.fault(f"it begins with {magic!r}, expected b'GGUF'")
        version = self.number("I", "the version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            other = ", of a machine with the other order of bytes" if swapped in (1, 2, 3) else ""
            raise self.fault(f"it has version {swapped if other else version}{other}, expected 2 or 3")
        tensors, keys = self.count("the number of tensors", MOST), self.count("the number of keys", MOST)
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            name = self.text("the name of a key")
            if name in metadata:
                raise self.fault(f"the key {name[:99]!r} appears twice")
            metadata[name] = self.value(self.number("I", f"the key {name[:99]!r}"), f"the key {name[:99]!r}")
        found: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        for _ in range(tensors):
            name = self.text("the name of a tensor")
            if name in found:
                raise self.fault(f"the tensor {name[:99]!r} appears twice")
            found[name] = self.tensor(f"the tensor {name[:99]!r}")
        return GgufHeader(metadata, self.placed(found, metadata.get("general.alignment", 32)))

    def tensor(self, what: str) -> tuple[str, tuple[int, ...], int, int]:
        count = self.number("I", what)
        if count > 4:
            raise self.fault(f"{what} has {count} sizes, expected at most 4")
        sizes = [self.number("Q", what) for _ in range(count)]
        kind, offset = self.number("I", what), self.number("Q", what)
        if kind not in TYPES:
            raise self.fault(f"{what} has the type {kind}, which bigkit does not know")
        name, values, block = TYPES[kind]
        elements = math.prod(sizes)
        if math.prod(size or 1 for size in sizes) >= 2**62 or (sizes[0] if sizes else 1) % values:
            raise self.fault(f"{what} has the sizes {sizes}, which {name} cannot have (blocks of {values} values)")
        return name, tuple(reversed(sizes)), offset, elements // values * block

    def placed(self, found: dict[str, tuple[str, tuple[int, ...], int, int]], alignment: Any) -> dict[str, GgufTensor]:
        """The tensors with their places in the file, none over the end of it or into another."""
        if type(alignment) is not int or not 0 < alignment <= 2**20:
            raise self.fault(f"general.alignment is {alignment!r}, expected a number of bytes")
        start = -(-(self.size - self.left) // alignment) * alignment
        end, last = start, ""
        placed = {name: GgufTensor(kind, shape, start + offset, size)
                  for name, (kind, shape, offset, size) in found.items()}  # fmt: skip
        for name, tensor in sorted(placed.items(), key=lambda item: item[1][2:]):
            if (tensor.offset - start) % alignment:
                raise self.fault(f"the tensor {name[:99]!r} begins at a byte that is no multiple of {alignment}")
            if tensor.offset < end:
                raise self.fault(f"the tensor {name[:99]!r} lies in the tensor {last[:99]!r}")
            end, last = tensor.offset + tensor.nbytes, name
            if end > self.size:
                raise self.fault(f"the tensor {name[:99]!r} ends at byte {end}, but the file has {self.size}")
        return placed
