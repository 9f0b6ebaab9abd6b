"""How many MLPs the CPU should compute where they rest, for a few tokens, while the links bring the rest.

    links     (bytes that travel - bytes of k MLPs) / their rate while the CPU reads too
    CPU       k x (bytes of an MLP / its rate + what it takes to hand over), and what the GPU does in between

A token takes the longer of the two at least, and somewhat more: a block waits for its weights, and a slot for its
block, so neither is busy all the time. The clock of `machine/streams.py` says how much; k is where a token is shortest.
Rates are those that `calibrate()` measured here, for each dtype and number of threads, with all links busy. Without
them nothing is said: RAM of one machine is several times as fast as that of another, and where it is slow the CPU only
takes from the links.

    >>> layers = [(405_000_000, 270_000_000)] * 32  # bytes that travel, and of its MLP
    >>> count, reading, seconds = best_count(layers, 0.005, [Reading(16, 54e9, 54e9)], slots=4, hop=2e-4, graph=True)
    >>> count, reading.threads, round(seconds, 3)
    (23, 16, 0.13)

Leaves out: computing it (`offload/on_cpu.py`), and weights on disk.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from ..machine.ledger import Calibration
from ..machine.streams import Clock, Player, Turn
from ..model.spec import ModelSpec, ModuleSpec
from ..units import counted, format_bytes, format_seconds
from .experts import is_apart
from .partition import spread

if TYPE_CHECKING:
    from .plan import Plan

SLOTS = (None, 3, 4)  # blocks in flight that are tried, where the CPU works between them; None: as without it
PAYS = 0.95  # a token must take less than this share of what streaming alone takes


@dataclass(frozen=True)
class OnHost:
    """Measured on 16 cores of an H200's host (Intel, PyTorch 2.11), 2026-11-30.

    Args:
        few: tokens of a block's call for which the CPU takes about as long as for one. In bfloat16 it reads 62 GB/s of
            weights for 1 token, 56 for 16, 38 for 64, 7 for 512.
        hops: seconds for each MLP beside its reading, where Python calls the CPU. Fitted: 16, 21 and 24 MLPs of 32 of a
            Llama-7B took 171, 168 and 197 ms a token where 46 GB/s were read. Most of it is Python's, which needs more
            than twice the time for a block beside a busy CPU. (Of 23 MLPs, later, 175 ms were foretold, and 172 taken.)
            What a CUDA graph takes is measured: `Calibration.call`.
    """

    few: int = 16
    hops: float = 1.2e-3


HOST = OnHost()
FEW = HOST.few


class Reading(NamedTuple):
    """What a number of the CPU's threads reads in products of matrices and one vector, while the links are busy.

    Args:
        threads: how many.
        reads: bytes of weights a second.
        links: bytes a second that all links bring meanwhile.
    """

    threads: int
    reads: float
    links: float


def best_count(
    layers: Sequence[tuple[int, int]], gpu: float, readings: Sequence[Reading], slots: int, hop: float = HOST.hops,
    graph: bool = False,
) -> tuple[int, Reading, float]:  # fmt: skip
    """How many MLPs the CPU should compute, with how many threads, and the seconds of a token then.

    Args:
        layers: bytes of each that travels, and those of its MLP in RAM, or 0; in their order.
        gpu: seconds for which the GPU, or Python, works for a token.
        readings: what was measured.
        slots: layers in flight, on all GPUs together.
        hop: seconds for each MLP beside its reading.
        graph: whether a token is one CUDA graph.
    """
    sizes = [mlp for _, mlp in layers if mlp]
    travels, mlp = sum(size for size, _ in layers), max(sizes, default=0)

    def least(way: tuple[int, Reading]) -> float:
        count, reading = way
        return max((travels - count * mlp) / reading.links, count * (mlp / reading.reads + hop) + gpu)

    ways = sorted(((k, reading) for reading in readings for k in range(len(sizes) + 1)), key=least)
    best = (*ways[0], math.inf)
    for count, reading in ways:
        if least((count, reading)) >= best[2]:
            break  # nor are those that follow
        seconds = token_seconds(layers, spread(sizes, count * mlp), gpu, reading, slots, hop, graph)
        if seconds < best[2]:
            best = count, reading, seconds
    return best


def token_seconds(
    layers: Sequence[tuple[int, int]],
    chosen: Collection[int],
    gpu: float,
    reading: Reading,
    slots: int,
    hop: float,
    graph: bool,
) -> float:
    """Seconds of a token in which the CPU computes the `chosen` MLPs, numbered as they come. See `best_count`."""
    turns, number = list[Turn](), 0
    for i, (size, mlp) in enumerate(layers):
        own = mlp if number in chosen and mlp else 0
        number += mlp > 0
        turns.append(Turn(str(i), size - own, gpu / len(layers) + (own / reading.reads + hop if own else 0.0), "cpu"))
    player, ends = Player(turns, reading.links, math.inf, slots, True, True, Clock()), list[float]()
    for token in range(3):
        for i in range(len(turns)):
            player.forward(i, token)
        if graph:  # it ends when all that it fetches ahead has arrived
            player.clock.free["compute"] = max(player.clock.free.values())
        ends.append(player.clock.free["compute"])
    return ends[-1] - ends[-2]


def readings_of(calibration: Calibration | None, dtype: str, gpus: int) -> list[Reading]:
    """What was measured of a dtype, with so many of the links at work; all were when it was measured."""
    if calibration is None:
        return []
    share = min(gpus / max(len(calibration.links), 1), 1.0)
    alone = gpus * (calibration.link_pinned or 0)  # RAM, which all links share, may keep each from its own rate
    rows = calibration.cpu_reads.get(dtype, ())
    return [Reading(threads, reads, max(links * share, min(links, alone))) for threads, reads, links in rows]


def mlp_of(block: ModuleSpec) -> str:
    """Own name of a block's MLP, or "": the largest child with two matrices or more and nothing but weights, which is
    no attention by its name, and no mixture of experts.
    """
    sizes = {"": 0}
    for own, child in block.children.items():
        tensors = [tensor for _, tensor, _ in child.named_tensors()]
        matrices = sum(len(tensor.shape) == 2 for tensor in tensors)
        stateless = "att" not in f"{own} {child.cls}".lower() and not any(tensor.buffer for tensor in tensors)
        if matrices > 1 and stateless and all(len(tensor.shape) < 3 for tensor in tensors):
            sizes[own] = child.bytes()
    return max(sizes, key=sizes.__getitem__)


def mlps_of(model: ModelSpec, plan: Plan) -> dict[str, int]:
    """Blocks that rest in RAM and work on a GPU -> bytes of the MLP of each, as layer records tell it."""
    apart = {layer.name for layer in is_apart(plan.layers)}
    sizes = {}
    precision = model.precision(plan.dtype, plan.quantization)
    specs = {layer.name: layer.spec for layer in model.layers_to_place()}
    for layer in plan.layers:
        if layer.device != "cpu" or layer.works in (None, "cpu") or layer.name in apart or layer.name not in specs:
            continue
        if own := mlp_of(specs[layer.name]):
            sizes[layer.name] = specs[layer.name].children[own].bytes(precision, f"{layer.name}.{own}")
    return sizes


def with_cpu(
    model: ModelSpec, plan: Plan, calibration: Calibration | None, alone: float, gpu: float, python: float
) -> tuple[Plan, float, str]:
    """A plan in which the CPU computes MLPs, as many as make a token shortest.

    Args:
        model: what is planned.
        plan: a plan without.
        calibration: what was measured on the machine.
        alone: seconds of a token if all that is offloaded is streamed.
        gpu, python: seconds for which the GPU and Python work for it.

    Returns:
        The plan, or that without if the CPU would not help; seconds of a token, by `bigkit.graph_decode` if a call by a
        graph was measured; and why, or "" if nothing was measured.
    """
    dtype = model.computes_in(model.precision(plan.dtype, plan.quantization))
    working = {layer.works for layer in plan.layers if layer.works is not None}
    readings = readings_of(calibration, dtype, len(working))
    mlps = mlps_of(model, plan) if readings and not plan.quantization and plan.feasible else {}
    if not mlps:
        return plan, alone, ""
    layers = [(layer.bytes, mlps.get(layer.name, 0)) for layer in plan.layers if layer.works is not None]
    slots, call = plan.slots * len(working), calibration.call if calibration else None
    by_python = max(gpu, python), readings, slots, HOST.hops, False
    count, reading, seconds = best_count(layers, *((gpu, readings, slots, call, True) if call else by_python))
    if not count or seconds > PAYS * alone:
        fastest = max(readings, key=lambda reading: reading.reads)
        rate = f"{format_bytes(fastest.reads, 'si')} of {dtype} weights a second beside busy links"
        return plan, alone, f"The CPU would not help: with {counted(fastest.threads, 'thread')} it reads {rate}."
    mlp, way = max(mlps.values()), ""
    if call:
        chosen = spread([*mlps.values()], count * mlp)
        eager = token_seconds(layers, chosen, max(gpu, python), reading, slots, HOST.hops, False)
        way = f" within bigkit.graph_decode, {format_seconds(eager)} in Python,"
    about = (
        f"For up to {FEW} tokens the CPU computes {counted(count, 'MLP')} of {len(mlps)} ({format_bytes(count * mlp)}) "
        f"where they rest, with {counted(reading.threads, 'thread')}: predicted {format_seconds(seconds)} a token{way} "
        f"instead of {format_seconds(alone)}. Its results round otherwise than the GPU's."
    )
    return replace(plan, on_cpu=(count * mlp, reading.threads), notes=(*plan.notes, about)), seconds, about
