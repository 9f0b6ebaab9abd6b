"""Faster than one link: three parts of `benchmarks/offload.py`.

    python benchmarks/offload.py --gpu --parts links cpu loading --save benchmarks/results/links.json

    links     a 7B in RAM over one GPU and over two
    cpu       a share of the MLPs on the CPU: what it reads beside a busy link, and what a token takes
    loading   13.5 GB from files in memory, on one GPU and on two

A token is a forward of one token, median; `generate` counts tokens too. The part `cpu` uses `--cores` of the host's
cores (16), as one GPU of it comes with. All blocks hold the same random numbers, shifted: made in a few seconds.
"""

from __future__ import annotations

import gc
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from checkpoint import GB, llama, make
from decode import Bench
from torch import Tensor, nn

import bigkit
from bigkit.maps.on_cpu import FEW, HOST, Reading, best_count, token_seconds
from bigkit.maps.partition import spread
from bigkit.measure.links import measure_together

NEW, BYTES = 8, 450 * 10**6  # tokens that are generated; bytes that files of a block take, at most


def random_layers(model: nn.Module) -> dict[str, Tensor]:
    """Random weights for an empty Llama, in RAM."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator, state, drawn = torch.Generator(device).manual_seed(0), dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in model.state_dict().items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        first = name.replace(f".{layer}.", ".0.", 1) if layer else name
        if first not in drawn:
            new = torch.empty(tensor.shape, device=device)
            drawn[first] = new.normal_(1.0 if "norm" in name else 0.0, 0.02, generator=generator).to(tensor.dtype)
        state[name] = drawn[first].roll(layer, 0).cpu()
    return state


def filled(layers: int, state: dict[str, Tensor]) -> nn.Module:
    model = llama(layers)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


class Run:
    """Measures models that hold the same weights, and compares their logits and tokens with the first one's."""

    def __init__(self, table: Any) -> None:
        self.table, self.expected = table, dict[str, Tensor]()
        self.tokens = torch.randint(0, 32000, (1, 512), generator=torch.Generator().manual_seed(1))

    @torch.inference_mode()
    def __call__(
        self, way: str, model: nn.Module, moved: int = 0, prompt: int = 16, runs: int = 5, **more: Any
    ) -> None:
        one, x = self.tokens[:, :1].cuda(), self.tokens[:, :prompt].cuda()
        seconds, logits = _timed(lambda: model(one, use_cache=False).logits, runs)
        begin = time.perf_counter()
        made = model.generate(x, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
        took = time.perf_counter() - begin
        begin = time.perf_counter()
        long = model(self.tokens.cuda(), use_cache=False, logits_to_keep=1).logits
        torch.cuda.synchronize()
        found = {"logits": logits.float().cpu(), "tokens": made.cpu(), "long": long.float().cpu()}
        expected = self.expected = self.expected or found
        self.table.add(
            way=way, shape="1x1", s=seconds, gb_s=moved / seconds / GB, tokens_s=(NEW - 1) / (took - seconds),
            prompt_s=time.perf_counter() - begin, bit_equal=torch.equal(found["logits"], expected["logits"]),
            prompt_equal=torch.equal(found["long"], expected["long"]),
            same_tokens=torch.equal(found["tokens"], expected["tokens"]),
            difference=(found["logits"] - expected["logits"]).abs().max().item(),
            logits=expected["logits"].abs().max().item(), **more,
        )  # fmt: skip


def _timed(work: Any, runs: int) -> tuple[float, Tensor]:
    seconds = []
    for _ in range(2 + runs):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        result = work()
        for device in range(torch.cuda.device_count()):
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[2:]), result


def clean() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def measure(table: Any, parts: list[str], layers: int, cores: int) -> None:
    """All parts, on one model."""
    if "loading" in parts:
        loading(table, layers)
    if {"links", "cpu"} & {*parts}:
        state, run = random_layers(llama(layers)), Run(table)
        if "links" in parts:
            links(table, layers, state, run)
        if "cpu" in parts:
            cpu(table, layers, state, cores, run)


def links(table: Any, layers: int, state: dict[str, Tensor], run: Run) -> None:
    """One link against two."""
    size, gpus = sum(tensor.nbytes for tensor in state.values()), torch.cuda.device_count()
    table.add(way="weights", shape="-", s=0.0, bytes=size, gpus=gpus)
    for way, where, options in (
        ("one GPU", 0, {}),
        ("two GPUs", [0, 1], {}),
        ("two GPUs, half of the MLPs on the CPU", [0, 1], {"on_cpu": size // 3, "slots": 3}),
    )[: 3 if gpus > 1 else 1]:
        model = bigkit.cpu_offload(filled(layers, state), where, **options)
        for device in range(gpus):
            torch.cuda.reset_peak_memory_stats(device)
        run(f"in RAM, {way}", model, size)
        table.add(way=f"memory of {way}", shape="-", s=0.0,
                  peak_gb=[torch.cuda.max_memory_allocated(device) / GB for device in range(gpus)])  # fmt: skip
        del model
        clean()


def loading(table: Any, layers: int) -> None:
    """Files that are in memory, onto one GPU and onto two at once."""
    gpus, shared = torch.cuda.device_count(), Path("/dev/shm")
    large = shared.is_dir() and shutil.disk_usage(shared).free > BYTES * layers
    with tempfile.TemporaryDirectory(dir=shared if large else None) as name:
        folder = Path(name) / "large"
        make(folder, layers, gpu=True)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        halves = {"model.embed_tokens": 0, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 1}
        halves |= {f"model.layers.{i}": int(i >= layers // 2) for i in range(layers)}
        for way, device_map in (("one GPU", {"": 0}), ("two GPUs", halves))[:gpus]:
            seconds = []
            for _ in range(5):
                model = llama(layers)
                begin = time.perf_counter()
                bigkit.load_checkpoint_in_model(model, folder, device_map)
                for device in range(gpus):
                    torch.cuda.synchronize(device)
                seconds.append(time.perf_counter() - begin)
                del model
                clean()
            best = statistics.median(seconds)
            table.add(way=f"load, {way}", shape="-", s=best, bytes=size, gb_s=size / best / GB, all_s=seconds)


def cpu(table: Any, layers: int, state: dict[str, Tensor], cores: int, run: Run) -> None:
    """What MLPs on the CPU are worth."""
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), allowed)
    torch.set_num_threads(len(allowed))
    rates, reads, call = measure_together(512 * 2**20, 2**30)
    for dtype, rows in reads.items():
        for threads, own, other in rows:
            table.add(way=f"CPU reads, {dtype}", shape=f"{threads} threads", s=0.0, gb_s=own / GB, link_gb_s=other / GB)
    table.add(way="links", shape="-", s=0.0, gb_s=sum(rates) / GB)
    table.add(way="a graph calls the CPU", shape="-", s=call)
    size = sum(tensor.nbytes for tensor in state.values())
    streamed = bigkit.cpu_offload(filled(layers, state), 0)
    run("in RAM, streamed", streamed, size)
    by_graphs(table, "in RAM, streamed", streamed, size, new=10)
    del streamed
    clean()
    count, slots, threads, graph_s, python_s = share(state, layers, reads["bfloat16"], call)
    more = {"count": count, "slots": slots, "threads": threads}
    mlp = sum(tensor.nbytes for name, tensor in state.items() if ".layers.0.mlp." in name)
    model = bigkit.cpu_offload(filled(layers, state), 0, on_cpu=count * mlp, cpu_threads=threads, slots=slots)
    by_graphs(table, "in RAM, MLPs on the CPU", model, size, **more, predicted_s=graph_s)
    run("in RAM, MLPs on the CPU", model, size, FEW, **more, predicted_s=python_s)


def share(state: dict[str, Tensor], layers: int, rows: Any, call: float) -> tuple[int, int, int, float, float]:
    """How many MLPs, slots and threads make a token by graphs shortest, and what it takes by graphs and in Python."""
    sizes: dict[str, list[int]] = {}
    for name, tensor in state.items():
        unit = ".".join(name.split(".")[:3]) if ".layers." in name else name
        own = sizes.setdefault(unit, [0, 0])
        own[0] += tensor.nbytes
        own[1] += tensor.nbytes * (".mlp." in name)
    units = [(nbytes, mlp) for nbytes, mlp in sizes.values()]
    readings = [Reading(*row) for row in rows]
    ways = {slots: best_count(units, 0.15e-3 * layers, readings, slots, call, True) for slots in (3, 4)}
    slots, (count, reading, seconds) = min(ways.items(), key=lambda way: way[1][2])
    mlps = [mlp for _, mlp in units if mlp]
    chosen = spread(mlps, count * max(mlps))
    python = token_seconds(units, chosen, 0.7e-3 * layers, reading, slots, HOST.hops, False)
    return count, slots, reading.threads, seconds, python


def by_graphs(table: Any, way: str, model: nn.Module, moved: int, new: int = 14, **more: Any) -> None:
    """A decoded token as one CUDA graph; with `count` MLPs on the CPU, whether the text is that of Python, too."""
    bench = Bench("cuda:0", False, 0)
    with bigkit.graph_decode(model):
        seconds, text = bench.decode(model, new, FEW + 1, new - 6)
    if "count" in more:
        static = {"cache_implementation": "static", "disable_compile": True}
        more["same_tokens"] = torch.equal(text, bench.decode(model, new, FEW + 1, 4, **static)[1])
    table.add(way=way, shape="graph", s=seconds, gb_s=moved / seconds / GB, **more)
