"""bigkit: plan and run models that are too big for one device, and see what happens.

The public names. Each is imported when it is first used, so `import bigkit` imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {  # module -> the public names in it
    "api": "advise describe estimate_memory plan plan_hosts",
    "checkpoints.load": "load_checkpoint_in_model",
    "checkpoints.save": "save_model",
    "checkpoints.state_dict": "load_state_dict",
    "distributed.gather": "gather gather_for_results gather_object",
    "distributed.in_flight": "map_in_flight",
    "distributed.map_file": "map_file",
    "distributed.notebook": "notebook_launcher",
    "distributed.state": "PartialState split_between_processes",
    "dryrun.result": "DryRun",
    "dryrun.run": "dry_run",
    "hosts": "pipeline",
    "machine.hardware": "HARDWARE Hardware",
    "machine.ledger": "Calibration Ledger",
    "maps.advise": "Advice",
    "maps.device_map": "check_device_map compute_module_sizes find_tied_parameters get_balanced_memory get_max_memory "
    "infer_auto_device_map",
    "maps.hosts": "HostsPlan",
    "maps.plan": "Plan PlanError",
    "measure.acceptance": "acceptance",
    "measure.calibrate": "calibrate",
    "measure.record": "Recorder record",
    "meta.empty": "init_empty_weights init_on_device",
    "model.estimate": "MemoryEstimate",
    "model.precision": "Precision",
    "model.spec": "Layer ModelSpec",
    "offload.dispatch": "dispatch_model",
    "offload.graphs": "graph_decode",
    "offload.hooks": "AlignDevicesHook ModelHook SequentialHook add_hook_to_module remove_hook_from_module",
    "offload.load_and_dispatch": "load_checkpoint_and_dispatch",
    "offload.one_place": "cpu_offload disk_offload",
    "offload.resting_cache": "RestingCache",
    "offload.whole_model": "cpu_offload_with_hook",
    "quantize.load": "BnbQuantizationConfig load_and_quantize_model replace_with_bnb_layers",
    "units": "format_bytes parse_bytes",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = ["__version__", "zoo", *sorted(_HOME_OF)]

if TYPE_CHECKING:
    from . import zoo
    from .api import advise, describe, estimate_memory, plan, plan_hosts
    from .checkpoints.load import load_checkpoint_in_model
    from .checkpoints.save import save_model
    from .checkpoints.state_dict import load_state_dict
    from .distributed.gather import gather, gather_for_results, gather_object
    from .distributed.in_flight import map_in_flight
    from .distributed.map_file import map_file
    from .distributed.notebook import notebook_launcher
    from .distributed.state import PartialState, split_between_processes
    from .dryrun.result import DryRun
    from .dryrun.run import dry_run
    from .hosts import pipeline
    from .machine.hardware import HARDWARE, Hardware
    from .machine.ledger import Calibration, Ledger
    from .maps.advise import Advice
    from .maps.device_map import (
        check_device_map,
        compute_module_sizes,
        find_tied_parameters,
        get_balanced_memory,
        get_max_memory,
        infer_auto_device_map,
    )
    from .maps.hosts import HostsPlan
    from .maps.plan import Plan, PlanError
    from .measure.acceptance import acceptance
    from .measure.calibrate import calibrate
    from .measure.record import Recorder, record
    from .meta.empty import init_empty_weights, init_on_device
    from .model.estimate import MemoryEstimate
    from .model.precision import Precision
    from .model.spec import Layer, ModelSpec
    from .offload.dispatch import dispatch_model
    from .offload.graphs import graph_decode
    from .offload.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
    from .offload.load_and_dispatch import load_checkpoint_and_dispatch
    from .offload.one_place import cpu_offload, disk_offload
    from .offload.resting_cache import RestingCache
    from .offload.whole_model import cpu_offload_with_hook
    from .quantize.load import BnbQuantizationConfig, load_and_quantize_model, replace_with_bnb_layers
    from .units import format_bytes, parse_bytes


_EXTRA = "torch transformers timm safetensors ipywidgets tqdm cloudpickle".split()  # of pyproject.toml's "torch"


def _say_missing(error: ImportError, what: str) -> str:
    """What to install if a package is missing that only the extra "torch" brings; else the error's own words."""
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRA:
        return str(error)
    return f"{what} needs {package}, which is not installed: pip install 'bigkit[torch]'"


def __getattr__(name: str) -> object:
    try:
        if name in _HOME_OF:
            return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
        if name in ("accelerate", "widgets", "zoo"):
            return import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_say_missing(error, f"bigkit.{name}"), name=error.name) from error
    raise AttributeError(f"module 'bigkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
