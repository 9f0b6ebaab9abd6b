"""Loading 8-bit and 4-bit models, and quantizing loaded ones.

`load_and_quantize_model` streams: one tensor is read, quantized and let go before the next one comes, so the peak is
the quantized model and one tensor. A checkpoint that is quantized already is taken as it is; `save_model` writes one.

Leaves out: what a quantized weight is made of (`bnb.py`) and how it is stored (`stored.py`), which layers are quantized
(`replace.py`), training (an adapter's business: `peft`).
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.as_stored import AsStored, as_stored
from ..checkpoints.format import Checkpoint, CheckpointError, Stored
from ..checkpoints.load import load_matching, read_tensors
from ..checkpoints.match import match
from ..checkpoints.one_by_one import stream_rows, stream_tensors
from ..checkpoints.resting import record_resting_place, write_file
from ..checkpoints.write import Form
from ..devices import Device, placement, read_device
from ..maps.device_map import check_device_map, get_max_memory
from ..maps.strategies import STRATEGIES, place
from ..meta.skeleton import is_linear, spec_from_module
from ..model.precision import is_named, is_stacked
from ..model.spec import ModelSpec
from ..offload.dispatch import dispatch_model
from ..offload.inputs import torch_device
from ..units import dtype_name, format_bytes, is_floating, listed
from .bnb import bitsandbytes, put_together, quantized, skeleton, take_apart
from .config import BnbQuantizationConfig as BnbQuantizationConfig
from .replace import cast, empty_layer_for, layers_to_quantize, rows
from .replace import replace_with_bnb_layers as replace_with_bnb_layers
from .stacks import hold, quantized_stack, stacks_to_quantize
from .stored import from_stored, stored_keys, stored_kind, travelling_keys

_CPU = torch.device("cpu")
_AWAY = ("cpu", "disk")  # where weights rest that work elsewhere


def load_and_quantize_model(
    model: nn.Module,
    bnb_quantization_config: BnbQuantizationConfig,
    weights_location: str | os.PathLike[str] | None = None,
    device_map: Mapping[str, Device] | str | None = None,
    no_split_module_classes: Iterable[str] | None = None,
    max_memory: Mapping[Device, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    offload_state_dict: bool = False,
    stand_in: Mapping[Device, torch.device | str] | None = None,
    **options: Any,
) -> nn.Module:
    """Load a model with its linear layers quantized, or quantize one that is loaded.

    From a checkpoint, one tensor at a time is read, cast to `torch_dtype`, quantized on the device that will run it and
    placed. Nothing of the model changes before all of it has been checked and read. Without a checkpoint each weight
    is let go when it has been quantized: after an error in the middle (no memory, an interrupt) the model refuses to
    run. All its parameters are frozen. Hooks and attributes of the layers are kept; layers whose `forward` was replaced
    are refused, and so is a model that is quantized already. Experts that are stacked in one tensor are quantized one
    by one (`stacks.py`); of other such stacks, which stay in `torch_dtype`, a warning names their bytes.

    Args:
        model: the model, changed in place: on meta if there is a checkpoint.
        bnb_quantization_config: what becomes of it; Accelerate's object is taken too.
        weights_location: a checkpoint in full precision or quantized in the same way, by bigkit or Transformers: a
            file, an index or a folder. None quantizes the weights that the model has.
        device_map: module name -> device; or one of `STRATEGIES` ("auto", ...), planned with the sizes that the weights
            will have. None takes GPU 0, or the CPU where there is none.
        no_split_module_classes: classes that stay on one device; None takes the model's own list.
        max_memory: device -> budget, for maps by name; None asks this machine.
        offload_folder: where quantized weights for "disk" are written; those of a checkpoint that is quantized already
            rest in its files.
        offload_state_dict: accepted for compatibility; nothing is held in memory twice either way.
        stand_in, options: see `dispatch_model`.

    Returns:
        The model, with `hf_device_map`. What rests in RAM or on disk travels in its quantized form; `state_dict()` and
        adapters of `peft` find its scales too (DoRA on an offloaded 4-bit layer is refused).

    Raises:
        ImportError: bitsandbytes is not there.
        FileNotFoundError, CheckpointError: there is no checkpoint, it is broken, or does not fit model or config.
        PlanError: no placement fits within the budgets.
        TypeError: an option that `dispatch_model` does not have.
        ValueError: the map misses a module, no layer would be quantized, a model on meta has no checkpoint, or weights
            for "disk" have no folder.

    >>> from bigkit.zoo.gpt import load_pygpt
    >>> config = BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="fp32")
    >>> model = load_and_quantize_model(load_pygpt(), config, device_map={"": "cpu"})
    >>> type(model.transformer["h"][0].mlp.c_fc).__name__, type(model.lm_head).__name__
    ('Linear4bit', 'Linear')
    """
    config = BnbQuantizationConfig.of(bnb_quantization_config)
    bitsandbytes()
    arguments: dict[str, Any] = {"offload_dir": offload_folder, "stand_in": stand_in, **options}
    inspect.signature(dispatch_model).bind(model, {}, **arguments)  # an option that it lacks is an error now
    with ExitStack() as until_loaded:
        source = None if weights_location is None else Checkpoint.open(weights_location)
        if source is not None:
            until_loaded.enter_context(as_stored(model, source))
        stacks = stacks_to_quantize(model, config)
        targets = layers_to_quantize(model, config, needed=not stacks)
        _warn_of_stacks(model, config, stacks)
        devices, slots = _device_map(
            model, config, [*targets, *stacks], device_map, no_split_module_classes, max_memory, options.get("slots")
        )
        arguments["slots"] = slots
        places = _Places(devices, stand_in, offload_folder)
        if source is None:
            weights = _weights_of_model(model, config, targets, stacks, places)
        else:
            kinds = _check(model, config, targets, source)
            weights = iter(list(_weights_of_checkpoint(source, kinds, config, targets, stacks, places)))
            with _without_weights(model, (*targets, *stacks)):
                rest, fp32 = Checkpoint.open(weights_location), config.keep_in_fp32_modules  # type: ignore[arg-type]
                load_matching(
                    model, rest, places.devices, offload_folder, config.torch_dtype, keep_in_fp32_modules=fp32
                )
        weights = chain([next(weights)], weights)  # the first one is made while the model is as it was
    with _refusing_to_run(model):
        for name, weight in weights:
            if isinstance(weight, Mapping):
                hold(model, name, config, weight)
                continue
            layer = empty_layer_for(targets[name], config)
            layer._parameters["weight"] = weight
            model.set_submodule(name.removesuffix(".weight"), layer)
            targets[name]._parameters["weight"] = None  # it can go, whoever still holds the old layer
            del weight
        if weights_location is None:
            cast(model, config.torch_dtype, config.keep_in_fp32_modules or ())
        dispatch_model(model, devices, **arguments)
        _mark(model, config, [*targets, *stacks])
    return model


def _warn_of_stacks(model: nn.Module, config: BnbQuantizationConfig, quantized: Iterable[str]) -> None:
    """Say which stacks of matrices, neither linear layers nor experts that can be quantized, stay as they are."""
    done = {*quantized}
    stacks = {
        name: tensor.elements * config.torch_dtype.itemsize
        for name, (tensor, owner) in spec_from_module(model).tensors.items()
        if len(tensor.shape) == 3 and min(tensor.shape) > 1 and not tensor.buffer and "Conv" not in owner.cls
        if name not in done and is_floating(tensor.dtype)
    }
    if stacks:
        warnings.warn(
            f"{listed(stacks)}: weights of several experts (or heads) in one tensor, which is no linear layer, are not "
            f"quantized. They stay in {dtype_name(config.torch_dtype)}: {format_bytes(sum(stacks.values()))}",
            stacklevel=3,
        )


@contextmanager
def _refusing_to_run(model: nn.Module) -> Iterator[None]:
    """A block that changes the model. If an error or an interrupt ends it, the model refuses to run from then on."""
    hook = model.register_forward_pre_hook(_refuse_to_run, prepend=True)
    yield
    hook.remove()


def _refuse_to_run(model: nn.Module, args: Any) -> None:
    raise RuntimeError(
        f"quantizing this {type(model).__name__} was interrupted: it is neither what it was nor ready to run. "
        "Build or load the model again"
    )


def _device_map(
    model: nn.Module, config: BnbQuantizationConfig, quantized: Iterable[str],
    device_map: Mapping[str, Device] | str | None, no_split: Iterable[str] | None,
    max_memory: Mapping[Device, int | str] | None,
    slots: int | None,
) -> tuple[dict[str, Device], int | None]:  # fmt: skip
    """The map that is asked for, checked; by name, planned with the sizes that the weights will have. And its slots."""
    if device_map is None:
        device_map = {"": 0 if torch.cuda.is_available() else "cpu"}
    if not isinstance(device_map, str):
        check_device_map(model, device_map)
        return {name: read_device(device) for name, device in device_map.items()}, slots
    if device_map not in STRATEGIES:
        raise ValueError(f"unknown device_map {device_map!r}: expected a dict or one of {', '.join(STRATEGIES)}")
    spec = spec_from_module(model)
    fp32 = config.keep_in_fp32_modules or ()
    floats = [name for name, (tensor, _) in spec.tensors.items() if is_floating(tensor.dtype)]
    plan = place(
        spec, get_max_memory(max_memory), device_map, dtype=config.torch_dtype, quantization=config.quantization,
        keep=_kept(spec, quantized), special_dtypes={name: "float32" for name in floats if is_named(name, fp32)},
        no_split=no_split,
        slots=slots,
    )  # fmt: skip
    return plan.device_map, plan.slots or slots


def _kept(spec: ModelSpec, quantized: Iterable[str]) -> list[str]:
    """Names of the modules that could be quantized and are not, given the names of the weights that are."""
    owners = {name.rpartition(".")[0] for name in quantized}
    return [name for name, module in spec.root.walk() if (module.linear or is_stacked(module)) and name not in owners]


class _Places:
    """Where weights rest, and where they are quantized: on the device that will run them.

    Args:
        device_map: module name -> device, for the whole model.
        stand_in: see `dispatch_model`.
        folder: where weights that rest on disk are written.
    """

    def __init__(
        self, device_map: Mapping[str, Device], stand_in: Mapping[Device, torch.device | str] | None,
        folder: str | os.PathLike[str] | None,
    ) -> None:  # fmt: skip
        real = {read_device(device): read_device(other) for device, other in (stand_in or {}).items()}
        main = next((device for device in device_map.values() if device not in _AWAY), "cpu")
        self.devices = {name: real.get(device, device) for name, device in device_map.items()}
        self.rests = placement(self.devices)  # name of a tensor -> the device where it rests
        self.main = real.get(main, main)  # runs what rests in RAM or on disk
        self.folder = None if folder is None else Path(folder)

    def works(self, name: str) -> torch.device:
        """The device that runs a weight."""
        device = self.rests(name)
        return torch_device(self.main if device in _AWAY else device)

    def memory(self, name: str) -> torch.device:
        """Where a weight is put: on its device, or in RAM, from where it may go on to disk."""
        return _CPU if self.rests(name) in _AWAY else self.works(name)

    def need_folder(self, names: Iterable[str]) -> None:
        """Check that there is a folder if any of these tensors must be written to disk."""
        on_disk = [name for name in names if self.rests(name) == "disk"]
        if on_disk and self.folder is None:
            raise ValueError(f"{listed(on_disk)} must be written to disk in another form: give an offload_folder")

    def put(self, name: str, weight: nn.Parameter) -> nn.Parameter:
        """Bring a quantized weight to where it rests."""
        memory = self.memory(name)
        if weight.device != memory:
            weight = put_together(weight, {part: tensor.to(memory) for part, tensor in take_apart(weight).items()})
        if self.rests(name) != "disk":
            return weight
        file, ranges = self._write(take_apart(weight))
        template = skeleton(weight)
        record_resting_place(template, ranges, file)
        return template

    def put_stack(self, name: str, parts: Mapping[str, nn.Parameter]) -> Mapping[str, nn.Parameter]:
        """Bring the tensors of a quantized stack, which are in its `memory`, to where it rests."""
        if self.rests(name) != "disk":
            return parts
        file, ranges = self._write(parts)
        empty = {suffix: nn.Parameter(part.to("meta"), requires_grad=False) for suffix, part in parts.items()}
        for suffix, part in empty.items():
            record_resting_place(part, {"": ranges[suffix]}, file)
        return empty

    def _write(self, parts: Mapping[str, Tensor]) -> tuple[Any, Mapping[str, Stored]]:
        """Write the tensors of a weight to a new file."""
        assert self.folder is not None, "need_folder was called"
        forms = {suffix: Form(tuple(part.shape), part.dtype) for suffix, part in parts.items()}
        return write_file(self.folder, forms, lambda suffix: parts[suffix].data)


def _quantize(
    tensors: Iterable[tuple[str, Tensor]], config: BnbQuantizationConfig, targets: Mapping[str, nn.Module],
    places: _Places,
) -> Iterator[tuple[str, nn.Parameter]]:  # fmt: skip
    """Weights, quantized as they come and put where they rest; each is let go before the next one comes."""
    for name, tensor in tensors:
        weight = tensor.to(config.torch_dtype)
        del tensor
        yield name, places.put(name, quantized(rows(targets[name], weight), config.quantization))
        del weight


def _quantize_stack(
    name: str, experts: Iterable[Tensor], count: int, config: BnbQuantizationConfig, places: _Places
) -> tuple[str, Mapping[str, nn.Parameter]]:
    """A stack, quantized expert by expert and put where it rests."""
    moved = (expert.to(places.works(name), config.torch_dtype) for expert in experts)
    return name, places.put_stack(name, quantized_stack(moved, count, config.quantization, places.memory(name)))


# ---------------------------------------------------------------------------------------------------------------------
# Weights from a checkpoint


def _check(
    model: nn.Module, config: BnbQuantizationConfig, targets: Mapping[str, nn.Module], source: Checkpoint
) -> dict[str, str | None]:
    """Weight -> how it is stored ("int8", "nf4", "fp4", None: plain), if the whole checkpoint fits the model."""
    _, report = match(model, source)
    kinds = {name: stored_kind(source, name) for name in targets}
    expected = config.quantization.partition("-")[0]
    for name, kind in kinds.items():
        if kind not in (None, expected):
            raise CheckpointError(f"{name} in {source.path} is stored as {kind}, but the config asks for {expected}")
    for name, *_ in (*report.mismatched, *report.wrong_dtype):
        if name not in kinds and (kind := stored_kind(source, name)):
            raise CheckpointError(f"{name} in {source.path} is stored as {kind}, but would be kept: see skip_modules")
    rest = dataclasses.replace(
        report,
        unexpected=(),
        duplicates=(),
        mismatched=tuple(record for record in report.mismatched if not kinds.get(record[0])),
        wrong_dtype=tuple(record for record in report.wrong_dtype if not kinds.get(record[0])),
    )
    if not rest.clean:
        raise CheckpointError(f"{source.path} does not fit {type(model).__name__}: {rest}")
    return kinds


def _weights_of_checkpoint(
    source: Checkpoint, kinds: Mapping[str, str | None], config: BnbQuantizationConfig,
    targets: Mapping[str, nn.Module], stacks: Iterable[str], places: _Places,
) -> Iterator[tuple[str, Any]]:  # fmt: skip
    """Name -> quantized weight, where it rests: those that are stored so, and the others quantized as they are read."""
    places.need_folder(stacks)
    plain: dict[torch.device, list[str]] = {}
    ready: dict[Device | torch.device, dict[str, torch.dtype | None]] = {}
    for name, kind in kinds.items():
        if kind is None or name not in source.stored:
            places.need_folder([name])
        if kind is None:
            plain.setdefault(places.works(name), []).append(name)
            continue
        *tensors, read_by_python = stored_keys(name, kind)
        for memory, keys in ((places.memory(name), tensors), (_CPU, [read_by_python])):
            ready.setdefault(memory, {}).update({key: None for key in keys if key in source})
    for device, names in plain.items():
        yield from _quantize(stream_tensors(source, names, device), config, targets, places)
    read = read_tensors(source, ready)
    for name in (name for name, kind in kinds.items() if kind):
        outputs, inputs = rows(targets[name], targets[name].weight).shape  # type: ignore[arg-type]
        weight = from_stored(name, (outputs, inputs), config.quantization, read)
        if places.rests(name) == "disk" and name in source.stored:  # it rests in the checkpoint itself
            ranges = {part: source.stored[key] for part, key in travelling_keys(name, weight).items()}
            template = skeleton(weight)
            record_resting_place(template, ranges)
            yield name, template
        else:
            yield name, places.put(name, weight)
    for name in stacks:
        count = source.shape_and_dtype(name)[0][0]
        yield _quantize_stack(name, stream_rows(source, name), count, config, places)


@contextmanager
def _without_weights(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Within it, the model lacks these parameters."""
    places = [(model.get_submodule(name.rpartition(".")[0])._parameters, name.rpartition(".")[2]) for name in names]
    weights = [parameters[own] for parameters, own in places]
    for parameters, own in places:
        parameters[own] = None
    try:
        yield
    finally:
        for (parameters, own), weight in zip(places, weights):
            parameters[own] = weight


# ---------------------------------------------------------------------------------------------------------------------
# Weights of a model that is loaded


def _weights_of_model(
    model: nn.Module, config: BnbQuantizationConfig, targets: Mapping[str, nn.Module], stacks: Iterable[str],
    places: _Places,
) -> Iterator[tuple[str, Any]]:  # fmt: skip
    """Name -> quantized weight, where it rests: all checked at once, and made one after another.

    Those for disk are written at once. They take no memory, and a full disk then leaves the model as it was.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in chain(parameters.items(), model.named_buffers(remove_duplicate=False)):
        if tensor.is_meta:
            raise ValueError(f"{name!r} is on meta and has no data to quantize: give weights_location")
    places.need_folder(parameters)
    del parameters

    def quantize(on_disk: bool) -> Iterator[tuple[str, Any]]:
        names = [name for name in targets if (places.rests(name) == "disk") == on_disk]
        tensors = ((name, model.get_parameter(name).data.to(places.works(name), config.torch_dtype)) for name in names)
        yield from _quantize(tensors, config, targets, places)
        for name in stacks:
            if (places.rests(name) == "disk") == on_disk:
                experts = model.get_parameter(name).data
                yield _quantize_stack(name, experts, len(experts), config, places)

    return chain(list(quantize(on_disk=True)), quantize(on_disk=False))


# ---------------------------------------------------------------------------------------------------------------------
# Afterwards


def _mark(model: nn.Module, config: BnbQuantizationConfig, targets: Iterable[str]) -> None:
    """What others ask a quantized model for: peft two flags, Transformers the config under which it loads it again."""
    model.requires_grad_(False)
    model.eval()
    marks: Any = model
    marks.is_loaded_in_4bit, marks.is_loaded_in_8bit = config.load_in_4bit, config.load_in_8bit
    if hasattr(marks, "config") and hasattr(marks.config, "to_dict") and hasattr(marks.config, "save_pretrained"):
        owners = {name.rpartition(".")[0] for name in targets}
        able = (isinstance(module, (nn.Linear, AsStored)) or is_linear(module) for module in model.modules())
        kept = [name for (name, _), one in zip(model.named_modules(), able) if one and name not in owners]
        stated = dataclasses.replace(config, skip_modules=kept, keep_in_fp32_modules=())
        copies: dict[int, Any] = {}  # id of a config -> its copy: the user's may be another model's too
        copy.deepcopy(marks.config, copies)
        for module in model.modules():
            if id(own := vars(module).get("config")) in copies:  # parts read what is set in their model's config
                module.config = copies[id(own)]
        marks.config.quantization_config = stated.to_dict()
    model.register_forward_pre_hook(_refuse_training)


def _refuse_training(model: nn.Module, args: Any) -> None:
    """A forward in training mode that could train nothing is a mistake: say so before the loss has no gradient."""
    if model.training and torch.is_grad_enabled() and not any(p.requires_grad for p in model.parameters()):
        raise RuntimeError(
            f"{type(model).__name__} is quantized: its weights are codes, which have no gradients, so it cannot be "
            "trained as a whole. Train an adapter on it (peft.get_peft_model with a LoraConfig), or call eval()"
        )
