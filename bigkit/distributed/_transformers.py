"""What a pipeline uses of Transformers' `generate` without a public name; seen in Transformers 5.17 to 5.23."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def draw_one_by_one(model: Any, ids: Tensor, processors: Any, criteria: Any, config: Any, **options: Any) -> Any:
    """The loop of `generate` that draws one token after another, with these processors and criteria."""
    return type(model)._sample(model, ids, processors, criteria, config, **options)


def pad_token(config: Any) -> Tensor | None:
    """The token that finished sequences get, as `generate` has prepared it."""
    return getattr(config, "_pad_token_tensor", None)
