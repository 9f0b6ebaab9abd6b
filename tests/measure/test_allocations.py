"""Reading PyTorch's trace of allocations: the allocator's model plays the GPU, so that no GPU is needed."""

from hypothesis import given

from bigkit.machine.allocator import CachingAllocator, OutOfMemory, Recording, replay
from bigkit.measure.allocations import _read
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
                entries.append({"action": action, "addr": block.address, "size": block.requested, "stream": 0})
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
    told = replay(recording.events, recording.streams, again)
    assert (told.peak_allocated, told.peak_reserved) == (gpu.peak_allocated, gpu.peak_reserved)
    assert (again.allocated, again.reserved) == (gpu.allocated, gpu.reserved)


@given(runs)
def test_a_full_device_is_read_rightly(run):
    """Segments given back to make room belong to the request; those given back in vain are an event."""
    events, streams = events_of(run)
    entries, gpu = trace_of([event for event in events if event], streams, 90 * MiB)
    recording = Recording(capacity=90 * MiB)
    _read(entries, [], recording)
    again = CachingAllocator(90 * MiB)
    told = replay(recording.events, recording.streams, again)
    assert (told.peak_allocated, told.peak_reserved) == (gpu.peak_allocated, gpu.peak_reserved)
    assert (again.allocated, again.reserved) == (gpu.allocated, gpu.reserved)


def test_moments_lie_where_they_were_marked():
    entries, _ = trace_of([600, 5 * MiB, -1, 0, 700], [])
    recording = Recording()
    _read(entries, [("start", 0), ("two", 2), ("freed", 3), ("end", 4)], recording)
    assert recording.marks == [("start", 0), ("two", 2), ("freed", 3), ("end", 5)]
