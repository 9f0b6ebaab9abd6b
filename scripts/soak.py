"""Spread small random models over and over, in random ways, and watch for a wrong output or a leak.

Each round makes a model (depth, width, ties, buffers), spreads it, and plays random steps on it and on a whole copy:
forwards in every grad mode, blocks that are skipped, repeated or call others, exceptions at random points, edits,
saving, and dispatching again with another map. Outputs must be equal bit for bit, every weight must be away after each
step, and memory, threads and open files must not grow. One line a minute; the first fault ends the run with the seed
that brings it back.

A leak grows all the time. What is only started late grows once: CUDA makes pools of threads, and opens files, when they
are first needed. So the run is cut into five windows, and something leaks if its median grows from each to the next,
the first left out.

    python scripts/soak.py --minutes 30 [--seed 0]

Leaves out: real GPUs, unless there are some (`--gpu`: GPU 0 is itself, not the CPU in its place).
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import nn
from torch.nn import functional as F

from bigkit import init_empty_weights
from bigkit.checkpoints.load import load_checkpoint_in_model
from bigkit.checkpoints.save import save_model
from bigkit.offload.dispatch import dispatch_model
from bigkit.offload.grouping import handles
from bigkit.offload.handle import Away
from bigkit.offload.hooks import remove_hook_from_module
from bigkit.offload.load_and_dispatch import load_checkpoint_and_dispatch

SAMPLED = 2  # seconds between two samples of what the process holds


class Stop(Exception):
    pass


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor, inner: nn.Module | None = None, edit: bool = False, stop: bool = False):
        x = torch.tanh(self.a(x))
        with torch.no_grad():
            self.calls += 1
            if edit:
                self.b.weight.mul_(0.5)
                self.a.bias.data.add_(0.25)
        if inner is not None:
            x = inner(x, edit=edit)
        if stop:
            raise Stop
        return self.b(x) + self.calls


class Model(nn.Module):
    def __init__(self, depth: int, width: int, tied: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))
        self.h = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, width, bias=False)
        if tied:
            self.head.weight = self.h[-1].a.weight

    def forward(self, x: torch.Tensor, steps: list[tuple[str, int]]) -> torch.Tensor:
        for kind, i in steps:
            block, other = self.h[i % len(self.h)], self.h[(i + 1) % len(self.h)]
            if kind == "foreign":
                x = F.linear(x, block.a.weight) + other.b.bias
            elif kind == "nested":
                x = block(x, inner=other if other is not block else None)
            else:
                x = block(x, edit=kind == "edit", stop=kind == "stop")
        return self.head(x) * self.scale


def places(rng: random.Random, depth: int, main: int | str) -> dict[str, int | str]:
    choice = ["cpu", "disk"] if main == "cpu" else ["cpu", "disk", 0]
    if rng.random() < 0.3:
        return {"": rng.choice(["cpu", "disk"])}
    names = ["scale", "head", *(f"h.{i}" for i in range(depth))]
    return {name: rng.choice(choice) for name in names}


def edit(rng: random.Random, whole: nn.Module, parts: nn.Module, device: torch.device) -> None:
    i, seed, kind = rng.randrange(len(whole.h)), rng.randrange(10**6), rng.randrange(6)
    for model in (whole, parts):
        weight = model.h[i].a.weight
        generator = torch.Generator().manual_seed(seed)
        fresh = torch.randn(weight.shape, generator=generator).to(device)
        if kind == 0:
            weight.data.mul_(0.5)
        elif kind == 1:
            weight.data[0] = fresh[0]
        elif kind == 2:
            model.h[i].b.weight = nn.Parameter(fresh)
        elif kind == 3:
            model.h[i].b.bias.data = fresh[0]
        elif kind == 4:
            model.load_state_dict({name: value.clone() * 0.9 for name, value in model.state_dict().items()})
        elif kind == 5:
            nn.init.constant_(model.scale.detach(), fresh[0, 0].item())


def check(whole: nn.Module, parts: nn.Module) -> None:
    for streamer in {id(handle.streamer): handle.streamer for handle in handles(parts)}.values():
        assert not streamer._loans and not streamer.held(), "something is still lent"
        for site in streamer.sites:
            assert all(isinstance(entry.tensors[entry.own], Away) for entry in site.entries), "a weight is not away"
    state = parts.state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(state[name].cpu(), value.cpu()), f"{name} differs"


def one_round(rng: random.Random, folder: Path, gpu: bool) -> int:
    depth, width = rng.randint(1, 6), rng.choice([4, 8, 33])
    torch.manual_seed(rng.randrange(10**6))
    whole = Model(depth, width, rng.random() < 0.4)
    main: int | str = rng.choice([0, "cpu"])
    device = torch.device("cuda", 0) if gpu and main == 0 else torch.device("cpu")
    options = {
        "main_device": main, "offload_dir": folder / "rest", "force_hooks": True, "offload_buffers": rng.random() < 0.5,
        "slots": rng.randint(1, 4), "prefetch": rng.random() < 0.8, "ram_cache": rng.choice([0, 3000, 10**7]),
    }  # fmt: skip
    if main == 0 and not gpu:
        options["stand_in"] = {0: "cpu"}
    if rng.random() < 0.5:
        save_model(whole, folder / "model", rng.choice(["1KB", "1GB"]))
        with init_empty_weights():
            parts = Model(depth, width, whole.head.weight is whole.h[-1].a.weight)
        options["offload_folder"] = options.pop("offload_dir")
        load_checkpoint_and_dispatch(parts, folder / "model", places(rng, depth, main), **options)
        options["offload_dir"] = options.pop("offload_folder")
    else:
        parts = dispatch_model(copy.deepcopy(whole), places(rng, depth, main), **options)
    whole = whole.to(device)
    forwards = 0
    for _ in range(rng.randint(1, 8)):
        action = rng.random()
        if action < 0.6:
            kinds = ["call", "call", "nested", "foreign", "edit"] + ["stop"] * (rng.random() < 0.3)
            steps = [(rng.choice(kinds), rng.randrange(8)) for _ in range(rng.randrange(8))]
            x = torch.randn(2, width, device=device)
            mode = rng.choice([torch.no_grad, torch.inference_mode, torch.enable_grad])
            results = []
            for model in (whole, parts):
                try:
                    with mode():
                        results.append(model(x, steps))
                except Stop:
                    results.append(torch.zeros(()))
            assert torch.equal(*results), "the output differs"
            forwards += 1
        elif action < 0.7:
            edit(rng, whole, parts, device)
            parts(torch.zeros(1, width, device=device), [("call", i) for i in range(depth)])  # what is new settles
            whole(torch.zeros(1, width, device=device), [("call", i) for i in range(depth)])
        elif action < 0.85:
            dispatch_model(parts, places(rng, depth, main), **options)
        elif action < 0.9:
            parts = copy.deepcopy(remove_hook_from_module(parts, recurse=True))
            dispatch_model(parts, places(rng, depth, main), **options)
        elif action < 0.95:
            save_model(parts, folder / "again", rng.choice(["1KB", "1GB"]))
            loaded = copy.deepcopy(whole)
            assert load_checkpoint_in_model(loaded, folder / "again", strict=True).clean
            assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), whole.state_dict().values()))
        else:
            remove_hook_from_module(parts, recurse=True)
            dispatch_model(parts, places(rng, depth, main), **options)
        check(whole, parts)
    if rng.random() < 0.2:
        x, expected = torch.randn(2, width, device=device), []
        whole_input = [("foreign", i) for i in range(depth)]
        with torch.no_grad():
            results: list[torch.Tensor] = []
            threads = [threading.Thread(target=lambda: results.append(parts(x, whole_input))) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            expected = whole(x, whole_input)
        assert len(results) == 3 and all(torch.equal(result, expected) for result in results), "threads differ"
    return forwards


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
    options = parser.parse_args()
    begin = reported = sampled = time.monotonic()
    seed, forwards, samples = options.seed, 0, [usage()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        while (now := time.monotonic()) - begin < 60 * options.minutes:
            try:
                forwards += one_round(random.Random(seed), folder, options.gpu)
                gc.collect()
                left = [*folder.glob("rest/*")]
                assert not left, f"{len(left)} files were left behind"
            except Exception:
                print(f"FAILED with --seed {seed}", flush=True)
                raise
            seed += 1
            if now - sampled > SAMPLED:
                sampled = now
                samples.append(usage())
            if now - reported > 60:
                reported = now
                report(samples[-1], (now - begin) / 60, seed - options.seed, forwards)
    report(usage(), (time.monotonic() - begin) / 60, seed - options.seed, forwards)
    if faults := grown(samples):
        print("FAILED: medians of windows grow: " + "; ".join(faults))
        return 1
    print(f"ok: {seed - options.seed} models, {forwards} forwards, no fault; {len(samples)} samples of what is held")
    return 0


def report(held: Usage, minutes: float, models: int, forwards: int) -> None:
    print(
        f"{minutes:5.1f} min: {models} models, {forwards} forwards, RSS {held.memory:.0f} MB, GPU {held.gpu:.0f} MB, "
        f"{held.threads} threads ({held.python_threads} of Python), {held.files} open files",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
