"""The long form of a test: one check for every name of a long list, and a table of what came of it."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable


def check_every(names: Iterable[str], check: Callable[[str], str], left_out: type[Exception] | tuple[()] = ()) -> None:
    """Check each name, print how many have which verdict, and fail with all that is wrong.

    Args:
        names: what to check.
        check: name -> a verdict; what follows a colon in it is printed beside the name.
        left_out: what `check` raises if there is nothing to check; its first words are counted.
    """
    counts: collections.Counter[str] = collections.Counter()
    told, faults = [], []
    for name in names:
        try:
            verdict = check(name)
            counts[verdict.partition(":")[0]] += 1
            told += [f"{name}: {verdict}"] * (":" in verdict)
        except left_out as error:
            counts["not made: " + str(error).partition(":")[0]] += 1
        except Exception as error:
            counts["wrong"] += 1
            faults.append(f"{name}: {type(error).__name__}: {error}")
    print("\n".join([*told, *(f"{count:4} {what}" for what, count in counts.most_common())]))
    assert not faults, "\n".join(faults)
