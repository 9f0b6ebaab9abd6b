"""Spread small random models over and over, in random ways, and watch for a wrong output or a leak.

Each round is a case of `tests/fuzz`, played on the spread model and on a plain one at once: modules of all sorts
(`cases.py`) and mixtures of experts (`mixtures.py`) in turn. Memory, threads and open
files must not grow. One line a minute; the first fault ends the run with the seed that brings it back.

A leak grows all the time. What is only started late grows once: CUDA makes pools of threads, and opens files, when they
are first needed. So the run is cut into five windows, and something leaks if its median grows from each to the next,
the first left out.

    python scripts/soak.py --minutes 30 [--seed 0]

Leaves out: real GPUs, unless there are some (`--gpu`: GPU 0 is itself, not the CPU in its place).
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import psutil

# Products of oneDNN are kept by their shapes, up to 1,024 of them: with shapes that are drawn that looks like a leak.
os.environ.setdefault("LRU_CACHE_CAPACITY", "1")  # both are read when torch is imported
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1")

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.fuzz import cases, mixtures

KINDS = {"modules": cases.check, "mixtures": mixtures.check}
AGAIN = 300  # mixtures, of which the first comes again then: PyTorch keeps something for each shape that it meets
SAMPLED = 2  # seconds between two samples of what the process holds


class Usage(NamedTuple):
    """What the process holds.

    Args:
        memory: resident memory, MB.
        gpu: memory that tensors hold on GPU 0, MB.
        python_threads: threads that Python has started.
        threads: all threads, those of CUDA's own pools among them.
        files: open files.
    """

    memory: float
    gpu: float
    python_threads: float
    threads: float
    files: float


MARGIN = Usage(memory=15, gpu=0.5, python_threads=0.5, threads=0.5, files=0.5)  # growth that is none
WINDOWS = 5


def usage() -> Usage:
    gc.collect()
    process, on_gpu = psutil.Process(), torch.cuda.is_initialized()
    return Usage(
        memory=process.memory_info().rss / 1e6,
        gpu=torch.cuda.memory_allocated() / 1e6 if on_gpu else 0,
        python_threads=threading.active_count(),
        threads=process.num_threads(),
        files=len(os.listdir("/proc/self/fd")),
    )


def grown(samples: list[Usage]) -> list[str]:
    """What leaks: its median in each window of the samples, the first left out, exceeds that of the window before.

    >>> held = Usage(500, 0, 3, 20, 30)
    >>> grown([held] * 12 + [held._replace(threads=90)] * 8)  # a pool of threads was started
    []
    >>> grown([held._replace(threads=20 + i) for i in range(20)])
    ['threads: 25.5, 29.5, 33.5, 37.5']
    """
    size = len(samples) // WINDOWS
    windows = [samples[i * size : (i + 1) * size] for i in range(1, WINDOWS)] if size else []
    faults = []
    for name, margin in MARGIN._asdict().items():
        medians = [statistics.median(getattr(sample, name) for sample in window) for window in windows]
        if medians and all(later > earlier + margin for earlier, later in zip(medians, medians[1:])):
            faults.append(f"{name}: {', '.join(f'{value:.1f}' for value in medians)}")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    options = parser.parse_args()
    begin = reported = sampled = time.monotonic()
    seed, samples = options.seed, [usage()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        while (now := time.monotonic()) - begin < 60 * options.minutes:
            kind = options.kinds[seed % len(options.kinds)]
            number = seed if kind != "mixtures" else options.seed + (seed - options.seed) % AGAIN
            KINDS[kind](number, folder / str(seed), options.gpu)
            seed += 1
            if now - sampled > SAMPLED:
                sampled = now
                samples.append(usage())
            if now - reported > 60:
                reported = now
                report(samples[-1], (now - begin) / 60, seed - options.seed)
    report(usage(), (time.monotonic() - begin) / 60, seed - options.seed)
    if faults := grown(samples):
        print("FAILED: medians of windows grow: " + "; ".join(faults))
        return 1
    print(f"ok: {seed - options.seed} models, no fault; {len(samples)} samples of what is held")
    return 0


def report(held: Usage, minutes: float, models: int) -> None:
    print(
        f"{minutes:5.1f} min: {models} models, RSS {held.memory:.0f} MB, GPU {held.gpu:.0f} MB, "
        f"{held.threads} threads ({held.python_threads} of Python), {held.files} open files",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
