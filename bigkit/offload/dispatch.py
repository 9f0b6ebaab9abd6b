"""Running a model that is spread over GPUs, RAM and disk: the calls with Accelerate's names.

`dispatch_model` applies a device map: weights that rest on a GPU go there, the others are sent away
(`offload/placing.py`), and each placed module gets a hook that brings inputs and weights together
(`offload/hooks.py`). What rests in RAM or on disk works on the GPUs in turn (`maps/links.py`), or on the main device if
one is named. From then on `model(...)` runs as if the model were whole.

What differs from Accelerate, on purpose: weights travel by the block, ahead of time and over pinned memory, over every
GPU's link; disk means a range of the checkpoint's own files; a model with resting weights refuses to be moved or cast.

Leaves out: making the map (`api.py`, `maps/device_map.py`), loading and dispatching in one call
(`offload/load_and_dispatch.py`), offloading by the whole model (`offload/whole_model.py`), and training.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..devices import Device, whole_on
from ..maps.device_map import check_device_map
from ..maps.plan import Plan
from ..meta.held import put
from ..units import parse_bytes
from .attach import attach
from .grouping import Layout, check_layers, in_turn, records, with_residents
from .hooks import drop_hooks, give_back_methods, hooks_in
from .lenders import alone, lenders_of
from .moving import change_methods, device_map_of
from .on_cpu import choose, split_units
from .on_device import rows_on_devices
from .options import names_of, read_options, with_threads
from .placing import Origins, make_units


@alone
def dispatch_model(
    model: nn.Module,
    device_map: Mapping[str, Device] | Plan,
    main_device: Device | torch.device | Iterable[Device | torch.device] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    offload_dir: str | os.PathLike[str] | None = None,
    offload_index: Mapping[str, Mapping[str, Any]] | None = None,
    offload_buffers: bool = False,
    skip_keys: str | Iterable[str] | None = None,
    preload_module_classes: Iterable[str] | None = None,
    force_hooks: bool = False,
    *,
    slots: int | None = None,
    prefetch: bool = True,
    resident_memory: int | str = 0,
    ram_cache: int | str | None = None,
    expert_cache: int | str = 0,
    on_cpu: int | str = 0,
    cpu_threads: int | None = None,
    stand_in: Mapping[Device, torch.device | str] | None = None,
) -> nn.Module:
    """Spread a model over devices as a map says, and make it run.

    Args:
        model: the model; weights on meta need data from `state_dict`, `offload_index`, or a checkpoint that
            `load_checkpoint_in_model` has put on "disk".
        device_map: module name -> GPU number, "cuda:N", "mps", "cpu" or "disk", covering the model; or a `Plan`, whose
            slots and MLPs for the CPU are taken too, where nothing else is said.
        main_device: where weights from "cpu" and "disk" work: one device, or several in turn; None takes those of the
            plan, or all GPUs (or MPS) that the map names, or the CPU.
        state_dict: name -> tensor, for weights that the model has on meta.
        offload_dir: where weights for "disk" are written that lie in no file yet; the files go with the model.
        offload_index: name -> {"safetensors_file", "weight_name"} (or {"dtype", "shape"} of a `.dat` file in
            `offload_dir`), for weights that lie in files.
        offload_buffers: send persistent buffers away too; else all buffers stay where they work.
        skip_keys: keyword arguments, and keys of outputs, that are not moved between devices.
        preload_module_classes: classes whose modules' weights always travel together. Blocks do anyway.
        force_hooks: put hooks even if the whole model lies on one device.
        slots: units that each such device holds for weights in flight, one working while others arrive; None takes two.
        prefetch: bring the next units while one works.
        resident_memory: bytes of the main devices where some blocks of the "cpu" and "disk" part stay, spread evenly.
        ram_cache: bytes of RAM that may keep blocks from disk, pinned, after their first visit. None: half of what is
            free, if the main device is a GPU, or if what rests on disk are experts of a mixture.
        expert_cache: bytes of the devices' memory where experts of a mixture that rest in RAM or on disk may stay after
            they were chosen: of each block an equal share, those chosen last.
        on_cpu: bytes of MLPs in RAM that the CPU computes when a block is called with few tokens (`offload/on_cpu.py`);
            0 takes what the plan has.
        cpu_threads: threads of PyTorch on the CPU meanwhile; None leaves them as they are.
        stand_in: GPU number -> another device in its place, to try a plan out without GPUs.

    Returns:
        The model, with `hf_device_map`, in which modules on "disk" come last. It can be cast and moved as a whole only
        if all its weights lie where they work. What a module returns or keeps of its weights, and what another thread
        reads of them meanwhile, stays as it is when other weights come and go.

    Raises:
        ValueError: the map misses, repeats or invents modules; a weight has no data; the disk is needed and no folder
            was given. The model is as it was.

    >>> from bigkit.zoo.gpt import load_pygpt
    >>> model = dispatch_model(load_pygpt(), {"": 0}, stand_in={0: "cpu"}, force_hooks=True)
    >>> model.hf_device_map
    {'': 0}
    """
    if isinstance(device_map, Plan):
        slots = (device_map.slots or None) if slots is None else slots
        on_cpu, cpu_threads = (on_cpu, cpu_threads) if on_cpu else with_threads(device_map.on_cpu, cpu_threads)
        device_map = device_map.device_map
    entries: Mapping[str, Device] = whole_on(device_map)
    layout = read_options(
        entries, main_device, slots, resident_memory, ram_cache, expert_cache, on_cpu, cpu_threads, stand_in,
        skip_keys, preload_module_classes,
    )  # fmt: skip
    check_device_map(model, entries)
    origins = Origins.of(state_dict, offload_index, offload_dir)
    if set(layout.places.values()) == {layout.main} and not force_hooks and not expert_cache:
        return _whole(model, layout, origins)
    classes = names_of(preload_module_classes)
    if budget := parse_bytes(resident_memory):
        layout = with_residents(model, layout, classes, budget)
    layout = in_turn(model, layout, classes, getattr(entries, "works", None))
    check_layers(model, layout)
    on_device = rows_on_devices(model, layout, parse_bytes(expert_cache))
    computed = choose(model, layout, classes, parse_bytes(on_cpu))
    with make_units(model, layout, origins, offload_buffers=offload_buffers, whole_classes=classes) as units:
        splits = split_units(model, units, computed)
        lenders = lenders_of(layout, units, splits, slots or 2, prefetch, ram_cache, on_device)
        _forget_earlier(model)
        attach(model, layout, lenders, names_of(skip_keys), splits, cpu_threads)
    model.hf_device_map = device_map_of(layout)  # type: ignore[assignment]
    change_methods(model, layout, away=bool(units))
    return model


def _whole(model: nn.Module, layout: Layout, origins: Origins) -> nn.Module:
    """A model that lies on one device needs no hooks."""
    for record in records(model):
        if record.tensor.is_meta:
            put(record.places.values(), origins.value(record))
    _forget_earlier(model)
    model.to(layout.device(layout.main))
    model.hf_device_map = device_map_of(layout)  # type: ignore[assignment]
    return model


def _forget_earlier(model: nn.Module) -> None:
    """Drop what an earlier dispatch or load has left at the model, now that all weights are in their places."""
    give_back_methods(model)
    for module in model.modules():
        placed: list[Any] = [hook for hook in hooks_in(module) if getattr(hook, "is_placed", False)]
        for hook in placed:
            hook.retire()
        drop_hooks(module, placed)
