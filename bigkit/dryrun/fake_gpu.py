"""Fake GPUs: PyTorch code runs on `cuda:0`, `cuda:1`, ... that do not exist, and every byte and operation is noted.

Three layers, from the outside in:

    FakeTensors        PyTorch's own: tensors have shapes, dtypes and devices, but no data
    AttentionChoice    sends scaled_dot_product_attention to the kernel that the imagined GPU would choose
    OperationLog       follows each storage from the operation that makes it to the moment its last tensor dies, and
                       notes what each operation computes and moves

Works with CUDA builds of PyTorch on machines without a GPU, and on Linux with any build: PyTorch is lent a device guard
that does nothing meanwhile, so no other thread should switch between real GPUs. Inference only.

Leaves out: what a run costs (`costs.py`, `run.py`), values (what depends on them raises PyTorch's
DataDependentOutputException), and memory that kernels take for themselves unless `kernel_workspaces` knows it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..machine.allocator import Recording
from ..machine.roofline import WAIT, Operation
from ..units import MiB
from ._torch import (
    ASK_DEVICE,
    ATTENTION,
    GROUPED_MM,
    QUESTIONS,
    FakeTensor,
    FakeTensors,
    TorchDispatchMode,
    aten,
    fake_device,
    lent_gpus,
    packet_of,
    storage_key,
    without_modes,
)
from .attention import AttentionChoice, Call, Target
from .costs import PRODUCTS, cost_of, dense_bytes, device_of, kernel_workspaces, tensors_in
from .splice import Attended, layout_of
from .values import KnownValues

FILLS = (aten.masked_fill, aten.masked_fill_)
COMPOSITE = (aten.linear.default, aten.matmul.default)  # reach a mode whole where a library's own operation calls them


@dataclass
class Trace:
    """What a fake run did.

    Args:
        recordings: device -> what was asked of its allocator.
        kinds: device -> what each request was for, such as "weights", in order.
        operations: all operations, in order.
        steps: (name of a step, number of operations up to its end).
        pool, pools: from which pool requests are served, 0 outside of CUDA graphs; and how many of those there are.
        unissued: steps that Python took since it launched the last kernel: modules called, operations issued.
        expert_hits: chosen experts that were on a GPU already, and that were brought, if some may stay there.
        alike: GPUs on which the same would be done, of those that were asked for.
        workspaces: device -> the numbers of the requests by which cuBLAS took workspaces.
        attended, but_attention: where each call of attention lies, in order; and GPUs on which the same would be done
            but in these calls.
    """

    recordings: dict[str, Recording] = field(default_factory=dict)
    kinds: dict[str, list[str]] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)
    steps: list[tuple[str, int]] = field(default_factory=list)
    pool: int = 0
    pools: int = 0
    unissued: int = 0
    expert_hits: tuple[int, int] = (0, 0)
    alike: set[Target] = field(default_factory=set)
    workspaces: dict[str, list[int]] = field(default_factory=dict)
    attended: list[Attended] = field(default_factory=list)
    but_attention: set[Target] = field(default_factory=set)

    def mark(self, name: str) -> None:
        """Note the end of a step, on every device and among the operations."""
        for recording in self.recordings.values():
            recording.marks.append((name, len(recording.events)))
        self.steps.append((name, len(self.operations)))

    def only_where(self, same: Callable[[Target], bool]) -> None:
        """Something holds of the target that others may not share: keep, in both sets, those that do."""
        for others in (self.alike, self.but_attention):
            others.intersection_update([*filter(same, others)])

    def lengths(self, device: str) -> tuple[int, int, int, int]:
        """Events and requests of a device, and operations so far; steps that Python took since the last kernel."""
        recording, kinds = self.recordings[device], self.kinds[device]
        return len(recording.events), len(kinds), len(self.operations), self.unissued

    def request(self, device: str, size: int, kind: str) -> int:
        """Note a request; returns its number on the device, from 1."""
        recording = self.recordings.setdefault(device, Recording())
        kinds = self.kinds.setdefault(device, [])
        recording.events.append(size)
        if self.pool:
            recording.streams += [0] * (len(kinds) - len(recording.streams)) + [self.pool]
        elif recording.streams:
            recording.streams.append(0)
        kinds.append(kind)
        return len(kinds)

    def free(self, device: str, number: int) -> None:
        """Note that a request's memory is free again."""
        self.recordings[device].events.append(-number)

    def add(self, operation: Operation) -> None:
        """Note an operation, for which Python also took the steps since the last one."""
        self.operations.append(replace(operation, issued=operation.issued + self.unissued))
        self.unissued = 0


class OperationLog(TorchDispatchMode):
    """Follows storages on fake GPUs, and counts operations.

    Args:
        trace: where everything is noted.
        target: the GPU that is imagined.
        fakes: makes tensors without data.

    `kind` says what new storages are for; while it is "weights", no operations are noted. `between_calls` is True while
    no module of the model runs: then a value that is asked for and not known is answered with 0, as "no, not finished".
    """

    def __init__(self, trace: Trace, target: Target, fakes: FakeTensors) -> None:
        super().__init__()
        self.trace, self.target, self.fakes = trace, target, fakes
        self.kind = "activations"
        self.live: dict[int, tuple[str, int, weakref.ref[Any]]] = {}  # storage -> device, request, the storage itself
        self.warm: set[Any] = set()  # devices whose first matrix product has been, and kinds of products
        self.quiet = self.between_calls = False
        self.overlooks = False  # whether some storages are RAM that a GPU reads
        self.values = KnownValues()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is ASK_DEVICE.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        if self.quiet:
            return func(*args, **kwargs)
        if func in COMPOSITE:
            with self:
                return func.decompose(*args, **kwargs)
        if func in QUESTIONS and (known := self._answer(func, args)) is not None:
            return known
        if packet_of(func) in FILLS and isinstance(args[2], Tensor) and args[2].is_cuda and self.kind != "weights":
            self.wait(fake_device(args[2]))  # PyTorch asks the GPU for the value
        inputs = [*tensors_in(args), *tensors_in(kwargs.values())]
        copied = self._copy_for_norm(func, args)
        result = self._run(func, args, kwargs)
        if self.kind != "weights":
            self.values.follow(func, args, kwargs, result)
            if self.between_calls and packet_of(func) is aten.argmax:
                self.values.take_for(result, 0)  # the token that is chosen
        outputs = list(tensors_in((result,)))
        if packet_of(func) is ATTENTION["cudnn"] and not args[4]:
            outputs = outputs[:1]  # the log-sum-exp that the fake kernel gives is not computed without gradients
        for tensor in outputs:
            self.see(tensor)
        if device := device_of(outputs, inputs):
            self.take_workspace(device, func, args, outputs)
            if copied:
                self.trace.free(device, copied)
        if self.kind != "weights":
            self.trace.unissued += 1
            if operation := cost_of(func, args, kwargs, inputs, outputs, result):
                if self.overlooks and any(map(self._is_overlooked, inputs)):
                    operation = replace(operation, bytes=0)  # what is read comes over the link, which is noted there
                self.trace.add(operation)
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if packet_of(func) is GROUPED_MM and args[0].dtype != torch.bfloat16:  # 2.11 has fake ones of this dtype alone
            with self.silent(), self:
                return func(args[0].bfloat16(), args[1].bfloat16(), *args[2:], **kwargs).to(args[0].dtype)
        return func(*args, **kwargs)

    def _answer(self, question: Any, tensors: Sequence[Tensor]) -> Any:
        """What Python asks for; None if nobody knows it."""
        answer = self.values.answer(question, tensors)
        if answer is None and self.between_calls:
            answer = 0
        if answer is not None and tensors[0].is_cuda and self.kind != "weights":
            self.wait(fake_device(tensors[0]))
        return answer

    def _copy_for_norm(self, func: Any, args: Any) -> int:
        """A layer norm first copies what does not lie in one piece: the number of that request, or 0."""
        if func is not aten.native_layer_norm.default or not args[0].is_cuda or args[0].is_contiguous():
            return 0
        return self.trace.request(str(fake_device(args[0])), dense_bytes(args[0]), "workspace")

    def take_workspace(self, device: str, func: Any, args: Any, outputs: Sequence[Tensor]) -> None:
        """Note what libraries take: for good at the first product, or for the time of one operation."""
        if self.target.workspace:
            if packet_of(func) in PRODUCTS and device not in self.warm:
                self.warm.add(device)
                number = self.trace.request(device, self.target.workspace, "workspace")
                self.trace.workspaces.setdefault(device, []).append(number)
            if func is aten.addmm.default and args[0].dim() == 1 and (device, func) not in self.warm:
                self.warm.add((device, func))
                self.trace.request(device, MiB, "workspace")  # of cuBLASLt, which adds the bias on the way
        numbers = [self.trace.request(device, size, "workspace") for size in kernel_workspaces(func, args, outputs)]
        for number in numbers:
            self.trace.free(device, number)

    def see(self, tensor: Tensor) -> None:
        """Note a storage that was not seen before."""
        if not tensor.is_cuda or storage_key(tensor) in self.live:
            return
        if size := tensor.untyped_storage().nbytes():
            device = str(fake_device(tensor))
            self.follow(tensor, device, self.trace.request(device, size, self.kind))

    def follow(self, tensor: Tensor, device: str, number: int) -> None:
        """Note when the storage of a tensor, which is the request of this number, is free."""
        key = storage_key(tensor)

        def gone(_: object, live: Any = self.live, trace: Trace = self.trace) -> None:
            if live.pop(key, None):
                trace.free(device, number)

        self.live[key] = device, number, weakref.ref(tensor.untyped_storage(), gone)

    def parameter(self, empty: Tensor, device: torch.device) -> nn.Parameter:
        """A fake parameter like an empty tensor, on a device; the dispatcher, which takes a while, is not asked."""
        with without_modes():
            made: Any = self.fakes.on(device, torch.empty(empty.shape, dtype=empty.dtype, device="meta"))
            self.see(made)
        made._is_param = True  # as of one that nn.Parameter makes
        return cast(nn.Parameter, made)

    def overlook(self, tensor: Tensor) -> None:
        """Count the storage of a tensor not as memory of a GPU: it is RAM that the GPU reads."""
        self.overlooks, key, live = True, storage_key(tensor), self.live
        live[key] = "", 0, weakref.ref(tensor.untyped_storage(), lambda _: live.pop(key, None))

    def _is_overlooked(self, tensor: Tensor) -> bool:
        return self.live.get(storage_key(tensor), ("cpu",))[0] == ""

    def label(self, tensor: Tensor, kind: str) -> None:
        """Say what the storage of a tensor is for."""
        if tensor.is_cuda and (entry := self.live.get(storage_key(tensor))):
            device, number, _ = entry
            self.trace.kinds[device][number - 1] = kind

    def attend(self, query: Tensor, call: Call, run: Callable[[], Tensor]) -> Tensor:
        """Run a call of attention, and note where it lies, unless it leaves more behind than its result.

        Nor before a device's first product: other kernels of attention may be that product, and take its workspace.
        """
        trace, device = self.trace, str(fake_device(query))
        cold = self.target.workspace > 0 and device not in self.warm
        event, request, operation, before = trace.lengths(device)
        out = run()
        events, requests, operations, after = trace.lengths(device)
        own, result = trace.recordings[device].events[event:], self.live[storage_key(out)][1]
        freed = {-number for number in own if number < 0}
        if cold or min(freed, default=requests) <= request or {*range(request + 1, requests + 1)} - freed != {result}:
            trace.but_attention.clear()
            return out
        place = event, request, operation, events - event, requests - request, operations - operation
        trace.attended.append(Attended(device, call, layout_of(out), *place, result - request, before, after))
        return out

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Note nothing meanwhile."""
        self.quiet = True
        try:
            yield
        finally:
            self.quiet = False

    def wait(self, device: torch.device) -> None:
        """Note that Python asks for a value, and waits for the device to know it."""
        self.trace.add(Operation(WAIT, str(device), 0, 0, "bool"))

    @contextmanager
    def following_calls(self, model: nn.Module) -> Iterator[None]:
        """Know meanwhile whether a call of the model is under way, or its caller works (`between_calls`)."""

        def note(between: bool) -> None:
            self.between_calls = between

        note(True)
        hooks = [
            model.register_forward_pre_hook(lambda *_: note(False), prepend=True),
            model.register_forward_hook(lambda *_: note(True)),
        ]
        try:
            yield
        finally:
            note(False)
            for hook in hooks:
                hook.remove()

    def capability(self) -> tuple[int, int]:
        """The target's compute capability, for which a model's code asks: others may do something else then."""
        self.trace.only_where(lambda other: other.capability == self.target.capability)
        return self.target.capability

    def call(self, *_: Any) -> None:
        """Note that a module is called."""
        self.trace.unissued += self.kind != "weights"


@contextmanager
def fake_gpus(target: Target = Target(), others: Iterable[Target] = ()) -> Iterator[OperationLog]:
    """Run the block on fake GPUs; tensors made in it have no data. Yields what notes the run.

    Args:
        target: the GPU that is imagined.
        others: GPUs of which `Trace.alike` is to say whether the same would be done on them.

    Raises:
        RuntimeError: this build of PyTorch has no CUDA device guard, and cannot be lent one.

    >>> with fake_gpus() as log:
    ...     a = torch.empty(1000, 1000, device="cuda:3")
    ...     b = a @ a
    >>> log.trace.recordings["cuda:3"].events, log.trace.operations[-1].flops
    ([4000000, 4000000, 33554432], 2000000000)
    """
    among = {target, *others}
    log = OperationLog(Trace(alike=among, but_attention={*among}), target, FakeTensors(allow_non_fake_inputs=True))
    with ExitStack() as stack:
        stack.callback(nn.modules.module.register_module_forward_pre_hook(log.call).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(lent_gpus(log.capability))
        stack.enter_context(log.fakes)
        stack.enter_context(AttentionChoice(target, log.trace.alike, log.attend))
        stack.enter_context(log)
        yield log
