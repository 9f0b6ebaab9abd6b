"""The values of small tensors in a run without data.

Nothing is computed on fake GPUs, but a model's Python asks for values: whether a mask is all ones (then attention needs
no mask, and takes another kernel), how many tokens a cache holds, whether the prompt is padded. Those follow from
shapes, masks, positions and token ids, not from weights. What needs no weight is computed beside the run, on the CPU.

Leaves out: all that depends on weights or random numbers, and large tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ._torch import QUESTIONS, FakeTensor, aten, packet_of, storage_key, without_modes
from .costs import tensors_in

MOST = 2**20  # elements of a tensor whose values are kept
EMPTY = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty}  # hold anything
SHAPE_ALONE = {aten.ones_like, aten.zeros_like, aten.full_like, aten.new_ones, aten.new_zeros, aten.new_full}


class KnownValues:
    """Computes small tensors that depend on no weight beside a fake run.

    >>> from bigkit.dryrun.fake_gpu import fake_gpus
    >>> with fake_gpus() as log:
    ...     mask = torch.ones(2, 3, dtype=torch.int64, device="cuda:0")
    ...     log.values.of(mask.sum())
    tensor(6)
    """

    def __init__(self) -> None:
        self.known: dict[int, tuple[Any, Any]] = {}  # key of a storage -> the same with data; watches for its end

    def of(self, tensor: Tensor) -> Tensor | None:
        """The tensor with its values, or None if they are not known."""
        if not isinstance(tensor, FakeTensor):
            return None if tensor.is_meta else tensor
        if (entry := self.known.get(storage_key(tensor))) is None:
            return None
        with without_modes():
            values = torch.empty(0, dtype=tensor.dtype)
            return values.set_(entry[0], tensor.storage_offset(), tensor.shape, tensor.stride())

    def answer(self, question: Any, tensors: Sequence[Tensor]) -> Any:
        """What one of `QUESTIONS` says about tensors; None if their values are not known."""
        values = [self.of(tensor) for tensor in tensors]
        with without_modes():
            return None if any(value is None for value in values) else question(*values)

    def take_for(self, tensor: Tensor, value: int) -> None:
        """Say that all values of a tensor are this number."""
        with without_modes():
            self._keep(tensor, torch.full(tensor.shape, value, dtype=tensor.dtype))

    def follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Compute what an operation computed, if its inputs are known; else forget what it changed."""
        outputs = list(tensors_in((result,)))
        changes = func._schema.is_mutable
        if not outputs or func in QUESTIONS or not (changes or all(map(_small, outputs))):
            return
        if packet_of(func) in SHAPE_ALONE:
            with without_modes():
                args = (torch.empty(args[0].shape, dtype=args[0].dtype), *args[1:])
        inputs = [*tensors_in(args), *tensors_in(kwargs.values())]
        known = all(self.of(tensor) is not None for tensor in inputs) and all(map(_small, outputs))
        known &= not changes or (bool(args) and isinstance(args[0], FakeTensor))  # real ones are changed once
        if known and packet_of(func) not in EMPTY and torch.Tag.nondeterministic_seeded not in func.tags:
            args, kwargs = tree_map(self._with_data, (args, dict(kwargs)))
            with without_modes(), torch.no_grad():
                computed = list(tensors_in((func(*args, **kwargs),)))
                for output, values in zip(outputs, computed):
                    self._keep(output, values)
        elif packet_of(func) is aten.histc:  # how many rows each expert is given: as many as any other
            rows, counts = args[0].numel(), outputs[0]
            with without_modes():
                ends = torch.arange(counts.numel() + 1) * rows // counts.numel()
                self._keep(counts, ends.diff().to(counts.dtype))
        elif changes:
            for tensor in inputs:
                self.known.pop(storage_key(tensor), None)

    def _keep(self, tensor: Tensor, values: Tensor) -> None:
        """Keep the values of a storage that is new; a view's are those of its base already."""
        key = storage_key(tensor)
        if key in self.known or not isinstance(tensor, FakeTensor):
            return
        layout = (tensor.shape, tensor.stride())
        if (values.shape, values.stride()) != layout or values.storage_offset() != tensor.storage_offset():
            values = torch.empty_strided(*layout, dtype=tensor.dtype).copy_(values)

        def gone(_: object, known: Any = self.known) -> None:
            known.pop(key, None)

        self.known[key] = values.untyped_storage(), weakref.ref(tensor.untyped_storage(), gone)

    def _with_data(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.of(value)
        return torch.device("cpu") if isinstance(value, torch.device) else value


def _small(tensor: Tensor) -> bool:
    return tensor.numel() <= MOST
