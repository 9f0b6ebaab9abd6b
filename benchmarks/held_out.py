"""Dry runs against runs that nobody had seen when the code was frozen.

    python benchmarks/held_out.py --draw CASES.json [--known]                    after the last commit, on any machine
    python benchmarks/held_out.py --measure CASES.json RESULTS.json [--part 0/2]            on a CUDA GPU, one process
    python benchmarks/held_out.py --predict RESULTS.json ... [--save]                       on any machine

The rule of the draw: the commit's hash is the seed. Of all types in Transformers that generate text from token ids and
that were neither in the table of `dryrun.py`, nor measured while the code was changed (`SEEN`), nor drawn before
(`FIRST`), `TYPES` are drawn, each with the sizes of its default configuration (a published model's), and as many of its
blocks as fit in `WEIGHTS`. Each gets two loads, drawn from `BATCHES`, `PROMPTS` and `NEW`; some are quantized, and of
some every second block rests in RAM. What a type's positions or `MOST_TOKENS` forbid is drawn again. `--known` adds
what is no news, after the drawn runs: those of the first draw that were not measured, and the table of `dryrun.py`.

`--measure` runs `generate` with random weights: once from an empty allocator for the memory, then for the times, in
turn with its narrow twin, each time on the core that is fastest then, after a run of the twin that does not count. The
fastest tenth counts: a rented host changes its pace by a half and more within seconds. It writes after every run, and
starts none after `--seconds`. A kernel that fails ends the process: call it again, and it goes on after that run.
`--predict` compares; it must run with the versions of Transformers and PyTorch that the results name, where code
differs between them.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import statistics
import subprocess
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import dryrun
import torch
import transformers
from torch import nn

from bigkit import init_empty_weights
from bigkit.dryrun.fake_bnb import config_of, fill_quantized, quantize_empty
from bigkit.dryrun.result import DryRun
from bigkit.dryrun.run import dry_run
from bigkit.dryrun.workload import Workload, fill, work
from bigkit.machine.hardware import GPUS, Hardware
from bigkit.machine.ledger import Calibration, HostStep, Twin
from bigkit.measure.allocations import settle
from bigkit.measure.twin import LOAD, SINGLE, issued_in, timed, twin_of
from bigkit.offload.dispatch import dispatch_model
from bigkit.zoo import build
from bigkit.zoo._transformers import from_config

BATCHES, PROMPTS, NEW = (1, 3, 32), (1, 100, 777, 1900), (1, 4, 16, 32)
TYPES = 40
ROUNDS, TOKENS = 3, 5  # visits to a core, and tokens in each run
EACH, MOST = 0.4, 4  # seconds in which a model is run again on a visit, and how often at most
CORES: list[int] = []  # that this process may run on: with two processes, give each its own (taskset)
WEIGHTS, MOST_BLOCKS, MOST_TOKENS = 10e9, 40, 32 * 777
SEEN = {  # in the table of dryrun.py, or measured while the code was changed
    "llama", "bloom", "gpt2", "mixtral", "deepseek_v3", "gemma2", "t5", "opt", "mistral", "qwen3", "qwen3_moe",
    "falcon", "gpt_neox", "phi3", "granite", "gemma3_text", "codegen", "bart", "cohere2", "olmo2", "falcon_mamba",
    "mamba2", "deepseek_v2", "glm4",
}  # fmt: skip
LOOPS = ("mamba", "falcon_mamba", "jamba", "recurrent_gemma", "rwkv", "xlstm", "minimax")  # over tokens, in Python
RATES = Path(__file__).parent / "results" / "dryrun.json"  # of an H200, measured before
FIRST = Path(__file__).parent / "results" / "held-out.json"  # of the first draw
KEPT = Path(__file__).parent / "results" / "held-out-2.json"
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
    if "shape" in case:
        built: nn.Module = build.build(dryrun.config_of(case["model"], case["blocks"]), dtype="bfloat16").eval()
        return built
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.CONFIG_MAPPING[case["type"]](**case.get("sizes", {}))
        config = cut(config, case["blocks"])
        cls = class_of(config)
        assert cls is not None
        with init_empty_weights():
            model: nn.Module = from_config(cls, config, torch.bfloat16).eval()
    return model


def load_of(case: dict[str, Any]) -> Workload:
    """The case's work: plain calls for the table of `dryrun.py`."""
    if "shape" in case:
        return dryrun.load_of(case, dryrun.config_of(case["model"], case["blocks"]))
    return Workload(*case["load"])


def key_of(case: dict[str, Any]) -> str:
    """What a case is called: "olmo/3x777+4", "phi/1x100+16/nf4"; "gpt2-xl/8x512" in the table of `dryrun.py`."""
    if "shape" in case:
        return dryrun.key_of(case)
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
    """How many blocks of a type's default configuration are taken; 0 if it is not drawn.

    Its narrow twin must run on the CPU: some default configurations are of no model that runs.
    """
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
        deep = depth(config)
        each = max(1.0, (sizes[1] - sizes[0]) / max(1, min(8, deep) - 1))
        fits = int(min(deep, MOST_BLOCKS, 1 + (WEIGHTS - sizes[0]) // each))
        if fits < 2 or sizes[0] + each * (fits - 1) < 2e8:
            return 0
        twin = fill(twin_of(empty({"type": kind, "blocks": fits})).float(), {"": "cpu"})
        work(twin, Workload(1, 4, 1), "cpu", lambda step: None)
        return fits
    except Exception as error:
        print(f"{kind} is left out: {type(error).__name__}: {str(error)[:100]}", flush=True)
        return 0


def drawn_before() -> tuple[set[str], list[str]]:
    """Types of the first draw, and its runs that were not measured then."""
    first = json.loads(FIRST.read_text())
    runs = [*first["late"], *(row["case"] for row in first["rows"])]
    return {run.partition("/")[0] for run in runs} | {*first["left out"]}, first["late"]


def known() -> list[dict[str, Any]]:
    """The cases that are no news: what the first draw left, then the table of `dryrun.py`, its single prompts first."""
    cases: list[dict[str, Any]] = []
    for run in drawn_before()[1]:
        kind, load, *rest = run.split("/")
        numbers = [int(number) for number in load.replace("x", "+").split("+")]
        case: dict[str, Any] = {"type": kind, "blocks": blocks_of(kind), "load": numbers, "draw": "first"}
        for word in rest:
            case |= {"map": "half"} if word == "half in RAM" else {"quantization": word}
        cases.append(case)
    table = [{**case, "type": case["model"], "draw": "table"} for case in dryrun.cases([])]
    return cases + sorted(table, key=lambda case: [*dryrun.SHAPES].index(case["shape"]))


def draw(path: Path, seed: str, more: bool) -> None:
    """Draw the cases, and write them with the commit."""
    chance = random.Random(int(seed[:12], 16))
    order = sorted({*transformers.CONFIG_MAPPING} - SEEN - drawn_before()[0])
    chance.shuffle(order)
    pool: dict[str, int] = {}
    for kind in order:
        if len(pool) < TYPES and (blocks := blocks_of(kind)):
            pool[kind] = blocks
            print(f"{kind}: {blocks} blocks", flush=True)
    kinds = [*pool]
    cases: list[dict[str, Any]] = []
    for i, kind in enumerate(kinds):
        config = transformers.CONFIG_MAPPING[kind]()
        most = getattr(config, "max_position_embeddings", None) or 10**9
        loads: set[tuple[int, int, int]] = set()
        while len(loads) < 2:
            batch, prompt, new = (chance.choice(values) for values in (BATCHES, PROMPTS, NEW))
            slow = prompt > 100 and any(name in kind for name in LOOPS)
            if prompt + new < most and batch * prompt <= MOST_TOKENS and not slow:
                loads.add((batch, prompt, new))
        for j, load in enumerate(sorted(loads)):
            case: dict[str, Any] = {"type": kind, "blocks": pool[kind], "load": list(load)}
            if j == 1 and i % 8 == 3:
                case["quantization"] = ("nf4", "int8")[i // 8 % 2]
            if j == 1 and i % 12 == 6:
                case["map"] = "half"
            cases.append(case)
    print(f"{len(cases)} cases of {len(kinds)} types")
    drawn = {"commit": seed, "transformers": transformers.__version__, "cases": cases + (known() if more else [])}
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
    parent = name
    while "." in parent:  # around the blocks, everything is named apart
        parent = parent.rpartition(".")[0]
        places.pop(parent, None)
        places |= {f"{parent}.{child}": 0 for child, _ in model.get_submodule(parent).named_children()}
    places.pop(name, None)
    return places | {f"{name}.{i}": "cpu" if i % 2 else 0 for i in range(len(blocks))}


def put(case: dict[str, Any], model: nn.Module) -> nn.Module:
    """Give a case's model memory."""
    if kind := case.get("quantization"):
        how = config_of(kind, "bfloat16")
        return fill_quantized(quantize_empty(model, how), {"": 0}, torch.device("cuda", 0), how)
    places = places_of(case, model)
    fill(model, places)
    return dispatch_model(model, places, 0) if len({*places.values()}) > 1 else model


def measure(case: dict[str, Any], model: nn.Module) -> None:
    """A case's memory from an empty allocator, then its times, in turn with those of its narrow twin."""
    kind, load = case.get("quantization"), load_of(case)
    case["twin"], case["single"], narrow = [], [], None
    with suppress(ValueError):
        narrow = twin_of(model, kind is not None)
    model = copy.deepcopy(model)  # the empty one serves the type's next case
    settle(0)
    case["before"] = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    model = put(case, model)
    case["filled"] = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    start = time.perf_counter()
    work(model, load, "cuda", lambda step: None)
    torch.cuda.synchronize()
    case["took"] = time.perf_counter() - start
    case["peak"] = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    few = replace(load, new=min(load.new, TOKENS))
    twin = None if narrow is None else put({"type": case["type"], "quantization": kind}, narrow)
    case["steps"], case["cores"] = [], []
    for i in range(1 + ROUNDS):
        case["cores"].append(take_fastest_core())
        steps, twins, singles = [timed(model, few, "cuda")], [], []
        if twin is not None:
            timed(twin, LOAD, "cuda")  # what runs first on a core is slower
            twins = [timed(twin, LOAD, "cuda") for _ in range(2)]
            singles = [timed(twin, SINGLE, "cuda") for _ in range(3)] if load.prompt == 1 else []
        start = time.perf_counter()
        while len(steps) < MOST and time.perf_counter() - start < EACH:
            steps.append(timed(model, few, "cuda"))
        if i:  # the first ones choose kernels
            case["steps"] += steps
            case["twin"] += twins
            case["single"] += singles


def take_fastest_core() -> int:
    """Run on the core that is fastest now: others on the same host make a core slow for seconds."""
    number = torch.ones(1)
    paces = {}
    for core in CORES:
        os.sched_setaffinity(0, {core})
        paces[core] = min(_pace(number) for _ in range(3))
    found = min(paces, key=paces.__getitem__)
    os.sched_setaffinity(0, {found})
    return found


def _pace(number: torch.Tensor) -> float:
    start = time.perf_counter()
    for _ in range(300):
        number.add_(1)
    return time.perf_counter() - start


def profile(model: nn.Module, load: Workload) -> dict[str, Any]:
    """Kernel -> (calls, microseconds) of one run, the longest ones."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    with profiled(activities=[ProfilerActivity.CUDA]) as seen:
        work(model, load, "cuda", lambda step: None)
        torch.cuda.synchronize()
    rows = sorted(seen.key_averages(), key=lambda row: -row.self_device_time_total)
    return {row.key[:120]: (row.count, row.self_device_time_total) for row in rows[:40]}


def measure_all(source: Path, path: Path, part: tuple[int, int], seconds: float, profiles: bool) -> None:
    """Measure this process's share of the cases; writes after each."""
    start = time.perf_counter()
    drawn = json.loads(source.read_text())
    results: dict[str, Any] = {name: drawn[name] for name in ("commit", "transformers") if name in drawn}
    results |= {"cases": json.loads(path.read_text())["cases"] if path.exists() else [], "late": []}
    done = {key_of(case) for case in results["cases"]}

    def write(line: str) -> None:
        path.write_text(json.dumps(results) + "\n")
        print(f"{time.perf_counter() - start:5.0f} s  {line}", flush=True)

    results["machine"] = {
        "gpu": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cudnn": torch.backends.cudnn.version(),
    }
    torch.ones(1, device="cuda")
    CORES[:] = sorted(os.sched_getaffinity(0))
    write(f"{len(CORES)} cores")
    made: tuple[str, Any] = ("", None)
    kinds = list(dict.fromkeys(case["type"] for case in drawn["cases"]))[part[0] :: part[1]]
    for case in drawn["cases"]:
        if case["type"] not in kinds or key_of(case) in done:
            continue
        if time.perf_counter() - start > seconds:
            results["late"].append(key_of(case))
            continue
        try:
            if made[0] != case["type"]:
                made = (case["type"], empty(case))
            model = made[1]
            measure(case, model)
            if profiles:
                case["kernels"] = profile(put(case, copy.deepcopy(model)), load_of(case))
            line = f"{case['peak'][0] / 1e9:.2f} GB allocated, model {shown(case['steps'])}; twin {shown(case['twin'])}"
        except Exception as error:
            case["error"] = line = f"{type(error).__name__}: {error}"[:600]
        results["cases"].append(case)
        write(f"{key_of(case)}  {line}")
        settle(0)  # raises if a kernel has failed
    write("done")


# ---------------------------------------------------------------------------------------------------------------------
# On any machine


def issued_of(run: DryRun) -> list[int]:
    """Steps of the host in each step of a dry run."""
    ends = [0, *(end for _, end in run.steps)]
    return [sum(operation.issued for operation in run.operations[a:b]) for a, b in zip(ends, ends[1:])]


def rehearsed(case: dict[str, Any]) -> tuple[DryRun, list[int], list[int]]:
    """A case's dry run, without a twin, and the host's steps in its twin's work and in that of a single token."""
    warnings.simplefilter("ignore")
    calibration = Calibration.from_json(json.loads(RATES.read_text())["calibration"])
    kind, load = case.get("quantization"), load_of(case)
    hardware = Hardware("one H200", (GPUS["H200"],), 0, 0)
    run = dry_run(lambda: empty(case), places_of(case, empty(case)), load.batch, load.prompt, load.new, hardware,
                  calibration=calibration, quantization=kind, dtype="bfloat16" if kind else None,
                  all_logits=load.all_logits, generate=load.generate)  # fmt: skip
    twins: list[list[int]] = [[], []]
    with suppress(ValueError):  # some have none
        twins = [issued_in(empty(case), work, kind) for work in ((LOAD, SINGLE) if load.prompt == 1 else (LOAD,))]
    return run, twins[0], twins[-1]


def twin_from(case: dict[str, Any], issued: list[int], single: list[int]) -> Twin:
    """The ledger's entry of a twin that was timed."""

    def step(rows: list[list[float]], count: int) -> HostStep:
        return HostStep(*(best([row[part] for row in rows]) for part in (0, 1)), count)

    tokens = [row for run in case["twin"] for row in run[1:]]
    return Twin(
        case["type"],
        case.get("quantization"),
        step([run[0] for run in case["twin"]], issued[0]),
        step(tokens, issued[-1]) if tokens else None,
        step([run[0] for run in case["single"]], single[0]) if case["single"] else None,
    )


def predicted(case: dict[str, Any]) -> dict[str, Any]:
    """What a dry run says of a case, with the twin and without it."""
    start = time.perf_counter()
    guess, issued, single = rehearsed(case)
    twin = twin_from(case, issued, single) if case["twin"] else None
    run = replace(guess, twin=twin)
    return {
        "twin": asdict(twin) if twin else None,
        "guessed": [guess.seconds["prefill"], guess.seconds.get("token")],
        "peak": [run.peak_allocated[0], run.peak_reserved[0]],
        "issued": issued_of(run)[:2],
        "seconds": [step.seconds for step in run.times],
        "busy": [dict(step.busy) for step in run.times[:2]],
        "took": time.perf_counter() - start,
    }


def attempt(case: dict[str, Any]) -> dict[str, Any]:
    """`predicted`, or why there is none."""
    try:
        return predicted(case)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:600]}


def shown(runs: list[Any]) -> str:
    """The times of runs in a few words."""
    if not runs:
        return "-"
    tokens = [step[0] for run in runs for step in run[1:]]
    text = f"{1000 * best([run[0][0] for run in runs]):.1f}"
    return f"{text} + {1000 * best(tokens):.1f} ({1000 * statistics.median(tokens):.1f}) ms" if tokens else f"{text} ms"


def predict_all(paths: list[Path], save: Path | None, processes: int) -> None:
    """Predict every case that was measured, and print both."""
    everything = []
    with ProcessPoolExecutor(processes) as pool:
        for path in paths:
            results = json.loads(path.read_text())
            cases = [case for case in results["cases"] if "error" not in case]
            for case in results["cases"]:
                if "error" in case:
                    print(f"{key_of(case):44} not measured: {case['error'][:120]}")
            for case, said in zip(cases, pool.map(attempt, cases)):
                case["predicted"] = said
                print(row_of(case), flush=True)
            everything.append(results)
    cases = [case for results in everything for case in results["cases"]]
    for which in dict.fromkeys(case.get("draw", "") for case in cases):
        print(which and f"({which})", summary([case for case in cases if case.get("draw", "") == which]))
    if save:
        about = {name: everything[0][name] for name in ("commit", "machine")}
        late = sum((results["late"] for results in everything), [])
        save.write_text(json.dumps({**about, "late": late, "rows": [kept(case) for case in cases]}, indent=1) + "\n")


def best(seconds: list[float]) -> float:
    """The fastest tenth: the host of a rented GPU has a slow and a fast pace, and changes it within seconds."""
    return sorted(seconds)[len(seconds) // 10]


def measured_times(case: dict[str, Any]) -> tuple[float, float | None]:
    """Seconds of the prompt, and of a token."""
    tokens = [step[0] for run in case["steps"] for step in run[1:]]
    return best([run[0][0] for run in case["steps"]]), best(tokens) if tokens else None


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


def errors_of(case: dict[str, Any]) -> dict[str, float]:
    """Quantity -> predicted / measured - 1."""
    return {name: predicted / measured - 1 for name, (predicted, measured) in compared(case).items()}


def kept(case: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a case: the figures that are compared, with the twin's, or why there are none."""
    about = {"case": key_of(case), "blocks": case["blocks"], **{k: case[k] for k in ("draw",) if k in case}}
    said = case.get("predicted", {})
    if problem := case.get("error") or said.get("error"):
        return about | {"error": problem}
    longest = [max(busy, key=busy.get) for busy in said["busy"]]
    return about | {
        "compared": compared(case),
        "twin": said.get("twin"),
        "longest": longest,
        "without twin": said["guessed"],
    }


def row_of(case: dict[str, Any]) -> str:
    """A case as a line."""
    said = case["predicted"]
    if "error" in said:
        return f"{key_of(case):44} not predicted: {said['error'][:200]}"
    errors, times = errors_of(case), measured_times(case)
    text = "  ".join(f"{name} {100 * error:+7.2f} %" for name, error in errors.items())
    shown = ", ".join(f"{1000 * seconds:.1f}" for seconds in times if seconds)
    busy = {lane: f"{1000 * value:.1f}" for lane, value in said["busy"][-1].items()}
    return f"{key_of(case):44} {text}   ({shown} ms; {busy}; {said['took']:.1f} s)"


def summary(cases: list[dict[str, Any]]) -> str:
    """How many were predicted within the bounds."""
    rows = [errors_of(case) for case in cases if "error" not in case and "error" not in case["predicted"]]
    lines = [f"{len(rows)} predicted of {len(cases)}"]
    for name, bound in (("allocated", 0.005), ("reserved", 0.03), ("prompt", 0.15), ("token", 0.15)):
        errors = [row[name] for row in rows if name in row]
        if errors:
            good, worst = sum(abs(error) <= bound for error in errors), max(errors, key=abs)
            beyond = sum(abs(error) > 0.4 for error in errors)
            middle = statistics.median(map(abs, errors))
            within = f"{good} of {len(errors)} within {100 * bound:g} %, the median {100 * middle:.2f} %"
            lines.append(f"{name:10} {within}, the worst {100 * worst:+.1f} %, {beyond} beyond 40 %")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", type=Path, metavar="CASES.json")
    parser.add_argument("--known", action="store_true", help="add runs that are no news")
    parser.add_argument("--measure", type=Path, nargs=2, metavar=("CASES.json", "RESULTS.json"))
    parser.add_argument("--predict", type=Path, metavar="RESULTS.json", nargs="+", default=[KEPT])
    parser.add_argument("--save", type=Path, metavar="FILE", help="keep the comparison")
    parser.add_argument("--part", default="0/1", help="this process's share: 0/2 is the first half of the types")
    parser.add_argument("--seconds", type=float, default=300, help="start no case after this time")
    parser.add_argument("--profile", action="store_true", help="note the kernels of each case")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    if options.draw:
        seed = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        draw(options.draw, seed, options.known)
    elif options.measure:
        mine, of = map(int, options.part.split("/"))
        measure_all(*options.measure, (mine, of), options.seconds, options.profile)
    else:
        predict_all(options.predict, options.save, options.processes)


if __name__ == "__main__":
    main()
