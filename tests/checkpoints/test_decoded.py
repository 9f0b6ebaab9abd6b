"""Stacks that are decoded when they are used: a prompt's product is that of the whole weight, in pieces."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations.moe import _grouped_linear

from bigkit.checkpoints import decoded
from bigkit.checkpoints.codecs import find_stack_codec
from bigkit.checkpoints.decoded import DecodedStack
from bigkit.quantize.stacks import quantized_stack

EXPERTS, ROWS, COLUMNS = 8, 48, 64


def stored(format: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    if format == "fp8":
        codes = torch.randn(EXPERTS, ROWS, COLUMNS).to(torch.float8_e4m3fn)
        return {"": codes, "_scale_inv": torch.rand(EXPERTS, ROWS // 16, COLUMNS // 16)}
    if format == "mxfp4":
        blocks = torch.randint(0, 256, (EXPERTS, COLUMNS, ROWS // 16, 8), dtype=torch.uint8)
        return {
            "_blocks": blocks,
            "_scales": torch.randint(118, 122, (EXPERTS, COLUMNS, ROWS // 16), dtype=torch.uint8),
        }
    pytest.importorskip("bitsandbytes")
    experts = torch.randn(EXPERTS, ROWS, COLUMNS, dtype=torch.bfloat16)
    parts = quantized_stack(experts, EXPERTS, format, torch.device("cpu"))
    return {suffix: part.detach() for suffix, part in parts.items()}


def stack_of(format: str, dtype: torch.dtype) -> DecodedStack:
    parts = stored(format)
    codec = find_stack_codec("w", [f"w{suffix}" for suffix in parts])
    assert codec is not None and codec.format == format
    return DecodedStack(parts, codec, dtype, (ROWS, COLUMNS))


class Largest(TorchDispatchMode):
    """The elements of the largest tensor with experts that is made within."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.ndim == 3:
                self.most = max(self.most, tensor.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("format", ["fp8", "mxfp4", "nf4", "fp4-double", "int8"])
def test_a_prompts_product_in_pieces(
    format: str, transposed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit that of the whole weight; some experts are chosen by nobody, and so are all of one piece."""
    stack, counts = stack_of(format, dtype), torch.tensor([3, 0, 5, 1, 0, 0, 4, 7])
    whole = stack.all()
    x = torch.randn(int(counts.sum()), ROWS if transposed else COLUMNS, dtype=dtype)
    ends = counts.cumsum(0).to(torch.int32)
    expected = _grouped_linear(x, whole, ends, is_transposed=transposed)
    for at_a_time in (1, 2 * ROWS * COLUMNS, 3 * ROWS * COLUMNS, 10**9):
        monkeypatch.setattr(decoded, "AT_A_TIME", at_a_time)
        with Largest() as seen:
            found = _grouped_linear(x, stack, ends, is_transposed=transposed)
        assert torch.equal(found, expected), at_a_time
        some = min(EXPERTS, max(1, at_a_time // (ROWS * COLUMNS)))
        assert 0 < seen.most <= some * ROWS * COLUMNS, "no more experts than that are decoded at once"


def test_pieces_are_of_chosen_experts_however_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = stack_of("fp8", torch.float32).transpose(1, 2)
    ends = torch.tensor([1, 0, 2, 0, 1, 0, 0, 1]).cumsum(0)
    x, pieces, held = torch.randn(5, COLUMNS), list[int](), list[Any]()

    def product(rows: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
        held.append(weakref.ref(weights))
        pieces.append(len(weights))
        begins = [0, *offs.tolist()]
        return torch.cat([rows[a:b] @ one for a, b, one in zip(begins, begins[1:], weights)])

    def piece(stack: DecodedStack, experts: Any, decode: Any = DecodedStack.__getitem__) -> Tensor:
        assert not any(one() is not None for one in held), "the piece before takes no memory any more"
        weights: Tensor = decode(stack, experts)
        return weights

    monkeypatch.setattr(DecodedStack, "__getitem__", piece)
    monkeypatch.setattr(decoded, "AT_A_TIME", 3 * ROWS * COLUMNS)
    found = stack.grouped_mm(x, ends, product)
    assert pieces == [3, 1]
    monkeypatch.undo()
    whole = stack.all()
    assert torch.equal(found, torch.cat([x[:1] @ whole[0], x[1:3] @ whole[2], x[3:4] @ whole[4], x[4:] @ whole[7]]))


def test_what_code_asks_of_a_weight_decodes_nothing() -> None:
    stack = stack_of("fp8", torch.bfloat16)
    with Largest() as seen:
        turned = stack.transpose(-2, -1)
        assert stack.shape == (EXPERTS, ROWS, COLUMNS) and turned.shape == (EXPERTS, COLUMNS, ROWS)
        assert turned.size(1) == COLUMNS and turned.dtype == torch.bfloat16 and turned.device.type == "cpu"
        assert turned.ndim == 3 and turned.data_ptr() % 16 == 0
    assert seen.most == 0
    many = torch.randint(EXPERTS, (5 * EXPERTS,))
    assert torch.equal(stack[many], stack.all()[many]) and torch.equal(turned[many], turned.all()[many])
    assert torch.equal(turned[[2, 5]], stack.all()[[2, 5]].mT) and torch.equal(stack[3], stack.all()[3])
    assert torch.equal(stack.transpose(0, 1), stack.all().transpose(0, 1))
    assert stack.numel() == math.prod(stack.shape) and torch.equal(torch.add(stack, 1), stack.all() + 1)
