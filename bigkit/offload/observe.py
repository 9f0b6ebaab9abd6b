"""What really happens in a forward of a model that is spread out, step by step.

`observe` listens while the model runs: to its streamer, for what travels, and to forward hooks, for what works where it
rests. What it gives is data: the turns in the order in which they worked, and every fetch, work and return. Which slot
a unit went to and in which order is what happened; how long it takes on other hardware is for `machine/streams.py` to
say.

Leaves out: modules without weights, and what happens inside a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..devices import Device, prefixes, read_device
from ..machine.streams import Schedule, Turn, schedule
from ..meta.skeleton import repeated_blocks
from .grouping import has_forward
from .handle import Away
from .hooks import AlignDevicesHook, ModelHook, SequentialHook, torch_device
from .stream import Event, Streamer


@dataclass(frozen=True)
class Observation:
    """What happened while a model ran.

    Args:
        units: name -> (bytes, where it rests, where it works), in the order in which they first worked.
        events: everything, in the order of the host.
        slots: how many the streamer had.
        prefetch: whether it fetched ahead.
        result: what the recorded function returned.
    """

    units: Mapping[str, tuple[int, Device, Device]]
    events: tuple[Event, ...]
    slots: int
    prefetch: bool
    result: Any

    def turns(self, rate: float) -> list[Turn]:
        """The units as turns whose work takes their bytes / `rate` seconds: so it is where each weight is read once."""
        return [Turn(name, nbytes, nbytes / rate, *places) for name, (nbytes, *places) in self.units.items()]

    def schedule(self, rate: float, link: float, disk: float, *, ahead: bool = True) -> Schedule:
        """When all this happens on a device that works through `rate` bytes of weights a second.

        Args:
            rate, link, disk: bytes a second.
            ahead: whether the host runs ahead; see `schedule`.

        Raises:
            ValueError: what happened follows other rules than `schedule`: an order that changed, a unit used twice, or
                slots that were filled before (so record a model's first forward).
        """
        works = [event.unit for event in self.events if event.kind == "work"]
        tokens = len(works) // len(self.units)
        if works != [*self.units] * tokens:
            raise ValueError("the units did not work in the same order in each forward: a schedule cannot say when")
        found = schedule(
            self.turns(rate), link=link, disk=disk, slots=self.slots, prefetch=self.prefetch, tokens=tokens, ahead=ahead
        )
        fetched = [(event.unit, event.slot) for event in self.events if event.kind == "fetch"]
        planned = [(found.turns[span.turn].name, span.slot) for span in found.spans if span.lane == "link"]
        if fetched != planned:
            raise ValueError(f"the model fetched {fetched}, by the rules it should have been {planned}")
        return found


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
    places: Mapping[str, Device] | None = vars(model).get("hf_device_map")
    if places is None:
        raise ValueError(f"{type(model).__name__} is not spread out: call bigkit.dispatch_model on it first")
    streamers = list(_streamers(model))
    if len(streamers) > 1:
        raise ValueError(f"{type(model).__name__} has {len(streamers)} streamers: record one dispatched model at once")
    events: list[Event] = []
    units: dict[str, tuple[int, Device, Device]] = {}
    travelling = {unit.name: unit for streamer in streamers for unit in streamer.units}

    def note(event: Event) -> None:
        events.append(event)
        if event.kind == "work" and event.unit in travelling:
            nbytes, works = travelling[event.unit].nbytes, read_device(event.device)
            units.setdefault(event.unit, (nbytes, "disk" if event.rests == "disk" else "cpu", works))

    def about(name: str, module: nn.Module) -> tuple[Callable[..., None], Callable[..., None]]:
        device = next(places[prefix] for prefix in reversed(prefixes(name)) if prefix in places)
        nbytes, where = sum(tensor.nbytes for tensor in module.parameters()), str(torch_device(device))

        def begins(*_: Any) -> None:
            units.setdefault(name, (nbytes, device, device))
            events.append(Event("work", name, 0, where, where, -1))

        def ends(*_: Any) -> None:
            events.append(Event("return", name, 0, where, where, -1))

        return begins, ends

    with ExitStack() as stack:
        for streamer in streamers:
            stack.enter_context(_listening(streamer, note))
        for name, module in _residents(model, places, {id(unit.module) for unit in travelling.values()}):
            begins, ends = about(name, module)
            stack.callback(module.register_forward_pre_hook(begins).remove)
            stack.callback(module.register_forward_hook(ends).remove)
        result = run()
    if not units:
        raise ValueError(f"nothing in {type(model).__name__} worked while it was recorded")
    slots = getattr(streamers[0], "count", 1) if streamers else 1
    return Observation(units, tuple(events), slots, bool(streamers and streamers[0].prefetch), result)


def _streamers(model: nn.Module) -> Iterator[Streamer]:
    seen: set[int] = set()
    for module in model.modules():
        hook: ModelHook | None = vars(module).get("_hf_hook")
        for part in hook.hooks if isinstance(hook, SequentialHook) else [hook]:
            streamer = part.streamer if isinstance(part, AlignDevicesHook) else None
            if streamer is not None and id(streamer) not in seen:
                seen.add(id(streamer))
                yield streamer


@contextmanager
def _listening(streamer: Streamer, note: Callable[[Event], None]) -> Iterator[None]:
    streamer.listeners.append(note)
    try:
        yield
    finally:
        streamer.listeners.remove(note)


def _residents(model: nn.Module, places: Mapping[str, Device], travelling: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """The blocks, and what lies beside them, that hold weights and work where they rest."""
    blocks = {cls for part in model.modules() for cls in getattr(part, "_no_split_modules", None) or ()}
    blocks |= set() if blocks else repeated_blocks(model)

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if all(isinstance(parameter, Away) for parameter in module.parameters()):
            return
        inside = [part for part in module.modules() if part is not module]
        cut = any(type(part).__name__ in blocks or id(part) in travelling for part in inside)
        if has_forward(module) and not cut and any(prefix in places for prefix in prefixes(name)):
            if id(module) not in travelling:  # a unit may share a weight with what lies on the device
                yield name, module
            return
        for own, child in module.named_children():
            yield from walk(f"{name}.{own}" if name else own, child)

    yield from walk("", model)
