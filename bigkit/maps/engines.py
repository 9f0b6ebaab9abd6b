"""A plan over hosts as commands: bigkit's own, and those of engines that serve models, with the same cut.

vLLM and SGLang take the number of blocks of each stage from a variable, and spread a stage over the GPUs of its host by
tensors (`--tensor-parallel-size`), which bigkit does by layers. llama.cpp's devices on other hosts come before its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..units import three_figures

if TYPE_CHECKING:
    from .hosts import HostsPlan


def commands(plan: HostsPlan) -> list[str]:
    """One line for each engine: the command on host K (of llama.cpp: on the last one), and what it does better.

    >>> from bigkit import plan_hosts
    >>> for line in commands(plan_hosts("llama-2-7b", ["RTX 4090", "RTX 3090"], dtype="float16"))[2:3]:
    ...     print(line.partition(" (")[0])
    vLLM, on host K: VLLM_PP_LAYER_PARTITION=16,16 vllm serve llama-2-7b --pipeline-parallel-size 2 \
--tensor-parallel-size 1 --nnodes 2 --node-rank K --master-addr HOST0
    """
    count = len(plan.stages)
    cut = ",".join(str(stage.blocks) for stage in plan.stages)
    runners = [[share.device for share in stage.plan.shares if share.runs] for stage in plan.stages]
    gpus = [len(own) for own in runners]
    homes = [[layer.device for layer in stage.plan.layers if layer.name[-1].isdigit()] for stage in plan.stages]
    split = ",".join(str(home.count(gpu)) for home, own in zip(homes, runners) for gpu in own)
    hosts = f"--num_machines {count} --num_processes {count} --machine_rank K --main_process_ip HOST0"
    lines = [f"bigkit, on host K: bigkit launch {hosts} --main_process_port 29500 script.py"]
    if plan.split and sum(gpus) > 1:
        start = f"torchrun --nnodes {count} --nproc-per-node {max(gpus)} --node-rank K --master-addr HOST0 script.py"
        pace = f"about {three_figures(plan.split)} tokens/s for one sequence; they meet twice in a block"
        every = f"it splits every layer over all {sum(gpus)} GPUs: {pace}"
        lines.append(f'Transformers, on host K: {start}, with from_pretrained(..., tp_plan="auto") ({every}).')
    if any(stage.plan.offloaded for stage in plan.stages):
        return [*lines, "vLLM and SGLang hold all weights on GPUs: here some rest in RAM or on disk."]
    tensor = max(gpus) if len({*gpus}) == 1 else 1
    uneven = "" if len({*gpus}) == 1 else " Both want as many GPUs on each host: one of each is used."
    lines += [
        f"vLLM, on host K: VLLM_PP_LAYER_PARTITION={cut} vllm serve {plan.model} --pipeline-parallel-size {count} "
        f"--tensor-parallel-size {tensor} --nnodes {count} --node-rank K --master-addr HOST0 "
        "(it batches requests as they come and pages their caches: many users at once).",
        f"SGLang, on host K: SGLANG_PP_LAYER_PARTITION={cut} python -m sglang.launch_server --model-path {plan.model} "
        f"--pp-size {count} --tp-size {tensor} --nnodes {count} --node-rank K --dist-init-addr HOST0:29500 "
        f"(the same, and prompts with a common beginning share its cache).{uneven}",
    ]
    others = ",".join(f"HOST{i}:50052" for i in range(count - 1))
    return [
        *lines,
        f"llama.cpp, on the last host, with rpc-server -p 50052 on the others: llama-server -m MODEL.gguf "
        f"-ngl 99{f' --rpc {others}' if others else ''} -ts {split} (fewer bits, any GPU or CPU, and no Python).",
    ]
