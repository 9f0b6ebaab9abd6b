"""Several tokens a pass for the GPT that ships: something guesses, the model checks all guesses in one pass.

The same words as in Transformers: `generate(assistant_model=draft)` lets a small GPT guess, and
`generate(prompt_lookup_num_tokens=5)` takes what followed the last words where they stood before. The text is that of
greedy decoding without guesses, because a guess counts only if the model's own choice is the same.

Leaves out: drawn text (Leviathan et al. (2023) show how), several prompts at once, and texts beyond block_size, where
the window slides and each token is a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .gpt import GPT
    from .kv_cache import KVCache

GUESSES = 5  # of a draft for each pass
NGRAM = 3  # tokens that must stand in the text before for a lookup, at most

Guess = Callable[[Tensor, int], Tensor]  # (text, shape (1, tokens); most) -> guessed tokens, shape (1, any)


class Draft:
    """Guesses with a small model.

    Args:
        model: it has the same tokens as the large one.
    """

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.cache: KVCache | None = None

    def __call__(self, idx: Tensor, most: int) -> Tensor:
        text = idx
        most = min(most, self.model.block_size - idx.shape[1])
        self.cache = self.cache or self.model.new_cache()
        self.cache.crop(idx.shape[1] - 1)  # guesses of last time that were not accepted
        for _ in range(most):
            logits = self.model(text[:, self.cache.length :], cache=self.cache)[0]
            text = torch.cat([text, logits[:, -1].argmax(-1, keepdim=True).to(text.device)], 1)
        return text[:, idx.shape[1] :]


def look_up(idx: Tensor, most: int) -> Tensor:
    """What followed the last tokens where they stood the last time before.

    >>> look_up(torch.tensor([[1, 2, 3, 4, 5, 1, 2, 3]]), 2)
    tensor([[4, 5]])
    """
    tokens = idx[0].tolist()
    for size in range(min(NGRAM, len(tokens) - 1), 0, -1):
        last = tokens[-size:]
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == last:
                return idx[:, start + size : start + size + most]
    return idx[:, :0]


def continue_checked(model: GPT, idx: Tensor, end: int, guess: Guess, most: int) -> Tensor:
    """Greedy text with guesses.

    Args:
        model: the one whose text it is.
        idx: the prompt, shape (1, tokens).
        end: tokens of prompt and text together, at most block_size; a longer prompt comes back as it is.
        guess: who guesses.
        most: tokens guessed for a pass.

    Returns:
        Prompt and continuation, shape (1, end).
    """
    cache = model.new_cache()
    while idx.shape[1] < end:
        guessed = guess(idx, min(most, end - idx.shape[1] - 1)).to(idx.device)
        text = torch.cat([idx, guessed], 1)
        logits = model(text[:, cache.length :], cache=cache)[0][:, -guessed.shape[1] - 1 :]
        own = logits.argmax(-1).to(idx.device)  # the model's choice after the text, and after each guess
        right = int((own[:, :-1] == guessed).cumprod(1).sum())
        idx = torch.cat([idx, own[:, : right + 1]], 1)
        cache.crop(idx.shape[1] - 1)
    return idx
