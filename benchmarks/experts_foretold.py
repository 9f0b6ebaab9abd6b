"""Mixtures of experts that rest elsewhere: bytes and seconds of a real run, and of a dry run with the same routing.

    python benchmarks/experts_foretold.py [--save]          a CUDA GPU
    python benchmarks/experts_foretold.py --tiny            no GPU: tiny shapes and stand-ins, to see that it runs

The machine is calibrated first. Then each case in turn: a model with random weights, a prompt of 32 tokens, and tokens
that are drawn; before and after it a narrow twin whose experts rest as the model's do (`calibrate(model=..., plan=)`).
The experts that its routers choose are recorded and given to the dry run. Bytes are compared forward by forward,
and have to be equal; seconds as the sum of all tokens but the first two, which meet what is new to the process.
`range_ms` is what nine of ten runs should lie between, and `rests_on` says what that comes from. `prompt_again_ms` is
the prompt once more: what the first one took beyond it is done once in a process.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers as tf
from experts import Clock, Drawn, build, class_and_config, experts_in, settle
from torch import nn

import bigkit
from bigkit import dry_run, init_empty_weights
from bigkit.checkpoints.ring import pinned_bytes
from bigkit.machine.ledger import Calibration, Twin
from bigkit.machine.roofline import FILL
from bigkit.measure.calibrate import calibrate
from bigkit.measure.routing import record_routing
from bigkit.measure.twin import NarrowTwin
from bigkit.offload.lenders import streamers_in

PROMPT = 32
# name -> case, blocks, where the experts rest, the share of them that a cache on the GPU holds, quantization
CASES: dict[str, tuple[str, int, str, float, str | None]] = {
    "Qwen3, RAM": ("qwen3", 16, "cpu", 0, None),
    "Qwen3, RAM, half on the GPU": ("qwen3", 16, "cpu", 0.5, None),
    "Qwen3, RAM and disk": ("qwen3", 6, "both", 0, None),
    "Mixtral, nf4, RAM": ("mixtral", 6, "cpu", 0, "nf4"),
    "DeepSeek-V3, RAM": ("deepseek", 3, "cpu", 0, None),
}


def config_for(quantization: str | None) -> Any:
    """How linear layers and experts are quantized."""
    return quantization and bigkit.BnbQuantizationConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quantization, bnb_4bit_compute_dtype="bf16", torch_dtype=torch.bfloat16
    )


def generate(model: nn.Module, new: int, device: str, seed: int, clock: Clock | None = None) -> None:
    """Read a prompt and write so many tokens, which are drawn."""
    vocabulary = model.config.vocab_size  # type: ignore[union-attr]
    ids = torch.randint(5, vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(1)).to(device)  # type: ignore[arg-type]
    model.generate(  # type: ignore[operator]
        ids, do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=new + 1,
        logits_processor=[Drawn(vocabulary, 1, new + 1, seed)], stopping_criteria=[clock or Clock()],
    )  # fmt: skip


def measure(name: str, new: int, device: str, tiny: bool, folder: str) -> tuple[dict[str, Any], Any, Twin]:
    """What a real run brings and takes, forward by forward; its routing; and a twin that runs before and after it.

    It runs twice: the first run is timed, and in the second somebody counts bytes and notes what is chosen, for which
    the host may have to wait.
    """
    case, layers, place, share, quantization = CASES[name]
    model = build(case, layers, device, tiny)
    generate(model, new, device, 4)  # kernels are loaded, and attention is planned for each length
    stand_in = {} if torch.cuda.is_available() else {0: "cpu"}
    places, cache = places_of(model, place), round(bytes_of_experts(model) * share)
    options: dict[str, Any] = {"expert_cache": cache, "offload_dir": folder, "ram_cache": 0, "stand_in": stand_in}
    if quantization:
        model = bigkit.load_and_quantize_model(model, config_for(quantization), device_map=places, stand_in=stand_in)
    else:
        model = bigkit.dispatch_model(model, places, **options)
    settle()
    twin = NarrowTwin(empty(name, tiny), device.partition(":")[0], quantization, places, cache)
    for _ in range(3):  # the first does not count, nor what it compiles
        twin.run()
    clock, begin = Clock(), time.perf_counter()
    generate(model, new, device, 3, clock)
    seconds = [end - start for start, end in zip([begin, *clock.times], clock.times)]
    for _ in range(2):
        twin.run()
    told = twin.told()
    del twin
    settle()
    clock, begin = Clock(), time.perf_counter()
    generate(model, 1, device, 3, clock)
    again = clock.times[0] - begin
    if share:  # with nothing on the GPU again
        model = bigkit.dispatch_model(model, places, **options)
        settle()
    counted, moved = Clock(), Counter[int]()
    for streamer in streamers_in(model):
        streamer.listeners.append(lambda e: moved.update({len(counted.times): e.nbytes * (e.kind == "fetch")}))
    routing = record_routing(model, lambda: generate(model, new, device, 3, counted), name)
    brought = [moved[step] for step in range(new + 1)]
    return {"bytes": brought, "seconds": seconds, "prompt_again": again, "cache": cache}, routing, told


def places_of(model: nn.Module, place: str) -> dict[str, Any]:
    """Where everything rests: experts elsewhere, or every second block's in RAM and the others' on disk."""
    names = [*experts_in(model)]
    own = {name: place if place != "both" else ("cpu", "disk")[i % 2] for i, name in enumerate(names)}
    return {"": 0, **own}


def bytes_of_experts(model: nn.Module) -> int:
    """Bytes of all experts."""
    return sum(p.nbytes for module in experts_in(model).values() for p in module.parameters())


def empty(name: str, tiny: bool) -> nn.Module:
    """A case's model without weights."""
    case, layers, *_ = CASES[name]
    model_class, config = class_and_config(case, layers, tiny)
    with init_empty_weights():
        model: nn.Module = model_class(config).bfloat16().eval()
    return model


def foretell(name: str, new: int, tiny: bool, cache: int, routing: Any, calibration: Calibration) -> dict[str, Any]:
    """What a dry run says of the same."""
    _, _, place, _, quantization = CASES[name]
    model = empty(name, tiny)
    run = dry_run(
        model, places_of(model, place), 1, PROMPT, new, "H200", dtype=None if quantization else "bfloat16",
        quantization=config_for(quantization), calibration=calibration, routing=routing, expert_cache=cache,
    )  # fmt: skip
    brought, start = [], 0
    for _, end in run.steps:
        brought.append(sum(op.bytes for op in run.operations[start:end] if op.name == FILL))
        start = end
    longest, spread = {step.name: step.bottleneck for step in run.times}, run.ranges["token"]
    return {
        "bytes": brought, "seconds": [step.seconds for step in run.times], "longest": longest[f"token {new}"],
        "range": [spread.low / spread.value, spread.high / spread.value], "rests_on": spread.rests_on,
    }  # fmt: skip


def compare(name: str, measured: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """Both side by side."""
    real, foretold = (sum(run["seconds"][3:]) / len(run["seconds"][3:]) for run in (measured, told))
    first, second = measured["seconds"][0], told["seconds"][0]
    low, high = (foretold * edge for edge in told["range"])
    return {
        "case": name,
        "bytes_equal": measured["bytes"] == told["bytes"],
        "bytes_per_token": [round(sum(run["bytes"][3:]) / len(run["bytes"][3:])) for run in (measured, told)],
        "bytes_of_prompt": [measured["bytes"][0], told["bytes"][0]],
        "token_ms": [round(1e3 * real, 2), round(1e3 * foretold, 2)],
        "error_percent": round(100 * (foretold / real - 1), 1),
        "range_ms": [round(1e3 * low, 2), round(1e3 * high, 2)],
        "rests_on": told["rests_on"],
        "in_range": low <= real <= high,
        "prompt_ms": [round(1e3 * first, 1), round(1e3 * second, 1)],
        "prompt_again_ms": round(1e3 * measured["prompt_again"], 1),
        "prompt_error_percent": round(100 * (second / first - 1), 1),
        "longest_busy": told["longest"],
    }


def main() -> None:
    """Calibrate, then run the cases, each measured and foretold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--new", type=int, default=16, help="tokens to decode")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--core", type=int, help="the core on which Python stays, once the machine is calibrated")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/experts-foretold.json")
    args = parser.parse_args()
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    calibration = calibrate(save=False, quick=args.tiny)
    gpu = torch.cuda.get_device_name() if device != "cpu" else "CPU"
    print(calibration.explain(), flush=True)
    if args.core is not None:
        os.sched_setaffinity(0, {args.core})  # of this thread alone: readers have been started
    about = {
        "core": args.core,
        "device": gpu,
        "torch": torch.__version__,
        "transformers": tf.__version__,
        "new_tokens": args.new,
    }
    results: dict[str, Any] = {"about": about, "rows": []}
    out = args.out or (Path(__file__).parent / "results" / "experts-foretold.json" if args.save else None)
    for name in args.cases:
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            measured, routing, twin = measure(name, args.new, device, args.tiny, folder)
        settle()
        told = foretell(name, args.new, args.tiny, measured["cache"], routing, calibration.with_twin(twin))
        found = compare(name, measured, told) | {"twin_ms": round(1e3 * twin.token.seconds, 2)}  # type: ignore[union-attr]
        results["rows"].append({**found, "measured": measured, "foretold": told})
        memory = f"{pinned_bytes() / 1e9:.1f} GB pinned, {psutil.Process().memory_info().rss / 1e9:.1f} GB of RAM"
        print(f"{json.dumps(found)}  {time.perf_counter() - begin:.0f} s, {memory} at its end", flush=True)
        if out:
            out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
