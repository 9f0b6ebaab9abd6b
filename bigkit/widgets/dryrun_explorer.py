"""`DryRunExplorer`: rehearse a model on machines that you do not have, and turn batch, prompt, GPUs and link.

With a GPU, *Measure* does the same work for real and lays it over what was predicted.

Leaves out: models that need more than token ids or one image, and quantized weights.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, NamedTuple

import ipywidgets as widgets

from ..api import plan
from ..draw.dryrun import dryrun_differences, dryrun_figure, dryrun_text
from ..dryrun.result import DryRun
from ..dryrun.run import dry_run, on_machine
from ..machine.hardware import GPUS, LINKS, Hardware, machine_of
from ..machine.ledger import calibration_of
from ..maps.plan import Plan
from ..measure.record import Measurement, measure, obstacle
from ..units import GiB, format_bytes, format_seconds
from ._controls import chosen, dtype_menu, field, menu, slider
from ._explorer import Explorer
from ._html import pill, preformatted, short

ITS_OWN = "the GPU's own"
HERE = "the one here"
PROMPTS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def _preset(model: str, gpu: str, count: int, batch: int, prompt: int, new: int) -> dict[str, Any]:
    """The controls of a rehearsal in float16, over the GPU's own link and with 64 GiB of RAM."""
    return {"model": model, "dtype": "float16", "gpu": gpu, "count": count, "batch": batch, "prompt": prompt,
            "new": new, "ram": 64, "link": ITS_OWN}  # fmt: skip


PRESETS = {
    "gpt2-xl on a T4": _preset("gpt2-xl", "T4", 1, 4, 256, 4),
    "llama-2-7b on an RTX 4090": _preset("llama-2-7b", "RTX 4090", 1, 1, 512, 2),
    "opt-13b on a T4, half in RAM": _preset("opt-13b", "T4", 1, 1, 512, 2),
    "llama-2-70b on four A100": _preset("llama-2-70b", "A100-40GB", 4, 1, 512, 1),
}


class Rehearsal(NamedTuple):
    """A plan, the run that follows from it, and all that it depends on."""

    plan: Plan
    run: DryRun
    key: tuple[Any, ...]


def _kind(gpu: str) -> str:
    """The entry of `GPUS` that a name means; the name itself if there is none."""
    return next((found.name for found in machine_of(gpu).gpus), gpu)


class DryRunExplorer(Explorer):
    """A run that has not happened, with controls.

    The controls are `preset`, `model`, `dtype`, `gpu` (a name in `GPUS`; "the one here" if there is one), `count`,
    `ram` (GiB), `link`, `batch`, `prompt` and `new` (tokens); set their `value` in code or by hand. The plan is made
    for the machine and the load; `plan`, `run` and `measured` are what is shown, or None if there is nothing yet.
    `measure` runs on the GPU that is here what is shown, and keeps it.

    Args:
        model: a shipped name, Hub id, Hub URL, timm name or folder.
        gpu: a name in `GPUS`, or the beginning or end of one ("4090").
        count: of such GPUs.
        dtype: of the weights; None takes what the model has.
        batch, prompt, new: sequences, tokens of each prompt, tokens generated.
        ram: GiB for weights that no GPU holds.

    Raises:
        ValueError: a GPU or dtype that does not exist. A model that is not found is said in the explorer.

    >>> explorer = DryRunExplorer("pygpt", "T4", batch=2, prompt=64, new=2)
    >>> explorer.batch.value = 4
    >>> explorer.run.load.batch, explorer.run.fits
    (4, True)
    """

    presets = PRESETS
    missing = "no run yet"

    def __init__(
        self,
        model: str = "gpt2-xl",
        gpu: str = "T4",
        count: int = 1,
        *,
        dtype: str | None = "float16",
        batch: int = 4,
        prompt: int = 256,
        new: int = 4,
        ram: int = 64,
    ) -> None:
        self._runs: dict[Any, DryRun] = {}
        self._alike: dict[Any, list[DryRun]] = {}  # the same work on GPUs that do something else in it
        self._measured: dict[Any, Measurement] = {}
        self._here = Hardware.detect()
        self.real = widgets.Button(layout=widgets.Layout(width="auto"))
        self.real.on_click(lambda _: self._try_to_measure())
        gpus = [*([HERE] if self._here.gpus else []), *GPUS]
        super().__init__(
            {
                "Model": {
                    "preset": self.preset_menu("Preset"), "model": self.model_field(model), "dtype": dtype_menu(dtype),
                },
                "Machine": {
                    "gpu": menu("GPU", gpus, gpu if gpu in gpus else _kind(gpu)),
                    "count": field(widgets.IntSlider, "GPUs", count, min=1, max=8),
                    "ram": field(widgets.BoundedIntText, "RAM, GiB", ram, min=0, max=4096),
                    "link": menu("Link", [ITS_OWN, *LINKS], ITS_OWN),
                },
                "Load": {
                    "batch": field(widgets.BoundedIntText, "Batch", batch, min=1, max=512),
                    "prompt": slider("Prompt", [(f"{n:,}", n) for n in sorted({*PROMPTS, prompt})], prompt),
                    "new": field(widgets.IntSlider, "New tokens", new, min=0, max=16),
                },
                "On the GPU that is here": {"real": self.real},
            },
            {"Plan": lambda: preformatted(self.shown.plan.explain(), wrap=True)},
        )  # fmt: skip

    plan = property(lambda self: self.result and self.result.plan)
    run = property(lambda self: self.result and self.result.run)
    measured = property(lambda self: self.result and self._measured.get(self.result.key))

    @property
    def hardware(self) -> Hardware:
        """The machine that the controls describe."""
        count, ram, link = self.count.value, self.ram.value * GiB, self.link.value
        if self.gpu.value == HERE:
            return Hardware(self._here.name, self._here.gpus[:count], ram, 0)
        gpu, name = GPUS[self.gpu.value], f"{count} x {self.gpu.value}"
        if link != ITS_OWN:
            gpu, name = replace(gpu, link=LINKS[link]), f"{name}, {link}"
        return Hardware(name, (gpu,) * count, ram, 0)

    def compute(self) -> Rehearsal:
        """Plan for the machine and the load, and rehearse the plan."""
        name, machine = self.model.value.strip(), self.hardware
        dtype = chosen(self.dtype)
        batch, prompt, new = self.batch.value, self.prompt.value, self.new.value
        places = plan(self.spec(), hardware=machine, dtype=dtype, batch=batch, context=prompt + new, strict=False)
        key = (name, dtype, tuple(places.device_map.items()), batch, prompt, new, machine)
        if key not in self._runs:
            others = [] if calibration_of(machine) else self._alike.setdefault(key[:-1], [])
            found = next((run for other in others if (run := on_machine(other, machine))), None)
            if found is None:  # these GPUs would do something else, or were measured
                self.say_working(f"Rehearsing {name} …")
                found = dry_run(name, places, batch, prompt, new, machine, dtype=dtype)
                others.append(found)
            self._runs[key] = found
        return Rehearsal(places, self._runs[key], key)

    def show(self, rehearsal: Rehearsal) -> None:
        plan, run, _ = rehearsal
        fullest = max(run.timelines.values(), key=lambda line: line.peak_reserved / (line.capacity or 2**62))
        of = f" of {format_bytes(fullest.capacity)}" if fullest.capacity else ""
        one = "At its peak it holds" if len(run.timelines) == 1 else f"The fullest of {len(run.timelines)} GPUs holds"
        facts = f"{one} {format_bytes(fullest.peak_reserved)}{of}. Prefill {format_seconds(run.seconds['prefill'])} "
        facts += f"({run.ranges['prefill'].told(format_seconds)}). " + (f"{run.speed}. " if run.speed else "")
        if plan.offloaded:
            share = plan.offloaded / sum(share.weights for share in plan.shares)
            facts += f"{100 * share:.0f} % of the weights travel. "
        facts += " ".join(plan.notes)
        verdict = pill("slow" if plan.offloaded or run.narrowly else "good", f"It fits{run.narrowly}.", facts)
        if not run.fits:
            verdict = pill("bad", "Out of memory.", f"{run.problem}.")
        self.put(verdict, dryrun_figure(run, self.measured), dryrun_text(run, self.measured))
        why = obstacle(run, self._here, plan.offloaded)
        self.real.description = f"Measure: {short(why, 30)}" if why else "Measure it"
        self.real.tooltip = why or "Run it for real on GPU 0, with random weights, and draw it over the prediction"
        self.real.disabled = bool(why)

    def measure(self) -> Measurement:
        """Do what is shown for real, on GPU 0 of this machine, with random weights; it is drawn over the prediction.

        Raises:
            ValueError: it cannot be measured here; the sentence says why.
        """
        from .. import zoo

        plan, run, key = self.shown
        if why := obstacle(run, self._here, plan.offloaded):
            raise ValueError(f"{run.model} cannot be measured: {why}")
        empty = zoo.empty_model(run.model, dtype=plan.dtype)
        self._measured[key] = measure(empty, plan.device_map, run.load, plan.slots or 2)
        self.refresh()
        return self._measured[key]

    def _try_to_measure(self) -> None:
        """What the button does: it says what it does meanwhile, and what went wrong."""
        self.say_working(f"Running {self.model.value.strip()} on the GPU that is here …")
        try:
            self.measure()
        except Exception as error:
            self.say_sorry(error)
        self.working.value = ""

    def to_code(self) -> str:
        plan, run, _ = self.shown
        load = run.load
        gpu = "Hardware.detect().gpus[0]" if self.gpu.value == HERE else f"GPUS[{self.gpu.value!r}]"
        if self.gpu.value != HERE and self.link.value != ITS_OWN:
            gpu = f"replace({gpu}, link=LINKS[{self.link.value!r}])"
        count, ram = len(self.hardware.gpus), self.ram.value
        return (
            "from dataclasses import replace\n\nfrom bigkit import dry_run\n"
            "from bigkit.machine.hardware import GPUS, LINKS, Hardware\n\n"
            f"hardware = Hardware({run.hardware!r}, ({gpu},) * {count}, {ram} * 2**30, 0)\n"
            f"device_map = {plan.device_map!r}\n"
            f"run = dry_run({run.model!r}, device_map, {load.batch}, {load.prompt}, {load.new}, hardware, "
            f"dtype={plan.dtype!r})\n"
            "print(run)\n"
        )

    def content(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.shown.run.to_json())
        return content

    def differences(self, old: Rehearsal, new: Rehearsal) -> list[str]:
        return dryrun_differences(old.run, new.run)

    def summary(self, rehearsal: Rehearsal) -> list[str]:
        """The model, the machine, the load, whether it fits, and the highest peak."""
        run = rehearsal.run
        peak = format_bytes(max(run.peak_reserved.values()))
        verdict = "fits" if run.fits else "out of memory"
        return [f"{short(run.model)}, {short(run.hardware, 24)}, {run.asked}: {verdict}, peak {peak}"]
