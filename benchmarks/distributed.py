"""How much sooner N processes answer a file of prompts than one, what a gather costs next to Accelerate's, and what one
model over N processes does beside one process that has all their GPUs.

    python benchmarks/distributed.py [--gpu] [--save]
    python benchmarks/distributed.py --gpu --parts stages [--kinds bf16 int8 nf4 moe] [--processes 8]

For shares the model is the shipped GPT. Each process has one thread on the CPU, or one GPU; one process is measured the
same way. The time is that of the work, after every process has loaded the model: starting them is given apart. Runs are
taken in turn, 1 process and N, and the medians compared. `overhead` is what splitting and gathering cost: the time of
one process with bigkit over that of a plain loop.

For stages it is a Llama-7B shape, or a mixture of experts, with random weights; without `--gpu` small ones. One process
with all GPUs and N processes (2) with one each answer the same prompts; it is said which share of the answers is equal.
*One at a time* means one group of sequences after another through both stages, so that one process always waits; *in
flight* means as many groups under way as stages (`map_in_flight`), and the gain is their ratio. Each way runs before it
is timed, so that memory, kernels and graphs are there. A run counts all of `generate`, the prompts included, for two
groups a process, or three with one more than processes under way. With `graphs` each process replays its decode steps
(`graph_decode`); only bf16 is timed in Python, with one group more and for single sequences, too. int8 looks for no
outliers.
Attention is PyTorch's own: cuDNN's, the default on an H200, gives other bits from call to call.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import bigkit
from bigkit import notebook_launcher

PARTS, KINDS = ["shares", "stages"], ["bf16", "int8", "nf4", "moe"]
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


def measure_shares(options: argparse.Namespace) -> dict[str, Any]:
    """The shipped GPT in 1, 2 and all processes, and gathers; two Markdown tables are printed."""
    most = torch.cuda.device_count() if options.gpu else os.cpu_count() or 1
    worlds = sorted({1, 2, 4, most} & set(range(1, most + 1)))
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
    return {"overhead": overhead, "scaling": rows, "gather_ms": gathered}


# ---------------------------------------------------------------------------------------------------------------------
# One model over several processes

# sequences in a group, tokens of a prompt, tokens to add
LOADS = {"many": (64, 128, 32), "one sequence": (1, 64, 32)}
LOADS_CPU = {"many": (8, 32, 8), "one sequence": (1, 16, 16)}


def empty_model(kind: str, gpu: bool) -> Any:
    """A model without weights: Llama's 7B, or a mixture of 8 layers with 16 experts each; small ones for the CPU."""
    import torch
    import transformers

    from bigkit import init_empty_weights

    small = {} if gpu else {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 512,
                            "num_attention_heads": 8}  # fmt: skip
    if kind == "moe":
        sizes = {"hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 8, "num_local_experts": 16,
                 "num_attention_heads": 16, "num_key_value_heads": 8, "sliding_window": None, **small}  # fmt: skip
        config, family = transformers.MixtralConfig(**sizes), transformers.MixtralForCausalLM
    else:
        config, family = transformers.LlamaConfig(**small), transformers.LlamaForCausalLM
    with init_empty_weights():
        return family._from_config(config, dtype=torch.bfloat16 if gpu else torch.float32)


def write_part(model: Any, names: Sequence[str], folder: Path, rank: int, gpu: bool) -> None:
    """Random weights for some modules of an empty model, in files of this process; rank 0 writes the index."""
    import json

    import torch
    from safetensors.torch import save_file

    from bigkit import gather_object

    mine = [name for name, _ in model.named_parameters() if any(name.startswith(f"{own}.") for own in names)]
    generator = torch.Generator("cuda" if gpu else "cpu").manual_seed(rank)
    shapes = dict(model.named_parameters())
    weight_map = {}
    for start in range(0, len(mine), 40):
        file = f"part-{rank}-{start}.safetensors"
        tensors = {}
        for name in mine[start : start + 40]:
            drawn = torch.empty(shapes[name].shape, dtype=shapes[name].dtype, device=generator.device)
            tensors[name] = drawn.normal_(1.0 if "norm" in name else 0.0, 0.02, generator=generator).cpu()
            weight_map[name] = file
        save_file(tensors, folder / file)
    parts = gather_object([weight_map])
    if rank == 0:
        index = {"metadata": {}, "weight_map": {name: file for part in parts for name, file in part.items()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def answer_in_stages(kinds: list[str], gpu: bool, folder: Path, loads: dict[str, Any]) -> list[Any]:
    """For each kind of model what this process measures: in stages, and on process 0 alone with all GPUs."""
    import itertools
    import shutil
    import time
    from contextlib import nullcontext
    from dataclasses import replace
    from functools import partial

    import torch

    import bigkit
    from bigkit import BnbQuantizationConfig, Hardware, PartialState, gather_object, graph_decode, map_in_flight
    from bigkit.machine.network import Network
    from bigkit.units import MiB

    state = PartialState(cpu=not gpu)
    torch.backends.cuda.enable_cudnn_sdp(False)
    if not gpu:
        torch.set_num_threads(1)

    def meet(together: bool = True) -> None:
        if together:
            gather_object([rank])  # by gloo: a barrier of nccl would spin on a GPU that process 0 is measuring

    rank, world, dtype = state.process_index, state.num_processes, torch.bfloat16 if gpu else torch.float32
    machine = gather_object([Hardware.detect()])[0]  # one for all: how much is free changes
    hosts = [replace(machine, gpus=machine.gpus[i : i + 1], ram=machine.ram // world) for i in range(world)]

    def equal(said: list[Any], expected: list[Any]) -> float:
        """The share of rows of tokens that are equal."""
        pairs = [pair for these, those in zip(said, expected) for pair in zip(these, those)]
        return sum(one == other for one, other in pairs) / len(pairs)

    def measured(model: Any, cases: list[tuple[str, str]], together: bool) -> tuple[dict[str, float], dict[str, Any]]:
        """Tokens a second of every load and way, the share of rows that the first way gave too, and the tokens."""
        model.generation_config.eos_token_id = None  # random weights draw any token
        model.generation_config.pad_token_id = 0
        rates, answers = dict[str, float](), dict[str, Any]()
        for by, load in cases:
            batch, prompt, new = loads[load]
            generator = torch.Generator().manual_seed(1)
            prompts = [*torch.randint(3, model.config.vocab_size, (3 * world, batch, prompt), generator=generator)]
            with graph_decode(model) if by == "graphs" else nullcontext():
                for way, (count, run) in ways.items() if together else [("one at a time", (1, one_at_a_time))]:
                    if way == more and (by == "Python" or kind != "bf16"):
                        continue
                    asked = prompts if way == more else prompts[: 2 * world]  # groups without a rest, of two
                    run(model, asked[:count], new if by == "graphs" else 4)  # memory, kernels and graphs are there then
                    meet(together)
                    start = time.perf_counter()
                    said = run(model, asked, new)
                    meet(together)
                    name = f"{load}, {by}, {way}"
                    rates[name] = len(asked) * batch * new / (time.perf_counter() - start)
                    said = [tokens.tolist() for tokens in said]
                    rates[f"{name}, equal"] = equal(said, answers.setdefault(f"{load}, {by}", said))
                    print(kind, name, round(rates[name], 1), rates[f"{name}, equal"], flush=True)
        return rates, answers

    def ask(model: Any, ids: Any, new: int) -> Any:
        return model.generate(ids.to(state.device), max_new_tokens=new, do_sample=False).cpu()

    def one_at_a_time(model: Any, prompts: Any, new: int) -> list[Any]:
        return [ask(model, ids, new) for ids in prompts]

    def in_flight(model: Any, prompts: Any, new: int, groups: int | None = None) -> list[Any]:
        return map_in_flight(lambda ids: ask(model, ids, new), prompts, model, groups=groups)

    more = f"{ {3: 'three'}.get(world + 1, world + 1) } under way"
    ways = {  # groups under way, and how they are asked
        "in flight": (world, in_flight),
        more: (world + 1, partial(in_flight, groups=world + 1)),
        "one at a time": (1, one_at_a_time),
    }

    def loaded(kind: str, plan: Any, config: Any, together: bool) -> Any:
        model = empty_model(kind, gpu)
        if together:
            return bigkit.pipeline(model, stored[kind == "moe"], plan, config).eval()
        places = {name: rank if gpu else "cpu" for rank, stage in enumerate(plan.stages) for name in stage.names}
        places |= dict.fromkeys(("model.norm", "model.rotary_emb"), world - 1 if gpu else "cpu")  # the same cut
        if config is None:
            return bigkit.load_checkpoint_and_dispatch(model, stored[kind == "moe"], places, dtype=dtype).eval()
        return bigkit.load_and_quantize_model(model, config, stored[kind == "moe"], places).eval()

    stored, rows, written = [folder / "llama", folder / "moe"], [], set[Path]()
    for kind in kinds:
        config = None
        if kind in ("int8", "nf4"):
            eight = {"load_in_8bit": True, "llm_int8_threshold": 0.0}  # no outliers, for which the host is asked
            bits = eight if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
            computing = {"torch_dtype": dtype, "bnb_4bit_compute_dtype": dtype}
            config = BnbQuantizationConfig(**bits, **computing)
        ask_for = {"quantization": config and config.quantization, "context": 320, "overhead": None if gpu else 0}
        model = empty_model(kind, gpu)
        plan = bigkit.plan_hosts(model, hosts, Network("NVLink", 3e11, 3e-5), dtype=dtype, **ask_for)
        if (place := stored[kind == "moe"]) not in written:
            place.mkdir(exist_ok=True)
            write_part(
                model, [*plan.stages[rank].names, *(["model.norm"] if rank == world - 1 else [])], place, rank, gpu
            )
            written.add(place)
            meet()
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        model = loaded(kind, plan, config, together=True)
        row: dict[str, Any] = {"load_s": time.perf_counter() - start, "blocks": plan.stages[rank].blocks}
        row["held_mib"] = sum(tensor.nbytes for tensor in model.parameters()) // MiB
        row |= {"peak_mib": torch.cuda.max_memory_allocated() // MiB} if gpu else {}
        row |= {"kind": kind, "one_predicted": plan.one, "split_predicted": plan.split}
        cases = [*itertools.product(["graphs", "Python"] if gpu else ["Python"], loads)]
        cases = cases if kind == "bf16" or not gpu else [("graphs", "many")]
        row["rates"], tokens = measured(model, cases, together=True)
        print(row, flush=True)
        del model
        meet()
        if rank == 0:
            whole = loaded(kind, plan, config, together=False)
            row["alone"], expected = measured(whole, cases, together=False)
            del whole
            row["equal"] = {load: equal(said, expected[load]) for load, said in tokens.items()}
        rows.append(row)
        meet()
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def measure_stages(kinds: list[str], gpu: bool, world: int) -> list[dict[str, Any]]:
    """A row for each kind of model: several processes, and one with all GPUs."""
    loads = LOADS if gpu else LOADS_CPU
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        every = notebook_launcher(answer_in_stages, (kinds, gpu, folder, loads), world)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return joined(every, gpu)


def joined(every: list[list[dict[str, Any]]], gpu: bool) -> list[dict[str, Any]]:
    """The rows of all processes as one."""
    rows = []
    for same in zip(*every):
        one = same[0]
        row = one | {name: [other[name] for other in same] for name in ("blocks", "held_mib", "load_s")}
        row |= {"peak_mib": [other["peak_mib"] for other in same]} if gpu else {}
        row["gain"] = {}
        for name in [name for name in one["rates"] if name.endswith(", in flight")]:
            key = name.removesuffix(", in flight")
            row["gain"][key] = one["rates"][name] / one["rates"][f"{key}, one at a time"]
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure, print what was found; with --save keep it as JSON."""
    parser = argparse.ArgumentParser(description="N processes against one")
    parser.add_argument("--gpu", action="store_true", help="one process a GPU, instead of one a core")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="shares: a model in each process; "
                        "stages: one model over several")  # fmt: skip
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="bytes to add to each")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of models in stages")
    parser.add_argument("--processes", type=int, default=2, help="over which a model is spread")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/{distributed,stages}-*.json")
    options = parser.parse_args()
    machine = {
        "processor": torch.cuda.get_device_name() if options.gpu else platform.machine(),
        "gpus": torch.cuda.device_count(), "cores": os.cpu_count(), "python": platform.python_version(),
        "torch": torch.__version__, "bigkit": bigkit.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    folder, place = Path(__file__).parent / "results", "gpu" if options.gpu else "cpu"
    folder.mkdir(exist_ok=True)
    if "shares" in options.parts:
        import accelerate

        content = measure_shares(options)
        about = {"accelerate": accelerate.__version__, **{n: vars(options)[n] for n in ("runs", "prompts", "tokens")}}
        if options.save:
            path = folder / f"distributed-{place}.json"
            path.write_text(json.dumps({"machine": machine | about, **content}, indent=1) + "\n")
    if "stages" in options.parts:
        import transformers

        about = {"transformers": transformers.__version__, "loads": LOADS if options.gpu else LOADS_CPU}
        content = {"machine": machine | about, "rows": measure_stages(options.kinds, options.gpu, options.processes)}
        if options.save:
            (folder / f"stages-{place}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
