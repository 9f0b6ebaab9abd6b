"""Which kernel `scaled_dot_product_attention` is sent to on a GPU that is not there, and what PyTorch does around it.

Left alone, fake tensors take the slow path, which stores every score. So a mode, `AttentionChoice`, asks
`choose_kernel` which of the GPU's fused kernels takes these tensors, and runs it, or the slow path of real tensors.

Source: aten/src/ATen/native/transformers/attention.cpp and cuda/sdp_utils.cpp in PyTorch.

Leaves out: dropout, gradients, and the kernels' time (`machine/roofline.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..units import MiB
from ._torch import ATTENTION
from .recurrent import KINDS, run_recurrent

TILE = 128  # rows and columns of scores that fused kernels compute at once, and their narrowest head
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Target:
    """What code can ask of the GPU that is imagined.

    Args:
        capability: its compute capability: (9, 0) is Hopper, (8, 0) A100, (8, 9) Ada, (7, 5) T4.
        attention: the fused kernels of scaled_dot_product_attention, in the order in which PyTorch tries them.
        workspace: bytes that cuBLAS takes at the first matrix product on a device.
        processors: streaming multiprocessors, by which bitsandbytes chooses its kernels.
    """

    capability: tuple[int, int] = (9, 0)
    attention: tuple[str, ...] = ("cudnn", "flash", "efficient")
    workspace: int = 32 * MiB
    processors: int = 132


class Asked(NamedTuple):
    """The arguments of `F.scaled_dot_product_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def kernel(self, target: Target) -> str:
        """See `choose_kernel`."""
        return choose_kernel(target, *self[:4], self.is_causal, self.enable_gqa)


class Call(NamedTuple):
    """What attention was asked for.

    Args:
        tensors: (shape, strides, dtype) of query, key and value.
        mask: the same of what is added to the scores, or None.
        is_causal, scale, grouped: as `F.scaled_dot_product_attention` takes them.
    """

    tensors: tuple[Any, ...]
    mask: Any
    is_causal: bool
    scale: float | None
    grouped: bool

    @staticmethod
    def of(asked: Asked) -> Call:
        """From the arguments."""
        about = [one if one is None else (tuple(one.shape), one.stride(), one.dtype) for one in asked[:4]]
        return Call(tuple(about[:3]), about[3], asked.is_causal, asked.scale, asked.enable_gqa)


class AttentionChoice(TorchFunctionMode):
    """Sends attention and recurrent layers to the kernels that the target would choose, and new tensors to it.

    Args:
        target: the GPU that is imagined.
        alike: GPUs; those that would choose another kernel are taken out.
        note: runs a call of attention on a GPU, and notes where it lies among all that is done.
    """

    def __init__(
        self, target: Target, alike: set[Target] | None = None,
        note: Callable[[Tensor, Call, Callable[[], Tensor]], Tensor] = lambda query, call, run: run(),
    ) -> None:  # fmt: skip
        super().__init__()
        self.target, self.alike, self.note = target, set() if alike is None else alike, note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            asked = Asked(*args, **(kwargs or {}))
            own = asked.kernel(self.target)
            self.alike -= {other for other in self.alike if asked.kernel(other) != own}
            run = partial(attend, self.target, asked)
            return self.note(asked.query, Call.of(asked), run) if asked.query.is_cuda else run()
        if func in KINDS and args[0].is_cuda:
            return run_recurrent(func, *args)
        if func is Tensor.new_tensor:  # the C++ behind it asks for the GPU in use, which is always the first
            given = {name: value for name, value in (kwargs or {}).items() if value is not None}
            return torch.tensor(*args[1:], **{"device": args[0].device, "dtype": args[0].dtype, **given})
        return func(*args, **(kwargs or {}))


def attend(target: Target, asked: Asked) -> Tensor:
    """`F.scaled_dot_product_attention` as the target would run it, with the copies PyTorch makes around its kernels."""
    query, key, value, mask, dropout_p, is_causal, scale, enable_gqa = asked
    kernel = asked.kernel(target) if query.is_cuda else "math"
    if kernel == "math":
        return attend_by_hand(query, key, value, mask, is_causal, scale, enable_gqa)
    if kernel == "flash":
        width = query.shape[-1]
        if missing := -width % 8:
            scale = scale if scale is not None else 1 / math.sqrt(width)
            query, key, value = (F.pad(tensor, (0, missing)) for tensor in (query, key, value))
        out: Tensor = ATTENTION[kernel](query, key, value, dropout_p, is_causal, scale=scale)[0]
        return out[..., :width] if missing else out
    bias = None if mask is None else _bias(query, key, mask, kernel)
    out = ATTENTION[kernel](query, key, value, bias, False, dropout_p, is_causal, scale=scale)[0]
    return out


def attend_by_hand(
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
        mask = _as_bias(mask, query.dtype)
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

    Args:
        target: the GPU.
        query, key, value: (batch, heads, tokens, width).
        mask: added to the scores, or None.
        is_causal, enable_gqa: as for `F.scaled_dot_product_attention`.
    """
    widths = {tensor.shape[-1] for tensor in (query, key, value)}
    half = query.dtype in (torch.float16, torch.bfloat16) and target.capability >= (8, 0)
    grouped = query.shape[1] != key.shape[1]
    broadcast = query.shape[0] != key.shape[0] or (grouped and not enable_gqa)
    operands = (query, key, value) if mask is None else (query, key, value, mask)
    last_is_dense = all(tensor.stride(-1) == 1 or tensor.shape[-1] == 1 for tensor in operands)
    empty = 0 in (*query.shape, *key.shape)
    if query.dim() != 4 or broadcast or empty or not last_is_dense:
        return "math"
    square = not is_causal or query.shape[2] == key.shape[2]
    for kernel in target.attention:
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


def _bias(query: Tensor, key: Tensor, mask: Tensor, kernel: str) -> Tensor:
    """A mask as the kernels want it: floating, the last dimension a multiple of 16 in memory, one for each head."""
    if mask.dtype == torch.bool:
        mask = _as_bias(mask, query.dtype)
    if kernel == "efficient" and (missing := -mask.shape[-1] % 16):
        mask = F.pad(mask, (0, missing))[..., : mask.shape[-1]]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(mask, 0.0, torch.scalar_tensor(-math.inf, dtype=dtype, device=mask.device))


def attention_flops(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Operations of one fused attention, masked places counted: scores, and the sum of values. Heads may be grouped.

    Its kernels compute whole tiles of the scores, and heads that are narrow as if they were 128 wide. PyTorch's own
    formula counts neither, and refuses grouped heads before 2.13.

    >>> q = torch.empty(1, 2, 150, 128)
    >>> attention_flops(q, q, q) == 2 * 2 * 256 * 256 * (128 + 128)
    True
    """
    batch, heads, tokens, width = query.shape
    seen = key.shape[2]
    if tokens > 1:
        tokens, seen = (-(-count // TILE) * TILE for count in (tokens, seen))
    return 2 * batch * heads * tokens * seen * (max(width, TILE) + max(value.shape[-1], TILE))
