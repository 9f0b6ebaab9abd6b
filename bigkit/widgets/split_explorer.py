"""`SplitExplorer`: which process gets which items, what gather returns, and who waits.

Leaves out: the processes; the arithmetic is enough. Each item is taken to need the same time.
"""

from __future__ import annotations

import json

import ipywidgets as widgets

from ..distributed.shares import Shares
from ..draw.canvas import shares_figure, shares_label, shares_text, svg
from ._explorer import LONGEST_REPR, WIDE, Explorer, menu, number_field, pill, preformatted

MOST_ITEMS, MOST_PROCESSES = 64, 16
OWN = "my own"
PRESETS = {
    "3 prompts on 2": (3, 2, False),
    "3 prompts on 2, padded": (3, 2, True),
    "fewer prompts than processes": (3, 8, False),
    "nothing wasted": (32, 8, False),
    "one too many": (33, 8, False),
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

    def __init__(self, items: int = 3, processes: int = 2, padding: bool = False) -> None:
        if not (0 <= items <= MOST_ITEMS and 1 <= processes <= MOST_PROCESSES):
            raise ValueError(f"cannot show {items} items on {processes} processes: expected 0 to {MOST_ITEMS} items "
                             f"and 1 to {MOST_PROCESSES} processes")  # fmt: skip
        self.split = Shares(items, processes, padding)
        self.preset = menu("Preset", [OWN, *PRESETS], self._preset_of(items, processes, padding))
        self.items = number_field(widgets.IntSlider, "Items", value=items, min=0, max=MOST_ITEMS)
        self.processes = number_field(widgets.IntSlider, "Processes", value=processes, min=1, max=MOST_PROCESSES)
        for slider in (self.items, self.processes):
            slider.continuous_update = True  # a redraw is cheap
        self.items.add_class("bigkit-items-slider")
        self.padding = widgets.Checkbox(value=padding, description="apply_padding", style=WIDE)
        self.steering = (self.preset,)
        self.preset.observe(self._take_preset, "value")
        super().__init__(
            [("Start from", [self.preset]), ("Split", [self.items, self.processes, self.padding])],
            [],
        )

    @staticmethod
    def _preset_of(*values: object) -> str:
        return next((name for name, preset in PRESETS.items() if preset == values), OWN)

    def _take_preset(self, change: object) -> None:
        if self.preset.value in PRESETS:
            with self.together():
                self.items.value, self.processes.value, self.padding.value = PRESETS[self.preset.value]

    def compute(self) -> None:
        """Split as the controls say."""
        values = (self.items.value, self.processes.value, self.padding.value)
        self.split = Shares(*values)
        self.preset.value = self._preset_of(*values)

    def show(self) -> None:
        """Show the split."""
        split = self.split
        turns = split.rounds * split.processes
        used = f"{100 * split.items / turns:.0f} %" if turns else "none"
        said = [f"{split.speedup:.2f} times as fast as one process; {used} of the turns are used."]
        if split.padded:
            said.append(f"{split.padded} of {len(split.gathered)} results are repeats, which gather_for_results drops.")
        if empty := sum(not part for part in split.parts):
            said.append(f"{empty} of {split.processes} processes have nothing to do.")
        news = "good" if split.rounds * split.processes == split.items else "slow"
        self.verdict.value = pill(news, f"{_turns(split)} instead of {split.items}.", " ".join(said))
        self.picture.value = svg(shares_figure(split), shares_label(split))
        self.text.value = preformatted(shares_text(split), wrap=True)

    def to_code(self) -> str:
        """Python that splits the same way, with real processes."""
        split = self.split
        return (
            "from bigkit import PartialState, gather_for_results, notebook_launcher\n\n\n"
            "def work(items):\n"
            "    state = PartialState(cpu=True)\n"
            f"    with state.split_between_processes(items, apply_padding={split.padding}) as mine:\n"
            "        results = list(mine)  # your model here\n"
            "    return mine, gather_for_results(results, len(items))\n\n\n"
            f"shares = notebook_launcher(work, (list(range({split.items})),), num_processes={split.processes})\n"
        )

    def to_json(self) -> str:
        """The split as JSON text: who gets which positions."""
        split = self.split
        content = {
            "items": split.items, "processes": split.processes, "apply_padding": split.padding,
            "shares": [list(part) for part in split.parts], "gather": list(split.gathered), "turns": split.rounds,
            "idle": split.idle, "repeated": split.padded,
        }  # fmt: skip
        return json.dumps(content, indent=2) + "\n"

    def __repr__(self) -> str:
        split = self.split
        head = f"SplitExplorer({split.items} items on {split.processes}{', padded' if split.padding else ''}: "
        lengths = "+".join(str(len(part)) for part in split.parts)
        tail = f"gather {len(split.gathered)}, {_turns(split)}, {split.idle} idle)"
        whole = f"{head}shares {lengths}, {tail}"
        return whole if len(whole) <= LONGEST_REPR else head + tail


def _turns(split: Shares) -> str:
    return f"{split.rounds} turn{'' if split.rounds == 1 else 's'}"
