"""Record what real runs ask of PyTorch's CUDA allocator, for the tests that replay it (needs a CUDA device).

    python scripts/record_allocations.py [folder]       default: tests/data/allocations

Random workloads (three mixes of sizes; one on two streams; one that empties its cache; one with so little memory that
the allocator must give segments back, and sometimes fails) and real models (prompt and decoding). One gzipped file
each.
"""

from __future__ import annotations

import math
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bigkit.dryrun.workload import Workload, fill, passes
from bigkit.measure.allocations import record_allocations
from bigkit.units import GiB, KiB, MiB
from bigkit.zoo import build, catalog

ROOT = Path(__file__).resolve().parent.parent


def random_work(seed: int, largest: int, steps: int = 3000, live: int = 60, streams: int = 1, empty: float = 0) -> None:
    """Requests of 1 B to `largest`, log-uniform, freed in random order; about `live` at a time."""
    chance = random.Random(seed)
    side = [torch.cuda.default_stream(), *(torch.cuda.Stream() for _ in range(streams - 1))]
    held: list[torch.Tensor] = []
    for _ in range(steps):
        if chance.random() < empty:
            torch.cuda.empty_cache()
        elif chance.random() < len(held) / (2 * live):
            held.pop(chance.randrange(len(held)))
        else:
            size = int(math.exp(chance.uniform(0, math.log(largest))))
            with torch.cuda.stream(chance.choice(side)):
                try:
                    held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
                except torch.cuda.OutOfMemoryError:
                    held.pop(chance.randrange(len(held)))


def model_work(name: str, load: Workload, layers: int) -> Callable[[Callable[[str], None]], None]:
    """A shipped model with `layers` blocks in bfloat16 on the GPU."""

    def run(mark: Callable[[str], None]) -> None:
        entry = catalog.find(name)
        assert entry is not None
        config = dict(catalog.config(entry))
        for field in ("num_hidden_layers", "num_layers", "n_layer"):
            if field in config:
                config[field] = layers
        model = build.build(config, dtype="bfloat16").eval()
        fill(model, {"": 0})
        mark("filled")
        for phase, _ in passes(model, load, "cuda"):
            mark(phase)

    return run


def workloads() -> Iterator[tuple[str, int | None, Callable[[Callable[[str], None]], object]]]:
    """(name, capacity, what to run)."""
    yield "random-small", None, lambda mark: random_work(0, 2 * MiB, live=200)
    yield "random-mixed", None, lambda mark: random_work(1, 200 * MiB)
    yield "random-large", None, lambda mark: random_work(2, 1 * GiB, steps=1500, live=15)
    yield "two-streams", None, lambda mark: random_work(3, 64 * MiB, streams=2)
    yield "emptied", None, lambda mark: random_work(4, 64 * MiB, empty=0.01)
    yield "little-memory", 2 * GiB, lambda mark: random_work(5, 400 * MiB, live=30)
    yield "kilobytes", None, lambda mark: random_work(6, 64 * KiB, steps=6000, live=2000)
    yield "bloom", None, model_work("bloom", Workload(2, 512, 3, all_logits=True), 2)
    yield "llama-2-7b", None, model_work("llama-2-7b", Workload(1, 512, 4), 6)
    yield "gpt2-xl", None, model_work("gpt2-xl", Workload(4, 256, 4), 12)
    yield "t5-large", None, model_work("t5-large", Workload(4, 128, 4), 8)
    yield "resnet50", None, model_work("resnet50.a1_in1k", Workload(8), 0)


def main(folder: Path) -> None:
    """Record every workload; one that fails is reported and left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, capacity, work in workloads():
        try:
            with record_allocations(capacity=capacity) as mark:
                work(mark)
            recording = mark.recording  # type: ignore[attr-defined]
            recording.about["work"] = name
            path = folder / f"{name}.json.gz"
            recording.save(path)
            peaks = {key: f"{value / MiB:,.1f} MiB" for key, value in recording.peaks.items()}
            print(f"{name:16} {len(recording.events):6} events, {len(recording.segments):4} segments, {peaks}, "
                  f"{path.stat().st_size / KiB:.0f} KiB", flush=True)  # fmt: skip
        except Exception:
            print(f"{name:16} FAILED", flush=True)
            traceback.print_exc()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tests" / "data" / "allocations")
