"""What was measured on this machine, and how predictions fared: a small JSON file.

    Calibration     rates and overheads of one machine, as `calibrate()` measured them; predictions use it
    Ledger          the file: one calibration for each machine, and an entry for each run that `record()` measured

Several processes may add to the file at once: each takes a lock, reads what is there, and puts a new file in its place.
The file lies where BIGKIT_LEDGER says, else in the user's cache folder (~/.cache/bigkit/ledger.json).

Leaves out: measuring (`measure/calibrate.py`).
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

MOST_RUNS = 1000  # kept in the file; older ones go


@dataclass(frozen=True)
class Calibration:
    """What one machine does, measured. Rates are bytes or FLOP a second, times are seconds; None: it has no such thing.

    Args:
        machine: its GPU (or CPU) and the number of cores.
        gpu: the GPU's name, or None.
        link_pinned, link_pageable: from RAM to the GPU, from memory that is pinned and that is not.
        disk_cold, disk_warm: from a file, when the disk must be read, and when the system has it in memory.
        memory: of the device that computes: bytes read and written by a large copy.
        host_memory: of RAM, likewise.
        products: dtype -> (FLOP of one matrix product, FLOP a second), from small to large; "float16, odd rows" and
            "bfloat16, odd rows" are of products with rows of an odd length.
        attention: (FLOP of one call of fused attention, FLOP a second), from small to large, in half precision.
        issue: what the host takes for one of its steps: to call a module, to issue an operation (views too), or to
            launch a kernel.
        kernel: what the smallest kernel takes on the GPU.
        context: bytes that a CUDA context takes before the first tensor.
        workspace: bytes that cuBLAS takes at the first matrix product.
        capability: the GPU's compute capability.
        versions: of the libraries it was measured with.
        gather: rows picked by a tensor of indices: bytes read and written.
        grouped: (FLOP of one expert's product, FLOP a second of all), from small to large.
        disk_readers: from a file that the system has in memory, by as many threads as offloading reads with.
        masked: as `attention`, with a mask that is a tensor.
        scattered: elements a second of an operation whose tensors lie in memory in different orders.
        plan: what attention takes more at a length that it meets for the first time.
        joined: elements a second of joining tensors that do not lie in memory as the result does (`torch.cat`).
    """

    machine: str
    gpu: str | None = None
    link_pinned: float | None = None
    link_pageable: float | None = None
    disk_cold: float | None = None
    disk_warm: float | None = None
    memory: float | None = None
    host_memory: float | None = None
    products: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    attention: tuple[tuple[float, float], ...] = ()
    issue: float | None = None
    kernel: float | None = None
    context: int | None = None
    workspace: int | None = None
    capability: tuple[int, int] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    gather: float | None = None
    grouped: tuple[tuple[float, float], ...] = ()
    disk_readers: float | None = None
    masked: tuple[tuple[float, float], ...] = ()
    scattered: float | None = None
    joined: float | None = None
    plan: float | None = None

    def explain(self) -> str:
        """What was measured, as text."""
        lines = [self.machine]
        rates = {
            "link, pinned": self.link_pinned, "link, pageable": self.link_pageable, "disk, cold": self.disk_cold,
            "disk, in the page cache": self.disk_warm, "the same, many readers": self.disk_readers,
            "memory of the device": self.memory, "picking rows": self.gather, "RAM": self.host_memory,
        }  # fmt: skip
        lines += [f"  {name:28} {rate / 1e9:10,.1f} GB/s" for name, rate in rates.items() if rate]
        for dtype, rows in self.products.items():
            lines.append(f"  {f'products, {dtype}':28} {max(rate for _, rate in rows) / 1e12:10,.2f} TFLOP/s")
        rates = {"elements, one by one": self.scattered, "elements, joined": self.joined}
        lines += [f"  {name:28} {rate / 1e9:10,.1f} G/s" for name, rate in rates.items() if rate]
        times = {"a step of the host": self.issue, "smallest kernel": self.kernel, "attention, a new length": self.plan}
        lines += [f"  {name:28} {1e6 * seconds:10,.1f} µs" for name, seconds in times.items() if seconds]
        sizes = {"CUDA context": self.context, "workspace of cuBLAS": self.workspace}
        lines += [f"  {name:28} {size / 2**20:10,.1f} MiB" for name, size in sizes.items() if size]
        return "\n".join(lines)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Calibration:
        """From what `dataclasses.asdict` and JSON make of one.

        Raises:
            ValueError: it is none.
        """
        try:
            pairs = {name: tuple(map(tuple, rows)) for name, rows in data["products"].items()}
            capability = data["capability"]
            rest = {"products": pairs, "attention": tuple(map(tuple, data["attention"])),
                    **{name: tuple(map(tuple, data.get(name, ()))) for name in ("grouped", "masked")},
                    "capability": None if capability is None else tuple(capability)}  # fmt: skip
            return Calibration(**{**data, **rest})
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"this is not the JSON of a Calibration: {error!r}") from error


@dataclass
class Ledger:
    """The file. `calibrations` is machine -> Calibration, `runs` one entry for each run measured, the oldest first."""

    path: Path
    calibrations: dict[str, Calibration] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def load(path: str | os.PathLike[str] | None = None) -> Ledger:
        """Read the ledger; one that does not exist is empty.

        Raises:
            ValueError: the file is no ledger that this version reads.
        """
        place = Path(path) if path is not None else ledger_path()
        try:
            text = place.read_text(encoding="utf-8")
        except FileNotFoundError:
            return Ledger(place)
        try:
            data = json.loads(text)
            if data["format"] != 1:
                raise ValueError(f"format {data['format']!r}")
            known = {name: Calibration.from_json(item) for name, item in data["calibrations"].items()}
            return Ledger(place, known, list(data["runs"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{place} is no ledger that this version of bigkit reads ({error}): move it away"
            ) from error

    def save(self) -> None:
        """Write the file whole: a reader sees the old one or the new one."""
        calibrations = {name: asdict(calibration) for name, calibration in self.calibrations.items()}
        text = json.dumps({"format": 1, "calibrations": calibrations, "runs": self.runs}, indent=1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=".ledger")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text + "\n")
            os.replace(name, self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def add(self, calibration: Calibration) -> None:
        """Keep a calibration, in place of an older one of the same machine."""
        self._change(lambda: self.calibrations.update({calibration.machine: calibration}))

    def add_run(self, run: Mapping[str, Any]) -> None:
        """Keep what one run took, and was foretold to take (`Recorder.entry`). Past `MOST_RUNS` the oldest go."""
        self._change(lambda: self.runs.append(dict(run)))

    def bias(self, machine: str | None = None) -> dict[str, Bias]:
        """Quantity -> how measured compared with predicted, over the runs that were foretold.

        Args:
            machine: only runs of this one.

        >>> ledger = Ledger(Path("unused"))
        >>> ledger.runs += [{"machine": "a", "predicted": {"token": 2.0}, "measured": {"token": 3.0}}]
        >>> ledger.bias()
        {'token': Bias(ratio=1.5, runs=1, within=0)}
        """
        ratios: dict[str, list[float]] = {}
        for run in self.runs:
            if machine in (None, run.get("machine")):
                told, real = run.get("predicted") or {}, run.get("measured") or {}
                for name in told.keys() & real.keys():
                    if told[name] and real[name]:
                        ratios.setdefault(name, []).append(real[name] / told[name])
        return {
            name: Bias(statistics.median(found), len(found), sum(abs(1 / ratio - 1) <= 0.15 for ratio in found))
            for name, found in sorted(ratios.items())
        }

    def explain(self) -> str:
        """What was measured here, and how the runs compared with their predictions, as text."""
        lines = [calibration.explain() for calibration in self.calibrations.values()]
        lines.append(f"{len(self.runs):,} runs recorded")
        for name, (ratio, runs, within) in self.bias().items():
            lines.append(f"  {name:26} {ratio:6.2f} x predicted in the median; {within} of {runs} within 15 %")
        return "\n".join(lines)

    def _change(self, change: Callable[[], Any]) -> None:
        """Read what is there now, change it, write it; other writers wait meanwhile."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path.parent):
            now = Ledger.load(self.path)
            self.calibrations, self.runs = now.calibrations, now.runs
            change()
            del self.runs[:-MOST_RUNS]
            self.save()


class Bias(NamedTuple):
    """How runs compared with predictions: the median of measured / predicted, of how many, and how many within 15 %."""

    ratio: float
    runs: int
    within: int


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder. Windows has none: there the last of two writers at the same moment wins."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def machine_key(gpu: str | None = None) -> str:
    """What a machine goes by in the ledger: its GPU (or the processor) and the number of cores."""
    return f"{gpu or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def ledger_path() -> Path:
    """Where the ledger lies: $BIGKIT_LEDGER, else bigkit/ledger.json in the user's cache folder.

    >>> ledger_path().name.endswith("json")
    True
    """
    if named := os.environ.get("BIGKIT_LEDGER"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bigkit" / "ledger.json"
