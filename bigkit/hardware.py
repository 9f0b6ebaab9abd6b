"""Devices that a plan can be made for: memory, memory bandwidth, matrix speed and link of common GPUs and machines.

Memory is what the driver reports (`nvidia-smi`), which is what a budget can use; the other figures are the vendors'
data sheets, for dense matrices. Leaves out: measuring this machine, and time.
"""

from __future__ import annotations

from dataclasses import dataclass

from .plans import Device
from .units import GB, TB, GiB, MiB

CONTEXT_BYTES = 527 * MiB  # what a CUDA context takes before the first tensor: measured on an H200 with torch 2.11


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Args:
        name: the usual name.
        memory: bytes that the driver reports.
        bandwidth: bytes a second from its own memory.
        flops: bfloat16 (float16 where there is no bfloat16) operations a second, dense.
        link: bytes a second from the host's pinned memory, in theory.
        capability: its compute capability.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    link: float
    capability: tuple[int, int] = (9, 0)


@dataclass(frozen=True)
class Hardware:
    """A machine: its GPUs in order, RAM and disk for weights in bytes.

    >>> HARDWARE["2 x RTX 4090"].max_memory()["cpu"] // 2**30
    64
    """

    name: str
    gpus: tuple[Gpu, ...]
    ram: int
    disk: int

    def max_memory(self) -> dict[Device, int]:
        """Budgets for `plan`: every GPU whole, RAM and disk. The CUDA context is `plan`'s `overhead`."""
        return {**{i: gpu.memory for i, gpu in enumerate(self.gpus)}, "cpu": self.ram, "disk": self.disk}


_PCIE3, _PCIE4, _PCIE5 = 15.75 * GB, 31.5 * GB, 63 * GB  # 16 lanes, after line coding

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("T4", 15360 * MiB, 320e9, 65e12, _PCIE3, (7, 5)),
        Gpu("L4", 23034 * MiB, 300e9, 121e12, _PCIE4 / 2, (8, 9)),  # 8 lanes
        Gpu("RTX 3090", 24576 * MiB, 936e9, 71e12, _PCIE4, (8, 6)),
        Gpu("RTX 4090", 24564 * MiB, 1008e9, 165e12, _PCIE4, (8, 9)),
        Gpu("A100-40GB", 40960 * MiB, 1555e9, 312e12, _PCIE4, (8, 0)),
        Gpu("A100-80GB", 81920 * MiB, 2039e9, 312e12, _PCIE4, (8, 0)),
        Gpu("H100-80GB", 81559 * MiB, 3350e9, 989e12, _PCIE5),
        Gpu("H200", 143771 * MiB, 4800e9, 989e12, _PCIE5),
    )
}


def machine(gpu: str, count: int, ram: int, disk: int = TB) -> Hardware:
    """A machine with `count` GPUs of one kind from `GPUS`."""
    return Hardware(f"{count} x {gpu}", (GPUS[gpu],) * count, ram, disk)


HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware("laptop, no GPU", (), 16 * GiB, 500 * GB),
        Hardware("Colab T4", (GPUS["T4"],), 12 * GiB, 70 * GB),
        machine("RTX 4090", 1, 64 * GiB),
        machine("RTX 4090", 2, 64 * GiB),
        machine("L4", 4, 192 * GiB),
        machine("A100-40GB", 4, 320 * GiB),
        machine("A100-80GB", 8, 960 * GiB, 4 * TB),
        machine("H100-80GB", 8, 1920 * GiB, 4 * TB),
        machine("H200", 8, 1920 * GiB, 4 * TB),
    )
}
