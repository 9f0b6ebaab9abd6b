"""How many bytes a checkpoint takes that is quantized already, from what its config says.

A `quantization_config` names a method, a number of bits, how many weights share a scale, and which modules are left
out. So the size follows without the files; where these can be reached, their headers are exact (`zoo/headers.py`).
By hand, for a weight of 4096 x 4096 in 4 bits with a scale and a zero point for each 128 weights of a row:

    >>> 4096 * 4096 // 2 + 4096 * 32 * 2 + 4096 * 32 // 2           # codes, scales in float16, zero points in 4 bits
    8716288

Leaves out: what the bits mean (`checkpoints/codecs.py`), and bitsandbytes' formats (`precision.py`).
Source: the files that AutoAWQ, AutoGPTQ, compressed-tensors, DeepSeek-V3 and gpt-oss publish.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from .experts import active_bytes, experts_of
from .spec import ModelSpec, ModuleSpec, TensorSpec

# Keys under which methods list the modules that they leave out.
_KEPT = ("modules_to_not_convert", "ignore", "ignored_layers", "llm_int8_skip_modules", "exclude_modules")


class Format(NamedTuple):
    """What a quantized weight takes.

    Args:
        bits: of one weight.
        group: weights of a row that share a scale; 0: all of a row; -1: all of the weight.
        rows: rows that share a scale.
        scale: bytes of a scale.
        zeros: whether each scale has a zero point of `bits` bits.
        fixed: bytes more for each weight (a scale for all, the shape).
        per_input: bytes more for each input (the group that it is in).
    """

    bits: int
    group: int
    rows: int = 1
    scale: int = 2
    zeros: bool = False
    fixed: int = 0
    per_input: int = 0

    def bytes(self, rows: int, columns: int) -> int:
        """Bytes of a weight of so many outputs and inputs."""
        across = 1 if self.group <= 0 else math.ceil(columns / self.group)
        scales = 1 if self.group < 0 else math.ceil(rows / self.rows) * across
        codes = math.ceil(rows * columns * self.bits / 8) + (math.ceil(scales * self.bits / 8) if self.zeros else 0)
        return codes + scales * self.scale + self.fixed + columns * self.per_input


def read_format(settings: Mapping[str, Any]) -> Format | None:
    """The format that a `quantization_config` names; None if it is not known here.

    >>> read_format({"quant_method": "awq", "bits": 4, "group_size": 128})
    Format(bits=4, group=128, rows=1, scale=2, zeros=True, fixed=0, per_input=0)
    """
    method = str(settings.get("quant_method", "")).lower()
    try:
        if method in ("fp8", "fbgemm_fp8"):
            rows, columns = settings.get("weight_block_size") or (1, 0)
            return Format(8, columns, rows, scale=4)
        if method == "mxfp4":
            return Format(4, 32, scale=1)
        if method in ("awq", "gptq"):
            bits, group = int(settings.get("bits", 4)), int(settings.get("group_size", 128))
            return Format(bits, max(group, 0), zeros=True, per_input=4 * (method == "gptq"))
        if method == "compressed-tensors":
            weights = next(iter(settings["config_groups"].values()))["weights"]
            bits, strategy = int(weights["num_bits"]), weights.get("strategy")
            if str(settings.get("format", "")).startswith("nvfp4"):
                return Format(4, 16, scale=1, fixed=4)
            group = {"tensor": -1, "channel": 0}.get(strategy, int(weights.get("group_size") or 0))
            packed = str(settings.get("format", "")).startswith("pack")
            return Format(bits, group, zeros=not weights.get("symmetric", True), fixed=16 * packed)
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration):
        pass
    return None


def stored_sizes(model: ModelSpec, settings: Mapping[str, Any]) -> dict[str, int] | None:
    """Tensor -> bytes as a checkpoint with this `quantization_config` stores it, ties once; None if unknown.

    MXFP4 quantizes stacked experts alone, the other methods linear layers, and experts where they are many matrices.
    """
    format, method = read_format(settings), str(settings.get("quant_method", "")).lower()
    if format is None:
        return None
    kept = [str(name) for key in _KEPT for name in settings.get(key) or ()]
    later = {name for group in model.ties for name in group[1:]}

    def size(name: str, tensor: TensorSpec, owner: ModuleSpec) -> int:
        stacked = len(tensor.shape) == 3 and "expert" in name and not name.endswith("bias")
        chosen = stacked if method == "mxfp4" else owner.linear and len(tensor.shape) == 2 or stacked
        module = name if stacked else name.rpartition(".")[0]
        if tensor.buffer or not chosen or module.endswith("lm_head") or _is_kept(module, kept):
            return tensor.bytes()
        *experts, rows, columns = tensor.shape
        if stacked and method == "mxfp4":  # such models have (in, out), their files (out, in)
            rows, columns = columns, rows
        return math.prod(experts) * format.bytes(rows, columns)

    return {name: size(name, tensor, owner) for name, (tensor, owner) in model.tensors.items() if name not in later}


def as_stored(model: ModelSpec) -> tuple[int, int] | None:
    """Bytes of a quantized checkpoint, and those of them that one token uses; None if there is none that is known.

    The first figure is exact where the files' headers could be read (the fact "stored_bytes").
    """
    settings, exact = model.facts.get("quantization_config"), model.facts.get("stored_bytes")
    if not isinstance(settings, Mapping):
        return None
    if settings.get("quant_method") == "bitsandbytes":
        kind = settings.get("bnb_4bit_quant_type", "fp4") + "-double" * bool(settings.get("bnb_4bit_use_double_quant"))
        precision = model.precision(None, kind if settings.get("load_in_4bit") else "int8")
        total, used = model.bytes(precision), active_bytes(model, precision)
    elif sizes := stored_sizes(model, settings):
        total = sum(sizes.values())
        idle = (
            sum(size for name, size in sizes.items() if name.startswith(f"{one.name}."))
            * (1 - one.per_token / one.count)
            for one in experts_of(model)
        )
        used = total - round(sum(idle))
    elif exact:
        total, used = model.bytes(), active_bytes(model)
    else:
        return None
    return (exact, round(exact * used / total)) if exact else (total, used)


def _is_kept(module: str, kept: list[str]) -> bool:
    """Whether a module is named among those that are left out: whole, by a part of its name, or by a pattern."""
    for name in kept:
        if name.startswith("re:"):
            if re.match(name[3:], module):
                return True
        elif re.search(rf"(^|\.){re.escape(name).replace(re.escape('*'), '[^.]+')}($|\.)", module):
            return True
    return False
