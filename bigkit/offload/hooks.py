"""Hooks: code that runs before and after a module's forward, with the names that Accelerate gave them.

    add_hook_to_module(module, hook)     from now on: hook.pre_forward, the module's own forward, hook.post_forward
    remove_hook_from_module(module)      as it was before

`AlignDevicesHook` is the one that makes a spread-out model run: it moves a module's inputs to the device that the
module works on and, if the module's weights rest elsewhere, borrows them for the time of the forward
(`offload/stream.py`).

Why not `Module.register_forward_hook(always_call=True)`: PyTorch calls such a hook after an `Exception` alone. An
interrupted forward (Ctrl-C raises `KeyboardInterrupt`, which is none) would keep its weights, and their lock. And it is
not called at all where code calls `module.forward` itself. So a hook here stands around `forward`, in a `finally` of
Python's own. Forward hooks that users register run outside of it.

Under `torch.compile` a hook is a place where the graph breaks: what is inside the module is compiled, the hook is not.

Leaves out: which modules get which hook (`offload/dispatch.py`).
"""

from __future__ import annotations

import functools
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.utils.rnn import PackedSequence

from .grouping import stream_alone
from .stream import Streamer
from .weights import Unit


class ModelHook:
    """Code around a module's forward. Inherit from it and override what you need.

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
        """Called when anything was raised, Ctrl-C included, between the start of `pre_forward` and the end of
        `post_forward`.
        """

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Called when the hook is removed; returns the module."""
        return module


class SequentialHook(ModelHook):
    """Several hooks as one; each method calls theirs in order.

    >>> hook = SequentialHook(ModelHook(), ModelHook())
    >>> hook.post_forward(nn.Identity(), 1)
    1
    """

    def __init__(self, *hooks: ModelHook) -> None:
        self.hooks = hooks
        self.no_grad = any(hook.no_grad for hook in hooks)

    def init_hook(self, module: nn.Module) -> nn.Module:
        for hook in self.hooks:
            module = hook.init_hook(module)
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for hook in self.hooks:
            args, kwargs = hook.pre_forward(module, *args, **kwargs)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        for hook in self.hooks:
            output = hook.post_forward(module, output)
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
    before = _hooks(module) if append else []
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
        hook: ModelHook | None = vars(part).get("_hf_hook")
        if hook is not None:
            hook.detach_hook(part)
            _unwrap(part)
    vars(module).pop("_apply", None)  # `dispatch_model` made it refuse to move
    return module


def _hooks(module: nn.Module) -> list[ModelHook]:
    """The hooks of a module, one by one."""
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
    wrapped = functools.partial(_hooked, whole, module, own_forward)
    functools.update_wrapper(wrapped, module.forward)
    vars(module).update(_hf_hook=whole, _old_forward=own_forward)
    module.forward = wrapped


def _unwrap(module: nn.Module) -> None:
    own_forward = vars(module).pop("_old_forward")
    del module.forward, module._hf_hook
    if own_forward is not None:
        module.forward = own_forward


def drop_placed(model: nn.Module) -> None:
    """Take away the hooks of an earlier `dispatch_model`, those of the user aside. Weights stay where they are."""
    for module in model.modules():
        hooks = _hooks(module)
        kept = [hook for hook in hooks if not (isinstance(hook, AlignDevicesHook) and hook._is_placed)]
        for hook in hooks:
            if hook not in kept and hook.streamer is not None:  # type: ignore[attr-defined]
                hook.streamer.close()  # type: ignore[attr-defined]
        if len(kept) < len(hooks):
            _wrap(module, kept)
    vars(model).pop("_apply", None)


def _hooked(hook: ModelHook, module: nn.Module, own_forward: Any, /, *args: Any, **kwargs: Any) -> Any:
    """A module's forward with a hook around it."""
    if torch.compiler.is_dynamo_compiling():
        return _run_untraced(_UNTRACED, hook, module, own_forward, args, kwargs)
    return _run(_TRACED, hook, module, own_forward, args, kwargs)


def _run(steps: Any, hook: ModelHook, module: nn.Module, own_forward: Any, args: Any, kwargs: Any) -> Any:
    before, after, failed = steps
    hooks = hook.hooks if type(hook) is SequentialHook else (hook,)
    begun: list[ModelHook] = []
    try:
        args, kwargs = before(hooks, begun, module, args, kwargs)
        # The class's own forward is looked up at each call, so that a copied module never runs the original's.
        forward = own_forward or functools.partial(type(module).forward, module)
        if hook.no_grad:
            with torch.no_grad():
                output = forward(*args, **kwargs)
        else:
            output = forward(*args, **kwargs)
        return after(hooks, begun, module, output)
    except BaseException:
        failed(begun, module)
        raise


def _before(hooks: Any, begun: list[ModelHook], module: nn.Module, args: Any, kwargs: Any) -> Any:
    for hook in hooks:
        begun.append(hook)
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
    return args, kwargs


def _after(hooks: Any, begun: list[ModelHook], module: nn.Module, output: Any) -> Any:
    for hook in hooks:
        output = hook.post_forward(module, output)
        begun.remove(hook)
    return output


def _failed(begun: list[ModelHook], module: nn.Module) -> None:
    for hook in begun:
        hook.on_error(module)


# PyTorch's own decorator for its optimizers and the like: it imports the compiler only if it is called.
_TRACED = (_before, _after, _failed)
_UNTRACED = tuple(_disable_dynamo(step) for step in _TRACED)
_run_untraced = _disable_dynamo(_run, recursive=False)


# ---------------------------------------------------------------------------------------------------------------------
# Moving inputs


def send_to_device(value: Any, device: torch.device, skip_keys: Iterable[str] = ()) -> Any:
    """Tensors in nested lists, tuples, dicts and objects with a `to` method, on a device.

    Args:
        value: anything; what is no tensor and holds none comes back as it is, and so does what is there already.
        device: where to.
        skip_keys: keys of dicts whose values stay where they are.

    >>> send_to_device({"x": [torch.ones(1)], "n": 3}, torch.device("meta"))
    {'x': [tensor(..., device='meta', size=(1,))], 'n': 3}
    """
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device)
    if isinstance(value, (str, bytes, int, float, type(None), nn.Module, torch.device, torch.dtype)):
        return value
    if isinstance(value, PackedSequence):
        return value.to(device)  # type: ignore[arg-type]  # it knows what of it stays on the CPU
    if isinstance(value, (list, tuple)):
        items = [send_to_device(item, device, skip_keys) for item in value]
        if all(new is old for new, old in zip(items, value)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        moved = {
            key: item if key in skip_keys else send_to_device(item, device, skip_keys) for key, item in value.items()
        }
        if all(moved[key] is item for key, item in value.items()):
            return value
        if isinstance(value, defaultdict):
            return defaultdict(value.default_factory, moved)
        return type(value)(moved)  # type: ignore[call-arg]
    if hasattr(value, "to") and callable(value.to):
        return value.to(device)
    return value


def find_device(value: Any) -> torch.device | None:
    """The device of the first tensor in nested lists, tuples and dicts.

    >>> find_device([1, {"x": torch.ones(1)}])
    device(type='cpu')
    """
    if isinstance(value, Tensor):
        return value.device
    if isinstance(value, (list, tuple, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            if (device := find_device(item)) is not None:
                return device
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The hook of a spread-out model


@dataclass
class _Call:
    """What one forward has to undo."""

    outermost: bool = True  # of those in which this thread is lent something
    input_device: torch.device | None = None
    lent: bool = False


class AlignDevicesHook(ModelHook):
    """Runs a module on one device, wherever its inputs come from and its weights rest.

    Args:
        execution_device: where inputs go before the forward; None leaves them.
        offload: send the module's weights away, and bring them for the time of each forward.
        io_same_device: send the output to the device of the input.
        weights_map: name -> tensor, for weights that the module has on meta.
        offload_buffers: send persistent buffers away too.
        place_submodules: the hook is for the modules within too, not for what the module itself holds alone.
        skip_keys: keyword arguments (and keys of an output) that stay where they are.

    >>> layer = add_hook_to_module(nn.Linear(2, 2), AlignDevicesHook("cpu", offload=True))
    >>> layer.weight
    <weight: 2 x 2 torch.float32, rests in RAM, works on cpu>
    >>> layer(torch.ones(1, 2)).shape
    torch.Size([1, 2])
    """

    def __init__(
        self,
        execution_device: torch.device | str | int | None = None,
        offload: bool = False,
        io_same_device: bool = False,
        weights_map: Mapping[str, Tensor] | None = None,
        offload_buffers: bool = False,
        place_submodules: bool = False,
        skip_keys: str | Iterable[str] | None = None,
    ) -> None:
        self.execution_device = None if execution_device is None else torch_device(execution_device)
        self.offload = offload
        self.io_same_device = io_same_device
        self.weights_map = weights_map
        self.offload_buffers = offload_buffers
        self.place_submodules = place_submodules
        self.skip_keys = (skip_keys,) if isinstance(skip_keys, str) else tuple(skip_keys or ())
        self.streamer: Streamer | None = None
        self.unit: Unit | None = None
        self._is_placed = False
        self._calls: dict[int, list[_Call]] = {}  # thread -> its forwards under way, innermost last

    @classmethod
    def placed(
        cls, device: torch.device, skip_keys: str | Iterable[str] | None, streamer: Streamer | None = None,
        unit: Unit | None = None, io_same_device: bool = False,
    ) -> AlignDevicesHook:  # fmt: skip
        """A hook for a module whose weights are where they belong: on the device, or sent away by a streamer."""
        hook = cls(device, io_same_device=io_same_device, skip_keys=skip_keys)
        hook.streamer, hook.unit, hook._is_placed = streamer, unit, True
        return hook

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_calls": {}}

    def init_hook(self, module: nn.Module) -> nn.Module:
        if self._is_placed or self.execution_device is None:
            return module
        if self.offload:
            self.streamer = stream_alone(module, self.execution_device, self.weights_map, self.offload_buffers,
                                         self.place_submodules)  # fmt: skip
            self.unit = self.streamer.units[0] if self.streamer else None
        elif self.place_submodules:
            module.to(self.execution_device)
        else:
            module._apply(lambda tensor: tensor.to(self.execution_device), recurse=False)
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.unit is not None or self.io_same_device:
            call = _Call(self.streamer is None or not self.streamer.held())
            self._calls.setdefault(threading.get_ident(), []).append(call)
            if self.io_same_device:
                call.input_device = find_device((args, kwargs))
            if self.unit is not None:
                assert self.streamer is not None
                self.streamer.lend(self.unit)
                call.lent = True
        device = self.execution_device
        if device is not None:
            if not all(isinstance(value, Tensor) and value.device == device for value in args):  # mostly they are there
                args = send_to_device(args, device)
            if kwargs:
                kwargs = send_to_device(kwargs, device, self.skip_keys)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if self.unit is not None or self.io_same_device:
            call = self._calls[threading.get_ident()][-1]
            self._return(call)
            if call.outermost and self.streamer is not None:
                self.streamer.recover()  # there is something to do only if an interrupt was caught within
            if call.input_device is not None:
                output = send_to_device(output, call.input_device, self.skip_keys)
            self._forget()
        return output

    def on_error(self, module: nn.Module) -> None:
        if calls := self._calls.get(threading.get_ident()):
            call = calls[-1]
            try:
                self._return(call)
            finally:
                if call.outermost and self.streamer is not None:
                    self.streamer.recover()
                self._forget()

    def _return(self, call: _Call) -> None:
        if call.lent:
            assert self.streamer is not None and self.unit is not None
            call.lent = False
            if self.streamer._loans and self.streamer._loans[-1].unit is self.unit:  # else it was interrupted
                self.streamer.take_back(self.unit)

    def _forget(self) -> None:
        calls = self._calls[threading.get_ident()]
        calls.pop()
        if not calls:
            del self._calls[threading.get_ident()]

    def detach_hook(self, module: nn.Module) -> nn.Module:
        if self.streamer is not None and self.unit is not None:
            self.streamer.release(self.unit)
        return module


def torch_device(device: torch.device | str | int) -> torch.device:
    """A device as PyTorch names it: 0 and "cuda" are cuda:0.

    >>> torch_device(1)
    device(type='cuda', index=1)
    """
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device("cuda", 0) if found.type == "cuda" and found.index is None else found
