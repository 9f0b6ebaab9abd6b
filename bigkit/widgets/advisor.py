"""`Advisor`: which way to store and place a model is fastest on a machine, and what it waits for.

Leaves out: running anything; `DryRunExplorer` rehearses the way that you choose.
"""

from __future__ import annotations

import ipywidgets as widgets

from ..api import Source, describe
from ..draw.advice import advice_figure, advice_label
from ..draw.canvas import svg
from ..machine.hardware import HARDWARE, machine_of
from ..maps.advise import TARGETS, Advice, advise
from ..units import format_bytes
from ._explorer import Explorer, menu, model_field, named, number_field, pill, preformatted, short, token_slider


class Advisor(Explorer):
    """Ask what fits, with controls.

    The controls are `model`, `hardware` (a name in `HARDWARE`), `batch`, `context` and `target`; set their `value` in
    code or by hand. `advice` is what is shown.

    Args:
        model: a shipped name, Hub id, Hub URL, timm name or folder; or an `nn.Module` or `ModelSpec`.
        hardware: a name in `HARDWARE`.
        batch, context: sequences, and tokens of each.
        target: what ranks first: "speed", "quality", "memory" or "context".

    Raises:
        ValueError: a machine or target that does not exist. A model that is not found is said in the explorer.

    >>> advisor = Advisor("llama-2-7b", "1 x RTX 4090")
    >>> advisor.batch.value = 4
    >>> advisor
    Advisor(llama-2-7b on 1 x RTX 4090, 4 x 2,048, best by speed: bfloat16, 160.26 tokens/s)
    """

    def __init__(
        self,
        model: Source = "llama-2-70b",
        hardware: str = "1 x RTX 4090",
        batch: int = 1,
        context: int = 2048,
        target: str = "speed",
    ) -> None:
        self.advice: Advice | None = None
        name, self._specs = named(model)
        self.model = model_field(name)
        self.hardware = menu("Machine", [*HARDWARE], hardware)
        self.batch = number_field(widgets.BoundedIntText, "Batch", value=batch, min=1, max=4096)
        self.context = token_slider(context, none=False)
        self.target = menu("Best by", [*TARGETS], target)
        super().__init__(
            [
                ("Model", [self.model]),
                ("Machine", [self.hardware]),
                ("Load", [self.batch, self.context]),
                ("What counts", [self.target]),
            ],
            [("Plan of the best", self._plan_pane)],
        )

    def compute(self) -> None:
        """Rank the ways for the model and the machine that are named."""
        name = self.model.value.strip()
        if name not in self._specs:
            self._specs[name] = describe(name)
        machine = machine_of(self.hardware.value)
        self.advice = advise(self._specs[name], machine, self.batch.value, self.context.value, self.target.value)

    def show(self) -> None:
        """Show the advice."""
        found = self._shown()
        best = found.best
        if best is None:
            self.verdict.value = pill("bad", "Nothing fits.", found.cures[0] if found.cures else "")
        else:
            away = f", {format_bytes(best.plan.offloaded)} rest elsewhere" if best.plan.offloaded else ""
            said = f"{found.batch / best.token:,.2f} tokens/s, waiting for {best.bottleneck}{away}."
            how = best.plan.quantization or best.plan.dtype
            self.verdict.value = pill("slow" if best.plan.offloaded else "good", f"Store it as {how}.", said)
        self.picture.value = svg(advice_figure(found), advice_label(found))
        self.text.value = preformatted(found.explain())

    def to_code(self) -> str:
        """Python that gives the same advice, and the device map of its best option."""
        found = self._shown()
        return (
            "from bigkit import advise\n\n"
            f"advice = advise({found.model!r}, {found.hardware!r}, batch={found.batch}, context={found.context}, "
            f"target={found.target!r})\nprint(advice)\n"
            "device_map = advice.best.plan.device_map if advice.best else None\n"
        )

    def to_json(self) -> str:
        """The options as JSON text."""
        return self._shown().to_json() + "\n"

    def _shown(self) -> Advice:
        if self.advice is None:
            raise ValueError("there is no advice yet: give the advisor a model that it can find")
        return self.advice

    def _plan_pane(self) -> str:
        best = self._shown().best
        return preformatted(best.plan.explain(), wrap=True) if best else "<p>Nothing fits.</p>"

    def __repr__(self) -> str:
        found = getattr(self, "advice", None)
        if found is None:
            return "Advisor(no advice yet)"
        best = found.best
        how = "nothing fits" if best is None else (
            f"{best.plan.quantization or best.plan.dtype}, {found.batch / best.token:,.2f} tokens/s"
        )  # fmt: skip
        load = f"{found.batch} x {found.context:,}"
        return (
            f"Advisor({short(found.model, 20)} on {short(found.hardware, 16)}, {load}, best by {found.target}: {how})"
        )
