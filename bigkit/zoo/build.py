"""From a config to the real model, on the meta device: the classes of Transformers, timm or bigkit, without memory.

The classic estimate builds what `AutoModel` gives, without the output head (`base=True`); a model that is to be run has
the head its config names (`base=False`). timm's and bigkit's models come in one form only.

Leaves out: where configs come from (`catalog.py`, `hub.py`) and weights (`bigkit.checkpoints.load`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..model.config import stored_dtype
from ..model.spec import ModelSpec
from ..units import dtype_name
from ._transformers import builds, from_config
from .errors import NoConfig, RemoteCodeNeeded, UnknownModel, ZooError
from .fetch import printable

if TYPE_CHECKING:
    import torch
    from torch import nn

MOST_PARTS = 100_000  # layers or experts; a config that says more would be built for hours
# What to try when a config names no architecture that the installed Transformers knows.
_HEADS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText", "AutoModelForMaskedLM")


def library_of(config: Mapping[str, Any]) -> str | None:
    """Which library a config.json belongs to: "transformers", "timm", "bigkit", or None if it does not say.

    >>> library_of({"model_type": "llama"}), library_of({"architecture": "resnet50"})
    ('transformers', 'timm')
    """
    if config.get("model_type") == "bigkit-gpt":
        return "bigkit"
    if "model_type" in config:
        return "transformers"
    return "timm" if isinstance(config.get("architecture"), str) else None


def knows(config: Mapping[str, Any]) -> bool:
    """Whether the installed libraries have classes for this config, without code from its repository."""
    library = library_of(config)
    if library == "transformers":
        from transformers import CONFIG_MAPPING

        return config["model_type"] in CONFIG_MAPPING
    return library is not None


def build(
    config: Mapping[str, Any], *, base: bool = False, dtype: object = "float32", remote: Mapping[str, Any] | None = None
) -> nn.Module:
    """An empty model: parameters on the meta device, buffers real.

    Args:
        config: a parsed config.json.
        base: without the output head, as `AutoModel.from_config` builds it.
        dtype: of the parameters; None takes the checkpoint's (`stored_dtype`).
        remote: where its code may be loaded from, as arguments of `AutoConfig.from_pretrained`; None forbids that.

    Raises:
        RemoteCodeNeeded: only code from the model's repository can build it, and `remote` is None.
        UnknownModel: no installed library has its classes.
        NoConfig: its numbers make no model.
    """
    library = library_of(config)
    if library is None:
        raise NoConfig('this config.json has neither a "model_type" (transformers) nor an "architecture" (timm)')
    for name, number in config.items():
        if re.match(r"(n|num)_.*(layer|block|expert)", name) and isinstance(number, int):
            if number > MOST_PARTS:
                raise NoConfig(f"config.json says {name} = {number}: expected at most {MOST_PARTS}")
            if number < 0:
                raise NoConfig(f"config.json says {name} = {number}: expected at least 0")
    try:
        import torch

        wanted: torch.dtype = getattr(torch, dtype_name(stored_dtype(config) if dtype in (None, "auto") else dtype))
        if library == "transformers":
            return _transformers(config, base, wanted, remote)
        model = _bigkit(config) if library == "bigkit" else _timm(config)
        return model.to(wanted)
    except (ZooError, ImportError):
        raise
    except Exception as error:  # what a stranger's numbers lead to in the classes of a library
        raise NoConfig(f"config.json builds no model ({type(error).__name__}: {printable(error)})") from error


def can_build(config: Mapping[str, Any]) -> bool:
    """Whether `build` can make it; with an "auto_map" it can, and says on what condition. Without torch it cannot."""
    if find_spec("torch") is None or find_spec(library_of(config) or "torch") is None:
        return False
    return knows(config) or (library_of(config) is not None and "auto_map" in config)


def spec_of(model: nn.Module, name: str, config: Mapping[str, Any]) -> ModelSpec:
    """The record of a model built from `config`, with the facts and the KV cache that the config tells."""
    from ..meta.skeleton import spec_from_module
    from ..model import config as reader

    spec, library = spec_from_module(model, name, trace_cache=True), library_of(config) or ""
    facts, attention = dict(spec.facts), spec.attention
    if library == "transformers":  # the built config says in which dtype it was built, the file how weights are stored
        facts |= {"torch_dtype": stored_dtype(config)}
    elif library == "bigkit":
        facts, attention = reader.facts(config), reader.attention(config, spec.root)
    elif library == "timm":
        facts = {"architecture": config["architecture"], **_timm_facts(model), **facts}
    return replace(spec, facts={**facts, "has_head": _has_head(model, library)}, attention=attention, library=library)


def _has_head(model: nn.Module, library: str) -> bool:
    """Whether the model ends in an output head: all do, but for the base classes of Transformers."""
    if library != "transformers":
        return True
    from transformers import MODEL_MAPPING

    settings = getattr(model, "config", None)
    if type(settings) in MODEL_MAPPING:
        base = MODEL_MAPPING[type(settings)]
        return type(model) not in (base if isinstance(base, (tuple, list)) else (base,))
    return getattr(model, "base_model", model) is not model


def _bigkit(config: Mapping[str, Any]) -> nn.Module:
    from ..meta.empty import init_empty_weights
    from .gpt import GPT, GPTConfig

    with init_empty_weights():
        return GPT(GPTConfig.from_dict(config))


def _timm(config: Mapping[str, Any]) -> nn.Module:
    from ..meta.empty import init_empty_weights

    architecture = config["architecture"]
    timm = _import("timm", f"the timm model {architecture!r}")
    options = {name: config[name] for name in ("num_classes",) if config.get(name) is not None}
    options |= config.get("model_args") or {}
    try:
        with init_empty_weights():
            model: nn.Module = timm.create_model(architecture, pretrained=False, **options)
            return model
    except RuntimeError as error:  # an unknown name, or a known one with an unknown tag
        raise UnknownModel(
            f"timm {timm.__version__} has no model {architecture!r} ({error}): see timm.list_models(pretrained=True)"
        ) from error


def _timm_facts(model: nn.Module) -> dict[str, Any]:
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    facts = {"image_size": size[-1] if size else None}
    facts |= {name: getattr(model, name, None) for name in ("num_features", "num_classes")}
    return {name: value for name, value in facts.items() if value is not None}


def _transformers(
    config: Mapping[str, Any], base: bool, wanted: torch.dtype, remote: Mapping[str, Any] | None
) -> nn.Module:
    from ..meta.empty import init_empty_weights

    transformers = _import("transformers", f"a model of type {config['model_type']!r}")
    if knows(config):
        try:
            settings = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        except Exception as error:  # each config class has its own checks and its own exceptions
            kind = config["model_type"]
            raise NoConfig(f"this is no valid config of model type {kind!r}: {printable(error)}") from error
        options: dict[str, Any] = {}
    elif "auto_map" not in config:
        raise UnknownModel(
            f"transformers {transformers.__version__} knows no model type {config['model_type']!r}: upgrade it, "
            'or size the weights alone with library_name="safetensors"'
        )
    elif remote is None:
        raise RemoteCodeNeeded(
            f"the model type {config['model_type']!r} is built by code in its own repository: read that code and pass "
            'trust_remote_code=True, or size its weights alone with library_name="safetensors"'
        )
    else:
        settings = transformers.AutoConfig.from_pretrained(**remote, trust_remote_code=True)
        options = {"trust_remote_code": True}
    quiet = logging.getLogger("transformers")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # "generation flags", "tied weights": nothing that concerns an empty model
    try:
        with init_empty_weights():
            model = _construct(transformers, settings, base, wanted, options)
    finally:
        quiet.setLevel(level)
    if callable(tie := getattr(model, "tie_weights", None)):
        tie()
    return model


def _construct(transformers: Any, settings: Any, base: bool, dtype: Any, options: dict[str, Any]) -> nn.Module:
    for architecture in () if base or options else getattr(settings, "architectures", None) or ():
        if cls := getattr(transformers, architecture, None):
            return from_config(cls, settings, dtype)
    remote = [name for name in getattr(settings, "auto_map", None) or () if name.startswith("AutoModel") and options]
    heads = [name for name in remote or _HEADS if name != "AutoModel"]
    for name in ("AutoModel", *heads) if base else (*heads, "AutoModel"):
        auto = getattr(transformers, name)
        if name in remote or builds(auto, settings):
            return auto.from_config(settings, dtype=dtype, **options)
    raise UnknownModel(f"transformers {transformers.__version__} builds no model from a {type(settings).__name__}")


def _import(module: str, what: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{what} needs {module}, which is not installed: pip install {module}") from error
