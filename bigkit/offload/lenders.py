"""Who lends each unit of a model: a streamer for each device, and for each kind of unit there.

Leaves out: what a streamer does (`stream.py`, `experts.py`), and which unit works where (`grouping.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from ..devices import Device
from ..machine.ram import ram_free
from ..units import parse_bytes
from ._torch import is_real_cuda
from .experts import ExpertStreamer
from .gather import GatherStreamer
from .grouping import Layout
from .hooks import AlignDevicesHook, hooks_in
from .inputs import torch_device
from .locks import all_of
from .mapped import PageLane
from .on_cpu import Split, cpu_streamer
from .rows import has_rows
from .stream import Streamer
from .weights import Unit

Dispatch = TypeVar("Dispatch", bound=Callable[..., nn.Module])


def lenders_of(
    layout: Layout, units: Sequence[Unit], splits: Sequence[Split], slots: int, prefetch: bool,
    ram_cache: int | str | None, on_device: Mapping[nn.Module, int],
) -> dict[Unit, Streamer]:  # fmt: skip
    """The streamer of each unit.

    Args:
        layout: where they rest and work.
        units: all of a model.
        splits: those of them whose MLPs the CPU computes for few tokens.
        slots, prefetch, ram_cache: see `dispatch_model`.
        on_device: see `rows_on_devices`.
    """
    half = ram_free() // 2
    cache = half if ram_cache is None else parse_bytes(ram_cache)
    lenders = _expert_streamers(layout, units, slots, prefetch, cache, on_device)
    dense = [unit for unit in (*units, *(split.rest for split in splits)) if unit not in lenders]
    works = [layout.main if unit.loose else layout.works(unit.name) for unit in dense]
    on_disk = [unit.nbytes if unit.rests_in() == "disk" else 0 for unit in dense]
    cache = 0 if ram_cache is None and layout.device(layout.main).type != "cuda" else cache
    for place in dict.fromkeys(works):
        device, name = layout.device(place), str(torch_device(place))
        own = [unit for unit, working in zip(dense, works) if working == place]
        options: dict[str, Any] = {"prefetch": prefetch, "name": name}
        if device.type == "cpu" and place not in layout.stand_in:
            options["lane"] = PageLane(device)
        else:
            share = sum(size for size, working in zip(on_disk, works) if working == place) / max(sum(on_disk), 1)
            options |= {"count": slots, "cache": int(cache * share)}
        lenders |= dict.fromkeys(own, Streamer(device, own, **options))
    if splits:
        lenders |= dict.fromkeys([split.mlp for split in splits], cpu_streamer(splits))
    return lenders


def _expert_streamers(
    layout: Layout, units: Sequence[Unit], slots: int, prefetch: bool, cache: int, on_device: Mapping[nn.Module, int]
) -> dict[Unit, Streamer]:
    """Who lends each unit of experts; other units are left out. The arguments are those of `lenders_of`.

    Args:
        cache: bytes of RAM for what rests on disk; experts may have what other units leave of it.
    """
    found: dict[Unit, Streamer] = {}
    by_device: dict[tuple[Device, bool], list[Unit]] = {}
    for unit in units:
        if unit.routed:
            by_device.setdefault((layout.works(unit.name), has_rows(unit)), []).append(unit)
    others = sum(unit.nbytes for unit in units if not unit.routed and unit.rests_in() == "disk")
    on_disk = sum(unit.nbytes for unit in units if unit.routed and unit.rests_in() == "disk")
    cache = max(0, cache - others)
    for (place, rows), own in by_device.items():
        device, name = layout.device(place), str(torch_device(place))
        is_cpu = device.type == "cpu" and place not in layout.stand_in
        share = cache * sum(unit.nbytes for unit in own if unit.rests_in() == "disk") // max(on_disk, 1)
        streamer: Streamer
        if rows:
            cls = GatherStreamer if device.type == "cuda" else ExpertStreamer
            stay = [on_device.get(unit.module, 0) for unit in own]
            sizes: dict[str, Any] = {"cache": share, "on_device": stay, "count": slots}
            streamer = cls(device, own, **sizes, on_pages=is_cpu, prefetch=prefetch, name=name)
            if isinstance(streamer, GatherStreamer) and is_real_cuda(device):
                streamer.prepare()
        else:
            lane = PageLane(device) if is_cpu else None
            streamer = Streamer(device, own, lane, count=slots, prefetch=False, cache=0 if is_cpu else share, name=name)
        found.update(dict.fromkeys(own, streamer))
    return found


def streamers_in(model: nn.Module) -> list[Streamer]:
    """All that lend weights to a model, in the order of its modules."""
    hooks = (hook for module in model.modules() for hook in hooks_in(module) if isinstance(hook, AlignDevicesHook))
    return [*dict.fromkeys(hook.streamer for hook in hooks if hook.streamer is not None)]


def alone(dispatch: Dispatch) -> Dispatch:
    """Let a function change where a model rests while no other thread has any of its weights.

    Args:
        dispatch: its first argument is the model.
    """

    @functools.wraps(dispatch)
    def waits(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        streamers = streamers_in(model) if isinstance(model, nn.Module) else []
        with all_of(one.lock for one in streamers):
            return dispatch(model, *args, **kwargs)

    return waits  # type: ignore[return-value]
