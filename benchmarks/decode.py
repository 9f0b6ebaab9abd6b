"""Decoding side by side: Python, one CUDA graph a token, Transformers' compiler, Accelerate; caches; drafts.

    python benchmarks/decode.py [--save]                a CUDA GPU: Llama-7B and others, random weights
    python benchmarks/decode.py --parts bf16 cache      some of it; `compile` takes half a minute alone
    python benchmarks/decode.py --device cpu --tiny     no GPU: tiny shapes, to see that it runs

A step is one decoded token of one sequence, greedy, after a prompt of 16 tokens: the time between two calls of a
stopping criterion that waits for the GPU, as a median of those after the first ten, in the second of two equal calls:
where a cache grows, attention is planned anew for each length that it has for the first time, which takes some 40 ms
(`new_lengths` is the first call). `equal` says whether the tokens are those of Transformers' static cache without a
graph. Parts:

    bf16, nf4, int8   all weights on the GPU; int8 without outliers (llm_int8_threshold=0)
    streamed          blocks in RAM: nf4 all of them, bf16 half
    experts           blocks of Qwen3-30B-A3B's shape, experts on the GPU or in RAM
    cache             8 blocks of Llama-7B after a prompt of 32,768 tokens, then the 32 of Llama-3.1-8B (`--models`):
                      the cache on the GPU, resting in RAM, offloaded by Transformers
    passes            16 blocks in RAM: seconds of a pass over 1 to 64 tokens, and text with a draft that is right as
                      often as asked
    compile           what `torch.compile` makes of the static cache
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import logging
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import experts as mixtures
import torch
import transformers as tf
from torch import Tensor, nn

import bigkit
from bigkit.maps.draft import expected_tokens
from bigkit.offload.resting_cache import RestingCache

PARTS = ("bf16", "nf4", "int8", "cache", "experts", "passes", "streamed", "compile")
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 300}
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}
CACHED: dict[str, dict[str, int]] = {
    "Llama-7B": {"blocks": 8},
    "Llama-3.1-8B": {"blocks": 32, "num_key_value_heads": 8, "intermediate_size": 14_336},
}
Row = dict[str, Any]


class Bench:
    """What all parts share.

    Args:
        device: "cuda:0" or "cpu".
        tiny: shapes of a toy.
        blocks: of the mixture of experts.
        models: those of `CACHED` for the part `cache`.
    """

    def __init__(self, device: str, tiny: bool, blocks: int, models: Sequence[str] = ()) -> None:
        self.device, self.tiny, self.blocks, self.models = device, tiny, blocks, models
        self.places = {} if device != "cpu" else {"stand_in": {0: "cpu"}}

    def llama(self, blocks: int = 32, **other: int) -> nn.Module:
        """A Llama-7B shape with random weights; `other` sizes of it differ."""
        sizes = {**TINY, "num_hidden_layers": min(blocks, 4)} if self.tiny else {"num_hidden_layers": blocks, **other}
        torch.manual_seed(0)
        with torch.device(self.device):
            torch.set_default_dtype(torch.bfloat16)
            model = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, max_position_embeddings=40_000))
            torch.set_default_dtype(torch.float32)
        return model.eval().requires_grad_(False)

    def quantized(self, kind: str) -> nn.Module:
        """The same in few bits."""
        config = bigkit.BnbQuantizationConfig(**KINDS[kind], torch_dtype=torch.bfloat16)
        return bigkit.load_and_quantize_model(self.llama(), config, device_map={"": 0}, **self.places)

    def prompt(self, tokens: int = 16) -> Tensor:
        return torch.randint(3, 120, (1, tokens), generator=torch.Generator().manual_seed(1)).to(self.device)

    def wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def decode(self, model: Any, new: int, tokens: int = 16, skip: int = 10, **options: Any) -> tuple[float, Tensor]:
        """Median seconds of a step, and the text."""
        clock = mixtures.Clock()
        text = model.generate(
            self.prompt(tokens), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0,
            stopping_criteria=[clock], **options,
        )  # fmt: skip
        steps = [later - earlier for earlier, later in zip(clock.times[skip:], clock.times[skip + 1 :])]
        return statistics.median(steps), text

    def pair(self, part: str, model: nn.Module, new: int = 64, few: int = 16) -> Iterator[Row]:
        """A model decoded by Python, and by graphs."""
        first, seconds = (self.decode(model, few)[0] for _ in range(2))
        rates = {"tokens_per_s": round(1 / seconds, 1), "new_lengths": round(1 / first, 1)}
        yield {"part": part, "way": "Python", **rates}
        static = {"cache_implementation": "static", "disable_compile": True}
        seconds, expected = self.decode(model, few, **static)
        yield {"part": part, "way": "Python, static cache", "tokens_per_s": round(1 / seconds, 1)}
        settle()
        before = self.reserved()
        with self.graphs(model) as decoder:
            begin = time.perf_counter()
            _, text = self.decode(model, few)
            self.wait()
            first = time.perf_counter() - begin
            seconds, _ = self.decode(model, new)
            row = {"part": part, "way": "one graph a token", "tokens_per_s": round(1 / seconds, 1)}
            equal = bool(torch.equal(text, expected))
            yield row | {
                "equal": equal, "first_call_s": round(first, 2), "replayed": decoder.replayed,
                "graph_mb": round((self.reserved() - before) / 1e6),
            }  # fmt: skip

    def graphs(self, model: nn.Module) -> Any:
        return bigkit.graph_decode(model)

    def reserved(self) -> int:
        return 0 if self.device == "cpu" else torch.cuda.memory_reserved()


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def bf16(bench: Bench) -> Iterator[Row]:
    """All weights on the GPU, as stored; beside it Accelerate's hooks."""
    import accelerate

    model = bench.llama()
    yield from bench.pair("bf16", model)
    if bench.device != "cpu":
        spread = accelerate.dispatch_model(model, {"": 0}, force_hooks=True)
        yield {"part": "bf16", "way": "Accelerate", "tokens_per_s": round(1 / bench.decode(spread, 20)[0], 1)}


def nf4(bench: Bench) -> Iterator[Row]:
    """All weights on the GPU in 4 bits."""
    yield from bench.pair("nf4", bench.quantized("nf4"))


def int8(bench: Bench) -> Iterator[Row]:
    """All weights on the GPU in 8 bits."""
    yield from bench.pair("int8", bench.quantized("int8"))


AROUND = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}


def streamed(bench: Bench) -> Iterator[Row]:
    """Blocks in RAM."""
    model = bench.llama()
    blocks = len(model.model.layers)  # type: ignore[union-attr, arg-type]
    half = {f"model.layers.{i}": "cpu" if i % 2 else 0 for i in range(blocks)}
    yield from bench.pair(
        "bf16, half in RAM", bigkit.dispatch_model(model, {**AROUND, **half}, 0, **bench.places), 24, 16
    )
    del model
    settle()
    model = bigkit.dispatch_model(bench.quantized("nf4"), {**AROUND, "model.layers": "cpu"}, 0, **bench.places)
    yield from bench.pair("nf4, all in RAM", model, 24, 16)


def experts(bench: Bench) -> Iterator[Row]:
    """A mixture on the GPU, and with its experts in RAM."""
    model = mixtures.build("qwen3", bench.blocks, bench.device, bench.tiny)
    yield from bench.pair("experts on the GPU", model)
    if bench.device != "cpu":
        yield from bench.pair("experts in RAM", mixtures.in_ram(model))


def cache(bench: Bench) -> Iterator[Row]:
    """A long context."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # it does not repeat itself, so equal would say nothing
    tokens = 64 if bench.tiny else 32_768
    for name in bench.models:
        model = bench.llama(**CACHED[name])
        resting = functools.partial(RestingCache, model.config)
        ways: dict[str, Callable[[], Row]] = {
            "on the GPU": dict,
            "resting in RAM, no layer stays": lambda resting=resting: {"past_key_values": resting(room=0)},
            "resting in RAM": lambda resting=resting: {"past_key_values": resting()},
            "offloaded by Transformers": lambda: {"cache_implementation": "offloaded"},
        }
        expected = None
        for way, options in ways.items():
            if way.startswith("offloaded") and bench.device == "cpu":
                continue
            row, text = _long_text(bench, model, tokens, options)
            expected = text if expected is None else expected
            differ = (text != expected)[0].nonzero()
            row["equal_tokens"] = int(differ[0] if len(differ) else text.shape[1]) - tokens
            equal = not len(differ)
            yield {"part": "cache", "way": way, "model": name, **row, "context": tokens, "equal": equal}
        del model, resting, ways
        settle()


def _long_text(bench: Bench, model: nn.Module, tokens: int, options: Callable[[], Row]) -> tuple[Row, Tensor]:
    settle()
    if bench.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    first, _ = bench.decode(model, 12, tokens, 4, **options())
    settle()
    given, begin = options(), time.perf_counter()
    seconds, text = bench.decode(model, 12, tokens, 4, **given)
    row = {"tokens_per_s": round(1 / seconds, 2), "new_lengths": round(1 / first, 2)}
    row["call_s"] = round(time.perf_counter() - begin, 2)
    if bench.device != "cpu":
        row["gpu_peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        row["gpu_reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 1)
    if isinstance(past := given.get("past_key_values"), RestingCache):
        row["stay"] = past.layers_that_stay()
    return row, text


class Stub(tf.LlamaForCausalLM):
    """A draft that knows a text, and is right as often as asked."""

    text: Tensor  # shape (1, tokens)
    right: Tensor  # for each of them, whether it is guessed

    @functools.wraps(tf.LlamaForCausalLM.forward)  # `generate` asks which arguments there are
    def forward(self, input_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, past_key_values=past_key_values, **kwargs)
        end = output.past_key_values.get_seq_length()
        rows = output.logits.shape[1]
        places = torch.arange(end - rows + 1, end + 1, device=self.text.device).clamp(max=self.text.shape[1] - 1)
        guesses = torch.where(
            self.right[places], self.text[0, places], (self.text[0, places] + 1) % self.config.vocab_size
        )
        output.logits = torch.nn.functional.one_hot(guesses, self.config.vocab_size)[None] * 100.0  # sure of itself
        return output


def passes(bench: Bench, acceptance: float = 0.8, guesses: int = 8) -> Iterator[Row]:
    """Several tokens a pass of a model whose blocks are in RAM."""
    model = bigkit.dispatch_model(bench.llama(16), {**AROUND, "model.layers": "cpu"}, 0, **bench.places)
    for tokens in (1, 2, 4, 8, 16, 32, 64):
        times = []
        for _ in range(3):
            past = tf.DynamicCache(config=model.config)
            with torch.no_grad():
                model(bench.prompt(64), past_key_values=past)
                bench.wait()
                begin = time.perf_counter()
                model(bench.prompt(tokens), past_key_values=past)
                bench.wait()
            times.append(time.perf_counter() - begin)
        yield {"part": "passes", "way": f"a pass over {tokens}", "seconds": round(statistics.median(times), 4)}
    new = 25
    (_, text), (seconds, _) = (bench.decode(model, new, skip=2) for _ in range(2))
    yield {"part": "passes", "way": "Python", "tokens_per_s": round(1 / seconds, 2)}
    small = {**TINY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    draft = Stub(tf.LlamaConfig(**{**small, "vocab_size": model.config.vocab_size})).to(bench.device).eval()
    draft.text = text
    draft.right = (torch.rand(text.shape[1], generator=torch.Generator().manual_seed(0)) < acceptance).to(bench.device)
    draft.generation_config.update(
        num_assistant_tokens=guesses, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0
    )
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        calls.clear()
        begin = time.perf_counter()
        got = model.generate(
            bench.prompt(), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0,
            assistant_model=draft,
        )  # fmt: skip
        bench.wait()
        taken = time.perf_counter() - begin
    handle.remove()
    yield {
        "part": "passes", "way": "a draft", "acceptance": acceptance, "guesses": guesses, "passes": len(calls),
        "tokens_per_s": round(new / taken, 2), "equal": bool(torch.equal(got, text)),
        "tokens_per_pass": round(new / len(calls), 2), "expected": round(expected_tokens(acceptance, guesses), 2),
    }  # fmt: skip


def compile_(bench: Bench) -> Iterator[Row]:
    """Transformers' own way."""
    model = bench.llama()
    if bench.device == "cpu":
        return
    begin = time.perf_counter()
    bench.decode(model, 14, skip=2, cache_implementation="static")
    first = time.perf_counter() - begin
    seconds, _ = bench.decode(model, 64, cache_implementation="static")
    rate = round(1 / seconds, 1)
    yield {"part": "bf16", "way": "Transformers, compiled", "tokens_per_s": rate, "first_call_s": round(first, 1)}


# ---------------------------------------------------------------------------------------------------------------------


def settle() -> None:
    """Give back what is not used any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def stand_in_graphs() -> None:
    """On the CPU a tape plays the part of a graph."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from bigkit.offload import graphs
    from tests import fake_graph

    graphs.Recording = fake_graph.Recording  # type: ignore[misc, assignment]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="toy shapes")
    parser.add_argument("--blocks", type=int, default=8, help="of the mixture (%(default)s)")
    parser.add_argument("--models", nargs="+", choices=CACHED, default=[*CACHED], help="of the part cache")
    parser.add_argument("--save", action="store_true", help="keep the figures in benchmarks/results")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "decode.json")
    args = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    tf.logging.set_verbosity_error()
    if args.device == "cpu":
        stand_in_graphs()
    tiny = args.tiny or args.device == "cpu"
    bench = Bench(args.device, tiny, 2 if tiny else args.blocks, args.models)
    device = torch.cuda.get_device_name() if args.device != "cpu" else platform.machine() + " CPU"
    about = {"device": device, "torch": torch.__version__, "transformers": tf.__version__, "blocks": bench.blocks}
    rows: list[Row] = []
    with torch.no_grad():
        for part in args.parts:
            run = globals()[part if part != "compile" else "compile_"]
            try:
                for row in run(bench):
                    rows.append(row)
                    print(row, flush=True)
                    if args.save:
                        args.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
            except (RuntimeError, ValueError, ImportError) as error:
                print(f"{part}: {type(error).__name__}: {error}", flush=True)
            settle()


if __name__ == "__main__":
    main()
