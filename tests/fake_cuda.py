"""Streams and events that do everything at once, on the CPU: for what is written around them."""

from contextlib import nullcontext

import torch


class Event:
    """Knows whether it was recorded; waiting for one that was not is waiting for nothing, as in CUDA."""

    def __init__(self):
        self.recorded = 0

    def record(self, stream=None):
        self.recorded += 1

    def synchronize(self):
        pass


class Stream:
    def __init__(self, device=None):
        self.calls = []

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def __getattr__(self, name):  # wait_stream, wait_event, synchronize
        return lambda *given: self.calls.append(name)


class Runtime:
    """What `torch.cuda.cudart()` gives: which addresses are pinned, and whether pinning is refused."""

    def __init__(self, refuse=False):
        self.refuse, self.pinned = refuse, {}

    def cudaHostRegister(self, address, nbytes, flags):
        assert address not in self.pinned
        if not self.refuse:
            self.pinned[address] = nbytes
        return int(self.refuse)

    def cudaHostUnregister(self, address):
        del self.pinned[address]
        return 0


def install(monkeypatch, refuse=False):
    """Put them in the place of CUDA's; returns the runtime."""
    runtime = Runtime(refuse)
    for name, value in {
        "Stream": Stream, "Event": Event, "current_stream": lambda device=None: Stream(),
        "stream": lambda stream: nullcontext(), "device": lambda device: nullcontext(),
        "synchronize": lambda device=None: None, "cudart": lambda: runtime,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return runtime
