"""Train the mixture of experts that ships with bigkit, on the text that `train_gpt.py` trains on.

    python scripts/train_moe.py --out build/pymoe --minutes 8.5

The model is Transformers' own `Qwen3MoeForCausalLM`: in each block a router chooses, for each byte, 2 of 16 experts.
To the loss comes Transformers' load balancing, without which a router forgets most of its experts. Text, optimizer,
schedule and the choice of the weights to keep are `train_gpt.py`'s.

Writes to --out: what `save_pretrained` writes (config.json, the bfloat16 shards and their index), whenever the
validation loss is the best so far; at the end training.json, with figures, samples, and how often each expert was
chosen on the held-out text, and routing.json, which experts were chosen for each of its first bytes.
Leaves out: what train_gpt.py leaves out.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from train_gpt import PROMPTS, arguments, corpus, train, write_report
from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from bigkit.machine.routing import Routing
from bigkit.measure.routing import record_routing
from bigkit.zoo.gpt import SEPARATOR, decode, encode, heldout_text, perplexity

RECORDED = 512  # bytes whose routing is kept one by one


def drop(share: float, module: nn.Module, args: tuple, out: Any) -> Any:
    """A forward hook: what `module` adds to the hidden state, with a random share of it zeroed in training."""
    if isinstance(out, tuple):
        return (F.dropout(out[0], share, module.training), *out[1:])
    return F.dropout(out, share, module.training)


class LanguageModel(nn.Module):
    """A model of Transformers with `GPT`'s manner: (logits, loss) for ids and targets.

    In training the loss holds the load balancing; in eval mode it is the cross-entropy alone.
    """

    def __init__(self, model: Qwen3MoeForCausalLM, dropout: float = 0.0) -> None:
        super().__init__()
        self.model = model
        for block in model.model.layers:  # Qwen3-MoE itself drops attention weights only
            for part in (block.self_attn, block.mlp):
                part.register_forward_hook(partial(drop, dropout))
        self.block_size = int(model.config.max_position_embeddings)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits (batch, tokens, vocab_size) and the loss in nats, or None without targets."""
        weights = dict(self.model.named_parameters())
        if torch.is_autocast_enabled(ids.device.type):  # which the grouped matrix products of experts do not heed
            weights = {name: weight.bfloat16() for name, weight in weights.items()}
        options = {"input_ids": ids, "use_cache": False, "output_router_logits": self.training}
        out = torch.func.functional_call(self.model, weights, (), options)
        if targets is None:
            return out.logits, None
        loss = F.cross_entropy(out.logits.flatten(0, 1).float(), targets.flatten())
        if self.training:
            loss = loss + self.model.router_aux_loss_coef * out.aux_loss
        return out.logits, loss


def config_from(args: argparse.Namespace) -> Qwen3MoeConfig:
    """Qwen3-MoE for bytes: queries, keys and values with as many heads, untied embeddings."""
    return Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        head_dim=args.hidden_size // args.heads,
        moe_intermediate_size=args.expert_size,
        num_experts=args.experts,
        num_experts_per_tok=args.chosen,
        norm_topk_prob=True,
        router_aux_loss_coef=args.balance,
        max_position_embeddings=args.block_size,
        attention_dropout=args.dropout,
        tie_word_embeddings=False,
        bos_token_id=SEPARATOR,
        eos_token_id=SEPARATOR,
        pad_token_id=None,
    )


def save(model: nn.Module, folder: Path, shards: int) -> None:
    """Write the model of a `LanguageModel` in bfloat16 as Transformers does, in about `shards` files."""
    assert isinstance(model, LanguageModel)
    plain = Qwen3MoeForCausalLM._from_config(model.model.config, dtype=torch.bfloat16)
    plain.load_state_dict(model.model.state_dict())
    plain.generation_config = GenerationConfig(bos_token_id=SEPARATOR, eos_token_id=SEPARATOR)
    size = sum(parameter.nbytes for parameter in plain.parameters())
    plain.save_pretrained(folder, max_shard_size=f"{math.ceil(size / shards * 1.02 / 1000)}KB")
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors makes it private, and it is to be packaged


def samples(model: Qwen3MoeForCausalLM, seed: int, tokens: int) -> list[dict[str, str]]:
    """What the model makes of each prompt, greedily and drawn at temperature 0.8."""
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([[SEPARATOR, *encode(prompt)]], device=model.device)
        room = min(tokens, int(model.config.max_position_embeddings) - ids.shape[1])
        torch.manual_seed(seed)
        drawn = model.generate(ids, max_new_tokens=room, do_sample=True, temperature=0.8, top_k=50, eos_token_id=None)
        greedy = model.generate(ids, max_new_tokens=room, do_sample=False, eos_token_id=None)
        texts.append({"prompt": prompt, "greedy": decode(greedy[0, 1:]), "drawn": decode(drawn[0, 1:])})
    return texts


@torch.no_grad()
def routing(model: Qwen3MoeForCausalLM, text: str) -> Routing:
    """What the routers choose for each byte of a text, which is read in parts as long as the model can attend to."""
    parts = torch.tensor(encode(text), device=model.device).split(int(model.config.max_position_embeddings))
    return record_routing(model, lambda: [model(part[None]) for part in parts], "pymoe", lambda byte: decode([byte]))


def main() -> None:
    """Train, save, and report the figures of the saved files."""
    parser = arguments(__doc__.splitlines()[0])
    parser.set_defaults(batch=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--expert_size", type=int, default=128, help="width inside an expert")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--chosen", type=int, default=2, help="experts for each byte")
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the load balancing in the loss")
    parser.add_argument("--block_size", type=int, default=512)
    parser.add_argument("--dropout", type=float, default=0.1, help="in the attention and of what a block adds")
    parser.add_argument("--shards", type=int, default=4)
    args = parser.parse_args()

    train_bytes, validation, _ = corpus(args.stdlib, args.test_share, args.seed)
    torch.manual_seed(args.seed)
    model = LanguageModel(Qwen3MoeForCausalLM(config_from(args)), args.dropout)
    parameters = sum(p.numel() for p in model.parameters())
    lengths = {"train": len(train_bytes), "validation": len(validation), "held_out": len(heldout_text().encode())}
    print(f"{parameters:,} parameters, {parameters * 2:,} bytes; text: {lengths}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)

    average, figures = train(args, model, train_bytes, validation, lambda best: save(best, args.out, args.shards))
    save(average, args.out, args.shards)
    report(args, parameters, lengths, figures)


def report(args: argparse.Namespace, parameters: int, lengths: dict[str, int], figures: dict[str, Any]) -> None:
    """Measure the saved files and write training.json."""
    saved = Qwen3MoeForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(args.device).eval()
    figures["bits_per_byte"]["held_out"] = round(math.log2(perplexity(saved, heldout_text(), args.block_size)), 4)
    found = routing(saved, heldout_text())
    total = found.tokens * found.per_token
    figures["routing"] = [[round(count / total, 4) for count in layer] for layer in found.counts]
    few = tuple(layer[:RECORDED] for layer in found.chosen)
    replace(found, chosen=few, text=found.text[:RECORDED]).save(args.out / "routing.json")
    figures["samples"] = samples(saved, args.seed, args.sample_tokens)
    write_report(args, parameters, lengths, figures)


if __name__ == "__main__":
    main()
