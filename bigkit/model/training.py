"""What training takes on each of several GPUs: weights, gradients, the optimizer's states, and activations.

Adam in mixed precision keeps 16 bytes for each of n parameters: a weight and a gradient of 2 bytes each, and 12 for the
optimizer (a float32 weight and two moments). By hand, for 7.5 billion of them on each of 64 GPUs:

    data parallel    16 n                        120 GB       every GPU has all
    ZeRO-1           4 n + 12 n / 64              31.4        each keeps the optimizer's states of its share
    ZeRO-2           2 n + 14 n / 64              16.6        and the gradients
    ZeRO-3, FSDP     16 n / 64                     1.9        and the weights, which are gathered unit by unit

A unit that is gathered is there whole while it works, and so is the next one; that is counted with the weights.

Leaves out: tensor, sequence and pipeline parallelism, buffers of collectives, scores of the vocabulary, what autocast
makes (16-bit copies of all weights, activations in float32), and what an allocator wastes. Measured on two H200s, peaks
are 1.31 times the row's with autocast and data parallel, 1.08 with FSDP, 0.99 with FSDP and activation checkpointing.
Sources: ZeRO (arXiv:1910.02054), section 3 and table 1; PyTorch FSDP (arXiv:2304.11277), section 3; Reducing Activation
Recomputation (arXiv:2205.05198), equations 1 and 5; LoRA (arXiv:2106.09685), section 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from .precision import Precision, is_stacked, quantized_stacks
from .spec import ModelSpec

LORA_RANK = 16
# By what is shared: nothing, the optimizer's states, gradients too, weights too.
STAGES = ("data parallel", "ZeRO-1", "ZeRO-2", "ZeRO-3 or FSDP")
_EACH = {"float32": (4, 4, 8), "bfloat16": (2, 2, 12)}  # bytes of a parameter's weight, gradient and optimizer states


@dataclass(frozen=True)
class TrainingRow:
    """What one way of training takes on each GPU; bytes. `trained` is the number of parameters that are trained."""

    method: str
    trained: int
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All parts together."""
        return self.weights + self.gradients + self.optimizer + self.activations


def shared_bytes(parameters: int, gpus: int = 1, stage: int = 0, dtype: str = "bfloat16") -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer states that each GPU keeps, with Adam.

    Args:
        parameters: of the model, all trained.
        gpus: how many train it together.
        stage: 0 to 3, see `STAGES`.
        dtype: "bfloat16" (or float16) in mixed precision, or "float32".

    Raises:
        ValueError: another stage or dtype.

    >>> [round(sum(shared_bytes(7_500_000_000, 64, stage)) / 1e9, 1) for stage in range(4)]
    [120.0, 31.4, 16.6, 1.9]
    """
    if stage not in range(4) or dtype not in _EACH:
        raise ValueError(f"expected a stage from 0 to 3 and one of {', '.join(_EACH)}, not {stage!r} and {dtype!r}")
    share = ceil(parameters / gpus)
    first_shared = (3, 2, 1)  # the stage from which weights, gradients and states are shared
    weights, gradients, states = (
        each * (share if stage >= first else parameters) for each, first in zip(_EACH[dtype], first_shared)
    )
    return weights, gradients, states


def activation_bytes_kept(model: ModelSpec, batch: int, tokens: int, checkpointing: bool = False) -> int:
    """What a 16-bit forward keeps for its backward: 34 * tokens * batch * hidden_size bytes a block.

    With activation checkpointing each block keeps its input alone, 2 * tokens * batch * hidden_size, and one block at a
    time is computed again. Attention scores are left out: fused attention does not store them.

    Source: arXiv:2205.05198, equation 1 without scores, and section 5 for full recomputation.
    """
    each, blocks = tokens * batch * model.facts.get("hidden_size", 0), model.facts.get("num_hidden_layers", 0)
    return 2 * each * blocks + 34 * each if checkpointing else 34 * each * blocks


def lora_parameters(
    model: ModelSpec, rank: int = LORA_RANK, targets: Iterable[str] | None = None, experts: bool = False
) -> int:
    """Parameters of LoRA adapters: rank * (inputs + outputs) of each linear layer, and with `experts` of each expert.

    Args:
        model: its linear layers, but for the output head.
        rank: of the two factors.
        targets: own names of the layers that get one ("q_proj", "v_proj"); None takes all.
        experts: give one to each expert of stacked experts too, whose layers are matrices of one tensor.

    >>> from bigkit import zoo
    >>> lora_parameters(zoo.describe("llama-2-7b"), 8, ["q_proj", "v_proj"])  # what peft prints for it
    4194304
    """
    precision = model.precision("bfloat16", "nf4-double")
    wanted = None if targets is None else {*targets}
    names = [name for name in model.quantized(precision) if wanted is None or name.rpartition(".")[2] in wanted]
    count = sum(sum(model.tensors[f"{name}.weight"][0].shape) for name in names)
    for name in quantized_stacks(model, precision) if experts else ():
        if wanted is None or name.rpartition(".")[2] in wanted:
            experts_here, rows, columns = model.tensors[name][0].shape
            count += experts_here * (rows + columns)
    return rank * count


def training_rows(
    model: ModelSpec, batch: int, context: int, gpus: int = 1, checkpointing: bool = False
) -> tuple[TrainingRow, ...]:
    """Ways to train a model, and what each takes on each GPU.

    Args:
        model: what is trained, with its head.
        batch, context: sequences on each GPU, and tokens each.
        gpus: how many train it together. With several, the ways to share come first.
        checkpointing: keep the inputs of blocks alone, and compute the rest again for the backward.
    """
    n, kept = model.parameters, activation_bytes_kept(model, batch, context, checkpointing)
    rows = []
    if gpus > 1:
        for stage, name in enumerate(STAGES):
            weights, gradients, states = shared_bytes(n, gpus, stage)
            gathered = _gathered(model) if stage == 3 else 0
            rows.append(TrainingRow(f"{name}, bfloat16", n, weights + gathered, gradients, states, kept))
    else:
        for name, dtype, activations in (
            ("Adam, float32", "float32", 2 * kept),
            ("Adam, mixed bfloat16", "bfloat16", kept),
        ):
            _, gradients, states = shared_bytes(n, dtype=dtype)
            rows.append(TrainingRow(name, n, model.bytes(model.precision(dtype)), gradients, states, activations))
    bf16, nf4 = (model.bytes(model.precision("bfloat16", kind)) for kind in (None, "nf4-double"))
    ways = {f"LoRA r={LORA_RANK}, bfloat16": (bf16, False), f"QLoRA r={LORA_RANK}, nf4-double": (nf4, False)}
    if any(is_stacked(owner) for _, owner in model.tensors.values()):
        ways[f"LoRA r={LORA_RANK} on experts too, bfloat16"] = (bf16, True)
    if gpus > 1:
        ways[f"LoRA r={LORA_RANK}, FSDP, bfloat16"] = (ceil(bf16 / gpus) + _gathered(model), False)
    for name, (weights, experts) in ways.items():
        if adapters := lora_parameters(model, experts=experts):
            mine = ceil(adapters / gpus) if "FSDP" in name else adapters
            rows.append(TrainingRow(name, adapters, weights + 4 * mine, 4 * mine, 8 * mine, kept))
    return tuple(rows)


def _gathered(model: ModelSpec) -> int:
    """Bytes of the two largest units in 16 bit: one works while the next is gathered. Blocks are units."""
    precision = Precision("bfloat16")
    return 2 * max(layer.bytes(precision) for layer in model.layers())
