"""What training takes on each of several GPUs, beside the rows that `bigkit.estimate_memory(..., gpus=N)` prints.

    python benchmarks/training.py [--save]               two CUDA GPUs: a Llama of 1.3B with random weights, in bfloat16
    python benchmarks/training.py --device cpu --tiny    no GPU: tiny shapes, to see that it runs; peaks are not known

Each process makes three steps of Adam in mixed precision: with DistributedDataParallel and autocast, and with FSDP
(`fully_shard`), without and with activation checkpointing. `kept` are the bytes of weights, gradients and states after
a step, `rests` what PyTorch held then in all; `peak` is the most that it held during the last step, beside the total of
the row. Not in the row: scores of the vocabulary and their gradients, the copies in 16 bit that autocast makes of all
weights, and buckets of collectives.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import bigkit
from bigkit.model.training import STAGES, shared_bytes

WAYS = {"data parallel": False, "FSDP": False, "FSDP, checkpointing": True}


def llama(tiny: bool) -> nn.Module:
    """A Llama with random weights in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    width, layers, vocabulary = (64, 3, 128) if tiny else (2048, 24, 32000)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=layers, vocab_size=vocabulary,
        num_attention_heads=4 if tiny else 16, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def shared(model: Any, way: str, device: torch.device) -> Any:
    """The model as that way trains it."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    if way == "data parallel":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    if "checkpointing" in way:
        model.gradient_checkpointing_enable()
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def held(tensors: Any) -> int:
    """Bytes of tensors on this process."""
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def train(way: str, device: torch.device, tiny: bool, batch: int, tokens: int) -> dict[str, Any]:
    """Three steps; bytes that rest after them, and at the peak of the last one."""
    cuda = device.type == "cuda"
    with torch.device(device):
        model = llama(tiny)
    runs = shared(model.train(), way, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda)
    ids = torch.randint(0, 128, (batch, tokens), device=device)
    loss = torch.zeros(())
    peak = rests = 0
    for _ in range(3):
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        with torch.autocast(device.type, torch.bfloat16, enabled=way == "data parallel"):
            loss = runs(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        peak = torch.cuda.max_memory_allocated() if cuda else 0
        rests = torch.cuda.memory_allocated() if cuda else 0
    moments = [value for one in optimizer.state.values() for value in one.values() if torch.is_tensor(value)]
    kept = held(model.parameters()) + held(p.grad for p in model.parameters()) + held(moments)
    found = {"kept": kept, "rests": rests, "peak": peak, "loss": round(loss.item(), 3)}
    del runs, model, optimizer, loss, moments
    if cuda:
        torch.cuda.empty_cache()
    return found


def work(rank: int, args: argparse.Namespace) -> None:
    """One process."""
    cuda = args.device == "cuda"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo", init_method=f"file://{args.meeting}", rank=rank, world_size=args.processes
    )
    batch, tokens = (2, 32) if args.tiny else (args.batch, args.tokens)
    with bigkit.init_empty_weights():
        empty = llama(args.tiny)
    rows = []
    for way, checkpointing in WAYS.items():
        estimate = bigkit.estimate_memory(
            empty, batch=batch, context=tokens, gpus=args.processes, checkpointing=checkpointing
        )
        stage = 0 if way == "data parallel" else 3
        row = next(row for row in estimate.training if row.method.startswith(STAGES[stage]))
        try:
            found = train(way, device, args.tiny, batch, tokens)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:400]}
        share = sum(shared_bytes(row.trained, args.processes, stage))
        rows.append({"way": way, **found, "predicted_kept": share, "predicted_peak": row.total,
                     "predicted_activations": row.activations})  # fmt: skip
        if rank == 0:
            print(json.dumps(rows[-1]), flush=True)
    dist.destroy_process_group()
    if rank == 0 and args.out:
        about = {"device": torch.cuda.get_device_name() if cuda else platform.processor() or "CPU",
                 "torch": torch.__version__, "processes": args.processes, "batch": batch, "tokens": tokens,
                 "parameters": sum(p.numel() for p in empty.parameters())}  # fmt: skip
        args.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


def main() -> None:
    """Start the processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4, help="sequences on each GPU")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/training.json")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    args = parser.parse_args()
    args.out = args.out or (Path(__file__).parent / "results" / "training.json" if args.save else None)
    with tempfile.TemporaryDirectory() as folder:
        args.meeting = Path(folder, "processes")
        torch.multiprocessing.spawn(work, (args,), nprocs=args.processes)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
