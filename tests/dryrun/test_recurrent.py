"""Recurrent layers on fake GPUs give what they give on the CPU: shapes; and nothing asks for a real GPU."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from bigkit.dryrun.fake_gpu import fake_gpus

LAYERS = {
    "lstm": lambda **place: nn.LSTM(4, 6, batch_first=True, **place),
    "lstm, projected": lambda **place: nn.LSTM(4, 6, 2, bias=False, bidirectional=True, proj_size=3, **place),
    "gru": lambda **place: nn.GRU(4, 6, 2, bidirectional=True, **place),
    "relu": lambda **place: nn.RNN(4, 6, nonlinearity="relu", **place),
    "tanh": lambda **place: nn.RNN(4, 6, bias=False, **place),
}


def shapes(output):
    return [shapes(item) if isinstance(item, tuple) else tuple(item.shape) for item in output]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", LAYERS)
def test_shapes_are_those_of_the_cpu(name):
    expected = LAYERS[name]()(torch.zeros(2, 3, 4))
    with fake_gpus():
        found = LAYERS[name](device="cuda:1")(torch.zeros(2, 3, 4, device="cuda:1"))
        assert found[0].device == torch.device("cuda:1")
    assert shapes(found) == shapes(expected)


def test_packed_sequences():
    sequences = [torch.zeros(3, 4), torch.zeros(2, 4)]
    expected, _ = nn.LSTM(4, 6)(pack_sequence(sequences))
    with fake_gpus():
        layer = nn.LSTM(4, 6, device="cuda:1")
        rows = torch.zeros(5, 4, device="cuda:1")
        data = torch.lstm(
            rows, expected.batch_sizes, (torch.zeros(1, 2, 6, device="cuda:1"),) * 2, layer._flat_weights, True, 1, 0.0,
            False, False,
        )[0]  # fmt: skip
    assert data.shape == expected.data.shape


def test_new_tensors_lie_beside_the_old():
    with fake_gpus():
        old = torch.zeros(2, device="cuda:1", dtype=torch.float16)
        assert old.new_tensor([1, 2]).device == torch.device("cuda:1")
        assert old.new_tensor([1, 2]).dtype == torch.float16
        assert old.new_tensor([1], device="cpu", dtype=torch.int64).device.type == "cpu"
