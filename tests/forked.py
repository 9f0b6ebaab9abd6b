"""Programs in processes of their own that need not import torch: a server imports it once for all, and forks them.

Not for what only a fresh interpreter shows: which imports a module makes, and what is read from the environment then.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.context import ForkServerContext
from pathlib import Path

SHARED = [
    "torch", "numpy", "datasets", "transformers.models.llama.modeling_llama", "bigkit.distributed.gather",
    "bigkit.offload.load_and_dispatch",
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


def _run(code: str, words: list[str], folder: str, variables: dict[str, str], files: list[str]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it runs beside it ignore interrupts
    for descriptor, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    sys.stdout, sys.stderr = (open(descriptor, "w", encoding="utf-8", buffering=1) for descriptor in (1, 2))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = ["-c", *words]
    sys.path.insert(0, folder)
    exec(compile(code, "<forked>", "exec"), {"__name__": "__main__"})
