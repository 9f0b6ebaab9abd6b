"""A backward through weights that were only lent to the forward is an error that names them; so is a trace of it.

By the time of a backward the slot holds another block, so a gradient computed with it would be wrong. Two things can
reach a lent weight: what an operation has saved for its backward, and the weight's own gradient.

Leaves out: training what stays on a GPU beside offloaded weights; that works, and needs nothing from here.
"""

from __future__ import annotations

import atexit
from functools import cache, partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ._torch import pop_saved_tensors_hooks, storage_id

_NO_TRAINING = (
    "backward reached {!r}, whose weights rest elsewhere and are here only during the forward: offloaded weights are "
    "for inference. Place what is to be trained, and all that comes after it, on a GPU, or run under torch.no_grad()"
)


class _LentTo(NamedTuple):
    """What autograd keeps in place of a lent weight."""

    unit: str


def enter_guard(streamer: Any, unit: str, storages: frozenset[int]) -> torch.autograd.graph.saved_tensors_hooks:
    """Watch what autograd saves from now on; the caller exits the context that is returned.

    Args:
        streamer: who lends; see `end_guards`.
        unit: the unit's name.
        storages: `storage_id` of the memory that is lent.
    """

    def pack(tensor: Tensor) -> Tensor | _LentTo:
        # Detached: a node of the graph that saved its own output would keep itself alive.
        return _LentTo(unit) if storage_id(tensor) in storages else tensor.detach()

    pack.streamer = streamer  # type: ignore[attr-defined]
    guard = torch.autograd.graph.saved_tensors_hooks(pack, _unpack)
    try:
        guard.__enter__()
    except RuntimeError as error:  # `torch.func.grad` and its kin allow no such hooks
        raise RuntimeError(_NO_TRAINING.format(unit)) from error
    return guard


def _unpack(saved: Tensor | _LentTo) -> Tensor:
    if isinstance(saved, _LentTo):
        _refuse(saved.unit)
    return saved


def _refuse(name: str) -> NoReturn:
    _end_well()
    raise RuntimeError(_NO_TRAINING.format(name))


@cache
def _end_well() -> None:
    """Let another backward, at exit, take from autograd's queue what one that was refused has left there.

    It would be let go after Python, whose lock its hooks need, and the process would crash (PyTorch 2.11).
    """

    def backward() -> None:
        with torch.inference_mode(False), torch.enable_grad():
            torch.ones((), requires_grad=True).mul(1).backward()

    atexit.register(backward)


def refuse_trace(unit: str) -> NoReturn:
    """Refuse to be traced or exported: slots would become constants of the graph."""
    raise RuntimeError(
        f"the weights of {unit or 'this model'!r} rest elsewhere, so it cannot be traced or exported: call "
        "remove_hook_from_module(model, recurse=True) first"
    )


HOOK_NAMES = ("forward", "_hf_hook", "_old_forward")  # what hooks put into a module


class HookedForward(partial[Any]):
    """The forward of a module with hooks, which are Python that `torch.jit.script` cannot compile."""

    @property
    def __globals__(self) -> NoReturn:
        """Asked for by `torch.jit.script` alone."""
        raise AttributeError(
            "this module has hooks, as dispatch_model puts them, and cannot be scripted: call "
            "remove_hook_from_module(model, recurse=True) first, or use torch.jit.trace if no weight rests elsewhere"
        )


def end_guards(streamer: Any) -> None:
    """Exit the guards of a streamer that an interrupt left behind."""
    pop_saved_tensors_hooks(lambda pack: getattr(pack, "streamer", None) is streamer)


def guarded(tensor: Tensor, weight: Any) -> Tensor:
    """A tensor that is lent for a weight: no gradient can be computed where the weight asks for one."""
    if weight.template.requires_grad and torch.is_grad_enabled():
        refuse_gradient(tensor.requires_grad_(True), weight.name)
    return tensor


def refuse_gradient(tensor: Tensor, name: str) -> None:
    """Refuse the gradient of a weight that is lent, if it asks for one."""
    if tensor.requires_grad:
        tensor.register_hook(lambda gradient: _refuse(name))
