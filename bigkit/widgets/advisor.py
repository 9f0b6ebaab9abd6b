"""`Advisor`: which way to store and place a model is fastest on a machine, and what it waits for.

Leaves out: running anything; `DryRunExplorer` rehearses the way that you choose.
"""

from __future__ import annotations

import ipywidgets as widgets

from ..api import Source
from ..draw.advice import advice_figure
from ..machine.hardware import HARDWARE, machine_of
from ..maps.advise import TARGETS, Advice, advise
from ..model.estimate import load_text
from ..units import format_bytes
from ._controls import cache_menu, chosen_cache, field, menu, token_slider
from ._explorer import Explorer
from ._html import pill, preformatted, short


class Advisor(Explorer):
    """Ask what fits, with controls.

    The controls are `model`, `hardware` (a name in `HARDWARE`), `batch`, `context`, `kv_dtype` and `target`; set their
    `value` in code or by hand. `advice` is what is shown.

    Args:
        model: a shipped name, Hub id, Hub URL, timm name or folder; or an `nn.Module` or `ModelSpec`.
        hardware: a name in `HARDWARE`.
        batch, context: sequences, and tokens of each.
        target: what ranks first: "speed", "quality", "memory" or "context".
        kv_dtype: of keys and values in the cache; None: as the model computes.

    Raises:
        ValueError: a machine or target that does not exist. A model that is not found is said in the explorer.

    >>> advisor = Advisor("llama-2-7b", "1 x RTX 4090")
    >>> advisor.batch.value = 4
    >>> advisor
    Advisor(llama-2-7b on 1 x RTX 4090, batch 4, context 2,048, best by speed: bfloat16, 160 tokens/s)
    """

    missing = "no advice yet"

    def __init__(
        self,
        model: Source = "llama-2-70b",
        hardware: str = "1 x RTX 4090",
        batch: int = 1,
        context: int = 2048,
        target: str = "speed",
        kv_dtype: str | None = None,
    ) -> None:
        super().__init__(
            {
                "Model": {"model": self.model_field(model)},
                "Machine": {"hardware": menu("Machine", [*HARDWARE], hardware)},
                "Load": {
                    "batch": field(widgets.BoundedIntText, "Batch", batch, min=1, max=4096),
                    "context": token_slider(context, none=False),
                    "kv_dtype": cache_menu(kv_dtype),
                },
                "What counts": {"target": menu("Best by", [*TARGETS], target)},
            },
            {"Plan of the best": self._plan_pane},
        )

    advice = property(lambda self: self.result)

    def compute(self) -> Advice:
        """Rank the ways for the model and the machine that are named."""
        machine = machine_of(self.hardware.value)
        load = self.batch.value, self.context.value
        return advise(self.spec(), machine, *load, self.target.value, kv_dtype=chosen_cache(self.kv_dtype))

    def show(self, advice: Advice) -> None:
        """Show the advice."""
        best = advice.best
        if best is None:
            verdict = pill("bad", "Nothing fits.", " ".join([*advice.cures[:1], *advice.notes]))
        else:
            away = f", {format_bytes(best.plan.offloaded)} rest elsewhere" if best.plan.offloaded else ""
            facts = " ".join([f"{best.speed}, waiting for {best.bottleneck}{away}.", *advice.notes])
            verdict = pill("slow" if best.plan.offloaded else "good", f"Store it as {best.plan.stored}.", facts)
        self.put(verdict, advice_figure(advice), advice.explain())

    def to_code(self) -> str:
        """Python that gives the same advice, and the device map of its best option."""
        advice = self.shown
        cache = f", kv_dtype={advice.kv_dtype!r}" if advice.kv_dtype else ""
        return (
            "from bigkit import advise\n\n"
            f"advice = advise({advice.model!r}, {advice.hardware!r}, batch={advice.batch}, context={advice.context}, "
            f"target={advice.target!r}{cache})\nprint(advice)\n"
            "device_map = advice.best.plan.device_map if advice.best else None\n"
        )

    def _plan_pane(self) -> str:
        best = self.shown.best
        return preformatted(best.plan.explain(), wrap=True) if best else "<p>Nothing fits.</p>"

    def summary(self, advice: Advice) -> list[str]:
        """The model, the machine, the load, and the best way."""
        best, way = advice.best, "nothing fits"
        if best is not None:
            way = f"{best.plan.stored}, {best.speed}"
        load = load_text(advice.batch, advice.context, advice.kv_dtype)
        return [f"{short(advice.model, 20)} on {short(advice.hardware, 16)}, {load}, best by {advice.target}: {way}"]
