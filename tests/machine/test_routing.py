"""What caches of experts hold: each policy against its definition, the best one against every possible way."""

import json
from collections import Counter, OrderedDict
from functools import cache
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigkit import describe
from bigkit.machine.routing import POLICIES, Routing


@st.composite
def routings(draw, most_layers=3, most_experts=4, most_tokens=8):
    layers, experts = draw(st.integers(1, most_layers)), draw(st.integers(1, most_experts))
    tokens, few = draw(st.integers(1, most_tokens)), draw(st.integers(1, experts))
    choice = st.permutations(range(experts)).map(lambda order: tuple(order[:few]))
    layer = st.lists(choice, min_size=tokens, max_size=tokens).map(tuple)
    return Routing("drawn", experts, tuple(draw(st.lists(layer, min_size=layers, max_size=layers))))


def lru(groups, slots):
    cache, hits = OrderedDict(), []
    for group in groups:
        hits += [expert in cache for expert in group]
        for expert in group:
            cache[expert] = None
            cache.move_to_end(expert)
        while len(cache) > slots:
            cache.popitem(last=False)
    return hits, set(cache)


def static(groups, slots):
    often = [expert for expert, _ in Counter(expert for group in groups for expert in group).most_common(slots)]
    seen, hits = set(), []
    for group in groups:
        hits += [expert in often and expert in seen for expert in group]
        seen |= {*group}
    return hits, set(often) & seen


def most_hits(groups, slots):
    """By trying every way: of what was kept and what comes, keep any."""

    @cache
    def most(i, kept):
        if i == len(groups):
            return 0
        there = kept | {*groups[i]}
        ways = combinations(sorted(there), min(slots, len(there)))
        return len(kept.intersection(groups[i])) + max(most(i + 1, frozenset(way)) for way in ways)

    return most(0, frozenset())


@given(routings(), st.data())
def test_lru_and_static_as_by_hand(routing, data):
    slots = data.draw(st.integers(0, routing.all_experts))
    groups, last = routing.groups(), routing.tokens - 1
    for policy, by_hand in (("LRU", lru), ("static", static)):
        hits, kept = by_hand(groups, slots)
        assert routing.hits(policy, slots) == tuple(hits)
        assert routing.kept(policy, slots, last) == kept
    assert not any(routing.hits("none", slots)) and not routing.kept("none", slots, last)


@given(routings(most_layers=2, most_experts=3, most_tokens=5), st.data())
def test_best_is_what_no_way_beats(routing, data):
    slots = data.draw(st.integers(0, routing.all_experts))
    assert sum(routing.hits("best", slots)) == most_hits(routing.groups(), slots)


@given(routings(), st.data())
def test_what_must_hold_for_every_policy(routing, data):
    slots = data.draw(st.integers(0, routing.all_experts))
    token = data.draw(st.integers(0, routing.tokens - 1))
    requests, distinct = routing.requests(), len(set(routing.requests()))
    assert len(requests) == routing.tokens * routing.layers * routing.per_token
    for policy in POLICIES:
        hits, kept = routing.hits(policy, slots), routing.kept(policy, slots, token)
        assert sum(hits) <= sum(routing.hits("best", slots))
        assert len(kept) <= slots
        if slots < routing.all_experts:
            assert sum(hits) <= sum(routing.hits(policy, slots + 1))
            assert kept <= routing.kept(policy, slots + 1, token)
        if policy != "none":
            assert sum(routing.hits(policy, routing.all_experts)) == len(requests) - distinct
        if token:  # what a request finds is what was kept before its token, or was brought for this token
            before = routing.kept(policy, slots, token - 1)
            start = token * routing.layers * routing.per_token
            for i in range(start, start + routing.per_token):
                assert hits[i] == (requests[i] in before)
    assert sum(map(sum, routing.counts)) == len(requests)
    assert Routing.from_json(routing.to_json()) == routing


def test_bytes_per_token(tmp_path):
    routing = Routing("m", 4, (((0, 1), (0, 2), (0, 1)), ((3, 2), (3, 2), (3, 2))), ("a", "<", "\n"))
    assert routing.bytes_per_token("none", 0, 10) == 40
    assert routing.bytes_per_token("LRU", 8, 10) == pytest.approx(10 * 5 / 3), "five experts once each, of 3 tokens"
    routing.save(tmp_path / "routing.json")
    assert Routing.load(tmp_path / "routing.json") == routing
    assert repr(routing) == "Routing(m: 3 tokens, 2 layers, 2 of 4 experts)"


ONE = (((0, 1),),)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Routing("m", 2, (((0, 1, 2),),)), "a token of m takes 3 experts, but a layer has 2"),
        (lambda: Routing("m", 4, ()), "at least one layer"),
        (lambda: Routing("m", 4, ((),)), "at least one layer, one token"),
        (lambda: Routing("m", 4, (((0, 4),),)), "not among experts 0 to 3"),
        (lambda: Routing("m", 4, (((0, 0),),)), "not 2 different experts"),
        (lambda: Routing("m", 4, (((0, 1), (2,)),)), "not 2 different experts"),
        (lambda: Routing("m", 4, (((0, 1),), ((0, 1), (2, 3)))), r"differ in tokens: \[1, 2\]"),
        (lambda: Routing("m", 4, ONE, ("a", "b")), r"differ in tokens: \[1, 2\]"),
        (lambda: Routing("m", 4, ONE).hits("LFU", 1), "unknown policy 'LFU': expected one of 'none', 'static', 'LRU'"),
        (lambda: Routing("m", 4, ONE).hits("LRU", 5), "a cache of 5 experts: m has 4 .* expected 0 to that many"),
        (lambda: Routing("m", 4, ONE).kept("LRU", -1, 0), "a cache of -1 experts"),
        (lambda: Routing("m", 4, ONE).bytes_each(describe("mixtral-8x7b")),
         r"recorded from m \(1 layer, 2 of 4 experts\), and mixtral-8x7b has 32 layers, 2 of 8 experts"),
        (lambda: Routing("m", 4, ONE).bytes_each(describe("gpt2")), "and gpt2 has no experts"),
        (lambda: Routing.from_json("[]"), "no recorded routing"),
        (lambda: Routing.from_json("{"), "no recorded routing"),
        (lambda: Routing.from_json(json.dumps({"format": 2})), "reads format 1"),
        (lambda: Routing.from_json(json.dumps({"format": 1, "model": "m"})), "no recorded routing"),
    ],
)  # fmt: skip
def test_errors_are_a_sentence(make, said):
    with pytest.raises(ValueError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)
