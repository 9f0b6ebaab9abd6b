"""All explorers as one page without code: `python -m bigkit.widgets.app`, or `App()` in a notebook.

The page is the notebook beside this file, shown by Voilà, which gives each visitor a Python of their own. Options go on
to Voilà: `--port 8080 --no-browser`, and `--Voila.base_url=/some/prefix/` behind a JupyterHub or a proxy.

Leaves out: the explorers. An explorer is made when its tab is first opened.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from . import __getattr__ as _explorer

PAGE = Path(__file__).with_name("app.ipynb")
TABS = {  # what a tab answers -> the explorer
    "Does it fit?": "FitExplorer",
    "Who holds what?": "PlanExplorer",
    "How is it cut into files?": "ShardExplorer",
    "Watch it move": "HookTheatre",
    "What do fewer bits do?": "QuantizationLab",
    "Which experts work?": "ExpertExplorer",
    "Who gets which prompt?": "SplitExplorer",
    "Rehearse a run": "DryRunExplorer",
}
# Titles as wide as their words, in as many rows as it takes.
_STYLE = """<style>
.bigkit-app .lm-TabBar-content, .bigkit-app .p-TabBar-content { flex-wrap: wrap; }
.bigkit-app .lm-TabBar-tab, .bigkit-app .p-TabBar-tab { flex: 0 0 auto !important; max-width: none !important; }
</style>"""


class App(widgets.VBox):
    """The explorers, each under the question that it answers.

    `tabs` is the row of tabs: set its `selected_index` to open one, as a click does.

    >>> app = App()
    >>> app.tabs.selected_index = [*TABS].index("Who gets which prompt?")
    >>> app
    App(Who gets which prompt? SplitExplorer(3 items on 2: shares 2+1, gather 3, 2 turns, 1 idle))
    """

    def __init__(self) -> None:
        self.tabs = widgets.Tab([widgets.VBox() for _ in TABS], selected_index=0)
        for i, title in enumerate(TABS):
            self.tabs.set_title(i, title)
        self.tabs.observe(lambda _: self._open(), "selected_index")
        super().__init__([widgets.HTML(_STYLE, layout=widgets.Layout(display="none")), self.tabs])
        self.add_class("bigkit-app")
        self._open()

    @property
    def box(self) -> widgets.VBox:
        """What the open tab holds."""
        return self.tabs.children[self.tabs.selected_index or 0]

    def _open(self) -> None:
        """Make the explorer of the open tab, unless it is there."""
        if not self.box.children:
            self.box.children = [widgets.HTML("<p role='status'>One moment …</p>")]
            make: Any = _explorer([*TABS.values()][self.tabs.selected_index or 0])
            self.box.children = [make()]

    def __repr__(self) -> str:
        return f"App({[*TABS][self.tabs.selected_index or 0]} {self.box.children[0]!r})"


def main() -> None:
    """Show the page with Voilà, which takes the place of this process."""
    options = [] if os.environ.get("DISPLAY") or not sys.platform.startswith("linux") else ["--no-browser"]
    if find_spec("voila") is None:
        sys.exit("the page needs Voilà, which is not installed: pip install 'bigkit[torch,app]'")
    os.execv(sys.executable, [sys.executable, "-m", "voila", str(PAGE), *options, *sys.argv[1:]])


if __name__ == "__main__":
    main()
