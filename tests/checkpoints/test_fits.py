"""Files that are not what their names say: one sentence each, before anything is decoded; and odd but right ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import bigkit
from bigkit.checkpoints.as_stored import StoredLinear
from bigkit.model.header import CheckpointError
from tests.checkpoints.test_as_stored import PROMPT, empty, int32, write

LAYER, EXPERTS = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.experts"
Tensors = dict[str, Tensor]
Change = Callable[[Tensors], object]


def to(own: str, value: Tensor | Callable[[Tensor], Tensor]) -> Change:
    """Put another tensor in the place of one."""

    def change(tensors: Tensors) -> None:
        name = f"{LAYER if f'{LAYER}.{own}' in tensors or f'{EXPERTS}.{own}' not in tensors else EXPERTS}.{own}"
        tensors[name] = value if isinstance(value, Tensor) else value(tensors[name]).contiguous()

    return change


def also(own: str, value: Tensor) -> Change:
    """Add a tensor to the experts'."""
    return lambda tensors: tensors.update({f"{EXPERTS}.{own}": value})


def without(own: str) -> Change:
    return lambda tensors: tensors.pop(f"{LAYER}.{own}")


def zero_point(tensors: Tensors) -> None:
    tensors[f"{LAYER}.weight"] = torch.ones(128, 64, dtype=torch.int8)
    tensors[f"{LAYER}.weight_zero_point"] = torch.ones(128, 1, dtype=torch.int8)


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


SCALE, GRID = "weight_scale_inv", "one number, one for each row, or one for each block"
WRONG: list[tuple[str, Change, str]] = [
    ("fp8", to(SCALE, torch.rand(3, 1)), GRID),
    ("fp8", to(SCALE, torch.rand(7)), GRID),
    ("fp8", to(SCALE, torch.rand(0, 1)), GRID),
    ("fp8", to(SCALE, torch.ones(1, 1, dtype=torch.int32)), "exponents in one byte, not torch.int32"),
    ("fp8", to(SCALE, torch.ones(1, 1, dtype=torch.bool)), "not torch.bool"),
    ("fp8", to(SCALE, torch.ones(1, 1, dtype=torch.complex64)), "not torch.complex64"),
    ("fp8", to("weight_scale", torch.rand(1)), "weight_scale would not be read"),
    ("fp8", to("weight", lambda codes: as_bytes(codes).t().contiguous().view(codes.dtype)), "no format that bigkit"),
    ("fp8", to("weight", as_bytes), "no format that bigkit"),
    ("fp8", to("weight", lambda codes: as_bytes(codes).view(torch.float8_e4m3fnuz)), "no format that bigkit"),
    ("fp8", to("weight", lambda codes: as_bytes(codes) > 3), "no format that bigkit"),
    ("fp8", zero_point, "weight_zero_point would not be read"),
    ("fp8", without("weight"), "no format that bigkit"),
    ("int4", to("weight_scale", torch.rand(7, 2).bfloat16()), r"weight_scale must be .* \[128, 2\]"),
    ("int4", to("weight_scale", torch.rand(1).bfloat16()), "64 inputs make no groups of equal size"),
    ("int4", to("weight_scale", torch.rand(2, 128).bfloat16()), "no groups of equal size"),
    ("int4", to("weight_scale", torch.rand(128, 3).bfloat16()), "no groups of equal size"),
    ("int4", to("weight_scale", torch.ones(128, 2, dtype=torch.int32)), "weight_scale must be torch.float32"),
    ("int4", to("weight_zero_point", torch.zeros(128, 2, dtype=torch.int8)), r"must be torch.int32 \[16, 2\]"),
    ("int4", to("weight_zero_point", torch.zeros(5, 2, dtype=torch.int32)), r"must be torch.int32 \[16, 2\]"),
    ("int4", to("weight_g_idx", torch.full((64,), 9)), "names group 9 of 2"),
    ("int4", to("weight_g_idx", torch.full((64,), -1)), "names group -1 of 2"),
    ("int4", to("weight_g_idx", torch.zeros(9, dtype=torch.int32)), r"weight_g_idx must be .* \[64\]"),
    ("int4", to("weight_g_idx", torch.zeros(64)), "weight_g_idx must be torch.int32"),
    ("int4", to("weight_shape", torch.tensor([64, 128])), r"weight_shape says \[64, 128\]"),
    ("int4", to("weight_packed", int32(128, 5)), "no format that bigkit"),
    ("gptq", to("scales", torch.rand(2, 5).half()), r"scales must be .* \[2, 128\]"),
    ("gptq", to("qzeros", int32(2, 5)), r"qzeros must be torch.int32 \[2, 16\]"),
    ("gptq", to("g_idx", torch.arange(64) // 8), "names group 7 of 2"),
    ("gptq", to("qweight", int32(6, 128)), "no format that bigkit"),
    ("gptq", without("qzeros"), "no format that bigkit"),
    ("awq", to("qzeros", int32(1, 16)), r"qzeros must be torch.int32 \[2, 16\]"),
    ("awq", to("qweight", int32(128, 8)), "no format that bigkit"),
    ("mxfp4", to("down_proj_blocks", lambda blocks: blocks[:3]), r"_blocks must be torch.uint8 \[4, 64, 2, 16\]"),
    ("mxfp4", to("down_proj_scales", lambda scales: scales[:, :, :1]), r"_scales must be torch.uint8 \[4, 64, 2\]"),
    ("mxfp4", to("gate_up_proj_blocks", torch.zeros(4, 64, 4, 16, dtype=torch.uint8)), r"\[4, 128, 2, 16\]"),
    ("mxfp4", to("down_proj_blocks", lambda blocks: blocks.view(torch.int8)), "_blocks must be torch.uint8"),
    ("mxfp4", to("down_proj_scales", lambda scales: scales.bfloat16()), "_scales must be torch.uint8"),
    ("mxfp4", to("down_proj_scales", lambda scales: scales[:0]), "_scales must be torch.uint8"),
    ("mxfp4", also("down_proj", torch.randn(4, 64, 64).bfloat16()), "down_proj lies there as well"),
    ("int4", to("weight", torch.randn(128, 64).bfloat16()), "weight_packed would not be read"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_does_not_fit_is_one_sentence(tmp_path: Path, number: int) -> None:
    format, change, sentence = WRONG[number]
    plain = write(tmp_path, format)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    for keep in ("stored", "dense"):
        model = empty(plain)
        with pytest.raises(CheckpointError, match=sentence) as error:
            bigkit.load_checkpoint_in_model(model, tmp_path, keep=keep)
        text = str(error.value)
        assert text.startswith((LAYER, EXPERTS)) and str(tmp_path) in text and "get the file anew" in text
        assert "\n" not in text and all(p.is_meta for p in model.parameters())
        assert not any(isinstance(module, StoredLinear) for module in model.modules())


def test_odd_files_that_are_right(tmp_path: Path) -> None:
    """Powers as scales, in either dtype; scales of activations, which are not needed; a layer that was left out."""
    plain = write(tmp_path, "fp8")
    tensors = load_file(tmp_path / "model.safetensors")
    names = [name.removesuffix(".weight_scale_inv") for name in tensors if name.endswith("_scale_inv")]
    powers = torch.tensor([[120]], dtype=torch.uint8)
    tensors[f"{names[0]}.weight_scale_inv"] = powers
    tensors[f"{names[1]}.weight_scale_inv"] = powers.clone().view(torch.float8_e8m0fnu)
    tensors[f"{names[2]}.weight_scale_inv"] = torch.tensor(2.0**-7)
    tensors[f"{names[3]}.input_scale"] = torch.rand(1)
    left_out = tensors.pop(f"{names[4]}.weight").float()
    del tensors[f"{names[4]}.weight_scale_inv"]
    tensors[f"{names[4]}.weight"] = left_out
    save_file(tensors, tmp_path / "model.safetensors")
    for name in names[:3]:
        plain.get_submodule(name).weight.data = (tensors[f"{name}.weight"].float() * 2.0**-7).bfloat16()
    plain.get_submodule(names[4]).weight.data = left_out.bfloat16()
    for keep in ("stored", "dense"):
        model = empty(plain)
        assert bigkit.load_checkpoint_in_model(model, tmp_path, keep=keep, strict=True).clean
        with torch.no_grad():
            assert torch.equal(model(PROMPT).logits, plain(PROMPT).logits)


@pytest.mark.parametrize("format", ["fp8", "gptq", "mxfp4"])
def test_shards_that_part_codes_and_scales(tmp_path: Path, format: str) -> None:
    """Every tensor of a weight lies in another file."""
    plain = write(tmp_path, format)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    files = {name: f"model-{place % 3 + 1:05}-of-00003.safetensors" for place, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    places = {"": 0, "model.layers.0": "disk", "model.layers.1": "cpu"}
    for options in ({}, {"keep": "dense"}, {"device_map": places, "stand_in": {0: "cpu"}}):
        model = empty(plain)
        load = bigkit.load_checkpoint_and_dispatch if "device_map" in options else bigkit.load_checkpoint_in_model
        found = load(model, tmp_path, strict=True, **options)  # type: ignore[operator]
        model = found if "device_map" in options else model
        with torch.no_grad():
            assert torch.equal(model(PROMPT).logits, plain(PROMPT).logits)
    (tmp_path / files[next(name for name in sorted(files) if "scale" in name)]).unlink()
    with pytest.raises(CheckpointError, match="which is not in its folder"):
        bigkit.load_checkpoint_in_model(empty(plain), tmp_path)


@pytest.mark.parametrize("left", [0, 7, 300, -1])
def test_truncated_files(tmp_path: Path, left: int) -> None:
    plain = write(tmp_path, "fp8")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    model = empty(plain)
    with pytest.raises(CheckpointError, match="model.safetensors"):
        bigkit.load_checkpoint_in_model(model, tmp_path)
    assert all(p.is_meta for p in model.parameters())


def test_a_tied_head_that_is_stored_beside_what_it_is_tied_to(tmp_path: Path) -> None:
    """A head that has a weight of its own in the file is not the embedding, and is never taken for it unseen."""
    plain = write(tmp_path, "fp8")
    plain.config.tie_word_embeddings = True
    tied = type(plain)(plain.config).bfloat16().eval()
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["lm_head.weight"].float()
    tensors["lm_head.weight"] = head.to(torch.float8_e4m3fn)
    tensors["lm_head.weight_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, tmp_path / "model.safetensors")
    model = empty(tied)
    with pytest.raises(CheckpointError, match="lm_head in .* is that of 'model.embed_tokens.weight', too: build"):
        bigkit.load_checkpoint_in_model(model, tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.is_meta
    plain.lm_head.weight.data = tensors["lm_head.weight"].bfloat16()
    plain.config.tie_word_embeddings = model.config.tie_word_embeddings = False
    model = empty(plain)
    bigkit.load_checkpoint_in_model(model, tmp_path, strict=True)
    with torch.no_grad():
        assert torch.equal(model(PROMPT).logits, plain(PROMPT).logits)
