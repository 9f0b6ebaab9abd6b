"""Random modules, made from a recipe that prints as a few lines of Python and builds the same module each time.

A recipe is a nested tuple: the name of a part, then the recipes of what is in it. Every part maps (2, 3, WIDTH) to the
same shape, so that they stand in any order:

    >>> build(("chain", ("linear",), ("residual", ("mlp",))), seed=0)(torch.zeros(2, 3, WIDTH)).shape
    torch.Size([2, 3, 8])

Each part is there because models are written so: ties, buffers, parametrizations, containers that are walked instead of
called, methods other than forward, weights that are read from outside, returned or edited, arguments of every form.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

WIDTH = 8
Recipe = tuple[Any, ...]


class Stop(Exception):
    """What a forward raises that is told to."""


class Linear(nn.Linear):
    """A linear layer that is no plain one."""


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Attention(nn.Module):
    """`nn.MultiheadAttention` reads the weight of its own `out_proj`."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Encoder(nn.TransformerEncoderLayer):
    """Has a fast path in eval mode without gradients."""

    def __init__(self) -> None:
        super().__init__(WIDTH, 2, WIDTH, dropout=0.0, batch_first=True)


class Recurrent(nn.Module):
    def __init__(self, cls: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = cls(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Norm(nn.Module):
    """Statistics that training moves, in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, 1)).reshape(x.shape)


class Own(nn.Module):
    """Parameters and buffers of its own, one of them in no state dict, around another part."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.list = nn.ParameterList([torch.randn(WIDTH), torch.randn(WIDTH)])
        self.register_buffer("offset", torch.randn(WIDTH))
        self.register_buffer("table", torch.randn(3, WIDTH), persistent=False)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x + self.table[: x.shape[1]]) * self.scale
        return sum(self.list, x) + self.offset


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


class Chosen(nn.Module):
    """Parts that the data choose, in an order of their own."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, len(inner)), nn.ModuleList(inner)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).mean((0, 1)).argsort().tolist()
        for i in chosen[: max(1, len(chosen) - 1)]:
            x = x + self.experts[i](x)
        return x


class Walked(nn.Module):
    """A Sequential whose layers are called one by one, and a part of which is called too."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.layers[:1](x)


class Named(nn.Module):
    """A dict of parts, run backwards."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({f"p{i}": part for i, part in enumerate(inner)})

    def forward(self, x: Tensor) -> Tensor:
        for name in reversed([*self.parts]):
            x = self.parts[name](x)
        return x


class Method(nn.Module):
    """Another method than forward does the work."""

    class Worker(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(WIDTH, WIDTH), inner

        def encode(self, x: Tensor) -> Tensor:
            return self.inner(torch.tanh(self.first(x)))

        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("nobody calls this")

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.worker = self.Worker(inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.worker.encode(x)


class Pair(NamedTuple):
    first: Tensor
    second: dict[str, Tensor]


@dataclasses.dataclass
class Record:
    hidden: Tensor
    extra: list[Tensor]


class Forms(nn.Module):
    """Inputs and outputs of every form: keyword-only, dicts, named tuples, dataclasses."""

    class Inside(nn.Module):
        def __init__(self, inner: nn.Module, form: str) -> None:
            super().__init__()
            self.inner, self.form, self.mix = inner, form, nn.Linear(WIDTH, WIDTH)

        def forward(self, *args: Any, data: Any = None, **kwargs: Any) -> Any:
            x = data["x"][0] if self.form == "dict" else data.hidden if self.form == "record" else kwargs["hidden"]
            y = self.mix(self.inner(x))
            return {"dict": {"y": (y, None)}, "record": Record(y, [x]), "keyword": Pair(y, {"x": x})}[self.form]

    def __init__(self, inner: nn.Module, form: str) -> None:
        super().__init__()
        self.inside = self.Inside(inner, form)

    def forward(self, x: Tensor) -> Tensor:
        form = self.inside.form
        if form == "dict":
            return self.inside(data={"x": [x], "n": 3})["y"][0]
        if form == "record":
            result = self.inside(data=Record(x, []))
            return result.hidden + result.extra[0]
        pair = self.inside(hidden=x)
        return pair.first - pair.second["x"]


class Views(nn.Module):
    """Returns its weight and views of it, and keeps one."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.kept = nn.Parameter(torch.randn(4, WIDTH)), []

        def forward(self, n: int) -> tuple[Tensor, Tensor]:
            self.kept = [self.weight.detach()[0]]
            return self.weight[:n], self.weight

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.table, self.inner = self.Table(), inner

    def forward(self, x: Tensor) -> Tensor:
        rows, weight = self.table(3)
        return self.inner(x + rows) * weight[3] + self.table.kept[0].to(x.device)


class Edits(nn.Module):
    """Counts its calls in a buffer, and writes into its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.calls += 1
            self.linear.weight.mul_(0.9)
            self.linear.bias.data.add_(0.1)
        return self.linear(x) + self.calls


class Reads(nn.Module):
    """Reads the weight of a layer that is not called, and what the user has noted at it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.linear, self.inner = nn.Linear(WIDTH, WIDTH), inner
        self.note(0.5)

    def note(self, factor: float) -> None:
        self.linear.weight.factor, self.linear.weight.named = torch.full((), factor), {"twice": 2}

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear.weight
        return F.linear(self.inner(x), weight, self.linear.bias) * weight.factor.to(x.device) * weight.named["twice"]


class Stops(nn.Module):
    """Raises where the user's flag says so; the flag is no tensor, and not in the state."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.last, self.stop = inner, nn.Linear(WIDTH, WIDTH), False

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        if self.stop:
            raise Stop
        return self.last(x)


class Shared(nn.Module):
    """One part in two places, and a weight that two layers share."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(inner), nn.Sequential(nn.Linear(WIDTH, WIDTH), inner)
        self.head = nn.Linear(WIDTH, WIDTH)
        self.head.weight = self.second[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


class Root(nn.Module):
    """A table that is tied to the head, and what lies between."""

    def __init__(self, *inner: nn.Module, tied: bool = True) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(11, WIDTH), nn.ModuleList(inner), nn.Linear(WIDTH, 11)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.embed(ids) * scale
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(x), "hidden": x}


LEAVES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "subclass": lambda: Linear(WIDTH, WIDTH),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "batch": Norm,
    "mlp": MLP,
    "attention": Attention,
    "encoder": Encoder,
    "gru": lambda: Recurrent(nn.GRU),
    "lstm": lambda: Recurrent(nn.LSTM),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "edits": Edits,
}
AROUND_ONE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "residual": Residual,
    "own": Own,
    "method": Method,
    "dict": lambda inner: Forms(inner, "dict"),
    "record": lambda inner: Forms(inner, "record"),
    "keyword": lambda inner: Forms(inner, "keyword"),
    "views": Views,
    "reads": Reads,
    "stops": Stops,
    "shared": Shared,
}
AROUND_SEVERAL: dict[str, Callable[..., nn.Module]] = {
    "chain": nn.Sequential,
    "walked": Walked,
    "named": Named,
    "chosen": Chosen,
}
ROOTS = {"tied": Root, "untied": lambda *inner: Root(*inner, tied=False)}


def random_recipe(rng: random.Random, depth: int = 3) -> Recipe:
    """A recipe of a part with at most `depth` parts inside each other."""
    kind = rng.random()
    if depth == 0 or kind < 0.35:
        return (rng.choice([*LEAVES]),)
    if kind < 0.75:
        return rng.choice([*AROUND_ONE]), random_recipe(rng, depth - 1)
    inner = (random_recipe(rng, depth - 1) for _ in range(rng.randint(1, 3)))
    return rng.choice([*AROUND_SEVERAL]), *inner


def random_root(rng: random.Random) -> Recipe:
    """A recipe of a model."""
    return rng.choice([*ROOTS]), *(random_recipe(rng) for _ in range(rng.randint(1, 4)))


def build(recipe: Recipe, seed: int) -> nn.Module:
    """The module of a recipe, with weights from a seed."""
    torch.manual_seed(seed)
    return _build(recipe)


def _build(recipe: Recipe) -> nn.Module:
    name, *inner = recipe
    if name in LEAVES:
        return LEAVES[name]()
    return {**AROUND_ONE, **AROUND_SEVERAL, **ROOTS}[name](*map(_build, inner))
