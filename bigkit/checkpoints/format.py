"""How a checkpoint lies on disk: check every claim that it makes, find a tensor, read it.

A checkpoint is one safetensors file, or several (shards) and an index that says which tensor lies in which. A file
starts with a header that says where each tensor lies (`header.py`), so a tensor is found without reading anything else.
`Checkpoint` checks every claim that a header or an index makes before a byte of it is used.

Leaves out: where to start in a folder (`index.py`), what a `.bin` file holds (`pickles.py`), what a model makes of
it (`match.py`, `load.py`), and saving (`write.py`, `save.py`).
Formats: https://huggingface.co/docs/safetensors, and the index of Hugging Face Transformers (`weight_map`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..model.header import DTYPES, header_length, parse_header
from ..model.header import CheckpointError as CheckpointError
from ..units import listed
from ._transformers import Made
from .index import files_of_index, start_of_folder
from .pickles import read_pickle, tensors_of

ASIDE = "\0"  # ends the names of tensors that are set aside

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, own) for name, (own, size) in DTYPES.items() if size >= 1}
NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Stored(NamedTuple):
    """Where one tensor lies: `nbytes` bytes from `offset` of `file`; or in `pieces`, of which that is the first."""

    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Any, ...] = ()

    @property
    def files(self) -> set[Path]:
        """The files that hold it."""
        return {piece.file for piece in self.pieces} or {self.file}


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
        key: in `.bin` files, the key of the dict that holds the tensors ("state_dict", "a.b"); "" is the file's own.
        nested: key -> names of the tensors that `.bin` files hold there.
        metadata: module name -> what PyTorch noted of it in a `.bin` file: the version of its names.
    """

    path: Path
    files: tuple[Path, ...] = ()
    stored: dict[str, Stored] = field(default_factory=dict)
    pickled: dict[str, Path] = field(default_factory=dict)
    duplicates: tuple[str, ...] = ()
    made: dict[str, Made] = field(default_factory=dict)
    key: str = ""
    nested: dict[str, tuple[str, ...]] = field(default_factory=dict)
    metadata: dict[str, dict[str, Any]] = field(default_factory=dict)
    _maps: dict[Path, torch.UntypedStorage] = field(default_factory=dict, repr=False)
    _pickles: dict[Path, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    @staticmethod
    def open(path: str | os.PathLike[str], key: str = "", prefix: str = "") -> Checkpoint:
        """Read and check the headers of a checkpoint.

        Args:
            path: a `.safetensors` or `.bin` file, an index (`*.json`, with `weight_map` or bare), or a folder, in which
                safetensors come before pickles, and an index may have any name if there is one only (`*.index.json`).
            key: see `Checkpoint`.
            prefix: a beginning of names, such as "module.", that is left out.

        Raises:
            FileNotFoundError: there is no checkpoint.
            CheckpointError: a file or index is broken, or is a git-lfs pointer or a web page in a file's place; nothing
                of it was used.
        """
        path = Path(path)
        target = start_of_folder(path) if path.is_dir() else path
        if not target.exists():
            raise FileNotFoundError(f"there is no checkpoint at {target}: give a file or folder on this machine")
        names_of = files_of_index(target) if target.suffix == ".json" else {target: None}
        if missing := [file.name for file in names_of if not file.is_file()]:
            raise CheckpointError(f"{target} names {listed(missing)}, which is not in its folder")
        checkpoint = Checkpoint(path, tuple(names_of), key=key)
        seen: set[str] = set()
        duplicates: dict[str, None] = {}
        for file, names in names_of.items():
            safe = file.suffix == ".safetensors"
            content: dict[str, Any] = read_header(file) if safe else dict.fromkeys(checkpoint.unpickle(file), file)
            duplicates |= dict.fromkeys(name for name in content if name in seen)
            seen.update(content)
            if names is not None:
                if absent := [name for name in names if name not in content]:
                    raise CheckpointError(f"{target} says that {listed(absent)} is in {file.name}, which lacks it")
                content = {name: content[name] for name in names}
            (checkpoint.stored if safe else checkpoint.pickled).update(content)
        checkpoint.duplicates = tuple(duplicates)
        for name in [name for name in checkpoint if name.startswith(prefix)] if prefix else []:
            checkpoint.rename(name, name.removeprefix(prefix))
        notes = checkpoint.metadata.items()
        checkpoint.metadata = {f"{name}.".removeprefix(prefix).rstrip("."): data for name, data in notes}
        return checkpoint

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
        tensor = self.unpickle(self.pickled[name])[name]
        return tuple(tensor.shape), tensor.dtype

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU. From a safetensors file these are mapped pages: read when touched, shared with other
        readers, copied when written to. From a `.bin` file it is a copy.

        Raises:
            KeyError: the checkpoint has no such tensor.
        """
        if name in self.pickled:
            return self.unpickle(self.pickled[name])[name].clone()  # trainers write such files anew, in place
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
        self.made.pop(new, None)
        if old in self.stored:
            self.stored[new] = self.stored.pop(old)
        elif old in self.made:
            self.made[new] = self.made.pop(old)
        else:
            self.pickled[new] = file = self.pickled.pop(old)
            self.unpickle(file)[new] = self.unpickle(file).pop(old)

    def set_aside(self, name: str) -> str:
        """Give a tensor a name that no model has: others are made of it, or it is not wanted. Returns that name."""
        aside = name + ASIDE
        while aside in self:
            aside += ASIDE
        self.rename(name, aside)
        return aside

    def unpickle(self, file: Path) -> dict[str, Tensor]:
        """The tensors of a `.bin` file, in the format from before PyTorch 1.6 too; no code in it is ever run."""
        if file not in self._pickles:
            dicts = read_pickle(file)
            self.nested |= {key: tuple(tensors_of(inner)) for key, inner in dicts.items() if key}
            if self.key not in dicts:
                raise CheckpointError(f"{file} has no tensors under {self.key!r}, but under {listed(self.nested)}")
            self._pickles[file] = tensors_of(dicts[self.key])
            self.metadata |= getattr(dicts[self.key], "_metadata", {})
        return self._pickles[file]


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, after checking that they fill it exactly and do not overlap.

    Raises:
        CheckpointError: the file is truncated, or its header is wrong; names the file and the tensor.
    """
    with open(file, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        length = header_length(stream.read(256), size, file)
        stream.seek(8)
        text = stream.read(length)
    entries = parse_header(text, 8 + length, size, file)
    for name, entry in entries.items():
        if entry.dtype not in _DTYPES:
            raise CheckpointError(
                f"tensor {name!r} in {file} is stored as {entry.dtype}, which torch cannot compute with"
            )
    return {
        name: Stored(file, offset, nbytes, _DTYPES[dtype], shape)
        for name, (offset, nbytes, dtype, shape) in entries.items()
    }
