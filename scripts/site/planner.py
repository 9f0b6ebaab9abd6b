"""What the page asks of bigkit: `answer(tab, values)` turns the text of its fields into a verdict, pictures and a text.

It runs in the browser under Pyodide, and anywhere else: it needs only the wings of bigkit that import no torch. Values
come as text, as a link or a field has them; whatever is wrong with them is one sentence under "error".

Leaves out: the page (`page.js`), and the runs that `make site` records for the tab "watch" (`scripts/make_site.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from bigkit import zoo
from bigkit.checkpoints.shards import cut_model
from bigkit.devices import Device, device_label, read_device
from bigkit.distributed.shares import Shares
from bigkit.draw.advice import advice_figure
from bigkit.draw.canvas import Picture
from bigkit.draw.plan import moved, plan_figure, plan_text, plan_verdict
from bigkit.draw.run import run_caption, run_figure, run_text
from bigkit.draw.shards import shards_figure, shards_text, shards_verdict
from bigkit.draw.shares import shares_figure, shares_text
from bigkit.machine.hardware import GPUS, HARDWARE, machine_of
from bigkit.machine.ledger import overhead_of
from bigkit.machine.streams import Schedule, Turn, schedule
from bigkit.maps.advise import TARGETS, advise
from bigkit.maps.plan import Plan, PlanError
from bigkit.maps.strategies import STRATEGIES, place
from bigkit.model.spec import QUANTIZATIONS, ModelSpec
from bigkit.units import GB, GiB, counted, format_seconds
from bigkit.zoo import catalog, hub

Values = Mapping[str, str]
AS_STORED = "as published"
DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn")
SLOTS = {"one by one": 1, "prefetch, 2 slots": 2, "prefetch, 3 slots": 3}  # ways to bring weights -> slots
MOST_GPUS = 16
LONGEST = 400  # letters of a value that are read
RUNS = Path(__file__).with_name("runs.json")  # in the browser; written by `scripts/make_site.py`


def _field(label: str, value: object, kind: str = "text", **options: Any) -> dict[str, Any]:
    return {"label": label, "value": str(value), "kind": kind, **options}


_LOAD = {
    "context": _field("Context, tokens", 4096, "number", min=1, max=2**24, steps=[2**n for n in range(7, 21)]),
    "batch": _field("Sequences at once", 1, "number", min=1, max=65536),
}
_MODEL = _field("Which model?", "qwen3-32b", list="models")
_MACHINE = _field("Which machine?", "RTX 4090", list="machines")
_HOW = _field("Stored as", AS_STORED, "select", options=[AS_STORED, *DTYPES, *QUANTIZATIONS])
_RATE = {"kind": "number", "min": 0.001, "max": 100_000, "any": True}

TABS: dict[str, dict[str, Any]] = {
    "fit": {
        "title": "Does it fit?",
        "about": "How to store a model so that it fits a machine, and how fast it then writes. Click on a way to "
        "see its plan below.",
        "fields": {
            "model": _MODEL,
            "machine": _MACHINE,
            **_LOAD,
            "target": _field("Best by", "speed", "select", options=[*TARGETS]),
            "way": _field("The way whose plan is shown", "", "hidden"),  # as it is stored: "nf4"
        },
    },
    "plan": {
        "title": "Who holds what?",
        "about": "Which layer lies on which device. Give the devices other sizes, or drag a layer or a "
        "boundary in the picture.",
        "fields": {
            "model": {**_MODEL, "clears": ["custom"]},
            "machine": {**_MACHINE, "clears": ["gpus", "ram", "disk", "custom"]},
            "gpus": _field("GPUs, GiB each", "", "sliders", max=192, step=0.25),
            "ram": _field("RAM, GiB", "", "number", min=0, max=2**15, any=True),
            "disk": _field("Disk, GiB", "", "number", min=0, max=2**20, any=True),
            "stored": _HOW,
            "strategy": _field("Where to cut", "auto", "select", options=[*STRATEGIES], clears=["custom"]),
            **_LOAD,
            "custom": _field("A map of your own", "", "hidden"),  # places and how many layers each: "0*20,cpu*16"
            "drag": _field("What is dragged", "", "hidden"),  # marks of the picture: "layer:3>device:cpu"
        },
    },
    "files": {
        "title": "How is it cut into files?",
        "about": "Which file of a checkpoint holds which tensor, by the rule that everybody's files follow.",
        "fields": {
            "model": _MODEL,
            "stored": _field("Stored as", AS_STORED, "select", options=[AS_STORED, *DTYPES]),
            "limit": _field("Largest file", "5GB"),
            "find": _field("Find a tensor", "lm_head"),
        },
    },
    "split": {
        "title": "Who gets which prompt?",
        "about": "How prompts are shared between processes, and who waits for whom.",
        "fields": {
            "items": _field("Prompts", 10, "range", min=0, max=64),
            "processes": _field("Processes", 4, "range", min=1, max=16),
            "padding": _field("Repeat the last prompt until all shares are equally long", "no", "check"),
        },
    },
    "watch": {
        "title": "Watch it move",
        "about": "A run of a real model whose weights lie in four places, recorded when this page was built. What was "
        "fetched when, and into which slot, is what happened; how long it takes follows from the rates below, for "
        "blocks as large as those of a 7B.",
        "fields": {
            "preset": _field("Where blocks rest", "", "select", options=[]),
            "way": _field("How weights are brought", "prefetch, 2 slots", "select", options=[*SLOTS]),
            "step": _field("Step", 14, "range", min=0, max=9999, play=True),
            "link": {"label": "Link to the GPU, GB/s", "value": "25", **_RATE},
            "disk": {"label": "Disk, GB/s", "value": "6", **_RATE},
            "rate": {"label": "GPU works through, GB/s", "value": "30", **_RATE},
        },
    },
}  # fmt: skip


def form() -> dict[str, Any]:
    """What the page shows before Python has started: tabs, fields, and the names to choose from."""
    tabs = json.loads(json.dumps(TABS))
    presets = [*_runs()]
    tabs["watch"]["fields"]["preset"] |= {"options": presets, "value": presets[0]}
    return {
        "tabs": tabs,
        "models": [[entry.name, entry.about] for entry in zoo.ENTRIES],
        "machines": [*dict.fromkeys([*HARDWARE, *GPUS])],
    }


def answer(tab: str, values: Values) -> dict[str, Any]:
    """What follows from the fields of a tab.

    Returns:
        "news" ("good", "slow" or "bad"), "headline", "facts", "pictures" (SVG texts), "text" and "code", and for some
        tabs "fields", values that the page shows in its own; or "error", one sentence.
    """
    try:
        if tab not in TABS:
            raise ValueError(f"there is no tab {tab!r}: expected one of {', '.join(TABS)}")
        known = {name: field["value"] for name, field in form()["tabs"][tab]["fields"].items()}
        return _ANSWERS[tab]({**known, **{name: value[:LONGEST] for name, value in values.items() if name in known}})
    except ImportError as error:
        return {"error": f"A page cannot do this, it needs Python on your machine: {error}."}
    except (ValueError, TypeError, OSError) as error:
        return {"error": str(error)}


# ---------------------------------------------------------------------------------------------------------------------
# The tabs


def _fit(values: Values) -> dict[str, Any]:
    spec, machine = _spec(values), machine_of(values["machine"])
    batch, context = _whole(values, "batch"), _whole(values, "context")
    advice = advise(spec, machine, batch, context, _choice(values, "target", TARGETS))
    load = f"batch={batch}, context={context}, target={advice.target!r}"
    call = f"advise({advice.model!r}, {values['machine']!r}, {load})"
    code = f"from bigkit import advise\n\nadvice = {call}\nprint(advice)\n"
    best = advice.best
    plans = {plan.stored: plan for plan in (*(option.plan for option in advice.options), *advice.misfits)}
    shown = plans.get(values["way"]) or next(iter(plans.values()), None)
    pictures = [advice_figure(advice), *([plan_figure(shown)] if shown else [])]
    facts = [best.reason] if best else [*advice.cures[:1]]
    if best and best.plan.longest:
        facts.append(f"The longest context here: {best.plan.longest}.")
    news = "bad" if best is None else "slow" if best.plan.offloaded else "good"
    return _said(news, advice.verdict, " ".join([*facts, *advice.notes]), pictures, advice.explain(), code)


def _plan(values: Values) -> dict[str, Any]:
    spec, machine = _spec(values), machine_of(values["machine"])
    own = any(values[name] for name in ("gpus", "ram", "disk"))
    budgets = _budgets(values, machine.max_memory()) if own else machine.max_memory()
    stored = _choice(values, "stored", (AS_STORED, *DTYPES, *QUANTIZATIONS))
    options: dict[str, Any] = {
        "dtype": stored if stored in DTYPES else "bfloat16" if stored in QUANTIZATIONS else None,
        "quantization": stored if stored in QUANTIZATIONS else None,
        "batch": _whole(values, "batch"), "context": _whole(values, "context"), "overhead": overhead_of(machine),
    }  # fmt: skip
    plan = _closest(spec, budgets, strategy=_choice(values, "strategy", STRATEGIES), **options)
    if values["custom"]:
        plan = _closest(spec, budgets, strategy=_own_map(values["custom"], plan), **options)
    if values["drag"]:
        plan = _closest(spec, budgets, strategy=moved(plan, *values["drag"].split(">", 1)), **options)
    news = "bad" if not plan.feasible else "slow" if plan.offloaded else "good"
    headline = {"bad": "It does not fit.", "slow": "It fits, with help from RAM or disk.", "good": "It fits."}[news]
    details = [plan_verdict(plan).partition(", " if plan.feasible else ": ")[2], *plan.notes]
    if plan.longest:
        details.append(f"the longest context here: {plan.longest}")
    facts = " ".join(f"{detail[0].upper()}{detail[1:].rstrip('.')}." for detail in details if detail)
    gpus = [size for device, size in budgets.items() if device not in ("cpu", "disk")]
    shown = {"gpus": ",".join(map(_gib, gpus)), "ram": _gib(budgets.get("cpu", 0)), "disk": _gib(budgets["disk"])}
    if plan.strategy == "custom":
        facts += " This is a map of your own."
        runs = groupby(layer.device for layer in plan.layers)
        shown["custom"] = ",".join(f"{device}*{len([*run])}" for device, run in runs)
    return _said(news, headline, facts, [plan_figure(plan)], f"{plan_text(plan)}\n\n{plan.explain()}",
                 plan.to_code()) | {"fields": shown}  # fmt: skip


def _own_map(custom: str, plan: Plan) -> dict[str, Device]:
    """The map that "0*20,cpu*16" says, for the layers of a plan."""
    runs = [run.partition("*") for run in custom.split(",")]
    if not all(count.isdecimal() and 0 < int(count) <= len(plan.layers) for _, _, count in runs):
        raise ValueError(f"a map of your own is places and numbers of layers, as in 0*20,cpu*16, not {custom[:80]!r}")
    places = [read_device(place) for place, _, count in runs for _ in range(int(count))]
    if len(places) != len(plan.layers):
        raise ValueError(f"the map of your own has {len(places)} layers and {plan.model} has {len(plan.layers)}")
    return {layer.name: place for layer, place in zip(plan.layers, places)}


def _files(values: Values) -> dict[str, Any]:
    spec, find = _spec(values), values["find"].strip()
    stored = _choice(values, "stored", (AS_STORED, *DTYPES))
    dtype = None if stored == AS_STORED else stored
    made = cut_model(spec, values["limit"].strip(), dtype)
    found = made.find(find) if find else {}
    facts = f"{shards_verdict(made).partition(', ')[2]}."
    if find:
        where = f", in {counted(len({*found.values()}), 'file')}" if found else ""
        facts += f" {counted(len(found), 'name')} with “{find}” in them{where}."
    code = (f"from bigkit import describe\nfrom bigkit.checkpoints.shards import cut_model\n\n"
            f"cut = cut_model(describe({spec.name!r}), {values['limit'].strip()!r}, {dtype!r})\n"
            f"print(cut.sizes, cut.find({find!r}))\n")  # fmt: skip
    headline = f"{counted(len(made.files), 'file')}."
    return _said("good", headline, facts, [shards_figure(made, find)], shards_text(made, find), code)


def _split(values: Values) -> dict[str, Any]:
    split = Shares(_whole(values, "items"), _whole(values, "processes"), values["padding"] == "yes")
    turns = split.rounds * split.processes
    facts = f"{split.speedup:.2f} times as fast as one process."
    if split.padded:
        facts += f" {counted(split.padded, 'result')} of {len(split.gathered)} are repeats, which must be dropped."
    if empty := sum(not part for part in split.parts):
        facts += f" {empty} of {split.processes} processes have nothing to do."
    code = (
        "from bigkit import PartialState\n\n"
        f"with PartialState().split_between_processes(prompts, apply_padding={split.padding}) as mine:\n    ...\n"
    )
    headline = f"{counted(split.rounds, 'turn')} instead of {split.items}."
    news = "good" if turns == split.items else "slow"
    return _said(news, headline, facts, [shares_figure(split)], shares_text(split), code)


def _watch(values: Values) -> dict[str, Any]:
    run = _runs()[_choice(values, "preset", [*_runs()])]
    way, step = _choice(values, "way", [*SLOTS]), _whole(values, "step")
    rates = {name: _number(values, name) * GB for name in ("link", "disk", "rate")}
    charts = {way: _schedule(run["turns"], tuple(rates.values()), way) for way in SLOTS}
    shown = charts[way]
    last = len(shown.frames) - 1
    step = min(step, last)
    frame = shown.frames[step]
    slow = charts["one by one"]
    gain = slow.per_token / shown.per_token
    headline = f"{format_seconds(shown.per_token)} a token, {gain:.2f} times as fast as one by one."
    facts = f"Step {step} of {last}. {run_caption(shown, frame)}"
    if step == last:
        facts += f" It wrote {run['wrote']!r}, as the whole model does."
    news = "good" if shown.bound == "compute" else "slow"
    named = {name: chart for name, chart in charts.items() if name in ("one by one", way)}
    places = dict.fromkeys(device_label(turn.rests) for turn in shown.turns)
    title = "Ten blocks, each as large as one of a 7B, over " + ", ".join(places)
    picture = run_figure(named, way, frame, title)
    return _said(news, headline, facts, [picture], run_text(named, way, frame), "from bigkit.widgets import HookTheatre"
                 f"\n\nHookTheatre({values['preset']!r})\n") | {"last": {"step": last}}  # fmt: skip


_ANSWERS: dict[str, Callable[[Values], dict[str, Any]]] = {
    "fit": _fit, "plan": _plan, "files": _files, "split": _split, "watch": _watch,
}  # fmt: skip


def _said(news: str, headline: str, facts: str, pictures: list[Picture], text: str, code: str) -> dict[str, Any]:
    return {"news": news, "headline": headline, "facts": facts, "pictures": [picture.svg for picture in pictures],
            "text": text, "code": code}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# From text to values


def _spec(values: Values) -> ModelSpec:
    """The record of a model that ships; a page has no way to ask the Hub."""
    name = values["model"].strip()
    if not name:
        raise ValueError("Name a model: the list has those that this page knows.")
    if catalog.find(name) is None:
        raise ValueError(
            f"This page knows the models in its list, and {name!r} is not among them.{hub.shipped_hint(name)} For any "
            f"other, install bigkit on your machine and ask there: bigkit advise {name}"
        )
    return zoo.describe(name)


def _gib(size: int) -> str:
    """Bytes as a field shows them, in GiB."""
    return f"{size / GiB:.2f}".removesuffix(".00")


def _closest(spec: ModelSpec, budgets: Mapping[Device, int], **options: Any) -> Plan:
    """The plan, or the one that comes closest if nothing fits."""
    try:
        return place(spec, budgets, **options)
    except PlanError as error:
        return error.plan


def _budgets(values: Values, machine: Mapping[Device, int]) -> dict[Device, int]:
    """Budgets as the fields say; what they leave open is the machine's."""
    given: dict[Device, int] = {}
    try:
        sizes = [float(size) for size in values["gpus"].split(",") if size.strip()]
    except ValueError:
        raise ValueError(f"GPUs are sizes in GiB with commas between, as in 24,24, not {values['gpus']!r}") from None
    if len(sizes) > MOST_GPUS or not all(0 <= size < 2**20 for size in sizes):
        raise ValueError(f"expected at most {MOST_GPUS} GPUs with sizes in GiB, not {values['gpus']!r}")
    if sizes:
        given = {i: round(size * GiB) for i, size in enumerate(sizes)}
    else:
        given = {device: size for device, size in machine.items() if device not in ("cpu", "disk")}
    for name, device in (("ram", "cpu"), ("disk", "disk")):
        size = _number(values, name) * GiB if values[name] else machine.get(device, 0)
        if size or device == "disk" or not given:
            given[device] = round(size)
    return given


def _number(values: Values, name: str) -> float:
    try:
        number = float(values[name].replace(",", ""))
        if not 0 <= number < 1e18 or (name in ("link", "disk", "rate") and number == 0 and "preset" in values):
            raise ValueError
    except ValueError:
        raise ValueError(f"{name} must be a number that is not negative, not {values[name]!r}") from None
    return number


def _whole(values: Values, name: str) -> int:
    field = next(tab["fields"][name] for tab in TABS.values() if name in tab["fields"])
    text = values[name].replace(",", "").strip()
    if not text.isdecimal() or not field["min"] <= int(text) <= field["max"]:
        raise ValueError(f"{name} must be a whole number from {field['min']} to {field['max']:,}, not {values[name]!r}")
    return int(text)


def _choice(values: Values, name: str, options: Any) -> str:
    if values[name] not in options:
        raise ValueError(f"unknown {name} {values[name]!r}: expected one of {', '.join(options)}")
    return values[name]


# ---------------------------------------------------------------------------------------------------------------------
# Recorded runs


@cache
def _runs() -> dict[str, Any]:
    runs: dict[str, Any] = json.loads(RUNS.read_text(encoding="utf-8"))
    return runs


def _schedule(turns: list[Any], rates: tuple[float, ...], way: str) -> Schedule:
    """When what was recorded happens, with rates in bytes a second of the link, the disk and the GPU's work."""
    link, disk, rate = rates
    timed = [Turn(name, nbytes, nbytes / rate, rests, works) for name, nbytes, rests, works in turns]
    ahead = way != "one by one"
    return schedule(timed, link=link, disk=disk, slots=SLOTS[way], prefetch=ahead, tokens=2, ahead=ahead)
