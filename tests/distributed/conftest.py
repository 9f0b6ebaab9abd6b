"""Groups of 1, 2, 3 and 8 processes, started once for all tests that leave them as they are."""

from collections.abc import Iterator

import pytest

from tests.ranks import Ranks

WORLDS = (1, 2, 3, pytest.param(8, marks=pytest.mark.soak))


@pytest.fixture(scope="session", params=WORLDS)
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    group = Ranks(request.param)
    yield group
    group.close()


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    group = Ranks(2)
    yield group
    group.close()


@pytest.fixture(scope="session")
def three() -> Iterator[Ranks]:
    group = Ranks(3)
    yield group
    group.close()
