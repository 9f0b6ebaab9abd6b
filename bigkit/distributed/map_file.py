"""A long file of prompts through N processes: resumed where a kill cut it off, and written in order.

    map_file(infer, "prompts.txt", "answers.jsonl")      # answers.jsonl.parts/ while it runs

A process that has nothing to do takes the next batch of lines without an answer, so that none waits long for another.
It appends its answers to a file of its own in `answers.jsonl.parts`, one line each with the prompt's number. At the end
process 0 merges these files in order and puts the whole in place with one rename. Whatever ends the job, what stands in
the parts is kept: the next run, with as many processes as you like, reads it and does the rest.

Leaves out: prompts that are no file (`split_between_processes`), and starting processes (`distributed/launch.py`,
`distributed/notebook.py`).
"""

from __future__ import annotations

import heapq
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch.distributed as dist

from ._torch import default_store
from .gather import gather_object
from .state import PartialState, together


def map_file(
    function: Callable[[list[Any]], Sequence[Any]],
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> Path:
    """Answer every line of a file, in all processes that were launched together, and write the answers in its order.

    Call it on every process. A job that was killed is taken up again by the same call; a finished one is left alone.
    With several hosts, `output` must be in a folder that all of them see.

    Args:
        function: takes a list of at most `batch_size` prompts, returns as many answers that JSON can hold.
        source: one prompt a line: text, or JSON if the name ends in `.jsonl`. An empty line is an empty prompt.
        output: the JSON Lines file to write: `{"index": 0, "prompt": ..., "output": ...}` for each line of `source`.
        batch_size: prompts in a call.
        progress: show a bar on process 0.

    Returns:
        The path of `output`, when it is complete.

    Raises:
        FileNotFoundError: there is no `source`.
        FileExistsError: `output` is there and answers something else.
        ValueError: an answer is missing or is no JSON, a line is no JSON, or `source` has changed since the job began.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "prompts.txt").write_text("a dog\\na cat\\n")
    >>> done = map_file(lambda prompts: [len(p) for p in prompts], folder / "prompts.txt", folder / "out.jsonl")
    >>> print(done.read_text(), end="")
    {"index": 0, "prompt": "a dog", "output": 5}
    {"index": 1, "prompt": "a cat", "output": 5}
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: expected at least one prompt in a batch")
    state = PartialState()
    job = _Job(Path(source), Path(output))
    known = job.known()
    state.wait_for_everyone()  # before anybody writes, all have seen the same
    if known is None:
        return job.output
    attempt = 1 + max((int(part.name.split("-")[0]) for part in job.files()), default=-1)
    attempt, name = gather_object([(attempt, uuid4().hex)])[0]
    job.parts.mkdir(parents=True, exist_ok=True)
    total = job.count()
    bar = _Bar(total, len(known), job, progress and state.is_main_process)
    left = ((index, prompt) for index, prompt in job.prompts() if index not in known)
    with (job.parts / f"{attempt:04}-{state.process_index:05}.jsonl").open("xb") as part, bar:
        numbered = enumerate(_batches(left, batch_size))
        for turn in _turns(name):
            batch = next((batch for number, batch in numbered if number == turn), None)
            if batch is None:
                break
            part.write(b"".join(_answered(function, batch, job.source)))
            part.flush()
            os.fsync(part.fileno())
            bar.update()
        state.wait_for_everyone()
        bar.update()
    with state.main_process_first():
        if state.is_main_process:
            job.merge(total)
    return job.output


def _turns(name: str) -> Iterator[int]:
    """Numbers from 0, each of them to one process only, whoever asks first."""
    if not dist.is_initialized():
        yield from count()
    store = default_store()
    while True:
        with together("map_file"):
            turn = store.add(f"bigkit-{name}", 1) - 1
        yield turn


def _answered(
    function: Callable[[list[Any]], Sequence[Any]], batch: list[tuple[int, Any]], source: Path
) -> list[bytes]:
    """The lines for one batch."""
    answers = function([prompt for _, prompt in batch])
    where = f"lines {batch[0][0] + 1} to {batch[-1][0] + 1} of {source.name}"
    if not isinstance(answers, (list, tuple)) or len(answers) != len(batch):
        got = len(answers) if isinstance(answers, (list, tuple)) else f"a {type(answers).__name__}"
        raise ValueError(f"the function returned {got} for the {len(batch)} prompts of {where}: expected a list with "
                         "one answer for each")  # fmt: skip
    try:
        return [_line(index, prompt, answer) for (index, prompt), answer in zip(batch, answers)]
    except (TypeError, ValueError) as error:
        raise ValueError(f"an answer to {where} cannot be written as JSON ({error}): return texts, numbers, lists and "
                         "dicts, such as tensor.tolist()") from error  # fmt: skip


def _line(index: int, prompt: Any, answer: Any) -> bytes:
    record = {"index": index, "prompt": prompt, "output": answer}
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _batches(items: Iterator[tuple[int, Any]], size: int) -> Iterator[list[tuple[int, Any]]]:
    while batch := list(islice(items, size)):
        yield batch


class _Job:
    """The three places of a job: prompts, answers, and the parts in between."""

    def __init__(self, source: Path, output: Path) -> None:
        self.source, self.output = source, output
        self.parts = output.with_name(output.name + ".parts")
        if not source.is_file():
            raise FileNotFoundError(f"there is no file of prompts {source}")

    def files(self) -> list[Path]:
        return sorted(self.parts.glob("????-?????.jsonl"))

    def prompts(self) -> Iterator[tuple[int, Any]]:
        """(number, prompt) of every line."""
        with self.source.open("rb") as file:
            for index, raw in enumerate(file):
                kind = "JSON" if self.source.suffix == ".jsonl" else "UTF-8 text"
                try:
                    text = raw.removesuffix(b"\n").removesuffix(b"\r").decode()
                    yield index, json.loads(text) if kind == "JSON" else text
                except ValueError as error:
                    raise ValueError(f"line {index + 1} of {self.source} is no {kind}: {error}") from error

    def count(self) -> int:
        with self.source.open("rb") as file:
            return sum(1 for _ in file)

    def known(self) -> set[int] | None:
        """Numbers of the lines that have an answer in the parts; None if the whole is done.

        Raises:
            FileExistsError: the output answers something else.
            ValueError: the source has changed.
        """
        if self.output.exists():
            answered = list(_records(self.output))
            asked = list(self.prompts())
            if [(record["index"], record["prompt"]) for record in answered] != asked:
                raise FileExistsError(f"{self.output} is already there and does not answer {self.source}: remove it or "
                                      "choose another name")  # fmt: skip
            return None
        told = {record["index"]: record["prompt"] for part in self.files() for record in _records(part)}
        for index, prompt in self.prompts():
            if index in told and told[index] != prompt:
                raise ValueError(f"line {index + 1} of {self.source} has changed since {self.parts} was begun: remove "
                                 "that folder to begin again")  # fmt: skip
        return set(told)

    def merge(self, total: int) -> None:
        """Put the parts together, in order and each line once, and remove them."""
        whole = self.parts / "whole"
        expected = 0
        with whole.open("wb") as file:
            for record in heapq.merge(*map(_records, self.files()), key=lambda record: record["index"]):
                if record["index"] < expected:
                    continue  # two jobs at once may answer a line twice
                if record["index"] > expected:
                    break
                file.write(_line(record["index"], record["prompt"], record["output"]))
                expected += 1
            file.flush()
            os.fsync(file.fileno())
        if expected != total:
            raise ValueError(f"line {expected + 1} of {self.source} has no answer in {self.parts}: with several hosts "
                             "this folder must be one that all of them see")  # fmt: skip
        whole.replace(self.output)
        shutil.rmtree(self.parts)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file of answers; a last line that was cut off by a kill is none."""
    with path.open("rb") as file:
        for raw in file:
            if raw.endswith(b"\n"):
                yield json.loads(raw)


class _Bar:
    """Progress over all processes: the lines that stand in this attempt's parts."""

    def __init__(self, total: int, known: int, job: _Job, shown: bool) -> None:
        self.job, self.read = job, dict.fromkeys((part.name for part in job.files()), -1)
        self.bar: Any = None
        if shown:
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=known, unit=" prompts", file=sys.stderr)

    def update(self) -> None:
        if self.bar is None:
            return
        for part in self.job.files():
            start = self.read.get(part.name, 0)
            if start >= 0:  # of this attempt
                with part.open("rb") as file:
                    file.seek(start)
                    new = file.read()
                self.read[part.name] = start + len(new)
                self.bar.update(new.count(b"\n"))

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
