"""Explorers: ipywidgets panels that turn a question about memory, files or time with sliders.

An explorer is a function from the values of its controls to a result, and from the result to a verdict, a picture and a
text that says the same. By hand:

    size = widgets.FloatSlider(10, min=0, max=24, description="GPU 0, GiB")
    picture = widgets.HTML()

    def follow(change=None):
        p = bigkit.plan("llama-2-7b", {0: f"{size.value}GiB", "cpu": "64GiB"}, strict=False)
        picture.value = plan_figure(p).svg

    size.observe(follow, "value")
    follow()
    widgets.VBox([size, picture])

`_explorer.py` adds what all of them share: groups of controls, presets, a sentence for an error, Reset, Undo, Compare,
the state as one line of text, the Python code of what is shown, export as JSON and SVG, and a short `repr`, which is
what tests of notebooks compare. `touch.js` lets a picture answer to a hand; it needs no Jupyter.

In the order of the course:

    fit_explorer        which model, which machine: does it fit, and how fast is it
    plan_explorer       which layer rests on which device
    shard_explorer      into which files a checkpoint is cut
    hook_theatre        a real forward of a small spread-out model, step by step
    quantization_lab    what fewer bits do to a layer's weights and outputs
    split_explorer      which process gets which items
    dryrun_explorer     a run on GPUs that you do not have
    expert_explorer     which experts a mixture chooses, and what a cache of some is worth

Each is imported when it is first used, so that `import bigkit.widgets` is cheap. ipywidgets 7.7 (Colab) or 8; without
anywidget pictures have only their tooltips.
Leaves out: the pictures (`draw/`) and whatever they show; an explorer only asks for them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .. import _say_missing

if TYPE_CHECKING:  # for editors and type checkers
    from .dryrun_explorer import DryRunExplorer as DryRunExplorer
    from .expert_explorer import ExpertExplorer as ExpertExplorer
    from .fit_explorer import FitExplorer as FitExplorer
    from .hook_theatre import HookTheatre as HookTheatre
    from .plan_explorer import PlanExplorer as PlanExplorer
    from .quantization_lab import QuantizationLab as QuantizationLab
    from .shard_explorer import ShardExplorer as ShardExplorer
    from .split_explorer import SplitExplorer as SplitExplorer

_FILES = {
    "DryRunExplorer": "dryrun_explorer", "ExpertExplorer": "expert_explorer", "FitExplorer": "fit_explorer",
    "HookTheatre": "hook_theatre", "PlanExplorer": "plan_explorer",
    "QuantizationLab": "quantization_lab", "ShardExplorer": "shard_explorer", "SplitExplorer": "split_explorer",
}  # fmt: skip
__all__ = [*_FILES]


def __getattr__(name: str) -> object:
    if name in _FILES:
        try:
            return getattr(import_module(f".{_FILES[name]}", __name__), name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(_say_missing(error, f"widgets.{name}"), name=error.name) from error
    raise AttributeError(f"module 'bigkit.widgets' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
