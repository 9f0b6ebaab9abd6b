"""From a device map to groups: which weights of a model rest where, and which of them travel together.

Where a module runs on the device on which its weights rest, they stay. Else they travel with a group: the block around
them, or the largest module that is no larger than a block, or for what a module with many blocks holds itself, that
alone (a *loose* group).

Leaves out: moving the weights there (`offload/placing.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..devices import Device, collapse, join, placement, prefixes
from ..maps.links import take_turns
from ..maps.partition import spread
from ..meta.held import Held, held_in
from ..meta.skeleton import own_tensors, repeated_blocks, spec_from_module
from ..model.experts import experts_of
from ._torch import is_real_cuda
from .codec import codec_of
from .handle import Away
from .inputs import torch_device


@dataclass
class Layout:
    """A device map, and what it says about every module and tensor.

    Args:
        places: name of a module or tensor -> where its weights rest.
        main: where weights that rest in RAM or on disk work, if nothing else is said.
        stand_in: place -> PyTorch's device that stands in for it.
        others: further devices where they work in turn.
        turns: name of a module that travels -> the device where it works.
    """

    places: dict[str, Device]
    main: Device
    stand_in: Mapping[Device, torch.device] = field(default_factory=dict)
    others: tuple[Device, ...] = ()
    turns: Mapping[str, Device] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rests = placement(self.places)  # name -> where it rests
        self.parts = list(dict.fromkeys([*self.places, *self.turns]))  # names of which something is known
        self._cut = {prefix for name in self.parts for prefix in prefixes(name)[:-1]}

    def works(self, name: str) -> Device:
        """Where a module or tensor works: where it rests, or else where what it is in works."""
        around = [self.rests(name), *(self.places.get(prefix, "cpu") for prefix in reversed(prefixes(name)))]
        turn = next((self.turns[prefix] for prefix in reversed(prefixes(name)) if prefix in self.turns), self.main)
        return next((device for device in around if device not in ("cpu", "disk")), turn)

    def works_on(self) -> set[Device]:
        """All places where something works."""
        return {*map(self.works, self.parts)}

    def is_away(self, name: str) -> bool:
        """Whether it rests elsewhere than where it works."""
        return self.works(name) != self.rests(name)

    def is_uniform(self, name: str) -> bool:
        """Whether all in a module rests in one place."""
        return name not in self._cut

    def device(self, place: Device) -> torch.device:
        """PyTorch's device for a place."""
        return self.stand_in.get(place) or torch_device(place)

    @property
    def pins(self) -> bool:
        """Whether RAM should be pinned, for a GPU that reads it."""
        return is_real_cuda(self.device(self.main))


def check_layers(model: nn.Module, layout: Layout) -> None:
    """Raise ValueError if the tensors of one layer are to work on two devices."""
    if len(layout.works_on()) == 1:
        return
    for prefix, module in model.named_modules():
        names = [join(prefix, own) for own in own_tensors(module)]
        works = {layout.device(layout.works(name)): name for name in names if not module._modules}
        if len(works) > 1:
            (one, first), (other, second), *_ = works.items()
            raise ValueError(
                f"{first!r} is to work on {one} and {second!r} on {other}, but {prefix!r}, a {type(module).__name__}, "
                f"computes with both: give {prefix!r} one place in the device map"
            )


def records(model: nn.Module) -> list[Held]:
    """All parameters and buffers, tied ones together, each place under one name: a module may be reached by two."""
    held = held_in(model)
    seen: set[tuple[int, str]] = set()
    for one in held:
        if isinstance(one.tensor, Away):
            one.away, one.tensor = one.tensor.weight, one.tensor.weight.template
        for name, (module, own, _) in [*one.places.items()]:
            if (id(module), own) in seen:
                del one.places[name]
            seen.add((id(module), own))
    return held


def experts_in(model: nn.Module) -> set[int]:
    """Ids of the modules that hold experts which a router chooses: all of a block's, or each alone in a ModuleList."""
    names = [experts.name for experts in experts_of(spec_from_module(model))]
    modules = [model.get_submodule(name) for name in names]
    alone = [child for module in modules if not has_forward(module) for child in module.children()]
    return {id(module) for module in (*modules, *alone) if has_forward(module)}


def has_forward(module: nn.Module) -> bool:
    """Whether calling the module runs something: a ModuleList is never called."""
    return getattr(type(module), "forward", None) is not nn.Module.forward


def block_classes(model: nn.Module) -> set[str]:
    """Classes of a model's blocks: those that it, or a part of it, names as not to be split; other repeated ones."""
    named = {cls for part in model.modules() for cls in getattr(part, "_no_split_modules", None) or ()}
    return named | repeated_blocks(model, named)


# ---------------------------------------------------------------------------------------------------------------------
# What travels together


@dataclass(eq=False)
class Group:
    """A module whose weights travel together.

    Args:
        name: the module's.
        module: all in it travels, or
        loose: only what it and its children without a forward hold themselves.
        routed: it is experts of a mixture, which a router chooses; the block around it is another group.
    """

    name: str
    module: nn.Module
    loose: bool = False
    routed: bool = False


class Cut:
    """The offloaded part of a model, cut into groups.

    Args:
        model: the model.
        layout: where it rests.
        whole_classes: classes whose modules always are one group (`preload_module_classes`).
        apart: whether experts of a mixture are groups of their own, not part of their block's.

    Attributes:
        groups: in the model's order.
        group_of: id of a module that holds tensors itself -> the group of these.
    """

    def __init__(self, model: nn.Module, layout: Layout, whole_classes: Iterable[str] = (), apart: bool = True) -> None:
        self.layout = layout
        self._experts = experts_in(model) if apart else set()
        self._whole = {*whole_classes}
        self.groups: list[Group] = []
        self.group_of: dict[int, Group] = {}
        self._blocks = {*whole_classes, *block_classes(model)}
        blocks = [module for module in model.modules() if self._is_block(module)]
        self._most = max(map(_nbytes, blocks), default=0) or max(_nbytes(m, recurse=False) for m in model.modules())
        self._walk("", model, ("", model))

    def _walk(self, name: str, module: nn.Module, caller: tuple[str, nn.Module]) -> None:
        """Group a module and all in it; `caller` is the innermost module around it, or itself, that is called."""
        if id(module) in self.group_of:
            return
        if has_forward(module):
            caller = (name, module)
            if self._travels_whole(name, module):
                self._group(name, module)
                return
        if any(self.layout.is_away(join(name, own)) for own in own_tensors(module)):
            self.group_of[id(module)] = self._loose_group(*caller)
        for own, child in module._modules.items():
            if child is not None:
                self._walk(join(name, own), child, caller)

    def _group(self, name: str, module: nn.Module) -> None:
        """Make a module a group, and the experts in it groups of their own."""
        inside = [] if type(module).__name__ in self._whole else [*module.named_modules(prefix=name)]
        experts = [(full, part) for full, part in inside if id(part) in self._experts and part is not module]
        outer = Group(name, module, routed=id(module) in self._experts)
        groups = [outer, *(Group(full, part, routed=True) for full, part in experts)]
        self.groups += groups
        for group in reversed(groups):
            for part in group.module.modules():
                self.group_of.setdefault(id(part), group)

    def _travels_whole(self, name: str, module: nn.Module) -> bool:
        if not self.layout.is_away(name) or not self.layout.is_uniform(name):
            return False
        if self._is_block(module) or not any(module.children()):
            return True
        return _nbytes(module) <= self._most and not any(map(self._is_block, module.modules()))

    def _loose_group(self, name: str, module: nn.Module) -> Group:
        group = next((group for group in self.groups if group.loose and group.module is module), None)
        if group is None:
            group = Group(name, module, loose=True)
            self.groups.append(group)
        return group

    def _is_block(self, module: nn.Module) -> bool:
        return type(module).__name__ in self._blocks


def _nbytes(module: nn.Module, recurse: bool = True) -> int:
    return sum(codec_of(tensor).nbytes(tensor) for tensor in module.parameters(recurse))


def with_residents(model: nn.Module, layout: Layout, whole_classes: Iterable[str], budget: int) -> Layout:
    """The layout with as many groups as a budget allows at rest where they work, spread evenly along the model.

    Args:
        budget: bytes of the main devices for them.
    """
    groups = [group for group in Cut(model, layout, whole_classes, apart=False).groups if not group.loose]
    resident = _turns(layout, [groups[i] for i in sorted(spread([_nbytes(group.module) for group in groups], budget))])
    finer: dict[str, Device] = {}
    for prefix, module in model.named_modules():
        for own in own_tensors(module) or ([] if module._modules else [""]):  # the map names what holds nothing too
            name = join(prefix, own)
            group = next((outer for outer in prefixes(name) if outer in resident), None)
            finer[group or name] = layout.rests(name) if group is None else resident[group]
    return replace(layout, places=collapse(finer))


def in_turn(
    model: nn.Module, layout: Layout, whole_classes: Iterable[str], planned: Mapping[str, Device] | None = None
) -> Layout:
    """The layout with the device of each group that travels, where there are several (the rule of `maps/links.py`).

    Args:
        planned: name of a layer -> where it works, as a plan says; None takes turns of links of one speed.
    """
    if not layout.others:
        return layout
    groups = [group for group in Cut(model, layout, whole_classes, apart=False).groups if not group.loose]
    works = _turns(layout, groups)
    for name, device in reversed([*(planned or {}).items()]):  # of what travels together, the first layer counts
        works |= {outer: device for outer in prefixes(name) if outer in works}
    return replace(layout, turns=works)


def _turns(layout: Layout, groups: list[Group]) -> dict[str, Device]:
    """Name of each group -> the device where it works, or would work."""
    devices, works = [layout.main, *layout.others], {group.name: layout.works(group.name) for group in groups}
    free = [group for group in groups if set(map(layout.places.get, prefixes(group.name))) <= {None, "cpu", "disk"}]
    turns = take_turns([_nbytes(group.module) for group in free], [1.0] * len(devices))
    return works | {group.name: devices[turn] for group, turn in zip(free, turns)}
