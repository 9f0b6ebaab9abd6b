"""A pipeline of several models of which one works at a time: text encoders, then a denoiser many times, then a VAE.

Each is a model like any other, so its weights are counted as always. What is new is the peak: not the sum, but the
fullest phase, and that depends on which components stay on the device. Three ways, from most memory to least:

    all stay                 all weights, and the activations of the hungriest component
    one at a time            of the fullest component its weights and activations; the others wait in RAM
    by the block             two of its largest blocks and its activations; every block comes for each pass

Leaves out: finding the components (`zoo/pipelines.py`), tracing activations (`dryrun/components.py`), and choosing what
stays on a machine (`maps/pipeline.py`).
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from ..units import format_bytes, format_count, text_table
from .spec import Layer, ModelSpec

PHASES = ("encode", "denoise", "decode")


@dataclass(frozen=True)
class Component:
    """One model of a pipeline.

    Args:
        name: its attribute of the pipeline, such as "text_encoder".
        spec: its record.
        phase: one of `PHASES`, when it works.
        activations: bytes that a pass of it takes beside its weights; None if it could not be traced.
        load: what that was traced for, in words.
    """

    name: str
    spec: ModelSpec
    phase: str
    activations: int | None = None
    load: str = ""

    @property
    def working(self) -> int:
        """Bytes of activations, 0 if they are not known."""
        return self.activations or 0

    @cached_property
    def weights(self) -> int:
        """Bytes of its weights."""
        return self.spec.bytes()

    @cached_property
    def blocks(self) -> tuple[str, ...] | None:
        """Classes whose modules come whole; None: as the model says.

        Of classes that it keeps whole and that lie in each other, the inner ones are enough, since all of a component
        that comes by block works on one GPU: Diffusers keeps the half of a UNet together for the sake of several.
        """
        kept = {*self.spec.no_split}
        outer = {
            module.cls for _, module in self.spec.root.walk()
            if module.cls in kept and any(inner.cls in kept for _, inner in module.walk() if inner is not module)
        }  # fmt: skip
        return tuple(sorted(kept - outer)) if outer else None

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """What comes whole, if it comes by block."""
        return self.spec.layers_to_place() if self.blocks is None else self.spec.layers(self.blocks)

    @cached_property
    def least(self) -> int:
        """Bytes of it that must be on the device if it comes by block: two of its largest, and its buffers."""
        return 2 * max(layer.bytes() for layer in self.layers) + self.spec.root.bytes(buffers_only=True)


@dataclass(frozen=True)
class PipelineSpec:
    """A pipeline: its name, its class, its components in the order in which they work, and what was left out."""

    name: str
    cls: str
    components: tuple[Component, ...]
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return sum(component.weights for component in self.components)


@dataclass(frozen=True)
class PipelineEstimate:
    """What a pipeline takes: its components, and the peak of each way to run it; bytes.

    Args:
        name, cls: see `PipelineSpec`.
        components: name, class, phase, parameters, weights, activations (None: not known), what these are for.
        ways: "all stay", "one at a time", "by the block" -> peak on the device.
        fullest: the component at the peak of "one at a time".
        notes: what must be said beside the figures.
    """

    name: str
    cls: str
    components: tuple[Mapping[str, Any], ...]
    ways: Mapping[str, int]
    fullest: str
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Every figure as JSON text, sizes in bytes."""
        return json.dumps(asdict(self), indent=1)

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """(title, headers, rows) of the two tables, sizes as text."""
        parts = [
            [str(one["name"]), str(one["class"]), str(one["phase"]), format_count(one["parameters"]),
             format_bytes(one["weights"]), "?" if one["activations"] is None else format_bytes(one["activations"]),
             str(one["load"])]
            for one in self.components
        ]  # fmt: skip
        return [
            (f"Components of {self.name} ({self.cls})",
             ["component", "class", "phase", "parameters", "weights", "activations", "for"], parts),
            ("Peak on the device", ["way", "peak"], [[way, format_bytes(size)] for way, size in self.ways.items()]),
        ]  # fmt: skip

    def __str__(self) -> str:
        blocks = [f"{title}\n{text_table(headers, rows)}" for title, headers, rows in self.tables()]
        return "\n\n".join([*blocks, *self.notes])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def __repr__(self) -> str:
        peaks = ", ".join(f"{way} {format_bytes(size)}" for way, size in self.ways.items())
        return f"PipelineEstimate({self.name}: {peaks})"


def estimate_pipeline(pipeline: PipelineSpec) -> PipelineEstimate:
    """Count a pipeline's memory.

    >>> from bigkit import zoo
    >>> spec = zoo.describe("gpt2")
    >>> parts = (Component("text_encoder", spec, "encode", 2**20), Component("unet", spec, "denoise", 2**21))
    >>> estimate_pipeline(PipelineSpec("two", "Pipeline", parts)).ways["all stay"] - 2 * spec.bytes()
    2097152
    """
    parts = pipeline.components
    rows = tuple(
        {"name": one.name, "class": one.spec.root.cls, "phase": one.phase, "parameters": one.spec.parameters,
         "weights": one.weights, "activations": one.activations, "load": one.load}
        for one in parts
    )  # fmt: skip
    fullest = max(parts, key=lambda one: one.weights + one.working)
    ways = {
        "all stay": pipeline.weights + max(one.working for one in parts),
        "one at a time": fullest.weights + fullest.working,
        "by the block": max(one.least + one.working for one in parts),
    }
    unknown = [one.name for one in parts if one.activations is None]
    notes = [f"Activations of {', '.join(unknown)} are not counted."] if unknown else []
    return PipelineEstimate(pipeline.name, pipeline.cls, rows, ways, fullest.name, (*notes, *pipeline.notes))


def order(components: Sequence[str], sequence: str) -> list[tuple[str, str]]:
    """(component, phase) in the order in which they work.

    Args:
        components: names.
        sequence: what a pipeline's class says, "text_encoder->transformer->vae"; the last but one is taken to denoise.

    >>> order(["vae", "unet", "text_encoder"], "text_encoder->image_encoder->unet->vae")
    [('text_encoder', 'encode'), ('unet', 'denoise'), ('vae', 'decode')]
    """
    said = [name for name in sequence.split("->") if name in components]
    names = [*said, *(name for name in components if name not in said)]

    def phase(name: str) -> str:
        if any(word in name for word in ("vae", "vqvae", "vqgan", "movq", "vocoder")):
            return "decode"
        return "denoise" if any(word in name for word in ("unet", "transformer", "prior", "control")) else "encode"

    return sorted(((name, phase(name)) for name in names), key=lambda item: PHASES.index(item[1]))
