"""The results of all processes, whole and in the order of the inputs, on every process.

    with state.split_between_processes(prompts) as mine:
        answers = gather_for_results([model(prompt) for prompt in mine], len(prompts))

A collective call needs equally long tensors on every process, and shares differ in length: they are sent padded to the
longest, and cut when they have arrived. Whatever is no tensor is sent as bytes (pickle).

Leaves out: cutting the inputs (`split.py`), and who the processes are (`state.py`).
"""

from __future__ import annotations

import copy
import hashlib
import sys
from collections import UserDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .shares import padded_length, share
from .split import is_a, is_record, len_of, map_columns, take
from .state import exchange, in_group, together

T = TypeVar("T")


def gather(tensor: Any) -> Any:
    """The tensors of all processes, one after another along dimension 0, on every process.

    They may differ in length, since shares do. A number without dimensions becomes one item.

    Args:
        tensor: a tensor of shape (items, ...), or a list, tuple or dict of them, nested if you like.

    Returns:
        The same structure, each tensor of shape (all items, ...), in the order of the processes, on its device.

    Raises:
        TypeError: something that is no tensor: that is for `gather_object`.
        ValueError: the processes hold different structures, dtypes or shapes (dimension 0 may differ).
        ProcessLost: another process ended, or did not come in time.

    >>> gather(torch.tensor([1, 2]))  # one process
    tensor([1, 2])
    """
    tensors: list[torch.Tensor] = []

    def collect(leaf: torch.Tensor) -> str:
        tensors.append(leaf if leaf.ndim else leaf[None])
        return f"{leaf.dtype} of shape (…, {', '.join(map(str, leaf.shape[1:]))})"

    structure = repr(_map_tensors(collect, tensor, "the input of gather"))
    if in_group("gather"):
        lengths = zip(*_agree(structure, [len(rows) for rows in tensors]))  # for each tensor those on every process
        tensors = [_join_rows(rows, everyones) for rows, everyones in zip(tensors, lengths)]
    joined = iter(tensors)
    return _map_tensors(lambda leaf: next(joined), tensor, "the input of gather")


def gather_object(items: Sequence[Any] | dict[Any, Any]) -> list[Any]:
    """The lists of all processes, one after another, on every process; for anything that pickles.

    Args:
        items: this process's list (or tuple); lengths may differ. A dict counts as a list with this one item.

    Raises:
        TypeError: neither: put a single object in a list.
        ProcessLost: another process ended, or did not come in time.

    >>> gather_object(["a", "b"])  # one process
    ['a', 'b']
    """
    if isinstance(items, dict):
        items = [items]
    elif not isinstance(items, (list, tuple)):
        raise TypeError(f"gather_object joins lists, not a {type(items).__name__}: put a single object in a list")
    return [item for part in exchange(list(items), "gather_object") for item in part]


def gather_for_results(results: T, total: int) -> T:
    """The results of all processes, exactly one for each input and in the inputs' order, on every process.

    The inverse of `split_between_processes`: it drops what was padded, and raises if anything is missing.

    Args:
        results: one for each item of this process's share, padding included: a list, tuple, tensor of shape
            (items, ...), ndarray, dict of these (columns), `datasets.Dataset` or `BatchEncoding`.
        total: how many inputs there were before the split: `len(prompts)`.

    Returns:
        The same type with `total` items. The numbers of a range come back as a list.

    Raises:
        TypeError: results of another type.
        ValueError: a process has more or fewer results than inputs; none are lost or doubled in silence.
        ProcessLost: another process ended, or did not come in time.

    >>> gather_for_results([len(prompt) for prompt in ["a dog", "a cat"]], 2)  # one process
    [5, 5]
    """
    lengths, totals = zip(*exchange((len_of(results, "results"), total), "gather_for_results"))
    if len(set(totals)) > 1:
        hint = "Every process must hold the same inputs in the same order"
        raise ValueError(f"the processes split different inputs: they say {sorted(set(totals))} items. {hint}")
    world = len(lengths)
    exact = [len(share(total, world, rank)) for rank in range(world)]
    padded = [padded_length(total, world)] * world
    if list(lengths) not in (exact, padded):
        counts = ", ".join(f"process {rank} has {length}" for rank, length in enumerate(lengths))
        expected = f"{total} inputs on {world} processes give {exact} results, or {padded} with padding"
        raise ValueError(f"{expected}, but {counts}. Return one result for each input")
    own = range(exact[dist.get_rank() if dist.is_initialized() else 0])  # without padding
    return map_columns(lambda column: _join_column(take(column, own)), results)


def _join_column(column: Any) -> Any:
    """One column of all processes, as its type."""
    if isinstance(column, torch.Tensor):
        return gather(column)
    if is_a("numpy", "ndarray", column):
        return sys.modules["numpy"].concatenate(exchange(column, "gather_for_results"))
    if is_a("datasets", "Dataset", column):
        return sys.modules["datasets"].concatenate_datasets(exchange(column, "gather_for_results"))
    return (tuple if isinstance(column, tuple) else list)(gather_object(list(column)))


def _agree(structure: str, lengths: list[int]) -> list[list[int]]:
    """The tensors' lengths on every process, or an error if the structures differ; a hash of both is compared first."""
    digest = hashlib.blake2b(f"{structure} {lengths}".encode(), digest_size=8).digest()
    own = torch.tensor([int.from_bytes(digest, "little", signed=True)], device=carrier("cpu"))
    digests = own.new_empty(dist.get_world_size())
    with together("gather"):
        dist.all_gather_into_tensor(digests, own)
    if len(set(digests.tolist())) == 1:
        return [lengths] * len(digests)
    structures, everyones_lengths = zip(*exchange((structure, lengths), "gather"))
    for rank, other in enumerate(structures):
        if other != structures[0]:
            kinds = f"process 0 has {structures[0]} and process {rank} has {other}"
            raise ValueError(f"gather needs the same kind of tensors on every process, but {kinds}")
    return list(everyones_lengths)


def _join_rows(tensor: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Tensors of shape (length, ...) from all processes, joined: sent padded to the longest, then cut."""
    longest = max(lengths)
    sent = tensor.detach().contiguous()
    if len(sent) < longest:
        sent = torch.cat([sent, sent.new_zeros(longest - len(sent), *sent.shape[1:])])
    raw = sent.reshape(-1).view(torch.uint8).to(carrier(sent.device))  # gloo and nccl know few dtypes, but bytes
    joined = raw.new_empty(len(lengths) * len(raw))
    if len(raw):
        with together("gather"):
            dist.all_gather_into_tensor(joined, raw)
    rows = joined.view(sent.dtype).view(len(lengths) * longest, *sent.shape[1:])
    if min(lengths) < longest:
        rows = torch.cat([rows[i * longest : i * longest + length] for i, length in enumerate(lengths)])
    return rows.to(tensor.device)


def carrier(device: str | torch.device) -> str | torch.device:
    """Where a tensor must be for the group's backends to carry it, its own device if that can be."""
    backends = dist.get_backend_config()
    return "cpu" if "nccl" not in backends else device if "gloo" in backends else "cuda"


def _map_tensors(function: Callable[[torch.Tensor], Any], thing: Any, path: str) -> Any:
    """The structure with `function` applied to each of its tensors, in order."""
    if isinstance(thing, torch.Tensor):
        return function(thing)
    if isinstance(thing, (dict, UserDict)):
        mapped = copy.copy(thing)
        for name in thing:
            mapped[name] = _map_tensors(function, thing[name], f"{path}[{name!r}]")
        return mapped
    if isinstance(thing, (list, tuple)):
        parts = [_map_tensors(function, item, f"{path}[{i}]") for i, item in enumerate(thing)]
        return type(thing)(*parts) if is_record(thing) else type(thing)(parts)
    raise TypeError(f"{path} is a {type(thing).__name__}, and gather takes tensors: use gather_object for the rest")
