"""RAM within control groups: the least that any of them leaves, in both versions, and in a container."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from bigkit import get_max_memory
from bigkit.machine import ram
from bigkit.machine.hardware import Hardware
from bigkit.machine.ram import ram_free, ram_limit
from bigkit.units import MiB

FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file {}\ntotal_active_file {}\nrss 9\n")
SECOND = ("memory.max", "memory.current", "anon 9\ninactive_file {}\nactive_file {}\n")
NONE = 2**63 - 4096  # what version 1 has for "no limit"


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ram, "SYSTEM", tmp_path)
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


def group(folder: Path, names: tuple[str, str, str], limit: object, used: int, files: int = 0) -> None:
    """A control group that holds `files` MiB of inactive and as much of active files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(names[2].format(files * MiB, files * MiB))


def test_no_group(system: Path) -> None:
    assert ram_limit() == psutil.virtual_memory().total  # no /proc/self/cgroup, as on a Mac
    (system / "proc/self/cgroup").write_text("0::/\n")
    group(system / "sys/fs/cgroup", SECOND, "max", 5 * MiB)
    assert ram_limit() == psutil.virtual_memory().total and ram_free() > 100 * MiB


def test_a_container(system: Path) -> None:
    (system / "proc/self/cgroup").write_text("0::/\n")
    group(system / "sys/fs/cgroup", SECOND, 300 * MiB, 250 * MiB, files=50)
    assert (ram_limit(), ram_free()) == (300 * MiB, 150 * MiB)
    assert Hardware.detect().ram == 150 * MiB
    if not torch.cuda.is_available():
        assert get_max_memory() == {"cpu": 150 * MiB}


def test_a_job_of_a_cluster(system: Path) -> None:
    """The outer group is fuller than the job's own."""
    (system / "proc/self/cgroup").write_text("11:cpuset:/slurm\n4:cpu,memory:/slurm/job_7/step_0\n1:name=systemd:/\n")
    top = system / "sys/fs/cgroup/memory"
    group(top, FIRST, NONE, 10**9)
    group(top / "slurm/job_7", FIRST, 400 * MiB, 350 * MiB)
    group(top / "slurm/job_7/step_0", FIRST, 200 * MiB, 60 * MiB)
    assert (ram_limit(), ram_free()) == (200 * MiB, 50 * MiB)
    group(top / "slurm/job_7", FIRST, 400 * MiB, 450 * MiB)
    assert ram_free() == 0


def test_a_container_that_is_told_the_name_of_its_group_outside(system: Path) -> None:
    (system / "proc/self/cgroup").write_text("4:memory:/docker/0f1e\n0::/docker/0f1e\n")
    group(system / "sys/fs/cgroup/memory", FIRST, 256 * MiB, 56 * MiB)
    assert (ram_limit(), ram_free()) == (256 * MiB, 200 * MiB)


@pytest.mark.parametrize("content", ["", "nonsense\n", "0::\n", "4:memory:relative/../..\n"])
def test_odd_files(system: Path, content: str) -> None:
    (system / "proc/self/cgroup").write_text(content)
    group(system / "sys/fs/cgroup", SECOND, "many", 5)
    assert 0 < ram_free() <= ram_limit() == psutil.virtual_memory().total
