"""Many groups of sequences under way in one pipeline, so that no process waits for another.

    process 0    g0 g1 g0 g1        one group alone: while process 1 works on it, process 0 waits, and the reverse.
    process 1       g0 g1 g0        With as many groups as processes each always has one to work on.

Each group has a thread on every process, and one of them runs at a time: a turn ends where a group waits for a token
that another process draws. All processes take turns in the same order, since all see the same tokens; so messages need
no names, and the caller's function no locks.

The answers are those of one group at a time, bit for bit, on CPUs, and on two H200 for small models in float32. A 7B in
bfloat16 with random weights drew other tokens there, seen once, and the cause is not known: compare before you rely on
it (`benchmarks/distributed.py --gpu --parts stages` says which share of the answers is equal).

Leaves out: a pipeline itself (`pipeline.py`), and files of prompts (`map_file.py`, which takes a pipeline).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from .pipeline import stage_of

T = TypeVar("T")
R = TypeVar("R")


def map_in_flight(function: Callable[[T], R], batches: Iterable[T], model: nn.Module) -> list[R]:
    """What a function makes of each batch, with as many batches under way as the model has stages.

    Call it on every process, with the same batches.

    Args:
        function: takes a batch and asks `model` about it, as `lambda ids: model.generate(ids, max_new_tokens=20)`. It
            runs in threads, but never twice at once, and without gradients.
        batches: the inputs. They are taken one by one, as their turn comes.
        model: one that `bigkit.pipeline` has returned.

    Returns:
        The results, in the order of the batches, on every process. In 16 bits on GPUs they may differ from those of one
        batch at a time (see the top of this file).

    Raises:
        ValueError: `model` is no pipeline.
        Exception: what `function` raises first; the batches that are under way are given up.

    >>> from bigkit import init_empty_weights, pipeline
    >>> from bigkit.zoo.gpt import GPT, GPTConfig, PYGPT, decode, encode
    >>> with init_empty_weights():
    ...     model = GPT(GPTConfig("pygpt"))
    >>> model = pipeline(model, PYGPT, dtype="float32").eval()
    >>> texts = [torch.tensor([encode(text)]) for text in ("import ", "def f(")]
    >>> [ids.shape[1] for ids in map_in_flight(lambda ids: model.generate(ids, 5), texts, model)]
    [12, 11]
    """
    results: dict[int, R] = {}
    run_in_flight(function, batches, model, results.__setitem__)
    return [results[i] for i in range(len(results))]


def run_in_flight(
    function: Callable[[T], R], batches: Iterable[T], model: nn.Module, done: Callable[[int, R], Any]
) -> None:
    """`map_in_flight`, with each result and its number given to `done`, in the order of the batches."""
    early: dict[int, R] = {}  # results of batches whose predecessors are under way
    first = 0
    stage = stage_of(model)
    numbered = enumerate(batches)
    turns = stage.turns = _Turns(stage.last + 1)
    device = torch.cuda.current_device() if stage.device.type == "cuda" else None

    def hand_out() -> None:
        nonlocal first
        while first in early:
            done(first, early.pop(first))
            first += 1

    def work(slot: int) -> None:
        if device is not None:
            torch.cuda.set_device(device)
        try:
            turns.begin(slot)
            with torch.no_grad():
                for number, batch in numbered:
                    early[number] = function(batch)
                    hand_out()
            turns.leave()
        except _GivenUp:
            pass
        except BaseException as error:
            turns.give_up(error)

    threads = [threading.Thread(target=work, args=(slot,), daemon=True) for slot in range(stage.last + 1)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:  # Ctrl-C comes to this thread
        turns.give_up(error)
        raise
    finally:
        stage.turns = None
    if turns.error is not None:
        raise turns.error
    stage.flush()


class _GivenUp(BaseException):
    """Another group has failed, or the user has had enough."""


class _Turns:
    """Threads that run one at a time, in the order of their numbers, until each has left."""

    def __init__(self, count: int) -> None:
        self.changed = threading.Condition()
        self.live = list(range(count))
        self.whose = 0
        self.own = threading.local()
        self.error: BaseException | None = None

    def begin(self, slot: int) -> None:
        self.own.slot = slot
        self._wait()

    def pass_on(self) -> None:
        """Let all others have their turn."""
        with self.changed:
            self._next()
        self._wait()

    def leave(self) -> None:
        with self.changed:
            self._next()
            self.live.remove(self.own.slot)
            self.changed.notify_all()

    def give_up(self, error: BaseException) -> None:
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()

    def _next(self) -> None:
        self.whose = next((slot for slot in self.live if slot > self.own.slot), self.live[0])
        self.changed.notify_all()

    def _wait(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.error is not None or self.whose == self.own.slot)
        if self.error is not None:
            raise _GivenUp
