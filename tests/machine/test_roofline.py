"""Times from costs: limits, scaling, and the two lanes."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigkit.machine.hardware import GPUS
from bigkit.machine.ledger import Calibration
from bigkit.machine.roofline import ARRIVE, FILL, LEAVE, TYPICAL, WAIT, Operation, Rates, rate_at, run_steps
from bigkit.machine.streams import Span, Turn, schedule

FLAT = Rates(1e12, {"float16": ((1e9, 1e14),)}, ((1e9, 1e14),), issue=1e-5, kernel=1e-6, link=5e10, peer=2e11, disk=2e9)


def product(flops=0, size=0, device="cuda:0", issued=1, source=""):
    return Operation("mm", device, flops, size, "float16", issued, source)


def test_one_operation_takes_the_longer_of_its_limits():
    assert FLAT.seconds(product()) == FLAT.kernel
    assert FLAT.seconds(product(flops=10**12)) == pytest.approx(0.01, rel=0.01)
    assert FLAT.seconds(product(flops=10**12, size=10**11)) == pytest.approx(0.1 / TYPICAL.weights, rel=0.01)
    assert FLAT.seconds(product(size=10**11)) == pytest.approx(0.1 / TYPICAL.streamed, rel=0.01)
    assert FLAT.seconds(product(size=2 * 10**9, source="cpu")) == pytest.approx(10**9 / 5e10)
    assert FLAT.seconds(product(size=2 * 10**9, source="cuda:1")) == pytest.approx(10**9 / 2e11)


def test_kinds_of_kernels_reach_their_shares_of_the_memorys_rate():
    def seconds(name, flops):
        return FLAT.seconds(Operation(name, "cuda:0", flops, 10**12, "float16"))

    for name, share in (("mm", TYPICAL.weights), ("bmm", TYPICAL.streamed), ("_grouped_mm", TYPICAL.grouped),
                        ("_scaled_dot_product_flash_attention", TYPICAL.attended)):  # fmt: skip
        assert seconds(name, 1) == pytest.approx(1 / share, rel=0.01)
    for name, share in (("add", TYPICAL.streamed), ("mean", TYPICAL.reduced), ("sort", TYPICAL.streamed)):
        assert seconds(name, 0) == pytest.approx(1 / share, rel=0.01)
    small = [FLAT.seconds(Operation(name, "cuda:0", 0, 8, "float16")) for name in ("add", "mean", "sort")]
    assert small == pytest.approx(
        [FLAT.kernel, FLAT.kernel + TYPICAL.reduction, FLAT.kernel + TYPICAL.sorting], rel=1e-3
    )


def test_elements_one_by_one_have_a_rate_of_their_own():
    one_by_one = TYPICAL.scattered * FLAT.memory
    added = Operation("add", "cuda:0", 0, 10**6, "float16", scattered=10**9)
    assert FLAT.seconds(added) == pytest.approx(2 * 10**9 / one_by_one, rel=0.01)
    assert FLAT.seconds(replace(added, dtype="float32")) == pytest.approx(4 * 10**9 / one_by_one, rel=0.01)
    assert FLAT.seconds(replace(added, bytes=10**12)) == pytest.approx(1 / TYPICAL.streamed, rel=0.01)


@given(st.floats(1, 1e20))
def test_a_rate_lies_between_the_measured_ones(size):
    table = [(1e3, 5.0), (1e6, 50.0), (1e9, 40.0)]
    assert 5 <= rate_at(table, size) <= 50
    for known, rate in table:
        assert rate_at(table, known) == pytest.approx(rate)


def test_python_or_the_gpu_is_what_takes_long():
    small = [product() for _ in range(100)]
    large = [product(flops=10**11) for _ in range(100)]  # 1 ms each
    [step] = run_steps(small, [("prefill", 100)], {"cuda:0": FLAT})
    assert step.bottleneck == "python" and step.seconds == pytest.approx(100 * 1e-5, rel=0.01)
    [step] = run_steps(large, [("prefill", 100)], {"cuda:0": FLAT})
    assert step.bottleneck == "cuda:0" and step.seconds == pytest.approx(0.1, rel=0.01)
    assert run_steps([], [("prefill", 0)], {"cuda:0": FLAT})[0].seconds == 0


def test_two_devices_take_turns():
    work = [
        product(10**11),
        product(size=2 * 10**8, device="cuda:1", source="cuda:0"),
        product(10**11, device="cuda:1"),
    ]
    [step] = run_steps(work, [("prefill", 3)], {"cuda:0": FLAT, "cuda:1": FLAT})
    assert step.seconds == pytest.approx(1e-3 + 5e-4 + 1e-3, rel=0.02)


@given(st.lists(st.tuples(st.integers(0, 10**12), st.integers(0, 10**9)), max_size=20), st.integers(0, 20))
def test_steps_add_up(costs, cut):
    work = [product(*cost) for cost in costs]
    cut = min(cut, len(work))
    first, second = run_steps(work, [("a", cut), ("b", len(work))], {"cuda:0": FLAT})
    [whole] = run_steps(work, [("a", len(work))], {"cuda:0": FLAT})
    assert whole.seconds <= first.seconds + second.seconds + 1e-12  # waiting between steps only costs
    assert first.busy["cuda:0"] + second.busy["cuda:0"] == pytest.approx(whole.busy["cuda:0"])


def test_rates_of_a_vendor_and_of_a_machine():
    rates = Rates.of_gpu(GPUS["H100-80GB"])
    assert rates.table("bfloat16") is rates.products["bfloat16"] and rates.table("int8") is rates.products["float32"]
    measured = Calibration("m", memory=1e12, issue=5e-6, products={"float16": ((1e9, 1e13),)})
    mixed = Rates.of_calibration(measured, GPUS["T4"])
    assert mixed.memory == 1e12 and mixed.issue == 5e-6 and mixed.link == Rates.of_gpu(GPUS["T4"]).link
    assert mixed.measured and Rates.of_calibration(replace(measured, disk_warm=3e9), GPUS["T4"]).disk == 3e9
    with pytest.raises(ValueError, match="lacks attention, kernel, link, peer, disk: name a GPU"):
        Rates.of_calibration(measured)


def moves(unit, slot, rests):
    """What a streamer notes when a unit is fetched, worked with (1 ms) and its slot given back."""
    fill, arrive, leave = (
        Operation(name, "cuda:0", 0, 10**9, "uint8", 0, rests, slot, unit) for name in (FILL, ARRIVE, LEAVE)
    )
    return fill, [arrive, product(10**11, issued=0), leave]


@pytest.mark.parametrize("rests", ["cpu", "disk"])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_steps_keep_the_clock_of_schedules(rests, slots):
    """A dry run's operations and a schedule of the same units end at the same time, copy by copy."""
    fills, works = zip(*(moves(f"h.{i}", i % slots, rests) for i in range(6)))
    operations = [*fills[:slots]]
    for i, work in enumerate(works):
        operations += [*work, *fills[i + slots : i + slots + 1]]
    spans = []
    [step] = run_steps(operations, [("token", len(operations))], {"cuda:0": FLAT}, spans)
    work = FLAT.seconds(product(10**11))
    blocks = [Turn(f"h.{i}", 10**9, work, rests) for i in range(6)]
    expected = schedule(blocks, link=FLAT.link, disk=FLAT.disk, slots=slots)
    ends = {span.name: span.end for span in spans if span.lane == "copy to cuda:0"}
    assert step.seconds == pytest.approx(expected.seconds)
    for span in expected.spans:
        if span.lane == "link" and span.token == 0:
            assert ends[blocks[span.turn].name] == pytest.approx(span.end)


def test_python_waits_for_a_value():
    spans = []
    asks = Operation(WAIT, "cuda:0", 0, 0, "bool")
    run_steps([product(10**11), asks, product()], [("token", 3)], {"cuda:0": FLAT}, spans)
    work, last = (span for span in spans if span.lane == "cuda:0")
    assert last.start > work.end and isinstance(last, Span)


def test_small_pieces_of_files_are_read_at_the_rate_that_was_measured():
    def seconds(nbytes, in_pieces, pieces=((1e8, 1e10), (1e10, 1e11))):
        fill, arrive = (
            Operation(name, "cuda:0", 0, nbytes, "uint8", 0, "disk", 0, "experts", experts=8, in_pieces=in_pieces)
            for name in (FILL, ARRIVE)
        )
        fast = replace(FLAT, disk=1e11, link=1e15, pieces=pieces)
        return run_steps([fill, arrive], [("token", 2)], {"cuda:0": fast})[0].seconds

    assert seconds(10**8, False) == seconds(10**8, True, ()) == pytest.approx(1e-3, rel=1e-3)
    assert seconds(10**8, True) == pytest.approx(1e-2, rel=1e-3)
    assert seconds(10**10, True) == pytest.approx(0.1, rel=1e-3), "many pieces keep all readers at work"
