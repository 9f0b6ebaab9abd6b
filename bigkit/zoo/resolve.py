"""From a name to a model: `describe` gives its record, `empty_model` the module itself, on the meta device.

Leaves out: what ships (`catalog.py`), the Hub and folders (`hub.py`), building (`build.py`), weights (`checkpoints/`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..model import stored
from ..model.spec import ModelSpec, TensorSpec
from . import catalog
from .catalog import Entry
from .errors import NoConfig, UnknownModel, ZooError

if TYPE_CHECKING:
    from torch import nn

    from .hub import Source

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
    """The record of a model: its layers, ties, KV cache and facts, with its weights in the checkpoint's dtype.

    Args:
        name: a shipped name, a folder, a GGUF file, a timm name, a Hub id or a Hub URL.
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
    if str(name).lower().endswith(".gguf"):
        from .gguf import describe_gguf

        return describe_gguf(os.fspath(name))
    source, label = _resolve(name, library_name, revision)
    if isinstance(source, Entry):
        spec = catalog.specs(source.name)["base" if base else "full"]
        return spec if spec.name == label else replace(spec, name=label)  # the same object keeps what it counted
    from . import build, headers, hub

    with _named(label):
        config, remote = _config(source, library_name, trust_remote_code, token)
        if config is None or not build.can_build(config):
            assert isinstance(source, hub.Source)  # timm models always have a usable config
            return headers.spec_from_tensors(label, headers.headers(source, token), config)
        model = build.build(config, base=base, dtype=None, remote=remote)
        spec = build.spec_of(model, label, config)
        files = None
        if "quantization_config" in spec.facts and isinstance(source, hub.Source):
            with suppress(ZooError):  # without files sizes follow from the config
                files = headers.headers(source, token)
        return stored.with_stored(spec, files)


def stored_tensors(name: str | os.PathLike[str]) -> dict[str, TensorSpec]:
    """What a quantized repository has of its weights: every tensor of its files, or where these cannot be reached those
    that its config tells of; nothing if it is not quantized, or in a way that is not known.

    >>> stored_tensors("gpt-oss-20b")["model.layers.0.mlp.experts.down_proj_scales"].shape
    (32, 2880, 90)
    """
    spec = describe(name)
    if "decoding" not in spec.facts:
        return {}
    source, _ = _resolve(name, None, None)
    from . import headers, hub

    if isinstance(source, hub.Source):
        with suppress(ZooError):
            return headers.headers(source)
    return stored.tensors_told(spec)


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
        dtype: of the parameters, a torch dtype or its name; None takes the checkpoint's, as `describe` has it.

    Raises:
        ZooError: as `describe`; a model known by its weights alone cannot be built.
        ImportError: the library that builds it is not installed.

    >>> model = empty_model("gpt2")
    >>> sum(parameter.numel() for parameter in model.parameters()), next(model.parameters()).device.type
    (124439808, 'meta')
    """
    if str(name).lower().endswith(".gguf"):
        raise NoConfig(f"{name} is a GGUF file, which llama.cpp runs: `bigkit plan` prints its command line")
    source, label = _resolve(name, library_name, revision)
    from . import build

    with _named(label):
        config, remote = _config(source, library_name, trust_remote_code, token)
        if config is None:
            raise NoConfig("there is no config.json that says how to build it: only `describe` can size its weights")
        return build.build(config, base=base, dtype=dtype, remote=remote)


@contextmanager
def _named(label: str) -> Iterator[None]:
    """What goes wrong with a model begins with its name."""
    try:
        yield
    except ZooError as error:
        if label in str(error):
            raise
        raise type(error)(f"{label}: {error}") from error


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
        from . import hub

        if url := hub.parse_url(name):
            label, revision = url[0], revision or url[1]
    entry = catalog.find(label)
    if entry and library_name in (None, entry.library) and revision in (None, "main"):
        return entry, label
    from . import hub

    if folder := hub.folder_of(name):
        return hub.Source(folder=folder), name
    bare = label.removeprefix("timm/")
    if library_name == "timm" or label.startswith("timm/") or (library_name is None and _TIMM.fullmatch(label)):
        if revision in (None, "main") and _is_timm(bare, library_name):
            return bare, label
    if "/" not in label and library_name is None and revision is None and (entry := catalog.alike(label)):
        return entry, entry.name
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
    source: Entry | Source | str, library_name: str | None, trust: bool, token: str | bool | None
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The config (None: go by the weights), and where its code may come from (None: nowhere)."""
    if isinstance(source, Entry):
        return catalog.config(source), None
    if isinstance(source, str):
        return {"architecture": source}, None  # with its tag: timm takes the number of classes from it
    from . import build, hub

    config = None if library_name == "safetensors" else hub.read_config(source, token)
    library = library_name if config is None else build.library_of(config)
    if library_name is not None and library not in (library_name, None):
        raise ZooError(f"{source} is a {library} model, by its config.json: it cannot be built with {library_name}")
    place = {"pretrained_model_name_or_path": str(source), "revision": source.revision or "main", "token": token}
    return config, place if trust else None
