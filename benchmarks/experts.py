"""Mixtures of experts with experts in RAM, side by side: resident, bigkit, bigkit with a cache on the GPU, Accelerate.

    python benchmarks/experts.py [--save]                  a CUDA GPU: the shapes of some models, random weights
    python benchmarks/experts.py --cases qwen3 --layers 6  one of them, with fewer blocks
    python benchmarks/experts.py --device cpu --tiny       no GPU: tiny shapes, to see that it runs
    python benchmarks/experts.py --cases disk              no GPU: 2 GB of experts in files that nobody has read yet

Each case runs in a process of its own, all of which are started first. A step is one decoded token of every sequence
with a KV cache: the time between two calls of a stopping criterion that waits for the GPU, as a median. A model of
random weights soon repeats itself, and so do the experts that it chooses; so the next token of each sequence is drawn,
the same in all ways, and embeddings are large, so that routers tell tokens apart; but in rows that are called greedy.
`equal` says whether the logits are, bit for bit, those of the resident model, `bytes_per_token` what was brought for a
step. `share_of_link` is of a step the part in which the link would have to work at its rate; `share_of_limit` counts
what the resident model takes for a step, too. Drawn tokens choose experts almost by chance: no luck for a cache.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

import bigkit
from bigkit.checkpoints.as_stored import hold_stack
from bigkit.checkpoints.codecs import find_stack_codec
from bigkit.measure.routing import record_routing
from bigkit.offload.events import Event
from bigkit.offload.experts import expert_hits
from bigkit.offload.hooks import hooks_in
from bigkit.offload.rows import count_rows

QWEN3 = {"vocab_size": 151936, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4,
         "head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}  # fmt: skip
MIXTRAL = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
           "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}  # fmt: skip
DEEPSEEK = {"vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
            "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 64, "num_experts_per_tok": 8,
            "first_k_dense_replace": 1}  # fmt: skip  # 64 of 256 experts: what a token takes is the same
GPT_OSS = {"vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64,
           "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4}  # fmt: skip
TINY = {"vocab_size": 128, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
CASES = ("qwen3", "mixtral", "deepseek", "qwen3-48", "disk")
BLOCKS = {"qwen3": 16, "qwen3-48": 48, "mixtral": 12, "deepseek": 5, "disk": 8}
BATCHES = {"qwen3": (1, 8, 32)}


# ---------------------------------------------------------------------------------------------------------------------
# Models


def class_and_config(case: str, layers: int, tiny: bool) -> tuple[Any, Any]:
    """The class of a case's model, and its config."""
    sizes: dict[str, Any]
    if case.startswith("qwen3"):
        sizes, config, model_class = QWEN3, tf.Qwen3MoeConfig, tf.Qwen3MoeForCausalLM
    elif case == "mixtral":
        sizes, config, model_class = MIXTRAL, tf.MixtralConfig, tf.MixtralForCausalLM
    elif case == "deepseek":
        sizes, config, model_class = DEEPSEEK, tf.DeepseekV3Config, tf.DeepseekV3ForCausalLM
    else:
        sizes, config, model_class = GPT_OSS, tf.GptOssConfig, tf.GptOssForCausalLM
    if tiny and case == "deepseek":
        sizes = {**sizes, "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32,
                 "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 16}  # fmt: skip
    elif tiny:
        sizes = {**sizes, **TINY, **({"moe_intermediate_size": 32} if "moe_intermediate_size" in sizes else {}),
                 **({"intermediate_size": 64} if "intermediate_size" in sizes else {})}  # fmt: skip
    return model_class, config(**sizes, num_hidden_layers=layers, tie_word_embeddings=False)


def build(case: str, layers: int, device: str, tiny: bool) -> nn.Module:
    """A model with random weights on a device, in bfloat16."""
    model_class, config = class_and_config(case, layers, tiny)
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model: nn.Module = model_class(config)
        torch.set_default_dtype(torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.02)
            model.get_input_embeddings().weight.normal_(0, 20)  # type: ignore[operator]  # else all tokens look alike to routers
    return model.eval().requires_grad_(False)


def experts_in(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, of the experts of each block."""
    return {name: module for name, module in model.named_modules() if count_rows(module)}


def in_ram(model: nn.Module, **options: Any) -> nn.Module:
    """The model with its experts in RAM and all else on the GPU."""
    places = {"": 0, **dict.fromkeys(experts_in(model), "cpu")}
    stand_in = {} if torch.cuda.is_available() else {0: "cpu"}
    return bigkit.dispatch_model(model, places, stand_in=stand_in, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def fewer(new: int, batch: int) -> int:
    """How many tokens to decode: steps of several sequences are long, and alike."""
    return new if batch == 1 else max(7, new // 3)


def settle() -> None:
    """Wait for the GPU, and give back what is not used any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class Clock(tf.StoppingCriteria):
    """Notes when each token is there."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.after: list[Callable[[], Any]] = []

    def __call__(self, ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        for call in self.after:
            call()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


class Drawn(tf.LogitsProcessor):
    """Lets the next tokens be drawn ones, unless `greedy`, and keeps the logits of the last step."""

    def __init__(self, vocabulary: int, batch: int, new: int, seed: int = 3, greedy: bool = False) -> None:
        self.greedy = greedy
        self.tokens = torch.randint(5, vocabulary, (new + 1, batch), generator=torch.Generator().manual_seed(seed))
        self.step, self.last = 0, torch.empty(0)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.last = scores.clone()
        if self.greedy:
            return scores
        self.tokens = self.tokens.to(scores.device)
        chosen = torch.full_like(scores, -torch.inf).scatter_(1, self.tokens[self.step][:, None], 0)
        self.step += 1
        return chosen


def decode(
    model: nn.Module, batch: int, new: int, vocabulary: int, warm: bool = True, each: int = 0, greedy: bool = False
) -> tuple[float, Tensor, float]:
    """Tokens a second of all sequences while decoding, the logits of the last step, and bytes brought for a step.

    With a cache on the GPU, or in graphs (`each`: bytes of one expert), the bytes follow from what was not in the
    cache: the host would have to wait to be told at once. If `greedy`, tokens are the likeliest ones, and embeddings
    small: then they repeat themselves.

    The run before the one that counts draws other tokens, but has the same lengths: attention is planned anew for each
    length of the cache, which takes some 40 ms on a GPU.
    """
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    ids = torch.randint(5, vocabulary, (batch, 32), generator=torch.Generator().manual_seed(1)).to(device)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": new}
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    if greedy:
        embedding.mul_(2.0**-10)
    if warm:
        model.generate(ids, logits_processor=[Drawn(vocabulary, batch, new, 4, greedy)], **options)  # type: ignore[operator]
    clock, drawn, moved = Clock(), Drawn(vocabulary, batch, new, greedy=greedy), list[tuple[int, int]]()

    def listen(event: Event) -> None:
        if event.kind == "fetch":
            moved.append((len(clock.times), event.nbytes))

    streamers = {hook.streamer for module in model.modules() for hook in hooks_in(module) if hasattr(hook, "streamer")}
    listened = set() if each else streamers - {None}
    misses = []
    clock.after.append(lambda: misses.append(expert_hits(model)[1]) if each and len(clock.times) == 2 else None)
    for streamer in listened:
        streamer.listeners.append(listen)
    model.generate(ids, stopping_criteria=[clock], logits_processor=[drawn], **options)  # type: ignore[operator]
    if greedy:
        embedding.mul_(2.0**10)
    for streamer in listened:
        streamer.listeners.remove(listen)
    steps = [later - earlier for earlier, later in zip(clock.times[1:], clock.times[2:])]
    brought = sum(nbytes for step, nbytes in moved if step > 1) / max(1, len(steps))
    if each:
        brought = (expert_hits(model)[1] - misses[0]) * each / max(1, len(steps))
    return batch / statistics.median(steps), drawn.last, brought


def prompt_seconds(model: nn.Module, vocabulary: int) -> float:
    """Median seconds of a forward with 8 prompts of 512 tokens."""
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    ids = torch.randint(5, vocabulary, (8, 512), generator=torch.Generator().manual_seed(2)).to(device)
    seconds = []
    with torch.no_grad():
        for _ in range(4):
            begin = time.perf_counter()
            model(input_ids=ids, logits_to_keep=1, use_cache=False)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def link_rate() -> float:
    """Bytes a second from pinned RAM to the GPU."""
    if not torch.cuda.is_available():
        return 50e9
    source, target = (
        torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True),
        torch.empty(1 << 30, dtype=torch.uint8).cuda(),
    )
    rates = []
    for _ in range(4):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        rates.append(source.nbytes / (time.perf_counter() - begin))
    return statistics.median(rates[1:])


def row(way: str, batch: int, rate: float, **more: Any) -> dict[str, Any]:
    """A result."""
    return {"way": way, "batch": batch, **({"tokens_per_second": round(rate, 3)} if rate else {}), **more}


class Bench:
    """One case: the resident model, what its tokens are and take, and the same with experts elsewhere.

    Args:
        case: one of `CASES`, but "disk".
        model: resident.
        new: tokens to decode.
        batches: how many sequences at once; none takes the case's own.
    """

    def __init__(self, case: str, model: nn.Module, new: int, batches: tuple[int, ...]) -> None:
        self.case, self.model, self.new, self.batches = case, model, new, batches or BATCHES.get(case, (1,))
        self.link = link_rate()
        self.vocabulary: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
        blocks = experts_in(model)
        self.total = sum(p.nbytes for module in blocks.values() for p in module.parameters())
        self.one = self.total // sum(map(count_rows, blocks.values()))  # bytes of an expert
        self.chosen: int = self.one * len(blocks) * model.config.num_experts_per_tok  # type: ignore[union-attr, operator]
        self.resident: dict[tuple[int, str], tuple[float, Tensor]] = {}  # sequences, mode -> tokens a second, logits
        self.brought: dict[tuple[int, str], float] = {}  # sequences, way -> bytes for a step in Python

    def measure(self, way: str, model: nn.Module, cached: bool = False) -> Iterator[dict[str, Any]]:
        """Tokens a second of each batch, one graph a token, and the prompt; the first way is what others must equal.

        Args:
            way: what the results call it.
            model: the model.
            cached: whether it has a cache of experts on the GPU.
        """
        cuda, first = torch.cuda.is_available(), not self.resident
        modes = ["Python", *(["graphs"] if cuda and self.case.startswith("qwen3") else [])]
        modes += ["greedy"] if self.case == "qwen3" and not cached else []
        for mode in modes:
            batches = {"graphs": (1,), "greedy": (8,)}.get(mode, self.batches[:2] if cached else self.batches)
            for batch in batches:
                each = self.one if cuda and batch == 1 and (cached or mode == "graphs") else 0
                with bigkit.graph_decode(model) if mode == "graphs" else contextlib.nullcontext():
                    rate, logits, brought = decode(
                        model, batch, fewer(self.new, batch), self.vocabulary, each=each, greedy=mode == "greedy"
                    )
                own: dict[str, Any] = {}
                brought = self.brought[batch, way] = brought or self.brought.get((batch, way), 0)
                if first:
                    self.resident[batch, mode] = rate, logits
                else:
                    own["equal"] = bool(torch.equal(logits, self.resident[batch, mode][1]))
                    own["bytes_per_token"], limit = round(brought), brought / self.link  # seconds
                    own["share_of_link"] = round(rate / batch * limit, 3)
                    own["share_of_limit"] = round(rate / batch * (batch / self.resident[batch, mode][0] + limit), 3)
                if cached and batch == 1:
                    own["hit_rate"] = round(1 - brought / self.chosen, 3)
                if cuda:
                    own["gpu_bytes"] = torch.cuda.memory_allocated()
                yield row(way + ("" if mode == "Python" else f", {mode}"), batch, rate, **own)
        if self.case != "qwen3-48" and not cached:
            seconds = prompt_seconds(model, self.vocabulary)
            rate = {} if first else {"prompt_bytes_per_second": round(self.total / seconds)}
            yield row(way, 8, 0, prompt_seconds=round(seconds, 4), **rate)


def run(
    case: str, layers: int, device: str, tiny: bool, new: int, batches: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """The results of one case, as they come."""
    if case == "disk":
        yield from from_disk(tiny, min(new, 6))
        return
    model = build(case, layers, device, tiny)
    bench = Bench(case, model, new, batches)
    yield row("link", 0, 0, bytes_per_second=round(bench.link), bytes_per_token=bench.chosen,
              bytes_of_experts=bench.total, blocks=len(experts_in(model)))  # fmt: skip
    yield from bench.measure("resident", model)
    begin = time.perf_counter()
    found = in_ram(model)
    settle()
    yield row("RAM", 0, 0, seconds_to_dispatch=round(time.perf_counter() - begin, 1))
    yield from bench.measure("RAM", found)
    if case == "qwen3":
        found = in_ram(model, expert_cache=bench.total // 2)
        settle()
        yield from bench.measure("RAM, half on the GPU", found, cached=True)
        if torch.cuda.is_available():
            yield accelerate(model, bench.vocabulary)
    if case == "mixtral":
        del model, found, bench.model
        settle()
        yield from in_nf4(bench, build(case, layers, device, tiny))


def in_nf4(bf16: Bench, model: nn.Module) -> Iterator[dict[str, Any]]:
    """The same with weights in nf4: on the GPU, and with experts in RAM; `equal` compares these two."""
    config = bigkit.BnbQuantizationConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bf16", torch_dtype=torch.bfloat16
    )
    stand_in = {} if torch.cuda.is_available() else {0: "cpu"}
    model = bigkit.load_and_quantize_model(model, config, device_map={"": 0}, stand_in=stand_in)
    settle()
    bench = Bench(bf16.case, model, bf16.new, bf16.batches)
    size = {"bytes_of_experts": bench.total, "bytes_per_token": bench.chosen}
    yield row("link, nf4", 0, 0, bytes_per_second=round(bench.link), **size)
    yield from bench.measure("resident, nf4", model)
    found = in_ram(model)
    settle()
    yield from bench.measure("RAM, nf4", found)


def from_disk(tiny: bool, new: int) -> Iterator[dict[str, Any]]:
    """A mixture of 2 GB whose experts lie in files outside of the page cache: bytes that a token reads, by the process.

    The system counts them: bytes asked for by reads, and bytes brought from the disk, of which the larger one counts.
    """
    sizes = {"vocab_size": 4096, "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16,
             "num_key_value_heads": 4, "head_dim": 64, "moe_intermediate_size": 640, "num_experts": 64,
             "num_experts_per_tok": 2, **(TINY if tiny else {})}  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**sizes)).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    ids = torch.randint(sizes["vocab_size"], (1, new), generator=torch.Generator().manual_seed(1))
    expected = [model(token[None]).logits for token in ids.T]
    routing = record_routing(model, lambda: [model(token[None]) for token in ids.T])
    each = sum(p.nbytes for p in next(iter(experts_in(model).values())).parameters()) // sizes["num_experts"]
    total = each * sizes["num_experts"] * sizes["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as folder:
        bigkit.save_model(model, folder)
        del model
        with bigkit.init_empty_weights():
            model = tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**sizes)).bfloat16().eval()
        for file in Path(folder).glob("*.safetensors"):
            with open(file, "rb+") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        places = {"": "cpu", **dict.fromkeys(experts_in(model), "disk")}
        found = bigkit.load_checkpoint_and_dispatch(model, folder, places, ram_cache="1GB")
        with torch.no_grad():
            for part in found.parameters():
                if not hasattr(part, "weight"):
                    part.sum()  # what is no expert is there before the first token
            for number, token in enumerate(ids.T):
                before, begin = bytes_read(), time.perf_counter()
                logits = found(token[None]).logits
                seconds = time.perf_counter() - begin
                brought = max(now - then for now, then in zip(bytes_read(), before))
                earlier = [{choice for past in layer[:number] for choice in past} for layer in routing.chosen]
                new_ones = sum(len({*layer[number]} - past) for layer, past in zip(routing.chosen, earlier))
                own = {"equal": bool(torch.equal(logits, expected[number])), "bytes_read": brought,
                       "bytes_chosen": new_ones * each, "seconds": round(seconds, 3)}  # fmt: skip
                more = {"bytes_of_experts": total} if not number else {}
                yield row(f"disk, token {number + 1}", 1, 0, ratio=round(brought / (new_ones * each), 3), **own, **more)


def bytes_read() -> tuple[int, int]:
    """Bytes that this process has asked reads for, and that came from the disk for it, so far; Linux counts them."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"]), int(counts["read_bytes"])


def packed_as(kind: str, module: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Random tensors of a format for a block's experts, whose decoded values take the places of the weights."""
    packed = {}
    for own in ("gate_up_proj", "down_proj"):
        weight = module.get_parameter(own)
        device, (count, rows, columns) = weight.device, weight.shape
        if kind == "MXFP4":  # gpt-oss has (in, out), its files (out, in)
            parts = {
                "_blocks": torch.randint(0, 256, (count, columns, rows // 32, 16), dtype=torch.uint8, device=device),
                "_scales": torch.randint(118, 121, (count, columns, rows // 32), dtype=torch.uint8, device=device),
            }
        else:
            sizes = (count, max(1, rows // 128), max(1, columns // 128))
            parts = {
                "": torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=device),
                "_scale_inv": 0.01 + torch.rand(sizes, device=device) / 100,
            }
            for expert in range(count):
                parts[""][expert] = torch.randn(rows, columns, device=device)
        codec = find_stack_codec(own, [f"{own}{suffix}" for suffix in parts])
        assert codec is not None
        for expert in range(count):
            one = {suffix: part[expert : expert + 1] for suffix, part in parts.items()}
            weight.data[expert] = codec.decode(one, weight.dtype)[0]
        packed[own] = {suffix: nn.Parameter(part, requires_grad=False) for suffix, part in parts.items()}
    return packed


def hold_packed(model: nn.Module, packed: Mapping[str, dict[str, dict[str, nn.Parameter]]]) -> None:
    """Put what `packed_as` gave for each block's experts in the places of their weights."""
    for name, parts in packed.items():
        module = model.get_submodule(name)
        for own, stored in parts.items():
            codec = find_stack_codec(own, [own + suffix for suffix in stored])
            assert codec is not None
            hold_stack(module, own, codec, stored)


def accelerate(model: nn.Module, vocabulary: int) -> dict[str, Any]:
    """Accelerate's dispatch with the experts in RAM: all of a block's are brought for each token."""
    from accelerate import dispatch_model

    places = {name: 0 for name, _ in leaves(model) if not any(name.startswith(other) for other in experts_in(model))}
    bigkit.remove_hook_from_module(model, recurse=True)
    model = model.to("cpu")
    settle()
    found = dispatch_model(model, {**places, **dict.fromkeys(experts_in(model), "cpu")}, main_device=0)
    rate, _, _ = decode(found, 1, 3, vocabulary, warm=False)
    return row("accelerate", 1, rate)


def leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with tensors of their own."""
    for name, module in model.named_modules():
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            yield name, module


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the cases, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--layers", type=int, default=0, help="blocks, instead of each case's own number")
    parser.add_argument("--batches", type=int, nargs="+", default=[], help="sequences, instead of each case's own")
    parser.add_argument("--new", type=int, default=24, help="tokens to decode")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a case is ended")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/experts.json")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        sys.stdin.readline()  # what is imported is there; now it is this case's turn
        layers = args.layers or BLOCKS[args.here]
        for found in run(args.here, layers, args.device, args.tiny, args.new, tuple(args.batches)):
            print("RESULT " + json.dumps(found), flush=True)
        return
    about = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "transformers": tf.__version__,
        "new_tokens": args.new,
    }
    results: dict[str, Any] = {"about": about, "blocks": {}, "rows": []}
    out = args.out or (Path(__file__).parent / "results" / "experts.json" if args.save else None)
    waiting = [
        subprocess.Popen(
            [sys.executable, __file__, "--here", case, *sys.argv[1:]], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )
        for case in args.cases
    ]  # fmt: skip
    for case, process in zip(args.cases, waiting):
        results["blocks"][case] = args.layers or BLOCKS[case]
        follow(case, process, args.limit, results, out)


def follow(case: str, process: subprocess.Popen[str], limit: float, results: dict[str, Any], out: Path | None) -> None:
    """Let a case begin, and keep its results as they come; one that takes longer than it may is ended."""
    assert process.stdout is not None and process.stdin is not None
    begin = time.perf_counter()
    timer = threading.Timer(limit, process.kill)
    timer.start()
    try:
        process.stdin.write("\n")
        process.stdin.close()
        for line in process.stdout:
            if not line.startswith("RESULT "):
                print(line, end="", flush=True)
                continue
            found = {"case": case, **json.loads(line.removeprefix("RESULT "))}
            print(f"{time.perf_counter() - begin:.1f} s {json.dumps(found)}", flush=True)
            results["rows"].append(found)
            if out:
                out.write_text(json.dumps(results, indent=1) + "\n")
    except BrokenPipeError:
        print(f"{case}: its process ended before it began")
    finally:
        timer.cancel()
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
