"""`bigkit launch` is torchrun with other words: what it starts, what it refuses, and that nothing outlives it."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from bigkit import cli
from bigkit.distributed.launch import Settings, command_line, read_config, write_example
from tests import forked
from tests.ranks import ROOT, free_port

PATHS = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
BIGKIT = [sys.executable, "-m", "bigkit.cli"]


@pytest.fixture(autouse=True)
def no_default_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setitem(ENVIRONMENT, "HF_HOME", str(tmp_path / "hf"))


def launch(folder: Path, *words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """`bigkit launch ...` in a folder."""
    return subprocess.run(
        [*BIGKIT, "launch", *map(str, words)], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
        **options,
    )  # fmt: skip


def still_alive(pids: Sequence[int], seconds: float = 10) -> list[int]:
    """Which of some processes are left after at most so many seconds."""
    until = time.monotonic() + seconds
    while left := [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]:
        if time.monotonic() > until:
            break
        time.sleep(0.2)
    return left


def wait_for(*paths: Path, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < until, f"{[path.name for path in paths if not path.exists()]} did not come"
        time.sleep(0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Words


def shown(*words: str) -> str:
    return str(cli._launch(cli._parser().parse_args(["launch", "--show", *words])))


def test_words_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert shown("--num_processes", "2", "x.py", "--num_processes", "3", "-m") == (
        "torchrun --standalone --nproc-per-node 2 x.py --num_processes 3 -m"
    ), "what follows the script is its own"
    assert shown("--cpu", "-m", "my.module") == (
        "BIGKIT_USE_CPU=1 torchrun --standalone --nproc-per-node 1 -m my.module"
    )
    assert shown("--gpu_ids", "0, 2", "--main_process_port", "5", "x.py") == (
        "CUDA_VISIBLE_DEVICES=0,2 torchrun --master-port 5 --nproc-per-node 2 x.py"
    )
    hosts = "--num_processes 4 --num_machines 2 --main_process_ip h --main_process_port 5 x.py".split()
    assert shown("--machine_rank", "1", *hosts) == (
        "torchrun --nnodes 2 --nproc-per-node 2 --node-rank 1 --master-addr h --master-port 5 x.py"
    )
    assert "'a b.py'" in shown("--cpu", "a b.py")


def test_programs_and_modules_and_what_has_no_effect(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert shown("--num-processes", "2", "--no_python", "prog") == (
        "torchrun --standalone --nproc-per-node 2 --no-python prog"
    )
    everyday = "--multi_gpu --same_network --mixed-precision no --dynamo_backend no --num_machines 1 --machine_rank 0"
    assert shown("--num-processes", "2", *everyday.split(), "x.py") == "torchrun --standalone --nproc-per-node 2 x.py"
    assert capsys.readouterr().err == ""
    assert shown("--cpu", "--mixed_precision", "bf16", "--dynamo-backend=inductor", "--debug", "x.py")
    assert capsys.readouterr().err == (
        "bigkit launch ignores debug (True), dynamo_backend (inductor), mixed_precision (bf16)\n"
    )
    assert cli.main(["launch", "--use-fsdp", "x.py"]) == 2
    assert "cannot do --use_fsdp: it runs inference" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        shown("--module", "--no_python", "x")


def test_torchrun_understands_the_words() -> None:
    from torch.distributed.run import parse_args

    hosts: dict[str, Any] = {"num_machines": 2, "main_process_ip": "h", "main_process_port": 5}
    for settings in (Settings(3), Settings(2, main_process_port=7), Settings(4, machine_rank=1, **hosts)):  # fmt: skip
        options = parse_args(settings.torchrun(["x.py", "--nnodes", "9"]))
        assert options.training_script == "x.py" and options.training_script_args == ["--nnodes", "9"]
        assert int(options.nproc_per_node) * int(options.nnodes.split(":")[-1]) == settings.num_processes


def test_each_process_gets_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    threads = {n: Settings(n, use_cpu=True).environment()["OMP_NUM_THREADS"] for n in (1, 2, 3, 16)}
    assert threads == {1: "8", 2: "4", 3: "2", 16: "1"}
    hosts = Settings(4, num_machines=2, main_process_ip="h", main_process_port=5)
    assert hosts.environment()["OMP_NUM_THREADS"] == "4", "two on this host"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_processes": 0}, "num_processes is 0: expected a whole number, at least 1"),
        ({"num_processes": "two"}, "num_processes is 'two'"),
        (
            {"num_processes": 3, "num_machines": 2, "main_process_ip": "h", "main_process_port": 5},
            "cannot share evenly",
        ),
        ({"num_machines": 2, "main_process_port": 5}, "main_process_ip is missing"),
        ({"num_machines": 2, "main_process_ip": "h"}, "main_process_port is missing"),
        ({"machine_rank": 1}, "machine_rank is 1: the 1 machines are numbered from 0"),
        ({"rdzv_backend": "c10d"}, "rdzv_backend is 'c10d': expected static"),
        ({"gpu_ids": "a"}, "gpu_ids is 'a'"),
        ({"use_cpu": "yes"}, "use_cpu is 'yes'"),
    ],
)
def test_settings_that_make_no_sense(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        Settings(**values)


# ---------------------------------------------------------------------------------------------------------------------
# Config files


def test_config_files_that_accelerate_writes(tmp_path: Path) -> None:
    from accelerate.commands.config.default import write_basic_config

    path = tmp_path / "default_config.json"
    write_basic_config(save_location=str(path))
    assert read_config(path)["num_machines"] == 1
    text = """
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: MULTI_GPU
downcast_bf16: 'no'
enable_cpu_affinity: false
gpu_ids: 0,1
machine_rank: 0
main_process_ip: 10.0.0.1
main_process_port: 29500
main_training_function: main
mixed_precision: fp16
num_machines: 2
num_processes: 4
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
use_cpu: false
"""
    (tmp_path / "my_config.yaml").write_text(text)
    found = read_config(tmp_path / "my_config.yaml")
    assert found["num_processes"] == 4 and found["main_process_ip"] == "10.0.0.1" and found["gpu_ids"] == "0,1"
    (tmp_path / "my_config.json").write_text('{"num_processes": 2, "distributed_type": "MULTI_CPU", "gpu_ids": null}')
    assert read_config(tmp_path / "my_config.json") == {"num_processes": 2, "use_cpu": True}


def test_accelerates_default_file_is_found_and_never_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "hf" / "accelerate" / "default_config.yaml"
    assert shown("x.py") == "torchrun --standalone --nproc-per-node 1 x.py"
    path.parent.mkdir(parents=True)
    path.write_text("distributed_type: MULTI_CPU\nnum_processes: 3\nmixed_precision: bf16\n")
    assert shown("x.py") == "BIGKIT_USE_CPU=1 torchrun --standalone --nproc-per-node 3 x.py"
    assert capsys.readouterr().err == "bigkit launch ignores mixed_precision (bf16)\n"
    assert "--nproc-per-node 2" in shown("--num_processes", "2", "x.py")
    capsys.readouterr()
    path.write_text("distributed_type: FSDP\nnum_processes: 8\n")
    assert "--nproc-per-node 1" in shown("x.py")
    said = capsys.readouterr().err
    assert said.startswith(f"bigkit launch ignores {path}: distributed_type is 'FSDP'") and said.count("\n") == 1
    assert cli.main(["config", "default"]) == 2 and "is there already" in capsys.readouterr().err
    path.unlink()
    assert cli.main(["config", "default"]) == 0
    assert load_config_from_file(str(path)).num_processes == read_config(path)["num_processes"] == 1
    capsys.readouterr()
    assert cli.main(["env"]) == 0 and str(path) in capsys.readouterr().out
    assert cli.main(["test"]) == 0 and "--example" in capsys.readouterr().out


def test_options_overrule_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "c.json"
    path.write_text('{"num_processes": 2, "use_cpu": true, "main_process_port": 7}')
    assert shown("--config_file", str(path), "x.py").endswith("torchrun --master-port 7 --nproc-per-node 2 x.py")
    assert "--nproc-per-node 3" in shown("--config_file", str(path), "--num_processes", "3", "x.py")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"num_process": 2}', "unknown key 'num_process': is num_processes meant?"),
        ('{"num_processes": "2"}', "num_processes is '2'"),
        ('{"num_processes": true}', "num_processes is True"),
        ('{"distributed_type": "FSDP"}', "distributed_type is 'FSDP'"),
        ('{"distributed_type": "NO", "num_processes": 2}', "distributed_type is NO, but num_processes is 2"),
        ('{"deepspeed_config": {"zero_stage": 3}}', "deepspeed_config is set"),
        ('{"compute_environment": "AMAZON_SAGEMAKER"}', "compute_environment is 'AMAZON_SAGEMAKER'"),
        ('{"gpu_ids": true}', "gpu_ids is True"),
        ('{"fsdp_config": {}, "tpu_env": [], "gpu_id": null}', "unknown key 'gpu_id': is gpu_ids meant?"),
        ('["num_processes"]', "holds a list"),
        ('{"num_processes": 2', "is no JSON"),
    ],
)
def test_a_bad_config_is_refused_by_key(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        read_config(tmp_path / "c.json")
    assert "c.json" in str(error.value)
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(said.replace("JSON", "YAML"))):
        read_config(tmp_path / "c.yaml")


def test_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words, said in (
        (["--config_file", "none.yaml", "x.py"], "there is no config file none.yaml"),
        (["x.py"], "there is no script x.py"), ([], "needs a script"), (["--example", "x"], "there is no example 'x'"),
    ):  # fmt: skip
        assert cli.main(["launch", *words]) == 2
        assert said in capsys.readouterr().err


def test_the_command_line_needs_no_torch() -> None:
    code = (
        "import sys\nfrom bigkit.cli import main\n"
        "assert main(['launch', '--show', '--num_processes', '2', 'x.py']) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout == "torchrun --standalone --nproc-per-node 2 x.py\n"


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_the_example_runs_launched_and_alone(tmp_path: Path) -> None:
    done = launch(tmp_path, "--example")
    assert "bigkit launch --num_processes 2 distributed_inference.py" in done.stdout
    again = launch(tmp_path, "--example")
    assert again.returncode == 2 and "move it away" in again.stderr
    done = launch(tmp_path, "--num_processes", "2", "--cpu", "distributed_inference.py")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(
        "BIGKIT_USE_CPU=1 torchrun --standalone --nproc-per-node 2 distributed_inference.py\n"
    )
    said = done.stdout.splitlines()
    assert sorted(said[:2]) == [f"process {rank} of 2 on cpu: 2 prompts" for rank in (0, 1)]
    variables = {**ENVIRONMENT, "BIGKIT_USE_CPU": "1"}
    alone = forked.run((tmp_path / "distributed_inference.py").read_text(), folder=tmp_path, variables=variables)
    assert alone.stdout.splitlines()[0] == "process 0 of 1 on cpu: 4 prompts"
    assert alone.stdout.splitlines()[1:] == said[2:] and len(said) == 6


TWO_RANKS = """
import os, runpy
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # once for both
child = os.fork()
os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if child else "1"
runpy.run_path("distributed_diffusion.py", run_name="__main__")
assert not child or os.waitpid(child, 0)[1] == 0
"""


def test_one_image_for_each_prompt(tmp_path: Path) -> None:
    if find_spec("diffusers") is None:
        pytest.skip("diffusers is not installed")
    from PIL import Image

    write_example("diffusion", tmp_path)
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "BIGKIT_USE_CPU": "1"}
    done = forked.run(TWO_RANKS, folder=tmp_path, variables={**ENVIRONMENT, **world})
    assert done.returncode == 0, done.stderr
    files = ["a_cat_0.png", "a_chicken_1.png", "a_dog_0.png"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == files
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        "process 0 wrote a_dog_0.png", "process 0 wrote a_cat_0.png", "process 1 wrote a_chicken_1.png",
    ]  # fmt: skip
    pictures = [Image.open(tmp_path / name) for name in files]
    assert {picture.size for picture in pictures} == {(16, 16)}
    assert len({picture.tobytes() for picture in pictures}) == 3


FAILING = """
import sys, time
from bigkit import PartialState, gather_object
state = PartialState(cpu=True)
open(f"pid-{state.process_index}", "w").write(str(__import__("os").getpid()))
if state.process_index == 1:
    time.sleep(0.5)
    raise ValueError("no prompt for me")
gather_object([1])
"""


def test_a_failing_rank_ends_the_others_and_is_heard_first(tmp_path: Path) -> None:
    (tmp_path / "fail.py").write_text(FAILING)
    done = forked.launch("--num_processes", "3", "--cpu", "fail.py", folder=tmp_path, variables=ENVIRONMENT)
    assert done.returncode == 1
    text = done.stderr.partition("\n")[2]  # after the torchrun command
    first = text[text.index("Traceback") :]
    assert "ValueError: no prompt for me" in first.splitlines()[3] and "fail.py" in first.splitlines()[1]
    assert (
        text.count("Traceback (most recent call last)") >= 1 and "See the first" not in text[: text.index("no prompt")]
    )
    assert "all_gather_object" not in text, "processes that were left alone show no traceback of their own"
    root = text[text.index("Root Cause") :]
    assert "rank      : 1" in root and "no prompt for me" in root
    pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in range(3)]
    assert still_alive(pids) == []


WAITING = """
import os, time
from bigkit import PartialState
state = PartialState(cpu=True)
open(f"pid-{state.process_index}.part", "w").write(str(os.getpid()))
os.rename(f"pid-{state.process_index}.part", f"pid-{state.process_index}")
time.sleep(600)
"""


@pytest.mark.parametrize(
    "name", ["SIGKILL", *(pytest.param(name, marks=pytest.mark.soak) for name in ("SIGTERM", "SIGINT"))]
)  # of these two torchrun tells its processes itself
def test_nothing_outlives_the_launcher(name: str, tmp_path: Path) -> None:
    (tmp_path / "wait.py").write_text(WAITING)
    words = [*BIGKIT, "launch", "--num_processes", "2", "--cpu", "wait.py"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(words, cwd=tmp_path, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(tmp_path / "pid-0", tmp_path / "pid-1")
        pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in (0, 1)]
        assert [psutil.Process(pid).ppid() for pid in pids] == [process.pid] * 2, "torchrun took the place of bigkit"
        process.send_signal(getattr(signal, name))
        assert process.wait(60) != 0
        assert still_alive(pids) == []
    finally:
        for path in tmp_path.glob("pid-?"):
            pid = int(path.read_text())
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()


@pytest.mark.soak  # test_words_of_torchrun reads the line, and the example runs what it says
def test_the_printed_line_does_the_same(tmp_path: Path) -> None:
    (tmp_path / "who.py").write_text("from bigkit import PartialState\nprint(PartialState())\n")
    line = command_line(Settings(2, use_cpu=True), ["who.py"])
    words = shlex.split(line.replace("torchrun", f"{sys.executable} -m torch.distributed.run"))
    done = subprocess.run(["env", *words], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    for rank in (0, 1):  # two processes write to one pipe: their line ends may come in any order
        assert done.stdout.count(f"PartialState(process {rank} of 2, cpu)") == 1, done.stdout + done.stderr
    assert done.stdout.count("PartialState(") == 2
