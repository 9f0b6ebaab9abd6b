"""How a checkpoint is cut into files, from names and sizes alone.

`cut` fills file after file in the order of the tensors, with the rule of huggingface_hub, so that the files are those
that Transformers would write; `save_model` writes these files. `cut_model` does the same for a model that is only
described: no weights, no torch.

Leaves out: reading and writing (`checkpoints/load.py`).
Format of the index: that of Hugging Face Transformers (`weight_map`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..model.spec import ModelSpec
from ..units import dtype_name, parse_bytes


@dataclass(frozen=True)
class Cut:
    """A checkpoint cut into files.

    Args:
        limit: the most bytes that the tensors of a file may have together; a larger tensor has a file of its own.
        files: file name -> tensor name -> bytes, all in the order of writing.
        ties: name that is not stored -> the name under which its tensor is.
        model: what the model is called, with the dtype if there is one.
    """

    limit: int
    files: Mapping[str, Mapping[str, int]]
    ties: Mapping[str, str] = field(default_factory=dict)
    model: str = ""

    @property
    def sizes(self) -> dict[str, int]:
        """File name -> bytes of its tensors. On disk its header comes on top, about a hundred bytes a tensor."""
        return {file: sum(tensors.values()) for file, tensors in self.files.items()}

    @property
    def bytes(self) -> int:
        """Bytes of all tensors: the index's `total_size`."""
        return sum(self.sizes.values())

    @property
    def weight_map(self) -> dict[str, str]:
        """Tensor name -> the file that holds it."""
        return {name: file for file, tensors in self.files.items() for name in tensors}

    @property
    def alone(self) -> tuple[str, ...]:
        """Tensors larger than the limit."""
        return tuple(name for tensors in self.files.values() for name, size in tensors.items() if size > self.limit)

    def find(self, part: str) -> dict[str, str]:
        """The file of every tensor whose name contains `part`, those under a tied name included.

        >>> from bigkit import describe
        >>> cut_model(describe("gpt2"), "200MB").find("lm_head")
        {'lm_head.weight': 'model-00001-of-00003.safetensors'}
        """
        files = self.weight_map
        names = [*files, *self.ties]
        return {name: files[self.ties.get(name, name)] for name in names if part in name}

    def index(self) -> str:
        """The text of the index: which file holds which tensor. Readers need it if there is more than one file."""
        content = {"metadata": {"total_size": self.bytes}, "weight_map": self.weight_map}
        return json.dumps(content, indent=2) + "\n"


def cut(
    sizes: Mapping[str, int], max_shard_size: int | str = "10GB", file: str = "model.safetensors", generation: str = ""
) -> Cut:
    """Cut a checkpoint into files of at most `max_shard_size`.

    Tensors go into the open file in their order until the next one would make it too large; then a new file is opened.
    A tensor larger than the limit gets a file of its own, and the open file stays open.

    Args:
        sizes: tensor name -> bytes.
        max_shard_size: the limit, as a number of bytes or text ("5GB"); headers do not count.
        file: what the file is called if one is enough; otherwise its parts are numbered.
        generation: what goes before these numbers, to tell them from those of an earlier save.

    Raises:
        ValueError: the limit is no size, or less than one byte.

    Source: the rule of `split_state_dict_into_shards_factory` in huggingface_hub, with which tests compare it. The
    static pages run this one, where huggingface_hub is not.

    >>> for file, tensors in cut({"a": 6, "b": 20, "c": 3, "d": 4}, 10).files.items():
    ...     print(file, tensors)
    model-00001-of-00003.safetensors {'b': 20}
    model-00002-of-00003.safetensors {'a': 6, 'c': 3}
    model-00003-of-00003.safetensors {'d': 4}
    """
    limit = read_limit(max_shard_size)
    groups: list[list[str]] = []  # in the order in which files are full
    opened, filled = list[str](), 0
    for name, size in sizes.items():
        if size > limit:
            groups.append([name])
            continue
        if filled + size > limit:
            groups.append(opened)
            opened, filled = [], 0
        opened.append(name)
        filled += size
    groups += [opened] if opened else []
    stem, _, ending = file.rpartition(".")
    count = len(groups)
    parts = [f"{stem}{generation}-{number:05}-of-{count:05}.{ending}" for number in range(1, count + 1)]
    files = dict(zip(parts, groups)) if count > 1 else {file: list(sizes)}
    return Cut(limit, {file: {name: sizes[name] for name in names} for file, names in files.items()})


def read_limit(max_shard_size: int | str) -> int:
    """The most bytes of a file.

    Raises:
        ValueError: it is no size, or less than one byte.
    """
    limit = parse_bytes(max_shard_size)
    if limit < 1:
        raise ValueError(f"max_shard_size must be at least one byte, not {max_shard_size!r}")
    return limit


def cut_model(
    spec: ModelSpec, max_shard_size: int | str = "10GB", dtype: str | None = None, file: str = "model.safetensors"
) -> Cut:
    """The files that `save_model` would write for a model, which need not exist.

    Parameters and persistent buffers are stored; tied tensors once, under their first name.

    Args:
        spec: the model, as `bigkit.describe` gives it.
        max_shard_size, file: as in `cut`.
        dtype: what floating tensors are cast to; None takes what the spec says.

    Raises:
        ValueError: the limit is no size, or less than one byte; or the dtype is unknown.

    >>> from bigkit import describe
    >>> files = cut_model(describe("llama-2-7b"), "5GB", "bfloat16")
    >>> files.find("lm_head"), len(files.files)
    ({'lm_head.weight': 'model-00003-of-00003.safetensors'}, 3)
    """
    group = {name: names[0] for names in spec.ties for name in names}
    first: dict[str, str] = {}
    sizes: dict[str, int] = {}
    ties: dict[str, str] = {}
    for name, (tensor, _) in spec.tensors.items():
        if not tensor.persistent:
            continue
        owner = first.setdefault(group.get(name, name), name)
        if owner == name:
            sizes[name] = tensor.bytes(dtype)
        else:
            ties[name] = owner
    title = f"{spec.name}, {'as stored' if dtype is None else dtype_name(dtype)}"
    return replace(cut(sizes, max_shard_size, file), ties=ties, model=title)
