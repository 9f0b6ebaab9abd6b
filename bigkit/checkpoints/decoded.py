"""Stacked weights that are decoded when they are used: those of chosen experts, or a few experts at a time.

A token takes some experts, `gate_up_proj[chosen]`, and these are decoded. A prompt takes nearly all of them, in one
grouped product. Decoded at once they would take two to four times as much as they are stored in (11 GB for a block of
DeepSeek-V3), so that product is taken apart: some experts are decoded, multiplied with the rows of their tokens, and
let go. Each expert's product is the same one as before.

Leaves out: which modules hold such weights (`as_stored.py`), and the formats (`codecs.py`).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..model.stored import AT_A_TIME
from .ahead import decoded_in_turn
from .codecs import Parts, StackCodec

PLAIN = StackCodec("plain", ("",), lambda parts, dtype: parts[""])  # weights that need no decoding


class Elsewhere:
    """Stands for a tensor (experts, ...) of a stack that is not on the device: chosen experts of it can be had there.

    Args:
        shape, dtype: the tensor's.
        device: where it is wanted.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = torch.Size(shape), dtype, device

    @property
    def recorded(self) -> list[int] | None:
        """In a dry run, the experts that the work under way has chosen, if they were recorded once."""
        return None

    def take(self, parts: Mapping[str, Any], experts: Any) -> dict[str, Tensor]:
        """Some experts of all tensors of a stack, of which this is one; they may be read until others are taken."""
        raise NotImplementedError


class DecodedStack:
    """Stands for a weight (experts, rows, columns) in the code of Transformers.

    Args:
        parts: suffix -> tensor as it is stored, (experts, ...), or `Elsewhere`.
        codec, dtype: what they are decoded by, and to.
        form: (rows, columns) of an expert's weight.
        transposed: whether rows and columns are exchanged when it is used.
        of: the module that has it, and its name there.

    >>> from .codecs import find_stack_codec
    >>> codec = find_stack_codec("w", ["w_int8", "w_scb"])
    >>> parts = {"_int8": torch.full((3, 2, 4), 127, dtype=torch.int8), "_scb": torch.ones(3, 2)}
    >>> stack = DecodedStack(parts, codec, torch.float32, (2, 4)).transpose(1, 2)
    >>> stack.shape, stack[torch.tensor([0, 2])].shape
    (torch.Size([3, 4, 2]), torch.Size([2, 4, 2]))
    """

    def __init__(
        self, parts: Parts, codec: StackCodec, dtype: torch.dtype, form: tuple[int, ...], transposed: bool = False,
        of: tuple[nn.Module, str] | None = None,
    ) -> None:  # fmt: skip
        self.parts, self.codec, self.dtype, self.form = parts, codec, dtype, form
        self.transposed, self.of = transposed, of
        first = next(iter(parts.values()))
        self.shape = torch.Size((first.shape[0], *(form[::-1] if transposed else form)))
        self.device, self.ndim = first.device, 3

    def __getitem__(self, experts: Any) -> Tensor:
        if isinstance(experts, int):
            return self[experts : experts + 1 or None][0]
        if isinstance(experts, Tensor) and experts.ndim == 0:
            return self[experts[None]][0]
        first: Any = next(iter(self.parts.values()))
        if isinstance(first, Elsewhere):
            weights = self.codec.decode(first.take(self.parts, experts), self.dtype)
        elif isinstance(experts, Tensor) and len(experts) > len(first):
            return self.all()[experts]  # some are chosen several times, and decoded once
        else:
            weights = self._chosen(experts)
        return weights.transpose(-2, -1) if self.transposed else weights

    def _chosen(self, experts: Any) -> Tensor:
        real = isinstance(experts, Tensor) and not hasattr(experts, "fake_mode")
        if self.of is None or not real or not self.codec.reads_in_place(self.parts):
            return self.codec.chosen(self.parts, experts, self.dtype)
        module, name = self.of

        def decode(own: str) -> Tensor:
            stack = self if own == name else getattr(module, own)
            weights: Tensor = stack.codec.chosen(stack.parts, experts, stack.dtype)
            return weights

        return decoded_in_turn(module, name, experts, decode)

    def all(self) -> Tensor:
        """The whole weight."""
        return self[:]

    def transpose(self, first: int, second: int) -> Any:
        """The same with two dimensions exchanged."""
        if {first % 3, second % 3} != {1, 2}:
            return self.all().transpose(first, second)
        return DecodedStack(self.parts, self.codec, self.dtype, self.form, not self.transposed, self.of)

    def data_ptr(self) -> int:
        """An aligned address, as decoded weights have one."""
        return 0

    def size(self, dim: int | None = None) -> Any:
        """Its shape, or one dimension of it."""
        return self.shape if dim is None else self.shape[dim]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("parts", "codec"):
            raise AttributeError(name)
        if name == "data" or name.endswith("_"):
            raise RuntimeError(
                f"a forward writes to stacked experts ({name!r}) that are decoded or brought a few at a time, and it "
                "would be lost: change them between forwards"
            )
        return getattr(self.all(), name)

    def grouped_mm(self, x: Tensor, ends: Tensor, product: Callable[..., Tensor]) -> Tensor:
        """Multiply each expert with the rows of its tokens.

        Args:
            x: (rows, in), the first expert's rows first.
            ends: (experts,), where each expert's rows end.
            product: what multiplies a weight (some experts, in, out).

        Returns:
            (rows, out); rows that belong to no expert hold nothing.
        """
        first: Any = next(iter(self.parts.values()))
        elsewhere = isinstance(first, Elsewhere)
        more = 2 if not elsewhere and self.codec.reads_in_place(self.parts) else 1  # it makes no copies
        count, step = self.shape[0], max(1, more * AT_A_TIME // max(1, math.prod(self.form)))
        if step >= count and not elsewhere:
            return product(x, self.all(), offs=ends)
        bounds = [0, *_numbers(ends, x.shape[0], getattr(first, "recorded", None))]
        chosen = [expert for expert in range(count) if bounds[expert + 1] > bounds[expert]]
        # Not `of` a module: of pieces, nothing that follows is decoded ahead.
        stack = self if elsewhere else DecodedStack(self.parts, self.codec, self.dtype, self.form, self.transposed)
        out = x.new_empty(x.shape[0], self.shape[2])
        for begin in range(0, len(chosen), step):
            some = chosen[begin : begin + step]
            rows = slice(bounds[some[0]], bounds[some[-1] + 1])  # those between have none
            neighbours = some[-1] - some[0] < len(some)
            where = slice(some[0], some[-1] + 1) if neighbours else torch.tensor(some, device=x.device)
            chosen_here = some if elsewhere and not neighbours else where
            # Without a name: the next piece must not be decoded while this one is held.
            out[rows] = product(x[rows], stack[chosen_here], offs=ends[where] - rows.start)
        return out

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "grouped_mm" in getattr(function, "__name__", str(function)) and isinstance(args[1], DecodedStack):
            ends = kwargs["offs"] if "offs" in kwargs else args[2]
            return args[1].grouped_mm(args[0], ends, function)
        plain = [argument.all() if isinstance(argument, DecodedStack) else argument for argument in args]
        return function(*plain, **kwargs)


_asked: tuple[Any, int, list[int]] = (lambda: None, 0, [])  # the last tensor of ends, its version and its numbers


def _numbers(ends: Tensor, rows: int, recorded: list[int] | None) -> list[int]:
    """Where each expert's rows end; in a dry run, where nobody chooses, as recorded or as if all had as many.

    Both products of a block have the same ends: the host waits for the GPU once.
    """
    global _asked
    if hasattr(ends, "fake_mode"):
        if recorded is not None and len(recorded) == rows:
            return [sum(one <= expert for one in recorded) for expert in range(len(ends))]
        return [rows * (expert + 1) // len(ends) for expert in range(len(ends))]
    tensor, version, numbers = _asked
    if ends.is_inference():
        return [int(end) for end in ends.tolist()]
    if tensor() is not ends or version != ends._version:
        numbers = [int(end) for end in ends.tolist()]
        _asked = weakref.ref(ends), ends._version, numbers
    return numbers
