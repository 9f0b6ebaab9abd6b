"""What is computed from the zeros that stand for modules of other processes, and must not reach a block.

Leaves out: which modules are away (`pipeline.py`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class Taint(TorchDispatchMode):
    """Follows what is computed from zeros that stand for the output of a module elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, Any] = {}  # address -> storage, so that no other gets its address

    def mark(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.kept[storage.data_ptr()] = storage

    def has(self, thing: Any) -> bool:
        if isinstance(thing, (list, tuple)):
            return any(map(self.has, thing))
        return isinstance(thing, Tensor) and thing.untyped_storage().data_ptr() in self.kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = str(func).split(".")[1]  # "aten.zeros_like.default"
        by_shape = name.endswith("_like") or name.startswith("new_")
        if not by_shape and (self.has(args) or self.has(tuple((kwargs or {}).values()))):
            for tensor in output if isinstance(output, (list, tuple)) else [output]:
                if isinstance(tensor, Tensor):
                    self.mark(tensor)
        return output

    def refuse(self, name: str, block: nn.Module, args: Any, options: dict[str, Any]) -> None:
        """A block's inputs must come from this process, but for the hidden states."""
        inputs = {**{f"input {i}": arg for i, arg in enumerate(args)}, **options}
        if wrong := next((own for own, value in inputs.items() if self.has(value)), None):
            hint = "this model needs more than hidden states from one block to the next, and cannot be cut here"
            raise ValueError(f"{wrong} of {name} is computed from what rests on another process: {hint}")
