"""Which tensor of a checkpoint belongs to which tensor of a model, and every difference between the two.

Names alone decide. A tensor that is tied has several, and any of them may be in the file; what no file has under any of
its names may still be made of others, as Transformers makes it (`_transformers.py`).

Leaves out: reading and placing the tensors (`load.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..meta.empty import twin
from ..meta.skeleton import named_parts, tied
from ..units import dtype_name, listed
from ._torch import extra_states
from ._transformers import Made, conversions, ignored_names
from .as_stored import AsStored
from .format import ASIDE, Checkpoint, Stored
from .migrate import migrate

_SCALES = ("_scale", "_scale_inv", ".scale")  # names of scales end so; a tensor of one byte that has one is quantized


@dataclass(frozen=True)
class LoadReport:
    """What did not match between a checkpoint and a model, all of it, and what was left on disk.

    Args:
        missing: tensors of the model that the checkpoint lacks.
        unexpected: tensors of the checkpoint that the model lacks.
        mismatched: (name, shape in the checkpoint, shape in the model).
        wrong_dtype: (name, dtype in the checkpoint, dtype in the model) where no cast is right: between integers,
            floating and complex numbers, or from a float8 whose scales the model does not know.
        duplicates: names that several files of the checkpoint hold.
        advice: which `key` or `prefix` would find tensors that are missing, or into which part of the model they fit.
        on_disk: tensor name -> where it rests, for what a device map leaves on disk; the model has it on meta.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    wrong_dtype: tuple[tuple[str, str, str], ...] = ()
    duplicates: tuple[str, ...] = ()
    advice: str = ""
    on_disk: Mapping[str, Stored] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Whether everything matched."""
        return not (self.missing or self.unexpected or self.mismatched or self.wrong_dtype or self.duplicates)

    def __str__(self) -> str:
        parts = []
        if self.missing:
            parts.append(f"missing in the checkpoint: {listed(self.missing)}")
        if self.unexpected:
            parts.append(f"unknown to the model: {listed(self.unexpected)}")
        for what, records in (("shape", self.mismatched), ("dtype", self.wrong_dtype)):
            shown = [
                f"{name!r} ({theirs} in the checkpoint, {ours} in the model)" for name, theirs, ours in records[:5]
            ]
            more = f" and {len(records) - 5} more" if len(records) > 5 else ""
            parts += [f"wrong {what}: {', '.join(shown)}{more}"] if records else []
        if self.duplicates:
            parts.append(f"in more than one file: {listed(self.duplicates)}")
        parts += [self.advice] if self.advice else []
        return "; ".join(parts) or "everything matches"


@dataclass(slots=True)
class Slot:
    """One tensor of a model, with every place in the model that refers to it.

    Args:
        name: the first of its names.
        tensor: what the model has there.
        buffer: whether it is a buffer, not a parameter.
        names: all of its names; several if it is tied.
        places: (module, own name) for each of them.
        source: its name in the checkpoint; None if it is not there.
    """

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


def model_slots(model: nn.Module) -> list[Slot]:
    """A model's parameters and persistent buffers, tied ones together."""
    slots: dict[str, Slot] = {}
    for prefix, module in named_parts(model):
        start, hidden = prefix and prefix + ".", module._non_persistent_buffers_set
        for buffer, tensors in ((False, module._parameters), (True, module._buffers)):
            for own, tensor in tensors.items():
                if tensor is not None and not (buffer and own in hidden):
                    name = start + own
                    slots[name] = Slot(name, tensor, buffer, (name,), ((module, own),))
    for first, *others in tied((name, slot.tensor) for name, slot in slots.items()):
        for other in map(slots.pop, others):
            slots[first].names += other.names
            slots[first].places += other.places
    return list(slots.values())


_WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}  # attributes of torch's wrappers
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)  # their attribute is "module"


def plain_name(model: nn.Module, name: str) -> str:
    """What a tensor is called without the modules that only wrap another one: compiled, checkpointed, in parallel.

    >>> plain_name(nn.DataParallel(nn.Linear(2, 2)), "module.weight")
    'weight'
    """
    parts: list[str] = []
    module: Any = model
    for part in name.split("."):
        if not (part in _WRAPPED or part == "module" and isinstance(module, _PARALLEL)):
            parts.append(part)
        module = getattr(module, "_modules", {}).get(part)
    return ".".join(parts)


def match(model: nn.Module, source: Checkpoint) -> tuple[list[Slot], LoadReport]:
    """Find each tensor of a model in a checkpoint, and say what does not match. Reads no tensor.

    Where Transformers would rename tensors or make them of others, the checkpoint has them so afterwards.
    """
    slots = model_slots(model)
    migrate(model, source)  # which some wrappers use to give the names that their parts have
    if not _find(slots, source):
        for name in (name for slot in slots if not slot.source for name in slot.names):
            if (plain := plain_name(model, name)) != name and plain in source:
                source.rename(plain, name)
        tensors = {name: slot.tensor for slot in slots for name in slot.names}
        renamed, made = conversions(model, tensors, source, source.shape_and_dtype)
        source.made |= made
        for old, new in renamed.items():
            source.rename(old, new)
        _find(slots, source)
    report = _compare(model, source, slots)
    scalars = {name for name, theirs, ours in report.mismatched if not ours and len(theirs) == 1}
    for slot in (slot for slot in slots if slot.name in scalars):
        _make_scalar(str(slot.source), source)
    return slots, _compare(model, source, slots) if scalars else report


def _make_scalar(name: str, source: Checkpoint) -> None:
    """Take the number out of a vector, as which PyTorch before 0.4 saved it."""
    dtype = source.shape_and_dtype(name)[1]
    aside = source.set_aside(name)
    source.made[name] = Made(name, (), dtype, (aside,), lambda tensors: {name: tensors[aside][0]})


def _find(slots: list[Slot], source: Checkpoint) -> bool:
    """Note under which of its names the checkpoint has each tensor; whether it has them all."""
    for slot in slots:
        slot.source = slot.name if slot.name in source else next(filter(source.__contains__, slot.names), None)
    return all(slot.source for slot in slots)


def _compare(model: nn.Module, source: Checkpoint, slots: list[Slot]) -> LoadReport:
    mismatched, wrong_dtype = [], []
    for slot in slots:
        if slot.source is None:
            continue
        shape, dtype = source.shape_and_dtype(slot.source)
        if shape != slot.tensor.shape:
            mismatched.append((slot.name, shape, tuple(slot.tensor.shape)))
        elif dtype != slot.tensor.dtype and (
            not _castable(source, slot.source, dtype, slot.tensor.dtype) or (dtype.itemsize > 1 and _is_code(slot))
        ):
            wrong_dtype.append((slot.name, dtype_name(dtype), dtype_name(slot.tensor.dtype)))
    expected = {name for slot in slots for name in slot.names}
    expected.update(part for name in expected & source.made.keys() for part in source.made[name].sources)
    missing = _without_ignored((slot.name for slot in slots if slot.source is None), model, "missing")
    expected.update(name for name, _ in extra_states(model, source))
    unexpected = (name for name in source if name not in expected and not name.endswith(ASIDE))
    return LoadReport(
        missing=missing,
        unexpected=_without_ignored(unexpected, model, "unexpected"),
        mismatched=tuple(mismatched),
        wrong_dtype=tuple(wrong_dtype),
        duplicates=source.duplicates,
        advice=_advice(missing, source),
    )


def _advice(missing: tuple[str, ...], source: Checkpoint) -> str:
    """Where missing tensors may be: under a key of a file or a prefix, or in a file for one part of the model."""
    texts: Counter[str] = Counter()
    for key, names in {source.key: tuple(source), **source.nested}.items() if missing else ():
        at_key = f"key={key!r}" if key else ""
        for prefix, count in _prefixes(names, {*missing}).items():
            texts[", ".join(filter(None, (at_key, f"prefix={prefix!r}" if prefix else "")))] += count
        for prefix, count in _prefixes(missing, {*names}).items():
            if prefix:
                texts[f"{at_key} and loading into the model's part {prefix[:-1]!r}".removeprefix(" and ")] += count
    for text, count in texts.most_common(1):
        return f"{text} would find {count} of the {len(missing)} that are missing"
    return ""


def _prefixes(names: Iterable[str], others: set[str]) -> Counter[str]:
    """Prefix -> how many of the names are, without it, among the others."""
    found = (name[:i] for name in names for i in range(len(name)) if i == 0 or name[i - 1] == "." if name[i:] in others)
    return Counter(found)


def _castable(source: Checkpoint, name: str, dtype: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether a tensor of a checkpoint can become one of another dtype."""
    parts = source.made[name].sources if name in source.made else (name,)
    quantized = dtype.itemsize == 1 and any(part + end in source for part in parts for end in _SCALES)
    return not quantized and (dtype.is_floating_point, dtype.is_complex) == (
        wanted.is_floating_point,
        wanted.is_complex,
    )


def _is_code(slot: Slot) -> bool:
    """Whether a tensor holds the codes of a weight that is stored in few bits: no number can be rounded to these."""
    module, own = slot.places[0]
    return isinstance(module, AsStored) and own in module.stored and slot.tensor.dtype.itemsize == 1


def _without_ignored(names: Iterable[str], model: nn.Module, kind: str) -> tuple[str, ...]:
    """Names but for those of which the model's class says that they may be missing or unexpected."""
    patterns = ignored_names(model, kind)
    return tuple(name for name in names if not any(pattern.search(name) for pattern in patterns))
