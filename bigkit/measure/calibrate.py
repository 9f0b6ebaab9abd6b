"""Measuring this machine in under a minute: `calibrate()`.

Each figure is the best of a few repetitions after a warm-up: predictions start from what the machine can do. With a
GPU: the link, its memory, matrix products, fused attention, the smallest kernel, the CUDA context. Without one the CPU
stands in for it. Always: RAM, a file read cold and warm, and what a step of the host takes, over four tiny models of
Transformers that are built differently, their steps counted by dry runs of them.

Leaves out: several GPUs (the first one is measured) and the links between them.
"""

from __future__ import annotations

import itertools
import os
import platform
import queue
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..dryrun.fake_gpu import Target
from ..dryrun.run import rehearse
from ..dryrun.workload import Workload, fill, passes
from ..machine.ledger import Calibration, Ledger, machine_key
from ..machine.roofline import ODD
from ..offload.transfer import CHUNK, count_readers, readers
from ..units import MiB

BLOCK = 256 * MiB


def calibrate(folder: str | os.PathLike[str] | None = None, save: bool = True, quick: bool = False) -> Calibration:
    """Measure this machine.

    Args:
        folder: where the test file is written; the disk of your checkpoints. None takes the system's temporary folder.
        save: keep the result in the ledger, where predictions find it.
        quick: a tenth of the bytes: good enough to see the order of magnitude, and for tests.

    Returns:
        What was measured.

    >>> found = calibrate(save=False, quick=True)
    >>> found.disk_warm > 0 and found.issue > 0
    True
    """
    cuda = torch.cuda.is_available()
    block = BLOCK // 16 if quick else BLOCK
    device = "cuda" if cuda else "cpu"
    context = _context() if cuda else None
    rounds = [_round(device)]  # of Python's pace, which changes: at the start, in the middle, at the end
    cold, warm, readers = _disk(Path(folder) if folder is not None else Path(tempfile.gettempdir()), block)
    rounds.append(_round(device))
    found = Calibration(
        machine=machine_name(),
        gpu=torch.cuda.get_device_name(0) if cuda else None,
        link_pinned=_link(block, pinned=True) if cuda else None,
        link_pageable=_link(block, pinned=False) if cuda else None,
        disk_cold=cold,
        disk_warm=warm,
        disk_readers=readers,
        memory=_copy(device, block),
        host_memory=_copy("cpu", block),
        products=_products(cuda, quick),
        attention=_attention(quick) if cuda else (),
        masked=_attention(quick, masked=True) if cuda else (),
        grouped=_grouped(quick) if cuda else (),
        gather=_gather(device, block),
        scattered=_scattered(device, quick),
        joined=_joined(device, quick),
        plan=_plan() if cuda else None,
        kernel=_kernel() if cuda else None,
        context=context,
        workspace=_workspace() if cuda else None,
        capability=torch.cuda.get_device_capability(0) if cuda else None,
        versions=_versions(),
    )
    found = replace(found, issue=_issue([*rounds, _round(device)]))
    if save:
        Ledger.load().add(found)
    return found


def best(work: Callable[[], Any], device: str = "cpu", repeats: int = 5, inner: int = 1) -> float:
    """Seconds that `work` takes: the best of `repeats`, each of `inner` calls, after a warm-up.

    >>> best(lambda: sum(range(1000))) < 1
    True
    """
    work()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(inner):
            work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / inner)
    return min(times)


# ---------------------------------------------------------------------------------------------------------------------
# One figure each


def machine_name() -> str:
    """What this machine's calibration goes by in the ledger."""
    return machine_key(torch.cuda.get_device_name(0) if torch.cuda.is_available() else None)


def _versions() -> dict[str, str]:
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}


def _context() -> int | None:
    """Bytes that the first use of the GPU takes; None if it was used before, when they cannot be told from others."""
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved():
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def _link(size: int, pinned: bool) -> float:
    host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned).fill_(1)
    there = torch.empty(size, dtype=torch.uint8, device="cuda")
    return size / best(lambda: there.copy_(host, non_blocking=pinned), "cuda")


def _copy(device: str, size: int) -> float:
    size = 4 * size if device == "cuda" else size
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / best(lambda: target.copy_(source), device)


def _gather(device: str, size: int) -> float:
    source = torch.ones(size // 8192, 4096, device=device, dtype=torch.bfloat16)
    rows = torch.randperm(len(source), device=device)
    return 2 * source.nbytes / best(lambda: source[rows], device)


def _heads(device: str, quick: bool) -> torch.Tensor:
    """Rows cut into heads, and seen by the head, as attention sees them: (sequences, heads, tokens, 128)."""
    return torch.ones(1 if quick else 8, 512, 32, 128, device=device, dtype=torch.bfloat16).transpose(1, 2)


def _scattered(device: str, quick: bool) -> float:
    heads = _heads(device, quick)
    turn = torch.ones(512, 128, device=device, dtype=torch.bfloat16)
    return heads.numel() / _alone(lambda: heads * turn, device == "cuda")


def _joined(device: str, quick: bool) -> float:
    heads = _heads(device, quick)
    return heads.numel() / _alone(lambda: torch.cat((heads[..., 64:], heads[..., :64]), -1), device == "cuda")


def _disk(folder: Path, size: int) -> tuple[float | None, float | None, float | None]:
    """Bytes a second from a file that is read cold, warm, and warm by many threads, in large pieces.

    None for the first where pages cannot be dropped.
    """
    handle, name = tempfile.mkstemp(dir=folder, prefix="bigkit-calibrate")
    buffer = bytearray(16 * MiB)

    def read() -> float:
        start = time.perf_counter()
        os.lseek(handle, 0, os.SEEK_SET)
        while os.readv(handle, [buffer]):
            pass
        return size / (time.perf_counter() - start)

    try:
        piece = os.urandom(len(buffer))
        for _ in range(size // len(piece)):
            os.write(handle, piece)
        os.fsync(handle)
        cold = None
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            cold = read()
        read()
        return cold, max(read() for _ in range(3)), size / best(lambda: _read_shared(name, size))
    finally:
        os.close(handle)
        os.unlink(name)


def _read_shared(name: str, size: int) -> None:
    """Read a file as offloading does: all of its reader threads, a chunk each at a time, into chunks that are kept."""

    def take(jobs: Iterator[int]) -> None:
        buffer = _chunks.get()
        with open(name, "rb", buffering=0) as file:
            for at in jobs:
                file.seek(at)
                file.readinto(buffer)
        _chunks.put(buffer)

    while _chunks.qsize() < count_readers():
        _chunks.put(bytearray(CHUNK))
    jobs = iter(range(0, size, CHUNK))
    for done in [readers().submit(take, jobs) for _ in range(count_readers())]:
        done.result()


_chunks: queue.SimpleQueue[bytearray] = queue.SimpleQueue()


def _products(cuda: bool, quick: bool) -> dict[str, tuple[tuple[float, float], ...]]:
    sizes = (256, 512, 1024, 2048, 4096, 8192) if cuda and not quick else (64, 128, 256, 512)
    dtypes = (torch.float32, torch.float16, torch.bfloat16) if cuda else (torch.float32, torch.bfloat16)
    device = "cuda" if cuda else "cpu"
    found = {}
    for dtype in dtypes:
        rows = []
        for n in sizes:
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            flops = 2 * n**3
            rows.append((float(flops), flops / _alone(lambda: a @ b, cuda, flops)))  # noqa: B023
        found[str(dtype).removeprefix("torch.")] = tuple(rows)
    return found | (_odd_products(quick) if cuda else {})


def _odd_products(quick: bool) -> dict[str, tuple[tuple[float, float], ...]]:
    """16-bit products with weights of an odd number of rows, so that no row of the result begins where a kernel that
    takes several elements at once wants it.
    """
    found = {}
    for dtype in (torch.float16, torch.bfloat16):
        rows = []
        for n in (512,) if quick else (1024, 4096):
            inputs, weight = (torch.randn(size, n, device="cuda").to(dtype) for size in (n, n + 1))
            flops = 2 * n * n * (n + 1)
            rows.append((float(flops), flops / _alone(lambda: F.linear(inputs, weight), True, flops)))  # noqa: B023
        found[str(dtype).removeprefix("torch.") + ODD] = tuple(rows)
    return found


def _attention(quick: bool, masked: bool = False) -> tuple[tuple[float, float], ...]:
    rows = []
    for tokens in (128, 512, 2048) if quick else (128, 512, 2048, 8192):
        q = torch.randn(1, 32, tokens, 128, device="cuda", dtype=torch.float16)
        mask = torch.ones(tokens, tokens, device="cuda", dtype=torch.bool).tril() if masked else None
        flops = 4 * 32 * tokens**2 * 128
        seconds = _alone(lambda: F.scaled_dot_product_attention(q, q, q, mask), True, flops)  # noqa: B023
        rows.append((float(flops), flops / seconds))
    return tuple(rows)


def _kernel() -> float:
    a = torch.ones(1, device="cuda")
    return _alone(lambda: a.add_(1), True)


def _alone(work: Callable[[], Any], cuda: bool, flops: int = 0) -> float:
    """Seconds that `work` takes on the device itself: on a GPU by its own clock, queued behind other work, so that no
    time passes between one and the next.
    """
    if not cuda:
        return best(work, repeats=3)
    inner = max(5, min(200, int(1e12 / max(flops, 1))))
    wait = torch.randn(4096, 4096, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    work()
    for _ in range(3):
        for _ in range(20):
            wait @ wait  # long enough for Python to queue all that follows
        start.record()
        for _ in range(inner):
            work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000 / inner)
    return min(times)


def _workspace() -> int:
    from .allocations import record_allocations

    with record_allocations() as mark:
        a = torch.ones(256, 256, device="cuda", dtype=torch.float16)
        a @ a
        del a
    return max(mark.recording.events)  # type: ignore[attr-defined]


def _plan() -> float:
    q = torch.randn(1, 32, 1, 128, device="cuda", dtype=torch.float16)

    def attend(tokens: int) -> float:
        k = torch.randn(1, 32, tokens, 128, device="cuda", dtype=torch.float16)
        torch.cuda.synchronize()
        start = time.perf_counter()
        F.scaled_dot_product_attention(q, k, k)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    attend(next(_lengths))
    new = [next(_lengths) for _ in range(3)]
    return max(0.0, statistics.median(map(attend, new)) - statistics.median(map(attend, new)))


_lengths = itertools.count(1009, 2)  # what calls before have met is planned already


def _grouped(quick: bool) -> tuple[tuple[float, float], ...]:
    """Products of experts in one kernel, from few rows for each to many, each expert met by as many rows as chance
    gives it; empty where PyTorch has none for this GPU.
    """
    rows, experts, width = [], 32, 2048
    weights = torch.randn(experts, width, width, device="cuda").to(torch.bfloat16).transpose(1, 2)
    for each in (16, 128) if quick else (16, 128, 512, 2048):
        inputs = torch.randn(experts * each, width, device="cuda").to(torch.bfloat16)
        chosen = torch.randint(experts, (experts * each,), generator=torch.Generator().manual_seed(0))
        ends = torch.bincount(chosen, minlength=experts).cumsum(0).to("cuda", torch.int32)
        flops = 2 * each * width**2
        try:
            seconds = _alone(lambda: torch._grouped_mm(inputs, weights, offs=ends), True, flops * experts)  # noqa: B023
        except (AttributeError, RuntimeError):
            return ()
        rows.append((float(flops), flops * experts / seconds))
    return tuple(rows)


def _issue(rounds: Sequence[Mapping[str, float]]) -> float | None:
    """Seconds for each step of the host: the median of four models so small that a GPU always waits for Python, each
    at its best of all rounds.

    None where dry runs, which count the steps, cannot be made.
    """
    try:
        return statistics.median(min(seconds[name] for seconds in rounds) / host_steps(name) for name in HOSTS)
    except RuntimeError:
        return None


def _round(device: str) -> dict[str, float]:
    """Seconds of a step of each of the four."""
    return {name: last_step(name, device) for name in HOSTS}


HOSTS = ("llama", "gpt2", "gemma2", "bert")


def host_steps(name: str) -> int:
    """Steps of the host in the last step of a tiny model's work."""
    trace = rehearse(tiny_model(name), {"": 0}, _load(name), Target())
    return sum(operation.issued for operation in trace.operations[trace.steps[-2][1] :])


def _load(name: str) -> Workload:
    return Workload(1, 4, 0 if name == "bert" else 1)


def tiny_model(name: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """An empty model of eight blocks, 64 wide, by its type in Transformers: "llama", "gpt2", "bert"."""
    import transformers

    from ..meta.empty import init_empty_weights

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 2}
    rest = {} if name in ("gpt2", "bert") else {"num_key_value_heads": 2, "head_dim": 32}
    if name == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 8, "n_head": 2}
    config = transformers.AutoConfig.for_model(
        name, vocab_size=256, bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes, **rest
    )
    auto = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
    with init_empty_weights():
        model: nn.Module = auto.from_config(config, dtype=dtype).eval()
    return model


def last_step(name: str, device: str = "cpu") -> float:
    """Seconds of the last step of a tiny model's work, a token if it makes some: the best of ten after two others."""
    model = fill(
        tiny_model(name, torch.float32 if device == "cpu" else torch.bfloat16), {"": 0 if device == "cuda" else "cpu"}
    )
    times = []
    for _ in range(12):
        start = time.perf_counter()
        for _ in passes(model, _load(name), device):
            if device == "cuda":
                torch.cuda.synchronize()
            start, before = time.perf_counter(), start
            last = start - before
        times.append(last)
    return min(times[2:])
