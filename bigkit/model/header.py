"""The header of a safetensors file, read with a check on every claim that it makes, and without torch.

A file is eight bytes with the length of the header (little endian), the header (JSON: name -> dtype, shape, byte
range), and the bytes of the tensors one after another. `parse_header` takes the text of a header from wherever it comes
(a file, a range of a URL), so that nothing of a file is used before all of its header has been checked.

Leaves out: opening files, and tensors (`checkpoints/format.py`).
Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import reprlib
from operator import itemgetter
from typing import Any, NamedTuple

LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library

# What a file calls a dtype -> what torch and `units` call it, and bytes of one element.
DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "BOOL": ("bool", 1),
    "U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1), "C64": ("complex64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1), "F8_E8M0": ("float8_e8m0fnu", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1), "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1), "F4": ("uint4", 0.5),
}  # fmt: skip
_FIELDS = {"dtype", "shape", "data_offsets"}


class CheckpointError(ValueError):
    """A checkpoint is broken, or does not fit the model. The message names the file and the tensor."""


class Entry(NamedTuple):
    """What a header says of one tensor.

    Args:
        offset: the first of its bytes, counted from the start of the file.
        nbytes: how many there are.
        dtype: a key of `DTYPES`.
        shape: sizes, outermost first.
    """

    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


def header_length(start: bytes, size: int, file: object) -> int:
    """Bytes of the header of a safetensors file of `size` bytes, by the first bytes of it (some 256 are enough).

    Raises:
        CheckpointError: it is no safetensors file, or not a complete one.
    """
    if fault := no_weights(start):
        raise CheckpointError(f"{file} {fault}")
    length = int.from_bytes(start[:8], "little")
    if size < 8 or not 2 <= length <= min(LONGEST_HEADER, size - 8):
        raise CheckpointError(f"{file} is no complete safetensors file: {size} bytes, header announced {length}")
    return length


def parse_header(text: bytes, start: int, size: int, file: object) -> dict[str, Entry]:
    """The tensors of a safetensors file, after checking that they fill it exactly and do not overlap.

    Args:
        text: the header.
        start: bytes of the file before the first tensor: 8, and the length of the header.
        size: bytes of the whole file.
        file: what errors call it.

    Raises:
        CheckpointError: the header is wrong, the file is not as long as it says, or a shape has more than 64 sizes or
            2**62 elements or more; names the file and the tensor.

    >>> parse_header(b'{"w": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}', 68, 72, "a.safetensors")
    {'w': Entry(offset=68, nbytes=4, dtype='F16', shape=(2,))}
    """
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header of {file} is no valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {file} is a {type(header).__name__}, expected an object")
    header.pop("__metadata__", None)
    entries: dict[str, Entry] = {}
    for name, fields in header.items():
        entry = _entry(start, size, fields)
        if entry is None:
            raise CheckpointError(f"tensor {name!r} in {file} {_fault(size - start, fields)}")
        entries[name] = entry
    end = start
    for entry in sorted(entries.values(), key=itemgetter(0, 1)):  # by offset, empty ones first
        if entry.offset != end:
            name = next(name for name, other in entries.items() if other is entry)
            fault = "overlaps the one before it" if entry.offset < end else "leaves a hole before it"
            raise CheckpointError(f"tensor {name!r} in {file} {fault}: starts at byte {entry.offset}, expected {end}")
        end += entry.nbytes
    if end != size:
        raise CheckpointError(f"{file} has {size} bytes, but its tensors end at byte {end}")
    return entries


def _entry(start: int, size: int, fields: Any) -> Entry | None:
    """One line of a header, None if anything is wrong. There may be many thousands: the usual case is quick."""
    try:
        itemsize, shape, (first, last) = DTYPES[fields["dtype"]][1], fields["shape"], fields["data_offsets"]
        if len(fields) == 3 and _sizes(shape) and _sizes(fields["data_offsets"]) and first <= last <= size - start:
            nbytes = math.prod(shape) * itemsize if len(shape) <= 64 else -1
            if nbytes == last - first and (nbytes or not _too_large(shape)):  # what the file has room for is not
                return Entry(start + first, last - first, fields["dtype"], tuple(shape))
    except (KeyError, TypeError, ValueError):
        pass
    return None


def _fault(room: int, fields: Any) -> str:
    """What is wrong with a line of a header, where the file has `room` bytes for tensors."""
    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        return "has no dtype, shape and data_offsets, or more than these"
    dtype, shape, offsets = str(fields["dtype"]), fields["shape"], fields["data_offsets"]
    if dtype not in DTYPES:
        return f"has the dtype {reprlib.repr(fields['dtype'])}, expected one of {', '.join(DTYPES)}"
    if not _sizes(shape):
        return f"has the shape {reprlib.repr(shape)}, expected a list of sizes"
    if _too_large(shape):
        return f"has the shape {reprlib.repr(shape)}, expected at most 64 sizes and fewer than 2**62 elements"
    if not _sizes(offsets) or len(offsets) != 2:
        return f"has the byte range {reprlib.repr(offsets)}, expected two offsets"
    first, last = offsets
    if not first <= last <= room:
        return f"claims the bytes {first} to {last}, but the file has {room} (is it truncated?)"
    return f"has {last - first} bytes, but its shape {shape} takes {math.prod(shape) * DTYPES[dtype][1]}"


def _sizes(value: Any) -> bool:
    """Whether a JSON value is a list of numbers that can be sizes."""
    if type(value) is not list:
        return False
    for item in value:
        if type(item) is not int or not 0 <= item < 2**62:
            return False
    return True


def _too_large(shape: list[int]) -> bool:
    """Whether a shape is more than any tensor has; a product of very many sizes would take minutes."""
    return len(shape) > 64 or math.prod(size or 1 for size in shape) >= 2**62


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key appears twice")
    return fields


def no_weights(start: bytes) -> str:
    """What a file is instead of weights, by its first bytes, and what to do; "" if it may hold weights."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        return "is empty: download it again"
    if start[:4] == b"GGUF":
        return "is a GGUF file, which llama.cpp runs: `bigkit plan FILE` prints the command with the same placement"
    if text.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder, or download it again"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not the file itself: download it again, from an address of the file"
    return ""
