"""Mixtures of experts, as layer records: which modules are experts, how large one is, and how many a token takes.

A block of a mixture has many feed-forwards, the experts, and a router that chooses a few of them for each token. All
of them take memory; only the chosen ones are read and, where they rest elsewhere, have to travel. Two forms are known:

    fused      one module whose parameters have the experts as their first dimension: `gate_up_proj` (experts, ...),
               `down_proj` (experts, ...) and their biases, as Transformers holds them
    modules    a ModuleList of equal modules, one for each expert (older code, and code that comes with checkpoints)

Shared experts, which every token visits, are ordinary layers beside them.

Leaves out: where experts are placed (`maps/experts.py`) and how the chosen ones travel (`offload/experts.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..devices import join
from ..units import GiB, MiB, counted, format_bytes, format_count
from .precision import Precision
from .spec import ModelSpec, ModuleSpec

WHOLE = 3 * GiB  # a block's experts that take no more travel to a slot that holds all of them; of more, some at a time
SOME = GiB  # that slot then holds as many as these bytes, and no fewer than a token takes
PIECES, PIECE = 3, 64 * MiB  # beside it: slots through which a prompt's experts pass, and bytes of each


def in_flight(nbytes: int, count: int, per_token: int, slots: int) -> int:
    """Bytes on the device for experts that travel, while one block after another works.

    Args:
        nbytes: bytes of a block's experts.
        count, per_token: how many these are, and how many a token takes.
        slots: blocks that are in flight, where they travel whole.

    >>> in_flight(2 * GiB, 8, 2, 2) // GiB, format_bytes(in_flight(44 * GiB, 256, 8, 2))
    (4, '1.89 GiB')
    """
    if nbytes <= WHOLE:
        return slots * nbytes
    each = math.ceil(nbytes / count)
    return max(SOME, per_token * each) + PIECES * max(PIECE, each)


@dataclass(frozen=True, eq=False)
class Experts:
    """The routed experts of one block.

    Args:
        name: full name of the module that holds them, such as "model.layers.3.mlp.experts".
        count: how many there are.
        per_token: how many a token takes.
        spec: the module.
        shared: full names of the modules beside it that every token takes (shared experts).
    """

    name: str
    count: int
    per_token: int
    spec: ModuleSpec
    shared: tuple[str, ...] = ()

    def bytes(self, precision: Precision = Precision()) -> int:
        """Bytes of all of them at rest."""
        return self.spec.bytes(precision, self.name)

    def bytes_each(self, precision: Precision = Precision()) -> int:
        """Bytes of one of them; rounded up where scales are shared."""
        return math.ceil(self.bytes(precision) / self.count)

    @property
    def fused(self) -> bool:
        """Whether they are rows of the module's own parameters, not modules in it."""
        return all("." not in name for name, *_ in self.spec.named_tensors())

    @property
    def parameters(self) -> int:
        """Number of parameters of all of them."""
        return sum(tensor.elements for _, tensor, _ in self.spec.named_tensors() if not tensor.buffer)


@lru_cache(16)  # a model never changes
def experts_of(model: ModelSpec) -> tuple[Experts, ...]:
    """The experts of each block of a model, in order; empty if it is no mixture of experts.

    Raises:
        ValueError: a token is said to take more experts than any block has.

    >>> from bigkit import zoo
    >>> first = experts_of(zoo.describe("mixtral-8x7b"))[0]
    >>> first.name, first.count, first.per_token, first.bytes_each(Precision("bfloat16"))
    ('model.layers.0.mlp.experts', 8, 2, 352321536)
    """
    per_token = model.facts.get("experts_per_token")
    if not isinstance(per_token, int):
        return ()
    found: list[Experts] = []

    def look(module: ModuleSpec, name: str) -> None:
        for own, child in module.children.items():
            full = join(name, own)
            if count := count_experts(own, child, model.facts):
                shared = (other for other in module.children if other.startswith("shared_expert"))
                beside = tuple(join(name, other) for other in shared if not other.endswith("gate"))
                found.append(Experts(full, count, min(per_token, count), child, beside))
            else:
                look(child, full)

    look(model.root, "")
    if found:
        check_choice(model.name, max(one.count for one in found), per_token)
    return tuple(found)


def check_choice(name: str, count: int, per_token: int) -> None:
    """See that a token of a model takes at least one expert, and no more than a block has.

    Raises:
        ValueError: it does not.
    """
    if per_token < 1:
        raise ValueError(f"{name} says that a token takes {per_token} experts: expected at least 1")
    if per_token > count:
        raise ValueError(f"{name} says that a token takes {per_token} experts, but its blocks have {count} each")


def count_experts(own: str, module: ModuleSpec, facts: Mapping[str, Any]) -> int:
    """How many experts a module holds, by its form; 0 if it is no mixture.

    Args:
        own: its name within its parent.
        facts: of the model; the number of experts must be one that they name, if they name one.
    """
    if "expert" not in own and "Expert" not in module.cls:
        return 0
    weights = [tensor.shape for tensor in module.tensors.values() if not tensor.buffer]
    said = facts.get("num_experts")
    if len({shape[:1] for shape in weights}) == 1 and any(len(shape) == 3 or shape[0] == said for shape in weights):
        count = weights[0][0]
    elif module.cls in ("ModuleList", "ModuleDict") and len(module.children) > 1:
        forms = {(child.cls, child.bytes()) for child in module.children.values()}
        count = len(module.children) if len(forms) == 1 and all(map(str.isdigit, module.children)) else 0
    else:
        return 0
    return count if said is None or count <= said else 0


# ---------------------------------------------------------------------------------------------------------------------
# What a token uses


def active_parameters(model: ModelSpec) -> int:
    """Parameters that one token uses: all but those of the experts that were not chosen for it.

    The table of input embeddings is counted, as most publishers do (gpt-oss leaves it out).

    >>> from bigkit import zoo
    >>> round(active_parameters(zoo.describe("mixtral-8x7b")) / 1e9, 1)
    12.9
    """
    idle = sum(one.parameters // one.count * (one.count - one.per_token) for one in experts_of(model))
    return model.parameters - idle


def active_bytes(model: ModelSpec, precision: Precision = Precision()) -> int:
    """Bytes of the weights that one token uses."""
    idle = sum(one.bytes_each(precision) * (one.count - one.per_token) for one in experts_of(model))
    return max(0, model.bytes(precision) - idle)


def visited(tokens: int, per_token: int, count: int) -> float:
    """The share of a block's experts that some of so many tokens visit, if each chooses by chance.

    With n experts of which k work, b tokens leave one untouched with probability (1 - k/n)^b.

    >>> visited(1, 2, 8), round(visited(8, 2, 8), 2)
    (0.25, 0.9)
    """
    return 1 - (1 - per_token / count) ** tokens


def sentence(model: ModelSpec, precision: Precision = Precision("bfloat16")) -> str:
    """What is worth saying about a mixture of experts; empty for other models.

    >>> from bigkit import zoo
    >>> sentence(zoo.describe("mixtral-8x7b"))[:83]
    'A mixture of experts: of 46.7 B parameters a token uses 12.9 B, 2 of 8 experts in e'
    """
    experts = experts_of(model)
    if not experts:
        return ""
    kinds = {(one.count, one.per_token) for one in experts}
    count, per_token = max(kinds)
    choice = f"{per_token} of {count} experts" + ("" if len(kinds) == 1 else " at most")
    shared = len(experts[0].shared)
    beside = f" and {counted(shared, 'shared module')}" if shared else ""
    stored = "As stored," if precision == Precision() else f"In {precision.label}"
    return (
        f"A mixture of experts: of {format_count(model.parameters)} parameters a token uses "
        f"{format_count(active_parameters(model))}, {choice}{beside} in each of {counted(len(experts), 'block')}. "
        f"{stored} one expert takes {format_bytes(experts[0].bytes_each(precision))}, and a token uses "
        f"{format_bytes(active_bytes(model, precision))} of {format_bytes(model.bytes(precision))}."
    )
