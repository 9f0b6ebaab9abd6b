"""The arithmetic of shares: contiguous, even and complete, by hypothesis."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigkit.distributed.shares import Shares, share


@given(st.integers(0, 200), st.integers(1, 40))
def test_shares_are_contiguous_even_and_complete(items: int, processes: int) -> None:
    parts = [share(items, processes, process) for process in range(processes)]
    assert [position for part in parts for position in part] == list(range(items))
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1 and lengths == sorted(lengths, reverse=True)


@given(st.integers(0, 60), st.integers(1, 20), st.booleans())
def test_shares_as_data(items: int, processes: int, padding: bool) -> None:
    split = Shares(items, processes, padding)
    assert sorted(set(split.gathered)) == list(range(items))
    assert len(split.gathered) - split.padded == items and split.rounds == max(map(len, split.parts))
    if padding:
        assert split.idle == 0 and len(set(map(len, split.parts))) == 1
    else:
        assert split.padded == 0 and split.gathered == tuple(range(items))
    assert split.rounds * processes == items + split.padded + split.idle
    assert split.speedup <= processes


@pytest.mark.parametrize("wrong", [(-1, 2, 0), (3, 0, 0), (3, 2, 2), (3, 2, -1)])
def test_no_share_of_what_does_not_exist(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected zero or more items"):
        share(*wrong)
