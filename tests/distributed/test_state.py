"""Who a process is, waiting for the others, and what happens when one fails, in real groups of processes."""

import multiprocessing.connection
import os
import subprocess
import sys
import time
from typing import Any
from unittest import mock

import cloudpickle
import pytest
import torch
import torch.distributed as dist

import bigkit
from bigkit.distributed.gather import gather, gather_for_results, gather_object
from bigkit.distributed.state import PartialState, ProcessLost, split_between_processes
from tests import forked
from tests.ranks import ROOT, Ranks, free_port


def test_who_am_i(ranks: Ranks) -> None:
    def who(state: PartialState) -> tuple[Any, ...]:
        again = PartialState()
        return (
            state.process_index, again.process_index, state.num_processes, state.local_process_index,
            state.is_main_process, state.is_last_process, state.is_local_main_process, str(state.device),
        )  # fmt: skip

    n = ranks.size
    assert ranks(who) == [(i, i, n, i, i == 0, i == n - 1, i == 0, "cpu") for i in range(n)]


def test_main_process_first_and_only(ranks: Ranks, tmp_path: Any) -> None:
    def order(state: PartialState, folder: str) -> tuple[Any, ...]:
        path = f"{folder}/{state.num_processes}"
        with state.main_process_first():
            found = os.path.exists(path)
            open(path, "a").close()
        state.wait_for_everyone()
        with state.local_main_process_first():
            pass

        @state.on_main_process
        def once() -> int:
            """Only one."""
            return 5

        last = state.on_last_process(lambda: True)()
        return found, once(), once.__name__, state.on_local_main_process(lambda x: x)(3), last

    for rank, answer in enumerate(ranks(order, str(tmp_path))):
        last = True if rank == ranks.size - 1 else None
        assert answer == (rank > 0, None if rank else 5, "once", None if rank else 3, last)


def test_an_error_in_the_first_process_leaves_no_other_waiting(three: Ranks) -> None:
    def fail(state: PartialState) -> None:
        with state.main_process_first():
            if state.is_main_process:
                raise OSError("no such model")

    answers = three.tries(fail)
    assert [fine for fine, _ in answers] == [False, True, True] and "no such model" in answers[0][1]


def test_a_process_that_dies_is_an_error_for_the_others() -> None:
    group = Ranks(3)

    def die(state: PartialState) -> None:
        if state.process_index == 1:
            os._exit(1)
        gather_object([1])

    group.send(die)
    for rank in (0, 2):
        assert group.pipes[rank].poll(20)
        fine, text = cloudpickle.loads(group.pipes[rank].recv_bytes())
        assert not fine and ProcessLost.__name__ in text
        assert f"process {rank} of 3 cannot finish gather_object: another process has ended" in text
    for process in group.processes:
        process.kill()


def test_a_process_that_does_not_come_is_an_error_in_time() -> None:
    group = Ranks(2)

    def late(state: PartialState) -> None:
        state.destroy()
        other = PartialState(timeout=1)
        if other.process_index == 0:
            other.wait_for_everyone()
        else:
            time.sleep(2)

    port = str(free_port())  # a second group of the same processes needs a store of its own
    group(lambda state, port: os.environ.update(MASTER_PORT=port), port)
    answers = group.tries(late)
    assert [fine for fine, _ in answers] == [False, True] and "cannot finish wait_for_everyone" in answers[0][1]
    for process in group.processes:
        process.kill()


def test_unlaunched_is_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    state = PartialState(cpu=True)
    assert (state.process_index, state.num_processes) == (0, 1) and state.is_main_process and state.is_last_process
    assert repr(state) == "PartialState(process 0 of 1, cpu)"
    state.wait_for_everyone()
    state.print("hello", end="!")
    assert capsys.readouterr().out == "hello!"
    with split_between_processes(range(3)) as mine:
        assert mine == range(3)
    assert gather_for_results([1, 2], 2) == [1, 2] and gather(torch.tensor(1)).tolist() == [1]
    with pytest.raises(ValueError, match="one result for each input"):
        gather_for_results([1, 2], 3)
    state.destroy()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set but RANK and MASTER_ADDR and MASTER_PORT is not"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "start the script with `bigkit launch`"),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK is 'x'"),
    ],
)
def test_half_a_launch_is_refused(variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=said):
        PartialState()


def test_the_hook_on_uncaught_errors_is_there_only_while_a_launcher_waits() -> None:
    before = sys.excepthook
    state = PartialState(cpu=True)
    assert sys.excepthook is before, "a single process is left alone"
    state.destroy()
    assert sys.excepthook is before

    def joined(state: PartialState, port: str) -> list[bool]:
        state.destroy()
        before = sys.excepthook
        os.environ.update(MASTER_PORT=port, TORCHELASTIC_RUN_ID="test")
        state = PartialState(cpu=True)
        hooks = [sys.excepthook is before]
        PartialState(cpu=True)
        state.destroy()
        return [*hooks, sys.excepthook is before]

    group = Ranks(1)
    assert group(joined, str(free_port())) == [[False, True]]
    group.close()


def test_joining_ends_when_all_have_joined() -> None:
    """Else a process that has nothing to do ends while another is still connecting, which then fails."""

    def join(state: PartialState, port: str) -> float:
        state.destroy()
        os.environ["MASTER_PORT"] = port
        init = dist.init_process_group

        def slow_init(*args: Any, **options: Any) -> None:
            init(*args, **options)
            time.sleep(0.5 * state.process_index)

        start = time.monotonic()
        with mock.patch.object(dist, "init_process_group", slow_init):
            PartialState(cpu=True)
        return time.monotonic() - start

    group = Ranks(2)
    assert group(join, str(free_port()))[0] > 0.4, "process 0 went on before process 1 had joined"
    group.close()


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs the names of a process's threads")
def test_leaving_ends_the_threads_of_the_group() -> None:
    """Else one lets go of a tensor while Python ends, which aborts the process: rarely, and with all its work done."""
    code = (
        "import os\nfrom glob import glob\nfrom bigkit import PartialState\n"
        "state = PartialState(cpu=True)\n"
        "import torch.distributed.nn.functional  # as loading a model does: nine defaults hold what group there is\n"
        "def threads(): return [path for path in glob('/proc/self/task/*/comm') if 'gloo' in open(path).read()]\n"
        "assert threads()\nstate.destroy()\nassert not threads(), threads()\n"
    )
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = forked.run(code, variables={**os.environ, **variables})
    assert done.returncode == 0, done.stderr


def test_a_call_outside_the_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    for call in (lambda: gather(torch.ones(1)), lambda: gather_object([1]), lambda: gather_for_results([1], 1)):
        with pytest.raises(RuntimeError, match="process 1 of 3 called gather.* outside the group"):
            call()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="process 1 of this host has no GPU: there are 1"):
        PartialState()


def test_public_names_need_no_torch_until_used() -> None:
    code = "import bigkit, bigkit.distributed.shares, sys; print('torch' in sys.modules, bigkit.PartialState.__name__)"
    said = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT)
    assert said == "False PartialState\n"
    assert {"PartialState", "gather", "split_between_processes", "notebook_launcher"} <= set(bigkit.__all__)


def test_accelerate_aborts_on_uneven_gathers_and_waits_after_errors() -> None:
    group = Ranks(2)

    def uneven(state: PartialState) -> None:
        from accelerate import PartialState as Other
        from accelerate.utils import gather as their_gather

        rows = torch.zeros(1 + state.process_index)
        assert len(gather(rows)) == 3, "ours"
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what it says when it aborts
        Other(cpu=True)
        their_gather(rows)

    group.send(uneven)
    assert multiprocessing.connection.wait([process.sentinel for process in group.processes], 20)
    time.sleep(0.1)
    assert any(process.exitcode not in (0, None) for process in group.processes)
    for process in group.processes:
        process.kill()

    group = Ranks(2)

    def fails(state: PartialState, theirs: bool) -> float:
        from accelerate import PartialState as Other

        first = Other(cpu=True) if theirs else state
        start = time.monotonic()
        try:
            with first.main_process_first():
                if state.is_main_process:
                    raise OSError("no such model")
        except OSError:
            time.sleep(1)  # busy with something else
            if theirs:
                state.wait_for_everyone()
        return time.monotonic() - start

    assert group(fails, False)[1] < 0.9 < group(fails, True)[1]
    group.close()


def test_members_that_accelerates_users_know(three: Ranks) -> None:
    def members(state: PartialState) -> list[Any]:
        calls = [state.on_process(process_index=1), state.on_local_process(local_process_index=0)]
        calls += [state.on_main_process(), state.on_local_main_process(), state.on_last_process()]
        state.set_device()
        facts = [state.use_distributed, state.initialized, state.backend, state.distributed_type]
        return [*facts, *(call(lambda: True)() for call in calls)]

    facts = [True, True, "gloo", "MULTI_CPU"]
    first, second = [*facts, None, True, True, True, None], [*facts, True, None, None, None, None]
    assert three(members) == [first, second, [*facts, None, None, None, None, True]]
    alone = PartialState(cpu=True)
    assert (alone.use_distributed, alone.backend, alone.distributed_type) == (False, None, "NO")
    assert alone.on_process(lambda: 5, 3)() == 5


@pytest.mark.parametrize("processes", [1, 2])
def test_a_group_can_be_joined_again_and_again(processes: int) -> None:
    def again() -> list[list[int]]:
        answers = []
        for _ in range(4):
            state = PartialState(cpu=True, timeout=60)
            answers.append(gather_object([state.process_index]))
            state.destroy()
        return answers

    assert bigkit.notebook_launcher(again, num_processes=processes) == [[[*range(processes)]] * 4] * processes
