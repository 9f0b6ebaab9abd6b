"""`QuantizationLab`: what fewer bits do to the weights and outputs of a layer, and to a whole model's perplexity.

Leaves out: the arithmetic (`quantize/study.py`, and notebook 09 by hand).
"""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

import ipywidgets as widgets

from ..draw.canvas import study_figure, study_label, study_text, svg
from ..model.spec import quantized_bytes
from ..quantize.study import BLOCKSIZES, Sample, Scheme, Study, layers_of, planted, study
from ..units import format_bytes, text_table
from ._explorer import LONGEST_REPR, WIDE, Explorer, menu, number_field, pill, preformatted

TOKENS = 256  # of the held-out text, that the layers of the shipped GPT are measured on
SCORED = 2000  # bytes of it that perplexity is measured on: enough to see the order, in a second or two each
OWN = "your own"
PRESETS: dict[str, tuple[str, Scheme]] = {
    "QLoRA: nf4, double": ("", Scheme("nf4", double=True)),
    "nf4": ("", Scheme("nf4")),
    "fp4": ("", Scheme("fp4")),
    "LLM.int8": ("", Scheme("int8")),
    "outliers, treated as all": ("planted outliers", Scheme("int8", threshold=0.0)),
    "outliers, apart": ("planted outliers", Scheme("int8", threshold=6.0)),
}


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

    def __init__(self, layer: str = "transformer.h.0.mlp.c_fc", scheme: Scheme = Scheme()) -> None:
        self.study: Study | None = None
        self.errors: dict[str, float] = {}
        self.preset = menu("Preset", [*PRESETS, OWN], _preset(layer, scheme))
        self.layer = menu("Layer", list(_samples()), layer)
        self.kind = menu("Stored as", ("int8", "nf4", "fp4"), scheme.kind)
        self.blocksize = widgets.SelectionSlider(
            options=BLOCKSIZES, value=scheme.blocksize, description="Block size", continuous_update=False, style=WIDE,
            layout=widgets.Layout(width="100%"),
        )  # fmt: skip
        self.double = widgets.Checkbox(value=scheme.double, description="Double quantization", indent=False)
        self.threshold = number_field(
            widgets.FloatSlider, "Outliers ≥", value=scheme.threshold, min=0.0, max=20.0, step=0.5
        )
        self.steering = (self.preset,)
        self.preset.observe(self._take_preset, "value")
        super().__init__(
            [
                ("Start from", [self.preset]),
                ("Layer", [self.layer]),
                ("Weights", [self.kind]),
                ("4 bit", [self.blocksize, self.double]),
                ("8 bit", [self.threshold]),
            ],
            [("Perplexity", self._perplexity_pane)],
        )

    @property
    def scheme(self) -> Scheme:
        """What the controls ask for."""
        return Scheme(self.kind.value, self.blocksize.value, self.double.value, self.threshold.value)

    def compute(self) -> None:
        """Quantize all layers."""
        found = _studies(_plain(self.scheme))
        self.study, self.errors = found[self.layer.value], {name: made.output_error for name, made in found.items()}
        if self.layer.value != "planted outliers":
            del self.errors["planted outliers"]

    def show(self) -> None:
        """Show the layer that is chosen."""
        made = self._shown()
        whole = format_bytes(2 * made.shape[0] * made.shape[1])
        said = f"{format_bytes(made.nbytes)} instead of {whole} in bfloat16. Its weights move by "
        said += f"{100 * made.weight_error:.2f} %, its output by {100 * made.output_error:.2f} %."
        news = "good" if made.output_error < 0.02 else "slow" if made.output_error < 0.15 else "bad"
        self.verdict.value = pill(news, f"{made.bits:.2f} bits a weight.", said)
        self.picture.value = svg(study_figure(made, self.errors), study_label(made))
        self.text.value = preformatted(study_text(made, self.errors))
        self.preset.value = _preset(made.layer, self.scheme)
        self.blocksize.disabled = self.double.disabled = made.scheme.kind == "int8"
        self.threshold.disabled = made.scheme.kind != "int8"

    def perplexities(self) -> dict[str, float]:
        """How well the shipped GPT foretells held-out text as it is stored in each way: float32 to fp4, and this one.

        Block sizes other than 64 are for single layers: the layers of bitsandbytes have none.
        """
        kinds = ("float32", "bfloat16", "int8", "nf4", "nf4-double", "fp4")
        return {kind: _perplexity(kind) for kind in kinds}

    def to_code(self) -> str:
        """Python that makes this study again."""
        made, scheme = self._shown(), self.scheme
        get = "sample = planted()\n"
        if made.layer != "planted outliers":
            get = (
                "text = torch.tensor([encode(heldout_text())[:256]])\n"
                f"sample = layers_of(load_pygpt(dtype=torch.float32), text)[{made.layer!r}]\n"
            )
        return (
            "import torch\n\nfrom bigkit.quantize.study import Scheme, layers_of, planted, study\n"
            "from bigkit.zoo.gpt import encode, heldout_text, load_pygpt\n\n"
            f"{get}found = study(sample, {scheme!r})\nfound.bits, found.output_error\n"
        )

    def to_json(self) -> str:
        """The study as JSON text, with the output error of every layer."""
        return json.dumps({**self._shown().to_dict(), "output_errors": self.errors}, indent=2) + "\n"

    def _take_preset(self, change: Any) -> None:
        if self.preset.value == OWN:
            return
        layer, scheme = PRESETS[self.preset.value]
        with self.together():
            if layer:
                self.layer.value = layer
            self.kind.value, self.blocksize.value = scheme.kind, scheme.blocksize
            self.double.value, self.threshold.value = scheme.double, scheme.threshold

    def _perplexity_pane(self) -> str:
        rows = []
        for kind, found in self.perplexities().items():
            bits = {"float32": 32.0, "bfloat16": 16.0}.get(kind) or 8 * quantized_bytes((1024, 256), kind, 1024) / 2**18
            rows.append([kind, f"{bits:.2f}", f"{found:.3f}", f"{math.log2(found):.4f}"])
        table = text_table(["stored as", "bits a weight", "perplexity", "bits a byte"], rows)
        return f"<p>The shipped GPT on {SCORED:,} bytes that it has not seen:</p>{preformatted(table)}"

    def _shown(self) -> Study:
        if self.study is None:
            raise ValueError("there is nothing quantized yet: is bitsandbytes installed?")
        return self.study

    def __repr__(self) -> str:
        made = getattr(self, "study", None)
        if made is None:
            return "QuantizationLab(nothing quantized yet)"
        text = f"QuantizationLab({made.layer}, {made.scheme.label}: {made.bits:.2f} bits"
        error = f", output error {100 * made.output_error:.1f} %"
        return f"{text}{error if len(text + error) < LONGEST_REPR else ''})"


def _preset(layer: str, scheme: Scheme) -> str:
    """The preset that this is, one for this very layer before one for any, or `OWN`."""
    found = [name for at in (layer, "") for name, preset in PRESETS.items() if preset == (at, _plain(scheme))]
    return found[0] if found else OWN


def _plain(scheme: Scheme) -> Scheme:
    """The scheme without what does not act."""
    if scheme.kind == "int8":
        return Scheme("int8", threshold=scheme.threshold)
    return Scheme(scheme.kind, scheme.blocksize, scheme.double)


@cache
def _samples() -> dict[str, Sample]:
    import torch

    from ..zoo.gpt import encode, heldout_text, load_pygpt

    text = torch.tensor([encode(heldout_text())[:TOKENS]])
    found = layers_of(load_pygpt(dtype=torch.float32), text)
    made = planted()
    return {**{name: sample for name, sample in found.items() if name != "lm_head"}, made.name: made}


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
