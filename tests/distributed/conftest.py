"""Groups of 1, 2, 3 and 8 processes, and of others that a test asks for, started once for all that leave them so."""

from collections.abc import Callable, Iterator
from functools import cache

import pytest

from tests.ranks import Ranks

WORLDS = (1, 2, 3, pytest.param(8, marks=pytest.mark.soak))


@pytest.fixture(scope="session")
def group() -> Iterator[Callable[[int], Ranks]]:
    """Size -> the group of that size."""
    started: list[Ranks] = []

    @cache
    def start(size: int) -> Ranks:
        started.append(Ranks(size))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture(scope="session", params=WORLDS)
def ranks(request: pytest.FixtureRequest, group: Callable[[int], Ranks]) -> Ranks:
    return group(request.param)


@pytest.fixture(scope="session")
def two(group: Callable[[int], Ranks]) -> Ranks:
    return group(2)


@pytest.fixture(scope="session")
def three(group: Callable[[int], Ranks]) -> Ranks:
    return group(3)
