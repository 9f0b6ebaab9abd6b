"""What the CPU reads when a CUDA graph calls it, with stand-ins for graph and links."""

import gc
from unittest import mock

import pytest
import torch

from bigkit.measure import links
from bigkit.offload import host_calls
from tests import fake_graph


class Traffic:
    """Links that bring nothing, and are asked for it."""

    devices = [torch.device("cpu")]

    def __init__(self):
        self.started = self.finished = 0

    def start(self, pieces):
        self.started += pieces > 0

    def rates(self):
        return (5e9, 6e9)

    def finish(self):
        self.finished += 1
        return self.rates()


@pytest.fixture(autouse=True)
def _tapes(monkeypatch):
    monkeypatch.setattr(links, "Recording", fake_graph.Recording)


def test_a_graph_calls_for_the_same_products():
    mlps = [tuple(torch.randn(shape) for shape in ((11, 4), (11, 4), (4, 11))) for _ in range(2)]
    x = expected = torch.randn(1, 4)
    for k in range(5):
        expected = links._product(mlps[k % 2], expected)
    called = links.Called(torch.device("cpu"), mlps, x, 5)
    results = []
    with mock.patch.object(
        links, "_product", lambda *args, own=links._product: results.append(own(*args)) or results[-1]
    ):
        assert called() == called() == 5 * 3 * 44 * 4
    assert torch.equal(results[-1], expected) and len(results) == 5  # a tape's first play has nothing left to do
    assert links.Called(torch.device("cpu"), [], x, 7)() == 7
    del called
    gc.collect()
    assert not host_calls._functions  # what was called ends with the graph


def test_rates_of_links_are_those_meanwhile():
    traffic, threads = Traffic(), torch.get_num_threads()
    rows = links.measure_cpu(2**18, 0.001, traffic, width=64)
    assert rows.keys() == {"bfloat16", "float32"}
    assert {row[2] for own in rows.values() for row in own} == {11e9}
    assert traffic.started == traffic.finished == sum(map(len, rows.values())) and torch.get_num_threads() == threads


@pytest.mark.parametrize("call, takes", [(0, 0.004), (0.001, 0.003), (0.01, 0.002)])
def test_what_a_call_takes_is_taken_off(call, takes, monkeypatch):
    """But half of the time at most: what was measured apart may be longer by chance."""
    mlp = 3 * 64 * 176 * 4
    monkeypatch.setattr(links, "_reading", lambda work, seconds, traffic: (mlp / 0.004, 5e9))
    rows = links.measure_cpu(2**18, traffic=Traffic(), call=call, width=64)["float32"]
    assert [reads for _, reads, _ in rows] == pytest.approx([mlp / takes] * len(rows))
