"""What Transformers keeps for itself and bigkit asks for: how it renames and converts tensors when it loads a model.

Seen in Transformers 5.15 to 5.23; `tests/checkpoints/test_private_parts.py` fails when a name is gone. bigkit never
imports the library here: a model that comes from it has imported it already.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, NamedTuple

from torch import Tensor, nn


class Rules(NamedTuple):
    """How a model's tensors come from those of a checkpoint.

    Args:
        renamings: rules for a tensor that is only called otherwise (`WeightRenaming`).
        converters: rules for tensors that are put together or taken apart (`WeightConverter`).
    """

    renamings: list[Any]
    converters: list[Any]


def conversion_rules(model: nn.Module) -> Rules | None:
    """The rules for a model; None if it is not one of Transformers."""
    library = sys.modules.get("transformers")
    if library is None or not isinstance(model, library.PreTrainedModel):
        return None
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    transforms = get_model_conversion_mapping(model)
    return Rules(
        [rule for rule in transforms if isinstance(rule, WeightRenaming)],
        [rule for rule in transforms if isinstance(rule, WeightConverter)],
    )


def in_order(names: set[str]) -> list[str]:
    """Names in the order in which Transformers takes them: expert 2 before expert 10."""
    from transformers.core_model_loading import dot_natural_key

    return sorted(names, key=dot_natural_key)


def target_of(name: str, rules: Rules, model: Any, tensors: Mapping[str, Tensor]) -> tuple[str, str | None]:
    """What the model calls a tensor of a checkpoint, and the pattern of the converter that it needs, if any."""
    from transformers.core_model_loading import rename_source_key

    return rename_source_key(name, rules.renamings, rules.converters, model.base_model_prefix, tensors)


def convert(
    converter: Any, target: str, patterns: Mapping[str, str | None], tensors: Mapping[str, Tensor], model: Any
) -> dict[str, Tensor]:
    """Apply a converter to the tensors that `patterns` names, each under the pattern that it matched."""
    own = deepcopy(converter)  # it collects tensors, and forgets them when it has converted them
    for name, pattern in patterns.items():
        own.add_tensor(target, name, pattern, tensors[name])
    converted = own.convert(target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def ignored_names(model: nn.Module, kind: str) -> list[re.Pattern[str]]:
    """Patterns of the names of which a class says that they may be "missing" or "unexpected" in a checkpoint."""
    return [re.compile(pattern) for pattern in getattr(model, f"_keys_to_ignore_on_load_{kind}", None) or ()]
