"""Packing tensors into chunks and laying them out again, on the CPU; the real thing is in tests/gpu."""

import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bigkit.checkpoints import _torch, to_gpu
from bigkit.checkpoints.format import Checkpoint, Stored, read_header
from bigkit.checkpoints.to_gpu import _cut, _lay_out, read_to_gpu, stream_to_gpu
from tests import fake_cuda

CPU = torch.device("cpu")

DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn]


@st.composite
def files(draw):
    """(stored, content, dtypes): tensors of any dtype one after another in up to three files, some left out."""
    stored, content = {}, {}
    for f in range(draw(st.integers(1, 3))):
        path, body = Path(f"file{f}"), bytearray(draw(st.binary(max_size=9)))
        for t in range(draw(st.integers(0, 6))):
            dtype, shape = draw(st.sampled_from(DTYPES)), tuple(draw(st.lists(st.integers(0, 6), max_size=2)))
            size = torch.Size(shape).numel() * dtype.itemsize
            where = Stored(path, len(body), size, dtype, shape)
            body += bytes(draw(st.integers(0, 1)) for _ in range(size)) if dtype == torch.bool else draw(
                st.binary(min_size=size, max_size=size))  # fmt: skip
            if draw(st.integers(0, 4)):
                stored[f"{f}.{t}"] = where
        content[path] = bytes(body)
    casts = {name: draw(st.sampled_from([None, torch.float32])) for name in stored}
    return stored, content, casts


def every_byte_arrives_where_it_belongs(case, size, direct):
    stored, content, casts = case
    tensors = {n: torch.empty(w.shape, dtype=casts[n] or w.dtype) for n, w in stored.items()}
    chunk, staging = torch.empty(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    for load in _cut(stored, size):
        assert 0 < load.nbytes <= size and sum(part.nbytes for part in load.parts) == load.nbytes
        body = content[load.file][load.start : load.start + load.nbytes]
        chunk[: load.nbytes] = torch.frombuffer(bytearray(body), dtype=torch.uint8)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bigkit.checkpoints.to_gpu.DIRECT", direct)
            _lay_out(load, chunk, staging, stored, tensors)
    for name, where in stored.items():
        body = content[where.file][where.offset : where.offset + where.nbytes]
        expected = (
            torch.frombuffer(bytearray(body), dtype=torch.uint8).view(where.dtype).view(where.shape) if body else None
        )
        if expected is not None:
            expected = expected.to(casts[name] or where.dtype)
            assert torch.equal(tensors[name].view(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)), name


FILES = given(files(), st.integers(8, 70), st.sampled_from([1, 16, 10**6]))
test_every_byte_arrives_where_it_belongs = settings(max_examples=200)(FILES(every_byte_arrives_where_it_belongs))
test_every_byte_for_long = pytest.mark.soak(settings(max_examples=5000)(FILES(every_byte_arrives_where_it_belongs)))


def test_loads_follow_the_files_order(tmp_path):
    save_file({f"t{i}": torch.zeros(1000) for i in range(10)}, tmp_path / "a.safetensors")
    loads = list(_cut(read_header(tmp_path / "a.safetensors"), 9000))
    assert [load.start for load in loads] == sorted(load.start for load in loads)
    assert len(loads) == 5 and len(Checkpoint.open(tmp_path)) == 10


@pytest.mark.parametrize(("chunk", "ring", "readers"), [(4096, 2, 1), (100_003, 3, 4), (1 << 20, 1, 1)])
@pytest.mark.parametrize("refuse", [False, True])
def test_whole_files_go_through_the_ring(tmp_path, monkeypatch, chunk, ring, readers, refuse):
    """With streams that do everything at once; tests/gpu has the same with real ones."""
    runtime = fake_cuda.install(monkeypatch, refuse)
    tensors = {f"t{i}": torch.randn(3**i, 7) for i in range(9)} | {"empty": torch.empty(0, 2)}
    tensors |= {"half": torch.randn(5).half(), "flag": torch.tensor(True)}
    save_file(tensors, tmp_path / "model.safetensors")
    stored, sizes = read_header(tmp_path / "model.safetensors"), {"chunk": chunk, "ring": ring, "readers": readers}
    for name, value in read_to_gpu(stored, CPU, {"half": torch.float32}, **sizes).items():
        assert torch.equal(value, tensors[name].to(value.dtype)) and not runtime.pinned, name
    assert dict(stream_to_gpu(stored, CPU, **sizes)).keys() == tensors.keys()
    first, value = next(arriving := stream_to_gpu(stored, CPU, **sizes))
    arriving.close()  # the rest is not wanted
    assert torch.equal(value, tensors[first]) and not runtime.pinned
    os.truncate(tmp_path / "model.safetensors", 100_000)
    with pytest.raises(OSError, match="is shorter than it was: nothing at byte"):
        read_to_gpu(stored, CPU, **sizes)
    os.unlink(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError):
        read_to_gpu(stored, CPU, **sizes)
    assert not runtime.pinned and not [t for t in threading.enumerate() if t.name.startswith("bigkit-loader")]


def test_several_gpus_are_loaded_at_once(tmp_path, monkeypatch):
    fake_cuda.install(monkeypatch)
    tensors = {f"t{i}": torch.randn(50, 7 + i) for i in range(9)}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = read_header(tmp_path / "model.safetensors")
    halves = [{name: where for name, where in stored.items() if int(name[1]) % 2 == k} for k in range(2)]
    both = threading.Barrier(2)  # each waits until the other has begun

    def meet(*given, **sizes):
        both.wait(timeout=20)
        assert sizes == {"readers": to_gpu.READERS // 2}  # they share them
        return read_to_gpu(*given, **sizes)

    monkeypatch.setattr(to_gpu, "read_to_gpu", meet)
    values = to_gpu.read_to_gpus([(CPU, half) for half in halves], {"t3": torch.float64})
    assert values.keys() == tensors.keys() and values["t3"].dtype == torch.float64
    assert all(torch.equal(values[name], tensor.to(values[name].dtype)) for name, tensor in tensors.items())
    os.truncate(tmp_path / "model.safetensors", 1000)
    with pytest.raises(OSError, match="is shorter than it was"):
        to_gpu.read_to_gpus([(CPU, half) for half in halves])
    assert not [t for t in threading.enumerate() if t.name.startswith("bigkit-loader")]


def test_torch_has_what_loading_uses():
    version = f"in torch {torch.__version__}: see bigkit/checkpoints/_torch.py"
    targets = [torch.zeros(2, 2), torch.zeros(3, dtype=torch.int64)]
    views = _torch.cut_like(torch.arange(7.0), targets)
    assert [view.tolist() for view in views] == [[[0, 1], [2, 3]], [4, 5, 6]], f"_unflatten_dense_tensors {version}"
    _torch.copy_all(targets, views)
    assert targets[1].tolist() == [4, 5, 6], f"_foreach_copy_ does not cast {version}"
    assert _torch.detect_fake_mode() is None, f"detect_fake_mode sees a mode where there is none {version}"
