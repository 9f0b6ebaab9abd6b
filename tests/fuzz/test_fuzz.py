"""Random models, spread in random ways and used as users do: always what the same model does in plain PyTorch.

A failure prints its seed and its case. To play it again, or to go on from a seed for some time:

    BIGKIT_FUZZ_SEED=153 BIGKIT_FUZZ_MINUTES=0 python -m pytest -m soak tests/fuzz
"""

import os
import time

import pytest

from tests.fuzz import mixtures
from tests.fuzz.cases import check, draw

CASES, EACH = 300, 20


@pytest.mark.parametrize("first", range(0, CASES, EACH))
def test_spread_models_are_the_plain_ones(first, tmp_path):
    for seed in range(first, first + EACH):
        check(seed, tmp_path / str(seed))


@pytest.mark.soak
def test_spread_models_are_the_plain_ones_for_long(tmp_path):
    seed = int(os.environ.get("BIGKIT_FUZZ_SEED", CASES))
    end = time.monotonic() + 60 * float(os.environ.get("BIGKIT_FUZZ_MINUTES", 30))
    while True:
        check(seed, tmp_path / str(seed))
        seed += 1
        if time.monotonic() > end:
            break
    print(f"seeds up to {seed - 1} hold")


@pytest.mark.parametrize("first", range(0, 20, 5))
def test_spread_mixtures_are_the_whole_ones(first, tmp_path):
    for seed in range(first, first + 5):
        mixtures.check(seed, tmp_path / str(seed))


@pytest.mark.parametrize("drawn", [draw, mixtures.draw])
def test_a_seed_says_all(drawn):
    assert str(drawn(7)) == str(drawn(7)) != str(drawn(8))
