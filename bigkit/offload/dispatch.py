"""Running a model that is spread over GPUs, RAM and disk: the calls with Accelerate's names.

`dispatch_model` applies a device map: weights that rest on a GPU go there, the others are sent away
(`offload/grouping.py`), and each placed module gets a hook that brings inputs and weights together
(`offload/hooks.py`). What rests in RAM or on disk works on the main device. From then on `model(...)` runs as if the
model were whole.

What differs from Accelerate, on purpose: weights travel by the block, ahead of time and over pinned memory; disk means
a range of the checkpoint's own files; a model with resting weights refuses to be moved; its default main device is the
first one that the map names.

Leaves out: making the map (`api.py`, `maps/device_map.py`), and training.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.format import Checkpoint, Stored
from ..checkpoints.load import load_checkpoint_in_model
from ..devices import Device, collapse, placement, prefixes, read_device
from ..machine.hardware import Hardware
from ..maps import strategies
from ..maps.advise import calibration_of, rates_of
from ..maps.device_map import check_device_map, get_max_memory
from ..maps.partition import spread
from ..maps.strategies import STRATEGIES, interleaved
from ..meta.skeleton import spec_from_module
from ..units import parse_bytes
from .grouping import Group, Rest, groups, has_forward, make_units, records, streamer_for
from .hooks import (
    AlignDevicesHook,
    ModelHook,
    add_hook_to_module,
    drop_placed,
    remove_hook_from_module,
    send_to_device,
    torch_device,
)
from .stream import Streamer
from .weights import Unit, anatomy


def dispatch_model(
    model: nn.Module,
    device_map: Mapping[str, Device],
    main_device: Device | torch.device | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    offload_dir: str | os.PathLike[str] | None = None,
    offload_index: Mapping[str, Mapping[str, Any]] | None = None,
    offload_buffers: bool = False,
    skip_keys: str | Iterable[str] | None = None,
    preload_module_classes: Iterable[str] | None = None,
    force_hooks: bool = False,
    *,
    slots: int = 2,
    prefetch: bool = True,
    resident_memory: int | str = 0,
    ram_cache: int | str | None = None,
    stand_in: Mapping[Device, torch.device | str] | None = None,
) -> nn.Module:
    """Spread a model over devices as a map says, and make it run.

    Args:
        model: the model; weights on meta need data from `state_dict`, `offload_index`, or a checkpoint that
            `load_checkpoint_in_model` has put on "disk".
        device_map: module name -> GPU number, "cuda:N", "mps", "cpu" or "disk", covering the model.
        main_device: where weights from "cpu" and "disk" work; None takes the first GPU (or MPS) that the map names, or
            the CPU.
        state_dict: name -> tensor, for weights that the model has on meta.
        offload_dir: where weights for "disk" are written that lie in no file yet; the files go with the model.
        offload_index: name -> {"safetensors_file", "weight_name"} (or {"dtype", "shape"} of a `.dat` file in
            `offload_dir`), for weights that lie in files.
        offload_buffers: send persistent buffers away too; else all buffers stay where they work.
        skip_keys: keyword arguments, and keys of outputs, that are not moved between devices.
        preload_module_classes: classes whose modules' weights always travel together. Blocks do anyway.
        force_hooks: put hooks even if the whole model lies on one device.
        slots: units that the main device holds for weights in flight: one works while the next ones arrive.
        prefetch: bring the next units while one works.
        resident_memory: bytes of the main device for blocks of the "cpu" and "disk" part to stay there, spread evenly
            so that copies hide behind work. They show in `hf_device_map`.
        ram_cache: bytes of RAM that may keep blocks from disk, pinned, after their first visit. None: half of what is
            free, if the main device is a GPU.
        stand_in: GPU number -> another device in its place, to try a plan out without GPUs.

    Returns:
        The model, with `hf_device_map`.

    Raises:
        ValueError: the map misses, repeats or invents modules; a weight has no data; the disk is needed and no folder
            was given. The model is as it was.

    >>> from bigkit.zoo.gpt import load_pygpt
    >>> model = dispatch_model(load_pygpt(), {"": 0}, stand_in={0: "cpu"}, force_hooks=True)
    >>> model.hf_device_map
    {'': 0}
    """
    if not isinstance(device_map, Mapping):
        raise ValueError(f"device_map must map module names to devices, not {device_map!r}; bigkit.plan makes one")
    check_device_map(model, device_map)
    places = {name: read_device(device) for name, device in device_map.items()}
    main = _main_device(places, main_device)
    stands = {device: torch_device(other) for device, other in (stand_in or {}).items()}
    if set(places.values()) == {main} and not force_hooks:
        return _whole(model, places, _device(main, stands), _rest(model, state_dict, offload_index, None))

    def runs_at(device: Device) -> Device:
        return main if device in ("cpu", "disk") else device

    rest = _rest(model, state_dict, offload_index, offload_dir)
    classes = [preload_module_classes] if isinstance(preload_module_classes, str) else [*(preload_module_classes or ())]
    if budget := parse_bytes(resident_memory):
        places = _with_residents(model, places, runs_at, classes, budget)
    inner = {prefix for name in places for prefix in prefixes(name)[:-1]}
    accelerated = _device(main, stands).type == "cuda"
    units = make_units(
        model,
        placement(places),
        runs_at,
        lambda device: _device(device, stands),
        rest,
        offload_buffers=offload_buffers,
        whole_classes=classes,
        uniform=lambda name: name not in inner,
        pin=accelerated and torch._guards.detect_fake_mode() is None,
    )
    _forget_files(model)
    drop_placed(model)
    streamer = None
    for group, unit in units:
        unit.loose = group.loose
    if units:
        options: dict[str, Any] = {
            "prefetch": prefetch,
            "name": str(torch_device(main)),
        }
        if main in stands or _device(main, stands).type != "cpu":
            options |= {"count": slots, "cache": _cache(ram_cache, units, accelerated), "stands_in": main in stands}
        streamer = streamer_for(_device(main, stands), [unit for _, unit in units], **options)
    _attach(model, places, lambda device: _device(runs_at(device), stands), units, streamer, skip_keys)
    model.hf_device_map = dict(places)  # type: ignore[assignment]
    vars(model)["_apply"] = _Refusal()
    return model


def _forget_files(model: nn.Module) -> None:
    """The weights that a checkpoint was to provide have their places now."""
    for name in ("_on_disk", "_written"):
        vars(model).pop(name, None)


def _device(device: Device, stands: Mapping[Device, torch.device]) -> torch.device:
    return stands.get(device) or torch_device(device)


def _main_device(places: Mapping[str, Device], given: Device | torch.device | None) -> Device:
    if given is not None:
        return read_device(given)
    return next((device for device in places.values() if device not in ("cpu", "disk")), "cpu")


def _whole(model: nn.Module, places: dict[str, Device], device: torch.device, rest: Rest) -> nn.Module:
    """A model that lies on one device needs no hooks."""
    for record in records(model):
        if record.tensor.is_meta:
            value = rest.value(record)
            for place in record.places:
                record.put(place, value)
    _forget_files(model)
    drop_placed(model)
    model.to(device)
    model.hf_device_map = dict(places)  # type: ignore[assignment]
    return model


def _rest(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None,
    offload_index: Mapping[str, Mapping[str, Any]] | None,
    folder: str | os.PathLike[str] | None,
) -> Rest:
    stored: dict[str, Stored] = {**vars(model).get("_on_disk", {})}
    opened: dict[str, Checkpoint] = {}
    for name, entry in (offload_index or {}).items():
        file = entry.get("safetensors_file")
        if file is not None:
            if file not in opened:
                opened[file] = Checkpoint.open(file)
            known = opened[file].stored
            key = entry.get("weight_name", name)
            if key not in known:
                raise ValueError(f"the offload index says that {name!r} is {key!r} in {file}, which lacks it")
            stored[name] = known[key]
        elif folder is not None:
            path, dtype = Path(folder) / f"{name}.dat", getattr(torch, str(entry["dtype"]))
            stored[name] = Stored(path, 0, path.stat().st_size, dtype, tuple(entry["shape"]))
    written = vars(model).get("_written", {})
    return Rest(stored, state_dict or {}, None if folder is None else Path(folder), dict(written))


def _with_residents(
    model: nn.Module, places: dict[str, Device], runs_at: Callable[[Device], Device], classes: list[str], budget: int
) -> dict[str, Device]:
    """The map with as many groups as a budget allows moved to where they work, spread evenly along the model."""
    device_of = placement(places)
    inner = {prefix for name in places for prefix in prefixes(name)[:-1]}
    found, _ = groups(
        model, lambda name: runs_at(device_of(name)) != device_of(name), lambda name: name not in inner, classes
    )
    whole = [group for group in found if not group.loose]
    sizes = [sum(anatomy(type(tensor)).nbytes(tensor) for tensor in group.module.parameters()) for group in whole]
    chosen = {whole[i].name for i in spread(sizes, budget)}
    finer: dict[str, Device] = {}
    for prefix, module in model.named_modules():
        for own in (*module._parameters, *module._buffers):
            name = f"{prefix}.{own}" if prefix else own
            resident = next((outer for outer in prefixes(name) if outer in chosen), None)
            finer[resident or name] = runs_at(device_of(name)) if resident is not None else device_of(name)
    return collapse(finer)


def _cache(asked: int | str | None, units: list[tuple[Group, Unit]], accelerated: bool) -> int:
    if asked is not None:
        return parse_bytes(asked)
    if not accelerated or all(unit.rests_in() == "cpu" for _, unit in units):
        return 0
    import psutil

    return psutil.virtual_memory().available // 2


def _attach(
    model: nn.Module,
    places: Mapping[str, Device],
    runs_on: Callable[[Device], torch.device],
    units: list[tuple[Group, Unit]],
    streamer: Streamer | None,
    skip_keys: str | Iterable[str] | None,
) -> None:
    """Put hooks: one for each unit, one for each placed module that is called, and one around the model."""
    hooks: dict[nn.Module, AlignDevicesHook] = {}
    for group, unit in units:
        assert streamer is not None
        hooks[group.module] = AlignDevicesHook.placed(streamer.device, skip_keys, streamer, unit)
    modules = dict(model.named_modules())
    for name, device in places.items():
        for module in _called(modules[name]) if name in modules else ():
            hooks.setdefault(module, AlignDevicesHook.placed(runs_on(device), skip_keys))
    first = streamer.device if streamer else runs_on(next(iter(places.values())))
    root = hooks.pop(model, None) or AlignDevicesHook.placed(first, skip_keys)
    root.io_same_device, root.streamer = True, streamer
    for module, hook in (*hooks.items(), (model, root)):
        add_hook_to_module(module, hook, append=True)


def _called(module: nn.Module) -> list[nn.Module]:
    """The module itself, or what is called in its place if it is a mere container."""
    if has_forward(module):
        return [module]
    return [inner for child in module.children() for inner in _called(child)]


class _Refusal:
    """What `model.to` and its kin run into."""

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        raise RuntimeError(
            "this model is spread over devices by its hf_device_map and cannot be moved or cast as a whole: call "
            "bigkit.remove_hook_from_module(model, recurse=True) first, or dispatch it again with another map"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The short ways


def load_checkpoint_and_dispatch(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    device_map: str | Mapping[str, Device] | None = None,
    max_memory: Mapping[Device, int | str] | None = None,
    no_split_module_classes: Iterable[str] | str | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    offload_buffers: bool = False,
    dtype: torch.dtype | str | None = None,
    offload_state_dict: bool | None = None,
    skip_keys: str | Iterable[str] | None = None,
    preload_module_classes: Iterable[str] | None = None,
    force_hooks: bool = False,
    strict: bool = False,
    keep_in_fp32_modules: Iterable[str] | None = None,
    **options: Any,
) -> nn.Module:
    """Load a checkpoint into a model, usually an empty one, and spread it over devices.

    Args:
        model: the model.
        checkpoint: a file, an index or a folder.
        device_map: a map, or one of `planner.STRATEGIES` ("auto", ...), which finds one.
            Where blocks must be offloaded, those that stay are spread among them (not with "sequential"), so that
            copies hide behind work. None loads and does no more.
        max_memory: device -> budget, for a strategy; None asks this machine.
        no_split_module_classes: classes that stay on one device, for a strategy; None takes the model's own list.
        offload_folder: where weights for "disk" are written that lie in no file as they are needed (of another dtype).
        dtype: floating weights become this.
        offload_state_dict: accepted for compatibility; nothing is held in memory twice either way.
        strict: raise if anything in the checkpoint and the model does not match.
        keep_in_fp32_modules: see `load_checkpoint_in_model`.
        offload_buffers, skip_keys, preload_module_classes, force_hooks, options: see `dispatch_model`.

    Returns:
        The model, with `hf_device_map`.

    Raises:
        ValueError, FileNotFoundError, CheckpointError, PlanError: as the calls that it is made of.

    >>> from bigkit import init_empty_weights
    >>> from bigkit.zoo.gpt import GPT, GPTConfig, PYGPT
    >>> with init_empty_weights():
    ...     model = GPT(GPTConfig("pygpt"))
    >>> model = load_checkpoint_and_dispatch(model, PYGPT, {"transformer.h.0": "disk", "transformer.wte": "cpu",
    ...     "transformer.wpe": "cpu", "transformer.drop": "cpu", "transformer.ln_f": "cpu", "lm_head": "cpu",
    ...     **{f"transformer.h.{i}": "cpu" for i in range(1, 10)}}, dtype="bfloat16")
    >>> model(torch.tensor([[1, 2, 3]]))[0].shape
    torch.Size([1, 3, 256])
    """
    if isinstance(device_map, str):
        if device_map not in STRATEGIES:
            raise ValueError(f"unknown device_map {device_map!r}: expected a map or one of {', '.join(STRATEGIES)}")
        classes = [no_split_module_classes] if isinstance(no_split_module_classes, str) else no_split_module_classes
        max_memory = get_max_memory() if max_memory is None else max_memory
        rates = None
        if device_map == "fastest":
            machine = Hardware.detect()
            rates = next(iter(rates_of(machine, calibration_of(machine))), None)
        found = strategies.plan(
            spec_from_module(model), max_memory, device_map, dtype=dtype, no_split=classes,
            offload_buffers=offload_buffers, rates=rates,
        )  # fmt: skip
        device_map = found.device_map if device_map in ("sequential", "fastest") else interleaved(found)
    if device_map is not None:
        check_device_map(model, device_map)
    stand_in = options.get("stand_in") or {}
    loading = device_map and {n: "cpu" if read_device(d) in stand_in else d for n, d in device_map.items()}
    report = load_checkpoint_in_model(
        model, checkpoint, loading, offload_folder, dtype, offload_buffers=offload_buffers, strict=strict,
        keep_in_fp32_modules=keep_in_fp32_modules,
    )  # fmt: skip
    if device_map is None:
        return model
    if report.missing and any(record.tensor.is_meta and record.name in report.missing for record in records(model)):
        raise ValueError(f"{checkpoint} does not fill {type(model).__name__}: {report}")
    return dispatch_model(
        model, device_map, offload_dir=offload_folder, offload_buffers=offload_buffers, skip_keys=skip_keys,
        preload_module_classes=preload_module_classes, force_hooks=force_hooks, **options,
    )  # fmt: skip


def cpu_offload(
    model: nn.Module,
    execution_device: torch.device | Device | None = None,
    offload_buffers: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    preload_module_classes: Iterable[str] | None = None,
    **options: Any,
) -> nn.Module:
    """Keep a model's weights in RAM and bring each block to a device for its forward.

    Args:
        model: the model.
        execution_device: where it works; None takes the device of its first parameter.
        state_dict: name -> tensor, for weights that the model has on meta.
        offload_buffers, preload_module_classes, options: see `dispatch_model`.

    >>> model = cpu_offload(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 0, stand_in={0: "cpu"})
    >>> model[0].weight
    <0.weight: 2 x 2 torch.float32, rests in RAM, works on cpu>
    >>> model(torch.ones(1, 2)).shape
    torch.Size([1, 2])
    """
    device = _execution_device(model, execution_device)
    return dispatch_model(
        model, {"": "cpu"}, device, state_dict, offload_buffers=offload_buffers,
        preload_module_classes=preload_module_classes, **{"force_hooks": True, **options},
    )  # fmt: skip


def disk_offload(
    model: nn.Module,
    offload_dir: str | os.PathLike[str],
    execution_device: torch.device | Device | None = None,
    offload_buffers: bool = False,
    preload_module_classes: Iterable[str] | None = None,
    **options: Any,
) -> nn.Module:
    """Keep a model's weights on disk and bring each block to a device for its forward.

    Args:
        model: the model. Weights that `load_checkpoint_in_model` left on "disk" stay in the files of their checkpoint.
        offload_dir: where the others are written; the files go with the model.
        execution_device: where it works; None takes the device of its first parameter.
        offload_buffers, preload_module_classes, options: see `dispatch_model`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model = disk_offload(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), folder)
    ...     model(torch.ones(1, 2)).shape
    torch.Size([1, 2])
    """
    device = _execution_device(model, execution_device)
    return dispatch_model(
        model, {"": "disk"}, device, offload_dir=offload_dir, offload_buffers=offload_buffers,
        preload_module_classes=preload_module_classes, **options,
    )  # fmt: skip


def _execution_device(model: nn.Module, given: torch.device | Device | None) -> Device:
    if given is not None:
        return read_device(given)
    first = next(model.parameters(), None)
    return "cpu" if first is None or first.is_meta else read_device(first.device)


class CpuOffload(ModelHook):
    """Brings a whole model to a device when it is called, and keeps it there until `offload()`.

    Its weights stay in RAM too: to send them away again nothing needs to be copied, unless something wrote to them.
    """

    def __init__(self, execution_device: torch.device | Device | None, previous: UserCpuOffloadHook | None) -> None:
        self.execution_device = torch_device("cuda" if execution_device is None else execution_device)
        self.previous = previous
        self.in_ram: list[tuple[Tensor, Tensor, int]] = []  # tensor of the model, its data in RAM, its version

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module.to("cpu")

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.previous is not None:
            self.previous.offload()
        if not self.in_ram:
            for record in records(module):
                ram = record.tensor.data
                record.tensor.data = ram.to(self.execution_device)
                self.in_ram.append((record.tensor, ram, record.tensor._version))
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)

    def offload(self) -> None:
        """Send the weights back to RAM."""
        for tensor, ram, version in self.in_ram:
            if tensor._version != version:
                ram.copy_(tensor.data)
            tensor.data = ram
        self.in_ram = []

    def detach_hook(self, module: nn.Module) -> nn.Module:
        self.offload()
        return module


class UserCpuOffloadHook:
    """What `cpu_offload_with_hook` returns beside the model: sends it away, or ends the offloading."""

    def __init__(self, model: nn.Module, hook: CpuOffload) -> None:
        self.model, self.hook = model, hook

    def offload(self) -> None:
        """Send the model's weights back to RAM."""
        self.hook.offload()

    def remove(self) -> None:
        """Take the hook away."""
        remove_hook_from_module(self.model)


def cpu_offload_with_hook(
    model: nn.Module,
    execution_device: torch.device | Device | None = None,
    prev_module_hook: UserCpuOffloadHook | None = None,
) -> tuple[nn.Module, UserCpuOffloadHook]:
    """Keep a model in RAM until it is called, and on the device from then until the next of a chain is called.

    For pipelines in which one model works at a time, several times in a row.

    Args:
        model: the model.
        execution_device: where it works; None takes the first GPU.
        prev_module_hook: that of the model before it in the chain, which is sent away when this one is called.

    Returns:
        The model, and the hook that sends it away (`offload()`) or ends the offloading (`remove()`).

    >>> first, hook = cpu_offload_with_hook(nn.Linear(2, 2), "cpu")
    >>> second, hook_2 = cpu_offload_with_hook(nn.Linear(2, 2), "cpu", prev_module_hook=hook)
    >>> second(first(torch.ones(1, 2))).shape
    torch.Size([1, 2])
    """
    hook = CpuOffload(execution_device, prev_module_hook)
    add_hook_to_module(model, hook, append=True)
    return model, UserCpuOffloadHook(model, hook)
