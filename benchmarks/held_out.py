"""Dry runs against runs that nobody had seen when the code was frozen.

    python benchmarks/held_out.py --draw CASES.json                            after the last commit, on any machine
    python benchmarks/held_out.py --foretell CASES.json FOLDER                 before the measurement, on any machine
    python benchmarks/held_out.py --measure CASES.json RESULTS.jsonl [--part 0/2]                    on a CUDA GPU
    python benchmarks/held_out.py --compare CASES.json FOLDER RESULTS.jsonl ... [--save FILE]        on any machine

The rule of the draw: the commit's hash is the seed. Of all types in Transformers that generate text from token ids and
that were neither in the table of `dryrun.py`, nor measured while the code was changed (`SEEN`), nor in an earlier draw
(`DRAWS`; those that were drawn but not reached may be drawn again), `TYPES` are drawn, and where these are too few, of
the types of earlier draws. Each has the sizes of its default configuration (a published model's), and as many of its
blocks as fit in `WEIGHTS`, and gets a load, drawn from `BATCHES`, `PROMPTS` and `NEW`; some are quantized, and of some
every second block rests in RAM. What a type's positions or `MOST_TOKENS` forbid is drawn again.

`--foretell` makes the dry runs, and keeps them whole: one file for each case. What they lack is the pace of the host.

`--measure` gives each case a process of its own, so that a kernel that fails ends nothing else. It runs `generate` with
random weights: once from an empty allocator, for the memory and for the first prompt of a process; then for the times,
in rounds: the narrow twin, the model, the twin, the model, ..., the twin. A twin runs what `calibrate(model=...)` runs.
The first round does not count, at least `LEAST` do. It writes after every stage, starts none after `--seconds`, and
goes on where it stopped if it is called again. Two processes with a GPU each want cores of their own (`taskset`).

`--compare` must run with the versions that foretold. A round's prediction is the dry run with the two twins around the
model's run; **what counts is the median over the rounds of predicted / measured**. (The first three draws took medians
of twins in turn with their models; the third one's first declared twins ran some seconds before, and failed.)
"""

from __future__ import annotations

import argparse
import copy
import gzip
import itertools
import json
import os
import pickle
import random
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import transformers.generation.utils
from torch import nn

from bigkit import init_empty_weights
from bigkit.dryrun.fake_bnb import config_of, fill_quantized, quantize_empty
from bigkit.dryrun.result import DryRun
from bigkit.dryrun.run import dry_run
from bigkit.dryrun.workload import Workload, at_random, fill
from bigkit.machine.hardware import GPUS, Hardware
from bigkit.machine.ledger import Calibration, HostStep, Twin
from bigkit.measure.allocations import settle
from bigkit.measure.twin import LOAD, SINGLE, issued_in, timed, twin_of
from bigkit.offload.dispatch import dispatch_model
from bigkit.offload.lenders import streamers_in
from bigkit.zoo._transformers import from_config

BATCHES, PROMPTS, NEW = (1, 3, 32), (1, 100, 777, 1900), (1, 4, 16, 32)
TYPES = 40
TOKENS = 5  # that are generated when times are taken
LEAST, MOST, EACH = 5, 15, 1.8  # rounds of a model that count, and seconds for them
WEIGHTS, MOST_BLOCKS, MOST_TOKENS = 10e9, 40, 32 * 777
SEEN = {  # in the table of dryrun.py, or measured while the code was changed
    "llama", "bloom", "gpt2", "mixtral", "deepseek_v3", "gemma2", "t5", "opt", "mistral", "qwen3", "qwen3_moe",
    "falcon", "gpt_neox", "phi3", "granite", "gemma3_text", "codegen", "bart", "cohere2", "olmo2", "falcon_mamba",
    "mamba2", "deepseek_v2", "glm4",
}  # fmt: skip
LOOPS = ("mamba", "falcon_mamba", "jamba", "recurrent_gemma", "rwkv", "xlstm", "minimax")  # over tokens, in Python
RATES = Path(__file__).parent / "results" / "dryrun.json"  # of an H200, measured before
DRAWS = [Path(__file__).parent / "results" / f"held-out{number}.json" for number in ("", "-2", "-3", "-4", "-5", "-6")]
DEVICE = "cuda"
DEPTHS = ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers",
          "num_encoder_layers", "n_layer", "n_layers")  # fmt: skip


def class_of(config: Any) -> type[nn.Module] | None:
    """The class that generates text from token ids, if there is one."""
    for mapping in (transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_CAUSAL_LM_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    return None


def cut(config: Any, blocks: int) -> Any:
    """A config with at most so many blocks; lists with an entry for each block are cut with them."""
    config = copy.deepcopy(config)
    for name, value in list(vars(config).items()):
        if name in DEPTHS and type(value) is int and value > blocks:
            for other, rows in list(vars(config).items()):
                if isinstance(rows, list) and len(rows) == value:
                    setattr(config, other, rows[:blocks])
            setattr(config, name, blocks)
    return config


def depth(config: Any) -> int:
    """The most blocks that a config says."""
    return max([value for name, value in vars(config).items() if name in DEPTHS and type(value) is int], default=1)


def empty(case: dict[str, Any]) -> nn.Module:
    """The case's model, on the meta device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.CONFIG_MAPPING[case["type"]](**case.get("sizes", {}))
        config = cut(config, case["blocks"])
        cls = class_of(config)
        assert cls is not None
        with init_empty_weights():
            model: nn.Module = from_config(cls, config, torch.bfloat16).eval()
    return model


def key_of(case: dict[str, Any]) -> str:
    """What a case is called: "olmo/3x777+4", "phi/1x100+16/nf4"."""
    parts = [
        case["type"],
        "{}x{}+{}".format(*case["load"]),
        case.get("quantization"),
        case.get("map") and "half in RAM",
    ]
    return "/".join(part for part in parts if part)


# ---------------------------------------------------------------------------------------------------------------------
# The draw


def blocks_of(kind: str) -> int:
    """How many blocks of a type's default configuration are taken; 0 if it is not drawn."""
    try:
        config = transformers.CONFIG_MAPPING[kind]()
        if class_of(config) is None or not hasattr(config, "vocab_size"):
            return 0
        sizes = []
        for count in (1, 8):
            model: Any = empty({"type": kind, "blocks": count})
            sizes.append(2 * sum(parameter.numel() for parameter in model.parameters()))
        if model.main_input_name != "input_ids" or not model.can_generate():
            return 0
    except Exception as error:
        print(f"{kind} is left out: {type(error).__name__}: {str(error)[:100]}", flush=True)
        return 0
    deep = depth(config)
    each = max(1.0, (sizes[1] - sizes[0]) / max(1, min(8, deep) - 1))
    fits = int(min(deep, MOST_BLOCKS, 1 + (WEIGHTS - sizes[0]) // each))
    return fits if fits >= 2 and sizes[0] + each * (fits - 1) >= 2e8 else 0


def measured_before() -> set[str]:
    """Types of which an earlier draw measured a run, or that it left out."""
    draws = [json.loads(path.read_text()) for path in DRAWS]
    kinds = {row["case"].partition("/")[0] for draw in draws for row in draw["rows"]}
    return kinds.union(*(draw.get("left out", ()) for draw in draws))


def draw(path: Path, seed: str) -> None:
    """Draw the cases, and write them with the commit."""
    chance = random.Random(int(seed[:12], 16))
    drawn_before = measured_before()
    groups = [sorted({*transformers.CONFIG_MAPPING} - SEEN - drawn_before), sorted(drawn_before)]
    for group in groups:
        chance.shuffle(group)
    cases: list[dict[str, Any]] = []
    for kind in itertools.chain(*groups):
        if len(cases) == TYPES:
            break
        if not (blocks := blocks_of(kind)):
            continue
        config = transformers.CONFIG_MAPPING[kind]()
        most = getattr(config, "max_position_embeddings", None) or 10**9
        most = most if most > 0 else 10**9  # XLNet says -1
        while True:
            batch, prompt, new = (chance.choice(values) for values in (BATCHES, PROMPTS, NEW))
            slow = prompt > 100 and any(name in kind for name in LOOPS)
            if prompt + new < most and batch * prompt <= MOST_TOKENS and not slow:
                break
        case: dict[str, Any] = {"type": kind, "blocks": blocks, "load": [batch, prompt, new]}
        if len(cases) % 8 == 3:
            case["quantization"] = ("nf4", "int8")[len(cases) // 8 % 2]
        if len(cases) % 12 == 6:
            case["map"] = "half"
        cases.append(case)
        print(f"{key_of(case)}: {blocks} blocks", flush=True)
    drawn = {"commit": seed, "transformers": transformers.__version__, "cases": cases}
    path.write_text(json.dumps(drawn, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# On the GPU


def places_of(case: dict[str, Any], model: nn.Module) -> dict[str, int | str]:
    """Module name -> where it rests."""
    if case.get("map") != "half":
        return {"": 0}
    places: dict[str, int | str] = {name: 0 for name, _ in model.named_children()}
    lists = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) > 1]
    name, blocks = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    places |= {name: 0 for name, _ in (*model.named_parameters(recurse=False), *model.named_buffers(recurse=False))}
    parent = name
    while "." in parent:  # around the blocks, everything is named apart
        parent = parent.rpartition(".")[0]
        places.pop(parent, None)
        around = model.get_submodule(parent)
        own = (*around.named_children(), *around.named_parameters(recurse=False), *around.named_buffers(recurse=False))
        places |= {f"{parent}.{child}": 0 for child, _ in own}
    places.pop(name, None)
    return places | {f"{name}.{i}": "cpu" if i % 2 else 0 for i in range(len(blocks))}


def in_blocks(empty: torch.Tensor, device: torch.device) -> nn.Parameter:
    """Random values; in RAM, where they take long to draw, a million of them again and again."""
    if device.type != "cpu":
        return at_random(empty, device)
    values = (0.02 * torch.randn(2**20)).to(empty.dtype)
    data = values.repeat(-(-empty.numel() // values.numel()))[: empty.numel()].reshape(empty.shape)
    return nn.Parameter(data, requires_grad=False)


def put_quantized(model: nn.Module, kind: str, device: str = DEVICE) -> nn.Module:
    """Give a model memory, quantized."""
    how = config_of(kind, "bfloat16")
    return fill_quantized(quantize_empty(model, how), {"": 0}, torch.device(device, 0), how)


def put(case: dict[str, Any], model: nn.Module) -> nn.Module:
    """Give a case's model memory."""
    if kind := case.get("quantization"):
        return put_quantized(model, kind)
    places = places_of(case, model)
    fill(model, places, in_blocks)
    return dispatch_model(model, places, 0) if len({*places.values()}) > 1 else model


def measure(case: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> str:
    """A case's memory from an empty allocator, then its times between its twin's; a line about them."""
    kind, load = case.get("quantization"), Workload(*case["load"])
    model, narrow = empty(case), None
    with suppress(ValueError):
        narrow = twin_of(model, kind is not None)
    settle(0)
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    model = put(case, model)
    first = timed(model, load, DEVICE)
    peak = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    write({"before": before, "peak": peak, "first": first})
    few = replace(load, new=min(load.new, TOKENS))
    loads = {} if narrow is None else {"twin": LOAD, "single": SINGLE} if load.prompt == 1 else {"twin": LOAD}
    twin = None if narrow is None else put(case, narrow)
    steps: list[Any] = []
    beside: dict[str, list[Any]] = {name: [] for name in loads}

    def look() -> None:
        for name, work in loads.items():
            beside[name].append(timed(twin, work, DEVICE))  # type: ignore[arg-type]

    start = time.perf_counter()
    while len(steps) < 1 + LEAST or (len(steps) < 1 + MOST and time.perf_counter() - start < EACH):
        look()
        for streamer in streamers_in(model):
            streamer.let_go()  # each prompt finds what rests in RAM there, as the dry run's
        steps.append(timed(model, few, DEVICE))
    look()
    beside = {name: runs[1:] for name, runs in beside.items()}
    write({"steps": steps[1:], "beside": beside})  # the first round chooses kernels
    return f"{peak[0] / 1e9:.2f} GB allocated, model {shown(steps[1:])}; twin {shown(beside.get('twin', []))}"


def in_a_process(task: Callable[[], None], seconds: float) -> str:
    """Do something in a copy of this process, which must not have used the GPU; says what ended it, or nothing."""
    if not (child := os.fork()):
        code = 1
        try:
            task()
            code = 0
        finally:
            os._exit(code)
    end = time.perf_counter() + seconds
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.perf_counter() > end:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return f"it took longer than {seconds:.0f} s"
        time.sleep(0.01)
    return "" if found[1] == 0 else f"its process ended with {os.waitstatus_to_exitcode(found[1])}"


def lines_of(path: Path) -> list[dict[str, Any]]:
    """What was written about the cases so far, in order."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure_all(source: Path, path: Path, part: tuple[int, int], seconds: float) -> None:
    """Measure this process's share of the cases; writes after each stage."""
    start = time.perf_counter()

    def write(about: dict[str, Any]) -> None:
        with path.open("a") as file:
            file.write(json.dumps(about) + "\n")

    def say(line: str) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {line}", flush=True)

    def one(case: dict[str, Any]) -> None:
        warnings.simplefilter("ignore")
        key = key_of(case)
        try:
            line = measure(case, lambda about: write({"case": key, **about}))
        except Exception as error:
            line = f"{type(error).__name__}: {error}"[:600]
            write({"case": key, "error": line})
        say(f"{key}  {line}")

    def machine() -> None:
        cores, name = len(os.sched_getaffinity(0)), torch.cuda.get_device_name(0)
        write({"machine": {"gpu": name, "cores": cores, **versions(), "cudnn": torch.backends.cudnn.version()}})
        say(f"{name}, {cores} cores")

    in_a_process(machine, 60)
    done = {about.get("case") for about in lines_of(path) if "steps" in about or "error" in about}
    for case in json.loads(source.read_text())["cases"][part[0] :: part[1]]:
        if key_of(case) in done:
            continue
        if time.perf_counter() - start > seconds:
            say(f"{key_of(case)}  late")
        elif problem := in_a_process(lambda: one(case), 40):  # noqa: B023
            write({"case": key_of(case), "error": problem})
            say(f"{key_of(case)}  {problem}")
    say("done")


# ---------------------------------------------------------------------------------------------------------------------
# On any machine


def versions() -> dict[str, str]:
    """Of what a dry run follows: it does what this PyTorch does, which another one may do otherwise."""
    return {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}


def issued_of(run: DryRun) -> list[int]:
    """Steps of the host in each step of a dry run."""
    ends = [0, *(end for _, end in run.steps)]
    return [sum(operation.issued for operation in run.operations[a:b]) for a, b in zip(ends, ends[1:])]


def rehearsed(case: dict[str, Any]) -> tuple[DryRun, list[int], list[int]]:
    """A case's dry run, without a twin, and the host's steps in its twin's work and in that of a single token."""
    warnings.simplefilter("ignore")
    calibration = Calibration.from_json(json.loads(RATES.read_text())["calibration"])
    kind, load = case.get("quantization"), Workload(*case["load"])
    hardware = Hardware("one H200", (GPUS["H200"],), 0, 0)
    run = dry_run(lambda: empty(case), places_of(case, empty(case)), load.batch, load.prompt, load.new, hardware,
                  calibration=calibration, quantization=kind, dtype="bfloat16" if kind else None)  # fmt: skip
    twins: list[list[int]] = [[], []]
    places = places_of(case, empty(case)) if case.get("map") else None  # the twin's parts rest as the model's do
    with suppress(ValueError):  # some have none
        twins = [issued_in(empty(case), few, kind, places) for few in ((LOAD, SINGLE) if load.prompt == 1 else (LOAD,))]
    return run, twins[0], twins[-1]


def file_of(folder: Path, key: str) -> Path:
    """Where what was foretold of a case lies."""
    return folder / f"{key.replace('/', '_').replace(' ', '_')}.gz"


def keep_foretold(folder: Path, key: str, work: Callable[[], tuple[Any, ...]]) -> None:
    """Keep what is said of a case, a dry run first, or why it cannot be; what is there stays."""
    path, start = file_of(folder, key), time.perf_counter()
    if path.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    said: Any
    try:
        said = work()
        line = f"{said[0].seconds}, {said[0].peak_allocated[0] / 1e9:.2f} GB, {said[1]}"
    except Exception as error:
        said = line = f"{type(error).__name__}: {error}"[:600]
    with gzip.open(path, "wb") as file:
        pickle.dump((versions(), said), file)
    print(f"{key}  {line}  ({time.perf_counter() - start:.1f} s)", flush=True)


def read_foretold(folder: Path, key: str, machine: dict[str, str]) -> Any:
    """What was said of a case, which must have been with the versions of the machine that measured it."""
    with gzip.open(file_of(folder, key)) as file:
        by, said = pickle.load(file)
    if by != machine:
        raise SystemExit(f"{key} was foretold with {by} and measured with {machine}: foretell it with these")
    return said


def foretell_all(source: Path, folder: Path, part: tuple[int, int]) -> None:
    """Make the dry runs of this process's share of the cases, a file for each."""
    for case in json.loads(source.read_text())["cases"][part[0] :: part[1]]:
        keep_foretold(folder, key_of(case), lambda: rehearsed(case))  # noqa: B023


def twin_from(case: dict[str, Any], rows: dict[str, Any], issued: list[int], single: list[int]) -> Twin | None:
    """The ledger's entry of a twin that was timed."""
    if not rows.get("twin") or not issued:
        return None

    def step(runs: list[list[float]], count: int) -> HostStep:
        return HostStep(*(statistics.median(row[part] for row in runs) for part in (0, 1)), count)

    tokens = [row for run in rows["twin"] for row in run[1:]]
    return Twin(
        case["type"],
        case.get("quantization"),
        step([run[0] for run in rows["twin"]], issued[0]),
        step(tokens, issued[-1]) if tokens else None,
        step([run[0] for run in rows["single"]], single[0]) if rows.get("single") else None,
    )


def predicted(case: dict[str, Any], folder: Path, machine: dict[str, str]) -> dict[str, Any]:
    """What a dry run said of a case: in each round, with all of its twins, and without one."""
    said = read_foretold(folder, key_of(case), machine)
    if isinstance(said, str):
        return {"error": said}
    guess, issued, single = said
    beside = case.get("beside", {})
    twin = twin_from(case, beside, issued, single)
    pairs = [{name: runs[i : i + 2] for name, runs in beside.items()} for i in range(len(case.get("steps", ())))]
    rounds = [replace(guess, twin=twin_from(case, pair, issued, single)) for pair in pairs]
    run = replace(guess, twin=twin)
    return {
        "twin": asdict(twin) if twin else None,
        "fits": guess.fits,
        "guessed": [guess.seconds["prefill"], guess.seconds.get("token")],
        "peak": [guess.peak_allocated[0], guess.peak_reserved[0]],
        "issued": issued_of(guess)[:2],
        "seconds": [step.seconds for step in run.times],
        "rounds": [[step.seconds for step in each.times] for each in rounds],
        "ranges": [[found.low, found.high] for name in ("prefill", "token") if (found := run.ranges.get(name))],
        "busy": [dict(step.busy) for step in run.times[:2]],
    }


def shown(runs: list[Any]) -> str:
    """The times of runs in a few words."""
    if not runs:
        return "-"
    tokens = [step[0] for run in runs for step in run[1:]]
    text = f"{1000 * statistics.median(run[0][0] for run in runs):.1f}"
    return f"{text} + {1000 * statistics.median(tokens):.1f} ms" if tokens else f"{text} ms"


def compare_all(source: Path, folder: Path, paths: list[Path], save: Path | None) -> None:
    """Compare what was foretold with every case that was measured, and print both."""
    drawn, lines = json.loads(source.read_text()), [line for path in paths for line in lines_of(path)]
    machine = next(line["machine"] for line in lines if "machine" in line)
    cases = {key_of(case): case for case in drawn["cases"]}
    for line in lines:
        if "case" in line and "error" not in cases[line["case"]]:
            cases[line["case"]].update({name: value for name, value in line.items() if name != "case"})
    late = [key for key, case in cases.items() if "steps" not in case and "error" not in case]
    for key, case in cases.items():
        if key in late:
            continue
        case["predicted"] = predicted(case, folder, {name: machine[name] for name in versions()})
        print(f"{key:44} not measured: {case['error'][:120]}" if "error" in case else row_of(case), flush=True)
    rows = [case for key, case in cases.items() if key not in late]
    print(summary(rows), f"\nnot reached: {', '.join(late) or 'none'}")
    if save:
        about = {"commit": drawn["commit"], "machine": machine, "late": late, "foretold with": versions()}
        save.write_text(json.dumps({**about, "rows": [kept(case) for case in rows]}, indent=1) + "\n")


def measured_times(case: dict[str, Any]) -> tuple[float, float | None]:
    """Seconds of the prompt, and of a token: medians."""
    tokens = [step[0] for run in case["steps"] for step in run[1:]]
    return statistics.median(run[0][0] for run in case["steps"]), statistics.median(tokens) if tokens else None


def compared(case: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Quantity -> predicted and measured, bytes or seconds."""
    said, (prompt, token) = case["predicted"], measured_times(case)
    held = {
        "allocated": (said["peak"][0], case["peak"][0] - case["before"][0]),
        "reserved": (said["peak"][1], case["peak"][1] - case["before"][1]),
        "prompt": (said["seconds"][0], prompt),
    }
    if token and len(said["seconds"]) > 1:
        held["token"] = statistics.mean(said["seconds"][1 : 1 + TOKENS]), token
    return held


def around(case: dict[str, Any]) -> dict[str, float]:
    """ "prompt" and "token" -> the median over the rounds of predicted / measured."""
    ratios: dict[str, list[float]] = {}
    for said, run in zip(case["predicted"]["rounds"], case["steps"]):
        ratios.setdefault("prompt", []).append(said[0] / run[0][0])
        if run[1:] and said[1:]:
            taken = statistics.median(step[0] for step in run[1:])
            ratios.setdefault("token", []).append(statistics.mean(said[1 : 1 + TOKENS]) / taken)
    return {name: statistics.median(row) for name, row in ratios.items()}


def errors_of(case: dict[str, Any]) -> dict[str, float]:
    """Quantity -> predicted / measured - 1: of times, in the median round."""
    ratios = {name: predicted / measured for name, (predicted, measured) in compared(case).items()}
    return {name: ratio - 1 for name, ratio in {**ratios, **around(case)}.items()}


def kept(case: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a case: the figures that are compared, with the twin's, or why there are none."""
    about = {"case": key_of(case), "blocks": case["blocks"]}
    said = case["predicted"]
    if "error" in case:
        told = said.get("error") or ("fits" if said["fits"] else "does not fit")
        return about | {"not measured": case["error"], "foretold": told}
    if "error" in said:
        return about | {"error": said["error"]}
    return about | {
        "compared": compared(case),
        "twin": said["twin"],
        "longest": [max(busy, key=busy.get) for busy in said["busy"]],
        "without twin": said["guessed"],
        "around": around(case),
        "ranges": said["ranges"],
        "first": [step[0] for step in case["first"][:2]],
        "runs": len(case["steps"]),
    }


def row_of(case: dict[str, Any]) -> str:
    """A case as a line."""
    said = case["predicted"]
    if "error" in said:
        return f"{key_of(case):44} not predicted: {said['error'][:200]}"
    errors, times = errors_of(case), measured_times(case)
    text = "  ".join(f"{name} {100 * error:+7.2f} %" for name, error in errors.items())
    shown = ", ".join(f"{1000 * seconds:.1f}" for seconds in times if seconds)
    busy = [{lane: f"{1000 * value:.1f}" for lane, value in step.items()} for step in said["busy"]]
    return f"{key_of(case):44} {text}   ({shown} ms; {busy}; first {case['first'][0][0]:.2f} s)"


def summary(cases: list[dict[str, Any]]) -> str:
    """How many were predicted within the bounds."""
    good = [case for case in cases if "error" not in case and "error" not in case["predicted"]]
    lines = [f"{len(good)} predicted of {len(cases)}"]
    errors_of_all = [errors_of(case) for case in good]
    in_turn = [{name: told / taken - 1 for name, (told, taken) in compared(case).items()} for case in good]
    for rows, suffix in ((errors_of_all, ""), (in_turn, ", medians")):
        for name, bound in (("allocated", 0.005), ("reserved", 0.03), ("prompt", 0.15), ("token", 0.15)):
            errors = [row[name] for row in rows if name in row]
            if errors and (bound == 0.15 or not suffix):
                near, worst = sum(abs(error) <= bound for error in errors), max(errors, key=abs)
                beyond = sum(abs(error) > 0.4 for error in errors)
                middle = statistics.median(map(abs, errors))
                within = f"{near} of {len(errors)} within {100 * bound:g} %, the median {100 * middle:.2f} %"
                lines.append(f"{name + suffix:24} {within}, the worst {100 * worst:+.1f} %, {beyond} beyond 40 %")
    held = [low <= taken <= high for case in good for (low, high), taken in zip(
        case["predicted"]["ranges"], (taken for taken in measured_times(case) if taken))]  # fmt: skip
    return "\n".join([*lines, f"in their ranges: {sum(held)} of {len(held)}"])


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", type=Path, metavar="CASES.json")
    parser.add_argument("--foretell", type=Path, nargs=2, metavar=("CASES.json", "FOLDER"))
    parser.add_argument("--measure", type=Path, nargs=2, metavar=("CASES.json", "RESULTS.jsonl"))
    parser.add_argument("--compare", type=Path, nargs="+", metavar="FILE", help="CASES.json FOLDER RESULTS.jsonl ...")
    parser.add_argument("--save", type=Path, metavar="FILE", help="keep the comparison")
    parser.add_argument("--part", default="0/1", help="this process's share: 0/2 is every second case")
    parser.add_argument("--seconds", type=float, default=300, help="start no case after this time")
    options = parser.parse_args()
    mine, of = map(int, options.part.split("/"))
    if options.draw:
        seed = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        draw(options.draw, seed)
    elif options.foretell:
        foretell_all(*options.foretell, (mine, of))
    elif options.measure:
        measure_all(*options.measure, (mine, of), options.seconds)
    elif options.compare:
        source, folder, *paths = options.compare
        compare_all(source, folder, paths, options.save)
    else:
        parser.error("say what to do: --draw, --foretell, --measure or --compare")


if __name__ == "__main__":
    main()
