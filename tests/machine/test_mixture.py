"""The sizes of mixtures, against the layer records and published figures, and a token's time by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigkit import describe
from bigkit.machine.mixture import Mixture, token_time
from bigkit.machine.routing import POLICIES, Routing
from bigkit.model.experts import active_bytes, experts_of

ROUTING = Routing("tiny", 4, (((0, 1), (0, 2), (0, 1)), ((3, 2), (3, 1), (0, 3))))


@pytest.mark.parametrize("name", ["pymoe", "mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3"])
@pytest.mark.parametrize("dtype", [None, "float8_e4m3fn"])
def test_sizes_are_those_of_the_records(name, dtype):
    model = describe(name)
    precision, experts = model.precision(dtype), experts_of(model)
    mixture = Mixture.of(model, dtype)
    assert (mixture.layers, mixture.experts, mixture.per_token) == (
        len(experts),
        experts[0].count,
        experts[0].per_token,
    )
    assert mixture.each == experts[0].bytes_each(precision)
    assert mixture.routed == sum(one.bytes(precision) for one in experts)
    assert mixture.resident + mixture.routed == model.bytes(precision)
    assert mixture.resident + mixture.chosen == active_bytes(model, precision)


def test_a_quantized_checkpoint_counts_as_it_is_stored():
    """gpt-oss-120b: 128 x 36 experts of 3 x 2880 x 2880 weights in 4.25 bits, with biases in bfloat16."""
    mixture = Mixture.of(describe("gpt-oss-120b"))
    assert mixture.each == 3 * 2880 * 2880 * 17 // 32 + 3 * 2880 * 2
    assert round((mixture.routed + mixture.resident) / 2**30, 1) == 60.8


@given(st.sampled_from([*POLICIES]), st.integers(0, 8), st.floats(1, 1e12), st.floats(1, 1e12), st.floats(1, 1e12))
def test_time_by_hand(policy, slots, memory, link, disk):
    mixture = Mixture("m", 5, 8, 2, 1000, 700)
    missed = ROUTING.hits(policy, slots).count(False) / 12 * 5 * 2 * 1000
    found = token_time(mixture, ROUTING, policy, slots, memory=memory, link=link, disk=disk)
    assert found.waits == pytest.approx({"GPU": (700 + 10_000) / memory, "disk": missed / disk, "link": missed / link})
    assert found.seconds == pytest.approx(sum(found.waits.values()))
    assert found.travels == pytest.approx(missed) and found.cache == 5 * 8 * 1000 * slots / 8
    in_ram = token_time(mixture, ROUTING, policy, slots, memory=memory, link=link)
    assert [*in_ram.waits] == ["GPU", "link"] and in_ram.seconds <= found.seconds


def test_errors_are_a_sentence():
    with pytest.raises(ValueError, match="gpt2 has no experts: choose a mixture"):
        Mixture.of(describe("gpt2"))
    mixture = Mixture("m", 5, 8, 2, 1000, 700)
    with pytest.raises(ValueError, match="link brings 0 bytes a second"):
        token_time(mixture, ROUTING, "LRU", 1, memory=1, link=0)
    with pytest.raises(ValueError, match="a cache of 9 experts"):
        token_time(mixture, ROUTING, "LRU", 9, memory=1, link=1)
