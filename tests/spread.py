"""Small models, ways to spread them, and the comparison that every test of running them rests on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bigkit import init_empty_weights, save_model
from bigkit.meta.skeleton import own_tensors
from bigkit.offload.dispatch import dispatch_model
from bigkit.offload.handle import Away
from bigkit.offload.one_place import cpu_offload, disk_offload
from tests import forked

STAND_IN = {0: "cpu", 1: "cpu"}  # GPUs that are the CPU, but with slots


def handles(model: nn.Module) -> list[Away]:
    """Every handle that stands in a model."""
    own = [tensor for module in model.modules() for tensor, _ in own_tensors(module).values()]
    return [tensor for tensor in own if isinstance(tensor, Away)]


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a = nn.Linear(width, width)
        self.b = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(F.relu(self.a(x)))


class Net(nn.Module):
    """Blocks, a parameter of the root's own, and a head."""

    def __init__(self, depth: int = 4, width: int = 8) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))
        self.h = nn.ModuleList(Block(width) for _ in range(depth))
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.h:
            x = block(x)
        return self.out(x) * self.scale


class Tied(nn.Module):
    """A head with the weight of the embedding."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.mid, self.head = nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mid(self.embed(ids)))


def _disk(folder: Path) -> Callable[[nn.Module], nn.Module]:
    return lambda model: disk_offload(model, folder, 0, stand_in=STAND_IN)


WAYS: dict[str, Callable[[Path], Callable[[nn.Module], nn.Module]]] = {
    "RAM, slots": lambda folder: lambda model: cpu_offload(model, 0, stand_in=STAND_IN),
    "RAM, many slots": lambda folder: lambda model: cpu_offload(model, 0, stand_in=STAND_IN, slots=9),
    "RAM, no prefetch": lambda folder: lambda model: cpu_offload(model, 0, stand_in=STAND_IN, slots=1, prefetch=False),
    "disk, slots": _disk,
    "disk, cached": lambda folder: lambda model: disk_offload(model, folder, 0, stand_in=STAND_IN, ram_cache="1MiB"),
    "disk, mapped": lambda folder: lambda model: disk_offload(model, folder),
}


def spread_ways(model: nn.Module, folder: Path) -> Iterator[tuple[str, nn.Module]]:
    """Copies of a model, each spread in another way."""
    for name, way in WAYS.items():
        yield name, way(folder)(copy.deepcopy(model))


def same(one: Any, other: Any) -> bool:
    """Whether two outputs are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def check_at_rest(model: nn.Module) -> None:
    """Every weight that was sent away is away, nothing is lent, and each slot knows what it holds."""
    if torch.cuda.is_initialized():  # the first block's weights may be on their way
        torch.cuda.synchronize()
    for streamer in {id(handle.streamer): handle.streamer for handle in handles(model)}.values():
        assert not streamer._loans
        for site in streamer.sites:
            for entry in site.entries:
                assert isinstance(entry.tensors[entry.own], Away), entry.weight.name
        assert not any(slot.lent for slot in streamer.slots)
        assert {slot.unit.index: slot for slot in streamer.slots if slot.unit is not None} == streamer.holder
        for i, slot in streamer.holder.items():
            for weight in () if streamer.maps else streamer.units[i].weights:
                assert torch.equal(weight.over(slot.base).cpu(), weight.load()), weight.name
        assert not streamer.held()


def spread(model: nn.Module, device_map: dict[str, Any], **options: Any) -> nn.Module:
    return dispatch_model(model, device_map, stand_in=STAND_IN, **options)


_MEMORY = """
import sys, torch
from torch import nn
from bigkit import init_empty_weights, load_checkpoint_and_dispatch, save_model
def status(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) / 1024
for options in ({}, {"main_device": 0, "stand_in": {0: "cpu"}}):  # mapped pages, slots
    with init_empty_weights():
        model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(48)])
    model = load_checkpoint_and_dispatch(model, sys.argv[1], {"": "disk"}, **options)
    open("/proc/self/clear_refs", "w").write("5")
    start = status("VmRSS")
    WORK
    print(status("VmHWM") - start)
"""


def memory_beside_disk(folder: Path, work: str) -> float:
    """The most MB that a process takes for some work with `model`, which is 200 MB that rest on disk."""
    with init_empty_weights():
        large = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(48)])
    save_model(large.to_empty(device="cpu"), folder, "50MB")
    done = forked.run(_MEMORY.replace("WORK", work), folder)
    assert not done.returncode, done.stderr
    return max(map(float, done.stdout.split()))
