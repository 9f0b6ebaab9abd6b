"""A small GPT, and the trained one that ships with bigkit.

`GPT` is GPT-2's architecture with the public parameter names of Karpathy's minGPT (`transformer.h.0.attn.c_attn`, an
untied `lm_head`, `nn.Linear` everywhere), so checkpoints in that layout load. No module reads another module's weight,
and every tensor is moved to where its partner is: the model works on meta, and with its blocks on different devices.
`load_pygpt` gives a byte-level GPT that was trained on the Python standard library's source
(`scripts/train_gpt.py`); `perplexity` measures it on text that it has never seen.

Leaves out: training (that script), splitting and offloading (`bigkit.offload.dispatch`), and any tokenizer beyond
bytes.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.3.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..meta.empty import init_empty_weights
from .guesses import GUESSES, Draft, continue_checked, look_up
from .kv_cache import KVCache, LayerCache

PYGPT, PYMOE, PYDRAFT = (Path(__file__).parent / name for name in ("pygpt", "pymoe", "pydraft"))  # they ship
SEPARATOR = 0  # the byte between two files in the training text; a prompt that starts with it starts a new file

_GPT2 = {"vocab_size": 50257, "block_size": 1024}
PRESETS: dict[str, dict[str, int]] = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, **_GPT2},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024, **_GPT2},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280, **_GPT2},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600, **_GPT2},
    "pygpt": {"n_layer": 10, "n_head": 8, "n_embd": 256, "vocab_size": 256, "block_size": 512},
}


# ---------------------------------------------------------------------------------------------------------------------
# The architecture


@dataclass
class GPTConfig:
    """The sizes of a GPT: a preset, numbers of your own, or a preset with some numbers changed.

    Args:
        model_type: one of `PRESETS`, or None.
        n_layer, n_head, n_embd: blocks, attention heads a block, width; 0 takes the preset's.
        vocab_size, block_size: tokens known, tokens attended to at most; 0 takes the preset's.
        embd_pdrop, resid_pdrop, attn_pdrop: dropout after the embeddings, on the residual branches, in the attention.

    >>> GPTConfig("gpt2-xl", n_layer=2).resolved().n_embd
    1600
    """

    model_type: str | None = None
    n_layer: int = 0
    n_head: int = 0
    n_embd: int = 0
    vocab_size: int = 0
    block_size: int = 0
    embd_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    attn_pdrop: float = 0.1

    def resolved(self) -> GPTConfig:
        """The same config with each size filled in from the preset.

        Raises:
            ValueError: the preset is unknown, a size is missing, or n_head does not divide n_embd.
        """
        if self.model_type is not None and self.model_type not in PRESETS:
            raise ValueError(f"unknown model_type {self.model_type!r}: expected None or one of {', '.join(PRESETS)}")
        preset = PRESETS[self.model_type] if self.model_type else dict.fromkeys(_GPT2 | PRESETS["gpt2"], 0)
        sizes: dict[str, Any] = {name: getattr(self, name) or size for name, size in preset.items()}
        config = replace(self, **sizes)
        missing = [name for name in preset if getattr(config, name) < 1]
        if missing:
            raise ValueError(f"GPTConfig lacks {', '.join(missing)}: give each a positive number, or set model_type")
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is no multiple of n_head {config.n_head}: heads share it evenly")
        return config

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds: the sizes, and the few names by which other libraries' readers know them."""
        sizes = asdict(self.resolved())
        del sizes["model_type"]
        layout = {"n_positions": sizes["block_size"], "n_inner": 4 * sizes["n_embd"], "tie_word_embeddings": False}
        return {"architectures": ["GPT"], "model_type": "bigkit-gpt", **sizes, **layout}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GPTConfig:
        """The inverse of `to_dict`; keys that are no size or dropout are skipped."""
        names = {field.name for field in fields(cls)} - {"model_type"}
        return cls(**{name: value for name, value in data.items() if name in names}).resolved()


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each token to itself and the tokens before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.attn_pdrop = config.attn_pdrop
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)
        self.register_load_state_dict_pre_hook(_drop_mask)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """(batch, tokens, n_embd) -> the same shape; with a cache, x holds only the tokens that are not in it yet."""
        batch, tokens, width = x.shape
        heads = (part.view(batch, tokens, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))
        q, k, v = heads  # each (batch, heads, tokens, head size)
        if cache is not None:
            k, v = cache.append(k, v)
        past = k.shape[2] - tokens
        mask = None
        if past and tokens > 1:  # is_causal would align the mask to the first cached token, not to the last
            mask = torch.ones(tokens, past + tokens, dtype=torch.bool, device=x.device).tril(past)
        dropout = self.attn_pdrop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=not past and tokens > 1)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(batch, tokens, width)))


def _drop_mask(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Checkpoints of the older layout store the causal mask as a buffer `attn.bias`; SDPA needs none."""
    state_dict.pop(f"{prefix}bias", None)


class MLP(nn.Module):
    """Two linear layers with a tanh-GELU between them, four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.act = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_embd) -> the same shape."""
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    """Attention, then the MLP, each normalised first and added to what came in."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """(batch, tokens, n_embd) -> the same shape."""
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A decoder-only transformer with learned positions.

    Args:
        config: its sizes; missing ones come from `config.model_type`.

    >>> model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=256, block_size=32)).eval()
    >>> logits, loss = model(torch.tensor([encode("def f(x):")]))
    >>> logits.shape, loss
    (torch.Size([1, 9, 256]), None)
    """

    _no_split_modules = ["Block"]
    _keys_to_ignore_on_load_unexpected = [r"attn\.bias$"]

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config = config.resolved()
        self.block_size = config.block_size
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.embd_pdrop),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self._initialise()

    @staticmethod
    def get_default_config() -> GPTConfig:
        """An unfilled config: set `model_type`, or the sizes one by one."""
        return GPTConfig()

    def _initialise(self) -> None:
        """GPT-2's: normal with deviation 0.02; smaller where 2 * n_layer branches add up in the residual stream."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                branches = 2 * self.config.n_layer if name.endswith("c_proj") else 1
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(branches))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits for each token's successor, and the loss if the successors are given.

        Args:
            idx: token ids, (batch, tokens), int64; with a cache only those that are not in it yet.
            targets: the tokens to predict, of the same shape; -1 leaves a place out of the loss.
            cache: keys and values of earlier tokens; it is extended.

        Returns:
            Logits (batch, tokens, vocab_size), and the mean cross-entropy in nats or None.

        Raises:
            ValueError: more tokens than block_size, those in the cache counted.
        """
        past = cache.length if cache is not None else 0
        end = past + idx.shape[1]
        if end > self.block_size:
            raise ValueError(f"{end} tokens do not fit block_size {self.block_size}: pass the last {self.block_size}")
        tokens = self.transformer["wte"](idx)
        positions = self.transformer["wpe"](torch.arange(past, end, device=idx.device))
        x = self.transformer["drop"](tokens + positions.to(tokens.device))  # the two tables may lie on two devices
        for i, block in enumerate(self.transformer["h"].children()):
            x = block(x, cache.layers[i] if cache is not None else None)
        logits = self.lm_head(self.transformer["ln_f"](x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.to(logits.device).flatten(), ignore_index=-1)

    def new_cache(self) -> KVCache:
        """A cache with room for as many tokens as the model attends to."""
        return KVCache(self.config.n_layer, self.block_size)

    @torch.no_grad()
    def generate(
        self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, do_sample: bool = False,
        top_k: int | None = None, use_cache: bool = True, assistant_model: GPT | None = None,
        prompt_lookup_num_tokens: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Continue each row of `idx` by `max_new_tokens` tokens.

        Positions are learned, so once the text outgrows block_size the window slides and each step is a full forward
        pass: a cache saves time up to there.

        Args:
            idx: the prompts, (batch, tokens), int64, at least one token.
            max_new_tokens: tokens to add.
            temperature: divides the logits before sampling; below 1 sharpens the distribution, above 1 flattens it.
            do_sample: draw from the distribution (torch's random state) instead of taking the likeliest token.
            top_k: draw among the k likeliest tokens only.
            use_cache: keep keys and values instead of computing them again for each token.
            assistant_model: a small GPT that guesses some tokens for this one to check in one pass (`guesses.py`).
            prompt_lookup_num_tokens: guess at most so many from what stands in the text already, without a draft.

        Returns:
            Prompts and continuations, (batch, tokens + max_new_tokens).

        Raises:
            ValueError: an empty prompt or a temperature that is not positive; guesses for drawn text or several rows.
        """
        if idx.shape[1] == 0:
            raise ValueError("generate needs at least one token to continue: start with SEPARATOR (0) for a new file")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, not {temperature}: do_sample=False is greedy decoding")
        end = idx.shape[1] + max_new_tokens
        if assistant_model is not None or prompt_lookup_num_tokens:
            if do_sample or len(idx) > 1:
                raise ValueError("guesses are checked for greedy text of one prompt: leave do_sample and others out")
            guess = Draft(assistant_model) if assistant_model is not None else look_up
            idx = continue_checked(self, idx, min(end, self.block_size), guess, prompt_lookup_num_tokens or GUESSES)
        cache: KVCache | None = None
        for _ in range(end - idx.shape[1]):
            if cache is not None and cache.length < self.block_size:
                context = idx[:, cache.length :]
            else:
                context = idx[:, -self.block_size :]
                cache = self.new_cache() if use_cache else None
            logits = self(context, cache=cache)[0][:, -1] / temperature
            if top_k is not None:
                smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < smallest, -math.inf)
            idx = torch.cat((idx, self.choose(logits, do_sample).to(idx.device)), dim=1)
        return idx

    def choose(self, scores: Tensor, do_sample: bool) -> Tensor:
        """(batch, vocab_size) -> the id of each row's next token, (batch, 1): drawn, or the likeliest."""
        return scores.float().softmax(-1).multinomial(1) if do_sample else scores.argmax(-1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------
# Bytes as tokens


def encode(text: str) -> list[int]:
    """Text as token ids: its UTF-8 bytes.

    >>> encode("π = 3")
    [207, 128, 32, 61, 32, 51]
    """
    return list(text.encode())


def decode(tokens: list[int] | Tensor) -> str:
    """Token ids (a list, or a tensor of one dimension) as text; bytes that are no UTF-8 become U+FFFD.

    >>> decode(encode("π = 3"))
    'π = 3'
    """
    return bytes(tokens.tolist() if isinstance(tokens, Tensor) else tokens).decode(errors="replace")


# ---------------------------------------------------------------------------------------------------------------------
# The model that ships


def load_gpt(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> GPT:
    """A `GPT` from a folder with `config.json`, `model.safetensors.index.json` and its shards, in eval mode.

    The model is built on meta and the files' tensors become its parameters: nothing is initialised or copied twice.

    Args:
        folder: where the files are.
        device: where the weights shall be; on the CPU they are mapped from the files, not read.
        dtype: what to cast them to; None keeps them as stored.

    Raises:
        FileNotFoundError: the folder lacks one of the files.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    for path in (folder / "config.json", index):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: a GPT folder has config.json, an index and its shards")
    with init_empty_weights():  # under `torch.device("meta")` initialisers import the compiler: three seconds
        model = GPT(GPTConfig.from_dict(json.loads((folder / "config.json").read_text())))
    weights: dict[str, Tensor] = {}
    for shard in sorted(set(json.loads(index.read_text())["weight_map"].values())):
        weights |= load_file(folder / shard, device=str(device))
    model.load_state_dict(weights, assign=True)
    return model.to(dtype=dtype).eval()


def load_pygpt(device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> GPT:
    """The GPT that ships with bigkit: 8 million parameters, bytes as tokens, stored in bfloat16 in four shards.

    Args and errors: those of `load_gpt`.

    >>> model = load_pygpt(dtype=torch.float32)  # doctest: +SKIP
    >>> print(decode(model.generate(torch.tensor([encode("import ")]), 40)[0]))  # doctest: +SKIP
    """
    return load_gpt(PYGPT, device, dtype)


def load_pydraft(device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> GPT:
    """A GPT of 1.4 million parameters that guesses what pygpt is about to write: `generate(assistant_model=...)`.

    Args and errors: those of `load_gpt`.
    """
    return load_gpt(PYDRAFT, device, dtype)


def heldout_text() -> str:
    """About 30 KB of Python that `load_pygpt`'s model was not trained on (see `pygpt/README.md` for its licence).

    >>> heldout_text()[3:12]
    'Bisection'
    """
    return (PYGPT / "heldout.txt").read_text(encoding="utf-8")


@torch.no_grad()
def perplexity(
    model: nn.Module, text: str | None = None, block_size: int | None = None, stride: int | None = None
) -> float:
    """Per-byte perplexity of a byte-level model: e to the mean negative log-likelihood of each byte, in nats.

    A window of `block_size` bytes moves over the text by `stride`, and each byte is scored once, in the first window
    that reaches it, with at least `block_size - stride` bytes before it (fewer at the start of the text, which follows
    a `SEPARATOR`). A smaller stride gives more context and a lower, costlier figure.

    Args:
        model: gives (logits, ...) for ids of shape (1, tokens), as `GPT` does; it is put in eval mode meanwhile.
        text: what to score; None takes `heldout_text()`.
        block_size: bytes in a window; None takes the model's.
        stride: bytes between two windows; None takes half the window.

    Returns:
        A number from 1 (certain) upwards; 256 is a blind guess. Its base-2 logarithm is bits per byte.

    Raises:
        ValueError: the text is empty, or stride is not between 1 and block_size.
    """
    tokens = [SEPARATOR, *encode(heldout_text() if text is None else text)]
    block_size = block_size or int(model.block_size)  # type: ignore[arg-type]
    stride = stride or max(1, block_size // 2)
    if len(tokens) < 2:
        raise ValueError("perplexity needs a text of at least one byte, and got an empty one")
    if not 1 <= stride <= block_size:
        raise ValueError(f"stride {stride} leaves bytes out: expected 1 to block_size {block_size}")
    device = next(model.parameters()).device
    ids = torch.tensor(tokens, device="cpu" if device.type == "meta" else device)  # what Accelerate offloads is on meta
    nats, scored, training = 0.0, 0, model.training
    model.eval()
    try:
        for start in range(0, len(ids), stride):
            end = min(start + block_size, len(ids) - 1)
            logits = model(ids[None, start:end])[0]
            targets = ids[start + 1 : end + 1].to(logits.device)
            fresh = end - scored
            nats += F.cross_entropy(logits[0, -fresh:].float(), targets[-fresh:], reduction="sum").item()
            scored = end
            if end == len(ids) - 1:
                break
    finally:
        model.train(training)
    return math.exp(nats / scored)
