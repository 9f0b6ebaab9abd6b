"""Checkpoints in few bits that run as they are stored, beside the same weights in bfloat16.

    python benchmarks/stored.py [--save]                a CUDA GPU: shapes of gpt-oss-20b, DeepSeek-V3, Llama-7B
    python benchmarks/stored.py --parts kernels         decoding alone: seconds, and bytes a second
    python benchmarks/stored.py --device cpu --tiny     no GPU: tiny shapes, to see that it runs

Parts:

    kernels     seconds to decode what one token of a block needs, by PyTorch's operations and by a kernel; for experts
                also out of pinned RAM, beside the copy alone
    gpt-oss     experts in RAM: bfloat16, MXFP4
    deepseek    experts in RAM: bfloat16, FP8 in blocks
    llama       blocks in RAM: bfloat16, GPTQ's int4

The weights in bfloat16 are those that the stored ones decode to, so all ways have the same logits, bit for bit: `equal`
says whether they have, beside a model that is all on the GPU. A step is one decoded token of one sequence, as in
`experts.py`: tokens are drawn, the same in all ways, since a random model repeats itself and would find its experts in
slots. "Python" is plain `generate`, "graph" is `bigkit.graph_decode`. `brought` is what listeners counted for a step;
`kernels` what the profiler saw in one, in milliseconds by kind. A prompt is 8 x 512 tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import experts as mixtures
import torch
import transformers as tf
from torch import Tensor, nn

import bigkit
from bigkit.checkpoints import codecs
from bigkit.checkpoints import decoded as decoded_stacks
from bigkit.checkpoints.codecs import find_codec, find_stack_codec, rows_of
from bigkit.offload.hooks import hooks_in

PARTS = ("kernels", "gpt-oss", "deepseek", "llama")
BLOCKS = {"gpt-oss": 24, "deepseek": 7, "llama": 8}
NAMES = {"gpt-oss": "MXFP4", "deepseek": "FP8", "llama": "GPTQ int4"}
KINDS = {"decoding": ("_mxfp4", "_scaled", "_packed"), "gather": ("index", "gather"), "copies": ("Memcpy", "memcpy"),
         "products": ("gemm", "gemv", "cutlass", "nvjet", "xmma")}  # fmt: skip
Row = dict[str, Any]


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Decode by PyTorch's operations."""
    before, codecs._kernels = codecs._kernels, lambda: None  # type: ignore[assignment]
    try:
        yield
    finally:
        codecs._kernels = before


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], times: int = 8) -> float:
    """Median seconds of some work on the GPU."""
    found = []
    for _ in range(times + 2):
        wait()
        begin = time.perf_counter()
        work()
        wait()
        found.append(time.perf_counter() - begin)
    return statistics.median(found[2:])


# ---------------------------------------------------------------------------------------------------------------------
# Decoding alone


def kernels(bench: Bench) -> Iterator[Row]:
    """What a token of a block needs: 4 of 32 experts of gpt-oss, 8 of 32 of DeepSeek-V3, a layer in int4."""
    size = 32 if bench.tiny else 1
    for case, chosen, shape in (("gpt-oss", 4, (5760, 2880)), ("deepseek", 8, (4096, 7168))):
        rows, columns = (max(64, side // size // 64 * 64) for side in shape)
        yield experts_decoded(bench, case, chosen, (32, columns, rows) if case == "gpt-oss" else (32, rows, columns))
    rows, columns = 11008 // size // 64 * 64, 4096 // size // 64 * 64
    for format in ("gptq", "awq", "int4"):
        parts = packed_layer(format, rows, columns, bench.device)
        yield {"part": "kernels", "case": format, **layer_decoded(parts, rows, columns)}


def experts_decoded(bench: Bench, case: str, chosen: int, shape: tuple[int, ...]) -> Row:
    """Some experts of a stack, on the GPU and out of pinned RAM."""
    module = nn.Module()
    empty = torch.empty(shape, dtype=torch.bfloat16, device=bench.device)
    module.gate_up_proj = module.down_proj = nn.Parameter(empty, requires_grad=False)
    stored = mixtures.packed_as(NAMES[case], module)["gate_up_proj"]
    codec = find_stack_codec("w", [f"w{suffix}" for suffix in stored])
    assert codec is not None
    which = torch.randperm(shape[0], device=bench.device)[:chosen]
    parts = {suffix: part.detach() for suffix, part in stored.items()}
    few = {suffix: rows_of(part, which) for suffix, part in parts.items()}
    row, expected = decoded(lambda: codec.decode(few, torch.bfloat16), few)
    if bench.device != "cpu":
        pinned = {suffix: over_pinned(part) for suffix, part in parts.items()}
        nbytes = sum(part.nbytes for part in few.values())
        bring = seconds_of(lambda: [rows_of(part, which) for part in pinned.values()])
        both = seconds_of(lambda: codec.chosen(pinned, which, torch.bfloat16))
        equal = torch.equal(codec.chosen(pinned, which, torch.bfloat16), expected)
        row |= {"bring_ms": bring * 1e3, "bring_bytes_per_second": nbytes / bring, "bring_and_decode_ms": both * 1e3,
                "bring_and_decode_bytes_per_second": nbytes / both, "bring_and_decode_equal": equal}  # fmt: skip
    return {"part": "kernels", "case": case, **row}


def layer_decoded(parts: dict[str, Tensor], rows: int, columns: int) -> Row:
    """A linear layer."""
    codec = find_codec((rows, columns), {name: (tuple(part.shape), part.dtype) for name, part in parts.items()})
    assert codec is not None
    return decoded(lambda: codec.decode(parts, torch.bfloat16), parts)[0]


def decoded(work: Callable[[], Tensor], parts: dict[str, Tensor]) -> tuple[Row, Tensor]:
    """Decoding by PyTorch's operations and by a kernel, and the weights."""
    with without_kernels():
        expected, plain = work(), seconds_of(work)
    seconds, moved = seconds_of(work), sum(part.nbytes for part in parts.values()) + expected.nbytes
    return {"weights": expected.numel(), "plain_ms": plain * 1e3, "kernel_ms": seconds * 1e3,
            "kernel_bytes_per_second": moved / seconds, "equal": torch.equal(work(), expected)}, expected  # fmt: skip


def over_pinned(tensor: Tensor) -> Tensor:
    """A copy of a tensor in pinned RAM, as the GPU sees it."""
    from bigkit.checkpoints.ring import Slab
    from bigkit.offload.gather import seen_by_gpu

    slab = Slab(tensor.nbytes, pin=True)
    slab.pin()
    slab.bytes[: tensor.nbytes].copy_(tensor.contiguous().view(-1).view(torch.uint8))
    return seen_by_gpu(slab, tensor.device)[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def packed_layer(format: str, rows: int, columns: int, device: str, group: int = 128) -> dict[str, Tensor]:
    """Random tensors of a linear layer in 4 bits."""

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int64, device=device).to(torch.int32)

    group = min(group, columns)
    scales = torch.rand(columns // group, rows, device=device).half() / 100
    if format == "int4":
        return {"weight_packed": words(rows, columns // 8), "weight_scale": scales.t().contiguous(),
                "weight_shape": torch.tensor([rows, columns])}  # fmt: skip
    shape = (columns // 8, rows) if format == "gptq" else (columns, rows // 8)
    return {"qweight": words(*shape), "qzeros": words(columns // group, rows // 8), "scales": scales}


# ---------------------------------------------------------------------------------------------------------------------
# Models


class Bench:
    """What all parts share.

    Args:
        device: "cuda:0" or "cpu".
        tiny: shapes of a toy.
        blocks: of the models, instead of each one's own number.
        new: tokens to decode.
        more: look at kernels, and at other ways.
    """

    def __init__(self, device: str, tiny: bool, blocks: int, new: int, more: bool) -> None:
        self.device, self.tiny, self.blocks, self.new, self.more = device, tiny, blocks, new, more
        self.link = mixtures.link_rate()
        self.rates: dict[str, float] = {}
        self.logits: dict[str, Tensor] = {}

    def steps(self, model: Any, new: int = 0, **options: Any) -> tuple[float, Tensor]:
        """Tokens a second, and the logits of the last step. The run before has the same lengths.

        The prompt is one token: after a longer one whole blocks lie in slots, and these would not travel.
        """
        vocabulary, rates = model.config.vocab_size, []
        ids = torch.tensor([[7]], device=self.device)
        for _ in range(2):
            clock, drawn = mixtures.Clock(), mixtures.Drawn(vocabulary, 1, new or self.new)
            model.generate(ids, max_new_tokens=new or self.new, do_sample=False, eos_token_id=None, pad_token_id=0,
                           logits_processor=[drawn], stopping_criteria=[clock], **options)  # fmt: skip
            steps = [later - earlier for earlier, later in zip(clock.times[3:], clock.times[4:])]
            rates.append(1 / statistics.median(steps))
        return rates[-1], drawn.last

    def brought(self, model: Any) -> int:
        """Bytes that a step brings, as listeners are told."""
        moved: list[int] = []
        streamers = {hook.streamer for part in model.modules() for hook in hooks_in(part) if hasattr(hook, "streamer")}
        streamers -= {None}
        drawn = mixtures.Drawn(model.config.vocab_size, 1, 3)
        ids = torch.tensor([[7]], device=self.device)

        def listen(event: Any) -> None:
            if event.kind == "fetch" and drawn.step == 2:
                moved.append(event.nbytes)

        for streamer in streamers:
            streamer.listeners.append(listen)
        model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0,
                       logits_processor=[drawn])  # fmt: skip
        for streamer in streamers:
            streamer.listeners.remove(listen)
        return sum(moved)

    def measure(self, case: str, way: str, model: Any, modes: str = "graph Python prompt") -> Iterator[Row]:
        """A model by graphs and by Python, and a prompt."""
        for mode in modes.split():
            row: Row = {"part": case, "way": way, "mode": mode}
            try:
                if mode == "prompt":
                    seconds = mixtures.prompt_seconds(model, model.config.vocab_size)
                    row |= {"prompt_seconds": round(seconds, 4), "equal": self.equal(mode, self.prompt(model))}
                    yield row | self.against(mode, way, 1 / seconds)
                    continue
                if mode == "graph":
                    with bigkit.graph_decode(model):
                        rate, logits = self.steps(model)
                else:
                    rate, logits = self.steps(model, 10)
                    row["brought"] = self.brought(model)
                row |= self.profile(model, mode == "graph") if self.more else {}
            except Exception as error:
                yield row | {"error": f"{type(error).__name__}: {error}"[:300]}
                continue
            row["tokens_per_second"] = round(rate, 2)
            row["equal"] = self.equal(mode, logits)
            yield row | self.against(mode, way, rate)

    def expect(self, case: str, model: Any) -> Iterator[Row]:
        """Note the logits of a model that is all on the GPU, whose weights are decoded, and measure it."""
        self.logits["Python"] = self.steps(model, 10)[1]
        self.logits["graph"] = self.steps(model, cache_implementation="static", disable_compile=True)[1]
        self.logits["prompt"] = self.prompt(model)
        if self.device != "cpu":
            yield from self.measure(case, "all on the GPU, bf16", model)

    def prompt(self, model: Any) -> Tensor:
        """The logits after a prompt of 8 x 512 tokens."""
        generator = torch.Generator().manual_seed(2)
        ids = torch.randint(5, model.config.vocab_size, (8, 512), generator=generator).to(self.device)
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids, logits_to_keep=1, use_cache=False).logits
        return logits

    def equal(self, mode: str, logits: Tensor) -> bool:
        """Whether logits are those that are expected, bit for bit."""
        return bool(torch.equal(logits, self.logits[mode]))

    def against(self, mode: str, way: str, rate: float) -> Row:
        """How many times as fast as bfloat16 in RAM."""
        if way == "RAM, bf16":
            self.rates[mode] = rate
        return {"against_bf16": round(rate / self.rates[mode], 2)} if mode in self.rates else {}

    def profile(self, model: Any, graph: bool) -> Row:
        """Milliseconds of a step's kernels, by kind, and how many there are."""
        if self.device == "cpu":
            return {}
        try:
            return {"kernels": self.seen(model, graph)}
        except Exception as error:
            return {"kernels": f"{type(error).__name__}: {error}"[:200]}

    def seen(self, model: Any, graph: bool) -> dict[str, float]:
        """What the profiler saw in a step."""
        from torch.profiler import ProfilerActivity, profile

        with bigkit.graph_decode(model) if graph else contextlib.nullcontext():
            vocabulary = model.config.vocab_size
            ids = torch.randint(5, vocabulary, (1, 32), generator=torch.Generator().manual_seed(1)).to(self.device)
            options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

            def some(new: int) -> None:
                drawn = mixtures.Drawn(vocabulary, 1, new)
                model.generate(ids, max_new_tokens=new, logits_processor=[drawn], **options)

            totals = []
            for new in (6, 14):
                some(new)
                wait()
                with profile(activities=[ProfilerActivity.CUDA]) as seen:
                    some(new)
                    wait()
                kinds: dict[str, float] = {}
                times: list[int] = []
                for event in seen.events():
                    if event.device_type == torch.autograd.DeviceType.CUDA:
                        times += [event.time_range.start, event.time_range.end]
                        kind = next((k for k, words in KINDS.items() if any(w in event.name for w in words)), "others")
                        kinds[kind] = kinds.get(kind, 0) + event.device_time_total
                        kinds["kernels"] = kinds.get("kernels", 0) + 1
                kinds["from the first to the last"] = max(times) - min(times)
                totals.append(kinds)
        few, many = totals
        found = {kind: (many[kind] - few.get(kind, 0)) / 8 for kind in many}
        return {kind: round(value / (1 if kind == "kernels" else 1e3), 3) for kind, value in found.items()}


def mixture(case: str, bench: Bench) -> Iterator[Row]:
    """Experts in RAM, in bfloat16 and as stored."""
    model = mixtures.build(case, bench.blocks or BLOCKS[case], bench.device, bench.tiny)
    model.get_input_embeddings().weight.normal_(0, 20)  # type: ignore[operator]  # else all tokens look alike to routers
    stored = {name: mixtures.packed_as(NAMES[case], module) for name, module in mixtures.experts_in(model).items()}
    yield from bench.expect(case, model)
    found = mixtures.in_ram(model)
    mixtures.settle()
    yield from bench.measure(case, "RAM, bf16", found)
    bigkit.remove_hook_from_module(found, recurse=True)
    mixtures.hold_packed(found, stored)
    found = mixtures.in_ram(found)
    mixtures.settle()
    yield from bench.measure(case, f"RAM, {NAMES[case]}", found)
    if bench.more:
        before = decoded_stacks.decoded_in_turn
        decoded_stacks.decoded_in_turn = lambda module, own, experts, decode: decode(own)
        yield from bench.measure(case, f"RAM, {NAMES[case]}, one stack after the other", found, "graph")
        decoded_stacks.decoded_in_turn = before
        with without_kernels():
            yield from bench.measure(case, f"RAM, {NAMES[case]}, without kernels", found, "graph prompt")


def gpt_oss(bench: Bench) -> Iterator[Row]:
    """gpt-oss-20b's shape."""
    yield from mixture("gpt-oss", bench)


def deepseek(bench: Bench) -> Iterator[Row]:
    """DeepSeek-V3's shape with 16 of its 256 experts: what a token takes is the same."""
    mixtures.DEEPSEEK["n_routed_experts"] = 16
    yield from mixture("deepseek", bench)


def llama(bench: Bench) -> Iterator[Row]:
    """Blocks of Llama-7B's shape in RAM; their linear layers in bfloat16, and in GPTQ's int4."""
    from bigkit.checkpoints.as_stored import StoredLinear

    sizes: dict[str, Any] = {"num_hidden_layers": bench.blocks or BLOCKS["llama"]}
    if bench.tiny:
        sizes |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 300}
    torch.manual_seed(0)
    with torch.device(bench.device):
        torch.set_default_dtype(torch.bfloat16)
        model: Any = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
    linear = {name: module for name, module in model.model.layers.named_modules() if type(module) is nn.Linear}
    stored = {}
    for name, module in linear.items():
        parts = packed_layer("gptq", *module.weight.shape, bench.device)
        codec = find_codec(tuple(module.weight.shape), {own: (tuple(p.shape), p.dtype) for own, p in parts.items()})
        assert codec is not None
        module.weight.data = codec.decode(parts, torch.bfloat16)
        stored[name] = (codec, parts)
    yield from bench.expect("llama", model)
    stand_in = {} if torch.cuda.is_available() else {0: "cpu"}
    places = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0, "model.layers": "cpu"}
    found: Any = bigkit.dispatch_model(model, places, 0, stand_in=stand_in)
    yield from bench.measure("llama", "RAM, bf16", found)
    bigkit.remove_hook_from_module(found, recurse=True)
    for name, (codec, parts) in stored.items():
        layer: Any = found.model.layers.get_submodule(name)
        del layer._parameters["weight"]
        layer.__class__ = StoredLinear
        layer.codec, layer.works_in, layer.stored = codec, torch.bfloat16, tuple(parts)
        for own, part in parts.items():
            layer.register_parameter(own, nn.Parameter(part, requires_grad=False))
    found = bigkit.dispatch_model(found, places, 0, stand_in=stand_in)
    yield from bench.measure("llama", "RAM, GPTQ int4", found)
    if bench.more:
        with without_kernels():
            yield from bench.measure("llama", "RAM, GPTQ int4, without kernels", found, "graph prompt")


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the parts, and keep what they measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--blocks", type=int, default=0, help="blocks, instead of each model's own number")
    parser.add_argument("--new", type=int, default=24, help="tokens to decode")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--more", action="store_true", help="look at kernels, and at other ways")
    parser.add_argument("--out", type=Path, help="a JSON file for the results of one part")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/stored-PART.json")
    args = parser.parse_args()
    gpu = torch.cuda.is_available() and args.device != "cpu"
    about = {"device": torch.cuda.get_device_name() if gpu else platform.processor() or "CPU",
             "torch": torch.__version__, "transformers": tf.__version__, "new_tokens": args.new}  # fmt: skip
    for part in args.parts:
        out = args.out or (Path(__file__).parent / "results" / f"stored-{part}.json" if args.save else None)
        bench = Bench(args.device, args.tiny, args.blocks, args.new, args.more)
        sizes = {"link_bytes_per_second": round(bench.link), "blocks": args.blocks or BLOCKS.get(part, 1)}
        results: dict[str, Any] = {"about": about | sizes, "rows": []}
        work = getattr(sys.modules[__name__], part.replace("-", "_"))
        for row in work(bench):
            print(json.dumps(row), flush=True)
            results["rows"].append(row)
            if out:
                out.write_text(json.dumps(results, indent=1) + "\n")
        mixtures.settle()


if __name__ == "__main__":
    main()
