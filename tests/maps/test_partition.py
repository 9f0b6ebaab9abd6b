"""Cutting a chain: against brute force on every small case that hypothesis thinks of."""

from fractions import Fraction
from itertools import combinations_with_replacement

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigkit.maps.partition import Chain, last_true

NEEDS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 40)), min_size=1, max_size=7)
ROOMS = st.lists(st.integers(-3, 60), min_size=1, max_size=4)


def cuts(needs, rooms):
    """Every way to cut the chain so that each stretch fits its room, as lists of loads."""
    for inner in combinations_with_replacement(range(len(needs) + 1), len(rooms) - 1):
        edges = [0, *inner, len(needs)]
        loads = [sum(needs[a:b]) for a, b in zip(edges, edges[1:])]
        if all(a == b or load <= room for a, b, load, room in zip(edges, edges[1:], loads, rooms)):
            yield loads


def fullest(loads, rooms):
    return max(Fraction(load, room) if room > 0 else Fraction(0) for load, room in zip(loads, rooms))


def stretches(chain, ends):
    return [chain.load(a, b) for a, b in zip([0, *ends[:-1]], ends)]


def check_reach(needs, rooms):
    """The walk gets to the end exactly when some cut fits."""
    chain = Chain(needs)
    possible = next(cuts(needs, rooms), None) is not None
    assert (chain.reach(rooms)[-1] == len(needs)) == possible
    assert (chain.reach_back(rooms)[0] == 0) == possible


def check_balance(needs, rooms):
    """The fullest room is as empty as the best of all cuts makes it."""
    best = min((fullest(loads, rooms) for loads in cuts(needs, rooms)), default=None)
    if best is None:
        return
    chain = Chain(needs)
    ends = chain.balance(rooms)
    loads = stretches(chain, ends)
    assert ends == sorted(ends) and ends[-1] == len(needs)
    assert all(load <= max(room, 0) for load, room in zip(loads, rooms))
    assert fullest(loads, rooms) == best


@pytest.mark.parametrize("check", [check_reach, check_balance])
@settings(max_examples=200)
@given(needs=NEEDS, rooms=ROOMS)
def test_against_every_cut(check, needs, rooms):
    check(needs, rooms)


@pytest.mark.soak
@pytest.mark.parametrize("check", [check_reach, check_balance])
@settings(max_examples=3000)
@given(needs=NEEDS, rooms=ROOMS)
def test_against_every_cut_thousands_of_times(check, needs, rooms):
    check(needs, rooms)


def test_balance_evens_out_what_the_fullest_room_leaves_open():
    chain = Chain([10] * 32)
    assert sorted(stretches(chain, chain.balance([100] * 5))) == [60, 60, 60, 70, 70]
    chain = Chain([50, *[10] * 10])
    assert min(stretches(chain, chain.balance([75] * 8))) == 10  # no room stays empty


def test_huge_chains_stay_exact():
    needs = [2**50 + i for i in range(12)]
    chain = Chain(needs)
    loads = stretches(chain, chain.balance([2**54] * 3))
    assert max(loads) == min(max(each) for each in cuts(needs, [2**54] * 3))


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 1000))
def test_last_true(low, width, limit):
    assert last_true(lambda n: n <= max(limit, low), low, low + width) == min(max(limit, low), low + width)
