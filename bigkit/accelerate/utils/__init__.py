"""`accelerate.utils`: the names of its modules in one place."""

# fmt: off
# isort: skip_file
from ...quantize.config import BnbQuantizationConfig
from ..differences import refuse_unknown as __getattr__
from .bnb import has_4bit_bnb_layers, load_and_quantize_model
from .constants import (
    MODEL_NAME, SAFE_MODEL_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_PATTERN_NAME,
    WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_PATTERN_NAME,
)
from .dataclasses import CustomDtype, DistributedType, InitProcessGroupKwargs, PrecisionType
from .environment import (
    clear_environment, get_int_from_env, parse_choice_from_env, parse_flag_from_env, patch_environment, str_to_bool,
)
from .imports import (
    is_4bit_bnb_available, is_8bit_bnb_available, is_bf16_available, is_bitsandbytes_multi_backend_available,
    is_bnb_available, is_boto3_available, is_cuda_available, is_datasets_available, is_deepspeed_available,
    is_fp8_available, is_fp16_available, is_habana_gaudi1, is_hpu_available, is_matplotlib_available,
    is_megatron_lm_available, is_mlu_available, is_mps_available, is_msamp_available, is_musa_available,
    is_neuron_available, is_npu_available, is_pandas_available, is_peft_available, is_pytest_available,
    is_rich_available, is_rocm_available, is_sdaa_available, is_tensorboard_available, is_timm_available,
    is_torch_xla_available, is_torchao_available, is_torchvision_available, is_transformer_engine_available,
    is_transformers_available, is_triton_available, is_wandb_available, is_xpu_available,
)
from .memory import find_executable_batch_size, release_memory
from .modeling import (
    align_module_device, calculate_maximum_sizes, check_device_map, check_tied_parameters_on_same_device,
    compute_module_sizes, convert_file_size_to_int, dtype_byte_size, find_tied_parameters, get_balanced_memory,
    get_max_layer_size, get_max_memory, has_offloaded_params, id_tensor_storage, infer_auto_device_map,
    load_checkpoint_in_model, load_offloaded_weights, load_state_dict, named_module_tensors, retie_parameters,
    set_module_tensor_to_device,
)
from .offload import (
    OffloadedWeightsLoader, PrefixedDataset, extract_submodules_state_dict, load_offloaded_weight, offload_state_dict,
    offload_weight, save_offload_index,
)
from .operations import (
    CannotPadNestedTensorWarning, broadcast, broadcast_object_list, concatenate, find_device, gather, gather_object,
    is_torch_tensor, pad_across_processes, reduce, send_to_device,
)
from .other import extract_model_from_parallel, is_compiled_module, is_port_in_use, load, save, wait_for_everyone
from .random import set_seed
from .tqdm import tqdm
from .versions import compare_versions, is_torch_version
