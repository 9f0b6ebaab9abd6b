"""What an operation on a fake GPU costs: what it computes, what it reads and writes, what its kernel takes meanwhile.

    cost_of             an operation as `Operation`, whose time a roofline says
    kernel_workspaces   bytes that its kernel takes for itself while it runs

Leaves out: time (`machine/roofline.py`), and bitsandbytes' kernels (`fake_bnb.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..machine.roofline import Operation
from ..model.experts import visited
from ._torch import ATTENTION, GROUPED_MM, TO_COPY, UNSAFE_VIEW, aten, fake_device, flop_formula, packet_of
from .attention import TILE, attention_flops

PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, GROUPED_MM}
COPIES = {TO_COPY, aten.copy_, aten.clone}
# These read as much as they write, and each byte of a table at most once.
LOOKUPS = {aten.embedding, aten.index, aten.index_select, aten.gather, aten.slice_scatter}
# These write what they are given into a few rows of a tensor: operation -> which argument that is.
PUTS = {aten.index_put_: 2, aten.index_copy_: 3}
_NAMES = "empty zeros ones full arange randint empty_like zeros_like fill_ zero_ normal_ scalar_tensor"
CREATORS = {getattr(aten, name) for name in _NAMES.split()}  # read nothing
NORMS = {aten.native_layer_norm, aten._fused_rms_norm}
TOPK = 12  # elements taken one by one for each that is compared; its result has indices of 8 bytes
ROW = 400  # elements (of 16 bits) that an H200 would take one by one in the time in which it normalizes a short row
CACHE = 50 * 10**6  # bytes of Hopper's L2: a matrix that all products of a batch share is read once if it fits
# Bytes that a GPU reads at once, whoever needs fewer, from its memory and from its cache; and how long the cache takes
# for each byte, of what memory takes: copies of 2 to 32 heads that lay innermost, and of keys of 128, on an H200.
FETCH, SECTOR, CACHED = 64, 32, 0.75
GATHERED = 200  # elements (of 16 bits) that an H200 would take one by one in the time of a short row of a table
FEW_INPUTS = 64  # of a convolution's filter: ConvNeXt's first has 3 x 4 x 4
WITHOUT_KERNEL = {UNSAFE_VIEW, aten.detach, aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty}


def cost_of(
    func: Any, args: Any, kwargs: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor], result: Any
) -> Operation | None:
    """An operation as a cost, or None if no kernel runs: it is a view, makes an empty tensor, or no GPU takes part.

    Args:
        func: as PyTorch's dispatcher calls it.
        args, kwargs: its arguments.
        inputs, outputs: the tensors in them, and in its result.
        result: what it returned.
    """
    packet = packet_of(func)
    if not outputs or func.is_view or packet in WITHOUT_KERNEL or (device := device_of(outputs, inputs)) is None:
        return None
    output, issued = outputs[0], 1  # the launch
    read, written = sum(map(dense_bytes, inputs)), sum(map(dense_bytes, outputs))
    if packet in LOOKUPS:
        read = min(read, written)
    elif packet in CREATORS:
        read = 0
    elif packet in PUTS and args[PUTS[packet]].numel() > 1:
        read, written = read - dense_bytes(args[0]), dense_bytes(args[PUTS[packet]])
    elif packet in (aten.bmm, aten.baddbmm):
        read = sum(map(_read_in_a_batch if not args[-2].is_contiguous() else dense_bytes, inputs))
    elif packet is GROUPED_MM:
        read = dense_bytes(args[0]) + _bytes_of_chosen_experts(args[0], args[1])
    elif in_parallel(func):
        read = sum(_read_in_order_of(output, tensor) for tensor in inputs)
        read += 2 * dense_bytes(output) if packet is aten.masked_fill else 0  # it copies, and fills the copy
    source = ""
    if packet in COPIES:
        place = fake_device(output)
        source = next((str(fake_device(tensor)) for tensor in inputs if fake_device(tensor) != place), "")
    name, dtype = str(packet).removeprefix("aten."), str(output.dtype).removeprefix("torch.")
    flops, scattered = _flops(func, args, kwargs, result), _scattered(func, packet, inputs, output)
    return Operation(name, device, flops, read + written, dtype, issued, source, scattered=scattered)


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Floating-point operations: PyTorch's formula where it has one that fits, else our own, else 0."""
    packet = packet_of(func)
    if packet in ATTENTION.values():
        return attention_flops(*args[:3])
    if packet is GROUPED_MM:  # each row meets one expert, and each expert computes whole tiles
        rows, (experts, width, result_width) = args[0].shape[0], args[1].shape
        met = _chosen(rows, experts)
        return 2 * round(met * TILE * math.ceil(rows / met / TILE) * width * result_width)
    formula = flop_formula(packet)
    return int(formula(*args, **kwargs, out_val=result)) if formula else 0


def _read_in_a_batch(operand: Tensor) -> int:
    """Bytes of an operand that the products of a batch read: a large one that they share is read by each.

    So the logits of the last tokens of 32 prompts, a strided view, cost as much as the head's weights 32 times. Rows
    that lie in one piece are not meant: PyTorch makes one product of them, although fake ones may not look like it.
    """
    dense = dense_bytes(operand)
    return dense if dense <= CACHE else operand.numel() * operand.element_size()


def in_parallel(func: Any) -> bool:
    """Whether it is a pointwise operation or a copy; some of `masked_fill`'s have no tag."""
    packet = packet_of(func)
    return torch.Tag.pointwise in func.tags or packet in COPIES or packet in (aten.masked_fill, aten.masked_fill_)


def _read_in_order_of(output: Tensor, operand: Tensor) -> int:
    """Bytes that a kernel reads of an operand if it goes through all elements in the order of its result.

    Neighbours that lie apart come with what lies between. That is in the cache still when it is needed, unless more
    than it holds has been read by then: so T5's bias, whose 16 heads lie innermost, is read 16 times by attention,
    which takes head after head. Source: CUDA C++ Programming Guide, "Device memory accesses" and `cudaLimit`'s
    granularity of fetches.
    """
    lead, size = output.dim() - operand.dim(), operand.element_size()
    steps = [(output.stride(lead + i), operand.stride(i)) for i in range(operand.dim()) if operand.shape[i] > 1]
    innermost = min((own for own, n in zip(output.stride(), output.shape) if n > 1), default=1)
    apart = size * max((theirs for own, theirs in steps if own == innermost), default=0)
    again = next((own for own, theirs in steps if theirs == 1), output.numel())
    gone = again * min(FETCH, apart) > CACHE
    each = min(FETCH, apart) if gone else CACHED * min(SECTOR, apart)
    return dense_bytes(operand) if apart <= size else max(dense_bytes(operand), round(each * output.numel()))


def _bytes_of_chosen_experts(rows: Tensor, experts: Tensor) -> int:
    """Bytes of the experts that some row meets, by chance; one that no row meets is not read."""
    count = experts.shape[0]
    return round(dense_bytes(experts) * _chosen(rows.shape[0], count) / count)


def _chosen(rows: int, experts: int) -> float:
    """How many of the experts some row meets, by chance."""
    return experts * visited(rows, 1, experts)


def _scattered(func: Any, packet: Any, inputs: Sequence[Tensor], output: Tensor) -> int:
    """Elements that a pointwise operation, a copy, a `cat` or a norm of short rows takes one by one.

    Source: TensorIterator in PyTorch, which vectorizes only what all of its tensors have in one order; the factors are
    of kernels on an H200 (`roofline.Typical`).
    """
    if packet is aten.cat:  # a cache that is empty yet counts as one that lies otherwise
        slow = any(not tensor.is_contiguous() or not tensor.numel() for tensor in inputs)
        return 2 * output.numel() if slow else 0
    if packet in NORMS:  # one block of threads for each row, after a copy of what does not lie in one piece
        rows = output.numel() // max(1, output.shape[-1])
        return ROW * rows + (0 if inputs[0].is_contiguous() else output.numel())
    if packet in (aten.embedding, aten.index_select):  # one block of threads for each row
        return GATHERED * output.numel() // max(1, output.shape[-1])
    if packet is aten.topk:
        return TOPK * inputs[0].numel()
    if not in_parallel(func):
        return 0
    if packet is aten.masked_fill_:
        return 0 if inputs[1].shape == output.shape else output.numel()
    operands = [tensor for tensor in inputs if tensor.numel() > 1]
    if packet is aten.masked_fill and operands and operands[-1].shape != output.shape:
        return output.numel() * 3 // 2  # copies first
    in_one_order = all(tensor.shape == output.shape and tensor.stride() == output.stride() for tensor in operands)
    if in_one_order and packet is TO_COPY and inputs[0].dtype != output.dtype:
        return 0 if inputs[0].dtype == torch.float32 else output.numel() * 6 // 10  # not vectorized, but in order
    return 0 if in_one_order else output.numel()


def kernel_workspaces(func: Any, args: Any, outputs: Sequence[Tensor]) -> Sequence[int]:
    """Bytes of each request that a kernel makes for itself, and gives back when it is done."""
    packet = packet_of(func)
    if packet is ATTENTION["cudnn"]:
        return 8, 8  # seed and offset of a dropout that does not happen
    if packet is aten.convolution:
        return _convolution_workspace(args, outputs[0])
    return ()


def _convolution_workspace(args: Any, result: Tensor) -> Sequence[int]:
    """What cuDNN takes to lay 16-bit images out with the channels last, as its kernels want them.

    Input, result and filter, channels in eights; nothing if the images lie so, if the filter has few inputs, or if it
    is a point and each row of pixels can be taken as it is. Source: seen with cuDNN 9.19 on an H200; equal to the byte
    for ResNet-50, and to the nearest segment for ConvNeXt.
    """
    image, weight, stride, groups = args[0], args[1], args[3], args[8]
    if image.element_size() != 2 or image.dim() != 4 or groups > 1 or not image.is_contiguous():
        return ()
    if math.prod(weight.shape[1:]) < FEW_INPUTS:
        return ()
    point = tuple(weight.shape[2:]) == (1, 1)
    if point and set(stride) == {1} and math.prod(image.shape[2:]) % 4 == 0:
        return ()
    eights = -(-image.shape[1] // 8) * 8
    filters = 0 if point else weight.shape[0] * eights * math.prod(weight.shape[2:])
    elements = image.shape[0] * eights * math.prod(image.shape[2:]) + result.numel() + filters
    return (2 * elements + 16,)


def device_of(*groups: Sequence[Tensor]) -> str | None:
    """The first fake GPU among tensors, such as "cuda:0"."""
    return next((str(fake_device(tensor)) for tensors in groups for tensor in tensors if tensor.is_cuda), None)


def dense_bytes(tensor: Tensor) -> int:
    """Bytes behind a tensor; what an expanded dimension repeats is counted once."""
    elements = math.prod(n for n, step in zip(tensor.shape, tensor.stride()) if step or n <= 1)
    return elements * tensor.element_size()


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors among arguments or results, lists and tuples looked into."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)
