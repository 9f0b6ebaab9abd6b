"""`HookTheatre`: a real forward of the shipped GPT, spread over two fake GPUs, RAM and disk, step by step.

The model runs, on the CPU, with the hooks, units, slots and files that it would have on GPUs; what it fetches, into
which slot, and in which order things work is recorded from that run (`record.py`). How long each of it would take comes
from the rates that the controls say (`machine/streams.py`).

Leaves out: measured times, and models other than the shipped one.
"""

from __future__ import annotations

import html
import json
from typing import Any, NamedTuple

import ipywidgets as widgets

from ..devices import Device, device_label
from ..draw.canvas import svg
from ..draw.run import run_figure, run_label, run_news, run_text
from ..machine.streams import Schedule, schedule
from ..maps.partition import spread
from ..offload.observe import Observation, observe
from ..units import GB, format_bytes, format_seconds
from ._explorer import LONGEST_REPR, WIDE, Explorer, menu, number_field, pill, preformatted, short

BLOCKS = 10  # of the shipped GPT
PROMPT = "def "
ONE_BY_ONE, PREFETCH = "one by one", "prefetch"
OWN = "my own"


class Preset(NamedTuple):
    """Where the blocks rest (the others on disk), whether GPU 0's are spread, and rates in GB/s."""

    gpu0: int
    gpu1: int
    ram: int
    spread: bool
    link: float
    disk: float
    rate: float


PRESETS = {
    "two GPUs, RAM and disk": Preset(2, 2, 3, False, 25, 6, 30),
    "everything in RAM": Preset(0, 0, 10, False, 25, 6, 30),
    "half on the GPU": Preset(5, 0, 5, False, 25, 6, 30),
    "half on the GPU, spread": Preset(5, 0, 5, True, 25, 6, 30),
    "everything on disk": Preset(0, 0, 0, False, 25, 6, 30),
    "one token, RTX 4090": Preset(4, 0, 6, False, 25, 6, 1000),
}


class HookTheatre(Explorer):
    """Step through a forward of a model whose weights rest in four places.

    The controls are `step` (or `play`), `mode` ("one by one" or "prefetch"), `slots`, `tokens`, `preset`; `gpu0`,
    `gpu1` and `ram`, the blocks that rest there (the others rest on disk); `spread`; and `link`, `disk` and `rate` in
    GB/s: how fast GPU 0 is given weights, how fast files are read, and how many bytes of weights a GPU works through.
    Set their `value` in code or by hand.

    `schedule` is what is shown, `recording` the real run behind it, `charts` has both ways to run, with short names.

    Args:
        preset: one of `PRESETS`.
        mode: "one by one" or "prefetch".
        slots: units that GPU 0 holds in flight, with prefetch.
        tokens: how many to generate: each is one forward.

    Raises:
        ValueError: a preset or mode that does not exist.

    >>> theatre = HookTheatre("everything in RAM")
    >>> theatre.step.value = 3
    >>> theatre
    HookTheatre(blocks 0+0+10+0, prefetch, 2 slots, step 3 of 50, after 13.1 µs: wpe returns)
    """

    def __init__(
        self, preset: str = "two GPUs, RAM and disk", *, mode: str = PREFETCH, slots: int = 2, tokens: int = 2
    ) -> None:
        self.recording: Observation | None = None
        self.schedule: Schedule | None = None
        self.charts: dict[str, Schedule] = {}
        self._runs: dict[tuple[Any, ...], Observation] = {}
        self.preset = menu("Preset", [*PRESETS, OWN], preset)
        start = PRESETS.get(preset) or next(iter(PRESETS.values()))

        self.step = number_field(widgets.IntSlider, "Step", value=0, min=0, max=1)
        self.step.add_class("bigkit-step-slider")
        self.play = widgets.Play(value=0, min=0, max=1, interval=700, layout=widgets.Layout(width="auto"))
        widgets.jslink((self.play, "value"), (self.step, "value"))
        if mode not in (ONE_BY_ONE, PREFETCH):
            raise ValueError(f"unknown mode {mode!r}: expected {ONE_BY_ONE!r} or {PREFETCH!r}")
        self.mode = widgets.ToggleButtons(options=[ONE_BY_ONE, PREFETCH], value=mode, style={"button_width": "110px"})
        self.mode.add_class("bigkit-mode")
        self.slots = number_field(widgets.IntSlider, "Slots", value=slots, min=1, max=4)
        self.tokens = number_field(widgets.IntSlider, "Tokens", value=tokens, min=1, max=3)
        self.gpu0, self.gpu1, self.ram = (
            number_field(widgets.IntSlider, name, value=value, min=0, max=BLOCKS)
            for name, value in (("GPU 0", start.gpu0), ("GPU 1", start.gpu1), ("RAM", start.ram))
        )
        self.spread = widgets.Checkbox(
            value=start.spread, description="Spread GPU 0's blocks evenly", style=WIDE, indent=False,
            layout=widgets.Layout(width="100%"),
        )  # fmt: skip
        self.link, self.disk, self.rate = (
            number_field(widgets.BoundedFloatText, f"{name}, GB/s", value=value, min=0.1, max=10_000, step=1)
            for name, value in (("Link", start.link), ("Disk", start.disk), ("Work", start.rate))
        )
        self.steering = (self.preset, self.play)
        self.preset.observe(self._take_preset, "value")
        super().__init__(
            [
                ("Play, or step with the arrow keys", [self.play, self.step]),
                ("How weights are brought", [self.mode, self.slots, self.tokens]),
                ("Where blocks rest (else: disk)", [self.preset, self.gpu0, self.gpu1, self.ram, self.spread]),
                ("How fast", [self.link, self.disk, self.rate]),
            ],
            [("What happened, step by step", self._story_pane), ("Device map", self._map_pane)],
        )  # fmt: skip

    # -- where everything rests

    @property
    def device_map(self) -> dict[str, Device]:
        """Module name -> where it rests, as the controls say.

        Raises:
            ValueError: more blocks than the model has.
        """
        first, second, ram = self.gpu0.value, self.gpu1.value, self.ram.value
        if (placed := first + second + ram) > BLOCKS:
            raise ValueError(f"{placed} blocks are placed and the model has {BLOCKS}: move a slider to the left")
        ends: Device = 1 if second else 0
        others = BLOCKS - second
        here = spread([1] * others, first) if self.spread.value else set(range(first))
        kinds = iter(["cpu"] * ram + ["disk"] * BLOCKS)
        if self.spread.value:
            blocks: list[Device] = [0 if i in here else next(kinds) for i in range(others)] + [1] * second
        else:
            blocks = ([0] * first + [1] * second + ["cpu"] * ram + ["disk"] * BLOCKS)[:BLOCKS]
        before: dict[str, Device] = {"transformer.wte": 0, "transformer.wpe": 0, "transformer.drop": 0}
        after: dict[str, Device] = {"transformer.ln_f": ends, "lm_head": ends}
        return {**before, **{f"transformer.h.{i}": device for i, device in enumerate(blocks)}, **after}

    def _take_preset(self, change: object) -> None:
        if self.preset.value == OWN:
            return
        with self.together():
            for name, value in PRESETS[self.preset.value]._asdict().items():
                getattr(self, name).value = value

    def _name_preset(self) -> None:
        shown = tuple(getattr(self, name).value for name in Preset._fields)
        with self.together():
            self.preset.value = next((name for name, preset in PRESETS.items() if preset == shown), OWN)
            self._waiting = False

    # -- the run

    def compute(self) -> None:
        """Run the model as the controls say, unless it has run so before, and find when what happens."""
        places = self.device_map
        prefetch = self.mode.value == PREFETCH
        slots = self.slots.value if prefetch else 1
        key = (*places.values(), slots, prefetch, self.tokens.value)
        if key not in self._runs:
            self._runs[key] = _run(places, slots, prefetch, self.tokens.value)
        recording = self._runs[key]
        rates = [field.value * GB for field in (self.rate, self.link, self.disk)]
        shown = recording.schedule(*rates, ahead=prefetch)
        options: dict[str, Any] = {"link": shown.link, "disk": shown.disk, "tokens": shown.tokens}
        turns = [turn._replace(name=turn.name.removeprefix("transformer.")) for turn in shown.turns]
        count = self.slots.value
        self.charts = {
            ONE_BY_ONE: schedule(turns, slots=1, prefetch=False, ahead=False, **options),
            f"{PREFETCH}, {_slots(count)}": schedule(turns, slots=count, **options),
        }
        self.recording, self.schedule = recording, shown

    def show(self) -> None:
        """Show the step."""
        found = self._shown()
        self._name_preset()
        with self.together():
            last = len(found.frames) - 1
            self.step.max = self.play.max = last
            self._waiting = False
        at, name = found.frames[self.step.value], self._chart
        slow, fast = self.charts.values()
        assert self.recording is not None
        written, equal = self.recording.result
        gain = slow.per_token / fast.per_token
        bound = {"compute": "work itself", "link": "the link", "disk": "the disk"}[fast.bound]
        said = f"{gain:.2f} times as fast as one by one; {bound} has the most to do."
        news = "good" if gain >= 1.2 or fast.bound == "compute" else "slow"
        verdict = pill(news, f"Prefetch: {format_seconds(fast.per_token)} a token,", said)
        arriving = sum(found.turns[i].nbytes for i in found.scene(at).arriving)
        flight = f"In flight: {format_bytes(arriving, 'si')}. " if arriving else "Nothing is in flight. "
        end = f"It wrote {written!r}, as the whole model does: {equal}." if self.step.value == last else ""
        step = f"Step {self.step.value} of {last},"
        self.verdict.value = verdict + pill("good" if equal else "bad", step, f"{self._news(at)}. {flight}{end}")
        title = "pygpt over " + ", ".join(dict.fromkeys(device_label(turn.rests) for turn in found.turns))
        self.picture.value = svg(run_figure(self.charts, name, at, title), run_label(self.charts, name, at))
        self.text.value = preformatted(run_text(self.charts, name, at))

    @property
    def _chart(self) -> str:
        return [*self.charts][0 if self.mode.value == ONE_BY_ONE else 1]

    def _news(self, at: int) -> str:
        return run_news(self.charts[self._chart], at)

    def _shown(self) -> Schedule:
        if self.schedule is None:
            raise ValueError("nothing has run yet: give the model no more blocks than it has")
        return self.schedule

    # -- code and export

    def to_code(self) -> str:
        """Python that runs the model the same way, and gives the same schedule."""
        found = self._shown()
        places = "\n".join(f"    {name!r}: {device!r}," for name, device in self.device_map.items())
        return (
            "import torch\n\nfrom bigkit import init_empty_weights, load_checkpoint_and_dispatch\n"
            "from bigkit.offload.observe import observe\nfrom bigkit.zoo.gpt import GPT, PYGPT, GPTConfig, encode\n\n"
            f"device_map = {{\n{places}\n}}\n"
            "with init_empty_weights():\n    model = GPT(GPTConfig('pygpt')).eval()\n"
            "model = load_checkpoint_and_dispatch(\n"
            f"    model, PYGPT, device_map, dtype='bfloat16', slots={found.slots}, prefetch={found.prefetch},\n"
            "    stand_in={0: 'cpu', 1: 'cpu'}, force_hooks=True,  # without stand_in: on the GPUs themselves\n)\n"
            f"prompt = torch.tensor([encode({PROMPT!r})])\n"
            f"recording = observe(model, lambda: model.generate(prompt, {found.tokens}))\n"
            f"found = recording.schedule(rate={self.rate.value * GB:g}, link={found.link:g}, disk={found.disk:g}, "
            f"ahead={found.ahead})\n"
        )

    def to_json(self) -> str:
        """What is shown, as JSON text: what was recorded, and when it happens, each way."""
        found = self._shown()
        assert self.recording is not None
        charts = {
            name: {"first_token": chart.ends[0], "last_token": chart.per_token, "busy": chart.busy,
                   "spans": [{**span._asdict(), "turn": chart.turns[span.turn].name} for span in chart.spans]}
            for name, chart in self.charts.items()
        }  # fmt: skip
        content = {
            "mode": self.mode.value, "slots": found.slots, "tokens": found.tokens, "device_map": self.device_map,
            "link": found.link, "disk": found.disk, "rate": self.rate.value * GB,
            "turns": [turn._asdict() for turn in found.turns],
            "recorded": [event._asdict() for event in self.recording.events], "charts": charts,
        }  # fmt: skip
        return json.dumps(content, indent=2) + "\n"

    def _story_pane(self) -> str:
        lines = [f"{i:>4}  {self._news(at)}" for i, at in enumerate(self._shown().frames)]
        return f'<div style="max-height:300px;overflow:auto">{preformatted(chr(10).join(lines))}</div>'

    def _map_pane(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(repr(device))}</td><td>{device_label(device)}</td></tr>"
            for name, device in self.device_map.items()
        )
        return f"<table><tr><th>module</th><th>device</th><th></th></tr>{rows}</table>"

    def __repr__(self) -> str:
        found = getattr(self, "schedule", None)
        if found is None:
            return "HookTheatre(nothing has run yet)"
        turns = [turn for turn in found.turns if ".h." in turn.name]
        counts = "+".join(str(sum(turn.rests == place for turn in turns)) for place in (0, 1, "cpu", "disk"))
        mode = f"{PREFETCH}, {_slots(found.slots)}" if found.prefetch else ONE_BY_ONE
        news = self._news(found.frames[self.step.value])
        head = f"HookTheatre(blocks {counts}, {mode}, step {self.step.value} of {len(found.frames) - 1}, "
        return f"{head}{short(news, LONGEST_REPR - len(head) - 1)})"


def _run(places: dict[str, Device], slots: int, prefetch: bool, tokens: int) -> Observation:
    """Generate tokens with a spread-out model; the result is the text, and whether the whole model writes it too."""
    import torch

    from ..meta.empty import init_empty_weights
    from ..offload.dispatch import load_checkpoint_and_dispatch
    from ..zoo.gpt import GPT, PYGPT, GPTConfig, decode, encode, load_pygpt

    with init_empty_weights():
        model = GPT(GPTConfig("pygpt")).eval()
    load_checkpoint_and_dispatch(
        model, PYGPT, places, dtype="bfloat16", slots=slots, prefetch=prefetch, stand_in={0: "cpu", 1: "cpu"},
        force_hooks=True,
    )  # fmt: skip
    prompt = torch.tensor([encode(PROMPT)])
    recording = observe(model, lambda: model.generate(prompt, tokens))
    expected = load_pygpt().generate(prompt, tokens)
    result = (decode(recording.result[0]), bool(torch.equal(recording.result, expected)))
    return Observation(recording.units, recording.events, recording.slots, recording.prefetch, result)


def _slots(count: int) -> str:
    return "1 slot" if count == 1 else f"{count} slots"
