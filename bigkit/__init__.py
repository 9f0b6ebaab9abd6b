"""bigkit: plan and run models that are too big for one device, and see what happens.

The public names. Each is imported when it is first used, so `import bigkit` imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "front": ("advise", "describe", "estimate_memory", "plan"),
    "plans": ("Plan",),
    "planner": ("PlanError",),
    "estimate": ("MemoryEstimate",),
    "layers": ("Layer", "ModelSpec", "Precision"),
    "units": ("format_bytes", "parse_bytes"),
    "hardware": ("HARDWARE", "Hardware"),
    "ledger": ("Calibration", "Ledger"),
    "advice": ("Advice",),
    "calibration": ("calibrate",),
    "dryrun": ("DryRun", "dry_run"),
    "recorder": ("Recorder", "record"),
    "meta": ("init_empty_weights", "init_on_device"),
    "checkpoint": ("load_checkpoint_in_model", "load_state_dict", "save_model"),
    "dispatch": (
        "cpu_offload",
        "cpu_offload_with_hook",
        "disk_offload",
        "dispatch_model",
        "load_checkpoint_and_dispatch",
    ),
    "hooks": (
        "AlignDevicesHook",
        "ModelHook",
        "SequentialHook",
        "add_hook_to_module",
        "remove_hook_from_module",
    ),
    "device_map": (
        "check_device_map",
        "compute_module_sizes",
        "find_tied_parameters",
        "get_balanced_memory",
        "get_max_memory",
        "infer_auto_device_map",
    ),
    "distributed": ("PartialState", "gather", "gather_for_results", "gather_object", "split_between_processes"),
    "notebook": ("notebook_launcher",),
    "batches": ("map_file",),
    "quantize": ("BnbQuantizationConfig", "load_and_quantize_model", "replace_with_bnb_layers"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", "zoo", *sorted(_HOME_OF)]

if TYPE_CHECKING:
    from . import zoo
    from .advice import Advice
    from .batches import map_file
    from .calibration import calibrate
    from .checkpoint import load_checkpoint_in_model, load_state_dict, save_model
    from .device_map import (
        check_device_map,
        compute_module_sizes,
        find_tied_parameters,
        get_balanced_memory,
        get_max_memory,
        infer_auto_device_map,
    )
    from .dispatch import (
        cpu_offload,
        cpu_offload_with_hook,
        disk_offload,
        dispatch_model,
        load_checkpoint_and_dispatch,
    )
    from .distributed import PartialState, gather, gather_for_results, gather_object, split_between_processes
    from .dryrun import DryRun, dry_run
    from .estimate import MemoryEstimate
    from .front import advise, describe, estimate_memory, plan
    from .hardware import HARDWARE, Hardware
    from .hooks import (
        AlignDevicesHook,
        ModelHook,
        SequentialHook,
        add_hook_to_module,
        remove_hook_from_module,
    )
    from .layers import Layer, ModelSpec, Precision
    from .ledger import Calibration, Ledger
    from .meta import init_empty_weights, init_on_device
    from .notebook import notebook_launcher
    from .planner import PlanError
    from .plans import Plan
    from .quantize import BnbQuantizationConfig, load_and_quantize_model, replace_with_bnb_layers
    from .recorder import Recorder, record
    from .units import format_bytes, parse_bytes


def __getattr__(name: str) -> object:
    if name in _HOME_OF:
        return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    if name in ("zoo", "widgets"):
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module 'bigkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
