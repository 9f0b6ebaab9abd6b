"""Quantized models side by side: loading, tokens a second resident and offloaded, perplexity.

    python benchmarks/quantize.py [--save]             the CPU: loading against Transformers, perplexity
    python benchmarks/quantize.py --gpu [--save]       a CUDA GPU: loading against Accelerate and Transformers, tokens/s

Each way runs in a fresh process on the same files: a Llama-7B shape in bfloat16 (with --layers fewer blocks of it) in
shards, random weights, in the page cache. Time and peaks are those of the call that loads; the host's peak is that of
the process above what it held before, mapped files included, the GPU's is that of PyTorch's allocator. Tokens a second:
the median step of greedy decoding of one sequence with a KV cache, the blocks on the GPU or all in RAM. Perplexity: the
shipped GPT on text that it has not seen. Results are written as they come.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoint import llama, make
from torch import nn

import bigkit
import bigkit.quantize.bnb
from bigkit import BnbQuantizationConfig, load_and_quantize_model
from bigkit.model.precision import quantized_bytes

KINDS: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}
LOADED = ("int8", "nf4", "nf4-double")


def options(kind: str) -> dict[str, Any]:
    """The config of a kind, in Accelerate's words."""
    return {"bnb_4bit_compute_dtype": torch.bfloat16, "torch_dtype": torch.bfloat16, **KINDS[kind]}


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def bigkit_way(folder: Path, kind: str, layers: int, device: str) -> nn.Module:
    """From full precision, quantized as it arrives."""
    place = 0 if device == "cuda" else "cpu"
    return load_and_quantize_model(llama(layers), BnbQuantizationConfig(**options(kind)), folder, {"": place})


def accelerate_way(folder: Path, kind: str, layers: int, device: str) -> nn.Module:
    """Accelerate's call of the same name."""
    from accelerate.utils import BnbQuantizationConfig as Config
    from accelerate.utils import load_and_quantize_model as load

    return load(llama(layers), Config(**options(kind)), weights_location=str(folder), device_map={"": 0})


def transformers_way(folder: Path, kind: str, layers: int, device: str) -> nn.Module:
    """`from_pretrained`, which builds its own model: that time is part of it."""
    import transformers

    config = transformers.BitsAndBytesConfig(**{k: v for k, v in options(kind).items() if k != "torch_dtype"})
    return transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": 0 if device == "cuda" else "cpu"}, quantization_config=config
    )


WAYS: dict[str, Callable[..., nn.Module]] = {
    "bigkit": bigkit_way, "accelerate": accelerate_way, "transformers": transformers_way,
}  # fmt: skip


class HostMemory:
    """The peak of this process's memory above what it held at the start, in bytes."""

    def __enter__(self) -> HostMemory:
        self.base, self.peak, self.stop = self._now(), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join()
        self.total = max(0, max(self.peak, self._now()) - self.base)

    def _watch(self) -> None:
        while not self.stop.is_set():
            self.peak = max(self.peak, self._now())
            self.stop.wait(0.005)

    @staticmethod
    def _now() -> int:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmRSS"].split()[0]) * 1024


def load(way: str, kind: str, folder: Path, layers: int, device: str, runs: int) -> dict[str, Any]:
    """Load `runs` times: median seconds, peaks, and what the model then holds."""
    cuda = device == "cuda"
    if cuda:
        torch.ones(1, device="cuda").sum().item()
    bigkit.quantize.bnb.bitsandbytes()
    seconds, host, peak, held = [], 0, 0, 0
    for _ in range(runs):
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with HostMemory() as memory:
            begin = time.perf_counter()
            model = WAYS[way](folder, kind, layers, device)
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        host = max(host, memory.total)
        if cuda:
            peak, held = max(peak, torch.cuda.max_memory_allocated()), torch.cuda.memory_allocated()
        del model
    return {"what": "load", "way": way, "kind": kind, "first_s": seconds[0], "load_s": statistics.median(seconds),
            "host_peak_mb": host / 1e6, "gpu_peak_mb": peak / 1e6, "gpu_held_mb": held / 1e6}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Running


def decode(model: Any, prompt: torch.Tensor, tokens: int) -> list[float]:
    """Seconds of the prompt, and of each token after it."""
    cache, ids, seconds = None, prompt, []
    for _ in range(1 + tokens):
        begin = time.perf_counter()
        with torch.no_grad():
            out = model(ids, past_key_values=cache, use_cache=True)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        ids.tolist()  # waits for the token, and not for weights that are on their way for the next one
        seconds.append(time.perf_counter() - begin)
    return seconds


def run(where: str, kind: str, folder: Path, layers: int, tokens: int) -> dict[str, Any]:
    """Tokens a second of greedy decoding, everything on the GPU or all blocks in RAM."""
    blocks = dict.fromkeys((f"model.layers.{i}" for i in range(layers)), 0 if where == "resident" else "cpu")
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), 0)
    device_map: Any = {**rest, **blocks}
    begin = time.perf_counter()
    if kind == "bfloat16":
        model: Any = bigkit.load_checkpoint_and_dispatch(llama(layers), folder, device_map, dtype="bfloat16")
    else:
        config = BnbQuantizationConfig(**options(kind))
        model = load_and_quantize_model(llama(layers), config, folder, device_map)
    loaded = time.perf_counter() - begin
    prompt = torch.randint(0, 32000, (1, 16), device="cuda")
    decode(model.eval(), prompt, tokens)  # cuDNN plans its attention anew for every length that it has not seen
    torch.cuda.reset_peak_memory_stats()
    prefill, *steps = decode(model, prompt, tokens)
    per_token = statistics.median(steps)
    size = 2 if kind == "bfloat16" else quantized_bytes((4096, 11008), kind, 4096) / (4096 * 11008)
    travels = layers * (4 * 4096 * 4096 + 3 * 4096 * 11008) * size if where == "RAM" else 0
    return {"what": "run", "where": where, "kind": kind, "tokens_per_s": 1 / per_token, "prompt_s": prefill,
            "load_s": loaded, "travels_gb_per_token": travels / 1e9, "gb_per_s": travels / 1e9 / per_token,
            "gpu_peak_mb": torch.cuda.max_memory_allocated() / 1e6}  # fmt: skip


def perplexities(device: str, length: int) -> dict[str, Any]:
    """Perplexity of the shipped GPT as it is stored in each way."""
    from bigkit.zoo.gpt import heldout_text, load_pygpt, perplexity

    text = heldout_text()[:length]
    values = {dtype: perplexity(load_pygpt(device, getattr(torch, dtype)), text) for dtype in ("float32", "bfloat16")}
    for kind in KINDS:
        config = BnbQuantizationConfig(
            **{**options(kind), "torch_dtype": "float32", "bnb_4bit_compute_dtype": "float32"}
        )
        model = load_and_quantize_model(load_pygpt(), config, device_map={"": 0 if device == "cuda" else "cpu"})
        values[kind] = perplexity(model, text)
    return {"what": "perplexity", "bytes": len(text), **values}


def main() -> None:
    """Make the files, run every way in a process of its own, print tables."""
    parser = argparse.ArgumentParser(description="Quantized models side by side")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--layers", type=int, help="blocks of the Llama-7B shape (GPU: 32, CPU: 1)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24, help="tokens to decode")
    parser.add_argument("--text", type=int, default=8000, help="bytes that perplexity is measured on")
    parser.add_argument("--parts", default="load,run,perplexity")
    parser.add_argument("--folder", type=Path, help="where the files are made (a temporary folder)")
    parser.add_argument("--save", nargs="?", const=True, help="write benchmarks/results/quantize-*.json, or this file")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    device, layers = ("cuda", given.layers or 32) if given.gpu else ("cpu", given.layers or 1)
    if given.child:
        what, *names = given.child
        if what == "load":
            row = load(names[0], names[1], Path(names[2]), layers, device, given.runs)
        elif what == "run":
            row = run(names[0], names[1], Path(names[2]), layers, given.tokens)
        else:
            row = perplexities(device, given.text)
        print(json.dumps(row))
        return
    root = given.folder or Path(tempfile.mkdtemp(prefix="quantize-benchmark-"))
    try:
        compare(root, device, layers, given)
    finally:
        if not given.folder:
            shutil.rmtree(root)


def compare(root: Path, device: str, layers: int, given: argparse.Namespace) -> None:
    """Run all parts."""
    folder = root / "llama"
    make(folder, layers, given.gpu)
    import bitsandbytes

    machine = {
        "gpu": torch.cuda.get_device_name() if given.gpu else None, "cores": os.cpu_count(),
        "processor": platform.machine(), "python": platform.python_version(), "torch": torch.__version__,
        "bitsandbytes": bitsandbytes.__version__, "date": time.strftime("%Y-%m-%d"), "layers": layers,
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")), "runs": given.runs,
    }  # fmt: skip
    print(json.dumps(machine), flush=True)
    todo: list[list[str]] = []
    if "load" in given.parts:
        ways = list(WAYS) if given.gpu else ["bigkit", "transformers"]
        todo += [["load", way, kind, str(folder)] for kind in LOADED for way in ways]
    if "run" in given.parts and given.gpu:
        todo += [["run", where, kind, str(folder)]
                 for where in ("RAM", "resident") for kind in ("bfloat16", *LOADED)]  # fmt: skip
    if "perplexity" in given.parts:
        todo += [["perplexity"]]
    rows = []
    path = None
    if given.save:
        name = f"quantize-{'gpu' if given.gpu else 'cpu'}.json"
        path = Path(__file__).parent / "results" / name if given.save is True else Path(given.save)
        path.parent.mkdir(parents=True, exist_ok=True)
    for names in todo:
        arguments = [sys.executable, __file__, *(["--gpu"] if given.gpu else []), "--layers", str(layers),
                     "--runs", str(given.runs), "--tokens", str(given.tokens), "--text", str(given.text),
                     "--child", *names]  # fmt: skip
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=900)
        if done.returncode:
            print(f"{names[:3]} failed: {done.stderr.strip().splitlines()[-1:]}", flush=True)
            continue
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
        if path is not None:
            path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    table(rows)


def table(rows: list[dict[str, Any]]) -> None:
    """Print the rows as Markdown."""
    if loads := [row for row in rows if row["what"] == "load"]:
        print("\n| loaded as | way | load | host peak | GPU peak | held on the GPU |\n|---|---|---|---|---|---|")
        for row in loads:
            print(f"| {row['kind']} | {row['way']} | {row['load_s']:.2f} s | {row['host_peak_mb']:.0f} MB"
                  f" | {row['gpu_peak_mb']:.0f} MB | {row['gpu_held_mb']:.0f} MB |")  # fmt: skip
    if runs := [row for row in rows if row["what"] == "run"]:
        base = {row["where"]: row["tokens_per_s"] for row in runs if row["kind"] == "bfloat16"}
        print("\n| blocks | stored as | tokens/s | over bfloat16 | bytes a token | link | GPU peak |")
        print("|---|---|---|---|---|---|---|")
        for row in runs:
            ratio = row["tokens_per_s"] / base.get(row["where"], float("nan"))
            print(f"| {row['where']} | {row['kind']} | {row['tokens_per_s']:.2f} | {ratio:.2f}x"
                  f" | {row['travels_gb_per_token']:.2f} GB | {row['gb_per_s']:.1f} GB/s"
                  f" | {row['gpu_peak_mb']:.0f} MB |")  # fmt: skip
    for row in rows:
        if row["what"] == "perplexity":
            kinds = [kind for kind in ("float32", "bfloat16", *KINDS) if kind in row]
            print(f"\n| perplexity of {row['bytes']} bytes | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}")
            print(f"| the shipped GPT | {' | '.join(f'{row[kind]:.4f}' for kind in kinds)} |")


if __name__ == "__main__":
    main()
