"""The 72 runs of `dryrun.py` once more, each between runs of its narrow twin: is the host's pace all that was missing?

    python benchmarks/twins.py --foretell FOLDER                                 before the measurement, on any machine
    python benchmarks/twins.py --measure RESULTS.jsonl [--part 0/2] [--seconds 200]                      on a CUDA GPU
    python benchmarks/twins.py --compare FOLDER RESULTS.jsonl ... [--save]                               on any machine

Declared before anything was measured:

- The runs, models and loads are those of `dryrun.py`, called plainly; nothing of the library changes between the
  foretelling and the comparison. `--foretell` makes the dry runs, with the versions of the GPU's machine and the rates
  that are kept in results/dryrun.json; they lack the pace of the host, and have the memory.
- `--measure` gives each model a process of its own. For each load it fills the model from an empty allocator and runs
  it once, for the memory. Then come rounds: the twin, the model, the twin, the model, ..., the twin. A twin runs what
  `calibrate(model=...)` runs: `generate` with 16 tokens, then as many more as the load has. The first round does not
  count; at least `LEAST` do.
- A round's prediction is the dry run with the mean of the two twins around the run. **The figure that counts is the
  median over the rounds of predicted / measured.** Beside it: the median prediction of all twins against the median of
  all runs, as in the third draw of `held_out.py`; and, for mixtures, twins that are called plainly as their models are,
  because `generate` computes experts otherwise when it decodes.
- The host of a rented GPU goes at two paces, on some cores and not on others, and changes within a second whether or
  not another process runs beside (17 ms alone, 18.6 beside, 19.3 alone again; 13.4 and 21 elsewhere). So two processes
  may share the work, with a GPU and cores of their own, and rounds in which the pace changed count like all others.
- All that was measured is kept; a run that fails, is late or cannot be foretold is listed as such.

Found afterwards, and said beside the declared figures: a step was timed with the making of its inputs, which takes 1 to
9 ms for images and which no dry run counts, so `from the call` times a prompt from the model's call on; and a mixture
that is called plainly decodes as its plain twin, not as `generate` does, so that one counts there (since then
`calibrate(model=...)` times both).
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import dryrun
import torch
from held_out import in_a_process, keep_foretold, lines_of, put_quantized, read_foretold, versions
from torch import nn

from bigkit.dryrun.result import DryRun
from bigkit.dryrun.run import dry_run
from bigkit.dryrun.workload import Workload, fill
from bigkit.machine.hardware import GPUS, Hardware
from bigkit.machine.ledger import Calibration, HostStep, Twin
from bigkit.measure.allocations import settle
from bigkit.measure.twin import LOAD, issued_in, timed, twin_of
from bigkit.zoo import build

LEAST, MOST, EACH = 5, 12, 1.0  # rounds of a load that count, and seconds for them
LONGEST = 40  # seconds for one model
MIXTURES = ("mixtral-8x7b", "deepseek-v3", "qwen3-30b-a3b")
FIRST = ("llama-2-7b/nf4", "llama-2-7b/int8", "qwen3-30b-a3b", "vit-base-patch16-224", "resnet50.a1_in1k", "gpt2-xl")
DEVICE = "cuda"
KEPT = Path(__file__).parent / "results" / "twins.json"


def models() -> list[list[dict[str, Any]]]:
    """The cases of each model, those in front that only a twin can tell."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for case in dryrun.cases([]):
        groups.setdefault("/".join(filter(None, (case["model"], case.get("quantization")))), []).append(case)
    return [groups[name] for name in (*FIRST, *(name for name in groups if name not in FIRST)) if name in groups]


def empty(case: dict[str, Any]) -> nn.Module:
    """A case's model, on the meta device."""
    model: nn.Module = build.build(dryrun.config_of(case["model"], case["blocks"]), dtype="bfloat16").eval()
    return model


def load_of(case: dict[str, Any]) -> Workload:
    """What a case's model is asked to do."""
    return dryrun.load_of(case, dryrun.config_of(case["model"], case["blocks"]))


def twins_of(case: dict[str, Any]) -> dict[str, Workload]:
    """What a case's twin is asked to do: as `calibrate` does, and of mixtures plainly, too."""
    load = replace(LOAD, new=min(LOAD.new, load_of(case).new))
    plain = {"plain": replace(load, generate=False)} if case["model"] in MIXTURES else {}
    return {"twin": load, **plain}


# ---------------------------------------------------------------------------------------------------------------------
# Before: on any machine


def foretold(case: dict[str, Any]) -> tuple[DryRun, dict[str, list[int]]]:
    """A case's dry run, without a twin, and the host's steps in each step of its twins."""
    load, kind = load_of(case), case.get("quantization")
    calibration = Calibration.from_json(json.loads(dryrun.KEPT.read_text())["calibration"])
    run = dry_run(
        lambda: empty(case), None, load.batch, load.prompt, load.new, Hardware("one H200", (GPUS["H200"],), 0, 0),
        all_logits=load.all_logits, generate=load.generate, calibration=calibration, dtype="bfloat16",
        quantization=kind,
    )  # fmt: skip
    return run, {name: issued_in(empty(case), few, kind) for name, few in twins_of(case).items()}


def foretell_all(folder: Path) -> None:
    """Make the dry runs, a file for each."""
    for case in (case for group in models() for case in group):
        keep_foretold(folder, dryrun.key_of(case), lambda: foretold(case))  # noqa: B023


# ---------------------------------------------------------------------------------------------------------------------
# On the GPU


def put(model: nn.Module, kind: str | None) -> nn.Module:
    """Give a model memory."""
    if kind is None:
        return fill(model, {"": 0 if DEVICE == "cuda" else DEVICE})
    return put_quantized(model, kind, DEVICE)


def measure(case: dict[str, Any], whole: nn.Module, write: Callable[[dict[str, Any]], None]) -> str:
    """A case's memory from an empty allocator, then its times between its twin's; a line about them."""
    kind, load, narrow = case.get("quantization"), load_of(case), None
    with suppress(ValueError):
        narrow = twin_of(whole, kind is not None)
    settle(0)
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    model = put(copy.deepcopy(whole), kind)
    first = timed(model, load, DEVICE)
    peak = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    write({"before": before, "peak": peak, "first": first})
    loads = {} if narrow is None else twins_of(case)
    twin = None if narrow is None else put(narrow, kind)
    gc.collect()

    def look() -> None:
        for name, few in loads.items():
            twins[name].append(timed(twin, few, DEVICE))  # type: ignore[arg-type]

    runs: list[Any] = []
    twins: dict[str, list[Any]] = {name: [] for name in loads}
    start = time.perf_counter()
    while len(runs) < 1 + LEAST or (len(runs) < 1 + MOST and time.perf_counter() - start < EACH):
        look()
        runs.append(timed(model, load, DEVICE))
    look()
    write({"runs": runs[1:], "twins": {name: rows[1:] for name, rows in twins.items()}})
    prompts = ", ".join(f"{1000 * run[0][0]:.1f}" for run in runs[1:])
    beside = ", ".join(f"{1000 * run[0][0]:.1f}" for run in twins.get("twin", [])[1:])
    return f"{(peak[0] - before[0]) / 1e9:.2f} GB; prompts {prompts} ms; its twin's {beside}"


def measure_all(path: Path, part: tuple[int, int], seconds: float) -> None:
    """Measure this process's share of the models; writes after each stage."""
    start = time.perf_counter()

    def write(about: dict[str, Any]) -> None:
        with path.open("a") as file:
            file.write(json.dumps(about) + "\n")

    def say(line: str) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {line}", flush=True)

    def one(group: list[dict[str, Any]]) -> None:
        warnings.simplefilter("ignore")
        if not lines_of(path):
            name = torch.cuda.get_device_name(0)
            write({"machine": {"gpu": name, **versions(), "cudnn": torch.backends.cudnn.version()}})
        whole = empty(group[0])
        for case in group:
            key = dryrun.key_of(case)
            try:
                line = measure(case, whole, lambda about: write({"case": key, **about}))  # noqa: B023
            except Exception as error:
                line = f"{type(error).__name__}: {error}"[:600]
                write({"case": key, "error": line})
            say(f"{key}  {line}")

    for group in models()[part[0] :: part[1]]:
        while left := [case for case in group if dryrun.key_of(case) not in done_in(path)]:
            key = dryrun.key_of(left[0])
            if time.perf_counter() - start > seconds:
                say(f"{key}  late")
                break
            if problem := in_a_process(lambda: one(left), LONGEST):
                say(problem)
                for case in [case for case in left if dryrun.key_of(case) not in done_in(path)][:1]:
                    write({"case": dryrun.key_of(case), "error": problem})
    say("done")


def done_in(path: Path) -> set[str]:
    """The cases that were measured, or failed."""
    return {about["case"] for about in lines_of(path) if "runs" in about or "error" in about}


# ---------------------------------------------------------------------------------------------------------------------
# After: on any machine


def step_of(run: list[list[float]], tokens: bool, part: int) -> float:
    """Seconds of a run's prompt, or the median of its tokens; part 1: those before the model was called."""
    return statistics.median(step[part] for step in run[1:]) if tokens else run[0][part]


def twin_from(case: dict[str, Any], runs: list[Any], issued: list[int]) -> Twin:
    """A twin that took what these runs of it took in the mean."""
    prefill, token = (
        HostStep(*(statistics.mean(step_of(run, tokens, part) for run in runs) for part in (0, 1)), issued[tokens])
        if len(issued) > tokens else None
        for tokens in (False, True)
    )  # fmt: skip
    assert prefill is not None
    return Twin(case["model"], case.get("quantization"), prefill, token)


def told(run: DryRun) -> dict[str, tuple[float, float, float]]:
    """Quantity -> seconds that a dry run says, and the range."""
    return {name: (found.value, found.low, found.high) for name, found in run.ranges.items() if name in run.seconds}


def compared(case: dict[str, Any], guess: DryRun, issued: dict[str, list[int]]) -> dict[str, Any]:
    """Of the prompt and of a token: predicted / measured in every round and by each way, and whether the range held."""
    rounds = {way: [told(replace(guess, twin=twin_from(case, [*pair], issued[way]))) for pair in zip(runs, runs[1:])]
              for way, runs in case["twins"].items()}  # fmt: skip
    middle = {way: told(replace(guess, twin=middle_twin(case, runs, issued[way])))
              for way, runs in case["twins"].items()}  # fmt: skip
    best = "plain" if "plain" in rounds else "twin"
    found: dict[str, Any] = {}
    for name, (alone, *_) in told(guess).items():
        tokens = name == "token"
        whole = [step_of(run, tokens, 0) for run in case["runs"]]
        called = [seconds - step_of(run, tokens, 1) for seconds, run in zip(whole, case["runs"])]
        about: dict[str, Any] = {"measured": statistics.median(whole), "without twin": alone / statistics.median(whole)}
        about |= {way: [round(said[name][0] / seconds, 4) for said, seconds in zip(rows, whole)]
                  for way, rows in rounds.items()}  # fmt: skip
        about |= {f"{way}, medians": said[name][0] / statistics.median(whole) for way, said in middle.items()}
        about["called"] = {"measured": statistics.median(called), "without twin": alone / statistics.median(called)}
        if best in rounds:
            pairs = [*zip(rounds[best], called)]
            about["called"]["twin"] = [round(said[name][0] / seconds, 4) for said, seconds in pairs]
            about["called"]["held"] = [said[name][1] <= seconds <= said[name][2] for said, seconds in pairs]
        found[name] = about
    return found


def middle_twin(case: dict[str, Any], runs: list[Any], issued: list[int]) -> Twin:
    """The twin whose every step is the median of all runs."""
    steps = [[[statistics.median(run[i][part] for run in runs) for part in (0, 1)] for i in range(len(runs[0]))]]
    return twin_from(case, steps, issued)


def rows_of(folder: Path, paths: list[Path]) -> Iterator[dict[str, Any]]:
    """What is kept of each case."""
    lines = [line for path in paths for line in lines_of(path)]
    machine = next(line["machine"] for line in lines if "machine" in line)
    for case in (case for group in models() for case in group):
        key = dryrun.key_of(case)
        for line in lines:
            if line.get("case") == key:
                case |= {name: value for name, value in line.items() if name != "case"}
        if "runs" not in case:
            yield {"case": key, "not measured": case.get("error", "late")}
            continue
        said = read_foretold(folder, key, {name: machine[name] for name in versions()})
        if isinstance(said, str):
            yield {"case": key, "error": said}
            continue
        guess, issued = said
        peaks = {"allocated": guess.peak_allocated[0], "reserved": guess.peak_reserved[0]}
        memory = {name: [peaks[name], case["peak"][i] - case["before"][i]] for i, name in enumerate(peaks)}
        longest = [step.bottleneck for step in guess.times[:2]]
        yield {"case": key, **memory, "longest": longest, "times": compared(case, guess, issued)}


def compare_all(folder: Path, paths: list[Path], save: bool) -> None:
    """Compare what was foretold with every case that was measured, and print both."""
    rows = []
    for row in rows_of(folder, paths):
        rows.append(row)
        said = "  ".join(
            f"{name} {1000 * about['called']['measured']:7.1f} ms "
            + " ".join(f"{100 * (found - 1):+6.1f} % ({way})" for way, ratio in WAYS.items() if (found := ratio(about)))
            for name, about in row.get("times", {}).items()
        )
        print(f"{row['case']:40} {said or row}", flush=True)
    print(summary(rows))
    if save:
        machine = [line["machine"] for path in paths for line in lines_of(path) if "machine" in line]
        about = {"machine": machine, "foretold with": versions()}
        lines = ",\n".join(json.dumps(row) for row in rows)  # a line for each run
        KEPT.write_text(f'{json.dumps(about)[:-1]}, "rows": [\n{lines}\n]}}\n')


def middle(about: dict[str, Any], way: str) -> float | None:
    """The median over the rounds of predicted / measured."""
    return statistics.median(about[way]) if way in about else None


WAYS: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "declared": lambda about: middle(about, "twin"),
    "medians": lambda about: about.get("twin, medians"),
    "from the call": lambda about: middle(about["called"], "twin"),
    "from the call, without a twin": lambda about: about["called"]["without twin"],
}


def summary(rows: list[dict[str, Any]]) -> str:
    """How many were predicted within the bounds."""
    lines = []
    for name, bound in (("allocated", 0.005), ("reserved", 0.03)):
        errors = [row[name][0] / row[name][1] - 1 for row in rows if name in row]
        lines.append(f"{name}: {sum(abs(error) <= bound for error in errors)} of {len(errors)}, "
                     f"the worst {100 * max(errors, key=abs, default=0):+.2f} %")  # fmt: skip
    times = [(name, about) for row in rows for name, about in row.get("times", {}).items()]
    for name in ("prefill", "token"):
        for way, ratio in WAYS.items():
            errors = [found - 1 for key, about in times if key == name and (found := ratio(about)) is not None]
            if errors:
                near, beyond = (sum(abs(error) <= bound for error in errors) for bound in (0.15, 0.4))
                lines.append(f"{name}, {way}: {near} of {len(errors)} within 15 %, {len(errors) - beyond} beyond 40 %, "
                             f"the median {100 * statistics.median(map(abs, errors)):.1f} %")  # fmt: skip
    held = [one for _, about in times for one in about["called"].get("held", ())]
    return "\n".join([*lines, f"rounds in their range: {sum(held)} of {len(held)}"])


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--foretell", type=Path, metavar="FOLDER")
    parser.add_argument("--measure", type=Path, metavar="RESULTS.jsonl")
    parser.add_argument("--compare", type=Path, nargs="+", metavar="FILE", help="FOLDER RESULTS.jsonl ...")
    parser.add_argument("--save", action="store_true", help="keep the comparison in benchmarks/results")
    parser.add_argument("--part", default="0/1", help="this process's share: 0/2 is every second model")
    parser.add_argument("--seconds", type=float, default=200, help="start no model after this time")
    options = parser.parse_args()
    mine, of = map(int, options.part.split("/"))
    if options.foretell:
        foretell_all(options.foretell)
    elif options.measure:
        measure_all(options.measure, (mine, of), options.seconds)
    elif options.compare:
        folder, *paths = options.compare
        compare_all(folder, paths, options.save)
    else:
        parser.error("say what to do: --foretell, --measure or --compare")


if __name__ == "__main__":
    main()
