"""Modules whose weights stay as a quantized checkpoint stores them: they travel so, and are decoded where they work.

A layer of 4096 x 4096 in MXFP4 takes 8.9 MB on disk, in RAM, on the link and on the GPU; while it multiplies, and no
longer, there is a bfloat16 weight of 33.6 MB too. `as_stored` gives the layers of an empty model the tensors that the
checkpoint has under their names in place of `weight`, as plain parameters: sizes, plans, loading, offloading, dry runs
and saving see these, and need to know no format.

    linear layers       `StoredLinear`: weight = codec(parts), then the product
    experts one by one  FP8 ones are stacked as the class has them, codes and scales (`merged.py`)
    stacked experts     a subclass of their class, in which `self.gate_up_proj[chosen]` decodes the chosen experts only,
                        and a prompt's product a few at a time (`decoded.py`)

Leaves out: the formats (`codecs.py`), and decoding at loading (`load_checkpoint_in_model(..., keep="dense")`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model.config import experts_per_token
from ..model.header import CheckpointError
from ..model.spec import TensorSpec
from ..model.stored import DECODING, DECODING_OF, DECODING_STACK, decoding
from ..units import dtype_name
from ._peft import refuse_adapters_on
from ._transformers import Made, gptq_offset
from .codecs import Codec, Kinds, Parts, StackCodec, described, find_codec, find_stack_codec
from .decoded import DecodedStack
from .fits import stack_misfit, values_misfit
from .format import Checkpoint, Stored
from .merged import stack_experts
from .read_only import ReadOnly

ANEW = "get the file anew, or run it with the library that wrote it"


class AsStored(nn.Module):
    """What has weights as they are stored.

    Args:
        stored: own names of their tensors. A cast of the model leaves them as they are.
        stacks: own names of the stacked weights that these stand for, in the order of their use.
        works_in: the dtype that they are decoded to. A cast of the model changes it.
        decoding: bytes that the largest of its weights takes while it is decoded, on the device where it works.
    """

    stored: tuple[str, ...] = ()
    stacks: tuple[str, ...] = ()
    decoding: int = 0
    works_in: torch.dtype

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
        if not recurse:
            refuse_adapters_on(self.stacks or ("weight",))
        return super().named_parameters(prefix, recurse, remove_duplicate)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        *_, errors = rest
        wrong = [own for own in self.stored if _other_codes(state_dict.get(prefix + own), self._parameters[own])]
        for own in wrong:  # torch would round numbers to codes, for other scales
            errors.append(
                f"{prefix}{own} is stored here as {self._parameters[own].dtype}, and {state_dict[prefix + own].dtype} "  # type: ignore[union-attr]
                "was given: load the model with keep='dense' to give it other weights"
            )
        without = {name: value for name, value in state_dict.items() if name not in {prefix + own for own in wrong}}
        super()._load_from_state_dict(without if wrong else state_dict, prefix, *rest)

    _load_from_state_dict.only_refuses = True  # type: ignore[attr-defined]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        parts = [self._parameters[name] for name in self.stored]

        def keep_dtype(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            as_it_was = new.dtype != tensor.dtype and any(tensor is part for part in parts)
            return tensor.to(new.device) if as_it_was else new

        self.works_in = fn(torch.empty(0, dtype=self.works_in)).dtype
        return super()._apply(keep_dtype, recurse)

    def __reduce_ex__(self, protocol: Any) -> Any:
        made, made_of = super().__reduce_ex__(protocol), getattr(self, "made_of", None)
        return (_new, made_of, *made[2:]) if made_of else made  # the class itself has no name


class StoredLinear(AsStored, nn.Linear):
    """A linear layer that decodes its weight for each product."""

    codec: Codec

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in the dtype of x."""
        parts: Any = {name: self._parameters[name] for name in self.stored}
        return nn.functional.linear(x, self.codec.decode(parts, x.dtype), self.bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight (out, in), decoded anew each time one asks, as adapters do; what writes to it raises."""
        parts: Any = {name: self._parameters[name] for name in self.stored}
        reason = f"it is stored as {self.codec.format}, and would not change: load with keep='dense' to merge into it"
        return ReadOnly.of(self.codec.decode(parts, self.works_in), reason)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            own = self._parameters.get(name)
            if own is None or (value.shape, value.dtype) != (own.shape, own.dtype):
                raise ValueError(
                    f"the weight of this layer is stored as {self.codec.format}, and another one was given: load with "
                    "keep='dense' to exchange it"
                )
            self._parameters[name] = value
        else:
            super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, stored as {self.codec.format}"


@contextmanager
def as_stored(
    model: nn.Module, source: Checkpoint, keep: str = "stored", dtype: torch.dtype | str | None = None
) -> Iterator[None]:
    """Make the weights of an empty model those that a quantized checkpoint has; one that is not, changes nothing.

    If the block ends in an error, the model's modules are as they were.

    Args:
        model: weights that are not on meta stay what they are, and are filled with decoded ones.
        source: the checkpoint; with "dense" it has, afterwards, weights made of its tensors.
        keep: "stored": weights stay as they are stored. "dense": they are decoded when they are loaded.
        dtype: that other weights are cast to when they are loaded: these are decoded to it, too.

    Raises:
        CheckpointError: a weight is stored in a way that is not known here.
    """
    if keep not in ("stored", "dense"):
        raise ValueError(f"keep must be 'stored' or 'dense', not {keep!r}")
    undo: list[Callable[[], None]] = []
    try:
        if any(where.dtype.itemsize == 1 or where.dtype == torch.int32 for where in source.stored.values()):
            _change_modules(model, source, keep, undo)
        yield
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    for module in model.modules() if dtype is not None else ():
        if isinstance(module, AsStored):
            module.works_in = getattr(torch, dtype_name(dtype))


def keep_as_stored(model: nn.Module, tensors: Mapping[str, TensorSpec], name: str) -> None:
    """Give an empty model the modules that it has once it is loaded from a checkpoint with such tensors.

    Args:
        model: on meta; it stays there.
        tensors: name -> tensor of the checkpoint, of which the file is not needed.
        name: what errors call the checkpoint.
    """
    kinds = {full: (tensor.shape, getattr(torch, tensor.dtype)) for full, tensor in tensors.items()}
    stored = {full: Stored(Path(name), 0, 0, dtype, shape) for full, (shape, dtype) in kinds.items()}
    with as_stored(model, Checkpoint(Path(name), stored=stored)):
        pass


def _change_modules(model: nn.Module, source: Checkpoint, keep: str, undo: list[Callable[[], None]]) -> None:
    under: dict[str, Kinds] = {}
    for name in source.stored:
        module, _, own = name.rpartition(".")
        under.setdefault(module, {})[own] = source.shape_and_dtype(name)  # type: ignore[index]
    for name, stacks in stack_experts(model, source).items():
        under[name] = {**under.get(name, {}), **stacks}
    names_of: dict[int, list[str]] = {}
    for name, module in model.named_modules():  # a module that is in several places is one
        for own, parameter in module.named_parameters(recurse=False):
            names_of.setdefault(id(parameter), []).append(f"{name}.{own}".lstrip("."))
    for name, module in list(model.named_modules()):
        kinds = under.get(name, {})
        if type(module) is nn.Linear:
            try:
                codec = find_codec(tuple(module.weight.shape), kinds, gptq_offset(model))
                if codec:
                    _check_values(name, tuple(module.weight.shape), source, codec, kinds)
            except ValueError as error:
                raise CheckpointError(f"{name} in {source.path}: {error}; {ANEW}") from error
            others = [full for full in names_of[id(module.weight)] if full != f"{name}.weight"]
            if codec and others:
                raise CheckpointError(
                    f"{name} in {source.path} is stored as {codec.format}, but in this model its weight is that of "
                    f"{others[0]!r}, too: build the model with weights that are not tied (tie_word_embeddings=False)"
                )
            if codec:
                _change(name, module, source, keep if module.weight.is_meta else "dense", codec, kinds, undo)
        else:
            for own, stack_codec in list(_stacked(name, module, source, kinds)):
                _change_stack(name, module, own, stack_codec, source, keep, kinds, undo)


def _check_values(name: str, shape: tuple[int, ...], source: Checkpoint, codec: Codec, kinds: Kinds) -> None:
    """Look into the small tensors that say where numbers belong, if there is a file."""
    small = [own for own in ("weight_shape", "g_idx", "weight_g_idx") if own in kinds]
    if small and source.files:
        scales = kinds.get("weight_scale", kinds.get("scales"))
        assert scales is not None
        groups = scales[0][1] if "weight_scale" in kinds else scales[0][0]
        values = {own: source.read(f"{name}.{own}") for own in small}
        if wrong := values_misfit(shape, groups, values):
            raise ValueError(f"a weight of shape {list(shape)} is stored as {codec.format}, but {wrong}")


def _change(
    name: str, module: nn.Linear, source: Checkpoint, keep: str, codec: Codec, kinds: Kinds, undo: list[Any]
) -> None:
    weight, parts = module.weight, {own: kind for own, kind in kinds.items() if own != "bias"}
    if keep == "dense":
        _decode_at_loading(source, name, "weight", weight, parts, codec.decode)
        return
    _restorable(module, undo)
    bias = module._parameters.pop("bias")
    del module._parameters["weight"]
    module.__class__ = StoredLinear
    stored: Any = module
    stored.codec, stored.works_in, stored.stored = codec, weight.dtype, tuple(parts)
    stored.decoding = round(decoding(tuple(weight.shape), DECODING_OF.get(codec.format, DECODING)))
    for own, kind in parts.items():
        module._parameters[own] = _empty(kind)
    module._parameters["bias"] = bias


def _stacked(name: str, module: nn.Module, source: Checkpoint, kinds: Kinds) -> Iterator[tuple[str, StackCodec]]:
    """Own names of stacked weights that the checkpoint has quantized, and how."""
    for own, parameter in module._parameters.items():
        stack = parameter is not None and parameter.ndim == 3 and own not in getattr(module, "stored", ())
        codec = find_stack_codec(own, kinds) if stack else None
        if codec is not None and parameter is not None:
            own_kinds = {suffix: kinds[own + suffix] for suffix in codec.suffixes}
            wrong = stack_misfit(codec.format, tuple(parameter.shape), own_kinds)
            if own in kinds and own not in map(own.__add__, codec.suffixes):
                wrong = f"and {own} lies there as well, so that one of the two would not be read"
            if wrong:
                raise CheckpointError(
                    f"{name}.{own} in {source.path}: stacked weights of shape {list(parameter.shape)} are stored as "
                    f"{described({own + suffix: kind for suffix, kind in own_kinds.items()})}: {wrong}; {ANEW}"
                )
            yield own, codec


def _change_stack(
    name: str, module: nn.Module, own: str, codec: StackCodec, source: Checkpoint, keep: str, kinds: Kinds,
    undo: list[Any],
) -> None:  # fmt: skip
    weight, names = module._parameters[own], {suffix: own + suffix for suffix in codec.suffixes}
    assert weight is not None

    def decode(parts: Parts, dtype: torch.dtype) -> Tensor:
        return codec.decode({suffix: parts[one] for suffix, one in names.items()}, dtype)

    if keep == "dense" or not weight.is_meta:
        _decode_at_loading(source, name, own, weight, names.values(), decode)
        return
    _restorable(module, undo)
    hold_stack(module, own, codec, {suffix: _empty(kinds[one]) for suffix, one in names.items()})


def hold_stack(module: nn.Module, own: str, codec: StackCodec, parts: Mapping[str, nn.Parameter]) -> None:
    """Give a module a stacked weight as it is stored, in place of the parameter; its class becomes a subclass.

    Args:
        module: it has a parameter (experts, ...), which goes.
        own: the parameter's name.
        codec: the format.
        parts: suffix -> the tensor; the module has it as a parameter called `own + suffix`.
    """
    weight = module._parameters.pop(own)
    assert weight is not None
    names = {suffix: own + suffix for suffix in codec.suffixes}
    for suffix, one in names.items():
        module.register_parameter(one, parts[suffix])

    made_of: Any = getattr(module, "made_of", (type(module),))
    module.__class__ = _with_stacks(*made_of, (own, codec, tuple(weight.shape[1:])))
    holder: Any = module
    holder.works_in = weight.dtype
    holder.stored, holder.stacks = (*holder.stored, *names.values()), (*holder.stacks, own)
    chosen, each = experts_per_token(getattr(module, "config", None)), DECODING_STACK[codec.format]
    holder.decoding = max(holder.decoding, round(decoding(tuple(weight.shape), each, chosen or 1)))


@functools.cache
def _with_stacks(base: Any, *stacks: tuple[str, StackCodec, tuple[int, ...]]) -> Any:
    """A subclass of a class of modules, in which some stacked weights are decoded when they are used."""

    def decoded(own: str, codec: StackCodec, form: tuple[int, ...]) -> property:
        def stack(self: Any) -> DecodedStack:
            parts: Any = {suffix: self._parameters[own + suffix] for suffix in codec.suffixes}
            return DecodedStack(parts, codec, self.works_in, form, of=(self, own))

        return property(stack)

    content = {own: decoded(own, codec, form) for own, codec, form in stacks}
    bases = (base,) if issubclass(base, AsStored) else (AsStored, base)
    return type(base.__name__, bases, {**content, "made_of": (base, *stacks), "__module__": base.__module__})


def _new(*made_of: Any) -> Any:
    """A module of such a class, without anything in it; copies and pickles begin with it."""
    cls = _with_stacks(*made_of)
    return cls.__new__(cls)


def _decode_at_loading(
    source: Checkpoint, module: str, own: str, weight: Tensor, parts: Iterable[str],
    decode: Callable[[Parts, torch.dtype], Tensor],
) -> None:  # fmt: skip
    """Let a checkpoint have a weight that is made of its parts, which are found under no model's names any more."""
    full, aside = f"{module}.{own}", {part: source.set_aside(f"{module}.{part}") for part in parts}

    def make(tensors: Parts) -> dict[str, Tensor]:
        return {full: decode({part: tensors[key] for part, key in aside.items()}, weight.dtype)}

    source.made[full] = Made(full, tuple(weight.shape), weight.dtype, tuple(aside.values()), make)


def _restorable(module: nn.Module, undo: list[Any]) -> None:
    """Note what a module is, to put it back."""
    cls, parameters = type(module), dict(module._parameters)

    def restore() -> None:
        module.__class__ = cls
        for name in ("codec", "works_in", "stored", "stacks", "decoding"):
            vars(module).pop(name, None)
        module._parameters.clear()
        module._parameters.update(parameters)

    undo.append(restore)


def room_for_decoding(model: nn.Module) -> int:
    """Bytes that a device must have beside a model's weights, while the largest that is stored in few bits is decoded.

    >>> room_for_decoding(nn.Linear(2, 2))
    0
    """
    return max((module.decoding for module in model.modules() if isinstance(module, AsStored)), default=0)


def stored_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Name -> dtype of the tensors that stay as they are stored."""
    return {
        f"{name}.{own}".lstrip("."): parameter.dtype
        for name, module in model.named_modules()
        if isinstance(module, AsStored)
        for own, parameter in module._parameters.items()
        if own in module.stored and parameter is not None
    }


def _other_codes(given: Any, stored: Tensor | None) -> bool:
    codes = stored is not None and (stored.element_size() == 1 or not stored.is_floating_point())
    return codes and isinstance(given, Tensor) and given.dtype != stored.dtype  # type: ignore[union-attr]


def _empty(kind: tuple[tuple[int, ...], torch.dtype]) -> nn.Parameter:
    return nn.Parameter(torch.empty(kind[0], dtype=kind[1], device="meta"), requires_grad=False)
