"""Where models that name no blocks are cut: their plans run, with every tensor of an operation on one device."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from bigkit import compute_module_sizes, dispatch_model, init_empty_weights, plan
from bigkit.dryrun.fake_gpu import fake_gpus
from bigkit.dryrun.workload import fill


class Residual(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x):
        return x + self.down(self.up(x))


class Embedded(nn.Module):
    """Tokens and positions that are added up, before blocks in a container of a container."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(32, 8), nn.Embedding(32, 8)
        self.stages = nn.ModuleList(nn.Sequential(Residual(), Residual()) for _ in range(2))

    def forward(self, input):
        x = self.tokens(input) + self.positions(torch.arange(input.shape[1], device=input.device))
        for stage in self.stages:
            x = stage(x)
        return x


class Reads(nn.Module):
    """Names its blocks, and reads the weight of an embedding before them, as encoders of audio do."""

    _no_split_modules = ("Residual",)

    def __init__(self):
        super().__init__()
        self.conv, self.positions = nn.Linear(256, 8), nn.Embedding(64, 8)
        self.layers = nn.ModuleList(Residual() for _ in range(3))

    def forward(self, input):
        x = self.conv(input) + self.positions.weight
        for layer in self.layers:
            x = layer(x)
        return x


class Stem(nn.Module):
    """Parts without a number, with a residual in each."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = Residual(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), Residual()

    def forward(self, input):
        return self.last(self.middle(self.first(input)))


SIZES = dict(vocab_size=100, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2)  # noqa: C408
SIZES |= dict(decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64)  # noqa: C408
SIZES |= dict(pad_token_id=1, eos_token_id=2, decoder_start_token_id=0)  # noqa: C408
WIDTHS = dict(vocab_size=100, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)  # noqa: C408
IDS = torch.ones(1, 7, dtype=torch.long)
BOTH = {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
MODELS = {
    "blocks": (lambda: nn.Sequential(*[Residual() for _ in range(3)]), {"input": torch.ones(2, 8)}),
    "embedded": (Embedded, {"input": IDS}),
    "reads": (Reads, {"input": torch.ones(64, 256)}),
    "stem": (Stem, {"input": torch.ones(2, 8)}),
    "pegasus": (lambda: transformers.PegasusForConditionalGeneration(transformers.PegasusConfig(**SIZES)), BOTH),
    "marian": (lambda: transformers.MarianMTModel(transformers.MarianConfig(**SIZES)), BOTH),
    "mpnet": (lambda: transformers.MPNetModel(transformers.MPNetConfig(**WIDTHS)), {"input_ids": IDS}),
}


@pytest.mark.parametrize("share", [0.6, 0.8])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_names_no_blocks_runs_over_two_devices(name, share):
    make, inputs = MODELS[name]
    with init_empty_weights():
        model = make().eval()
    size = compute_module_sizes(model)[""]
    budgets = {0: int(size * share), 1: int(size * max(share, 0.7)), "cpu": size}
    places = plan(model, budgets, strict=False).device_map
    with fake_gpus(), torch.no_grad():
        dispatch_model(fill(model, places), places, 0)(**{key: value.to("cuda:0") for key, value in inputs.items()})
