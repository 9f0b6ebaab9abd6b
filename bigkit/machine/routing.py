"""Which experts a router chose, token by token, and what a cache of some of them would have saved.

A token asks for a few experts of each layer. Those that are kept on the GPU are there at once, the others travel. How
many are there depends on the text, on the model, and on which ones are kept:

    none      nothing is kept
    static    the experts that this routing asks for most often, each from when it is first asked for
    LRU       those that were asked for last
    best      what no policy can beat: who will be asked for last of all makes room, be it the one that has just come.
              It knows the future, so it is a bound and no recipe

All begin with an empty cache. Layers ask one after another, token by token; the experts of a layer are asked for at
once, and none of them makes room for another one before they have worked. What a small cache keeps a larger one keeps
too, so one pass tells for each request how large the cache must be that has it.

Leaves out: recording (`measure/routing.py`), and the time that copies take.
Sources: Belady, A study of replacement algorithms for a virtual-storage computer (1966); Mattson, Gecsei, Slutz and
Traiger, Evaluation techniques for storage hierarchies (1970).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from heapq import heappop, heappushpop
from itertools import islice
from pathlib import Path

from ..model.experts import experts_of
from ..model.precision import Precision
from ..model.spec import ModelSpec
from ..units import counted

NEVER = 2**62  # experts: no cache has what it was never asked for
Groups = Sequence[Sequence[int]]  # what layers ask for, one after another
# For each group: how large the cache must be that has each of it, and what a cache of so many keeps after it.
Steps = Iterator[tuple[Sequence[int], Callable[[int], Iterable[int]]]]


@dataclass(frozen=True)
class Routing:
    """What the routers of a model chose for each token of a text.

    Args:
        model: the model's name.
        experts: how many each layer has.
        chosen: numbers of experts, layers x tokens x k; layers without experts are left out.
        text: each token as text, or nothing.

    Raises:
        ValueError: the numbers make no routing.

    >>> routing = Routing("tiny", 4, (((0, 1), (0, 2), (0, 1)),))
    >>> routing.layers, routing.tokens, routing.per_token, routing.counts
    (1, 3, 2, ((3, 2, 1, 0),))
    >>> routing.hits("LRU", 2), routing.hit_rate("best", 2)
    ((False, False, True, False, True, False), 0.5)
    """

    model: str
    experts: int
    chosen: tuple[tuple[tuple[int, ...], ...], ...]
    text: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.chosen or not self.chosen[0] or not self.chosen[0][0]:
            raise ValueError(f"a routing of {self.model} needs at least one layer, one token and one choice")
        if self.per_token > self.experts:
            raise ValueError(f"a token of {self.model} takes {self.per_token} experts, but a layer has {self.experts}")
        lengths = {len(layer) for layer in self.chosen} | {len(self.text) or self.tokens}
        if len(lengths) > 1:
            raise ValueError(f"layers and text of {self.model} differ in tokens: {sorted(lengths)}")
        for number, layer in enumerate(self.chosen):
            for choice in layer:
                if len({*choice}) != self.per_token or len(choice) != self.per_token:
                    raise ValueError(f"layer {number}: {choice} is not {self.per_token} different experts")
                if not all(0 <= expert < self.experts for expert in choice):
                    raise ValueError(f"layer {number}: {choice} is not among experts 0 to {self.experts - 1}")

    layers = property(lambda self: len(self.chosen))
    tokens = property(lambda self: len(self.chosen[0]))
    per_token = property(lambda self: len(self.chosen[0][0]))
    all_experts = property(lambda self: self.layers * self.experts)

    @property
    def shape(self) -> str:
        """How many layers and experts, in words."""
        return f"{counted(self.layers, 'layer')}, {self.per_token} of {self.experts} experts"

    @property
    def counts(self) -> tuple[tuple[int, ...], ...]:
        """How often each expert was chosen, layers x experts."""
        counted = [Counter(expert for choice in layer for expert in choice) for layer in self.chosen]
        return tuple(tuple(layer[expert] for expert in range(self.experts)) for layer in counted)

    def groups(self) -> list[list[int]]:
        """What each layer asks for, token by token, as layer * experts + expert, in ascending order."""
        return [[layer * self.experts + expert for expert in sorted(choice)]
                for token in zip(*self.chosen) for layer, choice in enumerate(token)]  # fmt: skip

    def requests(self) -> list[int]:
        """All `groups` in one row."""
        return [expert for group in self.groups() for expert in group]

    # -- what a cache does

    def hits(self, policy: str, slots: int) -> tuple[bool, ...]:
        """For each request, in the order of `requests`, whether the expert was in a cache of so many experts.

        Args:
            policy: one of `POLICIES`.
            slots: experts of all layers together that the cache holds.

        Raises:
            ValueError: there is no such policy, or the cache is larger than all experts.
        """
        self._check(policy, slots)
        return tuple(size <= slots for size in _sizes(self, policy))

    def hit_rate(self, policy: str, slots: int) -> float:
        """The share of the requests that were in the cache; see `hits`."""
        found = self.hits(policy, slots)
        return sum(found) / len(found)

    def kept(self, policy: str, slots: int, token: int) -> frozenset[int]:
        """What is in the cache after a token, as layer * experts + expert; see `hits`."""
        self._check(policy, slots)
        last = (token + 1) * self.layers - 1
        _, kept = next(islice(POLICIES[policy](self.groups()), last, None))
        return frozenset(kept(slots))

    def bytes_per_token(self, policy: str, slots: int, each: int) -> float:
        """Bytes that travel for a token, on average, if one expert has `each` bytes; see `hits`.

        >>> Routing("tiny", 4, (((0, 1), (0, 2)),)).bytes_per_token("LRU", 2, 100)
        150.0
        """
        return self.hits(policy, slots).count(False) * each / self.tokens

    def bytes_each(self, model: ModelSpec, precision: Precision = Precision()) -> int:
        """Bytes of one expert of the model that this was recorded from.

        Raises:
            ValueError: the model has other layers or experts.
        """
        experts = experts_of(model)
        self.check({(len(experts), one.count, one.per_token) for one in experts}, model.name)
        return experts[0].bytes_each(precision)

    def check(self, shapes: Iterable[tuple[int, int, int]], name: str = "this model") -> None:
        """See that this was recorded from a model of such a shape.

        Args:
            shapes: (layers with experts, experts of one, experts that a token takes); of one model all are equal.
            name: what errors call the model.

        Raises:
            ValueError: the model has other layers or experts.
        """
        if {*shapes} != {(self.layers, self.experts, self.per_token)}:
            has = ", ".join(f"{counted(n, 'layer')}, {k} of {count} experts" for n, count, k in sorted(shapes))
            raise ValueError(
                f"this routing was recorded from {self.model} ({self.shape}), and {name} has "
                f"{has or 'no experts'}: record it from the same model"
            )

    def _check(self, policy: str, slots: int) -> None:
        if policy not in POLICIES:
            raise ValueError(f"unknown policy {policy!r}: expected one of {', '.join(map(repr, POLICIES))}")
        if not 0 <= slots <= self.all_experts:
            most = f"{self.model} has {self.all_experts} ({self.shape})"
            raise ValueError(f"a cache of {slots} experts: {most}, expected 0 to that many")

    # -- files

    def to_json(self) -> str:
        """As JSON text, without spaces."""
        return json.dumps({"format": 1, **asdict(self)}, separators=(",", ":")) + "\n"

    @staticmethod
    def from_json(text: str) -> Routing:
        """The inverse of `to_json`.

        Raises:
            ValueError: it is no routing.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != 1:
                raise ValueError("this version of bigkit reads format 1")
            chosen = tuple(tuple(tuple(map(int, choice)) for choice in layer) for layer in data["chosen"])
            return Routing(str(data["model"]), int(data["experts"]), chosen, tuple(map(str, data["text"])))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"this is no recorded routing ({type(error).__name__}: {error})") from error

    @staticmethod
    def of(given: Routing | str | os.PathLike[str]) -> Routing:
        """A routing, or the one in a JSON file.

        Raises:
            TypeError: it is neither. Others: those of `load`.
        """
        if isinstance(given, (str, os.PathLike)):
            return Routing.load(given)
        if not isinstance(given, Routing):
            raise TypeError(f"a routing is what record_routing gives, or its JSON file, not a {type(given).__name__}")
        return given

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a JSON file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Routing:
        """Read it from a JSON file; errors: those of `from_json`."""
        return Routing.from_json(Path(path).read_text(encoding="utf-8"))

    def __repr__(self) -> str:
        return f"Routing({self.model}: {counted(self.tokens, 'token')}, {self.shape})"


# ---------------------------------------------------------------------------------------------------------------------
# Policies


@lru_cache(16)
def _sizes(routing: Routing, policy: str) -> tuple[int, ...]:
    return tuple(size for sizes, _ in POLICIES[policy](routing.groups()) for size in sizes)


def _places(kept: Sequence[int], wanted: Iterable[int]) -> list[int]:
    """How many of a list one must take to have each of those that are wanted."""
    return [kept.index(one) + 1 if one in kept else NEVER for one in wanted]


def _none(groups: Groups) -> Steps:
    for group in groups:
        yield [NEVER] * len(group), lambda slots: ()


def _static(groups: Groups) -> Steps:
    ranked = [expert for expert, _ in Counter(expert for group in groups for expert in group).most_common()]
    rank = {expert: i for i, expert in enumerate(ranked)}
    kept = [NEVER] * len(ranked)  # until it has been asked for
    for group in groups:
        sizes = _places(kept, group)
        for expert in group:
            kept[rank[expert]] = expert
        yield sizes, lambda slots: (expert for expert in kept[:slots] if expert != NEVER)


def _lru(groups: Groups) -> Steps:
    kept: list[int] = []  # used last comes first
    for group in groups:
        sizes = _places(kept, group)
        kept[:] = [*reversed(group), *(expert for expert in kept if expert not in group)]
        yield sizes, lambda slots: kept[:slots]


def _best(groups: Groups) -> Steps:
    requests = [expert for group in groups for expert in group]
    again = [*range(len(requests), 2 * len(requests))]  # when the same expert is asked for again; never: in the end
    seen: dict[int, int] = {}
    for i in range(len(requests) - 1, -1, -1):
        again[i] = seen.get(requests[i], again[i])
        seen[requests[i]] = i
    who = dict(zip(again, requests))
    kept: list[int] = []  # as the times when they are asked for again
    end = 0
    for group in groups:
        start, end = end, end + len(group)
        sizes = _places(kept, range(start, end))
        # A cache of each size keeps who comes soonest of those that a smaller one has let go, and of its own.
        going = sorted(again[start:end])
        kept[:] = [heappop(going) if start <= time < end else heappushpop(going, time) for time in kept]
        kept.extend(sorted(going))
        yield sizes, lambda slots: (who[time] for time in kept[:slots])


POLICIES: dict[str, Callable[[Groups], Steps]] = {
    "none": _none, "static": _static, "LRU": _lru, "best": _best,
}  # fmt: skip
