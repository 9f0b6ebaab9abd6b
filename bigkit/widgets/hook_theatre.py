"""`HookTheatre`: a real forward of the shipped GPT, spread over two fake GPUs, RAM and disk, step by step.

The model runs, on the CPU, with the hooks, units, slots and files that it would have on GPUs; what it fetches, into
which slot, and in which order things work is recorded from that run (`offload/observe.py`). How long each of it would
take comes from the rates that the controls say (`machine/streams.py`), for blocks as large as those of a model of 7
billion parameters.

Below, a pane plays the blocks that rest in RAM in three ways: all are streamed, the CPU computes all MLPs where they
rest, or it computes every second one while the link brings the others (`machine/ways.py`).

Leaves out: measured times, and models other than the shipped one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import ipywidgets as widgets

from ..devices import Device, device_label
from ..draw.run import run_caption, run_figure, run_news, run_text
from ..draw.ways import ways_figure, ways_text
from ..machine.streams import Schedule, schedule
from ..machine.ways import play
from ..maps.partition import spread
from ..offload.observe import Observation, observe
from ..units import GB, counted, format_bytes, format_seconds
from ._controls import field, player
from ._explorer import LONGEST_REPR, Explorer
from ._html import map_table, pill, preformatted, short

BLOCKS = 10  # of the shipped GPT
TIMES = 256  # a block of it, 1.58 MB, is shown as large as one of llama-2-7b in bfloat16, 404 MB
PROMPT = "def "
ONE_BY_ONE, PREFETCH = "one by one", "prefetch"


def _preset(gpu0: int, gpu1: int, ram: int, spread: bool = False, rate: float = 30.0) -> dict[str, Any]:
    """Blocks on each place (the others rest on disk), whether GPU 0's are spread, and rates in GB/s."""
    rates = {"link": 25.0, "disk": 6.0, "rate": rate, "cpu": 20.0}
    return {"gpu0": gpu0, "gpu1": gpu1, "ram": ram, "spread": spread, **rates}


PRESETS = {
    "two GPUs, RAM and disk": _preset(2, 2, 3),
    "everything in RAM": _preset(0, 0, 10),
    "half on the GPU": _preset(5, 0, 5),
    "half on the GPU, spread": _preset(5, 0, 5, spread=True),
    "everything on disk": _preset(0, 0, 0),
    "one token, RTX 4090": _preset(4, 0, 6, rate=1000.0),
}


class Performance(NamedTuple):
    """A real run, when what happens in it by the rates of the controls, and both ways to run it, by name."""

    recording: Observation
    schedule: Schedule
    charts: dict[str, Schedule]


class HookTheatre(Explorer):
    """Step through a forward of a model whose weights rest in four places.

    The controls are `step` (or `play`), `mode` ("one by one" or "prefetch"), `slots`, `tokens`, `preset`; `gpu0`,
    `gpu1` and `ram`, the blocks that rest there (the others rest on disk); `spread`; and `link`, `disk`, `rate` and
    `cpu` in GB/s: how fast GPU 0 is given weights, how fast files are read, and how many bytes of weights a GPU and the
    CPU work through.
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
    HookTheatre(blocks 0+0+10+0, prefetch, 2 slots, step 3 of 50, after 3.36 ms: wpe returns)
    """

    presets = PRESETS
    steering = ("play",)
    missing = "nothing has run yet"
    cure = "place no more blocks than the model has"

    def __init__(
        self, preset: str = "two GPUs, RAM and disk", *, mode: str = PREFETCH, slots: int = 2, tokens: int = 2
    ) -> None:
        if mode not in (ONE_BY_ONE, PREFETCH):
            raise ValueError(f"unknown mode {mode!r}: expected {ONE_BY_ONE!r} or {PREFETCH!r}")
        self._recordings: dict[tuple[Any, ...], Observation] = {}
        start = PRESETS.get(preset) or next(iter(PRESETS.values()))
        blocks = {"min": 0, "max": BLOCKS}
        rates = {"min": 0.1, "max": 10_000, "step": 1}
        modes = widgets.ToggleButtons(options=[ONE_BY_ONE, PREFETCH], value=mode, style={"button_width": "110px"})
        play, step = player(0, 1, 700, "Step")
        super().__init__(
            {
                "Play, or step with the arrow keys": {"play": play, "step": step.add_class("bigkit-step-slider")},
                "How weights are brought": {
                    "mode": modes.add_class("bigkit-mode"),
                    "slots": field(widgets.IntSlider, "Slots", slots, min=1, max=4),
                    "tokens": field(widgets.IntSlider, "Tokens", tokens, min=1, max=3),
                },
                "Where blocks rest (else: disk)": {
                    "preset": self.preset_menu("Preset", preset),
                    "gpu0": field(widgets.IntSlider, "GPU 0", start["gpu0"], **blocks),
                    "gpu1": field(widgets.IntSlider, "GPU 1", start["gpu1"], **blocks),
                    "ram": field(widgets.IntSlider, "RAM", start["ram"], **blocks),
                    "spread": field(widgets.Checkbox, "Spread GPU 0's blocks evenly", start["spread"], indent=False),
                },
                "How fast": {
                    "link": field(widgets.BoundedFloatText, "Link, GB/s", start["link"], **rates),
                    "disk": field(widgets.BoundedFloatText, "Disk, GB/s", start["disk"], **rates),
                    "rate": field(widgets.BoundedFloatText, "Work, GB/s", start["rate"], **rates),
                    "cpu": field(widgets.BoundedFloatText, "CPU, GB/s", start["cpu"], **rates),
                },
            },
            {
                "What happened, step by step": self._story_pane,
                "Device map": lambda: map_table(self.device_map),
                "If the CPU computes, too": self._ways_pane,
            },
        )

    recording = property(lambda self: self.result and self.result.recording)
    schedule = property(lambda self: self.result and self.result.schedule)
    charts = property(lambda self: self.shown.charts)

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
        away = ["cpu"] * ram + ["disk"] * (BLOCKS - placed)
        blocks: list[Device] = [0] * first + [1] * second + away
        if self.spread.value:
            here, rest = spread([1] * (BLOCKS - second), first), iter(away)
            blocks = [0 if i in here else next(rest) for i in range(BLOCKS - second)] + [1] * second
        before: dict[str, Device] = {"transformer.wte": 0, "transformer.wpe": 0, "transformer.drop": 0}
        after: dict[str, Device] = {"transformer.ln_f": ends, "lm_head": ends}
        return {**before, **{f"transformer.h.{i}": device for i, device in enumerate(blocks)}, **after}

    # -- the run

    def compute(self) -> Performance:
        """Run the model as the controls say, unless it has run so before, and find when what happens."""
        places = self.device_map
        prefetch = self.mode.value == PREFETCH
        slots = self.slots.value if prefetch else 1
        key = (*places.values(), slots, prefetch, self.tokens.value)
        if key not in self._recordings:
            self._recordings[key] = _run(places, slots, prefetch, self.tokens.value)
        recording = self._recordings[key]
        rates = [control.value * GB for control in (self.rate, self.link, self.disk)]
        shown = recording.schedule(*rates, ahead=prefetch)
        options: dict[str, Any] = {"link": shown.link, "disk": shown.disk, "tokens": shown.tokens}
        turns = [turn._replace(name=turn.name.removeprefix("transformer.")) for turn in shown.turns]
        count = self.slots.value
        charts = {
            ONE_BY_ONE: schedule(turns, slots=1, prefetch=False, ahead=False, **options),
            f"{PREFETCH}, {counted(count, 'slot')}": schedule(turns, slots=count, **options),
        }
        return Performance(recording, shown, charts)

    def show(self, performance: Performance) -> None:
        recording, shown, charts = performance
        with self.together():
            last = len(shown.frames) - 1
            self.step.max = self.play.max = last
            self._waiting = False
        step = shown.frames[self.step.value]
        slow, fast = charts.values()
        written, equal = recording.result
        gain = slow.per_token / fast.per_token
        bound = {"compute": "work itself", "link": "the link", "disk": "the disk"}[fast.bound]
        news = "good" if gain >= 1.2 or fast.bound == "compute" else "slow"
        if shown.prefetch:
            headline, facts = "Prefetch", f"{gain:.2f} times as fast as one by one"
        else:
            headline, facts = "One by one", f"prefetch would be {gain:.2f} times as fast"
        headline += f": {format_seconds(charts[self._chart].per_token)} a token,"
        verdict = pill(news, headline, f"{facts}; {bound} has the most to do.")
        arriving = sum(shown.turns[i].nbytes for i in shown.scene(step).arriving)
        flight = f"In flight: {format_bytes(arriving, 'si')}. " if arriving else "Nothing is in flight. "
        end = f"It wrote {written!r}, as the whole model does: {equal}." if self.step.value == last else ""
        facts = f"{run_caption(charts[self._chart], step)} {flight}{end}"
        verdict += pill("good" if equal else "bad", f"Step {self.step.value} of {last},", facts)
        title = "Ten blocks, each as large as one of a 7B, over " + ", ".join(
            dict.fromkeys(device_label(turn.rests) for turn in shown.turns)
        )
        self.put(verdict, run_figure(charts, self._chart, step, title), run_text(charts, self._chart, step))

    @property
    def _chart(self) -> str:
        return [*self.charts][0 if self.mode.value == ONE_BY_ONE else 1]

    # -- code and export

    def to_code(self) -> str:
        shown = self.shown.schedule
        places = "\n".join(f"    {name!r}: {device!r}," for name, device in self.device_map.items())
        return (
            "import torch\n\nfrom bigkit import init_empty_weights, load_checkpoint_and_dispatch\n"
            "from bigkit.offload.observe import observe\nfrom bigkit.zoo.gpt import GPT, PYGPT, GPTConfig, encode\n\n"
            f"device_map = {{\n{places}\n}}\n"
            "with init_empty_weights():\n    model = GPT(GPTConfig('pygpt')).eval()\n"
            "model = load_checkpoint_and_dispatch(\n"
            f"    model, PYGPT, device_map, dtype='bfloat16', slots={shown.slots}, prefetch={shown.prefetch},\n"
            "    main_device=0, force_hooks=True, stand_in={0: 'cpu', 1: 'cpu'},  # without it: on the GPUs\n"
            ")\n"
            f"prompt = torch.tensor([encode({PROMPT!r})])\n"
            f"recording = observe(model, lambda: model.generate(prompt, {shown.tokens})).enlarged({TIMES})\n"
            f"found = recording.schedule(rate={self.rate.value * GB:g}, link={shown.link:g}, disk={shown.disk:g}, "
            f"ahead={shown.ahead})\n"
        )

    def content(self) -> dict[str, Any]:
        """What is shown, as plain data: what was recorded, and when it happens, each way."""
        recording, shown, charts = self.shown
        return {
            "mode": self.mode.value, "slots": shown.slots, "tokens": shown.tokens, "device_map": self.device_map,
            "link": shown.link, "disk": shown.disk, "rate": self.rate.value * GB,
            "turns": [turn._asdict() for turn in shown.turns],
            "recorded": [event._asdict() for event in recording.events],
            "charts": {
                name: {"first_token": chart.ends[0], "last_token": chart.per_token, "busy": chart.busy,
                       "spans": [{**span._asdict(), "turn": chart.turns[span.turn].name} for span in chart.spans]}
                for name, chart in charts.items()
            },
        }  # fmt: skip

    def _story_pane(self) -> str:
        _, shown, charts = self.shown
        lines = [f"{i:>4}  {run_news(charts[self._chart], step)}" for i, step in enumerate(shown.frames)]
        return f'<div style="max-height:300px;overflow:auto">{preformatted(chr(10).join(lines))}</div>'

    def _ways_pane(self) -> str:
        """The blocks that rest in RAM: streamed, their MLPs computed there, or both at once."""
        shown = self.shown.schedule
        away = [turn for turn in shown.turns if ".h." in turn.name and turn.rests == "cpu"]
        if len(away) < 2:
            return preformatted("Let two blocks or more rest in RAM.")
        count, cpu = len(away), self.cpu.value * GB
        mlp = away[0].nbytes * 2 / 3  # its share of a block's weights
        computed = {"streamed": (), "MLPs computed in RAM": range(count), "both: every second MLP": range(1, count, 2)}
        ways = {
            name: play(count, away[0].nbytes, away[0].seconds, shown.link, slots=max(2, shown.slots), tokens=2,
                       mlp=mlp, cpu=cpu, on_cpu=own)
            for name, own in computed.items()
        }  # fmt: skip
        title = f"{counted(count, 'block')} of a 7B in RAM, two tokens"
        alone, *others = (way.per_token for way in ways.values())
        gain = alone / min(others)
        if gain > 1.02:
            says = "good", "The CPU helps:", f"a token is {gain:.2f} times as fast as if all blocks travel."
        else:
            says = "slow", "The CPU does not help here:", "if all blocks travel, a token takes no longer."
        verdict = pill(*says, role="note")
        return verdict + ways_figure(ways, title, "block ").svg + preformatted(ways_text(ways))

    def summary(self, performance: Performance) -> list[str]:
        """How many blocks rest on each place, the way to run, and what has just happened."""
        _, shown, charts = performance
        blocks = [turn for turn in shown.turns if ".h." in turn.name]
        counts = "+".join(str(sum(turn.rests == place for turn in blocks)) for place in (0, 1, "cpu", "disk"))
        mode = f"{PREFETCH}, {counted(shown.slots, 'slot')}" if shown.prefetch else ONE_BY_ONE
        news = run_news(charts[self._chart], shown.frames[self.step.value])
        head = f"blocks {counts}, {mode}, step {self.step.value} of {len(shown.frames) - 1}, "
        return [head + short(news, LONGEST_REPR - len(head) - len("HookTheatre()"))]


def _run(places: dict[str, Device], slots: int, prefetch: bool, tokens: int) -> Observation:
    """Generate tokens with a spread-out model; the result is the text, and whether the whole model writes it too."""
    import torch

    from ..meta.empty import init_empty_weights
    from ..offload.load_and_dispatch import load_checkpoint_and_dispatch
    from ..zoo.gpt import GPT, PYGPT, GPTConfig, decode, encode, load_pygpt

    with init_empty_weights():
        model = GPT(GPTConfig("pygpt")).eval()
    load_checkpoint_and_dispatch(
        model, PYGPT, places, dtype="bfloat16", slots=slots, prefetch=prefetch, stand_in={0: "cpu", 1: "cpu"},
        force_hooks=True, main_device=0,
    )  # fmt: skip
    prompt = torch.tensor([encode(PROMPT)])
    recording = observe(model, lambda: model.generate(prompt, tokens))
    expected = load_pygpt().generate(prompt, tokens)
    result = (decode(recording.result[0]), bool(torch.equal(recording.result, expected)))
    return replace(recording, result=result).enlarged(TIMES)
