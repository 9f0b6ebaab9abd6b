"""`notebook_launcher` runs what a notebook defines, returns it in order, says who failed, and leaves nothing."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from nbclient import NotebookClient

from bigkit import notebook_launcher
from bigkit.distributed.notebook import LaunchError, pack
from tests.distributed.test_launch import ENVIRONMENT, still_alive, wait_for
from tests.forked import Forked
from tests.ranks import ROOT, free_port

os.environ.setdefault("PYTHONPATH", str(ROOT))


def test_functions_of_a_notebook(tmp_path: Path) -> None:
    """One kernel, many cells: globals, classes, a model, imports, output, errors with their lines."""
    cells = [
        "import torch\nfrom dataclasses import dataclass\n"
        "from bigkit import PartialState, gather_object, notebook_launcher",
        "@dataclass\nclass Answer:\n    rank: int\n    text: str\n\nscale = torch.nn.Linear(2, 2)\nprefix = 'p'",
        "def shout(text):\n    return prefix + text.upper()\n\n"
        "def infer(prompts, *, loud=True):\n    state = PartialState(cpu=True)\n"
        "    with state.split_between_processes(prompts) as mine:\n"
        "        answers = [Answer(state.process_index, shout(text)) for text in mine]\n"
        "    print('I have', len(mine))\n"
        "    with torch.no_grad():\n        total = scale(torch.ones(1, 2)).sum()\n"
        "    return gather_object(answers), total",
        "results = notebook_launcher(infer, (['a', 'b', 'c'],), num_processes=2)",
        "assert len(results) == 2 and results[0][0] == results[1][0]\n"
        "assert [(a.rank, a.text) for a in results[0][0]] == [(0, 'pA'), (0, 'pB'), (1, 'pC')]\n"
        "assert all(isinstance(a, Answer) for a in results[0][0])\n"
        "assert all(torch.equal(r[1], scale(torch.ones(1, 2)).sum().detach()) for r in results)",
        "def wrong(x):\n    state = PartialState(cpu=True)\n    if state.process_index == 1:\n"
        "        return 1 / x  # this line is shown\n    gather_object([1])",
        "try:\n    notebook_launcher(wrong, (0,), 2)\nexcept Exception as error:\n    print(error)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(out.get("text", "") for out in notebook.cells[3].outputs)
    assert sorted(said.splitlines()) == ["[0] I have 2", "[1] I have 1"]
    error = "".join(out.get("text", "") for out in notebook.cells[6].outputs)
    assert error.startswith("process 1 of 2 failed: ZeroDivisionError") and "1 / x  # this line is shown" in error
    assert "ProcessLost" not in error


def test_compiled_class_that_claims_to_be_of_python_is_found_by_its_name() -> None:
    from safetensors import safe_open

    assert safe_open.__module__ == "builtins", "that is what hides it from pickle"
    _, args, _ = pickle.loads(pack(len, (safe_open, int)))
    assert args == (safe_open, int)


def test_results_come_in_the_order_of_ranks_and_output_with_the_number(capfd: pytest.CaptureFixture[str]) -> None:
    def work(x: int) -> tuple[int, int, str | None]:
        import sys
        import time

        rank = int(os.environ["RANK"])
        time.sleep(0.3 * (2 - rank))
        print("out", rank)
        print("bar 1\rbar 2", file=sys.stderr)
        os.write(1, b"no newline")
        return rank, x, os.environ["OMP_NUM_THREADS"]

    assert [result[:2] for result in notebook_launcher(work, (7,), 3)] == [(0, 7), (1, 7), (2, 7)]
    said = sorted(capfd.readouterr().out.splitlines())
    expected = [
        line.format(rank)
        for rank in range(3)
        for line in ("[{0}] out {0}", "[{0}] bar 1", "[{0}] bar 2", "[{0}] no newline")
    ]
    assert said == sorted(expected)


def test_with_a_group_of_torch_alone() -> None:
    def by_hand() -> list[int]:
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo")
        mine = torch.tensor([dist.get_rank() ** 2])
        parts = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, mine)
        return [int(part) for part in parts]

    assert notebook_launcher(by_hand, (), 2) == [[0, 1]] * 2


@pytest.mark.parametrize("each", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_two_hosts_of_notebooks(each: int) -> None:
    """Two Pythons, as on two hosts, with so many processes each."""
    code = (
        "import sys\nfrom bigkit import notebook_launcher\n"
        "def who():\n    from bigkit import PartialState, gather_object\n    s = PartialState(cpu=True)\n"
        "    return s.process_index, s.local_process_index, gather_object([s.process_index])\n"
        f"print(notebook_launcher(who, (), {each}, use_port={free_port()}, num_nodes=2, node_rank=int(sys.argv[1])))"
    )
    hosts = [Forked(code, host, variables=ENVIRONMENT) for host in (0, 1)]
    for host, program in enumerate(hosts):
        results = [(host * each + local, local, list(range(2 * each))) for local in range(each)]
        assert program.wait().stdout == f"{results}\n"


def test_a_process_that_is_killed_is_named() -> None:
    def die() -> None:
        from bigkit import PartialState, gather_object

        state = PartialState(cpu=True)
        if state.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        gather_object([1])

    with pytest.raises(LaunchError, match="process 1 of 2 was ended by SIGKILL; often that means that memory ran out"):
        notebook_launcher(die, (), 2)

    def leave() -> None:
        os._exit(3)

    with pytest.raises(LaunchError, match="process 0 of 1 ended with status 3 and without an error"):
        notebook_launcher(leave, (), 1)
    with pytest.raises(LaunchError, match="process . of 2 ended with status 0 and without an error"):
        notebook_launcher(lambda: os._exit(0), (), 2)


def test_what_cannot_be_sent_is_named() -> None:
    import threading

    lock = threading.Lock()

    def locked() -> None:
        lock.acquire()

    with pytest.raises(TypeError, match="cannot send locked to other processes because of the variable 'lock', a lock"):
        notebook_launcher(locked, (), 1)
    with pytest.raises(TypeError, match="because of argument 1, a generator"):
        notebook_launcher(print, (1, (i for i in range(2))), 1)
    with pytest.raises(LaunchError, match="returned a generator, which cannot be sent back"):
        notebook_launcher(lambda: (i for i in range(2)), (), 1)


def test_modules_of_a_class_of_their_own_are_sent_by_name() -> None:
    import torch
    from torch.backends import cudnn, mkldnn, opt_einsum

    def seed_everything() -> None:
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = False
        cudnn.deterministic = True

    operations, addition, overload = torch.ops.aten, torch.ops.aten.add, torch.ops.aten.add.Tensor

    def work(given: Any) -> list[Any]:
        seed_everything()
        torch.backends.cuda.matmul.allow_tf32 = True
        one = torch.ones(1)
        sums = [operations.add(one, 1), torch.ops.aten.add(one, 1), addition(one, 1), overload(one, one)]
        names = [module.__name__ for module in (given, mkldnn, opt_einsum, torch.classes)]
        return [torch.backends.cudnn.deterministic, torch.backends.mps.is_available(), *map(float, sums), *names]

    assert notebook_launcher(work, (cudnn,), num_processes="1") == [  # type: ignore[arg-type]
        [True, False, 2.0, 2.0, 2.0, 2.0, "torch.backends.cudnn", *(f"torch.{name}" for name in MODULES)]
    ]


MODULES = ("backends.mkldnn", "backends.opt_einsum", "classes")


@pytest.mark.parametrize("arguments", [5, "ab", None])
def test_arguments_that_are_no_sequence(arguments: Any) -> None:
    with pytest.raises(TypeError, match="expected a tuple or list of the function's arguments"):
        notebook_launcher(print, arguments)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_processes": 0}, "cannot start 0 processes"),
        ({"node_rank": 1}, "host 1 of 1"),
        ({"num_nodes": 2}, "pass use_port"),
        ({"mixed_precision": "fp16"}, "mixed_precision is 'fp16'"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        notebook_launcher(print, (), **options)


SLEEPER = """
import os, subprocess, sys, time
from bigkit import notebook_launcher

def sleep(folder):
    import os, subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    rank = os.environ["RANK"]
    with open(f"{folder}/{rank}.part", "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    os.rename(f"{folder}/{rank}.part", f"{folder}/{rank}")
    time.sleep(600)

try:
    notebook_launcher(sleep, (sys.argv[1],), 2)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_nothing_outlives_an_interrupted_or_killed_kernel(name: str, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    variables = {**ENVIRONMENT, "TMPDIR": str(temporary)}
    program = Forked(SLEEPER, tmp_path, variables=variables)
    pids: list[int] = []
    try:
        wait_for(tmp_path / "0", tmp_path / "1")
        pids = [int(pid) for rank in "01" for pid in (tmp_path / rank).read_text().split()]
        assert len(pids) == 4 and all(map(psutil.pid_exists, pids))
        start = time.monotonic()
        program.kill(getattr(signal, name))
        done = program.wait(30)
        assert time.monotonic() - start < 20
        assert (name == "SIGINT") == (done.stdout == "interrupted\n"), done
        assert still_alive(pids) == []
        assert not list(temporary.glob("bigkit-*")), "the function and its results are left behind"
    finally:
        for pid in pids:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        program.kill()


def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert notebook_launcher(lambda: 1, (), 1) == [1]
    assert list(tmp_path.iterdir()) == []


def test_interrupting_a_cell_ends_its_processes(tmp_path: Path) -> None:
    """The square button of a real kernel."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path), env=ENVIRONMENT)

    def reply(request: str) -> dict[str, Any]:
        while (message := client.get_shell_msg(timeout=30))["parent_header"].get("msg_id") != request:
            pass  # a late answer to one of the requests by which the client found out that the kernel is ready
        return dict(message["content"])

    try:
        code = SLEEPER.partition("try:")[0] + "notebook_launcher(sleep, ('.',), 2)"
        request = client.execute(code, stop_on_error=False)  # else the kernel may answer "aborted" to the next one
        wait_for(tmp_path / "0", tmp_path / "1")
        pids = [int(pid) for rank in "01" for pid in (tmp_path / rank).read_text().split()]
        manager.interrupt_kernel()
        answer = reply(request)
        assert (answer["status"], answer["ename"]) == ("error", "KeyboardInterrupt")
        assert still_alive(pids) == []
        request = client.execute("notebook_launcher(lambda: 1, (), 1)")
        assert reply(request)["status"] == "ok", "the kernel still works"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_accelerate_returns_nothing_and_refuses_bitsandbytes() -> None:
    import accelerate
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # it refuses a process in which it was used before
    assert accelerate.notebook_launcher(lambda: 1, (), num_processes=1) is None
    sys.modules.setdefault("bitsandbytes", sys)
    try:
        with pytest.raises(RuntimeError, match="bitsandbytes"):
            accelerate.notebook_launcher(lambda: 1, (), num_processes=2)
        assert notebook_launcher(lambda: 1, (), 2) == [1, 1]
    finally:
        if sys.modules["bitsandbytes"] is sys:
            del sys.modules["bitsandbytes"]
