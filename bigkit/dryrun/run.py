"""A run that has not happened: `dry_run(...)` executes a model on fake GPUs and says what the real ones would hold.

The real code of the model runs, operation by operation, on devices that do not exist (`rehearse.py`). What it asks for
is played through a model of PyTorch's allocator (`machine/allocator.py`), which says how much each device has allocated
and reserved at every moment; what it computes and moves is timed with a roofline (`machine/roofline.py`).

    peak_allocated   what `torch.cuda.max_memory_allocated()` would say
    peak_reserved    what `torch.cuda.max_memory_reserved()` would say; this, and the CUDA context, must fit

Leaves out: pictures (`bigkit.draw.dryrun`), and what happens once for a process (see `machine/roofline.py`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.as_stored import AsStored, keep_as_stored
from ..checkpoints.collector import collector_paused
from ..devices import Device, read_device, whole_on
from ..machine.hardware import CONTEXT_BYTES, HARDWARE, Gpu, Hardware, machine_of
from ..machine.ledger import Calibration, Ledger, calibration_of, overhead_of, resting
from ..machine.roofline import Rates
from ..machine.routing import Routing
from ..maps.links import DeviceMap, links_of
from ..maps.on_cpu import HOST, readings_of
from ..maps.plan import Plan
from ..maps.predict import rates_of
from ..maps.strategies import place
from ..meta.skeleton import spec_from_module
from ..model.config import facts
from ..model.estimate import remarks
from ..model.stored import tensors_told
from ..quantize.load import BnbQuantizationConfig
from ..quantize.replace import cast
from ..units import dtype_name
from .met import COMPARED, NO_OTHER, about_met
from .rehearse import rehearse, target_of
from .replay import Unlike
from .result import DryRun
from .splice import splice
from .workload import Workload, in_words


@collector_paused()
def dry_run(
    model: str | nn.Module | Callable[[], nn.Module],
    plan: Plan | Mapping[str, Device] | Device | None = None,
    batch_size: int = 1,
    prompt_tokens: int = 512,
    new_tokens: int = 0,
    hardware: Hardware | str | None = None,
    *,
    dtype: object = None,
    all_logits: bool = False,
    cache: bool = True,
    generate: bool = True,
    slots: int | None = None,
    resident_memory: int | str = 0,
    calibration: Calibration | None = None,
    quantization: BnbQuantizationConfig | str | None = None,
    replay: bool = True,
    expert_cache: int | str = 0,
    routing: Routing | str | os.PathLike[str] | None = None,
    graphs: bool = False,
) -> DryRun:
    """Run a model on GPUs that do not exist.

    Args:
        model: a name, an empty model (on the meta device, see `init_empty_weights`; it is left without memory, on fake
            devices), or a function that builds one.
        plan: where its parts rest: a `Plan`, a device map, one device, or a strategy of `bigkit.plan`; None puts all on
            GPU 0, or spreads it over a machine with several ("auto").
        batch_size: sequences, or images.
        prompt_tokens: tokens of each sequence's prompt.
        new_tokens: tokens that are then generated for each sequence, one at a time.
        hardware: the machine, or its name in `HARDWARE` or `GPUS`; None takes as many H100s as the plan names.
        dtype: of the weights; None takes the plan's, then that of the model, or of the config if `model` is a name;
            those of a quantized repository stay as they are stored.
        all_logits: keep the logits of every prompt token, as a plain call of the model does.
        cache: keep the KV cache of a prompt after which nothing is generated.
        generate: run the model's own `generate`, where it has one; False calls the model itself, once for the prompt
            and once a token.
        slots, resident_memory: see `dispatch_model`; None takes the plan's slots, or two.
        calibration: rates measured on that machine; None takes the ones in the ledger if the hardware is this machine
            (`Hardware.detect()`) and `calibrate()` was called here, else the vendors' figures.
        quantization: of the linear layers: a `BnbQuantizationConfig` or one of `QUANTIZATIONS`; None takes the plan's,
            or what a repository is quantized to.
            bitsandbytes' own Python for CUDA is followed (`dryrun/fake_bnb.py`).
        replay: trace blocks that are surely equal twice, then note the same again (`dryrun/replay.py`); False runs all.
        expert_cache: bytes of the GPUs for experts that stay there; see `dispatch_model`.
        routing: which experts are chosen, token by token, as `record_routing` gives it, or its JSON file; from its
            beginning, and again when it ends. None: as many different ones as chance gives.
        graphs: generate within `bigkit.graph_decode`, and count what the graphs keep.

    MLPs that a plan gives to the CPU (`on_cpu=True`) are computed there, if the calibration says what it reads.

    Returns:
        The run: peaks, timelines and times.

    Raises:
        ValueError: an unknown device or quantization, the hardware has too few GPUs, no experts for the cache, or a
            routing of another model.
        ImportError: it is quantized, and bitsandbytes is not there.

    >>> run = dry_run("pygpt", batch_size=2, prompt_tokens=32, new_tokens=2)
    >>> run.fits, [step.name for step in run.times]
    (True, ['prefill', 'token 1', 'token 2'])
    """
    load = Workload(batch_size, prompt_tokens, new_tokens, all_logits, cache, generate, graphs)
    given: Any = whole_on(plan)
    if isinstance(given, str) or (given is None and hardware is not None and len(_machine(hardware, 1).gpus) > 1):
        given = _plan(model, _machine(hardware, 1), given or "auto", dtype, quantization, load)
    places, routing = _places(given), None if routing is None else Routing.of(routing)
    if isinstance(given, Plan):
        dtype, quantization = dtype or given.dtype, quantization or given.quantization
        slots = slots or given.slots
    on_cpu, left_out = getattr(given, "on_cpu", None), list[str]()
    if quantization is None and dtype is None:
        quantization = _quantized_so(model)
    working = (*places.values(), *getattr(places, "works", {}).values())
    numbers = sorted({device for device in working if isinstance(device, int)}) or [0]
    machine = _machine(hardware, max(numbers) + 1)
    left_out += _about_gpu(machine.gpus[0])
    here = calibration is None
    calibration = calibration or calibration_of(machine)
    left_out += _about_versions(calibration)
    config = None
    if quantization is not None:
        from .fake_bnb import config_of

        config = config_of(quantization, dtype)
        dtype = config.torch_dtype
        if config.load_in_8bit:
            left_out.append("Inputs beyond the threshold of LLM.int8 cost time that is not counted here.")
    name, empty = _model(model, dtype, config)
    of_gpus = rates_of(machine, calibration)
    rates = {f"cuda:{i}": of_gpus[i] for i in numbers}
    if on_cpu and (measured := _beside_the_cpu(empty, rates, on_cpu[1], graphs, calibration)):
        rates = measured
    elif on_cpu:
        on_cpu, which = None, "a graph's call of it takes" if graphs else "it reads beside a busy link"
        left_out.append(f"MLPs that the CPU computes are streamed here: what {which} was not measured on this machine.")
    target = target_of(machine.gpus[numbers[0]], calibration)
    options: dict[str, Any] = {
        "slots": slots or 2, "resident_memory": resident_memory, "quantization": config, "expert_cache": expert_cache,
        "routing": routing, "on_cpu": on_cpu[0] if on_cpu else 0,
    }  # fmt: skip
    replay = replay and not (expert_cache or routing or graphs)  # else no two tokens are alike
    try:
        trace = rehearse(empty, places, load, target, **options, replay=replay)
    except Unlike:
        if isinstance(model, nn.Module):  # it is half run, and cannot be built again
            raise RuntimeError(
                f"blocks of {type(model).__name__} look alike and are not: build it again and give replay=False"
            ) from None
        name, empty = _model(model, dtype, config)
        trace = rehearse(empty, places, load, target, **options)
    known: Any = getattr(empty, "config", None)
    about = facts(known.to_dict()) if hasattr(known, "to_dict") else {}
    about |= {"decoding": 0} if any(isinstance(part, AsStored) for part in empty.modules()) else {}
    context = calibration.context if calibration and calibration.context else CONTEXT_BYTES
    first, last = trace.steps[0][1], trace.steps[1][1]
    issued = sum(operation.issued for operation in trace.operations[first:last])
    kind = config.quantization if config else None
    rests = resting(places, expert_cache)
    return DryRun(
        model=name,
        load=load,
        device_map=places,
        hardware=machine.name,
        recordings={read_device(device): recording for device, recording in trace.recordings.items()},
        kinds={read_device(device): kinds for device, kinds in trace.kinds.items()},
        operations=trace.operations,
        steps=trace.steps[1:],
        rates=rates,
        capacity={i: machine.gpus[i].memory - context for i in numbers},
        asked=in_words(empty, load),
        notes=(*remarks(name, about, load.prompt + load.new), *left_out, *about_met(target.capability)),
        twin=calibration.twin(type(empty).__name__, kind, issued, rests) if calibration else None,
        met=target.capability == COMPARED,
        expert_hits=trace.expert_hits,
        alike=frozenset(trace.alike),
        workspaces={read_device(device): numbers for device, numbers in trace.workspaces.items()},
        attended=trace.attended,
        but_attention=frozenset(trace.but_attention),
        quantized=config is not None,
        recorded=Ledger.load().ratios(calibration.machine, name) if here and calibration else {},
    )


def on_machine(run: DryRun, machine: Hardware) -> DryRun | None:
    """A dry run with the rates and the memory of another machine; None if its GPUs would do something else.

    Where they take other kernels of attention, these are put in the place of its own (`splice.py`). The caller knows
    that nothing was measured on the machine.

    >>> from bigkit.machine.hardware import machine_of
    >>> run = dry_run("pygpt", hardware="RTX 3090")
    >>> on_machine(run, machine_of("RTX 5090")).hardware, on_machine(run, machine_of("H200")).hardware
    ('1 x RTX 5090', '1 x H200')
    """
    target = target_of(machine.gpus[0])
    if any(rates.reads for rates in run.rates.values()):  # nobody knows what that machine's CPU reads
        return None
    if target not in run.alike:
        spliced = splice(run, target) if target in run.but_attention else None
        if spliced is None:
            return None
        run = replace(run, attended=(), alike=frozenset(), but_attention=frozenset(), **vars(spliced))
    rates, numbers = rates_of(machine, None), [i for i in run.capacity if isinstance(i, int)]
    notes = (note for note in run.notes if not note.endswith((_AS_CUDA, NO_OTHER)))
    recordings = {
        device: replace(recording, events=_with_requests(recording.events, run.workspaces[device], target.workspace))
        if device in run.workspaces else recording
        for device, recording in run.recordings.items()
    }  # fmt: skip
    return replace(
        run, hardware=machine.name, rates={f"cuda:{i}": rates[i] for i in numbers},
        capacity={i: machine.gpus[i].memory - CONTEXT_BYTES for i in numbers}, recordings=recordings,
        notes=(*notes, *_about_gpu(machine.gpus[0]), *about_met(target.capability)), met=target.capability == COMPARED,
    )  # fmt: skip


def _beside_the_cpu(
    model: nn.Module, rates: Mapping[str, Rates], threads: int, graphs: bool, calibration: Calibration | None
) -> dict[str, Rates] | None:
    """The rates of GPUs while the CPU computes MLPs with so many threads; None if that was not measured."""
    dtype = str(max(model.parameters(), key=Tensor.numel).dtype).removeprefix("torch.")
    found = readings_of(calibration, dtype, len(rates))
    if calibration is None or not found or (graphs and not calibration.call):
        return None
    nearest = min(found, key=lambda own: abs(own.threads - threads))
    beside: dict[str, Any] = {"reads": nearest.reads, "hop": HOST.hops, "call": calibration.call or 0.0}
    return {name: replace(own, link=min(own.link, nearest.links / len(rates)), **beside) for name, own in rates.items()}


_AS_CUDA = "is rehearsed as a CUDA GPU of its memory and speed."


def _about_gpu(gpu: Gpu) -> list[str]:
    return [f"{gpu.name} {_AS_CUDA}"] if gpu.mps else []


def _about_versions(calibration: Calibration | None) -> list[str]:
    """What must be said if a machine was measured with another PyTorch than the one whose operations are followed.

    PyTorch 2.11, for example, multiplies the last tokens of a batch one by one, and 2.15 all at once: with 32 prompts
    and a vocabulary of 262,000 that is 15 ms on an H200, or half a millisecond.
    """
    measured, own = ((calibration.versions if calibration else {}).get("torch", ""), torch.__version__)
    there, here = (".".join(version.split(".")[:2]) for version in (measured, own))
    if not there or there == here:
        return []
    return [
        f"The machine was measured with PyTorch {there}; this run does what {here} does, which may be something else."
    ]


def _with_requests(events: Sequence[int], numbers: Sequence[int], size: int) -> list[int]:
    """Events with another size of the requests of these numbers, from 1."""
    requests, changed = [i for i, event in enumerate(events) if event > 0], [*events]
    for number in numbers:
        changed[requests[number - 1]] = size
    return changed


def _plan(
    model: str | nn.Module | Callable[[], nn.Module], machine: Hardware, strategy: str, dtype: object,
    quantization: BnbQuantizationConfig | str | None, load: Workload,
) -> Plan:  # fmt: skip
    """What `bigkit.plan` gives on a machine."""
    if isinstance(model, str):
        from .. import zoo

        spec = zoo.describe(model)
    else:
        spec = spec_from_module(model if isinstance(model, nn.Module) else model(), trace_cache=True)
    kind = quantization.quantization if isinstance(quantization, BnbQuantizationConfig) else quantization
    return place(
        spec, machine.max_memory(), strategy, dtype=dtype, quantization=kind, batch=load.batch,
        context=load.prompt + load.new, overhead=overhead_of(machine), strict=False,
        links=links_of(machine, calibration_of(machine)),
    )  # fmt: skip


def _quantized_so(model: str | nn.Module | Callable[[], nn.Module]) -> BnbQuantizationConfig | None:
    """How bitsandbytes has quantized a model already, by its config; None if it has not."""
    if isinstance(model, str):
        from .. import zoo

        about = dict(zoo.describe(model).facts)
    else:
        config: Any = getattr(model, "config", None)
        about = facts(config.to_dict()) if hasattr(config, "to_dict") else {}
    settings = about.get("quantization_config")
    if not isinstance(settings, Mapping) or settings.get("quant_method") != "bitsandbytes":
        return None
    return BnbQuantizationConfig.from_dict(settings, about.get("torch_dtype"))


def _places(plan: Plan | Mapping[str, Device] | None) -> dict[str, Device]:
    """Module name -> where it rests, devices as plans name them."""
    device_map = {"": 0} if plan is None else plan.device_map if isinstance(plan, Plan) else plan
    places = {name: read_device(device) for name, device in device_map.items()}
    if "mps" in places.values():
        raise ValueError("a dry run knows GPUs, 'cpu' and 'disk', not mps")
    return DeviceMap(places, works) if (works := getattr(device_map, "works", {})) else places


def _machine(hardware: Hardware | str | None, gpus: int) -> Hardware:
    """The machine, or one with so many of the GPUs that are named."""
    machine = machine_of("H100-80GB" if hardware is None else hardware)
    counted = isinstance(hardware, str) and (hardware in HARDWARE or re.match(r"\s*\d+\s*x", hardware))
    if not isinstance(hardware, Hardware) and not counted and len(machine.gpus) == 1 and not machine.unified:
        machine = machine_of(f"{gpus} x {machine.gpus[0].name}")
    if len(machine.gpus) < gpus:
        raise ValueError(f"the plan uses GPU {gpus - 1}, and {machine.name} has {len(machine.gpus)} GPUs")
    return machine


def _model(
    model: str | nn.Module | Callable[[], nn.Module], dtype: object, quantization: BnbQuantizationConfig | None
) -> tuple[str, nn.Module]:
    """The model's name, and the model, empty."""
    if isinstance(model, str):
        from .. import zoo

        name, empty = model, zoo.empty_model(model, dtype=dtype)
        tensors = zoo.stored_tensors(model) if dtype is None and quantization is None else {}
    else:
        empty = model if isinstance(model, nn.Module) else model()
        config = getattr(empty, "config", None)
        name = getattr(config, "_name_or_path", "") or type(empty).__name__
        told = dtype is None and quantization is None and isinstance(getattr(config, "quantization_config", None), dict)
        tensors = tensors_told(spec_from_module(empty)) if told else {}
    if tensors:
        keep_as_stored(empty, tensors, name)
    if real := next((name for name, parameter in empty.named_parameters() if not parameter.is_meta), None):
        raise ValueError(f"{real!r} has memory: a dry run needs an empty model, built under init_empty_weights()")
    if quantization is not None:
        from .fake_bnb import quantize_empty

        quantize_empty(empty, quantization)
    elif not isinstance(model, str) and dtype not in (None, "auto"):
        cast(empty, getattr(torch, dtype_name(dtype)))
    return name, empty
