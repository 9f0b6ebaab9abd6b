"""A run on a GPU with other kernels of attention, made of another run: against one that is made there."""

import pytest
import torch
from torch import nn

from bigkit import dry_run
from bigkit.dryrun.rehearse import target_of
from bigkit.dryrun.run import on_machine
from bigkit.machine.hardware import GPUS, machine_of

PARTS = ("recordings", "kinds", "operations", "steps", "workspaces", "capacity", "peak_reserved", "seconds")
OUTER = ("transformer.wte", "transformer.wpe", "transformer.ln_f", "transformer.drop", "lm_head")
MAPS = {
    "one GPU": None,
    "two GPUs": dict.fromkeys(OUTER, 0) | {f"transformer.h.{i}": int(i >= 6) for i in range(12)},
    "half in RAM": dict.fromkeys(OUTER, 0) | {f"transformer.h.{i}": "cpu" if i % 2 else 0 for i in range(12)},
}


@pytest.mark.parametrize("places", MAPS, ids=[*MAPS])
@pytest.mark.parametrize("source, other", [("T4", "H200"), ("A100-40GB", "T4"), ("H200", "RTX 4090")])
def test_a_run_with_other_attention_is_what_a_run_there_would_be(source, other, places):
    start, expected = (
        dry_run("gpt2", MAPS[places], 2, 16, 2, f"2 x {name}", dtype="float16") for name in (source, other)
    )
    assert target_of(GPUS[other]) not in start.alike, "else this test compares nothing"
    found = on_machine(start, machine_of(f"2 x {other}"))
    for part in PARTS:
        assert getattr(found, part) == getattr(expected, part), part


def test_of_a_run_with_graphs_no_other_is_made():
    run = dry_run("gpt2", None, 1, 8, 2, "H200", dtype="float16", graphs=True)
    assert on_machine(run, machine_of("T4")) is None


class AttentionFirst(nn.Module):
    """Attention to an image, before any product of matrices."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(64, 10)

    def forward(self, images):
        x = images.bfloat16().flatten(1)[:, :1024].view(-1, 1, 16, 64)
        return self.out(nn.functional.scaled_dot_product_attention(x, x, x)[:, 0])


def test_of_attention_that_may_be_the_first_product_no_other_is_made():
    """A T4 has no kernel for it in bfloat16: it multiplies matrices, and the first product takes a workspace."""
    with torch.device("meta"):
        model = AttentionFirst().eval()
    run = dry_run(model, None, 2, 224, hardware="H200", dtype="bfloat16")
    assert on_machine(run, machine_of("T4")) is None and run.workspaces
