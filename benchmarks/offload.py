"""Running a model that rests elsewhere, side by side: bigkit, Accelerate, diffusers.

    python benchmarks/offload.py [--save]              the CPU: disk offload, and what a hook costs
    python benchmarks/offload.py --gpu [--save]        a CUDA GPU: 13.5 GB in RAM and on disk, and larger models
    python benchmarks/offload.py --gpu --parts large   only one part of it: ceilings ways disk ablation large moe, or
                                                       those of benchmarks/links.py: one link against several

On the GPU the model is a Llama-7B shape in bfloat16 with random weights. Every way computes the same two forwards:
1 x 16 tokens, where the link is what takes time, and 8 x 512, where the GPU has work of the same order. Times are
medians, with the device synchronised; every output is compared bit for bit with the one of the model that lies on the
GPU whole. Accelerate is run as it comes, and helped: its weights pinned beforehand and its cache clearing taken out.

A rate is the bytes of all weights that rest elsewhere over the time of one forward. Ceilings come from the same run.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import links as beyond
import torch
from checkpoint import GB, drop, llama, pinned_rate, read_raw, warm
from torch import Tensor, nn

import bigkit
import bigkit.offload.stream
from bigkit.checkpoints import ring
from bigkit.offload import transfer
from bigkit.offload.weights import Unit

SHAPES = {"1x16": (1, 16), "8x512": (8, 512)}


# ---------------------------------------------------------------------------------------------------------------------
# Models


def random_state(model: nn.Module, device: str) -> dict[str, Tensor]:
    """Random weights for an empty model, drawn on `device`, in RAM."""
    generator = torch.Generator(device).manual_seed(0)
    state = {}
    for name, tensor in model.state_dict().items():
        drawn = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        drawn.normal_(1.0 if "norm" in name else 0.0, 0.02, generator=generator)
        state[name] = drawn.cpu()
    return state


def filled(empty: Callable[[], nn.Module], state: dict[str, Tensor]) -> nn.Module:
    """A model whose parameters are the tensors of `state`; nothing is copied."""
    model = empty()
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def tokens(shape: str, vocabulary: int, device: str) -> Tensor:
    """Random tokens, the same in every run."""
    return torch.randint(0, vocabulary, SHAPES[shape], generator=torch.Generator().manual_seed(1)).to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def timed(forward: Callable[[], Tensor], runs: int, device: str, warmups: int = 2) -> tuple[float, Tensor]:
    """Median seconds of a forward, and its output."""
    seconds = []
    for run in range(warmups + runs):
        begin = time.perf_counter()
        output = forward()
        if device == "cuda":
            torch.cuda.synchronize()
        if run >= warmups:
            seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), output


def once(model: nn.Module, x: Tensor) -> float:
    """Seconds of a single forward."""
    with torch.no_grad():
        return timed(lambda: model(x, use_cache=False).logits, 1, x.device.type, warmups=0)[0]


class Table:
    """Rows as they are measured, kept on disk after each one."""

    def __init__(self, machine: dict[str, Any], path: Path | None) -> None:
        self.machine, self.rows, self.path = machine, list[dict[str, Any]](), path
        self.expected: dict[str, Tensor] = {}

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self.write()

    def write(self) -> None:
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"machine": self.machine, "rows": self.rows}, indent=1) + "\n")

    def measure(
        self, way: str, model: nn.Module, moved: int, device: str, runs: int, warmups: int = 2, **more: Any
    ) -> None:
        """Run a model over the shapes and add its rows."""
        for shape in SHAPES:
            x = tokens(shape, 32000, device)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with torch.no_grad():
                seconds, output = timed(lambda: model(x, use_cache=False).logits, runs, device, warmups)  # noqa: B023
            row: dict[str, Any] = {"way": way, "shape": shape, "s": seconds}
            if moved:
                row["gb_s"] = moved / seconds / GB
            if device == "cuda":
                row["gpu_peak_gb"] = torch.cuda.max_memory_allocated() / GB
            if shape in self.expected:
                row["bit_equal"] = torch.equal(output.to("cpu"), self.expected[shape])
            else:
                self.expected[shape] = output.to("cpu")
            self.add(**row, **more)
            del output


@contextmanager
def changed(thing: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute with another value for a while."""
    old = getattr(thing, name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        setattr(thing, name, old)


def clean() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------------------
# The GPU


class InOrder(transfer.CudaLane):
    """A lane that copies on the stream of the work: what overlap is worth."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.stream = torch.cuda.current_stream(device)


class Apart(transfer.CudaLane):
    """A lane that copies weight by weight: what coalescing is worth."""

    def fill(self, slot: transfer.Slot, unit: Unit) -> None:
        self.stream.wait_event(slot.free)
        with torch.cuda.stream(self.stream):
            for part in unit.parts():
                if part.nbytes:
                    part.over(slot.base, part.offset).copy_(part.on_cpu(), non_blocking=True)
            slot.ready.record(self.stream)


def gpu(table: Table, parts: list[str], folder: Path, runs: int, layers: int) -> None:
    """All parts on a GPU."""
    if "ceilings" in parts:
        table.machine["pinned_gb_s"] = pinned_rate() / GB
        table.write()
    smaller = {"ways": gpu_ways, "ablation": gpu_ablation, "disk": gpu_disk}
    if smaller.keys() & set(parts):
        empty = lambda: llama(layers)  # noqa: E731
        state = random_state(empty(), "cuda")
        size = sum(tensor.nbytes for tensor in state.values())
        table.machine["bytes"] = size
        model = filled(empty, state).to("cuda")
        table.measure("resident", model, 0, "cuda", runs)
        del model
        clean()
        for name, part in smaller.items():
            if name in parts:
                part(table, empty, state, size, folder, runs)
                clean()
        del state
        table.expected = {}
    if "large" in parts:
        gpu_large(table)
    if "moe" in parts:
        gpu_moe(table, runs)


def gpu_ways(table: Table, empty: Any, state: dict[str, Tensor], size: int, folder: Path, runs: int) -> None:
    """Everything in RAM, and half of it."""
    begin = time.perf_counter()
    model = bigkit.cpu_offload(filled(empty, state), 0)
    torch.cuda.synchronize()
    prepared = time.perf_counter() - begin
    table.measure("bigkit, all in RAM", model, size, "cuda", runs, prepare_s=prepared)
    del model
    clean()
    model = bigkit.cpu_offload(filled(empty, state), 0, resident_memory=size // 2)
    table.measure("bigkit, half in RAM", model, streamed(model), "cuda", runs)
    del model
    clean()

    import accelerate

    model = accelerate.cpu_offload(filled(empty, state), execution_device=0)
    table.measure("accelerate, all in RAM", model, size, "cuda", max(2, runs // 2))
    del model
    clean()
    blocks = {f"model.layers.{i}": 0 if i % 2 else "cpu" for i in range(len(empty().model.layers))}
    others = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    model = accelerate.dispatch_model(filled(empty, state), {**others, **blocks}, main_device=0)
    table.measure("accelerate, half in RAM", model, size // 2, "cuda", max(2, runs // 2))
    del model
    clean()
    begin = time.perf_counter()
    pinned = {name: tensor.pin_memory() for name, tensor in state.items()}
    prepared = time.perf_counter() - begin
    with changed(accelerate.utils.modeling, "clear_device_cache", lambda *a, **k: None):
        model = accelerate.cpu_offload(filled(empty, pinned), execution_device=0, state_dict=pinned)
        table.measure("accelerate, helped", model, size, "cuda", runs, prepare_s=prepared)
        del model, pinned
    clean()
    try:
        diffusers_way(table, filled(empty, state), size, runs)
    except ImportError as error:
        print(f"diffusers was not measured: {error}", flush=True)


def streamed(model: nn.Module) -> int:
    """Bytes that travel in one forward."""
    found = {
        id(h.streamer): h.streamer
        for m in model.modules()
        if getattr(h := getattr(m, "_hf_hook", None), "streamer", None)
    }
    return sum(unit.nbytes for streamer in found.values() for unit in streamer.units)


def diffusers_way(table: Table, model: nn.Module, size: int, runs: int) -> None:
    """diffusers' group offloading by the block, with its stream; embedding and head stay on the GPU."""
    from diffusers.hooks import apply_group_offloading

    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    begin = time.perf_counter()
    model.lm_head.to(gpu)
    blocks = sum(p.nbytes for p in model.model.layers.parameters())
    apply_group_offloading(
        model.model, onload_device=gpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1,
        use_stream=True, record_stream=True,
    )  # fmt: skip
    table.measure("diffusers, group offload", model, blocks, "cuda", runs, prepare_s=time.perf_counter() - begin)


def gpu_ablation(table: Table, empty: Any, state: dict[str, Tensor], size: int, folder: Path, runs: int) -> None:
    """What each idea is worth: all but one."""
    for name, context, options in (
        ("without prefetch", None, {"prefetch": False}),
        ("without overlap", (bigkit.offload.stream, "CudaLane", InOrder), {}),
        ("without coalescing", (bigkit.offload.stream, "CudaLane", Apart), {}),
        ("without pinning", (ring, "_may_pin", lambda nbytes: False), {}),
        ("with three slots", None, {"slots": 3}),
    ):
        with changed(*context) if context else nullcontext():
            model = bigkit.cpu_offload(filled(empty, state), 0, **options)
            table.measure(f"bigkit, {name}", model, size, "cuda", runs)
            del model
        clean()


def gpu_disk(table: Table, empty: Any, state: dict[str, Tensor], size: int, folder: Path, runs: int) -> None:
    """On disk: warm, cold, with the RAM cache, and Accelerate."""
    files = folder / "llama"
    bigkit.save_model(filled(empty, state), files, "5GB")
    warm(files)

    def from_disk(**options: Any) -> tuple[nn.Module, float]:
        begin = time.perf_counter()
        model = bigkit.load_checkpoint_and_dispatch(empty().eval(), files, {"": "disk"}, main_device=0, **options)
        return model.requires_grad_(False), time.perf_counter() - begin

    model, prepared = from_disk(ram_cache=0)
    table.measure("bigkit, on disk, warm", model, size, "cuda", runs, prepare_s=prepared)
    x = tokens("1x16", 32000, "cuda")
    raw, cold = [], []
    for _ in range(2):  # in turn: the disk has its moods
        drop(files)
        raw.append(size / read_raw(files, 16) / GB)
        drop(files)
        cold.append(once(model, x))
    table.machine["raw_cold_gb_s"] = raw
    seconds = statistics.median(cold)
    table.add(way="bigkit, on disk, cold", shape="1x16", s=seconds, gb_s=size / seconds / GB, all_s=cold)
    del model
    clean()
    warm(files)
    model, prepared = from_disk()
    first = once(model, x)
    table.measure("bigkit, on disk, kept in RAM", model, size, "cuda", runs, prepare_s=prepared, first_s=first)
    del model
    clean()

    import accelerate

    begin = time.perf_counter()
    model = accelerate.disk_offload(filled(empty, state), str(folder / "accelerate"), execution_device=0)
    prepared = time.perf_counter() - begin
    table.measure("accelerate, on disk, warm", model, size, "cuda", 2, warmups=1, prepare_s=prepared)
    del model
    shutil.rmtree(folder / "accelerate")


def gpu_large(table: Table, cap: int = 10 * 10**9, count: int = 32) -> None:
    """A 32 GB model on a GPU with 10 GB: the tokens that it generates are those of the whole model."""
    import transformers

    config = transformers.LlamaConfig(hidden_size=5120, intermediate_size=13824, num_attention_heads=40,
                                      num_key_value_heads=40, num_hidden_layers=50, dtype="bfloat16")  # fmt: skip

    def empty() -> nn.Module:
        with bigkit.init_empty_weights():
            return transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)

    state = random_state(empty(), "cuda")
    size = sum(tensor.nbytes for tensor in state.values())
    prompt = tokens("1x16", 32000, "cuda")

    def generate(model: nn.Module) -> tuple[float, Tensor]:
        begin = time.perf_counter()
        made = model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        torch.cuda.synchronize()
        return time.perf_counter() - begin, made

    model = filled(empty, state).to("cuda")
    generate(model)
    seconds, expected = generate(model)
    table.add(way="resident, large", shape=f"{count} tokens", bytes=size, s=seconds)
    del model
    clean()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(cap / total)
    try:
        begin = time.perf_counter()
        model = bigkit.cpu_offload(filled(empty, state), 0, resident_memory="4GB")
        prepared = time.perf_counter() - begin
        torch.cuda.reset_peak_memory_stats()
        seconds, found = generate(model)
        table.add(
            way="bigkit, large", shape=f"{count} tokens", bytes=size, s=seconds, prepare_s=prepared,
            gb_s=streamed(model) * count / seconds / GB, gpu_peak_gb=torch.cuda.max_memory_reserved() / GB,
            cap_gb=cap / GB, bit_equal=torch.equal(found, expected),
        )  # fmt: skip
        del model
        clean()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def gpu_moe(table: Table, runs: int) -> None:
    """A mixture of experts with fused expert tensors."""
    import transformers

    config = transformers.MixtralConfig(hidden_size=2048, intermediate_size=4096, num_hidden_layers=8,
                                        num_local_experts=16, num_attention_heads=16, num_key_value_heads=8,
                                        dtype="bfloat16")  # fmt: skip

    def empty() -> nn.Module:
        with bigkit.init_empty_weights():
            return transformers.MixtralForCausalLM._from_config(config, dtype=torch.bfloat16)

    state = random_state(empty(), "cuda")
    size = sum(tensor.nbytes for tensor in state.values())
    model = filled(empty, state).to("cuda")
    table.measure("resident, 16 experts", model, 0, "cuda", runs)
    del model
    clean()
    table.measure("bigkit, 16 experts in RAM", bigkit.cpu_offload(filled(empty, state), 0), size, "cuda", runs)


# ---------------------------------------------------------------------------------------------------------------------
# The CPU


def cpu(table: Table, folder: Path, runs: int) -> None:
    """Disk offload of 0.7 GB, and what a hook costs."""
    import accelerate

    config_layers = 1
    empty = lambda: llama(config_layers)  # noqa: E731
    SHAPES.clear()
    SHAPES.update({"1x1": (1, 1), "1x4": (1, 4)})
    state = random_state(empty(), "cpu")
    size = sum(tensor.nbytes for tensor in state.values())
    table.machine["bytes"] = size
    files = folder / "llama"
    bigkit.save_model(filled(empty, state), files, "200MB")
    table.measure("resident", filled(empty, state), 0, "cpu", runs)
    load = lambda: bigkit.load_checkpoint_and_dispatch(empty().eval(), files, {"": "disk"}).requires_grad_(False)  # noqa: E731
    model = load()
    table.measure("bigkit, on disk, warm", model, size, "cpu", runs)
    raw = []
    cold = []
    x = tokens("1x1", 32000, "cpu")
    for _ in range(3):
        drop(files)
        raw.append(size / read_raw(files, 2) / GB)
        drop(files)
        cold.append(once(model, x))
    table.machine["raw_cold_gb_s"] = statistics.median(raw)
    seconds = statistics.median(cold)
    table.add(way="bigkit, on disk, cold", shape="1x1", s=seconds, gb_s=size / seconds / GB)
    del model
    model = accelerate.disk_offload(filled(empty, state), str(folder / "accelerate"), execution_device="cpu")
    table.measure("accelerate, on disk, warm", model, size, "cpu", max(3, runs // 2))
    del model
    torch.set_num_threads(1)
    hooks(table)


class Tiny(nn.Module):
    """400 layers with next to no work."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList([nn.Linear(8, 8) for _ in range(400)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.h:
            x = layer(x)
        return x


def hooks(table: Table) -> None:
    """Microseconds that a hook adds to a module's forward."""
    import accelerate

    model, x, count = Tiny().requires_grad_(False), torch.randn(1, 8), 400
    two = {f"h.{i}": i % 2 for i in range(count)}

    def cost(way: str, spread: nn.Module) -> float:
        with torch.no_grad():
            seconds, _ = timed(lambda: spread(x), 21, "cpu", warmups=5)
        return seconds / count * 1e6

    plain = cost("plain", model)
    with tempfile.TemporaryDirectory() as folder:
        new = lambda: copy.deepcopy(model)  # noqa: E731
        for way, make in (
            ("bigkit, resident", lambda: bigkit.dispatch_model(new(), two, stand_in={0: "cpu", 1: "cpu"})),
            ("bigkit, in RAM", lambda: bigkit.cpu_offload(new(), 0, stand_in={0: "cpu"})),
            ("bigkit, on disk", lambda: bigkit.disk_offload(new(), folder, "cpu")),
            ("accelerate, in RAM", lambda: accelerate.cpu_offload(new(), execution_device="cpu")),
            ("accelerate, on disk", lambda: accelerate.disk_offload(new(), folder, execution_device="cpu")),
        ):
            table.add(way=way, shape="hook", us=cost(way, make()) - plain)


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description="Running a model that rests elsewhere, side by side")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--parts", nargs="*", default=["ceilings", "ways", "ablation", "disk", "large", "moe"])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=12, help="of a 70B, for the part seventy")
    parser.add_argument("--cores", type=int, default=16, help="of the CPU, for the part cpu")
    parser.add_argument("--folder", type=Path, help="where files are made (a temporary folder)")
    parser.add_argument("--save", nargs="?", const=True, help="write benchmarks/results/offload-*.json, or this file")
    options = parser.parse_args()
    name = f"offload-{'gpu' if options.gpu else 'cpu'}.json"
    path = (
        Path(__file__).parent / "results" / name
        if options.save is True
        else Path(options.save)
        if options.save
        else None
    )
    import accelerate

    machine = {
        "gpu": torch.cuda.get_device_name() if options.gpu else None, "cores": os.cpu_count(),
        "processor": processor(), "python": platform.python_version(), "torch": torch.__version__,
        "accelerate": accelerate.__version__, "date": time.strftime("%Y-%m-%d"), "runs": options.runs,
    }  # fmt: skip
    table = Table(machine, path)
    root = options.folder or Path(tempfile.mkdtemp(prefix="offload-benchmark-"))
    try:
        if {*options.parts} & {*beyond.PARTS}:
            beyond.measure(table, options.parts, options.layers, options.cores, options.blocks)
        elif options.gpu:
            gpu(table, options.parts, root, options.runs, options.layers)
        else:
            cpu(table, root, options.runs)
    finally:
        if not options.folder:
            shutil.rmtree(root, ignore_errors=True)
    print(json.dumps(machine))
    show(table.rows)


def processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows as Markdown."""
    print("| way | shape | time | GB/s | bit-equal |\n|---|---|---|---|---|")
    for row in rows:
        took = f"{row['us']:.1f} us" if "us" in row else f"{row['s']:.4f} s"
        rate = f"{row['gb_s']:.1f}" if "gb_s" in row else ""
        print(f"| {row['way']} | {row['shape']} | {took} | {rate} | {row.get('bit_equal', '')} |")


if __name__ == "__main__":
    main()
