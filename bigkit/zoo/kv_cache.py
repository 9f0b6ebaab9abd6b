"""Keys and values that a GPT has computed, so that a new token costs one token's work.

Leaves out: caches of Transformers' models (`offload/resting_cache.py` has one that rests in RAM).
"""

from __future__ import annotations

from torch import Tensor


class LayerCache:
    """Keys and values that one block has computed: up to `room` tokens, each (batch, heads, tokens, head size).

    It has no `.to`, so hooks that move a module's inputs to its device hand it over as it is.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the keys and values of new tokens; returns those of all tokens so far."""
        if self.keys is None or self.values is None:
            batch, heads, _, size = k.shape
            self.keys = k.new_empty(batch, heads, self.room, size)
            self.values = v.new_empty(batch, heads, self.room, size)
        start, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class KVCache:
    """One `LayerCache` a block.

    Args:
        n_layer: blocks of the model.
        room: tokens that memory is set aside for, usually the model's block_size.
    """

    def __init__(self, n_layer: int, room: int) -> None:
        self.layers = [LayerCache(room) for _ in range(n_layer)]

    @property
    def length(self) -> int:
        """Tokens cached so far, in each block."""
        return self.layers[0].length

    def crop(self, length: int) -> None:
        """Forget the tokens after the first `length`."""
        for layer in self.layers:
            layer.length = min(layer.length, length)
