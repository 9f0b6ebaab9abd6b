"""What all explorers share: controls on the left, a picture with its text twin on the right, Reset, code and export.

The picture is SVG in an `HTML` widget, not an `Output`: nothing flickers, and a stored notebook holds no stray output.
Setting a control's value in code does what turning it by hand does, before the assignment returns.

Leaves out: what is asked and shown; each explorer says that.
"""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from ..api import Source, describe
from ..draw.canvas import Picture
from ..model.spec import ModelSpec
from ._controls import field, menu
from ._html import MONO, pill, preformatted, short, still

OWN = "my own"  # in a menu of presets: the controls agree with none of them
LONGEST_REPR = 109  # ipywidgets cuts a longer one where a cell shows it

_COPY = ("const t=this.parentNode.querySelector('textarea');t.focus();t.select();"
         "this.textContent=document.execCommand('copy')?'Copied':'Press Ctrl+C'")  # fmt: skip
# JupyterLab writes the titles of closed panes in a grey that is hard to read on theirs.
_STYLE = "<style>.bigkit-explorer .jupyter-widget-Collapse-header{color:var(--jp-ui-font-color1,inherit)}</style>"


class Explorer(widgets.VBox):
    """A panel of controls and what follows from them.

    A subclass gives its controls to `super().__init__`, and says in `compute` what follows from their values, in `show`
    how that looks, and in `summary` what its `repr` says. Whatever goes wrong in `compute` is shown as one sentence,
    above the last good picture.

    A preset gives several controls their values at once; a menu in `preset` names the one that the controls agree with.

    Args:
        groups: heading -> name -> control, from the top; each becomes an attribute of that name.
        panes: title -> function that makes its HTML; closed at first, and made only when open.
    """

    presets: Mapping[str, Mapping[str, Any]] = {}  # name -> control -> value
    own = OWN  # the option of the menu when no preset fits
    preset: Any = None  # the menu of presets, if there are any
    steering: tuple[str, ...] = ()  # names of controls that only turn others
    missing = "nothing yet"  # said where there is no result
    cure = "give the explorer a model that it can find"
    result: Any = None  # what `compute` returned last
    _depth = 0  # of `together`
    _waiting = False  # for the end of `together`

    def __init__(
        self, groups: Mapping[str, Mapping[str, widgets.Widget]], panes: Mapping[str, Callable[[], str]] = {}
    ) -> None:
        named = {name: control for group in groups.values() for name, control in group.items()}
        for name, control in named.items():
            setattr(self, name, control)
        self.error, self.verdict, self.picture, self.text = map(_output, ("error", "verdict", "picture", "text"))
        self._panes = {**panes, "Code": self._code_pane, "Export": self._export_pane}
        self.panes = widgets.Accordion([widgets.HTML() for _ in self._panes], selected_index=None)
        for i, title in enumerate(self._panes):
            self.panes.set_title(i, title)
        self.panes.observe(lambda _: self._fill_pane(), "selected_index")
        reset = _button("Reset", "Back to how it began", self.reset)
        copy = _button("Copy as code", "Show the Python that gives this", lambda: self._open_pane("Code"))
        export = _button("Export", "Save as JSON or SVG", lambda: self._open_pane("Export"))
        self.buttons = widgets.HBox([reset, copy, export])
        left = [item for heading in groups for item in (widgets.HTML(f"<b>{heading}</b>"), *groups[heading].values())]
        style = widgets.HTML(_STYLE, layout=widgets.Layout(display="none"))
        right = [style, self.error, self.verdict, self.picture, self.text, self.panes]
        narrow = widgets.Layout(flex="0 0 290px", width="290px", padding="0 12px 0 0")
        wide = widgets.Layout(flex="1 1 380px", width="auto", min_width="0")
        columns = [widgets.VBox([*left, self.buttons], layout=narrow), widgets.VBox(right, layout=wide)]
        # In a narrow window the picture goes below the controls.
        super().__init__([widgets.HBox(columns, layout=widgets.Layout(width="100%", flex_flow="row wrap"))])
        self.add_class("bigkit-explorer")

        turned = {name: control for name, control in named.items() if control.has_trait("value")}
        turned = {name: control for name, control in turned.items() if control is not self.preset}
        self._start = [(control, control.value) for control in turned.values()]
        self.listen(control for name, control in turned.items() if name not in self.steering)
        if self.preset is not None:
            self.preset.observe(lambda _: self._take_preset(), "value")
        self.refresh()

    # -- what a subclass says

    def compute(self) -> Any:
        """What follows from the controls. An exception's text is shown, and nothing else changes."""
        raise NotImplementedError

    def show(self, result: Any) -> None:
        """Show what `compute` returned, usually with `put`."""
        raise NotImplementedError

    def summary(self, result: Any) -> Sequence[str]:
        """What stands between the brackets of the `repr`: the first of these that is short enough."""
        raise NotImplementedError

    def to_code(self) -> str:
        """Python that gives what is shown."""
        raise NotImplementedError

    def content(self) -> dict[str, Any]:
        """What is shown, as plain data."""
        content: dict[str, Any] = json.loads(self.shown.to_json())
        return content

    def to_json(self) -> str:
        """What is shown, as JSON text."""
        return json.dumps(self.content(), indent=2) + "\n"

    def to_svg(self) -> str:
        """The picture, as SVG text."""
        return self.picture.value

    # -- the result

    @property
    def shown(self) -> Any:
        """The result that is shown.

        Raises:
            ValueError: there is none yet.
        """
        if self.result is None:
            raise ValueError(f"{self.missing}: {self.cure}")
        return self.result

    def put(self, verdict: str, picture: Picture, text: str, wrap: bool = False) -> None:
        """Show a verdict as HTML, a picture and its text twin, whose long lines scroll or wrap."""
        self.verdict.value, self.picture.value, self.text.value = verdict, picture.svg, preformatted(text, wrap)

    _ipython_display_ = None  # with ipywidgets 7, which has it, IPython would not ask for the bundle

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """What a cell stores: the live view, its `repr`, and a still picture for where nothing runs."""
        view = {"version_major": 2, "version_minor": 0, "model_id": self.model_id}
        data = {"text/plain": repr(self), "application/vnd.jupyter.widget-view+json": view}
        return {**data, "text/html": still(self.picture.value)} if self.picture.value else data

    def __repr__(self) -> str:
        name = type(self).__name__
        if self.result is None:
            return f"{name}({self.missing})"
        room = LONGEST_REPR - len(name) - 2
        texts = self.summary(self.result)
        return f"{name}({next((text for text in texts if len(text) <= room), short(texts[-1], room))})"

    # -- following the controls

    def listen(self, controls: Iterable[widgets.Widget]) -> None:
        """Refresh whenever one of these controls is turned."""
        for control in controls:
            control.observe(self._changed, "value")

    def _changed(self, change: object) -> None:
        if self._depth:
            self._waiting = True
        else:
            self.refresh()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Take several changes as one: what is shown follows once, at the end."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._waiting and not self._depth:
                self._waiting = False
                self.refresh()

    def refresh(self) -> None:
        """Compute and show again."""
        verdict = self.verdict.value  # `compute` may say meanwhile that it works
        try:
            self.result = self.compute()
        except Exception as error:  # building a model from an arbitrary name may raise anything
            self.say_sorry(error)
            self.verdict.value = verdict
            return
        self.error.value = ""
        self._name_preset()
        self.show(self.result)
        self._fill_pane()

    def say_sorry(self, error: Exception) -> None:
        """Show what went wrong as one sentence."""
        text = str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
        self.error.value = pill("bad", "Sorry:", text.removesuffix(".") + ".", role="alert")

    def reset(self) -> None:
        """Bring every control back to where it began."""
        with self.together():
            for control, value in self._start:
                control.value = value

    # -- presets

    def setting(self, name: str) -> Any:
        """The value of a control."""
        return getattr(self, name).value

    def turn(self, name: str, value: Any) -> None:
        """Give a control a value."""
        getattr(self, name).value = value

    def preset_menu(self, description: str, value: str = "") -> widgets.Dropdown:
        """The menu of the presets; without a value it starts as `own`, until the first result names a preset."""
        self.preset = menu(description, [*self.presets, self.own], value or self.own)
        return self.preset

    def _take_preset(self) -> None:
        with self.together():
            for name, value in self.presets.get(self.preset.value, {}).items():
                self.turn(name, value)

    def _name_preset(self) -> None:
        """Let the menu name the preset that the controls agree with: of several, the one that says most."""
        if self.preset is not None:
            self.preset.value = max(self.fitting(), key=lambda name: len(self.presets[name]), default=self.own)

    def fitting(self) -> list[str]:
        """The presets that the controls agree with."""
        return [name for name, values in self.presets.items()
                if all(self.setting(control) == value for control, value in values.items())]  # fmt: skip

    # -- the model, where there is one

    def model_field(self, model: Source) -> widgets.Combobox:
        """A field for a model's name, with the shipped names as suggestions. One given as an object keeps its name."""
        from .. import zoo

        self._specs: dict[str, ModelSpec] = {}
        if not isinstance(model, str):
            spec = describe(model)
            model, self._specs = spec.name, {spec.name: spec}
        hint = "name, Hub id, URL or folder"
        return field(widgets.Combobox, "Model", model, options=zoo.names(), ensure_option=False, placeholder=hint)

    def spec(self) -> ModelSpec:
        """The records of the model that `model` names."""
        name = self.model.value.strip()
        if name not in self._specs:
            self._specs[name] = describe(name)
        return self._specs[name]

    # -- code and export

    def export(self, path: str | os.PathLike[str]) -> Path:
        """Write what is shown to a file: JSON or SVG, by its suffix.

        Raises:
            ValueError: the suffix is neither .json nor .svg.
        """
        path = Path(path)
        makers = {".json": self.to_json, ".svg": self.to_svg}
        if path.suffix not in makers:
            raise ValueError(f"cannot export to {path.name!r}: expected a name that ends in .json or .svg")
        path.write_text(makers[path.suffix](), encoding="utf-8")
        return path

    def _open_pane(self, title: str) -> None:
        self.panes.selected_index = [*self._panes].index(title)
        self._fill_pane()

    def _fill_pane(self) -> None:
        """Make the open pane; those that are closed cost nothing."""
        if self.panes.selected_index is not None and self.picture.value:
            self.panes.children[self.panes.selected_index].value = [*self._panes.values()][self.panes.selected_index]()

    def _code_pane(self) -> str:
        code = self.to_code()
        return (
            f'<div><textarea readonly aria-label="Python code" rows="{code.count(chr(10)) + 1}" '
            f'style="width:100%;box-sizing:border-box;{MONO}">{html.escape(code)}</textarea>'
            f'<button onclick="{_COPY}">Copy to clipboard</button></div>'
        )

    def _export_pane(self) -> str:
        links = []
        for suffix, kind, make in (("json", "application/json", self.to_json), ("svg", "image/svg+xml", self.to_svg)):
            url = f"data:{kind};base64,{base64.b64encode(make().encode()).decode()}"
            name = f"bigkit-{type(self).__name__.removesuffix('Explorer').lower()}.{suffix}"
            links.append(f'<a style="text-decoration:underline" download="{name}" href="{url}">{name}</a>')
        return f"<p>Download {' or '.join(links)}.</p>"


def _output(name: str) -> widgets.HTML:
    widget = widgets.HTML(layout=widgets.Layout(width="100%", overflow="auto" if name == "text" else None))
    widget.add_class(f"bigkit-{name}")
    return widget


def _button(name: str, tip: str, action: Callable[[], None]) -> widgets.Button:
    button = widgets.Button(description=name, tooltip=tip, layout=widgets.Layout(width="auto"))
    button.on_click(lambda _: action())
    return button
