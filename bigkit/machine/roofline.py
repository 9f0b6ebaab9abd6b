"""How long a run takes: a roofline over its operations, Python issuing them, and weights that travel.

    one operation     the time of the smallest kernel (sums and sorts need several), and the longest of: what it
                      computes / the rate of such products, what it reads and writes / the memory's bandwidth (of
                      which some kernels reach a part), the elements that it must take one by one / the rate of those
    one step          lanes: Python takes one step of its own after another (each takes `issue`, or what it took in a
                      narrow twin of the model that was measured): it calls a module, issues an operation, launches a
                      kernel. The GPU runs each operation when it was issued and the one before it is done. A decode
                      step of a small model waits for Python, a long prompt for the GPU. Weights that rest elsewhere
                      pass two more lanes, disk and link: the clock of `machine/streams.py` says when. Experts have a
                      lane of their own, which shares the link. For an MLP that the CPU computes, Python waits until it
                      is done, and in a CUDA graph the GPU.

The rate of a matrix product grows with its size; it is read off a measured table, or off the vendor's figure and the
share of it that large products reach (`TYPICAL`).

Leaves out: several streams of work, caches of the processor, and what happens once for a process: loading kernels,
cuDNN planning its attention at each length that is new (35 to 54 ms on an H200), or Triton compiling what decodes
weights that are stored in few bits.

Source of the roofline: Williams, Waterman, Patterson, Roofline: an insightful visual performance model (CACM 2009).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..units import dtype_bits
from .hardware import Gpu
from .ledger import Calibration, HostStep
from .streams import Clock, SlotState, Span

Table = Sequence[tuple[float, float]]
FILL, ARRIVE, LEAVE, WAIT = "fill", "arrive", "leave", "wait"  # names of what moves weights, or waits
HOST, CALL = "on the CPU", "call of the CPU"  # what the CPU computes where it rests, asked by Python or by a graph


@dataclass(frozen=True)
class Typical:
    """Figures that stand where nothing was measured; each was measured or fitted once, on one machine.

    "H200" is the 72 runs of `benchmarks/results/dryrun.json`: one H200, PyTorch 2.11, 16 cores of its host. "Kernels"
    are medians over the kernels of 28 architectures with two loads each on an H200 (PyTorch 2.11, 2026-11-30): 3,400
    pointwise in one order, 1,500 one by one, 670 sums, 100 sorts, 270 of attention.

    Args:
        bandwidth: share of a vendor's bandwidth that a large copy reaches (H200).
        streamed: share of a large copy's bandwidth that pointwise kernels reach (kernels).
        reduced: the same for those that sum or compare along a dimension (kernels).
        weights: the same for products that wait for memory, and for gathered rows (kernels).
        attended: the same for fused attention (kernels).
        grouped: the same for the products of all experts in one kernel (kernels).
        scattered: the same, of the result's bytes alone, for kernels that take elements one by one because their
            tensors lie in memory in different orders (kernels).
        reduction, sorting, indexing: seconds that a sum, a sort, and taking elements one by one take beside it
            (kernels).
        products: share of a vendor's 16-bit FLOP a second that large products reach (H200).
        float32: FLOP a second in float32 for each of 16 bits (H200, without TF32).
        attention: share of a vendor's 16-bit FLOP a second that fused attention reaches (H200).
        link: share of a vendor's link that a copy from pinned RAM reaches (H200).
        gathered: share of the rate of copies that a GPU reaches which reads experts out of RAM itself (H200).
        issue: seconds that Python takes for one step (H200: 5.4e-6; slower hosts more).
        kernel: seconds that the smallest kernel takes (H200: 1.8e-6).
    """

    bandwidth: float = 0.88
    streamed: float = 1.0
    reduced: float = 0.6
    weights: float = 0.9
    attended: float = 0.5
    grouped: float = 0.68
    scattered: float = 0.2
    reduction: float = 3e-6
    sorting: float = 6e-5
    indexing: float = 8e-7
    products: float = 0.75
    float32: float = 1 / 16
    attention: float = 0.5
    link: float = 0.87
    gathered: float = 0.92
    issue: float = 6e-6
    kernel: float = 2.5e-6


TYPICAL = Typical()
SUMS = frozenset(
    "sum mean var var_mean prod amax amin argmax logsumexp linalg_vector_norm native_layer_norm native_group_norm "
    "_fused_rms_norm _softmax _log_softmax cumsum".split()
)
SORTS = frozenset(("sort", "argsort"))
SHARES = {
    "index": TYPICAL.weights, "_grouped_mm": TYPICAL.grouped, "bmm": TYPICAL.streamed, "baddbmm": TYPICAL.streamed,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation as a cost.

    Args:
        name: as PyTorch's dispatcher calls it ("mm"), or FILL, ARRIVE, LEAVE, WAIT, HOST, CALL.
        device: where it runs, such as "cuda:0".
        flops: floating-point operations that it computes.
        bytes: bytes that it reads and writes.
        dtype: the dtype of its result.
        issued: steps that Python takes for it: itself and the views before it, the modules called on the way, and the
            launch of its kernel.
        source: for a copy between devices, where it comes from; for a slot, where its weights rest ("cpu", "disk").
        slot, unit: for weights that travel: the number of the slot, and the name of the unit.
        scattered: elements of its result that its kernel takes one by one, because its tensors lie in memory in
            different orders, or one is repeated; several at once go in one access otherwise.
        experts: experts of a mixture that are brought.
        gathered: whether the GPU itself reads them out of RAM, which reaches a part of the link's rate.
        in_pieces: whether they lie in small pieces of files.
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
    scattered: int = 0
    experts: int = 0
    gathered: bool = False
    in_pieces: bool = False


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, and the least time that an operation takes.

    Args:
        memory: bytes a second that a large copy reads and writes.
        products: dtype -> (FLOP of one matrix product, FLOP a second), from small to large.
        attention: (FLOP of one call of fused attention, FLOP a second), from small to large.
        issue: seconds that Python takes for one step.
        kernel: seconds that the smallest kernel takes.
        link: bytes a second from pinned RAM.
        peer: bytes a second from another GPU.
        disk: bytes a second from files.
        reads: bytes of weights a second that the CPU reads in MLPs that it computes.
        hop, call: seconds for each of them beside that, where Python or a CUDA graph asks for it.
        measured: whether they were measured on the machine; else they follow from a vendor's figures.
        pieces: (bytes that are read at once, bytes a second) of small pieces of files; without them `disk` holds.
    """

    memory: float
    products: Mapping[str, Table]
    attention: Table
    issue: float
    kernel: float
    link: float
    peer: float
    disk: float
    reads: float = 0.0
    hop: float = 0.0
    call: float = 0.0
    measured: bool = field(default=False, compare=False)
    pieces: Table = ()

    @staticmethod
    def of_gpu(gpu: Gpu, disk: float = 3.5e9) -> Rates:
        """From a vendor's figures and the shares of them that PyTorch's kernels usually reach; `disk` in bytes/s."""
        half = _saturating(TYPICAL.products * gpu.flops)
        return Rates(
            memory=TYPICAL.bandwidth * gpu.bandwidth,
            products={
                "float16": half,
                "bfloat16": half,
                "float32": _saturating(TYPICAL.products * TYPICAL.float32 * gpu.flops),
            },
            attention=_saturating(TYPICAL.attention * gpu.flops),
            issue=TYPICAL.issue,
            kernel=TYPICAL.kernel,
            link=TYPICAL.link * gpu.link,
            peer=TYPICAL.link * gpu.link,
            disk=disk,
        )

    @staticmethod
    def of_calibration(calibration: Calibration, gpu: Gpu | None = None, disk: float = 3.5e9) -> Rates:
        """From what was measured; what was not is taken from `gpu`.

        Raises:
            ValueError: something is missing and `gpu` is None.
        """
        measured: dict[str, Any] = {
            "memory": calibration.memory,
            "products": calibration.products,
            "attention": calibration.attention,
            "issue": calibration.issue,
            "kernel": calibration.kernel,
            "link": calibration.link_pinned,
            "peer": calibration.link_pinned,
            "disk": calibration.disk_warm,
        }
        missing = [name for name, rate in measured.items() if not rate]
        if missing and gpu is None:
            raise ValueError(f"the calibration of {calibration.machine!r} lacks {', '.join(missing)}: name a GPU")
        if gpu is not None:
            nominal = Rates.of_gpu(gpu, disk)
            measured |= {name: getattr(nominal, name) for name in missing}
        return Rates(**measured, measured=True, pieces=calibration.pieces)

    def seconds(self, operation: Operation) -> float:
        """The time that one operation takes on the device."""
        if operation.source:
            link = self.peer if operation.source.startswith("cuda") else self.link
            return max(self.kernel, operation.bytes / 2 / link)  # bytes are counted where they are read and written
        if not operation.flops:
            sums, sorts = operation.name in SUMS, operation.name in SORTS
            share = TYPICAL.reduced if sums else SHARES.get(operation.name, TYPICAL.streamed)
            moving = operation.bytes / (share * self.memory)
            scattered = operation.scattered * dtype_bits(operation.dtype) / 8
            one_by_one = scattered / (TYPICAL.scattered * self.memory)
            more = TYPICAL.sorting if sorts else TYPICAL.reduction if sums else TYPICAL.indexing * bool(scattered)
            return self.kernel + more + max(moving, one_by_one)
        attention = "attention" in operation.name
        rate = rate_at(self.attention if attention else self.table(operation.dtype), operation.flops)
        share = TYPICAL.attended if attention else SHARES.get(operation.name, TYPICAL.weights)
        return self.kernel + max(operation.flops / rate, operation.bytes / (share * self.memory))

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


# ---------------------------------------------------------------------------------------------------------------------
# Steps


@dataclass(frozen=True)
class StepTime:
    """One step: its seconds, and how long each lane was busy: "python", the devices, their links, "disk", "CPU"."""

    name: str
    seconds: float
    busy: Mapping[str, float]

    @property
    def bottleneck(self) -> str:
        """The lane that was busy longest."""
        return max(self.busy, key=lambda lane: self.busy[lane])


def run_steps(
    operations: Sequence[Operation], steps: Iterable[tuple[str, int]], rates: Mapping[str, Rates],
    spans: list[Span] | None = None, paces: Mapping[str, HostStep] | None = None,
) -> list[StepTime]:  # fmt: skip
    """The time of each step.

    Args:
        operations: in the order in which they are issued.
        steps: (name, number of operations up to its end), in order; the devices are waited for at each end.
        rates: device -> its rates.
        spans: filled with what each lane did, if given.
        paces: name of a step -> the host's pace in it, if it was measured; else that of the rates.

    >>> slow = Rates(1e9, {"float32": ((1.0, 1e9),)}, (), issue=1e-6, kernel=1e-6, link=1e9, peer=1e9, disk=1e9)
    >>> [step] = run_steps([Operation("mm", "cuda:0", 10**9, 0, "float32")], [("prefill", 1)], {"cuda:0": slow})
    >>> round(step.seconds, 3), step.bottleneck
    (1.0, 'cuda:0')
    """
    player = _Player(rates, spans)
    clock = player.clock
    times: list[StepTime] = []
    done = 0
    for name, end in steps:
        begin, before = clock.now, dict(clock.busy)
        player.begin((paces or {}).get(name))
        for operation in operations[done:end]:
            player.play(operation)
        for device in rates:  # but not for links, which may bring what is needed later
            clock.wait(device)
        busy = {lane: seconds - before.get(lane, 0.0) for lane, seconds in clock.busy.items()}
        times.append(StepTime(name, clock.now - begin, busy))
        done = end
    return times


class _Player:
    """Plays operations on a clock: "python", the devices, "copy to" and "experts to" each, "disk" and "CPU"."""

    def __init__(self, rates: Mapping[str, Rates], spans: list[Span] | None) -> None:
        self.rates, self.spans, self.clock = rates, spans, Clock()
        self.clock.busy = dict.fromkeys(("python", *rates), 0.0)
        self.slots: dict[tuple[str, int], SlotState] = defaultdict(SlotState)
        self.pace: HostStep | None = None
        self.seconds: dict[int, float] = {}  # id of an operation -> what it takes: replayed blocks share theirs

    def begin(self, pace: HostStep | None) -> None:
        """Begin a step: what the host does before it calls the model."""
        self.pace = pace
        if pace and pace.before:
            self._note("python", "between two calls", self.clock.occupy("python", pace.before))
            self.clock.wait("python")

    def play(self, operation: Operation) -> None:
        """Issue one operation, and run it when its device and its input are ready."""
        clock, device, rates = self.clock, operation.device, self.rates[operation.device]
        if operation.issued:
            issue = self.pace.issue if self.pace else rates.issue
            self._note("python", operation.name, clock.occupy("python", operation.issued * issue))
            clock.wait("python")
        if operation.name == FILL:
            self._fill(operation)
        elif operation.name == ARRIVE:
            clock.arrive(self.slots[device, operation.slot], device)
        elif operation.name == LEAVE:
            clock.leave(self.slots[device, operation.slot], device)
        elif operation.name == WAIT:
            clock.wait(device)
        elif operation.name in (HOST, CALL):
            self._compute_in_ram(operation)
        else:
            if (seconds := self.seconds.get(id(operation))) is None:
                seconds = self.seconds[id(operation)] = rates.seconds(operation)
            after = clock.free.get(operation.source, 0.0)
            self._note(device, operation.name, clock.occupy(device, seconds, after))

    def _compute_in_ram(self, operation: Operation) -> None:
        """The CPU begins when the device has done all before; who asked for it goes on when it is done."""
        clock, device, rates = self.clock, operation.device, self.rates[operation.device]
        by_graph = operation.name == CALL
        seconds = operation.bytes / rates.reads + (rates.call if by_graph else rates.hop)
        times = clock.occupy("CPU", seconds, clock.free.get(device, 0.0))
        self._note("CPU", operation.unit, times)
        if by_graph:
            clock.free[device] = times[1]
        else:
            clock.now = times[1]

    def _fill(self, operation: Operation) -> None:
        rates, lane = self.rates[operation.device], f"copy to {operation.device}"
        slot = self.slots[operation.device, operation.slot]
        disk = rates.disk if operation.source == "disk" else None
        if disk is not None and operation.in_pieces and rates.pieces:
            disk = rate_at(rates.pieces, operation.bytes)
        before = self.clock.busy.get(lane, 0.0)
        link = rates.link * (TYPICAL.gathered if operation.gathered else 1)
        filling = self.clock.fill(slot, operation.bytes, link, disk, lane)
        if filling.read is not None:
            self._note("disk", operation.unit, filling.read)
        if operation.experts:
            busy, own = self.clock.busy, f"experts to {operation.device}"
            busy[own] = busy.get(own, 0.0) + busy[lane] - before
            busy[lane] = before
            lane = own
        self._note(lane, operation.unit, filling.copied)

    def _note(self, lane: str, name: str, times: tuple[float, float]) -> None:
        if self.spans is not None:
            self.spans.append(Span(lane, name, *times))
