"""Run a function that was written in a notebook in several processes at once, and get its results back.

    def infer(prompts):
        with PartialState().split_between_processes(prompts) as mine:
            return [model(prompt) for prompt in mine]

    notebook_launcher(infer, (prompts,), num_processes=2)    # a list: what process 0 returned, what process 1 returned

Each process is a fresh Python: nothing is forked, so CUDA may be in use already and any library imported. The function
and the globals that it names are sent to it by value (cloudpickle); a module that it imports is imported again there.

Leaves out: scripts (`distributed/launch.py`), and changing what a process computed with after it has started.
"""

from __future__ import annotations

import inspect
import io
import linecache
import os
import pickle
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import ChainMap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

PATIENCE = 5.0  # seconds that a process has to end when it is asked to
_WORK = "import sys; from bigkit.distributed.notebook import _work; _work(*sys.argv[1:])"


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
        function: defined in a notebook or anywhere else. What it refers to must be picklable.
        args: its arguments, the same for each process.
        num_processes: how many on this host; None takes one for each GPU, or one.
        mixed_precision: "no": load a model in the dtype that it shall compute in.
        use_port: where the processes meet; None takes a free one. With several hosts, the same on each.
        master_addr: with several hosts, the address of the first.
        node_rank, num_nodes: with several hosts, which one this is and how many there are.

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
    import torch.distributed as dist

    if mixed_precision not in ("no", None):
        raise ValueError(f"mixed_precision is {mixed_precision!r}: expected 'no'. For inference load the model in the "
                         "dtype that it shall compute in, as in from_pretrained(name, dtype='bfloat16')")  # fmt: skip
    count = _gpus_or_one() if num_processes is None else num_processes
    if count < 1 or num_nodes < 1 or not 0 <= node_rank < num_nodes:
        raise ValueError(f"cannot start {count} processes on host {node_rank} of {num_nodes}: expected at least one "
                         "process and one host, and node_rank from 0")  # fmt: skip
    if num_nodes > 1 and use_port is None:
        raise ValueError("several hosts need a port to meet at: pass use_port, the same on each host")
    work = _pack(function, tuple(args))
    # The store lives here, so that its port is never free for others between being chosen and being used.
    store = None
    if node_rank == 0:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            master_addr, int(use_port or 0), is_master=True, wait_for_workers=False
        )
    port = store.port if store is not None else int(use_port or 0)
    world = {
        "WORLD_SIZE": count * num_nodes, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": master_addr, "MASTER_PORT": port,
        "GROUP_RANK": node_rank, "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="bigkit-") as folder:
        Path(folder, "work").write_bytes(work)
        group = _Group(count, node_rank * count, Path(folder), {name: str(value) for name, value in world.items()})
        try:
            group.wait()
        finally:
            group.end()
        return [group.result(i) for i in range(count)]


def _gpus_or_one() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def _pack(function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """The call as bytes; what cannot be sent is named."""
    import cloudpickle

    try:
        # the lines of the cells, which a traceback shows: they are in no file that the process could read
        cells = {name: entry for name, entry in linecache.cache.items() if len(entry) > 1 and entry[1] is None}
        return _dumps((function, args, cells))
    except Exception as error:
        parts = {f"argument {i}": arg for i, arg in enumerate(args)}
        try:
            found = inspect.getclosurevars(function)
            parts |= {f"the variable {name!r}": value for name, value in {**found.globals, **found.nonlocals}.items()}
        except TypeError:
            pass
        for name, value in parts.items():
            try:
                cloudpickle.dumps(value)
            except Exception:
                raise TypeError(f"cannot send {_name(function)} to other processes because of {name}, "
                                f"a {type(value).__name__} ({error}). Make it in the function") from error  # fmt: skip
        raise TypeError(f"cannot send {_name(function)} to other processes: {error}") from error


def _dumps(thing: Any) -> bytes:
    """By value, as cloudpickle does; code keeps the name of its file, so that a traceback can show its lines."""
    import cloudpickle

    def reduce(code: CodeType) -> tuple[Any, ...]:
        make, parts = cloudpickle.CloudPickler.dispatch_table[CodeType](code)
        return _named_code, (make, parts, code.co_filename)

    class Pickler(cloudpickle.CloudPickler):
        dispatch_table = ChainMap({CodeType: reduce}, cloudpickle.CloudPickler.dispatch_table)

    file = io.BytesIO()
    Pickler(file).dump(thing)
    return file.getvalue()


def _named_code(make: Callable[..., CodeType], parts: tuple[Any, ...], name: str) -> CodeType:
    return make(*parts).replace(co_filename=name)


def _name(function: Any) -> str:
    return getattr(function, "__name__", None) or type(function).__name__


# ---------------------------------------------------------------------------------------------------------------------
# Here: start, listen, end


class _Group:
    """The processes of this host: what they say, how they end, and that they end."""

    def __init__(self, count: int, first: int, folder: Path, world: dict[str, str]) -> None:
        self.first, self.folder, self.world = first, folder, int(world["WORLD_SIZE"])
        self.lines: queue.Queue[tuple[int, str]] = queue.Queue()
        self.processes: list[subprocess.Popen[str]] = []
        self.listeners: list[threading.Thread] = []
        threads = max(1, (os.cpu_count() or 1) // count)
        common = {"OMP_NUM_THREADS": str(threads), **os.environ, **world, "PYTHONUNBUFFERED": "1"}
        common["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        try:
            for local in range(count):
                rank = first + local
                process = subprocess.Popen(
                    [sys.executable, "-c", _WORK, str(folder), str(local)],
                    env={**common, "RANK": str(rank), "LOCAL_RANK": str(local)},
                    stdin=subprocess.PIPE,  # never written to: its end tells a process that this Python is gone
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                    start_new_session=True,
                )  # fmt: skip
                self.processes.append(process)
                self.listeners.append(threading.Thread(target=self._listen, args=(local, process), daemon=True))
                self.listeners[-1].start()
        except BaseException:
            self.end()
            raise

    def _listen(self, local: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self.lines.put((local, line))

    def wait(self) -> None:
        """Show what the processes say until all have ended well.

        Raises:
            LaunchError: one did not.
        """
        while not self._failed() and any(process.poll() is None for process in self.processes):
            self._show(0.05)
        if self._failed():
            raise LaunchError(self._why())
        self.end()

    def _failed(self) -> list[int]:
        """Those that have ended without leaving a result."""
        ended = [i for i, process in enumerate(self.processes) if process.poll() is not None]
        return [i for i in ended if self.processes[i].poll() or not (self.folder / f"result-{i}").exists()]

    def _why(self) -> str:
        """End all, and say who failed first: not one that merely missed a neighbour, if there is another."""
        until = time.monotonic() + 1  # who misses a process that died without a word may be heard before it
        while True:
            failures = [(*self._failure(i), i) for i in self._failed()]
            if time.monotonic() > until or not all(lost for lost, *_ in failures):
                break
            self._show(0.05)
        self.end()
        _, _, said, local = min(failures)
        return f"process {self.first + local} of {self.world} {said}"

    def _failure(self, local: int) -> tuple[bool, float, str]:
        """(whether it only missed another one, when, what happened) of a process that has failed."""
        code = self.processes[local].poll() or 0
        try:
            lost, when, text = pickle.loads((self.folder / f"error-{local}").read_bytes())
            return lost, when, text
        except FileNotFoundError:
            if code >= 0:
                return False, 0.0, f"ended with status {code} and without an error"
            hint = "; often that means that memory ran out" if code == -9 else ""
            return False, 0.0, f"was ended by {signal.Signals(-code).name}{hint}"

    def _show(self, seconds: float) -> None:
        try:
            local, line = self.lines.get(timeout=seconds)
        except queue.Empty:
            return
        print(f"[{self.first + local}] {line}", end="" if line.endswith("\n") else "\n", flush=True)

    def result(self, local: int) -> Any:
        """What the function returned in a process."""
        return pickle.loads((self.folder / f"result-{local}").read_bytes())

    def end(self) -> None:
        """End every process that still runs and everything that it started, and show what they said last."""
        for signalled in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
            left = [process for process in self.processes if process.poll() is None]
            for process in left:
                _signal_session(process, signalled)
            until = time.monotonic() + PATIENCE
            for process in left:
                try:
                    process.wait(max(0.0, until - time.monotonic()))
                except subprocess.TimeoutExpired:
                    pass
        for process in self.processes:
            _signal_session(process, getattr(signal, "SIGKILL", signal.SIGTERM))  # what it left behind
            if process.stdin is not None:
                process.stdin.close()
        for listener in self.listeners:
            listener.join(1)
        while not self.lines.empty():
            self._show(0)


def _signal_session(process: subprocess.Popen[str], number: int) -> None:
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
    except (ProcessLookupError, PermissionError):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# There: run the function


def _work(folder: str, local: str) -> None:
    """What each process does: call the function, leave its result or its error in the folder."""
    import cloudpickle

    lifeline = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    threading.Thread(target=_end_with_parent, args=(lifeline, folder), daemon=True).start()
    try:
        function, args, cells = pickle.loads(Path(folder, "work").read_bytes())
        linecache.cache.update(cells)
        value = function(*args)
        try:
            packed = cloudpickle.dumps(value)
        except Exception as error:
            raise TypeError(f"{_name(function)} returned a {type(value).__name__}, which cannot be sent back "
                            f"({error}): return plain data or CPU tensors") from error  # fmt: skip
        _leave(Path(folder, f"result-{local}"), packed)
    except BaseException as error:
        lost = type(error).__name__ == "ProcessLost"
        last = traceback.format_exception_only(type(error), error)[-1].strip()
        inner = error.__traceback__ and error.__traceback__.tb_next
        shown = "".join(traceback.format_exception(type(error), error, inner))
        _leave(Path(folder, f"error-{local}"), pickle.dumps((lost, time.time(), f"failed: {last}\n\n{shown}")))
        sys.exit(1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
        time.sleep(0.2)  # see `distributed.settle`


def _leave(path: Path, content: bytes) -> None:
    """Write a file that is there wholly or not at all."""
    path.with_suffix(".part").write_bytes(content)
    path.with_suffix(".part").rename(path)


def _end_with_parent(lifeline: int, folder: str) -> None:
    """Wait until the other end of a pipe, which only the parent holds, is closed; then end all that started here."""
    os.read(lifeline, 1)
    shutil.rmtree(folder, ignore_errors=True)  # which the parent could not do
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
