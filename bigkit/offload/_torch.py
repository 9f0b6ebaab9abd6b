"""What the wing uses of PyTorch's private parts, in one place. Seen in torch 2.11 to 2.15."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..checkpoints._torch import DisableTorchFunctionSubclass as DisableTorchFunctionSubclass
from ..checkpoints._torch import detect_fake_mode as detect_fake_mode

Function = TypeVar("Function", bound=Callable[..., Any])

# What lies in nested lists, tuples, dicts and outputs of Transformers; a copy in which what has some type is replaced;
# their leaves and structure, and the way back. `torch.utils._pytree`, 2.11 to 2.15.
tree_leaves: Callable[[Any], list[Any]] = pytree.tree_leaves
tree_map_only: Callable[[Any, Callable[[Any], Any], Any], Any] = pytree.tree_map_only
tree_flatten: Callable[[Any], tuple[list[Any], Any]] = pytree.tree_flatten
tree_unflatten: Callable[[list[Any], Any], Any] = pytree.tree_unflatten


def storage_id(tensor: Tensor) -> int:
    """The same number for all tensors that share memory. `UntypedStorage._cdata`, 2.11 to 2.15."""
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:  # a tensor of `torch.func`, around another
        return 0


def state_of(tensor: Tensor) -> tuple[int, int] | None:
    """What changes when a tensor is written to or given other data; None if nothing would tell (`inference_mode`)."""
    return None if tensor.is_inference() else (tensor._version, storage_id(tensor))


def storage_users(tensor: Tensor) -> int:
    """How many tensors share a tensor's memory, and a constant. `torch._C._storage_Use_Count`, 2.11 to 2.15."""
    users: int = torch._C._storage_Use_Count(storage_id(tensor))
    return users


def make_subclass(cls: type, data: Tensor, requires_grad: bool) -> Any:
    """A tensor of class `cls` with the data of another, as a new leaf. `Tensor._make_subclass`, 2.11 to 2.15."""
    return Tensor._make_subclass(cls, data, requires_grad)


def mark_parameter(tensor: Tensor) -> None:
    """Let a tensor of any class count as an `nn.Parameter` for `isinstance`. `_is_param`, 2.11 to 2.15."""
    tensor._is_param = True


def real_tensors() -> AbstractContextManager[Any]:
    """Context in which new tensors are real, also in a dry run. `unset_fake_temporarily`, 2.11 to 2.15."""
    if detect_fake_mode() is None:
        return nullcontext()
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor is one of a dry run, without data. `FakeTensor.fake_mode`, 2.11 to 2.15."""
    return hasattr(tensor, "fake_mode")


def is_real_cuda(device: torch.device) -> bool:
    """Whether a device is a CUDA GPU that exists, not one of a dry run."""
    return device.type == "cuda" and detect_fake_mode() is None


def held_by_this_thread(lock: threading.RLock) -> bool:
    """Whether this thread has acquired a lock. `RLock._is_owned` of Python, on which `threading.Condition` rests."""
    held: bool = lock._is_owned()  # type: ignore[attr-defined]
    return held


def pop_saved_tensors_hooks(is_ours: Callable[[Any], bool]) -> None:
    """End the innermost `saved_tensors_hooks` of this thread, as long as `is_ours(pack_hook)`.

    Those that an interrupt left behind can be ended in no public way: their context manager may not exist yet.
    `torch._C._autograd._top_saved_tensors_default_hooks` and `_pop_...`, 2.11 to 2.15.
    """
    while (hooks := torch._C._autograd._top_saved_tensors_default_hooks(False)) is not None and is_ours(hooks[0]):
        torch._C._autograd._pop_saved_tensors_default_hooks()


def in_functional_call() -> bool:
    """Whether this thread is in a `torch.func.functional_call`. `torch.nn.utils.stateless`, 2.11 to 2.15."""
    code = torch.nn.utils.stateless._functional_call.__code__
    frame = sys._getframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


_PROXY = torch._C._TorchDispatchModeKey.PROXY


def is_traced() -> bool:
    """Whether operations are being recorded: by `torch.jit.trace`, or for `torch.export` and `make_fx`.

    `torch._C._get_tracing_state`, `_get_dispatch_mode` and its key `PROXY`, 2.11 to 2.15.
    """
    if torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None:
        return True
    return torch._C._get_dispatch_mode(_PROXY) is not None


def never_compiled(function: Function, *, with_callees: bool = True) -> Function:
    """Make `torch.compile` leave a function alone, and with `with_callees` all that it calls.

    What `torch.compiler.disable` does, without a wrapper for each call and without importing the compiler.
    `_torchdynamo_disable` and `torch._C._dynamo.eval_frame`, 2.11 to 2.15.
    """
    vars(function)["_torchdynamo_disable"] = True
    with suppress(AttributeError, RuntimeError):  # a Python for which torch has no compiler
        compiler = torch._C._dynamo.eval_frame
        skip, default = compiler._FrameAction.SKIP, compiler._FrameAction.DEFAULT
        strategy = compiler._FrameExecStrategy(skip, skip if with_callees else default)
        compiler.set_code_exec_strategy(function.__code__, strategy)
    return function


def _lent_data(tensor: Tensor) -> Tensor:
    return tensor.detach()


def _set_lent_data(tensor: Tensor, value: Tensor) -> None:
    if value.shape != tensor.shape or value.dtype != tensor.dtype:
        raise ValueError(
            f"a weight of shape {tuple(tensor.shape)} {tensor.dtype} that is lent to a forward cannot become "
            f"{tuple(value.shape)} {value.dtype} there: assign it between forwards"
        )
    tensor.detach().copy_(value)


def _lent_detached(tensor: Tensor) -> Tensor:
    detached = Tensor.detach(tensor)
    if type(detached) is Tensor:
        detached.__class__ = LentBuffer
    return detached


def _read_only(read: Callable[..., Any]) -> Any:
    def array(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As of any tensor, but what would write to it raises."""
        values = read(tensor, *args, **kwargs)
        values.flags.writeable = False
        return values

    return array


class LentParameter(nn.Parameter):
    """A parameter that is lent to a forward. Writing to its `data` raises `_version`, so that no write goes unseen;
    numpy's arrays over it, of which none would be seen, are read-only.
    """

    data = property(_lent_detached, _set_lent_data)
    detach = _lent_detached
    numpy, __array__ = _read_only(Tensor.numpy), _read_only(Tensor.__array__)


class LentBuffer(Tensor):
    """A buffer that is lent to a forward; as `LentParameter`. `_disabled_torch_function_impl`, 2.11 to 2.15."""

    data = property(_lent_detached, _set_lent_data)
    detach = _lent_detached
    numpy, __array__ = _read_only(Tensor.numpy), _read_only(Tensor.__array__)
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def mark_lent(tensor: Tensor) -> None:
    """Give a plain parameter or buffer the class above by assigning `__class__`, which torch allows, 2.11 to 2.15."""
    if type(tensor) is nn.Parameter:
        tensor.__class__ = LentParameter
    elif type(tensor) is Tensor:
        tensor.__class__ = LentBuffer


def _set_watched_data(tensor: Tensor, value: Tensor) -> None:
    Tensor.data.__set__(tensor, value)  # type: ignore[attr-defined]
    torch.autograd.graph.increment_version(tensor)


class WatchedParameter(nn.Parameter):
    """A parameter in which writing to its `data`, or setting them, raises `_version`."""

    data = property(_lent_data, _set_watched_data)


class WatchedBuffer(Tensor):
    """A buffer of that kind; copied and pickled it is a plain one."""

    data = property(_lent_data, _set_watched_data)
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return memo.setdefault(id(self), self.as_subclass(Tensor).clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def watch_writes(tensor: Tensor) -> bool:
    """Let every write to a tensor raise its `_version`, as `mark_lent` does; False where there is no way."""
    if type(tensor) in (nn.Parameter, Tensor) and not tensor.is_inference():
        tensor.__class__ = WatchedParameter if isinstance(tensor, nn.Parameter) else WatchedBuffer
    return isinstance(tensor, (WatchedParameter, WatchedBuffer)) or is_fake(tensor)


def stop_watching(tensor: Tensor) -> None:
    """End what `watch_writes` began."""
    if isinstance(tensor, (WatchedParameter, WatchedBuffer)):
        tensor.__class__ = nn.Parameter if isinstance(tensor, WatchedParameter) else Tensor  # type: ignore[assignment]


def end_failed_capture(pool: Any, device: torch.device) -> None:
    """Undo what a capture that could not end leaves behind: new memory goes to its pool, random numbers are refused.

    `torch._C._cuda_endAllocateToPool`, 2.11 to 2.15, which raises if the capture did end; an empty capture lets go of
    the numbers.
    """
    with suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(device.index or 0, pool)
    with suppress(RuntimeError), torch.cuda.device(device):
        number, empty = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
        with torch.cuda.graph(empty, capture_error_mode="thread_local"):
            number.add_(1)
