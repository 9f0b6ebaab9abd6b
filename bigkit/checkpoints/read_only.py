"""The weight of a layer that is stored in few bits, as others ask for it: decoded, and refusing to be written to.

Adapters read `layer.weight` (its dtype, the length of its rows), and merge themselves into it. What is decoded lies in
memory of its own, so a write would be lost without a word.

Leaves out: decoding itself (`codecs.py`).
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from ._torch import DisableTorchFunctionSubclass

_IN_PLACE = {f"__i{name}__" for name in "add sub mul truediv floordiv mod pow and or xor lshift rshift matmul".split()}


class ReadOnly(Tensor):
    """A tensor that is read as any other, and so are its views; what would write to it raises.

    >>> import torch
    >>> weight = ReadOnly.of(torch.ones(2, 3), "it is stored as fp8")
    >>> type(weight * 2).__name__, float(weight.sum())
    ('Tensor', 6.0)
    >>> weight.data += 1
    Traceback (most recent call last):
    RuntimeError: add_ would write to a weight of [2, 3], but it is stored as fp8
    """

    reason: str

    @staticmethod
    def of(tensor: Tensor, reason: str) -> Tensor:
        """The same tensor; itself if it has no values, on meta or in a dry run: there nothing can be lost.

        Args:
            tensor: any.
            reason: what ends the sentence "... would write to a weight of [4, 4], but ".
        """
        if tensor.is_meta or type(tensor) is not Tensor:
            return tensor
        own = tensor.as_subclass(ReadOnly)
        own.reason = reason
        return own

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, given, versions = kwargs or {}, list[ReadOnly](), list[tuple[Tensor, int]]()

        def plain(item: Any) -> Any:
            if isinstance(item, ReadOnly):
                given.append(item)
                tensor = item.as_subclass(Tensor)
                if not tensor.is_inference():  # that has no version
                    versions.append((tensor, tensor._version))
                return tensor
            return type(item)(map(plain, item)) if type(item) in (list, tuple) else item

        def read_only(item: Any) -> Any:
            if type(item) is Tensor and item.untyped_storage().data_ptr() in memory:
                return ReadOnly.of(item, given[0].reason)
            return type(item)(map(read_only, item)) if type(item) in (list, tuple) else item

        def refuse() -> NoReturn:
            what = "setting data" if func.__name__ == "__set__" else func.__name__
            raise RuntimeError(f"{what} would write to a weight of {[*given[0].shape]}, but {given[0].reason}")

        with DisableTorchFunctionSubclass():
            first = _writes(func.__name__) or kwargs.get("inplace")
            plain(next(iter([*args, *kwargs.values()])) if first else kwargs.get("out"))
            if given or func is Tensor.__dlpack__:
                given = given or [args[0]]
                refuse()
            result = func(*plain([*args]), **{name: plain(value) for name, value in kwargs.items()})
            if any(tensor._version != before for tensor, before in versions):  # `F.relu(weight, True)`
                refuse()
            if func in (Tensor.numpy, Tensor.__array__):
                result.flags.writeable = False
            memory = {item.untyped_storage().data_ptr() for item in given}
            return read_only(result)


def _writes(name: str) -> bool:
    """Whether an operation of this name writes to its first argument."""
    if name.startswith("__"):
        return name in ("__set__", "__setitem__") or name in _IN_PLACE
    return name.endswith("_")
