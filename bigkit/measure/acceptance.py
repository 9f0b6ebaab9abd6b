"""How often a draft guesses what a model says: the acceptance on which the gain of speculation depends.

Both read the same text once. At each place the model's likeliest next token is what greedy decoding would write there;
the draft's guess is right if its likeliest is the same. No text is generated, so that a page costs one pass of each.

Leaves out: drawn text, where a guess may also be accepted by chance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def acceptance(model: nn.Module, draft: nn.Module, tokens: Tensor, window: int = 512) -> float:
    """The share of tokens that a draft guesses as a model would write them.

    Args:
        model, draft: they give logits for ids, as models of Transformers do, or a tuple that begins with them.
        tokens: a text of the kind that is to be written, shape (1, tokens) or (tokens,).
        window: tokens read at a time.

    Returns:
        0 to 1; `advise(..., acceptance=...)` takes it.

    Raises:
        ValueError: there are less than two tokens, or the two do not know the same tokens.

    >>> from bigkit.zoo.gpt import encode, load_pygpt
    >>> acceptance(load_pygpt(), load_pygpt(), torch.tensor(encode("def area(width, height):")))
    1.0
    """
    row = tokens.flatten()
    if len(row) < 2:
        raise ValueError(f"acceptance needs a text of at least two tokens, and got {len(row)}")
    same = 0
    for part in row.split(window):
        logits = [_logits(one(part[None].to(next(one.parameters()).device))) for one in (model, draft)]
        if logits[0].shape[-1] != logits[1].shape[-1]:
            raise ValueError(
                f"the model knows {logits[0].shape[-1]} tokens and the draft {logits[1].shape[-1]}: a draft must have "
                "the same tokens"
            )
        mine, guessed = (one[0].argmax(-1).cpu() for one in logits)
        same += int((mine == guessed).sum())
    return same / len(row)


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    return output[0] if logits is None else logits
