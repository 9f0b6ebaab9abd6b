"""Memory and time of real models on one GPU, predicted by dry runs and measured.

    python benchmarks/dryrun.py --measure RESULTS.json [--traces FOLDER] [--seconds 450]      on a CUDA GPU
    python benchmarks/dryrun.py [--predict RESULTS.json ...] [--save]                         on any machine
    python benchmarks/dryrun.py --offload benchmarks/results/offload-gpu.json                 on any machine

Every case is a model of real size, bfloat16, with as many blocks as fit in about 50 GB and random weights; three
shapes: 1 x 16 and 8 x 512 tokens with decoding after them, and 2 x 2048 keeping the logits of every token. Each starts
from an empty allocator: fill the weights, run the prompt, generate. `--measure` stores what the GPU's allocator said,
the kernels that attention chose, and times; when all are done it times them once more and calibrates once more. It
writes after every case and starts none after `--seconds`. `--predict` runs the same cases on fake GPUs and prints
predicted against measured; without a file, it takes the results that are kept in benchmarks/results. `--offload`
predicts what `benchmarks/offload.py --gpu` measured.

Times are the best of several, as those of `calibrate()` are, with the medians beside them: the host of a rented GPU
slows down and speeds up by a half from one minute to the next, or for as long as it is rented. So `--predict` takes
several runs on machines of one kind: memory is the first one's, each time and rate the best one's.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from bigkit import init_empty_weights
from bigkit.dryrun.fake_bnb import config_of as quantized_config
from bigkit.dryrun.fake_bnb import fill_quantized, quantize_empty
from bigkit.dryrun.result import DryRun
from bigkit.dryrun.run import dry_run
from bigkit.dryrun.workload import Workload, fill, passes
from bigkit.machine.allocator import Recording
from bigkit.machine.hardware import GPUS, Hardware
from bigkit.machine.ledger import Calibration
from bigkit.measure.allocations import record_allocations, settle
from bigkit.measure.calibrate import calibrate
from bigkit.units import GiB
from bigkit.zoo import build, catalog

SHAPES = {
    "1x16": Workload(1, 16, 4, generate=False),
    "8x512": Workload(8, 512, 4, generate=False),
    "2x2048": Workload(2, 2048, 0, all_logits=True, generate=False),
}
# Configs of models that do not ship with bigkit, as their makers publish them.
OTHERS: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "head_dim": 128,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4,
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "num_hidden_layers": 48, "vocab_size": 151936, "max_position_embeddings": 40960,
    },
    "falcon-7b": {
        "model_type": "falcon", "architectures": ["FalconForCausalLM"], "hidden_size": 4544, "num_hidden_layers": 32,
        "num_attention_heads": 71, "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False,
        "bias": False, "alibi": False, "vocab_size": 65024,
    },
    "gpt-neox-20b": {
        "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "hidden_size": 6144,
        "intermediate_size": 24576, "num_hidden_layers": 44, "num_attention_heads": 64, "vocab_size": 50432,
        "max_position_embeddings": 2048, "rotary_pct": 0.25,
    },
    "phi-3-mini": {
        "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064,
        "max_position_embeddings": 4096, "pad_token_id": 32000, "sliding_window": 2047,
    },
    "bloom-7b1": {
        "model_type": "bloom", "architectures": ["BloomForCausalLM"], "n_embed": 4096, "hidden_size": 4096,
        "n_layer": 30, "num_attention_heads": 32, "n_head": 32, "vocab_size": 250880, "pad_token_id": 3,
    },
}  # fmt: skip
# (name, blocks): 0 takes them all. The most telling ones first.
MODELS = (
    ("llama-2-7b", 0), ("bloom-7b1", 0), ("gpt2-xl", 0), ("mixtral-8x7b", 8), ("deepseek-v3", 5), ("gemma-2-9b", 0),
    ("t5-large", 0), ("opt-1.3b", 0), ("bert-base-cased", 0), ("mistral-7b", 0), ("qwen3-0.6b", 0), ("bloom", 4),
    ("llama-3.1-8b", 0), ("qwen3-30b-a3b", 16), ("vit-base-patch16-224", 0), ("resnet50.a1_in1k", 0),
    ("falcon-7b", 0), ("gpt-neox-20b", 0), ("phi-3-mini", 0), ("convnext_base.fb_in22k_ft_in1k", 0),
    ("llama-3.1-405b", 4), ("qwen3-32b", 16),
)  # fmt: skip
QUANTIZED = (("llama-2-7b", "nf4"), ("llama-2-7b", "int8"))  # these too, where there is bitsandbytes
BOUNDARIES = ("bloom-7b1/2x2048", "gpt2-xl/8x512", "llama-2-7b/2x2048", "mixtral-8x7b/8x512")
KEPT = Path(__file__).parent / "results" / "dryrun.json"
BLOCKS = ("num_hidden_layers", "num_layers", "n_layer")


def config_of(name: str, blocks: int) -> dict[str, Any]:
    """A model's config, cut to its first blocks."""
    entry = catalog.find(name)
    config = dict(OTHERS[name] if entry is None else catalog.config(entry))
    for field in BLOCKS if blocks else ():
        if field in config:
            config[field] = blocks
    return config


def cases(only: list[str]) -> Iterator[dict[str, Any]]:
    """Every case as plain data; vision models see images whatever the shape says, so only the batch differs there."""
    for name, blocks in MODELS:
        for shape in SHAPES:
            if not only or name in only or f"{name}/{shape}" in only:
                yield {"model": name, "blocks": blocks, "shape": shape}
                yield from (
                    {"model": name, "blocks": blocks, "shape": shape, "quantization": quantization}
                    for other, quantization in QUANTIZED
                    if other == name and find_spec("bitsandbytes")
                )


def key_of(case: dict[str, Any]) -> str:
    """What a case is called: "gpt2-xl/8x512", "llama-2-7b/1x16/nf4"."""
    return "/".join(case[part] for part in ("model", "shape", "quantization") if part in case)


def load_of(case: dict[str, Any], config: dict[str, Any]) -> Workload:
    """The case's work; prompts are cut to what the model's learned positions hold."""
    load = SHAPES[case["shape"]]
    positions = config.get("n_positions") or config.get("max_position_embeddings") or 10**9
    if config.get("model_type") in ("gpt2", "bert", "opt"):
        load = replace(load, prompt=min(load.prompt, positions - load.new))
    return load


# ---------------------------------------------------------------------------------------------------------------------
# On the GPU


class Kernels(TorchFunctionMode):
    """Notes which kernel each distinct call of scaled_dot_product_attention is sent to."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = (args[i] if i < len(args) else kwargs[n] for i, n in enumerate(("query", "key", "value")))
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            more = {name: kwargs[name] for name in ("scale", "enable_gqa", "is_causal") if name in kwargs}
            about = "none" if mask is None else f"{list(mask.shape)} {mask.dtype}"
            sizes = f"q {list(q.shape)} {list(q.stride())} k {list(k.shape)} v {list(v.shape)} {q.dtype}"
            flags = f"causal {more.get('is_causal', False)} gqa {more.get('enable_gqa', False)}"
            key = f"{sizes} mask {about} {flags}".replace("torch.", "")
            self.seen[key] = int(torch._fused_sdp_choice(q, k, v, mask, 0.0, **more))
        return func(*args, **kwargs)


def measure(case: dict[str, Any], traces: Path | None) -> dict[str, Any]:
    """One case on the GPU: its allocations from an empty start, then its times."""
    model, load, put = prepared(case)
    figures: dict[str, Any] = {}
    with record_allocations() as mark:
        put()
        mark("filled")
        figures["filled"] = [torch.cuda.memory_allocated(), torch.cuda.memory_reserved()]
        for phase, _ in passes(model, load, "cuda"):
            mark(phase)
            if phase == "prefill":
                figures["prefill"] = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]
    recording = mark.recording  # type: ignore[attr-defined]
    figures["peak"] = [recording.peaks["allocated"], recording.peaks["reserved"]]
    figures["events"] = len(recording.events)
    if traces is not None:
        recording.about["work"] = key_of(case).replace("/", " ")
        recording.save(traces / f"{key_of(case).replace('/', '-')}.json.gz")
    try:
        with Kernels() as kernels:
            for _ in passes(model, load, "cuda"):
                pass
        figures["attention"] = kernels.seen
    except Exception as error:
        figures["attention"] = f"{type(error).__name__}: {error}"[:300]
    figures["times"] = times_of(model, load)
    return figures


def prepared(case: dict[str, Any]) -> tuple[torch.nn.Module, Workload, Callable[[], object]]:
    """A case's model, empty, its work, and what gives the model memory on the GPU."""
    config = config_of(case["model"], case["blocks"])
    model = build.build(config, dtype="bfloat16").eval()
    if "quantization" not in case:
        return model, load_of(case, config), lambda: fill(model, {"": 0})
    how = quantized_config(case["quantization"], "bfloat16")
    quantize_empty(model, how)
    return model, load_of(case, config), lambda: fill_quantized(model, {"": 0}, torch.device("cuda", 0), how)


def times_of(model: torch.nn.Module, load: Workload, repeats: int = 6) -> dict[str, list[float]]:
    """Phase -> the seconds that it took, time after time."""
    times: dict[str, list[float]] = {}
    for i in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for phase, _ in passes(model, load, "cuda"):
            torch.cuda.synchronize()
            now = time.perf_counter()
            if i:
                times.setdefault(phase, []).append(now - start)
            start = now
    return times


def note_times(case: dict[str, Any], times: dict[str, list[float]]) -> str:
    """Store the best and the median of each phase in a case; returns them as text."""
    case["seconds"] = {phase: min(values) for phase, values in times.items()}
    case["median"] = {phase: statistics.median(values) for phase, values in times.items()}
    rows = ((phase, 1000 * case["seconds"][phase], 1000 * case["median"][phase]) for phase in times)
    return ", ".join(f"{phase} {best:.1f} ({median:.1f}) ms" for phase, best, median in rows)


def better(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The first of two calibrations of machines of one kind, with the single rates that were better in the second."""
    rates = dict(first)
    for name, value in second.items():
        if isinstance(value, float) and isinstance(rates[name], float):
            rates[name] = (min if name in ("issue", "kernel") else max)(value, rates[name])
    return rates


def best_of(paths: list[Path]) -> dict[str, Any]:
    """The first of several results, with the times and rates that were better in the others."""
    first, *others = (json.loads(path.read_text()) for path in paths)
    for other in others:
        first["calibration"] = better(first["calibration"], other["calibration"])
        times = {key_of(case): case.get("seconds", {}) for case in other["cases"]}
        for case in first["cases"]:
            seconds, more = case.get("seconds", {}), times.get(key_of(case), {})
            case["seconds"] = {phase: min(value, more.get(phase, value)) for phase, value in seconds.items()}
    return first | {"runs": sum(results.get("runs", 1) for results in (first, *others))}


def boundary(name: str, shape: str, allocated: int, reserved: int) -> int:
    """The smallest limit, to 1 %, under which the case runs: between what is allocated and what is reserved."""
    config = config_of(name, dict(MODELS)[name])
    load = load_of({"shape": shape}, config)
    total = torch.cuda.get_device_properties(0).total_memory

    def runs(limit: int) -> bool:
        settle()
        torch.cuda.set_per_process_memory_fraction(limit / total)
        try:
            model = fill(build.build(config, dtype="bfloat16").eval(), {"": 0})
            return sum(1 for _ in passes(model, load, "cuda")) > 0
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    low, high = int(0.97 * allocated), int(1.01 * reserved)
    while high - low > 0.01 * allocated:
        middle = (low + high) // 2
        low, high = (low, middle) if runs(middle) else (middle, high)
    return high


def machine() -> dict[str, Any]:
    """The GPU, the libraries, what a context takes, and what the first matrix product takes."""
    import transformers

    free_before, total = torch.cuda.mem_get_info()
    torch.zeros(1, device="cuda").cpu()
    properties = torch.cuda.get_device_properties(0)
    products: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "mm": lambda a: a @ a,
        "addmm": lambda a: F.linear(a, a, a[0]),
        "bmm": lambda a: a[None] @ a[None],
    }
    workspaces = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for kind, product in products.items():
            with record_allocations() as mark:
                a = torch.ones(256, 256, dtype=dtype, device="cuda")
                product(a)
                del a
            recording: Recording = mark.recording  # type: ignore[attr-defined]
            workspaces[f"{kind} {dtype}"] = [event for event in recording.events if event > 0]
    return {
        "gpu": properties.name,
        "capability": [properties.major, properties.minor],
        "memory": total,
        "taken_when_first_asked": total - free_before,
        "processors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "transformers": transformers.__version__,
        "workspaces": workspaces,
    }


def measure_all(path: Path, traces: Path | None, seconds: float, only: list[str]) -> None:
    """Measure every case and a few boundaries, then every time again; writes after each."""
    start = time.perf_counter()
    results: dict[str, Any] = {"calibration": asdict(calibrate(save=False))}  # before anything else uses the GPU
    results |= {"machine": machine(), "cases": [], "boundaries": {}}
    times: dict[str, dict[str, list[float]]] = {}
    if traces is not None:
        traces.mkdir(parents=True, exist_ok=True)

    def write(line: str) -> None:
        """Let go of the case that is done, store the results so far, and print a line."""
        gc.collect()
        torch.cuda.empty_cache()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{time.perf_counter() - start:5.0f} s  {line}", flush=True)

    def late() -> bool:
        return time.perf_counter() - start > seconds

    write(f"calibrated: {results['calibration']}")
    for case in cases(only):
        key = key_of(case)
        if late():
            results.setdefault("not_started", []).append(key)
            continue
        try:
            figures = measure(case, traces)
            times[key] = figures.pop("times")
            case |= figures
            allocated, reserved = figures["peak"]
            memory = f"{allocated / GiB:6.2f} GiB allocated, {reserved / GiB:6.2f} reserved"
            line = f"{memory}, {note_times(case, times[key])}"
        except Exception as error:
            case |= {"error": f"{type(error).__name__}: {error}"[:2000], "where": traceback.format_exc()[-2000:]}
            line = case["error"][:160]
        results["cases"].append(case)
        write(f"{key}  {line}")
    done = {key_of(case): case for case in results["cases"] if "error" not in case}
    for key in BOUNDARIES:
        if key in done and not late():
            limit = boundary(done[key]["model"], done[key]["shape"], *done[key]["peak"])
            results["boundaries"][key] = limit
            write(f"{key}: runs with {limit / GiB:.2f} GiB")
    free, total = torch.cuda.mem_get_info()
    results["machine"]["outside_allocator_after_work"] = total - free - torch.cuda.memory_reserved()
    for key, case in done.items():
        if not late():
            model, load, put = prepared(case)
            put()
            for phase, values in times_of(model, load).items():
                times[key][phase] += values
            del model, put
            write(f"{key} again  {note_times(case, times[key])}")
    if not late():
        results["calibration"] = better(results["calibration"], asdict(calibrate(save=False)))
    for key, case in done.items():
        if not late():
            case["predicted there"] = predict(results, case)[1]
            write(f"{key}  predicted here too")
    results["seconds"] = time.perf_counter() - start
    write("done")


# ---------------------------------------------------------------------------------------------------------------------
# On any machine


def predict(results: dict[str, Any], case: dict[str, Any]) -> tuple[DryRun, dict[str, Any]]:
    """The dry run of one case for the machine that the results are from, and what of it is kept."""
    calibration = Calibration.from_json(results["calibration"])
    gpu = next((gpu for name, gpu in GPUS.items() if name.split("-")[0] in results["machine"]["gpu"]), GPUS["H200"])
    config = config_of(case["model"], case["blocks"])
    load = load_of(case, config)
    start = time.perf_counter()
    run = dry_run(
        lambda: build.build(config, dtype="bfloat16"),
        None, load.batch, load.prompt, load.new, Hardware(results["machine"]["gpu"], (gpu,), 0, 0),
        all_logits=load.all_logits, calibration=calibration, quantization=case.get("quantization"), dtype="bfloat16",
        generate=load.generate,
    )  # fmt: skip
    peak = [run.peak_allocated[0], run.peak_reserved[0]]
    lanes = {"prefill": run.times[0].bottleneck, "token": run.times[-1].bottleneck}
    return run, {"peak": peak, "seconds": run.seconds, "longest": lanes, "took": time.perf_counter() - start}


def predict_all(results: dict[str, Any], only: list[str], save: bool) -> None:
    """Predict every case that was measured, and print both."""
    import transformers

    if (there := results["machine"]["transformers"]) != transformers.__version__:
        print(f"measured with Transformers {there}, predicted with {transformers.__version__}: some models differ")
    rows: list[list[float]] = []
    errors_of_time: dict[tuple[str, str], list[float]] = {}
    for case in results["cases"]:
        name = key_of(case)
        if "error" in case or (only and case["model"] not in only and name not in only):
            continue
        run, case["predicted"] = predict(results, case)
        allocated, reserved = case["predicted"]["peak"]
        real = case["peak"]
        times = {"prefill": case["seconds"]["prefill"], "token": case["seconds"].get("decode")}
        for key, value in times.items():
            if value and key in run.seconds:
                lane = "Python" if case["predicted"]["longest"][key] == "python" else "the GPU"
                errors_of_time.setdefault((key, lane), []).append(run.seconds[key] / value - 1)
        comparison = "  ".join(
            f"{1000 * run.seconds[key]:8.1f} {1000 * value:8.1f} ms {100 * (run.seconds[key] / value - 1):+6.1f} %"
            for key, value in times.items()
            if value and key in run.seconds
        )
        errors = [100 * (a / b - 1) for a, b in zip((allocated, reserved), real)]
        rows.append(errors)
        memory = "  ".join(
            f"{predicted / GiB:7.3f} {measured / GiB:7.3f} GiB {error:+6.2f} %"
            for predicted, measured, error in zip((allocated, reserved), real, errors)
        )
        print(f"{name:34} {memory}  {comparison}", flush=True)
        if limit := results["boundaries"].get(name):
            low, high = allocated // 2, reserved
            while high - low > allocated // 1000:
                middle = (low + high) // 2
                low, high = (low, middle) if run.fails_with(0, middle) is None else (middle, high)
            print(f"{'':34} runs with {high / GiB:.3f} GiB, really {limit / GiB:.3f} GiB")
            case["predicted"]["boundary"] = high
    if rows:
        for title, column, bound in (("allocated", 0, 0.5), ("reserved", 1, 3.0)):
            good = sum(abs(row[column]) <= bound for row in rows)
            worst = max(abs(row[column]) for row in rows)
            print(f"{title}: {good} of {len(rows)} within {bound} %, the worst {worst:.2f} %")
    for (key, lane), row in sorted(errors_of_time.items()):
        good, middle = sum(abs(error) <= 0.15 for error in row), statistics.median(map(abs, row))
        print(f"{key}, {lane} longest busy: {good} of {len(row)} within 15 %, "
              f"median error {100 * middle:.1f} %, the worst {100 * max(row, key=abs):+.0f} %")  # fmt: skip
    if save:
        KEPT.write_text(json.dumps(results, indent=1) + "\n")


def predict_offload(path: Path, save: bool) -> None:
    """Predict the forwards of a Llama-7B shape that rests in RAM or on disk, with the link that was measured beside
    them, and the disk: cold as raw readers measured it there, warm as the calibration says.

    The benchmark keeps the logits of one forward during the next, which a dry run of one forward does not.
    """
    import transformers

    measured, kept = json.loads(path.read_text()), json.loads(KEPT.read_text())
    rates = replace(Calibration.from_json(kept["calibration"]), link_pinned=1e9 * measured["machine"]["pinned_gb_s"])
    size = measured["machine"]["bytes"]
    cold = 1e9 * statistics.mean(measured["machine"]["raw_cold_gb_s"])
    rows = []
    ways: dict[str, tuple[dict[str, int | str] | None, int]] = {
        "resident": (None, 0),
        "bigkit, all in RAM": ({"": "cpu"}, 0),
        "bigkit, half in RAM": ({"": "cpu"}, size // 2),
        "bigkit, on disk, cold": ({"": "disk"}, 0),
        "bigkit, on disk, warm": ({"": "disk"}, 0),
    }

    def llama() -> torch.nn.Module:
        config = transformers.LlamaConfig(dtype="bfloat16")
        with init_empty_weights():
            return transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)

    for row in measured["rows"]:
        if row["way"] not in ways:
            continue
        places, resident = ways[row["way"]]
        batch, tokens = map(int, row["shape"].split("x"))
        run = dry_run(
            llama, places, batch, tokens, 0, "H200", all_logits=True, cache=False, resident_memory=resident,
            calibration=replace(rates, disk_warm=cold) if row["way"].endswith("cold") else rates,
        )  # fmt: skip
        logits = 2 * batch * tokens * 32000
        peak, seconds = run.peak_allocated[0] + logits, run.seconds["prefill"]
        memory = row.get("gpu_peak_gb")
        held = f"{peak / 1e9:7.3f} {memory:7.3f} GB {100 * (peak / 1e9 / memory - 1):+5.2f} %" if memory else " " * 26
        print(f"{row['way']:22} {row['shape']:6} {held}  {1000 * seconds:7.1f} {1000 * row['s']:7.1f} ms "
              f"{100 * (seconds / row['s'] - 1):+6.1f} %")  # fmt: skip
        rows.append({"way": row["way"], "shape": row["shape"], "measured": {"peak_gb": memory, "seconds": row["s"]},
                      "predicted": {"peak_gb": peak / 1e9, "seconds": seconds}})  # fmt: skip
    if save:
        KEPT.write_text(json.dumps({**kept, "offload": rows}, indent=1) + "\n")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, metavar="RESULTS.json")
    parser.add_argument("--predict", type=Path, metavar="RESULTS.json", nargs="+", default=[KEPT])
    parser.add_argument("--offload", type=Path, metavar="RESULTS.json")
    parser.add_argument("--save", action="store_true", help="keep the comparison in benchmarks/results")
    parser.add_argument("--traces", type=Path, help="store every case's allocations in this folder")
    parser.add_argument("--seconds", type=float, default=450, help="start no case after this time")
    parser.add_argument("--only", nargs="*", default=[], help="models, or MODEL/SHAPE")
    options = parser.parse_args()
    if options.offload is not None:
        predict_offload(options.offload, options.save)
    elif options.measure is None:
        predict_all(best_of(options.predict), options.only, options.save)
    else:
        measure_all(options.measure, options.traces, options.seconds, options.only)


if __name__ == "__main__":
    main()
