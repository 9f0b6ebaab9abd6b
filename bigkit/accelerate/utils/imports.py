"""`accelerate.utils.imports`: what this machine has. bigkit uses CUDA, MPS and the CPU: other accelerators are no."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from ..differences import refuse_unknown as __getattr__
from .versions import compare_versions


def _installed(package: str) -> Callable[[], bool]:
    return lambda: find_spec(package) is not None


def _no(*args: Any, **kwargs: Any) -> bool:
    """Never: bigkit has no part for it."""
    return False


is_boto3_available = _installed("boto3")
is_datasets_available = _installed("datasets")
is_matplotlib_available = _installed("matplotlib")
is_pandas_available = _installed("pandas")
is_peft_available = _installed("peft")
is_pytest_available = _installed("pytest")
is_rich_available = _installed("rich")
is_tensorboard_available = _installed("tensorboard")
is_timm_available = _installed("timm")
is_torchao_available = _installed("torchao")
is_torchvision_available = _installed("torchvision")
is_tqdm_available = _installed("tqdm")
is_transformers_available = _installed("transformers")
is_triton_available = _installed("triton")
is_wandb_available = _installed("wandb")
is_4bit_bnb_available = is_8bit_bnb_available = _installed("bitsandbytes")
is_bitsandbytes_multi_backend_available = _installed("bitsandbytes")

is_deepspeed_available = is_megatron_lm_available = is_msamp_available = is_transformer_engine_available = _no
is_hpu_available = is_mlu_available = is_musa_available = is_neuron_available = is_npu_available = _no
is_sdaa_available = is_torch_xla_available = is_xpu_available = is_habana_gaudi1 = is_fp8_available = _no


def is_bnb_available(min_version: str | None = None) -> bool:
    """Whether bitsandbytes is there, of this version or a later one."""
    return is_8bit_bnb_available() and (min_version is None or compare_versions("bitsandbytes", ">=", min_version))


def is_cuda_available() -> bool:
    """Whether there is a CUDA GPU."""
    return torch.cuda.is_available()


def is_rocm_available() -> bool:
    """Whether there is an AMD GPU, which PyTorch calls CUDA."""
    return torch.version.hip is not None and torch.cuda.is_available()


def is_mps_available(min_version: str = "1.12") -> bool:
    """Whether there is an Apple GPU."""
    return torch.backends.mps.is_available()


def is_bf16_available(ignore_tpu: bool = False) -> bool:
    """Whether bfloat16 can be computed in."""
    return torch.cuda.is_bf16_supported() if torch.cuda.is_available() else True


def is_fp16_available() -> bool:
    """Whether float16 can be computed in."""
    return True
