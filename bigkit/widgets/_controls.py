"""Controls of explorers: fields as wide as their column."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import ipywidgets as widgets

from ..model.attention import KV_DTYPES, kv_dtype_name
from ..units import dtype_name

TOKENS = (128, 192, *(n << i for i in range(12) for n in (256, 384)), 2**20)  # 128 .. 1,048,576, two steps an octave
AS_STORED = "as stored"  # in a menu; a Dropdown shows an option that stands for None as a blank
AS_COMPUTED = "as computed"  # in the menu of the cache
DTYPES = (AS_STORED, "float32", "float16", "bfloat16", "float8_e4m3fn")


def field(kind: type[widgets.Widget], description: str, value: Any, **options: Any) -> widgets.Widget:
    """A control as wide as the column; it reports when the hand lets go."""
    if kind.class_traits().get("continuous_update"):
        options.setdefault("continuous_update", False)
    layout = widgets.Layout(width="100%")
    return kind(value=value, description=description, style={"description_width": "82px"}, layout=layout, **options)


def slider(description: str, options: Iterable[tuple[str, int]], value: int) -> widgets.SelectionSlider:
    """A slider over (text, number) options."""
    return field(widgets.SelectionSlider, description, value, options=list(options))


def token_slider(value: int, none: bool) -> widgets.SelectionSlider:
    """A slider over context lengths, two steps an octave; `value` is among them, and 0 ("none") if wanted."""
    lengths = sorted({*TOKENS, value, *([0] if none else [])})
    return slider("Context", [(f"{n:,}" if n else "none", n) for n in lengths], value)


def menu(description: str, options: Sequence[Any], value: Any) -> widgets.Dropdown:
    """A list to choose from.

    Raises:
        ValueError: `value` is not in the list.
    """
    if value not in options:
        raise ValueError(f"unknown {description.lower()} {value!r}: expected one of {', '.join(map(repr, options))}")
    return field(widgets.Dropdown, description, value, options=options)


def dtype_menu(dtype: object) -> widgets.Dropdown:
    """A menu of dtypes, for weights; None is "as stored"."""
    return menu("Dtype", DTYPES, AS_STORED if dtype is None else dtype_name(dtype))


def chosen_dtype(control: widgets.Dropdown) -> str | None:
    """The dtype that such a menu shows."""
    return None if control.value == AS_STORED else control.value


def cache_menu(kv_dtype: object) -> widgets.Dropdown:
    """A menu of dtypes for keys and values in the cache; None is "as computed"."""
    return menu("KV cache", (AS_COMPUTED, *KV_DTYPES), kv_dtype_name(kv_dtype) or AS_COMPUTED)


def chosen_cache(control: widgets.Dropdown) -> str | None:
    """The dtype that such a menu shows."""
    return None if control.value == AS_COMPUTED else control.value
