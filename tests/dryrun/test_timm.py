"""Dry runs of vision models: one of each of timm's families runs on fake GPUs, or is refused in one sentence."""

from __future__ import annotations

import pytest

from bigkit import dry_run, zoo
from bigkit.zoo import ZooError
from tests.sweeps import check_every

timm = pytest.importorskip("timm")
CHOSEN = ["convnext", "efficientnet", "levit", "resnet", "swin_transformer", "vision_transformer"]


def first_of(family: str) -> str:
    """The model of a family with the shortest name, by which timm calls the plain ones."""
    return sorted(timm.list_models(module=family), key=lambda name: (len(name), name))[0]


def check(family: str) -> str:
    """Rehearse the first model of a family: "runs", or the sentence that refuses it."""
    name = first_of(family)
    try:
        empty = zoo.empty_model(name, dtype="float32")
    except ZooError as error:
        return f"not built: {error}"
    try:
        run = dry_run(empty, None, 2, 1, 0, "H200")
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
        return f"refused: {error}"
    weights = sum(parameter.nbytes for parameter in zoo.empty_model(name, dtype="float32").parameters())
    assert run.timelines[0].at_peak()["weights"] >= weights and run.seconds["prefill"] > 0
    return "runs"


@pytest.mark.filterwarnings("ignore")  # of timm
@pytest.mark.parametrize("family", CHOSEN)
def test_a_family_is_rehearsed(family):
    assert check(family) == "runs"


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_every_family_is_rehearsed_or_refused():
    check_every(timm.list_modules(), check)
