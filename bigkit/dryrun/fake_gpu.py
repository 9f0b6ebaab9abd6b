"""Fake GPUs: PyTorch code runs on `cuda:0`, `cuda:1`, ... that do not exist, and every byte and operation is noted.

Three layers, from the outside in:

    FakeTensorMode      PyTorch's own: tensors have shapes, dtypes and devices, but no data
    Attention           sends scaled_dot_product_attention to the kernel that the foretold GPU would choose; left alone,
                        fake tensors take the slow path, which stores every score
    Notebook            follows each storage from the operation that makes it to the moment its last tensor dies, and
                        counts what each operation computes and moves

Works with CUDA builds of PyTorch on machines without a GPU, and on Linux with any build: PyTorch is lent a device guard
that does nothing for the time of the run, in which no other thread should switch between real GPUs. Inference only.

Leaves out: what a run costs (`dryrun/run.py`), values (what depends on them raises PyTorch's
DataDependentOutputException), and memory that kernels take for themselves unless `_TEMPORARY` knows it.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..machine.allocator import Recording
from ..machine.roofline import MASKED, ODD, WAIT, Operation
from ..units import MiB

aten = torch.ops.aten


@dataclass(frozen=True)
class Target:
    """What the code can ask of the GPU that is foretold.

    Args:
        capability: its compute capability: (9, 0) is Hopper, (8, 0) A100, (8, 9) Ada, (7, 5) T4.
        attention: the fused kernels of scaled_dot_product_attention, in the order in which PyTorch tries them.
        workspace: bytes that cuBLAS takes at the first matrix product on a device.
        processors: streaming multiprocessors, by which bitsandbytes chooses its kernels.
    """

    capability: tuple[int, int] = (9, 0)
    attention: tuple[str, ...] = ("cudnn", "flash", "efficient")
    workspace: int = 32 * 2**20
    processors: int = 132


@dataclass
class Trace:
    """What a fake run did: for each device its allocations, and all operations in order.

    `kinds[device][k]` says what the k-th request (from 0) was for; `steps` are (name, number of operations up to its
    end); `unissued` counts what Python did since the last kernel that it launched: modules called, operations issued.
    """

    recordings: dict[str, Recording] = field(default_factory=dict)
    kinds: dict[str, list[str]] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)
    steps: list[tuple[str, int]] = field(default_factory=list)
    unissued: int = 0

    def mark(self, name: str) -> None:
        """Note the end of a step, on every device and among the operations."""
        for recording in self.recordings.values():
            recording.marks.append((name, len(recording.events)))
        self.steps.append((name, len(self.operations)))

    def request(self, device: str, size: int, kind: str) -> int:
        """Note a request; returns its number on the device, from 1."""
        recording = self.recordings.setdefault(device, Recording())
        kinds = self.kinds.setdefault(device, [])
        recording.events.append(size)
        kinds.append(kind)
        return len(kinds)

    def free(self, device: str, number: int) -> None:
        """Note that a request's memory is free again."""
        self.recordings[device].events.append(-number)


class Notebook(TorchDispatchMode):
    """Follows storages on fake GPUs, and counts operations.

    Args:
        trace: where everything is noted.
        target: the GPU that is foretold.

    `kind` names what new storages are for; `label` renames those of given tensors later.
    """

    def __init__(self, trace: Trace, target: Target) -> None:
        super().__init__()
        self.trace, self.target = trace, target
        self.kind = "activations"
        self.live: dict[int, tuple[str, int, weakref.ref[Any]]] = {}  # storage -> device, request, the storage itself
        self.warm: set[Any] = set()  # devices whose first matrix product has been
        self.kernels: Mapping[Any, Callable[..., Any]] = {}  # operations that are followed into their Python
        self.following = False
        self.quiet = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.quiet:
            return func(*args, **(kwargs or {}))
        if self.kernels and (followed := self._follow(func, args, kwargs or {})):
            return followed[0]
        if func in _COMPOSITE:
            with self:
                return func.decompose(*args, **(kwargs or {}))
        inputs = [*_tensors(args), *_tensors((kwargs or {}).values())]
        copied = 0
        if func is _LAYER_NORM and args[0].is_cuda and not args[0].is_contiguous():
            copied = self.trace.request(str(args[0].device), _bytes(args[0]), "workspace")
        result = self._run(func, args, kwargs or {})
        outputs = list(_tensors((result,)))
        if func is _CUDNN and not args[4]:
            outputs = outputs[:1]  # the log-sum-exp that the fake kernel gives is not computed without gradients
        for tensor in outputs:
            self.see(tensor)
        device = next((str(t.device) for t in (*outputs, *inputs) if t.is_cuda), None)
        if device is not None:
            self.take_workspace(device, func, args, outputs)
            if copied:
                self.trace.free(device, copied)
        self.count(func, inputs, outputs, args, kwargs or {}, result)
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is aten.view.default and not {1, -1}.isdisjoint(args[1]):
            old = args[0]
            return aten.as_strided.default(old, *view_of(tuple(old.shape), old.stride(), tuple(args[1])))
        if func is _GROUPED and args[0].dtype != torch.bfloat16:  # PyTorch 2.11 has fake ones of this dtype alone
            with self.silent(), self:
                return func(args[0].bfloat16(), args[1].bfloat16(), *args[2:], **kwargs).to(args[0].dtype)
        return func(*args, **kwargs)

    def _follow(self, func: Any, args: Any, kwargs: Any) -> tuple[Any] | None:
        """The result of an operation in `kernels`, whose own operations are noted; None for any other."""
        if func in _QUESTIONS and self.kind == "weights":  # the mean of scales, while a state dict is made
            return (0.0,)
        if func in _QUESTIONS and self.following:  # whether there are outliers: no
            self.wait(args[0].device)
            return (False,)
        if func not in self.kernels or not any(tensor.is_cuda for tensor in _tensors(args)):
            return None
        if self.kind != "weights":
            self.trace.unissued += INTO_PYTHON
        before, self.following = self.following, True
        try:
            with self:
                return (self.kernels[func](*args, **kwargs),)
        finally:
            self.following = before

    def wait(self, device: torch.device) -> None:
        """Note that Python asks for a value, and waits for the device to know it."""
        self.trace.operations.append(Operation(WAIT, str(device), 0, 0, "bool", self.trace.unissued + 1))
        self.trace.unissued = 0

    def kernel(self, name: str, tensors: Sequence[Tensor], flops: int, dtype: str = "") -> None:
        """Note a kernel that PyTorch does not know: it reads or writes each of these tensors once."""
        if self.kind != "weights":
            moved = sum(map(_bytes, tensors))
            dtype = dtype or next((str(t.dtype) for t in tensors if t.is_floating_point()), "float32")
            device = str(tensors[0].device)
            self.trace.operations.append(
                Operation(name, device, flops, moved, dtype.removeprefix("torch."), 1 + self.trace.unissued)
            )
            self.trace.unissued = 0

    def take_workspace(self, device: str, func: Any, args: Any, outputs: list[Tensor]) -> None:
        """Note what libraries take: for good at the first product, or for the time of one operation."""
        if func in _PRODUCTS and device not in self.warm:
            self.warm.add(device)
            if self.target.workspace:
                self.trace.request(device, self.target.workspace, "workspace")
        if func is _ADDMM and args[0].dim() == 1 and (device, func) not in self.warm and self.target.workspace:
            self.warm.add((device, func))
            self.trace.request(device, MiB, "workspace")  # of cuBLASLt, which adds the bias on the way
        if sizes := _TEMPORARY[func](args, outputs) if func in _TEMPORARY else ():
            numbers = [self.trace.request(device, size, "workspace") for size in sizes]
            for number in numbers:
                self.trace.free(device, number)

    def see(self, tensor: Tensor) -> None:
        """Note a storage that was not seen before."""
        if not tensor.is_cuda:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = storage.nbytes()
        if key in self.live or not size:
            return
        device = str(tensor.device)
        self.follow(tensor, device, self.trace.request(device, size, self.kind))

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Note nothing meanwhile."""
        self.quiet = True
        try:
            yield
        finally:
            self.quiet = False

    def follow(self, tensor: Tensor, device: str, number: int) -> None:
        """Note when the storage of a tensor, which is a request with this number, is free."""
        storage = tensor.untyped_storage()
        key = storage._cdata

        def gone(_: object, live: Any = self.live, trace: Trace = self.trace) -> None:
            if live.pop(key, None):
                trace.free(device, number)

        self.live[key] = device, number, weakref.ref(storage, gone)

    def label(self, tensors: Sequence[Tensor], kind: str) -> None:
        """Say what the storages of these tensors are for."""
        for tensor in tensors:
            if tensor.is_cuda and (found := self.live.get(tensor.untyped_storage()._cdata)):
                self.trace.kinds[found[0]][found[1] - 1] = kind

    def count(
        self, func: Any, inputs: list[Tensor], outputs: list[Tensor], args: Any, kwargs: Any, result: Any
    ) -> None:
        """Note what an operation computes and moves; a view does neither, but takes time to issue."""
        if self.kind == "weights" or func is _ASK:
            return
        self.trace.unissued += 1
        device = next((str(t.device) for t in (*outputs, *inputs) if t.is_cuda), None)
        if device is None or not outputs or func.is_view or func in _FREE:
            return
        packet = func._overloadpacket
        formula, met = flop_registry.get(packet), 0
        if packet in _ATTENTION:
            flops = attention_flops(*args[:3])
        else:
            flops = int(formula(*args, **kwargs, out_val=result)) if formula else 0
        if packet is aten._grouped_mm:  # each row meets one expert, by chance; one that no row meets is not read
            rows, experts = args[0].shape[0], args[1].shape[0]
            flops = 2 * rows * args[1].shape[1] * args[1].shape[2]
            met = round(_bytes(args[1]) * (1 - (1 - 1 / experts) ** rows))
            inputs = [args[0]]
        written = sum(map(_bytes, outputs))
        if packet in _GATHERS:
            read = written
        elif packet in _CREATES:
            read = 0
        else:
            read = sum(map(_bytes, inputs)) + met
        scattered, extra = _scattered(func, inputs, outputs[0])
        if packet in _BATCHED:  # what is repeated for each matrix is read again, unless the cache holds it
            extra = sum(t.nbytes - _bytes(t) for t in inputs if _bytes(t) > CACHE)
        dtype = str(outputs[0].dtype).removeprefix("torch.")
        name = str(packet).removeprefix("aten.")
        if packet in _ATTENTION and len(args) > 3 and isinstance(args[3], Tensor):
            name += MASKED
        if packet in _DENSE and outputs[0].element_size() == 2 and (outputs[0].shape[-1] | inputs[-1].shape[-2]) % 2:
            name += ODD
        moved = packet in _MOVES
        source = next((str(t.device) for t in inputs if t.device != outputs[0].device), "") if moved else ""
        parts = args[1].shape[0] if packet is aten._grouped_mm else 1
        issued = self.trace.unissued + 1 + _MORE_STEPS.get(packet, 0)  # and the launch
        self.trace.operations.append(
            Operation(
                name, device, flops, read + written + extra, dtype, issued, source, parts=parts, scattered=scattered
            )
        )
        self.trace.unissued = 0

    def call(self, *_: Any) -> None:
        """Note that a module is called."""
        self.trace.unissued += self.kind != "weights"


class Attention(TorchFunctionMode):
    """Sends scaled_dot_product_attention to the kernel that the target would choose."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target = target

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return attend(self.target, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def attend(
    target: Target,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` as the target would run it, with the copies PyTorch makes around its kernels.

    Source: aten/src/ATen/native/transformers/attention.cpp in PyTorch.
    """
    kernel = choose_kernel(target, query, key, value, attn_mask, is_causal, enable_gqa) if query.is_cuda else "math"
    if kernel == "flash":
        width = query.shape[-1]
        if rest := -width % 8:
            scale = scale if scale is not None else 1 / math.sqrt(width)
            query, key, value = (F.pad(tensor, (0, rest)) for tensor in (query, key, value))
        out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return out[..., :width] if rest else out
    if kernel in ("efficient", "cudnn"):
        bias = None if attn_mask is None else _bias(query, key, attn_mask, kernel)
        run = getattr(aten, f"_scaled_dot_product_{kernel}_attention")
        return run(query, key, value, bias, False, dropout_p, is_causal, scale=scale)[0]
    return _math(query, key, value, attn_mask, is_causal, scale, enable_gqa)


def _math(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, gqa: bool
) -> Tensor:
    """Attention from plain operations, in float32, as `_scaled_dot_product_attention_math` does it on real tensors.

    For fake ones PyTorch takes another way there, which holds other tensors at its peak.
    """
    dtype = query.dtype
    query, key, value = (tensor.float() if tensor.element_size() == 2 else tensor for tensor in (query, key, value))
    root = math.sqrt(abs(scale) if scale is not None else 1 / math.sqrt(query.shape[-1]))
    scaled = query * root
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, torch.scalar_tensor(-math.inf, dtype=query.dtype, device=query.device))
    if gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (tensor.repeat_interleave(groups, -3) for tensor in (key, value))
    scores = torch.matmul(scaled, key.transpose(-2, -1) * root)
    if mask is not None:
        scores.add_(mask)
    weights = _safe_softmax(scores)
    del scores
    low = weights.to(dtype)  # PyTorch returns it too
    out = torch.matmul(weights, value).to(dtype)
    del low
    return out


def _safe_softmax(scores: Tensor) -> Tensor:
    out = torch.softmax(scores, -1)
    rows = scores.eq(-math.inf).all(-1, keepdim=True)
    return out.masked_fill_(rows, 0.0)


def choose_kernel(
    target: Target, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> str:
    """ "flash", "efficient", "cudnn" or "math": the first of the target's kernels that takes these tensors.

    Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp in PyTorch.
    """
    widths = {tensor.shape[-1] for tensor in (query, key, value)}
    half = query.dtype in (torch.float16, torch.bfloat16) and target.capability >= (8, 0)
    grouped = query.shape[1] != key.shape[1]
    broadcast = query.shape[0] != key.shape[0] or (grouped and not enable_gqa)
    operands = (query, key, value) if mask is None else (query, key, value, mask)
    last_is_dense = all(tensor.stride(-1) == 1 or tensor.shape[-1] == 1 for tensor in operands)
    empty = 0 in (*query.shape, *key.shape)
    for kernel in target.attention:
        if query.dim() != 4 or broadcast or empty or not last_is_dense:
            break
        square = not is_causal or query.shape[2] == key.shape[2]
        if kernel == "flash" and half and mask is None and len(widths) == 1 and max(widths) <= 256 and square:
            return kernel
        if kernel == "efficient" and not grouped and query.shape[-1] == key.shape[-1]:
            kinds = (torch.float32, torch.float16) if target.capability < (8, 0) else _FLOATS
            step = 4 if query.dtype == torch.float32 else 8
            if query.dtype in kinds and all(width % step == 0 for width in widths):
                return kernel
        if kernel == "cudnn" and half and all(width % 8 == 0 for width in widths):
            if max(widths) <= (256 if target.capability[0] == 9 else 128) and key.shape[2] > 1 and square:
                return kernel
    return "math"


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _bias(query: Tensor, key: Tensor, mask: Tensor, kernel: str) -> Tensor:
    """A mask as the kernels want it: floating, the last dimension a multiple of 16 in memory, one for each head."""
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, torch.scalar_tensor(-math.inf, dtype=query.dtype, device=query.device))
    if kernel == "efficient" and (rest := -mask.shape[-1] % 16):
        mask = F.pad(mask, (0, rest))[..., : mask.shape[-1]]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def attention_flops(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Operations of one fused attention, masked places counted: scores, and the sum of values. Heads may be grouped.

    PyTorch's own formula refuses grouped heads before 2.13.
    """
    batch, heads, tokens, width = query.shape
    return 2 * batch * heads * tokens * key.shape[2] * (width + value.shape[-1])


@contextmanager
def fake_gpus(target: Target = Target()) -> Iterator[Notebook]:
    """Run the block on fake GPUs; tensors made in it have no data. Yields what notes the run.

    Raises:
        RuntimeError: this build of PyTorch has no CUDA device guard, and lending it one is not possible here.

    >>> with fake_gpus() as notes:
    ...     a = torch.empty(1000, 1000, device="cuda:3")
    ...     b = a @ a
    >>> notes.trace.recordings["cuda:3"].events, notes.trace.operations[-1].flops
    ([4000000, 4000000, 33554432], 2000000000)
    """
    trace = Trace()
    notes = Notebook(trace, target)
    with ExitStack() as stack:
        stack.callback(nn.modules.module.register_module_forward_pre_hook(notes.call).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(_device_guard())
        stack.enter_context(mock.patch("torch.cuda.get_device_capability", lambda device=None: target.capability))
        # With a real GPU in the machine PyTorch makes a real tensor there for each fake one.
        stack.enter_context(mock.patch("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None))
        stack.enter_context(_FakeTensors(allow_non_fake_inputs=True))
        stack.enter_context(Attention(target))
        stack.enter_context(notes)
        yield notes


class _FakeTensors(FakeTensorMode):
    """PyTorch's, making constants as on a machine without a GPU: else they are born real, on the GPU that is there."""

    avoid_device_init = True


# ---------------------------------------------------------------------------------------------------------------------
# What operations cost

_BATCHED = frozenset((aten.bmm, aten.baddbmm))
_DENSE = _BATCHED | {aten.mm, aten.addmm}
_PRODUCTS = frozenset(packet.default for packet in (*_DENSE, aten._grouped_mm))
_FREE = {
    aten._unsafe_view.default,
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.detach.default,
}
_MOVES = {aten._to_copy, aten.copy_}
_GATHERS = {aten.embedding, aten.index, aten.index_select, aten.gather, aten.slice_scatter}
_CREATES = {
    aten.empty, aten.zeros, aten.ones, aten.full, aten.arange, aten.randint, aten.empty_like, aten.zeros_like,
    aten.fill_, aten.zero_, aten.normal_, aten.scalar_tensor,
}  # fmt: skip

INTO_PYTHON = 6  # steps of the host for an operation that is written in Python: seen with bitsandbytes' for 4 bit
_MORE_STEPS = {  # seen on an H200, PyTorch 2.11: it prepares a list of products, in Qwen3-30B; cuDNN's, in ResNet-50
    aten._grouped_mm: 29,
    aten.convolution: 4,
}
_COPIES = _MOVES | {aten.clone}
SECTOR = 32  # bytes of a GPU's memory that are read at once
FEW_INPUTS = 64  # of a convolution's filter: ConvNeXt's first has 3 x 4 x 4
CACHE = 48 * MiB  # L2 of a large GPU

_ATTENTION = {getattr(aten, f"_scaled_dot_product_{kernel}_attention") for kernel in ("flash", "efficient", "cudnn")}

_CUDNN = aten._scaled_dot_product_cudnn_attention.default
_ADDMM = aten.addmm.default
_LAYER_NORM = aten.native_layer_norm.default  # copies what does not lie in one piece before it asks for its results
_GROUPED = aten._grouped_mm.default
_ASK = torch.ops.prim.device.default  # `tensor.device` of fake tensors; real ones do not ask the dispatcher
_COMPOSITE = (aten.linear.default, aten.matmul.default)  # reach a mode whole where a library's own operation calls them
_QUESTIONS = (aten._local_scalar_dense.default, aten.is_nonzero.default)


def _convolution_workspace(args: Any, outputs: list[Tensor]) -> Sequence[int]:
    """What cuDNN takes to lay images out with the channels last, as its 16-bit kernels want them.

    Input, result and filter, channels in eights; the filter alone if the images lie so; nothing if the filter is a
    point and each row of pixels can be taken as it is, or if it has few inputs. Source: seen with cuDNN 9.19 on an
    H200; met to the byte for ResNet-50 with 8 images and, within 200 bytes, for ConvNeXt.
    """
    image, weight, stride, groups = args[0], args[1], args[3], args[8]
    result = outputs[0]
    if image.element_size() != 2 or image.dim() != 4 or groups > 1 or math.prod(weight.shape[1:]) < FEW_INPUTS:
        return ()
    if image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous():
        return (weight.nbytes,) if weight.is_contiguous() and math.prod(weight.shape[2:]) > 1 else ()
    point = tuple(weight.shape[2:]) == (1, 1)
    if point and set(stride) == {1} and math.prod(image.shape[2:]) % 4 == 0:
        return ()
    eights = -(-image.shape[1] // 8) * 8
    filters = 0 if point else 2 * weight.shape[0] * eights * math.prod(weight.shape[2:])
    return (2 * image.shape[0] * eights * math.prod(image.shape[2:]) + 2 * result.numel() + filters + 16,)


_TEMPORARY: dict[Any, Callable[[Any, list[Tensor]], Sequence[int]]] = {  # operation -> what its kernel takes meanwhile
    aten.convolution.default: _convolution_workspace,
    _CUDNN: lambda args, outputs: (8, 8),  # seed and offset of a dropout that does not happen
}


@lru_cache(maxsize=4096)
def view_of(shape: tuple[int, ...], stride: tuple[int, ...], size: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Shape and strides of a view, as of a real tensor: fake ones give other strides to dimensions of size 1, and by
    those a batch of single tokens is multiplied as a matrix or as a batch.

    >>> view_of((8, 1, 32, 128), (4096, 128, 128, 1), (8, 1, 4096))
    ([8, 1, 4096], [4096, 4096, 1])
    """
    with no_dispatch():
        view = torch.empty_strided(shape, stride, device="meta").view(size)
    return list(view.shape), list(view.stride())


def _scattered(func: Any, inputs: Sequence[Tensor], output: Tensor) -> tuple[int, int]:
    """Elements that a pointwise operation, a copy or a `cat` takes one by one, and bytes that it reads beside its own:
    the rest of each sector of memory of which it needs one element.

    Source: TensorIterator in PyTorch, which vectorizes only what all of its tensors have in one order.
    """
    packet = func._overloadpacket
    if packet is aten.cat:
        whole = all(tensor.is_contiguous() for tensor in inputs)
        return (0 if whole else output.numel()), 0
    if torch.Tag.pointwise not in func.tags and packet not in _COPIES:
        return 0, 0
    operands = [tensor for tensor in inputs if tensor.numel() > 1]
    if all(tensor.shape == output.shape and tensor.stride() == output.stride() for tensor in operands):
        return 0, 0
    fastest = min(range(output.dim()), key=lambda i: (output.stride(i), output.shape[i] == 1), default=0)
    extra = 0
    for tensor in operands:
        i = fastest - output.dim() + tensor.dim()
        if i >= 0 and tensor.shape[i] > 1 and (step := tensor.stride(i)) > 1:
            extra += output.numel() * min(SECTOR, step * tensor.element_size()) - _bytes(tensor)
    return output.numel(), max(0, extra)


def _bytes(tensor: Tensor) -> int:
    """Bytes behind a tensor; what an expanded dimension repeats is counted once."""
    elements = math.prod(n for n, step in zip(tensor.shape, tensor.stride()) if step or n <= 1)
    return elements * tensor.element_size()


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


# ---------------------------------------------------------------------------------------------------------------------
# CPU builds of PyTorch


@contextmanager
def _device_guard() -> Iterator[None]:
    """Lend PyTorch a CUDA device guard that does nothing: the one of the meta device.

    Operations take a guard for the device of their tensors. A CUDA build without a GPU has one that does nothing; a CPU
    build has none and raises; with a real GPU there is a real one, which knows no `cuda:7` on a machine with one. The
    registry of guards is a plain table of pointers, indexed by device type.
    """
    if torch.version.cuda and not torch.cuda.is_available():
        yield
        return
    registry = _guards()
    cuda, meta = 1, 14  # c10::DeviceType
    kept, registry[cuda] = registry[cuda], registry[meta]
    try:
        yield
    finally:
        registry[cuda] = kept


def _guards() -> Any:
    from pathlib import Path

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
