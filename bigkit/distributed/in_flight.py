"""Many groups of sequences under way in one pipeline, so that no process waits for another.

    process 0    g0 g1 g0 g1        one group alone: while process 1 works on it, process 0 waits, and the reverse.
    process 1       g0 g1 g0        With as many groups as processes each always has one to work on.

Each group has a thread on every process, and one of them runs at a time: a turn ends where a group waits for a token
that another process draws. All processes take turns in the same order, since all see the same tokens; so messages need
no names, and the caller's function no locks.

The model itself works on the caller's thread, as it does for one group at a time: libraries of a GPU keep handles,
workspaces and plans for each thread (cuDNN needs some 30 ms to plan attention for a length that a thread has not seen).

No thread whose turn it is waits for the GPU, so that Python prepares one group's step while the GPU works for another:

    stream of all    ....[ g0 works ][ g1 works ][ g0 works ]      blocks and head
    stream of g0     masks           token, stops?                 what `generate` does around them; its host waits for
    stream of g1            masks                token, stops?     this group's work alone
    mailer           .................[token g0]..[token g1]       a thread: sends each token as soon as it is drawn

So greedy tokens are those of one group at a time, bit for bit, where the kernels themselves give the same bits twice.
PyTorch's default for attention on an H200, cuDNN's, does not with 64 sequences and one new token each;
`torch.backends.cuda.enable_cudnn_sdp(False)` takes another one, which does.

Leaves out: a pipeline itself (`pipeline.py`), and files of prompts (`map_file.py`, which takes a pipeline).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .pipeline import Call, stage_of

_PATIENCE = 1.0  # seconds for all threads that are given up to see it; one may wait for another process

T = TypeVar("T")
R = TypeVar("R")


def map_in_flight(
    function: Callable[[T], R], batches: Iterable[T], model: nn.Module, *, groups: int | None = None
) -> list[R]:
    """Apply a function to each batch, with as many batches under way as the model has stages.

    Call it on every process, with the same batches. Within `bigkit.graph_decode` each process replays its decode steps:
    what a token waits for is then the GPU, and not Python.

    Args:
        function: takes a batch and asks `model` about it, as `lambda ids: model.generate(ids, max_new_tokens=20)`. It
            runs in threads, but never twice at once, and without gradients.
        batches: the inputs. They are taken one by one, as their turn comes.
        model: one that `bigkit.pipeline` has returned.
        groups: how many batches are under way; None takes one for each stage. One more takes memory for its cache, and
            keeps stages busy whose pace varies, or whose step is short beside the way of a token back to the first.

    Returns:
        The results, in the order of the batches, on every process. Greedy tokens are those of one batch at a time.
        Where tokens are drawn at random, batches take numbers of one generator in turn: the same seed gives the same
        answers with as many stages, and others than one batch at a time.

    Raises:
        ValueError: `model` is no pipeline, there are no groups, or `function` calls this.
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
    run_in_flight(function, batches, model, results.__setitem__, groups)
    return [results[i] for i in range(len(results))]


def run_in_flight(
    function: Callable[[T], R], batches: Iterable[T], model: nn.Module, done: Callable[[int, R], Any],
    groups: int | None = None,
) -> None:  # fmt: skip
    """`map_in_flight`, with each result and its number given to `done`, in the order of the batches."""
    stage = stage_of(model)
    if stage.turns is not None:
        raise ValueError("map_in_flight was called by a function that it runs: call it once, with all batches")
    slots = range(stage.last + 1 if groups is None else groups)
    if not slots:
        raise ValueError(f"groups is {groups}: expected at least one batch under way")
    early: dict[int, R] = {}  # results of batches whose predecessors are under way
    first = 0
    numbered = enumerate(batches)
    turns, modes = _Turns(len(slots), stage.device, _ways_of_experts(model)), _modes(stage.device.type)
    for line in stage.lines.values():
        line.expect_groups(len(slots))

    def hand_out() -> None:
        nonlocal first
        while first in early:
            done(first, early.pop(first))
            first += 1

    def work(slot: int) -> None:
        stage.group.turns = turns
        turns.begin(slot)
        stage.call = Call()
        with modes(), torch.no_grad():
            for number, batch in numbered:
                early[number] = function(batch)
                turns.settle()
                hand_out()
        turns.leave()

    try:
        turns.run(work)
    finally:
        stage.lost = stage.lost or turns.stuck
    stage.flush()


def _modes(kind: str) -> Callable[[], AbstractContextManager[None]]:
    """Autocast and inference mode of this thread, for another one."""
    autocast = partial(torch.autocast, kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
    inference = torch.is_inference_mode_enabled()

    @contextmanager
    def the_same() -> Iterator[None]:
        with torch.inference_mode(inference), autocast():
            yield

    return the_same


def _ways_of_experts(model: nn.Module) -> Callable[[], Callable[[], None]]:
    """Notes how a mixture's experts are computed now, and returns what puts that back.

    Transformers' `generate` decodes in another way (`batched_mm`) than it reads prompts, and says so to the model.
    """
    configs = {id(config): config for part in model.modules() if (config := getattr(part, "config", None)) is not None}
    known = [config for config in configs.values() if hasattr(config, "_experts_implementation")]

    def note() -> Callable[[], None]:
        noted = [(config, config._experts_implementation) for config in known]

        def put_back() -> None:
            for config, way in noted:
                if config._experts_implementation != way:
                    config._experts_implementation = {"": way}  # of this one, and not of those within it

        return put_back

    return note


class _GivenUp(BaseException):
    """Another group has failed, or the user has had enough."""


class _Turns:
    """Threads that run one at a time, in the order of their numbers, until each has left.

    What they all need the same thread for is done by the one that waits for them. On a GPU each has its own stream.

    Args:
        count: how many.
        device: where the model works.
        settings: notes what a thread has set of the model, for its next turn, and returns what puts it back.
    """

    def __init__(self, count: int, device: torch.device, settings: Callable[[], Callable[[], None]]) -> None:
        self.device, self.settings = device, settings
        self.as_before = settings()
        self.stream = torch.cuda.current_stream() if device.type == "cuda" else None  # of the one that waits
        self.changed = threading.Condition()
        self.live = list(range(count))
        self.whose = 0
        self.own = threading.local()
        self.error: BaseException | None = None
        self.letters: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.work: Callable[[], Any] | None = None
        self.worked: Any = None  # what came of it
        self.stuck = False  # whether a thread still waits for another process, though all are given up

    @property
    def slot(self) -> int:
        """The number of the group of which this thread is."""
        return int(self.own.slot)

    def run(self, work: Callable[[int], None]) -> None:
        """Call `work` with each number on a thread, until all have left or one has failed.

        Raises:
            BaseException: what the first one raised.
        """

        def kept(work: Callable[..., None], *args: int) -> None:
            try:
                work(*args)
            except _GivenUp:
                pass
            except BaseException as error:
                self.give_up(error)

        threads = [threading.Thread(target=kept, args=(work, slot), daemon=True) for slot in self.live]
        threads.append(threading.Thread(target=kept, args=(self.mail,), daemon=True))
        try:
            for thread in threads:
                thread.start()
            self.serve()
        except BaseException as error:  # Ctrl-C comes to this thread
            self.give_up(error)
            raise
        finally:
            self.letters.put(None)
            latest = time.monotonic() + _PATIENCE
            for thread in threads:
                thread.join(max(0.0, latest - time.monotonic()) if self.error else None)
            self.stuck = any(thread.is_alive() for thread in threads)
            self.as_before()
        if self.error is not None:
            raise self.error

    def begin(self, slot: int) -> None:
        self.own.slot, self.own.stream = slot, None
        if self.stream is not None:
            self.own.stream = torch.cuda.Stream(self.device)
            self.own.stream.wait_stream(self.stream)
            torch.cuda.set_stream(self.own.stream)
        self._wait(lambda: self.whose == slot)
        self.as_before()

    def pass_on(self) -> None:
        """Let all others have their turn."""
        put_back = self.settings()
        with self.changed:
            self._next()
        self._wait(lambda: self.whose == self.own.slot)
        put_back()

    def settle(self) -> None:
        """Wait for this group's GPU work: who gets a result works on another stream."""
        if self.own.stream is not None:
            self.own.stream.synchronize()

    def leave(self) -> None:
        with self.changed:
            self._next()
            self.live.remove(self.own.slot)
            self.changed.notify_all()

    def give_up(self, error: BaseException) -> None:
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()

    def on_caller(self, work: Callable[[], R]) -> R:
        """What `work` returns on the thread that serves, in the modes of this one and in order with its GPU work."""
        modes, own = _modes(self.device.type), self.own.stream

        def there() -> R:
            if self.stream is not None:
                self.stream.wait_stream(own)
            with modes():
                worked = work()
            if self.stream is not None:
                own.wait_stream(self.stream)
            return worked

        with self.changed:
            self.work = there
            self.changed.notify_all()
        self._wait(lambda: self.work is None)
        worked, self.worked = self.worked, None
        if isinstance(worked, Exception):
            raise worked
        return worked

    def send_when_there(self, tensor: Tensor, send: Callable[[Tensor], Any]) -> None:
        """Let the mailer send a tensor as it is now, once it is computed; from RAM."""
        there = torch.cuda.Event() if tensor.is_cuda else None
        copied = tensor.to("cpu", non_blocking=tensor.is_cuda, copy=True)  # pinned, if it comes from a GPU
        if there is not None:
            there.record()

        def letter() -> None:
            if there is not None:
                there.synchronize()
            send(copied)

        self.letters.put(letter)

    def mail(self) -> None:
        """What the mailer does, until there is nothing more to come."""
        if self.stream is not None:
            torch.cuda.set_device(self.device)  # a thread begins with the first GPU
        while (letter := self.letters.get()) is not None:
            if self.error is None or isinstance(self.error, Exception):  # which others come to, too, by these letters
                letter()

    def serve(self) -> None:
        """Work for the others, until all have left or one has failed."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.work is not None or self.error is not None or not self.live)
            if self.error is not None or self.work is None:
                return
            try:
                self.worked = self.work()
            except Exception as error:
                self.worked = error
            with self.changed:
                self.work = None
                self.changed.notify_all()

    def _next(self) -> None:
        self.whose = next((slot for slot in self.live if slot > self.own.slot), self.live[0])
        self.changed.notify_all()

    def _wait(self, until: Callable[[], bool]) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.error is not None or until())
        if self.error is not None:
            raise _GivenUp
