"""What others do with a spread model as a whole: cast it, move it, and read where it is.

Leaves out: how a map is applied (`offload/dispatch.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..devices import Device
from .grouping import Layout


def refuse_to_move(*args: Any, **kwargs: Any) -> nn.Module:
    """What stands beneath `model.to`, `cuda`, `half`, ... where weights rest; Accelerate replaces each of these."""
    raise RuntimeError(
        "this model is spread over devices by its hf_device_map and cannot be moved or cast as a whole: call "
        "bigkit.remove_hook_from_module(model, recurse=True) first, or dispatch it again with another map"
    )


def cast_or_move(model: nn.Module, change: Callable[[Tensor], Tensor], **options: Any) -> nn.Module:
    """What stands there where all weights lie on the devices that they work on.

    Warns:
        UserWarning: the model was moved; its hooks still send inputs to where it was.
    """
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.device for tensor in tensors]
    type(model)._apply(model, change, **options)
    if before != [tensor.device for tensor in (*model.parameters(), *model.buffers())]:
        warnings.warn(
            "this model was moved, but its hooks still send inputs to the devices of its hf_device_map: call "
            "bigkit.remove_hook_from_module(model, recurse=True), or dispatch it again with another map",
            stacklevel=3,  # `model.to`, or what else the user has called
        )
    return model


class AwayMap(dict[str, Device]):
    """The map of a model of which all rests elsewhere. Its `values()` begin with the device that it works on.

    Pipelines of Transformers send inputs to the first of a map's values, and peft makes prefixes on its first GPU.

    >>> places = AwayMap({"": "disk"}, 0)
    >>> places, [*places.values()]
    ({'': 'disk'}, [0, 'disk'])
    """

    def __init__(self, places: dict[str, Device], main: Device) -> None:
        super().__init__(places)
        self.main = main

    def values(self) -> list[Device]:  # type: ignore[override]
        return [self.main, *super().values()]


def device_map_of(layout: Layout) -> dict[str, Device]:
    """What becomes a model's `hf_device_map`: modules that rest on disk come last."""
    places = dict(sorted(layout.places.items(), key=lambda item: item[1] == "disk"))
    return places if layout.main in places.values() or not places else AwayMap(places, layout.main)


def load_adapter(model: Any, device: torch.device, *args: Any, **kwargs: Any) -> Any:
    """What stands for `model.load_adapter` of Transformers, which would leave adapters unread whose layer is on disk.

    Args:
        model: the model.
        device: where weights work that rest in RAM or on disk.
    """
    places = model.hf_device_map
    model.hf_device_map = {name: device if place in ("cpu", "disk") else place for name, place in places.items()}
    try:
        return type(model).load_adapter(model, *args, **kwargs)
    finally:
        model.hf_device_map = places


def change_methods(model: nn.Module, layout: Layout, away: bool) -> None:
    """Put what stands for the methods above into a model; `give_back_methods` of `hooks.py` ends it.

    Args:
        model, layout: a model, and where it rests and works.
        away: whether some of it rests elsewhere.
    """
    vars(model)["_apply"] = refuse_to_move if away else partial(cast_or_move, model)
    if away and hasattr(type(model), "load_adapter"):
        vars(model)["load_adapter"] = partial(load_adapter, model, layout.device(layout.main))
