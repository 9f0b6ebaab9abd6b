"""Checkpoints on disk: find them, check them, save them, load them.

A checkpoint is one safetensors file, or several (shards) and an index that says which tensor lies in which. A
safetensors file is eight bytes with the length of a header, the header (JSON: name -> dtype, shape, byte range) and the
bytes of the tensors one after another, so a tensor is found without reading anything else.

`Checkpoint` knows where each tensor lies and checks every claim that a header or an index makes before a byte of it is
used. `load_checkpoint_in_model` maps the files into memory and hands their pages to the model: nothing is copied on the
CPU. `save_model` writes shard after shard under temporary names and swaps the index in last, so that a crash leaves the
old checkpoint or the new one.

Leaves out: the fast way to a GPU (`checkpoints/to_gpu.py`), and weights that stay on disk while the model runs
(`offload/weights.py`). Formats: https://huggingface.co/docs/safetensors, and the index of Hugging Face Transformers
(`weight_map`).
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import re
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..devices import Device, placement
from ..meta.empty import extra_tensors, tied, twin
from ..units import GB, dtype_name, format_bytes
from .library_names import Made, conversions
from .shards import cut

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
_SCALES = ("_scale", "_scale_inv", ".scale")  # what tells that a tensor of one byte is quantized
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
                raise CheckpointError(f"{target} names {_listed(missing)}, which is not in its folder")
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
                    raise CheckpointError(f"{target} says that {_listed(absent)} is in {file.name}, which lacks it")
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
            raise CheckpointError(f"{folder} has several files and no index: {_listed(names)}; name one of them")
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


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---------------------------------------------------------------------------------------------------------------------
# Loading


@dataclass(frozen=True)
class LoadReport:
    """What did not match between a checkpoint and a model, all of it, and what was left on disk.

    Args:
        missing: tensors of the model that the checkpoint lacks.
        unexpected: tensors of the checkpoint that the model lacks.
        mismatched: (name, shape in the checkpoint, shape in the model).
        wrong_dtype: (name, dtype in the checkpoint, dtype in the model) where no cast is right: an integer for a float,
            or a float8 whose scales the model does not know.
        duplicates: names that several files of the checkpoint hold.
        on_disk: tensor name -> where it rests, for what a device map leaves on disk; the model has it on meta.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    wrong_dtype: tuple[tuple[str, str, str], ...] = ()
    duplicates: tuple[str, ...] = ()
    on_disk: Mapping[str, Stored] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Whether everything matched."""
        return not (self.missing or self.unexpected or self.mismatched or self.wrong_dtype or self.duplicates)

    def __str__(self) -> str:
        said = []
        if self.missing:
            said.append(f"missing in the checkpoint: {_listed(self.missing)}")
        if self.unexpected:
            said.append(f"unknown to the model: {_listed(self.unexpected)}")
        for what, records in (("shape", self.mismatched), ("dtype", self.wrong_dtype)):
            shown = [f"{name!r} ({theirs} in the checkpoint, {ours} in the model)" for name, theirs, ours in records[:5]
                     ]  # fmt: skip
            rest = f" and {len(records) - 5} more" if len(records) > 5 else ""
            said += [f"wrong {what}: {', '.join(shown)}{rest}"] if records else []
        if self.duplicates:
            said.append(f"in more than one file: {_listed(self.duplicates)}")
        return "; ".join(said) or "everything matches"


def load_state_dict(
    checkpoint_file: str | os.PathLike[str], device_map: Mapping[str, Device] | None = None
) -> dict[str, Tensor]:
    """The tensors of a checkpoint, on the CPU or where a device map puts them.

    Args:
        checkpoint_file: a file, an index, or a folder.
        device_map: module name -> device; tensors that it leaves on "disk" or does not name stay on the CPU, mapped
            from the file.

    Raises:
        FileNotFoundError, CheckpointError: there is none, or it is broken.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(nn.Linear(2, 3), folder)
    ...     load_state_dict(folder)["weight"].shape
    torch.Size([3, 2])
    """
    checkpoint = Checkpoint.open(checkpoint_file)
    device_of = placement(device_map)
    places: dict[Device | torch.device, dict[str, torch.dtype | None]] = {}
    for name in checkpoint:
        place = device_of(name)
        places.setdefault("cpu" if place in ("disk", None) else place, {})[name] = None
    return read_tensors(checkpoint, places)


def load_checkpoint_in_model(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    device_map: Mapping[str, Device] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    offload_state_dict: bool = False,
    offload_buffers: bool = False,
    keep_in_fp32_modules: Iterable[str] | None = None,
    strict: bool = False,
) -> LoadReport:
    """Load a checkpoint into a model that is empty (on meta) or not.

    Nothing changes before everything has been checked and read: on an error the model is as it was. On the CPU a tensor
    of the right dtype is not copied: the model uses the pages of the file.

    Args:
        model: the model.
        checkpoint: a file, an index or a folder.
        device_map: module name -> device, covering the model. What it puts on "disk" stays on meta in the model and is
            found in the report's `on_disk`. None puts each tensor where the model has it (meta: on the CPU).
        offload_folder: where tensors for "disk" are written that no file of the checkpoint holds as they are needed (of
            another dtype, or in a `.bin` file). The file goes with the model.
        dtype: floating tensors become this; None gives each the dtype that the model has.
        offload_state_dict: accepted for compatibility; nothing is held in memory twice either way.
        offload_buffers: whether buffers of modules on "disk" rest there too; else they are loaded to the CPU.
        keep_in_fp32_modules: whole parts of module names ("lm_head", "h.0") whose weights stay float32 when `dtype` is
            float16 or bfloat16.
        strict: raise if anything does not match.

    Returns:
        What did not match, and what rests on disk.

    Raises:
        FileNotFoundError, CheckpointError: there is no checkpoint, it is broken, or with `strict` does not fit.
        ValueError: the device map misses modules, or a folder for offloading is needed.

    >>> import tempfile
    >>> from bigkit import init_empty_weights
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(nn.Linear(2, 3), folder)
    ...     with init_empty_weights():
    ...         empty = nn.Linear(2, 3)
    ...     load_checkpoint_in_model(empty, folder).clean, empty.weight.device
    (True, device(type='cpu'))
    """
    wanted = None if dtype is None else getattr(torch, dtype_name(dtype))
    fp32 = frozenset(keep_in_fp32_modules or ()) if wanted in (torch.float16, torch.bfloat16) else frozenset()
    with _collector_paused():
        return _load(
            model, Checkpoint.open(checkpoint), device_map, offload_folder, wanted, offload_buffers, fp32, strict
        )


def _load(
    model: nn.Module,
    source: Checkpoint,
    device_map: Mapping[str, Device] | None,
    offload_folder: str | os.PathLike[str] | None,
    wanted: torch.dtype | None,
    offload_buffers: bool,
    fp32: frozenset[str],
    strict: bool,
) -> LoadReport:
    if quantized := [name for name, module in model.named_modules() if extra_tensors(module)]:
        raise ValueError(f"{_listed(quantized)} is quantized: load_and_quantize_model fills an empty model")
    slots = _slots(model)
    _look_up(model, source, slots)
    report = _compare(model, source, slots)
    if strict and not report.clean:
        raise CheckpointError(f"{source.path} does not fit {type(model).__name__}: {report}")
    bad = {name for name, *_ in (*report.mismatched, *report.wrong_dtype)}
    places: dict[Device | torch.device, dict[str, torch.dtype | None]] = {}
    resting: dict[str, torch.dtype | None] = {}
    device_of = placement(device_map)
    for slot in slots:
        name = slot.source
        if name is None or slot.name in bad:
            continue
        in_fp32 = fp32 and any(f".{part}." in f".{slot.name}." for part in fp32)
        kept = torch.float32 if in_fp32 else wanted or slot.tensor.dtype
        target = kept if slot.tensor.is_floating_point() else None
        place: Device | torch.device | None = device_of(slot.name)
        if device_map is None:
            place = "cpu" if slot.tensor.is_meta else slot.tensor.device
        elif place is None:
            raise ValueError(f"the device map gives no device for {slot.name!r}")
        if place == "disk" and (offload_buffers or not slot.buffer):
            resting[name] = target
        else:
            places.setdefault("cpu" if place == "disk" else place, {})[name] = target
    rests, written = _rest(source, resting, offload_folder)
    values = read_tensors(source, places)
    for slot in slots:
        if slot.source in values:
            slot.fill(values[slot.source])
    on_disk = {slot.name: rests[slot.source] for slot in slots if slot.source in rests}
    vars(model)["_on_disk"] = on_disk  # where `save_model` finds them
    vars(model)["_written"] = {written.path: written} if written else {}  # keeps the file
    return replace(report, on_disk=on_disk)


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Thousands of new tensors would set off Python's collector again and again, which would find nothing."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


@dataclass(slots=True)
class _Slot:
    """One tensor of a model, every place in it that refers to it, and its name in the checkpoint, if it is there."""

    name: str
    tensor: Tensor
    buffer: bool
    names: tuple[str, ...]
    places: tuple[tuple[nn.Module, str], ...]
    source: str | None = None

    def fill(self, value: Tensor) -> None:
        """Give the model this value. A real parameter stays the same object, so that optimizers keep knowing it."""
        if not self.buffer and not self.tensor.is_meta and self.tensor.device.type == value.device.type:
            for module, own in self.places:
                module._parameters[own].data = value  # type: ignore[union-attr]
            return
        new = value if self.buffer else twin(self.tensor, value)
        for module, own in self.places:
            (module._buffers if self.buffer else module._parameters)[own] = new  # type: ignore[assignment]


def _slots(model: nn.Module) -> list[_Slot]:
    """Parameters and persistent buffers, tied ones together."""
    slots: dict[str, _Slot] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        start, hidden = prefix and prefix + ".", module._non_persistent_buffers_set
        for buffer, tensors in ((False, module._parameters), (True, module._buffers)):
            for own, tensor in tensors.items():
                if tensor is not None and not (buffer and own in hidden):
                    name = start + own
                    slots[name] = _Slot(name, tensor, buffer, (name,), ((module, own),))
    for first, *others in tied((name, slot.tensor) for name, slot in slots.items()):
        for other in map(slots.pop, others):
            slots[first].names += other.names
            slots[first].places += other.places
    return list(slots.values())


def compare(model: nn.Module, source: Checkpoint) -> LoadReport:
    """What would not match if a checkpoint were loaded into a model. Reads no tensor."""
    slots = _slots(model)
    _look_up(model, source, slots)
    return _compare(model, source, slots)


def _look_up(model: nn.Module, source: Checkpoint, slots: list[_Slot]) -> None:
    """Find each slot in the checkpoint: by one of its names, or made of tensors as Transformers makes it of them."""

    def found() -> bool:
        for slot in slots:
            slot.source = slot.name if slot.name in source else next(filter(source.__contains__, slot.names), None)
        return all(slot.source for slot in slots)

    if not found():
        expected = {name: slot.tensor for slot in slots for name in slot.names}
        renamed, source.made = conversions(model, expected, source, source.shape_and_dtype)
        for theirs, ours in renamed.items():
            source.rename(theirs, ours)
        found()


def _compare(model: nn.Module, source: Checkpoint, slots: list[_Slot]) -> LoadReport:
    mismatched, wrong = [], []
    for slot in slots:
        if slot.source is None:
            continue
        shape, dtype = source.shape_and_dtype(slot.source)
        if shape != slot.tensor.shape:
            mismatched.append((slot.name, shape, tuple(slot.tensor.shape)))
        elif dtype != slot.tensor.dtype:
            parts = source.made[slot.source].sources if slot.source in source.made else (slot.source,)
            scaled = dtype.itemsize == 1 and any(part + end in source for part in parts for end in _SCALES)
            if scaled or dtype.is_floating_point != slot.tensor.is_floating_point():
                wrong.append((slot.name, dtype_name(dtype), dtype_name(slot.tensor.dtype)))
    known = {name for slot in slots for name in slot.names}
    known.update(part for name in known & source.made.keys() for part in source.made[name].sources)

    def expected(attribute: str, found: Iterable[str]) -> tuple[str, ...]:
        """Names without those that the model's class declares to be ignored, as regular expressions."""
        patterns = [re.compile(pattern) for pattern in getattr(model, attribute, None) or ()]
        return tuple(name for name in found if not any(pattern.search(name) for pattern in patterns))

    return LoadReport(
        missing=expected("_keys_to_ignore_on_load_missing", (slot.name for slot in slots if slot.source is None)),
        unexpected=expected("_keys_to_ignore_on_load_unexpected", (name for name in source if name not in known)),
        mismatched=tuple(mismatched),
        wrong_dtype=tuple(wrong),
        duplicates=source.duplicates,
    )


def read_tensors(
    source: Checkpoint, places: Mapping[Device | torch.device, Mapping[str, torch.dtype | None]]
) -> dict[str, Tensor]:
    """Read tensors to their devices, as (device -> name -> dtype) says; those for a GPU all in one go."""
    values: dict[str, Tensor] = {}
    for place, dtypes in places.items():
        device = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
        if device.type == "cuda":
            from .to_gpu import read_to_gpu

            values |= read_to_gpu({n: source.stored[n] for n in dtypes if n in source.stored}, device, dtypes)
            made = [n for n in dtypes if n in source.made and source.stored.keys() >= {*source.made[n].sources}]
            for names in _batches(source, made):
                parts = {part: source.stored[part] for name in names for part in source.made[name].sources}
                read = read_to_gpu(parts, device)
                values |= {name: source.made[name].make(read).to(dtype=dtypes[name]) for name in names}
        for name in (name for name in dtypes if name not in values):
            values[name] = source.read(name).to(device=device, dtype=dtypes[name])
    return values


def _batches(source: Checkpoint, names: Iterable[str], most: int = 4 * GB) -> Iterator[list[str]]:
    """Tensors that are made of stored ones, in groups of not many bytes, since their parts are on the GPU as well."""
    batch: list[str] = []
    size = 0
    for name in names:
        own = sum(source.stored[part].nbytes for part in source.made[name].sources)
        if batch and size + own > most:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += own
    if batch:
        yield batch


def stream_tensors(source: Checkpoint, names: Iterable[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Read tensors to a device one after another, in the order of the files: what is let go makes room for the next.

    On the CPU each is in memory of its own: no page of the file counts as the process's.
    """
    stored = {name: source.stored[name] for name in names if name in source.stored}
    if device.type == "cuda":
        from .to_gpu import stream_to_gpu

        yield from stream_to_gpu(stored, device)
    else:
        for name, where in sorted(stored.items(), key=lambda item: (str(item[1].file), item[1].offset)):
            yield name, _private(where).to(device)
    for name in names:
        if name in source.pickled:
            yield name, source.read(name).to(device)


def _private(where: Stored) -> Tensor:
    """A tensor read into memory of its own."""
    raw = torch.empty(where.nbytes, dtype=torch.uint8)
    with open(where.file, "rb", buffering=0) as stream:
        stream.seek(where.offset)
        view, done = raw.numpy().data, 0
        while done < where.nbytes:
            count = stream.readinto(view[done:])
            if not count:
                at = where.offset + done
                raise OSError(f"{where.file} is shorter than when it was checked: nothing at byte {at}")
            done += count
    return raw.view(where.dtype).view(where.shape)


def _rest(
    source: Checkpoint, resting: Mapping[str, torch.dtype | None], folder: str | os.PathLike[str] | None
) -> tuple[dict[str, Stored], WrittenFile | None]:
    """Where tensors lie on disk in the dtype that is wanted: in the checkpoint itself, or in a new file."""
    found: dict[str, Stored] = {}
    rewrite: dict[str, torch.dtype | None] = {}
    for name, dtype in resting.items():
        where = source.stored.get(name)
        if where is not None and dtype in (None, where.dtype):
            found[name] = where
        else:
            rewrite[name] = dtype
    if not rewrite:
        return found, None
    if folder is None:
        name, wanted = next(iter(rewrite.items()))
        stored = dtype_name(source.shape_and_dtype(name)[1])
        form = f"as {dtype_name(wanted or stored)}" if name in source.stored else "as safetensors"
        raise ValueError(
            f"{_listed(rewrite)} rests on disk in another form ({stored} in {source.path}) and must be written {form}: "
            f"give an offload_folder" + (f', or dtype="{stored}" to use it as it is' if name in source.stored else "")
        )
    forms = {
        name: Form(source.shape_and_dtype(name)[0], dtype or source.shape_and_dtype(name)[1])
        for name, dtype in rewrite.items()
    }
    written, where_written = write_file(folder, forms, lambda name: source.read(name).to(forms[name].dtype))
    return found | where_written, written


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


# ---------------------------------------------------------------------------------------------------------------------
# Saving


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
        raise ValueError(f"{_listed(empty)} are on meta and have no data to save: load a checkpoint first")
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
    slots = {slot.name: on_disk.get(slot.name, slot.tensor) for slot in _slots(model)}
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
