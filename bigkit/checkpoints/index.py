"""Which files a checkpoint consists of: where to start in a folder, and the index that says which tensor is where.

Every claim of an index is checked. Format: `weight_map` of Hugging Face Transformers.
Leaves out: the files themselves (`format.py`).
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from ..model.header import CheckpointError as CheckpointError
from ..model.header import no_weights
from ..units import listed

# Tried in this order in a folder; the same as Transformers.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def start_of_folder(folder: Path) -> Path:
    """The file of a folder that a reader starts with."""
    for name in (SINGLE, INDEX, PICKLE, PICKLE_INDEX):
        if (folder / name).exists():
            return folder / name
    for pattern in ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*.index.json", "*.bin"):
        files = sorted(folder.glob(pattern))
        if len(files) == 1:
            return files[0]
        if files:
            if len(indexes := list(folder.glob("*.index.json"))) == 1:
                return indexes[0]
            names = listed(file.name for file in files)
            raise CheckpointError(f"{folder} has several files and no index: {names}; name one of them")
    expected = f"{SINGLE}, {INDEX}, {PICKLE} or {PICKLE_INDEX}"
    raise FileNotFoundError(f"there is no checkpoint in {folder}: expected {expected}")


def files_of_index(index: Path) -> dict[Path, list[str] | None]:
    """The files that an index names, each with the tensors that it says are in it."""
    names_of: dict[str, list[str]] = {}
    for name, file in read_index(index).items():
        names_of.setdefault(file, []).append(name)
    return {index.parent / file: names for file, names in names_of.items()}


def read_index(path: Path) -> dict[str, str]:
    """The index of a checkpoint: tensor name -> file name, all of them in the folder of the index.

    Raises:
        CheckpointError: it is no index, or names a file outside of its folder.
    """
    text = path.read_bytes()
    if fault := no_weights(text[:256]):
        raise CheckpointError(f"the index {path} {fault}")
    try:
        content = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the index {path} is no valid JSON: {error}") from error
    weight_map = content.get("weight_map", content) if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"the index {path} has no weight_map of tensor names to files")
    checked: set[str] = set()
    for name, file in weight_map.items():
        if not isinstance(file, str) or file not in checked:
            if fault := _fault(file):
                raise CheckpointError(f"the index {path} puts {name!r} into {file!r}, {fault}")
            checked.add(file)
    return weight_map


def _fault(file: Any) -> str:
    """What is wrong with a file name in an index, if anything."""
    if not isinstance(file, str) or not file or file[0] == "/" or ".." in PurePosixPath(file).parts:
        return "which is no file in its folder"
    if any(sign in file for sign in ("\\", "\0", ":")):
        return "which is no file in its folder"
    return "" if file.endswith((".safetensors", ".bin", ".pt", ".pth")) else "expected .safetensors or .bin"
