"""How a model is quantized: the options of Accelerate and Transformers, checked when they are given."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from ..units import dtype_name

_FLOATS = ("float32", "float16", "bfloat16")
# Options that Transformers has too, under the same names and with the same values.
_SHARED = ("load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")


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
        skip_modules: names of modules that stay in `torch_dtype`, or the ends of names ("lm_head", "h.0", "attn" for
            "self_attn"). None takes the output head. Tied modules, subclasses of `nn.Linear` and what the model's
            classes list in `_keep_in_fp32_modules` (T5's "wo") always stay.
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
    bnb_4bit_compute_dtype: Any = "fp16"
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
            if (names := getattr(self, name)) is not None:
                modules = [None] if isinstance(names, str) else list(names)
                if not all(isinstance(module, str) and module for module in modules):
                    raise ValueError(f"{name} must be a list of module names, not {names!r}")
                object.__setattr__(self, name, tuple(modules))

    @classmethod
    def of(cls, config: Any) -> BnbQuantizationConfig:
        """The same options from Accelerate's config, or another with these attributes.

        Raises:
            TypeError: it is none.
        """
        if isinstance(config, cls):
            return config
        names = [field.name for field in fields(cls)]
        if missing := [name for name in names if not hasattr(config, name)]:
            raise TypeError(f"expected a BnbQuantizationConfig, not a {type(config).__name__} without {missing[0]}")
        return cls(**{name: getattr(config, name) for name in names})

    @property
    def quantization(self) -> str:
        """One of `QUANTIZATIONS` of `model/spec.py`: what `plan` and `estimate_memory` call it."""
        if self.load_in_8bit:
            return "int8"
        return self.bnb_4bit_quant_type + "-double" * self.bnb_4bit_use_double_quant

    def to_dict(self) -> dict[str, Any]:
        """What Transformers has under `quantization_config` in a model's config.json."""
        skip = None if self.skip_modules is None else [*self.skip_modules, *(self.keep_in_fp32_modules or ())]
        return {
            "quant_method": "bitsandbytes",
            **{name: getattr(self, name) for name in _SHARED},
            "llm_int8_threshold": float(self.llm_int8_threshold),
            "llm_int8_skip_modules": skip,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
            "bnb_4bit_compute_dtype": dtype_name(self.bnb_4bit_compute_dtype),
            "bnb_4bit_quant_storage": "uint8",
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], torch_dtype: Any = None) -> BnbQuantizationConfig:
        """The inverse of `to_dict`; what bigkit has no name for is left out.

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
        names = (*_SHARED, "bnb_4bit_compute_dtype")
        options = {name: data[name] for name in names if data.get(name) is not None}
        if data.get("load_in_8bit"):
            options["llm_int8_threshold"] = data.get("llm_int8_threshold", 6.0)
        return cls(torch_dtype=torch_dtype, skip_modules=data.get("llm_int8_skip_modules"), **options)


def _float(name: str, dtype: object) -> torch.dtype:
    try:
        plain = dtype_name(dtype)
    except ValueError:
        plain = ""
    if plain not in _FLOATS:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, not {dtype!r}")
    result: torch.dtype = getattr(torch, plain)
    return result
