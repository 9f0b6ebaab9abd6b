"""8-bit and 4-bit models by bitsandbytes: which layers are quantized, loading them, and what they refuse.

`load_and_quantize_model` streams: one tensor is read, quantized and let go before the next one comes, so the peak is
the quantized model and one tensor. Linear layers are quantized, GPT-2's `Conv1D` turned round first. The output head
and tied modules are kept, and so are subclasses of `nn.Linear`, whose owners may read their weights. A checkpoint that
is quantized already is taken as it is; `save_model` writes one, in the keys of Transformers.

Leaves out: what a quantized weight is made of (`quantize/bnb.py`), training (an adapter's business: `peft`).
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.format import Checkpoint, CheckpointError, Form, Stored, WrittenFile, write_file
from ..checkpoints.load import compare, load_checkpoint_in_model, read_tensors, stream_tensors
from ..devices import Device, placement, read_device
from ..maps.device_map import get_max_memory
from ..maps.plan import Plan
from ..maps.strategies import STRATEGIES, plan
from ..meta.empty import twin
from ..meta.skeleton import spec_from_module
from ..offload.dispatch import dispatch_model
from ..offload.inputs import torch_device
from ..units import dtype_name
from .bnb import (
    bitsandbytes,
    empty_layer,
    from_stored,
    is_quantized,
    put_together,
    quantized,
    skeleton,
    stored_keys,
    stored_kind,
    take_apart,
    travelling_keys,
)

_FLOATS = ("float32", "float16", "bfloat16")


# ---------------------------------------------------------------------------------------------------------------------
# What is wanted


@dataclass(frozen=True)
class BnbQuantizationConfig:
    """How a model is quantized. It is checked when it is made, and never changes.

    Args:
        load_in_8bit: LLM.int8: int8 codes, one scale a row; activations are quantized too, outliers apart.
        llm_int8_threshold: activations of this magnitude or more are multiplied in 16 bit; 0 for none.
        load_in_4bit: 4-bit codes, one scale for each 64 weights; activations stay as they are.
        bnb_4bit_quant_type: "fp4" or "nf4" (spaced for normally distributed weights).
        bnb_4bit_use_double_quant: store the scales in 8 bits.
        bnb_4bit_compute_dtype: what 4-bit weights become to be multiplied: a torch dtype or its name ("fp16", "bf16").
        torch_dtype: the dtype of all other floating tensors, and of the weights before they are quantized; None takes
            float16 for 8 bit and the compute dtype for 4 bit.
        skip_modules: names of modules that stay in `torch_dtype`: whole names, or some of their parts ("lm_head",
            "h.0", "c_proj"). None takes the output head and tied modules.
        keep_in_fp32_modules: the same, for modules that stay in float32.

    Raises:
        ValueError: an option has a value that does not exist, or not exactly one of 8 and 4 bit is asked for.

    >>> BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4").quantization
    'nf4'
    """

    load_in_8bit: bool = False
    llm_int8_threshold: float = 6.0
    load_in_4bit: bool = False
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_compute_dtype: Any = "float16"
    torch_dtype: Any = None
    skip_modules: Iterable[str] | None = None
    keep_in_fp32_modules: Iterable[str] | None = None

    def __post_init__(self) -> None:
        for name in ("load_in_8bit", "load_in_4bit", "bnb_4bit_use_double_quant"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.load_in_8bit == self.load_in_4bit:
            both = "both" if self.load_in_8bit else "neither"
            raise ValueError(f"set exactly one of load_in_8bit and load_in_4bit, not {both}")
        threshold = self.llm_int8_threshold
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < float("inf"):
            raise ValueError(f"llm_int8_threshold must be a number of 0 or more, not {threshold!r}")
        if self.load_in_4bit and threshold != 6.0:
            warnings.warn("llm_int8_threshold has no effect with load_in_4bit", stacklevel=3)
        if self.bnb_4bit_quant_type not in ("fp4", "nf4"):
            raise ValueError(f"bnb_4bit_quant_type must be 'fp4' or 'nf4', not {self.bnb_4bit_quant_type!r}")
        compute = _float("bnb_4bit_compute_dtype", self.bnb_4bit_compute_dtype)
        default = torch.float16 if self.load_in_8bit else compute
        rest = default if self.torch_dtype is None else _float("torch_dtype", self.torch_dtype)
        object.__setattr__(self, "bnb_4bit_compute_dtype", compute)
        object.__setattr__(self, "torch_dtype", rest)
        for name in ("skip_modules", "keep_in_fp32_modules"):
            names = getattr(self, name)
            if names is None:
                continue
            listed = () if isinstance(names, str) else tuple(names)
            if isinstance(names, str) or not all(isinstance(item, str) and item for item in listed):
                raise ValueError(f"{name} must be a list of module names, not {names!r}")
            object.__setattr__(self, name, listed)

    @property
    def quantization(self) -> str:
        """One of `layers.QUANTIZATIONS`: what `plan` and `estimate_memory` call it."""
        if self.load_in_8bit:
            return "int8"
        return self.bnb_4bit_quant_type + "-double" * self.bnb_4bit_use_double_quant

    def to_dict(self) -> dict[str, Any]:
        """What Transformers has under `quantization_config` in a model's config.json."""
        skip = None if self.skip_modules is None else [*self.skip_modules, *(self.keep_in_fp32_modules or ())]
        return {
            "quant_method": "bitsandbytes", "load_in_8bit": self.load_in_8bit, "load_in_4bit": self.load_in_4bit,
            "llm_int8_threshold": float(self.llm_int8_threshold), "llm_int8_skip_modules": skip,
            "llm_int8_has_fp16_weight": False, "llm_int8_enable_fp32_cpu_offload": False,
            "bnb_4bit_quant_type": self.bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": self.bnb_4bit_use_double_quant,
            "bnb_4bit_compute_dtype": dtype_name(self.bnb_4bit_compute_dtype), "bnb_4bit_quant_storage": "uint8",
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], torch_dtype: Any = None) -> BnbQuantizationConfig:
        """The inverse of `to_dict`; what the other does not know is left out.

        Args:
            data: `quantization_config` of a config.json.
            torch_dtype: `dtype` of the same file.

        Raises:
            ValueError: it is no config of bitsandbytes, or asks for something that bigkit does not do.
        """
        if data.get("quant_method", "bitsandbytes") != "bitsandbytes":
            raise ValueError(f"quantized by {data['quant_method']!r}, expected 'bitsandbytes'")
        if data.get("llm_int8_has_fp16_weight") or data.get("bnb_4bit_quant_storage", "uint8") != "uint8":
            raise ValueError("llm_int8_has_fp16_weight and a bnb_4bit_quant_storage other than uint8 are not supported")
        names = ("load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
                 "bnb_4bit_compute_dtype")  # fmt: skip
        options = {name: data[name] for name in names if data.get(name) is not None}
        if data.get("load_in_8bit"):
            options["llm_int8_threshold"] = data.get("llm_int8_threshold", 6.0)
        return cls(torch_dtype=torch_dtype, skip_modules=data.get("llm_int8_skip_modules"), **options)


def _float(name: str, dtype: object) -> torch.dtype:
    try:
        known = dtype_name(dtype)
    except ValueError:
        known = ""
    if known not in _FLOATS:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, not {dtype!r}")
    found: torch.dtype = getattr(torch, known)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Which layers


def replace_with_bnb_layers(
    model: nn.Module,
    bnb_quantization_config: BnbQuantizationConfig,
    modules_to_not_convert: Iterable[str] | None = None,
    current_key_name: Iterable[str] | None = None,
) -> nn.Module:
    """Put bitsandbytes' layers in the place of linear ones, in the model itself.

    They take over the weights as they are. bitsandbytes quantizes a weight when it is moved to a device, the CPU
    included; `load_and_quantize_model` does all of it and needs less memory.

    Args:
        model: the model, on meta or not.
        bnb_quantization_config: which layers they become.
        modules_to_not_convert: names of modules that stay, whole or in part; None takes what the config says.
        current_key_name: accepted for compatibility.

    Returns:
        The model.

    Raises:
        ImportError: bitsandbytes is not there.
        ValueError: no layer of the model would be quantized.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    >>> replace_with_bnb_layers(model, BnbQuantizationConfig(load_in_8bit=True))
    Sequential(
      (0): Linear8bitLt(in_features=64, out_features=64, bias=True)
      (1): Linear(in_features=64, out_features=8, bias=True)
    )
    """
    names = None if modules_to_not_convert is None else tuple(modules_to_not_convert)
    for name, module in _targets(model, bnb_quantization_config, names).items():
        layer: Any = _layer(module, bnb_quantization_config)
        weight: Any = module.weight.data
        layer.weight = twin(layer.weight, weight.T.contiguous() if _is_conv1d(module) else weight)
        _put(model, name, layer, module)
    return model


def _targets(
    model: nn.Module, config: BnbQuantizationConfig, skip: tuple[str, ...] | None = None
) -> dict[str, nn.Module]:
    """Name -> module of every layer that is to be quantized."""
    if skip is None:
        given = spec_from_module(model).kept if config.skip_modules is None else config.skip_modules
        skip = (*given, *(config.keep_in_fp32_modules or ()))
    shared = _modules_of_ties(model)
    found = {
        name: module
        for name, module in model.named_modules()
        if _convertible(module) and not _named(name, skip) and name not in shared
    }
    if not found:
        kinds = sorted({type(module).__name__ for module in model.modules() if isinstance(module, nn.Linear)})
        has = f"it has {', '.join(kinds)}, all of them kept" if kinds else "it has no nn.Linear and no Conv1D"
        raise ValueError(f"no layer of {type(model).__name__} would be quantized: {has}")
    return found


def _convertible(module: nn.Module) -> bool:
    return type(module) is nn.Linear or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is the transposed linear layer of Transformers' GPT-2."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def _modules_of_ties(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[0] for group in spec_from_module(model).ties for name in group}


def _named(name: str, names: Iterable[str]) -> bool:
    """Whether some of the dotted parts of `name`, one after another, are one of `names`."""
    return any(f".{other}." in f".{name}." for other in names)


def _layer(module: nn.Module, config: BnbQuantizationConfig) -> nn.Module:
    """An empty layer of bitsandbytes of the same sizes."""
    outputs, inputs = _shape(module)
    made: nn.Module = empty_layer(
        module, inputs, outputs, config.quantization, config.llm_int8_threshold, config.bnb_4bit_compute_dtype
    )
    return made


def _shape(module: nn.Module) -> tuple[int, int]:
    """(out, in)."""
    first, second = module.weight.shape  # type: ignore[misc]
    return (second, first) if _is_conv1d(module) else (first, second)


def _put(model: nn.Module, name: str, layer: nn.Module, module: nn.Module) -> None:
    layer.bias = module.bias
    layer.requires_grad_(False)
    layer.train(module.training)
    model.set_submodule(name, layer)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


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
    placed. Nothing of the model changes before all of it has been checked and read. All its parameters are frozen.

    Args:
        model: the model, changed in place: on meta if there is a checkpoint.
        bnb_quantization_config: what becomes of it.
        weights_location: a checkpoint in full precision or quantized in the same way, by bigkit or Transformers: a
            file, an index or a folder. None quantizes the weights that the model has.
        device_map: module name -> device; or one of `planner.STRATEGIES` ("auto", ...), planned with the sizes that
            the weights will have. None takes GPU 0, or the CPU where there is none.
        no_split_module_classes: classes that stay on one device; None takes the model's own list.
        max_memory: device -> budget, for maps by name; None asks this machine.
        offload_folder: where quantized weights for "disk" are written; those of a checkpoint that is quantized already
            rest in its files.
        offload_state_dict: accepted for compatibility; nothing is held in memory twice either way.
        stand_in, options: see `dispatch_model`.

    Returns:
        The model, with `hf_device_map`. What rests in RAM or on disk travels in its quantized form.

    Raises:
        ImportError: bitsandbytes is not there.
        FileNotFoundError, CheckpointError: there is no checkpoint, it is broken, or does not fit model or config.
        PlanError: no placement fits within the budgets.
        ValueError: the map misses a module, no layer would be quantized, a model on meta has no checkpoint, or weights
            for "disk" have no folder.

    >>> from bigkit.zoo.gpt import load_pygpt
    >>> config = BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="fp32")
    >>> model = load_and_quantize_model(load_pygpt(), config, device_map={"": "cpu"})
    >>> type(model.transformer["h"][0].mlp.c_fc).__name__, type(model.lm_head).__name__
    ('Linear4bit', 'Linear')
    """
    config = bnb_quantization_config
    bitsandbytes()
    targets = _targets(model, config)
    devices = _device_map(model, config, targets, device_map, no_split_module_classes, max_memory)
    real = {name: read_device((stand_in or {}).get(device, device)) for name, device in devices.items()}
    at = _Places(real, devices, None if offload_folder is None else Path(offload_folder))
    if weights_location is None:
        _quantize_in_place(model, config, targets, at)
    else:
        source = Checkpoint.open(weights_location)
        kinds = _check(model, config, targets, source)
        weights = dict(_weights(source, config, targets, kinds, at))
        with _set_aside(targets.values()):
            load_checkpoint_in_model(
                model, weights_location, real, offload_folder, config.torch_dtype,
                keep_in_fp32_modules=config.keep_in_fp32_modules,
            )  # fmt: skip
        for name, weight in weights.items():
            layer = _layer(targets[name], config)
            _put(model, name, layer, targets[name])
            layer._parameters["weight"] = weight
    vars(model).setdefault("_on_disk", {}).update(at.stored)
    vars(model).setdefault("_written", {}).update(at.files)
    dispatch_model(model, devices, offload_dir=offload_folder, stand_in=stand_in, **options)
    _mark(model, config)
    return model


@dataclass(frozen=True)
class _Places:
    """Where weights rest, and where they are quantized: on the device that will run them.

    Args:
        devices: the device map, with real devices.
        asked: the device map as it was given.
        folder: where what shall rest on disk is written.
        stored: name -> range of a file, for what rests there.
        files: those that were written; they go with the model.
    """

    devices: Mapping[str, Device]
    asked: Mapping[str, Device]
    folder: Path | None
    stored: dict[str, Stored] = field(default_factory=dict)
    files: dict[Path, WrittenFile] = field(default_factory=dict)

    @cached_property
    def rests(self) -> Callable[[str], Device]:
        """A tensor's name -> where it rests; the map was checked, so there is a place for each."""
        return placement(self.devices)

    def works(self, name: str) -> torch.device:
        """The device that runs it: for what rests in RAM or on disk the first GPU of the map, or the CPU."""
        main = next((name for name, device in self.asked.items() if device not in ("cpu", "disk")), None)
        found = self.rests(name)
        if found in ("cpu", "disk"):
            found = "cpu" if main is None else self.devices[main]
        return torch_device(found)

    def memory(self, name: str) -> torch.device:
        """Where it is put: on a device, or in RAM, from where what is for disk goes on."""
        return _CPU if self.rests(name) in ("cpu", "disk") else self.works(name)

    def put(self, name: str, weight: nn.Parameter) -> nn.Parameter:
        """A quantized weight where it rests: on disk, a skeleton of it."""
        if weight.device != self.memory(name):
            weight = put_together(
                weight, {part: data.to(self.memory(name)) for part, data in take_apart(weight).items()}
            )
        if self.rests(name) != "disk":
            return weight
        if self.folder is None:
            raise ValueError(f"{name!r} shall rest on disk and is in no file as it is needed: give an offload folder")
        parts = {_part(name, part): data for part, data in take_apart(weight).items()}
        forms = {part: Form(tuple(data.shape), data.dtype) for part, data in parts.items()}
        file, stored = write_file(self.folder, forms, parts.__getitem__)
        self.stored.update(stored)
        self.files[file.path] = file
        return skeleton(weight)


_CPU = torch.device("cpu")


def _part(name: str, part: str) -> str:
    return f"{name}.{part}" if part else name


def _device_map(
    model: nn.Module,
    config: BnbQuantizationConfig,
    targets: Mapping[str, nn.Module],
    device_map: Mapping[str, Device] | str | None,
    no_split: Iterable[str] | None,
    max_memory: Mapping[Device, int | str] | None,
) -> dict[str, Device]:
    """The map that is asked for, checked; by name, planned with the sizes that the weights will have."""
    if device_map is None:
        device_map = {"": 0 if torch.cuda.is_available() else "cpu"}
    if isinstance(device_map, str) and device_map not in STRATEGIES:
        raise ValueError(f"unknown device_map {device_map!r}: expected a dict or one of {', '.join(STRATEGIES)}")
    if isinstance(device_map, str):
        return _planned(model, config, targets, get_max_memory(max_memory), device_map, no_split).device_map
    devices = {name: read_device(device) for name, device in device_map.items()}
    _planned(model, config, targets, dict.fromkeys([*devices.values(), "cpu"], 2**62), devices, no_split, strict=False)
    return devices


def _planned(
    model: nn.Module,
    config: BnbQuantizationConfig,
    targets: Mapping[str, nn.Module],
    budgets: Mapping[Device, int | str],
    strategy: Mapping[str, Device] | str,
    no_split: Iterable[str] | None,
    strict: bool = True,
) -> Plan:
    spec = spec_from_module(model)
    fp32 = config.keep_in_fp32_modules or ()
    return plan(
        spec, budgets, strategy, dtype=config.torch_dtype, quantization=config.quantization,
        keep=[name for name, module in spec.root.walk() if module.linear and name not in targets],
        special_dtypes={
            name: "float32" for name, (tensor, _) in spec.tensors.items()
            if tensor.dtype in (*_FLOATS, "float64") and _named(name, fp32)
        },
        no_split=no_split, strict=strict,
    )  # fmt: skip


def _check(
    model: nn.Module, config: BnbQuantizationConfig, targets: Mapping[str, nn.Module], source: Checkpoint
) -> dict[str, str | None]:
    """Weight -> how it is stored ("int8", "nf4", "fp4", None: plain), once all of the checkpoint is seen to fit."""
    report = compare(model, source)
    kinds = {f"{name}.weight": stored_kind(source, f"{name}.weight") for name in targets}
    wanted = config.quantization.partition("-")[0]
    for name, kind in kinds.items():
        if kind not in (None, wanted):
            raise CheckpointError(f"{name} in {source.path} is stored as {kind}, but the config asks for {wanted}")
    for name, *_ in (*report.mismatched, *report.wrong_dtype):
        if name not in kinds and (kind := stored_kind(source, name)):
            raise CheckpointError(f"{name} in {source.path} is stored as {kind}, but would be kept: see skip_modules")
    stored = {name for name, kind in kinds.items() if kind}
    wrong = replace(
        report, unexpected=(), duplicates=(),
        mismatched=tuple(record for record in report.mismatched if record[0] not in stored),
        wrong_dtype=tuple(record for record in report.wrong_dtype if record[0] not in stored),
    )  # fmt: skip
    if not wrong.clean:
        raise CheckpointError(f"{source.path} does not fit {type(model).__name__}: {wrong}")
    return kinds


def _weights(
    source: Checkpoint,
    config: BnbQuantizationConfig,
    targets: Mapping[str, nn.Module],
    kinds: Mapping[str, str | None],
    at: _Places,
) -> Iterator[tuple[str, nn.Parameter]]:
    """Layer -> its quantized weight, where it rests."""
    streams: dict[torch.device, list[str]] = {}
    places: dict[Device | torch.device, dict[str, torch.dtype | None]] = {}
    for key, kind in kinds.items():
        if kind is None:
            streams.setdefault(at.works(key), []).append(key)
        else:
            keys = [name for name in stored_keys(key, kind) if name in source]
            for name in keys:
                places.setdefault(_CPU if name == keys[-1] else at.memory(key), {})[name] = None
    for device, keys in streams.items():
        for key, tensor in stream_tensors(source, keys, device):
            name = key.removesuffix(".weight")
            weight = tensor.to(config.torch_dtype)
            del tensor
            weight = weight.T if _is_conv1d(targets[name]) else weight
            yield name, at.put(key, quantized(weight, config.quantization))
            del weight
    stored = read_tensors(source, places)
    for key, kind in kinds.items():
        if kind is not None:
            name = key.removesuffix(".weight")
            weight = from_stored(key, _shape(targets[name]), config.quantization, stored)
            ranges = {part: source.stored.get(where) for part, where in travelling_keys(key, weight).items()}
            if at.rests(key) == "disk" and None not in ranges.values():  # it rests in the checkpoint itself
                at.stored.update({_part(key, part): where for part, where in ranges.items() if where})
                yield name, skeleton(weight)
            else:
                yield name, at.put(key, weight)


@contextmanager
def _set_aside(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Leave the weights of these modules out meanwhile."""
    weights = [(module, module._parameters["weight"]) for module in modules]
    for module, _ in weights:
        module._parameters["weight"] = None
    try:
        yield
    finally:
        for module, weight in weights:
            module._parameters["weight"] = weight


def _quantize_in_place(
    model: nn.Module, config: BnbQuantizationConfig, targets: Mapping[str, nn.Module], at: _Places
) -> None:
    """Quantize the weights that a model has, each let go before the next one, and bring the rest to its place."""
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    if empty := [name for name, tensor in tensors if tensor.is_meta]:
        raise ValueError(f"{empty[0]!r} is on meta and has no data to quantize: give weights_location")
    for name, module in targets.items():
        key = f"{name}.weight"
        weight: Any = module.weight.data.to(at.works(key), config.torch_dtype)
        weight = weight.T if _is_conv1d(module) else weight
        layer = _layer(module, config)
        _put(model, name, layer, module)
        layer._parameters["weight"] = at.put(key, quantized(weight, config.quantization))
        module._parameters["weight"] = None
    fp32 = config.keep_in_fp32_modules or ()
    for name, parameter in model.named_parameters():
        if not is_quantized(parameter):
            dtype = torch.float32 if _named(name, fp32) else config.torch_dtype
            parameter.data = parameter.data.to(
                at.memory(name), dtype if parameter.is_floating_point() else parameter.dtype
            )
    for prefix, module in model.named_modules():
        for own, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[own] = buffer.to(at.memory(f"{prefix}.{own}" if prefix else own))


def _mark(model: nn.Module, config: BnbQuantizationConfig) -> None:
    """What others ask a quantized model for: peft two flags, Transformers the config under which it loads it again."""
    model.requires_grad_(False)
    model.eval()
    marks: Any = model
    marks.is_loaded_in_4bit, marks.is_loaded_in_8bit = config.load_in_4bit, config.load_in_8bit
    if hasattr(marks, "config") and hasattr(marks.config, "to_dict") and hasattr(marks.config, "save_pretrained"):
        kept = [name for name, module in model.named_modules() if _convertible(module)]
        marks.config = copy.deepcopy(marks.config)
        marks.config.quantization_config = replace(config, skip_modules=kept, keep_in_fp32_modules=()).to_dict()
    model.register_forward_pre_hook(_refuse_training)


def _refuse_training(model: nn.Module, args: Any) -> None:
    """A forward in training mode that could train nothing is a mistake: say so before the loss has no gradient."""
    if model.training and torch.is_grad_enabled() and not any(p.requires_grad for p in model.parameters()):
        raise RuntimeError(
            f"{type(model).__name__} is quantized: its weights are codes, which have no gradients, so it cannot be "
            "trained as a whole. Train an adapter on it (peft.get_peft_model with a LoraConfig), or call eval()"
        )
