"""The model of the caching allocator: its rules, properties of any run, and recordings of real runs."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigkit.machine.allocator import CachingAllocator, OutOfMemory, Recording, replay, round_up, segment_bytes
from bigkit.units import GiB, KiB, MiB

RECORDED = sorted((Path(__file__).parents[1] / "data" / "allocations").glob("*.json.gz"))

sizes = st.one_of(st.integers(1, 4 * KiB), st.integers(1, 2 * MiB), st.integers(1, 64 * MiB))
runs = st.lists(st.tuples(sizes, st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=80)


def events_of(run):
    """A run as events: each request, and now and then the free of the request that `which` picks, or an empty cache."""
    events, streams, live, asked = [], [], [], 0
    for size, action, which in run:
        events.append(size)
        streams.append(which)
        asked += 1
        live.append(asked)
        if action >= 1:
            events.append(-live.pop(size % len(live)))
        if action == 3:
            events.append(0)
        if action == 2 and live:
            events.append(-live.pop(which % len(live)))
    return events, streams


@pytest.mark.parametrize(
    ("size", "allocated", "reserved"),
    [
        (1, 512, 2 * MiB),
        (513, 1024, 2 * MiB),
        (MiB, MiB, 2 * MiB),
        (MiB + 1, MiB + 512, 20 * MiB),
        (10 * MiB - 1, 10 * MiB, 10 * MiB),  # rounding to 512 B lifts it out of the 20 MiB class
        (10 * MiB, 10 * MiB, 10 * MiB),
        (11 * MiB, 12 * MiB, 12 * MiB),  # the last MiB is not worth a block of its own
        (10 * MiB + 512, 10 * MiB + 512, 12 * MiB),
    ],
)
def test_one_request(size, allocated, reserved):
    gpu = CachingAllocator()
    gpu.malloc(size)
    assert (gpu.allocated, gpu.reserved) == (allocated, reserved)


def test_best_fit_takes_the_smallest_block_and_the_lowest_address_among_equals():
    gpu = CachingAllocator()
    blocks = [gpu.malloc(size * MiB) for size in (30, 24, 24, 40)]
    for block in blocks:
        gpu.free(block)
    assert gpu.malloc(24 * MiB).address == min(blocks[1].address, blocks[2].address)
    assert gpu.malloc(25 * MiB).address == blocks[0].address
    assert gpu.malloc(36 * MiB).address == blocks[3].address


def test_neighbours_join_in_any_order():
    for order in ([0, 1, 2], [2, 1, 0], [0, 2, 1], [1, 0, 2]):
        gpu = CachingAllocator()
        parts = [gpu.malloc(4 * MiB) for _ in range(3)]
        for i in order:
            gpu.free(parts[i])
        assert gpu.malloc(20 * MiB - 512) and gpu.reserved == 20 * MiB


def test_streams_do_not_share():
    gpu = CachingAllocator()
    gpu.free(gpu.malloc(5 * MiB, stream=0))
    gpu.malloc(5 * MiB, stream=1)
    assert gpu.reserved == 40 * MiB


def test_a_full_device_gives_free_segments_back_before_it_fails():
    gpu = CachingAllocator(capacity=100 * MiB)
    gpu.free(gpu.malloc(60 * MiB))
    keep = gpu.malloc(30 * MiB)  # cut from the free segment, which can then not be given back
    gpu.free(gpu.malloc(32 * MiB))
    assert gpu.reserved == 92 * MiB
    with pytest.raises(OutOfMemory, match=r"41\.00 MiB were asked for; 30\.00 MiB are allocated in segments of 60"):
        gpu.malloc(41 * MiB)
    gpu.free(keep)
    assert gpu.malloc(100 * MiB) and gpu.reserved == 100 * MiB


def test_the_same_block_is_not_freed_twice():
    gpu = CachingAllocator()
    block = gpu.malloc(1)
    gpu.free(block)
    with pytest.raises(ValueError, match="free already"):
        gpu.free(block)
    with pytest.raises(ValueError, match="at least 1 byte"):
        gpu.malloc(0)


@given(runs)
def test_what_always_holds(run):
    events, streams = events_of(run)
    segments = {}

    def watch(size, address):
        if size < 0:
            assert segments.pop(address) == -size
        else:
            assert all(address + size <= other or other + n <= address for other, n in segments.items()), "overlap"
            segments[address] = size

    gpu = CachingAllocator(watch=watch)
    replayed = replay(events, streams, gpu)
    live, asked = {}, 0
    for event, allocated, reserved in zip(events, replayed.allocated, replayed.reserved):
        if event > 0:
            asked += 1
            live[asked] = event
        elif event < 0:
            del live[-event]
        least = sum(map(round_up, live.values()))
        assert least <= allocated <= reserved
        assert allocated <= least + len(live) * MiB  # an unsplit rest is at most 1 MiB
    assert sum(segments.values()) == gpu.reserved == replayed.reserved[-1]
    assert max(replayed.allocated) == replayed.peak_allocated and max(replayed.reserved) == replayed.peak_reserved


@given(runs)
def test_free_everything_and_nothing_is_left(run):
    events, streams = events_of(run)
    asked = [i + 1 for i, _ in enumerate(e for e in events if e > 0)]
    freed = {-event for event in events if event < 0}
    gpu = CachingAllocator()
    replay([*events, *(-i for i in asked if i not in freed), 0], streams, gpu)
    assert (gpu.allocated, gpu.reserved) == (0, 0)


@given(runs)
def test_against_a_search_through_every_segment(run):
    """The same rules, written plainly: each segment a list of [size, whose], searched from end to end."""
    events, streams = events_of(run)
    replayed = replay(events, streams)
    segments, where, stream_of, asked = [], {}, iter(streams), 0  # a segment: [address, stream, small, [[size, tag]]]
    space = CachingAllocator()._space
    for event, allocated, reserved in zip(events, replayed.allocated, replayed.reserved):
        if event > 0:
            asked += 1
            need, stream = round_up(event), next(stream_of)
            small = need <= MiB
            fits = [
                (block[0], segment[0] + sum(b[0] for b in segment[3][:i]), segment, i)
                for segment in segments
                if (segment[1], segment[2]) == (stream, small)
                for i, block in enumerate(segment[3])
                if block[1] is None and block[0] >= need
            ]
            if not fits:
                size = segment_bytes(need)
                segments.append([space.take(size), stream, small, [[size, None]]])
                fits = [(size, segments[-1][0], segments[-1], 0)]
            size, _, segment, i = min(fits, key=lambda fit: fit[:2])
            rest = size - need
            cut = rest >= 512 if small else rest > MiB
            segment[3][i : i + 1] = [[need, asked], [rest, None]] if cut else [[size, asked]]
            where[asked] = segment
        elif event < 0:
            blocks = where[-event][3]
            next(block for block in blocks if block[1] == -event)[1] = None
            joined = []
            for block in blocks:
                if joined and joined[-1][1] is None and block[1] is None:
                    joined[-1][0] += block[0]
                else:
                    joined.append(block)
            blocks[:] = joined
        else:
            for segment in [s for s in segments if len(s[3]) == 1 and s[3][0][1] is None]:
                space.give(segment[0], segment[3][0][0])
                segments.remove(segment)
        assert allocated == sum(b[0] for s in segments for b in s[3] if b[1] is not None)
        assert reserved == sum(b[0] for s in segments for b in s[3])


@given(runs, st.integers(20, 200))
def test_a_limit_is_kept(run, limit):
    events, streams = events_of(run)
    gpu = CachingAllocator(capacity=limit * MiB)
    try:
        replayed = replay(events, streams, gpu)
    except OutOfMemory:
        assert gpu.reserved <= limit * MiB
    else:
        assert replayed.peak_reserved <= limit * MiB


def test_a_recording_is_kept_and_a_broken_one_is_refused(tmp_path):
    recording = Recording([512, -1, 0], [1], [("start", 0)], [(0, 2 * MiB, 4096)], [4096], GiB, {"allocated": 512})
    recording.save(tmp_path / "a.gz")
    assert Recording.load(tmp_path / "a.gz") == recording
    first = (tmp_path / "a.gz").read_bytes()
    recording.save(tmp_path / "a.gz")
    assert (tmp_path / "a.gz").read_bytes() == first
    for broken in (first[:20], b"", b"text", first[:-5]):
        (tmp_path / "b.gz").write_bytes(broken)
        with pytest.raises(ValueError, match="b.gz holds no recording"):
            Recording.load(tmp_path / "b.gz")


@pytest.mark.skipif(not RECORDED, reason="no recordings of real runs yet: scripts/record_allocations.py makes them")
@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name.split(".")[0])
def test_recordings_of_real_runs_are_replayed_exactly(path):
    """The peaks, every segment at its moment, and the place of every request."""
    recording = Recording.load(path)
    taken = [(size, address) for _, size, address in recording.segments if size > 0]
    order = iter(taken)
    seen = []
    done = 0

    def place(size):
        real, address = next(order)
        assert size == real, f"segment {done}: {size} B, but the real one has {real} B"
        return address

    gpu = CachingAllocator(recording.capacity, place, lambda size, address: seen.append((done, size, address)))
    blocks, streams, addresses = [], iter(recording.streams), iter(recording.addresses)
    for done, event in enumerate(recording.events):  # noqa: B007
        if event > 0:
            blocks.append(gpu.malloc(event, next(streams, 0)))
            assert blocks[-1].address == next(addresses)
        elif event < 0:
            gpu.free(blocks[-event - 1])
        else:
            gpu.empty_cache()
    assert {"allocated": gpu.peak_allocated, "reserved": gpu.peak_reserved} == recording.peaks
    assert [item[:2] for item in seen if item[1] > 0] == [item[:2] for item in recording.segments if item[1] > 0]
