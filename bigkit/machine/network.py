"""The line between two hosts, and when each stage of a model that spans hosts works.

    stage 0    g0 g1 g0 g1          each group of sequences goes through all stages for a token, and the token comes
    line          ->    ->          back before its next one; while one group is in one stage, another may be in the
    stage 1       g0 g1 g0 g1       next. A stage takes the groups in turn.

Leaves out: how long a stage works (the caller says), several hosts behind one switch, and packets that are lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..units import GB, format_bytes, format_seconds, listed
from .streams import Clock, Span

TCP = 0.94  # of Ethernet's bits: frames of 1538 bytes on the wire carry 1448 of data


@dataclass(frozen=True)
class Network:
    """A line between hosts.

    Args:
        name: how it is called in tables.
        bandwidth: bytes a second in one direction.
        latency: seconds until the first byte of a message arrives, software included.
    """

    name: str
    bandwidth: float
    latency: float

    def seconds(self, nbytes: int) -> float:
        """From sending a message to its last byte's arrival."""
        return self.latency + nbytes / self.bandwidth

    def __str__(self) -> str:
        return f"{self.name} ({format_bytes(int(self.bandwidth))}/s, {format_seconds(self.latency)})"


# Latencies are of the order that TCP has within a building, and RDMA in a rack; measure yours (`ping`, half of it).
NETWORKS = {
    network.name: network
    for network in (
        Network("WLAN", 0.05 * GB, 2e-3),
        Network("Ethernet 1G", TCP * 0.125 * GB, 1e-4),
        Network("Ethernet 10G", TCP * 1.25 * GB, 5e-5),
        Network("Ethernet 25G", TCP * 3.125 * GB, 5e-5),
        Network("RDMA 100G", 0.9 * 12.5 * GB, 1e-5),
        Network("RDMA 400G", 0.9 * 50 * GB, 1e-5),
    )
}


def network_of(network: Network | str) -> Network:
    """A line: one given, or one of `NETWORKS` by its name, capitals aside.

    Raises:
        ValueError: there is none of this name.

    >>> network_of("ethernet 10g").seconds(0)
    5e-05
    """
    if isinstance(network, Network):
        return network
    found = next((line for name, line in NETWORKS.items() if name.lower() == str(network).lower()), None)
    if found is None:
        raise ValueError(f"unknown network {network!r}: expected a Network or one of {listed([*NETWORKS], 99)}")
    return found


def run_stages(
    stages: Sequence[float], network: Network, nbytes: int, groups: int = 1, tokens: int = 3
) -> tuple[float, list[Span]]:
    """Seconds in which every group gets another token, and what each lane does.

    Args:
        stages: seconds that each stage works for a token of one group.
        network: the line between neighbours, and back from the last stage to the first.
        nbytes: of the hidden states of one group.
        groups: how many are under way.
        tokens: of each group; the last of them counts, when all stages are busy.

    Two stages of 10 ms: one group gets a token every 20 ms, two groups one each in the same time.

    >>> line = Network("ideal", 1e12, 0.0)
    >>> round(run_stages([0.01, 0.01], line, 0)[0], 3), round(run_stages([0.01, 0.01], line, 0, groups=2)[0], 3)
    (0.02, 0.02)
    """
    clock, spans = Clock(), list[Span]()
    back = network.seconds(8) if len(stages) > 1 else 0.0
    ready, rounds = [0.0] * groups, [0.0]
    for token in range(tokens):
        for group in range(groups):
            at = ready[group]
            for k, seconds in enumerate(stages):
                lanes = [(f"stage {k}", seconds, 0.0)]
                if k + 1 < len(stages):
                    lanes.append((f"line {k}-{k + 1}", nbytes / network.bandwidth, network.latency))
                for lane, busy, late in lanes:
                    start, end = clock.occupy(lane, busy, at)
                    spans.append(Span(lane, f"group {group}", start, end, group, token))
                    at = end + late
            ready[group] = at + back
        rounds.append(max(ready))
    return rounds[-1] - rounds[-2], spans
