"""Models without memory: build any `nn.Module` with its parameters on the meta device.

A meta tensor has a shape and a dtype but no data. `with torch.device("meta")` would be enough for parameters, but it
also loses the values of buffers (rotary frequencies, position indices, masks), and those are in no checkpoint. While a
model is being built nobody can know which tensor will become a parameter and which a buffer: `torch.ones(n)` may end as
either. So `init_empty_weights` postpones the decision:

1. Every factory call (`torch.empty`, `zeros`, `arange`, `randn`, ...) returns a meta tensor, and what is done to it is
   written on a *tape*: one step for each call that created or changed a storage. Views need no step: tensors are found
   by their storage, and a view is only an offset, a size and strides into one. Meta kernels tell shapes and dtypes of
   results; an in-place initialiser (`normal_`, `fill_`, ...) changes neither, so its step is written and nothing run.
2. A tensor that becomes a parameter simply stays on meta. Nothing was ever allocated for it.
3. A tensor whose values are needed (it is registered as a buffer or set as an attribute, read by `.item()` or
   `.tolist()`, written into a real tensor, given to an operation that meta cannot do) is computed then: the steps that
   led to it, and only those, are replayed for real. From there on the real storage stands for the deferred one.
4. When the outermost block ends, every deferred tensor that is still alive elsewhere (in a cache, a closure, a
   dataclass) becomes real, as the object that it is; else a later model would get a meta tensor from that cache.

Invariant: a storage is either *waiting* (all its writes are on the tape) or *real* (none is). Two rules keep it. Replay
takes along every step that read an older value of a storage it brings up to date; and before a real tensor changes, the
steps that wait for its present value are replayed.

The wing's page (`__init__.py`) has a naive version, and says what it gets wrong.
Leaves out: reading a module as layer records (`skeleton.py`), and filling the parameters afterwards
(`checkpoints/load.py`). Random buffers are right in distribution but not number for number, since parameters no longer
draw from the generator; `nn.init.trunc_normal_` does not fill them, because torch skips that call on meta. A registered
tensor sees later writes through an older reference (`mask[0] = 1`), but not that reference being turned into something
else (`mask.data = other`, `mask.t_()`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, UntypedStorage, nn
from torch.overrides import TorchFunctionMode
from torch.utils import swap_tensors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..units import MiB
from ._torch import is_operation, laid_out_like, view_like, watch_modules
from ._torch import twin as twin
from .operations import META, Signature, map_tensors, replace_tensors, signature_of, storages_of, tensors_in, to_meta
from .origin import from_weights

REMEMBER = MiB  # bytes: a real tensor up to this size that moves to meta keeps its values on the tape


# ---------------------------------------------------------------------------------------------------------------------
# Building without memory


@contextmanager
def init_empty_weights(include_buffers: bool = False) -> Iterator[None]:
    """Build models inside this block with their parameters on meta: shapes and dtypes, no data.

    Parameters are on meta as they are created, so none is ever allocated, not even for a moment. Ties made in
    `__init__` survive, and so do classes and attributes of custom parameters. Buffers and plain tensor attributes are
    real and hold the values that they would hold anyway, and so does any other tensor made in the block that outlives
    it (in an `lru_cache`, a closure, a dataclass), unless it was asked for with `device="meta"`. Only models built by
    this thread are affected.

    Args:
        include_buffers: put buffers on meta too; their values are lost.

    >>> with init_empty_weights():
    ...     model = nn.Sequential(nn.Linear(100_000, 100_000), nn.BatchNorm1d(100_000))  # 40 GB, were it real
    >>> model[0].weight.device, model[1].running_var.sum()
    (device(type='meta'), tensor(100000.))
    """
    with init_on_device(META, include_buffers):
        yield


@contextmanager
def init_on_device(device: torch.device | str | int, include_buffers: bool = False) -> Iterator[None]:
    """Build models inside this block with their parameters on `device`.

    On a real device a parameter moves there when it is registered; what initialises it later runs there. For "meta" see
    `init_empty_weights`. Blocks may be nested; the innermost one counts.

    Args:
        device: where parameters go: "cuda:0", "cpu", "meta", ...
        include_buffers: put buffers there as well; otherwise they stay where the model's own code makes them.

    >>> with init_on_device("cpu"):
    ...     layer = nn.Linear(2, 3)
    >>> layer.weight.shape
    torch.Size([3, 2])
    """
    with _tape_of_this_thread() as tape:
        tape.targets.append((torch.device(device), bool(include_buffers)))
        try:
            yield
        finally:
            if len(tape.targets) == 1:
                tape.settle_survivors()
            tape.targets.pop()


@dataclass(eq=False, slots=True)
class _Step:
    """One call on the tape.

    Args:
        number: its place in the order of calls.
        func, args, kwargs: the call.
        outputs: the tensors that it returned; none for an initialiser, which fills a tensor.
        written: the storages that it creates or changes.
        default: the default dtype of the moment, which `integers / 2` takes.
        done: whether it has been replayed.
    """

    number: int
    func: Callable[..., Any]
    args: Any
    kwargs: dict[str, Any]
    outputs: list[Tensor]
    written: set[UntypedStorage]
    default: torch.dtype
    done: bool = False

    @property
    def touched(self) -> set[UntypedStorage]:
        """Every storage that it reads, creates or changes."""
        return storages_of(tensors_in((self.args, self.kwargs, self.outputs)))

    def in_its_dtype(self, tensor: Tensor) -> Tensor:
        """An argument, cast to the dtype of the result where that followed from a default dtype which is another now.

        The default dtype belongs to the whole process, so it is not set back for a replay.
        """
        if self.default == torch.get_default_dtype() or not self.outputs:
            return tensor
        result = self.outputs[0].dtype
        dtypes = [result, *(other.dtype for other in tensors_in((self.args, self.kwargs)))]
        inexact = [dtype for dtype in dtypes if dtype.is_floating_point or dtype.is_complex]
        return tensor.to(result) if inexact == [result] else tensor


@dataclass(eq=False)
class _Tape(TorchDispatchMode):
    """Sees every call to torch in its thread, defers what can wait, and computes what is needed.

    Args:
        targets: (device, include_buffers) of each block, the innermost last.
        steps: storage -> the steps that touch it, in order, while it waits.
        values: storage on meta -> the real one that stands for it.
        moved: tensor -> what was registered in its place.
        parameters: storages that stay on meta: those of parameters, and of buffers with `include_buffers`.
        made: the deferred tensors that the model's code was given.
        count: steps so far.
        off: whether calls pass through, because they are the tape's own.
    """

    targets: list[tuple[torch.device, bool]] = field(default_factory=list)
    steps: dict[UntypedStorage, list[_Step]] = field(default_factory=dict)
    values: WeakKeyDictionary[UntypedStorage, UntypedStorage] = field(default_factory=WeakKeyDictionary)
    moved: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    parameters: WeakSet[UntypedStorage] = field(default_factory=WeakSet)
    made: list[ref[Tensor]] = field(default_factory=list)
    count: int = 0
    off: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first call imports torch._dynamo: one second and 150 MB

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.off or not is_operation(func):
            return func(*args, **kwargs)
        signature, tensors = signature_of(func), tensors_in((args, kwargs))
        known = any(self.waits(tensor) or self.computed(tensor) for tensor in tensors)
        if known and signature.is_view:  # same storage, so already on the tape
            return func(*args, **kwargs)
        if known:
            args, kwargs = map_tensors(self.value, (args, kwargs))
        if known or (self.deferring and signature.creates(tensors, kwargs)):
            outputs = self.defer(func, signature, args, kwargs, known)
            if outputs is not None:
                return outputs
        return self.run(func, signature, args, kwargs)

    def defer(self, func: Any, signature: Signature, args: Any, kwargs: dict[str, Any], known: bool) -> Any:
        """Write a call on the tape; what it returns, on meta, or None if it has to run now.

        Args:
            known: whether any of its arguments is on the tape.
        """
        written, tensors = signature.written(args, kwargs), tensors_in((args, kwargs))
        if not signature.returns_tensors or not all(map(self.waits, written)):
            return None
        if signature.initialises and len(tensors) == 1:  # its meta kernels are slow to run and to import
            self.record(func, args, kwargs, written, [])
            return written[0]
        meta_args, meta_kwargs = map_tensors(to_meta, (args, kwargs)) if tensors else (args, kwargs)
        on_meta = {"device": META} if signature.takes_device else {}
        try:
            outputs = func(*meta_args, **{**meta_kwargs, **on_meta})
        except (NotImplementedError, RuntimeError) as error:
            if "meta" not in str(error).lower():
                raise
            return None  # the result depends on values
        results = tensors_in(outputs)
        # Pickle and deepcopy make an empty shell and then set its storage, so shells have to be real.
        if not known and kwargs.get("device") != META and all(result.numel() <= 1 for result in results):
            return None
        if results and signature.takes_dtype:  # the default dtype may be another when it is replayed
            kwargs = {**kwargs, "dtype": results[0].dtype}
        self.record(func, args, kwargs, written, results)
        return outputs

    def run(self, func: Any, signature: Signature, args: Any, kwargs: dict[str, Any]) -> Any:
        """Make a call now, after computing what it reads and what waits for the values that it overwrites."""
        if self.deferring and kwargs.get("device") == META:
            kwargs["device"] = torch.device("cpu")
        written = signature.written(args, kwargs)
        self.compute(tensor.untyped_storage() for tensor in tensors_in((args, kwargs)) if self.waits(tensor))
        self.compute((tensor.untyped_storage() for tensor in written if not self.waits(tensor)), readers=True)
        args, kwargs = map_tensors(self.value, (args, kwargs))
        return func(*args, **kwargs)

    @property
    def deferring(self) -> bool:
        return bool(self.targets) and self.targets[-1][0] == META

    def waits(self, tensor: Tensor) -> bool:
        """Whether the values of this meta tensor are known to the tape but not computed yet."""
        return tensor.is_meta and tensor.layout == torch.strided and tensor.untyped_storage() in self.steps

    def computed(self, tensor: Tensor) -> bool:
        """Whether a real storage stands for the one of this meta tensor."""
        return tensor.is_meta and tensor.layout == torch.strided and tensor.untyped_storage() in self.values

    def value(self, tensor: Tensor) -> Tensor:
        """The real tensor that stands for a deferred one; any other tensor as it is."""
        if not tensor.is_meta or tensor.layout != torch.strided:
            return tensor
        storage = self.values.get(tensor.untyped_storage())
        return tensor if storage is None else view_like(tensor, storage)

    def record(self, func: Any, args: Any, kwargs: Any, written: list[Tensor], outputs: list[Tensor]) -> None:
        tensors = tensors_in((args, kwargs))
        inputs = storages_of(tensors)
        changed = storages_of(written) | storages_of(outputs) - inputs
        if not changed:
            return
        # The tape keeps aliases: `t.data = other` or `t.t_()` may give the tensor itself another storage or shape.
        if tensors:
            args, kwargs = map_tensors(Tensor.detach, (args, kwargs))
        outputs = [output.detach() for output in outputs]
        self.count += 1
        step = _Step(self.count, func, args, kwargs, outputs, changed, torch.get_default_dtype())
        for storage in inputs | changed:
            self.steps.setdefault(storage, []).append(step)

    def compute(self, storages: Iterable[UntypedStorage], readers: bool = False) -> None:
        """Replay the steps that lead to these storages; with `readers` also those that only wait for their values."""
        queue = deque((storage, readers) for storage in storages)
        replay: set[_Step] = set()
        reading: dict[UntypedStorage, list[_Step]] = {}
        while queue:
            storage, whole = queue.popleft()
            steps = [step for step in self.steps.pop(storage, []) if not step.done]
            writes = [i for i, step in enumerate(steps) if storage in step.written]
            end = len(steps) if whole else writes[-1] + 1 if writes else 0
            reading[storage] = reading.get(storage, []) + steps[end:]
            fresh = set(steps[:end]) - replay
            replay |= fresh
            queue += [(other, False) for step in fresh for other in step.touched]
        with self.switched_off():
            for step in sorted(replay, key=lambda step: step.number):
                self.replay(step)
        for storage, steps in reading.items():
            if steps := [step for step in steps if not step.done]:
                self.steps.setdefault(self.values.get(storage, storage), []).extend(steps)

    def replay(self, step: _Step) -> None:
        args, kwargs = map_tensors(lambda tensor: step.in_its_dtype(self.value(tensor)), (step.args, step.kwargs))
        if kwargs.get("device") == META:  # taken from a parameter (`torch.zeros(3, device=self.weight.device)`)
            kwargs["device"] = torch.device("cpu")
        results = tensors_in(step.func(*args, **kwargs))
        for deferred, real in zip(step.outputs, results, strict=False):
            storage = deferred.untyped_storage()
            if storage not in self.values:
                self.values[storage] = laid_out_like(deferred, real).untyped_storage()
        step.done, step.args, step.kwargs, step.outputs = True, (), {}, []

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        before, self.off = self.off, True
        try:
            with torch.no_grad():
                yield
        finally:
            self.off = before

    def real(self, tensor: Tensor) -> Tensor:
        """The same tensor with its values: computed when it waits, unchanged when it is real or unknown to the tape."""
        if not tensor.is_meta or tensor.layout != torch.strided:
            return tensor
        if tensor not in self.moved:
            self.compute([tensor.untyped_storage()])
            with self.switched_off():
                real = self.value(tensor)
            if real is tensor:
                return tensor
            self.moved[tensor] = twin(tensor, real)
        return self.moved[tensor]

    def move(self, tensor: Tensor, device: torch.device) -> Tensor:
        """The same tensor on another device, with its class, attributes and requires_grad; each call gives this one."""
        if tensor.is_meta or tensor.device == device:
            return tensor
        if tensor not in self.moved:
            data = tensor.data
            if data.nbytes > REMEMBER:
                with self.switched_off():
                    data = data.to(device)
            data = data.to(device)
            if data.device == tensor.device:  # "cuda" and "cuda:0"
                return tensor
            self.moved[tensor] = twin(tensor, data)
        return self.moved[tensor]

    def on_parameter(self, parameter: Tensor) -> Tensor:
        return self.stay(self.move(parameter, self.targets[-1][0]))

    def stay(self, tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            self.parameters.add(tensor.untyped_storage())
        return tensor

    def on_buffer(self, buffer: Tensor) -> Tensor:
        device, include_buffers = self.targets[-1]
        return self.stay(self.move(buffer, device)) if include_buffers else self.real(buffer)

    def on_attribute(self, module: nn.Module, name: str) -> None:
        value = vars(module).get(name)
        if isinstance(value, (Tensor, tuple)):  # lists and dicts may still grow: their tensors are survivors
            vars(module)[name] = replace_tensors(self.settled, value)

    def settle_survivors(self) -> None:
        """Make the deferred tensors real that outlive the block: the same objects, with the values that they stand for.

        A view goes before the tensor that it views, which can only be changed when nothing in torch refers to it.
        """
        alive = {id(own): own for made in self.made if (own := made()) is not None and not from_weights(own, self)}
        real = {key: self.settled(tensor) for key, tensor in alive.items()}
        self.made.clear()
        self.moved.clear()  # no tensor with a weak reference can be swapped
        with self.switched_off():
            for key, tensor in reversed(alive.items()):
                if real[key] is not tensor:
                    with suppress(RuntimeError):  # somebody else's weak reference: it stays on meta
                        swap_tensors(tensor, twin(tensor, real[key].detach()))

    def settled(self, tensor: Tensor) -> Tensor:
        """A plain attribute, made real unless it mirrors a parameter: is one, views one, is computed with gradients."""
        mirrors = isinstance(tensor, nn.Parameter) or tensor.grad_fn is not None  # as in old-style weight_norm
        mirrors = mirrors or (tensor.layout == torch.strided and tensor.untyped_storage() in self.parameters)
        return tensor if mirrors else self.real(tensor)


class _Calls(TorchFunctionMode):
    """Sees what the dispatcher does not: other ways to tensor values, and the tensors that callers are given."""

    def __init__(self, tape: _Tape) -> None:
        self.tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.numpy, Tensor.tolist, Tensor.__array__):
            args = (self.tape.real(args[0]), *args[1:])
        elif func == Tensor.data.__set__ and args[0].is_meta != args[1].is_meta:  # type: ignore[attr-defined]
            target, value = args
            args = (target, self.tape.move(value, META) if target.is_meta else self.tape.real(value))
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.tape.deferring and str(kwargs.get("device")) != "meta":
            self.tape.made += [ref(tensor) for tensor in tensors_in(result) if tensor.is_meta]
        return result


_here = threading.local()  # `tape`: the tape of this thread, while it builds
_lock = threading.Lock()
_tapes: list[_Tape] = []  # of all threads; while there is one, modules are watched
_unwatch: list[Callable[[], None]] = []  # what ends that


@contextmanager
def _tape_of_this_thread() -> Iterator[_Tape]:
    if (current := getattr(_here, "tape", None)) is not None:
        yield current
        return
    tape = _here.tape = _Tape()
    with _lock:
        if not _tapes:
            _unwatch.append(watch_modules(lambda: getattr(_here, "tape", None)))
        _tapes.append(tape)
    try:
        with _Calls(tape), tape:
            yield tape
    finally:
        del _here.tape
        with _lock:
            _tapes.remove(tape)
            if not _tapes:
                _unwatch.pop()()
