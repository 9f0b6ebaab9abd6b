"""Loading checkpoints side by side: bigkit, Accelerate, Transformers, safetensors; on the CPU and on a GPU.

    python benchmarks/checkpoint.py [--save]             the CPU: load, and load + first forward
    python benchmarks/checkpoint.py --gpu [--save]       a CUDA GPU: a 13.5 GB model warm and cold, 20 000 small tensors
    ... --only large|many                                one of the two models; a saved file keeps the other's rows
    ... --gpu --sweep                                    and sizes of chunks, of the ring, and numbers of readers

Each way runs in a fresh process on the same files: a Llama-7B shape in bfloat16 (with --layers fewer blocks of it) in
shards, random weights. Warm: the files lie in the page cache, median of several loads. Cold: their pages are dropped
first. Host memory is the peak of the process above what it held before the load, sampled from /proc; "anonymous" leaves
out pages of mapped files. Ceilings are measured in the same run: a pinned copy, and the best of several raw readers.
Each way stops taking samples after `--seconds`, and is ended after four times that with what it has; results are
written as they come.
"""

from __future__ import annotations

import argparse
import gc
import json
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigkit import init_empty_weights
from bigkit.checkpoints.format import Checkpoint
from bigkit.checkpoints.load import load_checkpoint_in_model
from bigkit.checkpoints.save import save_model
from bigkit.checkpoints.to_gpu import read_to_gpu
from bigkit.units import GB, MiB


def llama(layers: int, **sizes: int) -> nn.Module:
    """An empty Llama-7B shape with `layers` blocks; `sizes` of it differ."""
    import transformers

    config = transformers.LlamaConfig(num_hidden_layers=layers, dtype="bfloat16", **sizes)
    with init_empty_weights():
        return transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)


class Many(nn.Module):
    """20 000 small tensors."""

    def __init__(self, count: int = 10_000) -> None:
        super().__init__()
        self.h = nn.ModuleList([nn.Linear(32, 32) for _ in range(count)])


def many() -> nn.Module:
    """An empty `Many`."""
    with init_empty_weights():
        return Many()


def make(folder: Path, layers: int, gpu: bool, **sizes: int) -> None:
    """Write a checkpoint with random weights, unless it is there."""
    if folder.exists():
        return
    torch.manual_seed(0)
    if folder.name == "many":
        with torch.no_grad():
            save_model(Many(), folder, "5MB")
        return
    model = llama(layers, **sizes).to_empty(device="cuda" if gpu else "cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    save_model(model, folder, "5GB" if gpu else "500MB")
    model.config.save_pretrained(folder)
    del model, parameter
    if gpu:
        torch.cuda.empty_cache()  # the children need the room


# ---------------------------------------------------------------------------------------------------------------------
# Ways to load; each fills an empty model that was built before the clock starts, and returns it


def bigkit_way(folder: Path, model: nn.Module, device: str) -> nn.Module:
    """`load_checkpoint_in_model`."""
    load_checkpoint_in_model(model, folder, {"": 0 if device == "cuda" else device})
    return model


def accelerate_way(folder: Path, model: nn.Module, device: str) -> nn.Module:
    """Accelerate's call of the same name."""
    import accelerate

    index = next(folder.glob("*.index.json"), None)
    device_map = {"": 0 if device == "cuda" else device}
    accelerate.load_checkpoint_in_model(model, str(index or folder), device_map=device_map)
    return model


def transformers_way(folder: Path, model: nn.Module, device: str) -> nn.Module:
    """`from_pretrained`, which builds its own model: that time is part of it."""
    import transformers

    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=device)


def safetensors_way(folder: Path, model: nn.Module, device: str) -> nn.Module:
    """`load_file` of every shard, and `load_state_dict(assign=True)`."""
    from safetensors.torch import load_file

    for file in sorted(folder.glob("*.safetensors")):
        model.load_state_dict(load_file(file, device=device), strict=False, assign=True)
    return model


WAYS = {"bigkit": bigkit_way, "accelerate": accelerate_way, "transformers": transformers_way,
        "safetensors": safetensors_way}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def drop(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for file in folder.iterdir():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(folder: Path) -> None:
    """Read a folder's files once."""
    for file in folder.iterdir():
        with open(file, "rb") as stream:
            while stream.read(1 << 24):
                pass


def read_raw(folder: Path, readers: int, piece: int = 16 << 20) -> float:
    """Seconds to read a folder's files once with several readers, each into a buffer of its own."""
    files = {file: os.open(file, os.O_RDONLY) for file in sorted(folder.glob("*.safetensors"))}
    pieces = [(fd, start) for file, fd in files.items() for start in range(0, file.stat().st_size, piece)]
    local = threading.local()

    def read(item: tuple[int, int]) -> None:
        if not hasattr(local, "buffer"):
            local.buffer = memoryview(bytearray(piece))
        os.preadv(item[0], [local.buffer], item[1])

    begin = time.perf_counter()
    with ThreadPoolExecutor(readers) as pool:
        list(pool.map(read, pieces))
    seconds = time.perf_counter() - begin
    for fd in files.values():
        os.close(fd)
    return seconds


class HostMemory:
    """The peak of this process's memory above what it held at the start, in bytes."""

    def __enter__(self) -> HostMemory:
        self.base, self.peak, self.stop = self._now(), (0, 0), threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join()
        self.total, self.anonymous = (max(0, peak - base) for peak, base in zip(self.peak, self.base))

    def _watch(self) -> None:
        while not self.stop.is_set():
            self.peak = tuple(map(max, self.peak, self._now()))  # type: ignore[assignment]
            self.stop.wait(0.003)

    @staticmethod
    def _now() -> tuple[int, int]:
        lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return tuple(int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))  # type: ignore[return-value]


def child(way: str, folder: Path, layers: int, device: str, runs: int, cold: int, seconds: float) -> None:
    """Load in this process, warm and cold; prints what is known after each load: times and memory."""
    empty = many if folder.name == "many" else lambda: llama(layers)
    load = WAYS[way]
    if device == "cuda":
        torch.ones(1, device="cuda").sum().item()
    first = device == "cpu" and folder.name == "large"

    def timed(memory: HostMemory | None = None) -> tuple[float, float]:
        model = empty()
        with memory or nullcontext():  # the thread that watches memory takes Python's lock from the load
            begin = time.perf_counter()
            model = load(folder, model, device)
            if device == "cuda":
                torch.cuda.synchronize()
            loaded = time.perf_counter() - begin
            if first:
                with torch.inference_mode():
                    model(torch.ones(1, 4, dtype=torch.long))
            both = time.perf_counter() - begin
        assert not any(parameter.is_meta for parameter in model.parameters())
        del model
        if device == "cuda":
            torch.cuda.empty_cache()
        return loaded, both

    found: dict[str, Any] = {"way": way, "model": folder.name}
    start, memory = time.perf_counter(), HostMemory()
    found["first_s"], _ = timed(memory)
    found |= {"host_total_mb": memory.total / 1e6, "host_anonymous_mb": memory.anonymous / 1e6}
    samples: list[tuple[float, float]] = []
    while len(samples) < runs and (not samples or time.perf_counter() - start < seconds):
        samples.append(timed())
        found |= {"runs": len(samples), "warm_s": statistics.median(loaded for loaded, _ in samples)}
        if first:
            found["load_and_forward_s"] = statistics.median(both for _, both in samples)
        print(json.dumps(found), flush=True)
    times: list[float] = []
    for _ in range(cold):
        gc.collect()  # pages that are still mapped cannot be dropped
        drop(folder)
        times.append(timed()[1])
        print(json.dumps(found | {"cold_s": statistics.median(times)}), flush=True)


def ask_child(way: str, folder: Path, layers: int, options: argparse.Namespace) -> dict[str, Any] | None:
    """Run `child` in a process of its own; what it found until it ended or had to be ended."""
    warm(folder)
    command = [sys.executable, __file__, "--child", way, str(folder), "--layers", str(layers), "--runs",
               str(options.runs), "--cold", str(options.cold if folder.name == "large" else 0),
               "--seconds", str(options.seconds)] + ["--gpu"] * options.gpu  # fmt: skip
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complaint:
        process = subprocess.Popen(command, stdout=said, stderr=complaint)
        try:
            problem = "failed" if process.wait(4 * options.seconds) else ""
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            problem = "took too long"
        said.seek(0)
        complaint.seek(0)
        found = [line for line in said.read().splitlines() if line.startswith("{")]
        if problem:
            print(f"{way} {problem}: {complaint.read().strip().splitlines()[-1:]}", flush=True)
    return json.loads(found[-1]) | ({"problem": problem} if problem else {}) if found else None


def sweep(folder: Path, size: int) -> dict[str, Any]:
    """`read_to_gpu` with several chunks (MiB), rings and numbers of readers: GB/s, the best of three loads.

    Each into memory that is new to the process, and into memory that torch has already; `allocate_s` is what it takes
    to get the new memory alone.
    """
    stored, device = Checkpoint.open(folder).stored, torch.device("cuda:0")

    def best(work: Callable[[], object], fresh: bool) -> float:
        times = []
        for _ in range(3):
            if fresh:
                torch.cuda.empty_cache()
            begin = time.perf_counter()
            made = work()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
            del made
        return min(times)

    def allocate() -> object:
        return [torch.empty(where.shape, dtype=where.dtype, device=device) for where in stored.values()]

    rows = []
    for chunk, ring, readers in ((8, 16, 16), (8, 12, 12), (8, 8, 8), (8, 24, 16), (4, 16, 16), (4, 32, 16),
                                 (16, 8, 8), (16, 12, 12), (16, 16, 16)):  # fmt: skip
        load = partial(read_to_gpu, stored, device, chunk=chunk * MiB, ring=ring, readers=readers)
        new, again = (size / best(load, fresh) / GB for fresh in (True, False))
        rows.append({"chunk_mib": chunk, "ring": ring, "readers": readers, "new_gb_s": new, "reused_gb_s": again})
        print(json.dumps(rows[-1]), flush=True)
    return {"allocate_s": best(allocate, True), "rows": rows}


def pinned_rate() -> float:
    """Bytes a second of a large pinned copy to the GPU."""
    source = torch.empty(1 << 30, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device="cuda")
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return source.nbytes / min(times)


def main() -> None:
    """Make the files, run every way in a process of its own, print a table."""
    parser = argparse.ArgumentParser(description="Loading checkpoints side by side")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--only", choices=("large", "many"))
    parser.add_argument("--sweep", action="store_true", help="with --gpu: other chunks, rings and readers")
    parser.add_argument("--layers", type=int, help="blocks of the Llama-7B shape (GPU: 32, CPU: 3)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15, help="no more samples of a way after that")
    parser.add_argument("--cold", type=int, default=1, help="cold loads of each way; 0 for none")
    parser.add_argument("--folder", type=Path, help="where the files are made, or lie already (a temporary folder)")
    parser.add_argument(
        "--save", nargs="?", const=True, help="write benchmarks/results/checkpoint-*.json, or this file"
    )
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device, layers = ("cuda", options.layers or 32) if options.gpu else ("cpu", options.layers or 3)
    if options.child:
        way, folder = options.child
        child(way, Path(folder), layers, device, options.runs, options.cold, options.seconds)
        return
    root = options.folder or Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-"))
    root.mkdir(exist_ok=True)
    try:
        run(root, layers, options)
    finally:
        if not options.folder:
            shutil.rmtree(root)


def run(root: Path, layers: int, options: argparse.Namespace) -> None:
    """Make the files in `root` and compare."""
    path = Path(__file__).parent / "results" / f"checkpoint-{'gpu' if options.gpu else 'cpu'}.json"
    path = path if options.save in (True, None) else Path(options.save)
    kept = json.loads(path.read_text()) if options.only and options.save and path.exists() else {"rows": []}
    rows = [row for row in kept["rows"] if row["model"] != options.only]
    machine: dict[str, Any] = kept.get("machine", {}) | {
        "gpu": torch.cuda.get_device_name() if options.gpu else None, "cores": os.cpu_count(),
        "processor": platform.machine(), "python": platform.python_version(), "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip

    def save() -> None:
        if options.save:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")

    if options.only != "many":
        folder = root / "large"
        make(folder, layers, options.gpu)
        machine["bytes"] = size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        machine |= ceilings(folder, size, options)
        if options.sweep:
            warm(folder)
            machine["sweep"] = sweep(folder, size)
        print(json.dumps(machine), flush=True)
        save()
    for model, ways in (("large", list(WAYS)), ("many", ["bigkit", "accelerate", "safetensors"])):
        if options.only in (None, model):
            make(root / model, layers, options.gpu)
            for way in ways:
                if found := ask_child(way, root / model, layers, options):
                    print(json.dumps(found), flush=True)
                    rows.append(found)
                    save()
    table(rows, machine.get("bytes", 0))


def ceilings(folder: Path, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """GB/s of raw reads, cold and warm, by number of readers, and of a pinned copy."""
    many = min(16, 2 * (os.cpu_count() or 1))
    found: dict[str, Any] = {"raw_cold_gb_s": {}, "raw_warm_gb_s": {}}
    for readers in sorted({4, many}) if options.cold else ():
        gc.collect()  # pages that are still mapped cannot be dropped
        drop(folder)
        found["raw_cold_gb_s"][readers] = size / read_raw(folder, readers) / GB
    warm(folder)
    for readers in sorted({1, 4, 12, many}):
        found["raw_warm_gb_s"][readers] = size / read_raw(folder, readers) / GB
    if options.gpu:
        found["pinned_gb_s"] = pinned_rate() / GB
    return found


def table(rows: list[dict[str, Any]], size: int) -> None:
    """Print the rows as Markdown; rates for the large model."""
    print("| model | way | warm | GB/s | load + first forward | cold | host memory, anonymous |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        large = row["model"] == "large"
        rate = f"{size / row['warm_s'] / GB:.1f}" if large else ""
        both = f"{row['load_and_forward_s']:.3f} s" if "load_and_forward_s" in row else ""
        cold = f"{row['cold_s']:.2f} s, {size / row['cold_s'] / GB:.2f} GB/s" if "cold_s" in row else ""
        print(
            f"| {row['model']} | {row['way']} | {row['warm_s']:.3f} s | {rate} | {both} | {cold}"
            f" | {row['host_total_mb']:.0f} MB, {row['host_anonymous_mb']:.0f} MB |"
        )


if __name__ == "__main__":
    main()
