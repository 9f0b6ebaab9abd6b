"""`check` of the course: no answer, a right one, and how far off a wrong one is, without what is right."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from bigkit.course import check


@pytest.mark.parametrize(
    ("answer", "right", "said"),
    [
        (None, 42, "not answered yet"),
        ([3, None], [3, 4], "not answered yet"),
        (42, 42, "right"),
        (41.7, 42, "right"),
        ("14 GiB", 14 * 2**30, "right"),
        ("14 GB", 14 * 2**30, "not yet: 6.87 % too small"),
        (30, 40, "not yet: 25.0 % too small"),
        (400, 40, "not yet: 10.0 times too large"),
        (4, 40, "not yet: 10.0 times too small"),
        (0, 40, "not yet: not near"),
        (-40, 40, "not yet: not near"),
        (3, 0, "not yet: not near"),
        (0, 0, "right"),
        ("RAM", "RAM", "right"),
        ("disk", "RAM", "not yet"),
        (True, False, "not yet"),
        ((1, "RAM"), [1, "RAM"], "right"),
        ([1, "disk"], [1, "RAM"], "not yet: 1 of 2 are right"),
        ([1], [1, "RAM"], "not yet: 1 of 2 are right"),
        (7, [1, 2], "not yet: expected a list of 2, not 7"),
        ([7], 7, "not yet: expected a number, not [7]"),
    ],
)
def test_check_says(answer: Any, right: Any, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(answer, right) is None
    assert capsys.readouterr().out == said + "\n"


def test_within_is_a_share_of_what_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    check(45, 50, within=0.1)
    check(44, 50, within=0.1)
    assert capsys.readouterr().out == "right\nnot yet: 12.0 % too small\n"


def test_what_is_right_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = random.Random(0)
    for _ in range(200):
        right = numbers.randrange(10_000, 10**12)
        check(right * numbers.uniform(0.01, 0.9), right)
        said = re.sub(r"[,.]", "", capsys.readouterr().out)
        assert str(right) not in said and said.startswith("not yet: ")


def test_an_answer_that_is_no_size_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    check("a lot", 42)
    said = capsys.readouterr().out
    assert said.startswith("not yet: 'a lot' is no size") and said.count("\n") == 1
