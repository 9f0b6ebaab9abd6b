"""`MemoryExplorer`: how much memory a model takes to load, run and train, from its name, URL or folder.

Leaves out: devices (`plan_explorer.py`).
"""

from __future__ import annotations

from collections.abc import Iterable

import ipywidgets as widgets

from ..api import Source, estimate_memory
from ..draw.canvas import estimate_figure, estimate_label, estimate_text, svg
from ..model.estimate import CLASSIC, STORED, MemoryEstimate
from ..units import format_bytes
from ._explorer import LONGEST_REPR, WIDE, Explorer, model_field, number_field, pill, preformatted, short, token_slider

DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "int4")
STORAGES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "nf4", "nf4-double", "fp4", "fp4-double")


class MemoryExplorer(Explorer):
    """Ask how much memory a model takes.

    The controls are `model`, `dtypes`, `stored`, `context` and `batch`; set their `value` in code or by hand.
    `estimate` is the `MemoryEstimate` that is shown, or None if there is none yet.

    Args:
        model: a shipped name, Hub id, Hub URL, timm name or folder; or an `nn.Module` or `ModelSpec`.
        dtypes: rows of the classic table.
        stored: rows of the inference table.
        context, batch: tokens and sequences that cache and activations are counted for.

    >>> explorer = MemoryExplorer("bert-base-cased")
    >>> explorer.model.value = "gpt2"
    >>> explorer
    MemoryExplorer(gpt2, 124.4 M parameters, batch 1, context 2,048: float32 714.89 MiB to run)
    """

    def __init__(
        self,
        model: Source = "bert-base-cased",
        dtypes: Iterable[str] = CLASSIC,
        stored: Iterable[str] = STORED,
        *,
        context: int = 2048,
        batch: int = 1,
    ) -> None:
        self.estimate: MemoryEstimate | None = None
        name = model if isinstance(model, str) else str(getattr(model, "name", type(model).__name__))
        self._given = {name: model}  # a model given as an object is found under its name
        self.model = model_field(name)
        self.dtypes = _choices("Dtypes", DTYPES, dtypes)
        self.stored = _choices("Stored as", STORAGES, stored)
        self.context = token_slider(context, none=False)
        self.batch = number_field(widgets.BoundedIntText, "Batch", value=batch, min=1, max=4096)
        weights, load = [self.dtypes, self.stored], [self.context, self.batch]
        super().__init__([("Model", [self.model]), ("Weights", weights), ("Load", load)], [])

    def compute(self) -> None:
        """Estimate the model that is named."""
        name = self.model.value.strip()
        self.estimate = estimate_memory(
            self._given.get(name, name), self.dtypes.value, stored=self.stored.value,
            context=self.context.value, batch=self.batch.value,
        )  # fmt: skip

    def show(self) -> None:
        """Show the estimate."""
        estimate = self._shown()
        sizes = [f"{row.dtype} {format_bytes(row.total_size, 'classic')}" for row in estimate.rows]
        count = f"{estimate.parameters / 1e6:,.1f} M parameters."
        self.verdict.value = pill("good", count, f"To load: {', '.join(sizes)}." if sizes else "")
        self.picture.value = svg(estimate_figure(estimate), estimate_label(estimate))
        self.text.value = preformatted(estimate_text(estimate))

    def to_code(self) -> str:
        """Python that makes this estimate again."""
        estimate = self._shown()
        return (
            "from bigkit import estimate_memory\n\n"
            f"estimate_memory(\n    {estimate.name!r},\n    dtypes={[row.dtype for row in estimate.rows]!r},\n"
            f"    stored={[row.stored for row in estimate.inference]!r},\n"
            f"    batch={estimate.batch},\n    context={estimate.context},\n)\n"
        )

    def to_json(self) -> str:
        """The estimate as JSON text."""
        return self._shown().to_json()

    def _shown(self) -> MemoryEstimate:
        if self.estimate is None:
            raise ValueError("there is no estimate yet: give the explorer a model that it can find")
        return self.estimate

    def __repr__(self) -> str:
        estimate = getattr(self, "estimate", None)
        if estimate is None:
            return "MemoryExplorer(no estimate yet)"
        text = f"MemoryExplorer({short(estimate.name)}, {estimate.parameters / 1e6:,.1f} M parameters"
        text += f", batch {estimate.batch}, context {estimate.context:,}"
        run = "".join(f": {row.stored} {format_bytes(row.total)} to run" for row in estimate.inference[:1])
        return f"{text}{run if len(text + run) < LONGEST_REPR else ''})"


def _choices(description: str, options: Iterable[str], chosen: Iterable[str]) -> widgets.SelectMultiple:
    options = list(dict.fromkeys([*options, *chosen]))
    return widgets.SelectMultiple(
        options=options, value=tuple(chosen), rows=len(options), description=description, style=WIDE,
        layout=widgets.Layout(width="100%"),
    )  # fmt: skip
