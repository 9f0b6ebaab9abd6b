"""Spread small random models over and over, in random ways, and watch for a wrong output or a leak.

Each round makes a model (depth, width, ties, buffers), spreads it, and plays random steps on it and on a whole copy:
forwards in every grad mode, blocks that are skipped, repeated or call others, exceptions at random points, edits,
copies, saving, and dispatching again with another map. Outputs must be equal bit for bit, every weight must be away
after each step, and memory, threads and open files must not grow. One line a minute; the first fault ends the run with
the seed that brings it back.

    python scripts/soak.py --minutes 30 [--seed 0]

Leaves out: real GPUs, unless there are some (`--gpu`: GPU 0 is itself, not the CPU in its place).
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
from torch import nn
from torch.nn import functional as F

from bigkit import init_empty_weights
from bigkit.checkpoints.load import load_checkpoint_in_model
from bigkit.checkpoints.save import save_model
from bigkit.offload.dispatch import dispatch_model, load_checkpoint_and_dispatch
from bigkit.offload.grouping import handles
from bigkit.offload.handle import Away
from bigkit.offload.hooks import remove_hook_from_module

SETTLED = 30  # rounds after which nothing may grow any more


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
        assert not any(streamer.lent) and not streamer._loans, "something is still lent"
        streamer._ready()
        for entries in streamer._entries:
            assert all(isinstance(entry.tensors[entry.own], Away) for entry in entries), "a weight is not away"
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


def usage() -> tuple[float, int, int]:
    gc.collect()
    process = psutil.Process()
    return process.memory_info().rss / 1e6, process.num_threads(), len(os.listdir("/proc/self/fd"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gpu", action="store_true")
    asked = parser.parse_args()
    start = said = time.monotonic()
    seed, forwards, first = asked.seed, 0, None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        while time.monotonic() - start < 60 * asked.minutes or first is None:
            try:
                forwards += one_round(random.Random(seed), folder, asked.gpu)
                gc.collect()
                left = [*folder.glob("rest/*")]
                assert not left, f"{len(left)} files were left behind"
            except Exception:
                print(f"FAILED with --seed {seed}", flush=True)
                raise
            seed += 1
            if first is None and seed - asked.seed >= SETTLED:
                first = usage()
            if first is not None and (time.monotonic() - said > 60 or time.monotonic() - start >= 60 * asked.minutes):
                said = time.monotonic()
                memory, threads, files = usage()
                minutes, models = (said - start) / 60, seed - asked.seed
                print(
                    f"{minutes:5.1f} min: {models} models, {forwards} forwards, RSS {memory:.0f} MB (at first "
                    f"{first[0]:.0f}), {threads} threads ({first[1]}), {files} open files ({first[2]})",
                    flush=True,
                )
                assert memory < first[0] + 60, "memory grows"
                assert threads <= first[1] + 1 and files <= first[2] + 2, "threads or open files grow"
    print(f"ok: {seed - asked.seed} models, {forwards} forwards, no fault")
    return 0


if __name__ == "__main__":
    sys.exit(main())
