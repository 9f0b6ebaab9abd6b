"""Diagrams of the course, continued: a model that is loaded, run, stored in fewer bits, and shared by processes.

Each picture is a function without arguments, drawn with the vocabulary of `diagrams`.
"""

from __future__ import annotations

from .colours import BLUE, ORANGE, WHITE
from .diagrams import Diagram


def hook() -> Diagram:
    """What a hook adds around a layer's forward (notebook 06)."""
    d = Diagram(
        "Calling a module: before, forward, after",
        "model(x) calls pre_forward, which may replace the inputs, then forward, then post_forward, which may replace "
        "the output; if forward raises, only the hooks that were asked to always run are called.",
    )
    call = d.block(12, 44, 76, 40, "module(x)", WHITE)
    before = d.block(128, 44, 96, 40, "pre_forward\nthe hook", ORANGE)
    forward = d.block(264, 44, 96, 40, "forward\nthe layer", BLUE)
    after = d.block(400, 44, 96, 40, "post_forward\nthe hook", ORANGE)
    d.arrow(call.right, before.left, text="x")
    d.arrow(before.right, forward.left, text="x′")
    d.arrow(forward.right, after.left, text="y")
    d.arrow(after.bottom, (after.bottom[0], 112), (call.bottom[0], 112), call.bottom, text="y′, the result of the call")
    return d
