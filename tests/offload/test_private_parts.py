"""PyTorch's private parts that the wing uses are there and do what they are used for."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from bigkit.offload import _torch

VERSION = f"in torch {torch.__version__}: see bigkit/offload/_torch.py"


def test_locks_tell_whose_they_are():
    lock, answers = threading.RLock(), []
    assert not _torch.held_by_this_thread(lock), "RLock._is_owned says that a free lock is held"
    with lock:
        thread = threading.Thread(target=lambda: answers.append(_torch.held_by_this_thread(lock)))
        thread.start()
        thread.join()
        assert _torch.held_by_this_thread(lock) and answers == [False], "RLock._is_owned does not tell threads apart"


def test_saved_tensors_hooks_can_be_ended():
    def ours(tensor):
        return tensor

    def other(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(other, other):
        for _ in range(2):
            torch.autograd.graph.saved_tensors_hooks(ours, ours).__enter__()
        _torch.pop_saved_tensors_hooks(lambda pack: pack is ours)
        top = torch._C._autograd._top_saved_tensors_default_hooks(False)
        assert top is not None and top[0] is other, (
            f"other hooks for saved tensors were ended, or ours were not {VERSION}"
        )
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def test_writing_to_the_data_of_what_is_lent_is_seen():
    for tensor in (nn.Parameter(torch.zeros(4)), torch.zeros(4)):
        kind = type(tensor)
        _torch.mark_lent(tensor)
        assert isinstance(tensor, kind) and type(tensor) is not kind, f"__class__ of a tensor was not changed {VERSION}"
        for write in (lambda t: t.data.add_(1), lambda t: setattr(t, "data", torch.ones(4))):
            before = tensor._version
            write(tensor)
            assert tensor._version > before, f"a write to the data of a lent tensor goes unseen {VERSION}"
        with pytest.raises(ValueError, match=r"shape \(4,\) torch.float32 .* cannot become \(2,\)"):
            tensor.data = torch.ones(2)
        assert type(tensor + 1) is torch.Tensor, f"operations on a lent tensor give lent tensors {VERSION}"


def test_writing_to_the_data_of_what_is_copied_to_another_device_is_seen():
    for tensor in (nn.Parameter(torch.zeros(4)), torch.zeros(4)):
        assert _torch.watch_writes(tensor) and _torch.watch_writes(tensor)
        for write in (lambda t: t.data.add_(1), lambda t: setattr(t, "data", torch.ones(2))):
            before = tensor._version
            write(tensor)
            assert tensor._version > before, f"a write to the data of a tied tensor goes unseen {VERSION}"
        assert tensor.shape == (2,) and type(tensor + 1) is torch.Tensor
        for other in (copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor))):
            assert torch.equal(other, tensor) and isinstance(other, nn.Parameter) == isinstance(tensor, nn.Parameter)
    assert not _torch.watch_writes(nn.Linear(1, 1).weight.as_subclass(type("Own", (torch.Tensor,), {})))


def test_what_is_never_compiled_is_not():
    seen = []

    def callee(x):
        return x.sin()

    @_torch.never_compiled
    def apart(x):
        return callee(x)

    def between(x):
        return callee(x)

    only_itself = _torch.never_compiled(between, with_callees=False)

    def backend(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes if node.op.startswith("call"))
        return graph

    for function, names in ((apart, {"cos"}), (only_itself, {"cos", "sin"})):
        torch._dynamo.reset()
        seen.clear()
        result = torch.compile(lambda x: function(x.cos()), backend=backend)(torch.ones(2))  # noqa: B023
        assert torch.equal(result, torch.ones(2).cos().sin())
        assert set(seen) == names, f"torch.compile has compiled {seen}, it should have been {names} {VERSION}"
    torch._dynamo.reset()


def test_torch_has_what_offloading_uses():
    version = f"in torch {torch.__version__}: see bigkit/offload/_torch.py"
    base = torch.zeros(4)
    assert _torch.storage_id(base) == _torch.storage_id(base[1:]), f"views no longer share a storage's _cdata {version}"
    assert _torch.storage_id(base) != _torch.storage_id(base.clone()), f"two storages have one _cdata {version}"
    users = _torch.storage_users(base)
    view = base[1:]
    assert _torch.storage_users(base) == users + 1, f"views no longer count as users of a storage {version}"
    del view
    assert _torch.storage_users(base) == users, f"a view that is gone still counts {version}"
    made = _torch.make_subclass(nn.Parameter, base, False)
    assert type(made) is nn.Parameter and made.data_ptr() == base.data_ptr(), f"_make_subclass copies {version}"
    _torch.mark_parameter(base)
    assert isinstance(base, nn.Parameter), f"_is_param no longer makes a parameter of a tensor {version}"
    assert _torch.detect_fake_mode() is None, f"detect_fake_mode sees a mode where there is none {version}"
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        assert _torch.detect_fake_mode() is mode, f"detect_fake_mode does not see the mode that is on {version}"
        with _torch.real_tensors():
            assert type(torch.zeros(1)) is torch.Tensor, f"unset_fake_temporarily leaves tensors fake {version}"

    class Refusing(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            raise AssertionError("asked")

    with _torch.DisableTorchFunctionSubclass():
        assert torch.add(base.as_subclass(Refusing), 1).sum() == 4, f"a subclass is asked all the same {version}"

    nested = {"a": [base, (1, base)]}
    assert len(_torch.tree_leaves(nested)) == 3, f"_pytree sees other leaves {version}"
    assert _torch.tree_map_only(torch.Tensor, torch.sum, nested) == {"a": [0, (1, 0)]}, f"_pytree maps others {version}"


def test_a_failed_capture_can_be_undone():
    name = "_cuda_endAllocateToPool"
    assert hasattr(torch._C, name) or not hasattr(torch._C, "_CUDAGraph"), f"torch._C.{name} is gone {VERSION}"
    leaves, spec = _torch.tree_flatten({"a": [1, (2,)], "b": None})
    assert _torch.tree_unflatten(list(leaves), spec) == {"a": [1, (2,)], "b": None}
