"""Accelerate's module paths for all that is bigkit's subject: a script changes one import.

    from bigkit.accelerate import Accelerator, init_empty_weights, load_checkpoint_and_dispatch
    from bigkit.accelerate.utils import BnbQuantizationConfig, load_and_quantize_model, set_module_tensor_to_device

Most names are bigkit's own calls, imported from the wings where they are explained. The rest is short: what scripts use
beside them. What Accelerate has and bigkit leaves out, and what differs, stands with its reason in `differences.py`; a
test compares every public name and signature of Accelerate's modules with these.

Leaves out: training, and everything that bigkit does not do; asking for it says so in one sentence.
"""

from ..distributed.state import PartialState
from .accelerator import Accelerator
from .big_modeling import (
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    dispatch_model,
    init_empty_weights,
    init_on_device,
    load_checkpoint_and_dispatch,
)
from .differences import refuse_unknown as __getattr__
from .launchers import debug_launcher, notebook_launcher
from .utils import (
    DistributedType,
    InitProcessGroupKwargs,
    find_executable_batch_size,
    infer_auto_device_map,
    is_rich_available,
    load_checkpoint_in_model,
)
