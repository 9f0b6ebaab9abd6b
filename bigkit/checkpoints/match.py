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
from torch import nn

from ..meta.held import Held, held_in
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
            shown = [f"{name!r} ({there} in the checkpoint, {here} in the model)" for name, there, here in records[:5]]
            more = f" and {len(records) - 5} more" if len(records) > 5 else ""
            parts += [f"wrong {what}: {', '.join(shown)}{more}"] if records else []
        if self.duplicates:
            parts.append(f"in more than one file: {listed(self.duplicates)}")
        parts += [self.advice] if self.advice else []
        return "; ".join(parts) or "everything matches"


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


def match(model: nn.Module, source: Checkpoint) -> tuple[list[Held], LoadReport]:
    """Find each tensor of a model in a checkpoint, and say what does not match. Reads no tensor.

    Where Transformers would rename tensors or make them of others, the checkpoint has them so afterwards.
    """
    held = held_in(model, state=True)
    migrate(model, source)  # which some wrappers use to give the names that their parts have
    if not _find(held, source):
        for name in (name for one in held if not one.source for name in one.places):
            if (plain := plain_name(model, name)) != name and plain in source:
                source.rename(plain, name)
        tensors = {name: one.tensor for one in held for name in one.places}
        renamed, made = conversions(model, tensors, source, source.shape_and_dtype)
        source.made |= made
        for old, new in renamed.items():
            source.rename(old, new)
        _find(held, source)
    report = _compare(model, source, held)
    scalars = {name for name, theirs, ours in report.mismatched if not ours and len(theirs) == 1}
    for one in (one for one in held if one.name in scalars):
        _make_scalar(str(one.source), source)
    return held, _compare(model, source, held) if scalars else report


def _make_scalar(name: str, source: Checkpoint) -> None:
    """Take the number out of a vector, as which PyTorch before 0.4 saved it."""
    dtype = source.shape_and_dtype(name)[1]
    aside = source.set_aside(name)
    source.made[name] = Made(name, (), dtype, (aside,), lambda tensors: {name: tensors[aside][0]})


def _find(held: list[Held], source: Checkpoint) -> bool:
    """Note under which of its names the checkpoint has each tensor; whether it has them all."""
    for one in held:
        one.source = one.name if one.name in source else next(filter(source.__contains__, one.places), None)
    return all(one.source for one in held)


def _compare(model: nn.Module, source: Checkpoint, held: list[Held]) -> LoadReport:
    mismatched, wrong_dtype = [], []
    for one in held:
        if one.source is None:
            continue
        shape, dtype = source.shape_and_dtype(one.source)
        if shape != one.tensor.shape:
            mismatched.append((one.name, shape, tuple(one.tensor.shape)))
        elif dtype != (own := one.tensor.dtype) and (
            not _castable(source, one.source, dtype, own)
            or (dtype.itemsize > 1 and own.itemsize == 1 and is_stored(one))  # no number can be rounded to a code
        ):
            wrong_dtype.append((one.name, dtype_name(dtype), dtype_name(own)))
    expected = {name for one in held for name in one.places}
    expected.update(part for name in expected & source.made.keys() for part in source.made[name].sources)
    missing = _without_ignored((one.name for one in held if one.source is None), model, "missing")
    expected.update(name for name, _ in extra_states(model, source))
    unexpected = (name for name in source if name not in expected and not name.endswith(ASIDE))
    return LoadReport(
        missing=missing, unexpected=_without_ignored(unexpected, model, "unexpected"), mismatched=tuple(mismatched),
        wrong_dtype=tuple(wrong_dtype), duplicates=source.duplicates, advice=_advice(missing, source),
    )  # fmt: skip


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


def is_stored(one: Held) -> bool:
    """Whether a tensor is a part of a weight that is stored in few bits."""
    module, own, _ = next(iter(one.places.values()))
    return isinstance(module, AsStored) and own in module.stored


def _without_ignored(names: Iterable[str], model: nn.Module, kind: str) -> tuple[str, ...]:
    """Names but for those of which the model's class says that they may be missing or unexpected."""
    patterns = ignored_names(model, kind)
    return tuple(name for name in names if not any(pattern.search(name) for pattern in patterns))
