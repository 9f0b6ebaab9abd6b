"""`MemoryExplorer`: how much memory a model takes to load, run and train, from its name, URL or folder.

Leaves out: devices (`plan_explorer.py`).
"""

from __future__ import annotations

from collections.abc import Iterable

import ipywidgets as widgets

from ..api import Source, estimate_memory
from ..draw.estimate import estimate_figure, estimate_text
from ..model.estimate import CLASSIC, STORED, MemoryEstimate, load_text
from ..units import format_bytes, format_count
from ._controls import cache_menu, chosen_cache, field, token_slider
from ._explorer import Explorer
from ._html import pill, short

DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "int4")
STORAGES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "nf4", "nf4-double", "fp4", "fp4-double")


class MemoryExplorer(Explorer):
    """Ask how much memory a model takes.

    The controls are `model`, `dtypes`, `stored`, `context`, `batch` and `kv_dtype`; set their `value` in code or by
    hand. `estimate` is the `MemoryEstimate` that is shown, or None if there is none yet.

    Args:
        model: a shipped name, Hub id, Hub URL, timm name or folder; or an `nn.Module` or `ModelSpec`.
        dtypes: rows of the classic table.
        stored: rows of the inference table.
        context, batch: tokens and sequences that cache and activations are counted for.
        kv_dtype: of keys and values in the cache; None: as the model computes.

    >>> explorer = MemoryExplorer("bert-base-cased")
    >>> explorer.model.value = "gpt2"
    >>> explorer
    MemoryExplorer(gpt2, 124 M parameters, batch 1, context 1,024: float32 594.89 MiB to run)
    """

    missing = "no estimate yet"

    def __init__(
        self,
        model: Source = "bert-base-cased",
        dtypes: Iterable[str] = CLASSIC,
        stored: Iterable[str] = STORED,
        *,
        context: int = 2048,
        batch: int = 1,
        kv_dtype: str | None = None,
    ) -> None:
        super().__init__(
            {
                "Model": {"model": self.model_field(model)},
                "Weights": {
                    "dtypes": _choices("Dtypes", DTYPES, dtypes),
                    "stored": _choices("Stored as", STORAGES, stored),
                },
                "Load": {
                    "context": token_slider(context, none=False),
                    "batch": field(widgets.BoundedIntText, "Batch", batch, min=1, max=4096),
                    "kv_dtype": cache_menu(kv_dtype),
                },
            }
        )

    estimate = property(lambda self: self.result)

    def compute(self) -> MemoryEstimate:
        """Estimate the model that is named."""
        name = self.model.value.strip()
        return estimate_memory(
            self._specs.get(name, name), self.dtypes.value, stored=self.stored.value,
            context=self.context.value, batch=self.batch.value, kv_dtype=chosen_cache(self.kv_dtype),
        )  # fmt: skip

    def show(self, estimate: MemoryEstimate) -> None:
        """Show the estimate."""
        sizes = [f"{row.stored} {format_bytes(row.total)}" for row in estimate.inference]
        said = [
            *([f"To run: {', '.join(sizes)}."] if sizes else []),
            *(note for note in estimate.notes if note[0] != "*"),
        ]
        verdict = pill("good", f"{format_count(estimate.parameters)} parameters.", " ".join(said))
        self.put(verdict, estimate_figure(estimate), estimate_text(estimate))

    def to_code(self) -> str:
        """Python that makes this estimate again."""
        estimate = self.shown
        cache = f"    kv_dtype={estimate.kv_dtype!r},\n" if estimate.kv_dtype else ""
        return (
            "from bigkit import estimate_memory\n\n"
            f"estimate_memory(\n    {estimate.name!r},\n    dtypes={[row.dtype for row in estimate.rows]!r},\n"
            f"    stored={[row.stored for row in estimate.inference]!r},\n"
            f"    batch={estimate.batch},\n    context={self.context.value},\n{cache})\n"
        )

    def summary(self, estimate: MemoryEstimate) -> list[str]:
        """The model, its parameters, the load and, if there is room, what it takes to run."""
        text = f"{short(estimate.name)}, {format_count(estimate.parameters)} parameters"
        text += f", {load_text(estimate.batch, estimate.context, estimate.kv_dtype)}"
        run = [f"{text}: {row.stored} {format_bytes(row.total)} to run" for row in estimate.inference[:1]]
        return [*run, text]


def _choices(description: str, options: Iterable[str], chosen: Iterable[str]) -> widgets.SelectMultiple:
    options = list(dict.fromkeys([*options, *chosen]))
    return field(widgets.SelectMultiple, description, tuple(chosen), options=options, rows=len(options))
