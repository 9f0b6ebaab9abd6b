"""Three ways to bring weights in RAM and their inputs together, on the clock of `streams.py`.

    streamed           every block visits the GPU; its link is what takes time
    both links         blocks work on several GPUs in turn, and every link copies
    computed in RAM    of some blocks the CPU computes the MLP where it rests, and only the rest of the block travels

Blocks work one after another, wherever they do. While one works, the next ones that work on the same GPU arrive.

Leaves out: disks, prompts, and the hops of hidden states.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from .streams import Clock, SlotState, Span


class Way(NamedTuple):
    """What every lane does: "link 0", "GPU 0", ..., "CPU".

    Args:
        spans: of all tokens; the `turn` is the block's number.
        ends: seconds at which each token is done.
    """

    spans: tuple[Span, ...]
    ends: tuple[float, ...]

    @property
    def per_token(self) -> float:
        """Seconds of the last token."""
        return self.ends[-1] - (self.ends[-2] if len(self.ends) > 1 else 0.0)


def play(
    blocks: int, nbytes: float, work: float, link: float, *, gpus: int = 1, slots: int = 2, mlp: float = 0.0,
    cpu: float = 1.0, on_cpu: Collection[int] = (), tokens: int = 3,
) -> Way:  # fmt: skip
    """Play tokens through blocks that rest in RAM.

    Args:
        blocks: how many.
        nbytes: bytes of each.
        work: seconds for which a GPU works for one.
        link: bytes a second of each GPU's link.
        gpus: how many take turns.
        slots: blocks that each GPU holds in flight.
        mlp: bytes of a block's MLP.
        cpu: bytes of weights a second that the CPU reads in an MLP.
        on_cpu: numbers of the blocks whose MLP the CPU computes.
        tokens: how many.

    Ten blocks of 1 GB over a link of 50 GB/s, over two, and with every second MLP of 0.5 GB on the CPU:

    >>> [round(play(10, 1e9, 0.002, 50e9, **more).per_token, 3) for more in (
    ...     {}, {"gpus": 2}, {"mlp": 5e8, "cpu": 50e9, "on_cpu": range(0, 10, 2)})]
    [0.2, 0.1, 0.15]
    """
    clock, spans, ends, done = Clock(), list[Span](), list[float](), 0.0
    rooms = [[SlotState(number) for number in range(slots)] for _ in range(gpus)]
    holder: dict[int, SlotState] = {}  # step -> its slot; a step is a block of a token
    order = {step: gpu for gpu in range(gpus) for step in range(blocks * tokens) if step % blocks % gpus == gpu}

    def fetch(step: int) -> None:
        gpu, block = order[step], step % blocks
        slot = min(rooms[gpu], key=lambda slot: slot.used)
        slot.used = step + 1
        size = nbytes - (mlp if block in on_cpu else 0.0)
        begin, end = clock.fill(slot, int(size), link, lane=f"link {gpu}").copied
        holder[step] = slot
        spans.append(Span(f"link {gpu}", "", begin, end, block, step // blocks, slot.number))

    for step in range(blocks * tokens):
        gpu, block, token = order[step], step % blocks, step // blocks
        following = [later for later in range(step, blocks * tokens) if order[later] == gpu][:slots]
        for later in following:
            if later not in holder:
                fetch(later)
        slot = holder.pop(step)
        clock.arrive(slot, f"GPU {gpu}")
        begin, done = clock.occupy(f"GPU {gpu}", work, done)
        clock.leave(slot, f"GPU {gpu}")
        spans.append(Span(f"GPU {gpu}", "", begin, done, block, token, slot.number))
        if block in on_cpu:
            begin, done = clock.occupy("CPU", mlp / cpu, done)
            clock.now = done  # the host itself computes
            spans.append(Span("CPU", "", begin, done, block, token))
        if block == blocks - 1:
            ends.append(done)
    return Way(tuple(spans), tuple(ends))
