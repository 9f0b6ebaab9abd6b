"""What quantized checkpoints take: by their config against real files, and against published sizes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GptOssConfig, LlamaForCausalLM

import bigkit
from bigkit import zoo
from bigkit.checkpoints.codecs import STACK_CODECS, decode_mxfp4, find_codec
from bigkit.devices import placement
from bigkit.machine.hardware import HARDWARE
from bigkit.model.experts import active_bytes
from bigkit.model.spec import Precision
from bigkit.model.stored import DECODING_STACK, decoding, read_format, stored_sizes, with_stored
from bigkit.offload.handle import Away
from bigkit.quantize.stacks import quantized_stack
from bigkit.zoo import build
from tests.checkpoints.test_as_stored import FORMATS, LLAMA, PROMPT, empty, write
from tests.hub_server import FakeHub

CONFIGS: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]},
    "int4": {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
             "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
                 "num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}}}},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True},
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
    "mxfp8": {"quant_method": "mxfp8", "weight_block_size": [1, 32], "ignored_layers": ["lm_head"]},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
}  # fmt: skip


@pytest.mark.parametrize("format", [*FORMATS, "mxfp4"])
def test_sizes_by_the_config_are_those_of_the_file(tmp_path: Path, format: str) -> None:
    model = write(tmp_path, format)
    config = {**model.config.to_dict(), "quantization_config": CONFIGS[format], "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        on_file = {name: file.get_tensor(name).nbytes for name in file.keys()}
    (tmp_path / "model.safetensors").rename(tmp_path / "away")
    spec = zoo.describe(tmp_path)
    buffers = sum(tensor.bytes() for tensor, _ in spec.tensors.values() if tensor.buffer)
    assert spec.bytes() == sum(on_file.values()) + buffers

    (tmp_path / "away").rename(tmp_path / "model.safetensors")
    estimate = bigkit.estimate_memory(str(tmp_path))
    row = estimate.inference[0]
    named = CONFIGS[format].get("quant_algo", CONFIGS[format]["quant_method"]).lower()
    assert row.stored == f"as stored ({named})"
    assert row.weights == sum(on_file.values()) + buffers
    assert "is quantized" in str(estimate) and f"as stored ({named})" in str(estimate)


def test_what_is_in_an_unknown_format_is_not_called_stored(tmp_path: Path) -> None:
    config = {**LLAMA.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "new"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = bigkit.plan(str(tmp_path), {0: "1GB"}).explain()
    settings = {"quant_method": "torchao", "quant_type": "int8_weight_only"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    assert "torchao's weights and does not run them" in bigkit.plan(str(tmp_path), {0: "1GB"}).explain()
    assert "bfloat16 decoded" in said and "as stored" not in said and "quantized (new): all count it decoded" in said


def test_gpt_oss_has_its_published_size() -> None:
    """60.8 GiB for the larger, 12.8 for the smaller, by their model card (arXiv 2508.10925, table 1)."""
    for size, layers, experts in ((60.8, 36, 128), (12.8, 24, 32)):
        settings = GptOssConfig(num_hidden_layers=layers, num_local_experts=experts, dtype="bfloat16").to_dict()
        settings |= {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]}
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
        spec = with_stored(build.spec_of(build.build(settings, dtype=None), "gpt-oss", settings))
        total, used = spec.bytes(), active_bytes(spec, Precision())
        assert round(total / 2**30, 1) == size
        assert used < total / 2
    assert round(zoo.describe("gpt-oss-120b").bytes() / 2**30, 1) == 60.8


@pytest.mark.parametrize(
    "settings",
    [{}, {"quant_method": "new"}, {"quant_method": "awq", "bits": "few"}, {"quant_method": "compressed-tensors"},
     {"quant_method": "compressed-tensors", "config_groups": []}, {"quant_method": "modelopt", "quant_algo": "W4A8"},
     {"quant_method": "torchao", "quant_type": {"default": {"_type": "Strange", "_data": {}}}},
     {"quant_method": "fp8", "weight_block_size": [1]}],
)  # fmt: skip
def test_what_is_not_known_is_not_guessed(settings: dict[str, Any]) -> None:
    assert read_format(settings) is None
    assert stored_sizes(zoo.describe("gpt2"), settings) is None


TORCHAO = {  # a weight of 256 x 512 as torchao 0.18 makes it: bytes of codes, scales and zero points
    "Int8WeightOnlyConfig": 256 * 512 + 256 * 4 + 256, "Float8WeightOnlyConfig": 256 * 512 + 256 * 4,
    "Float8DynamicActivationFloat8WeightConfig": 256 * 512 + 256 * 4, "Int4WeightOnlyConfig": 256 * 256 + 4 * 256 * 4,
}  # fmt: skip


@pytest.mark.parametrize("kind", TORCHAO)
def test_torchao_by_its_config(kind: str) -> None:
    """The configs as torchao writes them; older ones are names alone."""
    data = {"group_size": 128 if "Int4" in kind else None}
    settings = {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_version": 2, "_data": data}}}
    format = read_format(settings)
    assert format is not None and format.bytes(256, 512) == TORCHAO[kind]
    old = {"Int8WeightOnlyConfig": "int8_weight_only", "Int4WeightOnlyConfig": "int4_weight_only"}
    if kind in old:
        older = read_format({"quant_method": "torchao", "quant_type": old[kind], "quant_type_kwargs": data})
        assert older is not None and older.bytes(256, 512) == TORCHAO[kind]


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao_by_its_tensors(kind: str) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    layer = nn.Sequential(nn.Linear(512, 256, bias=False)).bfloat16()
    torchao.quantize_(layer, getattr(torchao, kind)())
    weight: Any = layer[0].weight
    named = (getattr(weight, name, None) for name in ("qdata", "scale", "zero_point"))
    assert sum(part.nbytes for part in named if part is not None) == TORCHAO[kind]


def test_patterns_of_modules_that_are_left_out() -> None:
    """ModelOpt's cross dots: "*mlp.gate" is every router."""
    spec = zoo.describe("qwen3-30b-a3b")
    settings = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["*self_attn.q_proj", "lm_head"]}
    sizes = stored_sizes(spec, settings)
    assert sizes is not None and not any("q_proj" in name for name in sizes)
    assert sum("k_proj" in name for name in sizes) == spec.facts["num_hidden_layers"]


def test_bitsandbytes_counts_as_planned() -> None:
    spec = zoo.describe("llama-2-7b")
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    packed = with_stored(replace(spec, facts={**spec.facts, "quantization_config": settings, "quantization": "bnb"}))
    buffers = [tensor for tensor, _ in spec.tensors.values() if tensor.buffer]  # float32; float16 with `nf4`
    cast = sum(tensor.bytes() - tensor.bytes("float16") for tensor in buffers)
    assert packed.bytes() - cast == spec.bytes(spec.precision(None, "nf4")) < spec.bytes() / 3


def bytes_at(model: nn.Module) -> Counter[int | str]:
    """What a spread model holds on each place of its map; handles by what rests."""
    held = Counter[int | str]()
    place_of, seen = placement(model.hf_device_map), set[int]()  # type: ignore[arg-type]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            away = isinstance(tensor, Away)
            size = sum(part.nbytes for part in tensor.weight.parts.values()) if away else tensor.nbytes
            held[place_of(name)] += size  # type: ignore[index]
    return held


def ready(folder: Path, format: str) -> nn.Module:
    """A repository in a format with its config.json, and its model, empty."""
    model = write(folder, format)
    config = {**model.config.to_dict(), "quantization_config": CONFIGS[format], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return zoo.empty_model(folder, dtype=None)


@pytest.mark.parametrize("format", [*FORMATS, "mxfp4"])
def test_a_load_by_a_plan_holds_what_the_plan_says(tmp_path: Path, format: str) -> None:
    model = ready(tmp_path, format)
    whole = bigkit.plan(str(tmp_path), {0: "1GB"})
    assert sum(share.weights for share in whole.shares) == bigkit.estimate_memory(str(tmp_path)).inference[0].weights
    most = whole.shares[0].activations + whole.shares[0].weights * 3 // 4
    plan = bigkit.plan(str(tmp_path), {0: most, "cpu": whole.shares[0].weights // 8})
    assert len(set(plan.device_map.values())) > 1 and "as stored" in plan.explain()
    model = bigkit.load_checkpoint_and_dispatch(model, tmp_path, plan, stand_in={0: "cpu"}, offload_buffers=True)
    held = bytes_at(model)
    assert {share.device: share.weights for share in plan.shares if share.weights} == {**held}
    assert torch.isfinite(model(PROMPT).logits).all()


def test_a_repository_on_the_hub_counts_the_same(tmp_path: Path) -> None:
    whole, bare = tmp_path / "whole", tmp_path / "bare"
    whole.mkdir()
    ready(whole, "int4")
    shutil.copytree(whole, bare)
    (bare / "model.safetensors").rename(bare / "other.bin")
    code = (
        "import bigkit; print(*(bigkit.plan(f'someone/{x}', {0: '1GB'}).shares[0].weights for x in ('whole', 'bare')))"
    )
    with FakeHub() as hub:
        hub.add("someone/whole", whole)
        hub.add("someone/bare", bare)
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **settings}, capture_output=True, text=True
        )
    exact = bigkit.plan(str(bare), {0: "1GB"}).shares[0].weights  # by the config alone
    assert [*map(int, done.stdout.split())] == [exact, exact], done.stderr


@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4-double"])
def test_bitsandbytes_by_headers_and_by_the_config(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    plain = LlamaForCausalLM(LLAMA).bfloat16()
    plain.save_pretrained(tmp_path / "plain")
    bits: Any = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    double: Any = {"bnb_4bit_use_double_quant": True} if kind == "nf4-double" else {}
    settings = bigkit.BnbQuantizationConfig(**bits, **double, torch_dtype=torch.bfloat16)
    model = bigkit.load_and_quantize_model(empty(plain), settings, tmp_path / "plain", device_map={"": "cpu"})
    bigkit.save_model(model, tmp_path / "small")
    (tmp_path / "small" / "config.json").write_text(model.config.to_json_string(use_diff=False))
    by_headers = zoo.describe(tmp_path / "small")
    assert by_headers.facts["quantization"] == "bitsandbytes"
    (tmp_path / "small" / "model.safetensors").unlink()
    by_config = zoo.describe(tmp_path / "small")
    assert by_headers.bytes() == by_config.bytes()


def test_decoding_takes_no_more_than_is_kept_for_it() -> None:
    codes = torch.randint(0, 256, (4, 256, 16, 16), dtype=torch.uint8)
    mxfp4 = {"_blocks": codes, "_scales": torch.randint(118, 122, (4, 256, 16), dtype=torch.uint8)}
    cases: list[tuple[str, Any, Any]] = [("mxfp4", partial(decode_mxfp4), mxfp4)]
    for name, make in FORMATS.items():
        parts = make(256, 512)
        codec = find_codec((256, 512), {own: (tuple(part.shape), part.dtype) for own, part in parts.items()})
        cases.append((name, codec.decode, parts))  # type: ignore[union-attr]
    for name, decode, parts in cases:
        with Allocations() as seen:
            weight = decode(parts, torch.bfloat16)
        kept = read_format(CONFIGS[name]).decoding * weight.numel()  # type: ignore[union-attr]
        assert 0.6 * kept < seen.most <= kept, (name, seen.most / weight.numel())


@pytest.mark.parametrize("format", ["fp8", "nf4", "fp4-double", "int8"])
def test_decoding_experts_takes_no_more_than_is_kept_for_it(format: str) -> None:
    if format == "fp8":
        codes = torch.randn(4, 256, 512).to(torch.float8_e4m3fn)
        parts = {"": codes, "_scale_inv": torch.rand(4, 2, 4)}
    else:
        pytest.importorskip("bitsandbytes")
        experts = torch.randn(4, 256, 512, dtype=torch.bfloat16)
        parts = {name: part.detach() for name, part in quantized_stack(experts, 4, format, experts.device).items()}
    codec = next(codec for codec in STACK_CODECS if codec.format == format)
    with Allocations() as seen:
        weight = codec.decode(parts, torch.bfloat16)
    kept = decoding(tuple(weight.shape), DECODING_STACK[format], 2)
    assert 0.5 * kept < seen.most <= kept, (format, seen.most / weight.numel())


def test_an_automatic_map_leaves_room_for_decoding(tmp_path: Path) -> None:
    """On a GPU with room for the weights as they are stored and not for one that is decoded, some rest elsewhere."""
    for format in ("fp8", "gptq", "mxfp4"):
        folder = tmp_path / format
        folder.mkdir()
        model = ready(folder, format)
        stored = bigkit.describe(str(folder)).bytes()
        room = read_format(CONFIGS[format]).decoding * (8192 if format != "mxfp4" else 4 * 8192)  # type: ignore[union-attr]
        for spare, all_there in ((0.9 * room, False), (1.1 * room, True)):
            empty_again = zoo.empty_model(folder, dtype=None)
            budget = {0: round(stored + spare), "cpu": "1GB"}
            found = bigkit.load_checkpoint_and_dispatch(empty_again, folder, "auto", budget, stand_in={0: "cpu"})
            assert (set(found.hf_device_map.values()) == {0}) == all_there, (format, spare)  # type: ignore[union-attr]
        assert type(model) is type(found)


@pytest.mark.parametrize("format", ["fp8", "mxfp4", "gptq"])
def test_dry_runs_and_advice_count_what_plans_count(tmp_path: Path, format: str) -> None:
    ready(tmp_path, format)
    plan = bigkit.plan(str(tmp_path), {0: "1GB"}, context=18)
    for there in (True, False):  # by the headers, and by the config alone
        if not there:
            (tmp_path / "model.safetensors").unlink()
        run = bigkit.dry_run(str(tmp_path), prompt_tokens=16, new_tokens=2)
        peak = run.timeline(0).at_peak()
        assert peak["weights"] == plan.shares[0].weights, there
    assert peak["activations"] <= plan.shares[0].activations
    run = bigkit.dry_run(lambda: zoo.empty_model(tmp_path, dtype=None), prompt_tokens=16, new_tokens=2)
    assert run.timeline(0).at_peak()["weights"] == plan.shares[0].weights
    best = bigkit.advise(str(tmp_path), "RTX 4090", context=18, stored=(None,)).best
    assert best is not None and best.plan.shares[0].weights == plan.shares[0].weights


class Allocations(TorchDispatchMode):
    """The most bytes that tensors took which were made within, at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if torch.is_tensor(tensor) else None
            if storage is not None and storage._cdata not in before | self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return result

    def gone(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.now -= size


def test_what_is_quantized_already_is_not_quantized_again(tmp_path: Path) -> None:
    """Advice says which ways need another checkpoint, counts what decoding costs, and quantizing says what to do."""
    model = ready(tmp_path, "awq")
    with pytest.raises(ValueError, match="quantized already: load it as it is stored"):
        bigkit.load_and_quantize_model(model, bigkit.BnbQuantizationConfig(load_in_4bit=True), tmp_path, {"": "cpu"})
    advice = bigkit.advise(str(tmp_path), "RTX 4090")
    assert "need a checkpoint that is not quantized" in str(advice)
    assert "need a checkpoint that is not" not in str(bigkit.advise("llama-2-7b", "RTX 4090"))
    oss = bigkit.advise("gpt-oss-20b", "RTX 4090").options
    waits = {option.plan.stored: option.waits["GPU"] for option in oss}
    read = zoo.describe("gpt-oss-20b")
    used = active_bytes(read, Precision("bfloat16"))
    assert waits["mxfp4 as stored"] > used / HARDWARE["1 x RTX 4090"].gpus[0].bandwidth
