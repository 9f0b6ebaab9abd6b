"""A module as plain records: `spec_from_module` reads an `nn.Module` as the `ModelSpec` that planners and estimators
understand, and `tied_groups` finds the tensors that share memory.

Leaves out: the records themselves (`model/spec.py`), and building models without memory (`empty.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from ..devices import join
from ..model.spec import Attention, ModelSpec, ModuleSpec, TensorSpec
from ..units import dtype_name
from ._torch import are_apart, has_own_state, own_state, storage_key
from .cache import traced_attention

_PLAIN = (nn.Parameter, Tensor)

# ---------------------------------------------------------------------------------------------------------------------
# Reading a module's skeleton


def spec_from_module(
    model: nn.Module, name: str | None = None, no_split: Iterable[str] | None = None, *, trace_cache: bool = False
) -> ModelSpec:
    """What a planner and an estimator need to know of a module, on any device, meta included.

    Args:
        model: any module: your own, from transformers, from timm.
        name: what to call it; None takes the name in its config, or its class.
        no_split: classes whose modules stay on one device; None takes `_no_split_modules` of the model and its parts.
        trace_cache: find what the KV cache holds by running a twin of the model (`cache.py`), which takes up to a
            second; else, and where that cannot be, it follows from the config.

    Returns:
        The tree of shapes and dtypes (identical parts are one object), ties, and for a model with a transformers config
        the facts and the KV-cache growth read from it. Weights that the model computes (parametrizations) are not read:
        what counts are the tensors that they are computed from.

    Raises:
        TypeError: not a module.
        ValueError: a parameter of a lazy module has no shape yet.

    >>> from bigkit import init_empty_weights
    >>> with init_empty_weights():
    ...     model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    >>> spec = spec_from_module(model)
    >>> spec.bytes(), spec.parameters, spec.root.children["0"] is spec.root.children["1"]
    (576, 144, True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, not {type(model).__name__}; for a model's name use bigkit.plan(name)")
    skeleton, origins = _Skeleton(), {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    root, parts = skeleton.module(model), skeleton.parts
    facts, attention = _read_config(model, root)
    if trace_cache and (traced := traced_attention(model)) is not None:
        attention = traced
        facts.pop("uncounted_cache", None)
    facts |= _to_keep(model, parts)
    if no_split is None:
        silent = {cls for cls in skeleton.kinds if not hasattr(cls, "_no_split_modules")}
        told = (part for part in parts if type(part) not in silent or "_no_split_modules" in part.__dict__)
        own = (getattr(part, "_no_split_modules", None) or () for part in told)
        no_split = [cls for classes in own for cls in (sorted(classes) if isinstance(classes, Set) else classes)]
    elif isinstance(no_split, str):
        no_split = [no_split]
    return ModelSpec(
        name=name or getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__,
        root=root,
        ties=() if are_apart(skeleton.held) else tuple(map(tuple, tied_groups(model))),
        no_split=tuple(dict.fromkeys(no_split)),
        attention=attention,
        facts=facts,
        library=next((name for name in ("transformers", "timm", "bigkit") if name in origins), "module"),
    )


def tied_groups(model: nn.Module, buffers: bool = True) -> list[list[str]]:
    """Groups of names that stand for one tensor: the same object, or the same view of the same storage.

    Works on meta tensors, whose data pointers are all zero, because it compares storages.

    Args:
        model: any module.
        buffers: look at buffers too, not at parameters alone.

    Returns:
        Each group in registration order, the first name first.

    >>> model = nn.ModuleDict({"wte": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    >>> model["head"].weight = model["wte"].weight
    >>> tied_groups(model)
    [['wte.weight', 'head.weight']]
    """
    return tied(
        (join(name, own), tensor)
        for name, module in named_parts(model)
        for own, (tensor, buffer) in own_tensors(module).items()
        if buffers or not buffer
    )


def parts_that(model: nn.Module, holds: Callable[[nn.Module], Any]) -> list[tuple[str, nn.Module]]:
    """Those of `model.named_modules()` of which something holds. Mostly it holds of none: then no names are made."""
    return [part for part in model.named_modules() if holds(part[1])] if any(map(holds, _parts(model))) else []


def _parts(model: nn.Module) -> list[nn.Module]:
    """Every module in a model, in no order."""
    found = [model]
    for module in found:
        if module._modules:
            found += [child for child in module._modules.values() if child is not None]
    return found


def named_parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """`model.named_modules(remove_duplicate=False)` without a generator for each level."""
    found: list[tuple[str, nn.Module]] = []
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        found.append((name, module))
        for own, child in reversed(module._modules.items()):
            if child is not None:
                waiting.append((f"{name}.{own}" if name else own, child))
    return found


def tied(named: Iterable[tuple[str, Tensor]]) -> list[list[str]]:
    """The same for any tensors and their names."""
    named = list(named)
    keys = [storage_key(tensor) for _, tensor in named]
    if len(set(keys)) == len(keys):
        return []
    storages: dict[Any, list[tuple[str, Tensor]]] = {}
    for key, item in zip(keys, named):
        storages.setdefault(key, []).append(item)
    groups: dict[Any, list[str]] = {}
    for key, sharing in storages.items():
        for name, tensor in sharing if len(sharing) > 1 else ():
            view = None if isinstance(key, tuple) else (tensor.storage_offset(), tensor.size(), tensor.stride())
            groups.setdefault((key, view, tensor.dtype), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


class _Skeleton:
    """Makes ModuleSpecs, each distinct one once.

    Attributes:
        parts: the modules that were seen, in the order of `named_modules(remove_duplicate=False)`.
        held: their parameters and buffers.
        kinds: class -> its name, whether it may be linear, and whether it has a state dict of its own.
    """

    def __init__(self) -> None:
        self.parts: list[nn.Module] = []
        self.held: list[Tensor] = []
        self.kinds: dict[type, tuple[str, bool, bool]] = {}
        self._modules: dict[Any, ModuleSpec] = {}
        self._tensors: dict[Any, TensorSpec] = {}

    def module(self, module: nn.Module) -> ModuleSpec:
        is_root = not self.parts
        self.parts.append(module)
        kind = self.kinds.get(type(module)) or self._kind(module)
        tensors: dict[str, TensorSpec] = {}
        for own, weight in module._parameters.items():
            if weight is not None:
                tensors[own] = self.tensor(module, own, weight)
                self.held.append(weight)
        for own, tensor in module._buffers.items():
            if tensor is not None:
                persistent = own not in module._non_persistent_buffers_set
                tensors[own] = self.tensor(module, own, tensor, True, persistent)
                self.held.append(tensor)
        cls, linear, keeps_more = kind
        if keeps_more:
            with suppress(Exception):  # a class's own code may not be made for meta tensors
                tensors |= {own: self.tensor(module, own, tensor) for own, tensor in extra_tensors(module).items()}
        linear = linear and bool(tensors) and not is_root and is_linear(module)
        children = {own: self.module(child) for own, child in module._modules.items() if child is not None}
        inside = {**tensors, **children} if children else tensors
        key = (cls, linear, len(tensors), *inside, *map(id, inside.values()))  # specs are made once: none dies
        spec = self._modules.get(key)
        if spec is None:
            spec = self._modules[key] = ModuleSpec(cls, tensors, children, linear)
        return spec

    def _kind(self, module: nn.Module) -> tuple[str, bool, bool]:
        cls = type(module)
        kind = self.kinds[cls] = (cls.__name__, _may_be_linear(cls), has_own_state(module))
        return kind

    def tensor(
        self, module: nn.Module, own: str, tensor: Tensor, buffer: bool = False, persistent: bool = True
    ) -> TensorSpec:
        key = (tensor.shape, tensor.dtype, buffer, persistent) if type(tensor) in _PLAIN else None
        spec = self._tensors.get(key)
        if spec is None:
            if nn.parameter.is_lazy(tensor):
                full = join(next(name for name, part in named_parts(self.parts[0]) if part is module), own)
                raise ValueError(
                    f"{full!r} of a lazy {type(module).__name__} has no shape yet: run the model once first"
                )
            key = (tensor.shape, tensor.dtype, buffer, persistent)
            spec = self._tensors.get(key) or TensorSpec(
                tuple(tensor.shape), dtype_name(tensor.dtype), buffer=buffer, persistent=persistent
            )
            self._tensors[key] = spec
        return spec


def is_linear(module: nn.Module) -> bool:
    """Whether a layer can be quantized: a plain linear one, with a floating weight of its own that is not empty.

    Subclasses of `nn.Linear` have owners who may read their weights. Transformers' `Conv1D` (GPT-2) is a transposed
    one, and its `FalconLinear` only rounds otherwise.
    """
    if not _may_be_linear(type(module)):
        return False
    weight = module._parameters.get("weight")  # asking for `.weight` would run the code of a parametrized one
    return weight is not None and weight.ndim == 2 and weight.is_floating_point() and weight.numel() > 0


def _may_be_linear(cls: type) -> bool:
    foreign = cls.__name__ in ("Conv1D", "FalconLinear") and cls.__module__.startswith("transformers.")
    return cls is nn.Linear or foreign


def modules_to_keep(model: nn.Module) -> dict[str, list[str]]:
    """What a model's classes say about the dtypes of their parts, as facts of a `ModelSpec`; only what is not empty.

    keep_in_fp32, keep_in_fp32_strict: names that need float32 in float16, or in 16 bit (`float32_modules`).
    keep_in_int8: layers that `nn.TransformerEncoderLayer` computes with by itself where it is fast.
    """
    return _to_keep(model, _parts(model))


def _to_keep(model: nn.Module, parts: Sequence[nn.Module]) -> dict[str, list[str]]:
    classes = {type(part) for part in parts}
    plain = {cls for cls in classes if cls.__module__.startswith("torch.nn.") and cls is not nn.TransformerEncoderLayer}
    parts = [part for part in parts if type(part) not in plain]
    facts: dict[str, list[str]] = {}
    for fact in ("keep_in_fp32", "keep_in_fp32_strict"):
        attribute = f"_{fact.replace('fp32', 'fp32_modules')}"
        # Not by `getattr`: a module looks in three dicts, and raises, for each attribute that it lacks.
        by_class = {cls: getattr(cls, attribute, None) for cls in classes - plain}
        lists = (vars(part).get(attribute, by_class[type(part)]) for part in parts)
        facts[fact] = sorted({name for names in lists if isinstance(names, (list, tuple, set)) for name in names})
    encoder = nn.TransformerEncoderLayer
    named = named_parts(model) if any(issubclass(cls, encoder) for cls in classes) else ()
    encoders = [name for name, part in named if isinstance(part, encoder)]
    facts["keep_in_int8"] = [join(name, own) for name in encoders for own in ("linear1", "linear2")]
    return {fact: names for fact, names in facts.items() if names}


def extra_tensors(module: nn.Module, load: bool = False) -> dict[str, Tensor]:
    """What a module stores beside its parameters and buffers: the scales of quantized weights.

    Asks the module's own `_save_to_state_dict`, if it has one. Of a weight that rests elsewhere they are on meta, or
    with `load` real.

    Raises:
        ValueError: its weight is no longer what was quantized, so that saving it would be saving something else.
    """
    if not has_own_state(module):
        return {}
    own = {**module._parameters, **module._buffers}
    away: Any = {name: tensor for name, tensor in module._parameters.items() if hasattr(tensor, "streamer")}
    weight = away["weight"].weight.template if "weight" in away else own.get("weight")
    # bitsandbytes would undo this, but the scales have been rounded.
    if hasattr(getattr(weight, "quant_state", None), "original_qshape"):
        raise ValueError(
            f"the 4-bit weight of a {type(module).__name__} was packed anew for this CPU by a forward, which rounded "
            "its scales: load the model again, and save it before it runs"
        )
    try:
        module._parameters.update({name: a.load("cpu") if load else a.weight.template for name, a in away.items()})
        state = own_state(module)
    finally:
        module._parameters.update(away)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor) and name not in own}


def own_tensors(module: nn.Module) -> dict[str, tuple[Tensor, bool]]:
    """What a module itself holds: own name -> (tensor, whether it is a buffer)."""
    both = ((module._parameters, False), (module._buffers, True))
    return {own: (tensor, buffer) for held, buffer in both for own, tensor in held.items() if tensor is not None}


def repeated_blocks(model: nn.Module, named: Iterable[str] = ()) -> set[str]:
    """Classes of a model's repeated blocks, found by their place: numbered modules that hold no such module.

    Those are left out that are within, or around, a module of a class that is `named`.

    >>> repeated_blocks(nn.Sequential(nn.Sequential(nn.ReLU()), nn.TransformerEncoderLayer(4, 2)))
    {'TransformerEncoderLayer'}
    """
    return {*ModelSpec("", _Skeleton().module(model), no_split=tuple(named)).repeated_blocks}


def _read_config(model: nn.Module, root: ModuleSpec) -> tuple[dict[str, Any], tuple[Attention, ...]]:
    """Facts and attention from a transformers config, nothing from a model without one."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return {}, ()
    from ..model.config import attention, facts

    fields = config.to_dict()
    model_facts = facts(fields)
    if prefix := getattr(model, "base_model_prefix", ""):
        model_facts = {**model_facts, "has_head": hasattr(model, str(prefix))}  # a base model (LlamaModel) has none
    return model_facts, attention(fields, root)
