"""A random mixture of experts of Transformers, spread in a random way and used as users do: all drawn from one seed,
and played on the spread model and on a whole one at once.

On a CPU the device is a stand-in, which passes for a GPU in every second case, its RAM for pinned RAM; with a GPU it is
that one, whose own account of experts and graphs are met as well.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers as tf
from torch import Tensor, nn

import bigkit
from bigkit.offload import gather, lenders
from bigkit.offload.handle import Away
from bigkit.offload.lenders import streamers_in
from bigkit.offload.rows import count_rows
from tests.spread import handles

FAMILIES = {
    "mixtral": (tf.MixtralConfig, tf.MixtralForCausalLM),
    "qwen3": (tf.Qwen3MoeConfig, tf.Qwen3MoeForCausalLM),
    "gpt-oss": (tf.GptOssConfig, tf.GptOssForCausalLM),
    "deepseek": (tf.DeepseekV3Config, tf.DeepseekV3ForCausalLM),
}
WORDS = 64
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Stop(Exception):
    """Raised in the middle of a forward."""


class Case(NamedTuple):
    """All that one seed decides."""

    seed: int
    family: str
    sizes: dict[str, Any]
    dtype: torch.dtype
    implementation: str
    quantization: str
    pretends: bool
    steps: list[tuple[str, int]]


def draw(seed: int) -> Case:
    """The case of a seed."""
    rng = random.Random(seed)
    experts = rng.choice([2, 3, 5, 8, 16])
    family = rng.choice([*FAMILIES]) if experts in (8, 16) else rng.choice([*FAMILIES][:3])
    blocks, per_token, width = rng.randint(1, 4), rng.randint(1, min(4, experts)), rng.choice([16, 24, 32])
    sizes: dict[str, Any] = {
        "vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": blocks, "num_attention_heads": 4,
        "num_experts_per_tok": per_token, "intermediate_size": width, "moe_intermediate_size": width,
        "num_experts": experts, "num_local_experts": experts, "n_routed_experts": experts,
    }  # fmt: skip
    if family == "gpt-oss":
        sizes["layer_types"] = ["full_attention"] * blocks
    if family == "deepseek":
        # Parts of heads are multiples of 16 bytes: cuDNN's attention reads others at addresses that it cannot.
        sizes |= {"num_key_value_heads": 4, "n_group": 2, "topk_group": 2, "first_k_dense_replace": 1,
                  "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                  "v_head_dim": 8, "num_hidden_layers": blocks + 1}  # fmt: skip
    else:
        sizes |= {"num_key_value_heads": 2, "head_dim": 8}
    return Case(
        seed=seed,
        family=family,
        sizes=sizes,
        dtype=rng.choice([torch.float32, torch.bfloat16]),
        implementation=rng.choice(["batched_mm", "batched_mm", "grouped_mm", "eager"]),
        quantization=rng.choice(["", "", "", "nf4", "int8"]),
        pretends=rng.random() < 0.5,
        steps=[(rng.choice([*STEPS]), rng.randrange(10**6)) for _ in range(rng.randint(3, 8))],
    )


def check(seed: int, folder: Path, gpu: bool = False) -> None:
    """Play the case of a seed; its failure names the seed and the case."""
    case = draw(seed)
    play = Play(case, folder, gpu)
    try:
        with play.pretending() if case.pretends and not gpu else nullcontext():
            play.play()
    except BaseException as error:
        error.args = (f"mixture of seed {seed} at {play.at}: {error!r}\n{case}\n{play.places}, {play.options}",)
        raise


class Play:
    """A case that is being played.

    Attributes:
        whole, parts: the whole model, and the one that is spread.
        names: of the experts of each block.
    """

    def __init__(self, case: Case, folder: Path, gpu: bool) -> None:
        self.case, self.folder, self.at, self.gpu = case, folder, "start", gpu
        self.device, self.stand_in = ("cuda:0", {}) if gpu else ("cpu", {0: "cpu"})
        config_class, model_class = FAMILIES[case.family]
        torch.manual_seed(case.seed)
        model: Any = model_class(config_class(**case.sizes)).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.normal_(std=0.3)  # so that routers choose
        model.set_experts_implementation(case.implementation)
        model.to(case.dtype)
        if case.quantization:
            model = self.quantized(model)
        self.whole: Any = model.to(self.device)
        self.parts: Any = copy.deepcopy(model)
        self.names = [name for name, module in model.named_modules() if count_rows(module)]
        self.places: dict[str, Any] = {}
        self.options: dict[str, Any] = {}

    def quantized(self, model: nn.Module) -> nn.Module:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        bits: dict[str, Any] = {"load_in_8bit": True}
        if self.case.quantization == "nf4":
            bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        config = bigkit.BnbQuantizationConfig(**bits, torch_dtype=self.case.dtype, skip_modules=linear)
        model = bigkit.load_and_quantize_model(model, config, device_map={"": self.device})
        return getattr(model, "_orig_mod", model)

    @contextmanager
    def pretending(self) -> Iterator[None]:
        """Let the stand-in pass for a GPU."""
        with (
            mock.patch.object(lenders, "ExpertStreamer", gather.GatherStreamer),
            mock.patch.object(gather, "seen_by_gpu", lambda slab, device: slab.bytes[:]),
        ):
            yield

    def play(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.again(random.Random(self.case.seed))
        with torch.no_grad():
            for step, seed in self.case.steps:
                self.at = f"{step} {seed}"
                STEPS[step](self, random.Random(seed))
                for streamer in streamers_in(self.parts):
                    for site in streamer.sites:
                        site.take_in_changes()
                    at_rest(streamer)
        self.at = "end"
        bigkit.remove_hook_from_module(self.parts, recurse=True)
        assert not handles(self.parts)
        for (name, one), two in zip(self.whole.state_dict().items(), self.parts.to(self.device).state_dict().values()):
            assert same(one, two), name

    # -- what users do

    def again(self, rng: random.Random) -> None:
        """Spread it, perhaps from another way of being spread."""
        rest = rng.choice(["cpu", "disk", "any"])
        places = {name: rest if rest != "any" else rng.choice([0, "cpu", "disk"]) for name in self.names}
        self.places = {"": 0, **places}
        size = max(sum(p.nbytes for p in self.whole.get_submodule(name).parameters()) for name in self.names)
        away = [place for place in places.values() if place != 0]
        experts, per_token = self.case.sizes["num_experts"], self.case.sizes["num_experts_per_tok"]
        rows = rng.choice([0, 0, rng.randint(per_token, experts)]) if away else 0
        self.options = {
            "slots": rng.randint(1, 3), "prefetch": rng.random() < 0.8, "ram_cache": rng.choice([0, size // 2, 10**9]),
            "expert_cache": -(-size * rows // experts) * len(away),
        }  # fmt: skip
        bigkit.dispatch_model(
            self.parts, self.places, offload_dir=self.folder / f"rest{rng.random()}", stand_in=self.stand_in,
            **self.options,
        )  # fmt: skip
        for streamer in streamers_in(self.parts) if self.case.pretends and not self.gpu else ():
            for part in (part for unit in streamer.units for part in unit.parts() if part.slab is not None):
                part.slab.pinned, part.slab._release = True, lambda: None
        self.token(rng)

    def forward(self, rng: random.Random, rows: int, tokens: int) -> None:
        ids = torch.tensor([[rng.randrange(WORDS) for _ in range(tokens)] for _ in range(rows)], device=self.device)
        expected, found = (model(ids).logits for model in (self.whole, self.parts))
        assert torch.equal(expected, found), f"{rows} x {tokens}: {(expected - found).abs().max()}"

    def token(self, rng: random.Random) -> None:
        for _ in range(rng.randint(1, 4)):
            self.forward(rng, 1, 1)

    def few(self, rng: random.Random) -> None:
        self.forward(rng, rng.randint(1, 3), rng.randint(1, 2))

    def prompt(self, rng: random.Random) -> None:
        self.forward(rng, rng.randint(1, 2), rng.randint(5, 40))

    def generate(self, rng: random.Random) -> None:
        rows, tokens = rng.choice([1, 1, 3]), rng.randint(1, 9)
        ids = torch.randint(1, WORDS, (rows, tokens), generator=torch.Generator().manual_seed(rng.randrange(99)))
        with torch.inference_mode() if rng.random() < 0.3 else nullcontext():
            one, two = (m.generate(ids.to(self.device), max_new_tokens=6, **GREEDY) for m in (self.whole, self.parts))
        assert torch.equal(one, two)

    def graphs(self, rng: random.Random) -> None:
        """One CUDA graph a token, where there can be one."""
        resident = not any(place == "disk" for place in self.places.values())
        if not (self.gpu and resident and self.case.implementation != "eager" and not self.case.quantization):
            return self.generate(rng)
        ids = torch.randint(1, WORDS, (1, rng.randint(1, 9)), device=self.device)
        try:
            with bigkit.graph_decode(self.parts):
                found = [self.parts.generate(ids, max_new_tokens=8, **GREEDY) for _ in range(2)]
        except ValueError as error:
            assert "generate outside of bigkit.graph_decode" in str(error) and self.options["expert_cache"]
            return self.generate(rng)
        static = {"cache_implementation": "static", "disable_compile": True}
        expected = self.whole.generate(ids, max_new_tokens=8, **GREEDY, **static)
        assert all(torch.equal(one, expected) for one in found)
        self.token(rng)

    def write(self, rng: random.Random) -> None:
        """Change experts where they rest."""
        name, factor, kind = rng.choice(self.names), rng.choice([-1.0, 0.5]), rng.randrange(3)
        own = rng.choice([own for own, p in self.whole.get_submodule(name).named_parameters() if p.ndim == 3] or [""])
        if self.case.quantization or not own:
            return self.token(rng)
        for model in (self.whole, self.parts):
            module = model.get_submodule(name)
            if kind == 0:
                module._parameters[own].mul_(factor)
            elif kind == 1:
                module._parameters[own][0] = 0.25
            else:
                value = getattr(self.whole.get_submodule(name), own).detach().clone() * (
                    1 if model is self.parts else factor
                )
                setattr(module, own, nn.Parameter(value, requires_grad=False))
        self.token(rng)
        self.few(rng)

    def keep(self, rng: random.Random) -> None:
        """Keep a view of what a forward is lent; it stays what it was."""
        module = self.parts.get_submodule(rng.choice(self.names))
        if self.case.quantization or not hasattr(module, "act_fn"):
            return self.few(rng)
        kept: list[Any] = []
        handle = module.act_fn.register_forward_hook(lambda *_: kept.append(module.down_proj))
        self.forward(rng, 1, rng.choice([1, 1, 2, 20]))
        handle.remove()
        tensors = [tensor for tensor in kept if isinstance(tensor, Tensor)]
        before = [tensor.clone() for tensor in tensors]
        self.token(rng)
        self.prompt(rng)
        assert all(same(one, two) for one, two in zip(before, tensors))

    def stop(self, rng: random.Random) -> None:
        """An error in the middle of experts, or after some of them."""
        module = self.parts.get_submodule(rng.choice(self.names))
        within = getattr(module, "act_fn", None)

        def stop(*_: Any) -> None:
            raise Stop

        handle = (within if within is not None and rng.random() < 0.6 else module).register_forward_hook(stop)
        try:
            self.forward(rng, 1, rng.choice([1, 1, 2, 20]))
        except Stop:
            pass
        else:
            raise AssertionError("nothing was raised")
        finally:
            handle.remove()
        self.token(rng)
        self.prompt(rng)

    def state(self, rng: random.Random) -> None:
        """All weights, wherever they rest."""
        if not self.case.quantization:
            for (name, one), two in zip(self.whole.state_dict().items(), self.parts.state_dict().values()):
                assert same(one, two.to(one.device)), name


def at_rest(streamer: Any) -> None:
    """Every weight is away, nothing is lent, and each slot has the experts that it is said to have."""
    assert not streamer.held() and not streamer._loans and not any(slot.lent for slot in streamer.slots)
    for entry in (entry for site in streamer.sites for entry in site.entries):
        assert isinstance(entry.tensors[entry.own], Away), entry.weight.name
    assert {slot.unit.index: slot for slot in streamer.slots if slot.unit is not None} == streamer.holder
    for index, slot in streamer.holder.items():
        rows = sorted(streamer.filled[index]) if index in streamer.filled else slice(None)
        for weight in streamer.units[index].weights:
            assert same(weight.over(slot.base).cpu()[rows], weight.load().cpu()[rows]), weight.name


def same(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors have the same bits; what is not a number is equal to itself."""
    return torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8))


STEPS = {
    name: getattr(Play, name)
    for name in ("again", "token", "few", "prompt", "generate", "graphs", "write", "keep", "stop", "state")
}
