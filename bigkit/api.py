"""`plan`, `advise` and `estimate_memory` for whatever you hold: a name, a URL, a folder, an `nn.Module` or a record.

Leaves out: all arithmetic (`maps/strategies.py`, `maps/advise.py`, `model/estimate.py`) and finding names (`zoo/`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Union, cast

from . import zoo
from .devices import Device
from .machine.hardware import Hardware, machine_of
from .machine.ledger import calibration_of, overhead_of
from .machine.network import Network
from .maps import advise as _advise
from .maps import hosts as _hosts
from .maps.advise import Advice
from .maps.draft import ACCEPTANCE, draft_bytes, keep_room
from .maps.hosts import HostsPlan
from .maps.links import links_of
from .maps.pipeline import place_pipeline
from .maps.plan import Plan
from .maps.strategies import place
from .model import estimate as _estimate
from .model.estimate import MemoryEstimate
from .model.pipeline import PipelineSpec, estimate_pipeline
from .model.spec import ModelSpec

if TYPE_CHECKING:
    import torch

Source = Union[str, os.PathLike, ModelSpec, "torch.nn.Module"]


def describe(model: Source, library_name: str | None = None, *, base: bool = False, **options: Any) -> ModelSpec:
    """The skeleton of a model: given as a spec, an `nn.Module` (empty or not), a name, a Hub URL or a folder.

    Args:
        model: what to describe.
        library_name: "transformers", "timm" or "bigkit"; None finds it. Names only.
        base: the model without its head, as `AutoModel` builds it. Names only.
        options: `trust_remote_code`, `revision`, `token` for names on the Hub.

    Raises:
        ValueError, OSError: see `zoo.describe`.
        TypeError: it is none of these, or there is no such option.

    >>> describe("gpt2").parameters
    124439808
    """
    if isinstance(model, (str, os.PathLike)):
        return zoo.describe(os.fspath(model), library_name, base=base, **options)
    if unknown := sorted(options.keys() - {"trust_remote_code", "revision", "token"}):
        raise TypeError(f"describe() got an unexpected keyword argument {unknown[0]!r}")
    if isinstance(model, ModelSpec):
        return model
    if hasattr(model, "named_modules"):
        from .meta.skeleton import spec_from_module

        return spec_from_module(model, trace_cache=True)
    raise TypeError(f"expected a model's name, folder or URL, an nn.Module or a ModelSpec, not {type(model).__name__}")


def described(
    model: Source | PipelineSpec, library_name: str | None = None, dtype: object = None, batch: int = 1,
    image: int | tuple[int, int] | None = None, **options: Any,
) -> ModelSpec | PipelineSpec:  # fmt: skip
    """The record of a model, or of the pipeline that a folder or repository without a config.json is."""
    if isinstance(model, PipelineSpec):
        return model
    try:
        return describe(model, library_name, **options)
    except zoo.NoConfig as error:
        none = error
    from .dryrun.components import describe_pipeline

    where = {name: options[name] for name in ("revision", "token") if name in options}
    pipeline = describe_pipeline(model, dtype or "bfloat16", batch, image, **where)  # type: ignore[arg-type]
    if pipeline is None:
        raise none
    return pipeline


def plan(
    model: Source | PipelineSpec,
    max_memory: Mapping[Device, int | str] | None = None,
    strategy: str | Mapping[str, Device] = "auto",
    *,
    dtype: object = None,
    quantization: str | None = None,
    keep: Iterable[str] | str | None = None,
    special_dtypes: Mapping[str, object] | None = None,
    no_split: Iterable[str] | str | None = None,
    batch: int = 1,
    context: int = 0,
    overhead: int | str | None = None,
    offload_buffers: bool = False,
    strict: bool = True,
    experts_on_cpu: int | None = None,
    kv_dtype: object = None,
    links: Sequence[float] | None = None,
    slots: int | None = None,
    on_cpu: bool = False,
    hardware: Hardware | str | None = None,
    draft: Source | None = None,
    image: int | tuple[int, int] | None = None,
) -> Plan:
    """Place a model's layers on devices so that no device holds more than its budget.

    Args:
        model: a name, URL, folder, `nn.Module` or `ModelSpec`; a pipeline of Diffusers (a folder or repository with a
            `model_index.json`) gives a `PipelinePlan`, whose main GPU is the first one.
        max_memory: device -> budget in bytes or as text, as {0: "10GiB", "cpu": "64GiB"}, for GPU numbers, "cpu" (RAM)
            and "disk"; None takes those of `hardware`, or of this machine.
        strategy: "auto", "balanced", "balanced_low_0", "sequential", "exact" (for the longest context), or a device map
            of your own, to be checked.
        dtype: floating weights are cast to it ("float16", `torch.bfloat16`); None keeps them as stored.
        quantization: of the linear layers: "int8", "nf4", "nf4-double", "fp4" or "fp4-double".
        batch, context: sequences, and tokens of each (prompt and answer), that KV cache and activations are counted
            for; context 0 counts the weights alone.
        strict: raise if nothing fits; False returns the plan, with `problem` set.
        keep, special_dtypes, no_split, offload_buffers, experts_on_cpu, kv_dtype, slots: see `maps.strategies.place`.
        links: bytes a second of each GPU's link; None takes those of `hardware`, or of this machine.
        on_cpu: let the CPU compute MLPs that rest in RAM, for few tokens, if that pays by what `calibrate()` measured
            on this machine; the plan says how many, or why none. What it computes is not bit-equal to the GPU's.
        overhead: bytes that the runtime takes on each GPU; None takes `overhead_of` the machine, or 0 for budgets that
            are given without one.
        hardware: a machine, or the name of one ("1 x RTX 4090", "L4").
        draft: a small model that guesses tokens for this one to check (`generate(assistant_model=...)`): room for it
            stays free on the first device.
        image: height and width in pixels, of a pipeline's image; None is what its denoiser was trained for.

    Returns:
        The plan: `device_map` for `load_checkpoint_and_dispatch`, `explain()` says why as text, `max_context` is in
        tokens, `shares` has the bytes on each device.

    Raises:
        PlanError: no placement fits, with the bytes that are missing and what would help.
        ValueError: an unknown strategy, device, dtype or machine, a map that does not fit the model, or `on_cpu` where
            nothing was measured.

    >>> plan("gpt2", {0: "300MiB", 1: "300MiB"}).feasible
    True
    >>> plan("llama-2-7b", hardware="RTX 4090", dtype="float16").device_map
    {'': 0}
    """
    machine = None if hardware is None else machine_of(hardware)
    if max_memory is None and machine is None:
        machine = Hardware.detect()
        from .maps.device_map import get_max_memory

        free = get_max_memory()
        max_memory = {**free, "disk": machine.disk} if "mps" in free else None
    if max_memory is None and machine is not None:
        max_memory = machine.max_memory()
    if overhead is None:
        overhead = overhead_of(machine) if machine else 0
    assert max_memory is not None
    spec = described(model, dtype=dtype, batch=batch, image=image)
    if isinstance(spec, PipelineSpec):
        return cast(Any, place_pipeline(spec, max_memory, overhead))  # a `PipelinePlan`
    room = ""
    if draft is not None:
        guessing = describe(draft)
        nbytes = draft_bytes(guessing, dtype if quantization is None else "bfloat16", batch, context)
        max_memory, room = keep_room(max_memory, nbytes, guessing.name)
    measured = calibration_of(machine) if machine else None
    ask = partial(
        place, spec, max_memory, strategy, dtype=dtype, quantization=quantization, keep=keep,
        special_dtypes=special_dtypes, no_split=no_split, batch=batch, context=context, overhead=overhead,
        offload_buffers=offload_buffers, strict=strict, experts_on_cpu=experts_on_cpu, kv_dtype=kv_dtype,
        links=links if links is not None else links_of(machine, measured) if machine else (), slots=slots,
    )  # fmt: skip
    if on_cpu:
        here = machine or Hardware.detect()
        measured = measured or calibration_of(here)
        if not (measured and measured.cpu_reads):
            raise ValueError(
                "on_cpu needs what this machine's CPU reads beside a busy link: call bigkit.calibrate() here"
            )
        placed, about = _advise.best_with_cpu(spec, ask, here, measured)
        room = " ".join(filter(None, (room, "" if placed.on_cpu else about)))
    else:
        placed = ask()
    return replace(placed, notes=(*placed.notes, room)) if room else placed


def plan_hosts(
    model: Source,
    hosts: Sequence[Hardware | str] | str,
    network: Network | str = "Ethernet 10G",
    strategy: str = "balanced",
    **options: Any,
) -> HostsPlan:
    """Cut a model into one stage for each of several hosts; `bigkit.pipeline` loads and runs it so.

    Args:
        model: a name, URL, folder, `nn.Module` or `ModelSpec`.
        hosts: machines, or names of machines as `plan`'s `hardware`, in the order in which hidden states pass them; or
            a text, "RTX 4090 | 2 x L4", or "2 hosts" such as this machine.
        network: the line between them: a `Network`, or the name of one ("Ethernet 10G", "RDMA 100G", "WLAN").
        strategy: "balanced" makes the slowest stage as fast as it can be; "sequential" fills one host after the other.
        options: `dtype`, `quantization`, `batch` (sequences in all groups), `context` and others, see `plan`.

    Raises:
        PlanError: a stage does not fit its host, with the bytes that are missing and what would help.
        ValueError: a model that is no chain of blocks (an encoder with a decoder), or an unknown name.

    >>> p = plan_hosts("llama-2-7b", ["RTX 4090", "RTX 3090"], dtype="float16", batch=8, context=1024)
    >>> [stage.blocks for stage in p.stages], p.stages[0].plan.device_map
    ([16, 16], {'': 0})
    """
    return _hosts.plan_hosts(describe(model), hosts, network, strategy, **options)


def advise(
    model: Source,
    hardware: Hardware | str | None = None,
    batch: int = 1,
    context: int = 2048,
    target: str = "speed",
    *,
    stored: Iterable[str | None] = _advise.STORED,
    kv_dtype: object = None,
    draft: Source | None = None,
    acceptance: float = ACCEPTANCE,
) -> Advice:
    """Rank ways to store and place a model on a machine, by what a token would wait for.

    Args:
        model: a name, URL, folder, `nn.Module` or `ModelSpec`.
        hardware: a `Hardware`, the name of one ("1 x RTX 4090", "L4", "8 x H100-80GB"), or None for this machine, whose
            measured rates are used if `calibrate()` was called here.
        batch, context: sequences, and tokens of each.
        target: what ranks first: "speed", "quality", "memory" or "context" (the longest).
        stored: ways to store the weights that are tried: quantizations, and None for 16 bits or as a quantized
            checkpoint has it.
        draft: a small model that guesses tokens for this one to check: a name, folder, ...
        kv_dtype, acceptance: see `maps.advise.advise`.

    Returns:
        The advice: print it for a table; `options` are those that fit, best first, each with its `plan`; `best` is the
        first, or None, and `cures` then say what would have to change.

    Raises:
        ValueError: an unknown target or machine.

    >>> advise("llama-3.1-8b", "RTX 4090").best.plan.quantization is None
    True
    """
    spec = described(model)
    if isinstance(spec, PipelineSpec):
        raise ValueError(f"{spec.name} is a pipeline of several models: `plan` says how it runs on a machine")
    return _advise.advise(
        spec, machine_of(hardware), batch, context, target, stored=stored, kv_dtype=kv_dtype,
        draft=None if draft is None else describe(draft), acceptance=acceptance,
    )  # fmt: skip


def estimate_memory(
    model: Source | PipelineSpec,
    dtypes: Iterable[object] = _estimate.CLASSIC,
    library_name: str | None = None,
    *,
    stored: Iterable[str] = _estimate.STORED,
    batch: int = 1,
    context: int = 2048,
    kv_dtype: object = None,
    gpus: int = 1,
    checkpointing: bool = False,
    image: int | tuple[int, int] | None = None,
    **options: Any,
) -> MemoryEstimate:
    """Count how much memory a model takes to load, run and train. Shipped names need no network and no torch.

    Args:
        model: a name, URL, folder, `nn.Module` or `ModelSpec`; a pipeline of Diffusers gives a `PipelineEstimate` of
            `batch` images in bfloat16.
        dtypes: rows of the classic table.
        library_name: "transformers", "timm" or "bigkit"; None finds it.
        stored: rows of the inference table: dtypes, or quantizations ("int8", "nf4", "nf4-double", ...).
        batch, context: what KV cache and activations are counted for.
        kv_dtype: of keys and values in the cache ("float8", "int8", "int4", ...); None: as the model computes.
        gpus: how many train the model together: data parallel, ZeRO-1 to 3, FSDP; figures are those of each.
        checkpointing: train with activation checkpointing.
        image: height and width in pixels, of a pipeline's images; None is what its denoiser was trained for.
        options: `trust_remote_code`, `revision`, `token` for names on the Hub.

    >>> row = estimate_memory("bert-base-cased").rows[0]
    >>> row.dtype, row.total_size
    ('float32', 433249280)
    """
    full = described(model, library_name, batch=batch, image=image, **options)
    if isinstance(full, PipelineSpec):
        return cast(Any, estimate_pipeline(full))  # a `PipelineEstimate`
    by_name = isinstance(model, (str, os.PathLike))
    base = describe(cast(Source, model), library_name, base=True, **options) if by_name else full
    return _estimate.estimate(base, full, dtypes, stored, batch, context, kv_dtype, gpus, checkpointing)
