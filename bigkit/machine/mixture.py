"""What a token of a mixture of experts waits for, when a cache on the GPU holds some experts and the others travel.

    GPU     reads the weights that a token uses: all but its idle experts
    disk    reads the chosen experts that are not in the cache, if they rest there
    link    copies them

One waits for the other, as a router chooses in the middle of its block: nothing can be fetched before. Which experts
are in the cache follows from a recorded routing (`machine/routing.py`). It may be that of another model: then its hit
rate is taken for a cache with room for the same share of all experts, which is no more than an example.

Leaves out: the KV cache, the time of Python, and prompts, where most experts are chosen by some token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..model.experts import active_bytes, experts_of
from ..model.spec import ModelSpec
from ..units import format_bytes
from .routing import Routing


@dataclass(frozen=True)
class Mixture:
    """The sizes of a mixture of experts.

    Args:
        model: its name.
        layers: those with experts.
        experts, per_token: how many such a layer has, and how many of them a token takes.
        each: bytes of one expert.
        resident: bytes of everything else.
    """

    model: str
    layers: int
    experts: int
    per_token: int
    each: int
    resident: int

    @staticmethod
    def of(model: ModelSpec, dtype: str | None = None) -> Mixture:
        """The sizes of a model whose weights are stored in a dtype; None: as its checkpoint has them.

        Raises:
            ValueError: it has no experts.

        >>> from bigkit import describe
        >>> Mixture.of(describe("gpt-oss-120b"))
        Mixture(gpt-oss-120b: 36 x 128 experts of 13.24 MB, 4 at work, 4.26 GB beside them)
        """
        experts = experts_of(model)
        if not experts:
            raise ValueError(f"{model.name} has no experts: choose a mixture of experts, such as mixtral-8x7b")
        precision = model.precision(dtype)
        total, used = model.bytes(precision), active_bytes(model, precision)
        count, per_token = max((one.count, one.per_token) for one in experts)
        idle = sum(one.count - one.per_token for one in experts)
        each = round((total - used) / idle) if idle else experts[0].bytes_each(precision)
        everything = each * sum(one.count for one in experts)
        return Mixture(model.name, len(experts), count, per_token, each, max(0, total - everything))

    @property
    def routed(self) -> int:
        """Bytes of all experts."""
        return self.layers * self.experts * self.each

    @property
    def chosen(self) -> int:
        """Bytes of the experts that one token takes."""
        return self.layers * self.per_token * self.each

    def __repr__(self) -> str:
        each, beside = format_bytes(self.each, "si"), format_bytes(self.resident, "si")
        shape = f"{self.layers} x {self.experts} experts of {each}, {self.per_token} at work"
        return f"Mixture({self.model}: {shape}, {beside} beside them)"


@dataclass(frozen=True)
class TokenTime:
    """What one token waits for, on average over a text.

    Args:
        hit_rate: the share of the chosen experts that are in the cache.
        cache: bytes of the cache.
        travels: bytes of experts that are brought.
        waits: "GPU", "disk" and "link" -> seconds, one after the other.
    """

    hit_rate: float
    cache: int
    travels: float
    waits: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """All of them."""
        return sum(self.waits.values())


def token_time(
    mixture: Mixture, routing: Routing, policy: str, slots: int, *, memory: float, link: float,
    disk: float | None = None,
) -> TokenTime:  # fmt: skip
    """The time of a token.

    Args:
        mixture: the model.
        routing: a recorded one, of this model or of another one.
        policy, slots: what the cache keeps, and of how many of the routing's experts; see `Routing.hits`.
        memory, link: bytes a second from the GPU's own memory, and from RAM to it.
        disk: bytes a second from files, if the experts rest there; None: they rest in RAM.

    Raises:
        ValueError: a rate that is not positive, an unknown policy, a cache larger than all experts.

    >>> routing = Routing("tiny", 4, (((0, 1), (0, 2), (0, 1)),))
    >>> found = token_time(Mixture("tiny", 1, 4, 2, 100, 200), routing, "LRU", 2, memory=1000, link=100)
    >>> found.cache, round(found.travels), {lane: round(seconds, 2) for lane, seconds in found.waits.items()}
    (200, 133, {'GPU': 0.4, 'link': 1.33})
    """
    rates = {"memory": memory, "link": link, **({} if disk is None else {"disk": disk})}
    for name, rate in rates.items():
        if not rate > 0:
            raise ValueError(f"{name} brings {rate} bytes a second: expected more than 0")
    hit_rate = routing.hit_rate(policy, slots)
    travels = (1 - hit_rate) * mixture.chosen
    waits = {"GPU": (mixture.resident + mixture.chosen) / memory}
    if disk is not None:
        waits["disk"] = travels / disk
    waits["link"] = travels / link
    return TokenTime(hit_rate, round(mixture.routed * slots / routing.all_experts), travels, waits)
