"""What the routers of a mixture of experts choose, token by token, while a model reads or writes.

Transformers calls the experts of a layer with the numbers of those that its router has chosen. A hook notes these; the
model computes what it always does, wherever its weights lie. What follows from a routing, and how it is kept in a file,
is `machine/routing.py`.

Leaves out: several sequences at once, and experts that are modules of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..machine.routing import Routing
from ..offload.choice import choice_of
from ..offload.rows import count_rows
from .record import work_of


def record_routing(
    model: nn.Module, run: Callable[[], Any], name: str = "", decode: Callable[[int], str] | None = None
) -> Routing:
    """Run a model and note which experts are chosen for each token.

    A text that is read in one call gives the same routing as one that is written token by token.

    Args:
        model: a mixture of experts of Transformers, with memory, whole or spread out.
        run: what to do with it, for instance `lambda: model.generate(ids)`: one sequence.
        name: the model's name; its class's if empty.
        decode: a token's id as text, for the routing's `text`.

    Raises:
        ValueError: the model has no experts, or layers with different numbers of them; it was not called, or with more
            than one sequence.

    >>> import torch
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32, "num_hidden_layers": 2}
    >>> heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    >>> model = MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()
    >>> record_routing(model, lambda: model(torch.arange(6)[None]), decode=chr)
    Routing(MixtralForCausalLM: 6 tokens, 2 layers, 2 of 8 experts)
    """
    layers = [module for module in model.modules() if count_rows(module)]
    counts = {count_rows(module) for module in layers}
    kind = type(model).__name__
    if len(counts) != 1:
        found = f"layers of {' and '.join(map(str, sorted(counts)))} experts" if counts else "no experts"
        raise ValueError(
            f"{kind} has {found}: expected layers with the same number of experts, as Transformers has them"
        )
    chosen: list[list[Tensor]] = [[] for _ in layers]
    ids: list[Tensor] = []

    def called(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = work_of(args, kwargs)[1]
        if batch != 1:
            raise ValueError(f"{kind} is called with {batch} sequences: record the routing of one at a time")
        ids.extend(value for value in (kwargs.get("input_ids"), *args[:1]) if isinstance(value, Tensor))

    def choose(number: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (choice := choice_of((*args, *kwargs.values()))) is not None:
            chosen[number].append(choice.detach().clone())

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(called, with_kwargs=True).remove)
        for number, module in enumerate(layers):
            hook = module.register_forward_pre_hook(partial(choose, number), with_kwargs=True)
            stack.callback(hook.remove)
        run()
    if not all(chosen):
        raise ValueError(f"the experts of {kind} were not called while it was recorded: let run call the model")
    numbers = tuple(tuple(tuple(row) for choice in layer for row in choice.tolist()) for layer in chosen)
    text = tuple(decode(token) for part in ids for token in part.flatten().tolist()) if decode is not None else ()
    return Routing(name or kind, counts.pop(), numbers, text)
