"""A pipeline in scripts of `bigkit launch`: what unlike processes are told, and that all end with the first fault."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import bigkit.hosts
from bigkit import plan_hosts
from bigkit.zoo.gpt import PYGPT, encode, load_pygpt
from tests import forked
from tests.distributed import stages
from tests.distributed.test_launch import ENVIRONMENT, launch, still_alive
from tests.ranks import Ranks, free_port

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import torch
from bigkit import PartialState, init_empty_weights, map_file, pipeline
from bigkit.zoo.gpt import GPT, GPTConfig, encode

how, weights = sys.argv[1:]
state = PartialState(timeout=15 if how == "hangs" else 60)
Path(f"pid-{state.process_index}").write_text(str(os.getpid()))
with init_empty_weights():
    model = GPT(GPTConfig("pygpt"))
model = pipeline(model, weights, dtype="float32").eval()

def answer(prompts):
    ids = torch.tensor([encode(prompt) for prompt in prompts], device=state.device)
    if "12" in prompts[0] and state.process_index == 1:
        Path("fault").write_text(str(time.time()))
        if how == "raises":
            raise KeyError("the words of the first error")
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hangs":
            time.sleep(120)
        if how == "asks for something else":
            ids = ids + 1
    return [bytes(row).decode(errors="replace") for row in model.generate(ids, 3).tolist()]

map_file(answer, "prompts.txt", "answers.jsonl", batch_size=2, progress=False, pipeline=model)
"""


def run(
    folder: Path, how: str, port: int, where: str = "--cpu", weights: Path = PYGPT, count: int = 2
) -> tuple[int, str, float, list[int]]:
    """Exit status, what was said, seconds, and which processes are left."""
    (folder / "script.py").write_text(SCRIPT)
    (folder / "prompts.txt").write_text("".join(f"x = {i:02}\n" for i in range(20)))
    words = ["--num_processes", count, where, "--main_process_port", port, "script.py", how, weights]
    start = time.monotonic()
    on_cpu = where == "--cpu"  # CUDA wants fresh processes
    done = forked.launch(*words, folder=folder, variables=ENVIRONMENT) if on_cpu else launch(folder, *words)
    took = time.monotonic() - start
    pids = [int(path.read_text()) for path in folder.glob("pid-*")]
    return done.returncode, done.stderr, took, still_alive(pids)


FIRST = {
    "raises": r"KeyError: 'the words of the first error'",
    "dies": r"Signal 9 \(SIGKILL\)",
    "hangs": r"process \d of \d cannot finish pipeline: another process has ended, or did not come here in time",
    "asks for something else": r"process 1 stopped: it was called with other inputs or options than process 0",
}


@pytest.mark.parametrize(("count", "how"), [  # of four it is one in the middle
    (2, "raises"), *(pytest.param(count, how, marks=pytest.mark.soak) for count in (2, 4) for how in FIRST
                     if (count, how) != (2, "raises")),
])  # fmt: skip
def test_one_fault_ends_all_and_the_next_run_goes_on(count: int, how: str, tmp_path: Path) -> None:
    port = free_port()
    status, said, took, left = run(tmp_path, how, port, count=count)
    since = time.time() - float((tmp_path / "fault").read_text())
    assert since < (45 if how == "hangs" else 20), "all have ended seconds after the fault"
    assert status != 0 and left == []
    assert re.search(FIRST[how], said), said
    assert len(re.findall(r"^\[rank\d\]: Traceback", said, re.MULTILINE)) <= 1, said
    assert not (tmp_path / "answers.jsonl").exists(), "nothing half written"
    kept = "".join(path.read_text() for path in (tmp_path / "answers.jsonl.parts").glob("*.jsonl"))
    assert 4 <= kept.count("\n") <= 14, "what was done before stays"
    listening = [line for line in psutil.net_connections("tcp") if line.status == "LISTEN"]
    assert not any(line.laddr.port == port for line in listening), "no port stays open"
    assert took < 100
    status, said, _, left = run(tmp_path, "is well", port, count=count)
    assert status == 0 and left == [], said
    whole = load_pygpt(dtype=torch.float32)
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(20))
    for record in records:
        ids = whole.generate(torch.tensor([encode(record["prompt"])]), 3)[0]
        assert record["output"] == bytes(ids.tolist()).decode(errors="replace")


def unlike(state: Any, what: str, folder: Path) -> str:
    model, path, count = stages.empty("pygpt"), PYGPT, state.num_processes
    last = state.process_index == count - 1
    version = bigkit.hosts._version
    if what == "versions" and last:
        bigkit.hosts._version = lambda name: "1.0" if name == "torch" else version(name)
    if what == "checkpoint" and last:
        path = folder
    if what == "model" and last:
        model.config.attn_pdrop = 0.5
    plan = plan_hosts(model, stages.hosts(count), "WLAN" if what == "plan" and last else "Ethernet 10G")
    if what == "stages":
        plan = plan_hosts(model, stages.hosts(count + 1))
    try:
        bigkit.pipeline(model, path, plan)
    except ValueError as error:
        return str(error)
    finally:
        bigkit.hosts._version = version
    return "nothing was said"


def test_what_differs_is_named_on_every_process(three: Ranks, tmp_path: Path) -> None:
    shutil.copytree(PYGPT, tmp_path / "other")
    file = tmp_path / "other" / "model-00002-of-00004.safetensors"
    content = bytearray(file.read_bytes())
    content[-9000:] = bytes(9000)  # other weights of the same shapes
    file.write_bytes(content)
    expected = {
        "versions": r"process 2 differs from process 0 in 'torch \(.* on process 0, 1\.0 on 2\)'",
        "checkpoint": r"process 2 differs from process 0 in 'checkpoint \(",
        "model": r"process 2 differs from process 0 in 'model \(GPT",
        "plan": r"process 2 differs from process 0 in 'plan \(",
        "stages": r"the plan has 4 stages, and there are 3 processes: start one for each stage",
    }
    for what, pattern in expected.items():
        for said in three(unlike, what, tmp_path / "other"):
            assert re.match(pattern, said), said
