"""`SplitExplorer`: which process gets which items, what gather returns, and who waits.

Leaves out: the processes; the arithmetic is enough. Each item is taken to need the same time.
"""

from __future__ import annotations

from typing import Any

import ipywidgets as widgets

from ..distributed.shares import Shares
from ..draw.shares import shares_figure, shares_text
from ..units import counted
from ._controls import field
from ._explorer import Explorer
from ._html import pill

MOST_ITEMS, MOST_PROCESSES = 64, 16
PRESETS = {
    "3 prompts on 2": {"items": 3, "processes": 2, "padding": False},
    "3 prompts on 2, padded": {"items": 3, "processes": 2, "padding": True},
    "fewer prompts than processes": {"items": 3, "processes": 8, "padding": False},
    "nothing wasted": {"items": 32, "processes": 8, "padding": False},
    "one too many": {"items": 33, "processes": 8, "padding": False},
}


class SplitExplorer(Explorer):
    """Split items between processes, and see who gets what as their numbers change.

    The controls are `preset`, `items`, `processes` and `padding`; set their `value` in code or by hand. `split` is the
    `Shares` that is shown.

    Args:
        items: how many, 0 to 64.
        processes: how many share them, 1 to 16.
        padding: repeat the last item until all shares are equally long.

    Raises:
        ValueError: more items or processes than can be shown, or no process.

    >>> explorer = SplitExplorer(3, 2)
    >>> explorer.padding.value = True
    >>> explorer
    SplitExplorer(3 items on 2, padded: shares 2+2, gather 4, 2 turns, 0 idle)
    """

    presets = PRESETS

    def __init__(self, items: int = 3, processes: int = 2, padding: bool = False) -> None:
        if not (0 <= items <= MOST_ITEMS and 1 <= processes <= MOST_PROCESSES):
            raise ValueError(f"cannot show {items} items on {processes} processes: expected 0 to {MOST_ITEMS} items "
                             f"and 1 to {MOST_PROCESSES} processes")  # fmt: skip
        limits = {"min": 0, "max": MOST_ITEMS, "continuous_update": True}  # a redraw is cheap
        super().__init__(
            {
                "Start from": {"preset": self.preset_menu("Preset")},
                "Split": {
                    "items": field(widgets.IntSlider, "Items", items, **limits).add_class("bigkit-items-slider"),
                    "processes": field(
                        widgets.IntSlider, "Processes", processes, **{**limits, "min": 1, "max": MOST_PROCESSES}
                    ),
                    "padding": field(widgets.Checkbox, "apply_padding", padding, indent=False),
                },
            }
        )

    split = property(lambda self: self.shown)

    def compute(self) -> Shares:
        return Shares(self.items.value, self.processes.value, self.padding.value)

    def show(self, split: Shares) -> None:
        turns = split.rounds * split.processes
        used = f"{100 * split.items / turns:.0f} %" if turns else "none"
        facts = [f"{split.speedup:.2f} times as fast as one process; {used} of the turns are used."]
        if split.padded:
            count = len(split.gathered)
            facts.append(f"{split.padded} of {count} results are repeats, which gather_for_results drops.")
        if empty := sum(not part for part in split.parts):
            facts.append(f"{empty} of {split.processes} processes have nothing to do.")
        news = "good" if turns == split.items else "slow"
        verdict = pill(news, f"{counted(split.rounds, 'turn')} instead of {split.items}.", " ".join(facts))
        self.put(verdict, shares_figure(split), shares_text(split), wrap=True)

    def to_code(self) -> str:
        split = self.shown
        return (
            "from bigkit import PartialState, gather_for_results, notebook_launcher\n\n\n"
            "def work(items):\n"
            "    state = PartialState(cpu=True)\n"
            f"    with state.split_between_processes(items, apply_padding={split.padding}) as mine:\n"
            "        results = list(mine)  # your model here\n"
            "    return mine, gather_for_results(results, len(items))\n\n\n"
            f"shares = notebook_launcher(work, (list(range({split.items})),), num_processes={split.processes})\n"
        )

    def content(self) -> dict[str, Any]:
        split = self.shown
        return {
            "items": split.items, "processes": split.processes, "apply_padding": split.padding,
            "shares": [list(part) for part in split.parts], "gather": list(split.gathered), "turns": split.rounds,
            "idle": split.idle, "repeated": split.padded,
        }  # fmt: skip

    def summary(self, split: Shares) -> list[str]:
        """The items and processes, the length of each share if there is room, and how many turns it takes."""
        head = f"{split.items} items on {split.processes}{', padded' if split.padding else ''}: "
        lengths = "+".join(str(len(part)) for part in split.parts)
        tail = f"gather {len(split.gathered)}, {counted(split.rounds, 'turn')}, {split.idle} idle"
        return [f"{head}shares {lengths}, {tail}", head + tail]
