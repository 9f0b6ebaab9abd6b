"""What modules do in `load_state_dict`: hooks that fuse or rename tensors, names and defaults of older versions.

A module may change a state dict before its tensors are taken from it. Here it gets tensors on meta with the names and
shapes of the checkpoint, from the whole model down to its parts; what it renames, replaces or adds is noted in the
checkpoint, and done to real tensors when they are read.

Leaves out: hooks that run after loading, and extra state (`load.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..meta.skeleton import parts_that
from ._torch import load_own_way, loads_its_own_way
from ._transformers import Made
from .format import Checkpoint


def migrate(model: nn.Module, source: Checkpoint) -> None:
    """Note in a checkpoint what the modules of a model make of its names and tensors."""
    modules = parts_that(model, loads_its_own_way)
    state: dict[str, Tensor] = {}
    for name in source if modules else ():
        shape, dtype = source.shape_and_dtype(name)
        state[name] = torch.empty(shape, dtype=dtype, device="meta")
    for name, module in modules:
        prefix = name and name + "."
        before = {own: tensor for own, tensor in state.items() if own.startswith(prefix)}
        if not before:  # nor has a default a place where the file has nothing
            continue
        run = partial(load_own_way, module, prefix, source.metadata.get(name, {}))
        try:
            after = run(before)
        except Exception:  # a hook that looks at values
            before = {own: source.read(own) for own in before}
            after = run(before)
        _note(source, before, after, run)
        state = {own: tensor for own, tensor in state.items() if own not in before} | after


def _note(source: Checkpoint, before: Mapping[str, Tensor], after: Mapping[str, Tensor], run: Any) -> None:
    """Give tensors of a checkpoint new names, and note which are made of others."""
    gone = {own: source.set_aside(own) for own, tensor in before.items() if after.get(own) is not tensor}
    names = {id(tensor): own for own, tensor in before.items() if own in gone}
    made = [own for own, tensor in after.items() if before.get(own) is not tensor]
    for own in [own for own in made if id(after[own]) in names]:
        source.rename(gone.pop(names[id(after[own])]), own)
        made.remove(own)
    meta = {own: tensor.to("meta") for own, tensor in before.items()}

    def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return run(meta | {own: tensors[aside] for own, aside in gone.items()})

    for own in made:
        source.made[own] = Made(own, tuple(after[own].shape), after[own].dtype, (*gone.values(),), convert)
