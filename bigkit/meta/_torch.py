"""What is private in PyTorch and used or patched in this wing, and in `checkpoints` through it.

Seen in torch 2.11 to 2.15; `tests/meta/test_private_parts.py` fails when a name is gone. The dictionaries of an
`nn.Module` (`_parameters`, `_buffers`, `_modules`, `_non_persistent_buffers_set`) are used everywhere and stay where
they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.nn.modules import module as module_hooks


def is_operation(func: Any) -> bool:
    """Whether a dispatch mode is given an operation with a schema, not one of the few functions without."""
    return isinstance(func, torch._ops.OpOverload)


def view_like(tensor: Tensor, storage: UntypedStorage) -> Tensor:
    """The view that `tensor` is of its own storage, of another one; lazily conjugated or negated alike."""
    view = torch.empty(0, dtype=tensor.dtype, device=storage.device)
    view.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
    view = view.conj() if tensor.is_conj() else view
    return torch._neg_view(view) if tensor.is_neg() else view


def laid_out_like(deferred: Tensor, real: Tensor) -> Tensor:
    """`real` with the dtype, strides and offset of a tensor on meta."""
    real = real.to(deferred.dtype)
    if (real.stride(), real.storage_offset()) == (deferred.stride(), deferred.storage_offset()):
        return real
    size = deferred.untyped_storage().nbytes() // real.itemsize
    flat = torch.empty(size, dtype=real.dtype, device=real.device)
    return flat.as_strided(deferred.size(), deferred.stride(), deferred.storage_offset()).copy_(real)


def twin(tensor: Tensor, data: Tensor) -> Tensor:
    """`data` as the same kind of tensor: class (nn.Parameter and its heirs), attributes and requires_grad."""
    if hasattr(data, "fake_mode"):  # a fake tensor stays one, and says itself whether it is a parameter
        fake: Any = data.detach()
        fake._is_param = isinstance(tensor, nn.Parameter)
        return fake
    new = torch.Tensor._make_subclass(type(tensor), data, tensor.requires_grad and tensor.is_leaf)  # it detaches
    if attributes := vars(tensor):
        vars(new).update(attributes)
    return new


def storage_key(tensor: Tensor) -> Any:
    """What two tensors that share memory have in common: their storage, or for want of one the tensor itself."""
    try:
        if tensor.layout != torch.strided:
            return (id(tensor),)
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError, ValueError):  # lazy, or a wrapper around other tensors
        return (id(tensor),)


def are_apart(tensors: Sequence[Tensor]) -> bool:
    """Whether no two tensors share memory, and that is quickly seen."""
    try:
        return len({tensor.untyped_storage()._cdata for tensor in tensors}) == len(tensors)
    except (NotImplementedError, RuntimeError, ValueError):  # see `storage_key`
        return False


def has_own_state(module: nn.Module) -> bool:
    """Whether a class saves its state dict in a way of its own."""
    return type(module)._save_to_state_dict is not nn.Module._save_to_state_dict


def own_state(module: nn.Module) -> dict[str, Any]:
    """What a module itself adds to a state dict."""
    state: dict[str, Any] = {}
    module._save_to_state_dict(state, "", True)
    return state


def watch_modules(watcher: Callable[[], Any]) -> Callable[[], None]:
    """Tell the watcher of the current thread, if it has one, what modules register and are given as attributes.

    The hooks and `nn.Module.__setattr__`, which is replaced, belong to the whole process: a thread without a watcher
    passes through them unchanged.

    Args:
        watcher: gives an object with `on_parameter(parameter)`, `on_buffer(buffer)`, which return what is registered
            instead, and `on_attribute(module, name)`; or None.

    Returns:
        A function that undoes it. What others have put around `__setattr__` meanwhile stays.
    """
    plain_setattr = nn.Module.__setattr__

    def tell(event: str, subject: Any, *rest: Any) -> Any:
        current = watcher()
        if current is None or subject is None:
            return None
        with torch._C.DisableTorchFunction():  # no function mode, and no parameter's own class, shall see what it does
            return getattr(current, event)(subject, *rest)

    def set_attribute(module: nn.Module, name: str, value: Any) -> None:
        plain_setattr(module, name, value)
        if isinstance(value, (Tensor, tuple, list, dict)):
            tell("on_attribute", module, name)

    hooks = (
        module_hooks.register_module_parameter_registration_hook(lambda _, __, value: tell("on_parameter", value)),
        module_hooks.register_module_buffer_registration_hook(lambda _, __, value: tell("on_buffer", value)),
    )
    nn.Module.__setattr__ = set_attribute  # type: ignore[method-assign, assignment]

    def undo() -> None:
        if nn.Module.__setattr__ is set_attribute:
            nn.Module.__setattr__ = plain_setattr  # type: ignore[method-assign]
        for hook in hooks:
            hook.remove()

    return undo
