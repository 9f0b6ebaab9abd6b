"""Equal blocks of a model are traced twice and then replayed: what they asked for is noted again, nothing is run.

A call of a block is replayed if everything that its code can see is what it was in two calls before, of blocks with the
same modules: shapes, strides and aliases of its arguments, tensors of its layer in the KV cache, plain attributes of
its modules. And only if those two calls asked for the same, event by event, and left nothing behind but their result
and their layer's cache. Its result and cache are then new fake tensors, with storages that are followed like others.

The last block of a list always runs, and must do what was noted of those before: code that asks for its layer's number
would show there. Anything else runs as it is: blocks with hooks (weights that travel), caches of other classes than
`DynamicCache`, arguments that are neither tensors nor plain values, several devices. Tests hold replayed runs against
full ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .fake_gpu import Notebook

PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.device)


class Unlike(Exception):
    """The last block did something else than those before that looked the same: nothing may be replayed."""


class Unsure(Exception):
    """A block sees something of which it is not known whether it is the same."""


@dataclass(frozen=True)
class View:
    """A tensor: the number of its storage among those that the block made, and how it lies there."""

    storage: int
    nbytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Record:
    """What one call did. `events`: a size; -k, to free the k-th storage that it made; the name of a cache's tensor."""

    events: tuple[int | str, ...]
    kinds: tuple[str, ...]
    operations: tuple[Any, ...]
    unissued: int
    result: Any
    cache: tuple[tuple[str, Any], ...]


@contextmanager
def replaying(model: nn.Module, notes: Notebook) -> Iterator[dict[str, int]]:
    """Within it, calls of equal blocks are replayed. Yields how many calls were "traced" and "replayed"."""
    counts = {"traced": 0, "replayed": 0}
    records: dict[Any, tuple[Record, bool]] = {}
    wrapped = []
    for holder in model.modules():
        if isinstance(holder, nn.ModuleList) and len(holder) > 2:
            for block in holder:
                try:
                    known = _modules(block)
                except Unsure:
                    continue
                block.forward = _wrap(block, known, notes, records, counts, block is holder[-1])
                wrapped.append(block)
    try:
        yield counts
    finally:
        for block in wrapped:
            vars(block).pop("forward", None)


def _wrap(block: nn.Module, known: Any, notes: Notebook, records: dict[Any, Any], counts: dict[str, int],
          last: bool) -> Any:  # fmt: skip
    forward = type(block).forward
    number = _layer_number(block)

    def call(*args: Any, **kwargs: Any) -> Any:
        recordings = notes.trace.recordings
        if len(recordings) != 1:
            return forward(block, *args, **kwargs)
        device = next(iter(recordings))
        try:
            seen: dict[int, int] = {}
            caches: list[Any] = []
            with notes.silent():  # asking a fake tensor for its device is an operation
                key: Any = (known, notes.kind, notes.trace.unissued, _signature((args, kwargs), seen, caches))
                layer = _layer(caches, number)
                key = (*key, None if layer is None else (type(layer), _signature(vars(layer), seen, [])))
        except Unsure:
            counts["traced"] += 1
            return forward(block, *args, **kwargs)
        record, sure = records.get(key, (None, False))
        if sure and not last:
            counts["replayed"] += 1
            return _replay(record, layer, notes, device)
        counts["traced"] += 1
        events, operations = recordings[device].events, notes.trace.operations
        begin, first, done = len(events), len(notes.trace.kinds[device]), len(operations)
        old = {} if layer is None else {
            notes.live[t.untyped_storage()._cdata][1]: name for name, t in vars(layer).items()
            if isinstance(t, Tensor) and t.untyped_storage()._cdata in notes.live
        }  # fmt: skip
        result = forward(block, *args, **kwargs)
        try:
            with notes.silent():
                made = _record(events[begin:], notes.trace.kinds[device][first:], operations[done:], first, old, result,
                               layer, notes, device)  # fmt: skip
        except Unsure:
            made = None
        if sure and made != record:
            raise Unlike
        if made is None:
            records.pop(key, None)
        else:
            records[key] = made, record == made
        return result

    return call


def _record(
    events: list[int], kinds: list[str], operations: list[Any], first: int, old: dict[int, str], result: Any,
    layer: Any, notes: Notebook, device: str,
) -> Record:  # fmt: skip
    told: list[int | str] = []
    for event in events:
        if event < 0 and -event <= first:
            if -event not in old:
                raise Unsure
            told.append(old[-event])
        else:
            told.append(event if event > 0 else event + first)
    alive = {number for _, number, _ in notes.live.values() if number > first}
    kept: set[int] = set()

    def view(tensor: Tensor) -> View | None:
        storage = tensor.untyped_storage()
        if not tensor.is_cuda or str(tensor.device) != device:
            raise Unsure
        if not storage.nbytes():
            return View(0, 0, tuple(tensor.shape), tensor.stride(), 0, tensor.dtype)
        number = notes.live[storage._cdata][1]
        if number <= first:
            raise Unsure
        kept.add(number)
        shape, offset = tuple(tensor.shape), int(tensor.storage_offset())
        return View(number - first, storage.nbytes(), shape, tensor.stride(), offset, tensor.dtype)

    def views(value: Any) -> Any:
        if isinstance(value, Tensor):
            return view(value)
        if type(value) in (list, tuple):
            return type(value)(map(views, value))
        if isinstance(value, PLAIN):
            return value
        raise Unsure

    found = views(result)
    cache = () if layer is None else tuple((name, views(value)) for name, value in vars(layer).items())
    if alive != kept:
        raise Unsure
    return Record(tuple(told), tuple(kinds), tuple(operations), notes.trace.unissued, found, cache)


def _replay(record: Record, layer: Any, notes: Notebook, device: str) -> Any:
    events, kinds = notes.trace.recordings[device].events, notes.trace.kinds[device]
    first = len(kinds)
    for event in record.events:
        if isinstance(event, str):
            before = len(events)
            setattr(layer, event, None)  # its storage dies here, which notes that it is free
            if len(events) != before + 1:
                raise RuntimeError(
                    f"a replayed block could not free {event!r} of its cache: trace it with replay=False"
                )
        elif event > 0:
            events.append(event)
            kinds.append("")
        else:
            events.append(event - first)
    kinds[first:] = record.kinds
    notes.trace.operations.extend(record.operations)
    notes.trace.unissued = record.unissued
    storages: dict[int, Tensor] = {}

    def make(value: Any) -> Any:
        if isinstance(value, View):
            if not value.storage:
                return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=device)
            if value.storage not in storages:
                storages[value.storage] = torch.empty(value.nbytes, dtype=torch.uint8, device=device)
                notes.follow(storages[value.storage], device, first + value.storage)
            return storages[value.storage].view(value.dtype).as_strided(value.shape, value.stride, value.offset)
        return type(value)(map(make, value)) if type(value) in (list, tuple) else value

    with notes.silent():
        result = make(record.result)
        for name, value in record.cache:
            setattr(layer, name, make(value))
    storages.clear()  # `make` refers to itself, and would keep them until garbage is collected
    return result


# ---------------------------------------------------------------------------------------------------------------------
# What a block can see


def _modules(block: nn.Module) -> Any:
    """What its modules are: classes, plain attributes but the layer's number, shapes of their tensors."""
    found = []
    for name, module in block.named_modules():
        own = vars(module)
        if "_hf_hook" in own or "forward" in own or module._forward_hooks or module._forward_pre_hooks:
            raise Unsure
        plain = [(key, _attribute(value)) for key, value in own.items() if key not in _IGNORED]
        tensors = [
            (key, None if t is None else (tuple(t.shape), t.stride(), t.dtype, t.device))
            for key, t in (*module._parameters.items(), *module._buffers.items())
        ]
        found.append((name, type(module), tuple(plain), tuple(tensors)))
    return tuple(found)


_IGNORED = {*vars(nn.Module()), "layer_idx"} - {"training"}  # what every module has, and what differs by its nature


def _attribute(value: Any) -> Any:
    """What stands for an attribute: itself if it is plain, else its identity: equal blocks share their config."""
    if isinstance(value, PLAIN):
        return type(value), value
    if type(value) in (list, tuple):
        return tuple(map(_attribute, value))
    if type(value).__name__ == "MatmulLtState":  # of bitsandbytes' int8 layers, one for each
        return tuple((key, item) for key, item in vars(value).items() if isinstance(item, PLAIN))
    return id(value)


def _layer_number(block: nn.Module) -> int | None:
    numbers = {vars(module)["layer_idx"] for module in block.modules() if "layer_idx" in vars(module)}
    return numbers.pop() if len(numbers) == 1 else None


def _layer(caches: list[Any], number: int | None) -> Any:
    if not caches:
        return None
    if len({id(cache) for cache in caches}) > 1 or number is None or number >= len(caches[0].layers):
        raise Unsure
    return caches[0].layers[number]


def _signature(value: Any, seen: dict[int, int], caches: list[Any]) -> Any:
    if isinstance(value, Tensor):
        alias = seen.setdefault(value.untyped_storage()._cdata, len(seen))
        return (tuple(value.shape), value.stride(), value.storage_offset(), value.dtype, value.device, alias,
                value.untyped_storage().nbytes())  # fmt: skip
    if isinstance(value, PLAIN):
        return (type(value), value)
    if type(value) in (list, tuple):
        return tuple(_signature(item, seen, caches) for item in value)
    if type(value) is dict:
        return tuple((key, _signature(item, seen, caches)) for key, item in value.items())
    if type(value).__name__ == "DynamicCache":
        caches.append(value)
        return "cache"
    raise Unsure
