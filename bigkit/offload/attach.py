"""Which modules get a hook, and where the outputs of each go.

A hook stands around each unit that travels, each placed module, and the model. Where the model works on one device that
is all. Where it works on several, two kinds of code would let tensors of two devices meet:

- A placed module need not be what is called: layers of a Sequential are called one by one, an embedding by a method of
  the model around it. So everything within that holds tensors gets a hook too.
- A module whose parts are on several devices computes with what they return, and with tensors of its own (residuals,
  positions, biases of the output). It has one device, its *home*: inputs come there, and so do outputs of its parts.
  Those of blocks in a list stay where they are, since the next block takes them, and those within a Sequential.

Leaves out: what hooks do (`hooks.py`), and which weights travel together (`grouping.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..devices import join, prefixes
from ..meta.skeleton import own_tensors
from .copies import lend_copies
from .experts import ExpertsHook, ExpertStreamer
from .grouping import Layout, block_classes, has_forward
from .hooks import AlignDevicesHook, add_hook_to_module
from .on_cpu import Split, add_hooks
from .stream import Streamer
from .weights import Unit


def attach(
    model: nn.Module, layout: Layout, lenders: Mapping[Unit, Streamer], skip_keys: tuple[str, ...],
    splits: Sequence[Split] = (), threads: int | None = None,
) -> None:  # fmt: skip
    """Put hooks where a layout needs them; `splits` and `threads` are for MLPs that the CPU computes."""
    hooks: dict[nn.Module, AlignDevicesHook] = {}
    for unit, own in lenders.items():
        cls = ExpertsHook if isinstance(own, ExpertStreamer) else AlignDevicesHook
        hooks[unit.module] = cls.placed(own.device, skip_keys, own, unit)
    streamer = next(iter(lenders.values()), None)
    modules, several = dict(model.named_modules()), len(layout.works_on()) > 1
    for name in layout.parts:
        for module in _called(modules[name], iterated=True) if name in modules else ():
            if not several or any(map(own_tensors, module.modules())):  # else it works wherever its inputs are
                hooks.setdefault(module, AlignDevicesHook.placed(layout.device(layout.works(name)), skip_keys))
    if several:
        for name, module in modules.items():
            if has_forward(module) and (not layout.is_uniform(name) or own_tensors(module)):
                hooks.setdefault(module, AlignDevicesHook.placed(_home(layout, name, module), skip_keys))
        blocks = block_classes(model)
        for name, module in modules.items():
            if has_forward(module) and not layout.is_uniform(name) and not isinstance(module, nn.Sequential):
                for child in module.children():
                    for part in _called(child):
                        if part in hooks and (part is child or type(part).__name__ not in blocks):
                            hooks[part].output_device = hooks[module].execution_device
    add_hooks(hooks, splits, skip_keys, threads)
    first = streamer.device if streamer else layout.device(layout.works(next(iter(layout.places))))
    root = hooks.pop(model, None) or AlignDevicesHook.placed(first, skip_keys)
    root.io_same_device, root.streamer = True, root.streamer or streamer  # what lends the model's own weights, if any
    for own in lenders.values():
        own.model_id = id(model)
    for module, hook in (*hooks.items(), (model, root)):
        add_hook_to_module(module, hook, append=True)
    if several:
        lend_copies(model, layout)


def _called(module: nn.Module, iterated: bool = False) -> list[nn.Module]:
    """The module itself, or what is called in its place if it is a mere container.

    Args:
        iterated: a Sequential may be both: called, or iterated by the module around it.
    """
    own = [module] if has_forward(module) else []
    if own and not (iterated and isinstance(module, nn.Sequential)):
        return own
    return own + [inner for child in module.children() for inner in _called(child, iterated)]


def _home(layout: Layout, name: str, module: nn.Module) -> torch.device:
    """The device of what a module itself holds, or else of the first part of it."""
    own = [join(name, own) for own in own_tensors(module)]
    inside = (other for other in layout.parts if name in prefixes(other))
    return layout.device(layout.works(own[0] if own else next(inside, name)))
