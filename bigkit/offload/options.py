"""The options of a dispatch, read and checked before anything of the model changes.

Leaves out: the device map against the model (`maps/device_map.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

import torch

from ..devices import Device, read_device
from ..units import counted, parse_bytes
from ._torch import is_real_cuda
from .grouping import Layout
from .inputs import torch_device


def read_options(
    device_map: Mapping[str, Device],
    main_device: Device | torch.device | Iterable[Device | torch.device] | None = None,
    slots: int | None = None,
    resident_memory: int | str = 0,
    ram_cache: int | str | None = None,
    expert_cache: int | str = 0,
    on_cpu: int | str = 0,
    cpu_threads: int | None = None,
    stand_in: Mapping[Device, torch.device | str] | None = None,
    skip_keys: str | Iterable[str] | None = None,
    preload_module_classes: str | Iterable[str] | None = None,
    **others: Any,
) -> Layout:
    """Check the options of `dispatch_model` before anything of the model changes; any value is right for the `others`.

    Returns:
        The map with its main device and stand-ins.
    """
    if not isinstance(device_map, Mapping):
        raise ValueError(f"device_map must map module names to devices, not {device_map!r}; bigkit.plan makes one")
    if slots is not None and not _at_least_one(slots):
        raise ValueError(f"slots must be a number of blocks, at least 1, not {slots!r}")
    for size in (resident_memory, ram_cache or 0, expert_cache, on_cpu):
        parse_bytes(size)
    if cpu_threads is not None and not _at_least_one(cpu_threads):
        raise ValueError(f"cpu_threads must be a number of threads, at least 1, not {cpu_threads!r}")
    names_of(skip_keys)
    names_of(preload_module_classes)
    places = {name: read_device(device) for name, device in device_map.items()}
    gpus = [device for device in places.values() if device not in ("cpu", "disk")]
    working = [*getattr(device_map, "works", {}).values()] or gpus or ["cpu"]
    if main_device is not None:
        one = isinstance(main_device, str) or not isinstance(main_device, Iterable)
        working = [read_device(device) for device in ([main_device] if one else main_device)]  # type: ignore[union-attr]
    if not working:
        raise ValueError("main_device names no device: leave it out, or name where weights from RAM and disk work")
    main, *further = dict.fromkeys(working)
    if "disk" in working or (further and "cpu" in working):
        raise ValueError(f"main_device must be where weights work, GPUs or 'cpu', not {main_device!r}")
    stands = {read_device(given): torch_device(device) for given, device in (stand_in or {}).items()}
    layout = Layout(places, main, stands, tuple(further))
    for device in {layout.device(working) for working in (*gpus, main, *further)}:
        if is_real_cuda(device) and (number := device.index or 0) >= (there := torch.cuda.device_count()):
            raise ValueError(
                f"there is no GPU {number}: this machine has {counted(there, 'GPU')} that PyTorch sees. Give another "
                f"map, or let the CPU play it with stand_in={{{number}: 'cpu'}}"
            )
    return layout


def _at_least_one(number: Any) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool) and int(number) >= 1


def names_of(given: str | Iterable[str] | None) -> tuple[str, ...]:
    if not isinstance(given, Iterable | None):
        raise ValueError(f"expected a name or several, not {given!r}")
    return (given,) if isinstance(given, str) else tuple(given or ())


def with_threads(planned: tuple[int, int | None] | None, threads: int | None) -> tuple[int, int | None]:
    """Bytes of MLPs that the CPU computes as a plan says, and its threads: those that were asked for, or the plan's."""
    nbytes, own = planned or (0, None)
    return nbytes, own if threads is None else threads
