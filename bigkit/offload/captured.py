"""Slots within a CUDA graph: blocks that rest in pinned RAM are copied by the graph itself.

While a step is recorded, its streamers work as ever, with events of their own: each copy into a slot and each wait for
it becomes a part of the graph. Two things must hold for a replay, since no streamer runs then:

- What the step found in slots must be there again. It was fetched ahead by the step before, perhaps into another slot
  than the one where the recorded step found it: then the graph ends with a copy from slot to slot, which costs next to
  nothing beside the link.
- Between replays other forwards may use the slots (a prompt does). They see that a replay has emptied all but these,
  and wait for it as for any forward; what they have replaced is fetched anew before the next replay.

Leaves out: blocks on disk or in RAM that is not pinned (reader threads bring these), and experts that the host chooses.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from ..meta.held import held_by
from ._torch import is_fake
from .events import Event
from .experts import ExpertStreamer
from .gather import GatherStreamer
from .handle import Away
from .hooks import AlignDevicesHook, hooks_in
from .lenders import streamers_in
from .on_cpu import MlpHook
from .stream import Streamer
from .transfer import CudaLane, Slot

_INSTEAD = "generate outside of bigkit.graph_decode"
Found = dict[Streamer, dict[int, Slot]]  # index of a unit -> the slot in which a step found it
Result = TypeVar("Result")


def devices_of(model: nn.Module) -> list[torch.device]:
    """The devices that a model works on, that of its inputs first."""
    hooks = (hook for module in model.modules() for hook in hooks_in(module))
    others = (hook for hook in hooks if isinstance(hook, AlignDevicesHook) and not isinstance(hook, MlpHook))
    placed = [hook.execution_device for hook in others if hook.execution_device]
    own = [tensor.device for _, tensor in held_by(model.modules())]
    return [*dict.fromkeys(placed or own)]


def refuse_what_waits(model: nn.Module) -> None:
    """Refuse a model in whose steps the host has a part.

    Raises:
        ValueError: it says which part.
    """
    places = {str(place): name for name, place in getattr(model, "hf_device_map", {}).items()}
    if "disk" in places:
        raise ValueError(
            f"{places['disk'] or 'this model'!r} rests on disk, where a CUDA graph cannot read: let it rest in RAM, or "
            f"{_INSTEAD}"
        )
    for streamer in streamers_in(model):
        kept = [unit for unit in streamer.units if isinstance(streamer, ExpertStreamer) and streamer.rows[unit.index]]
        if isinstance(streamer, ExpertStreamer) and not all(map(streamer.keeps_account, kept)):
            raise ValueError(
                "with expert_cache the host looks here which experts are on the GPU, and a CUDA graph has no host: "
                f"dispatch without it, so that the GPU gathers experts from RAM, or {_INSTEAD}"
            )
        loose = [part for unit in streamer.units for part in unit.parts() if part.slab is not None and part.nbytes]
        if isinstance(streamer.lane, CudaLane) and not all(part.slab.pinned for part in loose if part.slab):
            raise ValueError(
                f"weights of {streamer.units[0].name!r} rest in RAM that is not pinned, from which a CUDA graph cannot "
                f"copy: free some RAM so that it can be pinned, or {_INSTEAD}"
            )
    for name, module in model.named_modules():
        if (threshold := getattr(getattr(module, "state", None), "threshold", 0)) and hasattr(
            module, "init_8bit_state"
        ):
            raise ValueError(
                f"{name!r} is in int8 and looks for outliers on the host (llm_int8_threshold={threshold}): quantize "
                f"with llm_int8_threshold=0 or to 4 bits, or {_INSTEAD}"
            )


def _noted(value: Any, depth: int = 4) -> Any:
    """What Python of a model may ask of an attribute, to be compared later: numbers, text, functions, and how many."""
    if isinstance(value, (bool, int, float, str, torch.dtype)):
        return value
    if callable(value) and not isinstance(value, nn.Module):
        return value
    if not isinstance(value, (dict, list, tuple, set, frozenset)):
        return type(value)
    if not depth or len(value) > 1000:
        return len(value)
    if isinstance(value, dict):
        return [(key, _noted(own, depth - 1)) for key, own in value.items()]
    return value if isinstance(value, (set, frozenset)) else [_noted(own, depth - 1) for own in value]


class Rings:
    """The slots of all streamers of a model, as graphs use them.

    Attributes:
        steps_before: how many steps run before one is recorded, so that each slot was used by each of its units.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.streamers = streamers_in(model)
        for hook in (hook for module in model.modules() for hook in hooks_in(module)):
            if isinstance(hook, MlpHook):
                hook.prepare_for_graphs()
        self.steps_before = max((streamer.count for streamer in self.streamers if not streamer.maps), default=1)
        self._first: dict[tuple[str, str], str] = {}  # unit -> what happened to it first
        self._before: Any = None
        self._tables: list[Any] = []  # accounts of experts on the GPU, when the step was recorded

    def streams(self) -> list[torch.cuda.Stream]:
        """The streams that copy."""
        lanes = [streamer.lane for streamer in self.streamers if isinstance(streamer.lane, CudaLane)]
        return [stream for lane in lanes for stream in lane.streams]

    def watched(self) -> bool:
        """Whether somebody listens to what is fetched: replays tell nothing."""
        return any(streamer.listeners for streamer in self.streamers)

    def refuse_batch(self, sequences: int) -> None:
        """Refuse steps in which the host would choose experts.

        Raises:
            ValueError: there are several sequences.
        """
        for streamer in self.streamers:
            if isinstance(streamer, ExpertStreamer) and sequences > 1:
                raise ValueError(
                    f"the experts of {streamer.units[0].name!r} rest in RAM, and for {sequences} sequences the host "
                    f"looks which are chosen: generate for one at a time, let them rest on a GPU, or {_INSTEAD}"
                )

    # -- the model

    def remember(self) -> None:
        """Note what the model is made of now."""
        self._before = self._present()

    def unchanged(self) -> bool:
        """Whether it still is: the same weights at the same addresses, modules and hooks, numbers and flags."""
        return bool(self._present() == self._before)

    def _present(self) -> Any:
        modules = [*self._model.modules()]
        weights = [(id(tensor), 0 if isinstance(tensor, Away) or is_fake(tensor) else tensor.data_ptr())
                   for _, tensor in held_by(modules)]  # fmt: skip
        kinds = {device.type for device in devices_of(self._model)}
        modes = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in sorted(kinds)]
        return weights, [(weakref.ref(module), _noted(vars(module))) for module in modules], modes

    # -- recording

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """While a step is recorded, slots have other events: those of a recording mean nothing outside of it."""
        before = {streamer: [*streamer.slots] for streamer in self.streamers}
        events = [(slot, slot.ready, slot.free) for slots in before.values() for slot in slots]
        try:
            try:
                for slot, ready, _ in events:
                    if ready is not None:
                        slot.ready, slot.free = torch.cuda.Event(), torch.cuda.Event()
                for streamer in self.streamers:
                    streamer.listeners.append(self._note)
                yield
                if any(streamer.slots != slots for streamer, slots in before.items()):
                    raise RuntimeError("it takes other slots than the steps before it took")
            finally:
                for streamer in self.streamers:
                    streamer.listeners = [listener for listener in streamer.listeners if listener != self._note]
                for slot, ready, free in events:
                    slot.ready, slot.free = ready, free
        except BaseException:
            for streamer in self.streamers:
                streamer.recover()
                self._settle(streamer, {})  # whatever copies were recorded, none was made
            raise

    def _note(self, event: Event) -> None:
        self._first.setdefault((event.device, event.unit), event.kind)

    def recorded(self, function: Callable[[], Result]) -> tuple[Result, Found]:
        """Call a function that is being recorded: what it returns, and what it found in slots, which is there again at
        the recording's end, and nothing else.
        """
        self._first = {}
        held = {streamer: dict(streamer.holder) for streamer in self.streamers}
        self._record_events()
        result = function()
        found: Found = {}
        for streamer in self.streamers:
            found[streamer] = own = {
                i: slot
                for i, slot in held[streamer].items()
                if self._first.get((streamer.name, streamer.units[i].name)) == "work"
            }
            self._wait(streamer)
            self._turn(streamer, own)
            self._settle(streamer, own)
        self._tables = self._accounts()
        return result, found

    def _accounts(self) -> list[Any]:
        return [table for one in self.streamers if isinstance(one, GatherStreamer) for table in one.tables.values()]

    def _turn(self, streamer: Streamer, found: dict[int, Slot]) -> None:
        """Copy units from the slots that they are in to those where the step found them."""
        moved = {i: streamer.holder.get(i) for i, slot in found.items() if streamer.holder.get(i) is not slot}
        bytes_of = {i: slot.base[: streamer.units[i].nbytes] for i, slot in moved.items() if slot is not None}
        if len(moved) > 1:
            bytes_of = {i: own.clone() for i, own in bytes_of.items()}  # they may go round in a ring
        for i in moved:
            if i in bytes_of:
                found[i].base[: len(bytes_of[i])].copy_(bytes_of[i])
            else:
                streamer.lane.fill(found[i], streamer.units[i])

    def _settle(self, streamer: Streamer, found: dict[int, Slot]) -> None:
        """Say what is in slots after a step."""
        for slot in streamer.slots:
            streamer._empty(slot)
        for i, slot in found.items():
            slot.unit = streamer.units[i]
        streamer.holder.update(found)

    # -- replaying

    @contextmanager
    def ready(self, found: Found) -> Iterator[None]:
        """Around a replay: before it all is in slots that the step found there; later forwards wait for it.

        Raises:
            RuntimeError: somebody keeps a view of experts on the GPU, and others have been made since.
        """
        if self._accounts() != self._tables:
            raise RuntimeError(f"experts lie elsewhere on the GPU than when this step was recorded: {_INSTEAD}")
        with ExitStack() as stack:
            for streamer in self.streamers:
                stack.enter_context(streamer.lock)
                own = found[streamer]
                if streamer.holder != own:
                    there = {i: slot for i, slot in own.items() if streamer.holder.get(i) is slot}
                    self._settle(streamer, there)
                    for i in own.keys() - there.keys():
                        streamer.lane.fill(own[i], streamer.units[i])
                        own[i].unit, streamer.holder[i] = streamer.units[i], own[i]
                self._wait(streamer)
                if isinstance(streamer, GatherStreamer):
                    streamer.before_replay()
            try:
                yield
            finally:
                self._record_events()

    def _wait(self, streamer: Streamer) -> None:
        """Let the device wait for copies."""
        if isinstance(streamer.lane, CudaLane):
            for stream in streamer.lane.streams:
                torch.cuda.current_stream(streamer.device).wait_stream(stream)

    def _record_events(self) -> None:
        for streamer in self.streamers:
            for slot in streamer.slots:
                if slot.ready is not None:
                    stream = torch.cuda.current_stream(streamer.device)
                    slot.ready.record(stream)
                    slot.free.record(stream)
