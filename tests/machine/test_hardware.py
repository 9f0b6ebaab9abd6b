"""Machines: presets, names of GPUs, and this machine."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bigkit import advise, dry_run, plan
from bigkit.machine.hardware import DISKS, GPUS, HARDWARE, LINKS, UNIFIED, Hardware, known_gpu, machine_of, variant
from bigkit.machine.ledger import Calibration, Ledger
from bigkit.units import GB, GiB, MiB
from bigkit.widgets import FitExplorer


def test_presets_make_sense():
    assert {"laptop, no GPU", "Binder", "Colab T4", "1 x RTX 4090", "8 x H200"} <= set(HARDWARE)
    for name, machine in HARDWARE.items():
        assert machine.name == name and machine.ram >= GiB and machine.ram_rate > 0
        assert machine.max_memory().get("cpu") == (None if machine.unified else machine.ram)
    for gpu in GPUS.values():
        assert gpu.bandwidth > 3 * gpu.link and gpu.flops > 1e13 and gpu.link in LINKS.values()
    assert DISKS["SATA SSD"] < DISKS["NVMe, PCIe 3.0 x4"] < DISKS["NVMe, PCIe 5.0 x4"]


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("GeForce RTX 4090", "RTX 4090"),
        ("H100-80GB", "H100-80GB"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti 16GB"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA L40S", "L40S"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GB200", "GB200"),
    ],
)
def test_what_a_driver_calls_a_gpu(name, entry):
    assert known_gpu(name) is GPUS[entry]


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA GH200 480GB", "NVIDIA A100 80GB PCIe",
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb", "NVIDIA GeForce RTX 3060", "NVIDIA L40", "NVIDIA T400", "Tesla T40",
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "NVIDIA GB300", "NVIDIA A100", "NVIDIA", "",
    ],
)  # fmt: skip
def test_another_board_of_nearly_the_same_name_is_unknown(name):
    """Its memory, bandwidth or link is not that of the entry: no figures are better than wrong ones."""
    assert known_gpu(name) is None


def test_this_machine():
    machine = Hardware.detect()
    assert machine.ram > GiB // 4 and machine.disk > 0 and machine.name.startswith("this machine: ")
    assert len(machine.gpus) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_gpus_of_this_machine_are_described_and_what_was_measured_counts(monkeypatch, tmp_path):
    about = [
        SimpleNamespace(name="NVIDIA H200", total_memory=140 * GiB, major=9, minor=0),
        SimpleNamespace(name="NVIDIA Something New", total_memory=48 * GiB, major=8, minor=9),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", about.__getitem__)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (about[i].total_memory, about[i].total_memory))
    machine = Hardware.detect()
    about[0].name = "NVIDIA H100 PCIe"
    about[0].total_memory = 80 * GiB
    assert "NVIDIA H100 PCIe (with the figures of H100-80GB)" in Hardware.detect().name
    about[0].name = "NVIDIA H200"
    monkeypatch.undo()
    assert [gpu.memory // GiB for gpu in machine.gpus] == [140, 48] and "H200, NVIDIA Something" in machine.name
    assert machine.name.endswith("New (with the figures of RTX 6000 Ada)")
    assert machine.gpus[0].flops == GPUS["H200"].flops and machine.gpus[1].capability == (8, 9)
    monkeypatch.setenv("BIGKIT_LEDGER", str(tmp_path / "ledger.json"))
    plain = dry_run("pygpt", None, 1, 8, 1, machine)
    Ledger.load().add(Calibration("here", gpu="NVIDIA H200", issue=1e-3, context=GiB))
    measured = dry_run("pygpt", None, 1, 8, 1, machine)
    assert measured.seconds["token"] > 20 * plain.seconds["token"]
    assert measured.timeline().capacity == 139 * GiB


@pytest.mark.parametrize(
    ("asked", "name", "memory", "ram"),
    [
        ("4090", "1 x RTX 4090", 24564 * MiB, 64 * GiB),
        ("rtx-4090", "1 x RTX 4090", 24564 * MiB, 64 * GiB),
        ("4090 24GB", "1 x RTX 4090", 24564 * MiB, 64 * GiB),
        ("2xh100", "2 x H100-80GB", 81559 * MiB, 64 * GiB),
        ("8 × h100 80gb", "8 x H100-80GB", 81559 * MiB, 1920 * GiB),
        ("2 * 24 GiB", "2 x 24GiB (as fast as L4)", 24 * GiB, 64 * GiB),
        ("8GB, 32GB RAM", "1 x 8GB (as fast as RTX 3060 12GB), 32GB RAM", 8 * 10**9, 32 * 10**9),
        ("RTX 4090 48GiB + 256GiB of RAM", "1 x RTX 4090 48GiB, 256GiB RAM", 48 * GiB, 256 * GiB),
        ("laptop", "laptop, no GPU", None, 16 * GiB),
        ("no gpu, 32GiB ram", "laptop, no GPU, 32GiB RAM", None, 32 * GiB),
        ("strix", "Strix Halo, 128 GB", 96 * GiB, 128 * GiB),
        ("m4 max, 64GiB RAM", "M4 Max, 128 GB, 64GiB RAM", 48 * GiB, 64 * GiB),
        ("M4 Max 64GiB", "M4 Max, 128 GB, 64GiB RAM", 48 * GiB, 64 * GiB),
        ("3060", "1 x RTX 3060 12GB", 12288 * MiB, 32 * GiB),
        ("4060 ti 8gb", "1 x RTX 4060 Ti 16GB 8GB", 8 * GB, 64 * GiB),
        ("dgx spark", "GB10, 128 GB", int(119.7 * GiB), 128 * GiB),
        ("Ryzen AI Max+ 395", "Strix Halo, 128 GB", 96 * GiB, 128 * GiB),
        ("m4 32GB", "M4, 32 GB", 24 * GiB, 32 * GiB),
        ("laptop 32GB", "laptop, no GPU, 32GB RAM", None, 32 * GB),
        ("32GB RAM", "laptop, no GPU, 32GB RAM", None, 32 * GB),
    ],
)
def test_names_of_machines_as_people_write_them(asked, name, memory, ram):
    machine = machine_of(asked)
    assert machine.name == name and machine.ram == ram and machine_of(name) == machine
    assert {gpu.memory for gpu in machine.gpus} == ({memory} if memory else set())
    assert len(machine.gpus) == int(asked[0] if asked[1:3].strip()[:1] in ("x", "×", "*") else memory is not None)


@pytest.mark.parametrize("name", [machine.name for machine in UNIFIED])
def test_one_memory_is_counted_once(name):
    """Where GPU and CPU share a memory, nothing that plans, advises, rehearses or shows has both of them to fill."""
    machine, model = HARDWARE[name], "llama-3.1-405b"
    found = plan(model, hardware=name)
    assert sum(share.used for share in found.shares if share.device != "disk") <= machine.gpus[0].memory < machine.ram
    assert "cpu" not in found.device_map.values() and found.feasible
    for option in advise(model, name).options:
        assert sum(share.used for share in option.plan.shares if share.device != "disk") <= machine.gpus[0].memory
    shown = FitExplorer(model, name)
    assert all(share.device != "cpu" or not share.budget for way, _ in shown.advice.ways for share in way.shares)
    run = dry_run("gpt2", hardware=name)
    assert run.timeline().capacity < machine.gpus[0].memory and [*run.capacity] == [0]
    assert ("is rehearsed as a CUDA GPU" in str(run)) == machine.gpus[0].mps


def test_a_count_may_come_after_the_name():
    assert machine_of("4090x2") is machine_of("2 x 4090") is machine_of("RTX 4090 * 2")
    assert machine_of("24GB x 3, 96GB RAM") == machine_of("3 x 24GB, 96GB RAM") and len(machine_of("24GBx3").gpus) == 3


def test_every_name_is_read_back():
    for name, machine in HARDWARE.items():
        assert machine_of(name) is machine
    for base in (*HARDWARE.values(), *map(machine_of, GPUS)):
        for ram in (None, 12 * GB, 100 * GiB):
            for memory in (None, 30 * GiB, 123_456_789):
                for count in (None, 1, 3) if base.gpus and not base.unified else (None,):
                    changed = variant(base, count, memory, ram)
                    assert machine_of(changed.name) == changed, changed.name


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("A100", r"could be 'A100-40GB', 'A100-80GB'"),
        ("m4", r"could be 'M4, 32 GB', 'M4 Pro, 64 GB', 'M4 Max, 128 GB'"),
        ("RTX 3080", r"could be .*'RTX 5080'"),
        ("2 x laptop", r"expected one of 'laptop, no GPU'"),
        ("0 x T4", r"expected from 1 to 999 of 'T4'"),
        ("PS5", r"no name is close to it"),
        ("GPU", r"unknown"),
        ("0GB", r"unknown"),
        ("", r"no name is close to it"),
        ("cat food", r"`bigkit machines` lists all names, and '2 x 24GiB' is a machine with GPUs of your own"),
    ],
)
def test_a_name_that_is_unknown_or_of_several_is_one_sentence(asked, said):
    with pytest.raises(ValueError, match=said) as error:
        machine_of(asked)
    assert str(error.value).startswith(f"unknown hardware {asked!r}: ") and len(str(error.value)) < 250


def test_a_gpu_of_your_own_is_as_fast_as_the_slowest_of_its_size():
    near = [gpu for gpu in GPUS.values() if 22 * GiB < gpu.memory < 25 * GiB]
    assert machine_of("24GiB").gpus[0].bandwidth == min(gpu.bandwidth for gpu in near)
    assert machine_of("4090 48GiB").gpus[0].bandwidth == GPUS["RTX 4090"].bandwidth


def test_hardware_needs_no_torch():
    code = "import bigkit.machine.hardware, sys; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


@pytest.mark.parametrize("name", ["GB10", "Strix Halo", "M4 Max"])
def test_a_memory_that_gpu_and_cpu_share_is_counted_once(name):
    """What does not fit on the GPU fits nowhere but on disk, and a plan says so."""
    import bigkit
    from bigkit.maps.plan import PlanError

    machine = machine_of(name)
    device = "mps" if name == "M4 Max" else 0
    assert machine.unified and [*machine.max_memory()] == [device, "disk"]
    assert machine.max_memory()[device] < machine.ram
    assert bigkit.plan("llama-2-70b", hardware=name, quantization="nf4").device_map == {"": device}
    best = bigkit.advise("llama-3.1-8b", name).best
    assert {share.device for share in best.plan.shares} == {device, "disk"} and best.plan.offloaded == 0
    if device == 0:
        assert dry_run("pygpt", None, 1, 8, 1, name).seconds["token"] > 0
    with pytest.raises(PlanError):
        bigkit.plan("llama-2-70b", {**machine.max_memory(), "disk": 0}, dtype="float16")


def test_this_machine_may_share_its_memory(monkeypatch):
    import psutil

    from bigkit import get_max_memory
    from bigkit.machine.hardware import is_unified

    assert not is_unified() or torch.backends.mps.is_available()
    about = SimpleNamespace(name="NVIDIA GB10", total_memory=119 * GiB, major=12, minor=1, is_integrated=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: about)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (GiB, 119 * GiB))  # the page cache has taken the rest
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GiB, total=119 * GiB))
    monkeypatch.setattr("bigkit.machine.ram._groups", lambda: iter(()))
    machine = Hardware.detect()
    assert machine.unified and machine.name == "this machine: 1 x NVIDIA GB10"
    assert machine.max_memory() == {0: 100 * GiB, "disk": machine.disk} and get_max_memory() == {0: 100 * GiB}
    assert machine.gpus[0].bandwidth == 273e9
