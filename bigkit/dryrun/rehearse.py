"""One run on fake GPUs: `rehearse` fills an empty model, spreads it as a map says, and does the work.

Weights that rest in RAM or on disk are dispatched as in a real run: the same hooks borrow them, into slots on a fake
GPU, through a lane that notes what it is asked to bring and when (`FakeLane`).

Leaves out: what the run costs (`run.py`), and blocks that are kept in RAM after they were read from disk.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ..checkpoints.ring import Slab
from ..devices import Device, placement, read_device
from ..machine.hardware import GPUS, Gpu
from ..machine.ledger import Calibration
from ..machine.roofline import ARRIVE, FILL, HOST, LEAVE, WAIT, Operation
from ..machine.routing import Routing
from ..maps.links import DeviceMap
from ..model.config import experts_per_token
from ..model.experts import check_choice
from ..offload.choice import Recorded
from ..offload.dispatch import dispatch_model
from ..offload.experts import ExpertStreamer, expert_hits
from ..offload.gather import GatherStreamer
from ..offload.hooks import hooks_in
from ..offload.lenders import streamers_in
from ..offload.on_cpu import MlpHook, MlpStreamer
from ..offload.rows import Rows, bytes_of_one, count_rows
from ..offload.stream import Streamer
from ..offload.transfer import PlainLane, Slot
from ..offload.weights import Unit
from ..quantize.load import BnbQuantizationConfig
from ..units import KiB, MiB
from ._torch import DATA_DEPENDENT, FAILURES, plain_calls
from ._transformers import as_with_data
from .attention import Target
from .fake_gpu import OperationLog, Trace, fake_gpus
from .graphs import fake_recordings
from .inputs import NotMade
from .replay import Unlike, replaying
from .workload import Step, Workload, fill, in_words, step_name, work

OURS = re.compile(r"[/\\](torch|bigkit[/\\]dryrun)[/\\]")  # files in which a fault of a model's own code does not lie
HOPPERS, USUAL = 32 * MiB, 8 * MiB + 128 * KiB  # bytes of cuBLAS's workspace, on Hopper and elsewhere
PROCESSORS = {"T4": 40, "L4": 58, "RTX 3090": 82, "RTX 4090": 128, "A100-40GB": 108, "A100-80GB": 108}  # others: 132


def target_of(gpu: Gpu, calibration: Calibration | None = None) -> Target:
    """What code can ask of a GPU.

    Hopper's cuBLAS takes 32 MiB of workspace, others 8.125 MiB. On Hopper and Blackwell PyTorch tries cuDNN's attention
    first: seen on an H200 with PyTorch 2.11 and cuDNN 9.19.

    >>> from bigkit.machine.hardware import GPUS
    >>> target_of(GPUS["T4"]).workspace
    8519680
    """
    capability = calibration.capability if calibration and calibration.capability else gpu.capability
    usual = HOPPERS if capability[0] == 9 else USUAL
    attention = ("cudnn", "flash", "efficient") if capability in ((9, 0), (10, 0)) else ("flash", "efficient")
    workspace = (calibration.workspace if calibration else None) or usual
    return Target(capability, attention, workspace, PROCESSORS.get(gpu.name, 132))


def rehearse(
    model: nn.Module, places: Mapping[str, Device], load: Workload, target: Target, slots: int = 2,
    resident_memory: int | str = 0, quantization: BnbQuantizationConfig | None = None, replay: bool = False,
    expert_cache: int | str = 0, routing: Routing | None = None, on_cpu: int = 0,
) -> Trace:  # fmt: skip
    """Fill an empty model on fake GPUs, spread it as a map says, and do the work; returns what was noted.

    Args:
        model: empty; it is left without memory, on fake devices.
        places: module name -> where it rests.
        load: the work.
        target: the GPU that is imagined.
        slots, resident_memory: see `dispatch_model`.
        quantization: of its linear layers, which are bitsandbytes' already.
        replay, expert_cache, routing: see `dry_run`.
        on_cpu: see `dispatch_model`.
    """
    works: Mapping[str, Device] = getattr(places, "works", {})
    places = {name: read_device(device) for name, device in places.items()}
    main = next((device for device in (*works.values(), *places.values()) if isinstance(device, int)), 0)
    in_ram = DeviceMap({name: "cpu" if device == "disk" else device for name, device in places.items()}, works)
    known = works or any(isinstance(device, int) for device in places.values())
    _check_experts(model, routing)
    with fake_gpus(target, map(target_of, GPUS.values())) as log, as_with_data(), ExitStack() as stack:
        log.kind = "weights"
        if quantization is not None:
            from .fake_bnb import fake_bitsandbytes, fill_quantized

            stack.enter_context(fake_bitsandbytes(log))
        with plain_calls():
            if quantization is None:
                fill(model.eval(), in_ram, log.parameter)
            else:
                fill_quantized(model.eval(), in_ram, main, quantization, log.parameter)
            if set(places.values()) != {main} or expert_cache:  # which has no use, and is refused, if all is there
                dispatch_model(
                    model, in_ram, None if known else main, slots=slots, resident_memory=resident_memory,
                    expert_cache=expert_cache, on_cpu=on_cpu,
                )  # fmt: skip
                _replace_lanes(model, log, places, routing)
        log.trace.mark("fill")
        log.kind = "activations"
        if replay:
            stack.enter_context(replaying(model, log))
        stack.enter_context(log.following_calls(model))
        stack.enter_context(fake_recordings(log))
        stack.enter_context(mock.patch.object(FAILURES, "disabled", True))

        def after(step: Step) -> None:
            label_cache(log, step.cache)
            log.trace.mark(step_name(len(log.trace.steps) - 1))  # the fill was the first

        try:
            work(model, load, main, after)
        except (NotMade, Unlike):
            raise
        except Exception as error:
            asked = f"{type(model).__name__} cannot be run without data on {in_words(model, load)}"
            raise ValueError(f"{asked}: {_in_a_line(error)}") from error
    log.live.clear()
    for recording in log.trace.recordings.values():
        del recording.events[recording.marks[-1][1] :]  # what is freed when everything is over
    log.trace.expert_hits = expert_hits(model)
    return log.trace


def _in_a_line(error: Exception) -> str:
    """What went wrong in a model's own code, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((frame for frame in reversed(frames) if not OURS.search(frame.filename)), frames[-1])
    place = f"{Path(frame.filename).name}, line {frame.lineno}"
    if isinstance(error, DATA_DEPENDENT):
        return f"its code asks for values that only a real run has ({place})"
    if isinstance(error, torch.AcceleratorError):
        return f"its code asks for a kernel that PyTorch looks for on a real GPU ({place})"
    text = str(error).strip().partition("\n")[0] or "no reason given"
    return f"{type(error).__name__} in {place}: {text}"


class FakeLane(PlainLane):
    """Brings nothing, and notes what it was asked to bring, into which slot, and when the work needs it."""

    def __init__(
        self, streamer: Streamer, log: OperationLog, places: Mapping[str, Device], numbers: dict[int, int]
    ) -> None:
        super().__init__(streamer.device)
        self.log, self.place, self.streamer = log, placement(places), streamer
        self.numbers = numbers  # id of a slot -> its number; experts have slots of their own

    def slot(self, nbytes: int) -> Slot:
        kind, self.log.kind = self.log.kind, "slots"
        try:
            slot = super().slot(nbytes)
        finally:
            self.log.kind = kind
        self.numbers[id(slot)] = len(self.numbers)
        return slot

    def fill(self, slot: Slot, unit: Unit) -> None:
        experts, gathered, in_pieces = 0, False, False
        if isinstance(self.streamer, ExpertStreamer):
            whole: Unit = unit.whole if isinstance(unit, Rows) else unit
            experts = max(1, unit.nbytes * self.streamer.counts[whole.index] // max(1, whole.nbytes))
            if whole is not unit:  # the router must have chosen: the host waits for that, or the GPU gathers by itself
                gathered = not self.streamer.host_waits
                self._note(LEAVE if gathered else WAIT, slot, unit)
                in_pieces = True
        self._note(FILL, slot, unit, experts=experts, gathered=gathered, in_pieces=in_pieces)

    def see(self, slab: Slab, device: torch.device) -> Tensor:
        """RAM as a tensor on a fake GPU, which takes no memory there."""
        with self.log.silent():
            memory = torch.empty(slab.bytes.nbytes, dtype=torch.uint8, device=device)
        self.log.overlook(memory)
        return memory

    def gather(self, slot: Slot, unit: Unit, nbytes: int) -> None:
        """The GPU reads experts itself, when the work before is done; the host does not wait."""
        self.numbers.setdefault(id(slot), len(self.numbers))
        self._note(LEAVE, slot, unit)
        self._note(FILL, slot, unit, nbytes, experts=nbytes // bytes_of_one(unit), gathered=True)

    def arrive(self, slot: Slot) -> None:
        self._note(ARRIVE, slot, slot.unit)

    def leave(self, slot: Slot) -> None:
        self._note(LEAVE, slot, slot.unit)

    def rests(self, unit: Unit) -> str:
        """Where a unit rests in the run that is imagined."""
        rests = {self.place(inside) for inside in (unit.name, *(weight.name for weight in unit.weights))}
        return "disk" if "disk" in rests else "cpu"

    def _note(self, name: str, slot: Slot, unit: Unit | None, nbytes: int = 0, **about: Any) -> None:
        assert unit is not None
        source, number = self.rests(unit), self.numbers[id(slot)]
        self.log.trace.operations.append(
            Operation(name, str(self.device), 0, nbytes or unit.nbytes, "uint8", 0, source, number, unit.name, **about)
        )


class HostLane(PlainLane):
    """Brings nothing: what the CPU computes is there. Notes that it did.

    Args:
        device: the CPU.
        log: notes the run.
        works: name of an MLP -> the GPU on which its block works.
    """

    def __init__(self, device: torch.device, log: OperationLog, works: Mapping[str, str]) -> None:
        super().__init__(device)
        self.log, self.works = log, works

    def fill(self, slot: Slot, unit: Unit) -> None:
        pass

    def leave(self, slot: Slot) -> None:
        unit = slot.unit
        assert unit is not None
        self.log.trace.add(Operation(HOST, self.works[unit.name], 0, unit.nbytes, "", 0, unit=unit.name))


def _replace_lanes(model: nn.Module, log: OperationLog, places: Mapping[str, Device], routing: Routing | None) -> None:
    """Put fake lanes in the place of those of a dispatched model, and a recorded routing in the place of chance."""
    layers = {id(module): number for number, module in enumerate(filter(count_rows, model.modules()))}
    numbers: dict[int, int] = {}
    hooks = [hook for module in model.modules() for hook in hooks_in(module) if isinstance(hook, MlpHook)]
    works = {hook.unit.name: str(hook.output_device) for hook in hooks if hook.unit is not None}
    for streamer in streamers_in(model):
        if isinstance(streamer, MlpStreamer):
            streamer.lane = HostLane(streamer.device, log, works)
            continue
        streamer.lane = lane = FakeLane(streamer, log, places, numbers)
        if isinstance(streamer, GatherStreamer):
            streamer.see, streamer.note = lane.see, lane.gather
            for part in (part for unit in streamer.units if lane.rests(unit) == "cpu" for part in unit.parts()):
                assert part.slab is not None
                part.slab.pinned = True  # a GPU can read it, as it can in a real run
            streamer.prepare()
        if routing is not None and isinstance(streamer, ExpertStreamer):
            streamer.recorded = Recorded([routing.chosen[layers[id(unit.module)]] for unit in streamer.units])


def _check_experts(model: nn.Module, routing: Routing | None) -> None:
    """See that tokens can choose as they are said to.

    Raises:
        ValueError: a token takes more experts than there are, or the routing is that of another model.
    """
    layers = [_choice(module) for module in model.modules() if count_rows(module)]
    for count, per_token in layers:
        check_choice(type(model).__name__, count, per_token)
    if routing is not None:
        routing.check({(len(layers), *layer) for layer in layers})


def _choice(module: Any) -> tuple[int, int]:
    """How many experts a module has, and how many a token takes; 1 if its config does not say it."""
    said = experts_per_token(module.config)
    return count_rows(module), 1 if said is None else said


def label_cache(log: OperationLog, cache: Any) -> None:
    """Say which storages are the KV cache: every tensor that the cache object holds, however deep."""
    seen: set[int] = set()
    waiting = [cache]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or item is None or isinstance(item, (str, int, float, nn.Module)):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            log.label(item, "KV cache")
        elif isinstance(item, (list, tuple)):
            waiting += item
        elif isinstance(item, dict):
            waiting += item.values()
        elif hasattr(item, "__dict__"):
            waiting += vars(item).values()
