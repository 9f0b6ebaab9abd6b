"""Saving a model: shard after shard under temporary names, the index swapped in last.

A crash at any moment leaves the old checkpoint or the new one, whole.

Leaves out: how tensors are dealt out to shards (`shards.py`), and the bytes of one file (`write.py`).
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..devices import join
from ..machine.ledger import locked
from ..meta.held import held_in
from ..meta.skeleton import extra_tensors
from ..model.header import CheckpointError
from ..units import format_bytes, listed
from ._torch import extra_states
from .format import Checkpoint, Stored
from .index import INDEX, PICKLE, PICKLE_INDEX, SINGLE, read_index
from .match import plain_name
from .resting import RestingPlace, record_resting_place, resting_place
from .shards import Cut, cut, read_limit
from .write import Form, check_dtypes, write_safetensors


def save_model(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    max_shard_size: int | str = "10GB",
    safe_serialization: bool = True,
) -> None:
    """Write a model's parameters and persistent buffers as a checkpoint that Hugging Face libraries read.

    What modules add to their state dict on their own is written too: the scales of quantized weights, and
    extra state that is a tensor. Names are those
    of the plain model: without `module.` of a DataParallel, and without `_orig_mod.` of what `torch.compile` wraps.
    Stacks of experts that bigkit has quantized are written as it holds them: `load_and_quantize_model` reads them,
    and Transformers does not, which has no such format (it reports them as missing, and begins them at random).

    Shards are written under temporary names and brought to disk; then the index is put in place in one step. Whenever
    the process is stopped, the folder holds the old checkpoint or the new one. Processes and threads that save into one
    folder take turns, and the last one's checkpoint stays; only one of a launch's processes needs to save.

    A checkpoint of the same format that is in the folder is replaced: at last `model.safetensors`, its index and the
    files that this index names are removed (with pickles: `pytorch_model.bin` and so on). All other files stay, also
    those of the other format. Pickles are refused where `model.safetensors` is, which all readers would take instead.

    Args:
        model: the model. A tensor on meta must be one that `load_checkpoint_in_model` left on disk: it is copied from
            there, so that no more than one shard is in memory at a time.
        save_directory: a folder, made if it is not there.
        max_shard_size: the most bytes of a file, as a number or text ("5GB"); a larger tensor has a file of its own.
        safe_serialization: safetensors; False writes pickles (`.bin`).

    Raises:
        ValueError: a tensor has no data or a dtype that the format cannot hold, the size makes no sense, or pickles
            would not be found; nothing was written.
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
    held = held_in(model, state=True)
    places = {one.name: place for one in held if (place := resting_place(one.tensor))}
    tensors = _to_save(model, {one.name: one.tensor for one in held}, places)
    forms = {name: Form(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    single, index = (SINGLE, INDEX) if safe_serialization else (PICKLE, PICKLE_INDEX)
    if safe_serialization:
        check_dtypes(forms)
    sizes, limit = {name: tensor.nbytes for name, tensor in tensors.items()}, read_limit(max_shard_size)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if places:
            places = {one.name: place for one in held if (place := resting_place(one.tensor))}  # still the same?
        others = listed(name for name in (SINGLE, INDEX) if (folder / name).exists())
        if others and not safe_serialization:
            raise ValueError(f"{folder} has {others}, which is read before pickles: remove it, or save elsewhere")
        plan = cut(sizes, limit, single, _next_generation(folder, single.partition(".")[0]))
        last = index if len(plan.files) > 1 else single  # what a reader looks for comes last
        old = _old_files(folder, single, index)
        with _staging(folder, plan.bytes) as stage:
            for file, names in plan.files.items():
                _write(stage / file, {name: tensors[name] for name in names}, forms)
            _put_in_place(plan, stage, folder, last)
        rests_in = {file for place in places.values() for where in place.parts.values() for file in where.files}
        if safe_serialization and folder.resolve() in {file.resolve().parent for file in rests_in}:
            stored = Checkpoint.open(folder / last).stored  # weights rest in files that are about to go
            for one in held:
                if one.name in places:
                    record_resting_place(one.tensor, {"": stored[plain_name(model, one.name)]})
        for name in old:
            if name not in {*plan.files, last}:
                (folder / name).unlink(missing_ok=True)


def _to_save(
    model: nn.Module, own_tensors: Mapping[str, Tensor], places: Mapping[str, RestingPlace]
) -> dict[str, Tensor | Stored]:
    """Name -> what is saved, module by module: parameters, persistent buffers, and what modules add on their own."""
    saved: dict[str, Tensor | Stored] = {**own_tensors}
    saved |= {name: place.parts[""] for name, place in places.items()}
    tensors: dict[str, Tensor | Stored] = {}
    for prefix, module in model.named_modules():
        extra = extra_tensors(module, load=True)
        for own in (*module._parameters, *module._buffers, *extra):
            name = join(prefix, own)
            if own in extra or name in saved:
                tensors[plain_name(model, name)] = extra[own] if own in extra else saved[name]
    for name, module in extra_states(model):
        if isinstance(extra_state := module.get_extra_state(), Tensor):
            tensors[plain_name(model, name)] = extra_state
        else:
            warnings.warn(f"{name!r} is a {type(extra_state).__name__}, no tensor, and is not saved", stacklevel=3)
    if empty := [name for name, tensor in tensors.items() if isinstance(tensor, Tensor) and tensor.is_meta]:
        raise ValueError(f"{listed(empty)} are on meta and have no data to save: load a checkpoint first")
    return tensors


def _write(file: Path, tensors: Mapping[str, Tensor | Stored], forms: Mapping[str, Form]) -> None:
    """Write one file, and bring it to the disk."""
    try:
        if file.suffix == ".safetensors":
            in_order = {name: forms[name] for name in sorted(tensors)}  # as the safetensors library writes them
            with open(file, "wb") as stream:
                write_safetensors(stream, in_order, lambda name: _value(tensors[name]))
        else:
            _write_pickle(file, {name: _alone(_value(tensor)) for name, tensor in tensors.items()})
    except OSError as error:
        raise OSError(f"{file.name}: {error}") from error
    _sync(file)


def _write_pickle(file: Path, tensors: dict[str, Tensor]) -> None:
    try:
        torch.save(tensors, file)
    except RuntimeError as error:  # torch does not name the cause
        raise OSError(f"it could not be written (is the disk full?): {error}") from error


def _value(tensor: Tensor | Stored) -> Tensor:
    """A tensor on the CPU, read if it rests on disk."""
    if isinstance(tensor, Stored):
        if tensor.pieces:
            return torch.cat([_value(piece).flatten() for piece in tensor.pieces]).view(tensor.shape)
        return Checkpoint(tensor.file, stored={"": tensor}).read("")
    value = tensor.detach().to("cpu").contiguous()
    return value if type(value) is Tensor else value.clone()  # it may be a handle on a weight


def _alone(tensor: Tensor) -> Tensor:
    """A tensor alone in its storage: a pickle holds whole storages."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _put_in_place(plan: Cut, stage: Path, folder: Path, last: str) -> None:
    """Give finished files their names: shards first, then in one step what a reader starts with."""
    if last not in plan.files:
        (stage / last).write_text(plan.index(), encoding="utf-8")
        _sync(stage / last)
        for file in plan.files:
            os.rename(stage / file, folder / file)
        _sync(folder)
    os.replace(stage / last, folder / last)
    _sync(folder)


def _old_files(folder: Path, single: str, index: str) -> list[str]:
    """Files of a checkpoint in a folder, what a reader starts with first; and shards that a killed save left there."""
    stem, _, ending = single.rpartition(".")
    shards: dict[str, None] = {}
    with contextlib.suppress(OSError, CheckpointError):
        shards |= dict.fromkeys(name for name in read_index(folder / index).values() if name.endswith(ending))
    own_shard = re.compile(rf"{stem}\.v\d+-\d{{5}}-of-\d{{5}}\.{ending}")
    shards |= dict.fromkeys(file.name for file in folder.iterdir() if own_shard.fullmatch(file.name))
    return [single, index, *shards]


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

    import psutil

    for old in folder.glob(f"{_STAGE}*"):
        pid = old.name.removeprefix(_STAGE).partition("-")[0]
        if not (pid.isdecimal() and len(pid) < 10 and psutil.pid_exists(int(pid))):
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
