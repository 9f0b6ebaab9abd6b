"""A stack that is decoded on a stream of its own: right in every order of streams, and only for the same choice."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigkit.checkpoints import ahead
from bigkit.checkpoints.ahead import decoded_in_turn
from tests.fake_streams import World


class Block(nn.Module):
    """Experts in int8, with a scale."""

    stacks = ("up", "down")

    def __init__(self) -> None:
        super().__init__()
        self.parts = {own: torch.randint(-99, 99, (6, 4, 4), dtype=torch.int8) for own in self.stacks}
        self.decoded: list[str] = []

    def decoder(self, experts: Tensor) -> Callable[[str], Tensor]:
        def decode(own: str) -> Tensor:
            self.decoded.append(own)
            return self.parts[own][experts].float() / 50

        return decode

    def forward(self, x: Tensor) -> Tensor:
        experts = (x.abs().sum(0) * 10).long()[:3] % 6
        up = decoded_in_turn(self, "up", experts, self.decoder(experts))
        x = (x @ up.sum(0)).tanh()
        return x @ decoded_in_turn(self, "down", experts, self.decoder(experts)).sum(0)

    def plain(self, x: Tensor) -> Tensor:
        experts = (x.abs().sum(0) * 10).long()[:3] % 6
        decode = self.decoder(experts)
        return (x @ decode("up").sum(0)).tanh() @ decode("down").sum(0)


@pytest.mark.parametrize("seed", range(12))
def test_in_any_order_of_streams(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    torch.manual_seed(seed)
    ahead._stream.cache_clear()
    blocks, x = [Block(), Block()], torch.randn(2, 4)
    expected = x
    for block in (*blocks, *blocks):
        expected = block.plain(expected)
    world: Any = World(monkeypatch)
    kept = [x, *(part for block in blocks for part in block.parts.values())]
    world.inputs = {tensor.untyped_storage()._cdata for tensor in kept}
    with world:
        found = x
        for block in (*blocks, *blocks):
            found = block(found)
    world.run(random.Random(seed).choice)
    assert torch.equal(found, expected) and len(world.streams) == 2
    ahead._stream.cache_clear()


def test_only_for_the_same_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead._stream.cache_clear()
    block, world = Block(), World(monkeypatch)
    first, other = torch.tensor([1, 2]), torch.tensor([1, 2])
    with world:
        for asked, choice, decoded in (
            ("up", first, ["up", "down"]), ("down", first, []), ("down", first, ["down"]),
            ("up", first, ["up", "down"]), ("down", other, ["down"]),  # what was begun is not taken
            ("up", first, ["up", "down"]), ("up", first, ["up", "down"]), ("down", first, []),
        ):  # fmt: skip
            block.decoded = []
            weights = decoded_in_turn(block, asked, choice, block.decoder(choice))
            assert block.decoded == decoded and torch.equal(weights, block.parts[asked][choice].float() / 50)
    assert not vars(first) and not vars(other)
    ahead._stream.cache_clear()


def test_nothing_stays_where_a_forward_failed_between_two_products(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead._stream.cache_clear()
    block, x, made = Block(), torch.randn(2, 4), list[weakref.ref[Tensor]]()

    def decoder(experts: Tensor) -> Callable[[str], Tensor]:
        def decode(own: str) -> Tensor:
            weights = block.parts[own][experts].float() / 50
            made.append(weakref.ref(weights))
            return weights

        return decode

    def fails(*_: Any) -> Tensor:
        raise RuntimeError("between two products")

    still = SimpleNamespace(wait_stream=lambda other: None, wait_event=lambda event: None, record_event=lambda: None)
    for name, value in {"Stream": still, "current_stream": still, "stream": nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(block, "decoder", decoder)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "tanh", fails)
        with pytest.raises(RuntimeError, match="between two products"):
            block(x)
    gc.collect()  # the error's frames
    assert len(made) == 2 and not any(weights() is not None for weights in made)
    assert torch.equal(block(x), block.plain(x))
    ahead._stream.cache_clear()
