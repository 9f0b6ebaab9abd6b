"""What is private in Transformers and used here; seen in Transformers 5.23. A test fails when a name is gone."""

from __future__ import annotations

from typing import Any


def from_config(cls: Any, settings: Any, dtype: Any) -> Any:
    """A model of exactly this class, not of the one that an `AutoModel` would choose."""
    return cls._from_config(settings, dtype=dtype)


def builds(auto: Any, settings: Any) -> bool:
    """Whether an `AutoModelFor...` has a class for a config; asking it to build one raises a long ValueError."""
    return type(settings) in auto._model_mapping
