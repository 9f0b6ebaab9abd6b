"""Pinned RAM and the ring of it: every byte arrives once, no chunk is refilled too early, all is given back."""

import gc
import queue
import random
import threading
import time

import psutil
import pytest
import torch

from bigkit.checkpoints import ring as ring_module
from bigkit.checkpoints.ring import Ring, Slab, pinned_bytes, read_fully
from tests import fake_cuda


class SlowEngine:
    """A copy engine that is slower than the readers: events are set when it has done what was queued before them."""

    def __init__(self):
        self.queue, self.copied = queue.SimpleQueue(), []
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def work(self):
        while (item := self.queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
            else:
                time.sleep(random.random() / 1000)
                number, source = item
                assert (source == number % 251).all(), "a chunk was filled again before it was copied"
                self.copied.append(number)

    def record_event(self, event=None):
        event = threading.Event()
        event.synchronize = lambda: event.wait(10)
        self.queue.put(event)
        return event


@pytest.mark.parametrize(("readers", "chunks"), [(1, 1), (1, 4), (4, 4), (8, 3), (3, 20)])
def test_every_job_arrives_and_no_chunk_is_filled_too_early(monkeypatch, readers, chunks):
    fake_cuda.install(monkeypatch)
    engine, ring, jobs = SlowEngine(), Ring(1000, chunks), iter([*range(100)])

    def send(number, chunk):
        engine.queue.put((number, chunk.bytes))
        ring.give_back(chunk, engine)

    def read(number, chunk):
        chunk.bytes.fill_(number % 251)

    threads = [threading.Thread(target=ring.fill, args=(jobs, read, send), daemon=True) for _ in range(readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    engine.queue.put(None)
    engine.thread.join(10)
    assert sorted(engine.copied) == [*range(100)]


def test_a_failed_read_gives_its_chunk_back_and_ends_one_reader(monkeypatch):
    fake_cuda.install(monkeypatch)
    ring, sent = Ring(10, 1), []

    def read(number, chunk):
        if number == 2:
            raise OSError("a broken disk")

    def send(number, chunk):
        sent.append(number)
        ring.give_back(chunk, fake_cuda.Stream())

    jobs = iter([*range(5)])
    with pytest.raises(OSError, match="a broken disk"):
        ring.fill(jobs, read, send)
    ring.fill(jobs, read, send)  # what is left, by another reader
    assert sent == [0, 1, 3, 4]


def test_closing_ends_readers_that_wait(monkeypatch):
    fake_cuda.install(monkeypatch)
    ring, full = Ring(10, 2), queue.SimpleQueue()
    work = (iter([*range(100)]), lambda job, chunk: None, lambda *item: full.put(item))  # nothing is given back
    threads = [threading.Thread(target=ring.fill, args=work, daemon=True) for _ in range(5)]
    for thread in threads:
        thread.start()
    full.get(), full.get()
    ring.close()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads) and full.empty()


def test_chunks_are_pinned_when_first_filled_and_unpinned_at_the_end(monkeypatch):
    runtime = fake_cuda.install(monkeypatch)
    ring = Ring(3000, 3)
    stream = fake_cuda.Stream()
    ring.fill(iter("ab"), lambda job, chunk: None, lambda job, chunk: ring.give_back(chunk, stream))
    assert [*runtime.pinned.values()] == [3000] * 2 and pinned_bytes() == 6000
    ring.fill(iter("abcdef"), lambda job, chunk: None, lambda job, chunk: ring.give_back(chunk, stream))
    assert len(runtime.pinned) == 3
    ring.unpin()
    assert not runtime.pinned and pinned_bytes() == 0


def test_a_slab_is_pinned_once_and_unpinned_when_it_goes(monkeypatch):
    runtime = fake_cuda.install(monkeypatch)
    slab = Slab(5000, pin=True)
    assert slab.bytes.shape == (5000,) and not slab.pinned
    slab.pin()
    slab.pin()
    assert slab.pinned and pinned_bytes() == 5000 and not slab.bytes.any()
    view = slab.bytes[10:]
    del slab
    gc.collect()
    assert not runtime.pinned and pinned_bytes() == 0 and not view.any()  # the memory itself is still there
    assert Slab(0).bytes.numel() == 0


def test_what_is_let_go_waits_for_every_gpu_that_was_used(monkeypatch):
    """A copy on another GPU than the current one may still write there."""
    fake_cuda.install(monkeypatch)
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device="current": waited.append(device))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0 if device == 1 else 2**20)
    slab = Slab(64, pin=True)
    slab.pin()
    del slab
    assert waited == ["current", 0, 2] and pinned_bytes() == 0
    slab = Slab(64, pin=True)
    slab.pin()
    slab.unpin()  # who calls it knows that nothing is under way
    assert waited == ["current", 0, 2, "current"] and pinned_bytes() == 0
    slab.unpin()


def test_refused_pinning_leaves_ordinary_ram(monkeypatch):
    fake_cuda.install(monkeypatch, refuse=True)
    slab = Slab(100, pin=True)
    slab.pin()
    assert not slab.pinned and pinned_bytes() == 0
    slab.unpin()
    unwanted = Slab(100)
    unwanted.pin()
    assert not unwanted.pinned


def test_what_cannot_be_unpinned_keeps_its_address(monkeypatch):
    """A system that maps the address anew refuses to pin what it still has as pinned."""
    runtime = fake_cuda.install(monkeypatch)
    slab = Slab(64, pin=True)
    slab.pin()
    address = slab.bytes.data_ptr()
    release, failing = slab._release, iter([RuntimeError("a graph is being recorded")])
    monkeypatch.setattr(ring_module, "_kept", [])

    def wait():
        for error in failing:
            raise error

    with pytest.raises(RuntimeError, match="recorded"):
        ring_module._unregister(slab.bytes, wait, runtime.cudaHostUnregister)
    assert ring_module._kept[0].data_ptr() == address and address in runtime.pinned
    release()
    assert not runtime.pinned


def test_a_refusal_is_not_left_to_the_next_kernel(monkeypatch):
    fake_cuda.install(monkeypatch, refuse=True)
    asked = []

    def zeros(*shape, device):  # as on a GPU, where the next kernel's start reports the error before
        asked.append(device)
        raise RuntimeError("part or all of the requested memory range is already mapped")

    monkeypatch.setattr(torch, "zeros", zeros)
    slab = Slab(64, pin=True)
    slab.pin()
    assert not slab.pinned and asked == ["cuda"]


def test_pinning_keeps_to_the_control_group(monkeypatch):
    assert 0 < ring_module.ram_limit() <= psutil.virtual_memory().total
    monkeypatch.setattr(ring_module, "ram_limit", lambda: 1000)
    assert ring_module._may_pin(900) and not ring_module._may_pin(901)
    monkeypatch.setitem(ring_module._pinned, 0, 500)
    assert ring_module._may_pin(400) and not ring_module._may_pin(401)


def test_a_file_is_read_in_as_many_pieces_as_the_system_gives(tmp_path, monkeypatch):
    import os

    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)))
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, at: whole(file, [views[0][:7]], at))
    target = bytearray(100)
    with open(path, "rb") as file:
        read_fully(file.fileno(), memoryview(target), 50, path)
        assert bytes(target) == bytes(range(50, 150))
        with pytest.raises(OSError, match="file is shorter than it was: nothing at byte 256"):
            read_fully(file.fileno(), memoryview(target), 200, path)


def test_a_disk_that_fails_is_named(tmp_path, monkeypatch):
    import errno
    import os

    def fails(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(OSError, match="Input/output error: .*/weights'"):
        read_fully(0, memoryview(bytearray(9)), 0, tmp_path / "weights")


def test_slabs_of_a_dry_run_take_no_memory():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        assert isinstance(Slab(2**40, pin=True).bytes, FakeTensor)
    assert type(Slab(10).bytes) is torch.Tensor


def test_a_ring_made_in_inference_mode_is_filled_in_every_mode():
    """Slots are first asked for by a forward, and filled by threads that know nothing of its mode."""
    with torch.inference_mode():
        slab = Slab(64)
    slab.bytes.copy_(torch.arange(64, dtype=torch.uint8))
    assert slab.bytes[3] == 3 and not slab.bytes.is_inference()
