"""Groups of real processes for tests: each has a rank, gloo between them, and runs what the test sends it.

They are forked from a server that has torch (`forked.py`), so that a group of eight is there in a second. Not a
launcher: those are tested as they are, in test_launch.py and test_notebook.py.
"""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cloudpickle

from tests.forked import forking

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve(pipe: Connection, variables: dict[str, str]) -> None:
    """One rank: join the group, then run what comes until None does."""
    os.environ.update(variables)
    from bigkit.distributed.state import PartialState

    state = PartialState(timeout=SECONDS)
    while (work := pipe.recv_bytes()) != b"":
        function, args = cloudpickle.loads(work)
        try:
            answer = (True, function(state, *args))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(cloudpickle.dumps(answer))
    state.destroy()


class Ranks:
    """`size` processes that are one group."""

    def __init__(self, size: int) -> None:
        context = forking()
        world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.size = size
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            here, there = context.Pipe()
            variables = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            process = context.Process(target=serve, args=(there, variables), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(state, *args)` returns on each rank, in order; the first failure is an AssertionError."""
        answers = self.tries(function, *args)
        for rank, (fine, answer) in enumerate(answers):
            assert fine, f"rank {rank} of {self.size}:\n{answer}"
        return [answer for _, answer in answers]

    def tries(self, function: Callable[..., Any], *args: Any) -> list[tuple[bool, Any]]:
        """For each rank whether it returned, and what: its value, or its traceback."""
        self.send(function, *args)
        answers = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(2 * SECONDS), f"rank {rank} of {self.size} does not answer"
            answers.append(cloudpickle.loads(pipe.recv_bytes()))
        return answers

    def send(self, function: Callable[..., Any], *args: Any) -> None:
        """Start `function(state, *args)` on each rank, and do not wait for it."""
        work = cloudpickle.dumps((function, args))
        for pipe in self.pipes:
            pipe.send_bytes(work)

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send_bytes(b"")
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
