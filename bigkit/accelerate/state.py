"""`accelerate.state`: who this process is."""

from __future__ import annotations

from typing import Any, ClassVar

from ..distributed.state import PartialState
from .differences import refuse_training
from .differences import refuse_unknown as __getattr__
from .utils.dataclasses import DistributedType


class AcceleratorState(PartialState):
    """A `PartialState` with the precision that models compute in: that of their own weights, "no" other one.

    Args:
        mixed_precision: None or "no".
        cpu: stay on the CPU although there are GPUs.

    Raises:
        ValueError: an option that is for training.

    >>> AcceleratorState(cpu=True).mixed_precision
    'no'
    """

    _shared_state: ClassVar[dict[str, Any]] = {}
    mixed_precision = "no"
    is_fsdp2 = False

    def __init__(
        self, mixed_precision: str | None = None, cpu: bool = False, dynamo_plugin: Any = None,
        deepspeed_plugin: Any = None, fsdp_plugin: Any = None, torch_tp_plugin: Any = None,
        megatron_lm_plugin: Any = None, parallelism_config: Any = None, _from_accelerator: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        refuse_training(
            "AcceleratorState", mixed_precision=None if mixed_precision == "no" else mixed_precision,
            dynamo_plugin=dynamo_plugin, deepspeed_plugin=deepspeed_plugin, fsdp_plugin=fsdp_plugin,
            torch_tp_plugin=torch_tp_plugin, megatron_lm_plugin=megatron_lm_plugin,
            parallelism_config=parallelism_config,
        )  # fmt: skip
        super().__init__(cpu, **options)
        AcceleratorState._shared_state.update(vars(self))

    @property
    def distributed_type(self) -> DistributedType:
        """How the processes compute."""
        return DistributedType(super().distributed_type)

    @staticmethod
    def _reset_state(reset_partial_state: bool = False) -> None:
        AcceleratorState._shared_state.clear()
        if reset_partial_state:
            PartialState._reset_state()


def is_initialized() -> bool:
    """Whether an `AcceleratorState` has been made."""
    return bool(AcceleratorState._shared_state)
