"""Equal blocks of a model are traced twice and then replayed: what they asked for is noted again, nothing is run.

A call of a block is replayed if everything that its code can see is what it was in two calls before, of blocks with the
same modules: shapes, strides and aliases of its arguments, tensors of its layer in the KV cache, plain attributes of
its modules. And only if those two calls asked for the same, event by event, and left nothing behind but their result
and their layer's cache. For a later token, whose cache is longer, one such call is enough. Its result and cache are
then new fake tensors, with storages that are followed like others.

The last block of a list always runs, and must do what was noted of those before: code that asks for its layer's number
would show there. Devices are numbered as a block sees them, its own first, so blocks on several GPUs are equal, too.
Anything else runs as it is: blocks on several devices, or whose weights travel, caches of other classes than
`DynamicCache`, arguments that are neither tensors nor plain values. Tests compare replayed runs with full ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..machine.roofline import Operation
from ..offload.hooks import AlignDevicesHook
from ..offload.inference_only import HOOK_NAMES
from ._torch import fake_device, plain_calls, storage_key, without_modes
from .fake_gpu import OperationLog
from .splice import Attended

KEPT = "<as it was>"  # what a cache still holds
PLAIN = (int, float, str, bool, type(None), torch.dtype)


class Unlike(Exception):
    """The check on the last block failed: it did not do what the blocks before it did, so none may be replayed."""


class Incomparable(Exception):
    """A block sees or leaves something that cannot be compared, so it runs as it is."""


class Place(NamedTuple):
    """A device by its number as the block sees it, or by its name if it is no GPU."""

    name: int | str


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
        operations: as they were noted, devices by their numbers: "" is the block's own.
        unissued: `Trace.unissued` at the end.
        left: what it returned, and its layer's cache by name; tensors as `View`.
        attended: calls of attention, numbered from its beginning.
    """

    events: tuple[int | str, ...]
    kinds: tuple[str, ...]
    operations: tuple[Operation, ...]
    unissued: int
    left: Any
    attended: tuple[Attended, ...]


@contextmanager
def replaying(model: nn.Module, log: OperationLog) -> Iterator[None]:
    """Within it, calls of equal blocks are replayed."""
    replayer = Replayer(log)
    kinds: dict[Any, int] = {}  # of equal blocks: a number, for what they are is looked up with every call
    wrapped = []
    for holder in model.modules():
        if isinstance(holder, nn.ModuleList) and len(holder) > 2:
            for block in holder:
                devices = {str(t.device) for t in (*block.parameters(), *block.buffers())}
                if len(devices) == 1 and (modules := _modules(block)) is not None:
                    hooked, kind = vars(block).get("forward"), kinds.setdefault(modules, len(kinds))
                    forward = hooked or partial(type(block).forward, block)
                    block.forward = partial(replayer.call, forward, block, kind, devices.pop(), block is holder[-1])
                    wrapped.append((block, hooked))
    try:
        yield
    finally:
        for block, hooked in wrapped:
            vars(block).pop("forward", None)
            if hooked is not None:
                block.forward = hooked


class Replayer:
    """Runs blocks and records what they do, or replays it.

    `records` has, for what a block sees, what a block did then, and whether a second one did the same. `proven` has the
    blocks of which two did the same, by their kind and inputs, whatever their cache held.
    """

    def __init__(self, log: OperationLog) -> None:
        self.log, self.trace = log, log.trace
        self.records: dict[Any, tuple[Record | None, bool]] = {}
        self.proven: set[Any] = set()
        self.device, self.names = "", [""]  # where the block lies that is called, and the devices that it sees
        self.named: dict[Any, tuple[Sequence[Operation], Sequence[Operation]]] = {}

    def call(
        self, own: Callable[..., Any], block: nn.Module, kind: int, device: str, last: bool, /, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """What `own(*args, **kwargs)`, the forward of a block on a device, gives, run or replayed."""
        forward = partial(own, *args, **kwargs)
        if device not in self.trace.recordings:
            return forward()
        self.device = device
        try:
            with self.log.silent(), plain_calls():  # asking a fake tensor for its device is an operation
                seen = Seen(device)
                arguments = described((args, kwargs), seen.about)
                layer = seen.layer(block)
                cached = None if layer is None else (type(layer), described(vars(layer), seen.about))
        except Incomparable:
            return forward()
        warm = self._warm()
        key = (kind, self.log.kind, self.trace.unissued, arguments, cached, warm)
        inputs = arguments[1][0][1]  # those without a name: what the block before it gave
        family = (kind, self.log.kind, warm, inputs, tuple(seen.places)) if inputs else None
        record, sure = self.records.get(key, (None, False))
        self.names = [*seen.devices]
        if record is not None and sure and not last:
            return self.replay(record, layer)
        with plain_calls():
            begins, freeable = [len(lines) for lines in self._lines()], self._requests_of(layer)
            before, others = self._held(layer), self._events_elsewhere()
        result = forward()
        try:
            if self._warm() != warm or self._events_elsewhere() != others:
                raise Incomparable
            with self.log.silent(), plain_calls():
                new = self.record(begins, freeable, result, layer, before)
        except Incomparable:
            new = None
        if sure and new != record:
            raise Unlike
        if new is not None and new == record and family:
            self.proven.add(family)
        self.records[key] = new, new is not None and (new == record or (record is None and family in self.proven))
        return result

    def _warm(self) -> int:
        """How many libraries have taken their workspace on the device: the first product there takes more."""
        return sum(entry == self.device or entry[0] == self.device for entry in self.log.warm)

    def _events_elsewhere(self) -> list[int]:
        return [len(recording.events) for name, recording in self.trace.recordings.items() if name != self.device]

    def _lines(self) -> tuple[list[int], list[str], list[Operation], list[Attended]]:
        """Events and kinds of the device, all operations, and all calls of attention."""
        trace = self.trace
        return trace.recordings[self.device].events, trace.kinds[self.device], trace.operations, trace.attended

    def _place(self, device: torch.device) -> Place:
        name = str(device)
        if device.type == "cuda" and name not in self.names:
            raise Incomparable
        return Place(self.names.index(name) if device.type == "cuda" else name)

    def _held(self, layer: Any) -> dict[str, Any]:
        """Name -> request and layout, of the tensors in a layer's cache; the tensors themselves would live on."""
        live, items = self.log.live, {} if layer is None else vars(layer)
        tensors = {name: value for name, value in items.items() if isinstance(value, Tensor) and value.is_cuda}
        return {
            name: (live[storage_key(value)][:2], value.shape, value.stride(), value.storage_offset())
            for name, value in tensors.items()
            if storage_key(value) in live
        }

    def _requests_of(self, layer: Any) -> dict[int, str]:
        """Request -> name, of the tensors in a layer's cache."""
        live, items = self.log.live, {} if layer is None else vars(layer)
        tensors = {name: storage_key(value) for name, value in items.items() if isinstance(value, Tensor)}
        return {live[key][1]: name for name, key in tensors.items() if key in live}

    def _numbered(self, operation: Operation) -> Operation:
        """An operation with the numbers of its devices."""
        if operation.device != self.device:
            raise Incomparable
        source = operation.source
        if source.startswith("cuda"):
            if source not in self.names:
                raise Incomparable
            source = f"cuda#{self.names.index(source)}"
        return replace(operation, device="", source=source)

    def _named(self, operations: Sequence[Operation]) -> Sequence[Operation]:
        """Operations with the devices that the block sees now."""
        names = {f"cuda#{number}": name for number, name in enumerate(self.names)}
        key = (id(operations), *self.names)
        if key not in self.named:
            named = [
                replace(operation, device=self.device, source=names.get(operation.source, operation.source))
                for operation in operations
            ]
            self.named[key] = operations, named  # held, so that no other has this id
        return self.named[key][1]

    def record(
        self, begins: Sequence[int], freeable: Mapping[int, str], result: Any, layer: Any, before: Mapping[str, Any]
    ) -> Record:
        """What was noted since `begins`, requests numbered from there; `before` is `_held` of the layer's cache then.

        Raises:
            Incomparable: the block left something else behind, or freed what others made.
        """
        (events, kinds, operations, attended), (event, first, operation, call) = self._lines(), begins
        kept: set[int] = set()  # requests that the result and the cache keep alive

        def view(tensor: object) -> View | Place:
            if isinstance(tensor, torch.device):
                return self._place(tensor)
            if not isinstance(tensor, Tensor) or not tensor.is_cuda or str(fake_device(tensor)) != self.device:
                raise Incomparable
            nbytes = tensor.untyped_storage().nbytes()
            number = self.log.live[storage_key(tensor)][1] if nbytes else first
            if nbytes and number <= first:
                raise Incomparable
            kept.update([number] if nbytes else [])
            offset = int(tensor.storage_offset())
            return View(number - first, nbytes, tuple(tensor.shape), tensor.stride(), offset, tensor.dtype)

        cache = {} if layer is None else dict(vars(layer))
        cache |= {name: KEPT for name, held in self._held(layer).items() if held == before.get(name)}
        left = described([result, cache], view)
        numbers: list[Any] = []
        for number in events[event:]:
            numbers.append(number if number > 0 else number + first if -number > first else freeable.get(-number))
        alive = {number for device, number, _ in self.log.live.values() if device == self.device and number > first}
        if None in numbers or alive != kept:
            raise Incomparable
        new = tuple(numbers), tuple(kinds[first:]), tuple(map(self._numbered, operations[operation:]))
        calls = tuple(part.moved("", -event, -first, -operation) for part in attended[call:])
        return Record(*new, self.trace.unissued, left, calls)

    def replay(self, record: Record, layer: Any) -> Any:
        """Note again what a record says, and make its result and its layer's cache."""
        events, kinds, operations, attended = self._lines()
        first = len(kinds)
        attended += [part.moved(self.device, len(events), first, len(operations)) for part in record.attended]
        for event in record.events:
            if isinstance(event, str):
                before = len(events)
                setattr(layer, event, None)  # its storage dies here, which notes that it is free
                if len(events) != before + 1:
                    raise RuntimeError(f"a replayed block could not free {event!r} of its cache: give replay=False")
            else:
                events.append(event if event > 0 else event - first)
        kinds.extend(record.kinds)
        operations.extend(self._named(record.operations))
        self.trace.unissued = record.unissued
        with without_modes(), plain_calls():
            result, cache = self._restored(record.left, first, {})
        for name, value in cache.items():
            if value is not KEPT:
                setattr(layer, name, value)
        return result

    def _restored(self, value: Any, first: int, storages: dict[int, Tensor]) -> Any:
        """The value that was described, with new tensors."""
        if isinstance(value, View):
            if value.storage not in storages:
                storages[value.storage] = torch.empty(value.nbytes, dtype=torch.uint8, device="meta")
                if value.storage:
                    self.log.follow(storages[value.storage], self.device, first + value.storage)
            view = storages[value.storage].view(value.dtype).as_strided(value.shape, value.stride, value.offset)
            return self.log.fakes.on(torch.device(self.device), view)
        if isinstance(value, Place):
            return torch.device(self.names[value.name] if isinstance(value.name, int) else value.name)
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

    def __init__(self, device: str) -> None:
        self.storages: dict[int, int] = {}
        self.devices = {device: 0}
        self.places: list[int | str] = []  # of the tensors, as they come
        self.caches: list[Any] = []

    def about(self, value: Any) -> Any:
        """How a tensor lies in memory, and which others share it; a device's number; or that it is a cache."""
        if isinstance(value, torch.device):
            return self.devices.setdefault(str(value), len(self.devices)) if value.type == "cuda" else str(value)
        if isinstance(value, Tensor):
            alias = self.storages.setdefault(storage_key(value), len(self.storages))
            size = value.untyped_storage().nbytes()
            place = str(fake_device(value))
            where = self.devices.setdefault(place, len(self.devices)) if value.is_cuda else place
            self.places.append(where)
            return tuple(value.shape), value.stride(), value.storage_offset(), value.dtype, where, alias, size
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
        hook = own.get("_hf_hook")
        if ("forward" in own) != (hook is not None) or module._forward_hooks or module._forward_pre_hooks:
            return None
        if hook is not None and not _only_moves_inputs(hook):
            return None
        plain = tuple((key, described(value, _attribute)) for key, value in own.items() if key not in _IGNORED)
        tensors = tuple(
            (key, None if t is None else (tuple(t.shape), t.stride(), t.dtype))
            for key, t in (*module._parameters.items(), *module._buffers.items())
        )
        about.append((name, type(module), hook is None, plain, tensors))
    return tuple(about)


def _only_moves_inputs(hook: object) -> bool:
    """Whether a hook does nothing but send inputs to the device on which its module's weights rest."""
    return type(hook) is AlignDevicesHook and not any((hook.streamer, hook.unit, hook.output_device))


# What every module has, and what differs by its nature.
_IGNORED = {*vars(nn.Module()), "layer_idx", *HOOK_NAMES} - {"training"}


def _attribute(value: Any) -> Any:
    """What stands for an attribute that is not plain: its identity, since equal blocks share their config."""
    if type(value).__name__ == "MatmulLtState":  # of bitsandbytes' int8 layers, one for each
        return tuple((name, item) for name, item in vars(value).items() if isinstance(item, PLAIN))
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, partial):
        return id(value.func), described(value.args, id), described(value.keywords, id)
    return id(value)
