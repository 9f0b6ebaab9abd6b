"""`PlanExplorer`: which layer rests on which device, turned with sliders.

Leaves out: time; whether a plan is fast is for the dry run to say.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import ipywidgets as widgets

from ..api import Source, describe
from ..devices import Device, device_label
from ..draw.canvas import plan_figure, plan_label, plan_text, plan_verdict, svg
from ..machine.hardware import CONTEXT_BYTES, HARDWARE
from ..maps.plan import Plan
from ..maps.strategies import STRATEGIES, PlanError, place, read_budgets
from ..model.spec import QUANTIZATIONS
from ..units import GiB, MiB, dtype_name, parse_bytes
from ._explorer import (
    AS_STORED,
    DTYPES,
    LONGEST_REPR,
    Explorer,
    menu,
    model_field,
    named,
    number_field,
    pill,
    preformatted,
    short,
    token_slider,
)

NONE = "none"  # in a menu, as AS_STORED is
OWN = "my own budgets"
MOST_GPUS = 16
STEP, FINE = 0.25, 1 / 256  # GiB: of the GPU sliders, and of those for budgets below 2 GiB
ENDS = (4.0, 16.0, 32.0, 64.0, 128.0, 192.0)  # GiB: a slider reaches to the first that is twice its size, or the last
DISK = 1024.0  # GiB, where the budgets name none


class PlanExplorer(Explorer):
    """Place a model on devices, and see what changes as their sizes do.

    The controls are `model`, `dtype`, `quantization`, `hardware`, `count` and `gpus` (one slider each, in GiB), `ram`,
    `disk`, `overhead` (MiB on each GPU), `strategy`, `context` and `batch`; set their `value` in code or by hand.
    `plan` is the `Plan` that is shown, or None if there is none yet.

    Args:
        model: a shipped name, Hub id, Hub URL, timm name or folder; or an `nn.Module` or `ModelSpec`.
        max_memory: a machine of `bigkit.HARDWARE` by name (None: two RTX 4090), or device -> budget as `plan` takes it.
        dtype, quantization, strategy, context, batch: as `plan` takes them.
        overhead: bytes that the runtime takes on each GPU; None counts a CUDA context on the machines of `HARDWARE`,
            and nothing for budgets of your own.

    Raises:
        ValueError: a machine, budget or choice that does not exist. A model that is not found is said in the explorer.

    >>> explorer = PlanExplorer("llama-2-7b", {0: "10GiB", 1: "10GiB"}, dtype="float16")
    >>> explorer.gpus[1].value = 6
    >>> explorer
    PlanExplorer(llama-2-7b float16 auto, fits, 9.4+5.9 of 16.00 GiB)
    >>> explorer.device_map["lm_head"]
    1
    """

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
    ) -> None:
        self.plan: Plan | None = None
        self._cure = ""
        name, self._specs = named(model)

        preset = "2 x RTX 4090" if max_memory is None else max_memory if isinstance(max_memory, str) else OWN
        sizes, ram, disk = _budgets(max_memory) if isinstance(max_memory, Mapping) else _machine(preset)
        if overhead is None:
            overhead = 0 if preset == OWN else CONTEXT_BYTES

        self.model = model_field(name)
        self.dtype = menu("Dtype", DTYPES, AS_STORED if dtype is None else dtype_name(dtype))
        self.quantization = menu("Quantized", [NONE, *QUANTIZATIONS], quantization or NONE)
        self.hardware = menu("Machine", [*HARDWARE, OWN], preset)
        self.count = number_field(widgets.IntSlider, "GPUs", value=len(sizes), min=0, max=MOST_GPUS)
        self._sliders: list[widgets.FloatSlider] = []
        self._gpu_box = widgets.VBox(layout=widgets.Layout(width="100%"))
        self.ram = number_field(widgets.BoundedFloatText, "RAM, GiB", value=ram, min=0, max=2.0**15, step=1)
        self.disk = number_field(widgets.BoundedFloatText, "Disk, GiB", value=disk, min=0, max=2.0**20, step=1)
        self.overhead = number_field(
            widgets.BoundedFloatText, "CUDA, MiB", value=parse_bytes(overhead) / MiB, min=0, max=2.0**14, step=1
        )
        self.strategy = menu("Strategy", STRATEGIES, strategy)
        self.context = token_slider(context, none=True)
        self.batch = number_field(widgets.BoundedIntText, "Batch", value=batch, min=1, max=4096)
        self._step = FINE if sizes and max(sizes) < 2 else STEP
        self._set_gpus(sizes)
        self.steering = (self.hardware, self.count)
        self.hardware.observe(self._take_machine, "value")
        self.count.observe(self._take_count, "value")

        machine = [self.hardware, self.count, self._gpu_box, self.ram, self.disk, self.overhead]
        super().__init__(
            [
                ("Model", [self.model, self.dtype, self.quantization]),
                ("Machine", machine),
                ("Plan", [self.strategy, self.context, self.batch]),
            ],
            [("Why each boundary stands where it does", self._story_pane), ("Device map", self._map_pane)],
        )
        self._start += [(slider, slider.value) for slider in self._sliders]

    # -- the machine

    @property
    def gpus(self) -> tuple[widgets.FloatSlider, ...]:
        """The sliders of the GPUs, in GiB."""
        return tuple(self._sliders[: self.count.value])

    @property
    def max_memory(self) -> dict[Device, int]:
        """The budgets that the controls show, in bytes."""
        budgets: dict[Device, int] = {i: round(slider.value * GiB) for i, slider in enumerate(self.gpus)}
        if self.ram.value or not budgets:
            budgets["cpu"] = round(self.ram.value * GiB)
        return {**budgets, "disk": round(self.disk.value * GiB)}

    def _set_gpus(self, sizes: Sequence[float]) -> None:
        """Show one slider for each size; those made before are used again."""
        end = next((end for end in ENDS if end >= 2 * max(sizes, default=0)), ENDS[-1])
        for i in range(len(self._sliders), len(sizes)):
            slider = number_field(
                widgets.FloatSlider, f"GPU {i}, GiB", value=sizes[i], min=0, max=max(end, *sizes), step=self._step,
                readout_format=".2f" if self._step == STEP else ".3f",
            )  # fmt: skip
            slider.continuous_update = True  # a redraw takes less than 50 ms, even of 405 billion parameters
            slider.add_class("bigkit-gpu-slider")
            self._sliders.append(slider)
            self.listen([slider])
        for slider, size in zip(self._sliders, sizes):
            slider.max = max(slider.max, end, size)
            slider.value = size
        self._gpu_box.children = self._sliders[: len(sizes)]

    def _take_machine(self, change: object) -> None:
        if self.hardware.value == OWN:
            return
        sizes, ram, disk = _machine(self.hardware.value)
        with self.together():
            self.count.value = len(sizes)
            self._set_gpus(sizes)
            self.ram.value, self.disk.value = ram, disk

    def _take_count(self, change: object) -> None:
        sizes = [slider.value for slider in self._sliders[: self.count.value]]
        with self.together():
            self._set_gpus(sizes + [sizes[-1] if sizes else 24.0] * (self.count.value - len(sizes)))
            self._waiting = True

    def _name_machine(self) -> None:
        """Let the menu name the machine that the budgets make."""
        shown = ([slider.value for slider in self.gpus], self.ram.value, self.disk.value)
        with self.together():
            self.hardware.value = next((name for name in HARDWARE if _machine(name) == shown), OWN)
            self._waiting = False

    # -- the plan

    def compute(self) -> None:
        """Plan with what the controls say; a budget that is too small gives the plan that comes closest."""
        name = self.model.value.strip()
        if name not in self._specs:
            self._specs[name] = describe(name)
        options = {
            "dtype": None if self.dtype.value == AS_STORED else self.dtype.value,
            "quantization": None if self.quantization.value == NONE else self.quantization.value,
            "batch": self.batch.value, "context": self.context.value, "overhead": round(self.overhead.value * MiB),
        }  # fmt: skip
        try:
            found, cure = place(self._specs[name], self.max_memory, self.strategy.value, **options), ""
        except PlanError as error:
            found, cure = error.plan, error.cure
        self.plan, self._cure = found, cure

    def show(self) -> None:
        """Show the plan."""
        found = self._shown()
        self._name_machine()
        news = "bad" if not found.feasible else "slow" if found.offloaded else "good"
        headline = {"bad": "Does not fit.", "slow": "Fits, offloaded.", "good": "Fits."}[news]
        details = [plan_verdict(found).partition(", " if found.feasible else ": ")[2]]
        if found.max_context is not None:
            details.append(f"Longest context here: {found.max_context:,} tokens")
        sentences = "".join(f"{detail[0].upper()}{detail[1:]}. " for detail in details if detail)
        self.verdict.value = pill(news, headline, sentences + self._cure)
        self.picture.value = svg(plan_figure(found), plan_label(found))
        self.text.value = preformatted(plan_text(found))

    @property
    def device_map(self) -> dict[str, Device]:
        """Module name -> device, of the plan that is shown."""
        return self._shown().device_map

    def to_code(self) -> str:
        """Python that makes this plan again."""
        return self._shown().to_code()

    def to_json(self) -> str:
        """The plan as JSON text."""
        return self._shown().to_json()

    def _shown(self) -> Plan:
        if self.plan is None:
            raise ValueError("there is no plan yet: give the explorer a model that it can find")
        return self.plan

    def _story_pane(self) -> str:
        return preformatted(self._shown().explain(), wrap=True)

    def _map_pane(self) -> str:
        cells = "".join(
            f"<tr><td>{html.escape(name) or 'the whole model'}</td><td>{html.escape(repr(device))}</td>"
            f"<td>{device_label(device)}</td></tr>"
            for name, device in self.device_map.items()
        )
        table = f"<table><tr><th>module</th><th>device</th><th></th></tr>{cells}</table>"
        return f'<div style="max-height:300px;overflow:auto;line-height:1.2" tabindex="0">{table}</div>'

    def __repr__(self) -> str:
        found = getattr(self, "plan", None)
        if found is None:
            return "PlanExplorer(no plan yet)"
        stored = found.quantization or found.dtype or "as stored"
        away = f"offloads {found.offloaded / GiB:.1f}" if found.offloaded else "fits"
        verdict = away if found.feasible else "does not fit"
        head = f"PlanExplorer({short(found.model)} {stored} {found.strategy}, {verdict}, "
        working = [share for share in found.shares if share.runs]
        tail = f" of {sum(share.budget or 0 for share in working) / GiB:.2f} GiB)"
        loads = [share.used / GiB for share in working]
        forms = [head + "+".join(f"{load:.{digits}f}" for load in loads) + tail for digits in (1, 0)]
        return next((text for text in forms if len(text) <= LONGEST_REPR), f"{head}{sum(loads):.1f}{tail}")


def _machine(name: str) -> tuple[list[float], float, float]:
    """GiB of each GPU, RAM and disk of a machine, rounded down to the steps of the controls."""
    if name not in HARDWARE:
        known = ", ".join(map(repr, HARDWARE))
        raise ValueError(f"unknown machine {name!r}: expected one of {known}, or a dict of device -> budget")
    machine = HARDWARE[name]
    sizes = [gpu.memory / GiB // STEP * STEP for gpu in machine.gpus]
    return sizes, float(machine.ram // GiB), float(machine.disk // GiB)


def _budgets(max_memory: Mapping[Device, int | str]) -> tuple[list[float], float, float]:
    """GiB of each GPU, RAM and disk of budgets as `plan` takes them."""
    budgets = read_budgets(max_memory)
    gpus = [device for device in budgets if isinstance(device, int)]
    if "mps" in budgets or gpus != list(range(len(gpus))) or len(gpus) > MOST_GPUS:
        raise ValueError(f"an explorer has GPUs 0, 1, ... up to {MOST_GPUS}, RAM and disk, not {list(max_memory)!r}")
    ram, disk = budgets.get("cpu") or 0, budgets["disk"]
    return [(budgets[i] or 0) / GiB for i in gpus], ram / GiB, DISK if disk is None else disk / GiB
