"""A device map of the user's own, checked against the model and the budgets.

Leaves out: making one (`strategies.py`), and maps without budgets (`device_map.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ..devices import Device, join, placement, prefixes, read_device
from ..model.spec import Layer, ModelSpec, ModuleSpec
from ..units import listed
from .experts import apart
from .task import Task


def warn_of_strangers(model: ModelSpec, given: str, names: Iterable[str]) -> list[str]:
    """The names that no module or tensor of the model has; they are warned of, as what is `given`."""
    known = {name for name, _ in model.root.walk()} | model.tensors.keys() if names else ()
    strangers = [name for name in names if name not in known]
    if strangers:
        warnings.warn(f"{given} names {listed(strangers)}, but {model.name} has no such module", stacklevel=5)
    return strangers


def read_map(task: Task, device_map: Mapping[str, Device]) -> tuple[Task, list[Device], list[Device]]:
    """The task cut as finely as a map of the user's own asks for, the device of each of its layers, and the runners
    that the map names: on these works what rests elsewhere.

    Of entries inside each other the innermost counts; a name that is not in the model is warned of.

    Raises:
        ValueError: the map misses layers, or names a device without a budget.
    """
    devices = {name: read_device(device) for name, device in device_map.items()}
    strangers = warn_of_strangers(task.model, "the device map", devices)
    devices = {name: device for name, device in devices.items() if name not in strangers}
    if without := sorted({str(device) for device in devices.values() if device not in task.budgets}):
        raise ValueError(f"the device map uses {listed(without)}, but max_memory gives no budget for it")
    around = {prefix for name in devices for prefix in prefixes(name)[:-1]}
    if around & set(task.index):
        finer = apart(task)
        inside = {name for name in devices if not set(task.index).isdisjoint(prefixes(name)[:-1])}
        if finer is not None and inside <= {finer.layers[i].name for i in finer.around}:
            task = finer
        else:
            pieces = (_by_tensor(layer) if layer.name in around else [layer] for layer in task.model.layers(()))
            layers = tuple(piece for several in pieces for piece in several)
            task = replace(task, layers=layers, options={**task.options, "no_split": []})
    device_of = placement(devices)
    places = [device_of(layer.name) for layer in task.layers]
    if missing := [layer.name for layer, place in zip(task.layers, places) if place is None]:
        raise ValueError(f"the device map gives no device for {listed(missing)}")
    return task, places, [runner for runner in task.runners if runner in places]


def _by_tensor(layer: Layer) -> list[Layer]:
    """A layer without children in pieces of one tensor each."""
    pieces = []
    for own, tensor in layer.spec.tensors.items():
        name, cls = join(layer.name, own), "Buffer" if tensor.buffer else "Parameter"
        ties = tuple(tie for tie in layer.ties if tie[0] == name)
        pieces.append(Layer(name, cls, ModuleSpec(cls, {"": tensor}), ties))
    return pieces
