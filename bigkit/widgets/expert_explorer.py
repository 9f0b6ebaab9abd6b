"""`ExpertExplorer`: which experts a mixture chooses, token by token, and what your machine makes of it.

The routing is a recorded one (`measure/routing.py`); pymoe's ships, so that nothing has to run first. The bytes are
those of any mixture of experts: of another model than the recorded one, the hit rate is only an example.

Leaves out: recording, and running anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ipywidgets as widgets

from ..draw.experts import Scene, experts_figure, experts_text
from ..machine.hardware import HARDWARE
from ..machine.mixture import Mixture, token_time
from ..machine.roofline import Rates
from ..machine.routing import POLICIES, Routing
from ..units import GB, format_bytes, format_seconds, three_figures
from ..zoo import catalog
from ._controls import AS_STORED, chosen, dtype_menu, field, menu, player
from ._explorer import Explorer
from ._html import pill, short

ROUTING = Path(catalog.__file__).parent / "pymoe" / "routing.json"
RAM, DISK = "RAM", "disk"


def _preset(model: str, machine: str, rests: str = RAM) -> dict[str, Any]:
    """A model on the first GPU of a machine: its rates, and as large a cache as it has room for."""
    hardware = HARDWARE[machine]
    gpu = hardware.gpus[0]
    mixture = Mixture.of(catalog.specs(model)["full"])
    room = gpu.memory - hardware.overhead - mixture.resident
    rates = Rates.of_gpu(gpu, hardware.disk_rate)
    speeds = {"link": rates.link, "disk": rates.disk, "memory": rates.memory}
    return {
        "model": model, "dtype": AS_STORED, "cache": min(100, max(0, 100 * room // mixture.routed)), "rests": rests,
        **{name: round(rate / GB, 1) for name, rate in speeds.items()},
    }  # fmt: skip


PRESETS = {
    "pymoe, a quarter on the GPU": {**_preset("pymoe", "1 x RTX 4090"), "cache": 25},
    "Qwen3-30B-A3B, RTX 4090": _preset("qwen3-30b-a3b", "1 x RTX 4090"),
    "Mixtral, RTX 4090": _preset("mixtral-8x7b", "1 x RTX 4090"),
    "gpt-oss-120b, RTX 4090": _preset("gpt-oss-120b", "1 x RTX 4090"),
    "DeepSeek-V3, one H100": _preset("deepseek-v3", "8 x H100-80GB"),
    "DeepSeek-V3, from disk": _preset("deepseek-v3", "8 x H100-80GB", DISK),
}


class ExpertExplorer(Explorer):
    """Watch a router choose, and ask what a cache of experts is worth on your machine.

    The controls are `token` (or `play`), from 1 on, `policy` (one of `POLICIES`), `cache` (percent of all experts that
    the GPU keeps), `preset`, `model` (whose bytes travel), `dtype`, `rests` ("RAM" or "disk": where the others are),
    and `link`, `disk` and `memory` in GB/s. Set their `value` in code or by hand. `scene` is what is shown.

    Args:
        preset: one of `PRESETS`.
        policy: what the cache keeps.
        routing: a recorded routing, or its JSON file; None takes pymoe's on held-out text, which ships.

    Raises:
        ValueError: a preset or policy that does not exist.

    >>> explorer = ExpertExplorer()
    >>> explorer.policy.value = "best"
    >>> explorer
    ExpertExplorer(pymoe, best, cache 25 %: 69 % hits, 727.30 KB and 33.1 µs a token, token 1 of 512)
    """

    presets = PRESETS
    steering = ("play",)
    missing = "nothing to show yet"
    cure = "choose a mixture of experts, such as mixtral-8x7b"

    def __init__(
        self, preset: str = "pymoe, a quarter on the GPU", *, policy: str = "LRU", routing: Routing | str | None = None
    ) -> None:
        self.routing = Routing.of(ROUTING if routing is None else routing)
        start = PRESETS.get(preset) or next(iter(PRESETS.values()))
        rates = {"min": 0.01, "max": 100_000, "step": 1}
        play, token = player(1, self.routing.tokens, 400, "Token")
        super().__init__(
            {
                "Play, or step with the arrow keys": {"play": play, "token": token},
                "What the GPU keeps": {
                    "policy": menu("Policy", [*POLICIES], policy),
                    "cache": field(widgets.IntSlider, "Cache, %", start["cache"], min=0, max=100),
                },
                "Whose bytes": {
                    "preset": self.preset_menu("Preset", preset),
                    "model": self.model_field(start["model"]),
                    "dtype": dtype_menu(None),
                },
                "Your machine": {
                    "rests": menu("Others in", [RAM, DISK], start["rests"]),
                    "link": field(widgets.BoundedFloatText, "Link, GB/s", start["link"], **rates),
                    "disk": field(widgets.BoundedFloatText, "Disk, GB/s", start["disk"], **rates),
                    "memory": field(widgets.BoundedFloatText, "GPU, GB/s", start["memory"], **rates),
                },
            }
        )

    scene = property(lambda self: self.result)

    @property
    def slots(self) -> int:
        """Experts of the recorded model that the cache holds."""
        return round(self.cache.value * self.routing.all_experts / 100)

    @property
    def _rates(self) -> dict[str, Any]:
        disk = self.disk.value * GB if self.rests.value == DISK else None
        return {"memory": self.memory.value * GB, "link": self.link.value * GB, "disk": disk}

    def compute(self) -> Scene:
        """Ask each policy, and find a token's time."""
        mixture = Mixture.of(self.spec(), chosen(self.dtype))
        times = {policy: token_time(mixture, self.routing, policy, self.slots, **self._rates) for policy in POLICIES}
        return Scene(self.routing, self.token.value - 1, self.policy.value, self.slots, mixture, times)

    def show(self, scene: Scene) -> None:
        mixture, time = scene.mixture, scene.times[scene.policy]
        gpu, moving = time.waits["GPU"], time.seconds - time.waits["GPU"]
        where = "disk and link" if "disk" in time.waits else "the link"
        travels, cache, rest = (format_bytes(size, "si") for size in (time.travels, time.cache, mixture.resident))
        facts = f"Of the chosen experts {100 * time.hit_rate:.0f} % are in the cache; {travels} travel for a token, "
        facts += f"which keeps {where} for {format_seconds(moving)} of {format_seconds(time.seconds)}. "
        facts += f"On the GPU: {cache} of experts and {rest} of all else."
        news = "good" if moving <= gpu else "slow" if moving <= 20 * gpu else "bad"
        verdict = pill(news, f"{three_figures(1 / time.seconds)} tokens a second.", facts)
        if mixture.model != scene.routing.model:
            here, there = scene.routing.shape, f"{mixture.layers} x {mixture.experts} experts"
            facts = f"The routing is that of {scene.routing.model} ({here}), the bytes are those of {mixture.model} "
            facts += f"({there}), whose own routing may be kinder or less kind to a cache: record it to know."
            verdict += pill("slow", "Only an example.", facts)
        self.put(verdict, experts_figure(scene), experts_text(scene))
        self.disk.disabled = self.rests.value != DISK

    def click(self, key: str) -> None:
        """A token of the text is the one that is shown."""
        if key.startswith("token:"):
            self.token.value = int(key.removeprefix("token:"))

    def to_code(self) -> str:
        scene = self.shown
        shipped = scene.routing == Routing.load(ROUTING)
        path = 'PYMOE / "routing.json"' if shipped else '"routing.json"'
        rates = ", ".join(f"{name}={rate if rate is None else f'{rate:g}'}" for name, rate in self._rates.items())
        return (
            "from bigkit import describe\nfrom bigkit.machine.mixture import Mixture, token_time\n"
            f"from bigkit.machine.routing import Routing\n{'from bigkit.zoo.gpt import PYMOE' * shipped}\n\n"
            f"routing = Routing.load({path}){'' if shipped else '  # save yours there: routing.save(...)'}\n"
            f"mixture = Mixture.of(describe({self.model.value.strip()!r}), {chosen(self.dtype)!r})\n"
            f"found = token_time(mixture, routing, {scene.policy!r}, {scene.slots}, {rates})\n"
            "1 / found.seconds, found.waits\n"
        )

    def content(self) -> dict[str, Any]:
        scene = self.shown
        mixture, few = scene.mixture, scene.routing.experts
        return {
            "model": mixture.model, "layers": mixture.layers, "experts": mixture.experts, "each": mixture.each,
            "resident": mixture.resident, "routing": scene.routing.model, "policy": scene.policy, "slots": scene.slots,
            "token": scene.token, "rates": self._rates,
            "chosen": [{"layer": key // few, "expert": key % few, "hit": hit} for key, hit in scene.asked.items()],
            "counts": scene.routing.counts,
            "policies": {
                policy: {"hit_rate": time.hit_rate, "cache": time.cache, "travels": time.travels, "waits": time.waits,
                         "seconds": time.seconds}
                for policy, time in scene.times.items()
            },
        }  # fmt: skip

    def summary(self, scene: Scene) -> list[str]:
        """The model, the cache, what it is worth, and the token."""
        time = scene.times[scene.policy]
        cache = f"{short(scene.mixture.model, 20)}, {scene.policy}, cache {self.cache.value} %"
        hits = f"{100 * time.hit_rate:.0f} % hits, {format_bytes(time.travels, 'si')} and "
        hits += f"{format_seconds(time.seconds)} a token"
        return [f"{cache}: {hits}, token {scene.token + 1} of {scene.routing.tokens}", f"{cache}: {hits}"]
