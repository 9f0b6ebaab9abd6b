"""The picture of an estimate, with its text twin: how much memory a model takes to run and to train.

Leaves out: devices (`draw/plan.py`), and controls (`widgets/memory_explorer.py`).
"""

from __future__ import annotations

from ..model.estimate import MemoryEstimate, load_text
from ..units import format_bytes
from .bars import PART_COLOURS, Bar, draw_bars
from .canvas import Picture

RUN = {"weights": "weights", "kv_cache": "KV cache", "activations": "activations"}  # field of a row -> name of a part
TRAIN = {"weights": "weights", "gradients": "gradients", "optimizer": "optimizer", "activations": "activations"}


def estimate_figure(estimate: MemoryEstimate) -> Picture:
    """An estimate as a picture: a stacked bar for each way to store the weights, and for each way to train.

    >>> from bigkit import estimate_memory
    >>> estimate_figure(estimate_memory("bert-base-cased"))  # doctest: +ELLIPSIS
    <Picture: Memory that bert-base-cased takes to run: float32 ...; to train: ...>
    """
    picture = Picture(estimate.name, estimate_label(estimate), left=142, right=74)
    picture.head(load_text(estimate.batch, estimate.context, estimate.kv_dtype))
    parts = dict.fromkeys([*RUN.values(), *TRAIN.values()])
    picture.legend([(part, PART_COLOURS[part]) for part in parts])
    picture.heading(f"To run {estimate.classes[1]}, weights stored as")
    draw_bars(picture, [Bar(row.stored, _parts(row, RUN)) for row in estimate.inference])
    picture.heading(f"To train {estimate.classes[1]} (another scale)")
    draw_bars(picture, [Bar(row.method, _parts(row, TRAIN)) for row in estimate.training])
    return picture


def estimate_text(estimate: MemoryEstimate) -> str:
    """The text twin of `estimate_figure`, with the classic table above it."""
    return str(estimate)


def estimate_label(estimate: MemoryEstimate) -> str:
    """One sentence for those who cannot see the picture of an estimate."""
    run = ", ".join(f"{row.stored} {format_bytes(row.total)}" for row in estimate.inference)
    train = ", ".join(f"{row.method} {format_bytes(row.total)}" for row in estimate.training)
    return f"Memory that {estimate.name} takes to run: {run}; to train: {train}."


def _parts(row: object, names: dict[str, str]) -> list[tuple[str, int, str]]:
    return [(name, getattr(row, part), PART_COLOURS[name]) for part, name in names.items()]
