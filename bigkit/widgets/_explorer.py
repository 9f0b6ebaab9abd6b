"""What all explorers share: controls on the left, a picture on the right, Reset, Undo, Compare, state, code, export.

The picture is SVG in a widget, not an `Output`: nothing flickers, and a stored notebook holds no stray output. What is
pointed at in it tells about itself (`touch.js`). Setting a control's value in code does what turning it by hand does,
before the assignment returns.

Leaves out: what is asked and shown; each explorer says that.
"""

from __future__ import annotations

import base64
import html
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from ..api import Source, describe
from ..draw.canvas import Picture
from ..model.spec import ModelSpec
from ._controls import Number, field, menu
from ._html import MONO, pill, preformatted, short, still
from ._picture import picture_widget
from ._state import Remembered

OWN = "my own"  # in a menu of presets: the controls agree with none of them
LONGEST_ERROR = 280  # letters
LONGEST_REPR = 109  # ipywidgets cuts a longer one where a cell shows it

TEXT, STATE = "As text", "State"  # titles of panes
CURRENT = 1.0  # seconds in which turns of one control are one step of Undo

_COPY = ("const t=this.parentNode.querySelector('textarea');t.focus();t.select();"
         "this.textContent=document.execCommand('copy')?'Copied':'Press Ctrl+C'")  # fmt: skip
_STYLE = f"<style>{Path(__file__).with_name('explorer.css').read_text(encoding='utf-8')}</style>"


class Explorer(Remembered, widgets.VBox):
    """A panel of controls and what follows from them.

    A subclass gives its controls to `super().__init__`, and says in `compute` what follows from their values, in `show`
    how that looks, and in `summary` what its `repr` says. Whatever goes wrong in `compute` is shown in a sentence,
    above the last good picture, which is dimmed. `click` and `drag` say what follows from a hand in the picture, and
    `differences` compares two results.

    `state` is one line of text that `from_state` makes the same explorer from.

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
    draggable = False  # whether parts of the picture can be dragged
    result: Any = None  # what `compute` returned last
    pinned: Any = None  # the result that others are compared with
    passing = False  # whether what is shown is a moment of a drag
    _told = ""  # key of the mark that `about` tells about
    _depth = 0  # of `together`
    _waiting = False  # for the end of `together`

    def __init__(
        self, groups: Mapping[str, Mapping[str, widgets.Widget]], panes: Mapping[str, Callable[[], str]] = {}
    ) -> None:
        named = {name: control for group in groups.values() for name, control in group.items()}
        for name, control in named.items():
            setattr(self, name, control)
        self.error, self.working, self.verdict, self.text, self.about, self.before = map(
            _output, ("error", "working", "verdict", "text", "about", "before")
        )
        self.picture = picture_widget(self._take_touch, self.draggable).add_class("bigkit-picture")
        self._panes: dict[str, Any] = {
            **panes, "Code": self._code_pane, "Export": self._export_pane, TEXT: None, STATE: lambda: self.state,
        }  # fmt: skip
        line = field(widgets.Text, "State", "", placeholder="paste a state here")
        line.observe(lambda change: self._take_line(change["new"]), "value")
        own = {TEXT: self.text, STATE: line}
        self.panes = widgets.Accordion([own.get(title) or widgets.HTML() for title in self._panes], selected_index=None)
        for i, title in enumerate(self._panes):
            self.panes.set_title(i, title)
        self.panes.observe(lambda _: self._fill_pane(), "selected_index")
        self.buttons = widgets.HBox([
            _button("Reset", "Back to how it began", self.reset),
            _button("Undo", "Take back what was turned or dragged last", self.undo),
            *([_button("Compare", "Keep this one beside what follows, or stop that", self.compare)]
              if type(self).differences is not Explorer.differences else []),
            _button("Code", "Show the Python that gives this", lambda: self._open_pane("Code")),
            _button("Export", "Save as JSON or SVG", lambda: self._open_pane("Export")),
        ]).add_class("bigkit-buttons")  # fmt: skip
        super().__init__([self._columns(groups)])
        self.add_class("bigkit-explorer")

        turned = {name: control for name, control in named.items() if control.has_trait("value")}
        turned = {name: control for name, control in turned.items() if control is not self.preset}
        self._turned = [name for name in turned if name not in self.steering]
        self._start = [(control, control.value) for control in turned.values()]
        self.listen(control for name, control in turned.items() if name not in self.steering)
        if self.preset is not None:
            self.preset.observe(lambda _: self._take_preset(), "value")
        self.refresh()

    def _columns(self, groups: Mapping[str, Mapping[str, widgets.Widget]]) -> widgets.HBox:
        """Controls on the left, the rest on the right; explorer.css says how they stand where there is little room."""
        boxes = [
            widgets.VBox([widgets.HTML(f"<b>{heading}</b>"), *controls.values()]).add_class("bigkit-group")
            for heading, controls in groups.items()
        ]
        style = widgets.HTML(_STYLE, layout=widgets.Layout(display="none"))
        pictures = widgets.HBox([self.before, self.picture], layout=widgets.Layout(flex_flow="row wrap-reverse"))
        right = [style, self.working, self.error, self.verdict, pictures.add_class("bigkit-pictures"), self.about]
        narrow = widgets.Layout(flex="0 0 290px", width="290px", padding="0 12px 0 0")
        wide = widgets.Layout(flex="1 1 300px", width="auto", min_width="0")
        left = [self.buttons, widgets.VBox(boxes).add_class("bigkit-controls")]  # in sight beside a long column, too
        columns = [widgets.VBox(left, layout=narrow).add_class("bigkit-left"),
                   widgets.VBox([*right, self.panes], layout=wide).add_class("bigkit-right")]  # fmt: skip
        row = widgets.HBox(columns, layout=widgets.Layout(width="100%", flex_flow="row wrap"))
        return row.add_class("bigkit-columns")

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
        self.verdict.value, self.picture.value = verdict, picture.svg
        if not self.passing:
            self.text.value = preformatted(text, wrap)

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

    # -- a hand in the picture

    def click(self, key: str) -> None:
        """What follows when a mark of the picture is clicked: `about` shows what `tell` says, until the next click."""
        self._told = "" if key == self._told else key
        self._tell()

    def _tell(self) -> None:
        self.about.value = self.tell(self._told) if self._told else ""

    def tell(self, key: str) -> str:
        """What a mark of the picture stands for, as HTML; nothing if there is nothing more to say than its tooltip."""
        return ""

    def drag(self, key: str, onto: str | None, done: bool = True) -> None:
        """What follows when a mark is dragged onto another; None: onto nothing."""

    def _take_touch(self, content: Mapping[str, Any]) -> None:
        does: dict[str, Callable[..., None]] = {"click": self.click, "drag": self.drag, "undo": self.undo}
        try:
            does[content["kind"]](**{name: value for name, value in content.items() if name != "kind"})
        except ValueError as error:
            self.say_sorry(error)

    # -- two results side by side

    def differences(self, old: Any, new: Any) -> list[str]:
        """How two results differ, in sentences."""
        raise NotImplementedError

    def compare(self) -> None:
        """Keep what is shown, beside what follows from now on; the second time, let it go."""
        self.pinned = self.shown if self.pinned is None else None
        self._pinned_svg = self.picture.value
        self._compare()

    def _compare(self) -> None:
        if self.pinned is None:
            self.before.value = ""
            self.before.layout.display = "none"
            return
        self.before.value, self.before.layout.display = f"<b>Kept, to compare with</b>{self._pinned_svg}", None
        said = " ".join(self.differences(self.pinned, self.result)) or "There is no difference yet."
        self.verdict.value += pill("slow", "Compared with the one that is kept:", said)
        if not self.passing:
            self.text.value += preformatted(f"compared with the one that is kept: {said}", wrap=True)

    # -- following the controls

    def listen(self, controls: Iterable[widgets.Widget]) -> None:
        """Refresh whenever one of these controls is turned."""
        for control in controls:
            control.observe(self._changed, "value")
            if isinstance(control, Number):
                control.observe(self._refuse, "refused")

    def _refuse(self, change: Any) -> None:
        if change["new"]:
            self.error.value = pill("bad", "Sorry:", f"{change['new']}.", role="alert")

    def _changed(self, change: Any) -> None:
        if self._depth:
            self._waiting = True
            return
        owner, now = change["owner"], time.monotonic()
        self._turning = owner is self._last[0] and now - self._last[1] < CURRENT
        self._last = (owner, now)
        self.refresh()
        self._turning = False

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

    @contextmanager
    def following(self) -> Iterator[None]:
        """Take changes that follow from the one before as one with it, also for Undo."""
        before, self._turning = self._turning, True
        try:
            with self.together():
                yield
        finally:
            self._turning = before

    def refresh(self) -> None:
        """Compute and show again."""
        self.say_working()
        try:
            result = self.compute()
        except Exception as error:  # building a model from an arbitrary name may raise anything
            self._remember()
            self.say_sorry(error)
        else:
            self.result, self.error.value = result, ""
            self._name_preset()
            self._remember()
            self._show()
        finally:
            self.working.value = ""

    def _show(self) -> None:
        """Show the result, and all that follows it."""
        for widget in (self.verdict, self.picture):
            widget.remove_class("bigkit-stale")
        self.show(self.result)
        self._compare()
        self._tell()
        self._fill_pane()

    def say_working(self, words: str = "Working …") -> None:
        """Say that it takes a moment; it is seen if that is longer than 0.2 s, until the result is there."""
        self.working.value = pill("slow", words)

    def say_sorry(self, error: Exception) -> None:
        """Show what went wrong, and dim what is no longer the answer."""
        text = str(error).strip().partition("\n\n")[0].replace("\n", " ") or type(error).__name__
        text = text if len(text) <= LONGEST_ERROR else text[:LONGEST_ERROR].rpartition(" ")[0] + " …"
        self.error.value = pill("bad", "Sorry:", text.removesuffix(".") + ".", role="alert")
        for widget in (self.verdict, self.picture):
            widget.add_class("bigkit-stale")

    def reset(self) -> None:
        """Bring every control back to where it began."""
        with self.together():
            for control, value in self._start:
                control.value = value

    # -- presets

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
        open_pane = self.panes.selected_index
        make = None if open_pane is None else [*self._panes.values()][open_pane]
        if make and self.picture.value:
            self.say_working()
            self.panes.children[open_pane].value = make()
            self.working.value = ""

    def _take_line(self, line: str) -> None:
        """Follow a state that was pasted."""
        if line != self.state:
            try:
                self.restore(self.read_state(line))
            except ValueError as error:
                self.say_sorry(error)

    def _code_pane(self) -> str:
        code = self.to_code()
        return (
            f'<div><textarea readonly aria-label="Python code" rows="{code.count(chr(10)) + 2}" '
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
