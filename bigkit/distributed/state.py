"""A process among those that were launched together: its number, its device, waiting for the others, and failures.

    state = PartialState()
    with state.split_between_processes(prompts) as mine:     # 3 prompts on 2 processes: 2 + 1
        answers = [model(prompt) for prompt in mine]

Start the script with `bigkit launch script.py`, torchrun or `notebook_launcher`; with plain `python` it is one process.
Every process must reach the same calls. gloo carries CPU tensors and objects, nccl CUDA tensors.

Leaves out: training (gradients, samplers, mixed precision), splitting one model (`pipeline.py`), and starting processes
(`launch.py`, `notebook.py`). Processes started by MPI or Slurm alone are not recognised; start torchrun from there.
"""

from __future__ import annotations

import atexit
import importlib
import os
import pickle
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, partial, wraps
from itertools import count
from types import TracebackType
from typing import Any, ClassVar, TypeVar

import cloudpickle
import torch
import torch.distributed as dist

from ._torch import record_failure
from .split import split

T = TypeVar("T")
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets, and `env://` reads
RUN_ID = "TORCHELASTIC_RUN_ID"  # set by torchrun: a launcher waits for this process
_joins = count()  # numbers the groups that this process has joined, which are the same for all
USE_CPU = "BIGKIT_USE_CPU"  # set by `bigkit launch --cpu`


class ProcessLost(RuntimeError):
    """Another process ended, or did not come to the same call in time."""


class PartialState:
    """This process among all that were started together. Unlaunched it is the only one, number 0 of 1.

    The first one made in a launched process joins the others (`torch.distributed.init_process_group`); later ones are
    views of the same group, also of one that you initialised yourself.

    Args:
        cpu: stay on the CPU although there are GPUs.
        timeout: how long a call waits for the others, in seconds or as a `timedelta`; that of the first one counts.

    Attributes:
        num_processes: the number of processes on all hosts (the world size).
        process_index: the number of this process among them, from 0 (its rank).
        local_process_index: its number on this host, from 0 (its local rank).
        device: `cuda:<local_process_index>`, or the CPU.

    Raises:
        RuntimeError: the variables of a launch are incomplete, or there are more processes than GPUs on this host.
        ProcessLost: the others did not come in time.

    >>> state = PartialState(cpu=True)
    >>> state.process_index, state.num_processes, state.device, state.is_main_process
    (0, 1, device(type='cpu'), True)
    """

    _shared_state: ClassVar[dict[str, Any]] = {}  # Accelerate's users ask whether it is empty: is there a state yet?
    debug = fork_launched = False  # Accelerate's users read them; here no process is ever forked

    def __init__(self, cpu: bool = False, *, timeout: float | timedelta = 1800) -> None:
        cpu = cpu or os.environ.get(USE_CPU, "").lower() in ("1", "true", "yes")
        cuda = not cpu and torch.cuda.is_available()
        if _is_launched() and not dist.is_initialized():
            _join(cuda, timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout))
        joined = dist.is_initialized()
        self.num_processes: int = dist.get_world_size() if joined else 1
        self.process_index: int = dist.get_rank() if joined else 0
        self.local_process_index: int = _local_rank(self.process_index) if joined else 0
        if joined:
            cuda = not cpu and "nccl" in dist.get_backend_config()
        self.device = torch.device("cuda", self.local_process_index) if cuda else torch.device("cpu")
        PartialState._shared_state.update(vars(self))

    @staticmethod
    def _reset_state() -> None:
        """Forget that there is a state, as Accelerate's tests do; the group stays, and objects know what they knew."""
        PartialState._shared_state.clear()

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
        if in_group("wait_for_everyone"):
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

    def _first(self, is_first: bool) -> Iterator[None]:
        if not is_first:
            self.wait_for_everyone()
        try:
            yield
        finally:  # an error in the block must not leave the others waiting
            if is_first:
                self.wait_for_everyone()

    @property
    def use_distributed(self) -> bool:
        """Whether there are other processes."""
        return self.num_processes > 1

    @property
    def initialized(self) -> bool:
        """Whether this object knows who it is: always."""
        return True

    @property
    def backend(self) -> str | None:
        """What carries tensors between processes: "nccl" on GPUs, "gloo", or None without a group."""
        if not dist.is_initialized():
            return None
        return "nccl" if "nccl" in dist.get_backend_config() else "gloo"

    @property
    def distributed_type(self) -> str:
        """How the processes compute, by Accelerate's names: "NO", "MULTI_CPU" or "MULTI_GPU"."""
        return "NO" if not dist.is_initialized() else "MULTI_GPU" if self.device.type == "cuda" else "MULTI_CPU"

    @property
    def default_device(self) -> torch.device:
        """The device that a process alone would take: a GPU if there is one, else the CPU."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def set_device(self) -> None:
        """Make `device` the current one, if it is a GPU; joining the others has done that already."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def on_process(self, function: Callable[..., T] | None = None, process_index: int | None = None) -> Any:
        """Decorator: the function runs on process `process_index`, or on the only one there is."""
        if function is None:
            return partial(self.on_process, process_index=process_index)
        return _only_if(self.process_index == process_index or not self.use_distributed, function)

    def on_local_process(self, function: Callable[..., T] | None = None, local_process_index: int | None = None) -> Any:
        """Decorator: the function runs on process `local_process_index` of each host, or on the only one there is."""
        if function is None:
            return partial(self.on_local_process, local_process_index=local_process_index)
        return _only_if(self.local_process_index == local_process_index or not self.use_distributed, function)

    def on_main_process(self, function: Callable[..., T] | None = None) -> Any:
        """Decorator: the function runs on process 0; on the others it does nothing and returns None."""
        return self.on_main_process if function is None else _only_if(self.is_main_process, function)

    def on_local_main_process(self, function: Callable[..., T] | None = None) -> Any:
        """Decorator: the function runs on process 0 of each host."""
        return self.on_local_main_process if function is None else _only_if(self.is_local_main_process, function)

    def on_last_process(self, function: Callable[..., T] | None = None) -> Any:
        """Decorator: the function runs on the process with the highest number."""
        return self.on_last_process if function is None else _only_if(self.is_last_process, function)

    def print(self, *values: Any, **options: Any) -> None:
        """`print`, once for each host."""
        if self.is_local_main_process:
            print(*values, **options)

    @contextmanager
    def split_between_processes(self, inputs: T, apply_padding: bool = False) -> Iterator[T]:
        """This process's share of `inputs`; see `split`."""
        yield split(inputs, self.num_processes, self.process_index, apply_padding)

    def destroy(self) -> None:
        """Leave the group, when no process needs the others any more; a second call does nothing.

        A PartialState that is made afterwards joins again, with all others that do.
        """
        _leave()

    destroy_process_group = destroy  # Accelerate's name

    def __repr__(self) -> str:
        return f"PartialState(process {self.process_index} of {self.num_processes}, {self.device})"


def _only_if(here: bool, function: Callable[..., T]) -> Callable[..., T | None]:
    @wraps(function)
    def wrapper(*args: Any, **options: Any) -> T | None:
        return function(*args, **options) if here else None

    return wrapper


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


def _is_launched() -> bool:
    """Whether this process was started together with others.

    Raises:
        RuntimeError: only some of the variables are set, so the others cannot be found: each would do all of the work.
    """
    present = [name for name in VARIABLES if os.environ.get(name)]
    if len(present) < len(VARIABLES):
        if os.environ.get("RANK", "0") == "0" and os.environ.get("WORLD_SIZE", "1") == "1":
            return False
        missing = " and ".join(name for name in VARIABLES if name not in present)
        problem = f"{' and '.join(present)} is set but {missing} is not"
        hint = "start the script with `bigkit launch` or torchrun, or unset it to run as one process"
        raise RuntimeError(f"{problem}: {hint}")
    for name in ("RANK", "WORLD_SIZE"):
        if not os.environ[name].isdigit():
            raise RuntimeError(f"the environment variable {name} is {os.environ[name]!r}: expected a whole number")
    return True


def in_group(call: str) -> bool:
    """Whether there are others to talk to.

    Raises:
        RuntimeError: this process was launched with others, but has not joined them: it would go on alone.
    """
    if dist.is_initialized():
        return True
    if _is_launched() and os.environ["WORLD_SIZE"] != "1":
        rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
        hint = "make a PartialState before, and destroy it after the last call"
        raise RuntimeError(f"process {rank} of {world} called {call} outside the group: {hint}")
    return False


def _local_rank(rank: int) -> int:
    """This process's number on its host; where LOCAL_RANK is not set, GPUs are dealt out to the ranks in turn."""
    local = os.environ.get("LOCAL_RANK")
    return int(local) if local else rank % (torch.cuda.device_count() or sys.maxsize)


def _join(cuda: bool, timeout: timedelta) -> None:
    """Join the group that the environment names; a process of torchrun also ends with it and reports its failure."""
    local = _local_rank(int(os.environ["RANK"]))
    if cuda and local >= torch.cuda.device_count():
        hint = "Start as many processes as GPUs, or add --cpu or PartialState(cpu=True)"
        raise RuntimeError(f"process {local} of this host has no GPU: there are {torch.cuda.device_count()}. {hint}")
    if RUN_ID in os.environ:
        _end_with_the_launcher()
    if cuda:
        torch.cuda.set_device(local)
    # Its functions take the group that there is at its import for their default and keep it alive, threads and all, so
    # it is imported before: gloo's threads must end with the group (see _end_gloo).
    importlib.import_module("torch.distributed.nn.functional")
    hook = sys.excepthook
    with together("PartialState()"):
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
        prefix = f"bigkit/{next(_joins)}"  # not where an earlier group left its addresses
        store = dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world)
        dist.all_reduce(torch.zeros(1))  # all have joined: one that left earlier would break off the others' joining
    sys.excepthook = _FailureHook(before=hook, next_hook=sys.excepthook)
    atexit.register(_end_gloo)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    if isinstance(sys.excepthook, _FailureHook):
        sys.excepthook = sys.excepthook.before


def _end_gloo() -> None:
    """End gloo's threads before Python ends: one that lets go of a tensor after that aborts the process."""
    if dist.is_initialized() and "nccl" in dist.get_backend_config():
        time.sleep(0.2)  # leaving would also wait for nccl, and that for processes which may have failed
    else:
        _leave()


@contextmanager
def together(call: str) -> Iterator[None]:
    """Say in one sentence that the others are gone, whatever the backend calls it."""
    try:
        yield
    except RuntimeError as error:
        rank, world = os.environ.get("RANK", "?"), os.environ.get("WORLD_SIZE", "?")
        reason = re.sub(r"^\[[^]]*\]\s*", "", str(error).strip())  # without the line of gloo's source
        reason = reason.partition("\n")[0].partition(". ")[0]
        problem = "another process has ended, or did not come here in time. See the first error that was shown"
        raise ProcessLost(f"process {rank} of {world} cannot finish {call}: {problem} ({reason})") from error


def exchange(thing: T, call: str) -> list[T]:
    """What every process holds, in the order of the processes; for anything that pickles."""
    if not in_group(call):
        return [thing]
    packed = cloudpickle.dumps(thing)  # by value where needed: a class of a notebook is in no module of the others
    parts: list[Any] = [None] * dist.get_world_size()
    with together(call):
        dist.all_gather_object(parts, packed)
    return [pickle.loads(part) for part in parts]


class _FailureHook:
    """`sys.excepthook` of a launched process from joining the others to leaving them (`PartialState.destroy`).

    It writes an uncaught exception into torchrun's summary, and shows a lost neighbour in one line only. So the first
    traceback that is shown is that of the process which failed, not of those that missed it.

    Args:
        before: the hook before joining, which leaving restores.
        next_hook: the one that PyTorch has set in joining, which shows the rank before each line.
    """

    def __init__(self, before: Callable[..., Any], next_hook: Callable[..., Any]) -> None:
        self.before, self.next_hook = before, next_hook

    def __call__(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, ProcessLost):
            print(error, file=sys.stderr, flush=True)
            time.sleep(0.5)  # the launcher looks ten times a second, and shall find whoever failed first alone
            return
        self.next_hook(kind, error, traceback)
        if isinstance(error, Exception):
            record_failure(error)


@cache
def _end_with_the_launcher() -> None:
    """End this process within a second when the launcher that started it is gone, even if that was killed."""
    parent, at_exit = os.getppid(), threading.Event()

    def watch() -> None:
        while not at_exit.wait(1):
            if os.getppid() != parent:
                os._exit(1)

    watcher = threading.Thread(target=watch, name="bigkit-watch", daemon=True)
    watcher.start()
    atexit.register(watcher.join)  # last: a thread must not wake up while the interpreter is being taken down
    atexit.register(at_exit.set)
