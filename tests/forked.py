"""Programs in processes of their own that need not import torch: a server imports it once for all, and forks them.

Not for what only a fresh interpreter shows: which imports a module makes, and what is read from the environment then.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import NoReturn

SHARED = [
    "torch", "numpy", "datasets", "transformers.models.llama.modeling_llama", "bigkit.distributed.gather",
    "bigkit.offload.load_and_dispatch", "ipykernel.kernelapp", "matplotlib.pyplot",
]  # fmt: skip


def forking() -> ForkServerContext:
    """What starts processes from the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SHARED)
    return context


class Forked:
    """A program that runs, in a session of its own, as `python -c` would run it.

    Args:
        code: its source.
        words: what follows in its `sys.argv`.
        folder: where it runs; None: here.
        variables: its whole environment; None: ours.
    """

    def __init__(
        self, code: str, *words: object, folder: Path | None = None, variables: Mapping[str, str] | None = None
    ) -> None:
        self.said = tempfile.TemporaryDirectory(prefix="tests-")
        self.files = [str(Path(self.said.name, name)) for name in ("stdout", "stderr")]
        place, environment = str(folder or os.getcwd()), dict(os.environ if variables is None else variables)
        arguments = (code, [*map(str, words)], place, environment, self.files)
        self.process = forking().Process(target=_run, args=arguments)
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process.exitcode is None

    def kill(self, number: int = signal.SIGKILL) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """Its end: exit status (negative: the signal that ended it) and what it wrote."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.kill()
            self.process.join()
            self.said.cleanup()
            raise subprocess.TimeoutExpired("a forked program", seconds)
        out, err = (Path(file).read_text(encoding="utf-8") for file in self.files)
        self.said.cleanup()
        return subprocess.CompletedProcess([], self.process.exitcode, out, err)


def run(code: str, *words: object, folder: Path | None = None, variables: Mapping[str, str] | None = None,
        seconds: float = 120) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run a program to its end. See `Forked`."""
    return Forked(code, *words, folder=folder, variables=variables).wait(seconds)


def launcher(*words: object, folder: Path, variables: Mapping[str, str], first: str = "") -> Forked:
    """`bigkit launch ...`, with torchrun in the process that is forked, and the processes of the script forked from it.

    Args:
        first: source that runs before.
    """
    return Forked(first + _LAUNCH, "launch", *words, folder=folder, variables=variables)


def launch(*words: object, folder: Path, variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Launch a script and wait for its end. See `launcher`."""
    return launcher(*words, folder=folder, variables=variables).wait()


_LAUNCH = """
import os, runpy, sys
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
from bigkit.cli import main
from tests.forked import Script

class Become(BaseException):
    pass

def become(path, line):
    raise Become(*line)

os.execv = become
try:
    sys.exit(main(sys.argv[1:]))
except Become as other:
    subprocess_handler.Popen, sys.argv = Script, [*other.args[2:]]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


class Script(subprocess.Popen):  # type: ignore[type-arg]
    """`python -u script ...`, forked from this process, in a session of its own."""

    def _execute_child(self, args: Sequence[str], *how: object) -> None:
        assert (*args[:2],) == (sys.executable, "-u")
        environment, script = how[5], args[2]
        assert isinstance(environment, dict)
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            self._child_created = True
        else:
            os.setsid()
            sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
            _become(lambda: runpy.run_path(script, run_name="__main__"), args[2:], environment)


class Kernel(Forked):
    """`python -m ipykernel_launcher ...`, as jupyter_client's `launch_kernel` starts it."""

    stdin = stdout = stderr = None

    def __init__(
        self, words: Sequence[str], *, cwd: str | None = None, env: Mapping[str, str], **others: object
    ) -> None:
        assert words[1:3] == ["-m", "ipykernel_launcher"]
        super().__init__(_KERNEL, *words[3:], folder=Path(cwd or os.getcwd()), variables=env)
        while self.poll() is None and os.getpgid(self.pid) != self.pid:  # else a signal to its group would end us
            time.sleep(0.001)

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        self.kill(number)

    def terminate(self) -> None:
        self.kill(signal.SIGTERM)


_KERNEL = """
import os, runpy, matplotlib

matplotlib.rcParams["backend"] = os.environ.get("MPLBACKEND") or "module://matplotlib_inline.backend_inline"
runpy.run_module("ipykernel_launcher", run_name="__main__", alter_sys=True)
"""


def _run(code: str, words: list[str], folder: str, variables: dict[str, str], files: list[str]) -> None:
    os.setsid()
    for descriptor, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    sys.stdout, sys.stderr = (open(descriptor, "w", encoding="utf-8", buffering=1) for descriptor in (1, 2))
    os.chdir(folder)
    sys.path.insert(0, folder)
    program = compile(code, "<forked>", "exec")
    _become(lambda: exec(program, {"__name__": "__main__"}), ["-c", *words], variables)


def _become(program: Callable[[], object], words: Sequence[str], variables: Mapping[str, str]) -> NoReturn:
    """Run a program as a Python of its own would, from its arguments and environment to its exit status."""
    status = 1
    try:
        gc.freeze()  # what the server has imported stays
        atexit._clear()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # a launcher handles them
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs beside it ignores them
        os.environ.clear()
        os.environ.update(variables)
        sys.argv = [*words]
        program()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        frames = error.__traceback__
        while frames and frames.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
            frames = frames.tb_next
        sys.excepthook(type(error), error.with_traceback(frames), frames)
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
