"""Checkpoints whose tensors are not the model's: renamed, cut apart or put together by the library the model is from.

Transformers fuses the experts of a mixture when it loads a model and cuts them apart when it saves it, so a file holds
`experts.3.gate_proj.weight` where the model has one `experts.gate_up_proj` for all. Which names belong together, and
what is done to them, is in that library's own tables; here they are asked, and nothing is known about any model.

Leaves out: the way back. `save_model` writes the model's names, which Transformers reads as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Made(NamedTuple):
    """A tensor that no file holds: `make` puts it together from the `sources` by name."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[str, ...]
    make: Callable[[Mapping[str, Tensor]], Tensor]


def conversions(
    model: nn.Module,
    expected: Mapping[str, Tensor],
    found: Iterable[str],
    kind: Callable[[str], tuple[tuple[int, ...], torch.dtype]],
) -> tuple[dict[str, str], dict[str, Made]]:
    """How a model's library would make its tensors from a checkpoint's.

    Args:
        model: any module; only models of Transformers know conversions.
        expected: name -> tensor of the model, all of them.
        found: names of the checkpoint's tensors.
        kind: name -> shape and dtype of a tensor of the checkpoint.

    Returns:
        name in the checkpoint -> name in the model, where that is all; and name in the model -> how to make it.
    """
    library = sys.modules.get("transformers")
    if library is None or not isinstance(model, library.PreTrainedModel):
        return {}, {}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    together: dict[str, list[tuple[str, str | None]]] = {}
    held = set(found)
    for name in sorted(held - expected.keys(), key=dot_natural_key):  # expert 2 before expert 10
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if target in expected and target not in held:
            together.setdefault(target, []).append((name, pattern))

    renamed: dict[str, str] = {}
    made: dict[str, Made] = {}
    for target, parts in together.items():
        sources, pattern = tuple(name for name, _ in parts), parts[0][1]
        if pattern is None:
            renamed[sources[0]] = target
            continue
        convert = _conversion(by_pattern[pattern], target, parts, model)
        kinds = {name: kind(name) for name in sources}
        try:
            outcome = convert({name: torch.empty(*one[:1], dtype=one[1], device="meta") for name, one in kinds.items()})
        except Exception:  # parts are missing or do not fit each other: they are reported under their own names
            continue
        for name, tensor in outcome.items():
            pick = lambda tensors, convert=convert, name=name: convert(tensors)[name]  # noqa: E731
            made[name] = Made(tuple(tensor.shape), tensor.dtype, sources, pick)
    return renamed, {name: one for name, one in made.items() if name in expected}


def _conversion(
    converter: Any, target: str, parts: list[tuple[str, str | None]], model: Any
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """A function from the parts by name to the tensors made of them."""

    def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        once = deepcopy(converter)  # it collects tensors, and forgets them when it has converted them
        for name, pattern in parts:
            once.add_tensor(target, name, pattern, tensors[name])
        made = once.convert(target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    return convert
