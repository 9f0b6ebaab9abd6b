"""Saving a model: shard after shard under temporary names, the index swapped in last.

A crash at any moment leaves the old checkpoint or the new one, whole.

Leaves out: how tensors are dealt out to shards (`shards.py`), and the bytes of one file (`format.py`).
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..meta.skeleton import extra_tensors
from ..units import format_bytes, listed
from .format import INDEX, PICKLE, PICKLE_INDEX, SINGLE, Checkpoint, Stored
from .load import model_slots
from .shards import cut


def save_model(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    max_shard_size: int | str = "10GB",
    safe_serialization: bool = True,
) -> None:
    """Write a model's parameters and persistent buffers as a checkpoint that Hugging Face libraries read.

    What modules add to their state dict on their own is written too: the scales of quantized weights.

    Shards are written under temporary names and brought to disk; then the index is put in place in one step. Whenever
    the process is stopped, the folder holds the old checkpoint or the new one. Shards of the old one are removed last.

    Args:
        model: the model. A tensor on meta must be one that `load_checkpoint_in_model` left on disk: it is copied from
            there, so that no more than one shard is in memory at a time.
        save_directory: a folder, made if it is not there. Other files in it stay.
        max_shard_size: the most bytes of a file, as a number or text ("5GB"); a larger tensor has a file of its own.
        safe_serialization: safetensors; False writes pickles (`.bin`).

    Raises:
        ValueError: a tensor has no data, or the size makes no sense.
        OSError: the disk is full or not writable; the checkpoint that was there is untouched.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(nn.Linear(100, 100), folder, max_shard_size="1KB")
    ...     sorted(os.listdir(folder))[0], len(os.listdir(folder))
    ('model-00001-of-00002.safetensors', 3)
    """
    folder = Path(save_directory)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; save_model needs a folder")
    on_disk = vars(model).get("_on_disk", {})
    tensors = _to_save(model, on_disk)
    if empty := [name for name, tensor in tensors.items() if isinstance(tensor, Tensor) and tensor.is_meta]:
        raise ValueError(f"{listed(empty)} are on meta and have no data to save: load a checkpoint first")
    rests_here = folder.resolve() in {file.parent.resolve() for file in {where.file for where in on_disk.values()}}
    if rests_here and not safe_serialization:
        raise ValueError(
            f"weights of this model rest in {folder}: save them as safetensors there, or in another folder"
        )
    single, index = (SINGLE, INDEX) if safe_serialization else (PICKLE, PICKLE_INDEX)
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    made = cut(sizes, max_shard_size, single, _next_generation(folder, single.partition(".")[0]))
    last = index if len(made.files) > 1 else single  # what a reader looks for comes last
    folder.mkdir(parents=True, exist_ok=True)
    with _staging(folder, made.bytes) as stage:
        for file, names in made.files.items():
            write = _write_safetensors if safe_serialization else _write_pickle
            write({name: _plain(name, tensors[name]) for name in names}, stage / file)
            _sync(stage / file)
        if last == index:
            (stage / index).write_text(made.index(), encoding="utf-8")
            _sync(stage / index)
            for file in made.files:
                os.rename(stage / file, folder / file)
            _sync(folder)
        os.replace(stage / last, folder / last)
        _sync(folder)
    if rests_here:  # the files that they rest in are about to go
        stored = Checkpoint.open(folder).stored
        on_disk.update({name: stored[name] for name in on_disk})
    _remove_stale(folder, {*made.files, last})


def _to_save(model: nn.Module, on_disk: Mapping[str, Stored]) -> dict[str, Tensor | Stored]:
    """Name -> what is stored, module by module: parameters, persistent buffers, and what modules add on their own."""
    slots = {slot.name: on_disk.get(slot.name, slot.tensor) for slot in model_slots(model)}
    tensors: dict[str, Tensor | Stored] = {}
    for prefix, module in model.named_modules():
        extra = extra_tensors(module, load=True)
        for own in (*module._parameters, *module._buffers, *extra):
            name = f"{prefix}.{own}" if prefix else own
            if own in extra or name in slots:
                tensors[name] = extra[own] if own in extra else slots[name]
    return tensors


def _plain(name: str, tensor: Tensor | Stored) -> Tensor:
    """A tensor as a file needs it: on the CPU, contiguous, alone in its storage."""
    if isinstance(tensor, Stored):
        tensor = Checkpoint(tensor.file, stored={name: tensor}).read(name)
    value = tensor.detach().to("cpu").contiguous()
    alone = type(value) is Tensor and value.untyped_storage().nbytes() == value.nbytes  # it may be a handle on a weight
    return value if alone else value.clone()


def _write_safetensors(tensors: dict[str, Tensor], file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # what it says of a full disk
        raise OSError(f"{file.name}: {error}") from error
    file.chmod(0o666 & ~_umask())  # safetensors makes it readable for its owner alone


def _write_pickle(tensors: dict[str, Tensor], file: Path) -> None:
    try:
        torch.save(tensors, file)
    except RuntimeError as error:  # the same of torch, which does not name the cause
        raise OSError(f"{file.name} could not be written (is the disk full?): {error}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _next_generation(folder: Path, stem: str) -> str:
    """What sets the names of new shards apart from those in the folder: nothing, or ".v2", ".v3", ..."""
    taken = [file.name for file in folder.glob(f"{stem}*-of-*")]
    numbers = [int(match[1] or 1) for name in taken if (match := re.match(rf"{stem}(?:\.v(\d+))?-\d", name))]
    return f".v{max(numbers) + 1}" if numbers else ""


_STAGE = ".saving-"


@contextlib.contextmanager
def _staging(folder: Path, size: int) -> Iterator[Path]:
    """A folder for unfinished files, gone afterwards; those that dead processes left behind are removed."""
    import shutil

    for old in folder.glob(f"{_STAGE}*"):
        if not _alive(old.name.removeprefix(_STAGE).partition("-")[0]):
            shutil.rmtree(old, ignore_errors=True)
    free = shutil.disk_usage(folder).free
    if free < size:
        need, have = format_bytes(size), format_bytes(free)
        raise OSError(f"no room for the checkpoint in {folder}: it takes {need}, {have} are free; nothing was written")
    stage = Path(tempfile.mkdtemp(prefix=f"{_STAGE}{os.getpid()}-", dir=folder))
    try:
        yield stage
    except OSError as error:
        raise OSError(f"could not save to {folder}: {error}; the checkpoint that was there is untouched") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _remove_stale(folder: Path, current: set[str]) -> None:
    """Remove other checkpoints of the same names: first what a reader would take before the new one, then shards."""
    for name in (SINGLE, INDEX, PICKLE, PICKLE_INDEX):
        if name not in current:
            (folder / name).unlink(missing_ok=True)
    for file in folder.iterdir():
        shard = re.fullmatch(r"(model|pytorch_model)(\.v\d+)?-\d{5}-of-\d{5}\.(safetensors|bin)", file.name)
        if shard and file.name not in current:
            file.unlink(missing_ok=True)
