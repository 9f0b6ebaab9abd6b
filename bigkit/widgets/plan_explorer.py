"""`PlanExplorer`: which layer rests on which device, turned with sliders, and dragged from one to another.

Leaves out: time, but for a first estimate; the dry run says more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import ipywidgets as widgets

from ..api import Source
from ..devices import Device
from ..draw.hosts import hosts_differences, hosts_figure, hosts_text
from ..draw.plan import moved, plan_differences, plan_figure, plan_text, plan_verdict, share_text
from ..machine.hardware import HARDWARE, Hardware, machine_of
from ..machine.ledger import overhead_of
from ..machine.network import NETWORKS
from ..maps.hosts import HostsPlan, plan_hosts, read_hosts
from ..maps.plan import Plan, PlanError
from ..maps.predict import predict
from ..maps.strategies import STRATEGIES, place
from ..maps.task import read_budgets
from ..model.spec import QUANTIZATIONS
from ..units import GiB, MiB, counted, format_bytes, listed, parse_bytes, three_figures
from ._controls import NONE, cache_menu, chosen, dtype_menu, field, menu, token_slider
from ._explorer import Explorer, _button
from ._html import device_table, map_table, pill, preformatted, short

CUSTOM = "custom"  # in the menu of strategies: the map that was dragged
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

    A layer or a boundary of the picture can be dragged to another device (`drag`): the plan is then a map of your own,
    checked and measured, also where it is over a budget. `planner` goes back to the strategy.

    `hosts` names machines, as in "RTX 4090 | 2 x L4", or "2 hosts" such as the machine that is shown: `plan` is then a
    `HostsPlan`, a process on each of them, with `network` between.

    Args:
        model: a shipped name, Hub id, Hub URL, timm name or folder; or an `nn.Module` or `ModelSpec`.
        max_memory: a machine by its name (None: two RTX 4090), or device -> budget, as `plan` takes them.
        dtype, quantization, strategy, context, batch, kv_dtype: as `plan` takes them.
        overhead: bytes that the CUDA context and the allocator take on each GPU; None takes `Hardware.overhead` of the
            machine, and nothing for budgets of your own.
        hosts, network: as `plan_hosts` takes them; the name of a network.

    Raises:
        ValueError: a machine, budget or choice that does not exist. A model that is not found is said in the explorer.

    >>> explorer = PlanExplorer("llama-2-7b", {0: "10GiB", 1: "10GiB"}, dtype="float16")
    >>> explorer.gpus[1].value = 6
    >>> explorer
    PlanExplorer(llama-2-7b float16 auto, fits, 9.4+5.9 of 16.00 GiB)
    >>> explorer.device_map["lm_head"]
    1
    >>> explorer.drag("layer:1", "device:1")
    >>> explorer.device_map["model.layers.0"], explorer.strategy.value
    (1, 'custom')
    """

    presets = {name: _machine(machine) for name, machine in HARDWARE.items()}
    own = "my own budgets"
    missing = "no plan yet"
    steering = ("count", "planner_button")
    draggable = True

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
        hosts: str = "",
        network: str = "Ethernet 10G",
    ) -> None:
        self._custom: tuple[Device, ...] = ()  # where each layer rests, of a map that was dragged
        self._grabbed: Plan | None = None  # what a drag that goes on began with
        self._planned = strategy  # the strategy to go back to
        self.planner_button = _button("Back to the planner", "Forget what was dragged", self.planner)
        if strategy == CUSTOM:
            raise ValueError(f"a map of your own is dragged in the picture: expected one of {', '.join(STRATEGIES)}")
        if isinstance(max_memory, Mapping):
            hardware, start = self.preset_menu("Machine"), _budgets(max_memory)
        else:
            machine = machine_of(max_memory or "2 x RTX 4090")
            hardware = self.preset_menu("Machine", machine.name if machine.name in self.presets else "")
            start = _machine(machine)
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
                        widgets.BoundedFloatText, "CUDA, MiB", start["overhead"], min=0, max=2**14, step=1,
                        tip="What the CUDA context and the allocator take on each GPU",
                    ),
                    "hosts": field(
                        widgets.Text, "Hosts", hosts, placeholder="4090 | 2 x L4, or 2 hosts",
                        tip="Machines that share the model, a process on each",
                    ),
                    "network": menu("Network", [*NETWORKS], network, "The line between hosts"),
                },
                "Plan": {
                    "strategy": menu("Strategy", (*STRATEGIES, CUSTOM), strategy, "How layers are placed"),
                    "planner_button": self.planner_button,
                    "context": token_slider(context, none=True),
                    "batch": field(widgets.BoundedIntText, "Batch", batch, min=1, max=4096, tip="Sequences at once"),
                    "kv_dtype": cache_menu(kv_dtype),
                },
            },
            {
                "Why each boundary stands where it does": lambda: preformatted(self.shown.explain(), wrap=True),
                "Device map": lambda: map_table(self.device_map),
            },
        )  # fmt: skip
        self.count.observe(self._take_count, "value")
        self._start += [(slider, slider.value) for slider in self._sliders]
        self._turned.remove("strategy")  # after what it is a strategy for
        self._turned = [*self._turned, "sizes", "custom", "strategy"]
        self._present = self.settings()

    plan = property(lambda self: self.result)

    @property
    def device_map(self) -> dict[str, Device]:
        """Module -> device; over hosts, the number of the process stands before the name."""
        if not isinstance(self.shown, HostsPlan):
            return dict(self.shown.device_map)
        stages = enumerate(self.shown.stages)
        return {f"{rank}: {name}": device for rank, own in stages for name, device in own.plan.device_map.items()}

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
        end = max(4.0, 2 * max(sizes, default=0))
        for i in range(len(self._sliders), len(sizes)):
            limits = {"min": 0, "max": end, "step": self._step}
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
        """The value of a control; "sizes" are those of the GPUs, "custom" is a map that was dragged."""
        if name == "custom":
            return ",".join(f"{device}*{len([*run])}" for device, run in groupby(self._custom))
        return [slider.value for slider in self.gpus] if name == "sizes" else super().setting(name)

    def turn(self, name: str, value: Any) -> None:
        """Give a control a value, or each GPU its size."""
        if name == "sizes":
            self.count.value = len(value)
            self._set_gpus(value)
        elif name == "custom":
            runs = [run.partition("*") for run in value.split(",") if run]
            places = ((int(where) if where.isdigit() else where, int(count)) for where, _, count in runs)
            self._custom = tuple(device for device, count in places for _ in range(count))
            self._waiting = True
        else:
            super().turn(name, value)

    # -- a hand in the picture

    def drag(self, key: str, onto: str | None, done: bool = True) -> None:
        """Move a layer ("layer:3") or a boundary ("boundary:3", before that layer) onto a device ("device:cpu") or a
        layer ("layer:7"): the plan becomes a map of your own.

        Args:
            key, onto: marks of the picture; None: onto nothing, which leaves all as it was before the drag.
            done: False shows where it would lead, and can go on from where it began.

        Raises:
            ValueError: the picture has no such mark.
        """
        begin = self._grabbed or self.shown
        self._grabbed, self.passing = None, False
        if onto is None:
            self.result = begin
        else:
            self._custom, before = tuple(moved(begin, key, onto).values()), self._custom
            self.result = self._plan(CUSTOM)
        if not done:
            self._grabbed, self.passing = begin, True
        if not done or onto is None:
            self._custom = self._custom if onto is None else before
            self._show()
            return
        with self.together():
            self.turn("strategy", CUSTOM)
            self._waiting = True

    def planner(self) -> None:
        """Go back from a map of your own to what the strategy plans."""
        self.strategy.value = self._planned

    def tell(self, key: str) -> str:
        """The parts of a device, and the layers that rest on it."""
        kind, _, name = key.partition(":")
        if isinstance(self.shown, HostsPlan):
            return ""
        share = next((share for share in self.shown.shares if str(share.device) == name.partition(":")[0]), None)
        if kind != "device" or share is None:
            return ""
        rows = [(layer.name, layer.cls, layer.bytes) for layer in self.shown.layers if layer.device == share.device]
        return device_table(share_text(self.shown, share.device), share, rows)

    def differences(self, old: Plan | HostsPlan, new: Plan | HostsPlan) -> list[str]:
        if isinstance(old, Plan) and isinstance(new, Plan):
            return plan_differences(old, new)
        if isinstance(old, HostsPlan) and isinstance(new, HostsPlan):
            return hosts_differences(old, new)
        return ["One of them is over several hosts."]

    # -- the plan

    def compute(self) -> Plan | HostsPlan:
        """Plan with what the controls say; a budget that is too small gives the plan that comes closest."""
        several = bool(self.hosts.value.strip())
        self.network.layout.display = None if several else "none"
        if several:
            ask = {name: value for name, value in self._asked().items() if value is not None}
            return plan_hosts(self.spec(), read_hosts(self.hosts.value, self._host()), self.network.value, **ask)
        if self.strategy.value != CUSTOM:
            self._planned, self._custom = self.strategy.value, ()
        self.planner_button.layout.display = None if self.strategy.value == CUSTOM else "none"
        return self._plan(self.strategy.value)

    def _asked(self) -> dict[str, Any]:
        """How weights are stored, and the load, as `plan` takes them."""
        return {
            "dtype": chosen(self.dtype), "quantization": chosen(self.quantization), "batch": self.batch.value,
            "context": self.context.value, "kv_dtype": chosen(self.kv_dtype),
        }  # fmt: skip

    def _host(self) -> Hardware:
        """The machine that the controls show, as one of several hosts: named, or as fast as one of its size."""
        sizes = {slider.value for slider in self.gpus}
        if self.machine or not sizes:
            return self.machine or HARDWARE["laptop, no GPU"]
        if len(sizes) > 1:
            raise ValueError("hosts with unlike GPUs of your own have no known rates: name them, as in 24GB | 12GB")
        return machine_of(f"{len(self.gpus)} x {sizes.pop()}GiB, {self.ram.value or 1}GiB RAM")

    def _plan(self, strategy: str, strict: bool = False) -> Plan:
        overhead = overhead_of(self.machine) if self.machine else round(self.overhead.value * MiB)
        options = {**self._asked(), "overhead": overhead}
        return place(self.spec(), self.max_memory, self._way(strategy, options), **options, strict=strict)

    def _cure(self, plan: Plan) -> str:
        """What would make a plan fit that does not; of a map that was dragged, how to get rid of it."""
        if plan.strategy == CUSTOM:
            return "Undo takes it back, and so does the planner."
        try:
            self._plan(plan.strategy, strict=True)
        except PlanError as error:
            return error.cure
        return ""

    def _way(self, strategy: str, options: dict[str, Any]) -> str | dict[str, Device]:
        """A strategy's name, or the map that was dragged; at first it is that of the plan that is shown."""
        if strategy != CUSTOM:
            return strategy
        plan = self._grabbed or self.result
        if plan is None or plan.model != self.spec().name or self._custom and len(self._custom) != len(plan.layers):
            plan = place(self.spec(), self.max_memory, self._planned, **options, strict=False)
        self._custom = self._custom or tuple(layer.device for layer in plan.layers)
        names = [layer.name for layer in plan.layers]
        if len(names) != len(self._custom):
            raise ValueError(f"the map that was dragged has {len(self._custom)} layers, and {self.model.value} has "
                             f"{len(names)}: go back to the planner")  # fmt: skip
        return dict(zip(names, self._custom))

    def _show_hosts(self, plan: HostsPlan) -> None:
        away = any(stage.plan.offloaded for stage in plan.stages)
        headline = f"Fits {counted(len(plan.stages), 'host')}{', offloaded' * away}."
        text = f"One sequence gets about {three_figures(plan.one)} tokens/s; {max(plan.batch, plan.groups)} in "
        text += f"{counted(plan.groups, 'group')} get {three_figures(plan.many)}. "
        text += f"{listed(plan.left_out)} would hold nothing." * bool(plan.left_out)
        self.put(pill("slow" if away else "good", headline, text), hosts_figure(plan), hosts_text(plan))

    def show(self, plan: Plan | HostsPlan) -> None:
        if isinstance(plan, HostsPlan):
            return self._show_hosts(plan)
        news = "bad" if not plan.feasible else "slow" if plan.offloaded else "good"
        headline = {"bad": "Does not fit.", "slow": "Fits, offloaded.", "good": "Fits."}[news]
        details = [plan_verdict(plan).partition(", " if plan.feasible else ": ")[2]]
        if plan.feasible and self.machine:
            option = predict(self.spec(), plan, self.machine, None)
            details.append(f"About {option.pace} on {self.machine.name}, waiting for {option.bottleneck}")
        if plan.longest:
            details.append(f"Longest context here: {plan.longest}")
        sentences = "".join(f"{detail[0].upper()}{detail[1:]}. " for detail in details if detail)
        sentences += " ".join(plan.notes)
        self.put(pill(news, headline, sentences), plan_figure(plan), plan_text(plan))
        if not plan.feasible:  # the picture is seen before the cure is found, which takes longer
            self.verdict.value = pill(news, headline, f"{sentences} {self._cure(plan)}")

    def to_code(self) -> str:
        return str(self.shown.to_code())

    def summary(self, plan: Plan | HostsPlan) -> list[str]:
        """The model, whether it fits, and what each GPU or all of them hold; over hosts, their blocks and the pace."""
        if isinstance(plan, HostsPlan):
            blocks, pace = "+".join(str(stage.blocks) for stage in plan.stages), f"{three_figures(plan.one)} tokens/s"
            stored = plan.stages[0].plan.stored
            return [f"{short(plan.model)} {stored}, {counted(plan.groups, 'host')}, blocks {blocks}, {pace}"]
        away = f"offloads {plan.offloaded / GiB:.1f}" if plan.offloaded else "fits"
        head = f"{short(plan.model)} {plan.stored} {plan.strategy}, {away if plan.feasible else 'does not fit'}, "
        working = [share for share in plan.shares if share.runs]
        tail = f" of {format_bytes(sum(share.budget or 0 for share in working))}"
        loads = [share.used / GiB for share in working]
        forms = ["+".join(f"{load:.{digits}f}" for load in loads) for digits in (1, 0)]
        return [f"{head}{form}{tail}" for form in (*forms, f"{sum(loads):.1f}")]
