"""A model known by its weights alone: the headers of its safetensors files name every tensor with shape and dtype.

A header is a few kilobytes at the start of a file; from the Hub it comes by a range request (`fetch.py`).

Leaves out: what a header may say, and its checks (`model/header.py`); reading weights (`checkpoints/`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..model import config as reader
from ..model.header import DTYPES, CheckpointError, Entry, header_length, parse_header
from ..model.spec import ModelSpec, ModuleSpec, TensorSpec
from .errors import NoConfig
from .fetch import Fetched, NoSuchFile, fetch, whole
from .hub import Source

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST = 100_000  # bytes asked for at first: nearly all headers are shorter
LARGEST_INDEX = 100_000_000  # bytes
HEADS = ("lm_head", "score", "classifier", "head", "fc")  # of the modules that a file names, what works last
DEEPEST = 100  # parts of a tensor's name; real ones have up to 12

_Start = Callable[[str, int], Fetched]  # (file, bytes) -> its start; raises NoSuchFile


def headers(source: Source, token: str | bool | None = None) -> dict[str, TensorSpec]:
    """Every tensor of a model's safetensors files, by name, from the files' headers alone.

    Raises:
        NoConfig: there are no safetensors files, or one cannot be read.
        ZooError: the repository cannot be read.
    """
    folder, repo, revision = source.folder, source.repo, source.revision
    start: _Start = _reader(folder) if folder else lambda file, most: fetch(repo, revision, file, token, most)
    files = _named_by_index(start) or [SINGLE]
    if folder and not (folder / files[0]).is_file():
        files = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file()) or files
    try:
        with ThreadPoolExecutor(16) as pool:
            parts = list(pool.map(lambda file: _entries(start, file), files))
    except CheckpointError as error:
        raise NoConfig(f"the weights of {source} cannot be sized: {error}") from error
    except NoSuchFile as error:
        raise NoConfig(
            f"{source} has neither a config.json that bigkit can build nor all safetensors files whose headers it "
            f"could read ({error}): choose a folder or repository of a transformers or timm model"
        ) from error
    entries = {name: entry for part in parts for name, entry in part.items()}
    return {name: TensorSpec(entry.shape, DTYPES[entry.dtype][0]) for name, entry in entries.items()}


def _reader(folder: Path) -> _Start:
    def start(file: str, most: int) -> Fetched:
        path = folder / file
        if not path.is_file():  # a named pipe would wait for ever
            raise NoSuchFile(f"{folder} has no {file}")
        with open(path, "rb") as stream:
            return Fetched(stream.read(most), path.stat().st_size)

    return start


def _named_by_index(start: _Start) -> list[str]:
    """The files that the index names: other formats of the same weights may lie beside them."""
    try:
        text = whole(start(INDEX, LARGEST_INDEX), LARGEST_INDEX, INDEX)
        names = set(json.loads(text)["weight_map"].values())
        if all(Path(name).name == name for name in names):
            return sorted(names)
    except NoSuchFile:
        return []
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        pass
    raise NoConfig(f"{INDEX!r} is no index of safetensors files: it has no usable weight_map")


def _entries(start: _Start, file: str) -> dict[str, Entry]:
    first, size = start(file, FIRST)
    end = 8 + header_length(first, size, file)
    text = first if end <= len(first) else start(file, end).start
    return parse_header(text[8:end], end, size, file)


def spec_from_tensors(
    name: str, tensors: Mapping[str, TensorSpec], config: Mapping[str, Any] | None = None
) -> ModelSpec:
    """A model's record from the names of its tensors: the dots separate modules.

    Classes are not in a weight file. Numbered children make a "ModuleList" of "Block"s, which stay whole; a matrix
    called "weight" counts as linear unless its name says that it embeds or normalises. An output head comes last, where
    a model has it; files have their tensors in any order.

    >>> spec = spec_from_tensors("tiny", {"h.0.up.weight": TensorSpec((8, 2)), "h.1.up.weight": TensorSpec((8, 2))})
    >>> [(layer.name, layer.cls, layer.bytes()) for layer in spec.layers()]
    [('h.0', 'Block', 64), ('h.1', 'Block', 64)]
    """
    tree: dict[str, Any] = {}
    for full, tensor in tensors.items():
        *path, leaf = full.split(".")
        if len(path) >= DEEPEST:
            raise NoConfig(f"the tensor {full[:60]!r}... lies {len(path)} modules deep: expected fewer than {DEEPEST}")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
            if isinstance(node, TensorSpec):
                raise NoConfig(f"the tensor {full!r} lies inside another tensor: these are not a module's weights")
        node[leaf] = tensor
    modules: dict[str, ModuleSpec] = {}  # equal modules are one object

    def module(node: dict[str, Any], cls: str, own: str) -> ModuleSpec:
        own_tensors = {key: value for key, value in node.items() if isinstance(value, TensorSpec)}
        below = {key: value for key, value in node.items() if not isinstance(value, TensorSpec)}
        numbered = bool(below) and all(key.isdigit() for key in below)
        if numbered and cls == "Module":
            cls = "ModuleList"
        order = sorted(below, key=int) if numbered else sorted(below, key=lambda key: cls == "Model" and key in HEADS)
        children = {key: module(below[key], "Block" if numbered else "Module", key) for key in order}
        weight = own_tensors.get("weight")
        embeds = re.search(r"emb|wte|wpe|norm|ln_|shared", own) is not None
        linear = weight is not None and len(weight.shape) == 2 and not embeds
        key = repr((cls, own_tensors, [(name, id(child)) for name, child in children.items()], linear))
        return modules.setdefault(key, ModuleSpec(cls, own_tensors, children, linear))

    root = module(tree, "Model", "")
    facts, attention = (reader.facts(config), reader.attention(config, root)) if config else ({}, ())
    head = any(name.partition(".")[0] in HEADS for name in tensors)
    return ModelSpec(name, root, (), ("Block",), attention, {**facts, "has_head": head}, "safetensors")
