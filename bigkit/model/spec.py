"""Layer records: what a planner sees of a model.

A `ModelSpec` is a model's skeleton without torch: a tree of `ModuleSpec` with the shape and dtype of every tensor, the
groups of tied tensors, the classes that must not be split, and what a token adds to the KV cache. `ModelSpec.layers()`
cuts the tree into a flat list of `Layer`s, the smallest pieces that a planner may move between devices. Identical
blocks share one `ModuleSpec` object, so an 80-block model is measured once per kind of block.

Leaves out: making a spec from an `nn.Module` (`meta/skeleton.py`), a name or a JSON table (`zoo/`), and every decision
about placement (`maps/strategies.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ..devices import join, prefixes
from ..units import dtype_bits, dtype_name, is_floating
from .attention import Attention as Attention
from .precision import QUANTIZATIONS as QUANTIZATIONS
from .precision import Precision as Precision
from .precision import precision_of
from .precision import tensor_bytes as tensor_bytes

_CONTAINERS = ("Sequential", "ModuleList", "ModuleDict")  # what they hold may be placed apart


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one parameter or buffer; `stored` are its bytes in a quantized checkpoint, if they differ."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    buffer: bool = False
    persistent: bool = True
    stored: int | None = None

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def bytes(self, dtype: str | None = None) -> int:
        """Bytes at rest; `dtype` casts floating tensors and leaves the others alone."""
        if dtype is None and self.stored is not None:
            return self.stored
        stored = dtype if dtype is not None and is_floating(self.dtype) else self.dtype
        return math.ceil(self.elements * dtype_bits(stored) / 8)


@dataclass(frozen=True, eq=False)
class ModuleSpec:
    """One module: its class, its own tensors and its children, in registration order.

    `linear` marks what bitsandbytes would replace: `nn.Linear`, and the `Conv1D` of GPT-2; no other classes.
    Compared by identity, so that equal blocks can be one shared object with one cached size.
    """

    cls: str
    tensors: Mapping[str, TensorSpec] = field(default_factory=dict)
    children: Mapping[str, ModuleSpec] = field(default_factory=dict)
    linear: bool = False

    def walk(self, prefix: str = "") -> Iterator[tuple[str, ModuleSpec]]:
        """Every module below and including this one as (name, spec), depth first, in registration order."""
        yield prefix, self
        for name, child in self.children.items():
            yield from child.walk(join(prefix, name))

    def named_tensors(self, prefix: str = "") -> Iterator[tuple[str, TensorSpec, ModuleSpec]]:
        """Every tensor below as (full name, spec, owner), tied ones under each of their names."""
        for module_name, module in self.walk(prefix):
            for name, tensor in module.tensors.items():
                yield join(module_name, name), tensor, module

    @cached_property
    def _sizes(self) -> dict[Any, int]:
        return {}

    def bytes(self, precision: Precision = Precision(), name: str = "", buffers_only: bool = False) -> int:
        """Bytes of all tensors below, each tied name counted again.

        Args:
            precision: how the tensors are stored.
            name: the full name of this module, by which `precision.keep` and `precision.special` know its parts.
            buffers_only: count buffers alone.
        """
        sizes: dict[Any, int] = self._sizes
        key: tuple[Any, ...] = (precision.dtype, precision.quantization, buffers_only)
        if precision.named and (name in precision.around or not precision.named.isdisjoint(prefixes(name))):
            sizes, key = precision.sizes, (self, name, buffers_only)  # the size depends on the name
        if (known := sizes.get(key)) is None:
            own = [item for item in self.tensors.items() if item[1].buffer or not buffers_only]
            size = sum(tensor_bytes(join(name, part), tensor, self, precision) for part, tensor in own)
            parts = self.children.items()  # equal ones are one object, which knows its size
            size += sum(own.bytes(precision, join(name, at), buffers_only) for at, own in parts)
            known = sizes[key] = size
        return known


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """A whole model as a planner and an estimator see it.

    Args:
        name: what the user called it.
        root: the module tree.
        ties: groups of full tensor names that share one storage; the first name of a group owns it.
        no_split: classes whose modules stay on one device (residual connections cross their parts).
        attention: KV-cache growth of each block, in order.
        facts: numbers of the config that estimates use (hidden_size, intermediate_size, vocab_size,
            num_hidden_layers, max_position_embeddings, ...), and what its classes need in float32 (`float32_modules`).
        library: where it comes from: "transformers", "timm", "bigkit", "safetensors" or "module".
    """

    name: str
    root: ModuleSpec
    ties: tuple[tuple[str, ...], ...] = ()
    no_split: tuple[str, ...] = ()
    attention: tuple[Attention, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    library: str = "module"

    def layers(self, no_split: Iterable[str] | str | None = None) -> tuple[Layer, ...]:
        """The model cut into the smallest pieces that may be placed apart, in registration order.

        A piece is a module of a `no_split` class, a module without children, or a tensor registered directly on a
        module that is split. Pieces without any tensor (Dropout, activations) are kept: a device map names them too.

        Args:
            no_split: class names that stay whole; None takes the model's own.
        """
        if no_split is None:
            no_split = self.no_split
        return self._cut(frozenset((no_split,) if isinstance(no_split, str) else no_split), False)

    def layers_to_place(self) -> tuple[Layer, ...]:
        """The pieces that a planner places apart: those of `layers`, but `repeated_blocks` stay whole too.

        Tensors that a module holds itself stay together, and so does what comes before the first block beside it:
        tokens and positions are added up, and some models read an embedding's weight instead of calling it. If the
        model names no `no_split` classes, nobody says where residual connections run, so only what holds a repeated
        block is cut, and else nothing but containers (the model itself, Sequential, ModuleList).
        """
        blocks = self.repeated_blocks.union(self.no_split)
        layers = list(self._cut(blocks, not self.no_split))
        around = {prefix for layer in layers if layer.cls in blocks for prefix in prefixes(layer.name)}
        for i, layer in enumerate(layers):
            parent = layer.name.rpartition(".")[0]
            if layer.cls in blocks:
                around -= set(prefixes(layer.name))  # what comes after a block may go elsewhere
            elif i and layers[i - 1].name.rpartition(".")[0] == parent:
                if parent in around or layer.cls in ("Parameter", "Buffer"):
                    layers[i] = replace(layer, with_previous=True)
        return tuple(layers)

    @cached_property
    def repeated_blocks(self) -> frozenset[str]:
        """Classes of blocks that `no_split` does not name: numbered modules with children, none of them a block."""

        def inner(module: ModuleSpec) -> set[str]:
            classes: set[str] = {module.cls}.intersection(self.no_split)
            for name, child in module.children.items() if not classes else ():
                is_block = name.isdigit() and child.children and child.cls not in _CONTAINERS
                classes |= inner(child) or ({child.cls} if is_block else set())
            return classes

        return frozenset(inner(self.root).difference(self.no_split))

    def _cut(self, classes: frozenset[str], guessed: bool) -> tuple[Layer, ...]:
        """The pieces if `classes` stay whole; with `guessed`, all but containers and what is around one."""
        if (classes, guessed) not in self._layers:
            pieces = dict(_cut(self.root, "", classes, guessed))
            ties: dict[str, list[tuple[str, str]]] = {}
            for owner, *others in self.ties:
                for name in others:
                    piece = next((prefix for prefix in prefixes(name) if prefix in pieces), None)
                    if piece is None:
                        raise ValueError(f"tied tensor {name!r} is no tensor of {self.name}")
                    ties.setdefault(piece, []).append((name, owner))
            self._layers[classes, guessed] = tuple(
                Layer(name, spec.cls, spec, tuple(ties.get(name, ()))) for name, spec in pieces.items()
            )
        return self._layers[classes, guessed]

    @cached_property
    def _layers(self) -> dict[tuple[frozenset[str], bool], tuple[Layer, ...]]:
        return {}

    @cached_property
    def tensors(self) -> dict[str, tuple[TensorSpec, ModuleSpec]]:
        """Full name -> (tensor, owner module), tied tensors under each name."""
        return {name: (tensor, owner) for name, tensor, owner in self.root.named_tensors()}

    def bytes(self, precision: Precision = Precision()) -> int:
        """Bytes of the whole model at rest, tied tensors counted once."""
        return self.root.bytes(precision) - sum(
            tensor_bytes(name, *self.tensors[name], precision) for group in self.ties for name in group[1:]
        )

    @cached_property
    def parameters(self) -> int:
        """Number of parameters, tied ones counted once, buffers left out."""
        repeated = {name for group in self.ties for name in group[1:]}
        named = self.root.named_tensors()
        return sum(tensor.elements for name, tensor, _ in named if not tensor.buffer and name not in repeated)

    def kv_bytes(self, context: int, batch: int = 1, dtype: str = "bfloat16", kv_dtype: str | None = None) -> int:
        """Bytes of the KV cache of `batch` sequences of `context` tokens, once decoding is under way.

        `dtype` is that of the model, in which states stay that do not grow; `kv_dtype` one of `KV_DTYPES`.
        """
        return batch * sum(block.bytes(context, dtype, kv_dtype) for block in self.attention)

    def computes_in(self, precision: Precision = Precision()) -> str:
        """The dtype of activations and KV cache: that of the weights, or bfloat16 if they have less than 16 bits."""
        weights = (tensor for _, tensor, _ in self.root.named_tensors() if not tensor.buffer)
        stored = (tensor.dtype for tensor in weights if is_floating(tensor.dtype))
        dtype = self.facts.get("computes_in") or precision.dtype or next(stored, "bfloat16")
        return dtype if dtype_bits(dtype) >= 16 else "bfloat16"

    @property
    def kept(self) -> frozenset[str]:
        """Modules that quantization leaves alone by default: the output head, and whatever shares a tied tensor."""
        children = [name for name, child in self.root.children.items() if any(True for _ in child.named_tensors())]
        return self.tied | frozenset(children[-1:] if self.facts.get("has_head", True) else ())

    @property
    def tied(self) -> frozenset[str]:
        """Modules with a tied tensor."""
        return frozenset(name.rpartition(".")[0] for group in self.ties for name in group)

    def precision(
        self, dtype: object = None, quantization: str | None = None, keep: Iterable[str] | str | None = None,
        special: Mapping[str, object] | None = None,
    ) -> Precision:  # fmt: skip
        """A `Precision` for this model: how loading stores each of its tensors.

        Args:
            dtype: of floating tensors; None or "auto" keeps theirs, and takes float16 with a quantization.
            quantization: None, or one of `QUANTIZATIONS`.
            keep: modules that quantization leaves in `dtype`, see `is_named`; None takes `kept`. Always kept as well:
                tied modules, the layers that the model's classes need in float32, and those whose int8 weight PyTorch's
                own code would read.
            special: exact tensor name -> dtype, which overrides the rest.
        """
        dtype = dtype_name(dtype) if dtype not in (None, "auto") else "float16" if quantization else None
        names = keep if keep is None else (keep,) if isinstance(keep, str) else tuple(keep)
        others = tuple((name, dtype_name(other)) for name, other in (special or {}).items())
        return precision_of(self, dtype, quantization, names, others)

    def quantized(self, precision: Precision) -> list[str]:
        """Names of the layers that are quantized with this precision: planned, estimated and loaded so."""
        linear = [name for name, module in self.root.walk() if module.linear] if precision.quantization else []
        return [name for name in linear if not precision.keep.intersection(prefixes(name))]

    def renamed(self, name: str) -> ModelSpec:
        """The same model under another name."""
        return replace(self, name=name)


@dataclass(frozen=True, eq=False)
class Layer:
    """The smallest piece of a model that a planner may place.

    Args:
        name: its full name, a key of the device map.
        cls: its class, or "Parameter"/"Buffer" for a tensor registered on a split module.
        spec: its tensors.
        ties: (own tensor name, owner tensor name) for each tensor that is stored with another one.
        with_previous: whether it must be placed with the layer before it.
    """

    name: str
    cls: str
    spec: ModuleSpec
    ties: tuple[tuple[str, str], ...] = ()
    with_previous: bool = False

    def bytes(self, precision: Precision = Precision(), buffers_only: bool = False) -> int:
        """Bytes at rest if this layer stood alone, its tied tensors counted."""
        return self.spec.bytes(precision, self.name, buffers_only)

    def tensor_bytes(self, name: str, precision: Precision = Precision()) -> int:
        """Bytes of one of its tensors, by full name."""
        for full, tensor, owner in self.spec.named_tensors(self.name):
            if full == name:
                return tensor_bytes(full, tensor, owner, precision)
        raise KeyError(f"layer {self.name!r} has no tensor {name!r}")


def _cut(module: ModuleSpec, name: str, no_split: frozenset[str], guessed: bool) -> Iterator[tuple[str, ModuleSpec]]:
    whole = module.cls in no_split or (name and not module.children)
    if guessed and name and module.cls not in _CONTAINERS:
        whole = whole or not any(part.cls in no_split for _, part in module.walk())
    if whole:
        yield name, module
        return
    for own, tensor in module.tensors.items():
        yield join(name, own), ModuleSpec("Buffer" if tensor.buffer else "Parameter", {"": tensor})
    for child_name, child in module.children.items():
        yield from _cut(child, join(name, child_name), no_split, guessed)
