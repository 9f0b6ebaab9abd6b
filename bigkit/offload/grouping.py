"""From a device map to units: which weights of a model rest where, and which of them travel together.

Every tensor is looked at once, with all the places in the model that refer to it. Where a place runs on the device on
which the tensor rests, it stays. Else the tensor joins a unit: the block around it, or the largest module that is no
larger than a block, or for what a module with many blocks holds itself, that alone.

A tensor that is tied over several units rests once and travels with each. One that is tied between a device and RAM is
not sent anywhere: the places that run on that device share what is there.

Leaves out: hooks and the calls that users know (`offload/dispatch.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.format import Form, Stored
from ..checkpoints.resting import resting_place, write_file
from ..devices import Device
from ..meta.empty import twin
from ..meta.skeleton import repeated_blocks, tied_groups
from .codec import PLAIN, codec_of
from .handle import Away
from .source import Source
from .stream import Mapped, Slots, Streamer
from .transfer import readers
from .weights import Part, Unit, Weight, part_of, rest_in_ram

Place = tuple[str, nn.Module, str]  # full name, module, own name


@dataclass
class Record:
    """One tensor of a model and every place that refers to it.

    A tensor that a streamer sent away before is on meta here, and `rests` says where it is.
    """

    name: str
    tensor: Tensor
    buffer: bool
    persistent: bool
    rests: Weight | None = None
    places: list[Place] = field(default_factory=list)

    def at(self, place: Place) -> Tensor:
        """What a place refers to."""
        _, module, own = place
        return (module._buffers if self.buffer else module._parameters)[own]  # type: ignore[return-value]

    def put(self, place: Place, tensor: Tensor) -> None:
        """Make a place refer to another tensor."""
        _, module, own = place
        (module._buffers if self.buffer else module._parameters)[own] = tensor  # type: ignore[assignment]


def records(model: nn.Module) -> list[Record]:
    """All parameters and buffers, tied ones together."""
    first = {name: group[0] for group in tied_groups(model) for name in group}
    found: dict[str, Record] = {}
    seen: set[tuple[int, str]] = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        for buffer, tensors in ((False, module._parameters), (True, module._buffers)):
            for own, tensor in tensors.items():
                if tensor is None:
                    continue
                name = f"{prefix}.{own}" if prefix else own
                owner = first.get(name, name)
                if owner not in found:
                    rests = tensor.weight if isinstance(tensor, Away) else None
                    persistent = own not in module._non_persistent_buffers_set
                    found[owner] = Record(name, rests.template if rests else tensor, buffer, persistent, rests)
                if (id(module), own) not in seen:  # a module may be reached by two names
                    seen.add((id(module), own))
                    found[owner].places.append((name, module, own))
    return [*found.values()]


# ---------------------------------------------------------------------------------------------------------------------
# What travels together


@dataclass(eq=False)
class Group:
    """A module whose weights travel together: all in it, or (loose) those that it and its children without a forward
    hold themselves.
    """

    name: str
    module: nn.Module
    loose: bool = False


def groups(model: nn.Module, is_away: Callable[[str], bool], uniform: Callable[[str], bool],
           whole_classes: Iterable[str] = ()) -> tuple[list[Group], dict[int, Group]]:  # fmt: skip
    """Cut the offloaded part of a model into groups.

    Args:
        model: the model.
        is_away: module name -> whether what it holds rests away from where it works.
        uniform: module name -> whether the device map treats all in it alike.
        whole_classes: classes whose modules always are one group (`preload_module_classes`).

    Returns:
        The groups in the model's order, and for each module (by id) that holds tensors the group of these.
    """
    blocks = {
        *whole_classes,
        *(cls for part in model.modules() for cls in getattr(part, "_no_split_modules", None) or ()),
    }
    blocks |= set() if blocks else repeated_blocks(model)
    sizes: dict[int, int] = {}
    holds_block: dict[int, bool] = {}

    def measure(module: nn.Module) -> None:
        if id(module) in sizes:
            return
        children = list(module.children())
        for child in children:
            measure(child)
        own = sum(t.nbytes for ts in (module._parameters, module._buffers) for t in ts.values() if t is not None)
        sizes[id(module)] = own + sum(sizes[id(child)] for child in children)
        holds_block[id(module)] = any(type(c).__name__ in blocks or holds_block[id(c)] for c in children)

    measure(model)
    block_sizes = [sizes[id(m)] for m in model.modules() if type(m).__name__ in blocks]
    limit = max(block_sizes, default=0) or max(_own_bytes(module) for module in model.modules())
    found: list[Group] = []
    group_of: dict[int, Group] = {}

    def walk(name: str, module: nn.Module, host: tuple[str, nn.Module]) -> None:
        if id(module) in group_of:
            return
        if has_forward(module):
            host = (name, module)
        away = is_away(name)
        small = sizes[id(module)] <= limit and not holds_block[id(module)]
        whole = type(module).__name__ in blocks or small or not any(module.children())
        if away and whole and uniform(name) and has_forward(module):
            found.append(Group(name, module))
            for part in module.modules():
                group_of.setdefault(id(part), found[-1])
            return
        own_names = [f"{name}.{own}" if name else own for own in (*module._parameters, *module._buffers)]
        if any(map(is_away, own_names)):
            loose = next((g for g in found if g.loose and g.module is host[1]), None)
            if loose is None:
                loose = Group(*host, loose=True)
                found.append(loose)
            group_of[id(module)] = loose
        for own, child in module._modules.items():
            if child is not None:
                walk(f"{name}.{own}" if name else own, child, host)

    walk("", model, ("", model))
    return found, group_of


def _own_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module._parameters.values() if tensor is not None)


def has_forward(module: nn.Module) -> bool:
    """Whether calling the module runs something: a ModuleList is never called."""
    return getattr(type(module), "forward", None) is not nn.Module.forward


# ---------------------------------------------------------------------------------------------------------------------
# From tensors to units


@dataclass
class Rest:
    """What is needed to send weights away.

    Args:
        stored: name -> range of a file that holds the tensor.
        given: name -> tensor, for those that the model has on meta.
        folder: where tensors are written that rest on disk and are in no file.
        written: path -> what keeps a file from being removed.
    """

    stored: Mapping[str, Stored]
    given: Mapping[str, Tensor]
    folder: Path | None = None
    written: dict[Path, Any] = field(default_factory=dict)
    _sources: dict[Path, Source] = field(default_factory=dict)

    def source(self, file: Path) -> Source:
        """A file, with pages that belong to this model alone."""
        if file not in self._sources:
            self._sources[file] = Source(file, self.written.get(file))
        return self._sources[file]

    def parts(self, record: Record) -> dict[str, Tensor | Stored]:
        """The plain tensors of a weight: as data, or as ranges of files.

        Raises:
            ValueError: it is on meta and its data are nowhere.
        """
        if record.rests is not None:
            sources = [part.source for part in record.rests.parts.values() if part.source is not None]
            self.written.update((source.path, source.owner) for source in sources)
            return {suffix: _stored(part) or part.on_cpu() for suffix, part in record.rests.parts.items()}
        if not record.tensor.is_meta:
            return dict(codec_of(record.tensor).take_apart(record.tensor))
        for name, *_ in record.places:
            if name in self.given:
                return {"": self.given[name].detach()}
            if name in self.stored:
                more = codec_of(record.tensor).suffixes
                named = {suffix: f"{name}.{suffix}" if suffix else name for suffix in more}
                return {suffix: self.stored[full] for suffix, full in named.items() if full in self.stored}
        if place := resting_place(record.tensor):
            self.written.update((where.file, place.written) for where in place.parts.values())
            return dict(place.parts)
        raise ValueError(f"{record.name!r} is on meta and has no data: load a checkpoint into the model first")

    def value(self, record: Record) -> Tensor:
        """The tensor itself."""
        if record.rests is not None:
            return record.rests.load()
        if not record.tensor.is_meta:
            return record.tensor
        parts = {suffix: _read(part, self) for suffix, part in self.parts(record).items()}
        return codec_of(record.tensor).put_together(record.tensor, parts)


def _read(part: Tensor | Stored, rest: Rest) -> Tensor:
    if isinstance(part, Tensor):
        return part
    source = rest.source(part.file)
    return Part(part.shape, _strides(part.shape), part.dtype, at=part.offset, source=source).on_cpu()


def _stored(part: Part) -> Stored | None:
    """The range of a file that holds a part, if one does."""
    if part.source is None or part.stride != _strides(part.shape):
        return None
    return Stored(part.source.path, part.at, part.nbytes, part.dtype, part.shape)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(torch.empty(shape, device="meta").stride())


def make_units(
    model: nn.Module,
    device_of: Callable[[str], Device],
    runs_at: Callable[[Device], Device],
    devices: Callable[[Device], torch.device],
    rest: Rest,
    *,
    offload_buffers: bool = False,
    whole_classes: Iterable[str] = (),
    uniform: Callable[[str], bool] = lambda name: True,
    pin: bool = False,
) -> list[tuple[Group, Unit]]:
    """Put every tensor of a model where a map wants it.

    Args:
        model: the model.
        device_of: name of a module or tensor -> where it rests.
        runs_at: where something rests -> where it works.
        devices: a place to work -> PyTorch's device.
        rest: where data come from and go to.
        offload_buffers, whole_classes, uniform: see `dispatch_model` and `groups`.
        pin: whether RAM is to be pinned.

    Returns:
        The units, each with its group. What stays has been moved to its device.

    Raises:
        ValueError, OSError: something has no data or no place; the model is as it was.
    """

    def is_away(name: str) -> bool:
        return runs_at(device_of(name)) != device_of(name)

    found, group_of = groups(model, is_away, uniform, whole_classes)
    work = _Settling(records(model), rest, device_of, pin)
    travelling: dict[int, dict[int, tuple[Record, list[Place]]]] = {id(group): {} for group in found}
    staying: list[tuple[Record, dict[Device, list[Place]]]] = []
    for record in work.records:
        here: dict[Device, list[Place]] = {}  # where it works -> the places that have it there for good
        away: list[Place] = []
        for place in record.places:
            home = device_of(place[0])
            stays = record.buffer and not (offload_buffers and record.persistent)
            if home == runs_at(home) or stays:
                here.setdefault(runs_at(home), []).append(place)
            else:
                away.append(place)
        for place in away:
            works = runs_at(device_of(place[0]))
            if works in here:
                here[works].append(place)  # it shares what is there
            else:
                inside = travelling[id(group_of[id(place[1])])]
                inside.setdefault(id(record), (record, []))[1].append(place)
        if here:
            staying.append((record, here))
    try:
        units = work.send_away([(group, [*travelling[id(group)].values()]) for group in found])
        for record, here in staying:
            work.stay(record, {devices(works): places for works, places in here.items()})
        work.finish()
    except BaseException:
        work.undo()
        raise
    return units


class _Settling:
    """Weights on their way to their places; `undo` brings those back that have left.

    What has been copied to RAM is let go of at once: at no time is more than a few units in memory twice.
    """

    def __init__(self, found: list[Record], rest: Rest, device_of: Callable[[str], Device], pin: bool) -> None:
        self.records, self.rest, self.device_of, self.pin = found, rest, device_of, pin
        self.made: dict[int, Weight] = {}  # record -> the weight that it became first
        self.left: dict[int, torch.device] = {}  # record -> the device that it has left for a unit
        self.stayed: list[tuple[Tensor, Tensor]] = []  # a tensor of the model, and its data before
        self.filling: list[Future[None]] = []
        # Handles of an earlier streamer hold no data, so they can be kept.
        self.handles = [
            (record, place, record.at(place)) for record in found if record.rests for place in record.places
        ]

    def send_away(self, chosen: list[tuple[Group, list[tuple[Record, list[Place]]]]]) -> list[tuple[Group, Unit]]:
        """Make the units, and begin to fill their RAM."""
        units: list[tuple[Group, Unit]] = []
        often = Counter(id(record) for _, inside in chosen for record, _ in inside)
        for group, inside in chosen:
            laid: list[tuple[Weight, dict[str, Tensor]]] = []  # with the data of what rests in RAM
            on_disk: list[tuple[Weight, dict[str, Tensor | Stored]]] = []
            for record, places in inside:
                at = [(module, own, record.buffer) for _, module, own in places]
                if id(record) in self.made:
                    laid.append((self.made[id(record)].alias(at), {}))
                    continue
                parts = self.rest.parts(record)
                shapes = {suffix: _part(part) for suffix, part in parts.items()}
                weight = self.made[id(record)] = Weight(record.name, _like(record, shapes), at, shapes)
                if self.device_of(places[0][0]) == "disk":
                    on_disk.append((weight, parts))
                    laid.append((weight, {}))
                else:
                    laid.append((weight, {suffix: _read(part, self.rest) for suffix, part in parts.items()}))
            if not laid:
                continue
            _rest_on_disk(on_disk, self.rest)
            laid.sort(key=lambda item: item[0].order())  # as they lie in their files: fewer and longer reads
            unit = Unit(group.name, group.module, [weight for weight, _ in laid])
            units.append((group, unit))
            values = [tensors for _, tensors in laid]
            if self.pin and all(often[id(record)] == 1 for record, _ in inside):
                # Pinning takes long, and runs well on several threads.
                self.filling.append(readers().submit(self._fill, unit, values, inside))
            else:
                self._fill(unit, values, inside)
        return units

    def _fill(self, unit: Unit, values: list[dict[str, Tensor]], inside: list[tuple[Record, list[Place]]]) -> None:
        """Give a unit its RAM, and let go of what the model held."""
        rest_in_ram(unit, values, self.pin)
        values.clear()
        for record, places in inside:
            like = self.made[id(record)].template
            for place in places:
                record.put(place, like)
            self.left.setdefault(id(record), record.tensor.device)
            record.tensor = like

    def stay(self, record: Record, here: dict[torch.device, list[Place]]) -> None:
        """Move a tensor to the device, or the devices, where it stays."""
        weight = self.made.get(id(record))
        value = weight.load() if weight is not None and record.tensor.is_meta else self.rest.value(record)
        kind = codec_of(value)
        same = kind is PLAIN and isinstance(record.tensor, nn.Parameter) and not record.tensor.is_meta
        same = same and not hasattr(record.tensor, "fake_mode")  # whose data cannot be moved (a dry run)
        for device, places in here.items():
            new = value
            if kind is not PLAIN:
                if value.device != device:
                    parts = {suffix: part.to(device) for suffix, part in kind.take_apart(value).items()}
                    new = kind.put_together(kind.template(value), parts)
            elif same:  # the same object, so that others keep knowing it
                self.stayed.append((record.tensor, record.tensor.data))
                record.tensor.data, new, same = value.detach().to(device), record.tensor, False
            elif value.device != device or record.tensor.is_meta:
                moved = value.detach().to(device)
                new = twin(record.tensor, moved) if isinstance(record.tensor, nn.Parameter) else moved
            for place in places:
                record.put(place, new)

    def finish(self) -> None:
        """Wait until all RAM is filled."""
        for done in self.filling:
            done.result()

    def undo(self) -> None:
        """Make the model what it was."""
        wait(self.filling)
        for tensor, data in self.stayed:
            tensor.data = data
        for record in self.records:
            tensor = record.tensor
            if id(record) in self.left and self.left[id(record)].type != "meta":
                tensor = self.made[id(record)].load(self.left[id(record)])
            for place in record.places:
                record.put(place, tensor)
        for record, place, handle in self.handles:
            record.put(place, handle)


def _like(record: Record, parts: Mapping[str, Part]) -> Tensor:
    """A tensor of a record without data, in the dtype that its data have: a checkpoint's may be another."""
    like = codec_of(record.tensor).template(record.tensor)
    if [*parts] == [""] and parts[""].dtype != like.dtype:
        data = like.detach().to(parts[""].dtype)
        return twin(like, data) if isinstance(like, nn.Parameter) else data
    return like


def _part(data: Tensor | Stored) -> Part:
    return Part(data.shape, _strides(data.shape), data.dtype) if isinstance(data, Stored) else part_of(data)


def _rest_on_disk(weights: list[tuple[Weight, dict[str, Tensor | Stored]]], rest: Rest) -> None:
    """Point parts to the files that hold them, after writing what is in none."""
    loose = {
        f"{weight.name}.{suffix}" if suffix else weight.name: part
        for weight, parts in weights
        for suffix, part in parts.items()
        if isinstance(part, Tensor)
    }
    written = _write(loose, rest) if loose else {}
    for weight, parts in weights:
        for suffix, part in parts.items():
            where = part if isinstance(part, Stored) else written[f"{weight.name}.{suffix}" if suffix else weight.name]
            record = weight.parts[suffix]
            record.stride, record.at, record.source = _strides(record.shape), where.offset, rest.source(where.file)


def _write(tensors: dict[str, Tensor], rest: Rest) -> dict[str, Stored]:
    """Write tensors to a new file."""
    if rest.folder is None:
        names = ", ".join(map(repr, [*tensors][:3])) + (f" and {len(tensors) - 3} more" if len(tensors) > 3 else "")
        raise ValueError(f"{names} shall rest on disk and are in no file that is known: give an offload folder")
    forms = {name: Form(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    file, stored = write_file(rest.folder, forms, tensors.__getitem__)
    rest.written[file.path] = file
    return stored


# ---------------------------------------------------------------------------------------------------------------------
# A streamer for one module alone


def stream_alone(
    module: nn.Module,
    device: torch.device,
    given: Mapping[str, Tensor] | None,
    offload_buffers: bool,
    submodules: bool,
) -> Streamer | None:
    """Send what a module holds (with `submodules`, what is in it) to RAM; None if that is nothing."""
    every = records(module)
    inside = [r for r in every if submodules or any(owner is module for _, owner, _ in r.places)]
    rest = Rest({}, {**(given or {})})
    work = _Settling(every, rest, lambda _: "cpu", False)
    weights, values = [], []
    for record in inside:
        if record.buffer and not (offload_buffers and record.persistent):
            work.stay(record, {device: record.places})
            continue
        parts = {suffix: _read(part, rest) for suffix, part in rest.parts(record).items()}
        places = [(owner, own, record.buffer) for _, owner, own in record.places]
        shapes = {suffix: part_of(part) for suffix, part in parts.items()}
        weights.append(Weight(record.name, _like(record, shapes), places, shapes))
        values.append(parts)
    if not weights:
        return None
    unit = Unit("", module, weights)
    rest_in_ram(unit, values, pin=device.type == "cuda")
    return streamer_for(device, [unit])


def streamer_for(device: torch.device, units: list[Unit], *, stands_in: bool = False, **options: Any) -> Streamer:
    """The streamer that suits a device; on the CPU itself nothing needs to be copied."""
    if device.type == "cpu" and not stands_in:
        return Mapped(device, units, prefetch=options.get("prefetch", True), name=options.get("name", ""))
    return Slots(device, units, **options)


def handles(model: nn.Module) -> list[Away]:
    """Every handle that stands in a model."""
    return [
        tensor
        for module in model.modules()
        for tensors in (module._parameters, module._buffers)
        for tensor in tensors.values()
        if isinstance(tensor, Away)
    ]
