"""Accelerate's own functions on models that bigkit has spread: hooks, modules' devices, state dicts, dispatch again."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bigkit import remove_hook_from_module
from tests.clients.places import AWAY, WAYS, check, language_model, quantized, spread_ways
from tests.spread import Net, check_at_rest

accelerate = pytest.importorskip("accelerate")
hooks = accelerate.hooks
from accelerate.utils import modeling  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Twice(hooks.ModelHook):
    def post_forward(self, module, output):
        return 2 * output


def added(model):
    hooks.add_hook_to_module(model.h[1], Twice(), append=True)
    hooks.add_hook_to_module(model.h[2].a, Twice())
    hooks.add_hook_to_module(model, hooks.SequentialHook(Twice(), Twice()), append=True)
    first = model(X)
    hooks.remove_hook_from_module(model.h[2].a)
    return first, model(X)


def replaced(model):
    hooks.add_hook_to_module(model.h[1], Twice())
    return model(X)


def taken(model):
    hooks.remove_hook_from_module(model, recurse=True)
    return model(X), model.double()(X.double())


def taken_from_within(model):
    hooks.remove_hook_from_submodules(model)
    return model(X)


def aligned(model):
    with modeling.align_module_device(model.h[1].a):
        seen = model.h[1].a.weight.clone()
    with modeling.align_module_device(model.h[1].a, "cpu"):
        model.h[1].a.weight.data.mul_(2)
    return seen, model(X)


def has_offloaded(model):
    return [modeling.has_offloaded_params(module) for module in model.modules()]


def set_tensor(model):
    modeling.set_module_tensor_to_device(model, "h.1.a.weight", "cpu", value=torch.ones(8, 8))
    modeling.set_module_tensor_to_device(model, "scale", "cpu", value=torch.full((8,), 0.5))
    return model(X), model(X)


def same_class(model):
    weight = model.h[1].a.weight
    made = type(weight)(torch.ones(8, 8), requires_grad=False)
    return type(made) is nn.Parameter, made.requires_grad, made


def facts(model):
    return (
        modeling.compute_module_sizes(model)[""],
        modeling.find_tied_parameters(model),
        [name for name, _ in modeling.named_module_tensors(model, recurse=True)],
        [*modeling.infer_auto_device_map(model, {"cpu": 10**6}).items()],
    )


def their_state_dict(model):
    state = modeling.get_state_dict_offloaded_model(model)
    return [*map(str, state)], [state[name].clone() for name in state]


def unwrapped(model):
    one = accelerate.Accelerator(cpu=True)
    return one.unwrap_model(model)(X), [value.clone() for value in one.get_state_dict(model).values()]


def brought_by_them(model):
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    hooks.attach_align_device_hook(model, execution_device="cpu", offload=True, weights_map=state)
    return model(X), model(X)


USES = [
    added, replaced, taken, taken_from_within, aligned, has_offloaded, set_tensor, same_class, facts,
    their_state_dict, unwrapped, brought_by_them,
]  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_functions_of_accelerate(use, tmp_path):
    torch.manual_seed(0)
    check(Net(), use, tmp_path)


AGAIN = {
    "dispatch_model": lambda model, folder: accelerate.dispatch_model(
        model, {"scale": "cpu", "h": "cpu", "out": "cpu"}, main_device="cpu", force_hooks=True
    ),
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, "cpu"),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, folder / "theirs", "cpu"),
    "cpu_offload_with_hook": lambda model, folder: accelerate.cpu_offload_with_hook(
        remove_hook_from_module(model, recurse=True), "cpu"
    )[0],
}


@pytest.mark.parametrize("again", AGAIN.values(), ids=AGAIN)
def test_spread_again_by_accelerate(again, tmp_path):
    torch.manual_seed(0)
    model = Net()
    for way, parts in spread_ways(model, tmp_path):
        parts(X)
        parts = again(parts, tmp_path / way)
        assert torch.equal(parts(X), model(X)) and torch.equal(parts(X), model(X)), way


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_saved_and_loaded_by_accelerate(tie, tmp_path):
    model, other, ids = language_model(tie), language_model(tie), torch.arange(5)[None]
    for tensor in other.parameters():
        tensor.data.mul_(2)
    accelerate.Accelerator(cpu=True).save_model(other, tmp_path / "other")
    for way, parts in spread_ways(model, tmp_path):
        accelerate.Accelerator(cpu=True).save_model(parts, tmp_path / f"{way} saved")
        again = load_file(tmp_path / f"{way} saved" / "model.safetensors")
        expected = {name: value for name, value in model.state_dict().items() if not tie or name != "lm_head.weight"}
        assert again.keys() == expected.keys(), way
        assert all(torch.equal(again[name], value) for name, value in expected.items()), way
        accelerate.load_checkpoint_in_model(parts, tmp_path / "other")
        assert torch.equal(parts(ids).logits, other(ids).logits), way
        check_at_rest(parts)


def test_what_would_move_the_model_is_refused(tmp_path):
    """`prepare` of a model that Accelerate itself has offloaded is refused too."""
    model = Net()
    for way, parts in spread_ways(model, tmp_path, AWAY):
        with pytest.raises(RuntimeError, match="cannot be moved or cast as a whole: call bigkit.remove_hook"):
            accelerate.Accelerator(cpu=True).prepare(parts)
        assert torch.equal(parts(X), model(X)), way
    resident = WAYS["GPUs"](model, tmp_path)
    assert torch.equal(accelerate.Accelerator(cpu=True).prepare(resident)(X), model(X))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_hooks_of_accelerate_leave_fewer_bits(kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    ids = torch.arange(7)[None]
    with torch.no_grad():
        expected, model = quantized(kind, None, tmp_path)(ids).logits, quantized(kind, "cpu", tmp_path)
        layer = model.model.layers[0].self_attn.q_proj
        with modeling.align_module_device(layer):
            assert layer.weight.dtype in (torch.uint8, torch.int8)
        hooks.add_hook_to_module(model.model.layers[0], hooks.ModelHook(), append=True)
        torch.testing.assert_close(model(ids).logits, expected)
        hooks.remove_hook_from_module(model, recurse=True)
        torch.testing.assert_close(model(ids).logits, expected)
