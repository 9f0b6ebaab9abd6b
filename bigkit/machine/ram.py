"""RAM of this machine that a process may use: all of it, or what its control groups leave.

In a container, and in a job of a cluster, the system tells how much RAM the machine has, and ends whoever takes more
than the limit of the control group. Groups lie within groups, each with a limit of its own. What they hold of files
counts as used and is given back when it is needed, as the system itself counts it.

Leaves out: GPUs (`hardware.py`), and what this process itself has taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SYSTEM = Path("/")  # where /proc and /sys lie


class _Version(NamedTuple):
    """The names of files in control groups of one version."""

    limit: str
    used: str
    files: tuple[str, ...]  # in `memory.stat`


_VERSIONS = {
    "": _Version("memory.max", "memory.current", ("active_file", "inactive_file")),
    "memory": _Version("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
}  # name of what governs memory in /proc/self/cgroup


def ram_limit() -> int:
    """Bytes of RAM that this process may use: the machine's, or the least limit of its control groups."""
    import psutil

    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _groups())])


def ram_free() -> int:
    """Bytes of RAM that can be had now: what the system says, or the least that is left of a control group's limit.

    >>> 0 < ram_free() <= ram_limit()
    True
    """
    import psutil

    return max(0, min([int(psutil.virtual_memory().available), *(limit - used for limit, used in _groups())]))


def _groups() -> Iterator[tuple[int, int]]:
    """Limit and used bytes of each control group that this process is in, and that has a limit."""
    for folder, names in _folders():
        try:
            limit = int((folder / names.limit).read_text())
            used = int((folder / names.used).read_text())
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such group here, or no limit ("max")
            continue
        yield limit, used - sum(int(counts.get(name, 0)) for name in names.files)


def _folders() -> Iterator[tuple[Path, _Version]]:
    """This process's control groups, and those around them; a container sees its own as the outermost."""
    try:
        lines = (SYSTEM / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # another system
        return
    for line in lines:
        _, governs, group = (line.split(":", 2) + ["", ""])[:3]
        for name in {*governs.split(",")} & {*_VERSIONS}:
            top = SYSTEM / "sys/fs/cgroup" / name
            own = Path(group.lstrip("/"))
            yield from ((top / path, _VERSIONS[name]) for path in dict.fromkeys((own, *own.parents, Path())))
