"""Small random models of other libraries, spread in each way that their clients must not notice."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from bigkit import cpu_offload, disk_offload, dispatch_model, infer_auto_device_map, load_and_quantize_model
from tests.quantize.helpers import CPU, config, llama
from tests.spread import STAND_IN, check_at_rest


def on_gpus(model: nn.Module, folder: Path) -> nn.Module:
    """Resident on two GPUs: half of the bytes on each."""
    nbytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return dispatch_model(model, infer_auto_device_map(model, {0: nbytes * 2 // 3, 1: nbytes}), stand_in=STAND_IN)


def in_ram(model: nn.Module, folder: Path) -> nn.Module:
    return cpu_offload(model, 0, stand_in=STAND_IN)


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    return disk_offload(model, folder / "offload", 0, stand_in=STAND_IN)


def mapped(model: nn.Module, folder: Path) -> nn.Module:
    """On disk, and working on the CPU."""
    return disk_offload(model, folder / "offload")


WAYS = {"GPUs": on_gpus, "RAM": in_ram, "disk": on_disk, "disk, mapped": mapped}
AWAY = {name: way for name, way in WAYS.items() if name != "GPUs"}


def spread_ways(model: nn.Module, folder: Path, ways: Any = None) -> Iterator[tuple[str, nn.Module]]:
    """Copies of a model, each spread in another way."""
    for name, way in (ways or WAYS).items():
        yield name, way(copy.deepcopy(model), folder / name)


def quantized(kind: str, where: str | None, folder: Path, **options: Any) -> nn.Module:
    """The small Llama in fewer bits; its blocks rest in RAM ("cpu") or on "disk", or stay where they work (None)."""
    torch.manual_seed(0)
    if where is None:
        return load_and_quantize_model(llama(), config(kind), device_map=CPU)
    places = {"model.embed_tokens": 0, "model.layers": where, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    return load_and_quantize_model(
        llama(), config(kind), device_map=places, stand_in=STAND_IN, offload_folder=folder, force_hooks=True, **options
    )


def check(model: nn.Module, use: Any, folder: Path, ways: Any = None) -> None:
    """A client gets from a spread model what it gets from the whole one, and leaves no weight lent.

    Args:
        use: the client's code: model -> tensors, numbers or texts, in tuples or dicts.
    """
    expected = use(copy.deepcopy(model))
    for way, parts in spread_ways(model, folder, ways):
        compare(use(parts), expected, way)
        check_at_rest(parts)


def compare(given: Any, expected: Any, way: str) -> None:
    if isinstance(expected, (tuple, list)):
        assert len(given) == len(expected), way
        for one, other in zip(given, expected):
            compare(one, other, way)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(given.detach(), expected.detach(), msg=lambda text: f"{way}: {text}")
    else:
        assert given == expected, way


def language_model(tie: bool = False) -> Any:
    """A small random Llama of Transformers."""
    return seeded(
        lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=100,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                tie_word_embeddings=tie,
                bos_token_id=0,
                eos_token_id=1,
            )  # fmt: skip
        )
    )


def seeded(make: Any) -> Any:
    """What `make` builds from the same random numbers at each call, in evaluation mode."""
    torch.manual_seed(0)
    return make().eval()


def tokenizer(length: int = 16) -> Any:
    """A tokenizer of 100 words, "w0" to "w99"."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w99"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w99", pad_token="w0", mask_token="w98", cls_token="w97", sep_token="w96",
        model_max_length=length,
    )  # fmt: skip
