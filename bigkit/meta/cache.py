"""What a model's KV cache holds, found by running it: a twin of the model without memory makes a few tokens, and its
cache is read.

A tensor on meta has a shape and no data, so a pass over a thousand tokens costs the Python of it and nothing else. The
twin is run at four lengths, each a prompt and one decoded token; of each tensor in the cache, four sizes say how it
grows:

    all equal                    a state that does not grow (recurrent and convolutional layers, a fixed source)
    a step for each token        keys and values, or the latent of MLA
    a step, then none            a sliding window, which is full
    a step for several tokens    keys and values that are compressed

No list of families is needed, so a new class of Transformers is counted on the day that it appears. Blocks of a kind
(same classes, same plain attributes but for their own number, same kind of cache) run once.

Leaves out: the cache of images and sounds that are not given (a model's text is run alone), and models that compute
with values that meta tensors do not have; `traced_attention` gives None for these.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..devices import join
from ..model.config import facts
from ..model.spec import Attention
from ._torch import storage_key
from .empty import init_empty_weights

FEW = (3, 4)  # tokens: shorter than any window
STEP = 256  # tokens by which the longest is longer: whatever is compressed is so in groups that divide it
MOST = 2**20  # tokens
OPERATIONS = 100_000  # a Mamba's loops take some 20,000

_known: dict[tuple[type, str], tuple[Attention, ...] | None] = {}


class _Opaque(Exception):
    """The cache cannot be read off a run."""


class _Yes(TorchDispatchMode):
    """What a model asks of a mask or of positions (all there? not packed?) is answered with yes: a plain text.

    A run of more than `OPERATIONS` is given up: a loop over the tokens of a window that a stranger's config made huge.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left = OPERATIONS

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise _Opaque
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True
        return func(*args, **(kwargs or {}))


def traced_attention(model: nn.Module) -> tuple[Attention, ...] | None:
    """What each block of a model of Transformers adds to its cache, in order, by running a twin on meta.

    Args:
        model: an instance of a class of Transformers. It is not run or changed: its class builds the twin from its
            config.

    Returns:
        One record for each block that caches, or several where its tensors grow in different ways; () for a model that
        keeps no cache; None if it cannot be found so.

    >>> from bigkit import zoo
    >>> last = traced_attention(zoo.empty_model("gpt2"))[-1]
    >>> last.layer, last.per_token, last.window
    ('transformer.h.11', 1536, None)
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict") or not callable(getattr(model, "can_generate", None)):
        return None
    settings = {name: value for name, value in config.to_dict().items() if name != "quantization_config"}
    key = (type(model), json.dumps(settings, default=str, sort_keys=True))
    if key not in _known:
        try:
            _known[key] = _trace(type(model), type(config).from_dict(settings))
        except Exception:  # a stranger's code, run in a way that it was not made for
            _known[key] = None
    return _known[key]


def _trace(cls: Any, config: Any) -> tuple[Attention, ...]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with init_empty_weights():
            twin = cls(config).eval()
        if hasattr(twin, "set_experts_implementation"):
            twin.set_experts_implementation("batched_mm")  # the others read the router's choice
        lengths, blocks = _lengths(config.to_dict()), _Blocks(twin.to("meta"))
        with torch.device("meta"), torch.no_grad(), _Yes():
            runs = [_run(twin, blocks, length) for length in lengths]
    finally:
        torch.set_default_dtype(default)
    names = dict.fromkeys(name for run in runs for name in run)
    return tuple(record for name in names for record in _records(name, [run.get(name, {}) for run in runs], lengths))


def _lengths(settings: dict[str, Any]) -> tuple[int, ...]:
    """Two lengths that are shorter than any window, and two that are longer."""
    about = facts(settings)
    most = about.get("max_position_embeddings", MOST) if about.get("positions") in ("learned", "alibi") else MOST
    step = min(STEP, most // 2)
    long = min(most - step, 2 * STEP + -(-_widest(settings) // STEP) * STEP)
    return *FEW, long, long + step


def _widest(settings: Any, named: bool = False) -> int:
    """The largest number that a config gives under the name of a window, a chunk or a rate of compression."""
    if isinstance(settings, dict):
        words = ("window", "chunk", "local", "compress", "block_size")
        return max((_widest(value, any(word in str(key) for word in words)) for key, value in settings.items()),
                   default=0)  # fmt: skip
    if isinstance(settings, (list, tuple)):
        return max((_widest(value, named) for value in settings), default=0)
    return settings if named and type(settings) is int and settings < MOST else 0


# ---------------------------------------------------------------------------------------------------------------------
# Running the twin


class _Size(NamedTuple):
    """What a tensor takes: elements of its storage, its own shape, and whether they have 32 bits."""

    elements: int = 0
    shape: tuple[int, ...] = ()
    wide: bool = False


_Sizes = dict[str, _Size]  # where in the cache -> what lies there


def _run(twin: Any, blocks: _Blocks, length: int) -> dict[str, _Sizes]:
    """Block -> what it holds in the cache once the last of `length` tokens was decoded."""
    ids = torch.zeros((1, length), dtype=torch.long)
    paired = bool(getattr(twin.config, "is_encoder_decoder", False))
    name = twin.main_input_name
    if name == "input_features":
        inputs = {name: torch.zeros(1, twin.config.num_mel_bins, 2 * twin.config.max_source_positions)}
    elif name == "input_ids":
        inputs = {name: ids if paired else ids[:, :-1]}
    else:
        raise _Opaque
    inputs |= {"decoder_input_ids": ids[:, :-1]} if paired else {}
    blocks.start()
    out = twin(**inputs, use_cache=True)
    kept = next(
        (key for key in ("past_key_values", "cache_params", "state") if getattr(out, key, None) is not None), ""
    )
    if not kept:
        if any(isinstance(value, Tensor) for part in twin.modules() for value in vars(part).values()):
            raise _Opaque  # its modules keep the state themselves
        return {}
    state: dict[str, Any] = {kept: getattr(out, kept)}
    if paired:
        state["encoder_outputs"] = (out.encoder_last_hidden_state,)
    blocks.output = {}
    out = twin(**{"decoder_input_ids" if paired else "input_ids": ids[:, -1:]}, **state, use_cache=True)
    return blocks.held(getattr(out, kept))


class _Blocks:
    """The numbered blocks of a twin. Of those of a kind the first runs, and the others return what it returned.

    What a block holds are the tensors that are new in the cache after it ran.
    """

    def __init__(self, twin: nn.Module) -> None:
        self.first_of: dict[str, str] = {}  # block -> the first of its kind, which ran for it
        self.firsts: dict[Any, str] = {}  # kind -> that block
        self.output: dict[str, Any] = {}
        self.owner: dict[int, tuple[str, Tensor]] = {}  # id of a tensor -> the block that made it
        lists = [(name, part) for name, part in twin.named_modules() if isinstance(part, nn.ModuleList)]
        outer = [item for item in lists if not any(item[0].startswith(f"{other}.") for other, _ in lists)]
        for name, part in outer:
            for number, block in enumerate(part):
                block.forward = self._once(join(name, str(number)), block, number, block.forward)

    def start(self) -> None:
        """Before a prompt."""
        self.first_of, self.firsts, self.output, self.owner = {}, {}, {}, {}

    def _once(self, name: str, block: nn.Module, number: int, forward: Any) -> Any:
        about = _kind(block, number)

        def run(*args: Any, **kwargs: Any) -> Any:
            cache = [value for value in (*args, *kwargs.values()) if not isinstance(value, (Tensor, nn.Module))]
            kind = (name.rpartition(".")[0], about, _kind_of_cache(cache, number))
            first = self.first_of.setdefault(name, self.firsts.setdefault(kind, name))
            if first == name:
                before = {id(tensor) for _, tensor in _tensors(cache)}
                self.output[name] = forward(*args, **kwargs)
                new = (tensor for _, tensor in _tensors(cache) if id(tensor) not in before)
                self.owner.update((id(tensor), (name, tensor)) for tensor in new)
            return self.output[first]

        return run

    def held(self, cache: Any) -> dict[str, _Sizes]:
        """Block -> what it holds in the cache."""
        found: dict[str, _Sizes] = defaultdict(dict)
        storages: set[int] = set()
        for where, tensor in _tensors(cache):
            storage = tensor.untyped_storage()
            if tensor.is_floating_point() and storage_key(tensor) not in storages:
                storages.add(storage_key(tensor))
                if id(tensor) not in self.owner:
                    raise _Opaque
                size = _Size(storage.nbytes() // tensor.element_size(), tuple(tensor.shape), tensor.element_size() == 4)
                found[self.owner[id(tensor)][0]][where] = size
        return {name: found.get(first, {}) for name, first in self.first_of.items()}


def _tensors(item: Any, where: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a cache holds, however deep, and where it is in it."""
    seen = set() if seen is None else seen
    if isinstance(item, Tensor):
        yield where, item
    elif item is None or isinstance(item, (str, int, float, nn.Module, torch.dtype, type)) or id(item) in seen:
        return
    else:
        seen.add(id(item))
        inner = dict(enumerate(item)) if isinstance(item, (list, tuple)) else item
        for key, value in list((inner if isinstance(inner, dict) else getattr(item, "__dict__", {})).items()):
            yield from _tensors(value, f"{where}.{key}", seen)


def _plain(value: Any, number: int) -> Any:
    """What of an attribute tells a kind of block from another; its own number does not."""
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item, number) for item in value)
    if value is None or isinstance(value, (str, int, float, bool, torch.dtype, type)):
        return value
    return type(value).__name__


def _kind(block: nn.Module, number: int) -> Any:
    def own(name: str, value: Any) -> Any:
        return "number" if value == number and ("layer" in name or "idx" in name) else _plain(value, number)

    return tuple(
        (name, type(part), tuple((key, own(key, value)) for key, value in vars(part).items() if key[0] != "_"),
         tuple((key, tuple(tensor.shape)) for key, tensor in part.named_parameters(recurse=False)))
        for name, part in block.named_modules()
    )  # fmt: skip


def _kind_of_cache(cache: list[Any], number: int) -> Any:
    """The class and the plain attributes of the layer of a cache that belongs to a block."""
    layers = [getattr(part, "layers", None) for part in cache]
    parts = [part[number] for part in layers if isinstance(part, list) and len(part) > number]
    return tuple(
        (type(part), tuple((key, value) for key, value in vars(part).items() if isinstance(value, (int, bool))))
        for part in parts
    )


# ---------------------------------------------------------------------------------------------------------------------
# Reading four sizes


def _records(name: str, runs: list[_Sizes], lengths: tuple[int, ...]) -> Iterator[Attention]:
    """The growth of what one block holds, tensors that grow alike in one record."""
    fixed = wide = 0
    grows: dict[tuple[int | None, int], int] = defaultdict(int)
    for where in dict.fromkeys(place for run in runs for place in run):
        sizes = [run.get(where, _Size()) for run in runs]
        elements = [size.elements for size in sizes]
        growth = _growth(elements, [size.shape for size in sizes[2:]], lengths)
        if growth is None and elements[2] == elements[3] == max(elements):  # full, if not from the first token on
            wide, fixed = wide + max(elements) * sizes[-1].wide, fixed + max(elements) * (not sizes[-1].wide)
        elif growth is None or sizes[-1].wide:
            raise _Opaque
        else:
            grows[growth.window, growth.every] += growth.per_token
    for (window, every), step in grows.items():
        yield Attention(name, step, window, fixed, wide, every)
        fixed = wide = 0
    if fixed or wide:
        yield Attention(name, 0, None, fixed, wide)


def _growth(elements: list[int], shapes: list[tuple[int, ...]], lengths: tuple[int, ...]) -> Attention | None:
    """The growth that gives all four sizes; None if nothing grows, or in no such way."""
    few, more, long, longer = elements
    step, entries = more - few, max((y - x for x, y in zip(*shapes)), default=0)
    ways: list[tuple[int, int | None, int]] = [(step, None, 1)]
    if step > 0 and long == longer:
        ways.append((step, long // step, 1))
    if entries > 0:
        ways.append(((longer - long) // entries, None, max(1, (lengths[3] - lengths[2]) // entries)))
    found = [Attention("", *way[:2], every=way[2]) for way in ways if way[0] > 0]
    return next((one for one in found if [one.growing(length) for length in lengths] == elements), None)
