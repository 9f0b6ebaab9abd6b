"""What stands in a model for a weight that rests elsewhere: a handle with a shape and a dtype, and no data.

A meta tensor in its place would be dangerous: used by mistake it gives an obscure error or, on some versions of
PyTorch, an uninitialised result. `Away` is right instead. What only asks about it (`shape`, `dtype`, `device`,
`numel()`) is answered without data; `device` is the device that the weight works on, so that inputs made for it land
there. Any other operation brings the weight, for that one operation: `F.linear(x, module.weight)` outside of the
module's forward works, only slowly. What an operation writes in place is kept where the weight rests. A view of a
handle is a handle too, so that `module.weight.data[0].zero_()` is kept as well.

Leaves out: the fast way, where a whole block's weights arrive before its forward asks for them (`offload/stream.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .stream import Streamer
    from .weights import Weight

# Answered from the handle. Reading an attribute needs no data either, except for these, which give tensors.
_ABOUT = {
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.storage_offset,
    Tensor.element_size, Tensor.is_contiguous, Tensor.is_floating_point, Tensor.is_complex, Tensor.is_signed,
    Tensor.untyped_storage, Tensor.get_device, Tensor.__len__, Tensor.__hash__,
    Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.retain_grad, Tensor.is_shared,
    torch.is_floating_point, torch.is_complex, torch.numel, torch.is_tensor, torch.is_same_size, Tensor.is_same_size,
}  # fmt: skip
_TENSOR_ATTRIBUTES = {"T", "mT", "H", "mH", "real", "imag"}


class Away(Tensor):
    """A handle on a weight that rests elsewhere.

    Attributes:
        weight: what it stands for.
        streamer: what brings it.
        steps: for a view or a detached handle, the operations that lead to it from the weight.
    """

    weight: Weight
    streamer: Streamer
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()

    @staticmethod
    def of(weight: Weight, streamer: Streamer) -> Away:
        """A new handle: a parameter for a parameter, a buffer for a buffer."""
        like = weight.like
        with _nothing_fake():
            meta = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
        cls = AwayParameter if isinstance(like, nn.Parameter) else Away
        return _made(cls, meta, like.requires_grad and like.is_leaf, weight, streamer)

    def load(self, device: torch.device | str | None = None) -> Tensor:
        """The weight's data on a device (None: where it works), in memory that is not this weight's resting place
        unless that is the CPU.
        """
        value = self.streamer.load(self.weight, None if device is None else torch.device(device))
        return self._seen(value)

    def _seen(self, value: Tensor) -> Tensor:
        for step in self.steps:
            value = step(value)
        return value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        owner = getattr(func, "__self__", None)  # the property, for an attribute being read or set
        if func in _ABOUT or (name == "__get__" and getattr(owner, "__name__", "") not in _TENSOR_ATTRIBUTES):
            return _ask(func, owner, args, kwargs)
        if name == "__set__":
            return _set(func, owner, args)
        if func is Tensor.requires_grad_:
            args[0]._require_grad(args[1] if len(args) > 1 else kwargs.get("requires_grad", True))
            return args[0]
        if func is Tensor.detach:
            return args[0]._detached()
        if func in (Tensor.cpu, Tensor.to) and args[0].device.type != "cpu" and _goes_to_cpu(func, args, kwargs):
            return args[0].load("cpu").clone()
        loaded: dict[int, Tensor] = {}  # weight -> its data, each brought once
        real: dict[int, Tensor] = {}  # handle -> what it stands for
        args_, kwargs_ = _brought((args, kwargs), loaded, real)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args_, **kwargs_)
        first = args[0] if args else next(iter(kwargs.values()), None)
        for target in _handles(first) if _writes(name) else _handles(kwargs.get("out")):
            target.streamer.keep(target.weight, loaded[id(target.weight)])
            result = target if result is real[id(target)] else result
        for handle in _handles([*args, *kwargs.values()]):
            handle.streamer.unload(handle.weight)
        if func in (Tensor.numpy, Tensor.__array__):  # a write would go unseen
            result = result.copy()
            result.flags.writeable = False
        elif isinstance(first, Away):
            result = first._views(result, real[id(first)], func, args_[1:] if args else (), kwargs_)
        return result

    def _views(self, result: Any, value: Tensor, func: Any, args: Any, kwargs: Any, at: int | None = None) -> Any:
        """An operation's result with handles in place of tensors that share this one's memory."""
        if isinstance(result, (list, tuple)) and at is None:
            items = [self._views(item, value, func, args, kwargs, i) for i, item in enumerate(result)]
            return result if all(new is old for new, old in zip(items, result)) else type(result)(items)
        if result is value:
            return self
        if not isinstance(result, Tensor) or isinstance(result, Away) or not _share_memory(result, value):
            return result

        def step(tensor: Tensor) -> Tensor:
            again = func(tensor, *args, **kwargs)
            view: Tensor = again if at is None else again[at]
            return view

        meta = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device="meta")
        return _made(Away, meta, result.requires_grad, self.weight, self.streamer, (*self.steps, step))

    def _detached(self) -> Away:
        with torch._C.DisableTorchFunctionSubclass():
            meta = Tensor.detach(self)
        return _made(Away, meta, False, self.weight, self.streamer, (*self.steps, Tensor.detach))

    def _require_grad(self, value: bool) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            Tensor.requires_grad_(self, value)
        if not self.steps:
            self.weight.like.requires_grad_(value)
            self.streamer.forget(self.weight)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shape = " x ".join(map(str, self.shape)) or "scalar"
        place = {"cpu": "RAM", "disk": "on disk"}[self.streamer.rests_in(self.weight)]
        rests = f"in {place}" if place == "RAM" else place
        return f"<{self.weight.name}: {shape} {self.dtype}, rests {rests}, works on {self.device}>"

    def __format__(self, spec: str) -> str:
        return super().__format__(spec) if spec else repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if self.steps:  # it stands in no model
            return self.clone()
        meta = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")
        new = _bare(type(self), meta, self.requires_grad)
        memo[id(self)] = new
        new.weight, new.streamer = copy.deepcopy(self.weight, memo), copy.deepcopy(self.streamer, memo)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.steps:
            return self.clone().__reduce_ex__(protocol)
        about = (type(self), tuple(self.shape), self.stride(), self.dtype, self.requires_grad)
        return _again, about, (self.weight, self.streamer), None, None, _connect


class AwayParameter(Away, nn.Parameter):
    """A handle on a parameter."""

    __torch_function__ = Away.__torch_function__
    __deepcopy__ = Away.__deepcopy__
    __reduce_ex__ = Away.__reduce_ex__
    __repr__ = Away.__repr__  # type: ignore[assignment]


def refuse_copy(what: str) -> NoReturn:
    """Refuse to copy or pickle something that a streamer serves.

    Args:
        what: its name and what it is, such as "the weight 'h.0.a.weight'".

    Raises:
        TypeError: always.
    """
    raise TypeError(
        f"{what} is spread out by bigkit and cannot be copied or pickled: call "
        "remove_hook_from_module(model, recurse=True) first, or copy the model before it is dispatched"
    )


def _nothing_fake() -> Any:
    """Under fake tensors (a dry run), a context without them: a handle is real, whatever it stands for."""
    if torch._guards.detect_fake_mode() is None:
        return nullcontext()
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def _bare(cls: type, meta: Tensor, requires_grad: bool) -> Any:
    return Tensor._make_subclass(cls, meta, requires_grad)


def _made(cls: type, meta: Tensor, requires_grad: bool, weight: Weight, streamer: Streamer, steps: Any = ()) -> Away:
    away: Away = _bare(cls, meta, requires_grad)
    away.weight, away.streamer, away.steps = weight, streamer, steps
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
        if this.steps:
            raise RuntimeError(f"cannot set the data of a view of {this.weight.name!r}, which rests elsewhere")
        this.streamer.keep(this.weight, value.clone() if isinstance(value, Away) else value)
        return
    if getattr(owner, "__name__", "") == "requires_grad":
        return this._require_grad(value)
    with torch._C.DisableTorchFunctionSubclass():
        func(this, value)


def _goes_to_cpu(func: Any, args: Any, kwargs: Any) -> bool:
    if func is Tensor.cpu:
        return True
    given = [*args[1:], *kwargs.values()]
    return len(given) == 1 and (given[0] == "cpu" or given[0] == torch.device("cpu"))


def _brought(value: Any, loaded: dict[int, Tensor], real: dict[int, Tensor]) -> Any:
    """`value` with every handle in it replaced by what it stands for."""
    if isinstance(value, Away):
        if id(value) not in real:
            if id(value.weight) not in loaded:
                loaded[id(value.weight)] = value.streamer.load(value.weight)
            real[id(value)] = value._seen(loaded[id(value.weight)])
        return real[id(value)]
    if isinstance(value, (list, tuple)):
        items = [_brought(item, loaded, real) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: _brought(item, loaded, real) for key, item in value.items()}
    return value


def _share_memory(one: Tensor, other: Tensor) -> bool:
    strided = one.layout == other.layout == torch.strided
    return strided and one.untyped_storage()._cdata == other.untyped_storage()._cdata


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
