"""How much sooner N processes answer a file of prompts than one, and what a gather costs next to Accelerate's.

    python benchmarks/distributed.py [--gpu] [--save]

The model is the shipped GPT. Each process has one thread on the CPU, or one GPU; one process is measured the same way.
The time is that of the work, after every process has loaded the model: starting them is given apart. Runs are taken in
turn, 1 process and N, and the medians compared. `overhead` is what splitting and gathering cost: the time of one
process with bigkit over that of a plain loop.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import bigkit
from bigkit import notebook_launcher

PROMPTS = ["import ", "def __init__(self", "class ", "for i in range(", "return ", "while ", "if x is ", "@property\n"]


def generate(model: Any, prompts: list[str], tokens: int, device: Any) -> list[str]:
    """Continue each prompt by so many bytes, one after another."""
    import torch

    from bigkit.zoo.gpt import decode, encode

    return [decode(model.generate(torch.tensor([encode(p)], device=device), tokens)[0]) for p in prompts]


def answer(prompts: list[str], tokens: int, gpu: bool, plain: bool) -> dict[str, float]:
    """Seconds for the prompts: with bigkit, and into a file; or a plain loop."""
    import json
    import tempfile
    import time
    from pathlib import Path

    import torch

    from bigkit import PartialState, gather_for_results, gather_object, map_file
    from bigkit.zoo.gpt import load_pygpt

    torch.set_num_threads(1)
    state = PartialState(cpu=not gpu)
    model = load_pygpt(state.device, torch.float32)
    generate(model, prompts[:2], tokens, state.device)
    seconds = {}
    state.wait_for_everyone()
    start = time.perf_counter()
    if plain:
        generate(model, prompts, tokens, state.device)
        return {"loop": time.perf_counter() - start}
    with state.split_between_processes(prompts) as mine:
        texts = generate(model, mine, tokens, state.device)
    assert len(gather_for_results(texts, len(prompts))) == len(prompts)
    seconds["split"] = time.perf_counter() - start

    folder = Path(gather_object([tempfile.mkdtemp()])[0])
    if state.is_main_process:
        (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    state.wait_for_everyone()
    start = time.perf_counter()
    source, output = folder / "prompts.jsonl", folder / "out.jsonl"
    map_file(lambda batch: generate(model, batch, tokens, state.device), source, output, batch_size=2, progress=False)
    seconds["file"] = time.perf_counter() - start
    return seconds


def gathers(sizes: list[int], gpu: bool, runs: int) -> dict[str, float]:
    """Milliseconds of a gather of float32 rows, and of objects, with bigkit and with Accelerate, in turn."""
    import statistics
    import time

    import accelerate
    import torch

    from bigkit import PartialState, gather, gather_object

    state = PartialState(cpu=not gpu)
    accelerate.PartialState(cpu=not gpu)
    calls: dict[str, Any] = {}
    for size in sizes:
        rows = torch.ones(size, 256, device=state.device)
        calls[f"{size} rows, bigkit"] = lambda rows=rows: gather(rows)
        calls[f"{size} rows, Accelerate"] = lambda rows=rows: accelerate.utils.gather(rows)
    texts = ["a text of some words"] * 1000
    calls["1000 texts, bigkit"] = lambda: gather_object(texts)
    calls["1000 texts, Accelerate"] = lambda: accelerate.utils.gather_object(texts)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(runs + 1):
        for name, call in calls.items():
            state.wait_for_everyone()
            start = time.perf_counter()
            call()
            if gpu:
                torch.cuda.synchronize()
            if run:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    """Measure, print two Markdown tables; with --save keep them as JSON."""
    parser = argparse.ArgumentParser(description="N processes against one")
    parser.add_argument("--gpu", action="store_true", help="one process a GPU, instead of one a core")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="bytes to add to each")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/distributed-{cpu,gpu}.json")
    options = parser.parse_args()

    most = torch.cuda.device_count() if options.gpu else os.cpu_count() or 1
    worlds = sorted({1, 2, most} & set(range(1, most + 1)))
    prompts = (PROMPTS * options.prompts)[: options.prompts]
    times: dict[tuple[int, str], list[float]] = {}
    for _ in range(options.runs):
        for world in worlds:
            start = time.perf_counter()
            results = notebook_launcher(answer, (prompts, options.tokens, options.gpu, False), world)
            for kind, seconds in results[0].items():
                times.setdefault((world, kind), []).append(seconds)
            whole = time.perf_counter() - start - times[world, "split"][-1] - times[world, "file"][-1]
            times.setdefault((world, "start"), []).append(whole)
        loop = notebook_launcher(answer, (prompts, options.tokens, options.gpu, True), 1)[0]["loop"]
        times.setdefault((1, "loop"), []).append(loop)
    medians = {key: statistics.median(taken) for key, taken in times.items()}
    rows = [
        {
            "processes": world,
            **{f"{kind}_s": medians[world, kind] for kind in ("split", "file", "start")},
            "split_ratio": medians[1, "split"] / medians[world, "split"],
            "file_ratio": medians[1, "file"] / medians[world, "file"],
        }
        for world in worlds
    ]
    overhead = medians[1, "split"] / medians[1, "loop"]
    print(f"{options.prompts} prompts, {options.tokens} bytes each; a plain loop takes {medians[1, 'loop']:.2f} s, one "
          f"process with bigkit {overhead:.2f} times that")  # fmt: skip
    print("| processes | split, infer, gather | ratio | map_file | ratio | starting and loading |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['processes']} | {row['split_s']:.2f} s | {row['split_ratio']:.2f}x | {row['file_s']:.2f} s"
              f" | {row['file_ratio']:.2f}x | {row['start_s']:.1f} s |")  # fmt: skip
    gathered = notebook_launcher(gathers, ([1, 1000, 30000], options.gpu, 20), worlds[-1])[0]
    print(f"\n| gather on {worlds[-1]} processes | bigkit | Accelerate |")
    print("|---|---|---|")
    for name in sorted({name.partition(",")[0] for name in gathered}):
        print(f"| {name} | {gathered[f'{name}, bigkit']:.2f} ms | {gathered[f'{name}, Accelerate']:.2f} ms |")
    if options.save:
        import accelerate

        machine = {
            "processor": torch.cuda.get_device_name() if options.gpu else platform.machine(),
            "gpus": torch.cuda.device_count(), "cores": os.cpu_count(), "python": platform.python_version(),
            "torch": torch.__version__, "accelerate": accelerate.__version__, "bigkit": bigkit.__version__,
            "runs": options.runs, "prompts": options.prompts, "tokens": options.tokens,
            "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        path = Path(__file__).parent / "results" / f"distributed-{'gpu' if options.gpu else 'cpu'}.json"
        path.parent.mkdir(exist_ok=True)
        content = {"machine": machine, "overhead": overhead, "scaling": rows, "gather_ms": gathered}
        path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
