"""`FitExplorer`: which model, which machine: does it fit, and how fast is it?

Leaves out: which layer rests where (`plan_explorer.py`), and a rehearsal (`dryrun_explorer.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ipywidgets as widgets

from ..api import Source, estimate_memory
from ..draw.advice import advice_figure
from ..machine.hardware import GPUS, HARDWARE, UNIFIED, Hardware, machine_of, variant
from ..maps.advise import TARGETS, Advice, advise
from ..model.estimate import load_text
from ..units import GiB, MiB, format_bytes
from ._controls import cache_menu, chosen, field, menu, token_slider
from ._explorer import Explorer
from ._html import pill, preformatted, short

NO_GPU = "none"
KINDS = {  # what the menu of GPUs offers -> a machine with it
    NO_GPU: HARDWARE["laptop, no GPU"],
    **{name: machine_of(name) for name in GPUS},
    **{shared.gpus[0].name: shared for shared in UNIFIED},
}


def _figures(machine: Hardware) -> dict[str, Any]:
    """A machine as values of the controls."""
    gpu = machine.gpus[0] if machine.gpus else None
    return {
        "gpu": gpu.name if gpu else NO_GPU,
        "count": len(machine.gpus),
        "memory": round(gpu.memory / GiB, 2) if gpu else 0.0,
        "ram": round(machine.ram / GiB, 2),
    }


def _bytes(gib: float, exact: Iterable[int]) -> int:
    """The bytes that a control shows with two digits."""
    return next((size for size in exact if round(size / GiB, 2) == gib), round(gib * 1024) * MiB)


class FitExplorer(Explorer):
    """Ask whether a model fits on a machine, in which form, and how fast it is there.

    The controls are `model`; `hardware` (a machine of the menu), or your own: `gpu` (the kind, whose speed counts),
    `count`, `memory` and `ram` (GiB); `context`, `batch`, `kv_dtype`; and `target` (what ranks first). Set their
    `value` in code or by hand. `advice` is what is shown, or None if there is none yet.

    Args:
        model: a shipped name, Hub id, Hub URL, timm name or folder; or an `nn.Module` or `ModelSpec`.
        hardware: a machine, or its name as `bigkit.advise` reads it ("4090", "2 x H100", "24GB, 128GiB RAM"); None for
            this machine.
        context, batch: tokens of each sequence, and sequences.
        target: what ranks first: "speed", "quality", "memory" or "context".
        kv_dtype: of keys and values in the cache; None: as the model computes.

    Raises:
        ValueError: a machine or target that does not exist. A model that is not found is said in the explorer.

    >>> explorer = FitExplorer("llama-2-7b", "RTX 4090")
    >>> explorer.batch.value = 4
    >>> explorer
    FitExplorer(llama-2-7b on 1 x RTX 4090, batch 4, context 2,048: fits, 160 tokens/s as bfloat16)
    """

    missing = "no advice yet"
    presets = {name: _figures(machine) for name, machine in HARDWARE.items()}
    own = "my own machine"

    def __init__(
        self,
        model: Source = "llama-3.1-8b",
        hardware: Hardware | str | None = "1 x RTX 4090",
        *,
        context: int = 2048,
        batch: int = 1,
        target: str = "speed",
        kv_dtype: str | None = None,
    ) -> None:
        given = machine_of(hardware)
        figures = _figures(given)
        self._machines, self._kinds = {**HARDWARE, given.name: given}, {figures["gpu"]: given, **KINDS}
        self.presets = {**self.presets, given.name: figures}
        sized = {"min": 0, "max": 2**15, "step": 1}
        named = self.model_field(model)
        self._objects = {**self._specs}  # what was not given by name
        super().__init__(
            {
                "Model": {"model": named},
                "Machine": {
                    "hardware": self.preset_menu("Machine", given.name),
                    "gpu": menu("GPU", [*self._kinds], figures["gpu"]),
                    "count": field(widgets.BoundedIntText, "Count", figures["count"], min=0, max=999),
                    "memory": field(widgets.BoundedFloatText, "GiB each", figures["memory"], **sized),
                    "ram": field(widgets.BoundedFloatText, "RAM, GiB", figures["ram"], **sized),
                },
                "Load": {
                    "context": token_slider(context, none=False),
                    "batch": field(widgets.BoundedIntText, "Batch", batch, min=1, max=4096, tip="Sequences at once"),
                    "kv_dtype": cache_menu(kv_dtype),
                },
                "What counts": {"target": menu("Best by", [*TARGETS], target, "What ranks first in the picture")},
            },
            {
                "Plan of the best": lambda: preformatted(self.shown.ways[0][0].explain(), wrap=True),
                "Memory to load, run and train": self._memory_pane,
            },
        )
        self.gpu.observe(self._take_gpu, "value")
        self.ram.observe(self._take_ram, "value")

    advice = property(lambda self: self.result)

    @property
    def machine(self) -> Hardware:
        """The machine that the controls describe."""
        if name := next(iter(self.fitting()), None):
            return self._machines[name]
        base = self._kinds[self.gpu.value if self.count.value else NO_GPU]
        sizes = [gpu.memory for machine in (base, *self._machines.values()) for gpu in machine.gpus[:1]]
        memory = _bytes(self.memory.value, sizes) if base.gpus else None
        made = variant(base, self.count.value if base.gpus else None, memory, _bytes(self.ram.value, [base.ram]))
        if made.unified and _figures(made)["memory"] != self.memory.value:
            raise ValueError(f"{base.name} has one memory, of which its GPU keeps a part: turn its RAM")
        return made

    def _take_gpu(self, change: object) -> None:
        """Another kind of GPU brings its own memory; a machine with one memory for all brings everything."""
        base = self._kinds[self.gpu.value]
        figures = _figures(base)
        if self.preset.value not in self.fitting():
            with self.following():
                for name in ("memory", "count", "ram") if base.unified or not base.gpus else ("memory",):
                    self.turn(name, figures[name])
                self.count.value = self.count.value or figures["count"]

    def _take_ram(self, change: object) -> None:
        """Of a memory that is shared the GPU keeps its part."""
        base = self._kinds[self.gpu.value]
        if base.unified:
            with self.following():
                self.memory.value = _figures(variant(base, ram=_bytes(self.ram.value, [base.ram])))["memory"]

    def compute(self) -> Advice:
        load = self.batch.value, self.context.value
        return advise(self.spec(), self.machine, *load, self.target.value, kv_dtype=chosen(self.kv_dtype))

    def show(self, advice: Advice) -> None:
        best = advice.best
        news = "bad" if best is None else "slow" if best.plan.offloaded else "good"
        facts = [best.reason] if best else advice.cures[:1]
        verdict = pill(news, advice.verdict, " ".join([*facts, *advice.notes]))
        self.put(verdict, advice_figure(advice), advice.explain())

    def to_code(self) -> str:
        advice = self.shown
        cache = f", kv_dtype={advice.kv_dtype!r}" if advice.kv_dtype else ""
        where = "" if advice.hardware.startswith("this machine") else f", {advice.hardware!r}"
        return (
            "from bigkit import advise\n\n"
            f"advice = advise({advice.model!r}{where}, batch={advice.batch}, "
            f"context={self.context.value}, target={advice.target!r}{cache})\nprint(advice)\n"
            "device_map = advice.best.plan.device_map if advice.best else None\n"
        )

    def tell(self, key: str) -> str:
        """The plan of the way that a mark stands for."""
        told = (plan.explain() for plan, _ in self.shown.ways if f"{key}:".startswith(f"way:{plan.stored}:"))
        return next((preformatted(text, wrap=True) for text in told), "")

    def differences(self, old: Advice, new: Advice) -> list[str]:
        """How two advices differ: the verdict, then each way that both have."""
        said = [] if old.verdict == new.verdict else [f"{old.verdict} Now: {new.verdict}"]
        before = {option.label: f"{option.speed}, {format_bytes(option.memory)}" for option in old.options}
        for option in new.options:
            now = f"{option.speed}, {format_bytes(option.memory)}"
            if before.get(option.label, now) != now:
                said.append(f"{option.label}: {before[option.label]}; now {now}.")
        return said

    def _memory_pane(self) -> str:
        name, advice = self.model.value.strip(), self.shown
        load = {"batch": advice.batch, "context": self.context.value, "kv_dtype": advice.kv_dtype}
        return estimate_memory(self._objects.get(name, name), **load)._repr_html_()

    def summary(self, advice: Advice) -> list[str]:
        """The model, the machine, the load, and the best way."""
        best, load = advice.best, load_text(advice.batch, advice.context, advice.kv_dtype)
        asked = f"{short(advice.model, 20)} on {short(advice.hardware, 16)}"
        if best is None:
            return [f"{asked}, {load}: does not fit"]
        way = f"{best.pace} as {best.label.removesuffix(' as stored')}"
        says, fits = f"{best.fit[0].lower()}{best.fit[1:]}, {way}", f"fits, {way}"
        fits = f"fits offloaded, {way}" if best.plan.offloaded else fits
        return [f"{asked}, {load}: {says}", f"{asked}: {says}", f"{asked}, {load}: {fits}", f"{asked}: {fits}"]
