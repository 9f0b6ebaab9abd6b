"""Run a function that was written in a notebook in several processes at once, and get its results back.

    def infer(prompts):
        with PartialState().split_between_processes(prompts) as mine:
            return [model(prompt) for prompt in mine]

    notebook_launcher(infer, (prompts,), num_processes=2)    # a list: what process 0 returned, what process 1 returned

Each process is a fresh Python: nothing is forked, so CUDA may be in use already and any library imported. The function
and the globals that it names are sent to it by value (cloudpickle); a module that it imports is imported again there.
torch.distributed.elastic starts functions too, but takes over the kernel's SIGINT and SIGTERM for good, imports the
main script again, mixes the lines of two processes, and leaves the processes behind when the kernel is killed.

Leaves out: scripts (`launch.py`), and changing what a process computed with after it has started.
"""

from __future__ import annotations

import builtins
import inspect
import io
import linecache
import marshal
import os
import pickle
import pkgutil
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import cloudpickle

PATIENCE = 5.0  # seconds that a process has to end when it is asked to
_WORKER = "import sys; from bigkit.distributed.notebook import _work; _work(*sys.argv[1:])"


class LaunchError(RuntimeError):
    """A function that ran in processes failed in one of them; the message holds its traceback."""


def notebook_launcher(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    num_processes: int | None = None,
    mixed_precision: str = "no",
    use_port: int | str | None = None,
    master_addr: str = "127.0.0.1",
    node_rank: int = 0,
    num_nodes: int = 1,
) -> list[Any]:
    """Call `function(*args)` in `num_processes` processes that know each other, and return what each returned.

    The lines that a process prints are shown as they come, after its number in brackets. If one fails, the others are
    ended. Interrupting the cell ends all; so does the end of this Python, however it came.

    Args:
        function: defined in a notebook or anywhere else. What it refers to must be picklable; modules, and objects
            that stand for one (`torch.backends.cudnn`, `torch.ops.aten`), are found again by name.
        args: its arguments, the same for each process.
        num_processes: how many processes to start on this host; None: one for each GPU, or one. "2" is 2.
        mixed_precision: only "no": load a model in the dtype that it shall compute in.
        use_port: the port where the processes meet; None takes a free one. With several hosts, the same on each.
        master_addr: with several hosts, the address of the first.
        node_rank, num_nodes: with several hosts, the number of this one, from 0, and how many there are.

    Returns:
        The results of this host's processes, in the order of their numbers. Return tensors on the CPU.

    Raises:
        LaunchError: the function raised in a process, or the process died; its traceback is in the message.
        TypeError: the function, an argument or a result cannot be sent to another process.
        ValueError: a number of processes or hosts that makes no sense.

    >>> def double(x):
    ...     from bigkit import PartialState
    ...     return PartialState(cpu=True).process_index, 2 * x
    >>> notebook_launcher(double, (21,), num_processes=2)
    [(0, 42), (1, 42)]
    """
    import torch
    import torch.distributed as dist

    from ._torch import MEET_AT_THE_LAUNCHER

    if mixed_precision not in ("no", None):
        hint = "load the model in the dtype that it shall compute in, as in from_pretrained(name, dtype='bfloat16')"
        raise ValueError(f"mixed_precision is {mixed_precision!r}: expected 'no'. For inference {hint}")
    if not isinstance(args, (list, tuple)):
        raise TypeError(f"args is {args!r}: expected a tuple or list of the function's arguments, as in (5,)")
    count = max(1, torch.cuda.device_count()) if num_processes is None else int(num_processes)
    node_rank, num_nodes = int(node_rank), int(num_nodes)
    if count < 1 or num_nodes < 1 or not 0 <= node_rank < num_nodes:
        expected = "expected at least one process and one host, and node_rank from 0"
        raise ValueError(f"cannot start {count} processes on host {node_rank} of {num_nodes}: {expected}")
    if num_nodes > 1 and use_port is None:
        raise ValueError("several hosts need a port to meet at: pass use_port, the same on each host")
    call = pack(function, tuple(args))
    port = int(use_port or 0)
    if node_rank == 0:  # the store lives here, so that no other program can take its port before the processes do
        store = dist.TCPStore(  # type: ignore[attr-defined]
            master_addr, port, is_master=True, wait_for_workers=False
        )
        port = store.port
    world = {
        "WORLD_SIZE": str(count * num_nodes),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": str(node_rank),
        "MASTER_ADDR": master_addr,
        "MASTER_PORT": str(port),
        **MEET_AT_THE_LAUNCHER,
    }
    with tempfile.TemporaryDirectory(prefix="bigkit-") as folder:
        Path(folder, "call").write_bytes(call)
        processes = _Processes(count, node_rank * count, Path(folder), world)
        try:
            processes.start()
            processes.wait()
        finally:
            processes.end()
        return [pickle.loads(Path(folder, f"result-{local}").read_bytes()) for local in range(count)]


class _Pickler(cloudpickle.CloudPickler):
    """Pickles by value what is in no file, and by name what stands for a module.

    Code keeps the name of its cell, so that a traceback can show its lines.
    """

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, CodeType):
            return marshal.loads, (marshal.dumps(thing),)  # the same Python reads it
        if name := _module_like(thing) or _home(thing):
            return pkgutil.resolve_name, (name,)
        return super().reducer_override(thing)


def _module_like(thing: Any) -> str | None:
    """The name by which another process finds an object of a class of modules (torch.backends.cudnn), or an operation.

    cloudpickle knows only plain modules, and would look into these.
    """
    if isinstance(thing, ModuleType) and type(thing) is not ModuleType:
        names = [thing.__name__, *(name for name, module in list(sys.modules.items()) if module is thing)]
    elif type(thing).__module__ == "torch._ops" and "." in str(thing):
        names = [f"torch.ops.{thing}"]  # torch.ops.aten.add
    else:
        return None
    for name in names:
        with suppress(ImportError, AttributeError, ValueError):
            if pkgutil.resolve_name(name) is thing:
                return name
    return None


def _home(thing: Any) -> str | None:
    """The name of a compiled class that claims to be one of Python's own, such as safetensors' `safe_open`."""
    if not isinstance(thing, type) or thing.__module__ != "builtins" or hasattr(builtins, thing.__name__):
        return None
    called = thing.__name__
    for name, module in list(sys.modules.items()):
        names: dict[str, Any] = getattr(module, "__dict__", {})
        if names.get(called) is thing and names.get("__name__") == name != "__main__":
            return f"{name}:{called}"
    return None


def pack(function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """The call as bytes.

    Raises:
        TypeError: a part of it cannot be sent; it is named.
    """
    # The lines of the cells, which a traceback shows: they are in no file that the process could read.
    cells = {name: entry for name, entry in linecache.cache.items() if len(entry) > 1 and entry[1] is None}
    file = io.BytesIO()
    try:
        _Pickler(file).dump((function, args, cells))
        return file.getvalue()
    except Exception as error:
        parts = {f"argument {i}": arg for i, arg in enumerate(args)}
        with suppress(TypeError):  # no function that was written in Python
            variables = inspect.getclosurevars(function)
            for name, value in {**variables.globals, **variables.nonlocals}.items():
                parts[f"the variable {name!r}"] = value
        problem = f"cannot send {getattr(function, '__name__', function)} to other processes"
        for name, value in parts.items():
            try:
                _Pickler(io.BytesIO()).dump(value)
            except Exception:
                kind = type(value).__name__
                raise TypeError(f"{problem} because of {name}, a {kind} ({error}). Make it in the function") from error
        raise TypeError(f"{problem}: {error}") from error


class _Processes:
    """The processes of this host; process `local` of them is number `first + local` of all."""

    def __init__(self, count: int, first: int, folder: Path, world: dict[str, str]) -> None:
        self.count, self.first, self.folder, self.world = count, first, folder, world
        self.processes: list[subprocess.Popen[str]] = []
        self.printers: list[threading.Thread] = []

    def start(self) -> None:
        """Start them, each with a thread here that shows what it prints."""
        threads = max(1, (os.cpu_count() or 1) // self.count)
        common = {"OMP_NUM_THREADS": str(threads), **os.environ, **self.world, "PYTHONUNBUFFERED": "1"}
        common["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        for local in range(self.count):
            rank = str(self.first + local)
            process = subprocess.Popen(
                [sys.executable, "-c", _WORKER, str(self.folder), str(local)],
                env={**common, "RANK": rank, "LOCAL_RANK": str(local)},
                stdin=subprocess.PIPE,  # never written to: its end tells a process that this Python is gone
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            self.processes.append(process)
            self.printers.append(threading.Thread(target=_show, args=(process, rank), daemon=True))
            self.printers[-1].start()

    def wait(self) -> None:
        """Wait until all have ended well.

        Raises:
            LaunchError: one did not.
        """
        while not (failures := self._failures()):
            if all(process.poll() is not None for process in self.processes):
                return
            time.sleep(0.05)
        # A process that died in silence may be noticed after those that lost it: the first of the others is the cause.
        deadline = time.monotonic() + 1
        while all(is_lost for is_lost, *_ in failures) and time.monotonic() < deadline:
            time.sleep(0.05)
            failures = self._failures()
        _, _, local, text = min(failures)
        raise LaunchError(f"process {self.first + local} of {self.world['WORLD_SIZE']} {text}")

    def _failures(self) -> list[tuple[bool, float, int, str]]:
        """Of each process that has ended without a result: whether it only lost another, when, which, what happened."""
        failures = []
        for local, process in enumerate(self.processes):
            code = process.poll()
            if code is None or (code == 0 and (self.folder / f"result-{local}").exists()):
                continue
            is_lost, when, text = False, 0.0, f"ended with status {code} and without an error"
            error = self.folder / f"error-{local}"
            if code == 1 and error.exists():
                is_lost, when, text = pickle.loads(error.read_bytes())
            elif code < 0:
                hint = "; often that means that memory ran out" if code == -signal.SIGKILL else ""
                text = f"was ended by {signal.Signals(-code).name}{hint}"
            failures.append((is_lost, when, local, text))
        return failures

    def end(self) -> None:
        """End every process that still runs and everything that they started, and show what they printed last."""
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        self._signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        for process, printer in zip(self.processes, self.printers):
            process.wait()
            printer.join(1)
            assert process.stdin is not None
            process.stdin.close()

    def _signal(self, number: int) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError, PermissionError):
                if hasattr(os, "killpg"):
                    os.killpg(process.pid, number)  # with all that it started
                else:
                    process.send_signal(number)


def _show(process: subprocess.Popen[str], rank: str) -> None:
    """Print each line of a process after its number."""
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            print(f"[{rank}] {line}", end="" if line.endswith("\n") else "\n", flush=True)


def _work(folder: str, local: str) -> None:
    """What each process does: call the function, leave its result or its error in the folder."""
    lifeline = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    threading.Thread(target=_end_with_parent, args=(lifeline, folder), daemon=True).start()
    try:
        function, args, cells = pickle.loads(Path(folder, "call").read_bytes())
        linecache.cache.update(cells)
        value = function(*args)
        try:
            result = cloudpickle.dumps(value)
        except Exception as error:
            problem = f"returned a {type(value).__name__}, which cannot be sent back ({error})"
            hint = "return plain data or CPU tensors"
            raise TypeError(f"{getattr(function, '__name__', function)} {problem}: {hint}") from error
        Path(folder, f"result-{local}").write_bytes(result)
    except BaseException as error:
        is_lost = type(error).__name__ == "ProcessLost"  # whose module imports torch, as the function need not
        last_line = traceback.format_exception_only(type(error), error)[-1].strip()
        frames = error.__traceback__ and error.__traceback__.tb_next  # without this function's own
        lines = "".join(traceback.format_exception(type(error), error, frames))
        failure = (is_lost, time.time(), f"failed: {last_line}\n\n{lines}")
        Path(folder, f"error-{local}").write_bytes(pickle.dumps(failure))
        sys.exit(1)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


def _end_with_parent(lifeline: int, folder: str) -> None:
    """Wait until the other end of a pipe, which only the parent holds, is closed; then end all that started here."""
    os.read(lifeline, 1)
    shutil.rmtree(folder, ignore_errors=True)  # which the parent could not do
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
