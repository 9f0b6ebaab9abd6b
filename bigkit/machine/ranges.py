"""How far a predicted quantity may be off, and what it rests on.

A range is meant to hold nine runs of ten. Of each kind that was measured it is so wide that it holds nine of ten of
the runs in `benchmarks/results` that nobody had seen; a test counts them. Each run that was recorded on this machine
narrows it, or widens it if it was further off.

Leaves out: predicting (`bigkit.dryrun`), and keeping runs (`ledger.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .roofline import StepTime

MEASURED, VENDOR, GUESSED = "measured here", "vendor's figures", "a guess"
ALIKE = "a guess from other models measured here"
PLAIN = "a guess from models that are not quantized"
WORTH = 3  # recorded runs that weigh as much as what a range starts from

# What a step waits for, and what its rate rests on -> (low, high): measured / predicted in nine runs of ten. Those that
# were measured, and Python's without a twin: the held-out runs on H200s (`benchmarks/results/held-out*.json`). Python's
# with a twin: the third draw, whose twins ran some seconds before; that rented host changed its pace by 2 meanwhile,
# and with twins in turn with their models it would be 0.87 to 1.16. Links: `experts-foretold*.json`, too. The others
# are guesses.
SPREADS: Mapping[tuple[str, str], tuple[float, float]] = {
    ("python", MEASURED): (0.55, 1.65),
    ("python", ALIKE): (0.6, 1.9),
    ("python", PLAIN): (0.9, 5.2),
    ("python", GUESSED): (0.5, 2.0),
    ("gpu", MEASURED): (0.88, 1.35),
    ("gpu", VENDOR): (0.75, 1.5),
    ("link", MEASURED): (0.8, 1.2),
    ("link", VENDOR): (0.8, 1.4),
    ("disk", MEASURED): (0.7, 1.5),
    ("disk", VENDOR): (0.5, 2.0),
}
MET, NOT_MET = "PyTorch's allocator, as on an H200", "PyTorch's allocator, not yet compared on such a GPU"
MEMORY: Mapping[tuple[str, str], tuple[float, float]] = {
    ("allocated", MET): (0.995, 1.005),
    ("reserved", MET): (0.97, 1.03),
    ("allocated", NOT_MET): (0.98, 1.02),
    ("reserved", NOT_MET): (0.94, 1.06),
}


@dataclass(frozen=True)
class Range:
    """A predicted quantity with the range that it should lie in.

    Args:
        value: seconds or bytes, as predicted.
        low, high: what nine of ten runs should lie between, in the same unit.
        rests_on: where the figures come from, in a few words.
        runs: recorded runs of this model on this machine that say so, too.

    >>> Range(2.0, 1.5, 3.0, GUESSED).told(lambda seconds: f"{seconds:g} s")
    '1.5 s to 3 s, a guess'
    """

    value: float
    low: float
    high: float
    rests_on: str
    runs: int = 0

    def told(self, say: Callable[[float], str]) -> str:
        """The range in words.

        Args:
            say: how a quantity is said: `format_seconds` or `format_bytes`.
        """
        runs = f" and {self.runs} recorded here" if self.runs else ""
        return f"{say(self.low)} to {say(self.high)}, {self.rests_on}{runs}"

    def narrowed(self, ratios: Sequence[float]) -> Range:
        """The range after runs with these ratios of measured to predicted.

        >>> wide = Range(1.0, 0.5, 2.0, GUESSED)
        >>> near, far = wide.narrowed([1.02] * 9), wide.narrowed([3.0])
        >>> round(near.low, 2), round(near.high, 2), far.high > wide.high
        (0.71, 1.41, True)
        """
        if not ratios:
            return self
        seen = sum(math.log(ratio) ** 2 for ratio in ratios)

        def side(factor: float) -> float:
            return math.sqrt((WORTH * math.log(factor) ** 2 + seen) / (WORTH + len(ratios)))

        low, high = (side(edge / self.value) for edge in (self.low, self.high))
        return Range(self.value, self.value * math.exp(-low), self.value * math.exp(high), self.rests_on, len(ratios))


def range_of_memory(kind: str, size: int, met: bool) -> Range:
    """The range of a peak: `kind` is "allocated" or "reserved"."""
    rests_on = MET if met else NOT_MET
    low, high = MEMORY[kind, rests_on]
    return Range(size, size * low, size * high, rests_on)


def range_of_steps(steps: Sequence[StepTime], host: str, others: str) -> Range:
    """The range of a step's mean time: each lane may be faster or slower, and the slowest counts.

    Args:
        steps: of one kind, at least one.
        host: what the host's pace rests on.
        others: what the rates of devices, links and disks rest on.
    """
    lows, highs = [], []
    for step in steps:
        spreads = {lane: SPREADS[_kind(lane), host if lane == "python" else others] for lane in step.busy}
        low, high = spreads[step.bottleneck]
        lows.append(max(step.seconds * low, *(step.busy[lane] * spreads[lane][0] for lane in spreads)))
        highs.append(max(step.seconds * high, *(step.busy[lane] * spreads[lane][1] for lane in spreads)))
    rests_on = host if steps[-1].bottleneck == "python" else others
    value, low, high = (sum(row) / len(steps) for row in ([step.seconds for step in steps], lows, highs))
    return Range(value, low, high, rests_on)


def _kind(lane: str) -> str:
    return lane if lane in ("python", "disk") else "link" if lane.startswith(("copy", "experts")) else "gpu"
