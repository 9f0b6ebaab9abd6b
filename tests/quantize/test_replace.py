"""Which layers are quantized."""

import copy

import pytest
import torch
from torch import nn

from bigkit import (
    load_and_quantize_model,
    replace_with_bnb_layers,
)
from tests.quantize.helpers import CPU, config, empty, every_kind, quantized_names, states_equal

bnb = pytest.importorskip("bitsandbytes")


class Odd(nn.Module):
    """Everything that is not simply a linear layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 32)
        self.attention = nn.MultiheadAttention(32, 2)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32, bias=False)
        self.tied = nn.Linear(32, 10, bias=False)
        self.tied.weight = self.embed.weight
        self.shared = self.down
        self.head = nn.Linear(32, 7)


def test_only_plain_linear_layers_are_quantized():
    model = load_and_quantize_model(Odd(), config("nf4"), device_map=CPU)
    assert quantized_names(model) == ["up.weight"]
    assert model.tied.weight is model.embed.weight and model.shared is model.down
    model = load_and_quantize_model(Odd(), config("nf4", skip_modules=[]), device_map=CPU)
    assert quantized_names(model) == ["up.weight", "head.weight"]
    assert model.attention(torch.ones(1, 1, 32), torch.ones(1, 1, 32), torch.ones(1, 1, 32))[0].isfinite().all()


@pytest.mark.parametrize(
    ("skip", "kept"),
    [
        (["lm_head"], set()),
        (["c_fc"], {"c_fc"}),
        (["mlp"], {"c_fc", "c_proj"}),
        (["c"], set()),
        (["mlp.c_proj"], {"c_proj"}),
    ],
)
def test_modules_are_skipped_by_whole_parts_of_their_names(saved, skip, kept):
    _, folder = saved
    model = load_and_quantize_model(empty(), config("int8", skip_modules=skip), folder, CPU)
    mlp = model.transformer["h"][0].mlp
    assert {name for name in ("c_fc", "c_proj") if type(getattr(mlp, name)) is nn.Linear} == kept
    assert isinstance(model.lm_head, bnb.nn.Linear8bitLt) == (skip != ["lm_head"])


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(
        ValueError, match="no layer of Sequential would be quantized: it has no nn.Linear and no Conv1D"
    ):
        load_and_quantize_model(nn.Sequential(nn.Conv2d(3, 3, 3)), config("int8"), device_map=CPU)
    with pytest.raises(ValueError, match="it has Linear, all of them kept"):
        load_and_quantize_model(nn.Sequential(nn.Linear(3, 3)), config("int8"), device_map=CPU)


@every_kind
def test_replacing_takes_the_weights_over_and_moving_quantizes(saved, kind):
    model, folder = saved
    full = model.transformer["h"][0].attn.c_attn.weight.clone()
    replaced = replace_with_bnb_layers(copy.deepcopy(model), config(kind))
    assert torch.equal(replaced.transformer["h"][0].attn.c_attn.weight, full)
    assert not states_equal(replaced.to("cpu"), load_and_quantize_model(empty(), config(kind), folder, CPU))
