"""Controls of explorers: fields as wide as their column."""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ipywidgets as widgets
import traitlets

from ..model.attention import KV_DTYPES, kv_dtype_name
from ..units import dtype_name

TOKENS = (128, 192, *(n << i for i in range(12) for n in (256, 384)), 2**20)  # 128 .. 1,048,576, two steps an octave
# In menus; a Dropdown shows an option that stands for None as a blank.
AS_STORED, AS_COMPUTED, NONE = "as stored", "as computed", "none"
DTYPES = (AS_STORED, "float32", "float16", "bfloat16", "float8_e4m3fn")


NUMBERS = {widgets.IntSlider: True, widgets.FloatSlider: True, widgets.BoundedIntText: False,
           widgets.BoundedFloatText: False}  # whether there is a slider  # fmt: skip


class Number(widgets.VBox):
    """A number that is typed, or turned with a slider as wide as the column.

    `value` is what was typed, also between two steps of the slider, or stays what it was: then `refused` is the
    sentence that says why.

    Args:
        description: its name.
        value: where it begins.
        min, max, step: of the slider; what is typed lies between the ends too.
        whole: whether it is a whole number.
        turned: whether there is a slider.
        stops: the values that the slider stops at, if they are not evenly spaced.
        words: value -> text, where it is not the number itself; the text can be typed too.
        continuous_update: whether the slider reports before the hand lets go.
        tip: what it is, which shows where it is pointed at.
    """

    value = traitlets.Any()
    min, max, step = traitlets.Any(0), traitlets.Any(100), traitlets.Any(1)
    disabled = traitlets.Bool(False)
    continuous_update = traitlets.Bool(False)
    refused = traitlets.Unicode()

    def __init__(
        self, description: str, value: float, *, min: float = 0, max: float = 100, step: float = 1, whole: bool = True,
        turned: bool = True, stops: Sequence[float] = (), words: Mapping[float, str] | None = None,
        continuous_update: bool = False, tip: str = "",
    ) -> None:  # fmt: skip
        self.description, self.whole, self.stops, self._words = description, whole, list(stops), dict(words or {})
        self.entry = _wide(widgets.Text, description, "", tip, continuous_update=False)
        self.slider: Any = None  # its name is that of the field; touch.js tells screen readers so
        limits = {"min": min, "max": max, "step": step}
        if self.stops:
            self.slider = _wide(widgets.IntSlider, "", 0, min=0, max=len(self.stops) - 1, readout=False)
        elif turned:
            kind = widgets.IntSlider if whole else widgets.FloatSlider
            self.slider = _wide(kind, "", value, readout=False, min=min, max=max, step=step)
        super().__init__([self.entry, *([self.slider] if self.slider else [])], layout=widgets.Layout(width="100%"))
        self.add_class("bigkit-number")
        self.set_trait("continuous_update", continuous_update)
        for name, limit in limits.items():
            self.set_trait(name, limit)
        self.value = value
        self.observe(self._follow, ["value", "min", "max", "step", "disabled", "continuous_update"])
        self._follow()
        self.entry.observe(self._take_text, "value")
        if self.slider:
            self.slider.observe(self._take_slider, "value")

    @traitlets.validate("value")
    def _between_the_ends(self, proposal: Any) -> float:
        value = proposal["value"]
        value = round(value) if self.whole else float(value)
        return value if self.stops else type(value)(builtins.min(builtins.max(value, self.min), self.max))

    def _follow(self, change: object = None) -> None:
        """Let the field and the slider show the value."""
        self.entry.value, self.entry.disabled = self._text(self.value), self.disabled
        if self.slider:
            with self.slider.hold_trait_notifications():
                if not self.stops:
                    self.slider.max, self.slider.min, self.slider.step = self.max, self.min, self.step
                self.slider.value = self._nearest() if self.stops else self.value
            self.slider.disabled, self.slider.continuous_update = self.disabled, self.continuous_update
        if not self.stops:
            self.value = self.value  # within the new ends

    def _nearest(self) -> int:
        return builtins.min(range(len(self.stops)), key=lambda i: abs(self.stops[i] - self.value))

    def _text(self, value: float) -> str:
        return self._words.get(value) or (f"{value:,}" if self.whole else f"{value:,.10g}")

    def _take_slider(self, change: Any) -> None:
        new = self.stops[change["new"]] if self.stops else change["new"]
        # A slider in a browser reports the step nearest to a value that was typed, which nobody asked for.
        if change["new"] != self._nearest() if self.stops else abs(new - self.value) >= self.step / 2:
            self.value = new

    def _take_text(self, change: Any) -> None:
        text = change["new"].strip()
        if text == self._text(self.value):
            return
        value = next((value for value, words in self._words.items() if words == text), None)
        low, high = (self.stops[0], self.stops[-1]) if self.stops else (self.min, self.max)
        try:
            value = float(text.replace(",", "")) if value is None else value
            if not low <= value <= high or (self.whole and value != round(value)):
                raise ValueError
        except ValueError:
            self.refused = ""
            kind = "a whole number" if self.whole else "a number"
            ends = f"{self._text(self._type(low))} to {self._text(self._type(high))}"
            stays = f"it stays {self._text(self.value)}"
            self.refused = f"{self.description} takes {kind} from {ends}, not {text!r}; {stays}"
        else:
            self.value = value
        self.entry.value = self._text(self.value)

    def _type(self, value: float) -> float:
        return round(value) if self.whole else value


def field(kind: type[widgets.Widget], description: str, value: Any, **options: Any) -> widgets.Widget:
    """A control as wide as the column, which reports when the hand lets go; a `Number` for a kind that is one."""
    if kind in NUMBERS:
        whole = kind in (widgets.IntSlider, widgets.BoundedIntText)
        return Number(description, value, whole=whole, turned=NUMBERS[kind], **options)
    return _wide(kind, description, value, **options)


def _wide(kind: type[widgets.Widget], description: str, value: Any, tip: str = "", **options: Any) -> widgets.Widget:
    traits = kind.class_trait_names()
    if "continuous_update" in traits:
        options.setdefault("continuous_update", False)
    tooltip = "tooltip" if "tooltip" in traits else "description_tooltip"
    options.setdefault(tooltip, tip or description)  # without one the browser says "null"
    layout = widgets.Layout(width="auto", min_width="0")
    return kind(value=value, description=description, style={"description_width": "82px"}, layout=layout, **options)


def slider(description: str, options: Iterable[tuple[str, int]], value: int, tip: str = "") -> Number:
    """A slider over (text, number) options; other numbers between the ends can be typed."""
    words: dict[float, str] = {number: text for text, number in options}
    return Number(description, value, stops=[*words], words=words, tip=tip)


def token_slider(value: int, none: bool) -> Number:
    """A slider over context lengths, two steps an octave; `value` is among them, and 0 ("none") if wanted."""
    lengths = sorted({*TOKENS, value, *([0] if none else [])})
    tip = "Tokens of each sequence, prompt and answer together"
    return slider("Context", [(f"{n:,}" if n else "none", n) for n in lengths], value, tip)


def menu(description: str, options: Sequence[Any], value: Any, tip: str = "") -> widgets.Dropdown:
    """A list to choose from.

    Raises:
        ValueError: `value` is not in the list.
    """
    if value not in options:
        raise ValueError(f"unknown {description.lower()} {value!r}: expected one of {', '.join(map(repr, options))}")
    return field(widgets.Dropdown, description, value, options=options, tip=tip)


def dtype_menu(dtype: object) -> widgets.Dropdown:
    """A menu of dtypes, for weights; None is "as stored"."""
    return menu("Dtype", DTYPES, AS_STORED if dtype is None else dtype_name(dtype))


def cache_menu(kv_dtype: object) -> widgets.Dropdown:
    """A menu of dtypes for keys and values in the cache; None is "as computed"."""
    tip = "The dtype in which keys and values are kept; as computed: that of the model"
    return menu("KV cache", (AS_COMPUTED, *KV_DTYPES), kv_dtype_name(kv_dtype) or AS_COMPUTED, tip)


def chosen(control: widgets.Dropdown) -> str | None:
    """What such a menu shows."""
    return None if control.value in (AS_STORED, AS_COMPUTED, NONE) else control.value


def player(first: int, last: int, interval: int, description: str) -> tuple[widgets.Play, Number]:
    """A button that plays, a step every `interval` ms, and the slider that it turns."""
    play = widgets.Play(value=first, min=first, max=last, interval=interval, layout=widgets.Layout(width="auto"))
    step = field(widgets.IntSlider, description, first, min=first, max=last)
    widgets.jslink((play, "value"), (step.slider, "value"))
    return play, step
