"""`bigkit.pipeline`: one model over several processes and hosts, each of which loads only its stage.

    bigkit launch --num_processes 2 script.py

    with bigkit.init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model = bigkit.pipeline(model, "folder", bigkit.plan_hosts(model, ["RTX 4090", "RTX 3090"]))
    model.generate(**inputs)        # on every process, with the same inputs; the same tokens come back on every one
    with bigkit.graph_decode(model):
        answers = bigkit.map_in_flight(lambda ids: model.generate(ids), batches, model)     # no process waits

Leaves out: how processes speak (`distributed/pipeline.py`), where to cut (`maps/hosts.py`), and loading itself
(`offload/load_and_dispatch.py`, `quantize/load.py`), which sees a model whose other modules are empty.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoints.as_stored import as_stored
from .checkpoints.format import Checkpoint, CheckpointError
from .checkpoints.match import match
from .devices import Device
from .distributed.gather import carrier
from .distributed.pipeline import Stage
from .distributed.state import PartialState, exchange
from .machine.hardware import Hardware
from .maps.hosts import HostsPlan, plan_hosts
from .meta.skeleton import spec_from_module
from .offload.load_and_dispatch import load_checkpoint_and_dispatch
from .quantize.load import load_and_quantize_model
from .units import listed

_made = count(1)  # pipelines of this process
_SAMPLES, _SAMPLE = 64, 4096  # pieces of a file that are hashed, and bytes of each


def pipeline(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    plan: HostsPlan | None = None,
    bnb_quantization_config: Any = None,
    *,
    dtype: torch.dtype | str | None = None,
    **options: Any,
) -> nn.Module:
    """Load a model's stage into this process, and join it with the stages of the others.

    Call it on every process, with the same arguments. From then on `model(...)` and `model.generate(...)` run on all of
    them together: make the same calls with the same inputs everywhere. Each returns the same tokens (and `model(...)`
    the same logits). One process alone loads the whole model.

    Args:
        model: the model, empty (`init_empty_weights`); a decoder with one chain of blocks.
        checkpoint: a file, an index or a folder, which each process can read.
        plan: a stage for each process, from `plan_hosts` with named machines, so that all processes make the same one;
            None cuts for the memory that the processes have now.
        bnb_quantization_config: how to quantize each weight as it is read, see `load_and_quantize_model`.
        dtype: floating weights become this; None takes the plan's.
        options: of `load_checkpoint_and_dispatch` or `load_and_quantize_model`, such as `offload_folder`.

    Returns:
        The model. Modules of other stages have no weights in it.

    Raises:
        ValueError: the plan has another number of stages than there are processes, or the processes differ in their
            versions, model, plan or checkpoint: the difference is named on all of them, before a weight is read.
        ProcessLost: another process ended, or did not come in time (`PartialState(timeout=...)`).

    >>> from bigkit import init_empty_weights
    >>> from bigkit.zoo.gpt import GPT, GPTConfig, PYGPT
    >>> with init_empty_weights():
    ...     model = GPT(GPTConfig("pygpt"))
    >>> model = pipeline(model, PYGPT, dtype="float32").eval()  # one process: all of it
    >>> model.generate(torch.tensor([[1, 2, 3]]), 5).shape
    torch.Size([1, 8])
    """
    state = PartialState()
    if state.num_processes > 1 and carrier("cpu") != "cpu":
        raise ValueError("this group has nccl alone: start it by PartialState(), or with backend 'cpu:gloo,cuda:nccl'")
    if plan is None:
        free = exchange(Hardware.detect(), "pipeline")
        local = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        shares = [
            replace(host, gpus=host.gpus[i % local : i % local + 1], ram=host.ram // local)
            for i, host in enumerate(free)
        ]
        plan = plan_hosts(spec_from_module(model), shares, dtype=dtype)
    if len(plan.stages) != state.num_processes:
        counts = f"the plan has {len(plan.stages)} stages, and there are {state.num_processes} processes"
        raise ValueError(f"{counts}: start one for each stage (bigkit launch --num_processes {len(plan.stages)})")
    _compare(model, Checkpoint.open(checkpoint), plan)
    config = bnb_quantization_config
    if config is not None and config.skip_modules is None:  # of the whole model: a stage would find its own last one
        config = replace(config, skip_modules=sorted(spec_from_module(model).kept))
    if config is None:
        _check_whole(model, Checkpoint.open(checkpoint))
    names, rank = [stage.names for stage in plan.stages], state.process_index
    own = plan.stages[rank].plan
    stage = Stage(model, names, rank)
    places = _on_own_gpus(plan, rank, state.local_process_index)
    with _with_more_in_the_file(model):
        if config is not None:
            load_and_quantize_model(model, config, checkpoint, device_map=places, **options)
        else:
            slots = {"slots": own.slots} if own.slots else {}
            dtype = own.dtype if dtype is None else dtype
            options = {"strict": True, **slots, **options}
            load_checkpoint_and_dispatch(model, checkpoint, places, dtype=dtype, **options)
    tag = max(exchange(next(_made), "pipeline"))
    stage.attach(_works_on(model, plan.stages[rank].names[0]) or state.device, tag)
    return model


def _on_own_gpus(plan: HostsPlan, rank: int, local_rank: int) -> dict[str, Device]:
    """The map of a stage with the GPUs of its process: the next ones after those of its neighbours on the host."""

    def gpus(stage: int) -> int:
        return len({device for device in plan.stages[stage].plan.device_map.values() if isinstance(device, int)})

    first = sum(map(gpus, range(rank - local_rank, rank)))
    own = plan.stages[rank].plan.device_map
    places = {name: device + first if isinstance(device, int) else device for name, device in own.items()}
    if "" in places:
        return places
    runner = next((device for device in places.values() if device not in ("cpu", "disk")), "cpu")
    away = {name: runner for stage in plan.stages for name in stage.names}
    return {**away, **places}  # modules elsewhere hold nothing, but they are called


def _works_on(model: nn.Module, name: str) -> torch.device | None:
    """The device of the first weight in memory of a module."""
    tensors = (tensor for tensor in model.get_submodule(name).parameters() if not tensor.is_meta)
    return next((tensor.device for tensor in tensors), None)


class _Seen(Exception):
    """Nothing went wrong: the model shall be as it was."""


def _check_whole(model: nn.Module, source: Checkpoint) -> None:
    """See that the checkpoint fits the whole model, of which only a stage will be loaded."""
    with suppress(_Seen), as_stored(model, source):
        _, report = match(model, source)
        if not report.clean:
            raise CheckpointError(f"{source.path} does not fit {type(model).__name__}: {report}")
        raise _Seen


@contextmanager
def _with_more_in_the_file(model: nn.Module) -> Iterator[None]:
    """Within it, nothing in the checkpoint is in excess: the rest is for other stages."""
    attribute: Any = "_keys_to_ignore_on_load_unexpected"
    before = vars(model).get(attribute)
    setattr(model, attribute, [""])
    try:
        yield
    finally:
        delattr(model, attribute)
        if before is not None:
            setattr(model, attribute, before)


# ---------------------------------------------------------------------------------------------------------------------
# The same on every process?


def _compare(model: nn.Module, source: Checkpoint, plan: HostsPlan) -> None:
    """See that all processes have the same versions, model, plan and checkpoint.

    Raises:
        ValueError: what differs, and between which processes; on every process.
    """
    own = {
        **{name: _version(name) for name in ("bigkit", "torch", "transformers", "bitsandbytes")},
        "python": ".".join(platform.python_version_tuple()[:2]),
        "model": f"{type(model).__name__} {_hash(_described(model))}",
        "plan": plan.digest,
        "checkpoint": _hash(*(f"{name} {source.shape_and_dtype(name)}" for name in sorted(source)), *_samples(source)),
    }
    for rank, other in enumerate(everyone := exchange(own, "pipeline")):
        if unlike := [name for name in own if other[name] != everyone[0][name]]:
            pairs = [f"{name} ({everyone[0][name]} on process 0, {other[name]} on {rank})" for name in unlike]
            raise ValueError(f"process {rank} differs from process 0 in {listed(pairs)}: make them the same everywhere")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _described(model: nn.Module) -> str:
    """A model's config and the names and shapes of its tensors."""
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else config
    return repr((settings, [(name, tuple(tensor.shape)) for name, tensor in model.named_parameters()]))


def _samples(source: Checkpoint) -> Iterator[bytes]:
    """Pieces of each file, spread evenly: other weights of the same shapes are seen, and little is read."""
    for file in source.files:
        size = Path(file).stat().st_size
        with Path(file).open("rb") as handle:
            for k in range(_SAMPLES):
                handle.seek(k * max(0, size - _SAMPLE) // (_SAMPLES - 1))
                yield handle.read(_SAMPLE)


def _hash(*things: str | bytes) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for thing in things:
        digest.update(thing if isinstance(thing, bytes) else thing.encode())
    return digest.hexdigest()
