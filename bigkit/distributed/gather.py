"""One script on 1, 2 or N processes: each takes its share of the inputs, and the results come back whole and in order.

    state = PartialState()                                   # who am I, and on which device?
    with state.split_between_processes(prompts) as mine:     # 3 prompts on 2 processes: 2 + 1
        answers = [model(prompt) for prompt in mine]
    answers = gather_for_results(answers, len(prompts))      # all of them, in the order of prompts, on every process

Start it with `bigkit launch script.py`, torchrun or `notebook_launcher`; with plain `python` it is one process. Every
process must hold the same inputs and reach the same calls. gloo carries CPU tensors and objects, nccl CUDA tensors.

Leaves out: training (gradients, samplers, mixed precision), splitting one model over processes, and starting processes
(`distributed/launch.py`, `distributed/notebook.py`). Processes started by MPI or Slurm alone are not recognised; start
torchrun from there.
"""

from __future__ import annotations

import atexit
import copy
import hashlib
import os
import pickle
import re
import sys
import threading
import time
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .shares import padded_length, share

T = TypeVar("T")
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets, and `env://` reads
USE_CPU = "BIGKIT_USE_CPU"  # set by `bigkit launch --cpu`


class ProcessLost(RuntimeError):
    """Another process ended, or did not come to the same call in time."""


# ---------------------------------------------------------------------------------------------------------------------
# Who am I?


class PartialState:
    """This process among all that were started together. Unlaunched it is the only one, number 0 of 1.

    The first one made in a launched process joins the others (`torch.distributed.init_process_group`); later ones are
    views of the same group, also of one that you initialised yourself.

    Args:
        cpu: stay on the CPU although there are GPUs.
        timeout: how long a call waits for the others, in seconds or as a `timedelta`; that of the first one counts.

    Attributes:
        num_processes: all processes on all hosts (the world size).
        process_index: this one's number among them (its rank).
        local_process_index: its number on this host (its local rank).
        device: `cuda:<local_process_index>`, or the CPU.

    Raises:
        RuntimeError: the variables of a launch are incomplete, or there are more processes than GPUs on this host.
        ProcessLost: the others did not come in time.

    >>> state = PartialState(cpu=True)
    >>> state.process_index, state.num_processes, state.device, state.is_main_process
    (0, 1, device(type='cpu'), True)
    """

    def __init__(self, cpu: bool = False, *, timeout: float | timedelta = 1800) -> None:
        cpu = cpu or os.environ.get(USE_CPU, "").lower() in ("1", "true", "yes")
        cuda = not cpu and torch.cuda.is_available()
        if _launched() and not dist.is_initialized():
            _join(cuda, timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout))
        joined = dist.is_initialized()
        self.num_processes: int = dist.get_world_size() if joined else 1
        self.process_index: int = dist.get_rank() if joined else 0
        self.local_process_index: int = _local_rank(self.process_index) if joined else 0
        if joined:
            cuda = not cpu and "nccl" in dist.get_backend_config()
        self.device = torch.device("cuda", self.local_process_index) if cuda else torch.device("cpu")

    @property
    def is_main_process(self) -> bool:
        """Whether this is process 0 of all."""
        return self.process_index == 0

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is process 0 of its host."""
        return self.local_process_index == 0

    @property
    def is_last_process(self) -> bool:
        """Whether this is the process with the highest number."""
        return self.process_index == self.num_processes - 1

    def wait_for_everyone(self) -> None:
        """Go on when every process has come to this call.

        Raises:
            ProcessLost: another one ended, or did not come in time.
        """
        if _grouped("wait_for_everyone"):
            with together("wait_for_everyone"):
                dist.barrier()

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Let process 0 run the block before all others do: it downloads, they find the files."""
        yield from self._first(self.is_main_process)

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """Let process 0 of each host run the block before the others."""
        yield from self._first(self.is_local_main_process)

    def _first(self, mine: bool) -> Iterator[None]:
        if not mine:
            self.wait_for_everyone()
        try:
            yield
        finally:  # an error in the block must not leave the others waiting
            if mine:
                self.wait_for_everyone()

    def on_main_process(self, function: Callable[..., T]) -> Callable[..., T | None]:
        """Decorator: the function runs on process 0; on the others it does nothing and returns None."""
        return self._only(self.is_main_process, function)

    def on_local_main_process(self, function: Callable[..., T]) -> Callable[..., T | None]:
        """Decorator: the function runs on process 0 of each host."""
        return self._only(self.is_local_main_process, function)

    def on_last_process(self, function: Callable[..., T]) -> Callable[..., T | None]:
        """Decorator: the function runs on the process with the highest number."""
        return self._only(self.is_last_process, function)

    @staticmethod
    def _only(here: bool, function: Callable[..., T]) -> Callable[..., T | None]:
        @wraps(function)
        def maybe(*args: Any, **options: Any) -> T | None:
            return function(*args, **options) if here else None

        return maybe

    def print(self, *values: Any, **options: Any) -> None:
        """`print`, once for each host."""
        if self.is_local_main_process:
            print(*values, **options)

    @contextmanager
    def split_between_processes(self, inputs: T, apply_padding: bool = False) -> Iterator[T]:
        """This process's share of `inputs`; see `split`."""
        yield split(inputs, self.num_processes, self.process_index, apply_padding)

    def destroy(self) -> None:
        """Leave the group, when no process needs the others any more; a second call does nothing."""
        if dist.is_initialized():
            dist.destroy_process_group()

    destroy_process_group = destroy  # Accelerate's name

    def __repr__(self) -> str:
        return f"PartialState(process {self.process_index} of {self.num_processes}, {self.device})"


def _launched() -> bool:
    """Whether this process was started together with others.

    Raises:
        RuntimeError: it seems so, but it is not told where they are: each would do all of the work.
    """
    given = [name for name in VARIABLES if os.environ.get(name)]
    if len(given) == len(VARIABLES):
        for name in ("RANK", "WORLD_SIZE"):
            if not os.environ[name].isdigit():
                raise RuntimeError(f"the environment variable {name} is {os.environ[name]!r}: expected a whole number")
        return True
    if os.environ.get("RANK", "0") != "0" or os.environ.get("WORLD_SIZE", "1") != "1":
        missing = " and ".join(name for name in VARIABLES if name not in given)
        raise RuntimeError(f"{' and '.join(given)} is set but {missing} is not: start the script with `bigkit launch` "
                           "or torchrun, or unset it to run as one process")  # fmt: skip
    return False


def _local_rank(rank: int) -> int:
    """This process's number on its host; where nobody told, that of the GPU which falls to it in turn."""
    told = os.environ.get("LOCAL_RANK")
    return int(told) if told else rank % (torch.cuda.device_count() or sys.maxsize)


def _grouped(call: str) -> bool:
    """Whether there are others to talk to.

    Raises:
        RuntimeError: this process was launched with others, but has not joined them: it would go on alone.
    """
    if dist.is_initialized():
        return True
    if _launched() and os.environ["WORLD_SIZE"] != "1":
        rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
        raise RuntimeError(f"process {rank} of {world} called {call} outside the group: make a PartialState before, "
                           "and destroy it after the last call")  # fmt: skip
    return False


def _join(cuda: bool, timeout: timedelta) -> None:
    """Join the group that the environment names, and arrange that this process neither outlives it nor hides errors."""
    local = _local_rank(int(os.environ["RANK"]))
    if cuda and local >= torch.cuda.device_count():
        raise RuntimeError(f"process {local} of this host has no GPU: there are {torch.cuda.device_count()}. "
                           "Start as many processes as GPUs, or add --cpu or PartialState(cpu=True)")  # fmt: skip
    _end_with_the_launcher()
    _tell_failures()
    if cuda:
        torch.cuda.set_device(local)
    with together("PartialState()"):
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout)
    atexit.register(settle)


def settle() -> None:
    """Let gloo's threads come to rest before Python ends.

    One that lets go of the last tensor of a collective takes Python's lock. Where it finds the interpreter being taken
    down, it aborts the process: seen with PyTorch 2.15 in three of ten runs that ended right after a gather.
    """
    time.sleep(0.2)


def _end_with_the_launcher() -> None:
    """End this process at once when the launcher that started it is gone, even if that was killed with no warning."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent, done = os.getppid(), threading.Event()

    def watch() -> None:
        while not done.wait(1):
            if os.getppid() != parent:
                os._exit(1)

    thread = threading.Thread(target=watch, name="bigkit-watch", daemon=True)
    thread.start()

    def stop() -> None:  # a thread must not wake up while the interpreter is being taken down
        done.set()
        thread.join()

    atexit.register(stop)


def _tell_failures() -> None:
    """Tell torchrun of an uncaught exception, for its summary, and show a lost neighbour in one line only.

    So the first traceback that is shown is that of the process which failed, not of those that missed it.
    """
    before = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        if issubclass(kind, ProcessLost):
            print(error, file=sys.stderr, flush=True)
            return
        before(kind, error, where)
        if os.environ.get("TORCHELASTIC_ERROR_FILE") and isinstance(error, Exception):
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            try:
                raise error.with_traceback(where)  # what it records is the exception being handled
            except Exception as same:
                get_error_handler().record_exception(same)

    sys.excepthook = tell


@contextmanager
def together(call: str) -> Iterator[None]:
    """Say in one sentence that the others are gone, whatever the backend calls it."""
    try:
        yield
    except RuntimeError as error:
        rank, world = os.environ.get("RANK", "?"), os.environ.get("WORLD_SIZE", "?")
        said = re.sub(r"^\[[^]]*\]\s*", "", str(error).strip()).partition("\n")[0].partition(". ")[0]  # not gloo's file
        raise ProcessLost(f"process {rank} of {world} cannot finish {call}: another process has ended, or did "
                          f"not come here in time. See the first error that was shown ({said})") from error  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Split

KINDS = "a list, tuple, range, dict of these, torch.Tensor, numpy.ndarray, datasets.Dataset or BatchEncoding"


def split(inputs: T, num_processes: int, process_index: int, apply_padding: bool = False) -> T:
    """One process's share of `inputs`: contiguous, in order; the first processes take the remainder.

    `inputs` are never changed. A share of a list, tuple, range or dict is a new one; one of a tensor or array is a view
    (padded: a copy), on the device where the tensor is.

    Args:
        inputs: a list, tuple, range, tensor (cut along dimension 0), ndarray, `datasets.Dataset`, `BatchEncoding`, or a
            dict of these, nested if you like: its values are columns of the same length.
        num_processes: how many share it.
        process_index: whose share.
        apply_padding: repeat the last item until all shares are equally long (`gather_for_results` drops it again). A
            padded range is a list.

    Returns:
        The same type as `inputs`, with 0 items if there are too few.

    Raises:
        TypeError: anything else. A text would be cut into letters, a set has no order, and what cannot be cut would go
            whole to every process, which would then do all of the work.
        ValueError: columns of different lengths, or a tensor without dimensions.

    >>> split(["a dog", "a cat", "a chicken"], 2, 1, apply_padding=True)
    ['a chicken', 'a chicken']
    >>> split({"id": range(3), "text": ["x", "y", "z"]}, 2, 0)
    {'id': range(0, 2), 'text': ['x', 'y']}
    """
    length = len_of(inputs)
    positions = share(length, num_processes, process_index)
    missing = padded_length(length, num_processes) - len(positions) if apply_padding and length else 0
    return _take(inputs, positions, missing, apply_padding)


@contextmanager
def split_between_processes(inputs: T, apply_padding: bool = False) -> Iterator[T]:
    """This process's share of `inputs`, for the processes that were launched together; see `split`.

    Args:
        inputs: a list, tuple, range, dict of these, tensor, ndarray, `datasets.Dataset` or `BatchEncoding`.
        apply_padding: repeat the last item until all shares are equally long.

    Raises:
        TypeError, ValueError: `inputs` cannot be split; see `split`.

    >>> with split_between_processes(["a dog", "a cat", "a chicken"]) as mine:
    ...     print(mine)  # one process gets everything
    ['a dog', 'a cat', 'a chicken']
    """
    with PartialState().split_between_processes(inputs, apply_padding) as mine:
        yield mine


def len_of(inputs: object, path: str = "inputs") -> int:
    """How many items `inputs` hold: the common length of the columns of a dict, else its own.

    Raises:
        TypeError, ValueError: as `split`.

    >>> len_of({"a": [1, 2], "b": {"c": (3, 4)}})
    2
    """
    if isinstance(inputs, (dict, UserDict)):
        if _is_one_text(inputs):
            raise ValueError(f"{path} holds the tokens of one text, which would be cut apart: tokenize a list of texts")
        lengths = {f"{path}[{name!r}]": len_of(column, f"{path}[{name!r}]") for name, column in inputs.items()}
        if len(set(lengths.values())) > 1:
            said = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise ValueError(f"the columns of {path} differ in length: {said}. Give each as many items as the others")
        return next(iter(lengths.values()), 0)
    if isinstance(inputs, (str, bytes, bytearray)):
        raise TypeError(f"{path} is one {type(inputs).__name__} ({inputs[:30]!r}), which would be cut into letters: "
                        "put it in a list")  # fmt: skip
    if (isinstance(inputs, torch.Tensor) or _is("numpy", "ndarray", inputs)) and not inputs.ndim:  # type: ignore[attr-defined]
        raise ValueError(f"{path} is a {type(inputs).__name__} without dimensions: expected one item a row")
    if _is_record(inputs) or not _can_cut(inputs):
        raise TypeError(f"cannot split {path}, a {type(inputs).__name__}: expected {KINDS}. Turn it into a list first")
    return len(inputs)  # type: ignore[arg-type]


def _can_cut(inputs: object) -> bool:
    plain = isinstance(inputs, (list, tuple, range, torch.Tensor))
    return plain or _is("numpy", "ndarray", inputs) or _is("datasets", "Dataset", inputs)


def _is(module: str, name: str, thing: object) -> bool:
    """Whether `thing` is of a class from a library that may not be installed; if it is, the library is imported."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(thing, kind)


def _is_record(inputs: object) -> bool:
    return isinstance(inputs, tuple) and hasattr(inputs, "_fields")  # a named tuple: its fields are no items


def _is_one_text(inputs: dict[Any, Any] | UserDict[Any, Any]) -> bool:
    """Whether a tokenizer's output is for one text instead of several: then `input_ids` are plain numbers."""
    ids = inputs.get("input_ids") if isinstance(inputs, UserDict) else None
    if isinstance(ids, (list, tuple)):
        return bool(ids) and isinstance(ids[0], int)
    return getattr(ids, "ndim", 2) == 1


def _take(inputs: Any, positions: range, missing: int, padded: bool) -> Any:
    """The items at `positions`, then the last item `missing` times."""
    here = slice(positions.start, positions.stop)
    if isinstance(inputs, (dict, UserDict)):
        made: Any = copy.copy(inputs)
        for name in inputs:
            made[name] = _take(inputs[name], positions, missing, padded)
        encodings = getattr(inputs, "_encodings", None)  # of a fast tokenizer: what char_to_token and the like read
        if encodings is not None:
            made._encodings = encodings[here] + encodings[-1:] * missing
        return made
    if isinstance(inputs, torch.Tensor):
        part = inputs[here]
        return torch.cat([part, inputs[-1:].expand(missing, *inputs.shape[1:])]) if missing else part
    if _is("numpy", "ndarray", inputs):
        part = inputs[here]
        return part if not missing else sys.modules["numpy"].concatenate([part, inputs[-1:].repeat(missing, axis=0)])
    if _is("datasets", "Dataset", inputs):
        return inputs.select([*positions, *[len(inputs) - 1] * missing])
    if isinstance(inputs, range):
        return [*inputs[here], *[inputs[-1]] * missing] if padded and inputs else inputs[here]
    return inputs[here] + inputs[-1:] * missing


# ---------------------------------------------------------------------------------------------------------------------
# Gather


def gather(tensor: Any) -> Any:
    """The tensors of all processes, one after another along dimension 0, on every process.

    They may differ in length, since shares do. A number without dimensions becomes one item.

    Args:
        tensor: a tensor of shape (items, ...), or a list, tuple or dict of them, nested if you like.

    Returns:
        The same structure, each tensor of shape (all items, ...), in the order of the processes, on its device.

    Raises:
        TypeError: something that is no tensor: that is for `gather_object`.
        ValueError: the processes hold different structures, dtypes or shapes (but for dimension 0).
        ProcessLost: another process ended, or did not come in time.

    >>> gather(torch.tensor([1, 2]))  # one process
    tensor([1, 2])
    """
    leaves: list[torch.Tensor] = []
    shape = _leaves(tensor, leaves, "the input of gather")
    leaves = [leaf if leaf.ndim else leaf[None] for leaf in leaves]
    kinds = [f"{leaf.dtype} of shape (…, {', '.join(map(str, leaf.shape[1:]))})" for leaf in leaves]
    lengths = [len(leaf) for leaf in leaves]
    if _agree((repr(shape), kinds, lengths), "gather"):
        told = [lengths] * (dist.get_world_size() if dist.is_initialized() else 1)
    else:
        everyone = _exchange((repr(shape), kinds, lengths), "gather")
        for rank, theirs in enumerate(everyone):
            if theirs[:2] != everyone[0][:2]:
                said = [f"process {r} has {everyone[r][0]}, {everyone[r][1]}" for r in (0, rank)]
                raise ValueError(f"gather needs the same kind of tensors on every process, but {' and '.join(said)}")
        told = [theirs[2] for theirs in everyone]
    joined = [_join_rows(leaf, [lengths[i] for lengths in told]) for i, leaf in enumerate(leaves)]
    return _rebuild(tensor, iter(joined))


def gather_object(items: Sequence[T]) -> list[T]:
    """The lists of all processes, one after another, on every process; for anything that pickles.

    Args:
        items: this process's list (or tuple); lengths may differ.

    Raises:
        TypeError: no list or tuple: put a single object in a list.
        ProcessLost: another process ended, or did not come in time.

    >>> gather_object(["a", "b"])  # one process
    ['a', 'b']
    """
    if not isinstance(items, (list, tuple)):
        raise TypeError(f"gather_object takes a list, whose items are joined, not a {type(items).__name__}: "
                        "put a single object in a list")  # fmt: skip
    return [item for part in _exchange(list(items), "gather_object") for item in part]


def gather_for_results(results: T, total: int) -> T:
    """The results of all processes, exactly one for each input and in the inputs' order, on every process.

    The inverse of `split_between_processes`: it drops what was padded, and raises if anything is missing.

    Args:
        results: one for each item of this process's share, padding included: a list, tuple, tensor of shape
            (items, ...), ndarray, dict of these (columns), `datasets.Dataset` or `BatchEncoding`.
        total: how many inputs there were before the split: `len(prompts)`.

    Returns:
        The same type with `total` items. The numbers of a range come back as a list.

    Raises:
        TypeError: results of another type.
        ValueError: a process has more or fewer results than inputs; none are lost or doubled in silence.
        ProcessLost: another process ended, or did not come in time.

    >>> gather_for_results([len(prompt) for prompt in ["a dog", "a cat"]], 2)  # one process
    [5, 5]
    """
    here = len_of(results, "results")
    told = _exchange((here, total), "gather_for_results")
    totals = {theirs for _, theirs in told}
    if len(totals) > 1:
        raise ValueError(f"the processes split different inputs: they say {sorted(totals)} items. Every process must "
                         "hold the same inputs in the same order")  # fmt: skip
    world = len(told)
    shares = [len(share(total, world, rank)) for rank in range(world)]
    lengths = [length for length, _ in told]
    padded = [padded_length(total, world)] * world
    if lengths not in (shares, padded):
        said = ", ".join(f"process {rank} has {length}" for rank, length in enumerate(lengths))
        raise ValueError(f"{total} inputs on {world} processes give {shares} results, or {padded} with padding, but "
                         f"{said}. Return one result for each input")  # fmt: skip
    rank = dist.get_rank() if dist.is_initialized() else 0
    return _gather_columns(_take(results, range(shares[rank]), 0, False))


def _gather_columns(results: Any) -> Any:
    """All processes' results of one type, joined."""
    if isinstance(results, (dict, UserDict)):
        made = copy.copy(results)
        for name in results:
            made[name] = _gather_columns(results[name])
        if getattr(results, "_encodings", None) is not None:
            made._encodings = gather_object(results._encodings)  # type: ignore[union-attr]
        return made
    if isinstance(results, torch.Tensor):
        return gather(results)
    if _is("numpy", "ndarray", results):
        return sys.modules["numpy"].concatenate(_exchange(results, "gather_for_results"))
    if _is("datasets", "Dataset", results):
        parts = _exchange(results, "gather_for_results")
        return sys.modules["datasets"].concatenate_datasets(parts)
    if isinstance(results, range):
        return gather_object(list(results))
    return type(results)(gather_object(results))


def _exchange(thing: T, call: str) -> list[T]:
    """What every process holds, in the order of the processes."""
    if not _grouped(call):
        return [thing]
    import cloudpickle

    packed = cloudpickle.dumps(thing)  # by value where needed: a class of a notebook is in no module of the others
    everyone: list[Any] = [None] * dist.get_world_size()
    with together(call):
        dist.all_gather_object(everyone, packed)
    return [pickle.loads(theirs) for theirs in everyone]


def _agree(thing: object, call: str) -> bool:
    """Whether every process holds the same; eight bytes of each are compared, which costs little."""
    if not _grouped(call):
        return True
    digest = hashlib.blake2b(repr(thing).encode(), digest_size=8).digest()
    mine = torch.tensor([int.from_bytes(digest, "little", signed=True)], device=_carrier("cpu"))
    with together(call):
        return len(set(_all_gather(mine).tolist())) == 1


def _join_rows(tensor: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Tensors of shape (length, ...) from all processes, joined: sent padded to the longest, then cut."""
    if not dist.is_initialized():
        return tensor
    longest = max(lengths)
    sent = tensor.detach().contiguous()
    if len(sent) < longest:
        sent = torch.cat([sent, sent.new_zeros(longest - len(sent), *sent.shape[1:])])
    raw = sent.reshape(-1).view(torch.uint8).to(_carrier(sent.device))  # gloo and nccl know few dtypes, but bytes
    with together("gather"):
        rows = _all_gather(raw).view(sent.dtype).view(len(lengths) * longest, *sent.shape[1:])
    if min(lengths) < longest:
        rows = torch.cat([rows[i * longest : i * longest + length] for i, length in enumerate(lengths)])
    return rows.to(tensor.device)


def _all_gather(flat: torch.Tensor) -> torch.Tensor:
    """A tensor of one dimension, of the same length on each process, from all of them."""
    found = flat.new_empty(dist.get_world_size() * len(flat))
    if len(flat):
        dist.all_gather_into_tensor(found, flat)
    return found


def _carrier(device: str | torch.device) -> str | torch.device:
    """Where a tensor must be for the group's backends to carry it, its own device if that can be."""
    backends = dist.get_backend_config()
    return "cpu" if "nccl" not in backends else device if "gloo" in backends else "cuda"


def _leaves(thing: Any, found: list[torch.Tensor], path: str) -> Any:
    """Collect the tensors of a structure; returns the structure without them."""
    if isinstance(thing, torch.Tensor):
        found.append(thing)
        return "tensor"
    if isinstance(thing, (list, tuple)):
        return [_leaves(item, found, f"{path}[{i}]") for i, item in enumerate(thing)]
    if isinstance(thing, (dict, UserDict)):
        return {name: _leaves(item, found, f"{path}[{name!r}]") for name, item in thing.items()}
    raise TypeError(
        f"{path} is a {type(thing).__name__}, and gather takes tensors: use gather_object for anything else"
    )


def _rebuild(thing: Any, joined: Iterator[torch.Tensor]) -> Any:
    if isinstance(thing, torch.Tensor):
        return next(joined)
    if isinstance(thing, (dict, UserDict)):
        made = copy.copy(thing)
        for name in thing:
            made[name] = _rebuild(thing[name], joined)
        return made
    parts = [_rebuild(item, joined) for item in thing]
    return type(thing)(*parts) if _is_record(thing) else type(thing)(parts)
