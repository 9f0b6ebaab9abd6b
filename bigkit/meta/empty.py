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

Invariant: a storage is either *waiting* (all its writes are on the tape) or *real* (none is). Two rules keep it. Replay
takes along every step that read an older value of a storage it brings up to date; and before a real tensor changes, the
steps that wait for its present value are replayed.

Leaves out: reading a module as layer records (`skeleton.py`), and filling the parameters afterwards
(`checkpoints/load.py`). Random buffers are right in
distribution but not number for number, since parameters no longer draw from the generator; `nn.init.trunc_normal_` does
not fill them, because torch skips that call on meta. A tensor hidden in an object that is neither a module nor a list,
tuple or dict on one stays on meta. A registered tensor sees later writes through an older reference (`mask[0] = 1`),
but not that reference being turned into something else (`mask.data = other`, `mask.t_()`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, UntypedStorage, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..units import MiB
from ._torch import twin

META = torch.device("meta")
REMEMBER = MiB  # a real tensor that moves to meta keeps its values on the tape up to this size


# ---------------------------------------------------------------------------------------------------------------------
# Building without memory


@contextmanager
def init_empty_weights(include_buffers: bool = False) -> Iterator[None]:
    """Build models inside this block with their parameters on meta: shapes and dtypes, no data.

    Parameters are on meta as they are created, so none is ever allocated, not even for a moment. Ties made in
    `__init__` survive, and so do classes and attributes of custom parameters. Buffers and plain tensor attributes are
    real and hold the values that they would hold anyway. Only models built by this thread are affected.

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
            tape.settle_containers()
        finally:
            tape.targets.pop()


@dataclass(eq=False, slots=True)
class _Step:
    """One call on the tape: what to replay, and which storages it creates or changes.

    `outputs` are the tensors that it made; an initialiser, which fills a tensor, has none. `default` is the default
    dtype of the moment: `torch.zeros(3)` and `integers / 2` depend on it.
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
        return _storages(_tensors((self.args, self.kwargs, self.outputs)))


@dataclass(eq=False)
class _Tape(TorchDispatchMode):
    """Sees every call to torch in its thread, defers what can wait, and computes what is needed."""

    targets: list[tuple[torch.device, bool]] = field(default_factory=list)  # (device, include_buffers), innermost last
    steps: dict[UntypedStorage, list[_Step]] = field(default_factory=dict)
    values: WeakKeyDictionary[UntypedStorage, UntypedStorage] = field(default_factory=WeakKeyDictionary)
    moved: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)  # tensor -> what stands for it now
    parameters: WeakSet[UntypedStorage] = field(default_factory=WeakSet)
    containers: list[tuple[nn.Module, str]] = field(default_factory=list)
    count: int = 0
    off: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first call imports torch._dynamo: one second and 150 MB

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.off or not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        signature, tensors = _signature(func), _tensors((args, kwargs))
        computed = any(map(self.computed, tensors))
        known = computed or any(map(self.waits, tensors))
        if known and signature.is_view:  # same storage, so already on the tape
            return func(*args, **kwargs)
        if computed:
            args, kwargs = _map(self.value, (args, kwargs))
        written = signature.written(args, kwargs)
        can_wait = known or (self.deferring and signature.creates(tensors, kwargs))
        if can_wait and signature.returns_tensors and all(map(self.waits, written)):
            if signature.initialises and len(tensors) == 1:  # its meta kernels are slow to run and to import
                self.record(func, args, kwargs, written, [])
                return written[0]
            try:
                meta_args, meta_kwargs = _map(_to_meta, (args, kwargs)) if tensors else (args, kwargs)
                on_meta = {"device": META} if signature.takes_device else {}
                outputs = func(*meta_args, **{**meta_kwargs, **on_meta})
            except (NotImplementedError, RuntimeError) as error:  # the result depends on values
                if "meta" not in str(error).lower():
                    raise
            else:
                # Pickle and deepcopy make an empty shell and then set its storage, so shells have to be real.
                if known or kwargs.get("device") == META or any(out.numel() > 1 for out in _tensors(outputs)):
                    self.record(func, args, kwargs, written, _tensors(outputs))
                    return outputs
        if self.deferring and kwargs.get("device") == META:
            kwargs["device"] = torch.device("cpu")
        self.compute(tensor.untyped_storage() for tensor in _tensors((args, kwargs)) if self.waits(tensor))
        self.compute((tensor.untyped_storage() for tensor in written if not self.waits(tensor)), readers=True)
        args, kwargs = _map(self.value, (args, kwargs))
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
        if storage is None:
            return tensor
        real = torch.empty(0, dtype=tensor.dtype, device=storage.device)
        real.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
        real = real.conj() if tensor.is_conj() else real
        return torch._neg_view(real) if tensor.is_neg() else real

    def record(self, func: Any, args: Any, kwargs: Any, written: list[Tensor], outputs: list[Tensor]) -> None:
        tensors = _tensors((args, kwargs))
        inputs = _storages(tensors)
        changed = _storages(written) | _storages(outputs) - inputs
        if not changed:
            return
        # The tape keeps aliases: `t.data = other` or `t.t_()` may give the tensor itself another storage or shape.
        if tensors:
            args, kwargs = _map(Tensor.detach, (args, kwargs))
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
        args, kwargs = _map(self.value, (step.args, step.kwargs))
        if kwargs.get("device") == META:  # taken from a parameter (`torch.zeros(3, device=self.weight.device)`)
            kwargs["device"] = torch.device("cpu")
        default = torch.get_default_dtype()
        torch.set_default_dtype(step.default)
        try:
            results = _tensors(step.func(*args, **kwargs))
        finally:
            torch.set_default_dtype(default)
        for deferred, real in zip(step.outputs, results, strict=False):
            storage = deferred.untyped_storage()
            if storage in self.values:
                continue
            if (real.stride(), real.storage_offset()) != (deferred.stride(), deferred.storage_offset()):
                flat = torch.empty(storage.nbytes() // real.itemsize, dtype=real.dtype, device=real.device)
                real = flat.as_strided(deferred.size(), deferred.stride(), deferred.storage_offset()).copy_(real)
            self.values[storage] = real.untyped_storage()
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
        """The same tensor on another device: class, attributes and requires_grad kept, asked twice the same object."""
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

    # What modules tell the tape

    def on_parameter(self, parameter: Tensor) -> Tensor:
        parameter = self.move(parameter, self.targets[-1][0])
        if parameter.layout == torch.strided:
            self.parameters.add(parameter.untyped_storage())
        return parameter

    def on_buffer(self, buffer: Tensor) -> Tensor:
        device, include_buffers = self.targets[-1]
        return self.move(buffer, device) if include_buffers else self.real(buffer)

    def on_attribute(self, module: nn.Module, name: str) -> None:
        value = vars(module).get(name)
        if isinstance(value, (Tensor, tuple)):
            vars(module)[name] = self.settle(value)
        elif isinstance(value, (list, dict)):  # may still grow: looked at when the block ends
            self.containers.append((module, name))

    def settle_containers(self) -> None:
        for module, name in self.containers:
            if name in vars(module):
                self.settle(vars(module)[name])
        self.containers.clear()

    def settle(self, value: Any, around: tuple[int, ...] = ()) -> Any:
        """A plain attribute with its deferred tensors made real, lists and dicts in place."""
        if isinstance(value, Tensor):
            return value if self.mirrors_parameter(value) else self.real(value)
        if not isinstance(value, (tuple, list, dict)) or id(value) in around:  # a list may hold itself
            return value
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        settled = [(key, self.settle(item, (*around, id(value)))) for key, item in items]
        changed = [(key, new) for (key, new), (_, old) in zip(settled, items, strict=True) if new is not old]
        if isinstance(value, tuple):
            made = [item for _, item in settled]
            return value if not changed else type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
        for key, item in changed:
            value[key] = item
        return value

    def mirrors_parameter(self, tensor: Tensor) -> bool:
        """A parameter, a view of one, or computed from one with gradients (old-style weight_norm): it stays on meta."""
        if isinstance(tensor, nn.Parameter) or tensor.grad_fn is not None:
            return True
        return tensor.layout == torch.strided and tensor.untyped_storage() in self.parameters


class _Reads(TorchFunctionMode):
    """The few ways to tensor values that do not pass the dispatcher."""

    def __init__(self, tape: _Tape) -> None:
        self.tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.numpy, Tensor.tolist, Tensor.__array__):
            args = (self.tape.real(args[0]), *args[1:])
        elif func == Tensor.data.__set__ and args[0].is_meta != args[1].is_meta:  # type: ignore[attr-defined]
            target, value = args
            args = (target, self.tape.move(value, META) if target.is_meta else self.tape.real(value))
        return func(*args, **(kwargs or {}))


_here = threading.local()
_lock = threading.Lock()
_undo: list[Callable[[], None]] = []  # one entry while any thread builds on a tape; `_watchers` counts those threads
_watchers = 0


@contextmanager
def _tape_of_this_thread() -> Iterator[_Tape]:
    tape = getattr(_here, "tape", None)
    if tape is not None:
        yield tape
        return
    tape = _here.tape = _Tape()
    try:
        with _modules_watched(), _Reads(tape), tape:
            yield tape
    finally:
        del _here.tape


@contextmanager
def _modules_watched() -> Iterator[None]:
    """Tell the tape of the current thread, if it has one, what modules register; undone when the last thread leaves."""
    global _watchers
    with _lock:
        _watchers += 1
        if _watchers == 1:
            _undo.append(_watch_modules())
    try:
        yield
    finally:
        with _lock:
            _watchers -= 1
            if not _watchers:
                _undo.pop()()


def _watch_modules() -> Callable[[], None]:
    plain_setattr = nn.Module.__setattr__

    def tell(event: Callable[..., Any], subject: Any, *rest: Any) -> Any:
        tape = getattr(_here, "tape", None)
        if tape is None or subject is None:
            return None
        with torch._C.DisableTorchFunction():  # neither `_Reads` nor a parameter's own class shall see what we do
            return event(tape, subject, *rest)

    def on_parameter(module: nn.Module, name: str, parameter: Any) -> Any:
        return tell(_Tape.on_parameter, parameter)

    def on_buffer(module: nn.Module, name: str, buffer: Any) -> Any:
        return tell(_Tape.on_buffer, buffer)

    def set_attribute(module: nn.Module, name: str, value: Any) -> None:
        plain_setattr(module, name, value)
        if isinstance(value, (Tensor, tuple, list, dict)):
            tell(_Tape.on_attribute, module, name)

    hooks = (
        module_hooks.register_module_parameter_registration_hook(on_parameter),
        module_hooks.register_module_buffer_registration_hook(on_buffer),
    )
    nn.Module.__setattr__ = set_attribute  # type: ignore[method-assign, assignment]

    def undo() -> None:
        nn.Module.__setattr__ = plain_setattr  # type: ignore[method-assign]
        for hook in hooks:
            hook.remove()

    return undo


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `function` applied to every tensor in its lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_map(function, item) for item in value])
    if isinstance(value, dict):
        return {key: _map(function, item) for key, item in value.items()}
    return value


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in `value`, in the order of `_map`."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    if isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, (Tensor, list, tuple, dict)):
                found += _tensors(item)
    return found


def _storages(tensors: Iterable[Tensor]) -> set[UntypedStorage]:
    return {tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided}


def _to_meta(tensor: Tensor) -> Tensor:
    if tensor.is_meta or tensor.layout != torch.strided:
        return tensor
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=META)


class _Signature:
    """What the schema of an operation says about it, and about a call of it."""

    def __init__(self, func: Any) -> None:
        schema = func._schema
        arguments = list(enumerate(schema.arguments))  # `writes`: those that it changes in place
        self.writes = [(i, arg.name) for i, arg in arguments if arg.alias_info and arg.alias_info.is_write]
        self.takes_device = any(argument.name == "device" for argument in schema.arguments)
        self.returns_tensors = any("Tensor" in str(result.type) for result in schema.returns)
        self.is_view = any(result.alias_info and not result.alias_info.is_write for result in schema.returns)
        self.only_shape = schema.name.endswith("_like") or schema.name.startswith("aten::new_")
        random = schema.name.endswith("_") and torch.Tag.nondeterministic_seeded in func.tags
        self.initialises = random or schema.name in ("aten::fill_", "aten::zero_")

    def written(self, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors that a call changes in place."""
        return _tensors([args[i] if i < len(args) else kwargs.get(name) for i, name in self.writes])

    def creates(self, tensors: list[Tensor], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call makes a tensor without looking at any values, or moves one to meta."""
        if not self.takes_device or kwargs.get("layout") not in (None, torch.strided):
            return False
        return self.only_shape or kwargs.get("device") == META or not tensors


@cache
def _signature(func: Any) -> _Signature:
    return _Signature(func)
