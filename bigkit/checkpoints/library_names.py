"""Checkpoints whose tensors are not the model's: renamed, cut apart or put together by the library the model is from.

Transformers fuses the experts of a mixture when it loads a model and cuts them apart when it saves it, so a file holds
`experts.3.gate_proj.weight` where the model has one `experts.gate_up_proj` for all. Which names belong together, and
what is done to them, is in that library's own tables; here they are asked (`_transformers.py`), and nothing is known
about any model.

Leaves out: the way back. `save_model` writes the model's names, which Transformers reads as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._transformers import conversion_rules, convert, in_order, target_of


class Made(NamedTuple):
    """A tensor that no file holds: `make` puts it together from the `sources` by name."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[str, ...]
    make: Callable[[Mapping[str, Tensor]], Tensor]


def conversions(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    names: Iterable[str],
    shape_and_dtype: Callable[[str], tuple[tuple[int, ...], torch.dtype]],
) -> tuple[dict[str, str], dict[str, Made]]:
    """How a model's library would make its tensors from a checkpoint's.

    Args:
        model: any module; only models of Transformers know conversions.
        tensors: name -> tensor of the model, all of them.
        names: names of the checkpoint's tensors.
        shape_and_dtype: what a tensor of the checkpoint is, by its name.

    Returns:
        name in the checkpoint -> name in the model, where that is all; and name in the model -> how to make it.
    """
    rules = conversion_rules(model)
    if rules is None:
        return {}, {}
    names = set(names)
    sources: dict[str, dict[str, str | None]] = {}  # name in the model -> names in the checkpoint and their patterns
    for name in in_order(names - tensors.keys()):
        target, pattern = target_of(name, rules, model, tensors)
        if target in tensors and target not in names:
            sources.setdefault(target, {})[name] = pattern

    converters = {pattern: converter for converter in rules.converters for pattern in converter.source_patterns}
    renamed: dict[str, str] = {}
    made: dict[str, Made] = {}
    for target, patterns in sources.items():
        first, pattern = next(iter(patterns.items()))
        if pattern is None:
            renamed[first] = target
        else:
            conversion = _Conversion(converters[pattern], target, patterns, model)
            made |= conversion.results({name: shape_and_dtype(name) for name in patterns})
    return renamed, {name: result for name, result in made.items() if name in tensors}


@dataclass(frozen=True)
class _Conversion:
    """Tensors of a checkpoint that become one or more of a model.

    Args:
        converter: the library's rule.
        target: the name in the model under which the rule collects them.
        patterns: name in the checkpoint -> the pattern of the rule that it matched.
        model: the model.
    """

    converter: Any
    target: str
    patterns: Mapping[str, str | None]
    model: nn.Module

    def results(self, kinds: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Made]:
        """What comes out, by name, from the shapes and dtypes of what goes in: nothing if these do not fit."""
        empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in kinds.items()}
        try:
            outputs = convert(self.converter, self.target, self.patterns, empty, self.model)
        except Exception:  # parts are missing or do not fit each other: they are reported under their own names
            return {}
        return {
            name: Made(tuple(tensor.shape), tensor.dtype, tuple(self.patterns), partial(self.make, name))
            for name, tensor in outputs.items()
        }

    def make(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """One of the results, from the tensors of the checkpoint."""
        return convert(self.converter, self.target, self.patterns, tensors, self.model)[name]
