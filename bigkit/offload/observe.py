"""What really happens in a forward of a model that is spread out, step by step.

`observe` listens while the model runs: to its streamer, for what travels, and to forward hooks, for what works where it
rests. What it gives is data: the turns in the order in which they worked, and every fetch, work and return. Which slot
a unit went to and in which order is what happened; how long it takes on other hardware is for `machine/streams.py` to
say.

Leaves out: modules without weights, and what happens inside a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..devices import Device, join, placement, prefixes, read_device
from ..machine.streams import Schedule, Turn, schedule
from .events import Event
from .experts import ExpertStreamer
from .grouping import block_classes, has_forward
from .handle import Away
from .inputs import torch_device
from .lenders import streamers_in
from .stream import Streamer
from .weights import Unit


@dataclass(frozen=True)
class Observation:
    """What happened while a model ran.

    Args:
        units: name -> (bytes, where it rests, where it works), in the order in which they first worked.
        events: everything, in the order of the host.
        slots: how many the streamer of blocks had.
        prefetch: whether it fetched ahead.
        result: what the recorded function returned.
        streamers: how many there were. Experts have one of their own, and so has each device; the slots of all are
            numbered in the order in which they were first filled.
    """

    units: Mapping[str, tuple[int, Device, Device]]
    events: tuple[Event, ...]
    slots: int
    prefetch: bool
    result: Any
    streamers: int = 1

    def turns(self, rate: float) -> list[Turn]:
        """The units as turns whose work takes their bytes / `rate` seconds: so it is where each weight is read once."""
        return [Turn(name, nbytes, nbytes / rate, *places) for name, (nbytes, *places) in self.units.items()]

    def enlarged(self, times: int) -> Observation:
        """The same run, as it would be if each weight were so many times as large."""
        units = {name: (unit[0] * times, unit[1], unit[2]) for name, unit in self.units.items()}
        events = tuple(event._replace(nbytes=event.nbytes * times) for event in self.events)
        return replace(self, units=units, events=events)

    def schedule(self, rate: float, link: float, disk: float, *, ahead: bool = True) -> Schedule:
        """When all this happens on a device that works through `rate` bytes of weights a second.

        Args:
            rate, link, disk: bytes a second.
            ahead: whether the host runs ahead; see `schedule`.

        Raises:
            ValueError: what happened follows other rules than `schedule`: an order that changed, a unit used twice,
                slots that were filled before (so record a model's first forward), or several streamers.
        """
        if self.streamers > 1:
            raise ValueError(
                f"{self.streamers} streamers have slots of their own here (experts, or several devices), and a "
                "schedule knows those of one: bigkit.dry_run says when all of it happens"
            )
        works = [event.unit for event in self.events if event.kind == "work"]
        tokens = len(works) // len(self.units)
        if works != [*self.units] * tokens:
            raise ValueError("the units did not work in the same order in each forward: a schedule cannot say when")
        timeline = schedule(
            self.turns(rate), link=link, disk=disk, slots=self.slots, prefetch=self.prefetch, tokens=tokens, ahead=ahead
        )
        fetched = [(event.unit, event.slot) for event in self.events if event.kind == "fetch"]
        planned = [(timeline.turns[span.turn].name, span.slot) for span in timeline.spans if span.lane == "link"]
        if fetched != planned:
            raise ValueError(f"the model fetched {fetched}, by the rules it should have been {planned}")
        return timeline


def observe(model: nn.Module, run: Callable[[], Any]) -> Observation:
    """Run a dispatched model and note what happens.

    Args:
        model: a model that `dispatch_model` has spread out.
        run: what to do with it, for instance `lambda: model(ids)`, once or several times.

    Raises:
        ValueError: the model is not dispatched, or nothing in it worked.

    >>> import torch
    >>> from bigkit import dispatch_model
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    >>> model = dispatch_model(model, {"0": 0, "1": "cpu", "2": "cpu"}, stand_in={0: "cpu"})
    >>> recording = observe(model, lambda: model(torch.ones(1, 4)))
    >>> [f"{event.kind} {event.unit}" for event in recording.events][:6]
    ['work 0', 'return 0', 'fetch 1', 'fetch 2', 'work 1', 'return 1']
    """
    places: dict[str, Device] | None = vars(model).get("hf_device_map")
    if places is None:
        raise ValueError(f"{type(model).__name__} is not spread out: call bigkit.dispatch_model on it first")
    streamers = streamers_in(model)
    notes = _Notes({unit.name: unit for streamer in streamers for unit in streamer.units})
    with ExitStack() as stack:
        for streamer in streamers:
            listen = partial(notes.listen, streamer=streamer if len(streamers) > 1 else None)
            streamer.listeners.append(listen)
            stack.callback(streamer.listeners.remove, listen)
        for name, module in _residents(model, places, {unit.module for unit in notes.travelling.values()}):
            for handle in notes.attend(name, module, placement(places)(name)):
                stack.callback(handle.remove)
        result = run()
    if not notes.units:
        raise ValueError(f"nothing in {type(model).__name__} worked while it was recorded")
    first = min(streamers, key=lambda one: isinstance(one, ExpertStreamer), default=None)
    slots, prefetch = (first.count, first.prefetch) if first is not None else (1, False)
    return Observation(notes.units, tuple(notes.events), slots, prefetch, result, len(streamers))


class _Notes:
    """What has happened so far.

    Args:
        travelling: name -> unit, for the streamers'.
    """

    def __init__(self, travelling: dict[str, Unit]) -> None:
        self.travelling = travelling
        self.numbers: dict[tuple[Streamer, int], int] = {}  # a streamer and its slot's number -> the number it has here
        self.events: list[Event] = []
        self.units: dict[str, tuple[int, Device, Device]] = {}

    def listen(self, event: Event, streamer: Streamer | None = None) -> None:
        """Note what a streamer tells; of several, which one it is."""
        if streamer is not None and event.slot >= 0:
            event = event._replace(slot=self.numbers.setdefault((streamer, event.slot), len(self.numbers)))
        self.events.append(event)
        if event.kind == "work":
            rests: Device = "disk" if event.rests == "disk" else "cpu"
            self.units.setdefault(event.unit, (self.travelling[event.unit].nbytes, rests, read_device(event.device)))

    def attend(self, name: str, module: nn.Module, device: Device) -> list[RemovableHandle]:
        """Note when a module works that lies on a device."""
        nbytes, where = sum(tensor.nbytes for tensor in module.parameters()), str(torch_device(device))

        def begins(*_: Any) -> None:
            self.units.setdefault(name, (nbytes, device, device))
            self.events.append(Event("work", name, 0, where, where, -1))

        def ends(*_: Any) -> None:
            self.events.append(Event("return", name, 0, where, where, -1))

        return [module.register_forward_pre_hook(begins), module.register_forward_hook(ends)]


def _residents(
    model: nn.Module, places: Mapping[str, Device], travelling: set[nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """The blocks, and what lies beside them, that hold weights and work where they rest."""
    blocks = block_classes(model)

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if all(isinstance(parameter, Away) for parameter in module.parameters()):
            return
        inside = [part for part in module.modules() if part is not module]
        holds_blocks = any(type(part).__name__ in blocks or part in travelling for part in inside)
        if has_forward(module) and not holds_blocks and any(prefix in places for prefix in prefixes(name)):
            if module not in travelling:  # a unit may share a weight with what lies on the device
                yield name, module
            return
        for own, child in module.named_children():
            yield from walk(join(name, own), child)

    yield from walk("", model)
