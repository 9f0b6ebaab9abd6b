"""Weights that rest on disk: which bytes of which file stand for a tensor that a model has on meta.

One rule: a tensor that is not on meta is the truth, and a resting place counts only for the very meta tensor that it
was recorded for. So the record is kept by the tensor's storage, not by a name in a model: every name and alias of the
tensor finds it, and whatever replaces the tensor (`load_state_dict(assign=True)`, a new parameter, `to_empty`, `half`)
has none, nor has a copy (`copy.deepcopy`, a pickle). The record goes when the tensor goes.

Leaves out: what brings such weights to a forward (`offload/weights.py`), and saving them (`save.py`).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage

from ..units import dtype_name, listed
from .format import Checkpoint, Stored, read_header
from .in_order import joined
from .write import Form, check_dtypes, write_safetensors


class RestingPlace(NamedTuple):
    """Where the bytes of a meta tensor are.

    Args:
        parts: suffix -> range of a file: "" is the tensor itself; a quantized weight has others ("absmax", ...).
        written: the file, if bigkit wrote it for this model; it is removed when nothing refers to it any more.
        versions: file -> its inode, size and time of change when the place was recorded.
    """

    parts: Mapping[str, Stored]
    written: WrittenFile | None
    versions: Mapping[Path, tuple[int, int, int] | None]


# Storages of meta tensors -> (offset, shape, stride, dtype) of a tensor in it -> where that one rests.
_places: weakref.WeakKeyDictionary[UntypedStorage, dict[Any, RestingPlace]] = weakref.WeakKeyDictionary()


def record_resting_place(tensor: Tensor, parts: Mapping[str, Stored], written: WrittenFile | None = None) -> None:
    """Remember where the bytes of a meta tensor are.

    Args:
        tensor: a tensor on meta that stands in a model.
        parts, written: see `RestingPlace`.
    """
    parts = {suffix: _anywhere(where) for suffix, where in parts.items()}
    versions = {file: _version(file) for where in parts.values() for file in where.files}
    _places.setdefault(tensor.untyped_storage(), {})[_view(tensor)] = RestingPlace(parts, written, versions)


def _anywhere(where: Stored) -> Stored:
    """The same for a process that goes to another folder before it reads."""
    if where.file.is_absolute():
        return where
    return where._replace(file=where.file.absolute(), pieces=tuple(map(_anywhere, where.pieces)))


def resting_place(tensor: Tensor) -> RestingPlace | None:
    """Where the bytes of a tensor are, if it is on meta and was left on disk.

    Raises:
        OSError: the file is gone, or is not what it was when the tensor was left in it.
    """
    try:
        place = _places.get(tensor.untyped_storage(), {}).get(_view(tensor)) if tensor.is_meta else None
    except (NotImplementedError, RuntimeError, ValueError):  # a lazy parameter or a wrapper has no storage
        return None
    for file, version in place.versions.items() if place else ():
        if _version(file) != version:
            raise OSError(f"{file} was changed or removed while weights of a model rest in it: load a checkpoint again")
    return place


def _view(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tensor.size(), tensor.stride(), tensor.dtype


def _version(file: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(file)
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


class WrittenFile:
    """A file with weights of a model, which is removed when nothing refers to this object any more."""

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
        ValueError: safetensors has no name for a dtype; nothing was written.
        OSError: the folder cannot be written to, or the disk is full; nothing is left behind.
    """
    check_dtypes(forms)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="offloaded-", suffix=".safetensors", delete=False) as file:
            written = WrittenFile(Path(file.name))
            write_safetensors(file, forms, read)  # type: ignore[arg-type]
    except OSError as error:
        raise OSError(f"could not write weights to {folder}: {error}; the model is as it was") from error
    return written, read_header(written.path)


def rest_on_disk(
    source: Checkpoint, dtypes: Mapping[str, torch.dtype | None], folder: str | os.PathLike[str] | None
) -> tuple[dict[str, Stored], WrittenFile | None]:
    """Where tensors are on disk in the dtypes that are wanted: in the checkpoint itself, or in a new file."""
    stored = {
        name: source.stored[name]
        for name, dtype in dtypes.items()
        if name in source.stored and dtype in (None, source.stored[name].dtype)
    }
    forms: dict[str, Form] = {}
    for name, dtype in dtypes.items():
        if name in source.made and dtype in (None, source.made[name].dtype) and (where := joined(source, name)):
            stored[name] = where
        if name not in stored:
            shape, own = source.shape_and_dtype(name)
            forms[name] = Form(shape, dtype or own)
    if not forms:
        return stored, None
    if folder is None:
        name, wanted = next((name, form.dtype) for name, form in forms.items())
        own = source.shape_and_dtype(name)[1]
        in_files = name in source.stored or (name in source.made and joined(source, name) is not None)
        form = f"as {dtype_name(wanted)}" if in_files else "as safetensors"
        as_it_is = in_files and own.is_floating_point
        raise ValueError(
            f"{source.path} has {listed(forms)} as {dtype_name(own)}, which for disk must be written {form}: "
            "give an offload_folder" + (f', or dtype="{dtype_name(own)}" to use it as it is' if as_it_is else "")
        )
    written, in_new_file = write_file(folder, forms, lambda name: source.read(name).to(forms[name].dtype))
    return stored | in_new_file, written
