"""MLPs that the CPU computes where they rest, for few tokens: who works where, the same outputs, all given back."""

import copy

import pytest
import torch

import bigkit
from bigkit.maps.on_cpu import FEW
from bigkit.offload.grouping import handles
from bigkit.zoo.gpt import load_pygpt
from tests.spread import STAND_IN, Net, check_at_rest, same, spread

MLP = 2 * (2 * 4 * 256 * 256 + 4 * 256 + 256)  # bytes of pygpt's


@pytest.fixture(scope="module")
def whole():
    return load_pygpt().eval().requires_grad_(False)


def told(model):
    """What streamers say from now on, as (device, kind, unit)."""
    found = {id(hook.streamer): hook.streamer for module in model.modules() for hook in _hooks(module) if hook.streamer}
    events = []
    for streamer in found.values():
        streamer.listeners.append(lambda event: events.append((event.device, event.kind, event.unit)))
    return events


def _hooks(module):
    from bigkit.offload.hooks import AlignDevicesHook, hooks_in

    return [hook for hook in hooks_in(module) if isinstance(hook, AlignDevicesHook)]


@pytest.mark.parametrize("main", [0, [0, 1]])
def test_few_tokens_are_computed_where_the_weights_rest_and_many_are_streamed(whole, main):
    model = spread(copy.deepcopy(whole), {"": "cpu"}, main_device=main, on_cpu=4 * MLP)
    events = told(model)
    for count in (1, FEW, FEW + 1, 1):
        tokens = torch.randint(0, 256, (1, count))
        events.clear()
        assert same(model(tokens), whole(tokens))
        check_at_rest(model)
        on_cpu = [unit for device, kind, unit in events if device == "cpu" and kind == "work"]
        chosen = [f"transformer.h.{i}.mlp" for i in ((0, 2, 5, 7) if main == 0 else (0, 1, 4, 5))]
        assert on_cpu == (chosen if count <= FEW else []), count


def test_a_model_without_such_parts_is_refused_and_left_as_it_was(whole):
    net = Net()
    with pytest.raises(ValueError, match="on_cpu: no block has an MLP"):
        spread(net, {"": "cpu"}, main_device=0, on_cpu=10**6)
    assert not handles(net)
    half = copy.deepcopy(whole).half()
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        bigkit.cpu_offload(half, 0, stand_in=STAND_IN, on_cpu="1GB")
