"""Replayed runs are full runs, event by event; and what is not surely equal is run."""

import pytest
import torch
from torch import nn

from bigkit import dry_run, init_empty_weights
from bigkit.dryrun.attention import Target
from bigkit.dryrun.rehearse import rehearse
from bigkit.dryrun.replay import Replayer, Unlike
from bigkit.dryrun.workload import Workload
from bigkit.zoo import catalog
from tests.dryrun.test_fake_gpu import TINY, tiny


def small(name, blocks=5):
    """A function that builds a shipped model's architecture with five blocks."""
    blocks = dict.fromkeys(("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer"), blocks)
    config = catalog.config(catalog.find(name))
    sizes = {**TINY[name], **{field: count for field, count in blocks.items() if field in config}}
    return lambda: tiny(name, **sizes)


def same(model, *load, **options):
    full, replayed = (dry_run(model, None, *load, "H200", replay=flag, **options) for flag in (False, True))
    assert full.recordings == replayed.recordings and full.kinds == replayed.kinds
    assert list(full.operations) == list(replayed.operations) and full.steps == replayed.steps
    assert full.peak_allocated == replayed.peak_allocated and full.peak_reserved == replayed.peak_reserved
    assert full.seconds == replayed.seconds


@pytest.mark.parametrize(
    "name",
    ["gpt2", "qwen3-0.6b", "bert-base-cased", "t5-large", "vit-base-patch16-224", "bloom", "mistral-7b", "deepseek-v3"],
)
def test_a_replayed_run_is_the_full_run(name):
    same(small(name), 2, 48, 2)


def test_loads_of_other_shapes():
    same("pygpt", 2, 48, 2, dtype="bfloat16")
    same(small("gemma-2-9b"), 1, 8, 2)  # within the window
    same("gpt2", 1, 8, 0, dtype="float32", cache=False)
    same(small("gpt2"), 3, 1, 3, all_logits=True)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "gemma-2-9b", "mixtral-8x7b"])
def test_later_tokens_are_traced_once(name, monkeypatch):
    """Of a later token one block of a kind runs, and the last, which is compared."""
    same(small(name), 2, 48, 3)
    ran = []
    record = Replayer.record
    monkeypatch.setattr(Replayer, "record", lambda *args: ran.append(1) or record(*args))
    counts = []
    for tokens in (3, 5):
        ran.clear()
        dry_run(small(name), None, 2, 20, tokens, "H200")
        counts.append(len(ran))
    assert counts[1] - counts[0] == 2 * (3 if name == "gemma-2-9b" else 2)  # its layers are of two kinds


@pytest.mark.parametrize("quantization", ["int8", "nf4-double"])
def test_quantized_blocks(quantization):
    pytest.importorskip("bitsandbytes")
    same("gpt2", 2, 40, 2, dtype="float16", quantization=quantization)


def test_blocks_that_travel_or_lie_on_several_gpus_are_run():
    places = {"transformer.wte": 0, "transformer.wpe": 0, "transformer.ln_f": 0, "lm_head": 0, "transformer.drop": 0}
    for away in ("cpu", "cuda:1"):
        spread = {**places, **{f"transformer.h.{i}": away if i % 2 else 0 for i in range(5)}}
        runs = [dry_run(small("gpt2"), spread, 1, 16, 1, "2 x T4", replay=flag) for flag in (False, True)]
        assert runs[0].recordings == runs[1].recordings and list(runs[0].operations) == list(runs[1].operations)


class Block(nn.Module):
    def __init__(self, number, odd):
        super().__init__()
        self.layer_idx, self.odd = number, odd
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        x = self.linear(x)
        return x * 2 if self.odd == "last" and self.layer_idx == 7 else x


class Stack(nn.Module):
    main_input_name = "pixel_values"

    def __init__(self, odd=""):
        super().__init__()
        self.blocks = nn.ModuleList(Block(i, odd if odd != "attribute" else str(i // 7)) for i in range(8))
        self.pretrained_cfg = {"input_size": (3, 64, 64)}

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def build(odd=""):
    with init_empty_weights():
        return Stack(odd)


def test_a_block_that_hides_its_difference_is_found_out():
    with pytest.raises(Unlike):
        rehearse(build("last"), {"": 0}, Workload(1, 1), Target(), replay=True)
    with pytest.raises(RuntimeError, match="blocks of Stack look alike and are not: build it again"):
        dry_run(build("last"))
    again, full = dry_run(lambda: build("last")), dry_run(build("last"), replay=False)
    assert again.recordings == full.recordings and list(again.operations) == list(full.operations)


def test_blocks_with_other_attributes_or_hooks_are_run():
    full = dry_run(build("attribute"), replay=False)
    assert dry_run(build("attribute")).recordings == full.recordings
    model, calls = build(), []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    dry_run(model)
    assert len(calls) == 8
    assert "forward" not in vars(model.blocks[0]) and torch.is_tensor(model.blocks[0].linear.weight)


def test_blocks_on_several_gpus_are_replayed_as_they_run(monkeypatch):
    spread = {"model.embed_tokens": 0, "model.norm": 2, "model.rotary_emb": 2, "lm_head": 2}
    spread |= {f"model.layers.{i}": i // 4 for i in range(12)}
    calls, real = [], Replayer.replay
    monkeypatch.setattr(Replayer, "replay", lambda *args: calls.append(1) or real(*args))
    model = small("llama-3.1-8b", 12)
    full, replayed = (dry_run(model, spread, 2, 24, 2, "3 x T4", replay=flag) for flag in (False, True))
    assert len(calls) >= 8, "most blocks, in three steps"
    assert full.recordings == replayed.recordings and full.kinds == replayed.kinds and full.steps == replayed.steps
    assert list(full.operations) == list(replayed.operations) and full.seconds == replayed.seconds
