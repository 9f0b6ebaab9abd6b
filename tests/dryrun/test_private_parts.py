"""What dry runs use of PyTorch's and bitsandbytes' private parts is there; if not, the sentence says what is gone."""

import inspect

import pytest
import torch
from torch._subclasses import fake_tensor
from torch.overrides import TorchFunctionMode

from bigkit.dryrun import _torch
from bigkit.dryrun.fake_gpu import fake_gpus


def test_pytorch_has_what_fake_gpus_need():
    seen = f"PyTorch {torch.__version__}; bigkit/dryrun/_torch.py was written for 2.11 to 2.15"
    assert hasattr(fake_tensor, "init_gpu_context"), f"fake_tensor.init_gpu_context is gone: {seen}"
    assert "torch.utils.swap_tensors(" in inspect.getsource(torch.nn.Module._apply), f"Module.to swaps no more: {seen}"
    mode = _torch.FakeTensors.__mro__[1]
    assert "avoid_device_init" in vars(mode), f"FakeTensorMode.avoid_device_init is gone: {seen}"
    source = inspect.getsource(mode.__enter__)
    assert "_ensureCUDADeviceGuardSet" in source, f"FakeTensorMode sees to no device guard any more: {seen}"
    assert _torch.packet_of(_torch.READ_VALUE.default) is _torch.READ_VALUE, f"_overloadpacket is gone: {seen}"
    assert _torch.flop_formula(_torch.aten.mm), f"flop_registry has no formula for mm: {seen}"
    for name, packet in _torch.ATTENTION.items():
        assert packet.overloads(), f"the {name} kernel of attention is gone: {seen}"
    for packet in (_torch.GROUPED_MM, _torch.TO_COPY, _torch.UNSAFE_VIEW, _torch.READ_VALUE, _torch.ASK_DEVICE):
        assert packet.overloads(), f"{packet} is gone: {seen}"


def test_no_function_mode_is_asked_within_plain_calls():
    class Refusing(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            raise AssertionError(f"{func} was asked for")

    with Refusing(), _torch.plain_calls():
        assert torch.ones(2).shape == (2,)
    with Refusing(), pytest.raises(AssertionError, match="ones"):
        torch.ones(2)


def test_transformers_asks_whether_a_tensor_has_data():
    transformers = pytest.importorskip("transformers")
    from transformers.utils import import_utils

    seen = f"Transformers {transformers.__version__}; bigkit/dryrun/_transformers.py was written for 5.17 to 5.23"
    assert "is_fake_tensor(tensor)" in inspect.getsource(import_utils.is_tracing), f"is_fake_tensor is gone: {seen}"


def test_the_registry_of_device_guards_is_a_table_of_pointers():
    try:
        registry = _torch.device_guards()
    except RuntimeError as error:
        pytest.skip(str(error))
    assert registry[0] and registry[14], "c10::DeviceType has the CPU at 0 and meta at 14 no more"


def test_a_tensor_of_one_storage_has_one_key():
    with fake_gpus():
        a = torch.empty(4, device="cuda:0")
        assert _torch.storage_key(a) == _torch.storage_key(a[1:]) != _torch.storage_key(a.clone())


def test_bitsandbytes_has_what_quantized_dry_runs_need():
    bnb = pytest.importorskip("bitsandbytes")
    from bigkit.dryrun import _bnb

    seen = f"bitsandbytes {bnb.__version__}; bigkit/dryrun/_bnb.py was written for 0.49 and 0.50"
    module, functions, _ = _bnb._cuda_kernels()
    names = {str(operation) for operation in functions}
    for name in ("dequantize_4bit", "quantize_4bit", "int8_linear_matmul", "int8_vectorwise_quant", "int8_mm_dequant"):
        assert f"bitsandbytes.{name}.default" in names, f"no function for CUDA does {name}: {seen}"
    assert "get_ptr" in vars(module), f"the functions for CUDA get pointers by another name than get_ptr: {seen}"
    for name in ("name2qmap", "create_dynamic_map"):
        assert hasattr(bnb.functional, name), f"functional.{name} is gone: {seen}"
