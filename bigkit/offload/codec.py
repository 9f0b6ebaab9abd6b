"""How tensors that are made of several plain ones are taken apart, and put together again around other memory.

A plain tensor is one part, itself. A quantized weight has several: packed bits, scales, perhaps scales of the scales.
Only plain tensors travel and rest in files; the class, its attributes and `requires_grad` stay behind in a template,
which has no data.

Leaves out: the quantized classes, which register themselves in `CODECS` (`quantize/bnb.py`), at the latest when a model
with them is met that others have made.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..meta.empty import twin


class TensorCodec(NamedTuple):
    """How a class of tensors is taken apart into plain ones and put together again.

    Args:
        take_apart: tensor -> {suffix: plain tensor}.
        put_together: (template, {suffix: plain tensor}) -> tensor; the plain tensors are views that must not be copied.
        template: tensor -> one of the same class and attributes on meta, which keeps no data alive.
        suffixes: all that there may be; "" is the tensor under its own name in a checkpoint, "absmax" one that lies
            there as `name.absmax`.
        nbytes: tensor -> bytes of all that it consists of.
        collect: (tensor, module) -> nothing; gives a tensor back what its module has taken of it.
    """

    take_apart: Callable[[Tensor], dict[str, Tensor]]
    put_together: Callable[[Tensor, dict[str, Tensor]], Tensor]
    template: Callable[[Tensor], Tensor]
    suffixes: tuple[str, ...] = ("",)
    nbytes: Callable[[Tensor], int] = lambda tensor: tensor.nbytes
    collect: Callable[[Tensor, nn.Module], None] = lambda tensor, module: None


def _plain_template(tensor: Tensor) -> Tensor:
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return twin(tensor, meta) if isinstance(tensor, nn.Parameter) else meta


def _plain_whole(template: Tensor, parts: dict[str, Tensor]) -> Tensor:
    return twin(template, parts[""]) if isinstance(template, nn.Parameter) else parts[""]


PLAIN = TensorCodec(lambda tensor: {"": tensor.detach()}, _plain_whole, _plain_template)
CODECS: dict[type, TensorCodec] = {}
REGISTERS = {"bitsandbytes": ("bigkit.quantize.bnb", "bitsandbytes")}  # library -> the function that registers classes


def codec_of(tensor: Tensor) -> TensorCodec:
    """The entry of `CODECS` for a tensor's class or one that it inherits from; `PLAIN` without one."""
    cls = type(tensor)
    if cls is nn.Parameter or cls is Tensor:
        return PLAIN
    if cls not in CODECS:
        for base in cls.__mro__:
            if base in CODECS:
                return CODECS[base]
            if (library := base.__module__.partition(".")[0]) in REGISTERS:
                module, function = REGISTERS.pop(library)
                getattr(import_module(module), function)()
                return codec_of(tensor)
        return PLAIN
    return CODECS[cls]


def own_copy(tensor: Tensor) -> Tensor:
    """A copy of a tensor in memory of its own, of the same class and with the same attributes, as a new leaf."""
    return _rebuilt(tensor, Tensor.clone)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on another device, of the same class and with the same attributes; a plain one keeps its graph."""
    return tensor.to(device) if codec_of(tensor) is PLAIN else _rebuilt(tensor, lambda part: part.to(device))


def _rebuilt(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    codec = codec_of(tensor)
    parts = {suffix: change(part) for suffix, part in codec.take_apart(tensor).items()}
    return codec.put_together(codec.template(tensor), parts)
