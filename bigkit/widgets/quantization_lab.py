"""`QuantizationLab`: what fewer bits do to the weights and outputs of a layer, and to a whole model's perplexity.

Leaves out: the arithmetic (`quantize/study.py`, and notebook 09 by hand).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import ipywidgets as widgets

from ..draw.study import study_figure, study_text
from ..model.precision import quantized_bytes
from ..quantize.study import BLOCKSIZES, Sample, Scheme, Study, layers_of, planted, study
from ..units import format_bytes, text_table
from ._controls import field, menu
from ._explorer import Explorer
from ._html import pill, preformatted

TOKENS = 256  # of the held-out text, that the layers of the shipped GPT are measured on
SCORED = 2000  # bytes of it that perplexity is measured on: enough to see the order, in a second or two each
PLANTED = "planted outliers"
PRESETS = {  # only the controls that act
    "QLoRA: nf4, double": {"kind": "nf4", "blocksize": 64, "double": True},
    "nf4": {"kind": "nf4", "blocksize": 64, "double": False},
    "fp4": {"kind": "fp4", "blocksize": 64, "double": False},
    "LLM.int8": {"kind": "int8", "threshold": 6.0},
    "outliers, treated as all": {"layer": PLANTED, "kind": "int8", "threshold": 0.0},
    "outliers, apart": {"layer": PLANTED, "kind": "int8", "threshold": 6.0},
}


class Studies(NamedTuple):
    """The layer that is chosen, and the relative error of every layer's output."""

    study: Study
    errors: dict[str, float]


class QuantizationLab(Explorer):
    """Trade bits for error, on the layers of the shipped GPT and on one with planted outliers.

    The controls are `preset`, `layer`, `kind` ("int8", "nf4", "fp4"), `blocksize`, `double` and `threshold`; set their
    `value` in code or by hand. `study` is the `Study` that is shown, `errors` the output error of every layer.

    Args:
        layer: name of a layer of the shipped GPT, or "planted outliers".
        scheme: how it is quantized.

    Raises:
        ValueError: there is no such layer.

    >>> lab = QuantizationLab()
    >>> lab.kind.value = "fp4"
    >>> lab
    QuantizationLab(transformer.h.0.mlp.c_fc, fp4, blocks of 64: 4.50 bits, output error 4.8 %)
    """

    presets = PRESETS
    missing = "nothing quantized yet"
    cure = "is bitsandbytes installed?"

    def __init__(self, layer: str = "transformer.h.0.mlp.c_fc", scheme: Scheme = Scheme()) -> None:
        super().__init__(
            {
                "Start from": {"preset": self.preset_menu("Preset")},
                "Layer": {"layer": menu("Layer", [*_samples()], layer)},
                "Weights": {"kind": menu("Stored as", ("int8", "nf4", "fp4"), scheme.kind)},
                "4 bit": {
                    "blocksize": menu("Block size", BLOCKSIZES, scheme.blocksize),
                    "double": field(widgets.Checkbox, "Double quantization", scheme.double, indent=False),
                },
                "8 bit": {
                    "threshold": field(widgets.FloatSlider, "Outliers ≥", scheme.threshold, min=0, max=20, step=0.5),
                },
            },
            {"Perplexity": self._perplexity_pane},
        )

    study = property(lambda self: self.result and self.result.study)
    errors = property(lambda self: self.shown.errors)

    @property
    def scheme(self) -> Scheme:
        """What the controls ask for."""
        return Scheme(self.kind.value, self.blocksize.value, self.double.value, self.threshold.value)

    def compute(self) -> Studies:
        studies, layer = _studies(_acting(self.scheme)), self.layer.value
        names = [name for name in studies if name != PLANTED or layer == PLANTED]
        return Studies(studies[layer], {name: studies[name].output_error for name in names})

    def show(self, studies: Studies) -> None:
        study, errors = studies
        whole = format_bytes(2 * study.shape[0] * study.shape[1])
        facts = f"{format_bytes(study.nbytes)} instead of {whole} in bfloat16. Its weights move by "
        facts += f"{100 * study.weight_error:.2f} %, its output by {100 * study.output_error:.2f} %."
        news = "good" if study.output_error < 0.02 else "slow" if study.output_error < 0.15 else "bad"
        verdict = pill(news, f"{study.bits:.2f} bits a weight.", facts)
        self.put(verdict, study_figure(study, errors), study_text(study, errors))
        self.blocksize.disabled = self.double.disabled = study.scheme.kind == "int8"
        self.threshold.disabled = study.scheme.kind != "int8"

    def click(self, key: str) -> None:
        """A column of a layer shows that layer."""
        if key.startswith("layer:"):
            self.layer.value = key.removeprefix("layer:")

    def perplexities(self) -> dict[str, float]:
        """How well the shipped GPT predicts held-out text, stored in each way from float32 to fp4.

        Block sizes other than 64 are for single layers: the layers of bitsandbytes have none.
        """
        kinds = ("float32", "bfloat16", "int8", "nf4", "nf4-double", "fp4")
        return {kind: _perplexity(kind) for kind in kinds}

    def to_code(self) -> str:
        layer = self.shown.study.layer
        sample = "sample = planted()\n"
        if layer != PLANTED:
            sample = (
                "text = torch.tensor([encode(heldout_text())[:256]])\n"
                f"sample = layers_of(load_pygpt(dtype=torch.float32), text)[{layer!r}]\n"
            )
        return (
            "import torch\n\nfrom bigkit.quantize.study import Scheme, layers_of, planted, study\n"
            "from bigkit.zoo.gpt import encode, heldout_text, load_pygpt\n\n"
            f"{sample}found = study(sample, {self.scheme!r})\nfound.bits, found.output_error\n"
        )

    def content(self) -> dict[str, Any]:
        return {**self.shown.study.to_dict(), "output_errors": self.errors}

    def _perplexity_pane(self) -> str:
        rows = []
        for kind, value in self.perplexities().items():
            bits = {"float32": 32.0, "bfloat16": 16.0}.get(kind) or 8 * quantized_bytes((1024, 256), kind, 1024) / 2**18
            rows.append([kind, f"{bits:.2f}", f"{value:.3f}", f"{math.log2(value):.4f}"])
        table = text_table(["stored as", "bits a weight", "perplexity", "bits a byte"], rows)
        return f"<p>The shipped GPT on {SCORED:,} bytes that it has not seen:</p>{preformatted(table)}"

    def summary(self, studies: Studies) -> list[str]:
        """The layer, how it is stored and, if there is room, the error of its output."""
        study = studies.study
        text = f"{study.layer}, {study.scheme.label}: {study.bits:.2f} bits"
        return [f"{text}, output error {100 * study.output_error:.1f} %", text]


def _acting(scheme: Scheme) -> Scheme:
    """The scheme without what does not act."""
    if scheme.kind == "int8":
        return Scheme("int8", threshold=scheme.threshold)
    return Scheme(scheme.kind, scheme.blocksize, scheme.double)


@cache
def _samples() -> dict[str, Sample]:
    import torch

    from ..zoo.gpt import encode, heldout_text, load_pygpt

    text = torch.tensor([encode(heldout_text())[:TOKENS]])
    samples = layers_of(load_pygpt(dtype=torch.float32), text)
    del samples["lm_head"]
    return {**samples, PLANTED: planted()}


@cache
def _studies(scheme: Scheme) -> dict[str, Study]:
    return {name: study(sample, scheme) for name, sample in _samples().items()}


@cache
def _perplexity(kind: str) -> float:
    import torch

    from ..quantize.load import BnbQuantizationConfig, load_and_quantize_model
    from ..zoo.gpt import heldout_text, load_pygpt, perplexity

    text = heldout_text()[:SCORED]
    if kind in ("float32", "bfloat16"):
        return perplexity(load_pygpt(dtype=getattr(torch, kind)), text)
    name, _, double = kind.partition("-")
    eight = name == "int8"
    config = BnbQuantizationConfig(
        load_in_8bit=eight, load_in_4bit=not eight, bnb_4bit_quant_type="nf4" if eight else name,
        bnb_4bit_use_double_quant=bool(double), bnb_4bit_compute_dtype="float32", torch_dtype="float32",
    )  # fmt: skip
    return perplexity(load_and_quantize_model(load_pygpt(), config, device_map={"": "cpu"}), text)
