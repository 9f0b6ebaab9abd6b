"""`accelerate.utils.other`: what is inside a wrapper, saving, and ports."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints.write import Form, check_dtypes, write_safetensors
from ...distributed.state import PartialState
from ..differences import refuse_unknown as __getattr__


def is_compiled_module(module: nn.Module) -> bool:
    """Whether `torch.compile` made this module."""
    return hasattr(module, "_orig_mod")


def extract_model_from_parallel(
    model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True, recursive: bool = False
) -> nn.Module:
    """The model that DataParallel or DistributedDataParallel wraps.

    Args:
        model: wrapped or not.
        keep_torch_compile: leave what `torch.compile` has put around the whole.
        keep_fp32_wrapper, recursive: accepted for compatibility: bigkit puts no other wrappers.

    >>> model = nn.Linear(2, 2)
    >>> extract_model_from_parallel(nn.DataParallel(model)) is model
    True
    """
    compiled: Any = model if is_compiled_module(model) else None
    inner: Any = model
    while is_compiled_module(inner) or isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        if is_compiled_module(inner) and inner is not compiled and keep_torch_compile:
            break
        inner = inner._orig_mod if is_compiled_module(inner) else inner.module
    if compiled is not None and keep_torch_compile:
        compiled._orig_mod = inner
        return compiled
    return inner


def save(
    obj: Any, f: str | os.PathLike[str], save_on_each_node: bool = False, safe_serialization: bool = False
) -> None:
    """Write something on the main process: a pickle, or a dict of tensors as safetensors.

    Args:
        obj: what to save. Tensors that share memory are written under each of their names.
        f: the file.
        save_on_each_node: write on process 0 of each host.
        safe_serialization: as a safetensors file.

    Raises:
        TypeError, ValueError: no dict of tensors, or of a dtype that the format cannot hold; nothing was written.
    """
    state = PartialState()
    if not (state.is_local_main_process if save_on_each_node else state.is_main_process):
        return
    if not safe_serialization:
        torch.save(obj, f)
        return
    if not isinstance(obj, Mapping) or not all(isinstance(value, Tensor) for value in obj.values()):
        raise TypeError(f"a safetensors file holds a dict of tensors, not a {type(obj).__name__} of other things")
    forms = {name: Form(tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(obj.items())}
    check_dtypes(forms)
    with Path(f).open("wb") as stream:
        write_safetensors(stream, forms, obj.__getitem__)


def load(f: Any, map_location: Any = None, **kwargs: Any) -> Any:
    """`torch.load`, of tensors and plain containers only unless `weights_only=False` is given."""
    return torch.load(f, map_location=map_location, **kwargs)


def wait_for_everyone() -> None:
    """Go on when every process has come to this call."""
    PartialState().wait_for_everyone()


def get_free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def is_port_in_use(port: int | None = None) -> bool:
    """Whether something listens on a port of this host (None: 29500)."""
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", 29500 if port is None else port)) == 0
