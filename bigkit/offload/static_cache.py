"""A static KV cache at addresses that CUDA graphs know.

Each call of `generate` makes a cache of its own. The first that is seen lends its tensors to all that follow: a cache
without memory begins with them, and what another one holds is copied there. So a graph that was recorded for one call
serves the next.

Leaves out: caches that grow.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, is_tensor

_COUNT = "cumulative_length_int"  # of layers with a sliding window: tokens so far


class Home:
    """The tensors of a static cache, at addresses that graphs know. Caches of the same shape take turns there.

    Args:
        cache: the first; its tensors become the home's.

    Attributes:
        steps: what was called, and the state of the cache -> its step.
    """

    def __init__(self, cache: Any) -> None:
        self.steps: dict[Any, Any] = {}
        self._enter(cache)
        self._tensors = [holder[name] for holder, name in self._places]
        self._shape = _shape(_cells(cache))

    def cache(self) -> Any:
        """Whose turn it is."""
        return self._cache()

    def fits(self, cache: Any) -> bool:
        """Whether a cache has the same shape."""
        return _shape(_cells(cache)) == self._shape

    def bind(self, cache: Any) -> None:
        """Let a cache have its turn: what it holds moves here. The one before keeps a copy, if somebody has it."""
        if self.cache() is not cache:
            self._leave()
            self._enter(cache)
        for (holder, name), own in zip(self._places, self._tensors):
            if holder[name] is not own:
                own.copy_(holder[name])
                holder[name] = own

    def welcome(self, cache: Any, sequences: int) -> None:
        """Let a cache that has no memory yet begin with the home's, emptied: a prompt then needs no second one."""
        layers = getattr(cache, "layers", [])
        mine = [dict(vars(layer)) for layer in self._layers]
        same = [
            type(layer) is type(own) and vars(layer).get("max_cache_len") == vars(own).get("max_cache_len", 0)
            for layer, own in zip(layers, self._layers)
        ]
        if not mine or len(layers) != len(mine) or not all(same) or {own["batch_size"] for own in mine} != {sequences}:
            return
        self._leave()
        for layer, own in zip(layers, mine):
            vars(layer).update(own)
        cache.reset()
        self._enter(cache)

    def _leave(self) -> None:
        """The cache whose turn it was keeps a copy, if somebody still has it."""
        if self.cache() is not None:
            for (holder, name), own in zip(self._places, self._tensors):
                if holder[name] is own:
                    holder[name] = own.clone()

    def _enter(self, cache: Any) -> None:
        cells = _cells(cache)
        self._places = [(holder, name) for holder, name in cells if is_tensor(holder[name])]
        self._plain = [(holder, name) for holder, name in cells if not is_tensor(holder[name])]
        self._layers, self._cache = getattr(cache, "layers", []), weakref.ref(cache)

    def scalars(self) -> list[Any]:
        """The plain values that the cache keeps."""
        return [holder[name] for holder, name in self._plain]

    def state(self) -> tuple[Any, ...]:
        """The same with counts left out that only say how full a window is: before and after it is, steps differ."""
        return tuple(own[name] >= own["max_cache_len"] if name == _COUNT else own[name] for own, name in self._plain)

    def began(self, before: list[Any]) -> bool:
        """Whether a step was the first of a cache: that of a decoder computes what it asks its encoder for."""
        return any(type(now) is bool and now != then for now, then in zip(self.scalars(), before))

    def counted(self, before: list[Any]) -> dict[int, int]:
        """What a step has added to the counts.

        Raises:
            TypeError: it has changed another value.
        """
        changed = {i: now - then for i, (now, then) in enumerate(zip(self.scalars(), before)) if now != then}
        for i in changed:
            if self._plain[i][1] != _COUNT:
                raise TypeError(f"its cache changes {self._plain[i][1]!r} in each step")
        self.put_back(before)
        return changed

    def count(self, added: dict[int, int]) -> None:
        """Count what a replay has done."""
        for i, amount in added.items():
            holder, name = self._plain[i]
            holder[name] += amount

    def put_back(self, before: list[Any]) -> None:
        """Undo what a recording has left in the cache: nothing was computed."""
        for (holder, name), value in zip(self._plain, before):
            holder[name] = value
        for (holder, name), own in zip(self._places, self._tensors):
            holder[name] = own


def _cells(cache: Any) -> list[tuple[Any, Any]]:
    """Where a cache keeps its tensors and plain values: (dict or list, key), in an order that is the same for all."""
    found: list[tuple[Any, Any]] = []
    waiting: list[Any] = [cache]
    while waiting:
        holder = waiting.pop()
        own = holder if isinstance(holder, (dict, list)) else vars(holder)
        for name, value in enumerate(own) if isinstance(own, list) else own.items():
            if isinstance(value, (Tensor, bool, int)) and name != "_is_user_defined":
                found.append((own, name))
            elif isinstance(value, (dict, list)) or hasattr(value, "layers") or hasattr(value, "get_max_length"):
                waiting.append(value)
    return found


def _shape(cells: list[tuple[dict[Any, Any], Any]]) -> list[Any]:
    """What must be the same in two caches that take turns: all but the counts."""
    return [(name, 0 if name == _COUNT else kind_of(holder[name])) for holder, name in cells]


def kind_of(leaf: Any) -> Any:
    """What must be the same from step to step: of a tensor all but its values."""
    return (tuple(leaf.shape), leaf.dtype, leaf.device) if is_tensor(leaf) else leaf


@contextmanager
def windows_roll(cache: Any) -> Iterator[None]:
    """Let full windows take one token without asking the host.

    Transformers makes a tensor out of a Python list there, which the compiler knows how to avoid and a graph refuses.
    """
    layers = [layer for layer in getattr(cache, "layers", []) if _COUNT in vars(layer) and layer.keys is not None]
    full = [layer for layer in layers if vars(layer)[_COUNT] >= layer.max_cache_len]
    for layer in full:
        vars(layer)["update"] = partial(_roll, layer)
    try:
        yield
    finally:
        for layer in full:
            vars(layer).pop("update", None)


def _roll(layer: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """What `StaticSlidingWindowLayer.update` does with a token when the window is full."""
    vars(layer)[_COUNT] += key_states.shape[-2]
    for own, new in ((layer.keys, key_states), (layer.values, value_states)):
        rolled = own.roll(-1, dims=-2)
        rolled[:, :, -1:] = new
        own.copy_(rolled)
    return layer.keys, layer.values
