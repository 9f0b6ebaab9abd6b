"""The kernel that gathers and decodes experts in four bits, run by Triton's interpreter: bitsandbytes' numbers."""

import os
import warnings
from contextlib import nullcontext

import pytest
import torch

from bigkit.checkpoints import fused
from bigkit.checkpoints.codecs import find_stack_codec
from bigkit.checkpoints.decoded import DecodedStack
from bigkit.quantize.stacks import quantized_stack

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="tests/gpu has this kernel compiled")


@pytest.fixture
def interpreted(monkeypatch):
    """Triton's interpreter in the place of its compiler."""
    pytest.importorskip("triton")
    for made in (fused._kernels, fused.triton_works, fused._values):
        made.cache_clear()
    for name in ("device", "device_of"):
        monkeypatch.setattr(torch.cuda, name, lambda given: nullcontext())
    yield
    monkeypatch.undo()
    for made in (fused._kernels, fused.triton_works, fused._values):
        made.cache_clear()


def stack_of(shape, kind):
    torch.manual_seed(0)
    weights = torch.randn(*shape)
    parts = {suffix: part.detach() for suffix, part in quantized_stack(weights, shape[0], kind, weights.device).items()}
    return parts, find_stack_codec("w", [f"w{suffix}" for suffix in parts])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(3, 64, 96), (5, 8, 64), (4, 130, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_numbers_are_those_of_bitsandbytes(kind, shape, dtype, interpreted):
    """The last shape's blocks are no multiple of a program's."""
    parts, codec = stack_of(shape, kind)
    for experts in ([2, 0, 2], [1], []):
        chosen = torch.tensor(experts, dtype=torch.long)
        expected = codec.decode({suffix: part[chosen] for suffix, part in parts.items()}, dtype)
        found = fused.decode_chosen(kind, parts, chosen, dtype)
        assert found.dtype == dtype and torch.equal(found, expected)


def test_what_it_cannot_do_is_left_to_pytorch(interpreted, monkeypatch):
    chosen = torch.tensor([1, 0])
    for shape, kind in (((2, 3, 34), "nf4"), ((2, 8, 64), "nf4-double"), ((2, 8, 64), "int8")):
        parts, _ = stack_of(shape, kind)
        assert fused.decode_chosen(kind, parts, chosen, torch.float32) is None
    parts, codec = stack_of((2, 8, 64), "nf4")
    monkeypatch.setattr(fused, "_kernels", lambda: (_ for _ in ()).throw(RuntimeError("no compiler")))
    fused.triton_works.cache_clear()
    with pytest.warns(UserWarning, match=r"Triton makes no kernel for cpu \(RuntimeError: no compiler\)"):
        assert fused.decode_chosen("nf4", parts, chosen, torch.float32) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert fused.decode_chosen("nf4", parts, chosen, torch.float32) is None
    stack = DecodedStack(parts, codec, torch.float32, (8, 64))
    assert torch.equal(stack[chosen], stack.all()[chosen])
