"""How long planning takes, against Accelerate's planner on the same model in the same run.

    python benchmarks/planner.py [--save]

Accelerate plans from an nn.Module on meta: `get_balanced_memory`, then `infer_auto_device_map`, as its "auto" does.
bigkit plans twice: from the layer records it already has, and from the nn.Module; and the call of that name is timed in
both. Medians of CPU time, which other processes disturb less; the ratio is Accelerate's time over bigkit's. Without a
GPU Accelerate cannot look up device numbers; for its calls alone, `torch.device` is told that they exist.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import nn

import bigkit
from bigkit import zoo
from bigkit.maps.strategies import STRATEGIES, place

GIB = 2**30


def median_ms(call: Callable[[], Any], runs: int) -> float:
    """Median CPU time of a call in milliseconds, after one that is not counted."""
    call()
    times = []
    for _ in range(runs):
        start = time.process_time()
        call()
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times)


def deep(layers: int, width: int = 1024) -> nn.Module:
    """A model of `layers` blocks between an embedding and a head, on meta."""

    class Block(nn.ModuleDict):
        def __init__(self) -> None:
            attention = nn.ModuleList([nn.Linear(width, width) for _ in range(4)])
            mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
            super().__init__({"attention": attention, "mlp": mlp, "norms": norms})

    with torch.device("meta"):
        blocks = nn.ModuleList([Block() for _ in range(layers)])
        return nn.ModuleDict({"embed": nn.Embedding(50000, width), "h": blocks, "head": nn.Linear(width, 50000)})


def cases() -> list[tuple[str, nn.Module, list[str], dict[Any, int]]]:
    """(name, model, classes that stay whole, budgets)."""
    eight = {**dict.fromkeys(range(8), 80 * GIB), "cpu": 900 * GIB}
    shipped = [
        ("llama-2-7b", {0: 10 * GIB, 1: 10 * GIB, "cpu": 64 * GIB}),
        ("bloom", eight),
        ("llama-3.1-405b", eight),
        ("deepseek-v3", eight),
    ]
    models: list[tuple[str, nn.Module, list[str], dict[Any, int]]] = []
    for name, budgets in shipped:
        model = zoo.empty_model(name)
        models.append((name, model, list(zoo.describe(name).no_split), budgets))
    models.append(("1000 blocks", deep(1000), ["Block"], dict.fromkeys(range(8), 10 * GIB)))
    return models


@contextmanager
def device_numbers():
    """Let `torch.device(0)` mean cuda:0 where there is no GPU."""
    if torch.cuda.is_available():
        yield
        return
    real = torch.device

    class Numbered:
        def __new__(cls, device, *rest):
            return real("cuda", device) if isinstance(device, int) else real(device, *rest)

    torch.device = Numbered  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.device = real  # type: ignore[misc]


def theirs(model: nn.Module, no_split: list[str], budgets: dict[Any, int]) -> dict[str, Any]:
    """Accelerate's "auto" in float16."""
    with device_numbers():
        balanced = accelerate.utils.get_balanced_memory(model, dict(budgets), no_split, dtype=torch.float16)
        return accelerate.infer_auto_device_map(model, balanced, no_split, dtype=torch.float16)


def infer(library: Any, model: nn.Module, no_split: list[str], budgets: dict[Any, int]) -> dict[str, Any]:
    """The call of the same name of either library, in float16."""
    with device_numbers():
        return library.infer_auto_device_map(model, dict(budgets), no_split, dtype=torch.float16)


def gpu_loads(model: nn.Module, device_map: dict[str, Any]) -> list[float]:
    """GiB of weights on each GPU under a map, float16."""
    sizes = bigkit.compute_module_sizes(model, dtype="float16")
    used: dict[Any, float] = {}
    for name, device in device_map.items():
        used[device] = used.get(device, 0) + sizes.get(name, 0) / GIB
    return [size for device, size in used.items() if isinstance(device, int)]


def measure(name: str, model: nn.Module, no_split: list[str], budgets: dict[Any, int], runs: int) -> dict[str, Any]:
    """One row: medians in milliseconds, ratios, and how many GiB of weights either planner keeps on GPUs."""
    spec = bigkit.describe(model)
    options: dict[str, Any] = {"dtype": "float16", "no_split": no_split}
    gpus = [device for device in budgets if isinstance(device, int)]
    row: dict[str, Any] = {
        "model": name,
        "layers": len(spec.layers(no_split)),
        "gpus": len(gpus),
        "accelerate_ms": median_ms(lambda: theirs(model, no_split, budgets), runs),
        "from_module_ms": median_ms(lambda: place(bigkit.describe(model), budgets, **options), runs),
        "accelerate_infer_ms": median_ms(lambda: infer(accelerate, model, no_split, budgets), runs),
        "infer_ms": median_ms(lambda: infer(bigkit, model, no_split, budgets), runs),
    }
    for strategy in STRATEGIES[1:]:
        row[f"{strategy}_ms"] = median_ms(partial(place, spec, budgets, strategy, **options), runs)
    row["ratio"] = row["accelerate_ms"] / row["balanced_ms"]
    row["ratio_infer"] = row["accelerate_infer_ms"] / row["infer_ms"]
    row["ratio_from_module"] = row["accelerate_ms"] / row["from_module_ms"]
    plan, loads = place(spec, budgets, **options), gpu_loads(model, theirs(model, no_split, budgets))
    weights = {share.device: share.weights / GIB for share in plan.shares}
    row["on_gpus_gib"] = sum(weights[gpu] for gpu in gpus)
    row["fullest_gib"] = max(weights[gpu] for gpu in gpus)
    row["accelerate_on_gpus_gib"], row["accelerate_fullest_gib"] = sum(loads), max(loads)
    return row


def main() -> None:
    """Run every case and print a Markdown table; with --save keep it as JSON."""
    parser = argparse.ArgumentParser(description="Planning time against Accelerate")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/planner.json")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = [measure(*case, options.runs) for case in cases()]
    print("| model | layers | GPUs | Accelerate | bigkit from the nn.Module | bigkit from records | exact | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['model']} | {row['layers']} | {row['gpus']} | {row['accelerate_ms']:.1f} ms"
            f" | {row['from_module_ms']:.1f} ms | {row['balanced_ms']:.2f} ms | {row['exact_ms']:.2f} ms"
            f" | {row['ratio']:.0f}x |"
        )
    print()
    print("| float16 weights | on GPUs | Accelerate | on the fullest GPU | Accelerate |")
    print("|---|---|---|---|---|")
    for row in rows:
        keys = ("on_gpus_gib", "accelerate_on_gpus_gib", "fullest_gib", "accelerate_fullest_gib")
        print(f"| {row['model']} | " + " | ".join(f"{row[key]:.2f} GiB" for key in keys) + " |")
    if options.save:
        machine = {
            "processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(),
            "torch": torch.__version__, "accelerate": accelerate.__version__, "bigkit": bigkit.__version__,
            "runs": options.runs, "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        path = Path(__file__).parent / "results" / "planner.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
