"""Reading PyTorch's trace of allocations: the allocator's model plays the GPU, so that no GPU is needed."""

from types import SimpleNamespace

import pytest
from hypothesis import given

from bigkit.machine.allocator import CachingAllocator, OutOfMemory, Recording, replay
from bigkit.measure import _torch, allocations
from bigkit.measure.allocations import _read, record_allocations
from bigkit.units import MiB
from tests.machine.test_allocator import events_of, runs


def trace_of(events, streams, capacity=None):
    """What `torch.cuda.memory._snapshot()` would list for a run."""
    entries = []

    def watch(size, address):
        entries.append({"action": "segment_alloc" if size > 0 else "segment_free", "addr": address, "size": abs(size)})

    gpu = CachingAllocator(capacity, watch=watch)
    blocks, stream = [], iter(streams)
    for event in events:
        if event > 0:
            lane = next(stream, 0)
            try:
                blocks.append(gpu.malloc(event, lane))
            except OutOfMemory:
                blocks.append(None)
                entries.append({"action": "oom", "device_free": 0, "size": event, "stream": 0})
                continue
            entries.append({"action": "alloc", "addr": blocks[-1].address, "size": event, "stream": 1000 * lane})
        elif event < 0 and blocks[-event - 1] is not None:
            block = blocks[-event - 1]
            for action in ("free_requested", "free_completed"):
                entries.append({"action": action, "addr": block.address, "size": block.size, "stream": 0})
            gpu.free(block)
        elif event == 0:
            gpu.empty_cache()
    return entries, gpu


@given(runs)
def test_a_trace_says_what_was_asked(run):
    events, streams = events_of(run)
    entries, gpu = trace_of(events, streams)
    recording = Recording()
    _read(entries, [], recording)
    assert [e for e in recording.events if e > 0] == [e for e in events if e > 0]
    again = CachingAllocator()
    replayed = replay(recording.events, recording.streams, again)
    assert (replayed.peak_allocated, replayed.peak_reserved) == (gpu.peak_allocated, gpu.peak_reserved)
    assert (again.allocated, again.reserved) == (gpu.allocated, gpu.reserved)


@given(runs)
def test_a_full_device_is_read_rightly(run):
    """Segments given back to make room belong to the request; those given back in vain are an event."""
    events, streams = events_of(run)
    entries, gpu = trace_of([event for event in events if event], streams, 90 * MiB)
    recording = Recording(capacity=90 * MiB)
    _read(entries, [], recording)
    again = CachingAllocator(90 * MiB)
    replayed = replay(recording.events, recording.streams, again)
    assert (replayed.peak_allocated, replayed.peak_reserved) == (gpu.peak_allocated, gpu.peak_reserved)
    assert (again.allocated, again.reserved) == (gpu.allocated, gpu.reserved)


def test_moments_lie_where_they_were_marked():
    entries, _ = trace_of([600, 5 * MiB, -1, 0, 700], [])
    recording = Recording()
    _read(entries, [("start", 0), ("two", 2), ("freed", 3), ("end", 4)], recording)
    assert recording.marks == [("start", 0), ("two", 2), ("freed", 3), ("end", 5)]


@pytest.fixture
def fake_cuda(monkeypatch):
    """PyTorch's settings of one GPU, as a user left them: a memory limit of 70 %, no history."""
    cuda = SimpleNamespace(limit=0.7, records=False, device_traces=[])
    stats = {f"{name}_bytes.all.peak": 0 for name in ("reserved", "allocated")}
    counts = {"allocation.all.allocated": 0, "allocation.all.freed": 0}
    functions = {
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "memory_reserved": lambda device: 0,
        "memory_allocated": lambda device: 0,
        "memory_stats": lambda device: {**stats, **counts},
        "reset_peak_memory_stats": lambda device: None,
        "get_device_name": lambda device: "fake",
        "get_device_properties": lambda device: SimpleNamespace(total_memory=1000 * MiB),
        "get_per_process_memory_fraction": lambda device: cuda.limit,
        "set_per_process_memory_fraction": lambda fraction, device: setattr(cuda, "limit", fraction),
    }
    for name, function in functions.items():
        monkeypatch.setattr(allocations.torch.cuda, name, function)
    monkeypatch.setattr(_torch, "clear_cublas_workspaces", lambda: None)
    monkeypatch.setattr(_torch, "records_history", lambda: cuda.records)
    monkeypatch.setattr(_torch, "start_history", lambda: setattr(cuda, "records", True))
    monkeypatch.setattr(_torch, "stop_history", lambda: setattr(cuda, "records", False))
    monkeypatch.setattr(_torch, "history", lambda device: [])
    return cuda


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_settings_are_afterwards_what_they_were(fake_cuda, error):
    def work():
        with record_allocations(capacity=100 * MiB) as mark:
            assert (fake_cuda.limit, fake_cuda.records, mark.recording.capacity) == (0.1, True, 100 * MiB)
            if error:
                raise error

    if error:
        pytest.raises(error, work)
    else:
        work()
    assert (fake_cuda.limit, fake_cuda.records) == (0.7, False)


def test_a_trace_that_cannot_be_read_restores_the_settings_too(fake_cuda, monkeypatch):
    monkeypatch.setattr(_torch, "history", lambda device: 1 / 0)
    with pytest.raises(ZeroDivisionError), record_allocations(capacity=100 * MiB):
        pass
    assert (fake_cuda.limit, fake_cuda.records) == (0.7, False)


def test_a_history_of_the_users_own_is_not_ended(fake_cuda):
    fake_cuda.records = True
    with pytest.raises(RuntimeError, match="records its memory history already"), record_allocations():
        pass
    assert fake_cuda.records
