"""`PlanExplorer`: which layer rests on which device, turned with sliders.

Leaves out: time; whether a plan is fast is for the dry run to say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets as widgets

from ..api import Source
from ..devices import Device
from ..draw.plan import plan_figure, plan_text, plan_verdict
from ..machine.hardware import HARDWARE, Hardware
from ..machine.ledger import overhead_of
from ..maps.plan import Plan, PlanError
from ..maps.strategies import STRATEGIES, place
from ..maps.task import read_budgets
from ..model.spec import QUANTIZATIONS
from ..units import GiB, MiB, format_bytes, parse_bytes
from ._controls import cache_menu, chosen_cache, chosen_dtype, dtype_menu, field, menu, token_slider
from ._explorer import Explorer
from ._html import map_table, pill, preformatted, short

NONE = "none"  # in a menu, as AS_STORED is
MOST_GPUS = 16
STEP, FINE = 0.25, 1 / 256  # GiB: of the GPU sliders, and of those for budgets below 2 GiB
DISK = 1024.0  # GiB, where the budgets name none


def _machine(machine: Hardware) -> dict[str, Any]:
    """A machine as values of the controls: sizes rounded down to their steps, and the overhead up."""
    return {
        "sizes": [gpu.memory / GiB // STEP * STEP for gpu in machine.gpus],
        "ram": 0.0 if machine.unified else float(machine.ram // GiB),
        "disk": float(machine.disk // GiB),
        "overhead": math.ceil(machine.overhead / MiB),
    }


def _budgets(max_memory: Mapping[Device, int | str]) -> dict[str, Any]:
    """Budgets as `plan` takes them, as values of the controls."""
    budgets = read_budgets(max_memory)
    gpus = [device for device in budgets if isinstance(device, int)]
    if "mps" in budgets or gpus != list(range(len(gpus))) or len(gpus) > MOST_GPUS:
        raise ValueError(f"an explorer has GPUs 0, 1, ... up to {MOST_GPUS}, RAM and disk, not {list(max_memory)!r}")
    ram, disk = budgets.get("cpu") or 0, budgets["disk"]
    return {
        "sizes": [(budgets[i] or 0) / GiB for i in gpus],
        "ram": ram / GiB,
        "disk": DISK if disk is None else disk / GiB,
        "overhead": 0,
    }


class PlanExplorer(Explorer):
    """Place a model on devices, and see what changes as their sizes do.

    The controls are `model`, `dtype`, `quantization`, `hardware`, `count` and `gpus` (one slider each, in GiB), `ram`,
    `disk`, `overhead` (MiB on each GPU), `strategy`, `context`, `batch` and `kv_dtype`; set their `value` in code or
    by hand. `plan` is the `Plan` that is shown, or None if there is none yet.

    Args:
        model: a shipped name, Hub id, Hub URL, timm name or folder; or an `nn.Module` or `ModelSpec`.
        max_memory: a machine of `bigkit.HARDWARE` by name (None: two RTX 4090), or device -> budget as `plan` takes it.
        dtype, quantization, strategy, context, batch, kv_dtype: as `plan` takes them.
        overhead: bytes that the CUDA context and the allocator take on each GPU; None takes `Hardware.overhead` of the
            machine, and nothing for budgets of your own.

    Raises:
        ValueError: a machine, budget or choice that does not exist. A model that is not found is said in the explorer.

    >>> explorer = PlanExplorer("llama-2-7b", {0: "10GiB", 1: "10GiB"}, dtype="float16")
    >>> explorer.gpus[1].value = 6
    >>> explorer
    PlanExplorer(llama-2-7b float16 auto, fits, 9.4+5.9 of 16.00 GiB)
    >>> explorer.device_map["lm_head"]
    1
    """

    presets = {name: _machine(machine) for name, machine in HARDWARE.items()}
    own = "my own budgets"
    missing = "no plan yet"
    steering = ("count",)

    def __init__(
        self,
        model: Source = "llama-2-7b",
        max_memory: str | Mapping[Device, int | str] | None = None,
        *,
        dtype: str | None = "bfloat16",
        quantization: str | None = None,
        strategy: str = "auto",
        context: int = 4096,
        batch: int = 1,
        overhead: int | str | None = None,
        kv_dtype: str | None = None,
    ) -> None:
        self._cure = ""  # what would make a plan fit that does not
        if isinstance(max_memory, Mapping):
            hardware, start = self.preset_menu("Machine"), _budgets(max_memory)
        else:
            hardware = self.preset_menu("Machine", max_memory or "2 x RTX 4090")
            start = dict(self.presets.get(hardware.value) or self.presets["2 x RTX 4090"])
        if overhead is not None:
            start["overhead"] = parse_bytes(overhead) / MiB

        sizes = start["sizes"]
        self._step = FINE if sizes and max(sizes) < 2 else STEP
        self._sliders: list[widgets.FloatSlider] = []
        self._gpu_box = widgets.VBox(layout=widgets.Layout(width="100%"))
        self._set_gpus(sizes)
        super().__init__(
            {
                "Model": {
                    "model": self.model_field(model),
                    "dtype": dtype_menu(dtype),
                    "quantization": menu("Quantized", [NONE, *QUANTIZATIONS], quantization or NONE),
                },
                "Machine": {
                    "hardware": hardware,
                    "count": field(widgets.IntSlider, "GPUs", len(sizes), min=0, max=MOST_GPUS),
                    "_gpu_box": self._gpu_box,
                    "ram": field(widgets.BoundedFloatText, "RAM, GiB", start["ram"], min=0, max=2**15, step=1),
                    "disk": field(widgets.BoundedFloatText, "Disk, GiB", start["disk"], min=0, max=2**20, step=1),
                    "overhead": field(
                        widgets.BoundedFloatText, "CUDA, MiB", start["overhead"], min=0, max=2**14, step=1
                    ),
                },
                "Plan": {
                    "strategy": menu("Strategy", STRATEGIES, strategy),
                    "context": token_slider(context, none=True),
                    "batch": field(widgets.BoundedIntText, "Batch", batch, min=1, max=4096),
                    "kv_dtype": cache_menu(kv_dtype),
                },
            },
            {
                "Why each boundary stands where it does": lambda: preformatted(self.shown.explain(), wrap=True),
                "Device map": lambda: map_table(self.device_map),
            },
        )
        self.count.observe(self._take_count, "value")
        self._start += [(slider, slider.value) for slider in self._sliders]

    plan = property(lambda self: self.result)
    device_map = property(lambda self: self.shown.device_map)

    # -- the machine

    @property
    def gpus(self) -> tuple[widgets.FloatSlider, ...]:
        """The sliders of the GPUs, in GiB."""
        return tuple(self._sliders[: self.count.value])

    @property
    def machine(self) -> Hardware | None:
        """The machine whose figures the controls show, to their steps."""
        return HARDWARE.get(next(iter(self.fitting()), ""))

    @property
    def max_memory(self) -> dict[Device, int]:
        """The budgets in bytes: those of the machine, or what the controls show."""
        if machine := self.machine:
            return machine.max_memory()
        budgets: dict[Device, int] = {i: round(slider.value * GiB) for i, slider in enumerate(self.gpus)}
        if self.ram.value or not budgets:
            budgets["cpu"] = round(self.ram.value * GiB)
        return {**budgets, "disk": round(self.disk.value * GiB)}

    def _set_gpus(self, sizes: Sequence[float]) -> None:
        """Show one slider for each size, which reaches to twice the largest; those made before are used again."""
        end, digits = max(4.0, 2 * max(sizes, default=0)), ".2f" if self._step == STEP else ".3f"
        for i in range(len(self._sliders), len(sizes)):
            limits = {"min": 0, "max": end, "step": self._step, "readout_format": digits}
            slider = field(widgets.FloatSlider, f"GPU {i}, GiB", sizes[i], **limits)
            slider.continuous_update = True  # a redraw takes less than 50 ms, even of 405 billion parameters
            slider.add_class("bigkit-gpu-slider")
            self._sliders.append(slider)
            self.listen([slider])
        for slider, size in zip(self._sliders, sizes):
            slider.max = max(slider.max, end)
            slider.value = size
        self._gpu_box.children = self._sliders[: len(sizes)]

    def _take_count(self, change: object) -> None:
        sizes = [slider.value for slider in self._sliders[: self.count.value]]
        with self.together():
            self._set_gpus(sizes + [sizes[-1] if sizes else 24.0] * (self.count.value - len(sizes)))
            self._waiting = True

    def setting(self, name: str) -> Any:
        """The value of a control; "sizes" are those of the GPUs."""
        return [slider.value for slider in self.gpus] if name == "sizes" else super().setting(name)

    def turn(self, name: str, value: Any) -> None:
        """Give a control a value, or each GPU its size."""
        if name == "sizes":
            self.count.value = len(value)
            self._set_gpus(value)
        else:
            super().turn(name, value)

    # -- the plan

    def compute(self) -> Plan:
        """Plan with what the controls say; a budget that is too small gives the plan that comes closest."""
        options = {
            "dtype": chosen_dtype(self.dtype),
            "quantization": None if self.quantization.value == NONE else self.quantization.value,
            "batch": self.batch.value, "context": self.context.value,
            "kv_dtype": chosen_cache(self.kv_dtype),
            "overhead": overhead_of(self.machine) if self.machine else round(self.overhead.value * MiB),
        }  # fmt: skip
        try:
            result, self._cure = place(self.spec(), self.max_memory, self.strategy.value, **options), ""
        except PlanError as error:
            result, self._cure = error.plan, error.cure
        return result

    def show(self, plan: Plan) -> None:
        """Show the plan."""
        news = "bad" if not plan.feasible else "slow" if plan.offloaded else "good"
        headline = {"bad": "Does not fit.", "slow": "Fits, offloaded.", "good": "Fits."}[news]
        details = [plan_verdict(plan).partition(", " if plan.feasible else ": ")[2]]
        if plan.longest:
            details.append(f"Longest context here: {plan.longest}")
        sentences = "".join(f"{detail[0].upper()}{detail[1:]}. " for detail in details if detail)
        sentences += " ".join([*plan.notes, self._cure])
        self.put(pill(news, headline, sentences), plan_figure(plan), plan_text(plan))

    def to_code(self) -> str:
        """Python that makes this plan again."""
        return self.shown.to_code()

    def summary(self, plan: Plan) -> list[str]:
        """The model, whether it fits, and what each GPU or all of them hold."""
        away = f"offloads {plan.offloaded / GiB:.1f}" if plan.offloaded else "fits"
        head = f"{short(plan.model)} {plan.stored} {plan.strategy}, {away if plan.feasible else 'does not fit'}, "
        working = [share for share in plan.shares if share.runs]
        tail = f" of {format_bytes(sum(share.budget or 0 for share in working))}"
        loads = [share.used / GiB for share in working]
        forms = ["+".join(f"{load:.{digits}f}" for load in loads) for digits in (1, 0)]
        return [f"{head}{form}{tail}" for form in (*forms, f"{sum(loads):.1f}")]
