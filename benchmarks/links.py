"""Faster than one link, over 1, 2, 4 and 8 GPUs, as far as they are there: parts of `benchmarks/offload.py`.

    python benchmarks/offload.py --gpu --parts rates links seventy peaks mixture loading cpu --save FILE
    python benchmarks/offload.py --parts links mixture     no GPU: tiny shapes on eight stand-ins, to see that it runs

    rates     bytes a second over each link alone, and over all at once
    links     a 7B in RAM over one GPU and over several
    cpu       a share of the MLPs on the CPU: what it reads beside a busy link, and what a token takes
    seventy   blocks of a 70B in RAM (`--blocks`), over one GPU and over several
    peaks     what each GPU holds, foretold and measured: models that fill all GPUs, placed by `bigkit.plan`
    mixture   a mixture over one GPU and over several, all experts in RAM
    loading   13.5 GB from files in memory, on one GPU and on several

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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import experts as mixtures
import torch
import transformers
from checkpoint import GB, llama, make
from decode import Bench
from torch import Tensor, nn

import bigkit
from bigkit import Hardware, zoo
from bigkit.dryrun.workload import at_random, fill
from bigkit.machine.ram import ram_free
from bigkit.maps.on_cpu import FEW, HOST, Reading, best_count, token_seconds
from bigkit.maps.partition import spread
from bigkit.maps.plan import Plan
from bigkit.measure.links import Traffic, measure_together

NEW, BYTES = 8, 450 * 10**6  # tokens that are generated; bytes that files of a block take, at most
PARTS = ("rates", "links", "cpu", "seventy", "peaks", "mixture", "loading")
GPU = torch.cuda.is_available()
GPUS = torch.cuda.device_count() or 8  # without one the CPU stands in, and shapes are tiny
COUNTS = sorted({1, 2, 4, 8, GPUS} & {*range(GPUS + 1)})
FIRST, STAND_IN = ("cuda:0", {}) if GPU else ("cpu", dict.fromkeys(range(GPUS), "cpu"))
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 300}  # fmt: skip
SIZES: dict[str, dict[str, int]] = {
    "7B": {} if GPU else TINY,
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    if GPU else {**TINY, "hidden_size": 128},
}  # fmt: skip


def random_layers(model: nn.Module) -> dict[str, Tensor]:
    """Random weights for an empty Llama, in RAM."""
    device = FIRST
    generator, state, drawn = torch.Generator(device).manual_seed(0), dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in model.state_dict().items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        first = name.replace(f".{layer}.", ".0.", 1) if layer else name
        if first not in drawn:
            new = torch.empty(tensor.shape, device=device)
            drawn[first] = new.normal_(1.0 if "norm" in name else 0.0, 0.02, generator=generator).to(tensor.dtype)
        state[name] = drawn[first].roll(layer, 0).cpu()
    return state


def filled(layers: int, state: dict[str, Tensor], shape: str = "7B") -> nn.Module:
    model = llama(layers, **SIZES["7B" if shape == "7B" else "70B"])
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


class Run:
    """Measures models that hold the same weights, and compares their logits and tokens with the first one's."""

    def __init__(self, table: Any) -> None:
        self.table, self.expected = table, dict[str, Tensor]()
        self.tokens = torch.randint(0, 32000 if GPU else 300, (1, 512), generator=torch.Generator().manual_seed(1))

    @torch.inference_mode()
    def __call__(
        self, way: str, model: nn.Module, moved: int = 0, prompt: int = 16, runs: int = 5, **more: Any
    ) -> None:
        one, x = self.tokens[:, :1].to(FIRST), self.tokens[:, :prompt].to(FIRST)
        seconds, logits = _timed(lambda: model(one, use_cache=False).logits, runs)
        begin = time.perf_counter()
        made = model.generate(x, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
        took = time.perf_counter() - begin
        begin = time.perf_counter()
        long = model(self.tokens.to(FIRST), use_cache=False, logits_to_keep=1).logits
        wait()
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
        wait()
        begin = time.perf_counter()
        result = work()
        wait()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[2:]), result


def clean() -> None:
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


def wait() -> None:
    for gpu in range(GPUS if GPU else 0):
        torch.cuda.synchronize(gpu)


def reset_peaks() -> None:
    for gpu in range(GPUS if GPU else 0):
        torch.cuda.reset_peak_memory_stats(gpu)


def peak_bytes() -> list[int]:
    """Bytes that were allocated on each GPU at most."""
    return [torch.cuda.max_memory_allocated(gpu) if GPU else 0 for gpu in range(GPUS)]


def name(count: int) -> str:
    return {1: "one GPU", 2: "two GPUs", 4: "four GPUs", 8: "eight GPUs"}.get(count, f"{count} GPUs")


def measure(table: Any, parts: Sequence[str], layers: int, cores: int, blocks: int) -> None:
    """These parts, those that need the same model after one another."""
    if "rates" in parts:
        rates(table)
    if {"links", "cpu"} & {*parts}:
        state, run = random_layers(llama(layers, **SIZES["7B"])), Run(table)
        if "links" in parts:
            links(table, layers, state, run)
        if "cpu" in parts:
            cpu(table, layers, state, cores, run)
        del state
    if "seventy" in parts:
        large(table, blocks)
    if "peaks" in parts:
        peaks(table)
    if "mixture" in parts:
        experts(table)
    if "loading" in parts:
        loading(table, layers)


def rates(table: Any) -> None:
    """Bytes a second over each link alone, and over 1, 2, 4 and 8 at once."""
    alone = [Traffic([torch.device("cuda", gpu)], 2**29) for gpu in range(GPUS if GPU else 0)]
    for traffic in alone:
        traffic.start(48)
        table.add(way="link alone", shape="-", s=0.0, gpu=traffic.devices[0].index, gb_s=traffic.finish()[0] / GB)
    del alone
    for count in COUNTS if GPU else ():
        traffic = Traffic([torch.device("cuda", gpu) for gpu in range(count)], 2**29)
        traffic.start(48)
        each = traffic.finish()
        table.add(way="links at once", shape=f"{count} GPUs", s=0.0, gb_s=sum(each) / GB, each=[n / GB for n in each])


def links(table: Any, layers: int, state: dict[str, Tensor], run: Run, shape: str = "7B") -> None:
    """One link against several."""
    size = sum(tensor.nbytes for tensor in state.values())
    table.add(way="weights" if shape == "7B" else f"weights, {shape}", shape="-", s=0.0, bytes=size, gpus=GPUS)
    ways = [(name(count), [*range(count)], {}) for count in COUNTS]
    if shape == "7B" and GPUS > 1:
        ways.append((f"{ways[-1][0]}, half of the MLPs on the CPU", ways[-1][1], {"on_cpu": size // 3, "slots": 3}))
    for way, where, options in ways:
        way += "" if shape == "7B" else f", {shape}"
        clean()
        reset_peaks()
        begin = time.perf_counter()
        model = bigkit.cpu_offload(filled(layers, state, shape), where, stand_in=STAND_IN or None, **options)
        run(f"in RAM, {way}", model, size, prepare_s=time.perf_counter() - begin)
        table.add(way=f"memory of {way}", shape="-", s=0.0, peak_gb=[peak / GB for peak in peak_bytes()])
        del model


def large(table: Any, layers: int) -> None:
    """Blocks of a Llama-70B, all in RAM: as many as half of it holds, and 80 at most."""
    block = sum(tensor.nbytes for tensor in llama(1, **SIZES["70B"]).model.layers.state_dict().values())
    layers = max(1, min(layers, 80, int(0.45 * ram_free() / block)))  # they lie there twice while they are prepared
    links(table, layers, random_layers(llama(layers, **SIZES["70B"])), Run(table), f"{layers} blocks of a 70B")


def loading(table: Any, layers: int) -> None:
    """Files that are in memory, onto one GPU and onto several at once."""
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and shutil.disk_usage(shared).free > BYTES * layers
    with tempfile.TemporaryDirectory(dir=shared if roomy else None) as place:
        folder = Path(place) / "large"
        make(folder, layers, GPU, **SIZES["7B"])
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for count in COUNTS:
            device_map = shares(layers, count) if GPU else {"": "cpu"}
            seconds = []
            for _ in range(5):
                model = llama(layers, **SIZES["7B"])
                begin = time.perf_counter()
                bigkit.load_checkpoint_in_model(model, folder, device_map)
                wait()
                seconds.append(time.perf_counter() - begin)
                del model
                clean()
            best = statistics.median(seconds)
            table.add(way=f"load, {name(count)}", shape="-", s=best, bytes=size, gb_s=size / best / GB, all_s=seconds)


def shares(layers: int, count: int) -> dict[str, Any]:
    """A Llama's modules over so many GPUs, in equal stretches."""
    ends = {"model.embed_tokens": 0, "model.norm": count - 1, "model.rotary_emb": 0, "lm_head": count - 1}
    return ends | {f"model.layers.{i}": i * count // layers for i in range(layers)}


def peaks(table: Any, prompt: int = 512) -> None:
    """What a dry run and the plan say that each GPU holds at most, and what it held, for shapes that fill all GPUs.

    A shape has as many of its blocks as 0.7 of the GPUs' memory takes; the mixture has a part of its experts in RAM.
    """
    free = [torch.cuda.mem_get_info(gpu)[0] if GPU else 2**23 for gpu in range(GPUS)]
    machine = Hardware.detect() if GPU else f"{GPUS} x H200"
    for shape in ("Llama-7B", "mixture", "bloom", "llama-3.1-405b"):
        empty, blocks = cut(shape, int(0.7 * sum(free)))
        size = sum(tensor.nbytes for tensor in {*empty().parameters()})
        budgets: dict[Any, int] = dict(enumerate(free))
        if shape == "mixture":  # experts of two blocks in flight, and of about two more that stay, of six
            budgets = dict.fromkeys(range(GPUS), int(0.8 * size / GPUS)) | {"cpu": ram_free() // 2}
        elif shape == "Llama-7B":  # a quarter of it, and what streaming takes
            budgets = dict.fromkeys(range(GPUS), size // (4 * GPUS) + size // 6 + 2**21) | {"cpu": ram_free() // 2}
        plan = None
        for strategy in ("auto",) if "cpu" in budgets else ("balanced", "exact"):
            if plan is not None:  # a little more than the balanced plan takes: the cache gets the rest
                budgets = dict.fromkeys(range(GPUS), int(1.02 * max(plan.used.values())))
            row: dict[str, Any] = {"way": f"peaks, {shape}, {strategy}", "shape": f"{blocks} blocks", "bytes": size}
            try:
                plan = bigkit.plan(empty(), budgets, strategy, context=prompt + NEW, overhead=0)
                row |= peaks_of(empty, plan, machine, min(plan.context, 4096) - NEW)
                row["over"] = any(now * GB > budgets[gpu] for gpu, now in enumerate(row["measured_gb"]))
            except (ValueError, torch.OutOfMemoryError) as error:
                row |= {"s": 0.0, "error": f"{type(error).__name__}: {error}"[:300]}
            table.add(**row)
            clean()


def peaks_of(empty: Callable[[], nn.Module], plan: Plan, machine: Any, prompt: int) -> dict[str, Any]:
    """Peaks of each GPU in GB: foretold, planned and measured, with the seconds of the run."""
    foretold = bigkit.dry_run(empty, plan, 1, prompt, NEW, machine).peak_allocated
    made = lambda tensor, device: nn.Parameter(at_random(tensor, torch.device(FIRST)).to(device), requires_grad=False)  # noqa: E731
    on_gpu = lambda tensor, device: (made if device.type == "cpu" else at_random)(tensor, device)  # noqa: E731
    model = fill(empty(), plan.device_map if GPU else {"": "cpu"}, on_gpu)
    model = bigkit.dispatch_model(model.requires_grad_(False), plan, stand_in=STAND_IN or None)
    clean()
    reset_peaks()
    begin = time.perf_counter()
    vocabulary = model.config.vocab_size  # type: ignore[union-attr]
    ids = torch.randint(3, vocabulary, (1, prompt), generator=torch.Generator().manual_seed(1)).to(FIRST)  # type: ignore[arg-type]
    model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
    wait()
    return {
        "s": time.perf_counter() - begin, "prompt": prompt, "slots": plan.slots, "offloaded_gb": plan.offloaded / GB,
        "foretold_gb": [foretold.get(gpu, 0) / GB for gpu in range(GPUS)],
        "planned_gb": [plan.used[gpu] / GB for gpu in range(GPUS)], "measured_gb": [n / GB for n in peak_bytes()],
    }  # fmt: skip


def cut(shape: str, most: int) -> tuple[Callable[[], nn.Module], int]:
    """A function that builds an empty model with as many of its blocks as so many bytes take, and their number."""
    if shape == "Llama-7B":
        return partial(llama, 32 if GPU else 8, **SIZES["7B"]), 32 if GPU else 8
    if shape == "mixture":  # DeepSeek-V3's shape with 32 of 256 experts
        family, config = mixtures.class_and_config("deepseek", 6 * GPUS, not GPU)
        config.n_routed_experts = 32
    else:
        config = zoo.empty_model(shape).config  # type: ignore[union-attr]
        family = getattr(transformers, config.architectures[0])  # type: ignore[union-attr, index, arg-type]

    def empty() -> nn.Module:
        with bigkit.init_empty_weights():
            return family._from_config(config, dtype=torch.bfloat16).eval()  # type: ignore[no-any-return]

    if shape == "mixture":
        return empty, config.num_hidden_layers
    if not GPU:
        config.update({"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 300}  # bloom has no others
                      | ({"intermediate_size": 128, "num_key_value_heads": 2} if shape != "bloom" else {}))  # fmt: skip
    model, whole = empty(), config.num_hidden_layers
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    blocks = sum(tensor.nbytes for tensor in max(lists, key=len).parameters())
    others = sum(tensor.nbytes for tensor in model.parameters()) - blocks
    config.num_hidden_layers = max(GPUS, min(whole, (most - others) * whole // blocks)) if GPU else 2 * GPUS
    return empty, config.num_hidden_layers


def experts(table: Any) -> None:
    """A mixture whose blocks take turns on 1, 2, 4 and 8 GPUs, with all experts in RAM, beside all of it on one.

    A token's experts are known when their block's router has worked, so a token has one link at a time; a prompt takes
    all experts, and the next block's travel over the next link.
    """
    layers = min(48, max(12, 6 * GPUS))  # a few more on each GPU than are in flight there
    model = mixtures.build("qwen3", layers, "cuda:0" if GPU else "cpu", not GPU)
    bench = mixtures.Bench("qwen3", model, 12, (1,))
    rate, expected, _ = mixtures.decode(model, 1, 12, bench.vocabulary)
    table.add(way="experts, all on one GPU", shape="decode", s=1 / rate, bytes=bench.total)
    for count in COUNTS:
        places = shares(layers, count) | {f"model.layers.{i}": i % count for i in range(layers)}
        places |= dict.fromkeys(mixtures.experts_in(model), "cpu")
        model = bigkit.dispatch_model(model, places, stand_in=STAND_IN or None)
        clean()
        rate, logits, brought = mixtures.decode(model, 1, 12, bench.vocabulary)
        table.add(way=f"experts in RAM, {name(count)}", shape="decode", s=1 / rate, gb_s=brought * rate / GB,
                  bit_equal=torch.equal(logits.cpu(), expected.cpu()))  # fmt: skip
        seconds = mixtures.prompt_seconds(model, bench.vocabulary)
        table.add(way=f"experts in RAM, {name(count)}", shape="8x512", s=seconds, gb_s=bench.total / seconds / GB)


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
