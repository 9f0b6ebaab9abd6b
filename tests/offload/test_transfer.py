"""Bytes on their way to slots, with streams that do everything at once; tests/gpu has real ones."""

import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bigkit.checkpoints.format import read_header
from bigkit.checkpoints.ring import Slab
from bigkit.offload import transfer
from bigkit.offload.reads import jobs_of
from bigkit.offload.source import Source
from bigkit.offload.transfer import CudaLane, PlainLane
from bigkit.offload.weights import Unit, Weight, part_of, rest_in_ram
from tests import fake_cuda

CPU = torch.device("cpu")


def unit_of(tensors):
    weights = [Weight(name, nn.Parameter(torch.empty_like(t, device="meta"), False), [], {"": part_of(t)})
               for name, t in tensors.items()]  # fmt: skip
    return Unit("unit", nn.Module(), weights)


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {f"w{i}": torch.randn(3**i, 5) for i in range(8)} | {"half": torch.randn(3).half(), "none": torch.empty(0)}


def filled(lane, unit, tensors):
    """A slot after a unit's arrival, which holds what it should."""
    slot = PlainLane.slot(lane, unit.nbytes)
    slot.ready, slot.free = fake_cuda.Event(), fake_cuda.Event()
    for _ in range(2):  # again, from chunks that have been used
        slot.base.fill_(255)
        lane.fill(slot, unit)
        lane.arrive(slot)
        for weight in unit.weights:
            assert torch.equal(weight.over(slot.base), tensors[weight.name]), weight.name
    lane.leave(slot)
    lane.close()
    return slot


@pytest.mark.parametrize("chunk", [512, 1000, 2**20])
@pytest.mark.parametrize("refuse", [False, True])
def test_units_from_ram_and_files_arrive_whole(monkeypatch, tmp_path, tensors, chunk, refuse):
    runtime = fake_cuda.install(monkeypatch, refuse)
    monkeypatch.setattr(transfer, "CHUNK", chunk)
    save_file(tensors, path := tmp_path / "model.safetensors")
    on_disk, in_ram, mixed = unit_of(tensors), unit_of(tensors), unit_of(tensors)
    source, header = Source(path), read_header(path)
    for unit in (on_disk, mixed):
        for weight in unit.weights[:: 1 if unit is on_disk else 2]:
            part = weight.parts[""]
            part.source, part.at = source, header[weight.name].offset
    for unit in (in_ram, mixed):
        rest_in_ram(unit, [{"": tensors[weight.name]} for weight in unit.weights], pin=True)
    assert in_ram.weights[0].parts[""].slab.pinned != refuse
    for unit in (on_disk, in_ram, mixed):
        lane = CudaLane(CPU)
        filled(lane, unit, tensors)
        assert (lane._ring is None) == (unit is in_ram and not refuse)
        filled(PlainLane(CPU), unit, tensors)
    del lane, unit, on_disk, in_ram, mixed, weight, part
    assert not runtime.pinned


def test_small_pieces_share_a_chunk(monkeypatch, tmp_path):
    """Python begins with one reader after another: what is small is read by few of them, and still whole."""
    fake_cuda.install(monkeypatch)
    monkeypatch.setattr(transfer, "CHUNK", 1000)
    monkeypatch.setattr(transfer, "TOGETHER", 500)
    data = torch.arange(6000, dtype=torch.int32).to(torch.uint8)
    (path := tmp_path / "file").write_bytes(bytes(data.tolist()))
    sizes = [100, 200, 200, 1, 2300, 450, 40]
    tensors = {str(i): data[700 * i : 700 * i + size] for i, size in enumerate(sizes) if size != 2300}
    tensors["4"] = data[2800 : 2800 + 2300]
    tensors = {name: tensors[name] for name in sorted(tensors)}
    unit, source = unit_of(tensors), Source(path)
    starts = [0, 700, 1400, 2100, 2800, 5200, 5900]
    for weight, start in zip(unit.weights, starts):
        tensors[weight.name] = data[start : start + sizes[int(weight.name)]]
        weight.parts[""].source, weight.parts[""].at = source, start
    shared = [[read.nbytes for read in job] for job in jobs_of(unit.moves(), 1000, 500)]
    assert shared == [[100, 200, 200], [1], [1000], [1000], [300], [450, 40]]
    filled(CudaLane(CPU), unit, tensors)


def test_a_file_that_was_cut_is_an_error_on_arrival(monkeypatch, tmp_path, tensors):
    fake_cuda.install(monkeypatch)
    monkeypatch.setattr(transfer, "CHUNK", 1000)
    save_file(tensors, path := tmp_path / "model.safetensors")
    unit, header = unit_of(tensors), read_header(path)
    for weight in unit.weights:
        weight.parts[""].source, weight.parts[""].at = Source(path), header[weight.name].offset
    lane = CudaLane(CPU)
    slot = filled(lane, unit, tensors)
    os.truncate(path, 5000)
    lane.fill(slot, unit)
    with pytest.raises(OSError, match="is shorter than it was"):
        lane.arrive(slot)
    lane.fill(slot, unit)
    lane.finish(slot)
    assert not slot.pending and lane._ring._free.qsize() == len(lane._ring.chunks)  # every chunk came back


def test_the_ring_of_a_machine_with_few_cores_is_short(monkeypatch, tmp_path):
    fake_cuda.install(monkeypatch)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    transfer.readers.cache_clear()
    unit = unit_of({"w": torch.ones(4)})
    unit.weights[0].parts[""].slab = Slab(16)
    lane = CudaLane(CPU)
    filled(lane, unit, {"w": torch.zeros(4)})
    assert len(lane._ring.chunks) == 6
    transfer.readers.cache_clear()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_the_weights_and_readers_of_its_own():
    unit = unit_of({"w": torch.arange(8.0)})
    rest_in_ram(unit, [{"": torch.arange(8.0)}], pin=False)
    assert transfer.readers().submit(int, "1").result() == 1
    child = os.fork()
    if not child:
        total = transfer.readers().submit(unit.weights[0].load().sum).result(timeout=20)
        os._exit(int(total))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == sum(range(8))
