"""Resting places: slabs, files, the parts of weights and the moves that bring them."""

import gc
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from bigkit.checkpoints.format import read_header
from bigkit.checkpoints.resting import write_file
from bigkit.checkpoints.ring import Slab
from bigkit.checkpoints.write import Form
from bigkit.offload.source import Source
from bigkit.offload.weights import ALIGN, Move, Part, Unit, Weight, part_of, rest_in_ram
from tests import fake_cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn]


def bytes_of(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).clone()


def random(shape, dtype):
    return torch.randint(0, 2, shape).to(dtype)


def unit_of(tensors, sources=None):
    module = nn.Module()
    weights = [
        Weight(f"w{i}", nn.Parameter(torch.empty_like(t, device="meta"), False), [(module, f"w{i}", False)],
               {"": part_of(t)})
        for i, t in enumerate(tensors)
    ]  # fmt: skip
    return Unit("unit", module, weights)


SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=6)


@given(SHAPES, st.data())
def test_what_is_laid_into_a_slab_comes_out_of_a_slot(shapes, data):
    tensors = []
    for shape in shapes:
        tensor = random(shape, data.draw(st.sampled_from(DTYPES)))
        tensors.append(tensor.permute(data.draw(st.permutations(range(tensor.dim())))))
    unit = unit_of(tensors)
    rest_in_ram(unit, [{"": tensor} for tensor in tensors], pin=False)
    slot = torch.full((unit.nbytes,), 255, dtype=torch.uint8)
    for move in unit.moves():
        slot[move.offset : move.offset + move.nbytes] = move.slab.bytes[move.at : move.at + move.nbytes]
    assert len(unit.moves()) <= 1  # a slab is laid out as the slot is: one copy
    for weight, tensor in zip(unit.weights, tensors):
        assert weight.parts[""].offset % ALIGN == 0
        for found in (weight.over(slot), weight.load()):
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert torch.equal(bytes_of(found), bytes_of(tensor))
            assert found.stride() == tensor.stride() or 1 in tensor.shape or not tensor.numel()


@given(shapes=SHAPES, data=st.data())
def test_what_lies_in_a_file_comes_out_of_as_few_reads_as_there_are_stretches(shapes, data, tmp_path_factory):
    tensors = {f"w{i}": random(shape, data.draw(st.sampled_from(DTYPES))) for i, shape in enumerate(shapes)}
    folder = tmp_path_factory.mktemp("file")
    if data.draw(st.booleans()):
        save_file(tensors, file := folder / "a.safetensors")
    else:
        forms = {name: Form(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        written, _ = write_file(folder, forms, tensors.__getitem__)
        file = written.path
    header, source = read_header(file), Source(file)
    unit = unit_of(list(tensors.values()))
    for weight in unit.weights:
        part = weight.parts[""]
        part.source, part.at = source, header[weight.name].offset
    unit.weights.sort(key=Weight.order)
    slot = torch.full((unit.nbytes,), 255, dtype=torch.uint8)
    for move in unit.moves():
        raw = bytearray(move.nbytes)
        source.read(memoryview(raw), move.at)
        for part in move.parts:
            start = part.at - move.at
            slot[part.offset : part.offset + part.nbytes] = torch.tensor(list(raw[start : start + part.nbytes]),
                                                                         dtype=torch.uint8)  # fmt: skip
    assert len(unit.moves()) <= 1
    for weight in unit.weights:
        for found in (weight.over(slot), weight.load()):
            assert found.dtype == tensors[weight.name].dtype
            assert torch.equal(bytes_of(found), bytes_of(tensors[weight.name]))


def test_a_tensor_that_starts_between_two_elements(tmp_path):
    path = tmp_path / "raw"
    path.write_bytes(b"x" + bytes_of(torch.arange(5.0)).numpy().tobytes())
    part = Part((5,), (1,), torch.float32, at=1, source=Source(path))
    assert torch.equal(part.on_cpu(), torch.arange(5.0))


def test_parts_keep_dense_strides_and_close_holes():
    for tensor in (torch.randn(3, 4).t(), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)):
        assert part_of(tensor).stride == tensor.stride()
    for tensor in (torch.randn(4, 6)[:, ::2], torch.randn(1, 4).expand(3, 4), torch.randn(6)[::3]):
        assert part_of(tensor).stride == tensor.contiguous().stride()
        assert part_of(tensor).nbytes == tensor.numel() * 4


def test_moves_follow_what_rests_elsewhere_now():
    tensors = [torch.randn(10) for _ in range(3)]
    unit = unit_of(tensors)
    rest_in_ram(unit, [{"": tensor} for tensor in tensors], pin=False)
    assert len(unit.moves()) == 1
    unit.weights[1].parts[""].slab = Slab(40)
    unit.weights[1].parts[""].at = 0
    assert len(unit.moves()) == 1
    unit.forget_moves()
    assert [len(move.parts) for move in unit.moves()] == [1, 1, 1] and unit.rests_in() == "cpu"


def test_an_interrupt_leaves_no_moves_out(monkeypatch):
    tensors = [torch.randn(10) for _ in range(3)]
    unit = unit_of(tensors)
    for weight, tensor in zip(unit.weights, tensors):
        rest_in_ram(Unit("alone", nn.Module(), [weight]), [{"": tensor}], pin=False)
    unit.lay_out()
    calls = []

    def interrupted(move, part):
        calls.append(part)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Move, "take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            unit.moves()
    assert calls and len(unit.moves()) == 3


def test_keep_and_what_fits():
    unit = unit_of([torch.randn(2, 3)])
    rest_in_ram(unit, [{"": torch.zeros(2, 3)}], pin=False)
    for wrong in (torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64)):
        assert not unit.weights[0].fits(wrong)
    assert unit.weights[0].fits(torch.ones(3, 2).t())
    unit.weights[0].keep(torch.ones(3, 2).t())
    assert unit.weights[0].load().sum() == 6


def test_a_file_is_never_written_to(tmp_path):
    save_file({"w0": torch.ones(4, 4)}, path := tmp_path / "a.safetensors")
    before = path.read_bytes()
    unit = unit_of([torch.ones(4, 4)])
    part = unit.weights[0].parts[""]
    part.source, part.at = Source(path), read_header(path)["w0"].offset
    with torch.no_grad():
        unit.weights[0].load().zero_()
    unit.weights[0].keep(torch.full((4, 4), 2.0))
    assert part.source is None and unit.weights[0].load().sum() == 32 and path.read_bytes() == before


def open_files():
    return [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]


def test_sources_have_pages_of_their_own_and_close_their_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(10000))
    one, other = Source(path), Source(tmp_path / "." / "file")
    torch.frombuffer(other.mapped(), dtype=torch.uint8)[:] = 7
    assert one.mapped()[0] == 0 and path.read_bytes()[0] == 0 and other.mapped()[0] == 7
    other.check()
    path.write_bytes(bytes(9999))
    for source in (one, other):
        with pytest.raises(OSError, match="changed under a model"):
            source.check()
    with pytest.raises(OSError, match="shorter than it was: nothing at byte 9999"):
        one.read(memoryview(bytearray(10)), 9995)
    with pytest.raises(OSError):
        Source(tmp_path / "nothing")
    assert str(path) in open_files()
    del one, other, source
    gc.collect()
    assert str(path) not in open_files()


def test_written_files_are_what_safetensors_reads(tmp_path):
    from safetensors.torch import load_file

    tensors = {"a": torch.randn(3), "flag": torch.tensor(True), "empty": torch.empty(0, 2),
               "half": torch.randn(5).half(), "ü": torch.arange(3, dtype=torch.uint8)}  # fmt: skip
    forms = {name: Form(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    written, stored = write_file(tmp_path / "new" / "folder", forms, tensors.__getitem__)
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(written.path).items())
    assert (
        all(where.offset % where.dtype.itemsize == 0 for where in stored.values()) and stored.keys() == tensors.keys()
    )

    def broken(name):
        raise OSError("read error")

    with pytest.raises(OSError, match="could not write weights to .*read error"):
        write_file(tmp_path / "other", forms, broken)
    assert not list((tmp_path / "other").iterdir())
    del written
    assert not list((tmp_path / "new" / "folder").iterdir())


class OnGpu(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


def test_pinning_for_what_comes_from_a_gpu_keeps_what_is_there(monkeypatch):
    """As experts are whose biases were in RAM already, and their codes on a GPU."""
    runtime = fake_cuda.install(monkeypatch)
    tensors = [torch.randn(3000), torch.randn(5, 7), torch.randn(9)]
    unit = unit_of(tensors)
    rest_in_ram(unit, [{"": tensors[0]}, {"": tensors[1].as_subclass(OnGpu)}, {"": tensors[2]}], pin=True)
    assert runtime.pinned
    assert all(torch.equal(weight.load(), tensor) for weight, tensor in zip(unit.weights, tensors))
