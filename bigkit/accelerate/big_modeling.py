"""`accelerate.big_modeling`: bigkit's own calls under their old address, and weights stored in fewer bits."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import nn

from ..meta.empty import init_empty_weights, init_on_device
from ..offload.dispatch import dispatch_model
from ..offload.load_and_dispatch import load_checkpoint_and_dispatch
from ..offload.one_place import cpu_offload, disk_offload
from ..offload.whole_model import cpu_offload_with_hook
from .differences import refuse_unknown as __getattr__
from .hooks import LayerwiseCastingHook, add_hook_to_module
from .utils.constants import SUPPORTED_PYTORCH_LAYERS_FOR_UPCASTING


def attach_layerwise_casting_hooks(
    module: nn.Module, storage_dtype: torch.dtype, compute_dtype: torch.dtype,
    skip_modules_pattern: str | Iterable[str] | None = None,
    skip_modules_classes: tuple[type[nn.Module], ...] | None = None, non_blocking: bool = False,
) -> None:  # fmt: skip
    """Store the weights of linear and convolution layers in one dtype, and cast them for each forward.

    Args:
        module: the model, or a layer.
        storage_dtype: such as `torch.float8_e4m3fn`.
        compute_dtype: what they become while their layer works.
        skip_modules_pattern: regular expressions; a module whose name one of them is found in stays, with all in it.
        skip_modules_classes: classes of modules that stay, with all in them.
        non_blocking: see `torch.Tensor.to`.

    >>> layer = nn.Linear(2, 2)
    >>> attach_layerwise_casting_hooks(layer, torch.float16, torch.float32)
    >>> layer.weight.dtype, layer(torch.ones(1, 2)).dtype
    (torch.float16, torch.float32)
    """
    patterns = [skip_modules_pattern] if isinstance(skip_modules_pattern, str) else [*(skip_modules_pattern or ())]

    def attach(part: nn.Module, name: str) -> None:
        if isinstance(part, skip_modules_classes or ()) or any(re.search(pattern, name) for pattern in patterns):
            return
        if isinstance(part, SUPPORTED_PYTORCH_LAYERS_FOR_UPCASTING):
            add_hook_to_module(part, LayerwiseCastingHook(storage_dtype, compute_dtype, non_blocking), append=True)
            return
        for own, child in part.named_children():
            attach(child, f"{name}.{own}" if name else own)

    attach(module, "")
