"""Random models and mixtures, spread out beside a real GPU: seeds that have failed there."""

from pathlib import Path

import pytest

pytest.importorskip("bitsandbytes")  # some are quantized
pytest.importorskip("peft")

from tests.fuzz import cases, mixtures


def test_rows_of_codes_that_are_no_whole_words(tmp_path: Path) -> None:
    """Experts in nf4 whose last dimension has 12 bytes, with a cache on the GPU."""
    mixtures.check(1030, tmp_path / "play", gpu=True)


@pytest.mark.parametrize("seed", [2133, 12020])
def test_what_the_first_block_needs_is_on_its_way(seed: int, tmp_path: Path) -> None:
    cases.check(seed, tmp_path / "play", gpu=True)
