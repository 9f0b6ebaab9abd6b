"""Equal blocks of a model are traced twice and then replayed: what they asked for is noted again, nothing is run.

A call of a block is replayed if everything that its code can see is what it was in two calls before, of blocks with the
same modules: shapes, strides and aliases of its arguments, tensors of its layer in the KV cache, plain attributes of
its modules. And only if those two calls asked for the same, event by event, and left nothing behind but their result
and their layer's cache. Its result and cache are then new fake tensors, with storages that are followed like others.

The last block of a list always runs, and must do what was noted of those before: code that asks for its layer's number
would show there. Anything else runs as it is: blocks with hooks (weights that travel), caches of other classes than
`DynamicCache`, arguments that are neither tensors nor plain values, several devices. Tests compare replayed runs with
full ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..machine.roofline import Operation
from ._torch import storage_key
from .fake_gpu import OperationLog

PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.device)


class Unlike(Exception):
    """The check on the last block failed: it did not do what the blocks before it did, so none may be replayed."""


class Incomparable(Exception):
    """A block sees or leaves something that cannot be compared, so it runs as it is."""


class View(NamedTuple):
    """A tensor that a block made: the number of its storage among those of the block, and how it lies there."""

    storage: int
    nbytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


class Record(NamedTuple):
    """What one call did.

    Args:
        events: a size, for a request; -k, to free the k-th storage that the block made; or the name of a tensor in its
            layer's cache that was freed.
        kinds: what each request was for.
        operations: as they were noted.
        unissued: `Trace.unissued` at the end.
        left: what it returned, and its layer's cache by name; tensors as `View`.
    """

    events: tuple[int | str, ...]
    kinds: tuple[str, ...]
    operations: tuple[Operation, ...]
    unissued: int
    left: Any


@contextmanager
def replaying(model: nn.Module, log: OperationLog) -> Iterator[None]:
    """Within it, calls of equal blocks are replayed."""
    replayer = Replayer(log)
    wrapped = []
    for holder in model.modules():
        if isinstance(holder, nn.ModuleList) and len(holder) > 2:
            for block in holder:
                if (modules := _modules(block)) is not None:
                    block.forward = partial(replayer.call, block, modules, block is holder[-1])
                    wrapped.append(block)
    try:
        yield
    finally:
        for block in wrapped:
            vars(block).pop("forward", None)


class Replayer:
    """Runs blocks and records what they do, or replays it.

    `records` has, for what a block sees, what a block did then, and whether a second one did the same.
    """

    def __init__(self, log: OperationLog) -> None:
        self.log, self.trace = log, log.trace
        self.records: dict[Any, tuple[Record | None, bool]] = {}

    def call(self, block: nn.Module, modules: Any, last: bool, *args: Any, **kwargs: Any) -> Any:
        """What `block(*args, **kwargs)` gives, run or replayed."""
        forward = partial(type(block).forward, block, *args, **kwargs)
        if len(self.trace.recordings) != 1:
            return forward()
        [self.device] = self.trace.recordings
        try:
            with self.log.silent():  # asking a fake tensor for its device is an operation
                seen = Seen()
                arguments = described((args, kwargs), seen.about)
                layer = seen.layer(block)
                cached = None if layer is None else (type(layer), described(vars(layer), seen.about))
        except Incomparable:
            return forward()
        key = (modules, self.log.kind, self.trace.unissued, arguments, cached)
        record, sure = self.records.get(key, (None, False))
        if record is not None and sure and not last:
            return self.replay(record, layer)
        begins, freeable = [len(lines) for lines in self._lines()], self._requests_of(layer)
        result = forward()
        try:
            with self.log.silent():
                new = self.record(begins, freeable, result, layer)
        except Incomparable:
            new = None
        if sure and new != record:
            raise Unlike
        self.records[key] = new, new is not None and new == record
        return result

    def _lines(self) -> tuple[list[int], list[str], list[Operation]]:
        """Events and kinds of the device, and all operations."""
        return self.trace.recordings[self.device].events, self.trace.kinds[self.device], self.trace.operations

    def _requests_of(self, layer: Any) -> dict[int, str]:
        """Request -> name, of the tensors in a layer's cache."""
        live, items = self.log.live, {} if layer is None else vars(layer)
        tensors = {name: storage_key(value) for name, value in items.items() if isinstance(value, Tensor)}
        return {live[key][1]: name for name, key in tensors.items() if key in live}

    def record(self, begins: Sequence[int], freeable: Mapping[int, str], result: Any, layer: Any) -> Record:
        """What was noted since `begins`, requests numbered from there.

        Raises:
            Incomparable: the block left something else behind, or freed what others made.
        """
        (events, kinds, operations), (event, first, operation) = self._lines(), begins
        kept: set[int] = set()  # requests that the result and the cache keep alive

        def view(tensor: object) -> View:
            if not isinstance(tensor, Tensor) or not tensor.is_cuda or str(tensor.device) != self.device:
                raise Incomparable
            nbytes = tensor.untyped_storage().nbytes()
            number = self.log.live[storage_key(tensor)][1] if nbytes else first
            if nbytes and number <= first:
                raise Incomparable
            kept.update([number] if nbytes else [])
            offset = int(tensor.storage_offset())
            return View(number - first, nbytes, tuple(tensor.shape), tensor.stride(), offset, tensor.dtype)

        left = described([result, {} if layer is None else vars(layer)], view)
        numbers: list[Any] = []
        for number in events[event:]:
            numbers.append(number if number > 0 else number + first if -number > first else freeable.get(-number))
        if None in numbers or {number for _, number, _ in self.log.live.values() if number > first} != kept:
            raise Incomparable
        new = tuple(numbers), tuple(kinds[first:]), tuple(operations[operation:])
        return Record(*new, self.trace.unissued, left)

    def replay(self, record: Record, layer: Any) -> Any:
        """Note again what a record says, and make its result and its layer's cache."""
        events, kinds, operations = self._lines()
        first = len(kinds)
        for event in record.events:
            if isinstance(event, str):
                before = len(events)
                setattr(layer, event, None)  # its storage dies here, which notes that it is free
                if len(events) != before + 1:
                    raise RuntimeError(f"a replayed block could not free {event!r} of its cache: give replay=False")
            else:
                events.append(event if event > 0 else event - first)
        kinds.extend(record.kinds)
        operations.extend(record.operations)
        self.trace.unissued = record.unissued
        with self.log.silent():
            result, cache = self._restored(record.left, first, {})
        for name, value in cache.items():
            setattr(layer, name, value)
        return result

    def _restored(self, value: Any, first: int, storages: dict[int, Tensor]) -> Any:
        """The value that was described, with new tensors."""
        if isinstance(value, View):
            if value.storage not in storages:
                storages[value.storage] = torch.empty(value.nbytes, dtype=torch.uint8, device=self.device)
                if value.storage:
                    self.log.follow(storages[value.storage], self.device, first + value.storage)
            return storages[value.storage].view(value.dtype).as_strided(value.shape, value.stride, value.offset)
        kind, items = value
        if kind is dict:
            return {name: self._restored(item, first, storages) for name, item in items}
        if kind in (list, tuple):
            return kind(self._restored(item, first, storages) for item in items)
        return items


# ---------------------------------------------------------------------------------------------------------------------
# What a block can see


def described(value: Any, about: Callable[[Any], Any]) -> Any:
    """A value that is equal for what looks the same. `about` gives it for what is not plain, or raises Incomparable."""
    if isinstance(value, PLAIN):
        return type(value), value
    if type(value) in (list, tuple):
        return type(value), tuple(described(item, about) for item in value)
    if type(value) is dict:
        return dict, tuple((name, described(item, about)) for name, item in value.items())
    return about(value)


class Seen:
    """What the code of one call can see. Storages are numbered as they come."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}
        self.caches: list[Any] = []

    def about(self, value: Any) -> Any:
        """How a tensor lies in memory, and which others share it; or that it is a cache."""
        if isinstance(value, Tensor):
            alias = self.storages.setdefault(storage_key(value), len(self.storages))
            size = value.untyped_storage().nbytes()
            return tuple(value.shape), value.stride(), value.storage_offset(), value.dtype, value.device, alias, size
        if type(value).__name__ != "DynamicCache":
            raise Incomparable
        self.caches.append(value)
        return "cache"

    def layer(self, block: nn.Module) -> Any:
        """The block's layer in the KV cache that it was given; None if it was given none."""
        if not self.caches:
            return None
        numbers = {vars(module)["layer_idx"] for module in block.modules() if "layer_idx" in vars(module)}
        layers = self.caches[0].layers
        if len({id(cache) for cache in self.caches}) > 1 or len(numbers) != 1 or max(numbers) >= len(layers):
            raise Incomparable
        return layers[numbers.pop()]


def _modules(block: nn.Module) -> Any:
    """What its modules are: classes, plain attributes but the layer's number, shapes of their tensors.

    None if there are hooks, which may do anything.
    """
    about = []
    for name, module in block.named_modules():
        own = vars(module)
        if "_hf_hook" in own or "forward" in own or module._forward_hooks or module._forward_pre_hooks:
            return None
        plain = tuple((key, described(value, _attribute)) for key, value in own.items() if key not in _IGNORED)
        tensors = tuple(
            (key, None if t is None else (tuple(t.shape), t.stride(), t.dtype, t.device))
            for key, t in (*module._parameters.items(), *module._buffers.items())
        )
        about.append((name, type(module), plain, tensors))
    return tuple(about)


_IGNORED = {*vars(nn.Module()), "layer_idx"} - {"training"}  # what every module has, and what differs by its nature


def _attribute(value: Any) -> Any:
    """What stands for an attribute that is not plain: its identity, since equal blocks share their config."""
    if type(value).__name__ == "MatmulLtState":  # of bitsandbytes' int8 layers, one for each
        return tuple((name, item) for name, item in vars(value).items() if isinstance(item, PLAIN))
    return id(value)
