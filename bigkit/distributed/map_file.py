"""A long file of prompts through N processes: resumed where a kill cut it off, and written in order.

    map_file(infer, "prompts.txt", "answers.jsonl")      # answers.jsonl.parts/ while it runs

A process that has nothing to do takes the next batch of lines without an answer, so that none waits long for another.
It appends its answers to a file of its own in `answers.jsonl.parts`, one line each with the prompt's number. At the end
process 0 merges these files in order and puts the whole in place with one rename. Whatever ends the job, what stands in
the parts is kept: the next run, with as many processes as you like, reads it and does the rest.

With a model over several processes (`pipeline`) all of them work on each batch, and process 0 alone writes.

Leaves out: prompts that are no file (`split_between_processes`), and starting processes (`launch.py`, `notebook.py`).
"""

from __future__ import annotations

import heapq
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from ._torch import default_store
from .gather import gather_object
from .in_flight import run_in_flight
from .state import PartialState, together


def map_file(
    function: Callable[[list[Any]], Sequence[Any]],
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    batch_size: int = 8,
    progress: bool = True,
    pipeline: nn.Module | None = None,
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
        pipeline: the model that `function` asks, if it is one over all processes (`bigkit.pipeline`): then all of them
            work on each batch, with as many batches under way as there are stages, and process 0 writes.

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
    answered = job.answered()
    state.wait_for_everyone()  # before anybody writes, all have seen the same
    if pipeline is not None:  # process 0 alone reads and writes the answers
        answered = gather_object([answered])[0]
    if answered is None:
        return job.output
    attempt = 1 + max((int(part.name.split("-")[0]) for part in job.files()), default=-1)
    attempt, run = gather_object([(attempt, uuid4().hex)])[0]
    writes = pipeline is None or state.is_main_process
    if writes:
        job.parts.mkdir(parents=True, exist_ok=True)
    with job.source.open("rb") as lines:
        total = sum(1 for _ in lines)
    unanswered = ((index, prompt) for index, prompt in job.prompts() if index not in answered)
    batches = iter(lambda: list(islice(unanswered, batch_size)), [])
    own = job.parts / f"{attempt:04}-{state.process_index:05}.jsonl" if writes else Path(os.devnull)
    hidden = not (progress and state.is_main_process)
    with (
        own.open("xb" if writes else "wb") as part,
        tqdm(total=total, initial=len(answered), unit=" prompts", file=sys.stderr, disable=hidden) as bar,
    ):

        def write(lines: bytes) -> None:
            part.write(lines)
            part.flush()
            os.fsync(part.fileno())

        def done(number: int, lines: bytes) -> None:
            if writes:
                write(lines)
            bar.update(lines.count(b"\n"))

        if pipeline is not None:
            run_in_flight(lambda batch: _answer(function, batch, job.source), batches, pipeline, done)
        else:
            take_turn, count_answers = _shared_counter(f"{run}-turns"), _shared_counter(f"{run}-answers")
            turn = take_turn(1)  # batches are numbered from 1, and each is for the process that drew its number
            for number, batch in enumerate(batches, start=1):
                if number == turn:
                    write(_answer(function, batch, job.source))
                    bar.update(len(answered) + count_answers(len(batch)) - bar.n)
                    turn = take_turn(1)
        state.wait_for_everyone()
        if pipeline is None:
            bar.update(len(answered) + count_answers(0) - bar.n)
    with state.main_process_first():
        if state.is_main_process:
            job.merge(total)
    return job.output


def _shared_counter(name: str) -> Callable[[int], int]:
    """A function that adds to a number which all processes share, and returns the sum."""
    total = 0

    def add(more: int) -> int:
        nonlocal total
        if dist.is_initialized():
            with together("map_file"):
                return default_store().add(f"bigkit-{name}", more)
        total += more
        return total

    return add


def _answer(function: Callable[[list[Any]], Sequence[Any]], batch: list[tuple[int, Any]], source: Path) -> bytes:
    """The lines for one batch of (number, prompt)."""
    answers = function([prompt for _, prompt in batch])
    where = f"lines {batch[0][0] + 1} to {batch[-1][0] + 1} of {source.name}"
    if not isinstance(answers, (list, tuple)) or len(answers) != len(batch):
        returned = len(answers) if isinstance(answers, (list, tuple)) else f"a {type(answers).__name__}"
        expected = f"for the {len(batch)} prompts of {where}: expected a list with one answer for each"
        raise ValueError(f"the function returned {returned} {expected}")
    try:
        return b"".join(_line(index, prompt, answer) for (index, prompt), answer in zip(batch, answers))
    except (TypeError, ValueError) as error:
        hint = "return texts, numbers, lists and dicts, such as tensor.tolist()"
        raise ValueError(f"an answer to {where} cannot be written as JSON ({error}): {hint}") from error


def _line(index: int, prompt: Any, answer: Any) -> bytes:
    record = {"index": index, "prompt": prompt, "output": answer}
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"


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

    def answered(self) -> set[int] | None:
        """Numbers of the lines that have an answer in the parts; None if the whole is done.

        Raises:
            FileExistsError: the output answers something else.
            ValueError: the source has changed.
        """
        if self.output.exists():
            pairs = [(record["index"], record["prompt"]) for record in _records(self.output)]
            if pairs != list(self.prompts()):
                hint = "remove it or choose another name"
                raise FileExistsError(f"{self.output} is already there and does not answer {self.source}: {hint}")
            return None
        asked = {record["index"]: record["prompt"] for part in self.files() for record in _records(part)}
        for index, prompt in self.prompts():
            if index in asked and asked[index] != prompt:
                hint = f"since {self.parts} was begun: remove that folder to begin again"
                raise ValueError(f"line {index + 1} of {self.source} has changed {hint}")
        return set(asked)

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
            hint = "with several hosts this folder must be one that all of them see"
            raise ValueError(f"line {expected + 1} of {self.source} has no answer in {self.parts}: {hint}")
        whole.replace(self.output)
        shutil.rmtree(self.parts)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file of answers; a last line that a kill cut off is left out."""
    with path.open("rb") as file:
        for raw in file:
            if raw.endswith(b"\n"):
                yield json.loads(raw)
