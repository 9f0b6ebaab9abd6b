"""Hooks: code that runs before and after a module's forward, with the names that Accelerate gave them.

    add_hook_to_module(module, hook)     from now on: hook.pre_forward, the module's own forward, hook.post_forward
    remove_hook_from_module(module)      as it was before

`AlignDevicesHook` is the one that makes a spread-out model run: it moves a module's inputs to the device that the
module works on and, if the module's weights rest elsewhere, borrows them for the time of the forward
(`offload/stream.py`).

Why not `Module.register_forward_hook(always_call=True)`: PyTorch calls such a hook after an `Exception` alone. An
interrupted forward (Ctrl-C raises `KeyboardInterrupt`, which is a `BaseException`) would keep its weights, and their
lock. And it is not called where code calls `module.forward` itself. So a hook here stands around `forward`, and
whatever is raised there is told to every hook that had begun. Forward hooks that users register run outside of it.

Under `torch.compile` a hook is a place where the graph breaks: what is inside the module is compiled, the hook is not.

Leaves out: moving inputs (`offload/inputs.py`), and which modules get which hook (`offload/dispatch.py`).
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Container, Iterable, Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ._torch import never_compiled
from .handle import refuse_copy
from .inference_only import HookedForward
from .inputs import find_device, send_to_device, torch_device
from .locks import all_of
from .placing import stream_alone
from .sites import settle_rest
from .stream import Streamer
from .weights import Unit


class ModelHook:
    """Code around a module's forward. Inherit from it and override what you need.

    Hooks that inherit from Accelerate's class work too; they have no `on_error` and are not told of errors.
    Accelerate's own functions take bigkit's hooks away as `remove_hook_from_module` does.

    Attributes:
        no_grad: run the forward under `torch.no_grad()`.

    >>> class Double(ModelHook):
    ...     def post_forward(self, module, output):
    ...         return 2 * output
    >>> layer = add_hook_to_module(nn.Identity(), Double())
    >>> layer(torch.ones(2))
    tensor([2., 2.])
    """

    no_grad = False

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Called when the hook is added; returns the module that gets it."""
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Called before each forward; returns the arguments that the forward is to have."""
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Called after each forward that did not fail; returns the output that the caller is to have."""
        return output

    def on_error(self, module: nn.Module) -> None:
        """Called when anything was raised, Ctrl-C included, from the start of `pre_forward` to `post_forward`'s end."""

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Called when the hook is removed; returns the module."""
        return module


class SequentialHook(ModelHook):
    """Several hooks as one; each method calls theirs in order. Each is told of errors for itself.

    >>> hook = SequentialHook(ModelHook(), ModelHook())
    >>> hook.post_forward(nn.Identity(), 1)
    1
    """

    def __init__(self, *hooks: ModelHook) -> None:
        self.hooks = hooks
        self.no_grad = any(getattr(hook, "no_grad", False) for hook in hooks)

    def init_hook(self, module: nn.Module) -> nn.Module:
        for hook in self.hooks:
            module = hook.init_hook(module)
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        begun = this_thread.begun
        for hook in self.hooks:
            args, kwargs = _begin(begun, hook, module, args, kwargs)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        begun = this_thread.begun
        for hook in self.hooks:
            output = _end(begun, hook, module, output)
        return output

    def detach_hook(self, module: nn.Module) -> nn.Module:
        for hook in self.hooks:
            module = hook.detach_hook(module)
        return module


# ---------------------------------------------------------------------------------------------------------------------
# Adding and removing


def add_hook_to_module(module: nn.Module, hook: ModelHook, append: bool = False) -> nn.Module:
    """Put a hook around a module's forward.

    Args:
        module: any module.
        hook: the hook; it is kept as `module._hf_hook`.
        append: keep the hook that is there, and run this one after it (`SequentialHook`). Else it is replaced.

    Returns:
        The module.

    >>> layer = add_hook_to_module(nn.Linear(2, 2), ModelHook())
    >>> type(layer._hf_hook).__name__, tuple(layer(torch.ones(1, 2)).shape)
    ('ModelHook', (1, 2))
    """
    before = _own_hooks(module) if append else []
    if not append:
        remove_hook_from_module(module)
    module = hook.init_hook(module)
    _wrap(module, [*before, hook])
    return module


def remove_hook_from_module(module: nn.Module, recurse: bool = False) -> nn.Module:
    """Take a module's hook away; nothing happens if it has none.

    Args:
        module: any module.
        recurse: take away those of all modules in it too.

    Returns:
        The module; weights that were elsewhere are in RAM.

    >>> layer = add_hook_to_module(nn.Linear(2, 2), ModelHook())
    >>> "forward" in vars(remove_hook_from_module(layer))
    False
    """
    for part in [*module.modules()] if recurse else [module]:
        if (hook := vars(part).get("_hf_hook")) is not None:
            with all_of([one.lock for own in hooks_in(part) if (one := vars(own).get("streamer"))]):
                hook.detach_hook(part)
                _unwrap(part)
    if recurse:
        settle_rest(module)
    give_back_methods(module)
    return module


def give_back_methods(module: nn.Module) -> None:
    """Let a module move, and load adapters, by its own methods; `dispatch_model` had put others in their place."""
    for name in ("_apply", "load_adapter"):
        vars(module).pop(name, None)


def hooks_in(module: nn.Module) -> Iterator[ModelHook]:
    """All hooks of a module, those within a `SequentialHook` one by one."""
    waiting = _own_hooks(module)
    while waiting:
        hook = waiting.pop(0)
        if isinstance(hook, SequentialHook):
            waiting = [*hook.hooks, *waiting]
        else:
            yield hook


def drop_hooks(module: nn.Module, unwanted: Container[ModelHook]) -> None:
    """Take some of a module's hooks away, without calling them, and leave the others."""
    hooks = _own_hooks(module)
    kept = [hook for hook in hooks if hook not in unwanted]
    if len(kept) < len(hooks):
        _wrap(module, kept)


def _own_hooks(module: nn.Module) -> list[ModelHook]:
    """The hooks of a module as they were added; `_wrap` has put several into a `SequentialHook`."""
    hook: ModelHook | None = vars(module).get("_hf_hook")
    return [*hook.hooks] if type(hook) is SequentialHook else [] if hook is None else [hook]


def _wrap(module: nn.Module, hooks: list[ModelHook]) -> None:
    """Put hooks around a module's forward in place of those that are there."""
    if "_hf_hook" in vars(module):
        _unwrap(module)
    if not hooks:
        return
    own_forward = vars(module).get("forward")
    whole = hooks[0] if len(hooks) == 1 else SequentialHook(*hooks)
    wrapped = HookedForward(_run, whole, module, own_forward)
    functools.update_wrapper(wrapped, module.forward)
    # Names that Accelerate's users look for; its own functions put `_old_forward` back.
    vars(module).update(_hf_hook=whole, _old_forward=module.forward)
    module.forward = wrapped


def _unwrap(module: nn.Module) -> None:
    own = vars(module)
    is_plain = getattr(own["_old_forward"], "__func__", None) is type(module).forward
    own.pop("forward", None) if is_plain else own.update(forward=own["_old_forward"])
    del module._hf_hook, module._old_forward  # in this order: after an interrupt all is done again


# ---------------------------------------------------------------------------------------------------------------------
# One forward


class _Thread(threading.local):
    """The innermost forward that this thread is in: its module, the hooks that have begun, what each has to undo."""

    def __init__(self) -> None:
        self.module: nn.Module | None = None
        self.begun: dict[ModelHook, _Undo | None] = {}


this_thread = _Thread()


@functools.partial(never_compiled, with_callees=False)
def _run(hook: ModelHook, module: nn.Module, own_forward: Any, /, *args: Any, **kwargs: Any) -> Any:
    """A module's forward with a hook around it."""
    # The class's own forward is looked up at each call, so that a copied module never runs the original's.
    forward = own_forward or MethodType(type(module).forward, module)
    if type(hook) is AlignDevicesHook and hook.unit is None and not (hook.io_same_device or hook.no_grad):
        # It moves inputs and outputs, and has nothing to undo, whatever is raised.
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
        return hook.post_forward(module, forward(*args, **kwargs))
    outer, around = this_thread.begun, this_thread.module
    begun: dict[ModelHook, _Undo | None] = {}
    try:
        this_thread.begun, this_thread.module = begun, module
        args, kwargs = _begin(begun, hook, module, args, kwargs)
        if getattr(hook, "no_grad", False):
            with torch.no_grad():
                output = forward(*args, **kwargs)
        else:
            output = forward(*args, **kwargs)
        this_thread.begun, this_thread.module = begun, module  # an interrupt within may have left others
        return _end(begun, hook, module, output)
    except BaseException:
        this_thread.begun = begun
        _fail([*begun], module)
        raise
    finally:
        this_thread.begun, this_thread.module = outer, around


@never_compiled
def _begin(begun: dict[ModelHook, Any], hook: ModelHook, module: nn.Module, args: Any, kwargs: Any) -> Any:
    begun[hook] = None
    return hook.pre_forward(module, *args, **kwargs)


@never_compiled
def _end(begun: dict[ModelHook, Any], hook: ModelHook, module: nn.Module, output: Any) -> Any:
    output = hook.post_forward(module, output)
    begun.pop(hook, None)
    return output


@never_compiled
def _fail(hooks: list[ModelHook], module: nn.Module) -> None:
    """Tell all hooks of an error, also if telling one raises another."""
    if hooks:
        try:
            if hasattr(hooks[0], "on_error"):  # Accelerate's hooks have none
                hooks[0].on_error(module)
        finally:
            _fail(hooks[1:], module)


# ---------------------------------------------------------------------------------------------------------------------
# The hook of a spread-out model


class _Undo:
    """What an `AlignDevicesHook` has to undo after one forward."""

    __slots__ = ("outermost", "input_device", "lent")

    def __init__(self, outermost: bool) -> None:
        self.outermost = outermost  # of the forwards in which something is lent to this thread
        self.input_device: torch.device | None = None
        self.lent = False


class AlignDevicesHook(ModelHook):
    """Runs a module on one device, wherever its inputs come from and its weights rest.

    Whatever is raised in a forward, at any point (by the handler of a signal, too), gives its weights back. Where code
    calls `pre_forward` without the forward, nothing is lent, and each operation brings the weights it needs.

    Args:
        execution_device: where inputs go before the forward; None leaves them.
        offload: send the module's weights away, and bring them for the time of each forward.
        io_same_device: send the output to the device of the input.
        weights_map: name -> tensor, for weights that the module has on meta.
        offload_buffers: send persistent buffers away too.
        place_submodules: the hook is for the modules within too, not for what the module itself holds alone.
        skip_keys: keyword arguments (and keys of an output) that stay where they are.
        tied_params_map: accepted for compatibility.

    Raises:
        ValueError: when it is added with `offload=True` and without `execution_device`.

    >>> layer = add_hook_to_module(nn.Linear(2, 2), AlignDevicesHook("cpu", offload=True))
    >>> layer.weight
    <weight: 2 x 2 torch.float32, rests in RAM, works on cpu>
    >>> layer(torch.ones(1, 2)).shape
    torch.Size([1, 2])
    """

    def __init__(
        self, execution_device: torch.device | str | int | None = None, offload: bool = False,
        io_same_device: bool = False, weights_map: Mapping[str, Tensor] | None = None, offload_buffers: bool = False,
        place_submodules: bool = False, skip_keys: str | Iterable[str] | None = None, tied_params_map: Any = None,
    ) -> None:  # fmt: skip
        self.execution_device = None if execution_device is None else torch_device(execution_device)
        self.offload, self.io_same_device, self.weights_map = offload, io_same_device, weights_map
        self.offload_buffers, self.place_submodules = offload_buffers, place_submodules
        self.skip_keys = (skip_keys,) if isinstance(skip_keys, str) else tuple(skip_keys or ())
        self.streamer: Streamer | None = None
        self.unit: Unit | None = None
        self.is_placed = False
        self.output_device: torch.device | None = None  # where outputs go, of a part of a module on several devices

    @classmethod
    def placed(
        cls, device: torch.device, skip_keys: Iterable[str], streamer: Streamer | None = None, unit: Unit | None = None
    ) -> AlignDevicesHook:
        """A hook for a module whose weights are where they belong: on the device, or sent away by a streamer."""
        hook = cls(device, skip_keys=skip_keys)
        hook.streamer, hook.unit, hook.is_placed = streamer, unit, True
        return hook

    def __deepcopy__(self, memo: dict[int, Any]) -> AlignDevicesHook:
        """The hook of a part that is copied alone: that has its weights with it, on the device that they work on."""
        if self.streamer is not None and (self.unit is None or self.streamer.model_id in memo):
            refuse_copy("this model")
        copied = copy.copy(self)
        copied.streamer = copied.unit = None
        return copied

    def retire(self) -> None:
        """Do nothing from now on: the model is dispatched anew. Users may hold the hook within one of their own."""
        if self.streamer is not None:
            if self.unit is not None:
                self.streamer.sites[self.unit.index].released = True
            self.streamer.close()
        self.execution_device = self.output_device = self.streamer = self.unit = None
        self.io_same_device = False

    def init_hook(self, module: nn.Module) -> nn.Module:
        if self.is_placed:
            if self.streamer is not None and self.unit is not None:  # it may have been detached before
                self.streamer.sites[self.unit.index].serve_again()
            return module
        if self.execution_device is None:
            if self.offload:
                raise ValueError(
                    "AlignDevicesHook(offload=True) has no execution_device: name the device on which the weights are "
                    'to work, such as AlignDevicesHook("cuda:0", offload=True)'
                )
        elif self.offload:
            self.streamer = stream_alone(
                module, self.execution_device, self.weights_map, self.offload_buffers, self.place_submodules
            )
            self.unit = self.streamer.units[0] if self.streamer else None
        elif self.place_submodules:
            module.to(self.execution_device)
        else:
            module._apply(lambda tensor: tensor.to(self.execution_device), recurse=False)
        return module

    @never_compiled
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # Others may call this alone and never end it, as `apply_forward_hook` of Diffusers does: then handles serve.
        works = self.unit is not None or self.io_same_device
        if works and this_thread.module is module and this_thread.begun.get(self) is None:
            undo = _Undo(self.streamer is None or not self.streamer.held())
            this_thread.begun[self] = undo  # also if it is called by a hook that says nothing of errors
            if self.io_same_device:
                undo.input_device = find_device((args, kwargs))
            if self.unit is not None:
                args, kwargs = self._lend(module, args, kwargs)
                undo.lent = True
        device = self.execution_device
        if device is not None:
            if [value for value in args if not isinstance(value, Tensor) or value.device != device]:  # mostly none
                args = send_to_device(args, device)
            if kwargs:
                kwargs = send_to_device(kwargs, device, self.skip_keys)
        return args, kwargs

    def _lend(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self.streamer.lend(self.unit)  # type: ignore[union-attr, arg-type]
        return args, kwargs

    @never_compiled
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        undo = this_thread.begun.get(self)
        if undo is not None:
            if undo.lent:
                output = self.streamer.own_output(self.unit, output)  # type: ignore[union-attr, arg-type]
            self._give_back(undo)
            if undo.input_device is not None:
                output = send_to_device(output, undo.input_device, self.skip_keys)
            this_thread.begun.pop(self, None)
        if self.output_device is not None:
            output = send_to_device(output, self.output_device, self.skip_keys)
        return output

    def on_error(self, module: nn.Module) -> None:
        undo = this_thread.begun.get(self)
        if undo is not None:
            self._give_back(undo, failed=True)

    def _give_back(self, undo: _Undo, failed: bool = False) -> None:
        try:
            if undo.lent:
                undo.lent = False
                self.streamer.take_back(self.unit, failed)  # type: ignore[union-attr, arg-type]
        finally:
            if undo.outermost and self.streamer is not None:
                self.streamer.recover()  # no-op unless an interrupt came, perhaps one that user code has caught

    def detach_hook(self, module: nn.Module) -> nn.Module:
        if self.streamer is not None and self.unit is not None:
            self.streamer.release(self.unit)
        if self.is_placed:
            give_back_methods(module)
        return module
