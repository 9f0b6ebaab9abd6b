"""Measuring this machine in under a minute: `calibrate()`.

Each figure is the best of a few repetitions after a warm-up: predictions start from what the machine can do. With a
GPU: the link, its memory, matrix products, fused attention, the smallest kernel, the CUDA context; all GPUs' links at
once, and what the CPU reads meanwhile (`links.py`); a file as offloading reads it, of which the median counts. Without
one the CPU stands in for it. Always: RAM, a file read cold and warm, and the time of a step of the host, over four tiny
models of Transformers that are built differently, their steps counted by dry runs of them.

Leaves out: several GPUs but for their links (the first one is measured) and the links between them.
"""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..devices import Device
from ..dryrun.attention import Target
from ..dryrun.rehearse import rehearse
from ..dryrun.workload import Workload, fill, passes
from ..machine.ledger import Calibration, Ledger, machine_key
from ..maps.plan import Plan
from ..offload.source import Source
from ..offload.transfer import CHUNK, CudaLane, readers
from ..offload.weights import Part, Unit, Weight
from ..units import MiB
from .links import measure_together
from .twin import measure_twin

BLOCK = 256 * MiB
PIECE = 4 * MiB  # of one stack of an expert, more or less
LARGE = 8  # times BLOCK: a file that no processor's cache holds
REPEATS = 5
PAUSE = 0.004  # seconds between two blocks that ask for experts, more or less
HOSTS = ("llama", "gpt2", "gemma2", "bert")  # types in Transformers of the tiny models by which the host is timed
Table = tuple[tuple[float, float], ...]  # (FLOP of one call, FLOP a second)


def calibrate(
    folder: str | os.PathLike[str] | None = None,
    save: bool = True,
    quick: bool = False,
    *,
    model: str | nn.Module | Any = None,
    quantization: str | None = None,
    plan: Plan | Mapping[str, Device] | None = None,
    expert_cache: int | str = 0,
) -> Calibration:
    """Measure this machine, or how fast its host goes through one architecture.

    Args:
        folder: where the test file is written; the disk of your checkpoints. None takes the system's temporary folder.
        save: keep the result in the ledger, where predictions find it.
        quick: a sixteenth of the bytes, and one tiny model: good enough for the order of magnitude, and for tests.
        model: a name, a config of Transformers, or an empty model: its narrow twin is run here (`measure/twin.py`), for
            some seconds, and dry runs of models of its class find what the host took. The machine itself is measured
            only if the ledger does not know it.
        quantization: of the twin's linear layers: one of `QUANTIZATIONS`.
        plan, expert_cache: where the model's parts rest, see `dispatch_model`: the twin's do the same, since hooks take
            the host time. None: all lies where it works.

    Returns:
        What was measured, with the twins that were measured before.

    Raises:
        ValueError: there is no such folder, or no twin of this model can be made.

    >>> calibration = calibrate(save=False, quick=True)
    >>> calibration.disk_warm > 0 and calibration.issue > 0
    True
    """
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"there is no folder {os.fspath(folder)!r} to measure the disk in")
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    if model is not None:
        known = Ledger.load().calibrations.get(machine_name()) or calibrate(folder, save, quick)
        calibration = known.with_twin(
            measure_twin(_empty(model), device, quantization, 1 if quick else 5, plan, expert_cache)
        )
        if save:
            Ledger.load().add(calibration)
        return calibration
    block = BLOCK // 16 if quick else BLOCK
    context = _context() if cuda else None  # before anything else uses the GPU
    hosts = HOSTS[:1] if quick else HOSTS
    pace = {name: last_step(name, device) for name in hosts}  # it changes, so it is measured again at the end
    cold, warm, pieces = _disk(Path(folder) if folder is not None else Path(tempfile.gettempdir()), block)
    figures: dict[str, Any] = {
        "disk_cold": cold,
        "disk_warm": warm,
        "pieces": pieces,
        "memory": _copy(device, 4 * block if cuda else block),
        "host_memory": _copy("cpu", block),
        "products": _products(cuda, quick),
        "versions": _versions(),
    }
    if cuda:
        figures |= {
            "gpu": torch.cuda.get_device_name(0),
            "link_pinned": _link(block, pinned=True),
            "link_pageable": _link(block, pinned=False),
            "attention": _attention(quick),
            "kernel": _kernel(),
            "context": context,
            "workspace": _workspace(),
            "capability": torch.cuda.get_device_capability(0),
        }
        together = measure_together(4 * block, 1024 * MiB // (16 if quick else 1))
        figures |= dict(zip(("links", "cpu_reads", "call"), together))
    pace = {name: min(seconds, last_step(name, device)) for name, seconds in pace.items()}
    calibration = Calibration(machine=machine_name(), issue=_issue(pace), **figures)
    if save:
        Ledger.load().add(calibration)
    return calibration


def _empty(model: Any) -> nn.Module:
    """A model without memory, by its name, its config, or itself."""
    from .. import zoo
    from ..zoo.build import build

    if isinstance(model, nn.Module):
        return model
    return build(model.to_dict(), dtype="bfloat16") if hasattr(model, "to_dict") else zoo.empty_model(model)


def machine_name() -> str:
    """The name of this machine in the ledger."""
    return machine_key(torch.cuda.get_device_name(0) if torch.cuda.is_available() else None)


def best(work: Callable[[], Any], device: str = "cpu", repeats: int = REPEATS) -> float:
    """Seconds that `work` takes: the best of `repeats` after a warm-up.

    >>> best(lambda: sum(range(1000))) < 1
    True
    """
    return min(_times(work, device, repeats))


def _times(work: Callable[[], Any], device: str, repeats: int, pause: float = 0) -> list[float]:
    times = []
    for _ in range(1 + repeats):
        time.sleep(pause)
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[1:]


# ---------------------------------------------------------------------------------------------------------------------
# One figure each


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
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / best(lambda: target.copy_(source), device)


def _disk(folder: Path, size: int) -> tuple[float | None, float, Table]:
    """Bytes a second from a file: cold, by one thread, and warm, as offloading reads, whole and in small pieces.

    None for the first where the system's copy cannot be dropped.
    """
    handle, name = tempfile.mkstemp(dir=folder, prefix="bigkit-calibrate")
    try:
        chunk = bytearray(os.urandom(CHUNK))
        _write(handle, chunk, size)
        os.fsync(handle)
        cold = None
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.lseek(handle, 0, os.SEEK_SET)
            start = time.perf_counter()
            while os.readv(handle, [chunk]):
                pass
            cold = size / (time.perf_counter() - start)
        if torch.cuda.is_available():
            larger = min(LARGE * size, size + shutil.disk_usage(folder).free // 2 // CHUNK * CHUNK)
            _write(handle, chunk, larger - size)
            return cold, *_as_units(name, larger)
        return cold, size / best(lambda: _read_shared(name, size)), ()
    finally:
        os.close(handle)
        os.unlink(name)


def _write(handle: int, chunk: bytearray, size: int) -> None:
    for _ in range(size // CHUNK):
        os.write(handle, chunk)


def _read_shared(name: str, size: int) -> None:
    """Read a file as offloading does: all of its reader threads, a chunk each at a time, into memory that is kept."""

    def read(at: int) -> None:
        if not hasattr(_kept, "chunk"):
            _kept.chunk = bytearray(CHUNK)
        with open(name, "rb", buffering=0) as file:
            file.seek(at)
            file.readinto(_kept.chunk)

    list(readers().map(read, range(0, size, CHUNK)))


_kept = threading.local()


def _as_units(name: str, size: int, device: str = "cuda:0") -> tuple[float, Table]:
    """Bytes a second until a unit is read from a file by a lane's readers, who queue copies to the GPU as well.

    Each repetition reads on where the last one ended: what was read just now lies in the processor's own cache still.
    They are asked for once in a while, by readers that have slept, and the median counts.

    Returns:
        The rate of a large one, and (bytes, rate) of some that lie in small pieces, as experts do.
    """
    lane, source = CudaLane(torch.device(device)), Source(name)
    halves = itertools.cycle((0, size // 2))
    places = itertools.cycle(range(0, size - PIECE + 1, 2 * PIECE))

    def rate(piece: int, count: int, places: Iterator[int]) -> tuple[float, float]:
        def unit() -> Unit:
            parts = [Part((piece,), (1,), torch.uint8, at=next(places), source=source) for _ in range(count)]
            return Unit("", nn.Identity(), [Weight("", torch.empty(0), [], {"": part}) for part in parts])

        repeats = 2 * REPEATS
        units, slot = iter([unit() for _ in range(1 + repeats)]), lane.slot(piece * count)

        def bring() -> None:
            lane.fill(slot, next(units))
            lane.arrive(slot)

        return float(piece * count), piece * count / statistics.median(_times(bring, "cpu", repeats, PAUSE))

    _, whole = rate(size // 2, 1, halves)  # at first the largest, so that all chunks of the ring are pinned
    pieces = [rate(PIECE, count, places) for count in (2, 4, 16, 48)]
    lane.close()
    return whole, tuple(pieces)


def _products(cuda: bool, quick: bool) -> dict[str, Table]:
    sizes = (256, 512, 1024, 2048, 4096, 8192) if cuda and not quick else (64, 128, 256, 512)
    dtypes = (torch.float32, torch.float16, torch.bfloat16) if cuda else (torch.float32, torch.bfloat16)
    products = {}
    for dtype in dtypes:
        rows = []
        for n in sizes:
            a, b = (torch.randn(n, n, device="cuda" if cuda else "cpu").to(dtype) for _ in range(2))
            flops = 2 * n**3
            rows.append((float(flops), flops / _alone(lambda: a @ b, cuda, flops)))  # noqa: B023
        products[str(dtype).removeprefix("torch.")] = tuple(rows)
    return products


def _attention(quick: bool) -> Table:
    rows = []
    for tokens in (128, 512, 2048) if quick else (128, 512, 2048, 8192):
        q = torch.randn(1, 32, tokens, 128, device="cuda", dtype=torch.float16)
        flops = 4 * 32 * tokens**2 * 128
        seconds = _alone(lambda: F.scaled_dot_product_attention(q, q, q), True, flops)  # noqa: B023
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


# ---------------------------------------------------------------------------------------------------------------------
# The host: the last step of a tiny model's work, for which a GPU always waits


def _issue(pace: Mapping[str, float]) -> float | None:
    """Seconds for each step of the host: the median of tiny models, given the seconds of each one's last step.

    None where dry runs, which count the steps, cannot be made.
    """
    try:
        return statistics.median(seconds / host_steps(name) for name, seconds in pace.items())
    except RuntimeError:
        return None


def host_steps(name: str) -> int:
    """Steps of the host in the last step of a tiny model's work."""
    trace = rehearse(tiny_model(name), {"": 0}, _load(name), Target())
    return sum(operation.issued for operation in trace.operations[trace.steps[-2][1] :])


def last_step(name: str, device: str = "cpu") -> float:
    """Seconds of the last step of a tiny model's work, a token if it makes some: the best of ten after two others."""
    model = fill(tiny_model(name, torch.float32 if device == "cpu" else torch.bfloat16), {"": device})
    times = []
    for _ in range(12):
        ends = [time.perf_counter()]
        for _ in passes(model, _load(name), device):
            if device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
        times.append(ends[-1] - ends[-2])
    return min(times[2:])


def _load(name: str) -> Workload:
    return Workload(1, 4, 0 if name == "bert" else 1, generate=False)


def tiny_model(name: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """An empty model of eight blocks, 64 wide, by its type in Transformers: one of `HOSTS`."""
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
