"""In which order a recording forks, joins and ends, with what stands for CUDA on the CPU."""

import gc
import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch

from bigkit.offload import recording
from bigkit.offload.recording import Recording


class Stream:
    def __init__(self, log, device):
        self.log, self.device = log, device

    def wait_stream(self, other):
        self.log.append(f"{self.device} waits for {other.device}")


class Rings:
    """A model with one stream that copies."""

    def __init__(self, log):
        self.log, self.copies = log, Stream(log, "copies")

    @contextmanager
    def borrowed(self):
        self.log.append("borrow")
        try:
            yield
        finally:
            self.log.append("give back")

    def streams(self):
        return [self.copies]

    def recorded(self, function):
        self.log.append("begin")
        result = function()
        self.log.append("end")
        return result, {}

    def ready(self, found):
        return nullcontext()


@pytest.fixture
def log(monkeypatch):
    log = []

    @contextmanager
    def graph(graph, pool, stream, capture_error_mode):
        log.append("capture")
        try:
            yield
        finally:
            log.append("captured")
            if "spoil" in log:
                raise RuntimeError("invalidated")

    class Graph:
        def replay(self):
            log.append("replay")

    for name, value in {
        "CUDAGraph": Graph, "MemPool": object, "graph_pool_handle": object, "graph": graph,
        "Stream": lambda device: Stream(log, device), "stream": lambda stream: nullcontext(),
        "use_mem_pool": lambda pool, device: nullcontext(), "synchronize": lambda device: log.append(f"sync {device}"),
        "current_stream": lambda device: Stream(log, f"current {device}"), "device": lambda device: nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(recording, "end_failed_capture", lambda pool, device: log.append(f"mend {device}"))
    return log


def test_all_streams_fork_and_join(log):
    own = Recording(["gpu 0", "gpu 1"], Rings(log))
    assert own.record(lambda: log.append("work") or 3) == 3
    assert log == [
        "sync gpu 0", "sync gpu 1", "borrow", "capture", "gpu 1 waits for gpu 0", "copies waits for gpu 0", "begin",
        "work", "end", "gpu 0 waits for gpu 1", "gpu 0 waits for copies", "captured", "give back",
    ]  # fmt: skip
    log.clear()
    own.replay()
    assert log == [
        "current gpu 0 waits for current gpu 1", "replay", "current gpu 1 waits for current gpu 0",
    ]  # fmt: skip


def test_garbage_waits_until_a_recording_has_ended(log):
    """Pinned RAM that is collected waits for the GPU, and that spoils what is being recorded."""

    class Loop:
        pass

    def work():
        loop = Loop()
        loop.itself = loop
        weakref.finalize(loop, gone.append, True)
        del loop
        assert len([[] for _ in range(100_000)]) == 100_000 and not gone  # enough for a collection by itself

    gone = []
    Recording(["gpu 0"], Rings(log)).record(work)
    gc.collect()
    assert gone and gc.isenabled()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_is_raised_ends_the_recording(log, error):
    own = Recording(["gpu 0"], Rings(log))

    def work():
        raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        own.record(work)
    assert isinstance(own.error, error)
    assert log[-3:] == ["gpu 0 waits for copies", "captured", "give back"]  # it could end, and gives back all itself


def test_a_recording_that_cannot_end_is_mended(log):
    own = Recording(["gpu 0"], Rings(log))

    def work():
        log.append("spoil")
        raise ValueError("in the middle")

    with pytest.raises(RuntimeError, match="invalidated"):
        own.record(work)
    assert str(own.error) == "in the middle" and log[-3:] == ["captured", "give back", "mend gpu 0"]


@pytest.mark.parametrize("interrupted", [False, True])
def test_nobody_goes_on_while_the_host_is_called(log, monkeypatch, interrupted):
    class Event:
        def __init__(self, blocking):
            assert blocking

        def record(self, stream):
            log.append(f"end of {stream.device}")

        def synchronize(self):
            log.append("waited")

    def replay():
        log.append("replay")
        if interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "Event", Event)
    own = Recording(["gpu 0"], Rings(log))
    own.record(lambda: None)
    monkeypatch.setattr(own._graph, "replay", replay, raising=False)
    own.calls._own.append(0)
    with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
        own.replay()
    assert log[-3:] == ["replay", "end of current gpu 0", "waited"]
