"""What `bigkit.accelerate` adds to bigkit's own calls, with Accelerate or PyTorch as the oracle."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import bigkit
from bigkit import accelerate as ours
from bigkit.accelerate import Accelerator, hooks, utils
from bigkit.accelerate.big_modeling import attach_layerwise_casting_hooks
from tests import forked

theirs = pytest.importorskip("accelerate")
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 5))
    ).eval()


def spread(model):
    """Weights that rest in RAM, on disk and where they work."""
    return bigkit.dispatch_model(model, {"0": 0, "1": 0, "2.0": "cpu", "2.1": "cpu"}, stand_in={0: "cpu"})


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_import_of_common_code():
    for line in """from bigkit.accelerate import init_empty_weights, load_checkpoint_and_dispatch, infer_auto_device_map
from bigkit.accelerate import dispatch_model, cpu_offload, cpu_offload_with_hook, disk_offload, load_checkpoint_in_model
from bigkit.accelerate import Accelerator, PartialState, notebook_launcher, debug_launcher
from bigkit.accelerate.accelerator import Accelerator
from bigkit.accelerate.utils import BnbQuantizationConfig, load_and_quantize_model, set_module_tensor_to_device
from bigkit.accelerate.utils import get_balanced_memory, get_max_memory, gather_object, send_to_device, is_xpu_available
from bigkit.accelerate.utils.modeling import load_checkpoint_in_model, get_max_layer_size, clean_device_map
from bigkit.accelerate.state import PartialState, AcceleratorState, is_initialized
from bigkit.accelerate.big_modeling import dispatch_model, attach_layerwise_casting_hooks
from bigkit.accelerate.hooks import add_hook_to_module, AlignDevicesHook, remove_hook_from_module
from bigkit.accelerate.hooks import CpuOffload, UserCpuOffloadHook, remove_hook_from_submodules
from bigkit.accelerate.hooks import attach_align_device_hook_on_blocks
from bigkit.accelerate.logging import get_logger""".splitlines():
        exec(line, {})
        exec(line.replace("bigkit.", ""), {})


SCRIPT = """
from accelerate import Accelerator, PartialState, dispatch_model, find_executable_batch_size, init_empty_weights
from accelerate import infer_auto_device_map, load_checkpoint_and_dispatch
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_submodules
from accelerate.utils import compute_module_sizes, find_tied_parameters, gather_object, named_module_tensors
from accelerate.utils import retie_parameters, send_to_device, set_module_tensor_to_device, set_seed

set_seed(0)
accelerator = Accelerator(cpu=True)
accelerator.save_model(net(), folder, max_shard_size=200)
with init_empty_weights():
    model = net()
assert all(tensor.is_meta for _, tensor in named_module_tensors(model, include_buffers=False, recurse=True))
device_map = {"0": "cpu", "1": "cpu", "2": "disk"}
model = load_checkpoint_and_dispatch(model, folder, device_map, offload_folder=folder + "/off", strict=True)
said = [model(send_to_device({"x": X}, accelerator.device)["x"]), compute_module_sizes(model), model.hf_device_map]
remove_hook_from_submodules(model)

class Double(ModelHook):
    def post_forward(self, module, output):
        return 2 * output

small = net()
add_hook_to_module(small[0], SequentialHook(Double(), Double()))
small[2][1].bias = nn.Parameter(torch.zeros(5))
said += [small(X), infer_auto_device_map(small, {0: 5000, "cpu": 5000}), find_tied_parameters(small)]
set_module_tensor_to_device(small, "0.bias", "cpu", torch.ones(6))
retie_parameters(small, [["0.bias", "1.bias"]])
said += [small(X), find_tied_parameters(small)]

@find_executable_batch_size(starting_batch_size=8)
def run(batch_size):
    if batch_size > 4:
        raise RuntimeError("CUDA out of memory.")
    return batch_size

with PartialState().split_between_processes(["a", "b"], apply_padding=True) as mine:
    said += [run(), gather_object(mine), accelerator.gather(torch.arange(2)), torch.rand(1)]
accelerator.wait_for_everyone()
"""


def test_the_same_script_says_the_same(tmp_path):
    said = []
    for package in ("accelerate", "bigkit.accelerate"):
        names = {"net": net, "torch": torch, "nn": nn, "X": X, "folder": str(tmp_path / package)}
        exec(SCRIPT.replace("from accelerate", f"from {package}"), names)
        said.append(names["said"])
    theirs.state.AcceleratorState._reset_state(True)
    for one, other in zip(*said, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_most_are_bigkits_own_calls():
    for name in bigkit.__all__:
        if not name.startswith("_") and name != "zoo" and (other := vars(ours).get(name) or vars(utils).get(name)):
            assert other is getattr(bigkit, name), name


def test_bigkit_itself_does_not_import_it():
    code = "import bigkit, bigkit.cli, sys; print('bigkit.accelerate' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
    assert forked.run("import bigkit; print(bigkit.accelerate.__name__)").stdout == "bigkit.accelerate\n"


# ---------------------------------------------------------------------------------------------------------------------
# Tensors of a model


def test_a_tensor_is_set_as_accelerate_sets_it():
    for name, device, value, dtype in (
        ("0.weight", "cpu", torch.ones(6, 4, dtype=torch.float64), None),
        ("0.weight", "cpu", torch.ones(6, 4), torch.float16),
        ("0.bias", "meta", None, None),
        ("1.running_mean", "cpu", torch.ones(6), torch.bfloat16),
        ("1.num_batches_tracked", "cpu", torch.tensor(7), None),
        ("2.0.weight", "cpu", None, torch.float16),
    ):
        results = []
        for lib in (theirs, ours):
            model = net()
            lib.utils.set_module_tensor_to_device(model, name, device, value, dtype)
            owner, _, own = name.rpartition(".")
            tensor = getattr(model.get_submodule(owner), own)
            results.append((type(tensor), tensor.dtype, tensor.device, tensor.requires_grad))
            results.append(None if tensor.is_meta else tensor.tolist())
        assert results[:2] == results[2:], name
    with pytest.raises(ValueError, match="no tensor '0.wight'"):
        utils.set_module_tensor_to_device(net(), "0.wight", "cpu")


def test_a_tensor_that_rests_elsewhere_is_set_too():
    model, new = spread(net()), torch.full((6, 6), 0.5)
    utils.set_module_tensor_to_device(model, "2.0.weight", "cpu", new)
    expected = net()
    expected[2][0].weight.data = new
    assert torch.equal(model(X), expected(X))


def test_offloaded_parameters_are_found_and_aligned():
    model = spread(net())
    assert utils.has_offloaded_params(model[2][1]) and not utils.has_offloaded_params(model[0])
    layer, expected = model[2][1], net()
    before = layer.weight
    with utils.align_module_device(layer, "cpu"):
        assert type(layer.weight) is nn.Parameter and layer.weight.device.type == "cpu"
        with torch.no_grad():
            layer.weight.mul_(2)  # Accelerate loses it
    assert layer.weight is before
    expected[2][1].weight.data *= 2
    assert torch.equal(model(X), expected(X))
    assert same(utils.modeling.get_state_dict_offloaded_model(model), expected.state_dict())
    found = utils.modeling.get_state_dict_from_offload(layer, "2.1.weight", {"2.1.weight": "", "0.weight": ""})
    assert torch.equal(found["2.1.weight"], expected[2][1].weight) and found["0.weight"] == ""


def test_sizes_and_maps():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8)), nn.LayerNorm(8))
    sizes = utils.compute_module_sizes(model)
    for classes in ([], ["Sequential"], "Linear"):
        layers = [*model.named_children()]
        assert utils.get_max_layer_size(layers, sizes, classes) == theirs.utils.get_max_layer_size(
            layers, sizes, [classes] if isinstance(classes, str) else classes
        )
    assert utils.calculate_maximum_sizes(model) == theirs.utils.calculate_maximum_sizes(model)
    for device_map in ({"a.0": 0, "a.1": 0, "b": 1}, {"a.0": 0, "a.1": 0}, {"a.b.c": "cpu", "a.b.d": "disk", "a.e": 0}):
        for name in ("", "a"):
            expected = theirs.utils.modeling.clean_device_map(dict(device_map), name)
            assert utils.modeling.clean_device_map(dict(device_map), name) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Weights in files, and hooks put by hand


@pytest.mark.parametrize("writer", [theirs, ours])
@pytest.mark.parametrize("reader", [theirs, ours])
def test_folders_of_weights_are_read_by_either_library(writer, reader, tmp_path):
    tensors = {**net().state_dict(), "half": torch.randn(2, 3).bfloat16(), "scalar": torch.tensor(2.5)}
    writer.utils.offload_state_dict(tmp_path, tensors)
    assert same(dict(reader.utils.OffloadedWeightsLoader(save_folder=tmp_path)), tensors)
    bigkit.save_model(net(), tmp_path / "safe")
    file = str(tmp_path / "safe" / "model.safetensors")
    index = {"w": {"safetensors_file": file, "weight_name": "0.weight", "dtype": "float16"}}
    assert torch.equal(reader.utils.OffloadedWeightsLoader(index=index)["w"], tensors["0.weight"].half())


def test_a_prefixed_part_of_a_mapping_can_be_walked_through():
    part = utils.PrefixedDataset({"h.0.a": 1, "h.1.a": 2}, "h.1.")
    assert dict(part) == {"a": 2} and len(part) == 1


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_hooks_on_blocks(offload_buffers, tmp_path):
    model, expected = net(), net()
    utils.offload_state_dict(tmp_path, model.state_dict())
    weights = utils.OffloadedWeightsLoader(save_folder=tmp_path)
    for name, _ in model[2].named_parameters():
        utils.set_module_tensor_to_device(model[2], name, "meta")
    devices, away = dict.fromkeys(("0", "1", "2"), "cpu"), {"0": False, "1": False, "2": True}
    hooks.attach_align_device_hook_on_blocks(model, devices, away, weights, offload_buffers)
    assert torch.equal(model(X), expected(X)) and hasattr(model, "_hf_hook")
    hooks.remove_hook_from_submodules(model)
    assert torch.equal(model(X), expected(X)) and same(model.state_dict(), expected.state_dict())
    hooks.attach_align_device_hook_on_blocks(model, "cpu", True, offload_buffers=offload_buffers)
    assert torch.equal(model(X), expected(X)) and utils.has_offloaded_params(model[2][0])


def test_layers_are_cast_for_their_forward_alone():
    model = net()
    attach_layerwise_casting_hooks(model, torch.bfloat16, torch.float32, skip_modules_pattern="^2.1")
    assert [model[0].weight.dtype, model[2][1].weight.dtype] == [torch.bfloat16, torch.float32]
    assert model(X).dtype == torch.float32
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.ones(2, 9))
    assert model[0].weight.dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------------------------
# Accelerator


def test_an_accelerator_runs_and_saves(tmp_path):
    accelerator = Accelerator(cpu=True, mixed_precision="no", kwargs_handlers=[ours.InitProcessGroupKwargs()])
    model = accelerator.prepare(net())
    assert accelerator.prepare(model, None) == (model, None)
    accelerator.save_model(spread(net()), tmp_path / "spread")
    assert same(bigkit.load_state_dict(tmp_path / "spread"), net().state_dict())
    accelerator.save(net().state_dict(), tmp_path / "a.safetensors", safe_serialization=True)
    assert same(bigkit.load_state_dict(tmp_path / "a.safetensors"), net().state_dict())
    accelerator.save({"a": 1}, tmp_path / "a.bin")
    assert utils.load(tmp_path / "a.bin") == {"a": 1}
    assert accelerator.unwrap_model(nn.DataParallel(model)) is model
    assert accelerator.state.distributed_type == theirs.DistributedType.NO == ours.DistributedType.NO
    with accelerator.split_between_processes([1, 2]) as mine, accelerator.autocast():
        assert accelerator.gather_for_metrics(mine, use_gather_object=True) == [1, 2]
    assert spread(net()) is not accelerator.prepare(spread(net()))  # and it is not moved


def test_what_is_for_training_says_so():
    for options in ({"mixed_precision": "bf16"}, {"gradient_accumulation_steps": 2}, {"log_with": "wandb"}):
        with pytest.raises(ValueError, match=f"{[*options][0]}=.* is for training"):
            Accelerator(cpu=True, **options)
    accelerator = Accelerator(cpu=True)
    with pytest.raises(TypeError, match="prepare takes models, not a DataLoader"):
        accelerator.prepare(net(), torch.utils.data.DataLoader([1]))
    with pytest.raises(TypeError, match="of other things"):
        accelerator.save({"a": 1}, "never.safetensors", safe_serialization=True)


def test_accelerates_config_is_taken():
    pytest.importorskip("bitsandbytes")
    results = []
    for lib in (theirs, ours):
        config = lib.utils.BnbQuantizationConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", torch_dtype=torch.float32
        )
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
        model = bigkit.load_and_quantize_model(model, config, device_map={"": "cpu"})
        results.append(model(torch.ones(1, 64)))
    assert torch.equal(*results)
    with pytest.raises(TypeError, match="not a dict"):
        bigkit.load_and_quantize_model(net(), {"load_in_4bit": True})


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def test_debug_launcher_leaves_gpus_alone():
    def where():
        from bigkit.accelerate.state import AcceleratorState

        state = AcceleratorState()
        return state.device.type, state.distributed_type.value

    assert ours.debug_launcher(where) == [("cpu", "MULTI_CPU")] * 2


def test_a_state_has_what_code_asks_for():
    state = ours.PartialState(cpu=True)
    assert (state.debug, state.fork_launched) == (False, False) and ours.PartialState._shared_state
    assert state.on_main_process()(lambda: 1)() == 1
    state._reset_state()
    assert not ours.PartialState._shared_state and state.process_index == 0
    assert bigkit.gather_object({"a": 1}) == [{"a": 1}]
