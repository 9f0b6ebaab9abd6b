"""What was measured on this machine, and how predictions fared: a small JSON file.

    Calibration     rates and overheads of one machine, as `calibrate()` measured them; predictions use it
    Ledger          the file: one calibration for each machine, and an entry for each run that `record()` measured

Several processes may add to the file at once: each takes a lock, reads the file, and puts a new one in its place.
Its path is BIGKIT_LEDGER, else in the user's cache folder (~/.cache/bigkit/ledger.json).

Leaves out: measuring (`measure/calibrate.py`).
"""

from __future__ import annotations

import json
import os
import platform
import re
import reprlib
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..units import counted, format_bytes, format_seconds, three_figures
from .hardware import CONTEXT_BYTES, Hardware

MOST_RUNS = 1000  # kept in the file; older ones go
_RATES = ("link_pinned", "link_pageable", "disk_cold", "disk_warm", "memory", "host_memory", "issue", "kernel", "call")
_SIZES = ("context", "workspace")


class HostStep(NamedTuple):
    """What the host took for a step in which the device waits for it.

    Args:
        seconds: the whole step.
        before: seconds of it that passed before the model was called: what `generate` does between two calls.
        issued: the host's steps in it, counted by a dry run (`roofline.Operation.issued`).
    """

    seconds: float
    before: float
    issued: int

    @property
    def issue(self) -> float:
        """Seconds for each of the host's steps."""
        return (self.seconds - self.before) / self.issued

    def without_before(self) -> HostStep:
        """The same step, of a model that is called alone."""
        return HostStep(self.seconds - self.before, 0.0, self.issued)


@dataclass(frozen=True)
class Twin:
    """The pace of the host in one architecture, measured with a narrow twin (`measure/twin.py`).

    Args:
        model: the model's class.
        quantization: of its linear layers, or None.
        prefill: the prompt's step.
        token: a token's step; None if it makes none.
        single: the step of a prompt of one token, which calls other kernels; None if it was not measured.
        plain: a token's step if the model is called alone; None if it is `token` without what `generate` does before.
        rests: what of it rested away from where it works meanwhile, see `resting`: hooks take time of the host's, too.
    """

    model: str
    quantization: str | None
    prefill: HostStep
    token: HostStep | None = None
    single: HostStep | None = None
    plain: HostStep | None = None
    rests: tuple[str, ...] = ()

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Twin:
        """From what `dataclasses.asdict` and JSON make of one."""
        others = (data["token"], data.get("single"), data.get("plain"))
        token, single, plain = (step and HostStep(*step) for step in others)
        rests = tuple(map(str, data.get("rests", ())))
        return Twin(str(data["model"]), data["quantization"], HostStep(*data["prefill"]), token, single, plain, rests)

    @property
    def numbers(self) -> list[float]:
        """All that must be positive."""
        return [number for step in (self.prefill, self.token, self.single, self.plain) if step for number in step]


@dataclass(frozen=True)
class Calibration:
    """What one machine does, measured. Rates are bytes or FLOP a second, times are seconds; None: it has no such thing.

    Args:
        machine: its GPU (or CPU) and the number of cores.
        gpu: the GPU's name, or None.
        link_pinned, link_pageable: bytes a second from RAM to the GPU, from memory that is pinned and that is not.
        links: bytes a second to each GPU while all are copied to at once.
        cpu_reads: dtype -> (threads, bytes of weights a second in products of matrices and a vector on the CPU, bytes a
            second of all links meanwhile).
        call: seconds in which a CUDA graph calls the CPU and goes on, beside what the CPU does (`host_calls.py`).
        disk_cold: bytes a second from a file when the disk must be read.
        disk_warm: bytes a second from a file that the system has in memory, by the threads that offloading reads with.
        pieces: (bytes that are read at once, bytes a second), from small to large, where they lie in small pieces of
            such a file, as experts do.
        memory: bytes a second that a large copy reads and writes, on the device that computes.
        host_memory: bytes a second that a large copy in RAM reads and writes.
        products: dtype -> (FLOP of one matrix product, FLOP a second), from small to large.
        attention: (FLOP of one call of fused attention, FLOP a second), from small to large, in half precision.
        issue: seconds that the host takes for one of its steps: to call a module, to issue an operation (views too), or
            to launch a kernel.
        kernel: seconds that the smallest kernel takes on the GPU.
        context: bytes that a CUDA context takes before the first tensor.
        workspace: bytes that cuBLAS takes at the first matrix product.
        capability: the GPU's compute capability.
        versions: library -> the version that it was measured with.
        twins: the pace of the host in the architectures that were measured.
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
    links: tuple[float, ...] = ()
    cpu_reads: Mapping[str, tuple[tuple[int, float, float], ...]] = field(default_factory=dict)
    call: float | None = None
    twins: tuple[Twin, ...] = ()
    pieces: tuple[tuple[float, float], ...] = ()

    def twin(self, model: str, quantization: str | None, issued: int, rests: tuple[str, ...] = ()) -> Twin | None:
        """The twin of a class of models whose prompt takes about so many steps of the host; None if there is none.

        One that rested as the model does, or else one that lay where it works.
        """
        same = [twin for twin in self.twins if (twin.model, twin.quantization) == (model, quantization)]
        alike = [twin for twin in same if twin.rests == rests] or [twin for twin in same if not twin.rests]
        return min(alike, key=lambda twin: abs(twin.prefill.issued - issued), default=None)

    def with_twin(self, twin: Twin) -> Calibration:
        """The same with one twin more, in place of an older one with as many steps."""
        others = [old for old in self.twins if (old.model, old.quantization, old.prefill.issued, old.rests)
                  != (twin.model, twin.quantization, twin.prefill.issued, twin.rests)]  # fmt: skip
        return replace(self, twins=(*others, twin))

    def explain(self) -> str:
        """What was measured, as text."""
        rates = {
            "link, pinned": self.link_pinned,
            "link, pageable": self.link_pageable,
            "disk, cold": self.disk_cold,
            "disk, in the page cache": self.disk_warm,
            "memory of the device": self.memory,
            "RAM": self.host_memory,
            "all links together": sum(self.links) if len(self.links) > 1 else None,
        }
        for dtype, rows in self.cpu_reads.items():
            threads, reads, links = max(rows, key=lambda row: row[1] + row[2])
            rates |= {f"{threads} CPU threads, {dtype}": reads, "  links meanwhile": links}
        rates |= {f"  {format_bytes(size)} in small pieces": rate for size, rate in self.pieces}
        products = {f"products, {dtype}": max(rate for _, rate in rows) for dtype, rows in self.products.items()}
        times = {"a step of the host": self.issue, "smallest kernel": self.kernel, "a call of the CPU": self.call}
        sizes = {"CUDA context": self.context, "workspace of cuBLAS": self.workspace}
        return "\n".join(
            [
                self.machine,
                *(f"  {name:28} {format_bytes(rate, 'si'):>13}/s" for name, rate in rates.items() if rate),
                *(f"  {name:28} {three_figures(rate / 1e12):>8} TFLOP/s" for name, rate in products.items()),
                *(f"  {name:28} {format_seconds(seconds):>13}" for name, seconds in times.items() if seconds),
                *(f"  {name:28} {format_bytes(size):>13}" for name, size in sizes.items() if size),
                *(
                    f"  a token of {twin.model} takes the host {format_seconds(twin.token.seconds)}"
                    + "".join(f", {kind}" for kind in twin.rests)
                    for twin in self.twins
                    if twin.token
                ),
            ]
        )

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Calibration:
        """From what `dataclasses.asdict` and JSON make of one. What older versions measured beside it is left out.

        Raises:
            ValueError: it is not a calibration.
        """
        try:
            values = {item.name: data[item.name] for item in fields(Calibration) if item.name in data}
            values["products"] = {name: tuple(map(tuple, rows)) for name, rows in data["products"].items()}
            values["attention"] = tuple(map(tuple, data["attention"]))
            values["pieces"] = tuple(map(tuple, data.get("pieces", ())))
            values["twins"] = tuple(map(Twin.from_json, data.get("twins") or ()))
            values["capability"] = data["capability"] and tuple(data["capability"])
            values["disk_warm"] = data.get("disk_readers") or data["disk_warm"]  # once a field of its own
            values["links"] = tuple(data.get("links", ()))
            values["cpu_reads"] = {name: tuple(map(tuple, rows)) for name, rows in data.get("cpu_reads", {}).items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"this is not the JSON of a Calibration: {error!r}") from error
        rows = [*values["attention"], *values["pieces"], *(row for rows in values["products"].values() for row in rows)]
        numbers = [values.get(name) for name in (*_RATES, *_SIZES)] + [number for row in rows for number in row]
        reads = [row for rows in values["cpu_reads"].values() for row in rows]
        numbers += [*values["links"], *(row[1] for row in reads)]
        rows += [() for row in reads if len(row) != 3]
        numbers += [number for twin in values["twins"] for number in twin.numbers]
        if not all(number is None or _is_positive(number) for number in numbers) or any(len(row) != 2 for row in rows):
            raise ValueError("a rate, time or size of a Calibration is not a positive number")
        if not isinstance(values.get("machine"), str) or not isinstance(values.get("versions"), dict):
            raise ValueError("a Calibration needs the name of its machine, and versions of libraries")
        return Calibration(**values)


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
            ValueError: the file is not a ledger that this version reads.
        """
        file = Path(path) if path is not None else ledger_path()
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return Ledger(file)
        try:
            data = json.loads(text)
            if data["format"] != 1:
                raise ValueError(f"format {data['format']!r}")
            calibrations = {name: Calibration.from_json(item) for name, item in data["calibrations"].items()}
            for run in data["runs"]:
                for part in ("predicted", "measured"):
                    if not all(isinstance(value, (int, float)) for value in (run.get(part) or {}).values()):
                        raise ValueError(f"{part} of a run holds {reprlib.repr(run[part])}: expected numbers")
            return Ledger(file, calibrations, list(data["runs"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{file} is not a ledger that this version of bigkit reads ({error}): move it away"
            ) from error

    def save(self) -> None:
        """Write the file whole: a reader sees the old one or the new one."""
        calibrations = {name: asdict(calibration) for name, calibration in self.calibrations.items()}
        text = json.dumps({"format": 1, "calibrations": calibrations, "runs": self.runs}, indent=1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, f"{text}\n".encode())

    def add(self, calibration: Calibration) -> None:
        """Keep a calibration in place of an older one of the same machine, whose twins stay if no library changed."""

        def change() -> None:
            old, new = self.calibrations.get(calibration.machine), calibration
            for twin in old.twins if old and old.versions == new.versions else ():
                if new.with_twin(twin).twins[:-1] == new.twins:  # not measured anew
                    new = new.with_twin(twin)
            self.calibrations[new.machine] = new

        self._change(change)

    def add_run(self, run: Mapping[str, Any]) -> None:
        """Keep what one run took, measured and predicted (`Recorder.entry`). Past `MOST_RUNS` the oldest go."""
        self._change(lambda: self.runs.append(dict(run)))

    def bias(self, machine: str | None = None) -> dict[str, Bias]:
        """Quantity -> how measured compared with predicted, over the runs that have a prediction.

        Args:
            machine: count only runs of this machine; None counts all.

        >>> ledger = Ledger(Path("unused"))
        >>> ledger.runs += [{"machine": "a", "predicted": {"token": 2.0}, "measured": {"token": 3.0}}]
        >>> ledger.bias()
        {'token': Bias(ratio=1.5, runs=1, within=0)}
        """
        ratios = self.ratios(machine)
        return {
            name: Bias(statistics.median(row), len(row), sum(abs(1 / ratio - 1) <= 0.15 for ratio in row))
            for name, row in sorted(ratios.items())
        }

    def ratios(self, machine: str | None = None, model: str | None = None) -> dict[str, list[float]]:
        """Quantity -> measured / predicted of each run that has a prediction; None counts all machines, or models."""
        ratios: dict[str, list[float]] = {}
        for run in self.runs:
            if machine in (None, run.get("machine")) and model in (None, run.get("name")):
                predicted, measured = run.get("predicted") or {}, run.get("measured") or {}
                for name in predicted.keys() & measured.keys():
                    if predicted[name] and measured[name]:
                        ratios.setdefault(name, []).append(measured[name] / predicted[name])
        return ratios

    def explain(self) -> str:
        """What was measured here, and how the runs compared with their predictions, as text."""
        lines = [calibration.explain() for calibration in self.calibrations.values()]
        lines.append(f"{counted(len(self.runs), 'run')} recorded")
        for name, (ratio, runs, within) in self.bias().items():
            lines.append(f"  {name:26} {ratio:6.2f} x predicted in the median; {within} of {runs} within 15 %")
        return "\n".join(lines)

    def _change(self, change: Callable[[], Any]) -> None:
        """Read what is there now, change it, write it; other writers wait meanwhile."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path.parent):
            current = Ledger.load(self.path)
            self.calibrations, self.runs = current.calibrations, current.runs
            change()
            del self.runs[:-MOST_RUNS]
            self.save()


class Bias(NamedTuple):
    """How runs compared with predictions.

    Args:
        ratio: the median of measured / predicted.
        runs: the number of runs.
        within: how many of them were predicted within 15 %.
    """

    ratio: float
    runs: int
    within: int


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other writer holds a folder, and hold it. Windows and some network file systems have no locks."""
    handle = None
    with suppress(ImportError, OSError):
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)  # a child that was forked meanwhile has the handle too
            os.close(handle)


def resting(places: Mapping[str, Any], expert_cache: object = 0) -> tuple[str, ...]:
    """What rests in RAM or on disk, each kind of module once: the host does the same for models in which that is equal.

    Args:
        places: module name -> where it rests.
        expert_cache: whether some experts stay on the GPU.

    >>> resting({"": 0, "layers.2.experts": "cpu", "layers.10.experts": "cpu"}, "2GB")
    ('layers.*.experts: cpu', 'some on the GPU')
    """
    away = {f"{re.sub('[0-9]+', '*', name)}: {device}" for name, device in places.items() if device in ("cpu", "disk")}
    return (*sorted(away), *(["some on the GPU"] if expert_cache else []))


def machine_key(gpu: str | None = None) -> str:
    """What a machine goes by in the ledger: its GPU (or the processor) and the number of cores."""
    return f"{gpu or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def calibration_of(hardware: Hardware) -> Calibration | None:
    """What the ledger has on a machine, if it is this one (`Hardware.detect()`)."""
    if not hardware.name.startswith("this machine"):
        return None
    calibrations = Ledger.load().calibrations
    if not hardware.gpus:
        return calibrations.get(machine_key())
    same = [item for item in calibrations.values() if item.gpu == hardware.gpus[0].name]
    unlike = lambda item: (item.machine != machine_key(item.gpu), len(item.links) != len(hardware.gpus))  # noqa: E731
    return min(same, key=unlike, default=None)  # a home may be shared by hosts with one GPU and with eight


def overhead_of(hardware: Hardware, calibration: Calibration | None = None) -> int:
    """Bytes of each GPU that a plan must leave free: `Hardware.overhead`, with the CUDA context that was measured.

    Args:
        hardware: the machine.
        calibration: what was measured there; None takes `calibration_of(hardware)`.
    """
    calibration = calibration or calibration_of(hardware)
    measured = (calibration.context if calibration else None) or CONTEXT_BYTES
    return hardware.overhead + (measured - CONTEXT_BYTES if hardware.gpus else 0)


def ledger_path() -> Path:
    """Where the ledger lies: $BIGKIT_LEDGER, else bigkit/ledger.json in the user's cache folder.

    >>> ledger_path().name.endswith("json")
    True
    """
    if named := os.environ.get("BIGKIT_LEDGER"):
        return Path(named)
    return cache_folder() / "ledger.json"


def cache_folder() -> Path:
    """Where bigkit keeps what it can do without: $XDG_CACHE_HOME/bigkit, else ~/.cache/bigkit."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bigkit"


def write_whole(path: Path, data: bytes) -> None:
    """Put a file in an old one's place: a reader sees the old bytes or the new ones."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".bigkit")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
