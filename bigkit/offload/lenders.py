"""Who lends each unit of a model: a streamer for each device, and for each kind of unit there.

Leaves out: what a streamer does (`stream.py`, `experts.py`), and which unit works where (`grouping.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import psutil
from torch import nn

from ..units import parse_bytes
from .experts import streamers_of
from .grouping import Layout
from .hooks import AlignDevicesHook, hooks_in
from .inputs import torch_device
from .mapped import PageLane
from .on_cpu import Split, cpu_streamer
from .stream import Streamer
from .weights import Unit


def lenders_of(
    layout: Layout,
    units: Sequence[Unit],
    splits: Sequence[Split],
    slots: int,
    prefetch: bool,
    ram_cache: int | str | None,
    on_device: Mapping[nn.Module, int],
) -> dict[Unit, Streamer]:
    """The streamer of each unit.

    Args:
        layout: where they rest and work.
        units: all of a model.
        splits: those of them whose MLPs the CPU computes for few tokens.
        slots, prefetch, ram_cache: see `dispatch_model`.
        on_device: see `rows_on_devices`.
    """
    half = psutil.virtual_memory().available // 2
    cache = half if ram_cache is None else parse_bytes(ram_cache)
    lenders = streamers_of(layout, units, slots, prefetch, cache, on_device)
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


def streamers_in(model: nn.Module) -> list[Streamer]:
    """All that lend weights to a model, in the order of its modules."""
    hooks = (hook for module in model.modules() for hook in hooks_in(module) if isinstance(hook, AlignDevicesHook))
    return [*dict.fromkeys(hook.streamer for hook in hooks if hook.streamer is not None)]
