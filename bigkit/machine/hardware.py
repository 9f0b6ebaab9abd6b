"""Devices that a plan can be made for: memory, memory bandwidth, matrix speed and link of common GPUs and machines.

Memory is what the driver reports (`nvidia-smi`; for MI300X and GB10 what PyTorch does), which is what a budget can use,
from logs in public repositories. The other figures are the vendors', for dense matrices with sums in float32: those of
their data sheets and of the white papers of GA102, AD102 and RTX Blackwell, as copies, reviews and other projects'
tables quote them. Baseten's comparison with A10 has A10G's speed, TechPowerUp's and TechSpot's reviews the links of RTX
4060 Ti, 5060 Ti and 5080, MLPerf's descriptions of systems those of B200, GB200 and MI300X. Where a sheet gives only
operations in 4 or 8 bits with sparsity, these are divided by what such tables have between them and 16 bits dense: by
16 for GeForce RTX 50, by 8 for RTX PRO 6000, GB10 and GeForce RTX 40, by 4 for RTX 6000 Ada.

In some machines GPU and CPU share one memory (`unified`): it is counted once, as the GPU's.
`Hardware.detect()` describes this machine.

Leaves out: what was measured (`machine/ledger.py`, `measure/calibrate.py`), and time (`machine/roofline.py`).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from ..devices import Device
from ..units import GB, TB, GiB, MiB, format_bytes, listed, parse_bytes
from .ram import ram_free

FRAGMENTATION = 0.02  # share of a GPU that its allocator reserves but cannot use: found by dry runs of offloaded plans
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
        capability: its compute capability; of Apple's, which have none, (8, 0): they take bfloat16.
        mps: whether PyTorch calls it "mps" (Apple's), and not by a number.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    link: float
    capability: tuple[int, int] = (9, 0)
    mps: bool = False


@dataclass(frozen=True)
class Hardware:
    """A machine.

    Args:
        name: how it is called in tables.
        gpus: its GPUs, in order.
        ram: bytes of RAM for weights.
        disk: bytes of a disk for weights.
        disk_rate: bytes a second that large reads from the disk bring.
        ram_rate: bytes a second that the CPU reads from RAM. 40 GB/s is a round figure for a desktop, not measured.
        unified: whether the GPU's memory and the RAM are one; `ram` is then all of it.

    >>> HARDWARE["2 x RTX 4090"].max_memory()["cpu"] // 2**30
    64
    """

    name: str
    gpus: tuple[Gpu, ...]
    ram: int
    disk: int
    disk_rate: float = 3.5 * GB
    ram_rate: float = 40 * GB
    unified: bool = False

    @staticmethod
    def detect(folder: str | os.PathLike[str] = ".") -> Hardware:
        """This machine: its GPUs, the RAM that this process may use, and the free space of a disk; what others hold
        is left out.

        A GPU that is not in `GPUS` (an H100 PCIe, a laptop's RTX 4090) gets its own memory, and the other figures of
        the one there whose compute capability is nearest (and then its memory), which the machine's name says;
        `calibrate()` replaces them
        by measured ones.

        Args:
            folder: where weights would rest on disk.

        Raises:
            ImportError: torch, which knows the GPUs, is not installed.

        >>> Hardware.detect().ram > 2**28
        True
        """
        if find_spec("torch") is None:
            raise ImportError(
                "only torch knows which GPUs this machine has, and it is not installed: name a machine, as in 'RTX "
                "4090' or 'laptop, no GPU', or pip install 'bigkit[torch]'"
            )
        gpus = _gpus()
        names = [
            gpu.name if known_gpu(gpu.name) else f"{gpu.name} (with the figures of {_nearest(gpu).name})"
            for gpu in gpus
        ]
        name = f"{len(names)} x {names[0]}" if names and len({*names}) == 1 else ", ".join(names) or "no GPU"
        ram = ram_free() // MiB * MiB
        disk = shutil.disk_usage(folder).free // MiB * MiB
        return Hardware(f"this machine: {name}", gpus, ram, disk, unified=is_unified())

    @property
    def overhead(self) -> int:
        """Bytes of each GPU that a plan must leave free: the CUDA context, and what fragmentation costs.

        >>> HARDWARE["Colab T4"].overhead // MiB, HARDWARE["laptop, no GPU"].overhead
        (834, 0)
        """
        contexts = ((0 if gpu.mps else CONTEXT_BYTES) + int(FRAGMENTATION * gpu.memory) for gpu in self.gpus)
        return max(contexts, default=0)

    def max_memory(self) -> dict[Device, int]:
        """Budgets for `plan`: all of every GPU, RAM and disk. What a GPU cannot use is `plan`'s `overhead`.

        Where the memory is unified there is no budget for the CPU: what rests in RAM would take the GPU's own.

        >>> [*HARDWARE["GB10, 128 GB"].max_memory()], [*HARDWARE["M4 Max, 128 GB"].max_memory()]
        ([0, 'disk'], ['mps', 'disk'])
        """
        own: dict[Device, int] = {("mps" if gpu.mps else i): gpu.memory for i, gpu in enumerate(self.gpus)}
        if self.unified and own:
            return {**{device: min(size, self.ram) for device, size in own.items()}, "disk": self.disk}
        return {**own, "cpu": self.ram, "disk": self.disk}


LINKS = {  # bytes a second in one direction, after line coding; PCI-SIG's transfer rates
    "PCIe 3.0 x16": 15.75 * GB,
    "PCIe 4.0 x8": 15.75 * GB,
    "PCIe 4.0 x16": 31.5 * GB,
    "PCIe 5.0 x8": 31.5 * GB,
    "PCIe 5.0 x16": 63 * GB,
    "NVLink-C2C, half of a GB200": 225 * GB,  # 450 GB/s in one direction, which the two GPUs of a superchip share
}
DISKS = {  # bytes a second of large reads: what the interface lets through, less a tenth
    "SATA SSD": 0.55 * GB,
    "NVMe, PCIe 3.0 x4": 3.5 * GB,
    "NVMe, PCIe 4.0 x4": 7 * GB,
    "NVMe, PCIe 5.0 x4": 14 * GB,
}
_PCIE3, _PCIE4, _PCIE5 = (LINKS[f"PCIe {n}.0 x16"] for n in (3, 4, 5))

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("T4", 15360 * MiB, 320e9, 65e12, _PCIE3, (7, 5)),
        Gpu("L4", 23034 * MiB, 300e9, 121e12, _PCIE4 / 2, (8, 9)),  # 8 lanes
        Gpu("RTX 3060 12GB", 12288 * MiB, 360e9, 25.5e12, _PCIE4, (8, 6)),
        Gpu("RTX 3090", 24576 * MiB, 936e9, 71e12, _PCIE4, (8, 6)),
        Gpu("A10G", 23028 * MiB, 600e9, 70e12, _PCIE4, (8, 6)),
        Gpu("RTX 4060 Ti 16GB", 16380 * MiB, 288e9, 44e12, _PCIE4 / 2, (8, 9)),  # 8 lanes
        Gpu("RTX 4090", 24564 * MiB, 1008e9, 165e12, _PCIE4, (8, 9)),
        Gpu("L40S", 46068 * MiB, 864e9, 362e12, _PCIE4, (8, 9)),
        Gpu("RTX 6000 Ada", 49140 * MiB, 960e9, 364e12, _PCIE4, (8, 9)),
        Gpu("RTX 5060 Ti 16GB", 16311 * MiB, 448e9, 47e12, _PCIE5 / 2, (12, 0)),  # 8 lanes
        Gpu("RTX 5080", 16303 * MiB, 960e9, 113e12, _PCIE5, (12, 0)),
        Gpu("RTX 5090", 32607 * MiB, 1792e9, 209e12, _PCIE5, (12, 0)),
        Gpu("RTX PRO 6000", 97887 * MiB, 1792e9, 504e12, _PCIE5, (12, 0)),
        Gpu("A100-40GB", 40960 * MiB, 1555e9, 312e12, _PCIE4, (8, 0)),
        Gpu("A100-80GB", 81920 * MiB, 2039e9, 312e12, _PCIE4, (8, 0)),
        Gpu("H100-80GB", 81559 * MiB, 3350e9, 989e12, _PCIE5),
        Gpu("H200", 143771 * MiB, 4800e9, 989e12, _PCIE5),
        Gpu("B200", 183359 * MiB, 8000e9, 2250e12, _PCIE5, (10, 0)),
        Gpu("GB200", 189471 * MiB, 8000e9, 2500e12, LINKS["NVLink-C2C, half of a GB200"], (10, 0)),
        Gpu("MI300X", 196592 * MiB, 5300e9, 1307e12, _PCIE5, (9, 4)),  # gfx942; 191.98 GiB as PyTorch reports it
    )
}
_APPLE = 0.375e12  # operations a second of one GPU core: an order of magnitude, since Apple publishes none


def _shared(name: str, gpu: str, ram: int, usable: int, rate: float, flops: float, **options: Any) -> Hardware:
    """A machine with one memory, of which the GPU can use a part; nothing is copied between the two."""
    options.setdefault("capability", (8, 0))
    return Hardware(name, (Gpu(gpu, usable, rate, flops, rate, **options),), ram, TB, ram_rate=rate, unified=True)


# Bandwidths are NVIDIA's (DGX Spark), AMD's (Ryzen AI Max+ 395) and Apple's. What is usable: what PyTorch reports on a
# DGX Spark; AMD's largest share for graphics; Metal's limit of three quarters. Operations: an eighth of NVIDIA's 4-bit
# ones with sparsity (a sixteenth, as for GeForce, would be less than the 86e12 that cuBLAS was seen to reach); 40 units
# of AMD's RDNA 3.5 that do 512 in a clock of 2.9 GHz.
UNIFIED = (
    _shared("GB10, 128 GB", "GB10", 128 * GiB, int(119.7 * GiB), 273e9, 125e12, capability=(12, 1)),
    _shared("Strix Halo, 128 GB", "Radeon 8060S", 128 * GiB, 96 * GiB, 256e9, 59e12, capability=(11, 5)),
    _shared("M5, 24 GB", "Apple M5", 24 * GiB, 18 * GiB, 153e9, 10 * _APPLE, mps=True),
    _shared("M4, 32 GB", "Apple M4", 32 * GiB, 24 * GiB, 120e9, 10 * _APPLE, mps=True),
    _shared("M4 Pro, 64 GB", "Apple M4 Pro", 64 * GiB, 48 * GiB, 273e9, 20 * _APPLE, mps=True),
    _shared("M4 Max, 128 GB", "Apple M4 Max", 128 * GiB, 96 * GiB, 546e9, 40 * _APPLE, mps=True),
    _shared("M3 Ultra, 512 GB", "Apple M3 Ultra", 512 * GiB, 384 * GiB, 819e9, 80 * _APPLE, mps=True),
    _shared("M2 Ultra, 192 GB", "Apple M2 Ultra", 192 * GiB, 144 * GiB, 800e9, 76 * _APPLE, mps=True),
)


def machine(gpu: str, count: int, ram: int, disk: int = TB) -> Hardware:
    """A machine with `count` GPUs of one kind from `GPUS`."""
    return Hardware(f"{count} x {gpu}", (GPUS[gpu],) * count, ram, disk)


HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware("laptop, no GPU", (), 16 * GiB, 500 * GB),
        Hardware("Binder", (), 2 * GiB, 10 * GB, DISKS["SATA SSD"]),
        Hardware("Colab T4", (GPUS["T4"],), 12 * GiB, 70 * GB),
        machine("RTX 3060 12GB", 1, 32 * GiB),
        machine("RTX 3090", 1, 64 * GiB),
        machine("RTX 4090", 1, 64 * GiB),
        machine("RTX 4090", 2, 64 * GiB),
        machine("RTX 5090", 1, 64 * GiB),
        machine("RTX PRO 6000", 1, 128 * GiB),
        *UNIFIED,
        machine("L4", 4, 192 * GiB),
        machine("A100-40GB", 4, 320 * GiB),
        machine("A100-80GB", 8, 960 * GiB, 4 * TB),
        machine("H100-80GB", 8, 1920 * GiB, 4 * TB),
        machine("H200", 8, 1920 * GiB, 4 * TB),
        machine("B200", 8, 1920 * GiB, 4 * TB),
        machine("GB200", 4, 960 * GB, 4 * TB),  # two superchips, with 480 GB for each Grace
        machine("MI300X", 8, 1920 * GiB, 4 * TB),
    )
}


_SIZE = r"\d+(?:\.\d+)?\s*(?:[KMGT]i?)?B"
_ASKED = re.compile(  # "2 x RTX 4090 48GiB (as fast as it is), 64GiB RAM"; the count may come after the name
    rf"(?:(\d{{1,3}})\s*[x×*]\s*)?(.*?)\s*({_SIZE})?\s*(?:\(.*\))?\s*(?:(?<=[\dB\s])[x×*]\s*(\d{{1,3}}))?"
    rf"(?:[\s,+]*({_SIZE})\s*(?:of\s*)?RAM)?", re.IGNORECASE)  # fmt: skip
SAME = 0.07  # a card of 24 GB has 24 GiB: what differs less is the same memory


def machine_of(hardware: Hardware | str | None) -> Hardware:
    """A machine: one given, this one (None), or one by its name.

    A name is that of a machine in `HARDWARE`, or of one or several GPUs in `GPUS`: "RTX 4090", "3 x L4", "2xh100".
    Spaces, hyphens and capitals do not count, and the beginning or the end of a name is enough if no other has it:
    "4090", "laptop". A GPU of your own is a size, "2 x 24GiB", and counts as the slowest one in `GPUS` of about that
    memory, which the machine's name says; or one that is known, with another memory: "RTX 4090 48GiB". RAM may follow:
    "RTX 4090, 128GiB RAM"; else it is 64 GiB. Of a machine with one memory the size is that: "M4 Max 64GB". GiB are
    powers of 1024 and GB of 1000.

    Raises:
        ValueError: there is no such machine, or there are several; the sentence names those that look like it.
        TypeError: it is no machine and no name.

    >>> len(machine_of("3 x L4").gpus), machine_of("laptop").gpus, machine_of("4090").name
    (3, (), '1 x RTX 4090')
    >>> machine_of("2 x 16GiB, 128GiB RAM").name
    '2 x 16GiB (as fast as RTX 4060 Ti 16GB), 128GiB RAM'
    """
    if hardware is None:
        return Hardware.detect()
    if isinstance(hardware, Hardware):
        return hardware
    if not isinstance(hardware, str):
        raise TypeError(f"hardware must be a Hardware or the name of one, not {type(hardware).__name__}")
    if named := next((machine for name, machine in HARDWARE.items() if _letters(name) == _letters(hardware)), None):
        return named
    asked = _ASKED.fullmatch(hardware.strip())
    before, kind, size, after, more = asked.groups() if asked else ("", hardware, "", "", "")
    count, own = int(before or after or 1), size and not _letters(kind)
    memory, ram = None, parse_bytes(more.upper()) if more else None
    fitting = _fitting(kind + (size or "") if kind or size or not ram else "no GPU")
    if size and len(fitting) != 1:
        memory = parse_bytes(size.upper())
        fitting = _fitting(kind) if not own else [_slowest(memory)] if memory else []
    if len(fitting) != 1 or not 0 < count <= (999 if fitting[0] in GPUS else 1):
        raise ValueError(f"unknown hardware {hardware!r}: {_near(kind, fitting)}; `bigkit machines` lists all names, "
                         "and '2 x 24GiB' is a machine with GPUs of your own")  # fmt: skip
    base = _usual(fitting[0], count)
    if memory and (base.unified or not base.gpus):
        memory, ram = None, ram or memory
    sold = size and "i" not in size.lower() and not own  # in GB, as sold
    if memory and sold and abs(memory / base.gpus[0].memory - 1) < SAME:
        memory = None
    return variant(base, None, memory, ram, own)


def variant(
    base: Hardware, count: int | None = None, memory: int | None = None, ram: int | None = None, own: object = False
) -> Hardware:
    """A machine with another number of its first GPU, memory of each, or RAM; its name says so, as `machine_of` reads
    it. Of a memory that is shared the GPU keeps its part, whatever `memory` says.

    >>> variant(HARDWARE["1 x RTX 4090"], 3, ram=2**36).name, variant(HARDWARE["1 x RTX 4090"], 2).name
    ('3 x RTX 4090', '2 x RTX 4090')
    """
    kind = base.name.partition(" x ")[2]
    if count is not None and count != len(base.gpus):
        if base.unified or not base.gpus:
            raise ValueError(f"{base.name} cannot have {count} GPUs: name their kind, as in '2 x RTX 4090'")
        kind = base.gpus[0].name
        own_name = f"{base.name} with {count} GPUs"
        base = _usual(kind, count) if kind in GPUS else replace(base, name=own_name, gpus=base.gpus[:1] * count)
    name, gpus = base.name, base.gpus
    if base.unified:
        gpus = tuple(replace(gpu, memory=gpu.memory * (ram or base.ram) // base.ram) for gpu in gpus)
    elif memory is not None and gpus and memory != gpus[0].memory:
        name += f" {format_bytes(memory, 'exact')}"
        gpus = tuple(replace(gpu, memory=memory) for gpu in gpus)
    if own and gpus:
        name = f"{len(gpus)} x {format_bytes(gpus[0].memory, 'exact')} (as fast as {kind})"
    if ram is None or ram == base.ram:
        return base if gpus == base.gpus and not own else replace(base, name=name, gpus=gpus)
    return replace(base, name=f"{name}, {format_bytes(ram, 'exact')} RAM", gpus=gpus, ram=ram)


def _usual(kind: str, count: int) -> Hardware:
    """A machine with so many GPUs of a kind, or the machine of that name."""
    return HARDWARE.get(kind) or HARDWARE.get(f"{count} x {kind}") or machine(kind, count, 64 * GiB)


def named_machine(budgets: Mapping[Device, int], overhead: int) -> str | None:
    """The name of the machine in `HARDWARE` that has these budgets and this overhead; None if there is none."""
    machines = (machine for machine in HARDWARE.values() if machine.overhead == overhead)
    return next((machine.name for machine in machines if machine.max_memory() == budgets), None)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_SOLD = {"DGX Spark": "GB10, 128 GB", "Ryzen AI Max+ 395": "Strix Halo, 128 GB"}  # as it is called in shops


def _fitting(kind: str) -> list[str]:
    """The names in `GPUS` and of machines in `HARDWARE` that begin or end like this, with RTX or without; only the one
    that is this.
    """
    wanted = _letters(kind)
    if sold := [name for alias, name in _SOLD.items() if len(wanted) > 4 and _letters(alias).startswith(wanted)]:
        return sold
    names = {name: _letters(name) for name in (*GPUS, *HARDWARE) if not name[0].isdigit()}
    whole = [name for name, letters in names.items() if letters == wanted]
    ends = [name for name, letters in names.items() if letters.startswith((wanted, f"rtx{wanted}"))
            or letters.endswith(wanted) and (name in GPUS or len(wanted) > 4)]  # fmt: skip
    return whole or (ends if len(wanted) > 1 else [])


def _near(kind: str, fitting: Sequence[str]) -> str:
    """What an unknown name may have meant, in words."""
    from difflib import get_close_matches

    if len(fitting) == 1:
        return f"expected {'from 1 to 999' if fitting[0] in GPUS else 'one'} of {fitting[0]!r}"
    names = {_letters(name): name for name in (*HARDWARE, *GPUS) if not name[0].isdigit()}
    near = [names[match] for match in get_close_matches(_letters(kind), names, cutoff=0.5)]
    return f"it could be {listed(fitting or near)}" if fitting or near else "no name is close to it"


def _slowest(memory: int) -> str:
    """Of the GPUs with the nearest memory, the one that reads it most slowly."""
    near = min(abs(gpu.memory - memory) for gpu in GPUS.values()) + SAME * memory
    return min((gpu for gpu in GPUS.values() if abs(gpu.memory - memory) <= near), key=lambda gpu: gpu.bandwidth).name


# ---------------------------------------------------------------------------------------------------------------------
# This machine


# Names of products as drivers report them, without "NVIDIA", "Tesla" and "GeForce" -> the entry of `GPUS`. Boards that
# share a word of the name (RTX 4090 D and Laptop, 3090 Ti, H100 PCIe and NVL, A100 80GB PCIe, slices by MIG, RTX PRO
# 6000 Server and Max-Q, RTX 3060 of 8 GB, which is called as that of 12) differ in memory, clocks or link by NVIDIA's
# data sheets, and are not listed. Both A100 of 40 GB have the same figures; so have 4060 Ti and 5060 Ti of 8 and 16 GB.
_PRODUCTS = {
    "A100-SXM4-40GB": "A100-40GB",
    "A100-PCIE-40GB": "A100-40GB",
    "A100-SXM4-80GB": "A100-80GB",
    "H100 80GB HBM3": "H100-80GB",
    "RTX 6000 Ada Generation": "RTX 6000 Ada",
    "RTX PRO 6000 Blackwell Workstation Edition": "RTX PRO 6000",
    "RTX 4060 Ti": "RTX 4060 Ti 16GB",
    "RTX 5060 Ti": "RTX 5060 Ti 16GB",
    **{name: name for name in GPUS},
}


def known_gpu(name: str) -> Gpu | None:
    """The entry of `GPUS` for a product, by the whole name that its driver reports; None for every other product.

    >>> known_gpu("NVIDIA A100-SXM4-80GB").name, known_gpu("NVIDIA GeForce RTX 4090").name
    ('A100-80GB', 'RTX 4090')
    >>> known_gpu("NVIDIA GeForce RTX 4090 Laptop GPU"), known_gpu("NVIDIA H100 PCIe")
    (None, None)
    """
    product = " ".join(word for word in name.split() if word not in ("NVIDIA", "Tesla", "GeForce", "AMD", "Instinct"))
    shared = {gpu.name: gpu for machine in UNIFIED for gpu in machine.gpus}
    return shared.get(product) or GPUS.get(_PRODUCTS.get(product, ""))


def _nearest(gpu: Gpu) -> Gpu:
    """The entry whose compute capability is nearest, and of several the one with as much memory."""
    return min(
        GPUS.values(),
        key=lambda other: (
            *(abs(a - b) for a, b in zip(other.capability, gpu.capability)), abs(other.memory - gpu.memory),
        ),
    )  # fmt: skip


def _gpus() -> tuple[Gpu, ...]:
    import torch

    gpus = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(i)
        plain = Gpu(about.name, about.total_memory, 0, 0, 0, (about.major, about.minor))
        gpu = known_gpu(about.name) or _nearest(plain)
        # Without what others hold. Of a unified memory the driver counts as taken what the page cache holds.
        memory = plain.memory if is_unified() else min(plain.memory, torch.cuda.mem_get_info(i)[0] + CONTEXT_BYTES)
        gpus.append(replace(gpu, name=about.name, memory=memory, capability=plain.capability))
    return tuple(gpus)


def is_unified() -> bool:
    """Whether a GPU of this machine has no memory but the RAM: an integrated one, as in GB10, or Apple's."""
    import torch

    if not torch.cuda.is_available():
        return torch.backends.mps.is_available()
    count = torch.cuda.device_count()
    return any(getattr(torch.cuda.get_device_properties(i), "is_integrated", False) for i in range(count))
