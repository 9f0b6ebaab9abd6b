"""From a name to a model: `describe` gives its record, `empty_model` the module itself, on the meta device.

A name is looked up in this order:

    1. a shipped model, by short name, Hub id or alias, in any case; no torch, no network
       ("llama-2-7b", "meta-llama/Llama-2-7b-hf", "https://huggingface.co/meta-llama/Llama-2-7b-hf/tree/main")
    2. a local folder with config.json, or with safetensors files alone ("./gpt2" where "gpt2" is shipped)
    3. a timm model ("resnet18", "resnet18.a1_in1k", "timm/resnet18", "hf-hub:timm/resnet18.a1_in1k")
    4. a Hub id or URL: its config.json; where that tells nothing, the headers of its safetensors files

A revision other than "main" is asked of the Hub even if the model is shipped.

Leaves out: weights (`bigkit.checkpoints.load`); those of `pygpt` are loaded by `bigkit.zoo.gpt.load_pygpt`.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..zoo import catalog
from .catalog import ENTRIES, Entry, names
from .errors import BadURL, GatedModel, NoConfig, OfflineError, RemoteCodeNeeded, UnknownModel, ZooError

if TYPE_CHECKING:
    from torch import nn

    from ..model.spec import ModelSpec
    from .hub import Source

__all__ = [
    "ENTRIES", "BadURL", "Entry", "GatedModel", "NoConfig", "OfflineError", "RemoteCodeNeeded", "UnknownModel",
    "ZooError", "describe", "empty_model", "names",
]  # fmt: skip

LIBRARIES = ("transformers", "timm", "bigkit", "safetensors")
_TIMM = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)?")  # timm's names; a hyphen or a capital is never among them


def describe(
    name: str | os.PathLike[str],
    library_name: str | None = None,
    *,
    base: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> ModelSpec:
    """The record of a model: its layers, ties, KV cache and facts.

    Args:
        name: a shipped name, a folder, a timm name, a Hub id or a Hub URL.
        library_name: "transformers", "timm", "bigkit", or "safetensors" to size the weights alone from their headers;
            None finds out.
        base: without the output head, as `AutoModel` builds it: what the classic estimate counts.
        trust_remote_code: allow code from the model's repository to run.
        revision: branch, tag or commit on the Hub.
        token: for gated and private models; None takes the one that `hf auth login` stored.

    Raises:
        ZooError: `UnknownModel`, `GatedModel`, `OfflineError`, `BadURL`, `NoConfig` or `RemoteCodeNeeded`, each saying
            what to do.

    >>> spec = describe("meta-llama/Llama-2-7b-hf")
    >>> spec.parameters, len(spec.attention), spec.facts["hidden_size"]
    (6738415616, 32, 4096)
    """
    found, label = _resolve(name, library_name, revision)
    if isinstance(found, Entry):
        return _named(catalog.specs(found.name)["base" if base else "full"], label)
    from ..zoo import build, hub

    config, remote = _config(found, library_name, trust_remote_code, token)
    if config is None or not _usable(config):
        assert isinstance(found, hub.Source)  # shipped and timm models always have a usable config
        return hub.spec_from_tensors(label, hub.headers(found, token), config)
    model = build.build(config, base=base, remote=remote)
    return build.spec_of(model, label, build.library_of(config) or "", build.has_head(config, model), config)


def empty_model(
    name: str | os.PathLike[str],
    library_name: str | None = None,
    *,
    base: bool = False,
    dtype: object = "float32",
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> nn.Module:
    """The model itself, without memory: parameters on the meta device, buffers real.

    Args:
        name, library_name, base, trust_remote_code, revision, token: as in `describe`.
        dtype: of the parameters, a torch dtype or its name; None takes the one that the config names.

    Raises:
        ZooError: as `describe`; a model known by its weights alone cannot be built.
        ImportError: the library that builds it is not installed.

    >>> model = empty_model("gpt2")
    >>> sum(parameter.numel() for parameter in model.parameters()), next(model.parameters()).device.type
    (124439808, 'meta')
    """
    found, label = _resolve(name, library_name, revision)
    from ..zoo import build

    config, remote = _config(found, library_name, trust_remote_code, token)
    if config is None:
        raise NoConfig(f"{label!r} has no config.json that says how to build it: only `describe` can size its weights")
    return build.build(config, base=base, dtype=dtype, remote=remote)


# ---------------------------------------------------------------------------------------------------------------------
# The resolver


def _resolve(
    name: str | os.PathLike[str], library_name: str | None, revision: str | None
) -> tuple[Entry | Source | str, str]:
    """What `name` means, and what to call it: a shipped entry, a place, or the name of a timm model."""
    name = os.fspath(name) if isinstance(name, os.PathLike) else name
    if not isinstance(name, str) or not name.strip():
        raise UnknownModel(f"a model's name must be a text that is not empty, not {name!r}")
    if library_name not in (None, *LIBRARIES):
        raise ZooError(f"library_name must be None or one of {', '.join(LIBRARIES)}, not {library_name!r}")
    name = name.strip()
    label = name.removeprefix("hf-hub:").removeprefix("hf_hub:")
    if "/" in name and "." in name:  # may be a URL; only then is the parser worth its import
        from ..zoo import hub

        if url := hub.parse_url(name):
            label, revision = url[0], revision or url[1]
    entry = catalog.find(label)
    if entry and library_name in (None, entry.library) and revision in (None, "main"):
        return entry, label
    from ..zoo import hub

    if folder := hub.folder_of(name):
        return hub.Source(folder=folder), name
    bare = label.removeprefix("timm/")
    if library_name == "timm" or label.startswith("timm/") or (library_name is None and _TIMM.fullmatch(label)):
        if revision in (None, "main") and _is_timm(bare, library_name):
            return bare, label
    if not hub.is_repo(label):
        raise UnknownModel(
            f"{name!r} is no model name: expected a shipped name, a folder, or a Hub id OWNER/MODEL."
            + hub.shipped_hint(name)
        )
    return hub.Source(repo=label, revision=revision), label


def _is_timm(name: str, library_name: str | None) -> bool:
    try:
        import timm
    except ImportError:
        if library_name == "timm":
            raise
        return False
    return timm.is_model(name.partition(".")[0])


def _config(
    found: Entry | Source | str, library_name: str | None, trust: bool, token: str | bool | None
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The config of what was found (None: go by the weights), and where its code may come from (None: nowhere)."""
    if isinstance(found, Entry):
        return catalog.config(found), None
    if isinstance(found, str):
        return {"architecture": found}, None  # with its tag: timm takes the number of classes from it
    from ..zoo import build, hub

    config = None if library_name == "safetensors" else hub.read_config(found, token)
    library = library_name if config is None else build.library_of(config)
    if library_name is not None and library not in (library_name, None):
        raise ZooError(f"{found} is a {library} model, by its config.json: it cannot be built with {library_name}")
    place = {"pretrained_model_name_or_path": str(found), "revision": found.revision or "main", "token": token}
    return config, place if trust else None


def _usable(config: dict[str, Any]) -> bool:
    """Whether the model can be built; with an "auto_map" it can, and `build` says on what condition."""
    from ..zoo import build

    return build.library_of(config) is not None and (build.knows(config) or "auto_map" in config)


def _named(spec: ModelSpec, name: str) -> ModelSpec:
    return spec if spec.name == name else replace(spec, name=name)
