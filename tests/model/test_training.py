"""The training table: against what the papers print, and against two real processes."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn

import bigkit
from bigkit import zoo
from bigkit.model.training import activation_bytes_kept, lora_parameters, shared_bytes, training_rows
from tests.ranks import Ranks


@pytest.mark.parametrize(
    "parameters, gpus, expected",
    [
        (7.5e9, 1, (120, 120, 120)), (7.5e9, 4, (52.5, 41.3, 30)), (7.5e9, 16, (35.6, 21.6, 7.5)),
        (7.5e9, 64, (31.4, 16.6, 1.88)), (7.5e9, 256, (30.4, 15.4, 0.47)), (7.5e9, 1024, (30.1, 15.1, 0.12)),
        (128e9, 4, (896, 704, 512)), (128e9, 64, (536, 284, 32)), (128e9, 1024, (513, 257, 2)),
        (1e12, 64, (4187, 2218, 250)), (1e12, 1024, (4011, 2013, 15.6)),
    ],
)  # fmt: skip
def test_zero_is_as_its_paper_prints_it(parameters: float, gpus: int, expected: tuple[float, ...]) -> None:
    """arXiv:1910.02054, table 1: GB on each GPU for stages 1, 2 and 3."""
    for stage, size in enumerate(expected, 1):
        assert sum(shared_bytes(int(parameters), gpus, stage)) / 1e9 == pytest.approx(size, rel=0.01, abs=0.005), stage


def test_lora_is_as_its_paper_prints_it() -> None:
    """arXiv:2106.09685, section 5.5 and table 4: GPT-3 with adapters on two matrices of each layer, r = 1 and 8."""
    d, layers = 12288, 96
    for rank, printed in ((1, 4.7e6), (8, 37.7e6)):
        assert rank * 2 * layers * (d + d) == pytest.approx(printed, rel=0.01)
    with bigkit.init_empty_weights():
        block = nn.ModuleDict({name: nn.Linear(d, d, bias=False) for name in ("q_proj", "k_proj", "v_proj")})
        model = nn.ModuleDict({"h": nn.ModuleList([block] + [nn.ModuleDict({
            name: nn.Linear(d, d, bias=False) for name in ("q_proj", "k_proj", "v_proj")}) for _ in range(layers - 1)]),
            "lm_head": nn.Linear(d, 10)})  # fmt: skip
    spec = bigkit.describe(model)
    assert lora_parameters(spec, 8, ["q_proj", "v_proj"]) == pytest.approx(37.7e6, rel=0.01)


@pytest.mark.filterwarnings("ignore")  # peft reads what Transformers will remove
@pytest.mark.parametrize("experts", [False, True])
def test_lora_counts_what_peft_makes(experts: bool) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    config = zoo.empty_model("qwen3-30b-a3b").config
    for name, value in {"hidden_size": 32, "num_hidden_layers": 2, "num_experts": 4, "moe_intermediate_size": 16,
                        "intermediate_size": 32, "head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
                        "vocab_size": 64}.items():  # fmt: skip
        setattr(config, name, value)
    config.layer_types = None
    with bigkit.init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    spec = bigkit.describe(model)
    targets = ["q_proj", "v_proj"]
    settings = peft.LoraConfig(
        r=4, target_modules=targets,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if experts else None,
    )  # fmt: skip
    made = peft.get_peft_model(AutoModelForCausalLM.from_config(config), settings)
    trained = sum(parameter.numel() for parameter in made.parameters() if parameter.requires_grad)
    assert lora_parameters(spec, 4, [*targets, "gate_up_proj", "down_proj"], experts) == trained


def test_recomputation_saves_what_its_paper_says() -> None:
    """arXiv:2205.05198, section 5: scores are 5 a s / h of 34 + 5 a s / h; full recomputation keeps 2."""
    spec = zoo.describe("llama-2-7b")
    tokens, hidden, layers = 2048, 4096, 32
    assert activation_bytes_kept(spec, 1, tokens) == 34 * tokens * hidden * layers
    assert activation_bytes_kept(spec, 1, tokens, True) == (2 * layers + 34) * tokens * hidden
    for heads, length, width, saved in ((96, 2048, 12288, 0.70), (128, 2048, 20480, 0.65)):
        assert 1 - 34 / (34 + 5 * heads * length / width) == pytest.approx(saved, abs=0.01)


def test_rows_of_one_gpu_and_of_several() -> None:
    one = bigkit.estimate_memory("llama-2-7b")
    several = bigkit.estimate_memory("llama-2-7b", gpus=8, checkpointing=True)
    assert [row.method for row in one.training][:2] == ["Adam, float32", "Adam, mixed bfloat16"]
    totals = [row.total for row in several.training[:4]]
    assert totals == sorted(totals, reverse=True) and "each of 8 GPUs, with activation checkpointing" in str(several)
    assert several.training[0].activations < one.training[1].activations / 11
    mixture = training_rows(zoo.describe("mixtral-8x7b"), 1, 2048)
    trained = {row.method: row.trained for row in mixture}
    assert trained["LoRA r=16 on experts too, bfloat16"] > 5 * trained["LoRA r=16, bfloat16"]
    with pytest.raises(ValueError, match="gpus must be a whole number"):
        bigkit.estimate_memory("llama-2-7b", gpus=0)
    with pytest.raises(ValueError, match="expected a stage"):
        shared_bytes(8, 2, 4)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)) for _ in range(3)))


def trained(state: Any, way: str) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer states that this process keeps after a step of Adam in float32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    model = small()
    runs: Any = model
    if way == "fsdp":
        mesh = init_device_mesh("cpu", (state.num_processes,))
        for block in model:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        runs = DistributedDataParallel(model)
    made: Any = ZeroRedundancyOptimizer if way == "zero-1" else torch.optim.Adam
    options: Any = {"optimizer_class": torch.optim.Adam} if way == "zero-1" else {}
    optimizer = made(model.parameters(), lr=1e-3, **options)
    runs(torch.randn(4, 64)).square().mean().backward()
    optimizer.step()
    states = optimizer.optim.state if way == "zero-1" else optimizer.state

    def size(tensors: Any) -> int:
        local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
        return sum(tensor.numel() * tensor.element_size() for tensor in local if tensor.numel() > 1)

    moments = [value for one in states.values() for value in one.values() if torch.is_tensor(value)]
    return size(model.parameters()), size(p.grad for p in model.parameters()), size(moments)


@pytest.mark.parametrize("way, stage", [("ddp", 0), ("zero-1", 1), ("fsdp", 3)])
def test_two_processes_keep_what_is_foretold(way: str, stage: int) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    n = sum(parameter.numel() for parameter in small().parameters())
    ranks = Ranks(2)
    try:
        kept = ranks(trained, way)
    finally:
        ranks.close()
    foretold = shared_bytes(n, 2, stage, "float32")
    if way == "zero-1":  # whole parameters go to one rank or the other
        assert sum(states for *_, states in kept) == 2 * foretold[2]
        assert [sizes[:2] for sizes in kept] == [foretold[:2]] * 2
        assert all(states == pytest.approx(foretold[2], rel=0.1) for *_, states in kept)
    else:
        assert kept == [foretold] * 2
