"""Exercises of the course: `check` compares a reader's answer with what bigkit computes, and does not give it away."""

from __future__ import annotations

from numbers import Real
from typing import Any

from .units import parse_bytes, three_figures


def check(answer: Any, right: Any, within: float = 0.01) -> None:
    """Print "not answered yet", "right", or how far off an answer is; whatever the answer, nothing is raised.

    Args:
        answer: the reader's; None as long as there is none. For a number of bytes also a text such as "14 GiB".
        right: the right answer: a number, a text, or a list or tuple of these.
        within: how far from a right number still counts as right, as a share of it.

    >>> check(None, 42), check("10 GiB", 10 * 2**30), check(30, 40), check([1, 2, 5], [1, 2, 3])  # doctest: +ELLIPSIS
    not answered yet
    right
    not yet: 25.0 % too small
    not yet: 2 of 3 are right
    (None, ...)
    """
    try:
        print(_verdict(answer, right, within))
    except ValueError as error:  # a text that is no size
        print(f"not yet: {error}")
    except TypeError:
        kind = f"a list of {len(right)}" if isinstance(right, (list, tuple)) else "a number"
        print(f"not yet: expected {kind}, not {answer!r}")


def _verdict(answer: Any, right: Any, within: float) -> str:
    several = isinstance(right, (list, tuple))
    if answer is None or (several and isinstance(answer, (list, tuple)) and None in answer):
        return "not answered yet"
    if several:
        good = [_verdict(*pair, within) == "right" for pair in zip(answer, right)]
        return "right" if all(good) and len(answer) == len(right) else f"not yet: {sum(good)} of {len(right)} are right"
    if not isinstance(right, Real) or isinstance(right, bool):
        return "right" if answer == right else "not yet"
    number, wanted = float(parse_bytes(answer) if isinstance(answer, str) else answer), float(right)
    if abs(number - wanted) <= within * abs(wanted):
        return "right"
    times = number / wanted if wanted else 0.0
    if times <= 0:
        return "not yet: not near"
    far = f"{three_figures(max(times, 1 / times))} times"
    if 0.5 <= times <= 2:
        far = f"{three_figures(100 * abs(times - 1))} %"
    return f"not yet: {far} too {'large' if times > 1 else 'small'}"
