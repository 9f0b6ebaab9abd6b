"""What it would give to split every layer over all GPUs, instead of giving each GPU layers of its own.

Transformers has it as `tp_plan="auto"`, vLLM as `--tensor-parallel-size`: each GPU holds 1/n of each weight, all work
on every token, and they meet twice in each block to add up their parts (Shoeybi et al., Megatron-LM, 2019,
https://arxiv.org/abs/1909.08053). bigkit does not do it; a plan over hosts says how fast it would be.

Leaves out: experts that are split, GPUs that differ in more than the slowest one's rate, and meetings that overlap.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..machine.network import Network


def tokens_if_split(
    gpus: Sequence[tuple[int, float]], size: int, read: float, blocks: int, python: float, line: Network, hidden: int
) -> float | None:
    """Tokens a second of one sequence; None where the GPUs cannot hold their parts.

    Args:
        gpus: (bytes of room, bytes a second of its memory) of each.
        size, read: bytes of weights and cache, and how many of them a token reads.
        blocks: of the model.
        python: seconds in which each process starts the work of all blocks; it is not split.
        line: between neighbours in a ring. All n GPUs add up in 2 (n - 1) messages of 1/n of the hidden states.
        hidden: bytes of a token's hidden states.

    Two GPUs read 10 GB at 1 TB/s in 5 ms, and meet 64 times:

    >>> gpus = [(10**10, 1e12)] * 2
    >>> round(tokens_if_split(gpus, 10**10, 1e10, 32, 0.0, Network("NVLink", 3e11, 1e-5), 8192))
    159
    >>> round(tokens_if_split(gpus, 10**10, 1e10, 32, 0.0, Network("Ethernet", 1e9, 5e-5), 8192))
    84
    """
    count = len(gpus)
    if not count or size > count * min(room for room, _ in gpus):
        return None
    meeting = 2 * (count - 1) * line.seconds(hidden // count)
    slowest = min(rate for _, rate in gpus)
    return 1 / (max(read / count / slowest, python) + 2 * blocks * meeting)
