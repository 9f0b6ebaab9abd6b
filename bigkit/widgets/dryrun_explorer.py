"""`DryRunExplorer`: rehearse a model on machines that you do not have, and turn batch, prompt, GPUs and link.

With a GPU, *Measure* does the same work for real and lays it over what was foretold.

Leaves out: models that need more than token ids or one image, and quantized weights.
"""

from __future__ import annotations

from typing import Any

import ipywidgets as widgets

from ..api import describe, plan
from ..draw.canvas import svg
from ..draw.dryrun import dryrun_figure, dryrun_label, dryrun_text, format_time
from ..dryrun.run import DryRun, dry_run
from ..machine.hardware import GPUS, LINKS, Gpu, Hardware
from ..maps.plan import Plan
from ..measure.record import Measurement, measure, obstacle
from ..units import GiB, dtype_name, format_bytes
from ._explorer import (
    AS_STORED,
    DTYPES,
    LONGEST_REPR,
    WIDE,
    Explorer,
    menu,
    model_field,
    number_field,
    pill,
    preformatted,
    short,
)

OWN = "the GPU's own"
HERE = "the one here"
PROMPTS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
PRESETS = {
    "gpt2-xl on a T4": ("gpt2-xl", "float16", "T4", 1, 4, 256, 4),
    "llama-2-7b on an RTX 4090": ("llama-2-7b", "float16", "RTX 4090", 1, 1, 512, 2),
    "opt-13b on a T4, half in RAM": ("opt-13b", "float16", "T4", 1, 1, 512, 2),
    "llama-2-70b on four A100": ("llama-2-70b", "float16", "A100-40GB", 4, 1, 512, 1),
}


class DryRunExplorer(Explorer):
    """A run that has not happened, with controls.

    The controls are `preset`, `model`, `dtype`, `gpu` (a name in `GPUS`; "the one here" if there is one), `count`,
    `ram` (GiB), `link`, `batch`, `prompt` and `new` (tokens); set their `value` in code or by hand. The plan is made
    for the machine and the load; `plan`, `run` and `measured` are what is shown, or None if there is nothing yet.
    `measure` runs on the GPU that is here what is shown, and keeps it.

    Args:
        model: a shipped name, Hub id, Hub URL, timm name or folder.
        gpu: a name in `GPUS`.
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
        self.run: DryRun | None = None
        self.plan: Plan | None = None
        self.measured: Measurement | None = None
        self._runs: dict[Any, DryRun] = {}
        self._measured: dict[Any, Measurement] = {}
        self._key: Any = None
        self._here = Hardware.detect()
        self.real = widgets.Button(layout=widgets.Layout(width="auto"))
        self.real.on_click(lambda _: self._try_to_measure())
        wide = widgets.Layout(width="100%")
        self.preset = menu("Preset", ["", *PRESETS], "")
        self.model = model_field(model)
        self.dtype = menu("Dtype", DTYPES, AS_STORED if dtype is None else dtype_name(dtype))
        self.gpu = menu("GPU", [*([HERE] if self._here.gpus else []), *GPUS], gpu)
        self.count = number_field(widgets.IntSlider, "GPUs", value=count, min=1, max=8)
        self.ram = number_field(widgets.BoundedIntText, "RAM, GiB", value=ram, min=0, max=4096)
        self.link = menu("Link", [OWN, *LINKS], OWN)
        self.batch = number_field(widgets.BoundedIntText, "Batch", value=batch, min=1, max=512)
        self.prompt = widgets.SelectionSlider(
            options=[(f"{n:,}", n) for n in sorted({*PROMPTS, prompt})], value=prompt, description="Prompt",
            continuous_update=False, style=WIDE, layout=wide,
        )  # fmt: skip
        self.new = number_field(widgets.IntSlider, "New tokens", value=new, min=0, max=16)
        self.steering = (self.preset,)
        self.preset.observe(self._take_preset, "value")
        super().__init__(
            [
                ("Model", [self.preset, self.model, self.dtype]),
                ("Machine", [self.gpu, self.count, self.ram, self.link]),
                ("Load", [self.batch, self.prompt, self.new]),
                ("On the GPU that is here", [self.real]),
            ],
            [("Plan", lambda: preformatted(self._shown()[0].explain(), wrap=True))],
        )

    def _take_preset(self, change: dict[str, Any]) -> None:
        if change["new"] in PRESETS:
            with self.together():
                model, dtype, gpu, count, batch, prompt, new = PRESETS[change["new"]]
                self.model.value, self.dtype.value, self.gpu.value, self.count.value = model, dtype, gpu, count
                self.batch.value, self.prompt.value, self.new.value = batch, prompt, new

    @property
    def hardware(self) -> Hardware:
        """The machine that the controls describe."""
        if self.gpu.value == HERE:
            here = self._here
            return Hardware(here.name, here.gpus[: self.count.value], self.ram.value * GiB, 0)
        gpu = GPUS[self.gpu.value]
        if self.link.value != OWN:
            gpu = Gpu(gpu.name, gpu.memory, gpu.bandwidth, gpu.flops, LINKS[self.link.value], gpu.capability)
        link = "" if self.link.value == OWN else f", {self.link.value}"
        return Hardware(f"{self.count.value} x {gpu.name}{link}", (gpu,) * self.count.value, self.ram.value * GiB, 0)

    def compute(self) -> None:
        """Plan for the machine and the load, and rehearse the plan."""
        name, machine = self.model.value.strip(), self.hardware
        dtype = None if self.dtype.value == AS_STORED else self.dtype.value
        batch, prompt, new = self.batch.value, self.prompt.value, self.new.value
        found = plan(
            describe(name), machine.max_memory(), dtype=dtype, batch=batch, context=prompt + new,
            overhead=machine.overhead, strict=False,
        )  # fmt: skip
        key = (name, dtype, tuple(found.device_map.items()), batch, prompt, new, machine)
        if key not in self._runs:
            self.verdict.value = pill("slow", f"Rehearsing {name} …", "A few seconds.")
            self._runs[key] = dry_run(name, found, batch, prompt, new, machine, dtype=dtype)
        self.plan, self.run, self._key = found, self._runs[key], key
        self.measured = self._measured.get(key)

    def show(self) -> None:
        """Show the run, and what was measured of it."""
        found, run = self._shown()
        fullest = max(run.timelines.values(), key=lambda line: line.peak_reserved / (line.capacity or 2**62))
        of = f" of {format_bytes(fullest.capacity)}" if fullest.capacity else ""
        one = "At most" if len(run.timelines) == 1 else f"The fullest of {len(run.timelines)} GPUs holds"
        speed = f"{run.tokens_per_second:,.1f} tokens/s. " if run.tokens_per_second else ""
        away = f"{100 * found.offloaded / sum(share.weights for share in found.shares):.0f} % of the weights travel. "
        said = (
            f"{one} {format_bytes(fullest.peak_reserved)}{of}. Prefill {format_time(run.seconds['prefill'])}. {speed}"
            f"{away if found.offloaded else ''}"
        )
        if run.fits:
            self.verdict.value = pill("slow" if found.offloaded else "good", "It fits.", said)
        else:
            self.verdict.value = pill("bad", "Out of memory.", run.problem + ".")
        self.picture.value = svg(dryrun_figure(run, self.measured), dryrun_label(run, self.measured))
        self.text.value = preformatted(dryrun_text(run, self.measured))
        why = obstacle(run, self._here, found.offloaded)
        self.real.description = f"Measure: {short(why, 30)}" if why else "Measure it"
        self.real.tooltip = why or "Run it for real on GPU 0, with random weights, and draw it over what was foretold"
        self.real.disabled = bool(why)

    def measure(self) -> Measurement:
        """Do what is shown for real, on GPU 0 of this machine, with random weights; it is drawn over what was foretold.

        Raises:
            ValueError: it cannot be measured here; the sentence says why.
        """
        from .. import zoo

        found, run = self._shown()
        if why := obstacle(run, self._here, found.offloaded):
            raise ValueError(f"{run.model} cannot be measured: {why}")
        empty = zoo.empty_model(run.model, dtype=found.dtype)
        self._measured[self._key] = measure(empty, found.device_map, run.load)
        self.refresh()
        return self._measured[self._key]

    def _try_to_measure(self) -> None:
        """What the button does: it says what it does meanwhile, and what went wrong."""
        before = self.verdict.value
        self.verdict.value = pill("slow", f"Running {self.model.value.strip()} …", "On the GPU that is here.")
        try:
            self.measure()
        except Exception as error:
            self.say_sorry(error)
            self.verdict.value = before

    def to_code(self) -> str:
        """Python that rehearses the same run."""
        found, run = self._shown()
        load = run.load
        gpu = "Hardware.detect().gpus[0]" if self.gpu.value == HERE else f"GPUS[{self.gpu.value!r}]"
        if self.gpu.value != HERE and self.link.value != OWN:
            gpu = f"replace({gpu}, link=LINKS[{self.link.value!r}])"
        count, ram = len(self.hardware.gpus), self.ram.value
        return (
            "from dataclasses import replace\n\nfrom bigkit import dry_run\n"
            "from bigkit.machine.hardware import GPUS, LINKS, Hardware\n\n"
            f"hardware = Hardware({run.hardware!r}, ({gpu},) * {count}, {ram} * 2**30, 0)\n"
            f"device_map = {found.device_map!r}\n"
            f"run = dry_run({run.model!r}, device_map, {load.batch}, {load.prompt}, {load.new}, hardware, "
            f"dtype={found.dtype!r})\n"
            "print(run)\n"
        )

    def to_json(self) -> str:
        """The figures of the run, as JSON text."""
        return self._shown()[1].to_json() + "\n"

    def _shown(self) -> tuple[Plan, DryRun]:
        if self.run is None or self.plan is None:
            raise ValueError("there is no run yet: give the explorer a model that it can find")
        return self.plan, self.run

    def __repr__(self) -> str:
        run = getattr(self, "run", None)
        if run is None:
            return "DryRunExplorer(no run yet)"
        peak = max(run.peak_reserved.values()) / GiB
        verdict = "fits" if run.fits else "out of memory"
        load = f"{run.load.batch} x {run.load.prompt}+{run.load.new}"
        text = f"DryRunExplorer({short(run.model)}, {short(run.hardware, 24)}, {load}: {verdict}, peak {peak:.2f} GiB)"
        return text if len(text) <= LONGEST_REPR else text[: LONGEST_REPR - 4] + "...)"
