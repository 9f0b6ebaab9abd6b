"""Putting every weight of a model where its device map wants it, and the model back as it was if that fails.

What stays is moved to its device. What travels is laid out in units: in RAM as a slot on the device holds it, on disk
where it lies in its file. A tensor that is tied over several units rests once and travels with each. One that is tied
between a GPU and RAM, or another GPU, is kept on the first GPU; modules that work elsewhere get copies (`copies.py`).

Leaves out: what travels together (`offload/grouping.py`), and when (`offload/stream.py`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.format import Checkpoint, Stored
from ..checkpoints.resting import resting_place, write_file
from ..checkpoints.write import Form
from ..devices import join
from ..meta.empty import twin
from ..meta.held import Held, Place, put, tensors_of
from ..units import listed
from ._torch import is_fake, stop_watching
from .codec import PLAIN, codec_of, on_device
from .grouping import Cut, Group, Layout, records
from .mapped import PageLane
from .outside import known, settled, take_news
from .sites import has_handles
from .source import Joined, Source
from .stream import Streamer
from .transfer import readers
from .weights import Part, Unit, Weight, part_of, rest_in_ram

Parts = Mapping[str, Tensor | Stored]  # suffix -> a plain tensor of a weight, as data or as the range of a file
Travelling = dict[Group, dict[Held, list[str]]]  # the tensors of each group, with their names in it

# ---------------------------------------------------------------------------------------------------------------------
# Where data come from


@dataclass
class Origins:
    """Where the data of weights come from, and where those go that are to rest on disk.

    Args:
        stored: name -> range of a file that holds the tensor.
        given: name -> tensor, for those that the model has on meta.
        folder: where tensors are written that rest on disk and are in no file.
        written: path -> what keeps a file from being removed.
    """

    stored: Mapping[str, Stored] = field(default_factory=dict)
    given: Mapping[str, Tensor] = field(default_factory=dict)
    folder: Path | None = None
    written: dict[Path, Any] = field(default_factory=dict)
    _sources: dict[Path, Source] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        state_dict: Mapping[str, Tensor] | None,
        offload_index: Mapping[str, Mapping[str, Any]] | None,
        folder: str | os.PathLike[str] | None,
    ) -> Origins:
        """The origins that `dispatch_model` was given; where a checkpoint left weights on disk, each tensor knows.

        Raises:
            ValueError: the index names a tensor that its file lacks.
        """
        stored: dict[str, Stored] = {}
        opened: dict[str, Checkpoint] = {}
        for name, entry in (offload_index or {}).items():
            file = entry.get("safetensors_file")
            if file is not None:
                if file not in opened:
                    opened[file] = Checkpoint.open(file)
                key = entry.get("weight_name", name)
                if key not in opened[file].stored:
                    raise ValueError(f"the offload index says that {name!r} is {key!r} in {file}, which lacks it")
                stored[name] = opened[file].stored[key]
            elif folder is not None:
                path, dtype = Path(folder) / f"{name}.dat", getattr(torch, str(entry["dtype"]))
                stored[name] = Stored(path, 0, path.stat().st_size, dtype, tuple(entry["shape"]))
        return cls(stored, state_dict or {}, None if folder is None else Path(folder))

    def source(self, file: Path, pieces: Sequence[Stored] = ()) -> Source:
        """A file, with pages that belong to this model alone; or pieces of files as one."""
        if pieces:
            return Joined(pieces, [self.source(piece.file) for piece in pieces])
        if file not in self._sources:
            self._sources[file] = Source(file, self.written.get(file))
        return self._sources[file]

    def parts(self, record: Held) -> Parts:
        """The plain tensors of a weight: as data, or as ranges of files.

        Raises:
            ValueError: it is on meta and its data are nowhere.
        """
        if record.away is not None:
            take_news(record.away)
            sources = [part.source for part in record.away.parts.values() if part.source is not None]
            self.written.update((source.path, source.owner) for source in sources)
            return {suffix: _range_of(part) or part.on_cpu() for suffix, part in record.away.parts.items()}
        if not record.tensor.is_meta:
            return codec_of(record.tensor).take_apart(record.tensor)
        for name in record.places:
            if name in self.given:
                return {"": self.given[name].detach()}
            if name in self.stored:
                names = {suffix: join(name, suffix) for suffix in codec_of(record.tensor).suffixes}
                return {suffix: self.stored[full] for suffix, full in names.items() if full in self.stored}
        if place := resting_place(record.tensor):
            self.written.update((where.file, place.written) for where in place.parts.values())
            return dict(place.parts)
        raise ValueError(f"{record.name!r} is on meta and has no data: load a checkpoint into the model first")

    def value(self, record: Held) -> Tensor:
        """The tensor itself."""
        if record.away is not None:
            take_news(record.away)
            return settled(record.away, _elsewhere(record) is None)
        if not record.tensor.is_meta:
            return record.tensor
        return codec_of(record.tensor).put_together(record.tensor, self.read(self.parts(record)))

    def read(self, parts: Parts) -> dict[str, Tensor]:
        """Parts as tensors on the CPU; of those in files, the mapped pages."""
        return {
            suffix: part if isinstance(part, Tensor) else _unplaced(part, self.source(part.file, part.pieces)).on_cpu()
            for suffix, part in parts.items()
        }

    def write(self, tensors: dict[str, Tensor]) -> dict[str, Stored]:
        """Write tensors to a new file.

        Raises:
            ValueError: there is no folder.
            OSError: it could not be written.
        """
        if self.folder is None:
            names = listed(tensors, 3)
            raise ValueError(f"{names} shall rest on disk, and no file is known to have it: give an offload folder")
        forms = {name: Form(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        file, stored = write_file(self.folder, forms, tensors.__getitem__)
        self.written[file.path] = file
        return stored


def _unplaced(data: Tensor | Stored, source: Source | None = None) -> Part:
    """The part that data will be; of a range of a file, in that file if it is given."""
    if isinstance(data, Tensor):
        return part_of(data)
    at = data.offset if source and not data.pieces else 0
    return Part(data.shape, _strides(data.shape), data.dtype, at=at, source=source)


def _range_of(part: Part) -> Stored | None:
    """The range of a file that holds a part, if one does."""
    if part.source is None or part.stride != _strides(part.shape):
        return None
    pieces = part.source.pieces if isinstance(part.source, Joined) else ()
    at = pieces[0].offset if pieces else part.at
    return Stored(part.source.path, at, part.nbytes, part.dtype, part.shape, pieces)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(torch.empty(shape, device="meta").stride())


# ---------------------------------------------------------------------------------------------------------------------
# From tensors to units


@contextmanager
def make_units(
    model: nn.Module, layout: Layout, origins: Origins, *, offload_buffers: bool = False,
    whole_classes: Iterable[str] = (),
) -> Iterator[list[Unit]]:  # fmt: skip
    """A block in which every tensor of a model is where its layout wants it, and is then given to those who lend it.

    Args:
        model, layout: the model, and where it is to rest and work.
        origins: where data come from.
        offload_buffers, whole_classes: see `dispatch_model` and `Cut`.

    Yields:
        The units, in the model's order. What stays has been moved to its device.

    Raises:
        ValueError, OSError: something has no data or no place.
        BaseException: of the block. After each of them the model is as it was; if its earlier hooks are gone by then,
            it is whole, and on the CPU.
    """
    from .hooks import drop_hooks, hooks_in

    earlier = {hook for module in model.modules() for hook in hooks_in(module)}
    cut = Cut(model, layout, whole_classes)
    mover = _Mover(records(model), layout, origins)
    travelling: Travelling = {group: {} for group in cut.groups}
    staying: list[tuple[Held, torch.device]] = []
    for record in mover.records:
        stays = record.buffer and not (offload_buffers and record.persistent)
        here = [name for name in record.places if stays or not layout.is_away(name)]
        if here:
            staying.append((record, layout.device(layout.works(here[0]))))
            continue
        for name, (module, *_) in record.places.items():
            travelling[cut.group_of[id(module)]].setdefault(record, []).append(name)
    try:
        with mover.moved(travelling, staying) as units:
            yield units
    except BaseException:
        for module in model.modules():
            drop_hooks(module, [hook for hook in hooks_in(module) if vars(hook).get("is_placed")
                                and hook not in earlier])  # fmt: skip
        raise


class _Mover:
    """Moves tensors to where they rest; if that fails, it brings those back that have left.

    What has been copied to RAM is let go of at once: at no time is more than a few units in memory twice.
    """

    def __init__(self, tensors: list[Held], layout: Layout, origins: Origins) -> None:
        self.records, self.layout, self.origins = tensors, layout, origins
        for record in tensors:
            for module, *_ in record.places.values() if record.away is None and not record.tensor.is_meta else ():
                codec_of(record.tensor).collect(record.tensor, module)
        self.weights: dict[Held, Weight] = {}  # the weight that each became first
        self.left: dict[Held, torch.device] = {}  # the device that each has left for RAM
        self.joined: dict[Held, Tensor] = {}  # what is the same as a weight of another streamer -> its own tensor
        self.stayed: list[tuple[Tensor, Tensor]] = []  # a tensor of the model, and its data before
        self.filling: list[Future[None]] = []
        # Handles of an earlier streamer hold no data, so they can be kept.
        earlier = [place for record in tensors if record.away for place in record.places.values()]
        self.handles: list[tuple[Place, Any]] = [(place, tensors_of(place)[place[1]]) for place in earlier]

    @contextmanager
    def moved(self, travelling: Travelling, staying: list[tuple[Held, torch.device]]) -> Iterator[list[Unit]]:
        """A block in which what travels has been sent away, and what stays is on its device; an error undoes all."""
        try:
            units = self._send_away(travelling)
            for record, device in staying:
                self._stay(record, device)
            for done in self.filling:
                done.result()
            yield units
        except BaseException:
            self._undo()
            raise

    def _send_away(self, travelling: Travelling) -> list[Unit]:
        """Make the units, and begin to fill their RAM."""
        units: list[Unit] = []
        times = Counter(record for inside in travelling.values() for record in inside)
        for group, inside in travelling.items():
            if not inside:
                continue
            laid: list[tuple[Weight, dict[str, Tensor]]] = []  # with the data of what is to rest in RAM
            on_disk: list[tuple[Weight, Parts]] = []
            for record, names in inside.items():
                places = [record.places[name] for name in names]
                if record in self.weights:
                    laid.append((self.weights[record].alias(places), {}))
                    continue
                if (other := _elsewhere(record)) is not None:
                    self.joined[record], self.weights[record] = record.tensor, other.alias(places)
                    laid.append((self.weights[record], {}))
                    continue
                parts = self.origins.parts(record)
                weight = self.weights[record] = _new_weight(record, parts, places)
                if self.layout.rests(names[0]) == "disk":
                    on_disk.append((weight, parts))
                    laid.append((weight, {}))
                else:
                    laid.append((weight, self.origins.read(parts)))
            self._rest_on_disk(on_disk)
            laid.sort(key=lambda item: item[0].order())  # as they lie in their files: fewer and longer reads
            units.append(Unit(group.name, group.module, [weight for weight, _ in laid], group.loose, group.routed))
            values = [tensors for _, tensors in laid]
            if self.layout.pins and all(times[record] == 1 for record in inside):
                # Pinning takes long, and runs well on several threads.
                self.filling.append(readers().submit(self._fill, units[-1], values, inside))
            else:
                self._fill(units[-1], values, inside)
        return units

    def _rest_on_disk(self, weights: list[tuple[Weight, Parts]]) -> None:
        """Point parts to the files that hold them, after writing what is in none."""
        every = [(weight, suffix, data) for weight, parts in weights for suffix, data in parts.items()]
        in_no_file = {join(weight.name, own): data for weight, own, data in every if isinstance(data, Tensor)}
        written = self.origins.write(in_no_file) if in_no_file else {}
        for weight, suffix, data in every:
            stored = written[join(weight.name, suffix)] if isinstance(data, Tensor) else data
            weight.parts[suffix] = _unplaced(stored, self.origins.source(stored.file, stored.pieces))

    def _fill(self, unit: Unit, values: list[dict[str, Tensor]], inside: Iterable[Held]) -> None:
        """Give a unit its RAM, and let go of what the model held."""
        rest_in_ram(unit, values, self.layout.pins)
        values.clear()
        for record in inside:
            like = self.weights[record].template
            self.left.setdefault(record, record.tensor.device)
            record.tensor = like
        for weight in unit.weights:
            put(weight.places, weight.template)

    def _stay(self, record: Held, device: torch.device) -> None:
        """Move a tensor to the device where it stays."""
        value = new = self.origins.value(record)
        tensor = record.tensor if record.away is None else value
        if codec_of(value) is not PLAIN:
            new = value if value.device == device else on_device(value, device)
        # The same object stays in the model, so that others keep knowing it. Data of a fake tensor cannot be moved.
        elif isinstance(tensor, nn.Parameter) and not (tensor.is_meta or is_fake(tensor)):
            self.stayed.append((tensor, tensor.data))
            tensor.data, new = value.detach().to(device), tensor
        elif value.device != device or tensor.is_meta:
            new = value.detach().to(device)
            new = twin(tensor, new) if isinstance(tensor, nn.Parameter) else new
        if record.away is not None and new is not value and record.away.outside.ref is not None:
            record.away.outside.note(new, record.away)
        if _elsewhere(record) is None:
            stop_watching(new)
        put(record.places.values(), new)

    def _undo(self) -> None:
        """Make the model what it was."""
        wait(self.filling)
        for tensor, data in self.stayed:
            tensor.data = data
        for record in self.records:
            tensor = record.tensor
            if record in self.left and self.left[record].type != "meta":
                tensor = self.weights[record].load(self.left[record])
            if record in self.joined:
                tensor = self.joined[record]
                for same in self.weights[record].aliases:
                    same.aliases.remove(self.weights[record])
            put(record.places.values(), tensor)
        for place, handle in self.handles:
            served = handle.weight.lender.sites[handle.weight.index].released is False
            put([place], handle if served else settled(handle.weight, last=True))


def _new_weight(record: Held, parts: Parts, places: list[Place]) -> Weight:
    """A record's weight, in the dtype that its data have: a checkpoint's may be another than the model's."""
    forms = {suffix: _unplaced(part) for suffix, part in parts.items()}
    like = codec_of(record.tensor).template(record.tensor)
    if [*forms] == [""] and forms[""].dtype != like.dtype:
        data = like.detach().to(forms[""].dtype)
        like = twin(like, data) if isinstance(like, nn.Parameter) else data
    weight = Weight(record.name, like, places, forms)
    if record.away is None:
        weight.outside.note(record.tensor, weight)
    else:
        weight.outside = record.away.outside
        weight.outside.weights.add(weight)
    return weight


def _elsewhere(record: Held) -> Weight | None:
    """The weight that a tensor is already, in modules that are served by another streamer and stay with it."""
    weights = known(record.tensor) if record.away is None else [record.away]
    return next((weight for weight in weights if has_handles(weight, record.places.values())), None)


# ---------------------------------------------------------------------------------------------------------------------
# A streamer for one module alone


def stream_alone(
    module: nn.Module, device: torch.device, given: Mapping[str, Tensor] | None, offload_buffers: bool, submodules: bool
) -> Streamer | None:
    """Send what a module holds (with `submodules`, what is in it) to RAM; None if that is nothing."""
    mover = _Mover(records(module), Layout({"": "cpu"}, str(device)), Origins(given=given or {}))
    inside: dict[Held, list[str]] = {}
    staying: list[tuple[Held, torch.device]] = []
    for record in mover.records:
        if submodules or any(owner is module for owner, *_ in record.places.values()):
            if record.buffer and not (offload_buffers and record.persistent):
                staying.append((record, device))
            else:
                inside[record] = [*record.places]
    with mover.moved({Group("", module): inside}, staying) as units:
        return Streamer(device, units, PageLane(device) if device.type == "cpu" else None) if units else None
