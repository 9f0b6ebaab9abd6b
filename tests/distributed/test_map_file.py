"""`map_file` answers each line once and in order, whatever kills it and however many processes take it up again."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from bigkit import map_file
from tests import forked
from tests.distributed.test_launch import ENVIRONMENT, still_alive, wait_for
from tests.ranks import Ranks


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(folder: Path, lines: int) -> Path:
    path = folder / "prompts.txt"
    path.write_text("".join(f"prompt {i}\n" for i in range(lines)))
    return path


def lengths(prompts: list[str]) -> list[int]:
    return [len(prompt) for prompt in prompts]


@pytest.mark.parametrize("size", [1, 3])
def test_answers_in_order(size: int, tmp_path: Path) -> None:
    group = Ranks(size)
    for lines, batch in ((0, 8), (1, 8), (7, 2), (40, 3)):
        folder = tmp_path / f"{size}-{lines}"
        folder.mkdir()
        source = write(folder, lines)

        def work(state: Any, source: Path, output: Path, batch: int) -> list[int]:
            calls: list[int] = []

            def answer(prompts: list[str]) -> list[dict[str, Any]]:
                calls.append(len(prompts))
                return [{"by": state.process_index, "text": prompt[::-1]} for prompt in prompts]

            assert map_file(answer, source, output, batch_size=batch) == output
            return calls

        calls = group(work, source, folder / "out.jsonl", batch)
        found = records(folder / "out.jsonl")
        assert [(r["index"], r["prompt"], r["output"]["text"]) for r in found] == [
            (i, f"prompt {i}", f"prompt {i}"[::-1]) for i in range(lines)
        ]
        assert sum(map(sum, calls)) == lines
        assert sorted(path.name for path in folder.iterdir()) == ["out.jsonl", "prompts.txt"]
    group.close()


def test_a_slow_process_gets_less(tmp_path: Path) -> None:
    group = Ranks(2)

    def work(state: Any, source: Path, output: Path) -> int:
        done = 0

        def answer(prompts: list[str]) -> list[str]:
            nonlocal done
            time.sleep(0.5 if state.process_index else 0.01)
            done += len(prompts)
            return prompts

        map_file(answer, source, output, batch_size=1, progress=False)
        return done

    fast, slow = group(work, write(tmp_path, 24), tmp_path / "out.jsonl")
    assert fast + slow == 24 and fast > 2 * slow
    group.close()


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    source = tmp_path / "p.txt"
    source.write_bytes("é\u2028x\n\r\n  spaces  \r\n\nlast".encode())
    map_file(list, source, tmp_path / "out.jsonl", progress=False)
    expected = ["é\u2028x", "", "  spaces  ", "", "last"]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().split(b"\n")[:-1]]
    assert [record["prompt"] for record in lines] == [record["output"] for record in lines] == expected


def test_json_lines_in(tmp_path: Path) -> None:
    source = tmp_path / "p.jsonl"
    source.write_text('{"q": "a"}\n["b", 1]\n')
    map_file(lambda prompts: [len(p) for p in prompts], source, tmp_path / "out.jsonl", progress=False)
    assert [(r["prompt"], r["output"]) for r in records(tmp_path / "out.jsonl")] == [({"q": "a"}, 1), (["b", 1], 2)]
    source.write_text('{"q": "a"}\nplain\n')
    with pytest.raises(ValueError, match=r"line 2 of .*p.jsonl is no JSON"):
        map_file(list, source, tmp_path / "other.jsonl", progress=False)


def test_a_finished_job_is_left_alone_and_another_is_not_overwritten(tmp_path: Path) -> None:
    source, output = write(tmp_path, 5), tmp_path / "out.jsonl"
    map_file(lengths, source, output, progress=False)
    before = output.stat().st_mtime_ns
    map_file(lambda prompts: pytest.fail("called again"), source, output, progress=False)
    assert output.stat().st_mtime_ns == before
    write(tmp_path, 6)
    with pytest.raises(FileExistsError, match="does not answer"):
        map_file(lengths, source, output, progress=False)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (lambda prompts: [1], "returned 1 for the 2 prompts of lines 1 to 2 of prompts.txt"),
        (lambda prompts: None, "returned a NoneType"),
        (lambda prompts: {1, 2}, "returned a set"),
        (lambda prompts: [object(), 1], "cannot be written as JSON"),
        (lambda prompts: [float("nan"), 1], "cannot be written as JSON"),
    ],
)
def test_answers_that_do_not_fit(answers: Any, said: str, tmp_path: Path) -> None:
    source = write(tmp_path, 2)
    with pytest.raises(ValueError, match=said):
        map_file(answers, source, tmp_path / "out.jsonl", progress=False)
    assert not (tmp_path / "out.jsonl").exists()


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file of prompts"):
        map_file(lengths, tmp_path / "none.txt", tmp_path / "out.jsonl")
    source = write(tmp_path, 2)
    with pytest.raises(ValueError, match="batch_size is 0"):
        map_file(lengths, source, tmp_path / "out.jsonl", batch_size=0)
    source.write_bytes(b"fine\n\xff\n")
    with pytest.raises(ValueError, match="line 2 of .* is no UTF-8 text"):
        map_file(lengths, source, tmp_path / "out.jsonl", progress=False)


def test_an_exception_keeps_what_is_done(tmp_path: Path) -> None:
    source, output, asked = write(tmp_path, 10), tmp_path / "out.jsonl", []

    def breaks(prompts: list[str]) -> list[str]:
        if "prompt 6" in prompts:
            raise MemoryError("too long")
        asked.extend(prompts)
        return prompts

    with pytest.raises(MemoryError):
        map_file(breaks, source, output, batch_size=2, progress=False)
    (part,) = (tmp_path / "out.jsonl.parts").iterdir()
    with part.open("ab") as file:
        file.write(b'{"index": 6, "pro')  # what a kill in the middle of a write leaves
    map_file(lambda prompts: asked.extend(prompts) or prompts, source, output, progress=False)
    assert asked == [f"prompt {i}" for i in range(10)], "each was asked once"
    assert [record["index"] for record in records(output)] == list(range(10))


def test_a_source_that_changes_is_noticed(tmp_path: Path) -> None:
    source, output = write(tmp_path, 4), tmp_path / "out.jsonl"

    def breaks(prompts: list[str]) -> list[str]:
        if "prompt 2" in prompts:
            raise KeyError
        return prompts

    with pytest.raises(KeyError):
        map_file(breaks, source, output, batch_size=1, progress=False)
    source.write_text("prompt 0\nanother\nprompt 2\nprompt 3\n")
    with pytest.raises(ValueError, match="line 2 of .* has changed since"):
        map_file(list, source, output, progress=False)
    part = next((tmp_path / "out.jsonl.parts").iterdir())
    part.write_text(part.read_text().splitlines(keepends=True)[0])
    map_file(list, source, output, progress=False)
    assert [record["prompt"] for record in records(output)] == ["prompt 0", "another", "prompt 2", "prompt 3"]


def test_progress_counts_all_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    map_file(lengths, write(tmp_path, 20), tmp_path / "out.jsonl", batch_size=4)
    assert "20/20" in capsys.readouterr().err


JOB = """
import os, sys, time
from pathlib import Path
from bigkit import PartialState, map_file

state = PartialState(cpu=True)
log = open(f"asked-{state.process_index}-{os.getpid()}", "a")
Path(f"pid-{state.process_index}").write_text(str(os.getpid()))

def answer(prompts):
    time.sleep(float(sys.argv[1]))
    log.write("".join(prompt + "\\n" for prompt in prompts))
    log.flush()
    return [prompt[::-1] for prompt in prompts]

map_file(answer, "prompts.txt", "out.jsonl", batch_size=2)
state.destroy()
"""


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.soak)])
def test_killed_and_resumed_with_another_number_of_processes(kills: int, tmp_path: Path) -> None:
    """kill -9 to the launcher in the middle, and again; then three processes finish what two began."""
    lines = 30 * (1 + kills)
    write(tmp_path, lines)
    (tmp_path / "job.py").write_text(JOB)
    parts, counts = tmp_path / "out.jsonl.parts", [0]
    for attempt in range(kills):
        words = ["--num_processes", "2", "--cpu", "job.py", "0.3"]
        process = forked.launcher(*words, folder=tmp_path, variables=ENVIRONMENT)
        mine = [parts / f"{attempt:04}-{rank:05}.jsonl" for rank in (0, 1)]
        wait_for(*mine)
        while min(path.read_bytes().count(b"\n") for path in mine) < 4:
            assert process.is_running, process.wait()
            time.sleep(0.1)
        pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in (0, 1)]
        process.kill(signal.SIGKILL)
        process.wait()
        assert still_alive(pids) == []
        done = sum(path.read_bytes().count(b"\n") for path in parts.glob("*.jsonl"))
        assert counts[-1] < done < lines, "each run goes on where the one before had ended"
        assert not (tmp_path / "out.jsonl").exists()
        counts.append(done)
    done_before = {
        json.loads(line)["prompt"] for path in parts.glob("*.jsonl") for line in path.read_bytes().splitlines()
    }
    asked_before = {path.name for path in tmp_path.glob("asked-*")}

    words = ["--num_processes", "3", "--cpu", "job.py", "0"]
    done_run = forked.launch(*words, folder=tmp_path, variables=ENVIRONMENT)
    assert done_run.returncode == 0, done_run.stderr
    assert f"{counts[-1]}/{lines}" in done_run.stderr, "the bar starts at what is done"
    found = records(tmp_path / "out.jsonl")
    assert [(r["index"], r["output"]) for r in found] == [(i, f"prompt {i}"[::-1]) for i in range(lines)]
    again = [
        line
        for path in tmp_path.glob("asked-*")
        if path.name not in asked_before
        for line in path.read_text().splitlines()
    ]
    assert not done_before & set(again), "what had an answer was asked again"
    assert len(again) == len(set(again)) == lines - counts[-1]
    assert not parts.exists()
