"""What the host computes within a CUDA graph: MLPs where they rest, with no Python of the model in between.

    GPU    ... attention --writes--> pinned RAM              pinned RAM --reads--> the next block ...
    CPU                                 |  the MLP, over its weights  ^

A graph may call the host: in its turn the driver runs a function, on a thread of its own, and what follows waits for
it. Hidden states are handed over in pinned RAM that kernels write and read; a copy engine would first finish the block
that it is bringing.

Leaves out: which MLPs these are (`on_cpu.py`), and what else is in a graph (`recording.py`, `captured.py`).
"""

from __future__ import annotations

import copy
import ctypes
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.ring import HUGE_PAGE, Slab
from ._torch import is_real_cuda
from .gather import seen_by_gpu
from .inference_only import HOOK_NAMES, HookedForward

_functions: dict[int, Callable[[], None]] = {}  # number of a call -> what it does; one that is gone does nothing
_numbers = count(1)


class HostCalls:
    """The calls of one graph. They end with this object, also those of replays that are under way.

    Attributes:
        errors: what they have raised.
    """

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self._own: list[int] = []
        weakref.finalize(self, _forget, self._own)

    def __bool__(self) -> bool:
        return bool(self._own)

    def add(self, function: Callable[[], None], device: torch.device) -> None:
        """Let the host call a function when the device's current stream, which is recorded, comes to this point."""
        errors = self.errors

        def guarded() -> None:
            try:
                function()
            except BaseException as error:  # for the thread that replays
                errors.append(error)

        number = next(_numbers)
        _functions[number] = guarded
        self._own.append(number)
        launch(number, device)

    def check(self) -> None:
        """Raise what a call has raised, once.

        Raises:
            RuntimeError: a call failed; what the graph computed since means nothing.
        """
        if self.errors:
            error, self.errors[:] = self.errors[0], []
            raise RuntimeError(
                f"the CPU's part of a decode step failed, and its tokens mean nothing: {error}"
            ) from error


def _forget(numbers: list[int]) -> None:
    for number in numbers:
        _functions.pop(number, None)


def call(number: int) -> None:
    """Do what a call does."""
    if (function := _functions.get(number)) is not None:
        function()


_called = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(call)  # never freed: a graph may be under way


def launch(number: int, device: torch.device) -> None:
    """Ask the driver for a call. `cuLaunchHostFunc`, which may be recorded.

    Raises:
        RuntimeError: the driver refuses.
    """
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    if code := _driver().cuLaunchHostFunc(stream, _called, ctypes.c_void_p(number)):
        raise RuntimeError(f"the driver does not let a graph call the host (error {code})")


@cache
def _driver() -> Any:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


# ---------------------------------------------------------------------------------------------------------------------
# While a graph is recorded

_this_thread = threading.local()


@contextmanager
def recording_calls(calls: HostCalls) -> Iterator[None]:
    """While this thread records a graph."""
    _this_thread.calls = calls
    try:
        yield
    finally:
        _this_thread.calls = None


def calls_now() -> HostCalls | None:
    """The calls of the graph that this thread records, if it does."""
    return getattr(_this_thread, "calls", None)


class Desk:
    """Pinned RAM in which a GPU and the CPU hand tensors to each other, one at a time each way.

    Args:
        device: the GPU, or what stands in for one.
        nbytes: of a tensor, at most.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self.most = max(nbytes, HUGE_PAGE // 2)
        self.given = torch.empty(0)  # what the device has given last
        self.slab = Slab(2 * self.most, pin=is_real_cuda(device))
        self.slab.pin()
        self.seen = seen_by_gpu(self.slab, device) if self.slab.pinned else self.slab.bytes

    def give(self, value: Tensor) -> Tensor:
        """Let the device write a tensor; the same on the CPU, once the device has come to this point."""
        torch.bitwise_or(value.contiguous().view(-1).view(torch.uint8), 0, out=self.seen[: value.nbytes])
        self.given = self.slab.bytes[: value.nbytes].view(value.dtype).view(value.shape)
        return self.given

    def place(self, like: Tensor) -> Tensor:
        """Where the CPU writes what the device is to read."""
        return self.slab.bytes[self.most : self.most + like.nbytes].view(like.dtype).view(like.shape)

    def take(self, like: Tensor) -> Tensor:
        """Let the device read what lies there, into memory of its own."""
        read = torch.bitwise_or(self.seen[self.most : self.most + like.nbytes], 0)
        return read.view(like.dtype).view(like.shape)


def alone(module: nn.Module) -> nn.Module:
    """A module's copy without bigkit's hooks, over the same weights.

    Raises:
        RuntimeError: it has a forward of its own, not that of its class.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        own = vars(part).get("forward")
        if (own.args[-1] if isinstance(own, HookedForward) else own) is not None:
            raise RuntimeError(f"a {type(part).__name__} that the CPU computes has a forward of its own")
        kept: list[Any] = [*part._parameters.values(), *part._buffers.values()]
        kept += [*part._forward_pre_hooks.values(), *part._forward_hooks.values()]
        memo |= {id(one): one for one in kept} | {id(vars(part)[own]): None for own in HOOK_NAMES if own in vars(part)}
    twin = copy.deepcopy(module, memo)
    for part in twin.modules():
        for own in HOOK_NAMES:
            vars(part).pop(own, None)
    return twin
