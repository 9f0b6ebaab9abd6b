"""Bitsandbytes' layers in the place of those that are quantized.

Which ones they are, `ModelSpec.precision` says: for plans and estimates too. GPT-2's `Conv1D` is transposed first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.as_stored import AsStored, stored_dtypes
from ..meta.empty import twin
from ..meta.skeleton import modules_to_keep, spec_from_module
from ..model.precision import float32_modules, is_named
from ..units import dtype_name, listed
from .bnb import empty_layer
from .config import BnbQuantizationConfig


def replace_with_bnb_layers(
    model: nn.Module, bnb_quantization_config: BnbQuantizationConfig,
    modules_to_not_convert: Iterable[str] | None = None, current_key_name: Iterable[str] | None = None,
) -> nn.Module:  # fmt: skip
    """Put bitsandbytes' layers in the place of linear ones, in the model itself.

    They take over the weights as they are. bitsandbytes quantizes a weight when it is moved to a device, the CPU
    included; `load_and_quantize_model` does all of it and needs less memory.

    Args:
        model: the model, on meta or not.
        bnb_quantization_config: which layers they become.
        modules_to_not_convert: names of modules that stay, or the ends of names; None takes what the config says.
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
    config = BnbQuantizationConfig.of(bnb_quantization_config)
    for name, module in layers_to_quantize(model, config, names).items():
        layer: Any = empty_layer_for(module, config)
        layer.weight = twin(layer.weight, rows(module, module.weight.data).contiguous())  # type: ignore[arg-type]
        model.set_submodule(name.removesuffix(".weight"), layer)
    return model


def layers_to_quantize(
    model: nn.Module, config: BnbQuantizationConfig, skip: tuple[str, ...] | None = None, needed: bool = True
) -> dict[str, nn.Module]:
    """Name of a weight -> its layer, for all that are to be quantized.

    Raises:
        ValueError: there is none though one is needed, the model is quantized already, or a layer's forward was
            replaced.
    """
    spec = spec_from_module(model)
    fp32 = config.keep_in_fp32_modules or ()
    if skip is None and config.skip_modules is not None:
        skip = tuple(config.skip_modules)
    precision = spec.precision(config.torch_dtype, config.quantization, skip)
    layers = {
        f"{name}.weight": model.get_submodule(name) for name in spec.quantized(precision) if not is_named(name, fp32)
    }
    if any(type(module).__name__ in ("Linear8bitLt", "Linear4bit") for module in model.modules()):
        raise ValueError(
            f"this {type(model).__name__} is quantized already: quantizing changes a model itself, so it is no "
            "longer empty. Build it again (with init_empty_weights) to load another checkpoint"
        )
    if needed and not layers:
        kinds = sorted({type(module).__name__ for module in model.modules() if isinstance(module, nn.Linear)})
        has = f"it has {', '.join(kinds)}, all of them kept" if kinds else "it has no nn.Linear and no Conv1D"
        if config.load_in_8bit and spec.facts.get("keep_in_int8"):
            has += " (PyTorch's fast nn.TransformerEncoderLayer would read int8 codes as weights: take 4 bit)"
        if any(isinstance(module, AsStored) for module in model.modules()):
            has = "the checkpoint is quantized already: load it as it is stored, with load_checkpoint_and_dispatch"
        raise ValueError(f"no layer of {type(model).__name__} would be quantized: {has}")
    _refuse_patched(layers)
    return layers


def _refuse_patched(layers: Mapping[str, nn.Module]) -> None:
    """What a user has put on a layer goes over to the new one (`_carry_over`), except what is bound to the old one."""
    bound = ["forward", "_state_dict_hooks", "_state_dict_pre_hooks"]
    bound += ["_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"]
    patched = [name for name, module in layers.items() if any(vars(module).get(attribute) for attribute in bound)]
    if patched:
        raise ValueError(
            f"{listed(patched)}: the layer's forward was replaced or has hooks on its state dict, which would be lost "
            "when it is quantized. Put them on afterwards, or name the layer in skip_modules"
        )


def _carry_over(module: nn.Module, layer: nn.Module) -> None:
    """Hooks, attributes, and parts that a layer had beside its weight and bias: the new layer gets the same objects."""
    plain = vars(nn.Linear(1, 1, device="meta"))
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers", "_modules"):
            vars(layer)[name].update({own: part for own, part in value.items() if own not in ("weight", "bias")})
        elif name not in plain and name not in vars(layer) or (value and ("forward" in name or "backward" in name)):
            vars(layer)[name] = value
    layer._non_persistent_buffers_set |= module._non_persistent_buffers_set


def cast(model: nn.Module, dtype: torch.dtype, keep_in_fp32: Iterable[str] = ()) -> None:
    """Bring what is not quantized to a dtype, or to float32 what is named so or a class needs in it."""
    facts = modules_to_keep(model)
    fp32 = (*keep_in_fp32, *float32_modules(facts, dtype_name(dtype)))
    stored = stored_dtypes(model)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and name not in stored:
            parameter.data = parameter.data.to(torch.float32 if is_named(name, fp32) else dtype)


def rows(module: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight, of whatever class the layer is, as (out, in)."""
    is_conv1d = type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")
    return weight.T if is_conv1d else weight  # GPT-2's layer is transposed


def empty_layer_for(module: nn.Module, config: BnbQuantizationConfig) -> nn.Module:
    """A layer of bitsandbytes in the place of another one, with its bias and still without a weight."""
    outputs, inputs = rows(module, module.weight).shape  # type: ignore[arg-type]
    layer = empty_layer(
        module, inputs, outputs, config.quantization, config.llm_int8_threshold, config.bnb_4bit_compute_dtype
    )
    layer.bias = module.bias
    _carry_over(module, layer)
    return layer.requires_grad_(False).train(module.training)
