"""Pipelines of Diffusers: a folder or repository with a `model_index.json` that names a class for each component.

Only configs are read. Each component is built empty by its own class, of Diffusers or Transformers; schedulers,
tokenizers and processors hold no weights that count.

Leaves out: what a component computes with (`dryrun/components.py`), and single-file checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..model.pipeline import order
from .build import build
from .fetch import fetch, printable, whole
from .hub import LARGEST_CONFIG, Source, folder_of, is_repo, parse_url, read_json

if TYPE_CHECKING:
    from torch import nn

INDEX = "model_index.json"


def find_pipeline(
    name: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None
) -> tuple[Source, dict[str, Any]] | None:
    """Where a pipeline is, and its index; None if a folder or repository has none.

    Raises:
        ZooError: the repository cannot be read, or the index is no JSON object.
    """
    text = os.fspath(name)
    url = parse_url(text) if "/" in text and "." in text else None
    folder = folder_of(text)
    label = url[0] if url else text
    if folder is None and not is_repo(label):
        return None
    source = Source(folder=folder) if folder else Source(repo=label, revision=revision or (url and url[1]) or None)
    index = _read(source, INDEX, token)
    return None if index is None else (source, index)


def empty_components(
    source: Source, index: dict[str, Any], dtype: object = "bfloat16", token: str | bool | None = None
) -> Iterator[tuple[str, str, nn.Module | str]]:
    """(name, phase, model) of each component that has weights, in the order in which they work.

    A component that cannot be built is a text that says why.
    """
    import diffusers

    pipeline = getattr(diffusers, str(index.get("_class_name", "")), None)
    sequence = str(getattr(pipeline, "model_cpu_offload_seq", None) or "")
    entries = {
        name: entry for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)
    }  # fmt: skip
    for name, phase in order([*entries], sequence):
        library, cls = entries[name]
        config = _read(source, f"{name}/config.json", token)
        if config is not None:
            yield name, phase, _component(library, cls, config, dtype)


def _component(library: str, cls: str, config: dict[str, Any], dtype: object) -> nn.Module | str:
    from ..meta.empty import init_empty_weights

    try:
        if library == "transformers":
            return build({**config, "architectures": [cls]}, dtype=dtype)
        import diffusers
        import torch

        made = getattr(diffusers, cls, None) if library == "diffusers" else None
        if made is None or not issubclass(made, torch.nn.Module):
            return f"it is a {cls} of {library}, which neither Diffusers nor Transformers has"
        from ..units import dtype_name

        with init_empty_weights():
            model: nn.Module = made.from_config(config)
        return torch.nn.Module.to(model, getattr(torch, dtype_name(dtype)))  # Diffusers' own warns of no modules at all
    except Exception as error:  # what a stranger's numbers lead to in the classes of a library
        return f"its config builds no {cls} ({type(error).__name__}: {printable(error)})"


def _read(source: Source, file: str, token: str | bool | None) -> dict[str, Any] | None:
    """A JSON file of a folder or repository, or None if there is none."""

    def download() -> bytes:
        return whole(fetch(source.repo, source.revision, file, token, LARGEST_CONFIG), LARGEST_CONFIG, file)

    return read_json(source, file, f"{file} of {source}", download)
