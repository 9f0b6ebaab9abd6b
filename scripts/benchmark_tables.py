"""Write the tables of benchmarks/README.md and README.md from benchmarks/results, so that no figure is typed by hand.

    python scripts/benchmark_tables.py            # rewrite what stands between the markers
    python scripts/benchmark_tables.py --check    # say which tables are out of date; a test calls this

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, and NAME is a function below.
Leaves out: the prose around them, and measuring (`benchmarks/*.py --save`).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
TABLES: dict[str, Callable[[], str]] = {}


@cache
def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def row(name: str, **wanted: object) -> dict[str, Any]:
    """The row of a result whose columns have these values."""
    return next(r for r in results(name)["rows"] if all(r.get(key) == value for key, value in wanted.items()))


def table(*headers: str) -> Callable[[Callable[[], Iterable[Iterable[str]]]], None]:
    """Register a function that yields rows as a table under its name."""

    def register(rows: Callable[[], Iterable[Iterable[str]]]) -> None:
        def markdown() -> str:
            lines = [headers, ["---"] * len(headers), *rows()]
            return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)

        TABLES[rows.__name__] = markdown

    return register


def text(value: float | None, unit: str = "", digits: int = 2) -> str:
    return "" if value is None else f"{value:,.{digits}f}{unit}"


# ---------------------------------------------------------------------------------------------------------------------
# One table of headlines


@table("What, measured in one run", "bigkit", "others", "limit")
def headlines() -> Iterable[Iterable[str]]:
    load, link = results("checkpoint-gpu"), results("offload-gpu")["machine"]["pinned_gb_s"]
    size = load["machine"]["bytes"] / 1e9
    own, theirs = (size / row("checkpoint-gpu", way=way, model="large")["warm_s"] for way in ("bigkit", "transformers"))
    yield ("load 13.5 GB to the GPU, files in the page cache", f"{own:.1f} GB/s", f"Transformers {theirs:.1f}",
           f"{load['machine']['pinned_gb_s']:.1f} (link)")  # fmt: skip
    own, theirs = (
        row("offload-gpu", way=f"{way}, all in RAM", shape="1x16")["gb_s"] for way in ("bigkit", "accelerate")
    )
    yield "run a 7B whose weights rest in RAM", f"{own:.1f} GB/s", f"Accelerate {theirs:.1f}", f"{link:.1f} (link)"
    both, most = (row("links", way=way)["gb_s"] for way in ("in RAM, two GPUs", "links"))
    shared = row("links", way="in RAM, MLPs on the CPU", shape="graph")
    beside = row("links", way="beside one link: CPU reads, bfloat16", shape=f"{shared['threads']} threads")
    yield (f"the same over two GPUs; over one, and {shared['count']} of 32 MLPs on the CPU, one graph a token",
           f"{both:.1f} GB/s; {shared['gb_s']:.1f} GB/s", "",
           f"{most:.1f} (both links); {beside['gb_s'] + beside['link_gb_s']:.1f} (link and CPU)")  # fmt: skip
    own = row("offload-gpu", way="bigkit, on disk, cold", shape="1x16")["gb_s"]
    raw = statistics.mean(results("offload-gpu")["machine"]["raw_cold_gb_s"])
    yield "the same on one GPU, from a cold disk", f"{own:.2f} GB/s", "", f"{raw:.2f} (raw readers)"
    one: dict[str, Any] = {"case": "qwen3", "batch": 1}
    own, theirs = (row("experts", way=way, **one)["tokens_per_second"] for way in ("RAM, graphs", "accelerate"))
    most = (
        row("experts", case="qwen3", way="link")["bytes_per_second"]
        / row("experts", way="RAM", **one)["bytes_per_token"]
    )
    yield ("decode with 19 GB of experts in RAM, one graph a token, tokens drawn", f"{own:.1f} tokens/s",
           f"Accelerate {theirs:.2f}", f"{most:.1f} (link)")  # fmt: skip
    own, theirs = (row("decode", part="bf16", way=way)["tokens_per_s"] for way in ("one graph a token", "Python"))
    compiled = row("decode", part="bf16", way="Transformers, compiled")
    most = f"; compiled {compiled['tokens_per_s']:.0f}, after {compiled['first_call_s']:.0f} s"
    yield "decode a 7B that is all on the GPU", f"{own:.0f} tokens/s", f"Transformers {theirs:.0f}{most}", ""
    longest = results("planner")["rows"][2]
    yield (f"plan {longest['model']} over 8 GPUs, from layer records", f"{longest['balanced_ms']:.1f} ms",
           f"Accelerate {longest['accelerate_ms']:.0f} ms", "")  # fmt: skip
    memory, prompts, tokens = (held_out_errors(quantity) for quantity in ("allocated", "prompt", "token"))
    exact, soon, near = (
        sum(abs(error) <= bound for error in errors) for errors, bound in ((memory, 0.5), (prompts, 15), (tokens, 15))
    )
    image = {r["way"]: text(r["seconds"], " s") for r in results("pipelines")["rows"]}
    yield ("an image from 11 GB of Flux's shape, 8.1 GB on the GPU", image["bigkit, one at a time"],
            f"Diffusers {image['Diffusers, model offload']}", f"{image['on the GPU']} (all on the GPU)")  # fmt: skip
    rows = [row for draw in DRAWS for row in results(draw)["rows"]]
    ran = sum("AcceleratorError" not in row.get("error", "") and "not measured" not in row for row in rows)
    before = [sum(abs(error) <= 15 for error in held_out_errors(what, "before")) for what in ("prompt", "token")]
    last = len(held_out_errors("token", "before"))
    old = [sum(abs(error) <= 0.15 for error in twin_errors(key)) for key in ("prefill", "token")]
    yield (f"predicted: `generate`, {len(memory)} of {ran} held-out runs",
           f"allocated, without a GPU: {exact} within 0.5 %; time within 15 %, a narrow twin timed beside: {soon} "
           f"prompts, {near} tokens (before, of {last}: {before[0]} and {before[1]}); of 72 runs of a table {old[0]} "
           f"and {old[1]}", "", "measured on H200s")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Planning


@table("model", "layers", "GPUs", "Accelerate", "bigkit from the nn.Module", "bigkit from records", "exact", "ratio",
       "`infer_auto_device_map` alone")  # fmt: skip
def planning_time() -> Iterable[Iterable[str]]:
    for r in results("planner")["rows"]:
        yield (r["model"], str(r["layers"]), str(r["gpus"]), text(r["accelerate_ms"], " ms", 1),
               text(r["from_module_ms"], " ms", 1), text(r["balanced_ms"], " ms"), text(r["exact_ms"], " ms"),
               f"{r['ratio']:.0f}x",
               f"{r['accelerate_infer_ms']:.1f} and {r['infer_ms']:.1f} ms")  # fmt: skip


@table("float16 weights", "on GPUs", "Accelerate", "on the fullest GPU", "Accelerate")
def planning_places() -> Iterable[Iterable[str]]:
    columns = ("on_gpus_gib", "accelerate_on_gpus_gib", "fullest_gib", "accelerate_fullest_gib")
    for r in results("planner")["rows"]:
        yield r["model"], *(text(r.get(column), " GiB") for column in columns)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@table("to the GPU", "warm", "rate", "cold", "rate", "host memory", "20,000 small tensors, warm")
def loading_gpu() -> Iterable[Iterable[str]]:
    size = results("checkpoint-gpu")["machine"]["bytes"] / 1e9
    many = {r["way"]: r["warm_s"] for r in results("checkpoint-gpu")["rows"] if r["model"] == "many"}
    for r in results("checkpoint-gpu")["rows"]:
        if r["model"] == "large":
            yield (NAMES[r["way"]], text(r["warm_s"], " s", 3), text(size / r["warm_s"], " GB/s", 1),
                   text(r["cold_s"], " s"), text(size / r["cold_s"], " GB/s"), text(r["host_total_mb"], " MB", 0),
                   text(many.get(r["way"]), " s"))  # fmt: skip


@table("on the CPU", "load", "load + first forward", "cold", "20,000 small tensors")
def loading_cpu() -> Iterable[Iterable[str]]:
    many = {r["way"]: r["warm_s"] for r in results("checkpoint-cpu")["rows"] if r["model"] == "many"}
    for r in results("checkpoint-cpu")["rows"]:
        if r["model"] == "large":
            yield (NAMES[r["way"]], text(r["warm_s"], " s", 3), text(r["load_and_forward_s"], " s"),
                   text(r["cold_s"], " s"), text(many.get(r["way"]), " s"))  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Models that are spread out

NAMES = {
    "bigkit": "bigkit",
    "accelerate": "Accelerate",
    "transformers": "Transformers",
    "safetensors": "safetensors `load_file`",
    "resident": "all on the GPU",
    "bigkit, on disk, warm": "bigkit, on disk, files in the page cache",
    "bigkit, on disk, kept in RAM": "bigkit, on disk, kept in RAM after the first visit",
    "accelerate, all in RAM": "Accelerate, all in RAM",
    "accelerate, half in RAM": "Accelerate, half in RAM",
    "accelerate, helped": "Accelerate helped, all in RAM",
    "diffusers, group offload": "diffusers group offload, blocks in RAM",
    "accelerate, on disk, warm": "Accelerate, on disk, page cache",
}


@table("weights", "1 x 16 tokens", "rate", "8 x 512 tokens", "GPU memory", "to prepare")
def offloading_gpu() -> Iterable[Iterable[str]]:
    ways = ("resident", "bigkit, all in RAM", "bigkit, half in RAM", "bigkit, on disk, warm",
            "bigkit, on disk, kept in RAM", "accelerate, all in RAM", "accelerate, half in RAM", "accelerate, helped",
            "diffusers, group offload", "accelerate, on disk, warm")  # fmt: skip
    for way in ways:
        short, long = (row("offload-gpu", way=way, shape=shape) for shape in ("1x16", "8x512"))
        yield (NAMES.get(way, way), text(short["s"], " s", 3), text(short.get("gb_s"), " GB/s", 1),
               text(long["s"], " s", 3), text(short["gpu_peak_gb"], " GB", 1),
               text(short.get("prepare_s"), " s", 1))  # fmt: skip


@table("bigkit, all in RAM", "1 x 16 tokens", "8 x 512 tokens")
def offloading_ideas() -> Iterable[Iterable[str]]:
    ways = {
        "all in RAM": "as it is", "without pinning": "without pinned memory",
        "without overlap": "copies in turn with the work", "without prefetch": "fetched when called, not before",
        "without coalescing": "weight by weight", "with three slots": "three slots instead of two",
    }  # fmt: skip
    for way, name in ways.items():
        yield name, *(text(row("offload-gpu", way=f"bigkit, {way}", shape=s)["s"], " s", 3) for s in ("1x16", "8x512"))


@table("", "whole, on the GPU", "bigkit", "rate", "GPU memory")
def offloading_larger() -> Iterable[Iterable[str]]:
    for name, whole, spread, shape in (
        ("32.4 GB, 32 tokens generated", "resident, large", "bigkit, large", "32 tokens"),
        ("16 experts, 6.9 GB, 1 x 16 tokens", "resident, 16 experts", "bigkit, 16 experts in RAM", "1x16"),
        ("16 experts, 6.9 GB, 8 x 512 tokens", "resident, 16 experts", "bigkit, 16 experts in RAM", "8x512"),
    ):
        one, other = row("offload-gpu", way=whole, shape=shape), row("offload-gpu", way=spread, shape=shape)
        yield (name, text(one["s"], " s", 3), text(other["s"], " s", 3), text(other["gb_s"], " GB/s", 1),
               text(other["gpu_peak_gb"], " GB", 1))  # fmt: skip


@table("a token of a Llama-7B, all in RAM", "time", "weights", "prompt of 512", "logits differ by", "tokens")
def beyond_one_link() -> Iterable[Iterable[str]]:
    for r in results("links")["rows"]:
        if r["shape"] not in ("1x1", "graph"):
            continue
        on_cpu = f"; {r['count']} of 32 MLPs on {r['threads']} CPU threads, {r['slots']} slots" if "count" in r else ""
        name = "one GPU" + on_cpu if on_cpu else r["way"].removeprefix("in RAM, ").replace("streamed", "one GPU")
        if r["shape"] == "graph":
            alike = {True: "equal", False: "differ"}.get(r.get("same_tokens"), "")
            yield f"{name}; one CUDA graph", text(1000 * r["s"], " ms", 0), text(r["gb_s"], " GB/s", 1), "", "", alike
            continue
        if "bit_equal" not in r:
            yield name, text(1000 * r["s"], " ms", 0), text(r["gb_s"], " GB/s", 1), "", "", ""
            continue
        differ = "0" if r["bit_equal"] else f"{r['difference']:.2f} of {r['logits']:.1f}"
        yield (name, text(1000 * r["s"], " ms", 0), text(r["gb_s"], " GB/s", 1),
               "bit-equal" if r["prompt_equal"] else "differs", differ,
               "equal" if r["same_tokens"] else "differ")  # fmt: skip


@table("two H200s of one host", "one GPU", "two GPUs", "as fast", "outputs")
def several_links() -> Iterable[Iterable[str]]:
    rows = {(r["way"], r["shape"]): r for r in results("several-gpus")["rows"]}
    for way, shape, name in (
        ("in RAM, {}", "1x1", "16 blocks of a Llama-7B in RAM, a token"),
        ("in RAM, {}, 4 blocks of a 70B", "1x1", "4 blocks of a Llama-70B in RAM, a token"),
        ("experts in RAM, {}", "8x512", "12 blocks of Qwen3-30B-A3B, half on each GPU, experts in RAM, 8 x 512"),
        ("experts in RAM, {}", "decode", "the same, a token"),
        ("load, {}", "-", "6.9 GB of files in memory, loaded"),
    ):
        one, two = (rows.get((way.format(count), shape)) for count in ("one GPU", "two GPUs"))
        if one and two:
            equal = {True: "bit-equal", None: ""}.get(two.get("bit_equal"), "differ")
            rates = [f"{1000 * r['s']:.0f} ms, {r['gb_s']:.1f} GB/s" for r in (one, two)]
            yield name, *rates, text(one["s"] / two["s"], " times"), equal


@table("placed by a plan over two H200s, GB on GPU 0 and on GPU 1", "planned", "foretold by a dry run", "measured")
def several_peaks() -> Iterable[Iterable[str]]:
    for r in results("several-gpus")["rows"]:
        if r["way"].startswith("peaks, ") and "measured_gb" in r:
            name, strategy = r["way"].removeprefix("peaks, ").split(", ")
            places = f', "{strategy}"' if strategy != "auto" else f", {r['offloaded_gb']:.1f} GB in RAM"
            kinds = ("planned_gb", "foretold_gb", "measured_gb")
            figures = [" and ".join(f"{n:.2f}" for n in r[kind]) for kind in kinds]
            yield f"{r['shape']} of {name}{places}, a prompt of {r['prompt']:,}", *figures


@table("16 cores of the host", "the CPU reads", "both links bring meanwhile")
def beside_busy_links() -> Iterable[Iterable[str]]:
    for r in results("links")["rows"]:
        if r["way"].startswith("CPU reads"):
            yield (
                f"{r['way'].rpartition(' ')[2]}, {r['shape']}",
                *(text(r[k], " GB/s", 1) for k in ("gb_s", "link_gb_s")),
            )


@table("13.5 GB of files in memory", "time", "rate")
def loading_on_two() -> Iterable[Iterable[str]]:
    for r in results("links")["rows"]:
        if r["way"].startswith(("load, ", "read, ")):
            yield r["way"].partition(", ")[2], text(r["s"], " s", 3), text(r["gb_s"], " GB/s", 1)


@table("tokens a second, and how busy the link is", "1 sequence", "8", "32", "brought for one token", "GPU memory")
def experts_in_ram() -> Iterable[Iterable[str]]:
    for case, name in (("qwen3", ""), ("qwen3-48", "48 blocks: ")):
        rows = [r for r in results("experts")["rows"] if "tokens_per_second" in r and r["case"] == case]
        for way in dict.fromkeys(r["way"] for r in rows):
            own = [r for r in rows if r["way"] == way]
            rates = {r["batch"]: r["tokens_per_second"] for r in own}
            size = next((r["gpu_bytes"] / 1e9 for r in own if "gpu_bytes" in r), None)
            brought = next(
                (r["bytes_per_token"] / 1e9 for r in own if "bytes_per_token" in r and r["batch"] == 1), None
            )
            digits, busy = 1 if way != "accelerate" else 3, {r["batch"]: r.get("share_of_link") for r in own}
            cells = [text(rates.get(batch), digits=digits) + (f" ({busy[batch]:.0%})" if busy.get(batch) else "")
                     for batch in (1, 8, 32)]  # fmt: skip
            yield f"{name}{way}", *cells, text(brought, " GB"), text(size, " GB", 1)


@table("experts that rest elsewhere", "brought for a token, as foretold", "a token", "foretold", "error", "nine of ten",
       "first prompt", "again", "foretold")  # fmt: skip
def experts_foretold() -> Iterable[Iterable[str]]:
    for r in results("experts-foretold")["rows"]:
        assert r["bytes_equal"], r["case"]
        (low, high), (first, foretold) = r["range_ms"], r["prompt_ms"]
        yield (r["case"], text(r["bytes_per_token"][0] / 1e6, " MB", 1), *(text(ms, " ms", 1) for ms in r["token_ms"]),
               f"{r['error_percent']:+.1f} %", f"{low:.0f} to {high:.0f} ms",
               *(f"{ms:.0f} ms" for ms in (first, r["prompt_again_ms"], foretold)))  # fmt: skip


@table("experts in RAM, one sequence", "tokens a second", "brought for a token", "link busy", "equal", "8 x 512 tokens")
def experts_few_bits() -> Iterable[Iterable[str]]:
    names = {"mixtral": "Mixtral-8x7B, {} of 32 blocks", "deepseek": "DeepSeek-V3, 64 of 256 experts, {} of 61 blocks"}
    found = results("experts")
    for case, name in names.items():
        rows = [r for r in found["rows"] if r["case"] == case and not r["way"].startswith("link")]
        for way in dict.fromkeys(r["way"] for r in rows):
            own = {key: value for r in rows if r["way"] == way for key, value in r.items()}
            brought, share = own.get("bytes_per_token"), own.get("share_of_link")
            equal = {True: "yes", False: "no"}.get(own.get("equal"), "")  # type: ignore[arg-type]
            yield (f"{name.format(found['blocks'][case])}: {way}", text(own["tokens_per_second"], digits=1),
                   "" if brought is None else text(brought / 1e9, " GB"), "" if share is None else f"{share:.0%}",
                   equal, text(own.get("prompt_seconds"), " s", 3))  # fmt: skip


@table("2 GB of experts on a cold disk", "read", "chosen for the first time", "ratio", "time")
def experts_on_disk() -> Iterable[Iterable[str]]:
    for number, one in enumerate(results("experts-cpu")["rows"], 1):
        read, chosen = (text(one[name] / 1e6, " MB", 1) for name in ("bytes_read", "bytes_chosen"))
        yield f"token {number}", read, chosen, text(one["ratio"]), text(one["seconds"], " s")


# ---------------------------------------------------------------------------------------------------------------------
# Weights as they are stored

STORED = {
    "gpt-oss": "gpt-oss-20b, {} of 24 blocks", "deepseek": "DeepSeek-V3, {} of 61 blocks, 16 of 256 experts",
    "llama": "Llama-7B, {} of 32 blocks",
}  # fmt: skip


@table("weights in RAM, one sequence", "brought for a token", "tokens a second", "one graph a token", "8 x 512 tokens")
def as_stored() -> Iterable[Iterable[str]]:
    def cell(row: dict[str, Any], value: float | None, unit: str, digits: int) -> str:
        times = row.get("against_bf16", 1)
        return text(value, unit, digits) + (f" ({times:.2f} x)" if times != 1 else "")

    for part, name in STORED.items():
        if not (ROOT / "benchmarks" / "results" / f"stored-{part}.json").exists():
            continue
        rows, blocks = results(f"stored-{part}")["rows"], results(f"stored-{part}")["about"]["blocks"]
        for way in dict.fromkeys(r["way"] for r in rows):
            own = {r["mode"]: r for r in rows if r["way"] == way and "mode" in r}
            python, graph, prompt = (own.get(mode, {}) for mode in ("Python", "graph", "prompt"))
            brought = python.get("brought")
            yield (f"{name.format(blocks)}: {way}", text(brought and brought / 1e9, " GB"),
                   cell(python, python.get("tokens_per_second"), "", 1),
                   cell(graph, graph.get("tokens_per_second"), "", 1),
                   cell(prompt, prompt.get("prompt_seconds"), " s", 3))  # fmt: skip


DECODINGS = {
    "gpt-oss": "MXFP4, gate and up of 4 experts of gpt-oss",
    "deepseek": "FP8 in blocks, gate and up of 8 experts of DeepSeek-V3",
    "gptq": "GPTQ, 11,008 x 4,096", "awq": "AWQ, the same", "int4": "compressed-tensors, the same",
}  # fmt: skip


@table("decoding on the GPU", "weights", "PyTorch", "kernel", "read and written", "out of pinned RAM", "a copy alone")
def decoding_alone() -> Iterable[Iterable[str]]:
    rows = {r["case"]: r for r in results("stored-kernels")["rows"]}
    for case, name in DECODINGS.items():
        r = rows[case]
        yield (name, text(r["weights"] / 1e6, " M", 1), text(r["plain_ms"], " ms", 3), text(r["kernel_ms"], " ms", 3),
               text(r["kernel_bytes_per_second"] / 1e9, " GB/s", 0), text(r.get("bring_and_decode_ms"), " ms"),
               text(r.get("bring_ms"), " ms"))  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Decoding

DECODED = {
    "bf16": "Llama-7B, bfloat16", "nf4": "the same in nf4", "int8": "in int8 without outliers",
    "bf16, half in RAM": "bfloat16, half of the blocks in RAM", "nf4, all in RAM": "nf4, all blocks in RAM",
    "experts on the GPU": "8 blocks of Qwen3-30B-A3B", "experts in RAM": "the same, experts in RAM",
}  # fmt: skip


@table("tokens a second", "Python", "each length for the first time", "one graph a token", "first call with it")
def decoding() -> Iterable[Iterable[str]]:
    found = {(r["part"], r["way"]): r for r in results("decode")["rows"]}
    for part, name in DECODED.items():
        if (part, "one graph a token") in found:
            python, graph = (found[part, way] for way in ("Python", "one graph a token"))
            yield (name, text(python["tokens_per_s"], digits=1), text(python["new_lengths"], digits=1),
                   text(graph["tokens_per_s"], digits=1), text(graph["first_call_s"], " s"))  # fmt: skip
    compiled = found.get(("bf16", "Transformers, compiled"))
    if compiled:
        yield ("bfloat16, compiled by Transformers", "", "", text(compiled["tokens_per_s"], digits=1),
               text(compiled["first_call_s"], " s"))  # fmt: skip


@table("tokens a second", "first call", "second call", "layers on the GPU", "same tokens", "GPU memory", "reserved")
def decoding_cache() -> Iterable[Iterable[str]]:
    for r in results("decode")["rows"]:
        if r["part"] == "cache":
            others = {"on the GPU": "8", "offloaded by Transformers": "2 at a time"}
            stay = others.get(r["way"]) or f"{r['stay']}, 2 come"
            yield (r["way"], text(r["new_lengths"], digits=1), text(r["tokens_per_s"], digits=1), stay,
                   "yes" if r["equal"] else "no", text(r.get("gpu_peak_gb"), " GB", 1),
                   text(r.get("gpu_reserved_gb"), " GB", 1))  # fmt: skip


@table("16 blocks of Llama-7B in RAM: a pass over", *map(str, (1, 2, 4, 8, 16, 32)), "64 tokens")
def decoding_passes() -> Iterable[Iterable[str]]:
    passes = [r["seconds"] for r in results("decode")["rows"] if r["way"].startswith("a pass over")]
    yield "takes", *(text(1000 * seconds, " ms", 1) for seconds in passes)


@table("on the CPU", "1 token", "4 tokens", "a hook, resident", "a hook, weights in RAM", "a hook, on disk")
def offloading_cpu() -> Iterable[Iterable[str]]:
    cases = {(r["way"], r["shape"]): r.get("s") or r.get("us") for r in results("offload-cpu")["rows"]}

    def forwards(way: str) -> list[str]:
        return [text(1000 * cases[way, shape], " ms", 0) for shape in ("1x1", "1x4")]

    def hooks(name: str) -> list[str]:
        return [text(cases.get((f"{name}, {rest}", "hook")), " µs", 1) for rest in ("resident", "in RAM", "on disk")]

    yield "all in RAM", *forwards("resident"), "", "", ""
    yield "bigkit, on disk, page cache", *forwards("bigkit, on disk, warm"), *hooks("bigkit")
    yield "Accelerate, on disk, page cache", *forwards("accelerate, on disk, warm"), *hooks("accelerate")


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@table("two cores, gloo", "bigkit", "Accelerate")
def gathering() -> Iterable[Iterable[str]]:
    times = results("distributed-cpu")["gather_ms"]
    for what in dict.fromkeys(name.partition(",")[0] for name in times):
        yield f"gather {what}", *(text(times[f"{what}, {who}"], " ms") for who in ("bigkit", "Accelerate"))


@table("processes", "32 prompts", "against one", "a file of them", "against one", "starting them")
def splitting() -> Iterable[Iterable[str]]:
    for r in results("distributed-cpu")["scaling"]:
        yield (str(r["processes"]), text(r["split_s"], " s"), text(r["split_ratio"], "x"), text(r["file_s"], " s"),
               text(r["file_ratio"], "x"), text(r["start_s"], " s", 1))  # fmt: skip


@table("model, groups of", "steps by", "one process, both GPUs", "two processes, one group at a time", "in flight",
       "gain", "three groups")  # fmt: skip
def stages() -> Iterable[Iterable[str]]:
    for r in results("stages-gpu")["rows"]:
        for load, (batch, prompt, *_) in results("stages-gpu")["machine"]["loads"].items():
            for how in ("Python", "graphs"):
                if (key := f"{load}, {how}") in r["gain"]:
                    alone, rates = (r[whose].get(f"{key}, one at a time") for whose in ("alone", "rates"))
                    in_flight, three = (r["rates"].get(f"{key}, {way}") for way in ("in flight", "three under way"))
                    said = [text(rate, " tokens/s", 0) for rate in (alone, rates, in_flight)]
                    yield (f"{r['kind']}, {batch} x {prompt}", how, *said, text(r["gain"][key]),
                           text(three, " tokens/s", 0))  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Fewer bits


@table("quantized while loaded, on two cores", "bigkit", "its peak", "Transformers", "its peak")
def quantized_loading() -> Iterable[Iterable[str]]:
    for kind in ("int8", "nf4", "nf4-double"):
        own, theirs = (row("quantize-cpu", what="load", way=w, kind=kind) for w in ("bigkit", "transformers"))
        yield (kind, text(own["load_s"], " s"), text(own["host_peak_mb"], " MB", 0), text(theirs["load_s"], " s"),
               text(theirs["host_peak_mb"], " MB", 0))  # fmt: skip


@table("stored as", "in RAM", "against bfloat16", "travels for a token", "link", "on the GPU")
def quantized_running() -> Iterable[Iterable[str]]:
    plain = row("quantize-gpu", where="RAM", kind="bfloat16")["tokens_per_s"]
    for kind in ("bfloat16", "int8", "nf4", "nf4-double"):
        away, here = (row("quantize-gpu", where=where, kind=kind) for where in ("RAM", "resident"))
        yield (kind, text(away["tokens_per_s"], " tokens/s"), text(away["tokens_per_s"] / plain),
               text(away["travels_gb_per_token"], " GB"), text(away["gb_per_s"], " GB/s", 1),
               text(here["tokens_per_s"], " tokens/s", 1))  # fmt: skip


@table("stored as", "float32", "bfloat16", "int8", "nf4", "nf4-double", "fp4")
def quantized_perplexity() -> Iterable[Iterable[str]]:
    r = row("quantize-cpu", what="perplexity")
    yield "perplexity", *(text(r[k], "", 3) for k in ("float32", "bfloat16", "int8", "nf4", "nf4-double", "fp4"))


# ---------------------------------------------------------------------------------------------------------------------
# Dry runs


def memory_pairs(column: int) -> list[tuple[int, int]]:
    """(predicted, measured) peaks in bytes: column 0 is what was allocated, 1 what was reserved."""
    return [(case["predicted"]["peak"][column], case["peak"][column]) for case in results("dryrun")["cases"]]


@table("72 runs", "within", "how many", "worst")
def dryrun_memory() -> Iterable[Iterable[str]]:
    data = results("dryrun")
    plain = {f"{case['model']}/{case['shape']}": case for case in data["cases"] if "quantization" not in case}
    limits = [(plain[name]["predicted"]["boundary"], limit) for name, limit in data["boundaries"].items()]
    for name, rows, bound in (
        ("`max_memory_allocated`", memory_pairs(0), 0.5),
        ("`max_memory_reserved`", memory_pairs(1), 3.0),
        (f"smallest memory that it runs with ({len(limits)} runs)", limits, 1.0),
    ):
        errors = [100 * abs(predicted / measured - 1) for predicted, measured in rows]
        yield name, f"{bound:g} %", str(sum(error <= bound for error in errors)), f"{max(errors):.2f} %"


DRAWS = (
    "held-out",
    "held-out-2",
    "held-out-3",
    "held-out-4",
    "held-out-5",
    "held-out-6",
)  # each predicted with the code that was frozen before it was drawn


def held_out_errors(quantity: str, told: str = "", draws: Sequence[str] = DRAWS) -> list[float]:
    """How far predictions were off, in percent, in the runs that nobody had seen.

    Args:
        quantity: "allocated", "reserved", "prompt" or "token".
        told: which prediction of a time: with twins that were timed beside their models, "before" them, or "without
            twin"; twins were timed before in the third draw alone.
        draws: files of kept results.
    """
    errors = []
    for row in (row for draw in draws for row in results(draw)["rows"] if quantity in row.get("compared", {})):
        predicted, measured = row["compared"][quantity]
        if not told and "around" in row and quantity in row["around"]:
            predicted = measured * row["around"][quantity]
        elif quantity in ("prompt", "token") and told != "before":
            others = row.get(told or "with the twin beside it")
            predicted = others[quantity == "token"] if others else predicted
        elif told and "with the twin beside it" not in row:
            continue
        errors.append(100 * (predicted / measured - 1))
    return errors


@table("held-out runs", "within", "first draw", "second draw", "third draw", "fourth draw", "fifth draw", "sixth draw",
       "all", "median error", "worst", "beyond 40 %")  # fmt: skip
def held_out() -> Iterable[Iterable[str]]:
    """What was foretold of the runs of all draws."""
    for name, bound, told in (
        ("allocated", 0.5, ""), ("reserved", 3.0, ""), ("prompt", 15.0, ""), ("token", 15.0, ""),
        ("prompt, twin timed before", 15.0, "before"), ("token, twin timed before", 15.0, "before"),
        ("prompt, without a twin", 15.0, "without twin"), ("token, without a twin", 15.0, "without twin"),
    ):  # fmt: skip
        parts = [held_out_errors(name.partition(",")[0], told, draws) for draws in (*((d,) for d in DRAWS), DRAWS)]
        counts = [
            f"{sum(abs(error) <= bound for error in errors)} of {len(errors)}" if errors else "" for errors in parts
        ]
        errors = parts[-1]
        yield (name, f"{bound:g} %", *counts, f"{statistics.median(map(abs, errors)):.2f} %",
               f"{max(errors, key=abs):+.1f} %", str(sum(abs(error) > 40 for error in errors)))  # fmt: skip


@table("what", "longest busy", "within 15 %", "median error", "worst")
def dryrun_time() -> Iterable[Iterable[str]]:
    for what, predicted, measured in (("prompt", "prefill", "prefill"), ("token", "token", "decode")):
        for lane in ("the GPU", "Python"):
            errors = [
                100 * abs(case["predicted"]["seconds"][predicted] / case["seconds"][measured] - 1)
                for case in results("dryrun")["cases"]
                if measured in case["seconds"] and predicted in case["predicted"]["seconds"]
                if (case["predicted"]["longest"][predicted] == "python") == (lane == "Python")
            ]
            good = sum(error <= 15 for error in errors)
            yield (what, lane, f"{good} of {len(errors)}", f"{statistics.median(errors):.1f} %",
                   f"{max(errors):.0f} %")  # fmt: skip


def twin_errors(key: str, ratio: Callable[[dict[str, Any]], float] | None = None) -> list[float]:
    """Predicted / measured - 1 of the 72 runs between twins: "prefill" or "token", from the model's call on."""
    ratio = ratio or (lambda about: statistics.median(about["called"]["twin"]))
    return [ratio(row["times"][key]) - 1 for row in results("twins")["rows"] if key in row.get("times", {})]


@table("the 72 runs between twins", "within", "how many", "median error", "worst", "beyond 40 %")
def twins() -> Iterable[Iterable[str]]:
    rows = results("twins")["rows"]
    ways: dict[str, Callable[[dict[str, Any]], float] | None] = {
        ", as declared": lambda about: statistics.median(about["twin"]),
        ", from the model's call": None,
        ", from the model's call, without a twin": lambda about: about["called"]["without twin"],
    }
    errors = {f"`max_memory_{name}`": [row[name][0] / row[name][1] - 1 for row in rows if name in row]
              for name in ("allocated", "reserved")}  # fmt: skip
    for way, ratio in ways.items():
        errors |= {name + way: twin_errors(key, ratio) for name, key in (("prompt", "prefill"), ("token", "token"))}
    for name, off in errors.items():
        bound = 0.005 if "allocated" in name else 0.03 if "reserved" in name else 0.15
        yield (name, f"{100 * bound:g} %", f"{sum(abs(error) <= bound for error in off)} of {len(off)}",
               f"{100 * statistics.median(map(abs, off)):.2f} %", f"{100 * max(off, key=abs):+.1f} %",
               str(sum(abs(error) > 0.4 for error in off)))  # fmt: skip


@table("Llama-7B", "predicted", "measured")
def dryrun_offload() -> Iterable[Iterable[str]]:
    for r in results("dryrun")["offload"]:
        batch, tokens = r["shape"].split("x")
        seconds = [r[key]["seconds"] for key in ("predicted", "measured")]
        yield f"{r['way']}, {batch} x {tokens} tokens", *(text(s, " s", 3 if s < 1 else 2) for s in seconds)


@table("a pipeline of Flux's shape", "an image", "peak", "predicted", "the same image")
def pipelines() -> Iterable[Iterable[str]]:
    for r in results("pipelines")["rows"]:
        sizes = (text(r[key] / 1e9, " GB") if r[key] else "" for key in ("peak", "predicted"))
        yield r["way"], text(r["seconds"], " s"), *sizes, "yes" if r["equal"] else "no"


@table("the same over two GPUs", "an image", "peaks", "predicted", "the same image")
def pipelines_two() -> Iterable[Iterable[str]]:
    for r in results("pipelines-two")["rows"]:
        pairs = (
            " and ".join(text(r[key] / 1e9) for key in keys if key in r) + " GB"
            for keys in (("peak", "second_peak"), ("predicted", "second_predicted"))
        )
        yield r["way"], text(r["seconds"], " s"), *pairs, "yes" if r["equal"] else "no"


@table("training on two GPUs", "kept on each", "predicted", "peak", "predicted peak")
def training() -> Iterable[Iterable[str]]:
    for r in results("training")["rows"]:
        keys = ("kept", "predicted_kept", "peak", "predicted_peak")
        yield r["way"], *(text(r[key] / 1e9, " GB") for key in keys)


# ---------------------------------------------------------------------------------------------------------------------


def filled(page: str) -> str:
    """The text of a page with every table as the results have it.

    Raises:
        KeyError: a marker names a table that there is none of.
    """
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}",
        page,
        flags=re.DOTALL,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tables of the README files from benchmarks/results.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a table is out of date")
    check = parser.parse_args().check
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        if check and after != before:
            sys.exit(f"{path.relative_to(ROOT)} is out of date: run python scripts/benchmark_tables.py")
        if not check:
            path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
