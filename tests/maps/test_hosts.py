"""A model cut over hosts: against every other cut, with what each host can hold, and as commands of engines."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigkit import HostsPlan, PlanError, describe, plan, plan_hosts
from bigkit.machine.hardware import Gpu, Hardware
from bigkit.machine.network import Network, network_of, run_stages
from bigkit.machine.roofline import TYPICAL
from bigkit.maps.hosts import chain_of_blocks, part_of, read_hosts
from bigkit.model.activations import working_bytes
from bigkit.model.spec import Precision
from bigkit.units import GB, three_figures

LINE = Network("ideal", 1e12, 0.0)


def host(number: int, memory: float, bandwidth: float, ram: float = 0) -> Hardware:
    gpu = Gpu(f"GPU {number}", int(memory * GB), bandwidth * GB, 1e14, 20 * GB)
    return Hardware(f"host {number}", (gpu,), int(ram * GB), 0)


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(2, 9), st.sampled_from([100, 300, 1000])), min_size=2, max_size=3),
    st.sampled_from([1, 8]),
)
def test_no_other_cut_has_a_faster_slowest_stage(machines: list[tuple[int, int]], batch: int) -> None:
    """Every way to cut gpt2-xl's 48 blocks, with all weights on GPUs."""
    spec = describe("gpt2-xl")
    hosts = [host(i, memory, bandwidth) for i, (memory, bandwidth) in enumerate(machines)]
    ask = {"dtype": "float32", "batch": batch, "context": 512, "overhead": 0}
    units = chain_of_blocks(spec)
    precision = Precision("float32")
    kv = batch * 512 * 2 * 1600 * 4
    needs = [sum(layer.bytes(precision) for layer in unit) + kv for unit in units]
    working = working_bytes(spec, Precision("float32"), batch, 512)
    room = [own.gpus[0].memory - working for own in hosts]

    def slowest(ends: tuple[int, ...], spare: int = 0) -> float:
        loads = [sum(needs[a:b]) for a, b in zip((0, *ends), (*ends, 48))]
        if any(load > size - spare for load, size in zip(loads, room)):
            return float("inf")
        counts = [b - a for a, b in zip((0, *ends), (*ends, 48))]
        reading = [load / (TYPICAL.bandwidth * own.gpus[0].bandwidth) for load, own in zip(loads, hosts)]
        return max(*reading, max(counts) * 130 * TYPICAL.issue)

    cuts = [ends for n in [len(hosts) - 1] for ends in combinations(range(49), n)]
    cuts += [(k, k) for k in range(49)] if len(hosts) == 3 else []
    best = min(slowest(ends, spare=10**6) for ends in cuts)  # each host has the last norm, too
    try:
        found = plan_hosts(spec, hosts, LINE, **ask)
    except PlanError:
        assert best == float("inf")
        return
    blocks = {stage.host: stage.blocks for stage in found.stages}
    ends, done = [], 0
    for own in hosts[:-1]:
        done += blocks.get(own.name, 0)
        ends.append(done)
    assert slowest(tuple(ends)) <= best * 1.0001


def test_each_stage_is_an_ordinary_plan() -> None:
    spec = describe("llama-2-7b")
    found = plan_hosts(spec, ["RTX 4090", "RTX 3090", "L4"], dtype="float16", batch=4, context=1024)
    names = [name for stage in found.stages for name in stage.names]
    assert names == [layer.name for unit in chain_of_blocks(spec) for layer in unit]
    assert sum(stage.blocks for stage in found.stages) == 32
    whole = plan(spec, {0: "99GiB"}, dtype="float16", batch=4, context=1024)
    kept = spec.root.children["model"].children
    shared = kept["norm"].bytes(Precision("float16")) + kept["rotary_emb"].bytes(Precision("float16"))
    shares = [stage.plan.shares[0] for stage in found.stages]
    assert sum(share.weights - shared for share in shares) + shared == whole.shares[0].weights
    assert sum(share.kv_cache for share in shares) == whole.shares[0].kv_cache, "each stage holds its own blocks' cache"
    assert [stage.plan.device_map for stage in found.stages] == [{"": 0}] * 3
    blocks = [stage.blocks for stage in found.stages]
    assert abs(blocks[0] - blocks[1]) <= 1 and blocks[2] < 10, "an L4 reads slower, the others wait for Python"
    assert HostsPlan.from_json(found.to_json()) == found
    with pytest.raises(ValueError, match="this is not the JSON of a bigkit HostsPlan"):
        HostsPlan.from_json("{}")


def test_ends_of_a_tied_model_are_counted_on_both_hosts() -> None:
    spec = describe("gpt2")
    found = plan_hosts(spec, [host(i, 1, 500) for i in range(2)], overhead=0)
    table = 50257 * 768 * 4
    assert found.stages[0].plan.shares[0].weights > table and found.stages[1].plan.shares[0].weights > table
    last = part_of(spec, found.stages[1].names)
    assert last.ties == () and last.facts["has_head"] and not part_of(spec, found.stages[0].names).facts["has_head"]


def test_what_no_gpu_holds_rests_in_the_ram_of_its_host() -> None:
    found = plan_hosts(describe("gpt2-xl"), [host(0, 2, 500, 8), host(1, 2, 500, 8)], LINE, overhead=0)
    away = [{share.device: share.weights for share in stage.plan.shares}["cpu"] for stage in found.stages]
    assert all(size > 5e8 for size in away)
    seconds = [stage.seconds for stage in found.stages]
    assert max(seconds) < 1.25 * min(seconds), "what travels counts for the cut too"
    with pytest.raises(PlanError, match="on host 1, .*lacks"):
        plan_hosts(describe("gpt2-xl"), [host(0, 2, 500), host(1, 2, 500)], LINE, overhead=0)


def test_a_host_that_only_delays_is_left_out() -> None:
    slow = Hardware("old laptop", (), 4 * 10**9, 10**9, ram_rate=0.01 * GB)
    found = plan_hosts(describe("gpt2"), [host(0, 8, 1000), slow], overhead=0)
    assert found.left_out == ("old laptop",) and found.groups == 1
    assert "'old laptop' would hold nothing" in found.explain()


def test_equal_hosts_all_get_a_block() -> None:
    hosts = [host(i, 8, 1000) for i in range(5)]
    blocks = [stage.blocks for stage in plan_hosts(describe("gpt2"), hosts, overhead=0).stages]
    assert len(blocks) == 5 and max(blocks) == 3, "12 blocks: two hosts more make nothing faster, and hold less each"
    filled = plan_hosts(describe("gpt2"), hosts, strategy="sequential", overhead=0)
    assert [stage.blocks for stage in filled.stages] == [12] and len(filled.left_out) == 4


def test_the_plan_in_words_and_as_commands() -> None:
    text = plan_hosts(describe("llama-2-7b"), ["2 x RTX 4090", "RTX 3090"], "wlan", dtype="float16").explain()
    assert "line WLAN (47.68 MiB/s, 2.00 ms)" in text
    assert "process 1 on 1 x RTX 3090" in text and "One sequence: " in text
    assert "bigkit launch --num_machines 2 --num_processes 2 --machine_rank K --main_process_ip HOST0" in text
    assert "VLLM_PP_LAYER_PARTITION=" in text and "SGLANG_PP_LAYER_PARTITION=" in text and "--rpc HOST0:50052" in text
    counts = [int(count) for count in text.partition(" -ts ")[2].split()[0].split(",")]
    assert counts[0] + counts[1] == counts[2] == 16, "two GPUs of one host work one after the other"
    for wrong, said in (({"network": "10G"}, "unknown network '10G'"), ({"strategy": "best"}, "unknown strategy")):
        with pytest.raises(ValueError, match=said):
            plan_hosts(describe("gpt2"), ["L4"], **wrong)
    with pytest.raises(ValueError, match="4 chains of blocks"):
        plan_hosts(describe("resnet50"), ["L4"])


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=4), st.floats(0, 0.1), st.integers(1, 5))
def test_groups_in_turn(stages: list[float], latency: float, groups: int) -> None:
    """A round takes as long as the slowest stage for all groups, or as one group's way through all stages."""
    line = Network("line", 1e9, latency)
    way = sum(stages) + len(stages) * latency * (len(stages) > 1)
    seconds, spans = run_stages(stages, line, 0, groups, tokens=40)
    bound = max(groups * max(stages), way)
    assert seconds == pytest.approx(bound, abs=2e-6)
    for lane in {span.lane for span in spans}:
        own = [span for span in spans if span.lane == lane]
        assert all(a.end <= b.start + 1e-9 for a, b in zip(own, own[1:])), "a lane does one thing at a time"


def test_processes_of_one_host_get_gpus_of_their_own() -> None:
    from bigkit.hosts import _on_own_gpus

    found = plan_hosts(describe("llama-2-7b"), ["2 x T4", "L4", "T4"], dtype="float16", overhead=0)
    used = [{*_on_own_gpus(found, rank, local).values()} for rank, local in ((0, 0), (1, 1), (2, 2), (2, 0))]
    assert used == [{0, 1}, {2}, {3}, {0}]


def test_layers_that_are_split_instead() -> None:
    """n GPUs read n times as fast, and meet twice in each block; the line counts then."""
    pair = [host(i, 24, 1000) for i in range(2)]
    fast, slow = (plan_hosts(describe("llama-2-7b"), pair, Network("a", 1e12, lag), dtype="float16", overhead=0)
                  for lag in (0.0, 1e-3))  # fmt: skip
    assert fast.split and slow.split
    assert 1 / slow.split - 1 / fast.split == pytest.approx(2 * 32 * 2 * 1e-3, rel=1e-3)
    assert slow.split < slow.one, "one message a token, not 128"
    assert 'tp_plan="auto"' in fast.explain() and f"{three_figures(fast.split)} tokens/s" in fast.explain()
    tight = plan_hosts(describe("llama-2-7b"), [host(0, 24, 1000), host(1, 4, 1000)], LINE, dtype="float16", overhead=0)
    assert tight.split is None and "tp_plan" not in tight.explain(), "half of it does not fit on 4 GB"
    assert HostsPlan.from_json(fast.to_json()) == fast


def test_one_sequence_reads_its_own_cache_only() -> None:
    pair = [host(i, 80, 1000) for i in range(2)]
    ask = {"dtype": "float16", "context": 4096, "overhead": 0}
    alone = plan_hosts(describe("llama-2-7b"), pair, LINE, **ask)
    many = plan_hosts(describe("llama-2-7b"), pair, LINE, batch=16, **ask)
    assert many.one == pytest.approx(alone.one, rel=0.01) and many.each == 8
    stage, cache = many.stages[0], many.stages[0].plan.shares[0].kv_cache
    read = (stage.plan.shares[0].weights + cache / 2) / (TYPICAL.bandwidth * 1e12)
    assert stage.seconds == pytest.approx(read, rel=0.01), "of a group, half of all sequences"


def test_hosts_as_a_text() -> None:
    names = [machine.name for machine in read_hosts(" 4090 | 2 x L4 |")]
    assert names == ["1 x RTX 4090", "2 x L4"]
    assert [machine.name for machine in read_hosts("3 hosts | L4", host(0, 8, 100))] == ["host 0"] * 3 + ["1 x L4"]
    for wrong in ("", " | ", []):
        with pytest.raises(ValueError, match="hosts is empty: name at least one machine"):
            read_hosts(wrong)


def test_networks_by_name() -> None:
    assert network_of("RDMA 100g").bandwidth == 0.9 * 12.5e9
    assert network_of(LINE) is LINE
