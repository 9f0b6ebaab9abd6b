"""FP8 experts that a checkpoint has one by one are stacked with their scales, and run bit for bit as if decoded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import bigkit
from bigkit.checkpoints import codecs
from bigkit.model.header import CheckpointError

CONFIG = Qwen3MoeConfig(hidden_size=128, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=2,
                        num_experts=4, num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                        vocab_size=96, dtype="bfloat16", max_position_embeddings=64)  # fmt: skip
IDS = torch.tensor([[5, 9, 33, 2, 71, 8]])


def empty(config: Any = CONFIG) -> Any:
    with bigkit.init_empty_weights():
        return Qwen3MoeForCausalLM(config).bfloat16().eval()


def write(folder: Path, scale: str = "block") -> tuple[Any, dict[str, Tensor]]:
    """A checkpoint as DeepSeek and Qwen write them, the model that its decoded weights give, and its tensors."""
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(CONFIG).bfloat16().save_pretrained(folder / "plain")
    tensors, decoded = {}, {}
    for name, tensor in load_file(folder / "plain" / "model.safetensors").items():
        if tensor.ndim == 2 and "proj" in name:
            rows, columns = tensor.shape
            size = (max(1, rows // 128), columns // 128) if scale == "block" else (rows, 1)
            scales = torch.rand(size) / 50
            tensors[name] = codes = (torch.randn(rows, columns)).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv" if scale == "block" else f"{name}_scale"] = scales
            whole = scales.repeat_interleave(rows // size[0], 0).repeat_interleave(columns // size[1], 1)
            decoded[name] = (codes.float() * whole).bfloat16()
        else:
            tensors[name] = decoded[name] = tensor
    save_file(tensors, folder / "model.safetensors")
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128] if scale == "block" else None}
    config = {**CONFIG.to_dict(), "architectures": ["Qwen3MoeForCausalLM"], "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "decoded").mkdir()
    save_file(decoded, folder / "decoded" / "model.safetensors")
    model = empty()
    assert bigkit.load_checkpoint_in_model(model, folder / "decoded").clean
    return model, tensors


@pytest.mark.parametrize("scale", ["block", "row"])
@pytest.mark.parametrize("way", ["resident", "cpu", "disk", "dense"])
@torch.no_grad()
def test_outputs_are_those_of_the_decoded_weights(tmp_path: Path, scale: str, way: str) -> None:
    plain, _ = write(tmp_path, scale)
    model = empty()
    if way in ("resident", "dense"):
        report = bigkit.load_checkpoint_in_model(model, tmp_path, keep="dense" if way == "dense" else "stored")
        assert report.clean, report
    else:
        places = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0, "model.layers": way}
        (tmp_path / "away").mkdir()
        bigkit.load_checkpoint_and_dispatch(
            model, tmp_path, places, offload_folder=tmp_path / "away", stand_in={0: "cpu"}
        )
    experts = model.model.layers[0].mlp.experts._parameters["gate_up_proj"]
    assert experts.dtype == (torch.bfloat16 if way == "dense" else torch.float8_e4m3fn)
    assert torch.equal(model(IDS).logits, plain(IDS).logits) and torch.equal(model(IDS).logits, plain(IDS).logits)


@torch.no_grad()
def test_a_model_that_has_weights_gets_those_of_the_file(tmp_path: Path) -> None:
    plain, _ = write(tmp_path)
    model = type(plain)(plain.config).bfloat16().eval()
    assert bigkit.load_checkpoint_in_model(model, tmp_path).clean
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    as_stored = empty()
    for _ in range(2):  # the second time into what the first has made
        assert bigkit.load_checkpoint_in_model(as_stored, tmp_path).clean
        assert torch.equal(as_stored(IDS).logits, plain(IDS).logits)


DEEPSEEK = DeepseekV3Config(
    hidden_size=256, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=3, n_routed_experts=8,
    n_group=2, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1, num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=128, kv_lora_rank=128, qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=32, vocab_size=96,
    dtype="bfloat16", max_position_embeddings=64,
)  # fmt: skip


def deepseek(folder: Path) -> tuple[Any, set[str]]:
    """A checkpoint laid out as DeepSeek-V3's, the model that its decoded weights give, and its names.

    Linear layers of attention, dense and shared feed-forwards and each expert alone are in FP8 with a scale for each
    128 x 128 (`kv_a_proj_with_mqa` has 160 rows: its last blocks are cut); embeddings, head, norms and routers are not.
    """
    torch.manual_seed(0)
    model: Any = DeepseekV3ForCausalLM(DEEPSEEK).bfloat16()
    model.save_pretrained(folder / "plain")
    stored, decoded = {}, {}
    for name, tensor in load_file(folder / "plain" / "model.safetensors").items():
        if "proj" in name and tensor.ndim == 2:
            rows, columns = tensor.shape
            codes, scales = (
                (tensor.float() * 2000).to(torch.float8_e4m3fn),
                torch.rand(-(-rows // 128), -(-columns // 128)),
            )
            stored[name], stored[f"{name}_scale_inv"] = codes, scales / 1000
            whole = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns] / 1000
            decoded[name] = (codes.float() * whole).bfloat16()
        else:
            stored[name] = decoded[name] = tensor
    save_file(stored, folder / "model.safetensors")
    (folder / "decoded").mkdir()
    save_file(decoded, folder / "decoded" / "model.safetensors")
    plain = empty_deepseek()
    assert bigkit.load_checkpoint_in_model(plain, folder / "decoded").clean
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    config = {**DEEPSEEK.to_dict(), "architectures": ["DeepseekV3ForCausalLM"], "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return plain, set(stored)


def empty_deepseek() -> Any:
    with bigkit.init_empty_weights():
        return DeepseekV3ForCausalLM(DEEPSEEK).bfloat16().eval()


@pytest.mark.parametrize("way", ["resident", "dense", "cpu", "disk", "experts in RAM", "experts on disk"])
@torch.no_grad()
def test_deepseek_as_it_is_published(tmp_path: Path, way: str) -> None:
    plain, names = deepseek(tmp_path)
    assert {"model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv", "model.layers.0.self_attn.kv_b_proj.weight",
            "model.layers.2.mlp.experts.7.down_proj.weight_scale_inv",
            "model.layers.1.mlp.shared_experts.up_proj.weight_scale_inv"} < names  # fmt: skip
    model = empty_deepseek()
    if way in ("resident", "dense"):
        report = bigkit.load_checkpoint_in_model(model, tmp_path, keep="dense" if way == "dense" else "stored")
        assert report.clean, report
    else:
        place = "disk" if "disk" in way else "cpu"
        parts = [f"model.layers.{i}" for i in range(3)] if way == place else []
        parts = parts or [f"model.layers.{i}.mlp.experts" for i in (1, 2)]
        (tmp_path / "away").mkdir()
        bigkit.load_checkpoint_and_dispatch(
            model, tmp_path, {"": 0, **dict.fromkeys(parts, place)}, strict=True, offload_folder=tmp_path / "away",
            stand_in={0: "cpu"},
        )  # fmt: skip
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **options), plain.generate(IDS, **options))
    if way == "resident":
        as_built = bigkit.zoo.empty_model(tmp_path, dtype=None)
        bigkit.load_checkpoint_in_model(as_built, tmp_path)
        held = sum(tensor.nbytes for tensor in (*as_built.parameters(), *as_built.buffers()))
        assert bigkit.plan(str(tmp_path), {0: "1GB"}, context=10).shares[0].weights == held
        bigkit.save_model(model, tmp_path / "saved")
        again = empty_deepseek()
        assert bigkit.load_checkpoint_in_model(again, tmp_path / "saved").clean
        assert torch.equal(again(IDS).logits, plain(IDS).logits)


def test_plans_dry_runs_and_saved_files_have_the_same_bytes(tmp_path: Path) -> None:
    plain, _ = write(tmp_path)
    model = bigkit.zoo.empty_model(tmp_path, dtype=None)
    bigkit.load_checkpoint_in_model(model, tmp_path)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    plan = bigkit.plan(str(tmp_path), {0: "1GB"}, context=10)
    assert plan.shares[0].weights == held == bigkit.describe(str(tmp_path)).bytes()
    run = bigkit.dry_run(str(tmp_path), prompt_tokens=8, new_tokens=2)
    assert run.timeline(0).at_peak()["weights"] == held
    bigkit.save_model(model, tmp_path / "saved")
    again = empty()
    assert bigkit.load_checkpoint_in_model(again, tmp_path / "saved").clean
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, plain(IDS).logits)


def test_what_cannot_be_stacked_is_one_sentence(tmp_path: Path) -> None:
    _, tensors = write(tmp_path)
    packed = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    packed["model.layers.0.mlp.experts.0.gate_proj.weight_packed"] = torch.zeros(128, 16, dtype=torch.int32)
    cut = dict(tensors)
    for name in tensors:
        if name.endswith("experts.0.gate_proj.weight_scale_inv"):
            cut[name] = torch.ones(3, 1)
    for case in (packed, cut):
        save_file(case, tmp_path / "model.safetensors")
        model = empty()
        with pytest.raises(CheckpointError, match="one by one in few bits .*gate_proj"):
            bigkit.load_checkpoint_in_model(model, tmp_path)
        assert all(tensor.is_meta for tensor in model.parameters())


def test_stacked_experts_decode_as_each_alone() -> None:
    for rows, columns, down, across in ((4, 6, 2, 3), (4, 6, 4, 1), (4, 6, 1, 1)):
        parts = {"": torch.randn(5, rows, columns).to(torch.float8_e4m3fn), "_scale_inv": torch.rand(5, down, across)}
        whole = codecs.decode_scaled_stack(parts, torch.float32)
        for number in range(5):
            alone = {"weight": parts[""][number], "weight_scale_inv": parts["_scale_inv"][number]}
            assert torch.equal(whole[number], codecs.decode_scaled(alone, torch.float32))
