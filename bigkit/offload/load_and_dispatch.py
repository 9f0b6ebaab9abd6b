"""From a checkpoint to a model that runs spread out, in one call: map, load, dispatch.

Leaves out: each of the three (`maps/strategies.py`, `checkpoints/load.py`, `dispatch.py`).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..checkpoints.as_stored import as_stored, room_for_decoding, stored_dtypes
from ..checkpoints.format import Checkpoint
from ..checkpoints.load import load_checkpoint_in_model
from ..devices import Device, whole_on
from ..maps.device_map import check_device_map, get_max_memory
from ..maps.plan import Plan
from ..maps.strategies import STRATEGIES, place
from ..meta.skeleton import spec_from_module
from .dispatch import dispatch_model
from .grouping import records
from .options import read_options


def load_checkpoint_and_dispatch(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    device_map: str | Mapping[str, Device] | Plan | None = None,
    max_memory: Mapping[Device, int | str] | None = None,
    no_split_module_classes: Iterable[str] | str | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    offload_buffers: bool = False,
    dtype: torch.dtype | str | None = None,
    offload_state_dict: bool | None = None,
    skip_keys: str | Iterable[str] | None = None,
    preload_module_classes: Iterable[str] | None = None,
    force_hooks: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
    keep_in_fp32_modules: Iterable[str] | None = None,
    key: str = "",
    prefix: str = "",
    keep: str = "stored",
    **options: Any,
) -> nn.Module:
    """Load a checkpoint into a model, usually an empty one, and spread it over devices.

    Args:
        model: the model.
        checkpoint: a file, an index or a folder.
        device_map: "auto" or another strategy of `plan`; a `Plan`; module names -> devices, of which the innermost
            counts; or a device for the whole model (0, "cpu", `torch.device`). None loads and does no more.
        max_memory: device -> budget, for a strategy; None asks this machine.
        no_split_module_classes: classes that stay on one device, for a strategy; None takes the model's own list.
        offload_folder: where weights for "disk" are written that lie in no file as they are needed (of another dtype).
        dtype: floating weights become this.
        offload_state_dict, full_state_dict, broadcast_from_rank0: accepted for compatibility: nothing is held in memory
            twice, and each process reads the whole checkpoint.
        strict: raise if anything in the checkpoint and the model does not match; else a warning names it.
        keep_in_fp32_modules, key, prefix, keep: see `load_checkpoint_in_model`.
        offload_buffers, skip_keys, preload_module_classes, force_hooks, options: see `dispatch_model`.

    Returns:
        The model, with `hf_device_map`.

    Raises:
        ValueError, FileNotFoundError, CheckpointError, PlanError: as the calls that it is made of.

    >>> from bigkit import init_empty_weights
    >>> from bigkit.zoo.gpt import GPT, GPTConfig, PYGPT
    >>> with init_empty_weights():
    ...     model = GPT(GPTConfig("pygpt"))
    >>> model = load_checkpoint_and_dispatch(model, PYGPT, {"": "cpu", "transformer.h.0": "disk"}, dtype="bfloat16")
    >>> model(torch.tensor([[1, 2, 3]]))[0].shape
    torch.Size([1, 3, 256])
    """
    dispatching = dict(
        offload_dir=offload_folder, offload_buffers=offload_buffers, skip_keys=skip_keys,
        preload_module_classes=preload_module_classes, force_hooks=force_hooks, **options,
    )  # fmt: skip
    inspect.signature(dispatch_model).bind(model, {}, **dispatching)  # options are checked before weights are loaded
    read_options({}, **dispatching)
    device_map = whole_on(device_map)
    source: str | os.PathLike[str] | Checkpoint = checkpoint
    with ExitStack() as until_loaded:  # an error before that leaves the model as it was
        if isinstance(device_map, str):
            if device_map not in STRATEGIES:
                raise ValueError(f"unknown device_map {device_map!r}: expected a map or one of {', '.join(STRATEGIES)}")
            classes = [no_split_module_classes] if isinstance(no_split_module_classes, str) else no_split_module_classes
            max_memory = get_max_memory() if max_memory is None else max_memory
            source = Checkpoint.open(checkpoint, key, prefix)
            if keep == "stored":  # the sizes to plan with
                until_loaded.enter_context(as_stored(model, source))
            device_map = place(
                spec_from_module(model), max_memory, device_map, dtype=dtype, special_dtypes=stored_dtypes(model),
                no_split=classes, offload_buffers=offload_buffers, overhead=room_for_decoding(model),
                slots=options.get("slots"),
            )  # fmt: skip
        loading = None
        if device_map is not None:
            places = device_map.device_map if isinstance(device_map, Plan) else device_map
            layout = read_options(places, **dispatching)
            check_device_map(model, places)
            loading = {name: "cpu" if device in layout.stand_in else device for name, device in layout.places.items()}
        report = load_checkpoint_in_model(
            model, source, loading, offload_folder, dtype, offload_buffers=offload_buffers, strict=strict,
            keep_in_fp32_modules=keep_in_fp32_modules, key=key, prefix=prefix, keep=keep,
        )  # fmt: skip
    if device_map is None:
        return model
    unfilled = {*report.missing, *(name for name, *_ in (*report.mismatched, *report.wrong_dtype))}
    if unfilled and any(record.tensor.is_meta and record.name in unfilled for record in records(model)):
        raise ValueError(f"{checkpoint} does not fill {type(model).__name__}: {report}")
    return dispatch_model(model, device_map, **dispatching)
