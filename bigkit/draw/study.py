"""The picture of a quantized layer, with its text twin: its weights, the values of a code, the error of every layer.

Leaves out: quantizing (`quantize/study.py`), and controls (`widgets/quantization_lab.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..units import format_bytes, text_table
from .canvas import WIDTH, Picture, shorten, text_width
from .colours import BLUE, GREEN, GREY, ORANGE, SKY, SOFT, VERMILLION

if TYPE_CHECKING:
    from ..quantize.study import Study


def study_figure(study: Study, errors: Mapping[str, float]) -> Picture:
    """A quantized layer as a picture: its weights as a histogram over the values that a code can stand for, and the
    error of every layer's output below, the layer's own marked.

    Args:
        study: the layer.
        errors: layer -> relative error of its output, in the model's order.

    >>> from bigkit.quantize.study import Scheme, planted, study
    >>> picture = study_figure(study(planted(), Scheme("nf4")), {"planted outliers": 0.09})
    >>> picture.save("study.svg")  # doctest: +SKIP
    """
    picture = Picture(study.layer, study_label(study))
    picture.head(_facts(study))
    picture.legend([("weights", BLUE), ("values of a code", GREEN), ("this layer", ORANGE), ("other layers", SKY)])
    _draw_histogram(picture, study.counts, study.codes)
    if study.features:
        apart = f"; {study.outliers} outliers are multiplied in 16 bit" if _threshold(study) else ""
        picture.heading(f"The largest input of each of {len(study.features):,} features{apart}")
        _draw_inputs(picture, study)
    picture.heading("How far the output of each layer moves, relative to its length, in the model's order")
    _draw_columns(picture, errors, study.layer)
    return picture


def study_text(study: Study, errors: Mapping[str, float]) -> str:
    """The text twin of `study_figure`: the layer's figures, its codes, and the error of each kind of layer.

    >>> from bigkit.quantize.study import Scheme, planted, study
    >>> print(study_text(study(planted(), Scheme("nf4")), {"planted outliers": 0.09}).splitlines()[0])
    planted outliers
    """
    kinds: dict[str, list[float]] = {}
    for name, error in errors.items():
        kinds.setdefault(".".join(part for part in name.split(".") if not part.isdigit()), []).append(error)
    rows = [[kind, str(len(values)), *(f"{100 * pick(values):.2f} %" for pick in (min, max))]
            for kind, values in kinds.items()]  # fmt: skip
    codes = f"{len(study.codes)}, evenly spaced from -1 to 1"
    if len(study.codes) <= 16:
        values = [f"{code:.3f}" for code in study.codes]
        codes = "\n  ".join(["", *(" ".join(values[i : i + 8]) for i in range(0, len(values), 8))])
    return "\n".join([
        study.layer, _facts(study), "",
        f"weights move by {100 * study.weight_error:.2f} %, the output by {100 * study.output_error:.2f} %",
        f"values of a code, times the scale: {codes}", "",
        text_table(["output error of", "layers", "least", "most"], rows),
    ])  # fmt: skip


def study_label(study: Study) -> str:
    """One sentence for those who cannot see the picture of a study."""
    return (
        f"{study.layer} as {study.scheme.label}: {_facts(study)}; a histogram of its weights over "
        f"{len(study.codes)} values, and the error of each layer's output, here {100 * study.output_error:.2f} %."
    )


def _facts(study: Study) -> str:
    rows, columns = study.shape
    facts = f"{study.scheme.label} · {rows:,} x {columns:,} · {format_bytes(study.nbytes)}"
    outliers = f" · {study.outliers} outlier features" if study.scheme.kind == "int8" else ""
    return f"{facts} · {study.bits:.2f} bits a weight{outliers}"


def _draw_histogram(picture: Picture, counts: Sequence[int], codes: Sequence[float], height: float = 92) -> None:
    """Counts of values from -1 to 1, and below it a line for each value of a code."""
    left, room, most = 16, WIDTH - 32, max(counts, default=0) or 1
    width = room / len(counts)
    for i, count in enumerate(counts):
        tall = height * count / most
        picture.box("weights", left + i * width, picture.y + height - tall, width - 0.6, tall, BLUE)
        low, high = (2 * j / len(counts) - 1 for j in (i, i + 1))
        says = f"{count:,} weights lie between {low:.3f} and {high:.3f} of their scale."
        picture.mark(f"bin:{i}", says, left + i * width, picture.y, width, height)
    picture.y += height
    thick = 0.6 if len(codes) > 64 else 1.6
    for code in codes:
        x = left + (code + 1) / 2 * room - thick / 2
        picture.box("values of a code", x, picture.y + 2, thick, 12, GREEN)
    for value in (-1, -0.5, 0, 0.5, 1):
        text = f"{value:g}" if value else "0 x its scale"
        picture.text(left + (value + 1) / 2 * room, picture.y + 21, text, 8, SOFT, "middle")
    picture.y += 30


def _threshold(study: Study) -> float:
    """From what magnitude on inputs are outliers; 0 where none are set apart."""
    return study.scheme.threshold if study.scheme.kind == "int8" else 0.0


def _draw_inputs(picture: Picture, study: Study, height: float = 52) -> None:
    """A column for each feature, or for several, with a line at the threshold."""
    left, threshold = 60.0, _threshold(study)
    most = max([*study.features, 1.05 * threshold, 1e-9])
    few = -(-len(study.features) // 230)  # features that share a column
    columns = [max(study.features[i : i + few]) for i in range(0, len(study.features), few)]
    width = (WIDTH - 16 - left) / len(columns)
    picture.y += 6
    for i, value in enumerate(columns):
        tall, outlier = height * value / most, bool(threshold) and value >= threshold
        place = left + i * width, picture.y + height - tall, 0.8 * width, tall
        picture.box("outlier" if outlier else "inputs", *place, ORANGE if outlier else GREY)
        name = f"Feature {i}" if few == 1 else f"Features {i * few} to {min((i + 1) * few, len(study.features)) - 1}"
        says = f"{name}: inputs up to {value:.2f}{', so multiplied in 16 bit' * outlier}."
        picture.mark(f"feature:{i}", says, left + i * width, picture.y, width, height)
    if threshold:
        y = picture.y + height * (1 - threshold / most)
        picture.line("threshold", [(left, y), (WIDTH - 16, y)], VERMILLION, 1, "4 2")
    for value in (0.0, most):
        picture.text(left - 6, picture.y + height * (1 - value / most), f"{value:.3g}", 8, SOFT, "end")
    picture.y += height + 10


def _draw_columns(picture: Picture, errors: Mapping[str, float], layer: str, height: float = 64) -> None:
    """A column for each layer's error, one of them marked, in percent."""
    left, most = 60, max(errors.values(), default=0) or 1
    width = min((WIDTH - 16 - left) / max(len(errors), 1), 40)
    picture.y += 6
    for i, (name, error) in enumerate(errors.items()):
        tall, x, chosen = height * error / most, left + i * width, name == layer
        colour = ORANGE if chosen else SKY
        picture.box("chosen" if chosen else "layers", x, picture.y + height - tall, 0.8 * width, tall, colour)
        picture.mark(f"layer:{name}", f"{name}: its output moves by {100 * error:.2f} %.", x, picture.y, width, height)
        if chosen:
            text = f"{shorten(name, 260, 9, bold=True)}: {100 * error:.2f} %"
            half = text_width(text, 9, bold=True) / 2
            middle = min(max(x + 0.4 * width, half + 8), WIDTH - half - 8)
            picture.text(middle, picture.y + height + 10, text, 9, anchor="middle", bold=True)
    for error in (0, most):
        y = picture.y + height * (1 - error / most)
        picture.text(left - 6, y, f"{100 * error:.2g} %", 8, SOFT, "end")
    picture.y += height + 22
