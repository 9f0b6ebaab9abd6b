"""Where layers rest so that a token comes soonest: the search behind the strategy "fastest".

Every unit of a model works once for a token; what rests in RAM or on disk must come over the link before. Which units
rest there decides how many bytes move, and in which order they stand decides how much of that hides behind work: the
schedule of the streams (`machine/streams.py`) says what a token takes. From a placement that fits, the search goes to
the best neighbour that fits, one unit moved or two exchanged, until no neighbour is better.

Leaves out: proof that nothing is better (tests hold it against every placement of small models), experts that a token
does not meet, and copies between GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

from ..devices import Device
from ..machine.roofline import Rates
from ..machine.streams import CHUNK, RING, Turn, schedule

TOKENS = 4  # forwards that are played: the first two find the slots as the ones before left them
PIECES = 8  # into which a unit from disk is cut here, instead of chunks
ROUNDS = 24  # of the search
FEW = 10  # pieces of which all neighbours are tried
BLOCK, OTHER = 100, 10  # operations that Python issues for a block, and for a layer that is none


@dataclass(frozen=True)
class Piece:
    """A unit as the search sees it.

    Args:
        weights: bytes that rest, and travel if it is offloaded.
        cache: bytes of KV cache that it reads.
        block: whether it is one of the blocks.
        kind: pieces of one kind may change places.
    """

    weights: int
    cache: int
    block: bool
    kind: Hashable


def token_seconds(pieces: Sequence[Piece], places: Sequence[Device], main: Device, rates: Rates, slots: int) -> float:
    """What a token takes, between others.

    Args:
        pieces: in the order in which they work.
        places: where each rests; what rests in RAM or on disk works on `main`, unless that is the CPU.
        main: the device to which they travel.
        rates: of that device.
        slots: pieces in flight; 0 if none travels.

    >>> from bigkit.machine.hardware import GPUS
    >>> blocks = [Piece(10**9, 0, True, "block")] * 8
    >>> rates = Rates.of_gpu(GPUS["A100-80GB"])
    >>> round(token_seconds(blocks, ["cpu", 0] * 4, 0, rates, 2) / (4 * 10**9 / rates.link), 3)
    1.0
    """
    turns = []
    for piece, place in zip(pieces, places):
        issued = (BLOCK if piece.block else OTHER) * rates.issue
        seconds = max((piece.weights + piece.cache) / rates.memory, issued)
        turns.append(Turn("", piece.weights, seconds, place, main if place in ("cpu", "disk") else place))
    if not any(turn.travels for turn in turns):
        return sum(turn.seconds for turn in turns)
    chunk = max(CHUNK, max(piece.weights for piece in pieces) // PIECES)
    ends = schedule(
        turns, link=rates.link, disk=rates.disk, slots=max(1, slots), tokens=TOKENS, chunk=chunk,
        ring=max(1, CHUNK * RING // chunk),
    ).ends  # fmt: skip
    return (ends[-1] - ends[-3]) / 2  # of two, since with an odd number of turns the slots change sides


def search(
    pieces: Sequence[Piece],
    places: Sequence[Device],
    main: Device,
    devices: Sequence[Device],
    seconds: Callable[[Sequence[Device]], float],
    fits: Callable[[Sequence[Device]], bool],
) -> tuple[list[Device], float]:
    """The places that are best near the given ones, and what a token takes then.

    Args:
        pieces: in the order in which they work.
        places: where they rest at first; this fits.
        main: the device to which they travel.
        devices: where a piece may rest.
        seconds: what a token takes for given places.
        fits: whether given places keep within the budgets.
    """
    best = list(places)
    least = seconds(best)
    # At a tie too: a prompt, which has more to compute, gains where a token does not.
    even = _spread(pieces, best, main)
    if fits(even) and (found := seconds(even)) <= least:
        best, least = even, found
    for _ in range(ROUNDS):
        steps = [(seconds(step), step) for step in _neighbours(pieces, best, devices) if fits(step)]
        found, step = min(steps, key=lambda item: item[0], default=(least, best))
        if found >= least * (1 - 1e-9):
            break
        best, least = step, found
    return best, least


def _spread(pieces: Sequence[Piece], places: Sequence[Device], main: Device) -> list[Device]:
    """The same places, each evenly spread among pieces of one kind; other GPUs keep theirs."""
    found = list(places)
    for kind in dict.fromkeys(piece.kind for piece in pieces):
        mine = [i for i, piece in enumerate(pieces) if piece.kind == kind and places[i] in (main, "cpu", "disk")]
        here = [places[i] for i in mine]
        order = [
            ((number + 0.5) / here.count(place), here.index(place), place)
            for place in dict.fromkeys(here)
            for number in range(here.count(place))
        ]
        for i, (*_, place) in zip(mine, sorted(order, key=lambda item: item[:2])):
            found[i] = place
    return found


def _neighbours(pieces: Sequence[Piece], places: Sequence[Device], devices: Sequence[Device]) -> Iterator[list[Device]]:
    """One piece elsewhere, or two exchanged: of those of one kind in one place the first and the last; few: all."""
    ends: dict[tuple[Hashable, Device], list[int]] = {}
    for i, (piece, place) in enumerate(zip(pieces, places)):
        ends.setdefault((piece.kind, place), []).append(i)
    few = len(pieces) <= FEW
    chosen = sorted({i for mine in ends.values() for i in (mine if few else (mine[0], mine[-1]))})
    for i in chosen:
        for device in devices:
            if device != places[i]:
                yield [device if k == i else place for k, place in enumerate(places)]
    for i, j in ((i, j) for i in chosen for j in chosen if i < j):
        if places[i] != places[j]:
            yield [places[j] if k == i else places[i] if k == j else place for k, place in enumerate(places)]
