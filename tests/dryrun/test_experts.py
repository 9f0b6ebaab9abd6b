"""Dry runs of mixtures: of experts that rest elsewhere the chosen ones travel, as many as chance gives."""

import pytest
import transformers as tf

from bigkit import dry_run, init_empty_weights, plan
from bigkit.machine.hardware import HARDWARE
from bigkit.machine.roofline import FILL
from bigkit.maps.advise import advise
from bigkit.offload.choice import by_chance
from bigkit.zoo import describe

COUNT, CHOSEN, BLOCKS = 16, 2, 6


def qwen():
    config = tf.Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=BLOCKS, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, moe_intermediate_size=32, num_experts=COUNT, num_experts_per_tok=CHOSEN,
    )  # fmt: skip
    with init_empty_weights():
        return tf.Qwen3MoeForCausalLM(config)


@pytest.mark.parametrize("replay", [True, False])
def test_bytes_that_travel(replay):
    experts = {f"model.layers.{i}.mlp.experts": "cpu" for i in range(BLOCKS)}
    run = dry_run(qwen(), {"": 0, **experts}, 1, 32, 4, "H200", dtype="float32", replay=replay)
    whole = COUNT * 3 * 64 * 32 * 4
    fills = {step: [] for step, _ in run.steps}
    start = 0
    for step, end in run.steps:
        fills[step] = [op.bytes for op in run.operations[start:end] if op.name == FILL]
        start = end
    assert fills["prefill"] == [whole] * BLOCKS, "a prompt brings whole layers, each once"
    for token in range(1, 5):
        assert fills[f"token {token}"] == [whole * CHOSEN // COUNT] * BLOCKS


def test_by_chance():
    assert by_chance(COUNT, 1, CHOSEN, 3) != by_chance(COUNT, 1, CHOSEN, 4)
    average = sum(
        len(set(by_chance(COUNT, 1, CHOSEN, a) + by_chance(COUNT, 1, CHOSEN, 9999 + a))) for a in range(1, 400)
    )
    assert len(by_chance(COUNT, 2, CHOSEN, 0)) == round(average / 399)
    assert by_chance(COUNT, 1000, CHOSEN, 0) == [*range(COUNT)]


def test_advice_counts_what_travels():
    model, machine = describe("mixtral-8x7b"), HARDWARE["1 x RTX 4090"]
    option = advise(model, machine, stored=(None,)).best
    assert option.plan.experts == (2, 8) and option.bottleneck == "link"
    link = 0.87 * machine.gpus[0].link
    assert option.waits["link"] == pytest.approx(option.plan.offloaded * 2 / 8 / link)
    assert option.prefill >= option.plan.offloaded / link
    many = advise(model, machine, batch=16, stored=(None,)).best
    assert many.waits["link"] > 0.98 * many.plan.offloaded / link
    assert plan("mixtral-8x7b", hardware="1 x RTX 4090", dtype="bfloat16").experts
