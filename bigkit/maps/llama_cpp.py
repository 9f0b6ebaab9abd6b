"""A plan as options of llama.cpp: which blocks, and which experts, lie on which GPU.

    --n-gpu-layers 99    all blocks on GPUs, but for what the others say
    --n-cpu-moe N        the experts of the first N blocks in RAM
    -ot "PATTERN=CPU"    whatever else rests in RAM, by the names of its tensors
    -ts A,B              blocks on each GPU

What rests in RAM or on disk travels with bigkit; llama.cpp computes with it where it lies.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from ..devices import Device, prefixes

if TYPE_CHECKING:
    from .plan import Placed, Plan

_CACHES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "int8": "q8_0", "int4": "q4_0"}


def llama_cpp_flags(plan: Plan) -> str:
    """The options by which llama.cpp places a model as this plan does; empty if it runs on the CPU alone.

    >>> from bigkit import plan
    >>> print(llama_cpp_flags(plan("mixtral-8x7b", {0: "40GiB", "cpu": "99GiB"}, dtype="bfloat16", experts_on_cpu=25)))
    --n-gpu-layers 99 --n-cpu-moe 25
    """
    runners: list[Device] = [share.device for share in plan.shares if share.runs]
    if runners == ["cpu"]:
        return ""
    names = {layer.name for layer in plan.layers}
    experts = [layer for layer in plan.layers if not names.isdisjoint(prefixes(layer.name)[:-1])]
    apart = {layer.name for layer in experts}
    numbered = {
        _number(layer.name): layer
        for layer in plan.layers
        if layer.name not in apart and any(part.isdigit() for part in layer.name.split("."))
    }
    away = [number for number, layer in numbered.items() if layer.device not in runners]
    flags = ["--n-gpu-layers 99"]
    flags += [_pattern(away, "", "CPU")] if away else []
    flags += _experts(experts, runners)
    homes = [layer.device for layer in numbered.values() if layer.device in runners]
    if len({*homes}) > 1:
        if homes == sorted(homes, key=runners.index):
            counts = [homes.count(runner) for runner in runners]
            last = max(i for i, count in enumerate(counts) if count)
            counts[last] += 1  # the output counts as a block
            flags.append("-ts " + ",".join(map(str, counts)))
        else:
            for i, runner in enumerate(runners[1:], 1):
                own = [number for number, layer in numbered.items() if layer.device == runner]
                flags += [_pattern(own, "", f"CUDA{i}")] if own else []
    return " ".join(flags)


def llama_cpp_command(plan: Plan) -> str:
    """The command that runs a GGUF file as a plan places it."""
    flags = llama_cpp_flags(plan) or "--n-gpu-layers 0"
    context = f" -c {plan.context}" if plan.context else ""
    kind = _CACHES.get(plan.options.get("kv_dtype") or "")
    cache = f" -ctk {kind} -ctv {kind}" if kind else ""
    return f"llama-server -m {shlex.quote(plan.model)} {flags}{context}{cache}"


def _experts(experts: list[Placed], runners: list[Device]) -> list[str]:
    numbers = [_number(layer.name) for layer in experts if layer.device not in runners]
    if not numbers:
        return []
    if numbers == [_number(layer.name) for layer in experts][: len(numbers)]:
        return [f"--n-cpu-moe {max(numbers) + 1}"]
    return [_pattern(numbers, r"ffn_.*_exps\.", "CPU")]


def _pattern(numbers: list[int], rest: str, device: str) -> str:
    return rf'-ot "blk\.({"|".join(map(str, numbers))})\.{rest}={device}"'


def _number(name: str) -> int:
    """The number of the block that a module is, or lies in."""
    return next(int(part) for part in name.split(".") if part.isdigit())
