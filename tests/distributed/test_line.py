"""Messages of a pipeline arrive as they were sent, in order, whatever their sizes were before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bigkit.distributed import line
from tests.ranks import Ranks

SHAPES = [(), (3,), (0,), (2, 0, 4), (2, 5, 8), (1, 1, 8), (1, 1, 8), (700, 3), (40, 70), (2, 5, 8), (1,)]


@pytest.fixture(scope="module")
def two() -> Any:
    group = Ranks(2)
    yield group
    group.close()


def messages() -> list[tuple[list[int], torch.Tensor]]:
    torch.manual_seed(0)
    made = []
    for i, shape in enumerate(SHAPES * 3):
        dtype = [torch.float32, torch.bfloat16, torch.int64, torch.float64][i % 4]
        made.append(([i, -i, 2**55 + i][: i % 4], (100 * torch.randn(shape)).to(dtype)))
    return made


def both_ways(state: Any, tag: int, most: int, ahead: int) -> list[bool]:
    """Each rank sends all messages to the other, and takes the other's in between."""
    line._MOST = most
    to, come = (line.Line(1 - state.process_index, tag, ahead) for _ in range(2))
    same = []
    for words, tensor in messages():
        to.post(words, tensor.mT if tensor.ndim > 1 else tensor)
        found, arrived = come.take(torch.device("cpu"))
        expected = tensor.mT if tensor.ndim > 1 else tensor
        same.append(found == words and arrived.dtype == tensor.dtype and torch.equal(arrived, expected))
    for words, tensor in messages()[:8]:  # several under way
        to.post(words, tensor)
    for words, tensor in messages()[:8]:
        found, arrived = come.take(torch.device("cpu"))
        same.append(found == words and torch.equal(arrived, tensor))
    to.flush()
    return same


@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("most", [2**22, 100, 0])
def test_messages_arrive(two: Ranks, most: int, ahead: int) -> None:
    for same in two(both_ways, 10 * most + ahead, most, ahead):
        assert len(same) == 3 * len(SHAPES) + 8 and all(same), same


def changed(state: Any) -> list[bool]:
    """Whether tensors arrive as they were when they were posted, though their owner changes them at once."""
    to, come = (line.Line(1 - state.process_index, 5) for _ in range(2))
    for i in range(4):
        to.post([], tensor := torch.full((1000 * i + 1,), 7.0))
        tensor.zero_()
    state.wait_for_everyone()
    same = [torch.equal(come.take(torch.device("cpu"))[1], torch.full((1000 * i + 1,), 7.0)) for i in range(4)]
    to.flush()
    return same


def test_a_tensor_may_be_changed_while_it_is_under_way(two: Ranks) -> None:
    assert two(changed) == [[True] * 4] * 2


def refused(state: Any) -> str:
    try:
        line.Line(1 - state.process_index, 3).post([], torch.tensor([True]))
    except TypeError as error:
        return str(error)
    return ""


def test_what_cannot_be_sent_is_said(two: Ranks) -> None:
    for rank, said in enumerate(two(refused)):
        assert said.startswith(
            f"a tensor of torch.bool and 1 dimensions cannot be sent to process {1 - rank}: expected"
        )
