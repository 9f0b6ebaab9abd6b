"""What is private in PyTorch and dry runs need, in one place. Seen in PyTorch 2.11 and 2.15.

tests/dryrun/test_private_parts.py says which name is gone.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor  # the class of tensors without data
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # sees every operation
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
FAILURES = logging.getLogger("torch._subclasses.fake_tensor")  # prints a traceback for each error, which is raised too
without_modes = _disable_current_modes  # plain PyTorch within modes
plain_calls = torch._C.DisableTorchFunction  # within it no TorchFunctionMode is asked, which takes a while

ATTENTION = {  # the fused kernels of scaled_dot_product_attention, by the names that we give them
    "flash": aten._scaled_dot_product_flash_attention,
    "efficient": aten._scaled_dot_product_efficient_attention,
    "cudnn": aten._scaled_dot_product_cudnn_attention,
}
RECURRENT = aten._cudnn_rnn  # a whole LSTM, GRU or plain recurrent network
GROUPED_MM = aten._grouped_mm  # the products of all experts in one kernel
TO_COPY = aten._to_copy  # `tensor.to(...)`
UNSAFE_VIEW = aten._unsafe_view  # a view, in products of more than two dimensions
READ_VALUE = aten._local_scalar_dense  # `tensor.item()`
DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)  # raised where values are needed
# Operations by which Python asks for a value.
QUESTIONS = (READ_VALUE.default, aten.is_nonzero.default, aten.equal.default)
ASK_DEVICE = torch.ops.prim.device  # `tensor.device` of a fake tensor; a real one does not ask the dispatcher


class FakeTensors(FakeTensorMode):
    """PyTorch's mode, making constants as on a machine without a GPU; beside one they would be real tensors on it.

    `avoid_device_init` also gives a CUDA build on a machine without a GPU a device guard that does nothing.
    """

    avoid_device_init = True

    def on(self, device: torch.device, tensor: Tensor) -> Tensor:
        """A fake tensor that lies on a device as one without memory lies on the meta device; call it without modes."""
        return FakeTensor(self, tensor, device)


def packet_of(operation: Any) -> Any:
    """An operation without its overload: `aten.mm` of `aten.mm.default`."""
    return operation._overloadpacket


def flop_formula(packet: Any) -> Callable[..., int] | None:
    """PyTorch's own formula for what an operation computes, or None."""
    return flop_registry.get(packet)


def fake_device(tensor: Tensor) -> torch.device:
    """`tensor.device`; a fake tensor is not asked through the dispatcher, which takes a while."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


def storage_key(tensor: Tensor) -> int:
    """A number that the tensors of one storage share while it lives."""
    return tensor.untyped_storage()._cdata


@contextmanager
def lent_gpus(capability: Callable[[], tuple[int, int]]) -> Iterator[None]:
    """Within it PyTorch takes any `cuda:N` for a GPU of this capability and touches none. Other threads see it too."""
    with (
        _device_guard(),
        mock.patch("torch.cuda.get_device_capability", lambda device=None: capability()),
        mock.patch("torch.backends.cudnn.is_acceptable", lambda tensor: False),  # an LSTM would select the real GPU
        # With a real GPU in the machine PyTorch makes a real tensor there for each fake one.
        mock.patch("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None),
        mock.patch("torch.utils.swap_tensors", _swap),
    ):
        yield


_swap_real = torch.utils.swap_tensors


def _swap(parameter: Tensor, converted: Tensor) -> None:
    """For `Module.to`, which gives a parameter other data but swaps a fake one; that fails, for it is referred to."""
    if isinstance(parameter, FakeTensor):
        parameter.data = converted.data
    else:
        _swap_real(parameter, converted)


@contextmanager
def _device_guard() -> Iterator[None]:
    """Put the meta device's guard, which does nothing, in the place of CUDA's.

    Operations take a guard for the device of their tensors. A CUDA build without a GPU is given one by `FakeTensors`; a
    CPU build has none and raises; with a real GPU there is a real one, which knows no `cuda:7` on a machine with one.
    """
    if torch.version.cuda and not torch.cuda.is_available():
        yield
        return
    registry = device_guards()
    cuda, meta = 1, 14  # c10::DeviceType
    own, registry[cuda] = registry[cuda], registry[meta]
    try:
        yield
    finally:
        registry[cuda] = own


def device_guards() -> Any:
    """The registry of device guards: a plain table of pointers, indexed by device type.

    Raises:
        RuntimeError: it is not where it was in the versions that are known.
    """
    name = "_ZN3c104impl26device_guard_impl_registryE"
    for library in ("libc10.so", "libc10.dylib"):
        path = Path(torch.__file__).parent / "lib" / library
        if path.exists():
            try:
                return (ctypes.c_void_p * 16).in_dll(ctypes.CDLL(str(path)), name)
            except (OSError, ValueError):
                break
    raise RuntimeError(
        "fake GPUs need a CUDA device guard that does nothing, and none can be lent to this build of PyTorch: "
        "use a CUDA build on a machine without a GPU, or Linux"
    )
