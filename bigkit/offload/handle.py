"""What stands in a model for a weight that rests elsewhere: a handle with a shape and a dtype, and no data.

A meta tensor in its place would be dangerous: used by mistake it gives an obscure error or, on some versions of
PyTorch, an uninitialised result. A handle, `Away`, gives what the weight itself would give, or a clear error:

    question      `shape`, `dtype`, `device`, `numel()` and the like are answered without data; `device` is the device
                  that the weight works on, so that inputs made for it land there
    read          any other operation brings the weight, for that one operation: `F.linear(x, module.weight)` outside
                  of the module's forward works, only slowly
    write         `weight.mul_(2)`, `weight[0] = 1` and `weight.data = new` are kept where the weight rests
    view          `weight[0]` and `weight.T` can be read; a write into them is an error, since nothing would keep it
    attribute     what else the weight has (the scales of a quantized one) is loaded where it works
    copy, pickle  give the weight itself, in memory of its own (pickled, on the CPU), so that `torch.load` reads it
    memory        each weight has an address of its own, by which those that save find out what is tied

Leaves out: the fast way, where a whole block's weights arrive before its forward asks for them (`offload/stream.py`).
"""

from __future__ import annotations

import weakref
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from ._torch import (
    DisableTorchFunctionSubclass,
    make_subclass,
    mark_parameter,
    real_tensors,
    storage_id,
    tree_leaves,
    tree_map_only,
)
from .codec import codec_of, own_copy
from .outside import take_news

if TYPE_CHECKING:
    from .stream import Streamer
    from .weights import Weight

_STORAGES = (Tensor.untyped_storage, Tensor.storage)
# Answered from the handle. Reading an attribute needs no data either, except for those that are tensors.
_QUESTIONS = {
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.storage_offset,
    Tensor.element_size, Tensor.is_contiguous, Tensor.is_floating_point, Tensor.is_complex, Tensor.is_signed,
    *_STORAGES, Tensor.data_ptr, Tensor.get_device, Tensor.__len__, Tensor.__hash__,
    Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.retain_grad, Tensor.is_shared,
    torch.is_floating_point, torch.is_complex, torch.numel, torch.is_tensor, torch.is_same_size, Tensor.is_same_size,
}  # fmt: skip
_PLAIN_VALUES = (bool, int, float, str, torch.dtype, type(None))
_TENSOR_ATTRIBUTES = {"T", "mT", "H", "mH", "real", "imag"}


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


class Away(Tensor):
    """A handle on a weight that rests elsewhere.

    Attributes:
        weight: what it stands for.
        streamer: what brings it.
        in_model: whether it stands in a model; else it is what `detach()` or `data` of such a handle gave.
        stands_for: the class of what it stands for; `nn.Parameter` for buffers too.
    """

    weight: Weight
    streamer: Streamer
    in_model: bool
    stands_for: type = nn.Parameter

    @staticmethod
    def of(weight: Weight, streamer: Streamer) -> Away:
        """A new handle: a parameter for a parameter, a buffer for a buffer."""
        template = weight.template
        # Under fake tensors (a dry run) too a handle is real, whatever it stands for.
        with real_tensors():
            meta = torch.empty_strided(template.shape, template.stride(), dtype=template.dtype, device="meta")
        handle = make_subclass(_handle_class(type(template)), meta, template.requires_grad and template.is_leaf)
        values = {name: value for name, value in vars(template).items() if isinstance(value, _PLAIN_VALUES)}
        vars(handle).update(values)  # peft makes a weight like this one from them
        if isinstance(template, nn.Parameter):
            mark_parameter(handle)
        handle._unswapped = weakref.ref(handle)  # `torch.utils.swap_tensors` refuses what has a weak reference
        return _connect(handle, weight, streamer, in_model=True)

    def __new__(cls, data: Tensor, requires_grad: bool = True, **attributes: Any) -> Any:
        """A weight, not a handle: others make one like this by `type(weight)(data, requires_grad=...)`."""
        if cls is not Away and isinstance(data, cls.stands_for):
            return data
        own = {name: value for name, value in attributes.items() if name not in Away.__annotations__}
        return cls.stands_for(data, requires_grad, **own)

    def __getattr__(self, name: str) -> Any:
        """What the weight has beside its data and is no plain value: the scales of a quantized one, loaded."""
        weight = self.__dict__.get("weight")
        if weight is None or name.startswith("_") or name not in vars(weight.template):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.load(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What users note at a weight, forwards find at the tensor that is lent to them."""
        super().__setattr__(name, value)
        if self.__dict__.get("in_model") and not hasattr(type(self), name) and name not in Away.__annotations__:
            vars(self.weight.template)[name] = value
            self.streamer.forget(self.weight)

    def load(self, device: torch.device | str | None = None) -> Tensor:
        """The weight's data on a device (None: where it works), in memory that is not this weight's resting place
        unless that is the CPU.
        """
        value = self.streamer.load(self.weight, None if device is None else torch.device(device))
        return value if self.in_model else value.detach()

    # Operations of which torch does not tell a subclass.

    def set_(self, *source: Any) -> Away:
        """Set the data to another tensor, or to what lies in a storage."""
        real: Any = [item.load() if isinstance(item, Away) else item for item in source]
        self.data = torch.empty(0, dtype=self.dtype).set_(*real)
        return self

    def _typed_storage(self) -> RestingStorage:
        return RestingStorage(self, "_typed_storage")

    def new(self, *args: Any, **kwargs: Any) -> Any:
        """A tensor of this dtype, where the weight works."""
        return torch.empty(0, dtype=self.dtype, device=self.device).new(*args, **kwargs)

    def new_tensor(self, *args: Any, **kwargs: Any) -> Tensor:
        """A tensor of this dtype with other data, where the weight works."""
        return torch.empty(0, dtype=self.dtype, device=self.device).new_tensor(*args, **kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")  # that is read or set, if one is
        if func in _QUESTIONS or (name == "__get__" and attribute not in _TENSOR_ATTRIBUTES):
            return _answer(func, attribute, args, kwargs)
        if name == "__set__":
            return _set(func, attribute, *args)
        if func is Tensor.requires_grad_:
            args[0]._require_grad(args[1] if len(args) > 1 else kwargs.get("requires_grad", True))
            return args[0]
        if func is Tensor.detach:
            return args[0]._detached()
        if func is Tensor.module_load:
            raise RuntimeError(
                f"{args[0].weight.name!r} rests elsewhere and cannot be swapped: load the state dict without "
                "torch.__future__.set_swap_module_params_on_conversion"
            )
        if func in (Tensor.cpu, Tensor.to) and args[0].device.type != "cpu" and _goes_to_cpu(func, args, kwargs):
            return args[0].load("cpu").clone()
        return _operate(func, args, kwargs)

    def _detached(self) -> Away:
        with real_tensors(), DisableTorchFunctionSubclass():
            meta = Tensor.detach(self)
        return _connect(make_subclass(Away, meta, False), self.weight, self.streamer)

    def _require_grad(self, value: bool) -> None:
        with DisableTorchFunctionSubclass():
            Tensor.requires_grad_(self, value)
        if self.in_model:
            self.weight.template.requires_grad_(value)
            self.streamer.forget(self.weight)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shape = " x ".join(map(str, self.shape)) or "scalar"
        place = {"cpu": "in RAM", "disk": "on disk"}[self.weight.rests_in()]
        return f"<{self.weight.name}: {shape} {self.dtype}, rests {place}, works on {self.device}>"

    def __format__(self, spec: str) -> str:
        return super().__format__(spec) if spec else repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return own_copy(self.load()) if self.in_model else self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        value = own_copy(self.load("cpu")) if self.in_model else self.load("cpu").clone()
        return value.__reduce_ex__(protocol)


@cache
def _handle_class(cls: type) -> type[Away]:
    """The class of handles on tensors of a class. Others ask those on quantized weights for their name, or class."""
    if cls in (nn.Parameter, Tensor):
        return Away
    return type(cls.__name__, (Away,), {"stands_for": cls, "__class__": property(lambda handle: cls)})


def take_notes(weight: Weight, value: Tensor) -> None:
    """A plain weight has become another tensor: what users have noted at that counts, and no longer what they had noted
    at the one before.
    """
    kept = {name: note for name, note in vars(value).items() if name[0] != "_" and name not in Away.__annotations__}
    for same in (weight, *weight.aliases):
        handle, noted = vars(same.away), vars(same.template)
        for name in [name for name in noted if name[0] != "_"]:
            del noted[name]
            handle.pop(name, None)
        noted.update(kept)
        handle.update({name: note for name, note in kept.items() if isinstance(note, _PLAIN_VALUES)})


class AwayView(Away):
    """Part of a weight's data that was brought for one operation, such as `weight[0]` or `weight.T`."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _operate(func, args, kwargs or {})

    def load(self, device: torch.device | str | None = None) -> Tensor:
        """A copy of the part on a device (None: where it is)."""
        return self.to(device or self.device, copy=True)


class RestingStorage:
    """What stands for the storage of a handle. It answers what those ask who look for tensors that share memory."""

    def __init__(self, handle: Away, kind: str = "untyped_storage") -> None:
        self.handle, self.kind = handle, kind

    def data_ptr(self) -> int:
        """The address where the weight rests."""
        return _address(self.handle.weight)

    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self.handle.numel() * self.handle.element_size()

    def __len__(self) -> int:
        return self.nbytes() if self.kind == "untyped_storage" else self.handle.numel()

    size = __len__

    def __setitem__(self, *_: Any) -> NoReturn:
        self._refuse("__setitem__")

    def _refuse(self, name: str) -> NoReturn:
        raise RuntimeError(
            f"{name} would write to the storage of {self.handle.weight.name!r}, which rests elsewhere and would stay "
            "as it is: write to the weight itself (`weight[0] = ...`, `weight.mul_(...)`)"
        )

    @property
    def _cdata(self) -> int:
        weight = self.handle.weight
        tensor = weight.outside.real()
        return min(map(id, (weight, *weight.aliases))) if tensor is None else storage_id(tensor)

    def __getattr__(self, name: str) -> Any:
        if name.endswith("_"):
            self._refuse(name)
        return getattr(getattr(self.handle.load().clone(), self.kind)(), name)  # of the weight alone, not of its block


def _connect(handle: Any, weight: Weight, streamer: Streamer, in_model: bool = False) -> Away:
    handle.weight, handle.streamer, handle.in_model = weight, streamer, in_model
    connected: Away = handle
    return connected


def _address(weight: Weight) -> int:
    """Where a weight's bytes lie (of a quantized one, its codes): safetensors reads them from there."""
    tensor = weight.outside.real()
    with real_tensors():
        return (tensor if tensor is not None and tensor.is_cpu else weight.parts[""].on_cpu()).data_ptr()


def _answer(func: Any, attribute: str, args: Any, kwargs: Any) -> Any:
    """Answer a question about a handle."""
    handle = args[0]
    if handle.weight.outside.ref is not None:
        take_news(handle.weight)
    if attribute == "device":
        return handle.streamer.device
    if attribute in ("is_meta", "is_cpu", "is_cuda"):
        return handle.streamer.device.type == attribute.removeprefix("is_")
    if attribute == "data":
        return handle._detached()
    if func is Tensor.data_ptr:
        return _address(handle.weight)
    if func in _STORAGES:
        return RestingStorage(handle, func.__name__)
    with DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _set(func: Any, attribute: str, handle: Away, value: Any) -> None:
    """Set an attribute of a handle: new data is kept where the weight rests."""
    if attribute == "requires_grad":
        handle._require_grad(value)
    elif attribute == "grad" and value is not None:
        raise RuntimeError(
            f"{handle.weight.name!r} rests elsewhere and takes no gradient: what is offloaded can run, but not learn"
        )
    elif attribute != "data":
        with DisableTorchFunctionSubclass():
            func(handle, value)
    elif handle.in_model:
        # What was brought may share memory with what is written to.
        value = value.clone() if isinstance(value, Away) else value
        if codec_of(handle.weight.template) is not codec_of(value):  # the codes of a quantized weight
            whole = own_copy(handle.load())
            whole.data = value
            value = whole
        handle.streamer.keep(handle.weight, value)
    else:
        raise RuntimeError(
            f"this is a detached {handle.weight.name!r}, which rests elsewhere: set the weight's own data"
        )


def _goes_to_cpu(func: Any, args: Any, kwargs: Any) -> bool:
    if func is Tensor.cpu:
        return True
    given = [*args[1:], *kwargs.values()]
    return len(given) == 1 and (given[0] == "cpu" or given[0] == torch.device("cpu"))


_INTO_A_VIEW = (
    "{} would write into a view of {!r}, which rests elsewhere and would stay as it is: write to the weight itself "
    "(`weight[0] = ...`, `weight.mul_(...)`), or clone() the view"
)


def _operate(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation on the data of the handles among its arguments."""
    if func is Tensor.__dlpack__:
        raise RuntimeError(
            f"{args[0].weight.name!r} rests elsewhere and cannot be shared by DLPack, where a write would go unseen: "
            "share a clone()"
        )
    first = _writes(func.__name__) or kwargs.get("inplace")
    written = next(iter([*args, *kwargs.values()])) if first else kwargs.get("out")
    targets = [tensor for tensor in tree_leaves(written) if isinstance(tensor, Away)]
    for target in targets:
        if isinstance(target, AwayView):
            raise RuntimeError(_INTO_A_VIEW.format(func.__name__, target.weight.name))
        target.streamer.forget(target.weight)  # first: after an interrupt a slot must not hold what was there before
    changing = {id(target.weight) for target in targets}
    loaded: dict[int, Tensor] = {}  # id of a weight -> its data, brought once
    versions: dict[int, int] = {}  # id of a tensor that the operation sees -> its version before
    brought: dict[int, Tensor] = {}  # the same -> it
    handles: dict[int, Away] = {}  # id of a tensor that the operation sees -> the handle in whose place it sees it
    owners: dict[int, Away] = {}  # storage that the operation sees -> a handle on its weight

    def bring(handle: Away) -> Tensor:
        weight = handle.weight
        tensor: Tensor = handle
        if not isinstance(handle, AwayView):
            if id(weight) not in loaded:
                value = handle.streamer.load(weight)
                loaded[id(weight)] = (
                    own_copy(value) if id(weight) in changing and weight.rests_in() == "disk" else value
                )
            tensor = loaded[id(weight)] if handle.in_model else loaded[id(weight)].detach()
        with DisableTorchFunctionSubclass():
            handles[id(tensor)] = owners[storage_id(tensor)] = handle
            if not tensor.is_inference():
                versions.setdefault(id(tensor), tensor._version)
        brought[id(tensor)] = tensor
        return tensor

    def protect(item: Any) -> Any:
        """The handle in place of its own data, and a view that refuses writes in place of a part of them."""
        if id(item) in handles:
            return handles[id(item)]
        if type(item) is not Tensor or item.layout != torch.strided or storage_id(item) not in owners:
            return item
        owner = owners[storage_id(item)]
        return _connect(item.as_subclass(AwayView), owner.weight, owner.streamer)

    args, kwargs = tree_map_only(Away, bring, (args, kwargs))
    with DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)
        changed = [handles[one] for one, before in versions.items() if brought[one]._version != before]
    # What is called so (`map_` raises no version), and what did so: `F.relu(weight, True)`, `F.embedding(max_norm=1)`.
    for handle in dict.fromkeys([*targets, *changed]):
        if isinstance(handle, AwayView):
            handle.streamer.forget(handle.weight)
            raise RuntimeError(_INTO_A_VIEW.format(func.__name__, handle.weight.name))
        handle.streamer.keep(handle.weight, loaded[id(handle.weight)])
    for handle in handles.values():
        handle.streamer.unload(handle.weight)
    if func in (Tensor.numpy, Tensor.__array__):  # a write would go unseen
        result = result.copy()
        result.flags.writeable = False
    elif isinstance(result, (list, tuple)) and any(isinstance(item, Tensor) for item in result):
        return type(result)(map(protect, result))
    return protect(result)


def _writes(name: str) -> bool:
    """Whether an operation of this name writes into its first argument: `add_`, `__iadd__`, `__setitem__`."""
    if name.startswith("__") and name.endswith("__"):
        return name == "__setitem__" or (
            name[2] == "i" and name not in ("__index__", "__int__", "__invert__", "__iter__")
        )
    return name.endswith("_")
