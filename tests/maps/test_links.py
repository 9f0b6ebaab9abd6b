"""Layers at rest take turns on all GPUs: the rule, plans by it, and what is said of them."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigkit import advise, dry_run, plan, zoo
from bigkit.machine.hardware import machine_of
from bigkit.machine.ledger import Calibration, Ledger
from bigkit.maps.links import links_of, take_turns
from bigkit.maps.on_cpu import HOST, Reading, best_count, readings_of, token_seconds
from bigkit.maps.partition import spread
from bigkit.maps.plan import Plan

LLAMA, RAM = "llama-2-7b", {"cpu": "64GiB"}
H200 = Calibration(
    "this", "H200", link_pinned=55e9, memory=4.2e12, issue=5.4e-6, disk_warm=20e9, links=(55e9,),
    cpu_reads={"bfloat16": ((8, 40e9, 54e9), (16, 62e9, 52e9))},
)  # fmt: skip


@given(st.lists(st.integers(1, 9), max_size=9), st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=3))
def test_each_goes_where_it_would_be_first(sizes, links):
    turns = take_turns(sizes, links)
    for i, turn in enumerate(turns):
        brought = [sum(size for size, other in zip(sizes[:i], turns) if other == k) for k in range(len(links))]
        ends = [(brought[k] + sizes[i]) / links[k] for k in range(len(links))]
        assert ends[turn] == pytest.approx(min(ends))
    if sizes and len(sizes) >= 4 * sum(links):  # in proportion, as far as whole layers go
        busy = [sum(size for size, turn in zip(sizes, turns) if turn == k) / links[k] for k in range(len(links))]
        assert max(busy) - min(busy) <= max(sizes)


def test_half_of_the_bytes_wait_at_each_of_two_links():
    one, two = (plan(LLAMA, {**dict.fromkeys(range(n), "3GiB"), **RAM}, dtype="bfloat16", context=512) for n in (1, 2))
    works = [layer.works for layer in two.layers if layer.device == "cpu"]
    assert abs(works.count(0) - works.count(1)) <= 1 and "GPU 0 and GPU 1 when their turn comes" in two.explain()
    assert {share.device: share.reserve > 0 for share in two.shares if share.runs} == {0: True, 1: True}
    times = [advise_one(LLAMA, f"{n} x 3GiB") for n in (1, 2)]
    assert one.offloaded > two.offloaded and times[0] / times[1] > 2.2


def advise_one(model, machine):
    own = replace(machine_of("2 x H200" if machine[0] == "2" else "H200"), name="x", ram=64 * 2**30)
    gpus = tuple(replace(gpu, memory=3 * 2**30) for gpu in own.gpus)
    return advise(model, replace(own, gpus=gpus), context=512, stored=[None]).best.waits["link"]


def test_the_cache_of_a_layer_at_rest_lies_where_it_works():
    found = plan(LLAMA, {0: "3GiB", 1: "3GiB", **RAM}, dtype="bfloat16", context=1024)
    per_layer = 2 * 4096 * 2 * 1024
    for share in found.shares[:2]:
        blocks = [layer for layer in found.layers if ".layers." in layer.name]
        here = [layer for layer in blocks if (layer.device if layer.works is None else layer.works) == share.device]
        assert share.kv_cache == len(here) * per_layer


def test_slow_links_bring_less():
    found = plan(LLAMA, {0: "2GiB", 1: "2GiB", **RAM}, dtype="bfloat16", links=[3, 1])
    works = [layer.works for layer in found.layers if ".layers." in layer.name and layer.works is not None]
    assert works.count(0) / works.count(1) == pytest.approx(3, rel=0.2)
    again = Plan.from_json(found.to_json())
    assert again == found and again.device_map.works == found.device_map.works and "links=[3, 1]" in found.to_code()


def test_a_gpu_without_room_for_slots_only_keeps_layers():
    """A GPU of 300 MiB holds the embedding of 250 MiB, and no block of 386 MiB."""
    found = plan(LLAMA, {0: "3GiB", 1: "300MiB", **RAM}, dtype="bfloat16")
    assert any(layer.device == 1 for layer in found.layers)
    assert found.feasible and {layer.works for layer in found.layers} <= {None, 0}


def test_links_are_those_that_were_measured_together():
    two = machine_of("2 x RTX 4090")
    measured = replace(H200, links=(26.1e9, 12.9e9))
    assert links_of(two, measured) == [1.0, 0.5] and links_of(two, H200) == [1.0, 1.0]
    assert links_of(two, replace(H200, links=(26.1e9, 25.8e9))) == [1.0, 1.0]  # equal, as far as one can tell


def test_a_dry_run_follows_the_plan():
    found = plan("pygpt", {0: "4MiB", 1: "4MiB", "cpu": "1GiB"})
    run = dry_run("pygpt", found, 1, 8, 1)
    assert {device for device in run.busy if device.startswith("copy to")} == {"copy to cuda:0", "copy to cuda:1"}
    for share in found.shares[:2]:
        assert run.timeline(share.device).at_peak()["slots"] <= share.reserve


# ---------------------------------------------------------------------------------------------------------------------
# MLPs on the CPU


def test_as_many_mlps_as_make_a_token_shortest():
    readings, layers = [Reading(8, 40e9, 54e9), Reading(16, 62e9, 52e9)], [(262, 0), *[(405, 270)] * 32, (262, 0)]
    layers = [(size * 10**6, mlp * 10**6) for size, mlp in layers]
    sizes = [mlp for _, mlp in layers if mlp]
    for slots, hop, graph in ((2, 1e-3, False), (4, 1e-3, False), (4, 2e-4, True)):
        count, reading, seconds = best_count(layers, 0.02, readings, slots, hop, graph)
        took = {
            (k, own): token_seconds(layers, spread(sizes, k * sizes[0]), 0.02, own, slots, hop, graph)
            for k in range(33) for own in readings
        }  # fmt: skip
        assert seconds == min(took.values()) == took[count, reading]
        travels, read = sum(size for size, _ in layers) - count * sizes[0], count * (sizes[0] / reading.reads + hop)
        assert max(travels / reading.links, read + 0.02) < seconds < 1.2 * max(travels / reading.links, read + 0.02)
    assert best_count(layers, 0.02, [Reading(2, 1e9, 40e9)], slots=4)[0] <= 1


def test_without_the_cpu_a_token_takes_what_the_link_takes():
    layers = [(10**8, 0)] * 9
    for graph in (True, False):
        assert token_seconds(layers, [], 0.001, Reading(1, 1.0, 1e10), 2, 0.0, graph) == pytest.approx(0.09, rel=0.02)


@pytest.mark.parametrize("shape, gpu, hop", [("graph", 0.15e-3, None), ("1x1", 0.7e-3, HOST.hops)])
def test_what_was_foretold_from_measured_rates_was_measured(shape, gpu, hop):
    """One H200, whose host computed 23 of 32 MLPs of a Llama-7B; `gpu` is what the benchmark takes for a block."""
    kept = json.loads((Path(__file__).parents[2] / "benchmarks/results/links.json").read_text())["rows"]
    [took] = [row for row in kept if row.get("count") == 23 and row["shape"] == shape]
    [read] = [row for row in kept if row["way"] == "beside one link: CPU reads, bfloat16" and "16" in row["shape"]]
    [call] = [row["s"] for row in kept if row["way"] == "a graph calls the CPU, busy link"]
    mlp, layers = 270_532_608, [(262_144_000, 0), *[(404_766_720, 270_532_608)] * 32, (8_192, 0), (262_144_000, 0)]
    reading = Reading(16, read["gb_s"] * 1e9, read["link_gb_s"] * 1e9)
    chosen = spread([mlp] * 32, 23 * mlp)
    seconds = token_seconds(layers, chosen, 32 * gpu, reading, took["slots"], hop or call, shape == "graph")
    assert seconds == pytest.approx(took["predicted_s"], rel=2e-3) and seconds == pytest.approx(took["s"], rel=0.15)


@pytest.fixture
def calibrated(tmp_path, monkeypatch):
    def calibrate(calibration):
        monkeypatch.setenv("BIGKIT_LEDGER", str(tmp_path / "ledger.json"))
        Ledger.load().add(calibration)
        return replace(machine_of("H200"), name="this machine: H200", gpus=machine_of("H200").gpus)

    return calibrate


def test_a_plan_with_the_cpu_where_it_pays(calibrated):
    machine = calibrated(H200)
    ask = {"max_memory": {0: "3GiB", **RAM}, "dtype": "bfloat16", "hardware": machine, "overhead": 0, "context": 512}
    without, found = plan(LLAMA, **ask), plan(LLAMA, on_cpu=True, **ask)
    assert without.on_cpu is None and found.feasible and found.slots > without.slots
    nbytes, threads = found.on_cpu
    assert threads == 16 and 0.4 < nbytes / sum(l.bytes for l in found.layers if l.works is not None) < 0.55  # noqa: E741
    assert "the CPU computes" in found.explain() and "instead of" in found.explain()
    assert Plan.from_json(json.dumps(asdict(found))) == found and "on_cpu=True" in found.to_code()
    few = replace(machine, gpus=(replace(machine.gpus[0], memory=3 * 2**30 + machine.overhead),))
    notes = advise(LLAMA, few, context=512).notes
    assert any("the CPU computes" in note and note.startswith("bfloat16: ") for note in notes), notes


def test_what_a_graph_takes_is_said_beside_python(calibrated):
    machine = calibrated(replace(H200, call=2e-4))
    ask = {"max_memory": {0: "3GiB", **RAM}, "dtype": "bfloat16", "hardware": machine, "overhead": 0, "context": 512}
    said = plan(LLAMA, on_cpu=True, **ask).explain()
    found = re.search(r"predicted ([\d.]+) ms a token within bigkit.graph_decode, ([\d.]+) ms in Python, inst", said)
    assert found and float(found[1]) < float(found[2])


def test_where_it_does_not_pay_the_plan_stays_and_says_so(calibrated):
    machine = calibrated(replace(H200, cpu_reads={"bfloat16": ((2, 2e9, 40e9),)}))
    ask = {"max_memory": {0: "3GiB", **RAM}, "dtype": "bfloat16", "hardware": machine, "overhead": 0, "context": 512}
    without, found = plan(LLAMA, **ask), plan(LLAMA, on_cpu=True, **ask)
    assert found == without and "The CPU would not help: with 2 threads it reads 2.00 GB of bfloat16" in found.explain()
    nf4 = plan(LLAMA, on_cpu=True, **ask, quantization="nf4")
    assert nf4.on_cpu is None


def test_nothing_is_guessed():
    with pytest.raises(ValueError, match=r"call bigkit.calibrate\(\) here"):
        plan("gpt2", {0: "100MiB", "cpu": "1GiB"}, on_cpu=True, hardware="L4")
    assert not any("CPU" in note for note in advise(zoo.describe(LLAMA), "L4").notes)


def test_of_eight_links_that_share_the_ram_one_alone_is_faster_than_an_eighth():
    eight = Calibration("a", link_pinned=55e9, links=(25e9,) * 8, cpu_reads={"bfloat16": ((8, 40e9, 200e9),)})
    rates = [readings_of(eight, "bfloat16", gpus)[0].links for gpus in (1, 2, 4, 8)]
    assert rates == [55e9, 110e9, 200e9, 200e9]
    assert readings_of(replace(eight, link_pinned=None), "bfloat16", 2)[0].links == 50e9
