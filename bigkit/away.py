"""What stands in a model for a weight that rests elsewhere: a handle with a shape and a dtype, and no data.

A meta tensor in its place would be dangerous: used by mistake it gives an obscure error or, on some versions of
PyTorch, an uninitialised result. `Away` is right instead. What only asks about it (`shape`, `dtype`, `device`,
`numel()`) is answered without data; `device` is the device that the weight works on, so that inputs made for it land
there. Any other operation brings the weight, for that one operation: `F.linear(x, module.weight)` outside of the
module's forward works, only slowly. What an operation writes in place is kept where the weight rests.

Leaves out: the fast way, where a whole block's weights arrive before its forward asks for them (`stream.py`).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .store import Weight
    from .stream import Streamer

# Answered from the handle. Reading an attribute needs no data either, except for these, which give tensors.
_ABOUT = {
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.storage_offset,
    Tensor.element_size, Tensor.is_contiguous, Tensor.is_floating_point, Tensor.is_complex, Tensor.is_signed,
    Tensor.requires_grad_, Tensor.untyped_storage, Tensor.get_device, Tensor.__len__, Tensor.__hash__,
    Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.retain_grad, Tensor.is_shared,
    torch.is_floating_point, torch.is_complex, torch.numel, torch.is_tensor, torch.is_same_size, Tensor.is_same_size,
}  # fmt: skip
_TENSOR_ATTRIBUTES = {"T", "mT", "H", "mH", "real", "imag"}


class Away(Tensor):
    """A handle on a weight that rests elsewhere.

    Attributes:
        weight: what it stands for.
        streamer: what brings it.
    """

    weight: Weight
    streamer: Streamer

    @staticmethod
    def of(weight: Weight, streamer: Streamer) -> Away:
        """A new handle: a parameter for a parameter, a buffer for a buffer."""
        like = weight.like
        meta = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
        cls = AwayParameter if isinstance(like, nn.Parameter) else Away
        return _made(cls, meta, like.requires_grad and like.is_leaf, weight, streamer)

    def load(self, device: torch.device | str | None = None) -> Tensor:
        """The weight's data on a device (None: where it works), in memory that is not this weight's resting place
        unless that is the CPU.
        """
        return self.streamer.load(self.weight, None if device is None else torch.device(device))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        owner = getattr(func, "__self__", None)  # the property, for an attribute being read or set
        if func in _ABOUT or (name == "__get__" and getattr(owner, "__name__", "") not in _TENSOR_ATTRIBUTES):
            return _ask(func, owner, args, kwargs)
        if name == "__set__":
            return _set(func, owner, args)
        if func is Tensor.detach:
            this = args[0]
            with torch._C.DisableTorchFunctionSubclass():
                return _made(Away, Tensor.detach(this), False, this.weight, this.streamer)
        if func in (Tensor.cpu, Tensor.to) and _goes_to_cpu(func, args, kwargs):
            return args[0].load("cpu")
        found: dict[int, tuple[Away, Tensor]] = {}
        real = _brought((args, kwargs), found)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*real[0], **real[1])
        first = args[0] if args else next(iter(kwargs.values()), None)
        for target in _handles(first) if _writes(name) else _handles(kwargs.get("out")):
            value = found[id(target)][1]
            target.streamer.keep(target.weight, value)
            result = target if result is value else result
        return result

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shape = " x ".join(map(str, self.shape)) or "scalar"
        place = {"cpu": "RAM", "disk": "on disk"}[self.streamer.rests_in(self.weight)]
        rests = f"in {place}" if place == "RAM" else place
        return f"<{self.weight.name}: {shape} {self.dtype}, rests {rests}, works on {self.device}>"

    def __format__(self, spec: str) -> str:
        return super().__format__(spec) if spec else repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Away:
        meta = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")
        new = _bare(type(self), meta, self.requires_grad)
        memo[id(self)] = new
        new.weight, new.streamer = copy.deepcopy(self.weight, memo), copy.deepcopy(self.streamer, memo)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        about = (type(self), tuple(self.shape), self.stride(), self.dtype, self.requires_grad)
        return _again, about, (self.weight, self.streamer), None, None, _connect


class AwayParameter(Away, nn.Parameter):
    """A handle on a parameter."""

    __torch_function__ = Away.__torch_function__
    __deepcopy__ = Away.__deepcopy__
    __reduce_ex__ = Away.__reduce_ex__
    __repr__ = Away.__repr__  # type: ignore[assignment]


def _bare(cls: type, meta: Tensor, requires_grad: bool) -> Any:
    return Tensor._make_subclass(cls, meta, requires_grad)


def _made(cls: type, meta: Tensor, requires_grad: bool, weight: Weight, streamer: Streamer) -> Away:
    away: Away = _bare(cls, meta, requires_grad)
    away.weight, away.streamer = weight, streamer
    return away


def _again(cls: type, shape: Any, stride: Any, dtype: torch.dtype, requires_grad: bool) -> Any:
    return _bare(cls, torch.empty_strided(shape, stride, dtype=dtype, device="meta"), requires_grad)


def _connect(away: Away, state: tuple[Weight, Streamer]) -> None:
    away.weight, away.streamer = state


def _ask(func: Any, owner: Any, args: Any, kwargs: Any) -> Any:
    """Answer a question about a handle."""
    this, attribute = args[0], getattr(owner, "__name__", "")
    if attribute == "device":
        return this.streamer.device
    if attribute in ("is_meta", "is_cpu", "is_cuda"):
        return this.streamer.device.type == attribute.removeprefix("is_")
    if attribute == "data":
        return this.detach()
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _set(func: Any, owner: Any, args: Any) -> None:
    """Set an attribute: new data is kept where the weight rests."""
    this, value = args
    if getattr(owner, "__name__", "") == "data":
        if not (isinstance(value, Away) and value.weight is this.weight):
            this.streamer.keep(this.weight, value.load() if isinstance(value, Away) else value)
        return
    with torch._C.DisableTorchFunctionSubclass():
        func(this, value)


def _goes_to_cpu(func: Any, args: Any, kwargs: Any) -> bool:
    if func is Tensor.cpu:
        return True
    given = [*args[1:], *kwargs.values()]
    return len(given) == 1 and (given[0] == "cpu" or given[0] == torch.device("cpu"))


def _brought(value: Any, found: dict[int, tuple[Away, Tensor]]) -> Any:
    """`value` with every handle in it replaced by its weight, each brought once."""
    if isinstance(value, Away):
        if id(value) not in found:
            loaded = value.load()
            found[id(value)] = (value, loaded if value.requires_grad else loaded.detach())
        return found[id(value)][1]
    if isinstance(value, (list, tuple)):
        items = [_brought(item, found) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: _brought(item, found) for key, item in value.items()}
    return value


def _handles(value: Any) -> list[Away]:
    return [item for item in (value if isinstance(value, (list, tuple)) else (value,)) if isinstance(item, Away)]


def _writes(name: str) -> bool:
    """Whether an operation of this name writes into its first argument: `add_`, `__iadd__`, `__setitem__`."""
    dunder = name.startswith("__") and name.endswith("__")
    if dunder:
        return name == "__setitem__" or (
            name[2] == "i" and name not in ("__index__", "__int__", "__invert__", "__iter__")
        )
    return name.endswith("_")
