"""`Accelerator` for inference: where am I, put the model there, share the inputs, join the results, save.

Leaves out: training, which needs Accelerate itself; what is asked for it says so in one sentence.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from torch import nn

from ..checkpoints.save import save_model
from ..distributed.gather import gather, gather_object
from .differences import reason_left_out, refuse_training
from .state import AcceleratorState
from .utils.dataclasses import InitProcessGroupKwargs
from .utils.memory import release_memory
from .utils.modeling import get_state_dict_offloaded_model, is_spread
from .utils.operations import pad_across_processes, reduce
from .utils.other import extract_model_from_parallel, save

_BY_DEVICE = object()  # Accelerate's default of split_batches is an object that means: not given


class Accelerator(AcceleratorState):
    """This process, its device, and what scripts do with them. See `PartialState` for the attributes.

    Args:
        device_placement: whether `prepare` moves models to the device.
        cpu: stay on the CPU although there are GPUs.
        project_dir: kept as an attribute.
        kwargs_handlers: an `InitProcessGroupKwargs`, whose timeout is taken.
        step_scheduler_with_optimizer, rng_types: for training, without effect.

    Raises:
        ValueError: any other option is given: it is for training.

    >>> accelerator = Accelerator(cpu=True)
    >>> model = accelerator.prepare(nn.Linear(2, 2))
    >>> model.weight.device == accelerator.device, accelerator.unwrap_model(model) is model
    (True, True)
    """

    def __init__(
        self, device_placement: bool = True, split_batches: Any = _BY_DEVICE, mixed_precision: str | None = None,
        gradient_accumulation_steps: int = 1, cpu: bool = False, dataloader_config: Any = None,
        deepspeed_plugin: Any = None, fsdp_plugin: Any = None, torch_tp_plugin: Any = None,
        megatron_lm_plugin: Any = None, rng_types: list[str] | None = None, log_with: Any = None,
        project_dir: str | os.PathLike[str] | None = None, project_config: Any = None,
        gradient_accumulation_plugin: Any = None, step_scheduler_with_optimizer: bool = True,
        kwargs_handlers: list[Any] | None = None, dynamo_backend: str | None = None, dynamo_plugin: Any = None,
        deepspeed_plugins: Any = None, parallelism_config: Any = None,
    ) -> None:  # fmt: skip
        timeouts: list[Any] = [one.timeout for one in kwargs_handlers or () if isinstance(one, InitProcessGroupKwargs)]
        refuse_training(
            "Accelerator", split_batches=None if split_batches is _BY_DEVICE else split_batches,
            gradient_accumulation_steps=None if gradient_accumulation_steps == 1 else gradient_accumulation_steps,
            dataloader_config=dataloader_config, log_with=log_with, project_config=project_config,
            gradient_accumulation_plugin=gradient_accumulation_plugin, deepspeed_plugins=deepspeed_plugins,
            kwargs_handlers=None if len(timeouts) == len(kwargs_handlers or ()) else kwargs_handlers,
            dynamo_backend=None if str(dynamo_backend).lower() == "no" else dynamo_backend,
        )  # fmt: skip
        options: dict[str, Any] = {"timeout": timeouts[0]} if timeouts and timeouts[0] else {}
        super().__init__(
            mixed_precision, cpu, dynamo_plugin, deepspeed_plugin, fsdp_plugin, torch_tp_plugin, megatron_lm_plugin,
            parallelism_config, **options,
        )  # fmt: skip
        self.device_placement, self.project_dir = device_placement, project_dir

    def __getattr__(self, name: str) -> Any:
        if reason := reason_left_out(name):
            raise AttributeError(f"bigkit's Accelerator has no {name}: {reason}")
        raise AttributeError(f"'Accelerator' object has no attribute {name!r}")

    @property
    def state(self) -> AcceleratorState:
        """This object: it knows all that Accelerate's state does."""
        return self

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """Models on this process's device; None stays None.

        Raises:
            TypeError: an optimizer, a scheduler or a data loader.
        """
        places = device_placement or [self.device_placement] * len(args)
        prepared = [self._prepare(thing, place) for thing, place in zip(args, places, strict=True)]
        return prepared[0] if len(prepared) == 1 else tuple(prepared)

    def _prepare(self, thing: Any, place: bool) -> Any:
        if isinstance(thing, nn.Module):
            return self.prepare_model(thing, place)
        if thing is None:
            return thing
        hint = "share the inputs of a data loader with split_between_processes, and train with Accelerate itself"
        raise TypeError(f"prepare takes models, not a {type(thing).__name__}: {hint}")

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """The model on this process's device; one that is spread over devices stays as it is."""
        place = self.device_placement if device_placement is None else device_placement
        return model.to(self.device) if place and not is_spread(model) else model

    def unwrap_model(
        self, model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True
    ) -> nn.Module:
        """See `extract_model_from_parallel`."""
        return extract_model_from_parallel(model, keep_fp32_wrapper, keep_torch_compile)

    def save_model(
        self, model: nn.Module, save_directory: str | os.PathLike[str], max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:  # fmt: skip
        """`bigkit.save_model` on the main process; nothing on the others."""
        if self.is_main_process:
            save_model(self.unwrap_model(model), save_directory, max_shard_size, safe_serialization)

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """Name -> tensor; those that rest elsewhere are brought to the CPU."""
        return get_state_dict_offloaded_model(self.unwrap_model(model) if unwrap else model)

    def save(self, obj: Any, f: str | os.PathLike[str], safe_serialization: bool = False) -> None:
        """Write anything on the main process; see `utils.save`."""
        save(obj, f, safe_serialization=safe_serialization)

    def gather(self, tensor: Any) -> Any:
        """See `bigkit.gather`."""
        return gather(tensor)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """The results of all processes. Nothing is dropped at the end, because nothing is padded."""
        return gather_object(input_data) if use_gather_object else gather(input_data)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """See `utils.reduce`."""
        return reduce(tensor, reduction, scale)

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        """See `utils.pad_across_processes`."""
        return pad_across_processes(tensor, dim, pad_index, pad_first)

    def autocast(self, autocast_handler: Any = None) -> contextlib.AbstractContextManager[None]:
        """Nothing: a model computes in the dtype of its weights."""
        refuse_training("autocast", autocast_handler=autocast_handler)
        return contextlib.nullcontext()

    def free_memory(self, *objects: Any) -> list[Any]:
        """See `utils.release_memory`."""
        return release_memory(*objects)

    clear = free_memory

    @property
    def multi_device(self) -> bool:
        """Whether there are several processes with GPUs."""
        return self.use_distributed and self.device.type == "cuda"

    def verify_device_map(self, model: nn.Module) -> bool:
        """Whether the model is spread over several devices, so that DistributedDataParallel cannot take it."""
        return any(len({*getattr(part, "hf_device_map", {}).values()}) > 1 for part in model.modules())

    def end_training(self) -> None:
        """Leave the others, when nothing is to be exchanged any more."""
        self.destroy()
