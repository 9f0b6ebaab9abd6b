"""`accelerate.utils.offload`: tensors in files of their own, one `.dat` each, and mappings that read them when asked.

bigkit itself writes no such folders (weights on disk are ranges of safetensors files), but `dispatch_model` reads them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoints.format import Checkpoint
from ...units import dtype_name

Folder = str | os.PathLike[str]


def offload_weight(
    weight: Tensor, weight_name: str, offload_folder: Folder, index: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """Write a tensor to `<weight_name>.dat` in a folder.

    Args:
        weight: the tensor.
        weight_name, offload_folder: where to.
        index: is given an entry for it, and returned.
    """
    flat = weight.detach().cpu().contiguous().reshape(-1)
    Path(offload_folder, f"{weight_name}.dat").write_bytes(flat.view(torch.uint8).numpy().data if len(flat) else b"")
    if index is not None:
        index[weight_name] = {"dtype": dtype_name(weight.dtype), "shape": list(weight.shape)}
    return index


def load_offloaded_weight(weight_file: Folder, weight_info: Mapping[str, Any]) -> Tensor:
    """Read a tensor that `offload_weight` wrote; `weight_info` is its entry in the index.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     index = offload_weight(torch.arange(3), "a", folder, {})
    ...     load_offloaded_weight(f"{folder}/a.dat", index["a"])
    tensor([0, 1, 2])
    """
    shape, dtype = weight_info["shape"], getattr(torch, dtype_name(weight_info["dtype"]))
    if not (count := math.prod(shape)):
        return torch.empty(shape, dtype=dtype)
    raw = bytearray(Path(weight_file).read_bytes())
    if len(raw) != count * dtype.itemsize:
        raise ValueError(f"{weight_file} has {len(raw)} bytes, and {shape} {dtype} takes {count * dtype.itemsize}")
    return torch.frombuffer(raw, dtype=dtype).reshape(shape)


def save_offload_index(index: Mapping[str, Any] | None, offload_folder: Folder) -> None:
    """Add entries to the `index.json` of a folder."""
    if index:
        file = Path(offload_folder, "index.json")
        old = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        file.write_text(json.dumps({**old, **index}, indent=2), encoding="utf-8")


def offload_state_dict(save_dir: Folder, state_dict: Mapping[str, Tensor]) -> None:
    """Write tensors and their index to a folder, which is made if it is not there."""
    os.makedirs(save_dir, exist_ok=True)
    index: dict[str, Any] = {}
    for name, tensor in state_dict.items():
        offload_weight(tensor, name, save_dir, index)
    save_offload_index(index, save_dir)


class PrefixedDataset(Mapping[str, Tensor]):
    """The part of a mapping whose keys begin with a prefix, by keys without it."""

    def __init__(self, dataset: Mapping[str, Tensor], prefix: str) -> None:
        self.dataset, self.prefix = dataset, prefix

    def __getitem__(self, key: str) -> Tensor:
        return self.dataset[self.prefix + key]

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(self.prefix) for key in self.dataset if key.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class OffloadedWeightsLoader(Mapping[str, Tensor]):
    """Tensors of a dict and of files, read when they are asked for.

    Args:
        state_dict: name -> tensor; these come first.
        save_folder: a folder that `offload_state_dict` wrote.
        index: name -> {"safetensors_file", "weight_name", "dtype"} or an entry of `offload_weight`; None takes that of
            the folder.
        device: where tensors of safetensors files go; None is the CPU.

    Raises:
        ValueError: none of the three is given.
    """

    def __init__(
        self, state_dict: Mapping[str, Tensor] | None = None, save_folder: Folder | None = None,
        index: Mapping[str, Mapping[str, Any]] | None = None, device: torch.device | str | int | None = None,
    ) -> None:  # fmt: skip
        if state_dict is None and save_folder is None and index is None:
            raise ValueError("OffloadedWeightsLoader needs a state_dict, a save_folder or an index, and none is given")
        if index is None and save_folder is not None:
            index = json.loads(Path(save_folder, "index.json").read_text(encoding="utf-8"))
        self.state_dict, self.save_folder, self.index = state_dict or {}, save_folder, index or {}
        self.device = device
        self.all_keys = [*dict.fromkeys((*self.state_dict, *self.index))]
        self._files: dict[str, Checkpoint] = {}

    def __getitem__(self, key: str) -> Tensor:
        if key in self.state_dict:
            return self.state_dict[key]
        entry = self.index[key]
        file = entry.get("safetensors_file")
        if file is None:
            return load_offloaded_weight(Path(self.save_folder or "", f"{key}.dat"), entry)
        if file not in self._files:
            self._files[file] = Checkpoint.open(file)
        dtype = getattr(torch, dtype_name(entry["dtype"])) if "dtype" in entry else None
        tensor = self._files[file].read(entry.get("weight_name", key))
        return tensor.to(device="cpu" if self.device is None else self.device, dtype=dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.all_keys)

    def __len__(self) -> int:
        return len(self.all_keys)


def extract_submodules_state_dict(
    state_dict: Mapping[str, Tensor], submodule_names: Iterable[str]
) -> dict[str, Tensor]:
    """The tensors that lie in some modules.

    >>> extract_submodules_state_dict({"h.1.a": torch.ones(1), "h.10.a": torch.ones(1)}, ["h.1"])
    {'h.1.a': tensor([1.])}
    """
    return {
        key: tensor
        for name in submodule_names
        for key, tensor in state_dict.items()
        if key == name or key.startswith(f"{name}.")
    }
