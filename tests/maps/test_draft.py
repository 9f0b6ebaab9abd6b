"""A draft's room in a plan, and what it brings: against the formula of the paper and against a count by chance."""

import random

import pytest

import bigkit
from bigkit.maps.draft import best_guesses, expected_tokens


@pytest.mark.parametrize("acceptance, guesses", [(0.0, 4), (0.3, 1), (0.8, 5), (1.0, 7)])
def test_expected_tokens(acceptance, guesses):
    if acceptance < 1:
        assert expected_tokens(acceptance, guesses) == pytest.approx(
            (1 - acceptance ** (guesses + 1)) / (1 - acceptance)
        )
    chance, total = random.Random(0), 0
    for _ in range(20_000):
        total += 1
        for _ in range(guesses):
            if chance.random() >= acceptance:
                break
            total += 1
    assert total / 20_000 == pytest.approx(expected_tokens(acceptance, guesses), rel=0.03)


def test_how_many_guesses():
    assert best_guesses(0.8, 0.2, lambda tokens: 0.2 * tokens, 0.01).guesses == 0  # a pass that costs by the token
    flat = best_guesses(0.8, 0.2, lambda tokens: 0.2, 0.01)
    assert flat.seconds < 0.2 / 3 and best_guesses(0.8, 0.2, lambda tokens: 0.2, 0.1).guesses < flat.guesses
    with pytest.raises(ValueError, match="from 0 to 1"):
        expected_tokens(1.5, 3)


def test_a_plan_keeps_room():
    alone = bigkit.plan("llama-2-7b", {0: "10GiB", "cpu": "32GiB"}, dtype="float16", context=1024)
    beside = bigkit.plan("llama-2-7b", {0: "10GiB", "cpu": "32GiB"}, dtype="float16", context=1024, draft="gpt2")
    assert beside.shares[0].budget < alone.shares[0].budget and beside.shares[0].weights < alone.shares[0].weights
    assert alone.shares[0].budget - beside.shares[0].budget > bigkit.zoo.describe("gpt2").bytes(
        bigkit.Precision("float16")
    )
    assert "stays free for the draft gpt2" in beside.explain()


def test_advice_with_a_draft():
    plain = bigkit.advise("llama-2-70b", "RTX 4090")
    advice = bigkit.advise("llama-2-70b", "RTX 4090", draft="gpt2", acceptance=0.8)
    assert plain.best.speculation is None and "with the draft" not in plain.explain()
    best = advice.best.speculation
    assert best.tokens == pytest.approx(expected_tokens(0.8, best.guesses)) and best.seconds < advice.best.token / 2
    assert "with the draft" in advice.explain() and best.text in advice.explain()
    assert '"guesses"' in advice.to_json()
    assert "does not pay" in bigkit.advise("llama-2-70b", "RTX 4090", draft="llama-2-70b").explain()


def test_a_mixture_is_warned_of():
    advice = bigkit.advise("mixtral-8x7b", "RTX 4090", draft="gpt2")
    assert "picks" in advice.explain() and "checking guesses costs more here" in advice.explain()
