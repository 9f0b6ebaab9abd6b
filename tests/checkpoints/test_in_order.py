"""Where a made tensor's bytes lie, against what the conversion itself makes."""

import pytest
import torch
import transformers as tf
from safetensors.torch import save_file

from bigkit import init_empty_weights
from bigkit.checkpoints._transformers import Made
from bigkit.checkpoints.format import Checkpoint
from bigkit.checkpoints.in_order import joined, ranges_in_order
from bigkit.checkpoints.match import match


def checkpoint(folder, dtype=torch.float32, **tensors):
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return Checkpoint.open(folder)


def make(convert, shape, sources, dtype=torch.float32):
    return Made(
        "x", tuple(shape), dtype, tuple(sources), lambda tensors: {"x": convert(*(tensors[s] for s in sources))}
    )


@pytest.mark.parametrize(
    ("convert", "simple"),
    [
        (lambda a, b, c: torch.cat([a, b, c]), True),
        (lambda a, b, c: torch.stack([c, a, b]), True),
        (lambda a, b, c: torch.stack([a, b, c]).transpose(1, 2), False),
        (lambda a, b, c: torch.cat([a, b, c], 1), False),
        (lambda a, b, c: torch.stack([x.view(2, -1, 4).transpose(0, 1).reshape(-1, 4) for x in (a, b, c)]), False),
        (lambda a, b, c: torch.cat([a, b]), False),
        (lambda a, b, c: torch.cat([a, b, b]), False),
        (lambda a, b, c: torch.cat([a, b, 2 * c]), False),
        (lambda a, b, c: torch.cat([a, b, c[:5]]), False),
        (lambda a, b, c: a.view(6, 4) + b + c, False),
    ],
)
def test_only_what_keeps_bytes_in_order(convert, simple, tmp_path):
    parts = {name: torch.randn(6, 4) for name in "abc"}
    source = checkpoint(tmp_path, **parts)
    made = convert(*parts.values())
    source.made["x"] = make(convert, made.shape, "abc")
    where = joined(source, "x")
    assert (where is not None) == simple
    if where:
        raw = (tmp_path / "model.safetensors").read_bytes()
        data = b"".join(raw[piece.offset : piece.offset + piece.nbytes] for piece in where.pieces)
        assert data == made.contiguous().numpy().tobytes() and where.nbytes == len(data)
    source.made["y"] = make(convert, made.shape, "abc", torch.bfloat16)
    assert ranges_in_order(source, "y") == (), "of another dtype it is computed"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "olmoe"])
def test_experts_of_transformers(family, tmp_path):
    config = tf.AutoConfig.for_model(
        family, vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=12, moe_intermediate_size=12, num_local_experts=11, num_experts=11, n_routed_experts=11,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=0, kv_lora_rank=4, q_lora_rank=4,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, head_dim=8,
    )  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    with init_empty_weights():
        empty = type(model)(config)
    source = Checkpoint.open(tmp_path)
    match(empty, source)
    assert source.made
    raw = (tmp_path / "model.safetensors").read_bytes()
    for name in source.made:
        where = joined(source, name)
        data = b"".join(raw[piece.offset : piece.offset + piece.nbytes] for piece in where.pieces)
        assert data == source.read(name).contiguous().numpy().tobytes(), name
