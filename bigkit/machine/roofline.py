"""How long a run takes: a roofline over its operations, Python issuing them, and weights that travel.

    one operation     the time of the smallest kernel, and the longer of: what it computes / the rate of such products,
                      what it reads and writes / the memory's bandwidth (of which kernels reach a part: `STREAMED`),
                      the elements that it must take one by one / the rate of those
    one step          lanes: Python takes one step of its own after another (each takes `issue`): it calls a module,
                      issues an operation, launches a kernel. The GPU runs each operation when it was issued and the
                      one before it is done. A decode step of a small model waits for Python, a long prompt for the
                      GPU. Weights that rest elsewhere pass two more lanes, disk and link, into slots: a slot is filled
                      when its last reader is done, and read when it is filled.

The rate of a matrix product grows with its size; it is read off a measured table, or off the vendor's figure and the
share of it that large products reach.

Leaves out: several streams of work, and caches of the processor.

Source of the roofline: Williams, Waterman, Patterson, Roofline: an insightful visual performance model (CACM 2009).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .hardware import Gpu
from .ledger import Calibration

STREAMED = 0.75  # of a large copy's bandwidth, by operations that are no products: seen on an H200, over 20 models

SCATTERED, JOINED = 0.077, 0.042  # elements a second for each byte of bandwidth, where they were not measured
PLAN = 0.049  # seconds in which cuDNN plans its attention for a length that is new: seen on an H200, PyTorch 2.11
MASKED = ", masked"  # ends the name of an attention with a mask that is a tensor
ODD = ", odd rows"  # ends the name of a 16-bit product of which a matrix has rows of an odd length, as GPT-2's logits
ODD_SHARE = 0.125  # of a product's usual rate: seen on an H200

GATHERS = frozenset(("index", "index_put", "index_put_"))  # rows picked by a tensor: far from a copy's speed

Table = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation as a cost.

    Args:
        name: as PyTorch's dispatcher calls it ("mm").
        device: where it ran, "cuda:0".
        flops: what it computes.
        bytes: what it reads and writes.
        dtype: of its result.
        issued: steps that Python took for it: itself and the views before it, the modules called on the way, and the
            launch of its kernel.
        source: for a copy between devices, where it comes from; for a slot, where its weights rest ("cpu", "disk").
        slot, unit: for weights that travel: the number of the slot, and whose weights they are.
        parts: matrix products in it, if one kernel does several: experts.
        scattered: elements that its kernel takes one by one, because its tensors lie in memory in different orders, or
            one is repeated; several at once go in one access otherwise.
    """

    name: str
    device: str
    flops: int
    bytes: int
    dtype: str
    issued: int = 1
    source: str = ""
    slot: int = -1
    unit: str = ""
    parts: int = 1
    scattered: int = 0


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, and what it takes at least. See `Calibration` for the fields.

    Without `grouped`, `gather` and `masked`, products of experts go as fast as others, gathers as other operations, and
    attention with a mask as without; without `scattered` and `joined`, they follow from `memory`.
    """

    memory: float
    products: Mapping[str, Table]
    attention: Table
    issue: float
    kernel: float
    link: float
    peer: float
    disk: float
    gather: float = 0.0
    grouped: Table = ()
    masked: Table = ()
    scattered: float = 0.0
    joined: float = 0.0
    plan: float = PLAN
    measured: bool = field(default=False, compare=False)

    @staticmethod
    def of_gpu(gpu: Gpu, disk: float = 3.5e9) -> Rates:
        """From a vendor's figures and the shares of them that PyTorch's kernels usually reach; `disk` in bytes/s."""
        half = _saturating(0.75 * gpu.flops)
        return Rates(
            memory=0.88 * gpu.bandwidth,
            products={"float16": half, "bfloat16": half, "float32": _saturating(0.75 * gpu.flops / 16)},
            attention=_saturating(0.5 * gpu.flops),
            issue=6e-6,
            kernel=2.5e-6,
            link=0.87 * gpu.link,
            peer=0.87 * gpu.link,
            disk=disk,
        )

    @staticmethod
    def of_calibration(calibration: Calibration, gpu: Gpu | None = None, disk: float = 3.5e9) -> Rates:
        """From what was measured; what was not is taken from `gpu`.

        Raises:
            ValueError: something is missing and `gpu` is None.
        """
        base = Rates.of_gpu(gpu, disk) if gpu is not None else None
        found = {
            "memory": calibration.memory,
            "products": calibration.products,
            "attention": calibration.attention,
            "issue": calibration.issue,
            "kernel": calibration.kernel,
            "link": calibration.link_pinned,
            "peer": calibration.link_pinned,
            "disk": calibration.disk_readers or calibration.disk_warm,
        }
        missing = [name for name, value in found.items() if not value]
        if missing and base is None:
            raise ValueError(f"the calibration of {calibration.machine!r} lacks {', '.join(missing)}: name a GPU")
        both: dict[str, Any] = {name: value or getattr(base, name) for name, value in found.items()}
        more: dict[str, Any] = {
            "gather": calibration.gather or 0.0, "grouped": calibration.grouped, "masked": calibration.masked,
            "scattered": calibration.scattered or 0.0, "joined": calibration.joined or 0.0,
            "plan": calibration.plan or PLAN,
        }  # fmt: skip
        return Rates(**both, **more, measured=True)

    def seconds(self, operation: Operation) -> float:
        """What one operation takes on the device."""
        if operation.source:
            link = self.peer if operation.source.startswith("cuda") else self.link
            return max(self.kernel, operation.bytes / 2 / link)
        if not operation.flops:
            gathers = operation.name in GATHERS and self.gather
            moving = operation.bytes / (self.gather if gathers else STREAMED * self.memory)
            one_by_one = self.scattered or SCATTERED * self.memory
            if operation.name == "cat":
                one_by_one = self.joined or JOINED * self.memory
            return self.kernel + max(moving, operation.scattered / one_by_one)
        table = self.table(operation.dtype)
        if "attention" in operation.name:
            table = self.masked if operation.name.endswith(MASKED) and self.masked else self.attention
        elif operation.name.endswith(ODD):
            table = self.products.get(operation.dtype + ODD) or [(size, ODD_SHARE * rate) for size, rate in table]
        size = operation.flops
        if operation.parts > 1 and self.grouped:
            table, size = self.grouped, operation.flops // operation.parts
        return self.kernel + max(operation.flops / rate_at(table, size), operation.bytes / self.memory)

    def table(self, dtype: str) -> Table:
        """The rates of matrix products in a dtype; float32's for one that was not measured."""
        return self.products.get(dtype) or self.products.get("float32") or next(iter(self.products.values()))


def rate_at(table: Table, size: float) -> float:
    """The rate at a size, between the measured ones on a logarithmic scale; the ends go on as they are.

    >>> rate_at([(1e6, 1e9), (1e8, 3e9)], 1e7)
    2000000000.0
    """
    sizes = [row[0] for row in table]
    i = bisect_left(sizes, size)
    if i == 0:
        return table[0][1]
    if i == len(table):
        return table[-1][1]
    (a, low), (b, high) = table[i - 1], table[i]
    return low + (high - low) * math.log(size / a) / math.log(b / a)


def _saturating(peak: float) -> Table:
    """Products up to 1 GFLOP reach a tenth of the peak, from 1 TFLOP on all of it."""
    return ((1e9, 0.1 * peak), (1e10, 0.4 * peak), (1e11, 0.85 * peak), (1e12, peak))


@dataclass(frozen=True)
class StepTime:
    """One step: its seconds, and how long each lane was busy: "python", the devices, the links to them, "disk"."""

    name: str
    seconds: float
    busy: Mapping[str, float]

    @property
    def bottleneck(self) -> str:
        """The lane that was busy longest."""
        return max(self.busy, key=lambda lane: self.busy[lane])


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time: on which lane, what, from when to when (seconds from the start of the first step)."""

    lane: str
    name: str
    start: float
    end: float


class Clock:
    """Plays operations: Python issues them, each device and each link does one thing at a time.

    Args:
        rates: device -> its rates.
        spans: filled with what each lane did, if given.
    """

    def __init__(self, rates: Mapping[str, Rates], spans: list[Span] | None = None) -> None:
        self.rates, self.spans = rates, spans
        self.now = 0.0  # Python's
        self.free: dict[str, float] = dict.fromkeys(rates, 0.0)  # lane -> when it has done all it was asked to do
        self.busy: dict[str, float] = dict.fromkeys(("python", *rates), 0.0)
        self.ready: dict[tuple[str, int], float] = {}  # slot -> when it is filled
        self.emptied: dict[tuple[str, int], float] = {}  # slot -> when its last reader is done

    def play(self, operation: Operation) -> None:
        """Do one operation."""
        issue = operation.issued * self.rates[operation.device].issue
        if issue and self.spans is not None:
            self.spans.append(Span("python", operation.name, self.now, self.now + issue))
        self.now += issue
        self.busy["python"] += issue
        slot = (operation.device, operation.slot)
        if operation.name == FILL:
            self._fill(operation, slot)
        elif operation.name == ARRIVE:
            self.free[operation.device] = max(self.free[operation.device], self.ready[slot])
            if operation.source == "disk":  # a copy can be queued only when the bytes have been read
                self.now = max(self.now, self.ready[slot])
        elif operation.name == LEAVE:
            self.emptied[slot] = max(self.now, self.free[operation.device])
        elif operation.name == WAIT:  # Python asks for a value
            self.now = max(self.now, self.free[operation.device])
        else:
            after = self.free.get(operation.source, 0.0)
            self._spend(operation.device, operation.name, after, self.rates[operation.device].seconds(operation))

    def _fill(self, operation: Operation, slot: tuple[str, int]) -> None:
        rates = self.rates[operation.device]
        copy, disk = f"copy to {operation.device}", "disk"
        after = self.emptied.get(slot, 0.0)
        copying = operation.bytes / rates.link
        if operation.source == "disk":  # the copy goes on while the rest is read
            reading = operation.bytes / rates.disk
            read = self._spend(disk, operation.unit, after, reading)
            after = max(after, read - max(reading, copying))
            self.ready[slot] = max(read, self._spend(copy, operation.unit, after, copying))
        else:
            self.ready[slot] = self._spend(copy, operation.unit, after, copying)

    def _spend(self, lane: str, name: str, after: float, seconds: float) -> float:
        start = max(self.now, self.free.get(lane, 0.0), after)
        self.free[lane] = start + seconds
        self.busy[lane] = self.busy.get(lane, 0.0) + seconds
        if self.spans is not None:
            self.spans.append(Span(lane, name, start, start + seconds))
        return start + seconds

    def wait(self) -> None:
        """Python waits for the devices, not for links that bring what is needed later."""
        self.now = max(self.now, *(self.free[device] for device in self.rates))


FILL, ARRIVE, LEAVE, WAIT = "fill", "arrive", "leave", "wait"


def run_steps(
    operations: Sequence[Operation],
    steps: Iterable[tuple[str, int]],
    rates: Mapping[str, Rates],
    spans: list[Span] | None = None,
) -> list[StepTime]:
    """The time of each step.

    Args:
        operations: in the order in which they are issued.
        steps: (name, number of operations up to its end), in order; the devices are waited for at each end.
        rates: device -> its rates.
        spans: filled with what each lane did, if given.

    >>> slow = Rates(1e9, {"float32": ((1.0, 1e9),)}, (), issue=1e-6, kernel=1e-6, link=1e9, peer=1e9, disk=1e9)
    >>> [step] = run_steps([Operation("mm", "cuda:0", 10**9, 0, "float32")], [("prefill", 1)], {"cuda:0": slow})
    >>> round(step.seconds, 3), step.bottleneck
    (1.0, 'cuda:0')
    """
    clock = Clock(rates, spans)
    times: list[StepTime] = []
    done = 0
    for name, end in steps:
        begin, before = clock.now, dict(clock.busy)
        for operation in operations[done:end]:
            clock.play(operation)
        clock.wait()
        busy = {lane: seconds - before.get(lane, 0.0) for lane, seconds in clock.busy.items()}
        times.append(StepTime(name, clock.now - begin, busy))
        done = end
    return times
