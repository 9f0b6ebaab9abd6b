"""Streams on the CPU that do their work late and in any order that their events allow: for copies that might overtake.

Operations are noted with the stream that was current, and run again afterwards on scrambled memory.
"""

from contextlib import contextmanager
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import fake_cuda


class Event:
    def __init__(self, *args, **options):
        self.marks = 0

    def record(self, stream):
        stream.record_event(self)


class Stream:
    def __init__(self, world):
        self.world, self.queue, self.done = world, [], 0

    def record_event(self, event=None):
        event = event or Event()
        event.marks += 1
        self.queue.append(("record", (event, event.marks)))
        return event

    def wait_event(self, event):
        self.queue.append(("wait", (event, event.marks)))

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def synchronize(self):
        pass


class World(TorchDispatchMode):
    """What is asked for while it is entered."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.current, self.streams, self.reached = Stream(self), [], set()
        self.streams.append(self.current)
        self.inputs, self.written = set(), {}
        runtime = fake_cuda.Runtime()
        for name, value in {
            "Stream": self.stream, "stream": self.using, "current_stream": lambda device=None: self.current,
            "Event": Event, "cudart": lambda: runtime, "synchronize": lambda device=None: None,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
        monkeypatch.setattr(torch, "tensor", partial(self.from_host, torch.tensor))

    def stream(self, device=None):
        self.streams.append(Stream(self))
        return self.streams[-1]

    def from_host(self, make, *args, **options):
        """What the host knows needs no stream."""
        tensor = make(*args, **options)
        self.inputs.add(tensor.untyped_storage()._cdata)
        return tensor

    @contextmanager
    def using(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.current.queue.append(("run", (function, args, kwargs or {}, output)))
        for tensor in tree_leaves((args, output)):
            if isinstance(tensor, torch.Tensor):
                self.written[tensor.untyped_storage()._cdata] = tensor
        return output

    def run(self, choose):
        """Do all again on memory that holds nothing; `choose` picks from the streams that can go on."""
        for cdata, tensor in self.written.items():
            if cdata not in self.inputs and not tensor.is_meta and tensor.untyped_storage().nbytes():
                torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(0x7F)
        while left := [stream for stream in self.streams if stream.done < len(stream.queue)]:
            able = [stream for stream in left if self._able(stream)]
            stream = choose(able)
            kind, what = stream.queue[stream.done]
            stream.done += 1
            if kind == "record":
                self.reached.add((id(what[0]), what[1]))
            elif kind == "run":
                _again(*what)

    def _able(self, stream):
        kind, what = stream.queue[stream.done]
        return kind != "wait" or not what[1] or (id(what[0]), what[1]) in self.reached


def _again(function, args, kwargs, output):
    again = function(*args, **kwargs)
    for old, new in zip(tree_leaves(output), tree_leaves(again)):
        if isinstance(old, torch.Tensor) and old.untyped_storage()._cdata != new.untyped_storage()._cdata:
            old.copy_(new)
