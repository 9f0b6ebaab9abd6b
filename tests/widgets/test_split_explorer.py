"""The picture and the text of a split say what the shares are, and the explorer follows its controls."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigkit.distributed.shares import Shares
from bigkit.draw.canvas import WIDTH, Box
from bigkit.draw.shares import shares_figure, shares_label, shares_text
from bigkit.widgets import SplitExplorer
from bigkit.widgets._explorer import LONGEST_REPR


def count_boxes(split: Shares) -> dict[str, int]:
    """How many boxes of each kind are drawn; all lie inside the picture."""
    found: dict[str, int] = {}
    for box in shares_figure(split).shapes:
        assert isinstance(box, Box) and box.x + box.width <= WIDTH + 1e-6
        found[box.kind] = found.get(box.kind, 0) + 1
    return found


@settings(max_examples=40)
@given(st.integers(0, 64), st.integers(1, 16), st.booleans())
def test_every_turn_is_drawn(items: int, processes: int, padding: bool) -> None:
    split = Shares(items, processes, padding)
    drawn = count_boxes(split)
    assert drawn.get("items", 0) == 3 * items, "with its process, in gather, in gather_for_results"
    assert drawn.get("repeated", 0) == 2 * split.padded, "with its process, and in gather"
    assert drawn.get("idle", 0) == (split.idle if items else processes)
    text = shares_text(split)
    numbers = re.search(r"gather returns \d+: (.*)", text)
    assert numbers and [int(n) for n in re.findall(r"\d+", numbers[1])] == list(split.gathered)
    assert numbers[1].count("|") == processes - 1
    exact = re.search(r"gather_for_results returns \d+: (.*)", text)
    assert exact and [int(n) for n in exact[1].split()] == list(range(items))
    assert shares_label(split).count("gets") == processes


def looks(explorer: SplitExplorer) -> tuple[str, str, str, str]:
    return explorer.picture.value, explorer.text.value, explorer.verdict.value, repr(explorer)


def test_something_shows_and_each_control_turns_it() -> None:
    explorer = SplitExplorer()
    svg = ElementTree.fromstring(explorer.picture.value)
    assert svg.get("role") == "img" and "process 1 gets 2" in (svg.get("aria-label") or "")
    start = looks(explorer)
    for control, value in ((explorer.items, 5), (explorer.processes, 3), (explorer.padding, True)):
        before = looks(explorer)
        control.value = value
        assert all(one != other for one, other in zip(before, looks(explorer))), control.description
    assert repr(explorer) == "SplitExplorer(5 items on 3, padded: shares 2+2+2, gather 6, 2 turns, 0 idle)"
    explorer.buttons.children[0].click()
    assert looks(explorer) == start and explorer.preset.value == "3 prompts on 2"


def test_presets_and_their_name_follow_each_other() -> None:
    explorer = SplitExplorer()
    explorer.preset.value = "fewer prompts than processes"
    assert (explorer.items.value, explorer.processes.value, explorer.padding.value) == (3, 8, False)
    assert "5 of 8 processes have nothing to do" in explorer.verdict.value
    explorer.items.value = 4
    assert explorer.preset.value == "my own" and explorer.items.value == 4
    explorer.items.value, explorer.processes.value, explorer.padding.value = 3, 2, True
    assert explorer.preset.value == "3 prompts on 2, padded"


def test_reprs_are_short() -> None:
    for items in (0, 1, 64):
        for processes in (1, 16):
            assert len(repr(SplitExplorer(items, processes, True))) <= LONGEST_REPR
    assert repr(SplitExplorer(33, 8)).startswith(
        "SplitExplorer(33 items on 8: shares 5+4+4+4+4+4+4+4, gather 33, 5 turns"
    )


@pytest.mark.parametrize("wrong", [(65, 2), (-1, 2), (3, 0), (3, 17)])
def test_what_cannot_be_shown(wrong: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected 0 to 64 items and 1 to 16"):
        SplitExplorer(*wrong)


def test_code_and_export_give_the_same_split(tmp_path: Path) -> None:
    explorer = SplitExplorer(3, 2, True)
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(explorer.to_code(), scope)
    assert scope["shares"] == [([0, 1], [0, 1, 2]), ([2, 2], [0, 1, 2])]
    content = json.loads(explorer.export(tmp_path / "split.json").read_text())
    assert content["shares"] == [[0, 1], [2, 2]] and content["gather"] == [0, 1, 2, 2] and content["repeated"] == 1
    ElementTree.parse(explorer.export(tmp_path / "split.svg"))


def test_no_torch_is_needed() -> None:
    code = "import sys; from bigkit.widgets import SplitExplorer; SplitExplorer(5, 3); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
