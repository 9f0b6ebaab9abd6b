"""Where weights work that rest in RAM or on disk, if there are several GPUs: on all of them in turn.

The rule: in the model's order, each layer goes to the GPU whose link would have brought it first.

A link brings weights while GPUs work, and each GPU has a link of its own: with two GPUs of one kind every second block
works on the other one, both links copy all the time, and a token waits half as long. Hidden states hop: little.

Leaves out: weights that a map puts inside something that lies on a GPU (experts of a block, say): they work there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heapreplace

from ..devices import Device
from ..machine.hardware import Hardware
from ..machine.ledger import Calibration


def take_turns(sizes: Sequence[int], links: Sequence[float]) -> list[int]:
    """The rule: which link brings each of several things that are needed one after another.

    Args:
        sizes: bytes of each.
        links: bytes a second of each link, or in any other unit.

    Returns:
        For each the number of the link that would have brought it first, with all that it has brought before.

    >>> take_turns([10, 10, 10, 10], [1, 1]), take_turns([10, 10, 10, 10], [3, 1])
    ([0, 1, 0, 1], [0, 0, 0, 1])
    """
    turns: list[int] = []
    if len({*links}) == 1:  # each goes to the link that has brought least
        brought = [(0, link) for link in range(len(links))]  # a heap
        for size in sizes:
            least, first = brought[0]
            turns.append(first)
            heapreplace(brought, (least + size, first))
        return turns
    busy = [0.0] * len(links)
    for size in sizes:
        ends = [before + size / link for before, link in zip(busy, links)]
        turns.append(first := min(range(len(links)), key=ends.__getitem__))
        busy[first] = ends[first]
    return turns


def links_of(hardware: Hardware, calibration: Calibration | None) -> list[float]:
    """The speed of each GPU's link while all are busy, in tenths of the fastest; as measured, else the vendors'.

    >>> from bigkit.machine.hardware import machine_of
    >>> links_of(machine_of("2 x RTX 4090"), None)
    [1.0, 1.0]
    """
    rates = [gpu.link for gpu in hardware.gpus]
    if calibration and len(calibration.links) == len(rates):
        rates = [*calibration.links]
    return [max(round(rate / max(rates), 1), 0.1) for rate in rates]


class DeviceMap(dict[str, Device]):
    """A device map that knows where its layers work that rest in RAM or on disk; else a dict like any other.

    Args:
        places: module name -> where it rests.
        works: name of a layer that rests in RAM or on disk -> the GPU where it works.

    >>> DeviceMap({"": "cpu"}, {"h.0": 0, "h.1": 1})
    {'': 'cpu'}
    """

    def __init__(self, places: Mapping[str, Device], works: Mapping[str, Device]) -> None:
        super().__init__(places)
        self.works = dict(works)
