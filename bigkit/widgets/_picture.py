"""The widget that shows a picture: with anywidget one that says what a hand does in it (`touch.js`), else plain HTML.

Leaves out: what follows from that; each explorer says it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import traitlets

TOUCH = Path(__file__).with_name("touch.js")
Touched: Any = None  # the class, where anywidget can be imported

try:
    import anywidget
except ImportError:
    pass
else:

    class Touched(anywidget.AnyWidget):  # type: ignore[no-redef]
        """SVG whose marks answer to a hand; `draggable` says whether they can be dragged."""

        _esm = TOUCH.read_text(encoding="utf-8")
        value = traitlets.Unicode().tag(sync=True)
        draggable = traitlets.Bool().tag(sync=True)


def picture_widget(does: Callable[[Mapping[str, Any]], None], draggable: bool) -> widgets.DOMWidget:
    """An empty picture; its `value` is SVG.

    Args:
        does: is called with what a hand did: its "kind" is "click", "drag" or "undo", the rest as `touch.js` says.
        draggable: whether parts can be dragged.
    """
    if Touched is None:
        return widgets.HTML()
    picture = Touched(draggable=draggable)
    picture.on_msg(lambda _, content, buffers: does(content))
    return picture
