"""Small models in full precision, saved."""

import pytest
import torch

from bigkit import (
    load_and_quantize_model,
    save_model,
)
from tests.quantize.helpers import CPU, config, empty, four, small


@pytest.fixture
def saved(tmp_path):
    """A small GPT in full precision, and the folder that it is saved in."""
    torch.manual_seed(0)
    model = small().eval()
    save_model(model, tmp_path / "full", "100KB")
    return model, tmp_path / "full"


@pytest.fixture
def four_saved(tmp_path):
    """Four blocks, saved in full precision and in each quantized form; a fake GPU 0 stands in for a real one."""
    torch.manual_seed(0)
    save_model(four(), tmp_path / "full", "200KB")

    def saved_as(kind):
        model = load_and_quantize_model(empty(four), config(kind), tmp_path / "full", CPU)
        save_model(model, tmp_path / kind, "50KB")
        return model

    return tmp_path, saved_as
