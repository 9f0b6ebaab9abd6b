"""What PyTorch keeps for itself and this wing uses: each name is there and does what it is used for."""

import threading

import pytest
import torch
from torch import nn

from bigkit.meta import _torch

GONE = "torch {version} has no {name} any more: bigkit/meta/_torch.py must find another way"


@pytest.mark.parametrize(
    "owner, name",
    [
        (torch._ops, "OpOverload"),
        (torch, "_neg_view"),
        (torch.Tensor, "_make_subclass"),
        (torch.UntypedStorage, "_cdata"),
        (torch._C, "DisableTorchFunction"),
        (nn.Module, "_save_to_state_dict"),
        (torch.utils._python_dispatch.TorchDispatchMode, "_should_skip_dynamo"),
        (nn.modules.module, "register_module_parameter_registration_hook"),
        (nn.modules.module, "register_module_buffer_registration_hook"),
    ],
)
def test_a_name_is_there(owner, name):
    assert hasattr(owner, name), GONE.format(version=torch.__version__, name=f"{owner.__name__}.{name}")


@pytest.mark.parametrize("name", ["_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"])
def test_a_module_has_its_dictionaries(name):
    assert name in vars(nn.Linear(2, 2)), GONE.format(version=torch.__version__, name=f"nn.Module.{name}")


def test_a_schema_says_what_a_call_writes():
    argument = torch.ops.aten.add_.Tensor._schema.arguments[0]
    assert argument.alias_info.is_write and not argument.kwarg_only
    assert _torch.is_operation(torch.ops.aten.add_.Tensor)


def test_views_of_another_storage():
    waves = torch.randn(4, dtype=torch.complex64).conj()
    for tensor in (waves, waves.imag, waves[1:], waves.view(2, 2).t()):
        assert torch.equal(_torch.view_like(tensor, waves.untyped_storage()), tensor)


def test_a_twin_keeps_class_and_attributes():
    class Marked(nn.Parameter):
        pass

    parameter = Marked(torch.zeros(2))
    parameter.mark = "hello"
    other = _torch.twin(parameter, torch.ones(3, dtype=torch.float16))
    assert type(other) is Marked and other.mark == "hello" and other.requires_grad and other.tolist() == [1, 1, 1]


def test_only_a_thread_with_a_watcher_tells_it():
    here, told = threading.local(), []

    class Watcher:
        def on_parameter(self, parameter):
            told.append("parameter")
            return parameter

        def on_buffer(self, buffer):
            told.append("buffer")
            return buffer

        def on_attribute(self, module, name):
            told.append(name)

    plain = nn.Module.__setattr__
    undo = _torch.watch_modules(lambda: getattr(here, "watcher", None))
    try:
        thread = threading.Thread(target=lambda: nn.BatchNorm1d(2))
        thread.start()
        thread.join()
        nn.BatchNorm1d(2)
        assert told == []
        here.watcher = Watcher()
        nn.BatchNorm1d(2).mask = torch.zeros(2)
    finally:
        undo()
    assert told.count("parameter") == 2 and told.count("buffer") == 3 and told[-1] == "mask"
    assert nn.Module.__setattr__ is plain
