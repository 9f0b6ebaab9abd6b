"""Loading: the tensors of a checkpoint become the weights of a model, and every difference is reported.

`load_checkpoint_in_model` maps the files into memory and hands their pages to the model: nothing is copied on the CPU.

Leaves out: the fast way to a GPU (`to_gpu.py`), and weights that stay on disk while the model runs
(`offload/weights.py`).
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..devices import Device, placement
from ..meta.empty import twin
from ..meta.skeleton import extra_tensors, tied
from ..units import GB, dtype_name, listed
from .format import Checkpoint, CheckpointError, Form, Stored, WrittenFile, write_file
from .library_names import conversions

_SCALES = ("_scale", "_scale_inv", ".scale")  # what tells that a tensor of one byte is quantized


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
            said.append(f"missing in the checkpoint: {listed(self.missing)}")
        if self.unexpected:
            said.append(f"unknown to the model: {listed(self.unexpected)}")
        for what, records in (("shape", self.mismatched), ("dtype", self.wrong_dtype)):
            shown = [f"{name!r} ({theirs} in the checkpoint, {ours} in the model)" for name, theirs, ours in records[:5]
                     ]  # fmt: skip
            rest = f" and {len(records) - 5} more" if len(records) > 5 else ""
            said += [f"wrong {what}: {', '.join(shown)}{rest}"] if records else []
        if self.duplicates:
            said.append(f"in more than one file: {listed(self.duplicates)}")
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
    >>> from bigkit import save_model
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
    >>> from bigkit import init_empty_weights, save_model
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
        raise ValueError(f"{listed(quantized)} is quantized: load_and_quantize_model fills an empty model")
    slots = model_slots(model)
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


def model_slots(model: nn.Module) -> list[_Slot]:
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
    slots = model_slots(model)
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
            f"{listed(rewrite)} rests on disk in another form ({stored} in {source.path}) and must be written {form}: "
            f"give an offload_folder" + (f', or dtype="{stored}" to use it as it is' if name in source.stored else "")
        )
    forms = {
        name: Form(source.shape_and_dtype(name)[0], dtype or source.shape_and_dtype(name)[1])
        for name, dtype in rewrite.items()
    }
    written, where_written = write_file(folder, forms, lambda name: source.read(name).to(forms[name].dtype))
    return found | where_written, written
