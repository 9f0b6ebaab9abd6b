"""Loading: the tensors of a checkpoint become the weights of a model, and every difference is reported.

`load_checkpoint_in_model` maps the files into memory and hands their pages to the model: nothing is copied on the CPU.
What a device map leaves on disk stays in the files: the model has it on meta, and `resting.py` knows where it is.

Leaves out: finding each tensor in the checkpoint (`match.py`), tensors without a model (`state_dict.py`), the fast way
to a GPU (`to_gpu.py`), and weights that stay on disk while the model runs (`offload/weights.py`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..devices import Device, placement
from ..meta.held import Held
from ..meta.skeleton import extra_tensors, modules_to_keep, parts_that
from ..model.header import CheckpointError
from ..model.precision import float32_modules, is_named
from ..units import dtype_name, listed
from ._torch import extra_states, run_post_hooks
from .as_stored import as_stored
from .collector import collector_paused
from .format import Checkpoint, Stored
from .match import LoadReport, is_stored, match
from .resting import record_resting_place, rest_on_disk


def load_checkpoint_in_model(
    model: nn.Module,
    checkpoint: str | os.PathLike[str] | Checkpoint,
    device_map: Mapping[str, Device] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    offload_state_dict: bool = False,
    offload_buffers: bool = False,
    keep_in_fp32_modules: Iterable[str] | None = None,
    offload_8bit_bnb: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
    key: str = "",
    prefix: str = "",
    keep: str = "stored",
) -> LoadReport:
    """Load a checkpoint into a model that is empty (on meta) or not; a warning names all that does not match.

    Nothing changes before everything has been checked and read: on an error the model is as it was. On the CPU a tensor
    of the right dtype is not copied from a safetensors file: the model uses the pages of the file, so replace such a
    file by a new one (as `save_model` does), never in place. What a `.bin` file holds is copied, and the file is free.

    Modules do what they do in `load_state_dict`: hooks, older names, extra state that is a tensor. Hooks that run after
    loading find on meta what rests on disk.

    Args:
        model: the model.
        checkpoint: a file, an index or a folder; or one that is open already, with its `key` and `prefix`.
        device_map: module name -> device, covering the model. What it puts on "disk" is on meta in the model
            afterwards, and the report's `on_disk` says where it lies. None puts each tensor where the model has it
            (meta: on the CPU).
        offload_folder: where tensors for "disk" are written that no file of the checkpoint holds as they are needed (of
            another dtype, or in a `.bin` file). The file goes with the model.
        dtype: of floating tensors; None, and all other tensors, take the dtype that the model has. An integer of
            another width is cast without a check of its range, as torch's `load_state_dict` does.
        offload_state_dict, offload_8bit_bnb, full_state_dict, broadcast_from_rank0: accepted for compatibility: nothing
            is held in memory twice, and each process reads the whole checkpoint.
        offload_buffers: whether buffers of modules on "disk" rest there too; else they are loaded to the CPU.
        keep_in_fp32_modules: names of modules, or the ends of names ("lm_head", "h.0", "norm"), whose weights become
            float32 when `dtype` is float16 or bfloat16. Those that the model's classes list for this
            (`_keep_in_fp32_modules`, `_keep_in_fp32_modules_strict` of Transformers) always do.
        strict: raise if anything does not match, instead of a warning.
        key: where in a `.bin` or `.pt` file of a trainer the weights are: `"state_dict"`, `"model"`, or `"a.b"` for the
            dict `b` in the dict `a`. The warning names the one that fits.
        prefix: what names of the checkpoint begin with and names of the model do not, as "module.".
        keep: what becomes of weights on meta that the checkpoint has quantized (FP8, MXFP4, GPTQ, AWQ, ...): "stored":
            they stay as they are, whatever `dtype` says, and their modules decode them for each use; "dense": they are
            decoded when they are loaded, as those of a model that has weights always are.

    Returns:
        What did not match, and what rests on disk.

    Raises:
        FileNotFoundError, CheckpointError: there is no checkpoint, it is broken, or with `strict` does not fit.
        ValueError: the device map misses modules, or a folder for offloading is needed.

    >>> import tempfile
    >>> from bigkit import init_empty_weights, save_model
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(nn.Linear(2, 3), folder)
    ...     with init_empty_weights():
    ...         empty = nn.Linear(2, 3)
    ...     load_checkpoint_in_model(empty, folder).clean, empty.weight.device
    (True, device(type='cpu'))
    """
    if quantized := [name for name, _ in parts_that(model, extra_tensors)]:
        raise ValueError(f"{listed(quantized)} is quantized: load_and_quantize_model fills an empty model")
    with collector_paused():
        source = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint, key, prefix)
        with as_stored(model, source, keep, dtype):
            report = load_matching(
                model, source, device_map, offload_folder, dtype, offload_buffers, keep_in_fp32_modules, strict
            )
    if not report.clean:
        unlike = len(report.mismatched) + len(report.wrong_dtype)
        counts = f"{len(report.missing)} tensors missing, {len(report.unexpected)} unknown, {unlike} of another kind"
        what = f"{source.path} does not fit {type(model).__name__}; what does not match is not loaded"
        warnings.warn(f"{what} ({counts}): {report}", stacklevel=2)
    return report


def load_matching(
    model: nn.Module, source: Checkpoint, device_map: Mapping[str, Device] | None = None,
    offload_folder: str | os.PathLike[str] | None = None, dtype: torch.dtype | str | None = None,
    offload_buffers: bool = False, keep_in_fp32_modules: Iterable[str] | None = None, strict: bool = False,
) -> LoadReport:  # fmt: skip
    """Load what matches of an open checkpoint, and report the rest. See `load_checkpoint_in_model`."""
    floats = None if dtype is None else getattr(torch, dtype_name(dtype))
    fp32 = {*(keep_in_fp32_modules or ())} if floats in (torch.float16, torch.bfloat16) else set()
    fp32 |= {*float32_modules(modules_to_keep(model), floats and dtype_name(floats))}
    held, report = match(model, source)
    if strict and not report.clean:
        raise CheckpointError(f"{source.path} does not fit {type(model).__name__}: {report}")
    unfit = {name for name, *_ in (*report.mismatched, *report.wrong_dtype)}
    held = [one for one in held if one.source is not None and one.name not in unfit]
    places: dict[Device | torch.device, dict[str, torch.dtype | None]] = {}
    for one, place in _placed(held, device_map, offload_buffers):
        places.setdefault(place, {})[str(one.source)] = _dtype(one, floats, fp32)
    stored, written = rest_on_disk(source, places.pop("disk", {}), offload_folder)
    values = read_tensors(source, places)
    on_disk: dict[str, Stored] = {}
    for one in held:
        if one.source in values:
            one.fill(values[one.source])
        elif one.source in stored:
            on_disk[one.name] = where = stored[one.source]
            empty = torch.empty(where.shape, dtype=where.dtype, device="meta")
            one.fill(empty)
            record_resting_place(empty, {"": where}, written if written and where.file == written.path else None)
    for name, module in extra_states(model, (*source, *source.made)):
        module.set_extra_state(source.read(name))
    missing, unexpected = [*report.missing], [*report.unexpected]
    run_post_hooks(model, missing, unexpected)
    return replace(report, on_disk=on_disk, missing=tuple(missing), unexpected=tuple(unexpected))


def _placed(
    held: Iterable[Held], device_map: Mapping[str, Device] | None, offload_buffers: bool
) -> Iterator[tuple[Held, Device | torch.device]]:
    """The tensors of a model, each with the device where it goes."""
    device_of = placement(device_map)
    for one in held:
        if device_map is None:
            yield one, "cpu" if one.tensor.is_meta else one.tensor.device
            continue
        place = device_of(one.name)
        if place is None:
            raise ValueError(f"the device map gives no device for {one.name!r}")
        yield one, "cpu" if place == "disk" and one.buffer and not offload_buffers else place


def _dtype(one: Held, floats: torch.dtype | None, fp32: set[str]) -> torch.dtype:
    """What a tensor becomes: floating ones in modules named in `fp32` float32, in others `floats` if given."""
    if not one.tensor.is_floating_point() or is_stored(one):
        return one.tensor.dtype
    if fp32 and is_named(one.name, fp32):
        return torch.float32
    return floats or one.tensor.dtype


# ---------------------------------------------------------------------------------------------------------------------
# Reading many tensors, each to where it goes


def read_tensors(
    source: Checkpoint, places: Mapping[Device | torch.device, Mapping[str, torch.dtype | None]]
) -> dict[str, Tensor]:
    """Read tensors to their devices, as (device -> name -> dtype) says; those for GPUs all in one go."""
    from .to_gpu import read_to_gpu, read_to_gpus

    devices = {at: torch.device("cuda", at) if isinstance(at, int) else torch.device(at) for at in places}
    gpus = [(devices[at], {n: source.stored[n] for n in names if n in source.stored})
            for at, names in places.items() if devices[at].type == "cuda"]  # fmt: skip
    values = read_to_gpus(gpus, {name: dtype for names in places.values() for name, dtype in names.items()})
    for place, dtypes in places.items():
        if (device := devices[place]).type == "cuda":
            for name, made in source.made.items():
                if name in dtypes and source.stored.keys() >= {*made.sources}:
                    parts = read_to_gpu({part: source.stored[part] for part in made.sources}, device)
                    values[name] = made.make(parts).to(device=device, dtype=dtypes[name])
        for name in (name for name in dtypes if name not in values):
            values[name] = source.read(name).to(device=device, dtype=dtypes[name])
    return values
