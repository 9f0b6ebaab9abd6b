"""PyTorch's private parts that the wing uses are there and do what they are used for."""

import torch
from torch import nn

from bigkit.offload import _torch


def test_torch_has_what_offloading_uses():
    version = f"in torch {torch.__version__}: see bigkit/offload/_torch.py"
    base = torch.zeros(4)
    assert _torch.storage_id(base) == _torch.storage_id(base[1:]), f"views no longer share a storage's _cdata {version}"
    assert _torch.storage_id(base) != _torch.storage_id(base.clone()), f"two storages have one _cdata {version}"
    made = _torch.make_subclass(nn.Parameter, base, False)
    assert type(made) is nn.Parameter and made.data_ptr() == base.data_ptr(), f"_make_subclass copies {version}"
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
