"""What a plan keeps free is what a dry run of the same model then takes: no less, and not much more."""

import pytest
import torch
import transformers as tf

from bigkit import dry_run, init_empty_weights, load_and_quantize_model, plan
from bigkit.dryrun.fake_bnb import config_of

pytest.importorskip("bitsandbytes")
MiB = 2**20
SIZES = {"hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
         "vocab_size": 2000, "intermediate_size": 1024}  # fmt: skip
OWN = {
    "Llama": {}, "Phi3": {"pad_token_id": 0}, "Gemma2": {"head_dim": 64, "query_pre_attn_scalar": 64}, "Mixtral": {},
    "Qwen3Moe": {"num_experts": 32, "num_experts_per_tok": 8, "moe_intermediate_size": 384, "head_dim": 64},
    "GptOss": {"num_local_experts": 16, "intermediate_size": 512, "head_dim": 64,
               "layer_types": ["full_attention"] * 2},
    "DeepseekV3": {"n_routed_experts": 32, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
                   "moe_intermediate_size": 256, "first_k_dense_replace": 1, "q_lora_rank": 128, "kv_lora_rank": 64,
                   "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32, "num_key_value_heads": 8},
    "Llama4Text": {"num_local_experts": 8, "intermediate_size_mlp": 1024, "intermediate_size": 512, "head_dim": 64},
    "Mamba": {"num_hidden_layers": 2, "intermediate_size": 1024},
    "Bloom": {"hidden_size": 1024, "n_layer": 2, "n_head": 8, "intermediate_size": 4096},
}  # fmt: skip


def empty(family, dtype="bfloat16", **more):
    config = getattr(tf, f"{family}Config")(**{**SIZES, **OWN[family], **more})
    with init_empty_weights():
        made = getattr(tf, f"{family.removesuffix('Text')}ForCausalLM")(config)
    return made.to(getattr(torch, dtype)).eval()


CASES = [
    ("Mixtral", 1, 1, "int8"), ("Mixtral", 1, 32, "nf4"), ("Mixtral", 32, 4, "nf4-double"),
    ("Qwen3Moe", 1, 1000, None), ("GptOss", 1, 1000, None), ("GptOss", 1, 500, "int8"), ("DeepseekV3", 1, 500, "nf4"),
    ("Llama4Text", 1, 500, None), ("Llama", 8, 200, "int8"), ("Llama", 4, 32, "nf4"), ("Gemma2", 1, 1000, None),
    ("Mamba", 1, 32, None), ("Phi3", 4, 200, None), ("Bloom", 8, 100, None),
]  # fmt: skip


@pytest.mark.parametrize(("family", "batch", "prompt", "kind"), CASES)
def test_a_plan_keeps_free_what_a_run_takes(family, batch, prompt, kind):
    """The products of experts, scores that are stored, and weights that are decoded while they multiply."""
    how = {"quantization": kind, "dtype": "bfloat16" if kind else None}
    given = plan(empty(family), {0: "4GiB"}, batch=batch, context=prompt + 1, overhead=0, **how)
    line = dry_run(empty(family), given, batch, prompt, 1, "H200").timeline()
    taken = max(map(sum, zip(*(held for kind, held in line.kinds.items() if kind != "workspace"))))
    assert taken <= 1.003 * given.used[0] + 0.3 * MiB
    assert given.used[0] <= 1.25 * taken


def test_a_dry_run_has_the_dtype_that_was_planned():
    """As `load_checkpoint_and_dispatch(dtype=...)` does."""
    given = plan(empty("Mixtral", "float32"), {0: "4GiB"}, dtype="float16", batch=1, context=33, overhead=0)
    run = dry_run(empty("Mixtral", "float32"), given, 1, 32, 1, "H200")
    assert run.timeline().at_peak()["weights"] == pytest.approx(given.shares[0].weights, rel=0.001)


def test_experts_inside_of_offloaded_blocks_have_slots_of_their_own():
    """The largest dense layer in flight may be another one than the block with the experts."""
    models = [empty("DeepseekV3", num_hidden_layers=3) for _ in range(2)]
    given = plan(models[0], {0: "1GiB", "cpu": "4GiB"}, {"": "cpu", "lm_head": 0}, overhead=0)
    run = dry_run(models[1], given, 1, 1, 1, "H200")
    slots = max(run.timeline().kinds["slots"])
    assert slots - 4096 <= given.shares[0].reserve <= 1.05 * slots  # beside alignment


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_layer_whose_weight_is_read_by_the_models_own_code_is_not_quantized(kind):
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 96, "state_size": 4}
    made = tf.MambaForCausalLM(tf.MambaConfig(**sizes)).eval()
    with init_empty_weights():
        empty = tf.MambaForCausalLM(tf.MambaConfig(**sizes)).eval()
    made = load_and_quantize_model(made, config_of(kind, "float32"), device_map={"": "cpu"})
    assert made.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, pad_token_id=0).shape == (1, 5)
    weights = sum(one.nbytes for one in (*made.parameters(), *made.buffers()))
    run = dry_run(empty, None, 1, 3, 1, "T4", quantization=kind, dtype="float32")
    assert run.timeline().at_peak()["weights"] == pytest.approx(weights, abs=4096)
