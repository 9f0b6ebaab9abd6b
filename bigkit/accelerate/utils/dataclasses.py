"""`accelerate.utils.dataclasses`: the options that are not for training alone."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import Enum

from ...quantize.config import BnbQuantizationConfig
from ..differences import refuse_unknown as __getattr__


class DistributedType(str, Enum):
    """How processes compute. bigkit gives one of the first three; scripts compare with the others too."""

    NO = "NO"
    MULTI_CPU = "MULTI_CPU"
    MULTI_GPU = "MULTI_GPU"
    MULTI_NPU = "MULTI_NPU"
    MULTI_MLU = "MULTI_MLU"
    MULTI_SDAA = "MULTI_SDAA"
    MULTI_MUSA = "MULTI_MUSA"
    MULTI_XPU = "MULTI_XPU"
    MULTI_HPU = "MULTI_HPU"
    MULTI_NEURON = "MULTI_NEURON"
    DEEPSPEED = "DEEPSPEED"
    FSDP = "FSDP"
    XLA = "XLA"
    MEGATRON_LM = "MEGATRON_LM"


class CustomDtype(Enum):
    """Names of dtypes that PyTorch lacks, for sizes."""

    FP8 = "fp8"
    INT4 = "int4"
    INT2 = "int2"

    def __str__(self) -> str:
        return str(self.value)


class PrecisionType(str, Enum):
    """What a model computes in; here always NO: the dtype of its weights."""

    NO = "no"
    FP8 = "fp8"
    FP16 = "fp16"
    BF16 = "bf16"


@dataclass
class InitProcessGroupKwargs:
    """How long a call waits for the other processes; the rest is bigkit's to choose.

    Args:
        backend, init_method: accepted for compatibility.
        timeout: None takes `PartialState`'s.
    """

    backend: str | None = "nccl"
    init_method: str | None = None
    timeout: timedelta | None = None
