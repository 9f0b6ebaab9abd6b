"""Several tokens a pass: a small model, the draft, guesses some tokens, and the model checks them all in one pass.

A pass over a few tokens reads the same weights as a pass over one. Where they come over a link, that is nearly all it
takes; so speculation pays most where a model does not fit. The text is that of the model alone: a guess counts only as
far as the model would have said the same.

    tokens of a pass    (1 - a^(k + 1)) / (1 - a): k guesses, each accepted with probability a, and the model's own
    seconds of a pass   the model's for k + 1 tokens, and k times the draft's for one

Of experts, more tokens choose more, and these travel: the seconds of the model's pass grow with k.

Leaves out: guesses from the prompt itself (`prompt_lookup_num_tokens` of Transformers), which need no draft.

Source: Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding" (2023), equation 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..devices import Device, device_label
from ..model.spec import ModelSpec
from ..units import format_bytes, parse_bytes, three_figures
from .strategies import place

ACCEPTANCE = 0.7  # of a guess, where none was measured: Leviathan et al., table 2, has 0.5 to 0.9 for text
MOST = 16  # tokens guessed at a time, at most


@dataclass(frozen=True)
class Speculation:
    """What a draft brings.

    Args:
        draft: its name.
        acceptance: probability that a guessed token is accepted.
        guesses: tokens guessed for each pass, as many as are best.
        tokens: expected tokens of a pass.
        seconds: expected seconds of a token.
    """

    draft: str
    acceptance: float
    guesses: int
    tokens: float
    seconds: float

    @property
    def text(self) -> str:
        """In words: "12.3 tokens/s, 3.4 a pass of 6"; or that it does not pay."""
        if not self.guesses:
            return "does not pay"
        return f"{three_figures(1 / self.seconds)} tokens/s, {self.tokens:.1f} a pass of {self.guesses + 1}"


def expected_tokens(acceptance: float, guesses: int) -> float:
    """Tokens that a pass yields on average.

    Args:
        acceptance: probability that a guess is accepted, 0 to 1.
        guesses: how many there are.

    Raises:
        ValueError: the acceptance is no probability.

    >>> expected_tokens(0.5, 1), round(expected_tokens(0.8, 4), 2), expected_tokens(1, 4)
    (1.5, 3.36, 5.0)
    """
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance is {acceptance}: expected the share of guesses that are accepted, from 0 to 1")
    return float(sum(acceptance**i for i in range(guesses + 1)))


def best_guesses(
    acceptance: float, one: float, seconds: Callable[[int], float], draft: float, name: str = "draft"
) -> Speculation:
    """How many tokens to guess at a time.

    Args:
        acceptance: probability that a guess is accepted.
        one: seconds of a token without a draft.
        seconds: tokens -> seconds of a pass of the model over so many.
        draft: seconds of the draft's pass over one.
        name: the draft's.

    Returns:
        The fastest; 0 guesses where none pays.

    >>> best_guesses(0.8, 0.25, lambda tokens: 0.25, 0.005).text
    '15.3 tokens/s, 4.7 a pass of 12'
    """
    ways = [Speculation(name, acceptance, 0, 1.0, one)]
    for guesses in range(1, MOST + 1):
        tokens = expected_tokens(acceptance, guesses)
        ways.append(Speculation(name, acceptance, guesses, tokens, (seconds(guesses + 1) + guesses * draft) / tokens))
    return min(ways, key=lambda way: way.seconds)


def draft_bytes(draft: ModelSpec, dtype: object, batch: int, context: int) -> int:
    """What a draft takes of the device that it works on: weights, KV cache and activations."""
    return place(draft, {0: 2**60}, dtype=dtype, batch=batch, context=context).shares[0].used


def keep_room(max_memory: Mapping[Device, int | str], nbytes: int, name: str) -> tuple[dict[Device, int | str], str]:
    """Budgets with room for a draft on the first device, and a sentence that says so.

    >>> keep_room({0: "10GiB", "cpu": "64GiB"}, 2**30, "small")
    ({0: 9663676416, 'cpu': '64GiB'}, '1.00 GiB of GPU 0 stays free for the draft small.')
    """
    first = next(iter(max_memory))
    left = max(0, parse_bytes(max_memory[first]) - nbytes)
    where = device_label(first)
    return {**max_memory, first: left}, f"{format_bytes(nbytes)} of {where} stays free for the draft {name}."


def warning(model: ModelSpec, picked: Callable[[int], float], guesses: int) -> str | None:
    """What must be said of a draft for a mixture of experts; None for other models."""
    if not model.facts.get("num_experts"):
        return None
    one, several = (100 * picked(tokens) for tokens in (1, guesses + 1))
    return (
        f"{model.name} is a mixture of experts: a pass over {guesses + 1} tokens picks {several:.0f} % of the experts "
        f"where one token picks {one:.0f} %, so checking guesses costs more here."
    )
