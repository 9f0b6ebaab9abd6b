"""What all explorers share: controls on the left, a picture with its text twin on the right, Reset, code and export.

The picture is SVG in an `HTML` widget, not an `Output`: nothing flickers, and a stored notebook holds no stray output.
Setting a control's value in code does what turning it by hand does, before the assignment returns.

Leaves out: what is asked and shown; each explorer says that.
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from ..api import Source, describe
from ..draw.canvas import GREEN, ORANGE, VERMILLION
from ..model.spec import ModelSpec

WIDE = {"description_width": "82px"}
TOKENS = (128, 192, *(n << i for i in range(12) for n in (256, 384)), 2**20)  # 128 .. 1,048,576, two steps an octave
AS_STORED = "as stored"  # in a menu; a Dropdown shows an option that stands for None as a blank
DTYPES = (AS_STORED, "float32", "float16", "bfloat16", "float8_e4m3fn")
LONGEST_REPR = 109  # ipywidgets cuts a longer one where a cell shows it

PILLS = {"good": ("#DDF3EA", GREEN), "slow": ("#FFF1D6", ORANGE), "bad": ("#FBE3D6", VERMILLION)}  # ground and edge
_COPY = ("const t=this.parentNode.querySelector('textarea');t.focus();t.select();"
         "this.textContent=document.execCommand('copy')?'Copied':'Press Ctrl+C'")  # fmt: skip
# JupyterLab writes the titles of closed panes in a grey that is hard to read on theirs.
_STYLE = "<style>.bigkit-explorer .jupyter-widget-Collapse-header{color:var(--jp-ui-font-color1,inherit)}</style>"
_MONO = "margin:0;font:11.5px/1.4 ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;white-space:pre"


class Explorer(widgets.VBox):
    """A panel of controls and what follows from them.

    A subclass makes its controls, calls `super().__init__`, and says in `compute` what follows from their values and in
    `show` how that looks. Whatever goes wrong in `compute` is shown as one sentence, above the last good picture.

    Args:
        groups: (heading, controls) from the top.
        panes: (title, function that makes its HTML); closed at first, and made only when open.
    """

    steering: tuple[widgets.Widget, ...] = ()  # controls that only turn others; the subclass listens to them
    _depth = 0  # of `together`
    _waiting = False  # for the end of `together`

    def __init__(
        self,
        groups: Sequence[tuple[str, Sequence[widgets.Widget]]],
        panes: Sequence[tuple[str, Callable[[], str]]],
    ) -> None:
        self.error = widgets.HTML()
        self.verdict = widgets.HTML()
        self.picture = widgets.HTML(layout=widgets.Layout(width="100%"))
        self.text = widgets.HTML(layout=widgets.Layout(width="100%", overflow="auto"))
        for widget, name in ((self.error, "error"), (self.verdict, "verdict"),
                             (self.picture, "picture"), (self.text, "text")):  # fmt: skip
            widget.add_class(f"bigkit-{name}")

        self._panes = [*panes, ("Code", self._code_pane), ("Export", self._export_pane)]
        self.panes = widgets.Accordion([widgets.HTML() for _ in self._panes], selected_index=None)
        for i, (title, _) in enumerate(self._panes):
            self.panes.set_title(i, title)
        self.panes.observe(lambda _: self._fill_pane(), "selected_index")

        buttons = []
        for name, tip, action in (
            ("Reset", "Back to how it began", self.reset),
            ("Copy as code", "Show the Python that gives this", lambda: self._open_pane("Code")),
            ("Export", "Save as JSON or SVG", lambda: self._open_pane("Export")),
        ):
            button = widgets.Button(description=name, tooltip=tip, layout=widgets.Layout(width="auto"))
            button.on_click(lambda _, action=action: action())
            buttons.append(button)
        self.buttons = widgets.HBox(buttons)

        left = widgets.VBox(
            [item for heading, controls in groups for item in (widgets.HTML(f"<b>{heading}</b>"), *controls)]
            + [self.buttons],
            layout=widgets.Layout(flex="0 0 290px", width="290px", padding="0 12px 0 0"),
        )
        right = widgets.VBox(
            [
                widgets.HTML(_STYLE, layout=widgets.Layout(display="none")),
                self.error,
                self.verdict,
                self.picture,
                self.text,
                self.panes,
            ],
            layout=widgets.Layout(flex="1 1 380px", min_width="0", width="auto"),
        )
        # In a narrow window the picture goes below the controls.
        super().__init__([widgets.HBox([left, right], layout=widgets.Layout(width="100%", flex_flow="row wrap"))])
        self.add_class("bigkit-explorer")

        controls = [control for _, group in groups for control in group if control.has_trait("value")]
        self._start = [(control, control.value) for control in controls]
        self.listen(control for control in controls if control not in self.steering)
        self.refresh()

    # -- what a subclass says

    def compute(self) -> None:
        """Find what follows from the controls. An exception's text is shown, and nothing else changes."""
        raise NotImplementedError

    def show(self) -> None:
        """Put what `compute` found into `verdict`, `picture` and `text`."""
        raise NotImplementedError

    def to_code(self) -> str:
        """Python that gives what is shown."""
        raise NotImplementedError

    def to_json(self) -> str:
        """What is shown, as JSON text."""
        raise NotImplementedError

    def to_svg(self) -> str:
        """The picture, as SVG text."""
        return self.picture.value

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
            self.compute()
        except Exception as error:  # building a model from an arbitrary name may raise anything
            self.say_sorry(error)
            self.verdict.value = verdict
            return
        self.error.value = ""
        self.show()
        self._fill_pane()

    def say_sorry(self, error: Exception) -> None:
        """Show what went wrong as one sentence."""
        said = str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
        self.error.value = pill("bad", "Sorry:", said.removesuffix(".") + ".", role="alert")

    def reset(self) -> None:
        """Bring every control back to where it began."""
        with self.together():
            for control, value in self._start:
                control.value = value

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
        self.panes.selected_index = [name for name, _ in self._panes].index(title)
        self._fill_pane()

    def _fill_pane(self) -> None:
        """Make the open pane; those that are closed cost nothing."""
        if self.panes.selected_index is not None and self.picture.value:
            self.panes.children[self.panes.selected_index].value = self._panes[self.panes.selected_index][1]()

    def _code_pane(self) -> str:
        code = self.to_code()
        return (
            f'<div><textarea readonly aria-label="Python code" rows="{code.count(chr(10)) + 1}" '
            f'style="width:100%;box-sizing:border-box;{_MONO}">{html.escape(code)}</textarea>'
            f'<button onclick="{_COPY}">Copy to clipboard</button></div>'
        )

    def _export_pane(self) -> str:
        links = []
        for suffix, kind, make in (("json", "application/json", self.to_json), ("svg", "image/svg+xml", self.to_svg)):
            url = f"data:{kind};base64,{base64.b64encode(make().encode()).decode()}"
            name = f"bigkit-{type(self).__name__.removesuffix('Explorer').lower()}.{suffix}"
            links.append(f'<a style="text-decoration:underline" download="{name}" href="{url}">{name}</a>')
        return f"<p>Download {' or '.join(links)}.</p>"


def preformatted(text: str, wrap: bool = False) -> str:
    """Plain text as HTML that keeps its columns; lines that are too long scroll, or wrap."""
    style = f"{_MONO}-wrap" if wrap else f"{_MONO};overflow:auto"
    return f'<pre tabindex="0" style="{style}">{html.escape(text)}</pre>'


def pill(news: str, headline: str, rest: str = "", role: str = "status") -> str:
    """A line of news ("good", "slow" or "bad"), which a screen reader says when it changes."""
    ground, edge = PILLS[news]
    style = f"background:{ground};color:#111;border-left:4px solid {edge};padding:4px 10px;line-height:1.4"
    words = f"<b>{html.escape(headline)}</b> {html.escape(rest)}"
    return f'<div role="{role}" style="{style};white-space:normal">{words}</div>'


def short(text: str, length: int = 30) -> str:
    """A name cut to fit a `repr`.

    >>> short("a" * 40, 10)
    'aaaaaaaaa…'
    """
    return text if len(text) <= length else text[: length - 1] + "…"


def named(model: Source) -> tuple[str, dict[str, ModelSpec]]:
    """A name to show for a model, and its spec under that name if it was given as an object."""
    if isinstance(model, str):
        return model, {}
    spec = describe(model)
    return spec.name, {spec.name: spec}


def model_field(value: str) -> widgets.Combobox:
    """A text field for a model, with the shipped names as suggestions."""
    from .. import zoo

    return widgets.Combobox(
        value=value, options=zoo.names(), description="Model", continuous_update=False, ensure_option=False,
        placeholder="name, Hub id, URL or folder", style=WIDE, layout=widgets.Layout(width="100%"),
    )  # fmt: skip


def token_slider(value: int, none: bool) -> widgets.SelectionSlider:
    """A slider over context lengths, two steps an octave; `value` is among them, and 0 ("none") if wanted."""
    lengths = sorted({*TOKENS, value, *([0] if none else [])})
    return widgets.SelectionSlider(
        options=[(f"{n:,}" if n else "none", n) for n in lengths], value=value, description="Context",
        continuous_update=False, style=WIDE, layout=widgets.Layout(width="100%"),
    )  # fmt: skip


def number_field(kind: type[widgets.Widget], description: str, **options: Any) -> widgets.Widget:
    """A number with arrows or a slider, as wide as the column; it reports when the hand lets go."""
    layout = widgets.Layout(width="100%")
    return kind(description=description, continuous_update=False, style=WIDE, layout=layout, **options)


def menu(description: str, options: Sequence[Any], value: Any) -> widgets.Dropdown:
    """A list to choose from, as wide as the column.

    Raises:
        ValueError: `value` is not in the list.
    """
    if value not in options:
        raise ValueError(f"unknown {description.lower()} {value!r}: expected one of {', '.join(map(repr, options))}")
    layout = widgets.Layout(width="100%")
    return widgets.Dropdown(options=options, value=value, description=description, style=WIDE, layout=layout)
