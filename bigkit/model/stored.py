"""How many bytes a checkpoint takes that is quantized already, from what its config says.

A `quantization_config` names a method, a number of bits, how many weights share a scale, and which modules are left
out. So the size follows without the files; where these can be reached, their headers are exact (`zoo/headers.py`).
By hand, for a weight of 4096 x 4096 in 4 bits with a scale and a zero point for each 128 weights of a row:

    >>> 4096 * 4096 // 2 + 4096 * 32 * 2 + 4096 * 32 // 2           # codes, scales in float16, zero points in 4 bits
    8716288

Leaves out: what the bits mean (`checkpoints/codecs.py`), and bitsandbytes' formats (`precision.py`).
Source: the files that AutoAWQ, AutoGPTQ, compressed-tensors, DeepSeek-V3 and gpt-oss publish; ModelOpt's names as vLLM
reads them; the tensors of torchao 0.18.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

from ..devices import join, prefixes
from ..units import dtype_bits, is_floating
from .precision import Precision, tensor_bytes
from .spec import ModelSpec, ModuleSpec, TensorSpec

# Keys under which methods list the modules that they leave out.
FP8 = "float8_e4m3fn"
AT_A_TIME = 2**26  # weights of stacked experts that are decoded at a time, as `checkpoints/decoded.py` does it
DECODING = 17.0  # bytes that a weight takes while it is decoded, in the format that takes most
BYTE_CODES = 4.5  # the same for codes of one byte, and for MXFP4
DECODING_OF = {"fp8": BYTE_CODES, "int8": BYTE_CODES, "nvfp4": 11.0}  # format of a layer -> it; others: DECODING
DECODING_STACK = {  # format of stacked experts -> the same
    "fp8": BYTE_CODES, "mxfp4": BYTE_CODES, "int8": 8.0, "nf4": 3.0, "fp4": 3.0, "nf4-double": 3.0,
    "fp4-double": 3.0,
}  # fmt: skip
_KEPT = ("modules_to_not_convert", "ignore", "ignored_layers", "llm_int8_skip_modules", "exclude_modules")


class Format(NamedTuple):
    """How a quantized weight is stored.

    Args:
        parts: its rows (outputs) and columns (inputs) -> the tensors that a checkpoint has in its place, by own name.
        decoding: bytes that each weight takes while it is decoded to bfloat16, all copies in between counted.
    """

    parts: Callable[[int, int], dict[str, TensorSpec]]
    decoding: float = DECODING

    def bytes(self, rows: int, columns: int) -> int:
        """Bytes of a weight of so many outputs and inputs."""
        return sum(part.bytes() for part in self.parts(rows, columns).values())


def read_format(settings: Mapping[str, Any]) -> Format | None:
    """The format that a `quantization_config` names; None if it is not known here.

    >>> format = read_format({"quant_method": "awq", "bits": 4, "group_size": 128})
    >>> {name: part.shape for name, part in format.parts(4096, 4096).items()}
    {'qweight': (4096, 512), 'qzeros': (32, 512), 'scales': (32, 4096)}
    >>> format.bytes(4096, 4096)
    8716288
    """
    method = str(settings.get("quant_method", "")).lower()
    try:
        if method in ("fp8", "fbgemm_fp8", "mxfp8"):
            block = settings.get("weight_block_size") or ([1, 32] if method == "mxfp8" else None)
            height, width = map(int, block) if block else (1, 0)
            return Format(partial(_scaled, height, width, block is not None, method == "mxfp8"), BYTE_CODES)
        if method.startswith("modelopt"):
            fp8 = Format(partial(_scaled, 2**62, 0, False, False), BYTE_CODES)  # one scale for a whole weight
            return {"NVFP4": Format(_modelopt_nvfp4, 11), "FP8": fp8}[str(settings["quant_algo"])]
        if method == "torchao":
            return _torchao(settings)
        if method == "mxfp4":
            return Format(_mxfp4, BYTE_CODES)
        if method in ("awq", "gptq"):
            bits, group = int(settings.get("bits", 4)), int(settings.get("group_size", 128))
            return Format(partial(_awq if method == "awq" else _gptq, bits, max(group, 0)))
        if method == "compressed-tensors":
            return _compressed_tensors(settings)
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration):
        pass
    return None


def _compressed_tensors(settings: Mapping[str, Any]) -> Format:
    weights = next(iter(settings["config_groups"].values()))["weights"]
    bits, strategy, kind = int(weights["num_bits"]), weights.get("strategy"), str(settings.get("format", ""))
    group = {"tensor": -1, "channel": 0}.get(strategy, int(weights.get("group_size") or 0))

    def parts(rows: int, columns: int) -> dict[str, TensorSpec]:
        if kind.startswith("nvfp4"):
            return {
                "weight_packed": TensorSpec((rows, columns // 2), "uint8"),
                "weight_scale": TensorSpec((rows, columns // 16), "float8_e4m3fn"),
                "weight_global_scale": TensorSpec((1,)),
            }
        groups = _groups(columns, group)
        scale = {"weight_scale": TensorSpec((rows, groups) if group >= 0 else (1,), "bfloat16")}
        if not kind.startswith("pack"):
            return {"weight": TensorSpec((rows, columns), "int8" if weights.get("type") == "int" else FP8), **scale}
        zero = {"weight_zero_point": TensorSpec((rows * bits // 32, groups), "int32")}
        return {
            "weight_packed": TensorSpec((rows, -(-columns * bits // 32)), "int32"),
            **scale,
            "weight_shape": TensorSpec((2,), "int64"),
            **({} if weights.get("symmetric", True) else zero),
        }

    return Format(parts, 11 if kind.startswith("nvfp4") else DECODING if kind.startswith("pack") else BYTE_CODES)


def _groups(columns: int, group: int) -> int:
    """Groups of inputs that share a scale; all of them if `group` is 0."""
    return math.ceil(columns / group) if group > 0 else 1


def _scaled(height: int, width: int, inverse: bool, exponents: bool, rows: int, columns: int) -> dict[str, TensorSpec]:
    scales = TensorSpec((math.ceil(rows / height), _groups(columns, width)), "uint8" if exponents else "float32")
    return {"weight": TensorSpec((rows, columns), FP8), "weight_scale_inv" if inverse else "weight_scale": scales}


def _modelopt_nvfp4(rows: int, columns: int) -> dict[str, TensorSpec]:
    return {
        "weight": TensorSpec((rows, columns // 2), "uint8"),
        "weight_scale": TensorSpec((rows, columns // 16), FP8),
        "weight_scale_2": TensorSpec(()),
        "input_scale": TensorSpec(()),
    }


def _torchao(settings: Mapping[str, Any]) -> Format:
    """torchao's weights: codes, and scales (and zero points) by row or by group."""
    kind = settings["quant_type"]
    if isinstance(kind, str):  # before torchao 0.10: "int4_weight_only"
        named, data = "".join(word.capitalize() for word in kind.split("_")), settings.get("quant_type_kwargs") or {}
    else:
        named, data = kind["default"]["_type"], kind["default"]["_data"]
    group = int(data.get("group_size") or (128 if named.startswith("Int4") else 0))

    def parts(rows: int, columns: int) -> dict[str, TensorSpec]:
        if named.startswith("Int4WeightOnly"):
            scales = TensorSpec((_groups(columns, group), rows), "bfloat16")
            return {"qdata": TensorSpec((rows, columns // 2), "int8"), "scale": scales, "zero_point": scales}
        scales = TensorSpec((rows, _groups(columns, group)))
        if named.startswith("Float8"):
            return {"qdata": TensorSpec((rows, columns), FP8), "scale": scales}
        zero = TensorSpec(scales.shape, "int8")
        return {"qdata": TensorSpec((rows, columns), "int8"), "scale": scales, "zero_point": zero}

    known = ("Int4WeightOnly", "Int8WeightOnly", "Int8DynamicActivationInt8", "Int8StaticActivationInt8",
             "Float8WeightOnly", "Float8DynamicActivationFloat8", "Float8StaticActivationFloat8")  # fmt: skip
    if not named.startswith(known):
        raise ValueError(named)
    return Format(parts)


def _mxfp4(rows: int, columns: int) -> dict[str, TensorSpec]:
    return {
        "_blocks": TensorSpec((rows, columns // 32, 16), "uint8"),
        "_scales": TensorSpec((rows, columns // 32), "uint8"),
    }


def _gptq(bits: int, group: int, rows: int, columns: int) -> dict[str, TensorSpec]:
    groups = _groups(columns, group)
    return {
        "qweight": TensorSpec((columns * bits // 32, rows), "int32"),
        "qzeros": TensorSpec((groups, rows * bits // 32), "int32"),
        "scales": TensorSpec((groups, rows), "float16"),
        "g_idx": TensorSpec((columns,), "int32"),
    }


def _awq(bits: int, group: int, rows: int, columns: int) -> dict[str, TensorSpec]:
    groups = _groups(columns, group)
    return {
        "qweight": TensorSpec((columns, rows * bits // 32), "int32"),
        "qzeros": TensorSpec((groups, rows * bits // 32), "int32"),
        "scales": TensorSpec((groups, rows), "float16"),
    }


def with_stored(model: ModelSpec, files: Mapping[str, TensorSpec] | None = None) -> ModelSpec:
    """The same model with the bytes that a quantized checkpoint has of each weight, as it is loaded and run.

    From then on "as stored" (a `Precision` without a dtype and a quantization) counts these; with a dtype or a
    quantization the weights count decoded, as before. The fact "decoding" says how many bytes the largest weight takes
    while it is decoded, on the device that it works on.

    Args:
        model: its facts hold the `quantization_config`; without one it comes back as it is.
        files: name -> tensor of the checkpoint's files, if these can be reached: then sizes are exact.

    >>> from bigkit import zoo
    >>> spec = zoo.describe("gpt-oss-20b")
    >>> spec.bytes(), spec.bytes(spec.precision("bfloat16"))
    (13761265024, 41829514496)
    """
    settings = model.facts.get("quantization_config")
    if not isinstance(settings, Mapping):
        return model
    sizes = stored_sizes(model, settings) if files is None else sizes_in_files(model, files)
    if files is not None and sizes and settings.get("quant_method") == "bitsandbytes":
        sizes = _bitsandbytes(model, settings, sizes)  # some of it is a text in the file, and a number in memory
    if not sizes:
        return model
    format, made = read_format(settings), dict[Any, ModuleSpec]()
    each = {"bitsandbytes": 0}.get(str(settings.get("quant_method")), format.decoding if format else DECODING)

    def rebuilt(module: ModuleSpec, name: str) -> ModuleSpec:
        own = {leaf: sizes.get(join(name, leaf)) for leaf in module.tensors}
        children = {leaf: rebuilt(child, join(name, leaf)) for leaf, child in module.children.items()}
        key = (id(module), *own.values(), *map(id, children.values()))  # equal modules stay one object
        if key not in made:
            tensors = {leaf: replace(tensor, stored=own[leaf]) for leaf, tensor in module.tensors.items()}
            made[key] = replace(module, tensors=tensors, children=children)
        return made[key]

    chosen = model.facts.get("experts_per_token") or 1
    room = max(decoding(model.tensors[name][0].shape, each, chosen) for name in sizes)
    facts = {**model.facts, "decoding": round(room)}
    return replace(model, root=rebuilt(model.root, ""), facts=facts)


def decoding(shape: tuple[int, ...], each: float, chosen: int = 1) -> float:
    """Bytes that a weight takes while it is decoded; of stacked experts those of a token, or some of a prompt's.

    Args:
        shape: (out, in), or (experts, ...).
        each: bytes for each weight, all copies in between counted.
        chosen: experts that a token takes.

    >>> decoding((128, 256), 12), decoding((8, 2**20, 256), 4.5, 2) == 2 * 2**28 * 4.5
    (393216, True)
    """
    elements = math.prod(shape)
    if len(shape) < 3:
        return elements * each
    one = elements // shape[0]
    elements = one * min(shape[0], max(chosen, AT_A_TIME // one))
    return elements * each


def is_as_stored(model: ModelSpec, precision: Precision) -> bool:
    """Whether with this precision the weights of a quantized checkpoint stay as they are stored."""
    return "decoding" in model.facts and precision.dtype is None and precision.quantization is None


def decoding_bytes(model: ModelSpec, precision: Precision) -> int:
    """Bytes that a device needs beside the weights, while one of them is decoded there."""
    return model.facts["decoding"] if is_as_stored(model, precision) else 0


def decoded_bytes(model: ModelSpec, precision: Precision) -> int:
    """Bytes in 16 bit of all weights that are decoded each time they work: written once more, and read again."""
    if not decoding_bytes(model, precision):
        return 0
    return 2 * sum(tensor.elements for tensor, _ in model.tensors.values() if tensor.stored is not None)


def stored_sizes(model: ModelSpec, settings: Mapping[str, Any]) -> dict[str, int] | None:
    """Weight -> bytes that a checkpoint with this `quantization_config` has of it, if it is quantized; None if unknown.

    MXFP4 quantizes stacked experts alone, the other methods linear layers, and experts where they are many matrices.
    """
    if settings.get("quant_method") == "bitsandbytes":
        names = model.quantized(model.precision(None, _kind(settings)))
        return _bitsandbytes(model, settings, [f"{name}.weight" for name in names])
    parts = stored_tensors(model, settings)
    if parts is None:
        return None
    return {name: sum(part.bytes() for part in own.values()) for name, own in parts.items()}


def tensors_told(model: ModelSpec) -> dict[str, TensorSpec]:
    """What a checkpoint has of its quantized weights, by name, as the model's `quantization_config` tells it."""
    told = stored_tensors(model, model.facts.get("quantization_config") or {}) or {}
    return {full: tensor for parts in told.values() for full, tensor in parts.items()}


def stored_tensors(model: ModelSpec, settings: Mapping[str, Any]) -> dict[str, dict[str, TensorSpec]] | None:
    """Weight that is quantized -> the tensors that a checkpoint has of it, by full name; None if that is unknown."""
    format, method = read_format(settings), str(settings.get("quant_method", "")).lower()
    if format is None:
        return None
    kept = [str(name) for key in _KEPT for name in settings.get(key) or ()]
    parts: dict[str, dict[str, TensorSpec]] = {}
    for name, (tensor, owner) in model.tensors.items():
        stacked = len(tensor.shape) == 3 and "expert" in name and not name.endswith("bias")
        chosen = stacked if method == "mxfp4" else owner.linear and len(tensor.shape) == 2 or stacked
        around = name.rpartition(".")[0]
        if tensor.buffer or not chosen or around.endswith("lm_head") or _is_kept(name if stacked else around, kept):
            continue
        *experts, rows, columns = tensor.shape
        if stacked and method == "mxfp4":  # such models have (in, out), their files (out, in)
            rows, columns = columns, rows
        own = format.parts(rows, columns)
        if stacked:
            stacks = {leaf: replace(part, shape=(*experts, *part.shape)) for leaf, part in own.items()}
            parts[name] = {name + leaf.removeprefix("weight"): part for leaf, part in stacks.items()}
        else:
            parts[name] = {join(around, leaf): part for leaf, part in own.items()}
    return parts


def _kind(settings: Mapping[str, Any]) -> str:
    """What bigkit calls the quantization of bitsandbytes' settings."""
    kind = settings.get("bnb_4bit_quant_type", "fp4") + "-double" * bool(settings.get("bnb_4bit_use_double_quant"))
    return kind if settings.get("load_in_4bit") else "int8"


def _bitsandbytes(model: ModelSpec, settings: Mapping[str, Any], names: Iterable[str]) -> dict[str, int]:
    precision = Precision(None, _kind(settings))
    return {name: tensor_bytes(name, *model.tensors[name], precision) for name in names}


def sizes_in_files(model: ModelSpec, files: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Weight -> bytes that a checkpoint has of it, if it is quantized, by the tensors in its files.

    What lies where a weight should be is what it is made of: `qweight` and `scales` of a linear layer,
    `down_proj_blocks` of experts. What lies in each expert alone, where the class stacks them, is shared out among the
    stacks by their elements. Weights that are not quantized are left out: they are loaded in the model's dtype. So is
    what the model's class does not ask for.
    """
    leaves: dict[str, list[str]] = {}  # module -> own names of its weights
    for name, (tensor, _) in model.tensors.items():
        module, _, leaf = name.rpartition(".")
        leaves.setdefault(module, []).extend([] if tensor.buffer else [leaf])
    parts: dict[str, list[TensorSpec]] = {}
    for full, stored in files.items():
        module, _, leaf = full.rpartition(".")
        if full in model.tensors or module in model.tensors:  # `weight.absmax` belongs to `weight`
            whole = full if full in model.tensors else module
            if not leaf.startswith("bitsandbytes__") and not leaf.startswith("quant_state"):  # a text
                parts.setdefault(whole, []).append(stored)
        elif module in leaves:
            named = max((name for name in leaves[module] if leaf.startswith(name)), key=len, default="weight")
            parts.setdefault(join(module, named), []).append(stored)
        else:
            around = next((outer for outer in reversed(prefixes(module)) if leaves.get(outer)), "")
            parts.setdefault(around + ".", []).append(stored)  # each expert alone
    packed = {name: kinds for name, kinds in parts.items() if not all(map(_is_plain, kinds))}
    sizes = {name: sum(kind.bytes() for kind in kinds) for name, kinds in packed.items() if name in model.tensors}
    for name in packed.keys() - sizes.keys():
        total = sum(kind.bytes() for kind in packed[name])
        stacks = [join(name[:-1], leaf) for leaf in leaves.get(name[:-1], ())]
        stacks = [stack for stack in stacks if len(model.tensors[stack][0].shape) == 3 and stack not in parts]
        elements = [model.tensors[stack][0].elements for stack in stacks]
        ends = [total * end // sum(elements) for end in accumulate(elements)]
        sizes |= {stack: end - start for stack, start, end in zip(stacks, [0, *ends], ends)}
    return sizes


def _is_plain(tensor: TensorSpec) -> bool:
    return is_floating(tensor.dtype) and dtype_bits(tensor.dtype) >= 16


def _is_kept(module: str, kept: list[str]) -> bool:
    """Whether a module is named among those that are left out: whole, by a part of its name, or by a pattern."""
    for name in kept:
        if name.startswith("re:"):
            if re.match(name[3:], module):
                return True
        elif re.search(rf"(^|\.){re.escape(name).replace(re.escape('*'), '.*')}($|\.)", module):
            return True
    return False
