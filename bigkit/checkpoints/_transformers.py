"""What is private in Transformers and asked for: how it renames and converts a checkpoint's tensors when it loads them.

Transformers fuses the experts of a mixture when it loads a model and cuts them apart when it saves it, so a file holds
`experts.3.gate_proj.weight` where the model has one `experts.gate_up_proj` for all. Which names belong together, and
what is done to them, is in that library's own tables; nothing is known here about any model.

Seen in Transformers 5.15 to 5.23; `tests/checkpoints/test_private_parts.py` fails when a name is gone.
Leaves out: the way back. `save_model` writes the model's names, which Transformers reads as well.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Made(NamedTuple):
    """A tensor that no file holds.

    Args:
        name: what the model calls it.
        shape, dtype: what it is.
        sources: names of the tensors of the checkpoint that it is made of.
        convert: these by name -> all that is made of them, by name.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[str, ...]
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

    def make(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensor, from its sources by name."""
        return self.convert(tensors)[self.name]


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
    library = sys.modules.get("transformers")  # never imported here: a model that comes from it has done so
    if library is None or not isinstance(model, library.PreTrainedModel):
        return {}, {}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    names = set(names)
    sources: dict[str, dict[str, str | None]] = {}  # name in the model -> names in the checkpoint, with their patterns
    for name in sorted(names - tensors.keys(), key=dot_natural_key):  # expert 2 before expert 10
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, tensors)
        if target in tensors and target not in names:
            sources.setdefault(target, {})[name] = pattern

    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    renamed: dict[str, str] = {}
    made: dict[str, Made] = {}
    for target, patterns in sources.items():
        first, pattern = next(iter(patterns.items()))
        if pattern is None:
            renamed[first] = target
        else:
            convert = partial(_convert, converter_of[pattern], target, patterns, model)
            made |= _results(convert, {name: shape_and_dtype(name) for name in patterns})
    return renamed, {name: result for name, result in made.items() if name in tensors}


def _convert(
    converter: Any, target: str, patterns: Mapping[str, str | None], model: Any, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Apply a converter to the tensors that `patterns` names, each under the pattern that it matched."""
    own = deepcopy(converter)  # it collects tensors, and forgets them when it has converted them
    for name, pattern in patterns.items():
        own.add_tensor(target, name, pattern, tensors[name])
    converted = own.convert(target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def _results(convert: Any, kinds: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Made]:
    """What comes out of a conversion, from the shapes and dtypes of what goes in: nothing if these do not fit."""
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in kinds.items()}
    try:
        outputs = convert(empty)
    except Exception:  # parts are missing or do not fit each other: they are reported under their own names
        return {}
    return {name: Made(name, tuple(own.shape), own.dtype, tuple(kinds), convert) for name, own in outputs.items()}


def ignored_names(model: nn.Module, kind: str) -> list[re.Pattern[str]]:
    """Patterns of the names of which a class says that they may be "missing" or "unexpected" in a checkpoint."""
    return [re.compile(pattern) for pattern in getattr(model, f"_keys_to_ignore_on_load_{kind}", None) or ()]


def gptq_offset(model: nn.Module) -> int:
    """What files in GPTQ's format add to zero points: 1, or 0 if the model's config says that they are of version 2."""
    settings: Any = getattr(getattr(model, "config", None), "quantization_config", None) or {}
    settings = settings if isinstance(settings, Mapping) else vars(settings)
    return 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
