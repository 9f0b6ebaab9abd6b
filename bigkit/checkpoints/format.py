"""How a checkpoint lies on disk: find it, check every claim that it makes, read a tensor, write a file.

A checkpoint is one safetensors file, or several (shards) and an index that says which tensor lies in which. A
safetensors file is eight bytes with the length of a header, the header (JSON: name -> dtype, shape, byte range) and the
bytes of the tensors one after another, so a tensor is found without reading anything else. `Checkpoint` knows where
each tensor lies and checks every claim that a header or an index makes before a byte of it is used.

Leaves out: what a model makes of it (`load.py`), and saving a whole model (`save.py`).
Formats: https://huggingface.co/docs/safetensors, and the index of Hugging Face Transformers (`weight_map`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..units import listed
from .library_names import Made

# Tried in this order in a folder; the same as Transformers.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_ENTRY = {"dtype", "shape", "data_offsets"}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint is broken, or does not fit the model. The message names the file and the tensor."""


# ---------------------------------------------------------------------------------------------------------------------
# Finding and checking


class Stored(NamedTuple):
    """Where one tensor lies: `nbytes` bytes from `offset` of `file`."""

    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass
class Checkpoint:
    """A checkpoint whose headers and index have been read and checked, and none of its tensors.

    Args:
        path: what was opened.
        files: its files, in order.
        stored: tensor name -> where it lies (safetensors only).
        pickled: tensor name -> its file (`.bin` only); the tensor is known once the file is unpickled.
        duplicates: names that more than one file holds; the index decides, or else the last file.
        made: name -> how the tensor is made from others, for the model that is loaded.
    """

    path: Path
    files: tuple[Path, ...] = ()
    stored: dict[str, Stored] = field(default_factory=dict)
    pickled: dict[str, Path] = field(default_factory=dict)
    duplicates: tuple[str, ...] = ()
    made: dict[str, Made] = field(default_factory=dict)
    _maps: dict[Path, torch.UntypedStorage] = field(default_factory=dict, repr=False)
    _pickles: dict[Path, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    @staticmethod
    def open(path: str | os.PathLike[str]) -> Checkpoint:
        """Read and check the headers of a checkpoint.

        Args:
            path: a `.safetensors` or `.bin` file, an index (`*.json`, with `weight_map` or bare), or a folder, in which
                safetensors come before pickles.

        Raises:
            FileNotFoundError: there is no checkpoint.
            CheckpointError: a file or index is broken; nothing of it was used.
        """
        path = Path(path)
        target = _in_folder(path) if path.is_dir() else path
        if not target.exists():
            raise FileNotFoundError(f"there is no checkpoint at {target}")
        if target.suffix == ".json":
            weight_map = _read_index(target)
            files = tuple(target.parent / name for name in dict.fromkeys(weight_map.values()))
            if missing := [file.name for file in files if not file.is_file()]:
                raise CheckpointError(f"{target} names {listed(missing)}, which is not in its folder")
        else:
            weight_map, files = None, (target,)
        found = Checkpoint(path, files)
        chosen: dict[str, list[str]] = {}
        for name, file_name in (weight_map or {}).items():
            chosen.setdefault(file_name, []).append(name)
        seen: set[str] = set()
        duplicates: dict[str, None] = {}
        for file, names in zip(files, chosen.values() if weight_map else [None]):
            safe = file.suffix == ".safetensors"
            content: dict[str, Any] = read_header(file) if safe else dict.fromkeys(found.unpickle(file), file)
            if not seen.isdisjoint(content):
                duplicates |= dict.fromkeys(name for name in content if name in seen)
            seen.update(content)
            if names is not None:
                if absent := [name for name in names if name not in content]:
                    raise CheckpointError(f"{target} says that {listed(absent)} is in {file.name}, which lacks it")
                content = {name: content[name] for name in names}
            (found.stored if safe else found.pickled).update(content)
        found.duplicates = tuple(duplicates)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self.stored or name in self.pickled or name in self.made

    def __iter__(self) -> Iterator[str]:
        yield from self.stored
        yield from self.pickled

    def __len__(self) -> int:
        return len(self.stored) + len(self.pickled)

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """What a tensor is, without reading it."""
        if name in self.stored:
            return self.stored[name].shape, self.stored[name].dtype
        if name in self.made:
            return self.made[name].shape, self.made[name].dtype
        tensor = self.read(name)
        return tuple(tensor.shape), tensor.dtype

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, its pages those of the file: read when touched, shared, copied when written to.

        Raises:
            KeyError: the checkpoint has no such tensor.
        """
        if name in self.pickled:
            return self.unpickle(self.pickled[name])[name]
        if name in self.made:
            return self.made[name].make({part: self.read(part) for part in self.made[name].sources})
        where = self.stored[name]
        if where.file not in self._maps:
            size = where.file.stat().st_size
            whole = torch.from_file(str(where.file), shared=False, size=size, dtype=torch.uint8)
            self._maps[where.file] = whole.untyped_storage()
        # A storage of its own for each: libraries take tensors that share one for tied.
        own = self._maps[where.file][where.offset : where.offset + where.nbytes]
        if where.offset % where.dtype.itemsize:
            own = own.clone()  # a tensor cannot start between two elements
        return torch.empty(0, dtype=where.dtype).set_(own).view(where.shape)

    def rename(self, old: str, new: str) -> None:
        """Find a tensor under another name from now on."""
        if old in self.stored:
            self.stored[new] = self.stored.pop(old)
        else:
            self.pickled[new] = file = self.pickled.pop(old)
            self.unpickle(file)[new] = self.unpickle(file).pop(old)

    def unpickle(self, file: Path) -> dict[str, Tensor]:
        """The tensors of a `.bin` file; nothing in it is ever executed."""
        if file not in self._pickles:
            try:
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:  # every broken pickle fails in its own way
                reason = str(error).split("\n")[0]
                raise CheckpointError(f"{file} is no file of tensors that can be loaded safely: {reason}") from error
            if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
                raise CheckpointError(f"{file} holds a {type(content).__name__}, expected a dict of tensors by name")
            self._pickles[file] = {name: value for name, value in content.items() if isinstance(value, Tensor)}
        return self._pickles[file]


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, after checking that they fill it exactly and do not overlap.

    Raises:
        CheckpointError: the file is truncated, or its header is wrong; names the file and the tensor.
    """
    with open(file, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(LONGEST_HEADER, size - 8):
            raise CheckpointError(f"{file} is no complete safetensors file: {size} bytes, header announced {length}")
        text = stream.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header of {file} is no valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {file} is a {type(header).__name__}, expected an object")
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _entry(file, start, size, name, entry) for name, entry in header.items()}
    end = start
    for where in sorted(tensors.values(), key=itemgetter(1, 2)):  # by offset, empty ones first
        if where.offset != end:
            name = next(name for name, other in tensors.items() if other is where)
            wrong = "overlaps the one before it" if where.offset < end else "leaves a hole before it"
            raise CheckpointError(f"tensor {name!r} in {file} {wrong}: starts at byte {where.offset}, expected {end}")
        end += where.nbytes
    if end != size:
        raise CheckpointError(f"{file} has {size} bytes, but its tensors end at byte {end}")
    return tensors


def _entry(file: Path, start: int, size: int, name: str, entry: Any) -> Stored:
    """One line of a header, checked. There may be many thousands: the usual case asks little."""
    try:
        dtype, shape, (first, last) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if len(entry) == 3 and _sizes(shape) and _sizes(entry["data_offsets"]) and first <= last <= size - start:
            if last - first == math.prod(shape) * dtype.itemsize:
                return Stored(file, start + first, last - first, dtype, tuple(shape))
    except (KeyError, TypeError, ValueError):
        pass
    raise CheckpointError(f"tensor {name!r} in {file} {_wrong_entry(size - start, entry)}")


def _wrong_entry(room: int, entry: Any) -> str:
    """What is wrong with a line of a header, where the file has `room` bytes for tensors."""
    if not isinstance(entry, dict) or entry.keys() != _ENTRY:
        return "has no dtype, shape and data_offsets, or more than these"
    dtype, shape, offsets = _DTYPES.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
    if dtype is None:
        return f"has the dtype {entry['dtype']!r}, expected one of {', '.join(_DTYPES)}"
    if not _sizes(shape):
        return f"has the shape {shape!r}, expected a list of sizes"
    if not _sizes(offsets) or len(offsets) != 2:
        return f"has the byte range {offsets!r}, expected two offsets"
    first, last = offsets
    if not first <= last <= room:
        return f"claims the bytes {first} to {last}, but the file has {room} (is it truncated?)"
    return f"has {last - first} bytes, but its shape {shape} takes {math.prod(shape) * dtype.itemsize}"


def _sizes(value: Any) -> bool:
    if type(value) is not list:
        return False
    for item in value:
        if type(item) is not int or not 0 <= item < 2**62:
            return False
    return True


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _in_folder(folder: Path) -> Path:
    for name in (SINGLE, INDEX, PICKLE, PICKLE_INDEX):
        if (folder / name).exists():
            return folder / name
    for pattern in ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*.bin"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = [file.name for file in found]
            raise CheckpointError(f"{folder} has several files and no index: {listed(names)}; name one of them")
    expected = f"{SINGLE}, {INDEX}, {PICKLE} or {PICKLE_INDEX}"
    raise FileNotFoundError(f"there is no checkpoint in {folder}: expected {expected}")


def _read_index(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the index {path} is no valid JSON: {error}") from error
    weight_map = content.get("weight_map", content) if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"the index {path} has no weight_map of tensor names to files")
    for file in {file if isinstance(file, str) else "" for file in weight_map.values()}:
        path_parts = PurePosixPath(file).parts
        outside = not file or file[0] == "/" or ".." in path_parts or any(sign in file for sign in ("\\", "\0", ":"))
        if outside or not file.endswith((".safetensors", ".bin", ".pt", ".pth")):
            name, file = next((n, f) for n, f in weight_map.items() if f == file or not isinstance(f, str))
            what = "which is no file in its folder" if outside else "expected .safetensors or .bin"
            raise CheckpointError(f"the index {path} puts {name!r} into {file!r}, {what}")
    return weight_map


class Form(NamedTuple):
    """What a tensor is, without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class WrittenFile:
    """A file with weights of a model, which goes when nothing needs it any more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        weakref.finalize(self, _remove, str(path), os.getpid())

    def __deepcopy__(self, memo: dict[int, Any]) -> WrittenFile:
        return self


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked child
        with contextlib.suppress(OSError):
            os.unlink(path)


def write_file(
    folder: str | os.PathLike[str], forms: Mapping[str, Form], read: Callable[[str], Tensor]
) -> tuple[WrittenFile, dict[str, Stored]]:
    """Write tensors into a new safetensors file, one after another, so that no more than one is in memory.

    Args:
        folder: where to; made if it is not there.
        forms: name -> shape and dtype.
        read: name -> the tensor.

    Returns:
        The file, and where in it each tensor lies.

    Raises:
        OSError: the folder cannot be written to, or the disk is full; nothing is left behind.
    """
    header: dict[str, Any] = {}
    end = 0
    order = sorted(forms, key=lambda name: -forms[name].dtype.itemsize)  # so that each starts at a multiple of its own
    for name in order:
        shape, dtype = forms[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="offloaded-", suffix=".safetensors", delete=False) as file:
            written = WrittenFile(Path(file.name))
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                flat = read(name).detach().to("cpu").contiguous().reshape(-1)
                file.write(flat.view(torch.uint8).numpy().data)
    except OSError as error:
        raise OSError(f"could not write weights to {folder}: {error}; the model is as it was") from error
    return written, read_header(written.path)
