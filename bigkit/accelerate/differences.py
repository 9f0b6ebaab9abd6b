"""What Accelerate has and `bigkit.accelerate` has not, or has otherwise: data, each entry with its reason.

A test of `tests/accelerate` holds these tables against Accelerate: what is missing or different must stand here, and
what stands here must be so. Another runs Accelerate's own tests, which may fail only where `BEHAVIOUR` says why.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

SEEN_IN = "1.15"  # the version of Accelerate that these tables were made for

# Reason -> names (of modules, classes, functions, constants and members; "*" stands for anything).
LEFT_OUT = {
    "it is for training": """
        GradientState AutocastKwargs GradScalerKwargs DistributedDataParallelKwargs DDPCommunicationHookType
        DataLoaderConfiguration ProjectConfiguration GradientAccumulationPlugin TorchDynamoPlugin ProfileKwargs
        DynamoBackend LoggerType RNGType TORCH_DYNAMO_MODES KwargsHandler synchronize_rng_state* get_grad_scaler
        get_mixed_precision_context_manager ConvertOutputsToFp32 convert_outputs_to_fp32 convert_to_fp32
        OPTIMIZER_NAME SCHEDULER_NAME SCALER_NAME SAMPLER_NAME RNG_STATE_NAME PROFILE_PATTERN_NAME
        *PROFILING_AVAILABLE* accumulate backward clip_grad_norm_ clip_grad_value_ gradient_accumulation_steps
        lomo_backward no_sync optimizer_step_was_skipped prepare_optimizer prepare_scheduler profile sync_gradients
        trigger_sync_in_backward unscale_gradients set_trigger check_trigger join_uneven_inputs fp8_backend
        should_save_model save_state load_state register_for_checkpointing register_*_state_pre_hook save_iteration
        init_trackers get_tracker log logging_dir""",
    "it belongs to Accelerate's data loaders; share inputs with split_between_processes": """
        skip_first_batches prepare_data_loader dispatch_batches even_batches split_batches non_blocking
        use_seedable_sampler use_stateful_dataloader pad_input_tensors slice_tensors find_batch_size
        ignorant_find_batch_size get_data_structure initialize_tensors is_tensor_information TensorInformation listify
        honor_type recursively_apply is_namedtuple get_shape gather_tensor_shape is_torchdata_*""",
    "one model over several processes is bigkit.pipeline, cut by bigkit.plan_hosts": """
        prepare_pippy build_pipeline find_pippy_batch_size generate_device_map pippy_forward""",
    "it is for training, or cuts single tensors; bigkit cuts a model by layers, over GPUs or over processes": """
        ParallelismConfig *DeepSpeed* *deepspeed* FullyShardedDataParallelPlugin *Megatron* *megatron* *FSDP* *fsdp*
        *TensorParallel*
        *ContextParallel* *context_parallel* *_parallel_*rank *device_mesh is_composable_parallelism_enabled
        parallelism_config *TrainStep avg_losses_across_data_parallel_group parse_*_config get_module_class_from_name
        BETA_* model_has_dtensor get_model_tp_size DTENSOR_PYTORCH_VERSION GatheredParameters ensure_weights_retied
        CUDA_DISTRIBUTED_TYPES TORCH_DISTRIBUTED_OPERATION_TYPES DEEPSPEED_*""",
    "bigkit runs on CUDA, MPS and the CPU, and quantizes with bitsandbytes": """
        *SAGEMAKER* *SageMaker* *sagema* install_xla copy_tensor_to_devices is_torch_xpu_tensor *RecipeKwargs *fp8*
        FP8BackendType *_ao *_ao_layers filter_first_and_last_linear_layers torchao_required convert_model
        has_transformer_engine_layers *numa_affinity prepare_tpu is_*_available""",
    "it is a part of Accelerate's own making; the public calls do what it is for": """
        do_nothing ThreadLocalSharedDict BaseEnum EnumWithContains ComputeEnvironment test_launch PrepareForLaunch
        prepare_simple_launcher_cmd_env prepare_multi_gpu_env TORCH_LAUNCH_PARAMS write_basic_config
        ELASTIC_LOG_LINE_PREFIX_TEMPLATE_PYTORCH_VERSION STR_OPERATION_TO_FUNC are_libraries_initialized
        CPUInformation get_cpu_distributed_information get_current_device_type get_gpu_info get_driver_version
        check_cuda_p2p_ib_support check_os_kernel convert_dict_to_env_variables purge_accelerate_environment
        check_device_same check_tied_parameters_in_config get_module_leaves get_module_size_with_ties
        fallback_allocate is_peft_model get_quantized_model_device_map get_keys_to_not_convert get_parameter_device
        quantize_and_offload_8bit DistributedOperationException verify_operation chained_operation
        clean_state_dict_for_safetensors get_pretty_name merge_dicts recursive_getattr get_module_children_bottom_up""",
    "bigkit.format_bytes does it": "convert_bytes",
    "torch.compile does it, for a block at a time": "compile_regions has_compiled_regions *_repeated_blocks",
}

# Name -> how its parameters differ, and why.
OTHERWISE = {
    "init_empty_weights": "include_buffers=False, not None: no environment variable changes what a call does",
    "init_on_device": "include_buffers=False, not None: no environment variable changes what a call does",
    "find_tied_parameters": "no **kwargs: Accelerate takes none either, and calls itself with them",
    "find_device": "its parameter is called `value`",
    "gather_object": "its parameter is called `items`: a list. A dict is one item of it, never its keys alone",
    "notebook_launcher": "use_port=None finds a free port. No rendezvous and restart options: a fresh Python runs each "
    "process, and the first failure ends them all",
    "PartialState": "timeout, and no other option: the backend follows from the device",
    "PartialState.destroy_process_group": "no `group`: there is one",
    "AcceleratorState.destroy_process_group": "no `group`: there is one",
}

# What behaves otherwise. Each of Accelerate's own tests that fail with bigkit names one of these.
BEHAVIOUR = {
    "handles": "A weight that rests elsewhere is never on meta: it is a handle, on the device that it works on. A "
    "weight that rests where it works stays as it is, without a hook.",
    "maps": "GPUs keep a reserve only if something is offloaded, and then for two blocks in flight each. What fits is "
    "never left out: `fallback_allocation` changes nothing. Without a `main_device`, what rests in RAM or on disk "
    "works on all GPUs that the map names, in turn.",
    "budgets": "No map is over a budget. Buffers of offloaded layers count; where nothing fits, PlanError says how "
    "many bytes are missing.",
    "words": "Messages are bigkit's own. They are Python warnings, not lines of a log.",
    "ties": "Tensors that share memory are written under each of their names, so nothing is removed and no one warned. "
    "Modules with one parameter stay tied also if they are sent away one by one, or one of them stays; two parameters "
    "over one memory (`nn.Parameter(other.weight)`) are tied within one call alone.",
    "execution device": "AlignDevicesHook(offload=True) must be told where the weights are to work.",
    "training": "Accelerator.prepare takes models; an optimizer, a scheduler or a data loader is an error.",
    "private": "Accelerate's private attributes (`_models`) and the inner names of its modules are not there.",
    "reset": "An object goes on knowing who it is after `PartialState._reset_state()`, which empties `_shared_state`.",
    "environment": "Of the ACCELERATE_ variables LOG_LEVEL is read. BIGKIT_USE_CPU=1 leaves GPUs alone.",
}


def reason_left_out(name: str) -> str | None:
    """Why there is no such name, or None.

    >>> reason_left_out("DeepSpeedPlugin")[:60]
    'it is for training, or cuts single tensors; bigkit cuts a mo'
    """
    for reason, patterns in LEFT_OUT.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns.split()):
            return reason
    return None


def refuse_unknown(name: str) -> Any:
    """The `__getattr__` of these modules: an unknown name is an error, with the reason if it was left out on purpose.

    Raises:
        ImportError: it was left out.
        AttributeError: Accelerate has none, either.
    """
    if reason := reason_left_out(name):
        raise ImportError(f"bigkit.accelerate has no {name}: {reason}")
    raise AttributeError(f"bigkit.accelerate has no {name!r}")


def refuse_training(call: str, **options: Any) -> None:
    """Refuse options that are for training.

    Args:
        call: who was given them.
        options: those that are not None are refused.

    Raises:
        ValueError: with their names.

    >>> refuse_training("Accelerator", mixed_precision="bf16")
    Traceback (most recent call last):
        ...
    ValueError: Accelerator(mixed_precision='bf16') is for training; bigkit computes in the dtype of the weights
    """
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{call}({name}={value!r}) is for training; bigkit computes in the dtype of the weights")
